#include "runtime/config.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

// What a field may be; `least` minus infinity: anything.
struct Values {
    double least = -std::numeric_limits<double>::infinity(), most = std::numeric_limits<double>::infinity();
    bool above = false;  // least itself is excluded
};
Values any() { return {}; }
Values in(double least, double most) { return {.least = least, .most = most}; }
Values from(double least) { return {.least = least}; }
Values above(double limit) { return {.least = limit, .above = true}; }

template <class T> Status check(const char* key, const T& v, const Values& may) {
    if constexpr (std::is_same_v<T, std::vector<double>>) {
        for (const double each : v) DC_TRY_STATUS(check(key, each, may));
    } else if constexpr (std::is_floating_point_v<T>) {
        if (std::isinf(may.least) || (std::isfinite(v) && (may.above ? v > may.least : v >= may.least))) return {};
        return bad(key, number(v), std::string("a finite number ") + (may.above ? "> " : ">= ") + number(may.least));
    } else if constexpr (std::is_integral_v<T>) {
        const auto d = static_cast<double>(v);
        if (d >= may.least && d <= may.most) return {};
        return bad(key, std::to_string(v), number(may.least) + ".." + number(may.most));
    }
    return {};
}

Status validate_moe(const ModelConfig& c) {
    DC_TRY_STATUS(check("n_shared_experts * moe_intermediate_size",
                        int64_t{c.n_shared_experts} * c.moe_intermediate_size, in(0, kMaxFfnSize)));
    const bool noaux = c.topk_method == TopkMethod::kNoauxTc;
    if (noaux != (c.scoring_func == ScoringFunc::kSigmoid)) {
        return bad("scoring_func", noaux ? "softmax" : "sigmoid",
                   noaux ? "sigmoid (topk_method noaux_tc)" : "softmax (topk_method greedy or group_limited_greedy)");
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
    return check("num_experts_per_tok", c.num_experts_per_tok, in(1, double{1} * group_size * c.topk_group));
}

}  // namespace

Status validate(const ModelConfig& c) {
    const auto printable = [](char ch) { return ch > ' ' && ch <= '~'; };
    if (c.model_type.empty() || c.model_type.size() > 64 ||
        !std::all_of(c.model_type.begin(), c.model_type.end(), printable)) {
        return bad("model_type", "no such name", "1..64 printable characters");
    }
    const auto if_moe = [&](const Values& may) { return c.n_routed_experts > 0 ? may : any(); };
#define X(type, name, values) DC_TRY_STATUS(check(#name, c.name, values));
    DEEPCALM_CONFIG(X)
#undef X
    if (c.qk_rope_head_dim % 2 != 0)
        return bad("qk_rope_head_dim", std::to_string(c.qk_rope_head_dim), "an even number");
    const int factors = c.rope_type == RopeType::kLongrope ? c.qk_rope_head_dim / 2 : 0;
    if (std::ssize(c.short_factor) != factors)
        return bad("short_factor", std::to_string(c.short_factor.size()) + " numbers", std::to_string(factors));
    return c.n_routed_experts > 0 ? validate_moe(c) : Status();
}

}  // namespace deepcalm
