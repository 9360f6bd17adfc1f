// The stages (stages.h says what each computes). Section by section: shared parts, attention side, FFN side, head.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/moe.cuh"

namespace deepcalm::gpu {

// --- shared parts ---------------------------------------------------------------------------------------------------

struct Range {
    int begin, end;
};
DC_DEVICE Range deal(int n, int block, int n_blocks) {
    return {static_cast<int>(int64_t{n} * block / n_blocks), static_cast<int>(int64_t{n} * (block + 1) / n_blocks)};
}
DC_DEVICE int live_rows(const Rows& r) { return r.n_live ? min_int(r.n, *r.n_live) : r.n; }
struct NoWait {
    DC_DEVICE void operator()() const {}
};

// inv[run * stride + j] = 1 / sqrt(mean square of run `run` of row j + eps). Eight warps' worth of partial sums per run, in
// order, whatever the block: x(j) points at row j. Ends with a barrier; partial: [rows * runs * 8] f32.
template <class X>
DC_DEVICE void rms_rows(int rows, int runs, int width, float eps, float* partial, float* inv, int stride, X&& x) {
    constexpr int kParts = 8;
    const int lane = rt::lane();
    for (int u = rt::warp(); u < rows * runs * kParts; u += rt::warps()) {
        const int part = u % kParts, run = u / kParts % runs, j = u / kParts / runs;
        const float* row = x(j) + int64_t{run} * width;
        float sum = 0;
        for (int c = 4 * (part * 32 + lane); c < width; c += 4 * 32 * kParts) {
            const Quad v = load4(row + c, width - c);
            for (int i = 0; i < 4; ++i) sum = rt::fma(v.v[i], v.v[i], sum);
        }
        for (int m = 16; m > 0; m /= 2) sum += rt::shfl_xor(sum, m);
        if (lane == 0) partial[u] = sum;
    }
    rt::sync_block();
    for (int u = rt::thread(); u < rows * runs; u += rt::threads()) {
        float sum = 0;
        for (int p = 0; p < kParts; ++p) sum += partial[u * kParts + p];
        inv[u % runs * stride + u / runs] = 1.0F / rt::sqrt(sum / static_cast<float>(width) + eps);
    }
    rt::sync_block();
}

// Four columns from `col` of a row under the norm; inv: of the row, runs `stride` apart.
DC_DEVICE Quad normed(const Norm& norm, const float* row, int col, int cols, const float* inv, int stride) {
    Quad v = load4(row + col, cols - col);
    if (!norm.w || col >= cols) return v;
    for (int i = 0; i < 4; ++i) {
        const int c = col + i;
        if (c >= cols) break;
        const bool second = c >= norm.width;
        const float w = second ? norm.w2[c - norm.width] : norm.w[c];
        v.v[i] = w * (v.v[i] * inv[second ? stride : 0]);
    }
    return v;
}

// norm.out: blocks deal the rows. Every thread; scratch as rms_rows wants it for one row.
DC_DEVICE void write_normed(const Norm& norm, const View<const float>& x, int cols, int rows, int block, int n_blocks,
                            const ProductSmem& s) {
    if (!norm.out.data || !norm.w) return;
    const int runs = norm.w2 ? 2 : 1;
    for (int i = block; i < rows; i += n_blocks) {
        const float* row = x.row(i);
        rms_rows(1, runs, norm.width, norm.eps, s.sum, s.inv, 1, [&](int) { return row; });
        for (int c = 4 * rt::thread(); c < cols; c += 4 * rt::threads()) {
            const Quad v = normed(norm, row, c, cols, s.inv, 1);
            for (int k = 0; k < 4 && c + k < cols; ++k) norm.out.row(i)[c + k] = v.v[k];
        }
        rt::sync_block();
    }
}

// A plan of stage args `a` that multiplies `w` in `units` units a problem.
template <class P, class A> DC_DEVICE P plan_of(const A& a, const Matrix& w, int units) {
    P plan;
    plan.a = &a;
    plan.pass = a.rows;
    plan.units_per_problem = units;
    plan.n_pieces = segments(w);
    plan.act_bytes = act_stride(act_of(w.format));
    return plan;
}

// A plan whose activations are rows of x, normed or not.
template <int NB> struct RowsPlan : Plan {
    View<const float> x;
    int cols = 0;
    const Norm* norm = nullptr;  // null: none
    const float* inv = nullptr;
    DC_DEVICE void read(const View<const float>& rows, int n_cols, const Norm* n) {
        x = rows;
        cols = n_cols;
        norm = n;
    }
    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem& s) {
        inv = s.inv;
        if (!norm || !norm->w) return;
        rms_rows(rows, norm->w2 ? 2 : 1, norm->width, norm->eps, s.sum, s.inv, NB * kBlockRows,
                 [&](int j) { return x.row(g.row0 + j); });
    }
    DC_DEVICE Quad row_quad(int64_t row, int j, int col) const {
        if (!norm) return load4(x.row(row) + col, cols - col);
        return normed(*norm, x.row(row), col, cols, inv + j, NB * kBlockRows);
    }
};

// silu through exp(-|x|), so neither side overflows.
DC_DEVICE float swiglu(float gate, float up) {
    const float e = exp_neg(gate < 0 ? gate : -gate);
    return gate * (gate < 0 ? e : 1.0F) / (1.0F + e) * up;
}

// --- embed ----------------------------------------------------------------------------------------------------------

template <int NB, class Wait>
DC_DEVICE void stage_embed(const EmbedArgs& a, int block, int n_blocks, const Smem&, Wait wait) {
    wait();
    const int n = live_rows(a.rows);
    for (int i = block; i < n; i += n_blocks) {
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
            a.x.row(i)[c] = v;
            if (a.hidden.data) a.x.row(i)[a.d + c] = a.hidden.row(i)[c];
        }
    }
}

// --- product: qkv_a, q_b, o_proj, eh_proj ---------------------------------------------------------------------------

template <int NB> struct ProductPlan : RowsPlan<NB> {
    const ProductArgs* a = nullptr;
    DC_DEVICE Piece piece(int, int p) const { return segment(a->w, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o >= a->w.rows) return;
        if (a->tap.data) a->tap.row(row)[o] = v;
        float* y = a->y.row(row) + o;
        *y = a->add ? *y + v : v;
    }
};

template <int NB, class Wait>
DC_DEVICE void stage_product(const ProductArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    auto plan = plan_of<ProductPlan<NB>>(a, a.w, a.w.row_tiles);
    plan.read(a.x, a.w.cols, &a.norm);
    const Range u = deal(a.w.row_tiles, block, n_blocks);
    run<NB>(plan, u.begin, u.end, s, wait);
    write_normed(a.norm, a.x, a.w.cols, live_rows(a.rows), block, n_blocks, s);
}

// --- absorb: W_UK, rope, cache write --------------------------------------------------------------------------------

template <int NB> struct AbsorbPlan : Plan {
    const AbsorbArgs* a = nullptr;
    DC_DEVICE int act_id(int head) const { return head; }
    DC_DEVICE Piece piece(int head, int p) const { return segment(a->w_uk, head, p); }
    DC_DEVICE Quad get(int head, int row, int, int p, int col) const {
        const int c = p * kSegment + col;
        return load4(a->q.row(row) + int64_t{head} * (a->dn + a->dr) + c, a->dn - c);
    }
    DC_DEVICE void finish(int head, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->r) a->q_full[(int64_t{row} * a->n_heads + head) * (a->c_pad + a->r_pad) + o] = v;
    }
};

// Component i of v [dr] rotated half-split: (a, b) -> (a cos - b sin, a sin + b cos).
DC_DEVICE float rotated(const float* v, const float* cos, const float* sin, int dr, int i) {
    const int half = dr / 2;
    if (i < half) return v[i] * cos[i] - v[half + i] * sin[i];
    return v[i - half] * sin[i - half] + v[i] * cos[i - half];
}

template <int NB, class Wait>
DC_DEVICE void stage_absorb(const AbsorbArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    auto plan = plan_of<AbsorbPlan<NB>>(a, a.w_uk, a.w_uk.row_tiles);
    const Range u = deal(a.n_heads * a.w_uk.row_tiles, block, n_blocks);
    run<NB>(plan, u.begin, u.end, s, wait);

    const int n = live_rows(a.rows), pos = *a.rows.pos, width = a.c_pad + a.r_pad, half = a.dr / 2, dqk = a.dn + a.dr;
    // everything of q_full but the product: rotated q, zeros in the pads
    const int rest = width - a.r;
    for (int64_t e = int64_t{block} * rt::threads() + rt::thread(); e < int64_t{n} * a.n_heads * rest;
         e += int64_t{n_blocks} * rt::threads()) {
        const int i = a.r + static_cast<int>(e % rest), k = i - a.c_pad;
        const int64_t row_head = e / rest, row = row_head / a.n_heads, head = row_head % a.n_heads;
        const float* q = a.q.row(row) + head * dqk + a.dn;
        const int64_t at = min_int(pos + static_cast<int>(row), a.ctx - 1);
        const float v = k >= 0 && k < a.dr ? rotated(q, a.cos + at * half, a.sin + at * half, a.dr, k) : 0.0F;
        a.q_full[row_head * width + i] = v;
        if (a.q_tap.data && k >= 0 && k < a.dr) a.q_tap.row(row)[head * dqk + a.dn + k] = v;
    }
    if (a.q_tap.data)
        for (int64_t e = int64_t{block} * rt::threads() + rt::thread(); e < int64_t{n} * a.n_heads * a.dn;
             e += int64_t{n_blocks} * rt::threads()) {
            const int64_t row = e / a.dn / a.n_heads, i = e / a.dn % a.n_heads * dqk + e % a.dn;
            a.q_tap.row(row)[i] = a.q.row(row)[i];
        }
    for (int i = block; i < n && pos + i < a.ctx; i += n_blocks) {
        const float* kv = a.kv.row(i);
        rms_rows(1, 1, a.r, a.eps, s.sum, s.inv, 1, [&](int) { return kv; });
        const float *cos = a.cos + int64_t{pos + i} * half, *sin = a.sin + int64_t{pos + i} * half;
        const auto value = [&](int c) {
            if (c < a.c_pad) return c < a.r ? a.kv_norm[c] * (kv[c] * s.inv[0]) : 0.0F;
            return c - a.c_pad < a.dr ? rotated(kv + a.r, cos, sin, a.dr, c - a.c_pad) : 0.0F;
        };
        cache_write(a.type, a.cache + (pos + i) * a.row_bytes, a.c_pad, a.r_pad, value);
        if (a.c_tap.data)
            for (int c = rt::thread(); c < a.r; c += rt::threads()) a.c_tap.row(i)[c] = value(c);
        if (a.k_tap.data)
            for (int c = rt::thread(); c < a.dr; c += rt::threads()) a.k_tap.row(i)[c] = value(a.c_pad + c);
        rt::sync_block();
    }
}

// --- attend, value --------------------------------------------------------------------------------------------------

template <int NB, class Wait>
DC_DEVICE void stage_attend(const AttendArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const AttendSmem s = carve_attend(smem, a);
    rt::copy_open(s.bar + rt::warp());
    wait();
    const int n = live_rows(a.rows), groups = ceil_to(a.n_heads, kHeadRows);
    const int units = n > 0 ? ceil_to(row_end(a.rows, n - 1, a.ctx), kChunk * a.unit_chunks) : 0;  // of the longest row
    int phase = 0;
    for (int64_t u = block; u < int64_t{units} * n * groups; u += n_blocks)
        attend_unit(a, s, static_cast<int>(u / groups % n), static_cast<int>(u % groups),
                    static_cast<int>(u / groups / n), phase);
    rt::copy_close(s.bar + rt::warp());
}

struct ValuePlan : Plan {
    const ValueArgs* a = nullptr;
    float* factor = nullptr;  // [max_rows][factors][2]: of the chunks, from `partials` on of the partials
    float* total = nullptr;   // [max_rows] sum of probabilities
    float* latent = nullptr;  // [max_rows][c_pad]
    int factors = 0, partials = 0;
    DC_DEVICE int act_id(int head) const { return head; }
    DC_DEVICE Piece piece(int head, int p) const { return segment(a->w_uv, head, p); }
    DC_DEVICE Quad get(int, int, int j, int p, int col) const {
        const int c = p * kSegment + col;
        return load4(latent + j * a->c_pad + c, a->w_uv.cols - c);
    }
    DC_DEVICE void finish(int head, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->dv) a->v.row(row)[int64_t{head} * a->dv + o] = v;
    }

    // Factors of row j (this warp's): (a, b) of every chunk inside its partial, then of every partial.
    DC_DEVICE void merge_factors(int row, int j, int head) const {
        const int lane = rt::lane(), end = row_end(a->rows, row, a->ctx);
        const int units = ceil_to(end, kChunk * a->unit_chunks), n_partials = ceil_to(end, kChunk * kPartialChunks);
        float* f = factor + 2 * j * factors;
        const int64_t slot = int64_t{row} * a->max_units * a->n_heads + head;
        float m = 0, l = 0;
        for (int p = 0; p < n_partials; ++p) {
            float m1, l1;
            if (a->unit_chunks > 1) {
                const float* ml = a->part_ml + 2 * (slot + int64_t{p} * a->n_heads);
                m1 = ml[0];
                l1 = ml[1];
            } else {
                const int u = p * kPartialChunks + lane, n = min_int(kPartialChunks, units - p * kPartialChunks);
                const float* ml = a->part_ml + 2 * (slot + int64_t{lane < n ? u : p * kPartialChunks} * a->n_heads);
                const float mine = ml[0], sum = ml[1];
                float top = mine;  // running maximum up to this chunk
                for (int k = 1; k < kPartialChunks; k *= 2) {
                    const float other = rt::shfl(top, lane - k < 0 ? lane : lane - k);
                    if (lane >= k && other > top) top = other;
                }
                const float before = rt::shfl(top, lane > 0 ? lane - 1 : 0);
                const float fa = lane == 0 ? 0.0F : exp_neg(before - top), fb = lane == 0 ? 1.0F : exp_neg(mine - top);
                if (lane < n) {
                    f[2 * u] = fa;
                    f[2 * u + 1] = fb;
                }
                m1 = rt::shfl(top, n - 1);
                l1 = rt::shfl(sum, 0);
                for (int k = 1; k < n; ++k) l1 = rt::fma(rt::shfl(sum, k), rt::shfl(fb, k), l1 * rt::shfl(fa, k));
            }
            const Merge r = p == 0 ? Merge{m1, l1, 0, 1} : merge_stats(m, l, m1, l1);
            m = r.m;
            l = r.l;
            if (lane == 0) {
                f[2 * (partials + p)] = r.a;
                f[2 * (partials + p) + 1] = r.b;
            }
        }
        if (lane == 0) total[j] = l;
    }

    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem&) const {
        for (int j = rt::warp(); j < rows; j += rt::warps()) merge_factors(g.row0 + j, j, g.problem);
        rt::sync_block();
        for (int e = rt::thread(); e < rows * a->c_pad; e += rt::threads()) {
            const int j = e / a->c_pad, c = e % a->c_pad, row = g.row0 + j, end = row_end(a->rows, row, a->ctx);
            const int units = ceil_to(end, kChunk * a->unit_chunks), per = kPartialChunks / a->unit_chunks;
            const float* f = factor + 2 * j * factors;
            const float* o = a->part_o + (int64_t{row} * a->max_units * a->n_heads + g.problem) * a->c_pad + c;
            float v = 0;
            for (int u = 0; u < units;) {
                const int p = u / per, stop = min_int(u + per, units);
                float part = o[int64_t{u} * a->n_heads * a->c_pad];
                for (++u; u < stop; ++u)
                    part = merge_value(part, f[2 * u], o[int64_t{u} * a->n_heads * a->c_pad], f[2 * u + 1]);
                const float* fp = f + 2 * (partials + p);
                v = p == 0 ? part : merge_value(v, fp[0], part, fp[1]);
            }
            latent[e] = v / total[j];
            if (a->latent_tap.data && g.unit == 0 && c < a->w_uv.cols)
                a->latent_tap.row(row)[int64_t{g.problem} * a->w_uv.cols + c] = latent[e];
        }
        rt::sync_block();
    }
};

template <int NB, class Wait>
DC_DEVICE void stage_value(const ValueArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<1>(smem);
    auto plan = plan_of<ValuePlan>(a, a.w_uv, a.w_uv.row_tiles);
    plan.factors = value_factors(a);
    plan.partials = a.unit_chunks == 1 ? a.max_units : 0;
    plan.max_rows = min_int(a.rows.n, smem.fit.value_rows);
    plan.latent = reinterpret_cast<float*>(s.end);
    plan.factor = plan.latent + plan.max_rows * a.c_pad;
    plan.total = plan.factor + 2 * plan.max_rows * plan.factors;
    const Range u = deal(a.n_heads * a.w_uv.row_tiles, block, n_blocks);
    run<1>(plan, u.begin, u.end, s, wait);
}

// --- FFN: shared or dense w1/w3, router, routed experts -------------------------------------------------------------

template <int NB> struct RouterPlan : RowsPlan<NB> {
    const FfnInArgs* a = nullptr;
    DC_DEVICE Piece piece(int, int p) const { return segment(a->router, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->router.rows) a->logits.row(row)[o] = v;
    }
};
template <int NB> struct GateUpPlan : RowsPlan<NB> {
    static constexpr bool kPair = true;
    const FfnInArgs* a = nullptr;
    DC_DEVICE Piece piece(int, int p) const { return segment(a->w_gate_up, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float gate, float up) const {
        const int o = unit * kTileRows + r;
        if (o < a->width) a->h.row(row)[o] = swiglu(gate, up);
    }
};

template <int NB, class Wait>
DC_DEVICE void stage_ffn_in(const FfnInArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    const int routers = a.router.row_tiles, pairs = a.w_gate_up.row_tiles / 2;
    const Range u = deal(routers + pairs, block, n_blocks);
    bool waited = false;
    if (u.begin < routers) {
        auto plan = plan_of<RouterPlan<NB>>(a, a.router, routers);
        plan.read(a.x, a.router.cols, &a.norm);
        run<NB>(plan, u.begin, min_int(u.end, routers), s, wait);
        waited = true;
    }
    if (u.end > routers) {
        auto plan = plan_of<GateUpPlan<NB>>(a, a.w_gate_up, pairs);
        plan.read(a.x, a.w_gate_up.cols, &a.norm);
        run<NB>(plan, u.begin > routers ? u.begin - routers : 0, u.end - routers, s, [&] {
            if (!waited) wait();
            waited = true;
        });
    }
    if (!waited) wait();
    write_normed(a.norm, a.x, a.router.rows > 0 ? a.router.cols : a.w_gate_up.cols, live_rows(a.rows), block, n_blocks,
                 s);
}

template <int NB, class Wait>
DC_DEVICE void stage_route(const RouteArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    wait();
    const Routing& r = a.routing;
    const int n = live_rows(a.rows);
    float* scratch = reinterpret_cast<float*>(smem.at) + rt::warp() * (2 * r.n_experts + r.n_group);
    for (int i = block * rt::warps() + rt::warp(); i < n; i += n_blocks * rt::warps())
        route_row(r, r.logits.row(i), scratch, r.topk_idx + int64_t{i} * r.topk, r.topk_weight + int64_t{i} * r.topk);
}

// Routed experts: a problem is a touched expert. Short passes multiply all rows and keep those that chose the expert;
// longer ones gather its rows.
template <int NB> struct ExpertsPlan : RowsPlan<NB> {
    static constexpr bool kPair = true;
    const ExpertsArgs* a = nullptr;
    Lists lists;
    bool gather = false;
    DC_DEVICE int first_slot(int problem) const { return lists.begin[lists.touched[problem]]; }
    DC_DEVICE int count(int problem) const { return lists.begin[lists.touched[problem] + 1] - first_slot(problem); }
    DC_DEVICE int rows(int problem) const { return gather ? count(problem) : this->pass.n; }
    DC_DEVICE int live(int problem) const { return gather ? count(problem) : this->n_live; }
    DC_DEVICE int act_id(int problem) const { return gather ? problem : 0; }
    DC_DEVICE int source(int problem, int row) const {
        return gather ? lists.pair[first_slot(problem) + row] / a->routing.topk : row;
    }
    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem& s) {
        this->inv = s.inv;
        if (!a->norm.w) return;
        rms_rows(rows, 1, a->norm.width, a->norm.eps, s.sum, s.inv, NB * kBlockRows,
                 [&](int j) { return a->x.row(source(g.problem, g.row0 + j)); });
    }
    DC_DEVICE Piece piece(int problem, int p) const { return segment(a->w, lists.touched[problem], p); }
    DC_DEVICE Quad get(int problem, int row, int j, int p, int col) const {
        return this->row_quad(source(problem, row), j, p * kSegment + col);
    }
    DC_DEVICE void finish(int problem, int unit, int r, int row, float gate, float up) const {
        const int o = unit * kTileRows + r;
        if (o >= a->width) return;
        int slot = first_slot(problem) + row;
        if (!gather) {
            const int end = lists.begin[lists.touched[problem] + 1];
            for (slot = first_slot(problem); slot < end && lists.pair[slot] / a->routing.topk != row;) ++slot;
            if (slot == end) return;
        }
        a->h.row(slot)[o] = swiglu(gate, up);
    }
};

template <int NB, class Wait>
DC_DEVICE void stage_experts(const ExpertsArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    const Routing& r = a.routing;
    const bool route_here = a.rows.n <= kBlockRows;
    wait();
    const int n = live_rows(a.rows);
    const int32_t* idx = r.topk_idx;
    if (route_here) {
        unsigned char* at = s.end + lists_smem(a.rows, r);
        auto* my_idx = reinterpret_cast<int32_t*>(at);
        auto* my_weight = reinterpret_cast<float*>(my_idx + kBlockRows * r.topk);
        float* scratch = reinterpret_cast<float*>(at + align16(8 * int64_t{kBlockRows} * r.topk)) +
                         rt::warp() * (2 * r.n_experts + r.n_group);
        for (int i = rt::warp(); i < n; i += rt::warps())
            route_row(r, r.logits.row(i), scratch, my_idx + i * r.topk, my_weight + i * r.topk);
        rt::sync_block();
        if (block == 0) {
            for (int i = rt::thread(); i < n * r.topk; i += rt::threads()) {
                r.topk_idx[i] = my_idx[i];
                r.topk_weight[i] = my_weight[i];
            }
        }
        idx = my_idx;
    }
    auto plan = plan_of<ExpertsPlan<NB>>(a, a.w, a.w.row_tiles / 2);
    plan.read(a.x, a.w.cols, &a.norm);
    plan.gather = !route_here;
    plan.lists = carve_lists(s.end, r);
    build_lists(plan.lists, idx, n, r.topk, r.n_experts);
    const Range u = deal(*plan.lists.n_touched * plan.units_per_problem, block, n_blocks);
    run<NB>(plan, u.begin, u.end, s, NoWait{});
}

// --- down: w2 of the routed experts, then of the shared ones, then the residual -------------------------------------

// Short passes: one long product per output tile, over the segments of every touched expert and then of the shared ones.
struct DownPlan : Plan {
    const DownArgs* a = nullptr;
    Lists lists;
    int per_expert = 0, n_routed = 0;  // segments of one expert, of all
    int first_y = 0;                   // acc: item of the second sum of output 0
    DC_DEVICE Piece piece(int, int p) const {
        if (p < n_routed) return segment(a->experts, lists.touched[p / per_expert], p % per_expert);
        return segment(a->shared, 0, p - n_routed);
    }
    // Slot of (row, expert of piece p), or -1.
    DC_DEVICE int slot(int p, int row) const {
        const int e = lists.touched[p / per_expert];
        for (int s = lists.begin[e]; s < lists.begin[e + 1]; ++s)
            if (lists.pair[s] / a->routing.topk == row) return s;
        return -1;
    }
    DC_DEVICE Quad get(int, int row, int, int p, int col) const {
        if (p >= n_routed) {
            const int c = (p - n_routed) * kSegment + col;
            return load4(a->shared_h.row(row) + c, a->shared.cols - c);
        }
        const int s = slot(p, row), c = p % per_expert * kSegment + col;
        return load4(a->h.row(s < 0 ? 0 : s) + c, s < 0 ? 0 : a->experts.cols - c);
    }
};
DC_DEVICE void fold(DownPlan& plan, const Group& g, int unit, int r, int j, const float* sum, float* acc, int n_sum) {
    const DownArgs& a = *plan.a;
    const int row = g.row0 + j, o = (g.unit + unit) * kTileRows + r;
    float out = g.first ? 0.0F : acc[unit * n_sum];                 // routed experts so far
    float y = g.first ? 0.0F : acc[(plan.first_y + unit) * n_sum];  // the current expert, or the shared ones
    for (int k = 0; k < g.np; ++k) {
        const int p = g.p0 + k;
        const float v = sum[(unit * g.np + k) * n_sum];
        if (p >= plan.n_routed) {
            y = p == plan.n_routed ? v : y + v;
            continue;
        }
        y = p % plan.per_expert == 0 ? v : y + v;
        if (p % plan.per_expert + 1 < plan.per_expert) continue;
        const int slot = plan.slot(p, row);
        if (slot >= 0) out = rt::fma(a.routing.topk_weight[plan.lists.pair[slot]], y, out);
    }
    if (!g.last) {
        acc[unit * n_sum] = out;
        acc[(plan.first_y + unit) * n_sum] = y;
        return;
    }
    const int rows = a.experts.rows > 0 ? a.experts.rows : a.shared.rows;
    if (o >= rows) return;
    const int64_t at = row * a.x.stride + o;
    if (a.routed && plan.n_routed > 0) a.routed[at] = out;
    if (a.shared.rows > 0) {
        if (a.shared_tap) a.shared_tap[at] = y;
        out = plan.n_routed > 0 ? out + y : y;
    }
    a.x.data[at] += out;
}

// Longer passes: expert after expert over the block's own output tiles, summed in a.routed.
template <int NB> struct GatheredDownPlan : Plan {
    const DownArgs* a = nullptr;
    Lists lists;
    int tile0 = 0;  // the block's first output tile
    DC_DEVICE int first_slot(int problem) const { return lists.begin[lists.touched[problem]]; }
    DC_DEVICE int rows(int problem) const { return lists.begin[lists.touched[problem] + 1] - first_slot(problem); }
    DC_DEVICE int live(int problem) const { return rows(problem); }
    DC_DEVICE int act_id(int problem) const { return problem; }
    DC_DEVICE Piece piece(int problem, int p) const {
        Piece s = segment(a->experts, lists.touched[problem], p);
        s.first_row_tile = tile0;
        return s;
    }
    DC_DEVICE Quad get(int problem, int row, int, int p, int col) const {
        const int c = p * kSegment + col;
        return load4(a->h.row(first_slot(problem) + row) + c, a->experts.cols - c);
    }
    DC_DEVICE void finish(int problem, int unit, int r, int row, float v, float) const {
        const int o = (tile0 + unit) * kTileRows + r;
        if (o >= a->experts.rows) return;
        const int pair = lists.pair[first_slot(problem) + row];
        float* out = a->routed + pair / a->routing.topk * a->x.stride + o;
        *out = rt::fma(a->routing.topk_weight[pair], v, *out);
    }
};
template <int NB> struct SharedDownPlan : RowsPlan<NB> {
    const DownArgs* a = nullptr;
    DC_DEVICE Piece piece(int, int p) const { return segment(a->shared, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o >= a->shared.rows) return;
        const int64_t at = row * a->x.stride + o;
        if (a->shared_tap) a->shared_tap[at] = v;
        a->x.data[at] += a->experts.rows > 0 ? a->routed[at] + v : v;
    }
};

template <int NB, class Wait>
DC_DEVICE void stage_down(const DownArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    const bool moe = a.experts.rows > 0;  // which expert comes first is known after the wait only
    const int tiles = moe ? a.experts.row_tiles : a.shared.row_tiles;
    const Range u = deal(tiles, block, n_blocks);
    if (moe && a.shared.rows > 0 && u.begin < u.end && rt::thread() == 0) {
        const int64_t bytes = int64_t{a.shared.col_tiles} * a.shared.tile_bytes;
        rt::prefetch_l2(a.shared.data + u.begin * bytes, static_cast<uint32_t>((u.end - u.begin) * bytes));
    }
    const auto lists = [&] {
        const Lists l = carve_lists(s.end, a.routing);
        build_lists(l, a.routing.topk_idx, live_rows(a.rows), a.routing.topk, a.routing.n_experts);
        return l;
    };
    if (a.rows.n <= kBlockRows) {
        DownPlan plan;
        plan.a = &a;
        plan.pass = a.rows;
        plan.units_per_problem = tiles;
        plan.max_tiles = plan.first_y = s.items / 2;  // acc holds two sums per output
        if (moe) {
            wait();
            plan.lists = lists();
            plan.per_expert = segments(a.experts);
            plan.n_routed = *plan.lists.n_touched * plan.per_expert;
            plan.act_bytes = act_stride(act_of(a.experts.format));
        }
        plan.n_pieces = plan.n_routed;
        if (a.shared.rows > 0) {
            plan.n_pieces += segments(a.shared);
            const int stride = act_stride(act_of(a.shared.format));
            plan.act_bytes = stride > plan.act_bytes ? stride : plan.act_bytes;
        }
        run<1>(plan, u.begin, plan.n_pieces > 0 ? u.end : u.begin, s, [&] {
            if (!moe) wait();
        });
        return;
    }
    bool waited = false;
    if (moe) {
        wait();
        waited = true;
        const int units = u.end > u.begin ? u.end - u.begin : 1;
        auto plan = plan_of<GatheredDownPlan<NB>>(a, a.experts, units);
        plan.tile0 = u.begin;
        plan.lists = lists();
        const int n = live_rows(a.rows), cols = min_int(u.end * kTileRows, a.experts.rows) - u.begin * kTileRows;
        for (int64_t e = rt::thread(); e < int64_t{n} * (cols > 0 ? cols : 0); e += rt::threads())
            a.routed[e / cols * a.x.stride + u.begin * kTileRows + e % cols] = 0.0F;
        rt::sync_block();
        run<NB>(plan, 0, u.end > u.begin ? *plan.lists.n_touched * units : 0, s, NoWait{});
        if (a.shared.rows == 0) {
            for (int64_t e = rt::thread(); e < int64_t{n} * (cols > 0 ? cols : 0); e += rt::threads()) {
                const int64_t at = e / cols * a.x.stride + u.begin * kTileRows + e % cols;
                a.x.data[at] += a.routed[at];
            }
            return;
        }
    }
    auto plan = plan_of<SharedDownPlan<NB>>(a, a.shared, a.shared.row_tiles);
    plan.read(a.shared_h, a.shared.cols, nullptr);
    run<NB>(plan, u.begin, u.end, s, [&] {
        if (!waited) wait();
    });
}

// --- head -----------------------------------------------------------------------------------------------------------

template <int NB> struct HeadPlan : RowsPlan<NB> {
    const HeadArgs* a = nullptr;
    DC_DEVICE Piece piece(int, int p) const { return segment(a->w, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->w.rows) a->logits.row(row)[o] = v;
    }
};

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

template <int NB, class Wait>
DC_DEVICE void stage_head(const HeadArgs& a, int block, int n_blocks, const Smem& smem, Wait wait) {
    const ProductSmem s = carve<NB>(smem);
    const int n_out = a.rows.n - a.first_row;
    if (n_out <= 0) {
        wait();
        write_normed(a.norm, a.x, a.norm.width, live_rows(a.rows), block, n_blocks, s);
        return;
    }
    auto plan = plan_of<HeadPlan<NB>>(a, a.w, a.w.row_tiles);
    plan.read(a.x.from(a.first_row), a.w.cols, &a.norm);
    plan.pass.n = n_out;
    plan.skip = a.first_row;
    const Range u = deal(a.w.row_tiles, block, n_blocks);
    run<NB>(plan, u.begin, u.end, s, wait);
    const int n = live_rows(a.rows);
    write_normed(a.norm, a.x, a.w.cols, n, block, n_blocks, s);

    const int lane = rt::lane(), lo = u.begin * kTileRows,
              hi = min_int(u.end * kTileRows, min_int(a.n_valid, a.w.rows));
    for (int j = rt::warp(); j < n - a.first_row; j += rt::warps()) {
        float value = minus_inf();
        int32_t id = -1;
        for (int o = lo + lane; o < hi; o += 32) {
            const float v = a.logits.row(j)[o];
            if (v > minus_inf() || v != v) take_better(value, id, v, v == v ? o : -2);
        }
        warp_best(value, id);
        if (lane == 0) {
            a.best_value[int64_t{j} * n_blocks + block] = value;
            a.best_id[int64_t{j} * n_blocks + block] = id;
        }
    }
    rt::sync_block();
    auto* last = reinterpret_cast<unsigned*>(s.inv);
    if (rt::thread() == 0) *last = rt::atomic_add_acq_rel(a.arrived, 1) + 1 == static_cast<unsigned>(n_blocks) ? 1 : 0;
    rt::sync_block();
    if (*last == 0) return;
    for (int j = rt::warp(); j < n - a.first_row; j += rt::warps()) {
        float value = minus_inf();
        int32_t id = -1;
        for (int k = lane; k < n_blocks; k += 32)
            take_better(value, id, a.best_value[int64_t{j} * n_blocks + k], a.best_id[int64_t{j} * n_blocks + k]);
        warp_best(value, id);
        if (lane == 0) a.choice[j] = id < 0 ? -1 : id;
    }
    if (rt::thread() == 0) rt::store_release(a.arrived, 0);
}

}  // namespace deepcalm::gpu
