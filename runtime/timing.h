// Where the time and the bytes of a pass go: one clock per thread, one row of sums per stage. Always on: two clock readings
// and a few additions per stage and thread. The stages of a pass follow each other without gaps, so that their seconds add
// up to its wall time.
#pragma once

#include <chrono>
#include <cstdint>

namespace deepcalm {

enum class Stage : uint8_t {
    kEmbed,      // embedding rows; MTP: also both input norms
    kEhProj,     // MTP only
    kAttnNorm,   // input norm, rounding for the next product (as in every norm stage)
    kQkvA,       // q_a (or q), kv_a
    kLatent,     // latent norms, key rotation, cache write
    kQB,         // q_b
    kQRope,      // query rotation
    kWUk,        // queries absorbed through W_UK
    kAttention,  // latent attention over the cache, combining of partials
    kWUv,        // W_UV, heads laid side by side
    kWo,         // output projection, residual
    kFfnNorm,
    kRouter,       // gate logits
    kRoute,        // top-k, rows grouped by expert
    kExpertsUp,    // gate and up of routed and shared experts, silu, rounding
    kExpertsDown,  // down of both, weighting, residual
    kFfnUp,        // dense layers
    kFfnDown,
    kFinalNorm,
    kHead,
};
inline constexpr int kNumStages = 20;
inline constexpr const char* kStageNames[kNumStages] = {
    "embed",      "eh_proj",      "attn_norm", "qkv_a",    "latent",     "q_b",    "q_rope",
    "w_uk",       "attention",    "w_uv",      "wo",       "ffn_norm",   "router", "route",
    "experts_up", "experts_down", "ffn_up",    "ffn_down", "final_norm", "head"};

inline int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// One thread's sums over one pass; written by that thread alone.
struct alignas(128) StageClock {
    struct Sum {
        int64_t calls = 0, bytes = 0, ns = 0, wait_ns = 0;
    };
    Sum stage[kNumStages] = {};
    int64_t bytes = 0;           // read since the last stage ended
    int64_t mark = 0;            // when the last stage ended, ns
    Stage last = Stage::kEmbed;  // the stage that ended last
};

// Sums over passes.
struct StageStats {
    int64_t calls = 0;   // once per layer and pass
    int64_t bytes = 0;   // weights and cache rows read by all threads together, each byte of a pass counted once
    double seconds = 0;  // wall time, waiting included
    double wait_sum = 0,
           wait_max = 0;  // seconds at barriers: all threads together; per pass, the thread that waited most
};

}  // namespace deepcalm
