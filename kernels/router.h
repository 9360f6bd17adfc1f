// Routing of one token (docs/model.md section 5), one text for a thread of a CPU and a warp of a GPU. Plain f32 code without
// vectors: the same bits for every instruction set of one architecture, and no libm, whose expf differs between machines.
#pragma once

#include "kernels/elementary.h"
#include "kernels/kernels.h"

namespace deepcalm::router {

// Who computes: lane() of count() lanes in step, which see each other's writes after sync(). max() is the largest v, best()
// the largest v and of equal ones the lowest index (negative: none), of all lanes. A GPU's are in kernels/cuda/ffn.cuh.
struct OneLane {
    static constexpr int lane() { return 0; }
    static constexpr int count() { return 1; }
    static constexpr void sync() {}
    static constexpr float max(float v) { return v; }
    static constexpr void best(float&, int&) {}
};

inline constexpr float kInf = __builtin_inff();

// exp(x), every product and sum rounded.
DC_SHARED float exp_neg(float x) {
    return deepcalm::exp_neg(x, [](float a, float b, float c) { return a * b + c; });
}
DC_SHARED float sigmoid(float z) {
    const float e = exp_neg(z > 0 ? -z : z);
    return z > 0 ? 1.0F / (1.0F + e) : e / (1.0F + e);
}
template <class Lanes> DC_SHARED void softmax(const float* z, float* p, int n, const Lanes& lanes) {
    float top = -kInf;
    for (int e = lanes.lane(); e < n; e += lanes.count()) top = z[e] > top ? z[e] : top;
    top = lanes.max(top);
    for (int e = lanes.lane(); e < n; e += lanes.count()) p[e] = exp_neg(z[e] - top);
    lanes.sync();
    float sum = 0;
    for (int e = 0; e < n; ++e) sum += p[e];
    lanes.sync();
    for (int e = lanes.lane(); e < n; e += lanes.count()) p[e] /= sum;
}

// Candidates that no comparison can rank come last; NaN itself is the mark of a taken one.
DC_SHARED float ranked(float v) { return v == v ? v : -kInf; }

// Index of the largest candidate, the lowest one on ties; marks it as taken. At least one must be left.
template <class Lanes> DC_SHARED int take_best(float* v, int n, const Lanes& lanes) {
    float top = 0;
    int best = -1;
    for (int e = lanes.lane(); e < n; e += lanes.count()) {
        const float x = v[e];
        if (x == x && (best < 0 || x > top)) {
            top = x;
            best = e;
        }
    }
    lanes.best(top, best);
    lanes.sync();
    if (lanes.lane() == 0) v[best] = __builtin_nanf("");
    lanes.sync();
    return best;
}

// Selection value of a group: max (group_limited_greedy) or the sum of the two largest (noaux_tc).
DC_SHARED float group_score(const float* choice, int n, bool top2_sum) {
    float first = -kInf, second = -kInf;
    for (int e = 0; e < n; ++e) {
        if (choice[e] > first) {
            second = first;
            first = choice[e];
        } else if (choice[e] > second) {
            second = choice[e];
        }
    }
    return ranked(top2_sum && n > 1 ? first + second : first);
}

// Leaves the best groups' candidates alone.
template <class Lanes>
DC_SHARED void limit_groups(const RouterArgs& a, float* scores, float* choice, float* groups, const Lanes& lanes) {
    const bool noaux = a.topk_method == TopkMethod::kNoauxTc;
    const int size = a.n_routed_experts / a.n_group;
    for (int g = lanes.lane(); g < a.n_group; g += lanes.count())
        groups[g] = group_score(choice + g * size, size, noaux);
    lanes.sync();
    for (int i = 0; i < a.topk_group; ++i) take_best(groups, a.n_group, lanes);
    for (int g = 0; g < a.n_group; ++g) {
        if (groups[g] != groups[g]) continue;  // taken: the group stays
        for (int e = g * size + lanes.lane(); e < (g + 1) * size; e += lanes.count()) {
            choice[e] = noaux ? -kInf : 0.0F;
            if (!noaux) scores[e] *= 0.0F;  // the weight too, should it be chosen after all; a NaN stays
        }
    }
    lanes.sync();
}

template <class Lanes> DC_SHARED void route(const RouterArgs& a, const Lanes& lanes) {
    const int n = a.n_routed_experts, k = a.num_experts_per_tok;
    float* scores = a.scratch;      // [n] softmax or sigmoid of the logits; the weights come from here
    float* choice = a.scratch + n;  // [n] what the selection ranks: scores + bias; behind it groups [n_group]
    if (a.scoring_func == ScoringFunc::kSoftmax) {
        softmax(a.gate_logits, scores, n, lanes);
    } else {
        for (int e = lanes.lane(); e < n; e += lanes.count()) scores[e] = sigmoid(a.gate_logits[e]);
    }
    for (int e = lanes.lane(); e < n; e += lanes.count())
        choice[e] = ranked(a.bias ? scores[e] + a.bias[e] : scores[e]);
    lanes.sync();
    if (a.topk_method != TopkMethod::kGreedy && a.n_group > 1) limit_groups(a, scores, choice, choice + n, lanes);
    for (int i = 0; i < k; ++i) {
        const int e = take_best(choice, n, lanes);
        if (lanes.lane() != 0) continue;
        int j = i;  // insertion keeps the indices ascending
        for (; j > 0 && a.topk_idx[j - 1] > e; --j) a.topk_idx[j] = a.topk_idx[j - 1];
        a.topk_idx[j] = e;
    }
    lanes.sync();
    float sum = 0;
    for (int i = 0; i < k; ++i) sum += scores[a.topk_idx[i]];
    for (int i = lanes.lane(); i < k; i += lanes.count()) {
        const float w = scores[a.topk_idx[i]];
        a.topk_weight[i] = (a.norm_topk_prob ? w / (sum + 1e-20F) : w) * a.routed_scaling_factor;
    }
    lanes.sync();
}

}  // namespace deepcalm::router
