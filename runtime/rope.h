// Rotary frequencies, YaRN and the softmax scale (docs/model.md 3.4), computed once in double from the configuration.
#pragma once

#include "runtime/config.h"

#include <vector>

namespace deepcalm {

struct Rope {
    std::vector<float> inv_freq;  // [qk_rope_head_dim / 2]
    float magnitude = 1;          // multiplies cos and sin (YaRN attention factor)
    float softmax_scale = 1;      // (dn + dr)^-1/2 * mscale^2, multiplies the whole score
    double query_beta = 0;        // llama_4_scaling_beta
    int original = 1;             // original_max_position_embeddings

    int half() const { return static_cast<int>(inv_freq.size()); }
    // What multiplies the queries of a position: 1 within the original context, 1 + beta ln 2 in as much again, and so on.
    float query_scale(int pos) const;
    // cos and sin of one position, phase in f32 as trained: cos, sin [half].
    void fill(int pos, float* cos, float* sin) const;
};

Rope make_rope(const ModelConfig& cfg);

}  // namespace deepcalm
