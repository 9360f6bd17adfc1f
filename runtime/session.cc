#include "runtime/session.h"

#include "runtime/batch.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <thread>

namespace deepcalm {
Result<std::unique_ptr<Session>> Session::make(Model& model, int ctx, CacheType kv, int max_rows, bool keep_mtp) {
    const ModelConfig& c = model.cfg();
    if (ctx < 1 || ctx > c.max_position_embeddings) {
        return Error{ErrorCode::kSession, "ctx: " + std::to_string(ctx) + ", expected 1.." +
                                              std::to_string(c.max_position_embeddings) + " (max_position_embeddings)"};
    }
    if (max_rows < 1 || max_rows > 4096) {
        return Error{ErrorCode::kSession, "max_rows: " + std::to_string(max_rows) + ", expected 1..4096"};
    }
    if (keep_mtp && c.num_nextn_predict_layers == 0) {
        return Error{ErrorCode::kUnsupported, "this model has no MTP layer: nothing to draft with"};
    }
    std::unique_ptr<Session> s(new Session(model));
    s->kv_ = kv;
    s->keep_mtp_ = keep_mtp;
    s->max_rows_ = max_rows;
    s->cache_ = {.n_layers = c.num_hidden_layers, .ctx = ctx, .row_bytes = c.cache_row_bytes(kv)};
    if (c.num_nextn_predict_layers > 0) s->mtp_cache_ = {.n_layers = 1, .ctx = ctx, .row_bytes = s->cache_.row_bytes};
    const auto held = model.hold_passes();
    DC_TRY_STATUS(model.backend().reserve(max_rows + 1));  // one may be computed again
    DC_TRY(s->engine_, model.backend().make_engine({.ctx = ctx, .kv = kv, .max_rows = max_rows}));
    return s;
}

Result<std::unique_ptr<Session>> Session::fork(int n, int ctx) const {
    DC_TRY(auto other, make(model_, ctx, kv_, max_rows_, keep_mtp_));
    const auto held = model_.hold_passes();
    DC_TRY_STATUS(not_decoding("fork"));
    if (n < 0 || n > std::min(cache_.len, ctx)) {
        return Error{ErrorCode::kSession, "fork: " + std::to_string(n) + " positions, expected 0.." +
                                              std::to_string(std::min(cache_.len, ctx))};
    }
    std::vector<std::byte> rows(static_cast<size_t>(n * cache_.row_bytes));
    for (int i = 0; n > 0 && i < cache_.n_layers + mtp_cache_.n_layers; ++i) {
        const bool mtp = i == cache_.n_layers;
        const int layer = mtp ? 0 : i, n_rows = mtp ? std::min(n, mtp_cache_.len) : n;
        DC_TRY_STATUS(engine_->copy_rows(mtp, layer, n_rows, rows.data(), false));
        DC_TRY_STATUS(other->engine_->copy_rows(mtp, layer, n_rows, rows.data(), true));
    }
    other->tokens_ = tokens_;
    other->pending_ = pending_;
    other->cache_.len = cache_.len;
    other->mtp_cache_.len = std::min(n, mtp_cache_.len);
    other->forget(n);
    return other;
}

Session::~Session() {
    if (engine_ == nullptr) return;
    try {
        const auto held = model_.hold_passes();
        engine_.reset();
    } catch (const InUseAtFork&) {  // a device is the parent's
        (void)engine_.release();
    }
}

Status Session::check(const Cache& cache, std::span<const int32_t> ids, const char* what) const {
    const auto fail = [&](const std::string& text) {
        return Error{ErrorCode::kSession, std::string(what) + ": " + text};
    };
    DC_TRY_STATUS(not_decoding(what));
    if (ids.empty()) return fail("no tokens");
    if (static_cast<int64_t>(ids.size()) > max_rows_) {
        return fail(std::to_string(ids.size()) +
                    " tokens in one pass, at most max_rows = " + std::to_string(max_rows_));
    }
    if (cache.len + static_cast<int64_t>(ids.size()) > cache.ctx) {
        return fail("context full: " + std::to_string(cache.len) + " + " + std::to_string(ids.size()) +
                    " positions, the session holds " + std::to_string(cache.ctx));
    }
    for (const int32_t id : ids) {
        if (id < 0 || id >= model_.cfg().vocab_size) {
            return fail("token id " + std::to_string(id) + ", expected 0.." +
                        std::to_string(model_.cfg().vocab_size - 1));
        }
    }
    return {};
}

Status Session::pass(Model& model, std::span<const Part> parts, int64_t first_logits, PassStats& stats,
                     const Passed& passed) {
    const size_t at_once = model.backend().one_segment ? 1 : parts.size();
    for (size_t begin = 0; begin < parts.size(); begin += at_once) {
        std::vector<Segment> segments;
        for (const Part& p : parts.subspan(begin, at_once)) {
            Session& s = *p.session;
            segments.push_back({.engine = s.engine_.get(),
                                .ids = p.ids,
                                .hidden = p.hidden,
                                .pos = (p.hidden != nullptr ? s.mtp_cache_ : s.cache_).len,
                                .n_logits = p.n_logits,
                                .trace = &s.trace_});
        }
        const PassArgs args{.segments = segments,
                            .logits = model.logits_row(first_logits),
                            .stats = stats,
                            .interrupted = parts.size() == 1 ? parts[0].interrupted : nullptr};
        auto ran = model.backend().forward(args);
        if (!ran.ok()) {
            for (const Part& p : parts) p.session->trace_.taps.clear();
            return std::move(ran.error());
        }
        const int n = args.n();
        stats.passes += 1;
        stats.rows += n;
        stats.mtp_passes += args.mtp() ? 1 : 0;
        stats.mtp_rows += args.mtp() ? n : 0;
        int row = 0;
        for (size_t i = 0; i < segments.size(); ++i) {
            Session& s = *parts[begin + i].session;
            const int own = segments[i].n();
            (args.mtp() ? s.mtp_cache_ : s.cache_).len += own;
            if (&stats != &s.stats_) {  // a pass of several: its bytes and seconds are nobody's
                s.stats_.rows += own;
                s.stats_.mtp_rows += args.mtp() ? own : 0;
            }
            if (passed) passed(begin + i, ran.value().hidden.from(row), ran.value().experts);
            row += own;
            first_logits += segments[i].n_logits;
        }
    }
    return {};
}

Status Session::reserve_hidden(int64_t n) {
    const int64_t bytes = 4 * n * model_.cfg().hidden_size;
    if (hidden_.size() != bytes) {
        DC_TRY(hidden_, ZeroedBuffer::make(bytes, "hidden rows"));
    }
    return {};
}

std::vector<float> Session::hidden() const {
    const auto held = model_.hold_passes();
    std::vector<float> rows(static_cast<size_t>(hidden_.size()) / 4);
    if (!rows.empty()) std::memcpy(rows.data(), hidden_.data(), static_cast<size_t>(hidden_.size()));
    return rows;
}

void Session::count_union(std::span<const int32_t> experts, size_t n, size_t kept) {
    if (experts.empty()) {
        recent_.clear();  // no window reaches across a long pass
        return;
    }
    const auto per_layer = static_cast<size_t>(model_.cfg().num_experts_per_tok);
    for (size_t i = 0; i < kept; ++i) {
        std::vector<int32_t> token;
        for (size_t at = i * per_layer; at < experts.size(); at += n * per_layer) {
            const auto of_layer = experts.subspan(at, per_layer);
            token.insert(token.end(), of_layer.begin(), of_layer.end());
        }
        if (recent_.size() == ExpertUnion::kMaxWindow) recent_.erase(recent_.begin());
        recent_.push_back(std::move(token));
        std::vector<int32_t> seen, merged;
        for (size_t j = 1; j <= recent_.size(); ++j) {
            const auto& t = recent_[recent_.size() - j];
            merged.clear();
            std::set_union(seen.begin(), seen.end(), t.begin(), t.end(), std::back_inserter(merged));
            seen.swap(merged);
            union_.windows[j] += 1;
            union_.experts[j] += static_cast<int64_t>(seen.size());
        }
    }
}

Status Session::forward(std::span<const int32_t> ids, WantLogits want, float* logits, bool (*interrupted)()) {
    Work work{.session = this,
              .ids = {ids.begin(), ids.end()},
              .want = want,
              .keep_hidden = true,
              .interrupted = interrupted,
              .logits = logits};
    step(work);
    return work.error ? Status(*std::move(work.error)) : Status();
}

StepCost Session::step(Work& work) { return Step::run(model_, std::span(&work, 1), stats_); }

Status Session::truncate(int n) {
    const auto held = model_.hold_passes();
    DC_TRY_STATUS(not_decoding("truncate"));
    if (n < 0 || n > cache_.len) {
        return Error{ErrorCode::kSession,
                     "truncate: " + std::to_string(n) + " positions, expected 0.." + std::to_string(cache_.len)};
    }
    if (n < cache_.len) forget(n);
    return {};
}

void Session::forget(int n) noexcept {
    cache_.len = n;
    tokens_.resize(static_cast<size_t>(n));
    recent_.clear();
    hidden_ = ZeroedBuffer();
    if (keep_mtp_) {
        const int m = mtp_cache_.len;
        mtp_cache_.len = std::min(m, std::max(n - 1, 0));
        const int keep = mtp_cache_.len < m ? 0 : std::min(n_pending(), n - m);
        pending_.resize(static_cast<size_t>(keep) * static_cast<size_t>(model_.cfg().hidden_size));
    }
}

Result<CacheRows> Session::copy_cache(bool mtp) const {
    DC_TRY_STATUS(not_decoding("read cache"));
    const Cache& c = cache(mtp);
    const int64_t layer_bytes = c.len * c.row_bytes;
    CacheRows out{c.n_layers, c.len, c.row_bytes, nullptr};
    out.bytes = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(c.n_layers * layer_bytes));
    for (int i = 0; i < c.n_layers && c.len > 0; ++i)
        DC_TRY_STATUS(engine_->copy_rows(mtp, i, c.len, out.bytes.get() + i * layer_bytes, false));
    return out;
}

Result<CacheRows> Session::read_cache(bool mtp) const {
    const auto held = model_.hold_passes();
    return copy_cache(mtp);
}

Result<SessionState> Session::state() const {
    const auto held = model_.hold_passes();
    SessionState s{.tokens = tokens_, .cache = {}, .mtp_cache = {}, .pending = pending_};
    DC_TRY(s.cache, copy_cache(false));
    DC_TRY(s.mtp_cache, copy_cache(true));
    return s;
}

Status Session::trace(std::vector<std::string> names, std::map<std::string, std::vector<float>> feed) {
    const auto held = model_.hold_passes();
    if (!feed.empty() && !engine_->takes_feed())
        return Error{ErrorCode::kSession, "feed: this session runs on the CPU"};
    trace_.enable(std::move(names));
    trace_.feed = std::move(feed);
    trace_.taps.clear();
    return {};
}

std::map<std::string, Tap> Session::take_taps() {
    const auto held = model_.hold_passes();
    return std::exchange(trace_.taps, {});
}

Result<ArrayView> Session::device_view(const std::string& name) const {
    const auto held = model_.hold_passes();
    if (auto view = engine_->view(name)) return *std::move(view);
    return Error{ErrorCode::kSession,
                 "device view: no buffer '" + name +
                     "', expected on a device x, hidden, logits, cache, mtp_cache or a recorded tap"};
}

Result<std::string> Session::device_report(const std::string& what) const {
    const auto held = model_.hold_passes();
    return engine_->report(what);
}

Status Session::load(std::span<const int32_t> tokens, const std::byte* main_rows, int m, const std::byte* mtp_rows,
                     std::span<const float> pending) {
    const auto held = model_.hold_passes();
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kSession, "saved session: " + text}; };
    const int64_t d = model_.cfg().hidden_size;
    const auto n = static_cast<int64_t>(tokens.size());
    if (n > cache_.ctx) return fail(std::to_string(n) + " positions, this session holds " + std::to_string(cache_.ctx));
    for (const int32_t id : tokens) {
        if (id < 0 || id >= model_.cfg().vocab_size)
            return fail("token id " + std::to_string(id) + " outside the vocabulary");
    }
    const int64_t rows = static_cast<int64_t>(pending.size()) / d;
    if (!keep_mtp_ && (m != 0 || rows != 0)) return fail("holds MTP rows, this session keeps none");
    // Row m - 1 needs token m: with all n rows there would be nothing left to draft from.
    if (keep_mtp_ && (m < 0 || m > std::max<int64_t>(n - 1, 0) || (m + rows != n && !(rows == 0 && m + 1 == n)))) {
        return fail(std::to_string(m) + " MTP rows and " + std::to_string(rows) + " hidden states for " +
                    std::to_string(n) + " positions");
    }
    if (rows > kMaxPending) {  // an engine has room for so many
        return fail(std::to_string(rows) + " hidden states wait for their MTP rows, at most " +
                    std::to_string(kMaxPending));
    }
    DC_TRY_STATUS(not_decoding("restore"));
    std::vector<int32_t> new_tokens(tokens.begin(), tokens.end());
    std::vector<float> new_pending(pending.begin(), pending.end());
    forget(0);
    const auto fill = [&](bool mtp, const std::byte* rows, int n_rows) -> Status {
        const Cache& c = cache(mtp);
        auto* from = const_cast<std::byte*>(rows);  // both directions leave the source alone
        for (int i = 0; i < c.n_layers && n_rows > 0; ++i)
            DC_TRY_STATUS(engine_->copy_rows(mtp, i, n_rows, from + i * n_rows * c.row_bytes, true));
        return {};
    };
    DC_TRY_STATUS(fill(false, main_rows, static_cast<int>(n)));
    DC_TRY_STATUS(fill(true, mtp_rows, m));
    cache_.len = static_cast<int>(n);
    mtp_cache_.len = m;
    tokens_ = std::move(new_tokens);
    pending_ = std::move(new_pending);
    return {};
}

Status Session::mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits,
                            float* g) {
    const auto held = model_.hold_passes();
    if (model_.cfg().num_nextn_predict_layers == 0)
        return Error{ErrorCode::kUnsupported, "mtp_forward: this model has no MTP layer"};
    if (keep_mtp_) return Error{ErrorCode::kSession, "mtp_forward: this session keeps its own MTP state"};
    DC_TRY_STATUS(check(mtp_cache_, ids, "mtp_forward"));
    const auto n = static_cast<int>(ids.size());
    const int n_logits = want == WantLogits::kAll ? n : want == WantLogits::kLast ? 1 : 0;
    DC_TRY_STATUS(model_.reserve_logits(n_logits));
    const Part part{.session = this, .ids = ids, .hidden = hidden, .n_logits = n_logits};
    const int64_t d = model_.cfg().hidden_size, vocab = model_.cfg().vocab_size;
    DC_TRY_STATUS(pass(model_, std::span(&part, 1), 0, stats_, [&](size_t, View<const float> rows, auto) {
        for (int i = 0; g != nullptr && i < n; ++i) std::copy_n(rows.row(i), d, g + i * d);
    }));
    for (int i = 0; i < n_logits; ++i) std::copy_n(model_.logits_row(i), vocab, logits + i * vocab);
    hidden_ = ZeroedBuffer();
    return {};
}

Status Session::not_decoding(const char* what) const {
    if (!decoding_) return {};
    return Error{ErrorCode::kSession, std::string(what) + ": decoding on the device is not finished"};
}

Status Session::decode_start(int32_t token, const SampleParams& sample, int n_valid, int64_t max_tokens,
                             std::span<const int32_t> eos) {
    const auto held = model_.hold_passes();
    DC_TRY_STATUS(check(cache_, {&token, 1}, "decode"));
    if (keep_mtp_ && lacks_hidden()) DC_TRY_STATUS(Step::repeat_last(*this));
    std::vector<int32_t> tokens = tokens_;
    tokens.push_back(token);
    DC_TRY_STATUS(engine_->decode_start({.tokens = tokens,
                                         .keeps_mtp = keep_mtp_,
                                         .pending = pending_,
                                         .max_tokens = max_tokens,
                                         .n_valid = std::min(n_valid, model_.cfg().vocab_size),
                                         .sample = sample,
                                         .eos = eos}));
    decoding_ = true;
    recent_.clear();
    hidden_ = ZeroedBuffer();
    return {};
}

Status Session::decode_step(int k) {
    const auto held = model_.hold_passes();
    if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
    if (k < 0 || k >= kMaxRound || (k > 0 && !keep_mtp_)) {
        return Error{ErrorCode::kSession, "decode: " + std::to_string(k) + " drafts, expected 0.." +
                                              std::to_string(keep_mtp_ ? kMaxRound - 1 : 0)};
    }
    return engine_->decode_step(k);
}

Result<std::vector<DecodedRound>> Session::decode_poll(int& left, std::chrono::milliseconds patience) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + patience;; std::this_thread::sleep_for(std::chrono::microseconds(20))) {
        const auto held = model_.hold_passes();
        if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
        auto rounds = engine_->decode_poll(left);
        if (!rounds.ok() || !rounds.value().empty() || left == 0 || Clock::now() >= end) return rounds;
    }
}

Status Session::decode_finish() {
    const auto held = model_.hold_passes();
    if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
    decoding_ = false;
    DC_TRY(DecodeResult end,
           engine_->decode_finish(stats_));  // an error: the session is as it was before decode_start()
    tokens_ = std::move(end.tokens);
    pending_ = std::move(end.pending);
    cache_.len = static_cast<int>(tokens_.size());
    if (!keep_mtp_) return {};
    mtp_cache_.len = cache_.len - n_pending();
    return n_pending() > kMaxPending ? Step::catch_up(*this) : Status();
}

}  // namespace deepcalm
