#include "runtime/manifest.h"

namespace deepcalm {

std::vector<TensorSpec> expected_tensors(const ModelConfig& cfg) {
    std::vector<TensorSpec> out;
    ModelWeights unbound(cfg);
    visit(unbound, cfg, [&](const TensorSpec& spec, auto&) { out.push_back(spec); });
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
