// One sequence on a model: tokens, caches, buffers, passes.
//
// Threads: every public function may be called from any thread. Those that read or change the state hold the model's mutex
// from their checks to their last copy, so that they wait for passes, other sessions' too; what they return are copies.
// Failures: an error or an exception (memory, a device) takes the session back to the tokens that it had. Their rows are the
// same bits; what is lost are hidden(), at most one hidden state that is recomputed when it is needed, and the windows of
// expert_union(). Counters keep what was read. load() alone may leave a session on a device empty.
//
// A session is (docs/model.md 7.3):
//   tokens()               ids of the n cached positions
//   main cache             rows 0..n-1
//   MTP cache              rows 0..m-1, row i computed from (h_i, token i+1), so m <= max(n-1, 0) between rounds
//   pending hidden states  h_m..h_{n-1} (f32, post final norm); only when MTP is kept, at most kMaxPending rows between calls
// truncate(t) leaves m = min(m, t-1); h_{t-1} may then be gone and is recomputed (same bits) when it is next needed.
#pragma once

#include "runtime/cpu/buffers.h"
#include "runtime/kv_cache.h"
#include "runtime/model.h"
#include "runtime/sampler.h"
#include "runtime/trace.h"

#include <chrono>
#include <span>

namespace deepcalm {

enum class WantLogits : uint8_t { kNone, kLast, kAll };

// Sums over the session's passes, counted (not estimated) from what each pass touched.
struct SessionStats {
    int64_t passes = 0, rows = 0;  // main and MTP passes together
    int64_t mtp_passes = 0, mtp_rows = 0;
    int64_t weight_bytes = 0;     // packed weight bytes read
    int64_t cache_bytes = 0;      // cache rows read
    int64_t experts_touched = 0;  // distinct (layer, expert) pairs, summed over passes
    double seconds = 0;
    StageStats stages[2][kNumStages];  // main passes, MTP passes; bytes and seconds add up to the totals above
};

// Distinct experts that windows of adjacent tokens use: what a verification pass of j rows will read. Over tokens that went
// through passes of at most kMaxWindow rows and stayed in the sequence.
struct ExpertUnion {
    static constexpr int kMaxWindow = 8;
    int64_t windows[kMaxWindow + 1] = {};  // [j] windows of j tokens seen
    int64_t experts[kMaxWindow + 1] = {};  // [j] distinct (layer, expert) pairs in them, summed
};

// Rows 0..n-1 of every layer of a cache: [n_layers, n, row_bytes].
struct CacheRows {
    int n_layers = 0, n = 0;
    int64_t row_bytes = 0;
    std::unique_ptr<std::byte[]> bytes;
};

// What a saved session holds.
struct SessionState {
    std::vector<int32_t> tokens;  // [n]
    CacheRows cache, mtp_cache;   // n and m rows
    std::vector<float> pending;   // [n - m, hidden_size], or none where m + 1 == n
};

struct PassArgs;

class Session {
  public:
    static constexpr int kMaxPending = deepcalm::kMaxPending;
    ~Session();

    // keep_mtp: maintain the MTP cache and pending hidden states (drafting); refused for a model without an MTP layer.
    static Result<std::unique_ptr<Session>> make(Model& model, int ctx, CacheType kv, int max_rows, bool keep_mtp);

    // Appends ids (n <= max_rows, pos + n <= ctx) to the main cache. Logits rows (0, 1 or n) of [vocab_size] go to `logits`,
    // row stride vocab_size; final hidden rows (post-norm) stay in hidden().
    Status forward(std::span<const int32_t> ids, WantLogits want, float* logits);
    Status truncate(int n);
    // Replaces the whole state. main_rows [n_layers, n, row_bytes], mtp_rows [1, m, row_bytes], pending [n - m, hidden_size]
    // (n = tokens.size(); both MTP parts empty when the session does not keep MTP).
    Status load(std::span<const int32_t> tokens, const std::byte* main_rows, int m, const std::byte* mtp_rows,
                std::span<const float> pending);

    // One raw MTP pass, teacher-forced: rows mtp len.. from (hidden[i] [hidden_size], next token ids[i]); g [n, hidden_size] may
    // be null. For tests and tools; refused when the session keeps the MTP state itself.
    Status mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits, float* g);

    int pos(bool mtp) const { return copy(cache(mtp).len); }       // tokens in the main cache, rows in the MTP cache
    std::vector<int32_t> tokens() const { return copy(tokens_); }  // [pos(false)]
    std::vector<float> hidden() const;  // [rows of the last forward(), hidden_size]; none after an MTP pass
    SessionStats stats() const { return copy(stats_); }
    ExpertUnion expert_union() const { return copy(union_); }
    Result<CacheRows> read_cache(bool mtp) const;
    Result<SessionState> state() const;
    // Taps to record from now on, and values that take their place (Trace).
    void trace(std::vector<std::string> names, std::map<std::string, std::vector<float>> feed);
    std::map<std::string, Tap> take_taps();  // of the passes since the last call

    Model& model() const { return model_; }
    const KvCache& cache(bool mtp) const { return mtp ? mtp_cache_ : cache_; }  // its shape; rows and len are pos()'s

    // Decoding on the device, without the host between tokens: start() after `token` (known, not yet in the cache), then
    // rounds of k drafts are queued and polled when they have ended; finish() brings tokens(), the caches' lengths and the pending
    // hidden state up to date: everything emitted but the last token is in the cache. forward() and the rest are refused
    // in between. The rounds' tokens are those that Speculator::round would choose.
    Status decode_start(int32_t token, const SampleParams& sample, int n_valid, int64_t max_tokens,
                        std::span<const int32_t> eos);
    Status decode_step(int k);
    // Rounds that have ended since the last call; where none has, waits for one, but not longer than `patience` and without
    // the mutex. left: rounds that are queued and not returned yet.
    Result<std::vector<DeviceRound>> decode_poll(int& left, std::chrono::milliseconds patience);
    Result<DeviceDecodeState> decode_finish();
    DeviceSession* device() const { return device_.get(); }
    int max_rows() const { return state_.max_rows; }

  private:
    friend class Speculator;
    // Unless kept, takes the session back to its present tokens at the end of the scope.
    class Undo {
      public:
        explicit Undo(Session& s) : s_(s), n_(s.cache_.len) {}
        Undo(const Undo&) = delete;
        Undo& operator=(const Undo&) = delete;
        ~Undo() {
            if (!kept_) s_.forget(n_);
        }
        void keep() { kept_ = true; }

      private:
        Session& s_;
        int n_;
        bool kept_ = false;
    };
    explicit Session(Model& model) : model_(model) {}
    std::unique_lock<PassMutex> lock() const { return std::unique_lock(model_.pass_mutex()); }
    template <class T> T copy(const T& member) const {
        const auto held = lock();
        return member;
    }
    Status check(const KvCache& cache, std::span<const int32_t> ids, const char* what) const;
    // Passes without checks or locks. Logits of the last n_logits rows are left in logits_row(0..).
    Status main_pass(std::span<const int32_t> ids, int n_logits);
    Status mtp_pass(std::span<const int32_t> ids, const float* hidden, int n_logits);
    Status run(std::span<const int32_t> ids, const float* hidden, int n_logits, KvCache& cache);
    Status forward_device(const PassArgs& args);
    Status copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) const;  // cache rows 0..n-1
    Result<CacheRows> copy_cache(bool mtp) const;
    Status not_decoding(const char* what) const;
    Result<std::vector<DeviceRound>> poll_rounds(int& left);
    // MTP rows for every pending position whose next token is known; `next` (may be null) follows the last cached token.
    Status catch_up(const int32_t* next, int n_logits);
    void keep_hidden();  // appends the last main pass's hidden rows to pending_
    // Recomputes main row n-1 when its hidden state is needed and gone.
    Status restore_pending();
    // truncate() without checks or locks; n <= pos. The token after position n-1 becomes unknown again. Allocates nothing:
    // right after whatever a pass or a round left half done, as tokens_ and pending_ grow behind the rows they belong to.
    void forget(int n) noexcept;
    const float* logits_row(int64_t i) const;
    void count_union(int rows);  // the first `rows` rows of the last main pass stay in the sequence
    int n_pending() const { return static_cast<int>(static_cast<int64_t>(pending_.size()) / model_.cfg().hidden_size); }
    void copy_logits(int n_logits, float* logits) const;

    Model& model_;
    KvCache cache_, mtp_cache_;
    Buffers state_;
    Trace trace_;
    SessionStats stats_;
    ZeroedBuffer logits_;    // [rows, pad16(vocab_size)] f32
    int touched_rows_ = 0;   // of the longest pass whose buffers are still resident
    int last_rows_ = 0;      // rows of final_h that hold main hidden states
    int mtp_last_rows_ = 0;  // rows of the last MTP pass
    bool keep_mtp_ = false;
    std::vector<int32_t> tokens_;
    std::vector<float> pending_;
    ExpertUnion union_;
    std::vector<std::vector<int32_t>>
        recent_;  // up to kMaxWindow tokens, latest last: layer * n_routed_experts + expert, ascending
    DeviceSessionPtr device_{nullptr, {}};
    bool decoding_ = false;
    std::vector<int32_t> emitted_;  // token of decode_start(), then every token polled
};

// cpu/forward.cc: the pass, CPU transcription. Runs on the model's pool; writes cache rows pos..pos+n-1 (not cache.len).
// An error (memory, threads after fork) leaves statistics and lengths as they were.
struct PassArgs {
    Model& model;
    Buffers& state;
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
Status forward_cpu(const PassArgs& args);

}  // namespace deepcalm
