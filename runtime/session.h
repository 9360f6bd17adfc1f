// One sequence on a model: its caches, buffers and passes. Not thread-safe by itself; the model's mutex serialises passes.
#pragma once

#include "runtime/kv_cache.h"
#include "runtime/model.h"
#include "runtime/state.h"
#include "runtime/trace.h"

#include <functional>
#include <span>

namespace deepcalm {

enum class WantLogits : uint8_t { kNone, kLast, kAll };

// Sums over the session's passes, counted (not estimated) from what each pass touched.
struct SessionStats {
    int64_t passes = 0, rows = 0;
    int64_t weight_bytes = 0;     // packed weight bytes read
    int64_t cache_bytes = 0;      // cache rows read
    int64_t experts_touched = 0;  // distinct (layer, expert) pairs, summed over passes
    double seconds = 0;
};

class Session {
  public:
    static Result<std::unique_ptr<Session>> make(Model& model, int ctx, CacheType kv, int max_rows);

    // Appends ids (n <= max_rows, pos + n <= ctx) to the main cache. Logits rows (0, 1 or n) of [vocab_size] go to `logits`,
    // row stride vocab_size; final hidden rows (post-norm) stay in hidden().
    Status forward(std::span<const int32_t> ids, WantLogits want, float* logits);
    // MTP rows mtp_pos()..mtp_pos()+n-1 from (hidden[i] [hidden_size], next token ids[i]); g [n, hidden_size] may be null.
    Status mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits, float* g);

    const float* hidden() const { return state_.final_h.f32; }  // [last_rows(), hidden_stride()] f32
    int64_t hidden_stride() const { return state_.final_h.stride(); }
    int last_rows() const { return last_rows_; }

    Model& model() { return model_; }
    KvCache& cache(bool mtp) { return mtp ? mtp_cache_ : cache_; }
    Trace& trace() { return trace_; }
    const SessionStats& stats() const { return stats_; }
    int max_rows() const { return state_.max_rows; }

  private:
    Session(Model& model) : model_(model) {}
    Status check(const KvCache& cache, std::span<const int32_t> ids, const char* what) const;
    Status ensure_logits(int64_t rows);
    void copy_logits(WantLogits want, int n, float* logits) const;

    Model& model_;
    KvCache cache_, mtp_cache_;
    State state_;
    Trace trace_;
    SessionStats stats_;
    ZeroedBuffer logits_;  // [rows, pad16(vocab_size)]
    int last_rows_ = 0;
};

// forward_cpu.cc: the pass, CPU transcription. Runs on the model's pool; writes cache rows pos..pos+n-1 (not cache.len).
struct PassArgs {
    Model& model;
    State& state;
    KvCache& cache;
    Trace& trace;
    std::span<const int32_t> ids;   // [n]
    const float* hidden = nullptr;  // MTP only: [n, hidden_size]
    bool mtp = false;
    int pos = 0;              // cache row of ids[0]
    int n_logits = 0;         // last n_logits rows get logits
    float* logits = nullptr;  // [n_logits, pad16(vocab_size)]
    SessionStats* stats = nullptr;
};
void forward_cpu(const PassArgs& args);

}  // namespace deepcalm
