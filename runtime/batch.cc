#include "runtime/batch.h"

#include "kernels/elementary.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace deepcalm {
namespace {

// Probability of `id` under softmax(logits / temp) over valid ids; at temp 0 under softmax(logits). Those less probable by
// e^-20 are left out, 3e-4 of the sum at most: their exponentials would take longer than the pass of a small layer.
double probability(const float* logits, int n_valid, float temp, int id) {
    const double scale = temp > 0 ? 1.0 / temp : 1.0;
    const auto least = static_cast<float>(logits[id] - 20 / scale);
    double sum = 0;
    for (int v = 0; v < n_valid; ++v) {
        if (logits[v] > least) sum += exp_f64((double{logits[v]} - logits[id]) * scale);
    }
    return 1 / sum;
}

// Adds what the counters gain until the end of the scope.
class Meter {
  public:
    Meter(const PassStats& stats, int64_t& bytes, double& seconds)
        : stats_(stats), bytes_(bytes), seconds_(seconds), read_(read()), ran_(stats.seconds) {}
    Meter(const Meter&) = delete;
    Meter& operator=(const Meter&) = delete;
    ~Meter() {
        bytes_ += read() - read_;
        seconds_ += stats_.seconds - ran_;
    }

  private:
    int64_t read() const { return stats_.weight_bytes + stats_.cache_bytes; }
    const PassStats& stats_;
    int64_t& bytes_;
    double& seconds_;
    const int64_t read_;
    const double ran_;
};

}  // namespace

// One sequence of a step that is under way.
struct Step::Lane {
    explicit Lane(Work& work) : w(work), s(*work.session), undo(s), rows(work.ids), n(s.cache_.len) {
        if (s.keep_mtp_ && s.lacks_hidden()) {
            // It is computed again, as the first row of this pass. One that fails halfway has written the row's own bits
            // again, or nothing: it ends between stages.
            again = 1;
            rows.insert(rows.begin(), s.tokens_.back());
            s.cache_.len -= 1;
        }
    }
    int n_valid() const { return std::min(w.n_valid, s.model_.cfg().vocab_size); }
    // Logits rows of the main pass; those that tokens are chosen from are the last ones.
    int n_logits() const {
        return w.sample                     ? 1 + w.n_drafted
               : w.want == WantLogits::kAll ? static_cast<int>(w.ids.size())
                                            : static_cast<int>(w.want == WantLogits::kLast);
    }

    Work& w;
    Session& s;
    Session::Undo undo;
    std::vector<int32_t> rows;  // of the main pass: the row computed again, ids, drafts
    int n;                      // length before the step
    int again = 0;
    int drafts = 0;        // still to be made
    int row = 0;           // of the lane's first logits in a pass
    std::vector<float> g;  // [hidden_size] the MTP layer's last output
};

Status Step::check(const Work& w, std::span<Work* const> others) const {
    const Session& s = *w.session;
    const bool twice = std::ranges::count(others, w.session, &Work::session) > 0;
    if (twice || &s.model_ != &model_) return Error{ErrorCode::kSession, "step: a session twice, or of another model"};
    const char* what = w.sample ? "draft round" : "forward";
    DC_TRY_STATUS(s.check(s.cache_, w.ids, what));
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kSession, "draft: " + text}; };
    const auto given = std::ssize(w.drafts), n = w.k ? std::ptrdiff_t{w.k} : given;
    if (n < 0 || n > kMaxDraft) return fail(std::to_string(n) + ", expected 0.." + std::to_string(kMaxDraft));
    if (w.k > 0 && !s.keep_mtp_) return fail("this session keeps no MTP state");
    if (n > 0 && (w.ids.size() != 1 || !w.sample)) return fail("only behind a single token");
    if (given && given != n) return fail(std::to_string(given) + " ids, expected k = " + std::to_string(n));
    const int n_vocab = s.model_.cfg().vocab_size;
    for (const auto* ids : {&w.drafts, &w.chosen}) {
        for (const int32_t id : *ids) {
            if (id < 0 || id >= n_vocab)
                return fail("token id " + std::to_string(id) + ", expected 0.." + std::to_string(n_vocab - 1));
        }
    }
    return {};
}

Status Step::draft(std::span<Lane> lanes) {
    std::vector<Lane*> live;
    for (Lane& l : lanes) {
        const int room = std::min(l.s.cache_.ctx - l.n, l.s.max_rows_ - l.again) - 1;
        if (l.w.k == 0 && room > 0 && !l.w.drafts.empty()) {
            l.w.n_drafted = std::min(static_cast<int>(l.w.drafts.size()), room);
            l.rows.insert(l.rows.end(), l.w.drafts.begin(), l.w.drafts.begin() + l.w.n_drafted);
        }
        // Row 0 of the MTP cache pairs (h_0, t_1): the layer drafts nothing before the first main row.
        l.drafts = l.n > 0 && l.again == 0 ? std::min(l.w.k, room) : 0;
        if (l.drafts > 0) live.push_back(&l);
    }
    if (live.empty()) return {};
    const Meter meter(stats_, cost_.draft_bytes, cost_.draft_seconds);
    DC_TRY_STATUS(model_.reserve_logits(std::ssize(live)));
    // catch-up from true pairs; its last row drafts d_1; then the layer feeds on its own post-norm output
    DC_TRY_STATUS(catch_up(live, true));
    for (;;) {
        std::vector<int32_t> chosen(live.size(), -1);
        DC_TRY_STATUS(model_.backend().each(static_cast<int>(live.size()), [&](int i) {
            const Lane& l = *live[static_cast<size_t>(i)];
            const float* row = logits(l.row);
            auto id = sample(row, model_.cfg().vocab_size, l.n_valid(), *l.w.sample, l.n + std::ssize(l.rows));
            if (!id.ok()) return;  // a damaged MTP layer must not stop generation: verify what there is
            if (l.w.min_confidence > 0 &&
                probability(row, l.n_valid(), l.w.sample->temp, id.value()) < l.w.min_confidence)
                return;
            chosen[static_cast<size_t>(i)] = id.value();
        }));
        std::vector<Lane*> still;
        for (size_t i = 0; i < live.size(); ++i) {
            Lane& l = *live[i];
            if (chosen[i] < 0) continue;
            l.rows.push_back(l.w.drafts.empty() ? chosen[i] : l.w.drafts[static_cast<size_t>(l.w.n_drafted)]);
            if (++l.w.n_drafted < l.drafts) still.push_back(&l);
        }
        live = std::move(still);
        if (live.empty()) break;
        std::vector<Session::Part> parts;
        for (Lane* l : live) {
            l->row = static_cast<int>(parts.size());
            parts.push_back(
                {.session = &l->s, .ids = std::span(l->rows).last(1), .hidden = l->g.data(), .n_logits = 1});
        }
        cost_.mtp_rows += static_cast<int>(parts.size());
        DC_TRY_STATUS(Session::pass(model_, parts, 0, stats_, [&](size_t i, View<const float> hidden, auto) {
            std::copy_n(hidden.row(0), live[i]->g.size(), live[i]->g.data());
        }));
    }
    for (Lane& l : lanes) l.s.mtp_cache_.len = std::min(l.s.mtp_cache_.len, l.n);  // rows from recycled states go
    return {};
}

Status Step::verify(std::span<Lane> lanes) {
    const Meter meter(stats_, cost_.verify_bytes, cost_.verify_seconds);
    const int64_t experts = stats_.experts_touched;
    std::vector<Session::Part> parts;
    int n_logits = 0;
    for (Lane& l : lanes) {
        l.row = n_logits;
        DC_TRY_STATUS(l.s.reserve_hidden(l.w.keep_hidden ? std::ssize(l.w.ids) : 0));
        parts.push_back({.session = &l.s, .ids = l.rows, .n_logits = l.n_logits(), .interrupted = l.w.interrupted});
        n_logits += l.n_logits();
        cost_.rows += static_cast<int>(l.rows.size());
    }
    DC_TRY_STATUS(model_.reserve_logits(n_logits));
    const int64_t d = model_.cfg().hidden_size;
    DC_TRY_STATUS(
        Session::pass(model_, parts, 0, stats_, [&](size_t i, View<const float> hidden, std::span<const int32_t> used) {
            Lane& l = lanes[i];
            Session& s = l.s;
            s.tokens_.insert(s.tokens_.end(), l.rows.begin() + l.again, l.rows.end());
            for (int64_t row = 0; s.keep_mtp_ && row < std::ssize(l.rows); ++row)
                s.pending_.insert(s.pending_.end(), hidden.row(row), hidden.row(row) + d);
            for (int64_t row = 0; row < s.hidden_.size() / (4 * d); ++row)
                std::memcpy(s.hidden_.data() + 4 * row * d, hidden.row(l.again + row), static_cast<size_t>(4 * d));
            experts_ = lanes.size() == 1 ? used : std::span<const int32_t>();
        }));
    cost_.experts_verify += stats_.experts_touched - experts;
    return {};
}

void Step::choose(Lane& l) const {
    const int n_vocab = model_.cfg().vocab_size;
    for (int j = 0; l.w.sample && j <= l.w.n_drafted; ++j) {
        const float* row = logits(l.row + j);
        const auto at = static_cast<size_t>(j);
        auto next = at < l.w.chosen.size()
                        ? Result<int32_t>(l.w.chosen[at])
                        : sample(row, n_vocab, l.n_valid(), *l.w.sample, l.n + std::ssize(l.w.ids) + j);
        if (!next.ok()) {  // plain decoding reports a row without a token when it gets there, not earlier
            if (j == 0) l.w.error = std::move(next.error());
            l.w.n_accepted = std::max(j - 1, 0);  // the draft accepted last is the token that the next round passes
            break;
        }
        l.w.tokens.push_back(next.value());
        if (l.w.n_top >= 0) l.w.scores.push_back(scores_of(row, l.n_valid(), next.value(), l.w.n_top));
        if (j == l.w.n_drafted || next.value() != l.rows[l.rows.size() - static_cast<size_t>(l.w.n_drafted - j)]) break;
        ++l.w.n_accepted;
    }
    if (l.w.logits == nullptr || l.w.error) return;
    const auto n_rows = static_cast<int64_t>(l.w.sample ? l.w.tokens.size() : static_cast<size_t>(l.n_logits()));
    for (int64_t i = 0; i < n_rows; ++i)
        std::memcpy(l.w.logits + i * n_vocab, logits(l.row + i), static_cast<size_t>(n_vocab) * 4);
}

void Step::accept(Lane& l) {
    if (l.w.error) return;  // undone at the end
    Session& s = l.s;
    const auto rejected = static_cast<size_t>(l.w.n_drafted - l.w.n_accepted);
    s.count_union(experts_, l.rows.size(), l.rows.size() - rejected);
    s.cache_.len -= static_cast<int>(rejected);
    s.tokens_.resize(static_cast<size_t>(s.cache_.len));
    if (s.keep_mtp_) s.pending_.resize(s.pending_.size() - rejected * static_cast<size_t>(model_.cfg().hidden_size));
}

Status Step::catch_up(std::span<Lane* const> lanes, bool draft) {
    struct Todo {
        Lane* lane;
        std::vector<int32_t> ids;  // the tokens after the pending positions
        size_t done = 0;
    };
    std::vector<Todo> todo;
    const int64_t d = model_.cfg().hidden_size;
    for (Lane* l : lanes) {
        const Session& s = l->s;
        const int m = s.mtp_cache_.len, rows = std::min(s.n_pending(), s.cache_.len - m - (draft ? 0 : 1));
        if (rows <= 0) continue;
        Todo t{.lane = l, .ids = {s.tokens_.begin() + m + 1, s.tokens_.begin() + std::min(m + 1 + rows, s.cache_.len)}};
        if (std::ssize(t.ids) < rows) t.ids.push_back(l->rows.back());
        if (draft) l->g.resize(static_cast<size_t>(d));
        todo.push_back(std::move(t));
    }
    for (int row = 0; !todo.empty();) {
        std::vector<Session::Part> parts;
        const int first_logits = row;
        for (int room = model_.backend().max_rows; Todo& t : todo) {
            const auto left = static_cast<int>(t.ids.size() - t.done);
            const int n = std::min({left, room, t.lane->s.max_rows_});
            if (n == 0) continue;
            room -= n;
            const bool last = draft && n == left;
            if (last) t.lane->row = row++;
            parts.push_back({.session = &t.lane->s,
                             .ids = std::span(t.ids).subspan(t.done, static_cast<size_t>(n)),
                             .hidden = t.lane->s.pending_.data(),
                             .n_logits = last ? 1 : 0});
            cost_.mtp_rows += n;
        }
        // Pass by pass: the next one may fail.
        DC_TRY_STATUS(Session::pass(model_, parts, first_logits, stats_, [&](size_t i, View<const float> hidden, auto) {
            const auto n = std::ssize(parts[i].ids);
            Todo& t = *std::find_if(todo.begin(), todo.end(), [&](Todo& x) { return &x.lane->s == parts[i].session; });
            std::vector<float>& pending = t.lane->s.pending_;
            pending.erase(pending.begin(), pending.begin() + n * d);
            t.done += static_cast<size_t>(n);
            if (draft) std::copy_n(hidden.row(n - 1), d, t.lane->g.begin());
        }));
        std::erase_if(todo, [](const Todo& t) { return t.done == t.ids.size(); });
    }
    return {};
}

Status Step::run(std::span<Work* const> work) {
    std::vector<Lane> lanes;
    lanes.reserve(work.size());
    for (Work* w : work) {
        w->tokens.clear();
        w->scores.clear();
        w->n_drafted = w->n_accepted = 0;
        lanes.emplace_back(*w);
    }
    DC_TRY_STATUS(draft(lanes));
    DC_TRY_STATUS(verify(lanes));
    DC_TRY_STATUS(
        model_.backend().each(static_cast<int>(lanes.size()), [&](int i) { choose(lanes[static_cast<size_t>(i)]); }));
    std::vector<Lane*> late;
    for (Lane& l : lanes) {
        accept(l);
        // A prompt's MTP rows belong to its prefill, where they share a pass; single steps collect them.
        if (!l.w.error && l.s.keep_mtp_ && (l.w.ids.size() > 1 || l.s.n_pending() > kMaxPending)) late.push_back(&l);
    }
    const Meter meter(stats_, cost_.draft_bytes, cost_.draft_seconds);
    DC_TRY_STATUS(catch_up(late, false));
    for (const Lane* l : late) std::vector<float>(l->s.pending_).swap(l->s.pending_);  // not the memory of a chunk
    for (Lane& l : lanes) {
        if (!l.w.error) l.undo.keep();
    }
    return {};
}

StepCost Step::run(Model& model, std::span<Work> work, PassStats& stats) {
    const auto held = model.hold_passes();
    Step step(model, stats);
    std::vector<Work*> able;
    for (Work& w : work) {
        Status ok = step.check(w, able);
        if (ok.ok()) {
            able.push_back(&w);
        } else {
            w.error = std::move(ok.error());
        }
    }
    if (able.empty()) return step.cost_;
    const auto attempt = [&](std::span<Work* const> some) -> Status {
        try {
            return step.run(some);
        } catch (const std::bad_alloc&) {
            return Error{ErrorCode::kResource, "out of memory"};  // allocates nothing
        }
    };
    if (able.size() > 1 && attempt(able).ok()) return step.cost_;
    step.cost_.rows = step.cost_.mtp_rows = 0;  // those of the step, not of what it took
    for (Work* w : able) {                      // alone, or one after the other: perhaps memory suffices for some
        w->error.reset();
        Status ran = attempt(std::span(&w, 1));
        if (!ran.ok()) w->error = std::move(ran.error());
    }
    return step.cost_;
}

Status Step::repeat_last(Session& session) {
    Step step(session.model_, session.stats_);
    Work work{.session = &session};
    Lane lane(work);
    DC_TRY_STATUS(step.verify(std::span(&lane, 1)));
    lane.undo.keep();
    return {};
}

Status Step::catch_up(Session& session) {
    Step step(session.model_, session.stats_);
    Work work{.session = &session};
    Lane lane(work);
    Lane* lanes[] = {&lane};
    DC_TRY_STATUS(step.catch_up(lanes, false));
    lane.undo.keep();
    return {};
}

}  // namespace deepcalm
