#include "runtime/state.h"

#include <algorithm>

namespace deepcalm {
namespace {

// Lays buffers out one after the other: first pass counts, second pass points.
class Arena {
  public:
    explicit Arena(std::byte* base) : base_(base) {}
    template <class T> void take(T*& p, int64_t n) {
        if (base_ != nullptr) p = static_cast<T*>(static_cast<void*>(base_ + used_));
        used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    }
    void site(ActSite& s, int64_t rows, int cols) {
        const int64_t stride = round_up(cols, kTileCols);
        s.cols = cols;
        take(s.f32, rows * stride);
        uint16_t* bf16 = nullptr;
        int8_t* i8 = nullptr;
        float* d = nullptr;
        int32_t* sum = nullptr;
        take(bf16, rows * stride);
        take(i8, rows * stride);
        take(d, rows * stride / kTileCols);
        take(sum, rows * stride / kTileCols);
        s.kind[static_cast<int>(ActKind::kF32)] = {s.f32, nullptr, nullptr, stride};
        s.kind[static_cast<int>(ActKind::kBF16)] = {bf16, nullptr, nullptr, stride};
        s.kind[static_cast<int>(ActKind::kI8)] = {i8, d, sum, stride};
    }
    int64_t used() const { return used_; }
    void go_to(int64_t used) { used_ = used; }

  private:
    std::byte* base_;
    int64_t used_ = 0;
};

void lay_out(State& s, Arena& a, const ModelConfig& c, int n_threads) {
    const int64_t n = s.max_rows;
    const int64_t heads = c.num_attention_heads;
    const int64_t d_pad = round_up(c.hidden_size, kTileCols);
    const int64_t c_pad = round_up(c.kv_lora_rank, 32), r_pad = round_up(c.qk_rope_head_dim, 16);
    const int64_t q_rows = heads * c.qk_head_dim();
    a.take(s.x, n * d_pad);
    a.site(s.h, n, c.hidden_size);
    a.site(s.final_h, n, c.hidden_size);
    if (c.num_nextn_predict_layers > 0) a.site(s.eh, n, 2 * c.hidden_size);

    s.qkv_a_stride = round_up(c.q_lora_rank > 0 ? c.q_lora_rank : q_rows, kTileRows) +
                     round_up(c.kv_lora_rank + c.qk_rope_head_dim, kTileRows);
    a.take(s.qkv_a, n * s.qkv_a_stride);
    if (c.q_lora_rank > 0) {
        a.site(s.q_a, n, c.q_lora_rank);
        s.q_stride = round_up(q_rows, kTileRows);
        a.take(s.q, n * s.q_stride);
    } else {
        s.q_stride = s.qkv_a_stride;
        s.q = s.qkv_a;
    }
    // Heads of as many rows at a time as keep every thread busy, and a matrix's tiles in use for 64 of them.
    s.head_rows = static_cast<int>(std::min(n, std::max<int64_t>(64, 8 * n_threads)));
    const int64_t b = s.head_rows;
    a.site(s.q_nope, b * heads, c.qk_nope_head_dim);
    a.take(s.c_kv, n * c.kv_lora_rank);
    a.take(s.k_rope, n * c.qk_rope_head_dim);
    s.q_width = c_pad + r_pad;
    a.take(s.q_full, b * heads * s.q_width);
    a.take(s.row_end, n);

    // Split passes: every (row, partial) of up to kSplitRows rows; long passes: one row block x head block per thread.
    const int64_t slots =
        s.max_partials * std::max(kSplitRows * heads, int64_t{n_threads} * kAttnRowBlock * kAttnHeadBlock);
    a.take(s.part_m, slots);
    a.take(s.part_l, slots);
    a.take(s.part_o, slots * c_pad);
    const int64_t scratch =
        mla_scratch_bytes(static_cast<int>(c_pad), static_cast<int>(r_pad), kSplitRows, static_cast<int>(heads));
    s.mla_scratch.resize(static_cast<size_t>(n_threads));
    for (auto& p : s.mla_scratch) a.take(p, scratch);
    a.site(s.attn_latent, b * heads, c.kv_lora_rank);
    a.take(s.uv_tmp, heads * b * round_up(c.v_head_dim, kTileRows));
    a.site(s.attn_v, n, c.num_attention_heads * c.v_head_dim);

    a.take(s.out, n * d_pad);
    a.take(s.shared_out, n * d_pad);
    a.take(s.down_tmp, n * d_pad);
    const int64_t k = c.n_routed_experts > 0 ? c.num_experts_per_tok : 0;
    s.gate_up.resize(static_cast<size_t>(n_threads));
    for (auto& p : s.gate_up) a.take(p, n * 2 * kTileRows * kPairsAtOnce);
    // A layer is dense or MoE: their hidden rows share memory unless columns past a width must stay zero.
    const int64_t begin = a.used();
    if (!c.is_moe(0)) a.site(s.ffn_h, n, c.intermediate_size);
    const int64_t dense_end = a.used();
    if (k > 0) {
        if (c.intermediate_size % kTileCols == 0 && c.moe_intermediate_size % kTileCols == 0) a.go_to(begin);
        a.site(s.expert_h, n * k, c.moe_intermediate_size);
        if (c.n_shared_experts > 0) a.site(s.shared_h, n, c.n_shared_experts * c.moe_intermediate_size);
        a.go_to(std::max(a.used(), dense_end));
        s.gate_logits_stride = round_up(c.n_routed_experts, kTileRows);
        a.take(s.gate_logits, n * s.gate_logits_stride);
        a.take(s.route_scratch, n_threads * (2 * int64_t{c.n_routed_experts} + c.n_group));
        a.take(s.topk_idx, n * k);
        a.take(s.topk_weight, n * k);
        a.take(s.slot_row, n * k);
        a.take(s.slot_weight, n * k);
    }
}

}  // namespace

Result<State> State::make(const ModelConfig& cfg, int max_rows, int max_partials, int n_threads) {
    State s;
    s.max_rows = max_rows;
    s.max_partials = max_partials;
    Arena count(nullptr);
    lay_out(s, count, cfg, n_threads);
    DC_TRY(s.memory, ZeroedBuffer::make(count.used(), "activation buffers"));
    Arena place(s.memory.data());
    lay_out(s, place, cfg, n_threads);
    s.clocks.resize(static_cast<size_t>(n_threads));
    s.touched.reserve(static_cast<size_t>(cfg.n_routed_experts));
    return s;
}

}  // namespace deepcalm
