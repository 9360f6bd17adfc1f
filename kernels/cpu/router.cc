// Routing of one token (docs/model.md section 5). Plain f32 code without vectors: the same bits for every
// instruction set of one architecture, and no libm, whose expf differs between machines.
#include "kernels/elementary.h"
#include "kernels/kernels.h"

#include <bit>

namespace deepcalm {
namespace {

constexpr float kInf = __builtin_inff();

// exp(x) for x <= 0; 0 below -87 (the smallest normal results); NaN stays NaN.
float exp_neg(float x) {
    if (x < -87.0F) return 0.0F;
    const auto splat = [](float c) { return c; };
    const auto fma = [](float a, float b, float c) { return a * b + c; };
    const auto [p, n_biased] = exp_parts(x, splat, fma);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(n_biased) << 23));
}

float sigmoid(float z) {
    const float e = exp_neg(z > 0 ? -z : z);
    return z > 0 ? 1.0F / (1.0F + e) : e / (1.0F + e);
}

void softmax(const float* z, float* p, int n) {
    float top = -kInf;
    for (int e = 0; e < n; ++e) top = z[e] > top ? z[e] : top;
    float sum = 0;
    for (int e = 0; e < n; ++e) {
        p[e] = exp_neg(z[e] - top);
        sum += p[e];
    }
    for (int e = 0; e < n; ++e) p[e] /= sum;
}

// Candidates that no comparison can rank come last; NaN itself is the mark of a taken one.
float ranked(float v) { return v == v ? v : -kInf; }

// Index of the largest candidate, the lowest one on ties; marks it as taken. At least one must be left.
int take_best(float* v, int n) {
    int best = -1;
    for (int e = 0; e < n; ++e)
        if (v[e] == v[e] && (best < 0 || v[e] > v[best])) best = e;
    v[best] = __builtin_nanf("");
    return best;
}

// Selection value of a group: max (group_limited_greedy) or the sum of the two largest (noaux_tc).
float group_score(const float* choice, int n, bool top2_sum) {
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

}  // namespace

void route(const RouterArgs& a) noexcept {
    const int n = a.n_routed_experts, k = a.num_experts_per_tok;
    float* scores = a.scratch;          // [n] softmax or sigmoid of the logits; the weights come from here
    float* choice = a.scratch + n;      // [n] what the selection ranks: scores + bias
    float* groups = a.scratch + 2 * n;  // [n_group]
    if (a.scoring_func == ScoringFunc::kSoftmax) {
        softmax(a.gate_logits, scores, n);
    } else {
        for (int e = 0; e < n; ++e) scores[e] = sigmoid(a.gate_logits[e]);
    }
    for (int e = 0; e < n; ++e) choice[e] = ranked(a.bias ? scores[e] + a.bias[e] : scores[e]);

    if (a.topk_method != TopkMethod::kGreedy && a.n_group > 1) {
        const bool noaux = a.topk_method == TopkMethod::kNoauxTc;
        const int size = n / a.n_group;
        for (int g = 0; g < a.n_group; ++g) groups[g] = group_score(choice + g * size, size, noaux);
        for (int i = 0; i < a.topk_group; ++i) take_best(groups, a.n_group);
        for (int g = 0; g < a.n_group; ++g) {
            if (groups[g] != groups[g]) continue;  // taken: the group stays
            for (int e = g * size; e < (g + 1) * size; ++e) {
                choice[e] = noaux ? -kInf : 0.0F;
                if (!noaux) scores[e] *= 0.0F;  // the weight too, should it be chosen after all; a NaN stays
            }
        }
    }

    for (int i = 0; i < k; ++i) {  // insertion keeps the indices ascending
        const int e = take_best(choice, n);
        int j = i;
        for (; j > 0 && a.topk_idx[j - 1] > e; --j) a.topk_idx[j] = a.topk_idx[j - 1];
        a.topk_idx[j] = e;
    }
    float sum = 0;
    for (int i = 0; i < k; ++i) sum += scores[a.topk_idx[i]];
    for (int i = 0; i < k; ++i) {
        const float w = scores[a.topk_idx[i]];
        a.topk_weight[i] = (a.norm_topk_prob ? w / (sum + 1e-20F) : w) * a.routed_scaling_factor;
    }
}

}  // namespace deepcalm
