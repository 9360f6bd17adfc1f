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

#include "runtime/memory.h"
#include "runtime/model.h"

#include <chrono>
#include <utility>

namespace deepcalm {

enum class WantLogits : uint8_t { kNone, kLast, kAll };

struct Work;  // runtime/batch.h
struct StepCost;

// Distinct experts that windows of adjacent tokens use: what a verification pass of j rows will read. Over tokens that went
// through passes of at most kMaxWindow rows and stayed in the sequence.
struct ExpertUnion {
    static constexpr int kMaxWindow = kMaxRound;
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

// What a session knows of one of its caches, whose rows the engine holds: [n_layers, ctx, row_bytes].
struct Cache {
    int n_layers = 0, ctx = 0;
    int64_t row_bytes = 0;
    int len = 0;  // valid rows; truncation is an assignment, later rows are overwritten before they are read

    int64_t n_bytes() const { return int64_t{n_layers} * ctx * row_bytes; }
};

class Session {
  public:
    // keep_mtp: maintain the MTP cache and pending hidden states (drafting); refused for a model without an MTP layer.
    static Result<std::unique_ptr<Session>> make(Model& model, int ctx, CacheType kv, int max_rows, bool keep_mtp);
    ~Session();

    // Appends ids (n <= max_rows, pos + n <= ctx) to the main cache. Logits rows (0, 1 or n) of [vocab_size] go to `logits`,
    // row stride vocab_size; a copy of the final hidden rows (post-norm) stays in hidden(). interrupted: PassArgs::interrupted
    Status forward(std::span<const int32_t> ids, WantLogits want, float* logits, bool (*interrupted)() = nullptr);
    StepCost step(Work& work);  // of this session alone, whose counters hold what it read
    Status truncate(int n);
    // A new session with the first n tokens and what belongs to them, of the same kind but for its ctx >= n.
    Result<std::unique_ptr<Session>> fork(int n, int ctx) const;
    // Replaces the whole state. main_rows [n_layers, n, row_bytes], mtp_rows [1, m, row_bytes], pending [n - m, hidden_size]
    // (n = tokens.size(); both MTP parts empty when the session does not keep MTP).
    Status load(std::span<const int32_t> tokens, const std::byte* main_rows, int m, const std::byte* mtp_rows,
                std::span<const float> pending);

    // One raw MTP pass, teacher-forced: rows mtp len.. from (hidden[i] [hidden_size], next token ids[i]); g [n, hidden_size] may
    // be null. For tests and tools; refused when the session keeps the MTP state itself.
    Status mtp_forward(std::span<const int32_t> ids, const float* hidden, WantLogits want, float* logits, float* g);

    int pos(bool mtp) const { return copy(cache(mtp).len); }       // tokens in the main cache, rows in the MTP cache
    std::vector<int32_t> tokens() const { return copy(tokens_); }  // [pos(false)]
    std::vector<float> hidden() const;                             // [rows of the last forward(), hidden_size]
    PassStats stats() const { return copy(stats_); }
    ExpertUnion expert_union() const { return copy(union_); }
    Result<CacheRows> read_cache(bool mtp) const;
    Result<SessionState> state() const;
    // Taps to record from now on, and values that take their place (Trace), where the engine takes any.
    Status trace(std::vector<std::string> names, std::map<std::string, std::vector<float>> feed);
    std::map<std::string, Tap> take_taps();  // of the passes since the last call
    // Engine::view() and report(), for tests and measurements.
    Result<ArrayView> device_view(const std::string& name) const;
    Result<std::string> device_report(const std::string& what) const;

    const Cache& cache(bool mtp) const { return mtp ? mtp_cache_ : cache_; }  // its shape; len is pos()'s
    int max_rows() const { return max_rows_; }

    // Decoding by the engine, without the host between tokens: start() after `token` (known, not yet in the cache), then
    // rounds of k drafts are queued and polled when they have ended; finish() brings tokens(), the caches' lengths and the pending
    // hidden state up to date: everything emitted but the last token is in the cache. forward() and the rest are refused
    // in between. The rounds' tokens are those that Step::run would choose.
    Status decode_start(int32_t token, const SampleParams& sample, int n_valid, int64_t max_tokens,
                        std::span<const int32_t> eos);
    Status decode_step(int k);
    // Rounds that have ended since the last call; where none has, waits for one, but not longer than `patience` and without
    // the mutex. left: rounds that are queued and not returned yet.
    Result<std::vector<DecodedRound>> decode_poll(int& left, std::chrono::milliseconds patience);
    Status decode_finish();

  private:
    friend class Step;
    // Unless kept, takes the session back to its present tokens at the end of the scope.
    class Undo {
      public:
        explicit Undo(Session& s) : s_(s), n_(s.cache_.len) {}
        Undo(Undo&& o) noexcept : s_(o.s_), n_(o.n_), kept_(std::exchange(o.kept_, true)) {}
        Undo& operator=(Undo&&) = delete;
        ~Undo() {
            if (!kept_) s_.forget(n_);
        }
        void keep() { kept_ = true; }

      private:
        Session& s_;
        int n_;
        bool kept_ = false;
    };
    // A session's rows in a pass: those after its main cache's, or with `hidden` after its MTP cache's.
    struct Part {
        Session* session = nullptr;
        std::span<const int32_t> ids;     // [n]
        const float* hidden = nullptr;    // [n, hidden_size]
        int n_logits = 0;                 // of the last rows
        bool (*interrupted)() = nullptr;  // of PassArgs, where the part is alone
    };
    // passed(part, its final hidden rows [n, hidden_size], PassResult::experts): until the next pass.
    using Passed = std::function<void(size_t, View<const float>, std::span<const int32_t>)>;
    // Runs parts of different sessions, together where the backend can. Their caches grow; logits are left in
    // model.logits_row(first_logits...), one part's behind the other's.
    static Status pass(Model& model, std::span<const Part> parts, int64_t first_logits, PassStats& stats,
                       const Passed& passed);
    explicit Session(Model& model) : model_(model) {}
    template <class T> T copy(const T& member) const {
        const auto held = model_.hold_passes();
        return member;
    }
    Status check(const Cache& cache, std::span<const int32_t> ids, const char* what) const;
    Status not_decoding(const char* what) const;
    Result<CacheRows> copy_cache(bool mtp) const;
    // The hidden state of the last row was cut off, and MTP will need it.
    bool lacks_hidden() const { return cache_.len - mtp_cache_.len != n_pending(); }
    // truncate() without checks or locks; n <= pos. The token after position n-1 becomes unknown again. Allocates nothing:
    // right after whatever a pass or a round left half done, as tokens_ and pending_ grow behind the rows they belong to.
    void forget(int n) noexcept;
    Status reserve_hidden(int64_t n);
    // Of n rows of a pass with these experts the first `kept` stay in the sequence.
    void count_union(std::span<const int32_t> experts, size_t n, size_t kept);
    int n_pending() const { return static_cast<int>(static_cast<int64_t>(pending_.size()) / model_.cfg().hidden_size); }

    Model& model_;
    std::unique_ptr<Engine> engine_;
    Cache cache_, mtp_cache_;
    CacheType kv_ = CacheType::kF16;
    int max_rows_ = 0;
    bool keep_mtp_ = false;
    Trace trace_;
    PassStats stats_;
    ZeroedBuffer hidden_;  // [rows of the last forward(), hidden_size] f32; not of malloc, which keeps what is freed
    std::vector<int32_t> tokens_;
    std::vector<float> pending_;
    ExpertUnion union_;
    // Up to kMaxWindow tokens, latest last: layer * n_routed_experts + expert, ascending.
    std::vector<std::vector<int32_t>> recent_;
    bool decoding_ = false;
};

}  // namespace deepcalm
