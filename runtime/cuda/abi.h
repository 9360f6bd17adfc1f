// What the runtime and a device library (libdeepcalm_cuda.so, or the tests' simulator: the same sources on the CPU) say to
// each other. One C symbol, a table of functions, plain structs. The library is built from the same tree as the core and
// opened next to it; version and struct sizes are compared before anything else is called.
//
// Ownership: every object the library makes is closed through the table; memory never changes sides. The runtime's own types
// (configuration, bound weights, rope) are read through inline accessors during open_model() only and copied.
// Errors: no exception crosses in either direction, the two sides may have different C++ libraries. After a call that failed
// nothing runs on that still uses the caller's memory, and the session is as if the call had not been made: cache rows from
// the caller's length on may hold anything.
// Threads: calls on one model and its sessions are serialised by the caller (Model::pass_mutex).
#pragma once

#include "runtime/rope.h"
#include "runtime/weights.h"

namespace deepcalm {

inline constexpr int kDeviceAbi = 3;
// Changes when a struct that both sides read does; a library of another build is refused.
inline constexpr int64_t kDeviceFingerprint = int64_t{sizeof(ModelConfig)} << 48 | int64_t{sizeof(LayerWeights)} << 32 |
                                              int64_t{sizeof(ModelWeights)} << 16 | int64_t{sizeof(Rope)};

// Filled by a call that returns failure; text is one line.
struct DeviceError {
    ErrorCode code = ErrorCode::kResource;
    char text[1000] = "";
};

struct DeviceModelArgs {
    const ModelConfig* cfg = nullptr;
    const ModelWeights* weights = nullptr;  // pointers into the mapping [base, base + bytes)
    const Rope* rope = nullptr;
    const char* path = nullptr;  // for messages
    int fd = -1;                 // the mapped file
    const std::byte* base = nullptr;
    int64_t bytes =
        0;  // the file: uploaded whole, so that a device pointer is the device base + the offset in the file
    uint64_t fill_seed =
        0;  // not 0: weights are drawn on the device instead of read (speed work on shapes nobody ships)
    int device = 0;
};

struct DeviceSessionArgs {
    int ctx = 0;
    CacheType kv = CacheType::kF16;
    int max_rows = 0;  // rows of the largest pass
    bool mtp = false;  // an MTP cache is kept
};

// Receives taps and says which are wanted; data is host memory, valid during the call. Layout as Trace::record.
// They do not throw. take() gives the n f32 values that replace a tap once it is recorded (Trace::feed), or null; valid during the pass.
struct DeviceTrace {
    void* ctx = nullptr;
    bool (*wants)(void* ctx, const char* name) noexcept = nullptr;
    void (*record)(void* ctx, const char* name, const void* data, bool is_int, int64_t rows, const int64_t* dims,
                   int n_dims, int64_t stride) noexcept = nullptr;
    const float* (*take)(void* ctx, const char* name, int64_t* n) noexcept = nullptr;
};

// One pass: PassArgs of runtime/session.h with host pointers. All outputs are there on return.
struct DevicePass {
    const int32_t* ids = nullptr;  // [n]
    int n = 0;
    bool mtp = false;
    const float* hidden = nullptr;  // MTP: [n, hidden_size], else null
    int pos = 0;                    // cache row of ids[0]
    int n_logits = 0;
    float* logits = nullptr;  // [n_logits, logits_stride]
    int64_t logits_stride = 0;
    float* final_h = nullptr;  // [n, hidden_stride] post-norm hidden rows, or null when nobody reads them
    int64_t hidden_stride = 0;
    int32_t* topk = nullptr;             // [moe layers of the pass, n, num_experts_per_tok] expert ids, or null
    const DeviceTrace* trace = nullptr;  // null: no taps
};

// Decoding on the device: rounds of drafting, verification and acceptance without the host.
struct DeviceDecode {
    const int32_t* tokens = nullptr;  // [n + 1] t_0..t_n; the last is known but not in the cache yet
    int n = 0;                        // tokens in the main cache
    bool keeps_mtp = false;           // the MTP cache and its pending rows are kept up to date: drafts can be asked for
    int n_pending = 0;                // the MTP cache holds rows 0..n - n_pending - 1; at most kMaxPending
    const float* pending = nullptr;   // [n_pending, hidden_size] h_{n - n_pending}..h_{n-1}
    int64_t max_tokens = 0;           // tokens to emit at most
    int n_valid = 0;                  // ids below may be chosen
    float temp = 0, top_p = 1, min_p = 0;
    int top_k = 0;
    uint64_t seed = 0;
    const int32_t* eos = nullptr;  // [n_eos], at most kMaxEos
    int n_eos = 0;
};
inline constexpr int kMaxEos = 32;
inline constexpr int kMaxRound = 8;      // rows of a verification pass
inline constexpr int kMaxPending = 256;  // hidden rows that wait for their MTP row between calls

enum DeviceStop : int { kStopNone = 0, kStopEos, kStopLength, kStopContext, kStopNotFinite };

// A round that has ended.
struct DeviceRound {
    int32_t n_tokens = 0;  // emitted: accepted drafts and the token after them; 0 behind a stop
    int32_t tokens[kMaxRound] = {};
    int32_t drafted = 0, accepted = 0;
    int32_t experts = 0;  // distinct (layer, expert) pairs of the verification pass
    int32_t stop = 0;     // DeviceStop; once set, no further token comes
    int32_t bad_id = -1;  // kStopNotFinite: first NaN logit, -1: none is finite
    int64_t end_ns = 0;   // the device's clock
};

// Where a run of decoding ended, and what it counted.
struct DeviceDecodeState {
    int n = 0;          // tokens in the main cache
    int n_pending = 0;  // as in DeviceDecode
    // of everything that ran, rounds queued after the stop included
    int64_t passes = 0, rows = 0, mtp_passes = 0, mtp_rows = 0;
    int64_t experts = 0;      // distinct (layer, expert) pairs of main passes, summed over them
    int64_t mtp_experts = 0;  // and of MTP passes
    int64_t cache_rows = 0;   // rows of one layer that main passes read; mtp_cache_rows likewise
    int64_t mtp_cache_rows = 0;
};

// A view of device memory for tests and oracles, contiguous; never freed by the reader.
struct DeviceView {
    void* data = nullptr;
    const char* type = "<f4";  // or "<i4", "|u1", as numpy names them
    int n_dims = 0;
    int64_t dims[4] = {};
};

struct DeviceModel;
struct DeviceSession;

struct DeviceApi {
    int abi = kDeviceAbi;
    int64_t fingerprint = kDeviceFingerprint;

    // True: a device is there; text is its name, arch names its bits ("sm_90", "sim"). False: text is what is missing.
    bool (*probe)(int device, char* text, size_t size, char arch[16]) noexcept = nullptr;
    DeviceModel* (*open_model)(const DeviceModelArgs& args, DeviceError& error) noexcept = nullptr;
    void (*close_model)(DeviceModel* model) noexcept = nullptr;
    DeviceSession* (*open_session)(DeviceModel* model, const DeviceSessionArgs& args,
                                   DeviceError& error) noexcept = nullptr;
    void (*close_session)(DeviceSession* session) noexcept = nullptr;
    bool (*forward)(DeviceSession* session, const DevicePass& pass, DeviceError& error) noexcept = nullptr;
    // n_rows cache rows of one layer from `row` on, between the device and host [n_rows, row_bytes].
    bool (*copy_cache)(DeviceSession* session, bool mtp, int layer, int row, int n_rows, void* host, bool to_device,
                       DeviceError& error) noexcept = nullptr;
    // Starts decoding; then step() queues one round of k < kMaxRound drafts and returns at once, poll() returns the rounds
    // that have ended since the last poll without waiting for one (-1: failed) and how many are still to be returned, and
    // finish() waits for what is queued and returns the state and its pending rows [kMaxPending + kMaxRound, hidden_size].
    bool (*decode_start)(DeviceSession* session, const DeviceDecode& decode, DeviceError& error) noexcept = nullptr;
    bool (*decode_step)(DeviceSession* session, int k, DeviceError& error) noexcept = nullptr;
    int (*decode_poll)(DeviceSession* session, DeviceRound* rounds, int capacity, int& left,
                       DeviceError& error) noexcept = nullptr;
    bool (*decode_finish)(DeviceSession* session, DeviceDecodeState& state, float* pending,
                          DeviceError& error) noexcept = nullptr;
    // Named buffers of a session ("logits", "x", "cache", ...), and the taps of the last main pass and of the last MTP pass
    // that recorded any, valid until the next one; false: no such name.
    bool (*view)(DeviceSession* session, const char* name, DeviceView& view) noexcept = nullptr;
    // JSON text about the device, or a measurement that leaves the session as it is: see report.h.
    bool (*report)(DeviceSession* session, const char* what, char* text, size_t size,
                   DeviceError& error) noexcept = nullptr;
};

using DeviceEntry = const DeviceApi* (*)(int abi);
inline constexpr const char* kDeviceSymbol = "deepcalm_backend";

}  // namespace deepcalm
