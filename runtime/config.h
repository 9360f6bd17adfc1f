// The typed model configuration: one list of fields, read here, by the reader of Python's dict (python/bind_pack.cc) and by
// validate(). Field names are those of config.json; Python (deepcalm/files/config.py) resolves defaults and old and new key
// styles, C++ checks every number again before anything is allocated.
#pragma once

#include "kernels/kernels.h"
#include "runtime/result.h"

#include <array>
#include <string>
#include <vector>

namespace deepcalm {

enum class RopeType : uint8_t { kDefault, kYarn, kLongrope };

// The names of an enum's values in the configuration, in order.
constexpr std::array<const char*, 3> names_of(TopkMethod) { return {"greedy", "group_limited_greedy", "noaux_tc"}; }
constexpr std::array<const char*, 2> names_of(ScoringFunc) { return {"softmax", "sigmoid"}; }
constexpr std::array<const char*, 3> names_of(RopeType) { return {"default", "yarn", "longrope"}; }

// Published limits; a value outside is refused by name.
inline constexpr int kMaxHiddenSize = 65536;
inline constexpr int kMaxLayers = 1024;
inline constexpr int kMaxHeads = 1024;
inline constexpr int kMaxHeadDim = 4096;
inline constexpr int kMaxLoraRank = 65536;
inline constexpr int kMaxFfnSize = 1 << 20;
inline constexpr int kMaxExperts = 4096;
inline constexpr int kMaxVocab = 1 << 22;
inline constexpr int kMaxPositions = 1 << 24;

// X(type, name, values that validate(c) lets pass): in(least, most); of reals from(least) or above(limit), finite; any();
// if_moe(...): any where no layer has experts.
// clang-format off
#define DEEPCALM_CONFIG(X) \
    X(std::string, model_type, any()) /* of config.json; no branch depends on it */ \
    X(int, hidden_size, in(1, kMaxHiddenSize)) \
    X(int, num_hidden_layers, in(1, kMaxLayers)) \
    X(int, num_attention_heads, in(1, kMaxHeads)) \
    X(int, q_lora_rank, in(0, kMaxLoraRank)) /* 0: plain q_proj */ \
    X(int, kv_lora_rank, in(1, kMaxLoraRank)) \
    X(int, qk_nope_head_dim, in(1, kMaxHeadDim)) \
    X(int, qk_rope_head_dim, in(2, kMaxHeadDim)) \
    X(int, v_head_dim, in(1, kMaxHeadDim)) \
    X(int, intermediate_size, in(c.is_moe(0) ? 0 : 1, kMaxFfnSize)) /* dense FFN width */ \
    X(int, moe_intermediate_size, if_moe(in(1, kMaxFfnSize))) /* routed expert width */ \
    X(int, n_routed_experts, in(0, kMaxExperts)) /* 0: every layer is dense */ \
    X(int, num_experts_per_tok, if_moe(in(1, c.n_routed_experts))) \
    X(int, n_shared_experts, if_moe(in(0, kMaxExperts))) \
    X(int, first_k_dense_replace, in(0, c.num_hidden_layers)) \
    X(int, n_group, if_moe(in(1, c.n_routed_experts))) \
    X(int, topk_group, if_moe(in(1, c.n_group))) \
    X(TopkMethod, topk_method, any()) \
    X(ScoringFunc, scoring_func, any()) \
    X(bool, norm_topk_prob, any()) \
    X(float, routed_scaling_factor, if_moe(above(0))) \
    X(float, rms_norm_eps, above(0)) /* layer norms; the latent norms use kLatentNormEps (docs/model.md 3.1) */ \
    X(int, post_moe_norm, in(0, 1)) /* experts' outputs are normed before they join the residual stream */ \
    X(double, rope_theta, above(1)) \
    X(RopeType, rope_type, any()) \
    X(double, rope_factor, from(1)) \
    X(int, original_max_position_embeddings, in(c.needs_original() ? 1 : 0, kMaxPositions)) /* 0: absent */ \
    X(double, beta_fast, above(0)) \
    X(double, beta_slow, above(0)) \
    X(double, mscale, from(0)) /* 0: absent, as the next two */ \
    X(double, mscale_all_dim, from(0)) \
    X(double, attention_factor, from(0)) \
    X(bool, rope_truncate, any()) \
    X(std::vector<double>, short_factor, above(0)) /* of each frequency (longrope), else empty */ \
    X(double, llama_4_scaling_beta, from(0)) /* queries grow with their position (Rope::query_scale); 0: absent */ \
    X(float, embed_scale, above(0)) /* on the embedding, */ \
    X(float, residual_scale, above(0)) /* on what joins the residual stream, */ \
    X(float, logit_scale, above(0)) /* on logits */ \
    X(int, max_position_embeddings, in(1, kMaxPositions)) \
    X(int, vocab_size, in(1, kMaxVocab)) \
    X(int, num_nextn_predict_layers, in(0, 1)) /* an MTP layer is in the file */ \
    X(int, mtp_draft_head, in(0, c.num_nextn_predict_layers)) /* so is mtp.head, a copy of the head that drafts read */
// clang-format on

struct ModelConfig {
#define X(type, name, values) type name{};
    DEEPCALM_CONFIG(X)
#undef X

    int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
    bool needs_original() const { return rope_type == RopeType::kYarn || llama_4_scaling_beta > 0; }
    bool is_moe(int layer) const { return n_routed_experts > 0 && layer >= first_k_dense_replace; }

    // Rows that a pass makes, in elements; products write whole tiles, so strides of what they write are multiples of 16.
    int q_width() const { return num_attention_heads * qk_head_dim(); }          // queries of all heads
    int q_a_width() const { return q_lora_rank > 0 ? q_lora_rank : q_width(); }  // what wqkv_a makes of them
    int64_t kv_offset() const { return round_up(q_a_width(), kTileRows); }       // of c_kv | k_rope behind it
    int64_t qkv_a_stride() const { return kv_offset() + round_up(kv_lora_rank + qk_rope_head_dim, kTileRows); }
    // Of the queries, which without q_lora stay in wqkv_a's rows.
    int64_t q_stride() const { return q_lora_rank > 0 ? round_up(q_width(), kTileRows) : qkv_a_stride(); }
    int64_t gate_logits_stride() const { return round_up(n_routed_experts, kTileRows); }
    int64_t logits_stride() const { return round_up(vocab_size, kTileRows); }
    // Parts of a cache row (kernels/format.h), and of a head's query against it: q_absorbed | rotated q_rope.
    int c_pad() const { return static_cast<int>(round_up(kv_lora_rank, 32)); }
    int r_pad() const { return static_cast<int>(round_up(qk_rope_head_dim, 16)); }
    int q_full_width() const { return c_pad() + r_pad(); }
    int64_t cache_row_bytes(CacheType type) const { return deepcalm::cache_row_bytes(type, c_pad(), r_pad()); }

    // Without a row's logits, scratch and results.
    RouterArgs router(const float* bias) const {
        return {.bias = bias,
                .n_routed_experts = n_routed_experts,
                .num_experts_per_tok = num_experts_per_tok,
                .n_group = n_group,
                .topk_group = topk_group,
                .scoring_func = scoring_func,
                .topk_method = topk_method,
                .norm_topk_prob = norm_topk_prob,
                .routed_scaling_factor = routed_scaling_factor};
    }
};

inline constexpr float kLatentNormEps = 1e-6F;

Status validate(const ModelConfig& cfg);

}  // namespace deepcalm
