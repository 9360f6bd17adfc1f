// The stages at both ends of a pass, and the kernel of every stage (args.h says what each computes).
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/ffn.cuh"

namespace deepcalm::gpu {

// --- embed ----------------------------------------------------------------------------------------------------------

template <int NB> DC_DEVICE void stage(const EmbedArgs& a, const Fit&) {
    rt::dependency_wait();
    const int n = live_rows(a.rows);
    for (int i = rt::block(); i < n; i += rt::blocks()) {
        const int32_t id = a.ids[i];
        const bool known = id >= 0 && id < a.vocab;
        for (int c = rt::thread(); c < a.d; c += rt::threads()) {
            const int64_t at = int64_t{known ? id : 0} * a.d + c;
            float v = 0;
            if (known) {
                if (a.format == Format::kF32) {
                    v = reinterpret_cast<const float*>(a.table)[at];
                } else {
                    const uint32_t h = reinterpret_cast<const uint16_t*>(a.table)[at];
                    v = a.format == Format::kBF16 ? bf16_value(h) : rt::f16_value(h);
                }
            }
            a.x.row(i)[c] = v * a.scale;
            if (a.hidden.data) a.x.row(i)[a.d + c] = a.hidden.row(i)[c];
        }
    }
}

// --- product: qkv_a, q_b, o_proj, eh_proj ---------------------------------------------------------------------------

template <int NB> DC_DEVICE void stage(const ProductArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    auto plan = rows_plan<NB>(a.rows, a.w, a.x, &a.norm, a.w.rows, [&](int o, int row, float v, float) {
        if (a.tap.data) a.tap.row(row)[o] = v;
        float* y = a.y.row(row) + o;
        *y = a.add != 0 ? *y + a.add * v : v;
    });
    run<NB>(plan, own_units(a.w.row_tiles), s);
    write_normed(a.norm, a.x, a.w.cols, live_rows(a.rows), s);
}

// --- head -----------------------------------------------------------------------------------------------------------

// The better of two candidates: the larger value, then the lower id; id -1: none, -2: a NaN was seen, which wins.
DC_DEVICE void take_better(float& value, int32_t& id, float other, int32_t other_id) {
    if (id == -2 || other_id == -1) return;
    if (other_id == -2 || id == -1 || other > value || (other == value && other_id < id)) {
        value = other;
        id = other_id;
    }
}
DC_DEVICE void warp_best(float& value, int32_t& id) {
    for (int m = 16; m > 0; m /= 2) {
        const float v = rt::shfl_xor(value, m);
        const int32_t i = rt::shfl_xor(id, m);
        take_better(value, id, v, i);
    }
}

template <int NB> DC_DEVICE void stage(const HeadArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    const int n_out = a.rows.n - a.first_row;
    if (n_out <= 0) {
        rt::dependency_wait();
        write_normed(a.norm, a.x, a.norm.width, live_rows(a.rows), s);
        return;
    }
    auto plan = rows_plan<NB>(a.rows, a.w, a.x.from(a.first_row), &a.norm, a.w.rows,
                              [&](int o, int row, float v, float) { a.logits.row(row)[o] = v * a.scale; });
    plan.pass.n = n_out;
    plan.skip = a.first_row;
    const Units u = own_units(a.w.row_tiles);
    run<NB>(plan, u, s);
    const int n = live_rows(a.rows);
    write_normed(a.norm, a.x, a.w.cols, n, s);

    const int lane = rt::lane(), lo = u.begin * kTileRows,
              hi = min_int(u.end * kTileRows, min_int(a.n_valid, a.w.rows));
    for (int j = rt::warp(); j < n - a.first_row; j += rt::warps()) {
        float value = -router::kInf;
        int32_t id = -1;
        for (int o = lo + lane; o < hi; o += 32) {
            const float v = a.logits.row(j)[o];
            if (v > -router::kInf || v != v) take_better(value, id, v, v == v ? o : -2);
        }
        warp_best(value, id);
        if (lane == 0) {
            a.best_value[int64_t{j} * rt::blocks() + rt::block()] = value;
            a.best_id[int64_t{j} * rt::blocks() + rt::block()] = id;
        }
    }
    rt::sync_block();
    auto* last = reinterpret_cast<unsigned*>(s.inv);
    if (rt::thread() == 0)
        *last = rt::atomic_add_acq_rel(a.arrived, 1) + 1 == static_cast<unsigned>(rt::blocks()) ? 1 : 0;
    rt::sync_block();
    if (*last == 0) return;
    for (int j = rt::warp(); j < n - a.first_row; j += rt::warps()) {
        float value = -router::kInf;
        int32_t id = -1;
        for (int k = lane; k < rt::blocks(); k += 32)
            take_better(value, id, a.best_value[int64_t{j} * rt::blocks() + k],
                        a.best_id[int64_t{j} * rt::blocks() + k]);
        warp_best(value, id);
        if (lane == 0) a.choice[j] = id < 0 ? -1 : id;
    }
    if (rt::thread() == 0) rt::store_release(a.arrived, 0);
}

// --- kernels --------------------------------------------------------------------------------------------------------

// Two blocks of a decode pass fit the registers of an SM. The next kernel may start its prologue as soon as this one has
// blocks to spare. Stages take pointers into args.
template <int NB, class Args>
DC_KERNEL(kThreads, NB == 1 ? 2 : 1)
stage_kernel(const __grid_constant__ Args args, Fit fit) {
    rt::dependency_trigger();
    stage<NB>(args, fit);
}
template <class Args> auto kernel_of(int nb) {
    if constexpr (Args::kStage.every_nb) {
        if (nb > 1) return nb == 2 ? stage_kernel<2, Args> : stage_kernel<kPrefillBlocks, Args>;
    }
    return stage_kernel<1, Args>;
}

// Once per device, before the first launch: every kernel may use all the shared memory that a block can have.
template <class... Args> rt::Error allow_smem(StageList<Args...>, int64_t bytes) {
    rt::Error e = 0;
    for (const int nb : {1, 2, kPrefillBlocks}) ((e = e == 0 ? rt::allow_smem(kernel_of<Args>(nb), bytes) : e), ...);
    return e;
}

}  // namespace deepcalm::gpu
