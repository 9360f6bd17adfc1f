#include "runtime/config.h"

#include <algorithm>
#include <cmath>

namespace deepcalm {
namespace {

std::string number(double v) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", v);
    return text;
}

Error bad(const char* key, const std::string& found, const std::string& expected) {
    return {ErrorCode::kConfig, std::string("config: ") + key + " is " + found + ", expected " + expected};
}

Status in_range(const char* key, int64_t v, int64_t lo, int64_t hi) {
    if (v >= lo && v <= hi) return {};
    return bad(key, std::to_string(v), std::to_string(lo) + ".." + std::to_string(hi));
}

// lo is excluded when `open`; infinity and NaN never pass.
Status real(const char* key, double v, double lo, bool open) {
    if (std::isfinite(v) && (open ? v > lo : v >= lo)) return {};
    return bad(key, number(v), std::string("a finite number ") + (open ? "> " : ">= ") + number(lo));
}

Status validate_moe(const ModelConfig& c) {
    DC_TRY_STATUS(in_range("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts));
    DC_TRY_STATUS(in_range("n_shared_experts", c.n_shared_experts, 0, kMaxExperts));
    DC_TRY_STATUS(in_range("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxFfnSize));
    DC_TRY_STATUS(in_range("n_shared_experts * moe_intermediate_size",
                           int64_t{c.n_shared_experts} * c.moe_intermediate_size, 0, kMaxFfnSize));
    DC_TRY_STATUS(in_range("n_group", c.n_group, 1, c.n_routed_experts));
    DC_TRY_STATUS(in_range("topk_group", c.topk_group, 1, c.n_group));
    DC_TRY_STATUS(real("routed_scaling_factor", c.routed_scaling_factor, 0, true));
    const bool noaux = c.topk_method == TopkMethod::kNoauxTc;
    if (noaux != (c.scoring_func == ScoringFunc::kSigmoid)) {
        return bad("scoring_func", noaux ? "softmax" : "sigmoid",
                   noaux ? "sigmoid (topk_method noaux_tc)" : "softmax (topk_method greedy or group_limited_greedy)");
    }
    if (c.norm_topk_prob && !noaux) {
        return bad(
            "norm_topk_prob", "true",
            "false with softmax routing: the released codes disagree on whether the normalised weights are scaled");
    }
    if (c.topk_method == TopkMethod::kGreedy) return {};
    if (c.n_routed_experts % c.n_group != 0) {
        return bad("n_group", std::to_string(c.n_group),
                   "a divisor of n_routed_experts " + std::to_string(c.n_routed_experts));
    }
    const int group_size = c.n_routed_experts / c.n_group;
    if (noaux && c.n_group > 1 && group_size < 2) {
        return bad("n_group", std::to_string(c.n_group),
                   "groups of at least 2 experts (noaux_tc adds the two best of a group)");
    }
    return in_range("num_experts_per_tok", c.num_experts_per_tok, 1, int64_t{group_size} * c.topk_group);
}

}  // namespace

Status validate(const ModelConfig& c) {
    const auto printable = [](char ch) { return ch > ' ' && ch <= '~'; };
    if (c.model_type.empty() || c.model_type.size() > 64 ||
        !std::all_of(c.model_type.begin(), c.model_type.end(), printable)) {
        return bad("model_type", "no such name", "1..64 printable characters");
    }
    DC_TRY_STATUS(in_range("hidden_size", c.hidden_size, 1, kMaxHiddenSize));
    DC_TRY_STATUS(in_range("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers));
    DC_TRY_STATUS(in_range("num_attention_heads", c.num_attention_heads, 1, kMaxHeads));
    DC_TRY_STATUS(in_range("q_lora_rank", c.q_lora_rank, 0, kMaxLoraRank));
    DC_TRY_STATUS(in_range("kv_lora_rank", c.kv_lora_rank, 1, kMaxLoraRank));
    DC_TRY_STATUS(in_range("qk_nope_head_dim", c.qk_nope_head_dim, 1, kMaxHeadDim));
    DC_TRY_STATUS(in_range("qk_rope_head_dim", c.qk_rope_head_dim, 2, kMaxHeadDim));
    if (c.qk_rope_head_dim % 2 != 0)
        return bad("qk_rope_head_dim", std::to_string(c.qk_rope_head_dim), "an even number");
    DC_TRY_STATUS(in_range("v_head_dim", c.v_head_dim, 1, kMaxHeadDim));
    DC_TRY_STATUS(in_range("n_routed_experts", c.n_routed_experts, 0, kMaxExperts));
    DC_TRY_STATUS(in_range("first_k_dense_replace", c.first_k_dense_replace, 0, c.num_hidden_layers));
    const bool any_dense = c.n_routed_experts == 0 || c.first_k_dense_replace > 0;
    DC_TRY_STATUS(in_range("intermediate_size", c.intermediate_size, any_dense ? 1 : 0, kMaxFfnSize));
    if (c.n_routed_experts > 0) DC_TRY_STATUS(validate_moe(c));
    DC_TRY_STATUS(real("rms_norm_eps", c.rms_norm_eps, 0, true));
    DC_TRY_STATUS(real("rope_theta", c.rope_theta, 1, true));
    const int original_min = c.rope_type == RopeType::kYarn ? 1 : 0;  // 0: absent
    DC_TRY_STATUS(
        in_range("original_max_position_embeddings", c.original_max_position_embeddings, original_min, kMaxPositions));
    DC_TRY_STATUS(real("rope_factor", c.rope_factor, 1, false));
    DC_TRY_STATUS(real("beta_fast", c.beta_fast, 0, true));
    DC_TRY_STATUS(real("beta_slow", c.beta_slow, 0, true));
    DC_TRY_STATUS(real("mscale", c.mscale, 0, false));
    DC_TRY_STATUS(real("mscale_all_dim", c.mscale_all_dim, 0, false));
    DC_TRY_STATUS(real("attention_factor", c.attention_factor, 0, false));
    DC_TRY_STATUS(in_range("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions));
    DC_TRY_STATUS(in_range("vocab_size", c.vocab_size, 1, kMaxVocab));
    DC_TRY_STATUS(in_range("num_nextn_predict_layers", c.num_nextn_predict_layers, 0, 1));
    return in_range("mtp_draft_head", c.mtp_draft_head, 0, c.num_nextn_predict_layers);
}

}  // namespace deepcalm
