#include "runtime/sampler.h"

#include "kernels/noise.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

namespace deepcalm {
namespace {

struct Candidate {
    float logit;
    int id;
};
// Most probable first, ties to the lowest id.
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Keeps what top_k, top_p and min_p leave; probabilities are exp((l - max) / temp). Sorts no more than top_p needs.
void filter(std::vector<Candidate>& c, const SampleParams& p, double max) {
    const auto weight = [&](const Candidate& x) { return exp_f64((x.logit - max) / p.temp); };
    const auto at = [&](size_t i) { return c.begin() + static_cast<ptrdiff_t>(i); };
    if (p.top_k > 0 && static_cast<size_t>(p.top_k) < c.size()) {
        std::nth_element(c.begin(), at(static_cast<size_t>(p.top_k)), c.end(), before);
        c.resize(static_cast<size_t>(p.top_k));
        std::sort(c.begin(), c.end(), before);  // the sum below has one order
    }
    if (p.top_p < 1) {
        double total = 0, mass = 0;
        for (const Candidate& x : c) total += weight(x);
        size_t n = 0, sorted = 0;
        for (; n < c.size() && (n == 0 || mass < p.top_p * total); mass += weight(c[n++])) {
            if (n < sorted) continue;
            const size_t end = std::min(c.size(), 4 * sorted + 64);
            if (end < c.size()) std::nth_element(at(sorted), at(end), c.end(), before);
            std::sort(at(sorted), at(end), before);
            sorted = end;
        }
        c.resize(n);
    }
    if (p.min_p > 0) {
        const double border = max + p.temp * log_f64(p.min_p), room = 1e-9 * (1 + std::abs(border) + std::abs(max));
        std::erase_if(c, [&](const Candidate& x) {  // most without an exponential
            return x.logit < border - room || (x.logit < border + room && weight(x) < p.min_p);
        });
    }
}

// [k] noise bits below kNoiseRange minus this give less than k of Gumbel noise: 1 - u > exp(-k), with room for rounding.
constexpr auto kTails = [] {
    std::array<uint64_t, 40> tail{};
    for (size_t k = 0; k < tail.size(); ++k)
        tail[k] = static_cast<uint64_t>(0x1p52 * 1.000001 * exp_f64(-static_cast<double>(k))) + 1;
    return tail;
}();

}  // namespace

// Where the greatest of n logits is, the first of equals. Blocks without a greater one are passed over at vector speed.
Result<int> argmax(const float* logits, int n) {
    int best = 0;
    for (int begin = 0; begin < n; begin += 512) {
        const int end = std::min(begin + 512, n);
        int found = 0;
        for (int v = begin; v < end; ++v) found |= !(logits[v] <= logits[best]);
        for (int v = begin; found != 0 && v < end; ++v) {
            if (std::isnan(logits[v]))
                return Error{ErrorCode::kSession, not_finite(": token " + std::to_string(v) + " is NaN")};
            if (logits[v] > logits[best]) best = v;
        }
    }
    if (n > 0 && std::isfinite(logits[best])) return best;
    return Error{ErrorCode::kSession, not_finite(": no finite maximum")};
}

Result<int> sample(const float* logits, int n_vocab, int n_valid, const SampleParams& p, int64_t pos) {
    n_valid = std::min(n_valid, n_vocab);
    DC_TRY(const int best, argmax(logits, n_valid));
    if (p.temp <= 0) return best;

    std::vector<Candidate> c;
    c.reserve(static_cast<size_t>(n_valid));
    for (int v = 0; v < n_valid; ++v) {
        const float logit = logits[v];  // read once: another thread may write to a caller's array, and NaN has no order
        if (std::isfinite(logit)) c.push_back({logit, v});
    }
    filter(c, p, logits[best]);
    // Of a large vocabulary few tokens can still win once some score is known: the others are ruled out without logarithms.
    double best_score = -INFINITY;
    int choice = best, block_of = -1;
    NoiseBlock block{};
    for (const Candidate& x : c) {
        if (x.id / 2 != block_of) {
            block_of = x.id / 2;
            block = noise_block(p.seed, pos, x.id);
        }
        const uint64_t bits = block.bits(x.id);
        const double base = double{x.logit} / p.temp, needed = best_score - base;
        if (needed >= 1 && kNoiseRange - bits > kTails[needed < 39 ? static_cast<size_t>(needed) : 39]) continue;
        const double score = base + gumbel_of(bits);
        if (score > best_score || (score == best_score && x.id < choice)) {
            best_score = score;
            choice = x.id;
        }
    }
    return choice;
}

std::string not_finite(const std::string& what) {
    return "logits are not finite" + what + "; values too large for a cache in f16 or q8 need --kv bf16 or f32";
}

Scores scores_of(const float* logits, int n_valid, int32_t token, int n_top) {
    const float max = *std::max_element(logits, logits + n_valid);
    double sum = 0;
    for (int v = 0; v < n_valid; ++v) sum += exp_f64(double{logits[v]} - max);
    const double log_sum = log_f64(sum);
    const auto logprob = [&](int32_t id) { return double{logits[id]} - max - log_sum; };
    Scores s{.token = token, .logprob = logprob(token), .top = {}};
    std::vector<Candidate> c;
    for (int v = 0; v < n_valid && n_top > 0; ++v) c.push_back({logits[v], v});
    const auto n = std::min(c.size(), static_cast<size_t>(std::max(n_top, 0)));
    std::partial_sort(c.begin(), c.begin() + static_cast<ptrdiff_t>(n), c.end(), before);
    for (size_t i = 0; i < n; ++i) s.top.emplace_back(c[i].id, logprob(c[i].id));
    return s;
}

}  // namespace deepcalm
