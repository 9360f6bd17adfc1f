// Token choice from one row of logits. Keyed, not sequential: the token of a position depends on (logits, seed, position)
// alone, so a text is the same whether or not tokens were drafted.
#pragma once

#include "runtime/result.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace deepcalm {

struct SampleParams {
    float temp = 0;   // 0: argmax, ties to the lowest id
    int top_k = 0;    // 0: off; ties at the border to the lowest ids
    float top_p = 1;  // smallest set of most probable tokens with mass >= top_p
    float min_p = 0;  // tokens with p >= min_p * max p
    uint64_t seed = 0;
};

// logits [n_vocab] f32; ids >= n_valid (padding rows of the vocabulary) are never chosen. Filters act on softmax(logits / temp)
// in the order top_k, top_p, min_p; then argmax_v of logits[v] / temp + G(seed, pos, v), G standard Gumbel noise from
// Philox4x32-10. Error (kSession) when a valid logit is NaN or none is finite.
Result<int> sample(const float* logits, int n_vocab, int n_valid, const SampleParams& params, int64_t pos);

// What is said of logits that are not finite, and what to try.
std::string not_finite(const std::string& what);

// Natural logarithms of probabilities at one position, of softmax(logits) over ids < n_valid: temperature 1, before filters, in
// float64, summed in the order of ids.
struct Scores {
    int32_t token = 0;
    double logprob = 0;
    std::vector<std::pair<int32_t, double>> top;  // the n_top most probable ids, best first, ties to the lowest id
};
Scores scores_of(const float* logits, int n_valid, int32_t token, int n_top);

}  // namespace deepcalm
