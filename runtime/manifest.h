// The tensors of a model: where they are bound, and visit(), the one list of their names, roles and shapes. The packer
// (through _core.expected_tensors), the loader, the count of bytes and the copy on a device walk it.
#pragma once

#include "runtime/config.h"

#include <string>
#include <vector>

namespace deepcalm {

// What a tensor is for; the packer's dtype policy and the allowed formats depend on this alone.
enum class Role : uint8_t { kEmbed, kNorm, kBias, kAttn, kFfn, kExpert, kShared, kRouter, kEhProj, kHead, kDraftHead };
inline constexpr const char* kRoleNames[] = {"embed",  "norm",   "bias",    "attn", "ffn",       "expert",
                                             "shared", "router", "eh_proj", "head", "draft_head"};

struct TensorSpec {
    std::string name{};
    Role role;
    bool tiled = false;        // false: plain row-major [rows, cols] or [rows] (cols == 0)
    bool stacked = false;      // has a leading slice dimension (experts or heads), even when n_slices == 1
    int n_slices = 1;          // 1 unless stacked
    int rows = 0, cols = 0;    // of a slice; stacked parts: the sum of the parts' padded rows
    std::vector<int> parts{};  // natural rows of each part stacked along the rows, each padded to 16; empty: one part
    bool interleaved = false;  // two equal parts alternate tile by tile (gate, up)

    static TensorSpec vector(Role role, int n) { return {.role = role, .rows = n}; }
    static TensorSpec matrix(Role role, int rows, int cols) {
        return {.role = role, .tiled = true, .rows = rows, .cols = cols};
    }
    // Matrices that read the same input, one above the other or tile by tile.
    static TensorSpec joined(Role role, std::vector<int> parts, int cols, bool interleaved = false) {
        TensorSpec s = matrix(role, 0, cols);
        for (const int rows : parts) s.rows += static_cast<int>(round_up(rows, kTileRows));
        s.parts = std::move(parts);
        s.interleaved = interleaved;
        return s;
    }
    static TensorSpec gate_up(Role role, int width, int cols) { return joined(role, {width, width}, cols, true); }
    static TensorSpec stack(int n_slices, TensorSpec s) {
        s.stacked = true;
        s.n_slices = n_slices;
        return s;
    }
};

// Row-major, not cut into tiles.
struct PlainTensor {
    const std::byte* data = nullptr;  // [rows, cols] of `format`: f32, bf16 or f16
    Format format = Format::kF32;
    int rows = 0, cols = 0;
    int64_t row_bytes() const { return int64_t{cols} * (format == Format::kF32 ? 4 : 2); }
    int64_t n_bytes() const { return rows * row_bytes(); }
};

struct LayerWeights {
    bool moe = false;
    const float* attn_norm = nullptr;  // [hidden_size]
    PackedTensor wqkv_a;  // [pad16(q_lora_rank or n_heads * qk_head_dim) + pad16(kv_lora_rank + dr), hidden_size]
    const float* q_a_norm = nullptr;     // [q_lora_rank], null without q_lora
    PackedTensor wq_b;                   // [n_heads * qk_head_dim, q_lora_rank], empty without q_lora
    const float* kv_a_norm = nullptr;    // [kv_lora_rank]
    PackedTensor w_uk;                   // [n_heads][kv_lora_rank, qk_nope_head_dim]
    PackedTensor w_uv;                   // [n_heads][v_head_dim, kv_lora_rank]
    PackedTensor wo;                     // [hidden_size, n_heads * v_head_dim]
    const float* ffn_norm = nullptr;     // [hidden_size]
    PackedTensor w_gate_up, w_down;      // dense: [2 * pad16(intermediate_size), hidden_size], [hidden_size, same]
    PackedTensor router;                 // [n_routed_experts, hidden_size] f32
    const float* router_bias = nullptr;  // [n_routed_experts], null unless noaux_tc
    PackedTensor experts_gate_up, experts_down;  // [n_routed_experts] slices as of a dense layer, moe_intermediate_size
    PackedTensor shared_gate_up, shared_down;    // width n_shared_experts * moe_intermediate_size; rows == 0: none
    const float* post_moe_norm = nullptr;        // [hidden_size], null without

    // Of one routed expert; 0 for a dense layer.
    int64_t expert_bytes() const { return experts_gate_up.read_bytes() + experts_down.read_bytes(); }
};

// All pointers lie in the mapped file or, in a device library, in its copy on the device.
struct ModelWeights {
    PlainTensor embed;  // [vocab_size, hidden_size]
    std::vector<LayerWeights> layers;
    const float* final_norm = nullptr;  // [hidden_size]
    PackedTensor head;                  // [vocab_size, hidden_size]
    // MTP layer, when cfg.num_nextn_predict_layers > 0 (docs/model.md 6.1)
    const float *mtp_enorm = nullptr, *mtp_hnorm = nullptr, *mtp_final_norm = nullptr;  // [hidden_size]
    PackedTensor mtp_eh_proj;  // [hidden_size, 2 * hidden_size]: embedding half, hidden half
    PackedTensor mtp_head;     // [vocab_size, hidden_size], empty without mtp_draft_head
    LayerWeights mtp_layer;

    ModelWeights() = default;
    explicit ModelWeights(const ModelConfig& c) : layers(static_cast<size_t>(c.num_hidden_layers)) {
        for (int i = 0; i < c.num_hidden_layers; ++i) layers[static_cast<size_t>(i)].moe = c.is_moe(i);
        mtp_layer.moe = c.is_moe(c.num_hidden_layers);
    }
    const PackedTensor& draft_head() const { return mtp_head.rows > 0 ? mtp_head : head; }
};

// fn as a function of name, rest of the spec and member.
template <class Fn> auto named(std::string prefix, Fn& fn) {
    return [prefix = std::move(prefix), &fn](const char* name, TensorSpec spec, auto& member) {
        spec.name = prefix + name;
        fn(spec, member);
    };
}
// fn(spec, member) for every tensor of a decoder layer, in file order; member: PackedTensor& or const float*&.
template <class Layer, class Fn> void visit_layer(Layer& w, const ModelConfig& c, const std::string& prefix, Fn& fn) {
    using Spec = TensorSpec;
    const auto on = named(prefix, fn);
    const int d = c.hidden_size, heads = c.num_attention_heads, r = c.kv_lora_rank;
    on("attn_norm", Spec::vector(Role::kNorm, d), w.attn_norm);
    on("wqkv_a", Spec::joined(Role::kAttn, {c.q_a_width(), r + c.qk_rope_head_dim}, d), w.wqkv_a);
    if (c.q_lora_rank > 0) {
        on("q_a_norm", Spec::vector(Role::kNorm, c.q_lora_rank), w.q_a_norm);
        on("wq_b", Spec::matrix(Role::kAttn, c.q_width(), c.q_lora_rank), w.wq_b);
    }
    on("kv_a_norm", Spec::vector(Role::kNorm, r), w.kv_a_norm);
    on("w_uk", Spec::stack(heads, Spec::matrix(Role::kAttn, r, c.qk_nope_head_dim)), w.w_uk);
    on("w_uv", Spec::stack(heads, Spec::matrix(Role::kAttn, c.v_head_dim, r)), w.w_uv);
    on("wo", Spec::matrix(Role::kAttn, d, heads * c.v_head_dim), w.wo);
    on("ffn_norm", Spec::vector(Role::kNorm, d), w.ffn_norm);
    if (!w.moe) {
        on("w_gate_up", Spec::gate_up(Role::kFfn, c.intermediate_size, d), w.w_gate_up);
        on("w_down", Spec::matrix(Role::kFfn, d, c.intermediate_size), w.w_down);
        return;
    }
    const int expert = c.moe_intermediate_size, n_experts = c.n_routed_experts, shared = c.n_shared_experts * expert;
    on("router", Spec::matrix(Role::kRouter, n_experts, d), w.router);
    if (c.topk_method == TopkMethod::kNoauxTc) on("router_bias", Spec::vector(Role::kBias, n_experts), w.router_bias);
    on("experts.w_gate_up", Spec::stack(n_experts, Spec::gate_up(Role::kExpert, expert, d)), w.experts_gate_up);
    on("experts.w_down", Spec::stack(n_experts, Spec::matrix(Role::kExpert, d, expert)), w.experts_down);
    if (shared > 0) {
        on("shared.w_gate_up", Spec::gate_up(Role::kShared, shared, d), w.shared_gate_up);
        on("shared.w_down", Spec::matrix(Role::kShared, d, shared), w.shared_down);
    }
    if (c.post_moe_norm > 0) on("post_moe_norm", Spec::vector(Role::kNorm, d), w.post_moe_norm);
}

// The same for every tensor of a model of layers as ModelWeights(c) makes them, PlainTensor& too; MTP's begin with "mtp.".
template <class Weights, class Fn> void visit(Weights& w, const ModelConfig& c, Fn&& fn) {
    const auto on = named("", fn);
    const int d = c.hidden_size, vocab = c.vocab_size;
    on("embed", {.role = Role::kEmbed, .rows = vocab, .cols = d}, w.embed);
    for (size_t i = 0; i < w.layers.size(); ++i) visit_layer(w.layers[i], c, "layers." + std::to_string(i) + ".", fn);
    on("final_norm", TensorSpec::vector(Role::kNorm, d), w.final_norm);
    on("head", TensorSpec::matrix(Role::kHead, vocab, d), w.head);
    if (c.num_nextn_predict_layers == 0) return;
    on("mtp.enorm", TensorSpec::vector(Role::kNorm, d), w.mtp_enorm);
    on("mtp.hnorm", TensorSpec::vector(Role::kNorm, d), w.mtp_hnorm);
    on("mtp.eh_proj", TensorSpec::matrix(Role::kEhProj, d, 2 * d), w.mtp_eh_proj);
    visit_layer(w.mtp_layer, c, "mtp.", fn);
    on("mtp.final_norm", TensorSpec::vector(Role::kNorm, d), w.mtp_final_norm);
    if (c.mtp_draft_head > 0) on("mtp.head", TensorSpec::matrix(Role::kDraftHead, vocab, d), w.mtp_head);
}

// fn(pointer, bytes, suffix) for where a visited member lies, in the file under the tensor's name + suffix.
template <class T, class Fn> void pieces(const TensorSpec& spec, T& t, Fn&& fn) {
    if constexpr (std::is_pointer_v<T>) {
        fn(t, 4 * int64_t{spec.rows}, "");
    } else {
        fn(t.data, t.n_bytes(), "");
        if constexpr (std::is_same_v<std::remove_const_t<T>, PackedTensor>) {
            if (t.format == Format::kF8) fn(t.scales, 4 * t.n_slices * t.slice_scales(), ".scale");
        }
    }
}

// In file order.
std::vector<TensorSpec> expected_tensors(const ModelConfig& cfg);

// Formats a tensor of this role may be stored in; plain tensors by name (f32, bf16, f16).
bool format_allowed(Role role, Format format);

}  // namespace deepcalm
