#include "runtime/session.h"

#include <chrono>
#include <cstring>

namespace deepcalm {

Result<std::unique_ptr<Session>> Session::make(Model& model, int ctx, CacheType kv, int max_rows) {
    const ModelConfig& c = model.cfg();
    if (ctx < 1 || ctx > c.max_position_embeddings) {
        return Error{ErrorCode::kSession, "ctx: " + std::to_string(ctx) + ", expected 1.." +
                                              std::to_string(c.max_position_embeddings) + " (max_position_embeddings)"};
    }
    if (max_rows < 1 || max_rows > 4096) {
        return Error{ErrorCode::kSession, "max_rows: " + std::to_string(max_rows) + ", expected 1..4096"};
    }
    std::unique_ptr<Session> s(new Session(model));
    DC_TRY(s->cache_, KvCache::make(kv, c.num_hidden_layers, ctx, c.kv_lora_rank, c.qk_rope_head_dim));
    if (c.num_nextn_predict_layers > 0) {
        DC_TRY(s->mtp_cache_, KvCache::make(kv, 1, ctx, c.kv_lora_rank, c.qk_rope_head_dim));
    }
    DC_TRY(s->state_, State::make(c, max_rows, static_cast<int>(ceil_div(ctx, kPartialLen)), model.pool().size()));
    return s;
}

Status Session::check(const KvCache& cache, std::span<const int32_t> ids, const char* what) const {
    const auto fail = [&](const std::string& text) {
        return Error{ErrorCode::kSession, std::string(what) + ": " + text};
    };
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

Status Session::ensure_logits(int64_t rows) {
    const int64_t bytes = rows * round_up(model_.cfg().vocab_size, kTileRows) * 4;
    if (logits_.size() >= bytes) return {};
    DC_TRY(logits_, ZeroedBuffer::make(bytes, "logits"));
    return {};
}

void Session::copy_logits(WantLogits want, int n, float* logits) const {
    const int rows = want == WantLogits::kAll ? n : want == WantLogits::kLast ? 1 : 0;
    const int64_t vocab = model_.cfg().vocab_size, stride = round_up(vocab, kTileRows);
    for (int i = 0; i < rows; ++i) {
        std::memcpy(logits + i * vocab, logits_.data() + i * stride * 4, static_cast<size_t>(vocab) * 4);
    }
}

Status Session::forward(std::span<const int32_t> ids, WantLogits want, float* logits) {
    const std::lock_guard lock(model_.pass_mutex());
    DC_TRY_STATUS(check(cache_, ids, "forward"));
    const int n = static_cast<int>(ids.size());
    const int n_logits = want == WantLogits::kAll ? n : want == WantLogits::kLast ? 1 : 0;
    DC_TRY_STATUS(ensure_logits(n_logits));
    const auto start = std::chrono::steady_clock::now();
    forward_cpu({.model = model_,
                 .state = state_,
                 .cache = cache_,
                 .trace = trace_,
                 .ids = ids,
                 .pos = cache_.len,
                 .n_logits = n_logits,
                 .logits = static_cast<float*>(static_cast<void*>(logits_.data())),
                 .stats = &stats_});
    stats_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    cache_.len += n;
    last_rows_ = n;
    copy_logits(want, n, logits);
    return {};
}

Status Session::mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits,
                            float* g) {
    const std::lock_guard lock(model_.pass_mutex());
    if (model_.cfg().num_nextn_predict_layers == 0)
        return Error{ErrorCode::kUnsupported, "mtp_forward: this model has no MTP layer"};
    DC_TRY_STATUS(check(mtp_cache_, ids, "mtp_forward"));
    const int n = static_cast<int>(ids.size());
    const int n_logits = want == WantLogits::kAll ? n : want == WantLogits::kLast ? 1 : 0;
    DC_TRY_STATUS(ensure_logits(n_logits));
    const auto start = std::chrono::steady_clock::now();
    forward_cpu({.model = model_,
                 .state = state_,
                 .cache = mtp_cache_,
                 .trace = trace_,
                 .ids = ids,
                 .hidden = hidden,
                 .mtp = true,
                 .pos = mtp_cache_.len,
                 .n_logits = n_logits,
                 .logits = static_cast<float*>(static_cast<void*>(logits_.data())),
                 .stats = &stats_});
    stats_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    mtp_cache_.len += n;
    last_rows_ = 0;  // final_h now holds MTP rows; hidden() of the main pass is gone
    copy_logits(want, n, logits);
    if (g != nullptr) {
        const int64_t d = model_.cfg().hidden_size;
        for (int i = 0; i < n; ++i) std::memcpy(g + i * d, state_.final_h.row(i), static_cast<size_t>(d) * 4);
    }
    return {};
}

}  // namespace deepcalm
