#include "runtime/rope.h"

#include "kernels/elementary.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace deepcalm {
namespace {

double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * log_f64(factor) + 1; }

// The (fractional) rotary pair that turns `rotations` times over the original context.
double correction_dim(const ModelConfig& c, double rotations) {
    return c.qk_rope_head_dim * log_f64(c.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * log_f64(c.rope_theta));
}

}  // namespace

void Rope::fill(int pos, float* cos, float* sin) const {
    for (int j = 0; j < half(); ++j) {
        const SinCos turn = sincos_f32(static_cast<float>(pos) * inv_freq[static_cast<size_t>(j)]);
        cos[j] = turn.cos * magnitude;
        sin[j] = turn.sin * magnitude;
    }
}

float Rope::query_scale(int pos) const {
    return query_beta == 0 ? 1.0F : static_cast<float>(1 + query_beta * log_f64(1 + pos / original));
}

Rope make_rope(const ModelConfig& c) {
    Rope rope;
    rope.query_beta = c.llama_4_scaling_beta;
    rope.original = std::max(c.original_max_position_embeddings, 1);
    const int half = c.qk_rope_head_dim / 2;
    double scale = 1 / std::sqrt(static_cast<double>(c.qk_head_dim()));
    double lo = 0, hi = 0, factor = 1;
    const bool yarn = c.rope_type == RopeType::kYarn;
    if (yarn) {
        factor = c.rope_factor;
        lo = correction_dim(c, c.beta_fast);
        hi = correction_dim(c, c.beta_slow);
        if (c.rope_truncate) {
            lo = std::floor(lo);
            hi = std::ceil(hi);
        }
        lo = std::max(lo, 0.0);
        hi = std::min(hi, c.qk_rope_head_dim - 1.0);
        if (lo == hi) hi += 0.001;
        double magnitude = yarn_mscale(factor, 1);
        if (c.attention_factor != 0) {
            magnitude = c.attention_factor;
        } else if (c.mscale != 0 && c.mscale_all_dim != 0) {
            magnitude = yarn_mscale(factor, c.mscale) / yarn_mscale(factor, c.mscale_all_dim);
        }
        rope.magnitude = static_cast<float>(magnitude);
        if (c.mscale_all_dim != 0)
            scale *= yarn_mscale(factor, c.mscale_all_dim) * yarn_mscale(factor, c.mscale_all_dim);
    }
    if (c.rope_type == RopeType::kLongrope && c.attention_factor != 0)
        rope.magnitude = static_cast<float>(c.attention_factor);
    rope.softmax_scale = static_cast<float>(scale);
    for (int j = 0; j < half; ++j) {
        const double freq = exp_f64(-2.0 * j / c.qk_rope_head_dim * log_f64(c.rope_theta));
        const double ramp = yarn ? std::clamp((j - lo) / (hi - lo), 0.0, 1.0) : 0.0;
        const double slower = c.short_factor.empty() ? 1 : c.short_factor[static_cast<size_t>(j)];
        rope.inv_freq.push_back(static_cast<float>((freq * (1 - ramp) + freq / factor * ramp) / slower));
    }
    return rope;
}

}  // namespace deepcalm
