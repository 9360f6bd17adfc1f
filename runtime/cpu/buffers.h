// Activation buffers of a model, for passes of up to max_rows rows; zeroed at allocation so that columns past a natural width
// stay zero (docs/model.md 7.2). n = rows of the pass, d = hidden_size. Rows have 32 k columns unless said otherwise,
// by ModelConfig's strides.
#pragma once

#include "kernels/kernels.h"
#include "runtime/cpu/kv_cache.h"
#include "runtime/memory.h"
#include "runtime/timing.h"

#include <algorithm>
#include <vector>

namespace deepcalm {

// Rows that feed a product: the f32 values and, beside them, their rounded forms (filled by prepare() where a weight needs it).
struct ActSite {
    View<float> f32;  // [rows, cols]
    int cols = 0;
    Activation kind[kNumActKinds];  // kF32: f32

    float* row(int64_t i) const { return f32.row(i); }
};

// Rows of a sequence that meet its cache together, with all heads (decode, verification); more of them do so in blocks of
// kAttnRowBlock rows x kAttnHeadBlock heads.
inline constexpr int kSplitRows = 8;
inline constexpr int kAttnRowBlock = 4;
inline constexpr int kAttnHeadBlock = 16;
inline constexpr int kPartSlots = 2048;  // attention sums that a round holds at least
// Pairs of a group: kSplitRows rows with all heads, or a block.
constexpr int64_t group_vectors(int64_t heads) {
    return std::max(kSplitRows * heads, int64_t{kAttnRowBlock} * kAttnHeadBlock);
}

// Rows of one routed expert in a pass: slots [begin, end) of Buffers::slot_*.
struct ExpertRows {
    int expert, begin, end;
};

// A row of a pass: a token of one of its sequences.
struct PassRow {
    int32_t id;
    int pos;
    int segment;           // index in PassArgs::segments
    const float* hidden;   // MTP: [hidden_size]
    const KvCache* cache;  // that pos is a row of
    bool logits;
};

struct Buffers {
    // one_stride: of the kernels
    static Result<Buffers> make(const ModelConfig& cfg, int max_rows, int n_threads, bool one_stride);

    int max_rows = 0;
    std::vector<PassRow> rows;        // [n]
    std::vector<int32_t> logit_rows;  // rows that want logits, ascending
    View<float> x;                    // [n, d] residual stream
    View<float> cos_sin;              // [n, qk_rope_head_dim] cosines, then sines, of the rows' positions
    ActSite h;                        // [n, d] normed input of a block; the router reads its f32 form
    ActSite eh;                       // [n, 2d] MTP: normed embedding | normed hidden
    View<float> qkv_a;                // [n, qkv_a_stride()] stacked q_a (or q) | c_kv | k_rope, each part padded to 16
    ActSite q_a;                      // [n, q_lora_rank] after q_a_layernorm
    View<float> q;                    // [n, n_heads, qk_head_dim] per head nope | rope; aliases qkv_a without q_lora
    int head_rows = 0;                // rows b of the pass whose heads are computed at a time: at most max_rows
    ActSite q_nope;                   // [b * n_heads, qk_nope_head_dim] copied or rounded, may share with uv_tmp
    View<float> c_kv;                 // [n, kv_lora_rank] after kv_a_layernorm
    View<float> k_rope;               // [n, qk_rope_head_dim] rotated
    View<float> q_full;               // [b * n_heads, q_full_width()] q_absorbed | rotated q_rope
    // Sums of attention over partials, one of a (row, head) in each slot: of a round, those that a next round goes on with.
    MlaSums part, carried[2];
    int part_slots = 0;
    std::vector<std::byte*> mla_scratch;  // one per thread
    ActSite attn_latent;                  // [b * n_heads, kv_lora_rank], may lie in q_full
    View<float> uv_tmp;                   // [n_heads * b, pad16(v_head_dim)] values of heads that do not fill tiles
    ActSite attn_v;                       // [n, n_heads * v_head_dim], may lie in q
    View<float> out;                      // [n, d] output of a block before the residual, may be final_h
    View<float> expert_out;               // [n, d] rows of one routed expert, then of the shared ones
    std::vector<float*> gate_up;  // one per thread: [n * 32 * kPairsAtOnce] gate and up tiles before silu(gate) * up
    std::vector<Activation> together;  // one per thread, or none: [n, d] bf16 rows of h that an expert reads
    ActSite ffn_h;                     // [n, intermediate_size]; dense FFN hidden rows
    ActSite shared_h;                  // [n, n_shared_experts * moe_intermediate_size]
    ActSite expert_h;                  // [n * k, moe_intermediate_size], by slot
    View<float> gate_logits;           // [n, n_routed_experts]
    View<float> route_scratch;         // [n_threads, 2E + n_group]
    View<int32_t> topk_idx;            // [n, k] ascending
    View<float> topk_weight;           // [n, k]
    int32_t* slot_row = nullptr;   // [n * k] activation row of each slot, slots grouped by expert, experts ascending
    float* slot_weight = nullptr;  // [n * k]
    std::vector<int32_t> pass_experts;  // short main passes: [moe layer, n, k] layer * E + expert, ascending in a row
    std::vector<ExpertRows> touched;    // experts of the pass, ascending
    ActSite final_h;                    // [n, d] after the final norm: what the head and MTP read
    std::vector<StageClock> clocks;     // one per thread
    ZeroedBuffer memory;
};

// Pairs of a gate and an up tile of a longest pass that wait for silu(gate) * up.
inline constexpr int kPairsAtOnce = 8;
}  // namespace deepcalm
