// The typed model configuration. Field names are those of config.json; Python (deepcalm/checkpoint.py) resolves defaults
// and old and new key styles, C++ checks every number again before anything is allocated.
#pragma once

#include "kernels/kernels.h"
#include "runtime/result.h"

#include <string>

namespace deepcalm {

enum class RopeType : uint8_t { kDefault, kYarn };

struct ModelConfig {
    std::string
        model_type;  // deepseek_v2 | deepseek_v3 | kimi_k2 | glm4_moe_lite; informative, no branch depends on it
    int hidden_size = 0;
    int num_hidden_layers = 0;
    int num_attention_heads = 0;
    int q_lora_rank = 0;  // 0: plain q_proj
    int kv_lora_rank = 0;
    int qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;
    int intermediate_size = 0;      // dense FFN width
    int moe_intermediate_size = 0;  // routed expert width
    int n_routed_experts = 0;       // 0: every layer is dense
    int num_experts_per_tok = 0;
    int n_shared_experts = 0;
    int first_k_dense_replace = 0;
    int n_group = 1, topk_group = 1;
    TopkMethod topk_method = TopkMethod::kGreedy;
    ScoringFunc scoring_func = ScoringFunc::kSoftmax;
    bool norm_topk_prob = false;
    float routed_scaling_factor = 1;
    float rms_norm_eps = 1e-6F;  // layer norms; the two latent norms use kLatentNormEps (docs/model.md 3.1)
    double rope_theta = 1e4;
    RopeType rope_type = RopeType::kDefault;
    double rope_factor = 1;
    int original_max_position_embeddings = 0;
    double beta_fast = 32, beta_slow = 1;
    double mscale = 0, mscale_all_dim = 0;  // 0: absent
    double attention_factor = 0;            // 0: absent
    bool rope_truncate = true;
    int max_position_embeddings = 0;
    int vocab_size = 0;
    int num_nextn_predict_layers = 0;  // 0 or 1: an MTP layer is in the file
    int mtp_draft_head = 0;            // 0 or 1: so is mtp.head, a copy of the head that drafts read

    int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
    bool is_moe(int layer) const { return n_routed_experts > 0 && layer >= first_k_dense_replace; }
};

inline constexpr float kLatentNormEps = 1e-6F;

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

Status validate(const ModelConfig& cfg);

}  // namespace deepcalm
