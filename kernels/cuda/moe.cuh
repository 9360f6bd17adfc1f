// Routing of a pass, and its (row, expert) pairs grouped by expert.
//
// kernels/cpu/router.cc, operation for operation, so that indices and weights have the same bits: exponentials and
// sigmoids of different experts in different lanes, sums in expert order, ties to the lowest index.
#pragma once

#include "kernels/cuda/product.cuh"

namespace deepcalm::gpu {

// router.cc's exponential: every product and sum rounded, nothing fused.
DC_DEVICE float exp_neg_unfused(float x) {
    if (x < -87.0F) return 0.0F;
    const float n_biased = x * 1.44269504088896341F + 12582912.0F;
    const float n = n_biased - 12582912.0F;
    const float r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
    float p = 1.9875691500e-4F;
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + r + 1.0F;
    return rt::from_bits(rt::bits(p) + (rt::bits(n_biased) << 23));
}
DC_DEVICE float minus_inf() { return rt::from_bits(0xff800000U); }
DC_DEVICE float quiet_nan() { return rt::from_bits(0x7fc00000U); }

// The warp's best of v[0..n): the largest, the lowest index on ties, NaN (taken) never; marks it as taken.
DC_DEVICE int take_best(float* v, int n) {
    float top = 0;
    int best = -1;
    for (int e = rt::lane(); e < n; e += 32) {
        const float x = v[e];
        if (x == x && (best < 0 || x > top)) {
            top = x;
            best = e;
        }
    }
    for (int m = 16; m > 0; m /= 2) {
        const float other = rt::shfl_xor(top, m);
        const int index = rt::shfl_xor(best, m);
        if (index >= 0 && (best < 0 || other > top || (other == top && index < best))) {
            top = other;
            best = index;
        }
    }
    rt::sync_warp();
    if (rt::lane() == 0) v[best] = quiet_nan();
    rt::sync_warp();
    return best;
}

// One warp routes one row. scratch: [2 * n_experts + n_group] of this warp. idx, weight: [topk].
DC_DEVICE void route_row(const Routing& a, const float* logits, float* scratch, int32_t* idx, float* weight) {
    const int n = a.n_experts, k = a.topk, lane = rt::lane();
    float* scores = scratch;
    float* choice = scratch + n;
    float* groups = scratch + 2 * n;
    if (a.scoring_func == ScoringFunc::kSoftmax) {
        float top = minus_inf();
        for (int e = lane; e < n; e += 32) top = logits[e] > top ? logits[e] : top;
        for (int m = 16; m > 0; m /= 2) {
            const float other = rt::shfl_xor(top, m);
            top = other > top ? other : top;
        }
        for (int e = lane; e < n; e += 32) scores[e] = exp_neg_unfused(logits[e] - top);
        rt::sync_warp();
        float sum = 0;
        for (int e = 0; e < n; ++e) sum += scores[e];
        rt::sync_warp();
        for (int e = lane; e < n; e += 32) scores[e] /= sum;
    } else {
        for (int e = lane; e < n; e += 32) {
            const float z = logits[e], p = exp_neg_unfused(z > 0 ? -z : z);
            scores[e] = z > 0 ? 1.0F / (1.0F + p) : p / (1.0F + p);
        }
    }
    for (int e = lane; e < n; e += 32) {
        const float c = a.bias ? scores[e] + a.bias[e] : scores[e];
        choice[e] = c == c ? c : minus_inf();
    }
    rt::sync_warp();
    if (a.topk_method != TopkMethod::kGreedy && a.n_group > 1) {
        const bool noaux = a.topk_method == TopkMethod::kNoauxTc;
        const int size = n / a.n_group;
        for (int g = lane; g < a.n_group; g += 32) {
            float first = minus_inf(), second = minus_inf();
            for (int e = g * size; e < (g + 1) * size; ++e) {
                const float c = choice[e];
                if (c > first) {
                    second = first;
                    first = c;
                } else if (c > second) {
                    second = c;
                }
            }
            const float s = noaux && size > 1 ? first + second : first;
            groups[g] = s == s ? s : minus_inf();
        }
        rt::sync_warp();
        for (int i = 0; i < a.topk_group; ++i) take_best(groups, a.n_group);
        for (int e = lane; e < size * a.n_group; e += 32) {
            if (groups[e / size] != groups[e / size]) continue;  // taken: the group stays
            choice[e] = noaux ? minus_inf() : 0.0F;
            if (!noaux) scores[e] *= 0.0F;
        }
        rt::sync_warp();
    }
    for (int i = 0; i < k; ++i) {
        const int e = take_best(choice, n);
        if (lane == 0) {  // insertion keeps the indices ascending
            int j = i;
            for (; j > 0 && idx[j - 1] > e; --j) idx[j] = idx[j - 1];
            idx[j] = e;
        }
    }
    rt::sync_warp();
    float sum = 0;
    for (int i = 0; i < k; ++i) sum += scores[idx[i]];
    for (int i = lane; i < k; i += 32) {
        const float w = scores[idx[i]];
        weight[i] = (a.norm_topk_prob ? w / (sum + 1e-20F) : w) * a.scale;
    }
    rt::sync_warp();
}

// The pass's pairs by expert, rows in order inside an expert. Slot s holds pair[s] = row * topk + rank.
struct Lists {
    int32_t* begin;    // [n_experts + 1] first slot of each expert
    int32_t* touched;  // [*n_touched] experts that have pairs, ascending
    int32_t* n_touched;
    uint16_t* pair;  // [n * topk]
};
DC_DEVICE Lists carve_lists(unsigned char* smem, const Routing& r) {
    auto* ints = reinterpret_cast<int32_t*>(smem);
    return {ints, ints + r.n_experts + 1, ints + 2 * r.n_experts + 1,
            reinterpret_cast<uint16_t*>(smem + align16(4 * (2 * int64_t{r.n_experts} + 2)))};
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

}  // namespace deepcalm::gpu
