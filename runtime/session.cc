#include "runtime/session.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace deepcalm {
namespace {

constexpr int kKeepRows = 4 * kSplitRows;  // buffers of so many rows stay

int n_logits_of(WantLogits want, size_t n) {
    return want == WantLogits::kAll ? static_cast<int>(n) : want == WantLogits::kLast ? 1 : 0;
}

}  // namespace

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
    s->keep_mtp_ = keep_mtp;
    DC_TRY(s->cache_, KvCache::make(kv, c.num_hidden_layers, ctx, c, model.on_device()));
    if (c.num_nextn_predict_layers > 0) {
        DC_TRY(s->mtp_cache_, KvCache::make(kv, 1, ctx, c, model.on_device()));
    }
    if (model.on_device()) {
        DeviceError error;
        const DeviceApi* api = model.device().api;
        const DeviceSessionArgs args{.ctx = ctx, .kv = kv, .max_rows = max_rows, .mtp = c.num_nextn_predict_layers > 0};
        const auto lock = s->lock();
        s->device_ = {api->open_session(model.device_model(), args, error), {api}};
        if (s->device_ == nullptr) return to_error(error);
    }
    DC_TRY(s->state_, Buffers::make(c, max_rows, static_cast<int>(ceil_div(ctx, kPartialLen)), model.pool().size()));
    return s;
}

Session::~Session() {
    if (device_ == nullptr) return;
    try {
        const auto waits_for_passes = lock();
        device_.reset();
    } catch (const InUseAtFork&) {  // the device is the parent's
        (void)device_.release();
    }
}

Status Session::check(const KvCache& cache, std::span<const int32_t> ids, const char* what) const {
    const auto fail = [&](const std::string& text) {
        return Error{ErrorCode::kSession, std::string(what) + ": " + text};
    };
    DC_TRY_STATUS(not_decoding(what));
    if (ids.empty()) return fail("no tokens");
    if (static_cast<int64_t>(ids.size()) > state_.max_rows) {
        return fail(std::to_string(ids.size()) +
                    " tokens in one pass, at most max_rows = " + std::to_string(state_.max_rows));
    }
    if (cache.len + static_cast<int64_t>(ids.size()) > cache.ctx()) {
        return fail("context full: " + std::to_string(cache.len) + " + " + std::to_string(ids.size()) +
                    " positions, the session holds " + std::to_string(cache.ctx()));
    }
    for (const int32_t id : ids) {
        if (id < 0 || id >= model_.cfg().vocab_size) {
            return fail("token id " + std::to_string(id) + ", expected 0.." +
                        std::to_string(model_.cfg().vocab_size - 1));
        }
    }
    return {};
}

const float* Session::logits_row(int64_t i) const {
    return static_cast<const float*>(static_cast<const void*>(logits_.data())) + i * model_.cfg().logits_stride();
}

void Session::copy_logits(int n_logits, float* logits) const {
    const int64_t vocab = model_.cfg().vocab_size;
    for (int i = 0; i < n_logits; ++i) std::memcpy(logits + i * vocab, logits_row(i), static_cast<size_t>(vocab) * 4);
}

Status Session::run(std::span<const int32_t> ids, const float* hidden, int n_logits, KvCache& cache) {
    const int64_t logits_bytes = n_logits * model_.cfg().logits_stride() * 4;
    if (logits_.size() < logits_bytes) {
        DC_TRY(logits_, ZeroedBuffer::make(logits_bytes, "logits"));
    }
    const bool mtp = hidden != nullptr;
    const int n = static_cast<int>(ids.size());
    // The buffers of a long pass, 0.4 MB a row in V2-Lite, are given back before decoding: nothing in them is read again.
    if (n <= kSplitRows && touched_rows_ > kKeepRows) {
        state_.memory.release();
        touched_rows_ = 0;
    }
    touched_rows_ = std::max(touched_rows_, n);
    last_rows_ = 0;  // the pass overwrites them
    const PassArgs args{.model = model_,
                        .state = state_,
                        .cache = cache,
                        .trace = trace_,
                        .ids = ids,
                        .hidden = hidden,
                        .mtp = mtp,
                        .pos = cache.len,
                        .n_logits = n_logits,
                        .logits = static_cast<float*>(static_cast<void*>(logits_.data())),
                        .stats = &stats_};
    if (device_ != nullptr) {
        DC_TRY_STATUS(forward_device(args));
    } else {
        DC_TRY_STATUS(forward_cpu(args));
    }
    cache.len += n;
    last_rows_ = mtp ? 0 : n;
    if (mtp) mtp_last_rows_ = n;
    return {};
}

Status Session::main_pass(std::span<const int32_t> ids, int n_logits) {
    DC_TRY_STATUS(run(ids, nullptr, n_logits, cache_));
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    if (keep_mtp_) keep_hidden();
    return {};
}

void Session::keep_hidden() {
    const int64_t d = model_.cfg().hidden_size;
    for (int i = 0; i < last_rows_; ++i)
        pending_.insert(pending_.end(), state_.final_h.row(i), state_.final_h.row(i) + d);
}

Status Session::mtp_pass(std::span<const int32_t> ids, const float* hidden, int n_logits) {
    return run(ids, hidden, n_logits, mtp_cache_);
}

void Session::count_union(int rows) {
    const Buffers& s = state_;
    const auto n = static_cast<size_t>(last_rows_);
    if (s.pass_experts.empty() || n > ExpertUnion::kMaxWindow) {
        recent_.clear();  // no window reaches across a long pass
        return;
    }
    const auto per_layer = static_cast<size_t>(model_.cfg().num_experts_per_tok);
    for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
        std::vector<int32_t> token;
        for (size_t at = i * per_layer; at < s.pass_experts.size(); at += n * per_layer) {
            token.insert(token.end(), s.pass_experts.begin() + static_cast<int64_t>(at),
                         s.pass_experts.begin() + static_cast<int64_t>(at + per_layer));
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

Status Session::catch_up(const int32_t* next, int n_logits) {
    const int64_t d = model_.cfg().hidden_size;
    const int m = mtp_cache_.len;
    const int rows = std::min(n_pending(), cache_.len - m - (next == nullptr ? 1 : 0));
    if (rows <= 0) return {};
    std::vector<int32_t> ids(tokens_.begin() + m + 1, tokens_.begin() + std::min(m + 1 + rows, cache_.len));
    if (static_cast<int>(ids.size()) < rows) ids.push_back(*next);
    for (int i = 0; i < rows; i += state_.max_rows) {
        const int n = std::min(state_.max_rows, rows - i);
        DC_TRY_STATUS(mtp_pass(std::span(ids).subspan(static_cast<size_t>(i), static_cast<size_t>(n)), pending_.data(),
                               i + n == rows ? n_logits : 0));
        pending_.erase(pending_.begin(), pending_.begin() + n * d);  // pass by pass: the next one may fail
    }
    return {};
}

Status Session::restore_pending() {
    if (cache_.len - mtp_cache_.len == n_pending()) return {};
    DC_CHECK(n_pending() == 0 && cache_.len - mtp_cache_.len == 1);  // see truncate() and load()
    Undo undo(*this);
    // A pass that fails halfway has written the row's own bits again, or nothing: it ends between stages.
    cache_.len -= 1;
    DC_TRY_STATUS(run({&tokens_.back(), 1}, nullptr, 0, cache_));
    keep_hidden();
    undo.keep();
    return {};
}

Status Session::forward(std::span<const int32_t> ids, WantLogits want, float* logits) {
    const auto held = lock();
    DC_TRY_STATUS(check(cache_, ids, "forward"));
    const int n_logits = n_logits_of(want, ids.size());
    Undo undo(*this);
    if (keep_mtp_) {
        DC_TRY_STATUS(restore_pending());
    }
    DC_TRY_STATUS(main_pass(ids, n_logits));
    count_union(last_rows_);
    copy_logits(n_logits, logits);
    // A prompt's MTP rows belong to its prefill, where they share a pass; single steps collect them.
    if (keep_mtp_ && (ids.size() > 1 || n_pending() > kMaxPending)) DC_TRY_STATUS(catch_up(nullptr, 0));
    undo.keep();
    return {};
}

Status Session::truncate(int n) {
    const auto held = lock();
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
    last_rows_ = 0;
    if (keep_mtp_) {
        const int m = mtp_cache_.len;
        mtp_cache_.len = std::min(m, std::max(n - 1, 0));
        const int keep = mtp_cache_.len < m ? 0 : std::min(n_pending(), n - m);
        pending_.resize(static_cast<size_t>(keep) * static_cast<size_t>(model_.cfg().hidden_size));
    }
}

Status Session::copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) const {
    const KvCache& c = cache(mtp);
    if (n == 0) return {};
    if (device_ != nullptr) {
        DeviceError error;
        if (!model_.device().api->copy_cache(device_.get(), mtp, layer, 0, n, host, to_cache, error))
            return to_error(error);
    } else {
        std::memcpy(to_cache ? c.layer(layer) : host, to_cache ? host : c.layer(layer),
                    static_cast<size_t>(n * c.row_bytes()));
    }
    return {};
}

Result<CacheRows> Session::copy_cache(bool mtp) const {
    DC_TRY_STATUS(not_decoding("read cache"));
    const KvCache& c = cache(mtp);
    const int64_t layer_bytes = c.len * c.row_bytes();
    CacheRows out{c.n_layers(), c.len, c.row_bytes(), nullptr};
    out.bytes = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(c.n_layers() * layer_bytes));
    for (int i = 0; i < c.n_layers(); ++i)
        DC_TRY_STATUS(copy_rows(mtp, i, c.len, out.bytes.get() + i * layer_bytes, false));
    return out;
}

Result<CacheRows> Session::read_cache(bool mtp) const {
    const auto held = lock();
    return copy_cache(mtp);
}

Result<SessionState> Session::state() const {
    const auto held = lock();
    SessionState s{.tokens = tokens_, .cache = {}, .mtp_cache = {}, .pending = pending_};
    DC_TRY(s.cache, copy_cache(false));
    DC_TRY(s.mtp_cache, copy_cache(true));
    return s;
}

std::vector<float> Session::hidden() const {
    const auto held = lock();
    const int64_t d = model_.cfg().hidden_size;
    std::vector<float> out(static_cast<size_t>(last_rows_ * d));
    for (int64_t i = 0; i < last_rows_; ++i) std::copy_n(state_.final_h.row(i), d, out.begin() + i * d);
    return out;
}

void Session::trace(std::vector<std::string> names, std::map<std::string, std::vector<float>> feed) {
    const auto held = lock();
    trace_.enable(std::move(names));
    trace_.feed = std::move(feed);
    trace_.taps.clear();
}

std::map<std::string, Tap> Session::take_taps() {
    const auto held = lock();
    return std::exchange(trace_.taps, {});
}

Status Session::load(std::span<const int32_t> tokens, const std::byte* main_rows, int m, const std::byte* mtp_rows,
                     std::span<const float> pending) {
    const auto held = lock();
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kSession, "saved session: " + text}; };
    const int64_t d = model_.cfg().hidden_size;
    const auto n = static_cast<int64_t>(tokens.size());
    if (n > cache_.ctx())
        return fail(std::to_string(n) + " positions, this session holds " + std::to_string(cache_.ctx()));
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
    DC_TRY_STATUS(not_decoding("restore"));
    std::vector<int32_t> new_tokens(tokens.begin(), tokens.end());
    std::vector<float> new_pending(pending.begin(), pending.end());
    forget(0);
    for (int i = 0; i < cache_.n_layers(); ++i) {  // both directions leave the source alone
        DC_TRY_STATUS(copy_rows(false, i, static_cast<int>(n),
                                const_cast<std::byte*>(main_rows) + i * n * cache_.row_bytes(), true));
    }
    DC_TRY_STATUS(copy_rows(true, 0, m, const_cast<std::byte*>(mtp_rows), true));
    cache_.len = static_cast<int>(n);
    mtp_cache_.len = m;
    tokens_ = std::move(new_tokens);
    pending_ = std::move(new_pending);
    return {};
}

Status Session::mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits,
                            float* g) {
    const auto held = lock();
    if (model_.cfg().num_nextn_predict_layers == 0)
        return Error{ErrorCode::kUnsupported, "mtp_forward: this model has no MTP layer"};
    if (keep_mtp_) return Error{ErrorCode::kSession, "mtp_forward: this session keeps its own MTP state"};
    DC_TRY_STATUS(check(mtp_cache_, ids, "mtp_forward"));
    const int n_logits = n_logits_of(want, ids.size());
    DC_TRY_STATUS(mtp_pass(ids, hidden, n_logits));
    copy_logits(n_logits, logits);
    if (g != nullptr) {
        const int64_t d = model_.cfg().hidden_size;
        for (size_t i = 0; i < ids.size(); ++i) {
            std::memcpy(g + static_cast<int64_t>(i) * d, state_.final_h.row(static_cast<int64_t>(i)),
                        static_cast<size_t>(d) * 4);
        }
    }
    return {};
}

}  // namespace deepcalm
