#include "runtime/manifest.h"

namespace deepcalm {
namespace {

int pad_rows(int rows) { return static_cast<int>(round_up(rows, kTileRows)); }

class Builder {
  public:
    explicit Builder(std::string prefix, std::vector<TensorSpec>& out) : prefix_(std::move(prefix)), out_(out) {}

    void vector(const char* name, Role role, int n) { add({prefix_ + name, role, false, false, 1, n, 0, {}, false}); }
    void plain(const char* name, Role role, int rows, int cols) {
        add({prefix_ + name, role, false, false, 1, rows, cols, {}, false});
    }
    void matrix(const char* name, Role role, int rows, int cols) {
        add({prefix_ + name, role, true, false, 1, rows, cols, {}, false});
    }
    void stack(const char* name, Role role, int n_slices, int rows, int cols) {
        add({prefix_ + name, role, true, true, n_slices, rows, cols, {}, false});
    }
    // Two matrices that read the same input, one above the other.
    void parts(const char* name, Role role, int rows_a, int rows_b, int cols) {
        add({prefix_ + name, role, true, false, 1, pad_rows(rows_a) + pad_rows(rows_b), cols, {rows_a, rows_b}, false});
    }
    // Gate and up projection, alternating tile by tile.
    void gate_up(const char* name, Role role, bool stacked, int n_slices, int width, int cols) {
        add({prefix_ + name, role, true, stacked, n_slices, 2 * pad_rows(width), cols, {width, width}, true});
    }

  private:
    void add(TensorSpec spec) { out_.push_back(std::move(spec)); }
    std::string prefix_;
    std::vector<TensorSpec>& out_;
};

void decoder_layer(Builder& b, const ModelConfig& c, bool moe) {
    const int q_rows = c.num_attention_heads * c.qk_head_dim();
    b.vector("attn_norm", Role::kNorm, c.hidden_size);
    b.parts("wqkv_a", Role::kAttn, c.q_lora_rank > 0 ? c.q_lora_rank : q_rows, c.kv_lora_rank + c.qk_rope_head_dim,
            c.hidden_size);
    if (c.q_lora_rank > 0) {
        b.vector("q_a_norm", Role::kNorm, c.q_lora_rank);
        b.matrix("wq_b", Role::kAttn, q_rows, c.q_lora_rank);
    }
    b.vector("kv_a_norm", Role::kNorm, c.kv_lora_rank);
    b.stack("w_uk", Role::kAttn, c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim);
    b.stack("w_uv", Role::kAttn, c.num_attention_heads, c.v_head_dim, c.kv_lora_rank);
    b.matrix("wo", Role::kAttn, c.hidden_size, c.num_attention_heads * c.v_head_dim);
    b.vector("ffn_norm", Role::kNorm, c.hidden_size);
    if (!moe) {
        b.gate_up("w_gate_up", Role::kFfn, false, 1, c.intermediate_size, c.hidden_size);
        b.matrix("w_down", Role::kFfn, c.hidden_size, c.intermediate_size);
        return;
    }
    b.matrix("router", Role::kRouter, c.n_routed_experts, c.hidden_size);
    if (c.topk_method == TopkMethod::kNoauxTc) b.vector("router_bias", Role::kBias, c.n_routed_experts);
    b.gate_up("experts.w_gate_up", Role::kExpert, true, c.n_routed_experts, c.moe_intermediate_size, c.hidden_size);
    b.stack("experts.w_down", Role::kExpert, c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
    if (c.n_shared_experts > 0) {
        const int width = c.n_shared_experts * c.moe_intermediate_size;
        b.gate_up("shared.w_gate_up", Role::kShared, false, 1, width, c.hidden_size);
        b.matrix("shared.w_down", Role::kShared, c.hidden_size, width);
    }
}

}  // namespace

std::vector<TensorSpec> expected_tensors(const ModelConfig& c) {
    std::vector<TensorSpec> out;
    Builder top("", out);
    top.plain("embed", Role::kEmbed, c.vocab_size, c.hidden_size);
    for (int i = 0; i < c.num_hidden_layers; ++i) {
        Builder layer("layers." + std::to_string(i) + ".", out);
        decoder_layer(layer, c, c.is_moe(i));
    }
    top.vector("final_norm", Role::kNorm, c.hidden_size);
    top.matrix("head", Role::kHead, c.vocab_size, c.hidden_size);
    if (c.num_nextn_predict_layers > 0) {
        Builder mtp("mtp.", out);
        mtp.vector("enorm", Role::kNorm, c.hidden_size);
        mtp.vector("hnorm", Role::kNorm, c.hidden_size);
        mtp.matrix("eh_proj", Role::kEhProj, c.hidden_size, 2 * c.hidden_size);
        decoder_layer(mtp, c, c.is_moe(c.num_hidden_layers));
        mtp.vector("final_norm", Role::kNorm, c.hidden_size);
        if (c.mtp_draft_head > 0) mtp.matrix("head", Role::kDraftHead, c.vocab_size, c.hidden_size);
    }
    return out;
}

bool format_allowed(Role role, Format format) {
    switch (role) {
    case Role::kNorm:
    case Role::kBias:
    case Role::kRouter:
        return format == Format::kF32;  // routing reads f32 activations: f32 weights keep one kernel, exact
    case Role::kEmbed:
    case Role::kEhProj: return format == Format::kF32 || format == Format::kBF16 || format == Format::kF16;
    case Role::kAttn:
    case Role::kFfn:
    case Role::kExpert:
    case Role::kShared:
    case Role::kHead:
    case Role::kDraftHead: return true;
    }
    return false;
}

}  // namespace deepcalm
