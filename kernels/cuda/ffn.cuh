// FFN: gate and up, routing, routed experts, down (docs/model.md 5).
#pragma once

#include "kernels/cuda/product.cuh"
#include "kernels/router.h"

namespace deepcalm::gpu {

// The lanes of a warp as kernels/router.h wants them.
struct WarpLanes {
    DC_DEVICE static int lane() { return rt::lane(); }
    DC_DEVICE static int count() { return 32; }
    DC_DEVICE static void sync() { rt::sync_warp(); }
    DC_DEVICE static float max(float v) { return rt::max_lanes(v); }
    DC_DEVICE static void best(float& v, int& index) {
        for (int m = 16; m > 0; m /= 2) {
            const float other = rt::shfl_xor(v, m);
            const int i = rt::shfl_xor(index, m);
            if (i >= 0 && (index < 0 || other > v || (other == v && i < index))) {
                v = other;
                index = i;
            }
        }
    }
};
// A warp routes row i into topk_idx, topk_weight [n, topk]; scratch: [warps, Routing::scratch()] f32.
DC_DEVICE void route_row(const Routing& r, int i, float* scratch, int32_t* topk_idx, float* topk_weight) {
    RouterArgs args = r.router;
    args.gate_logits = r.logits.row(i);
    args.scratch = scratch + rt::warp() * r.scratch();
    args.topk_idx = topk_idx + int64_t{i} * r.topk();
    args.topk_weight = topk_weight + int64_t{i} * r.topk();
    router::route(args, WarpLanes{});
}

// The pass's pairs by expert, rows in order inside an expert. Slot s holds pair[s] = row * topk + rank.
struct Lists {
    int32_t* begin;    // [n_experts + 1] first slot of each expert
    int32_t* touched;  // [*n_touched] experts that have pairs, ascending
    int32_t* n_touched;
    uint16_t* pair;  // [n * topk]
    // Of the expert touched[i]: its slots, and the one of a row, or -1.
    DC_DEVICE int first(int i) const { return begin[touched[i]]; }
    DC_DEVICE int count(int i) const { return begin[touched[i] + 1] - first(i); }
    DC_DEVICE int slot(int i, int row, int topk) const {
        for (int s = first(i); s < begin[touched[i] + 1]; ++s)
            if (pair[s] / topk == row) return s;
        return -1;
    }
};
DC_DEVICE Lists carve_lists(unsigned char* smem, const Routing& r) {
    auto* ints = reinterpret_cast<int32_t*>(smem);
    return {ints, ints + r.n_experts() + 1, ints + 2 * r.n_experts() + 1,
            reinterpret_cast<uint16_t*>(smem + align16(4 * (2 * int64_t{r.n_experts()} + 2)))};
}

// Every thread of the block; idx [n_rows, topk] is complete and visible. Ends with a barrier.
DC_DEVICE void build_lists(const Lists& l, const int32_t* idx, int n_rows, int topk, int n_experts) {
    const int n = n_rows * topk, lane = rt::lane();
    for (int e = rt::thread(); e < n_experts; e += rt::threads()) {
        int count = 0;
        for (int i = 0; i < n; ++i) count += idx[i] == e ? 1 : 0;
        l.begin[e] = count;
    }
    rt::sync_block();
    if (rt::warp() == 0) {  // exclusive sums over the experts, a run of them per lane
        const int per = ceil_to(n_experts, 32), lo = min_int(lane * per, n_experts), hi = min_int(lo + per, n_experts);
        int slots = 0, used = 0;
        for (int e = lo; e < hi; ++e) {
            slots += l.begin[e];
            used += l.begin[e] > 0 ? 1 : 0;
        }
        int slot = 0, rank = 0;
        for (int i = 0; i < 32; ++i) {
            const int s = rt::shfl(slots, i), u = rt::shfl(used, i);
            slot += i < lane ? s : 0;
            rank += i < lane ? u : 0;
        }
        for (int e = lo; e < hi; ++e) {
            const int count = l.begin[e];
            l.begin[e] = slot;
            slot += count;
            if (count > 0) l.touched[rank++] = e;
        }
        if (lane == 31) {
            l.begin[n_experts] = slot;
            *l.n_touched = rank;
        }
    }
    rt::sync_block();
    for (int e = rt::thread(); e < n_experts; e += rt::threads()) {
        int slot = l.begin[e];
        if (slot == l.begin[e + 1]) continue;
        for (int i = 0; i < n; ++i)
            if (idx[i] == e) l.pair[slot++] = static_cast<uint16_t>(i);
    }
    rt::sync_block();
}

// --- ffn_in: gate and up of a dense layer or of the shared experts, router logits -------------------------------------

// silu through exp(-|x|), so neither side overflows.
DC_DEVICE float swiglu(float gate, float up) {
    const float e = exp_neg(gate < 0 ? gate : -gate);
    return gate * (gate < 0 ? e : 1.0F) / (1.0F + e) * up;
}

template <int NB> DC_DEVICE void stage(const FfnInArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    const int routers = a.router.row_tiles, pairs = a.w_gate_up.row_tiles / 2;
    const Units u = own_units(routers + pairs);
    const bool routes = u.begin < routers;
    const bool multiplies = u.end > routers;
    if (routes) {
        auto plan = rows_plan<NB>(a.rows, a.router, a.x, &a.norm, a.router.rows,
                                  [&](int o, int row, float v, float) { a.logits.row(row)[o] = v; });
        run<NB>(plan, {u.begin, min_int(u.end, routers)}, s);
    }
    if (multiplies) {
        auto plan =
            rows_plan<NB, true>(a.rows, a.w_gate_up, a.x, &a.norm, a.width,
                                [&](int o, int row, float gate, float up) { a.h.row(row)[o] = swiglu(gate, up); });
        run<NB>(plan, {routes ? 0 : u.begin - routers, u.end - routers}, s, !routes);
    }
    if (!routes && !multiplies) rt::dependency_wait();
    write_normed(a.norm, a.x, a.router.rows > 0 ? a.router.cols : a.w_gate_up.cols, live_rows(a.rows), s);
}

// --- route, experts -------------------------------------------------------------------------------------------------

template <int NB> DC_DEVICE void stage(const RouteArgs& a, const Fit&) {
    rt::dependency_wait();
    const Routing& r = a.routing;
    const int n = live_rows(a.rows);
    auto* scratch = reinterpret_cast<float*>(rt::dynamic_smem());
    for (int i = rt::block() * rt::warps() + rt::warp(); i < n; i += rt::blocks() * rt::warps())
        route_row(r, i, scratch, r.router.topk_idx, r.router.topk_weight);
}

// Routed experts: a problem is a touched expert. Short passes multiply all rows and keep those that chose the expert;
// longer ones gather its rows.
template <int NB> struct ExpertsPlan : NormedPlan<NB> {
    static constexpr bool kPair = true;
    const ExpertsArgs* a;
    Lists lists;
    bool gather;
    DC_DEVICE int rows(int problem) const { return gather ? lists.count(problem) : this->pass.n; }
    DC_DEVICE int live(int problem) const { return gather ? lists.count(problem) : this->n_live; }
    DC_DEVICE int act_id(int problem) const { return gather ? problem : 0; }
    DC_DEVICE int source(int problem, int row) const {
        return gather ? lists.pair[lists.first(problem) + row] / a->routing.topk() : row;
    }
    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem& s) {
        this->start(rows, s, [&](int j) { return source(g.problem, g.row0 + j); });
    }
    DC_DEVICE Piece piece(int problem, int p) const { return segment(a->w, lists.touched[problem], p); }
    DC_DEVICE Quad get(int problem, int row, int j, int p, int col) const {
        return this->row_quad(source(problem, row), j, p * kSegment + col);
    }
    DC_DEVICE void finish(int problem, int unit, int r, int row, float gate, float up) const {
        const int o = unit * kTileRows + r;
        if (o >= a->width) return;
        const int slot = gather ? lists.first(problem) + row : lists.slot(problem, row, a->routing.topk());
        if (slot >= 0) a->h.row(slot)[o] = swiglu(gate, up);
    }
};

template <int NB> DC_DEVICE void stage(const ExpertsArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    const Routing& r = a.routing;
    const bool route_here = a.rows.n <= kBlockRows;
    rt::dependency_wait();
    const int n = live_rows(a.rows);
    const int32_t* idx = r.router.topk_idx;
    if (route_here) {
        unsigned char* at = s.end + r.lists_smem(a.rows);
        auto* my_idx = reinterpret_cast<int32_t*>(at);
        auto* my_weight = reinterpret_cast<float*>(my_idx + kBlockRows * r.topk());
        auto* scratch = reinterpret_cast<float*>(at + align16(8 * int64_t{kBlockRows} * r.topk()));
        for (int i = rt::warp(); i < n; i += rt::warps()) route_row(r, i, scratch, my_idx, my_weight);
        rt::sync_block();
        if (rt::block() == 0) {
            for (int i = rt::thread(); i < n * r.topk(); i += rt::threads()) {
                r.router.topk_idx[i] = my_idx[i];
                r.router.topk_weight[i] = my_weight[i];
            }
        }
        idx = my_idx;
    }
    const Lists lists = carve_lists(s.end, r);
    build_lists(lists, idx, n, r.topk(), r.n_experts());
    const int pairs = a.w.row_tiles / 2;
    ExpertsPlan<NB> plan{{plan_of(a.rows, a.w, pairs), a.x, a.w.cols, &a.norm}, &a, lists, !route_here};
    run<NB>(plan, own_units(*lists.n_touched * pairs), s, false);
}

// --- down: w2 of the routed experts, then of the shared ones, then the residual -------------------------------------

// Short passes: one long product per output tile, over the segments of every touched expert and then of the shared ones.
struct DownPlan : Plan {
    const DownArgs* a;
    Lists lists;
    int per_expert = 0, n_routed = 0;  // segments of one expert, of all
    int first_y = 0;                   // acc: item of the second sum of output 0
    DC_DEVICE Piece piece(int, int p) const {
        if (p < n_routed) return segment(a->experts, lists.touched[p / per_expert], p % per_expert);
        return segment(a->shared, 0, p - n_routed);
    }
    DC_DEVICE int slot(int p, int row) const { return lists.slot(p / per_expert, row, a->routing.topk()); }
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
        if (slot >= 0) out = rt::fma(a.routing.router.topk_weight[plan.lists.pair[slot]], y, out);
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
    a.x.data[at] += a.scale * out;
}

// Longer passes: expert after expert over the block's own output tiles, summed in a.routed.
struct GatheredDownPlan : Plan {
    const DownArgs* a;
    Lists lists;
    int tile0;  // the block's first output tile
    DC_DEVICE int rows(int problem) const { return lists.count(problem); }
    DC_DEVICE int live(int problem) const { return rows(problem); }
    DC_DEVICE int act_id(int problem) const { return problem; }
    DC_DEVICE Piece piece(int problem, int p) const {
        Piece s = segment(a->experts, lists.touched[problem], p);
        s.first_row_tile = tile0;
        return s;
    }
    DC_DEVICE Quad get(int problem, int row, int, int p, int col) const {
        const int c = p * kSegment + col;
        return load4(a->h.row(lists.first(problem) + row) + c, a->experts.cols - c);
    }
    DC_DEVICE void finish(int problem, int unit, int r, int row, float v, float) const {
        const int o = (tile0 + unit) * kTileRows + r;
        if (o >= a->experts.rows) return;
        const int pair = lists.pair[lists.first(problem) + row];
        float* out = a->routed + pair / a->routing.topk() * a->x.stride + o;
        *out = rt::fma(a->routing.router.topk_weight[pair], v, *out);
    }
};

DC_DEVICE Lists lists_of(const DownArgs& a, const ProductSmem& s) {
    const Lists l = carve_lists(s.end, a.routing);
    build_lists(l, a.routing.router.topk_idx, live_rows(a.rows), a.routing.topk(), a.routing.n_experts());
    return l;
}

DC_DEVICE void down_short(const DownArgs& a, const Units& u, const ProductSmem& s) {
    const bool moe = a.experts.rows > 0;  // which expert comes first is known after the wait only
    DownPlan plan;
    plan.a = &a;
    plan.pass = a.rows;
    plan.units_per_problem = a.units();
    plan.max_tiles = plan.first_y = s.items / 2;  // acc holds two sums per output
    if (moe) {
        rt::dependency_wait();
        plan.lists = lists_of(a, s);
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
    run<1>(plan, {u.begin, plan.n_pieces > 0 ? u.end : u.begin}, s, !moe);
}

template <int NB> DC_DEVICE void down_long(const DownArgs& a, const Units& u, const ProductSmem& s) {
    if (a.experts.rows > 0) {
        rt::dependency_wait();
        const int units = u.end > u.begin ? u.end - u.begin : 1;
        GatheredDownPlan plan{plan_of(a.rows, a.experts, units), &a, lists_of(a, s), u.begin};
        const int n = live_rows(a.rows), cols = min_int(u.end * kTileRows, a.experts.rows) - u.begin * kTileRows;
        const auto each = [&](auto&& fn) {  // element of the block's columns
            for (int64_t e = rt::thread(); e < int64_t{n} * (cols > 0 ? cols : 0); e += rt::threads())
                fn(e / cols * a.x.stride + u.begin * kTileRows + e % cols);
        };
        each([&](int64_t at) { a.routed[at] = 0.0F; });
        rt::sync_block();
        run<NB>(plan, {0, u.end > u.begin ? *plan.lists.n_touched * units : 0}, s, false);
        if (a.shared.rows == 0) {
            each([&](int64_t at) { a.x.data[at] += a.scale * a.routed[at]; });
            return;
        }
    }
    auto plan =
        rows_plan<NB>(a.rows, a.shared, a.shared_h, nullptr, a.shared.rows, [&](int o, int row, float v, float) {
            const int64_t at = row * a.x.stride + o;
            if (a.shared_tap) a.shared_tap[at] = v;
            a.x.data[at] += a.scale * (a.experts.rows > 0 ? a.routed[at] + v : v);
        });
    run<NB>(plan, u, s, a.experts.rows == 0);
}

template <int NB> DC_DEVICE void stage(const DownArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    const Units u = own_units(a.experts.rows > 0 ? a.experts.row_tiles : a.shared.row_tiles);
    if (a.experts.rows > 0 && a.shared.rows > 0 && u.begin < u.end && rt::thread() == 0) {
        const int64_t bytes = int64_t{a.shared.col_tiles} * a.shared.tile_bytes;
        rt::prefetch_l2(a.shared.data + u.begin * bytes, static_cast<uint32_t>((u.end - u.begin) * bytes));
    }
    if (a.rows.n <= kBlockRows) {
        down_short(a, u, s);
    } else {
        down_long<NB>(a, u, s);
    }
}

}  // namespace deepcalm::gpu
