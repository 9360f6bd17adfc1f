// What computes a session's passes. Session, sampler and drafting know no more of a processor than this; runtime/cpu and
// runtime/cuda implement it. A device's engine lives in a library that is opened at run time and was compiled with the same
// headers (runtime/cuda/library.h): C++ types, errors and exceptions cross as they are.
//
// Threads: calls on a backend and its engines are serialised by Model::hold_passes(), making and closing an engine too.
// Failures: after a call that failed, by an error or an exception, nothing runs on that still uses the caller's memory, and
// engines are as if the call had not been made, but that cache rows from the caller's length on may hold anything.
#pragma once

#include "kernels/view.h"
#include "runtime/rope.h"
#include "runtime/sampler.h"
#include "runtime/timing.h"
#include "runtime/trace.h"
#include "runtime/weights.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <span>

namespace deepcalm {

// Weight bytes that one pass reads, split by what they depend on.
struct WeightBytes {
    int64_t fixed = 0;       // attention, dense and shared FFN, routers, norms of the main layers
    int64_t experts = 0;     // one routed expert of every main layer that has some, together: formats may differ
    int64_t head = 0;        // head and final norm
    int64_t embed_row = 0;   // one row of the embedding
    int n_moe_layers = 0;    // main layers with routed experts
    int64_t mtp_fixed = 0;   // the MTP layer without experts and head
    int64_t mtp_head = 0;    // the head that drafts read
    int64_t mtp_expert = 0;  // one of its routed experts
};

// A packed file, mapped, checked and bound.
struct BoundModel {
    ModelConfig cfg;
    std::string path;  // for messages
    MappedFile file;
    ModelWeights weights;  // pointers into `file`
    Rope rope;
    WeightBytes bytes;

    // Bytes that decoding one token at cache length n_ctx reads: weights once, experts in use, cache rows.
    int64_t active_bytes(int n_ctx, int64_t cache_row_bytes) const {
        return bytes.fixed + bytes.head + bytes.embed_row + cfg.num_experts_per_tok * bytes.experts +
               int64_t{cfg.num_hidden_layers} * n_ctx * cache_row_bytes;
    }
};

// Sums over passes, counted (not estimated) from what each pass touched.
struct PassStats {
    int64_t passes = 0, rows = 0;  // main and MTP passes together
    int64_t mtp_passes = 0, mtp_rows = 0;
    int64_t weight_bytes = 0;     // packed weight bytes read
    int64_t cache_bytes = 0;      // cache rows read
    int64_t experts_touched = 0;  // distinct (layer, expert) pairs, summed over passes
    double seconds = 0;
    // Main passes, MTP passes; bytes and seconds add up to the totals above, but on a device, which times no stages.
    StageStats stages[2][kNumStages];
};

inline constexpr int kMaxRound = 8;      // rows of a verification pass
inline constexpr int kMaxPending = 256;  // hidden rows that wait for their MTP row between calls

class Engine;

// The next n rows of one sequence in a pass.
struct Segment {
    Engine* engine = nullptr;       // of the backend that runs the pass
    std::span<const int32_t> ids;   // [n] their tokens; MTP: the tokens after them
    const float* hidden = nullptr;  // MTP: [n, hidden_size] hidden states; null: a pass through the main layers
    int pos = 0;                    // cache row of ids[0]; rows pos..pos+n-1 are written
    int n_logits = 0;               // the last n_logits rows get logits
    Trace* trace = nullptr;         // out: taps of these rows; its feed is used up, whether the pass fails or not

    int n() const { return static_cast<int>(ids.size()); }
    bool mtp() const { return hidden != nullptr; }
};

// A pass over rows of several sequences, side by side: the weights are read once for all of them. No row's bits depend on
// the others (law L1).
struct PassArgs {
    std::span<const Segment>
        segments;             // of different engines; all through the main layers, or all through the MTP layer
    float* logits = nullptr;  // out: [rows of all segments that want logits, in order, logits_stride()]
    PassStats& stats;         // out: what the pass read and how long it took, but not passes and rows; unless it fails
    // May be null. Asked by the caller's thread between layers of a long pass: true ends it with an error.
    bool (*interrupted)() = nullptr;

    bool mtp() const { return segments[0].mtp(); }
    int n() const {
        return std::accumulate(segments.begin(), segments.end(), 0, [](int n, const Segment& s) { return n + s.n(); });
    }
};

// What a pass leaves, until the backend's next one.
struct PassResult {
    View<const float> hidden;  // [n, hidden_size] after the final norm, rows of all segments in order
    // Main passes of one segment of up to kMaxRound rows: [moe layers, n, num_experts_per_tok] layer * n_routed_experts +
    // expert, ascending in a row and layer; else empty.
    std::span<const int32_t> experts;
};

// A run of decoding by an engine that needs no host between tokens.
struct DecodeArgs {
    std::span<const int32_t> tokens;  // [n + 1] t_0..t_n; the last is known but not in the cache yet
    bool keeps_mtp = false;           // the MTP cache and its pending rows are kept up to date: drafts can be asked for
    // [n_pending, hidden_size], at most kMaxPending: the MTP cache lacks these rows below n.
    std::span<const float> pending;
    int64_t max_tokens = 0;  // tokens to emit at most
    int n_valid = 0;         // ids below may be chosen
    SampleParams sample;
    std::span<const int32_t> eos;
};

enum DecodeStop : int { kStopNone = 0, kStopEos, kStopLength, kStopContext, kStopNotFinite };
inline constexpr const char* kStopNames[] = {"", "eos", "length", "context", "not finite"};

// A round of drafting, verification and acceptance that has ended.
struct DecodedRound {
    int32_t n_tokens = 0;  // emitted: accepted drafts and the token after them; 0 behind a stop
    int32_t tokens[kMaxRound] = {};
    int32_t drafted = 0, accepted = 0;
    int32_t experts = 0;  // distinct (layer, expert) pairs of the verification pass
    int32_t stop = 0;     // DecodeStop; once set, no further token comes
    int32_t bad_id = -1;  // kStopNotFinite: first NaN logit, -1: none is finite
    int64_t end_ns = 0;   // the device's clock
};

// Where a run of decoding ended.
struct DecodeResult {
    std::vector<int32_t> tokens;  // [n] in the main cache
    std::vector<float> pending;   // [n_pending, hidden_size]
};

// An array in an engine's memory, contiguous; for tests and oracles, never freed by the reader.
struct ArrayView {
    void* data = nullptr;
    const char* type = "<f4";  // or "<i4", "|u1", as numpy names them
    std::vector<int64_t> shape;
};

// One session's caches, and what decodes without the host.
class Engine {
  public:
    virtual ~Engine() = default;
    // Rows 0..n-1 of a layer's cache, between the cache and host [n, row_bytes].
    virtual Status copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) = 0;
    // Whether it takes values that a trace feeds (Trace::feed).
    virtual bool takes_feed() const { return false; }

    // Decoding by the engine itself: step() queues a round of k < kMaxRound drafts and returns at once; poll() returns the rounds
    // that have ended since the last poll, without waiting for one, and how many are still to be returned; finish() waits for
    // what is queued and adds everything that ran to `stats`, rounds queued behind a stop too.
    virtual Status decode_start(const DecodeArgs&) { return no_device("decode"); }
    virtual Status decode_step(int /*k*/) { return no_device("decode"); }
    virtual Result<std::vector<DecodedRound>> decode_poll(int& /*left*/) { return no_device("decode"); }
    virtual Result<DecodeResult> decode_finish(PassStats& /*stats*/) { return no_device("decode"); }

    // Named buffers ("logits", "x", "cache", ...) and the taps of the last main pass and of the last MTP pass that recorded any,
    // valid until the next one.
    virtual std::optional<ArrayView> view(const std::string& /*name*/) { return std::nullopt; }
    // JSON text about the device, or a measurement that leaves the session as it is.
    virtual Result<std::string> report(const std::string& /*what*/) { return no_device("device report"); }

  private:
    static Error no_device(const char* what) {
        return {ErrorCode::kUnsupported, std::string(what) + ": this session runs on the CPU"};
    }
};

struct EngineArgs {
    int ctx = 0;
    CacheType kv = CacheType::kF16;
    int max_rows = 0;  // of its longest pass
};

// A model's weights where passes are computed, and what its engines share. Outlives them; outlived by the BoundModel.
class Backend {
  public:
    std::string arch;         // names its bits: an instruction set, "sm_90", "sim"
    std::string device_name;  // "NVIDIA H200"; empty: the CPU
    int n_threads = 1;
    bool one_segment = false;  // passes take one segment only: sequences take turns
    int max_rows = 0;          // of a pass: what engines and reserve() have asked for
    int pass_rows = 256;       // of a pass that gains little from more rows

    virtual ~Backend() = default;
    virtual Result<std::unique_ptr<Engine>> make_engine(const EngineArgs& args) = 0;
    // Makes room for passes of so many rows.
    virtual Status reserve(int n) {
        max_rows = std::max(max_rows, n);
        return {};
    }
    virtual Result<PassResult> forward(const PassArgs& pass) = 0;
    // fn(i) for i < n, on all its threads.
    virtual Status each(int n, const std::function<void(int)>& fn) {
        for (int i = 0; i < n; ++i) fn(i);
        return {};
    }
};

}  // namespace deepcalm
