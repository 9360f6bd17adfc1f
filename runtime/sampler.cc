#include "runtime/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

namespace deepcalm {
namespace {

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53U} * c[0], p1 = uint64_t{0xCD9E8D57U} * c[2];
        c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
             static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return c;
}

struct Candidate {
    float logit;
    int id;
};
// Most probable first, ties to the lowest id.
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Applies top_k, top_p and min_p to candidates sorted by before(); probabilities are exp((l - max) / temp).
void filter(std::vector<Candidate>& c, const SampleParams& p, double total) {
    const double max = c.front().logit;
    const auto weight = [&](const Candidate& x) { return std::exp((x.logit - max) / p.temp); };
    if (p.top_p < 1) {
        double mass = 0;
        size_t n = 0;
        while (n < c.size() && mass < p.top_p * total) mass += weight(c[n++]);
        c.resize(std::max<size_t>(n, 1));
    }
    if (p.min_p > 0) {
        size_t n = 1;
        while (n < c.size() && weight(c[n]) >= p.min_p) ++n;
        c.resize(n);
    }
}

}  // namespace

double gumbel(uint64_t seed, int64_t pos, int v) {
    const auto r = philox({static_cast<uint32_t>(v / 2), static_cast<uint32_t>(pos),
                           static_cast<uint32_t>(static_cast<uint64_t>(pos) >> 32), 0},
                          seed);
    const size_t half = static_cast<size_t>(v % 2) * 2;
    const uint64_t bits = (uint64_t{r[half]} << 32 | r[half + 1]) >> 12;  // 52 bits
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;         // never 0 or 1
    return -std::log(-std::log(u));
}

Result<int> sample(const float* logits, int n_vocab, int n_valid, const SampleParams& p, int64_t pos) {
    n_valid = std::min(n_valid, n_vocab);
    int best = -1;
    for (int v = 0; v < n_valid; ++v) {
        if (std::isnan(logits[v]))
            return Error{ErrorCode::kSession, "logits are not finite: token " + std::to_string(v) + " is NaN"};
        if (best < 0 || logits[v] > logits[best]) best = v;
    }
    if (best < 0 || !std::isfinite(logits[best]))
        return Error{ErrorCode::kSession, "logits are not finite: no finite maximum"};
    if (p.temp <= 0) return best;

    std::vector<Candidate> c;
    const bool all = p.top_k <= 0 && p.top_p >= 1 && p.min_p <= 0;
    c.reserve(static_cast<size_t>(n_valid));
    for (int v = 0; v < n_valid; ++v) c.push_back({logits[v], v});
    if (!all) {
        if (p.top_k > 0 && p.top_k < n_valid) {
            std::nth_element(c.begin(), c.begin() + p.top_k, c.end(), before);
            c.resize(static_cast<size_t>(p.top_k));
        }
        double total = 0;
        for (const Candidate& x : c) total += std::exp((double{x.logit} - logits[best]) / p.temp);
        std::sort(c.begin(), c.end(), before);
        filter(c, p, total);
    }
    double best_score = -INFINITY;
    int choice = best;
    for (const Candidate& x : c) {
        if (!std::isfinite(x.logit)) continue;
        const double score = double{x.logit} / p.temp + gumbel(p.seed, pos, x.id);
        if (score > best_score || (score == best_score && x.id < choice)) {
            best_score = score;
            choice = x.id;
        }
    }
    return choice;
}

}  // namespace deepcalm
