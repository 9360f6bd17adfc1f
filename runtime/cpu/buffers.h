// Activation buffers of a session, sized once for max_rows rows; zeroed at allocation so that columns past a natural width
// stay zero (docs/model.md 7.2). n = rows of the pass, d = hidden_size. Rows have 32 k columns unless said otherwise,
// by ModelConfig's strides.
#pragma once

#include "kernels/kernels.h"
#include "runtime/config.h"
#include "runtime/memory.h"
#include "runtime/timing.h"

#include <vector>

namespace deepcalm {

// Rows that feed a product: the f32 values and, beside them, their rounded forms (filled by prepare() where a weight needs it).
struct ActSite {
    float* f32 = nullptr;  // [rows, stride] f32, stride = round_up(cols, 32)
    int cols = 0;
    Activation kind[kNumActKinds];

    int64_t stride() const { return kind[0].stride; }
    float* row(int64_t i) const { return f32 + i * stride(); }
};

// Rows of one routed expert in a pass: slots [begin, end) of Buffers::slot_*.
struct ExpertRows {
    int expert, begin, end;
};

struct Buffers {
    static Result<Buffers> make(const ModelConfig& cfg, int max_rows, int max_partials, int n_threads);

    int max_rows = 0;
    float* x = nullptr;          // [n, d_pad] residual stream
    ActSite h;                   // [n, d] normed input of a block; the router reads its f32 form
    ActSite eh;                  // [n, 2d] MTP: normed embedding | normed hidden
    float* qkv_a = nullptr;      // [n, qkv_a_stride()] stacked q_a (or q) | c_kv | k_rope, each part padded to 16
    ActSite q_a;                 // [n, q_lora_rank] after q_a_layernorm
    float* q = nullptr;          // [n, q_stride()] per head nope | rope; aliases qkv_a without q_lora
    int head_rows = 0;           // rows b of the pass whose heads are computed at a time: at most max_rows
    ActSite q_nope;              // [b * n_heads, qk_nope_head_dim], may share with uv_tmp
    float* c_kv = nullptr;       // [n, kv_lora_rank] after kv_a_layernorm
    float* k_rope = nullptr;     // [n, qk_rope_head_dim] rotated
    float* q_full = nullptr;     // [b, n_heads, q_full_width()] q_absorbed | rotated q_rope
    int32_t* row_end = nullptr;  // [n] one past the last position that a row sees
    float *part_m = nullptr, *part_l = nullptr;  // [partial_slots, part_heads]
    float* part_o = nullptr;                     // [partial_slots, part_heads, c_pad]
    int max_partials = 0;
    std::vector<std::byte*> mla_scratch;  // one per thread
    ActSite attn_latent;                  // [b * n_heads, kv_lora_rank], may lie in q_full
    float* uv_tmp = nullptr;              // [n_heads, b, pad16(v_head_dim)] W_UV output before it is laid side by side
    ActSite attn_v;                       // [n, n_heads * v_head_dim], may lie in q
    float* out = nullptr;                 // [n, d_pad] output of a block before the residual, may be final_h
    float* expert_out = nullptr;          // [n, d_pad] rows of one routed expert, then of the shared ones
    std::vector<float*> gate_up;     // one per thread: [n * 32 * kPairsAtOnce] gate and up tiles before silu(gate) * up
    ActSite ffn_h;                   // [n, intermediate_size]; dense FFN hidden rows
    ActSite shared_h;                // [n, n_shared_experts * moe_intermediate_size]
    ActSite expert_h;                // [n * k, moe_intermediate_size], by slot
    float* gate_logits = nullptr;    // [n, gate_logits_stride()]
    float* route_scratch = nullptr;  // [n_threads, 2E + n_group]
    int32_t* topk_idx = nullptr;     // [n, k] ascending
    float* topk_weight = nullptr;    // [n, k]
    int32_t* slot_row = nullptr;     // [n * k] activation row of each slot, slots grouped by expert, experts ascending
    float* slot_weight = nullptr;    // [n * k]
    std::vector<int32_t> pass_experts;  // short main passes: [moe layer, n, k] layer * E + expert, ascending in a row
    std::vector<ExpertRows> touched;    // experts of the pass, ascending
    ActSite final_h;                    // [n, d] after the final norm: what the head and MTP read
    std::vector<StageClock> clocks;     // one per thread
    ZeroedBuffer memory;
};

// Rows of a pass that share their split attention partials (decode, verification); longer passes give a thread whole rows.
inline constexpr int kSplitRows = 8;
inline constexpr int kAttnRowBlock = 4;  // query rows that share a converted cache chunk in long passes
// Pairs of a gate and an up tile of a longest pass that wait for silu(gate) * up.
inline constexpr int kPairsAtOnce = 8;
inline constexpr int kAttnHeadBlock = 16;  // heads of one attention unit in long passes

}  // namespace deepcalm
