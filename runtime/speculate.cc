#include "runtime/speculate.h"

#include "kernels/elementary.h"

#include <algorithm>

namespace deepcalm {
namespace {

// Probability of `id` under softmax(logits / temp) over valid ids; at temp 0 under softmax(logits).
double probability(const float* logits, int n_valid, float temp, int id) {
    const double scale = temp > 0 ? 1.0 / temp : 1.0;
    double sum = 0;
    for (int v = 0; v < n_valid; ++v) sum += exp_f64((double{logits[v]} - logits[id]) * scale);
    return 1 / sum;
}

struct Meter {  // what the session's counters gained since construction
    explicit Meter(const PassStats& s) : stats(s), before(s) {}
    int64_t bytes() const { return stats.weight_bytes - before.weight_bytes + stats.cache_bytes - before.cache_bytes; }
    double seconds() const { return stats.seconds - before.seconds; }
    int64_t experts() const { return stats.experts_touched - before.experts_touched; }
    const PassStats& stats;
    PassStats before;
};

}  // namespace

Status Speculator::check(const Session& s, int32_t token, const DraftParams& p) {
    DC_TRY_STATUS(s.check(s.cache_, {&token, 1}, "draft round"));
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kSession, "draft: " + text}; };
    if (p.k < 0 || p.k > kMaxDraft) return fail(std::to_string(p.k) + ", expected 0.." + std::to_string(kMaxDraft));
    if (p.k > 0 && !s.keep_mtp_) return fail("this session keeps no MTP state");
    const int n_vocab = s.model_.cfg().vocab_size;
    for (int j = 0; p.forced != nullptr && j < p.k; ++j) {
        if (p.forced[j] < 0 || p.forced[j] >= n_vocab) {
            return fail("forced token id " + std::to_string(p.forced[j]) + ", expected 0.." +
                        std::to_string(n_vocab - 1));
        }
    }
    return {};
}

Status Speculator::draft(Session& s, int k, const DraftParams& p, std::vector<int32_t>& rows) {
    const int n = s.cache_.len, n_vocab = s.model_.cfg().vocab_size, n_valid = std::min(p.n_valid, n_vocab);
    // catch-up from true pairs; its last row drafts d_1; then the layer feeds on its own post-norm output
    DC_TRY_STATUS(s.catch_up(&rows[0], 1));
    std::vector<float> g(static_cast<size_t>(s.model_.cfg().hidden_size));
    for (int j = 1; j <= k; ++j) {
        if (j > 1) {
            const int32_t id = rows.back();
            DC_TRY_STATUS(s.mtp_pass({&id, 1}, g.data(), 1));
        }
        std::copy_n(s.pass_.hidden.row(s.pass_.n - 1), g.size(), g.data());
        auto draft = sample(s.logits_row(0), n_vocab, n_valid, p.sample, n + j);
        if (!draft.ok()) break;  // a damaged MTP layer must not stop generation: verify what there is
        if (p.min_confidence > 0 &&
            probability(s.logits_row(0), n_valid, p.sample.temp, draft.value()) < p.min_confidence)
            break;
        rows.push_back(p.forced != nullptr ? p.forced[j - 1] : draft.value());
    }
    s.drop_drafts();
    return {};
}

Result<Round> Speculator::round(Session& s, int32_t token, const DraftParams& p, float* logits) {
    const auto held = s.model_.hold_passes();
    DC_TRY_STATUS(check(s, token, p));
    const int n_vocab = s.model_.cfg().vocab_size, n_valid = std::min(p.n_valid, n_vocab);
    std::vector<int32_t> rows{token};  // the verification batch: t_n, d_1, ..., d_k
    Session::Undo undo(s);             // as if the round had not been: `token` may be another one next time
    if (s.keep_mtp_) {
        DC_TRY_STATUS(s.restore_pending());
    }
    const int n = s.cache_.len;
    Round r;
    // Row 0 of the MTP cache pairs (h_0, t_1): nothing can be drafted before the first main row.
    const int k = n == 0 ? 0 : std::min({p.k, s.cache_.ctx - n - 1, s.max_rows_ - 1});
    if (k > 0) {
        const Meter meter(s.stats_);
        DC_TRY_STATUS(draft(s, k, p, rows));
        r.draft_bytes = meter.bytes();
        r.draft_seconds = meter.seconds();
    }
    r.n_drafted = static_cast<int>(rows.size()) - 1;

    const Meter meter(s.stats_);
    DC_TRY_STATUS(s.main_pass(rows, r.n_drafted + 1));
    r.verify_bytes = meter.bytes();
    r.verify_seconds = meter.seconds();
    r.experts_verify = meter.experts();
    for (int j = 0; j <= r.n_drafted; ++j) {
        auto next = sample(s.logits_row(j), n_vocab, n_valid, p.sample, n + 1 + j);
        if (!next.ok()) {  // plain decoding reports a row without a token when it gets there, not earlier
            if (j == 0) return std::move(next.error());
            --r.n_accepted;  // the draft accepted last is the token that the next round passes
            break;
        }
        r.tokens.push_back(next.value());
        if (j == r.n_drafted || next.value() != rows[static_cast<size_t>(j) + 1]) break;
        ++r.n_accepted;
    }
    if (logits != nullptr) s.copy_logits(r.n_accepted + 1, logits);
    const Meter catch_up(s.stats_);
    DC_TRY_STATUS(s.accept(r.n_accepted + 1, false));  // rejected rows are forgotten
    r.draft_bytes += catch_up.bytes();
    r.draft_seconds += catch_up.seconds();
    undo.keep();
    return r;
}

}  // namespace deepcalm
