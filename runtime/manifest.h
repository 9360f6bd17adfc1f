// Which tensors a packed model holds: one row per tensor. The packer (through _core.expected_tensors) and the loader read
// the same list, so a name or a shape is written once.
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
    std::string name;
    Role role;
    bool tiled;              // false: plain row-major [rows, cols] or [rows] (cols == 0)
    bool stacked;            // has a leading slice dimension (experts or heads), even when n_slices == 1
    int n_slices;            // 1 unless stacked
    int rows, cols;          // of a slice; stacked parts: the sum of the parts' padded rows
    std::vector<int> parts;  // natural rows of each part stacked along the rows, each padded to 16; empty: one part
    bool interleaved;        // two equal parts alternate tile by tile (gate, up)
};

// In file order. Names: embed, final_norm, head; layers.{i}. and mtp. + {attn_norm, wqkv_a, q_a_norm, kv_a_norm, wq_b, w_uk,
// w_uv, wo, ffn_norm, w_gate_up, w_down | router, router_bias, experts.w_gate_up, experts.w_down, shared.w_gate_up,
// shared.w_down}; mtp. + {enorm, hnorm, eh_proj, final_norm, head}.
std::vector<TensorSpec> expected_tensors(const ModelConfig& cfg);

// Formats a tensor of this role may be stored in (tiled: Format; plain: f32, bf16, f16 by name).
bool format_allowed(Role role, Format format);

}  // namespace deepcalm
