#include "runtime/cpu/buffers.h"

#include <algorithm>

namespace deepcalm {
namespace {

// Lays buffers out one after the other: first pass counts, second pass points.
class Arena {
  public:
    explicit Arena(std::byte* base) : base_(base) {}
    template <class T> T* take(int64_t n) {
        T* p = base_ != nullptr ? static_cast<T*>(static_cast<void*>(base_ + used_)) : nullptr;
        used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
        return p;
    }
    template <class T = float> View<T> rows(int64_t n, int64_t stride) { return {take<T>(n * stride), stride}; }
    // n rows of bf16 for a product that reads every step-th: not a multiple of 4096 bytes apart, or one set of a cache has them all
    Activation bf16(int64_t n, int cols, int64_t step = 1) {
        int64_t stride = round_up(cols, kTileCols);
        if (2 * step * stride % 4096 == 0) stride += kTileCols;
        return {take<uint16_t>(n * stride), nullptr, nullptr, stride};
    }
    // f32: where the f32 form lies that has no place of its own. step: what reads the rows takes every step-th.
    void site(ActSite& s, int64_t n_rows, int cols, View<float> f32 = {}, int64_t step = 1) {
        const int64_t stride = round_up(cols, kTileCols), n = n_rows * stride;
        s.cols = cols;
        s.f32 = f32.stride > 0 ? f32 : rows(n_rows, stride);
        s.kind[static_cast<int>(ActKind::kF32)] = {s.f32.data, nullptr, nullptr, s.f32.stride};
        s.kind[static_cast<int>(ActKind::kBF16)] = bf16(n_rows, cols, step);
        s.kind[static_cast<int>(ActKind::kI8)] = {take<int8_t>(n), take<float>(n / kTileCols),
                                                  take<int32_t>(n / kTileCols), stride};
    }
    int64_t used() const { return used_; }
    void go_to(int64_t used) { used_ = used; }

  private:
    std::byte* base_;
    int64_t used_ = 0;
};

void lay_out(Buffers& s, Arena& a, const ModelConfig& c, int n_threads) {
    const int64_t n = s.max_rows, heads = c.num_attention_heads, q_full = c.q_full_width();
    const int64_t d_pad = round_up(c.hidden_size, kTileCols), v_pad = round_up(c.v_head_dim, kTileCols);
    // Buffers that take turns share memory unless columns past a width must stay zero.
    const auto widths = {c.hidden_size,          c.q_lora_rank, c.kv_lora_rank,      c.qk_nope_head_dim,
                         2 * c.qk_rope_head_dim, c.v_head_dim,  c.intermediate_size, c.moe_intermediate_size};
    const bool shared = std::all_of(widths.begin(), widths.end(), [](int w) { return w % kTileCols == 0; });
    int64_t end = 0;
    const auto instead_of = [&](int64_t begin) {
        end = std::max(end, a.used());
        if (shared) a.go_to(begin);
    };
    s.x = a.rows(n, d_pad);
    s.cos_sin = a.rows(n, c.qk_rope_head_dim);
    const int64_t normed = a.used();
    a.site(s.h, n, c.hidden_size);
    a.site(s.final_h, n, c.hidden_size);
    s.out = shared ? s.final_h.f32 : a.rows(n, d_pad);
    const int64_t block = a.used();
    if (c.num_nextn_predict_layers > 0) a.site(s.eh, n, 2 * c.hidden_size);

    // What all heads have of a block of rows: h has been read by then, out is not yet written.
    instead_of(normed);
    // As many rows at a time as keep every thread busy, and a matrix's tiles in use for 64 of them or 4096 heads; a split
    // pass is one block.
    const int64_t b = std::min(n, std::max<int64_t>(kSplitRows * n_threads, std::min<int64_t>(64, 4096 / heads)));
    const int64_t nope_pad = round_up(c.qk_nope_head_dim, kTileCols);
    s.head_rows = static_cast<int>(b);
    s.uv_tmp = {a.take<float>(b * heads * std::max(nope_pad, v_pad)), v_pad};
    a.site(s.q_nope, b * heads, c.qk_nope_head_dim, {s.uv_tmp.data, shared ? nope_pad : 0}, heads);
    s.q_full = a.rows(b * heads, q_full);
    a.site(s.attn_latent, b * heads, c.kv_lora_rank, shared ? s.q_full : View<float>(), heads);
    a.go_to(std::max(a.used(), block));

    s.qkv_a = a.rows(n, c.qkv_a_stride());
    s.q = c.q_lora_rank > 0 ? a.rows(n, c.q_stride()) : s.qkv_a;
    if (c.q_lora_rank > 0) a.site(s.q_a, n, c.q_lora_rank);
    // A row's values come after the last reader of its queries.
    const bool in_q = shared && heads * v_pad <= c.q_stride();
    a.site(s.attn_v, n, c.num_attention_heads * c.v_head_dim, in_q ? s.q : View<float>());
    s.c_kv = a.rows(n, c.kv_lora_rank);
    s.k_rope = a.rows(n, c.qk_rope_head_dim);

    const auto sums = [&](int64_t slots) {
        return MlaSums{.m = a.take<float>(slots), .l = a.take<float>(slots), .o = a.rows(slots, c.c_pad())};
    };
    // Every thread's sums and a partial beside them, or a partial of every thread.
    s.part_slots = static_cast<int>(std::max<int64_t>(kPartSlots, 2 * n_threads * group_vectors(heads)));
    s.part = sums(s.part_slots);
    for (MlaSums& carried : s.carried) carried = sums(group_vectors(heads));
    const int64_t scratch = mla_scratch_bytes(c.c_pad(), c.r_pad(), kSplitRows, c.num_attention_heads);
    s.mla_scratch.resize(static_cast<size_t>(n_threads));
    for (auto& p : s.mla_scratch) p = a.take<std::byte>(scratch);
    instead_of(block);
    s.expert_out = a.rows(n, d_pad);
    const int64_t k = c.n_routed_experts > 0 ? c.num_experts_per_tok : 0;
    s.gate_up.resize(static_cast<size_t>(n_threads));
    for (auto& p : s.gate_up) p = a.take<float>(n * 2 * kTileRows * kPairsAtOnce);
    for (Activation& x : s.together) x = a.bf16(n, c.hidden_size);
    const int64_t hidden = a.used();
    if (!c.is_moe(0)) a.site(s.ffn_h, n, c.intermediate_size);
    if (k > 0) {
        instead_of(hidden);
        a.site(s.expert_h, n * k, c.moe_intermediate_size);
        if (c.n_shared_experts > 0) a.site(s.shared_h, n, c.n_shared_experts * c.moe_intermediate_size);
        s.gate_logits = a.rows(n, c.gate_logits_stride());
        s.route_scratch = a.rows(n_threads, 2 * int64_t{c.n_routed_experts} + c.n_group);
        s.topk_idx = a.rows<int32_t>(n, k);
        s.topk_weight = a.rows(n, k);
        s.slot_row = a.take<int32_t>(n * k);
        s.slot_weight = a.take<float>(n * k);
    }
    a.go_to(std::max(a.used(), end));
}

}  // namespace

Result<Buffers> Buffers::make(const ModelConfig& cfg, int max_rows, int n_threads, bool one_stride) {
    Buffers s;
    s.max_rows = max_rows;
    if (one_stride && cfg.n_routed_experts > 0) s.together.resize(static_cast<size_t>(n_threads));
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
