// A device library: weights and sessions in device memory, passes as graphs of kernels, decoding, and the table of
// functions that the core calls. Compiled by nvcc into libdeepcalm_cuda.so and, for the tests, by g++ (tests/sim).
#include "runtime/cuda/fill.cuh"
#include "runtime/cuda/forward.h"
#include "runtime/cuda/host.h"

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <map>
#include <memory>
#include <tuple>
#include <unistd.h>

namespace deepcalm {
namespace gpu {
namespace {

// --- errors ---------------------------------------------------------------------------------------------------------

__attribute__((format(printf, 3, 4))) bool fail(DeviceError& e, ErrorCode code, const char* format, ...) {
    e.code = code;
    std::va_list args;
    va_start(args, format);
    std::vsnprintf(e.text, sizeof e.text, format, args);
    va_end(args);
    return false;
}
bool check(rt::Error code, const char* what, DeviceError& e) {
    if (code == 0) return true;
    rt::last_error();  // clears what can be cleared
    return fail(e, ErrorCode::kResource, "device: %s failed: %s", what, rt::error_string(code));
}
#define DC_RT(call)                                                                                                    \
    if (!check(call, #call, error)) return false

// fn(), or `failed` with an error where it throws: nothing is thrown across the table.
template <class R, class Fn> R guarded(DeviceError& error, R failed, Fn&& fn) noexcept {
    try {
        return fn();
    } catch (const std::bad_alloc&) {
        fail(error, ErrorCode::kResource, "device: no host memory left");
    } catch (const std::exception& e) {
        fail(error, ErrorCode::kResource, "device: %s", e.what());
    } catch (...) {
        fail(error, ErrorCode::kResource, "device: an unknown exception");
    }
    return failed;
}

double gb(int64_t bytes) { return 1e-9 * static_cast<double>(bytes); }

}  // namespace

// Device memory that goes with its owner.
struct Memory {
    void* p = nullptr;
    int64_t bytes = 0;
    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { reset(); }
    void reset() {
        if (p != nullptr) rt::release(p);
        p = nullptr;
        bytes = 0;
    }
    rt::Error allocate(int64_t n) {
        reset();
        const rt::Error e = rt::allocate(&p, n);
        if (e != 0) p = nullptr;
        bytes = e == 0 ? n : 0;
        return e;
    }
};

}  // namespace gpu

using namespace gpu;

// --- model ----------------------------------------------------------------------------------------------------------

struct DeviceModel {
    ModelConfig cfg;
    Rope rope;
    std::string path;
    rt::DeviceInfo info;
    int index = 0;
    bool hangs = false;    // a session of it did not come to rest
    Memory memory;         // the packed file, byte for byte
    ModelWeights weights;  // pointers into `memory`

    std::byte* base() const { return static_cast<std::byte*>(memory.p); }

    // Reads the file in pieces through pinned memory: one is read while another travels; no second copy on the host.
    bool upload(int fd, int64_t bytes, DeviceError& error) {
        constexpr int64_t kPiece = int64_t{16} << 20;
        struct Lane {
            void* pinned = nullptr;
            rt::Stream stream = nullptr;
            ~Lane() {
                if (stream != nullptr) rt::destroy(stream);
                if (pinned != nullptr) rt::release_pinned(pinned);
            }
        } lanes[2];
        for (Lane& l : lanes) {
            DC_RT(rt::create(&l.stream));
            DC_RT(rt::allocate_pinned(&l.pinned, std::min(kPiece, bytes)));
        }
        for (int64_t at = 0, i = 0; at < bytes; at += kPiece, ++i) {
            Lane& l = lanes[i % 2];
            DC_RT(rt::synchronize(l.stream));
            const int64_t n = std::min(kPiece, bytes - at);
            for (int64_t got = 0; got < n;) {
                const ssize_t r = pread(fd, static_cast<char*>(l.pinned) + got, static_cast<size_t>(n - got), at + got);
                if (r < 0 && errno == EINTR) continue;
                if (r <= 0) {
                    return fail(error, ErrorCode::kPackedFile, "%s: %s at byte %lld of %lld", path.c_str(),
                                r < 0 ? std::strerror(errno) : "ends early", static_cast<long long>(at + got),
                                static_cast<long long>(bytes));
                }
                got += r;
            }
            DC_RT(rt::copy(base() + at, l.pinned, n, l.stream));
        }
        for (const Lane& l : lanes) DC_RT(rt::synchronize(l.stream));
        return true;
    }
};

// --- session --------------------------------------------------------------------------------------------------------

// A pass or a round that is run many times.
struct Replay {
    Program program;
    rt::Graph graph;
};

class JsonText;  // report.h

struct DeviceSession {
    DeviceModel& m;
    const DeviceSessionArgs args;
    rt::Stream stream = nullptr;
    Memory memory, tap_memory, kept[2];  // kept: copies of the taps of the last traced main pass, and MTP pass
    void* pinned = nullptr;
    std::map<std::string, DeviceView> kept_taps[2];
    Buffers b;
    TokenRing* ring = nullptr;
    int threads = std::min(kThreads, rt::kMaxThreads), blocks = 1;
    int pass_rows = std::min(kMaxPassRows, rt::kMaxRows);  // of the longest sub-pass
    // (mtp, n, n_logits, long context) of passes from the host; (k, parts, long context, sampled) of rounds
    using ReplayKey = std::tuple<int, int, int, bool, bool>;
    std::map<ReplayKey, std::unique_ptr<Replay>> replays;
    // a run of decoding
    DeviceDecode run;
    bool closed = false;             // it does not hold what it should: nothing more is computed
    unsigned queued = 0, taken = 0;  // rounds queued, rounds handed over
    int pend_bound = 0;              // pending rows at most
    int64_t pos_bound = 0;           // position that the queued rounds cannot pass

    DeviceSession(DeviceModel& model, const DeviceSessionArgs& a) : m(model), args(a) {}
    ~DeviceSession() {
        if (stream != nullptr) {
            rt::drain(stream);
            replays.clear();
            rt::destroy(stream);
        }
        if (pinned != nullptr) rt::release_pinned(pinned);
    }

    // Lays the buffers out; base null: only counts. Returns the bytes.
    int64_t lay_out(std::byte* base) {
        const ModelConfig& c = m.cfg;
        int64_t used = 0;
        const auto take = [&]<class T>(T*& p, int64_t n) {
            if (base != nullptr) p = reinterpret_cast<T*>(base + used);
            used += round_up(n * static_cast<int64_t>(sizeof(T)), 256);
        };
        const auto take_rows = [&](View<float>& v, int64_t n, int64_t width) {
            v.stride = round_up(width, 4);
            take(v.data, n * v.stride);
        };
        const int64_t rows = std::max(args.max_rows, kBlockRows), heads = c.num_attention_heads;
        const int64_t d = c.hidden_size;
        const bool moe = c.n_routed_experts > 0;
        b.rows = rows;
        b.row_stride = round_up(c.cache_row_bytes(args.kv), 16);
        take_rows(b.x, rows, d);
        take_rows(b.h, rows, d);
        take_rows(b.qkv, rows, c.qkv_a_stride());
        b.q = b.qkv;
        if (c.q_lora_rank > 0) take_rows(b.q, rows, c.q_stride());
        take_rows(b.q_full, rows, heads * c.q_full_width());
        take_rows(b.v, rows, heads * c.v_head_dim);
        take_rows(
            b.ffn_h, rows,
            std::max(c.is_moe(0) ? 0 : c.intermediate_size, moe ? c.n_shared_experts * c.moe_intermediate_size : 0));
        if (moe) {
            const int64_t k = c.num_experts_per_tok;
            take_rows(b.expert_h, rows * k, c.moe_intermediate_size);
            take_rows(b.gate_logits, rows, c.gate_logits_stride());
            take(b.topk_idx, (moe_layers() + 1) * rows * k);
            take(b.topk_weight, rows * k);
            if (rows > kBlockRows) take(b.routed, rows * b.x.stride);
        }
        const int64_t ctx = args.ctx, one = ceil_div(std::min<int64_t>(ctx, kShortContext), kChunk),
                      long_units = ceil_div(ctx, int64_t{kChunk} * kPartialChunks);
        b.part_units = kBlockRows * std::max(one, long_units);
        take(b.part_o, b.part_units * heads * c.c_pad());
        take(b.part_ml, b.part_units * heads * 2);
        take_rows(b.logits, kLogitRows, c.logits_stride());
        take(b.best_value, kLogitRows * int64_t{blocks});
        take(b.best_id, kLogitRows * int64_t{blocks});
        take(b.arrived, 1);
        take(b.cos, ctx * c.qk_rope_head_dim / 2);
        take(b.sin, ctx * c.qk_rope_head_dim / 2);
        take(b.cache, c.num_hidden_layers * ctx * b.row_stride);
        take(b.ids, rows);
        take(b.pos, rows);
        take(b.tokens, ctx + kMaxRound);
        take(b.choice, rows);
        take(b.loop, 1);
        if (args.mtp) {
            take(b.mtp_cache, ctx * b.row_stride);
            take_rows(b.eh, rows, 2 * d);
            take(b.hidden, rows * d);
            take(b.pend, (kMaxPending + kMaxRound) * d);
            take(b.g, d);
        }
        b.tap_stride = c.q_width() + 2 * round_up(heads * c.kv_lora_rank, 4) + round_up(c.q_lora_rank, 4) +
                       4 * b.x.stride + round_up(c.kv_lora_rank, 4) + round_up(c.qk_rope_head_dim, 4) + 64;
        return used;
    }
    int64_t moe_layers() const {
        return m.cfg.n_routed_experts > 0 ? std::max(m.cfg.num_hidden_layers - m.cfg.first_k_dense_replace, 0) : 0;
    }

    bool open(DeviceError& error) {
        blocks = m.info.sms;
        DC_RT(rt::set_device(m.index));
        const int64_t bytes = lay_out(nullptr);
        rt::DeviceInfo now;
        if (!rt::find_device(m.index, now, error.text, sizeof error.text)) return false;
        if (bytes > now.free) {
            return fail(
                error, ErrorCode::kResource,
                "a session of %d positions needs %.2f GB of device memory, %.2f GB of %.2f GB are free on %s; use "
                "a smaller ctx or max_rows, or another kv type",
                args.ctx, gb(bytes), gb(now.free), gb(now.total), now.name);
        }
        DC_RT(memory.allocate(bytes));
        lay_out(static_cast<std::byte*>(memory.p));
        DC_RT(rt::create(&stream));
        DC_RT(rt::allocate_pinned(&pinned, sizeof(TokenRing)));
        ring = new (pinned) TokenRing;
        DC_RT(rt::zero(b.arrived, 4, stream));
        DC_RT(rt::zero(b.loop, sizeof(Loop), stream));
        const int half = m.cfg.qk_rope_head_dim / 2;
        std::vector<float> cos(static_cast<size_t>(args.ctx) * static_cast<size_t>(half)), sin(cos.size());
        for (int i = 0; i < args.ctx; ++i)
            m.rope.fill(i, cos.data() + int64_t{i} * half, sin.data() + int64_t{i} * half);
        const rt::Settled settled{stream};
        DC_RT(rt::copy(b.cos, cos.data(), static_cast<int64_t>(cos.size()) * 4, stream));
        DC_RT(rt::copy(b.sin, sin.data(), static_cast<int64_t>(sin.size()) * 4, stream));
        DC_RT(allow_smem(PassStages{}, m.info.smem));
        DC_RT(rt::synchronize(stream));
        return fits(error);
    }
    // Every shape that this session can launch, or false and the stage that needs more shared memory than a block has.
    bool fits(DeviceError& error) const {
        Program p;
        for (const int n : {1, std::min(args.max_rows, kBlockRows), kBlockRows, std::min(args.max_rows, pass_rows)}) {
            for (const bool long_context : {false, args.ctx > kShortContext})
                writer(p).pass(shape(n, false, n, long_context, false));
        }
        for (const Op& op : p.ops) {
            if (op.need <= m.info.smem) continue;
            return fail(error, ErrorCode::kUnsupported,
                        "stage '%s' of this model needs %lld bytes of shared memory a block at ctx %d, %s gives %lld",
                        op.name.c_str(), static_cast<long long>(op.need), args.ctx, m.info.name,
                        static_cast<long long>(m.info.smem));
        }
        return true;
    }

    PassWriter writer(Program& p) const {
        return {{m.cfg, m.weights, b, args.ctx, args.kv, m.rope.softmax_scale, blocks, threads, m.info.smem}, p};
    }
    // A pass whose inputs the host has put into b.ids, b.pos, b.hidden.
    PassShape shape(int n, bool mtp, int n_logits, bool long_context, bool trace) const {
        return {.n = n,
                .mtp = mtp,
                .n_logits = n_logits,
                .long_context = long_context,
                .ids = b.ids,
                .pos = b.pos,
                .hidden = mtp ? View<const float>{b.hidden, m.cfg.hidden_size} : View<const float>{},
                .choice = b.choice,
                .n_valid = m.cfg.vocab_size,
                .trace = trace};
    }

    // ---- running a list of stages ----------------------------------------------------------------------------------

    rt::Error launch(const Op& op, bool dependent, rt::Stream s) const {
        return op.launch({.grid = op.blocks,
                          .block = threads,
                          .smem = op.smem,
                          .dependent = dependent && m.info.dependent,
                          .stream = s});
    }
    rt::Error launch_all(const Program& p, rt::Stream s) const {
        rt::Error e = 0;
        for (size_t i = 0; i < p.ops.size() && e == 0; ++i) e = launch(p.ops[i], i > 0, s);
        return e;
    }
    rt::Error prepare(Replay& r) const {
        return r.graph.record(stream, [&](rt::Stream s) { return launch_all(r.program, s); });
    }
    bool at_rest() const {
        using Clock = std::chrono::steady_clock;
        rt::Error e = 0;
        for (const auto end = Clock::now() + rt::kPatience; Clock::now() < end;) {
            if (rt::idle(stream, e)) return true;
        }
        return false;
    }
    // What was prepared under `key`, now or earlier; null: failed.
    template <class Write> Replay* replay(const ReplayKey& key, Write&& write, DeviceError& error) {
        if (const auto it = replays.find(key); it != replays.end()) return it->second.get();
        auto r = std::make_unique<Replay>();
        write(r->program);
        if (!check(prepare(*r), "recording a graph", error)) return nullptr;
        return (replays[key] = std::move(r)).get();
    }

    // ---- passes from the host --------------------------------------------------------------------------------------

    bool forward(const DevicePass& p, DeviceError& error) {
        DC_RT(rt::set_device(m.index));
        if (p.trace != nullptr) kept_taps[p.mtp].clear();
        std::map<std::string, DeviceView> taps;
        for (int at = 0; at < p.n; at += pass_rows) {  // sub-passes: the same bits (law L1)
            const int n = std::min(pass_rows, p.n - at);
            DevicePass part = p;
            const int64_t first_logit = p.n - p.n_logits;
            part.ids = p.ids + at;
            part.n = n;
            part.pos = p.pos + at;
            part.n_logits = static_cast<int>(std::clamp<int64_t>(at + n - first_logit, 0, n));
            part.logits = p.logits + std::max<int64_t>(at - first_logit, 0) * p.logits_stride;
            if (p.hidden != nullptr) part.hidden = p.hidden + int64_t{at} * m.cfg.hidden_size;
            if (p.final_h != nullptr) part.final_h = p.final_h + at * p.hidden_stride;
            if (!forward_part(part, at, p.n, taps, error)) return false;
        }
        return p.trace == nullptr || record(p, std::move(taps), error);
    }
    // Rows [first, first + p.n) of a pass of n_all.
    bool forward_part(const DevicePass& p, int first, int n_all, std::map<std::string, DeviceView>& taps,
                      DeviceError& error) {
        const int n = p.n;
        const int64_t d = m.cfg.hidden_size;
        std::vector<int32_t> pos(static_cast<size_t>(n));
        for (int i = 0; i < n; ++i) pos[static_cast<size_t>(i)] = p.pos + i;
        const rt::Settled settled{stream};
        DC_RT(rt::copy(b.ids, p.ids, 4 * int64_t{n}, stream));
        DC_RT(rt::copy(b.pos, pos.data(), 4 * int64_t{n}, stream));
        if (p.mtp) DC_RT(rt::copy(b.hidden, p.hidden, 4 * n * d, stream));
        const bool long_context = p.pos + n > kShortContext;
        const PassShape s = shape(n, p.mtp, p.n_logits, long_context, p.trace != nullptr);
        if (p.trace != nullptr) {
            if (!traced(s, p, first, n_all, taps, error)) return false;
        } else if (n > kBlockRows) {
            Program program;
            writer(program).pass(s);
            DC_RT(launch_all(program, stream));
        } else {
            Replay* r = replay(
                {p.mtp ? -2 : -1, n, p.n_logits, long_context, false},
                [&](Program& program) { writer(program).pass(s); }, error);
            if (r == nullptr) return false;
            DC_RT(r->graph.launch(stream));
        }
        const auto take_logits = [&](int rows, int64_t to) {
            return rt::copy_rows(p.logits + to * p.logits_stride, 4 * p.logits_stride, b.logits.data,
                                 4 * b.logits.stride, 4 * int64_t{m.cfg.vocab_size}, rows, stream);
        };
        if (n <= kBlockRows || p.n_logits <= 1) {
            if (p.n_logits > 0) DC_RT(take_logits(p.n_logits, 0));
        } else {
            for (int i = 0; i < p.n_logits; i += kLogitRows) {
                const int rows = std::min(kLogitRows, p.n_logits - i);
                Program program;
                writer(program).rows_head(p.mtp, n - p.n_logits + i, rows, m.cfg.vocab_size, b.pos);
                DC_RT(launch_all(program, stream));
                DC_RT(take_logits(rows, i));
            }
        }
        if (p.final_h != nullptr)
            DC_RT(rt::copy_rows(p.final_h, 4 * p.hidden_stride, b.h.data, 4 * b.h.stride, 4 * d, n, stream));
        const int64_t layers = p.mtp ? (m.cfg.is_moe(m.cfg.num_hidden_layers) ? 1 : 0) : moe_layers();
        const int64_t k = m.cfg.num_experts_per_tok, skip = p.mtp ? moe_layers() : 0;
        if (p.topk != nullptr && layers > 0) {
            DC_RT(rt::copy_rows(p.topk + first * k, 4 * n_all * k, b.topk_idx + skip * b.rows * k, 4 * b.rows * k,
                                4 * n * k, layers, stream));
        }
        DC_RT(rt::synchronize(stream));
        return true;
    }

    // The same stages one by one; behind each its intermediates are copied to `kept`, or replaced by what the host feeds.
    // taps: [n_all, ...] views into `kept`.
    bool traced(const PassShape& s, const DevicePass& p, int first, int n_all, std::map<std::string, DeviceView>& taps,
                DeviceError& error) {
        if (tap_memory.p == nullptr) DC_RT(tap_memory.allocate(4 * b.rows * b.tap_stride));
        b.taps = static_cast<float*>(tap_memory.p);
        Program program;
        writer(program).pass(s);
        const auto row_bytes = [&](const TapOut& t) { return 4 * t.vectors / t.rows * t.width; };
        if (first == 0) {
            std::map<std::string, int64_t> at;
            int64_t bytes = 0;
            for (const TapOut& t : program.taps) {
                if (!p.trace->wants(p.trace->ctx, t.name.c_str())) continue;
                at[t.name] = bytes;
                bytes += round_up(row_bytes(t) * n_all, 256);
            }
            if (bytes > kept[p.mtp].bytes) DC_RT(kept[p.mtp].allocate(bytes));
            for (const TapOut& t : program.taps) {
                if (!at.contains(t.name)) continue;
                DeviceView& v = taps[t.name];
                v = {.data = static_cast<std::byte*>(kept[p.mtp].p) + at[t.name],
                     .type = t.is_int ? "<i4" : "<f4",
                     .n_dims = static_cast<int>(t.dims.size()) + 1};
                v.dims[0] = n_all;
                std::copy(t.dims.begin(), t.dims.end(), v.dims + 1);
            }
        }
        size_t next = 0;
        for (size_t i = 0; i < program.ops.size(); ++i) {
            DC_RT(launch(program.ops[i], i > 0, stream));
            for (; next < program.taps.size() && program.taps[next].op == i; ++next) {
                const TapOut& t = program.taps[next];
                if (const auto v = taps.find(t.name); v != taps.end()) {
                    DC_RT(rt::copy_rows(static_cast<std::byte*>(v->second.data) + first * row_bytes(t), 4 * t.width,
                                        t.data, 4 * t.stride, 4 * t.width, t.vectors, stream));
                }
                int64_t fed = 0;
                const float* feed = t.input ? p.trace->take(p.trace->ctx, t.name.c_str(), &fed) : nullptr;
                if (feed == nullptr) continue;
                if (fed != row_bytes(t) / 4 * n_all) {
                    return fail(error, ErrorCode::kSession, "feed: %s has %lld values, expected %lld", t.name.c_str(),
                                static_cast<long long>(fed), static_cast<long long>(row_bytes(t) / 4 * n_all));
                }
                DC_RT(rt::copy_rows(t.data, 4 * t.stride, feed + first * row_bytes(t) / 4, 4 * t.width, 4 * t.width,
                                    t.vectors, stream));
            }
        }
        return true;
    }
    // Hands the taps of all rows to the host.
    bool record(const DevicePass& p, std::map<std::string, DeviceView> taps, DeviceError& error) {
        const DeviceTrace& to = *p.trace;
        std::vector<float> host;
        const rt::Settled settled{stream};
        for (const auto& [name, v] : taps) {
            int64_t per_row = 1;
            for (int i = 1; i < v.n_dims; ++i) per_row *= v.dims[i];
            host.resize(static_cast<size_t>(v.dims[0] * per_row));
            DC_RT(rt::copy(host.data(), v.data, static_cast<int64_t>(host.size()) * 4, stream));
            DC_RT(rt::synchronize(stream));
            to.record(to.ctx, name.c_str(), host.data(), v.type[1] == 'i', v.dims[0], v.dims + 1, v.n_dims - 1,
                      per_row);
        }
        kept_taps[p.mtp] = std::move(taps);
        const char* name = p.mtp ? "mtp.logits" : "logits";
        const int64_t vocab = m.cfg.vocab_size;
        if (p.n_logits > 0 && to.wants(to.ctx, name))
            to.record(to.ctx, name, p.logits, false, p.n_logits, &vocab, 1, p.logits_stride);
        return true;
    }

    bool copy_cache(bool mtp, int layer, int row, int n, void* host, bool to_device, DeviceError& error) {
        DC_RT(rt::set_device(m.index));
        const int64_t bytes = m.cfg.cache_row_bytes(args.kv);
        std::byte* at = (mtp ? b.mtp_cache : b.cache) + (int64_t{layer} * args.ctx + row) * b.row_stride;
        if (to_device) {
            DC_RT(rt::copy_rows(at, b.row_stride, host, bytes, bytes, n, stream));
        } else {
            DC_RT(rt::copy_rows(host, bytes, at, b.row_stride, bytes, n, stream));
        }
        DC_RT(rt::synchronize(stream));
        return true;
    }

    // ---- decoding --------------------------------------------------------------------------------------------------

    bool decode_start(const DeviceDecode& d, DeviceError& error) {
        DC_RT(rt::set_device(m.index));
        DC_RT(rt::synchronize(stream));
        run = d;
        *ring = TokenRing{};
        queued = taken = 0;
        pend_bound = d.n_pending;
        pos_bound = d.n;
        Loop l;
        const rt::Settled settled{stream};
        l.s.pos = d.n;
        l.s.n = 1;
        l.s.tokens[0] = d.tokens[d.n];
        l.n_pend = d.n_pending;
        l.left = d.max_tokens;
        l.ctx = args.ctx;
        l.n_valid = d.n_valid;
        l.temp = d.temp;
        l.top_p = d.top_p;
        l.min_p = d.min_p;
        l.top_k = d.top_k;
        l.seed = d.seed;
        l.n_eos = d.n_eos;
        std::copy_n(d.eos, d.n_eos, l.eos);
        l.stop = d.max_tokens <= 0 ? kStopLength : d.n + 1 >= args.ctx ? kStopContext : kStopNone;
        DC_RT(rt::copy(b.loop, &l, sizeof l, stream));
        DC_RT(rt::copy(b.tokens, d.tokens, 4 * (int64_t{d.n} + 1), stream));
        if (d.n_pending > 0) DC_RT(rt::copy(b.pend, d.pending, 4 * int64_t{d.n_pending} * m.cfg.hidden_size, stream));
        DC_RT(rt::synchronize(stream));
        return true;
    }

    // The stages of a round of k drafts that first brings the MTP cache up to date in `parts` passes.
    void write_round(Program& program, int k, int parts, bool long_context, bool sampled) const {
        PassWriter w = writer(program);
        Loop* l = b.loop;
        const int d = m.cfg.hidden_size, topk = m.cfg.num_experts_per_tok, rows = static_cast<int>(b.rows);
        const Routed mtp_routed{b.topk_idx + moe_layers() * b.rows * topk,
                                m.cfg.is_moe(m.cfg.num_hidden_layers) ? 1 : 0, rows, topk};
        const auto choose = [&](const int32_t* n_live, int n, bool last, int offset, int32_t* choice) {
            if (!sampled) return;
            w.add(ChooseArgs{.logits = b.logits,
                             .rows = n,
                             .n_live = n_live,
                             .last = last,
                             .pos = &l->s.pos,
                             .offset = offset,
                             .loop = l,
                             .choice = choice});
        };
        PassShape mtp{.n = kBlockRows,
                      .mtp = true,
                      .n_logits = 0,
                      .long_context = long_context,
                      .ids = l->s.mtp_tokens,
                      .pos = &l->s.mtp_pos,
                      .n_live = &l->s.mtp_n,
                      .hidden = {parts > 1 ? b.hidden : b.pend, d},
                      .choice = l->s.mtp_choice,
                      .n_valid = run.n_valid};
        for (int i = 0; i < parts; ++i) {
            w.add(CatchUpArgs{.loop = l,
                              .tokens = b.tokens,
                              .part = i,
                              .parts = parts,
                              .pend = b.pend,
                              .hidden = b.hidden,
                              .d = d,
                              .before = mtp_routed});
            mtp.n_logits = i + 1 == parts && k > 0 ? kBlockRows : 0;
            w.pass(mtp);
        }
        for (int j = 1; j <= k; ++j) {
            if (j > 1) {
                mtp.n = mtp.n_logits = 1;
                mtp.hidden.data = b.g;
                w.pass(mtp);
            }
            choose(&l->s.mtp_n, kBlockRows, true, j, l->s.mtp_choice);
            w.add(DraftArgs{.loop = l, .j = j, .more = j < k, .h = b.h, .g = b.g, .d = d, .routed = mtp_routed});
        }
        w.pass({.n = k + 1,
                .mtp = false,
                .n_logits = k + 1,
                .long_context = long_context,
                .ids = l->s.tokens,
                .pos = &l->s.pos,
                .n_live = &l->s.n,
                .choice = l->s.choice,
                .n_valid = run.n_valid});
        choose(&l->s.n, k + 1, false, 1, l->s.choice);
        w.add(AcceptArgs{.loop = l,
                         .ring = ring,
                         .tokens = b.tokens,
                         .caught_up = parts > 0,
                         .logits = b.logits,
                         .h = b.h,
                         .pend = run.keeps_mtp ? b.pend : nullptr,
                         .d = d,
                         .routed = {b.topk_idx, static_cast<int>(moe_layers()), rows, topk}});
    }

    bool decode_step(int k, DeviceError& error) {
        DC_RT(rt::set_device(m.index));
        if (queued - taken >= kRingRounds) {
            return fail(error, ErrorCode::kSession, "decode: %d rounds are queued and not polled, no more fit",
                        kRingRounds);
        }
        const bool long_context = pos_bound + kMaxRound > kShortContext;
        const bool catch_up = run.keeps_mtp && (k > 0 || pend_bound + 1 > kMaxPending);
        const int parts = catch_up ? static_cast<int>(ceil_div(pend_bound, kBlockRows)) : 0;
        // The writer keeps run.n_valid in the program: a run over another vocabulary is another program.
        Replay* r = replay(
            {k, parts, run.n_valid * 2 + (run.keeps_mtp ? 1 : 0), long_context, run.temp > 0},
            [&](Program& p) { write_round(p, parts > 0 ? k : 0, parts, long_context, run.temp > 0); }, error);
        if (r == nullptr) return false;
        DC_RT(r->graph.launch(stream));
        ++queued;
        pend_bound = !run.keeps_mtp ? 0 : catch_up ? k + 1 : pend_bound + 1;
        pos_bound += k + 1;
        return true;
    }

    int decode_poll(DeviceRound* rounds, int capacity, int& left, DeviceError& error) {
        rt::Error e = 0;
        const bool idle = rt::idle(stream, e);
        if (!check(e, "decoding", error)) return -1;
        const unsigned done = __atomic_load_n(&ring->done, __ATOMIC_ACQUIRE);
        if (done == taken && idle && done != queued) {
            fail(error, ErrorCode::kResource, "device: %u rounds were queued, %u have ended", queued, done);
            return -1;
        }
        int n = 0;
        for (; n < capacity && taken != done; ++n, ++taken) rounds[n] = ring->rounds[taken % kRingRounds];
        left = static_cast<int>(queued - taken);
        return n;
    }

    bool decode_finish(DeviceDecodeState& state, float* pending, DeviceError& error) {
        DC_RT(rt::set_device(m.index));
        Loop l;
        const rt::Settled settled{stream};
        DC_RT(rt::copy(&l, b.loop, sizeof l, stream));
        DC_RT(rt::synchronize(stream));
        if (l.n_pend < 0 || l.n_pend > (run.keeps_mtp ? kMaxPending + kMaxRound : 0))
            return fail(error, ErrorCode::kResource, "device: %d pending rows", l.n_pend);
        if (l.n_pend > 0) {
            DC_RT(rt::copy(pending, b.pend, 4 * int64_t{l.n_pend} * m.cfg.hidden_size, stream));
            DC_RT(rt::synchronize(stream));
        }
        state = l.counts;
        state.n = l.s.pos;
        state.n_pending = l.n_pend;
        return true;
    }

    bool view(const char* name, DeviceView& v) const {
        const ModelConfig& c = m.cfg;
        const auto f32 = [](const View<float>& p, int64_t rows) {
            return DeviceView{.data = p.data, .type = "<f4", .n_dims = 2, .dims = {rows, p.stride}};
        };
        const auto cache = [&](std::byte* p, int64_t layers) {
            return DeviceView{.data = p, .type = "|u1", .n_dims = 3, .dims = {layers, args.ctx, b.row_stride}};
        };
        const std::map<std::string, DeviceView> views = {
            {"x", f32(b.x, b.rows)},
            {"hidden", f32(b.h, b.rows)},
            {"logits", f32(b.logits, kLogitRows)},
            {"cache", cache(b.cache, c.num_hidden_layers)},
            {"mtp_cache", cache(b.mtp_cache, 1)},
        };
        for (const auto& named : {views, kept_taps[0], kept_taps[1]}) {
            const auto it = named.find(name);
            if (it == named.end() || it->second.data == nullptr) continue;
            v = it->second;
            return true;
        }
        return false;
    }

    // report.h
    bool report(const char* what, char* text, size_t size, DeviceError& error);
    bool report_stages(int n, int pos, JsonText& out, DeviceError& error);
    double seconds(int repeats, DeviceError& error, const std::function<rt::Error()>& queue);
};

#include "runtime/cuda/report.h"

// --- the table ------------------------------------------------------------------------------------------------------

namespace {

bool probe(int device, char* text, size_t size, char arch[16]) {
    rt::DeviceInfo info;
    if (!rt::find_device(device, info, text, size)) return false;
    std::snprintf(text, size, "%s", info.name);
    std::memcpy(arch, info.arch, sizeof info.arch);
    return true;
}

DeviceModel* open_model(const DeviceModelArgs& a, DeviceError& error) {
    auto m = std::make_unique<DeviceModel>();
    m->cfg = *a.cfg;
    m->rope = *a.rope;
    m->path = a.path;
    m->index = a.device;
    const auto open = [&] {
        if (!rt::find_device(a.device, m->info, error.text, sizeof error.text)) return false;
        if (a.bytes > m->info.free) {
            return fail(error, ErrorCode::kResource,
                        "%s needs %.2f GB of device memory, %.2f GB of %.2f GB are free on %s", a.path, gb(a.bytes),
                        gb(m->info.free), gb(m->info.total), m->info.name);
        }
        DC_RT(m->memory.allocate(a.bytes));
        m->weights = *a.weights;
        visit(m->weights, m->cfg, [&](const TensorSpec& spec, auto& member) {
            pieces(spec, member, [&]<class T>(const T*& at, int64_t, const char*) {
                at = reinterpret_cast<const T*>(m->base() + (reinterpret_cast<const std::byte*>(at) - a.base));
            });
        });
        if (a.fill_seed == 0) return m->upload(a.fd, a.bytes, error);
        DC_RT(fill_weights(m->weights, m->base(), a.fill_seed, m->cfg, m->info.sms));
        return true;
    };
    return open() ? m.release() : nullptr;
}

DeviceSession* open_session(DeviceModel* m, const DeviceSessionArgs& a, DeviceError& error) {
    auto s = std::make_unique<DeviceSession>(*m, a);
    return s->open(error) ? s.release() : nullptr;
}

// fn() of a session. Where it fails nothing that is queued may still use the caller's memory.
template <class R, class Fn> R session_call(DeviceSession* s, DeviceError& error, R failed, Fn&& fn) noexcept {
    if (s->closed) {
        fail(error, ErrorCode::kSession, "device: this session is closed, a report could not put its cache rows back");
        return failed;
    }
    const R r = guarded(error, failed, fn);
    if (r == failed) rt::drain(s->stream);
    return r;
}
// A method of a session as a function of the table (nvcc takes no member pointers here).
#define DC_ENTRY(failed, parameters, call)                                                                             \
    [] parameters noexcept { return session_call(s, e, failed, [&] { return s->call; }); }

constexpr DeviceApi kApi = {
    .abi = kDeviceAbi,
    .fingerprint = kDeviceFingerprint,
    .probe =
        [](int device, char* text, size_t size, char arch[16]) noexcept {
            DeviceError e;
            const bool found = guarded(e, false, [&] { return probe(device, text, size, arch); });
            if (!found && e.text[0] != 0) std::snprintf(text, size, "%s", e.text);
            return found;
        },
    .open_model =
        [](const DeviceModelArgs& a, DeviceError& e) noexcept {
            return guarded(e, static_cast<DeviceModel*>(nullptr), [&] { return open_model(a, e); });
        },
    .close_model =
        [](DeviceModel* m) noexcept {
            if (!m->hangs) delete m;
        },
    .open_session =
        [](DeviceModel* m, const DeviceSessionArgs& a, DeviceError& e) noexcept {
            return guarded(e, static_cast<DeviceSession*>(nullptr), [&] { return open_session(m, a, e); });
        },
    // What a device that hangs may still write to is given up, not waited for: the process can end.
    .close_session =
        [](DeviceSession* s) noexcept {
            DeviceError e;
            if (guarded(e, false, [&] { return s->at_rest(); })) {
                delete s;
            } else {
                s->m.hangs = true;
            }
        },
    .forward = DC_ENTRY(false, (DeviceSession * s, const DevicePass& p, DeviceError& e), forward(p, e)),
    .copy_cache = DC_ENTRY(
        false, (DeviceSession * s, bool mtp, int layer, int row, int n, void* host, bool to_device, DeviceError& e),
        copy_cache(mtp, layer, row, n, host, to_device, e)),
    .decode_start = DC_ENTRY(false, (DeviceSession * s, const DeviceDecode& d, DeviceError& e), decode_start(d, e)),
    .decode_step = DC_ENTRY(false, (DeviceSession * s, int k, DeviceError& e), decode_step(k, e)),
    .decode_poll = DC_ENTRY(-1, (DeviceSession * s, DeviceRound* rounds, int capacity, int& left, DeviceError& e),
                            decode_poll(rounds, capacity, left, e)),
    .decode_finish = DC_ENTRY(false, (DeviceSession * s, DeviceDecodeState& state, float* pending, DeviceError& e),
                              decode_finish(state, pending, e)),
    .view =
        [](DeviceSession* s, const char* name, DeviceView& v) noexcept {
            DeviceError e;
            return guarded(e, false, [&] { return s->view(name, v); });
        },
    .report = DC_ENTRY(false, (DeviceSession * s, const char* what, char* text, size_t size, DeviceError& e),
                       report(what, text, size, e)),
};
#undef DC_ENTRY

}  // namespace
}  // namespace deepcalm

// One stage by itself, for tests and oracles: `args` is its struct of `size` bytes (kernels/cuda/args.h), whose pointers
// are the caller's device memory. Launches queue on a stream of their own; name null waits for them. `smem` not 0: only tells
// how the stage of a pass of more than kBlockRows rows (long_pass) or fewer would use so many bytes a block: fit, and need.
// 0, an rt::Error, -1: no device or no such stage, or -2: its struct has another size.
struct StageLaunch {
    int32_t fit, blocks, threads, dependent;  // fit: index of kFits
    int64_t smem, need;
    int32_t long_pass;
};

namespace deepcalm::gpu {
namespace {

template <class... Args, class Fn>
int with_stage(StageList<Args...>, const char* name, const void* args, int64_t size, Fn&& fn) {
    int code = -1;
    const auto one = [&]<class A>(const A* a) {
        if (std::strcmp(name, A::kStage.name) == 0) code = size == static_cast<int64_t>(sizeof(A)) ? fn(*a) : -2;
    };
    (one(static_cast<const Args*>(args)), ...);
    return code;
}

}  // namespace
}  // namespace deepcalm::gpu

extern "C" __attribute__((visibility("default"))) int deepcalm_stage(const char* name, const void* args, int64_t size,
                                                                     StageLaunch* l) {
    using namespace deepcalm::gpu;
    namespace rt = deepcalm::rt;
    static rt::Stream stream = nullptr;
    static rt::DeviceInfo info;
    if (name != nullptr && l->smem != 0) {
        return with_stage(PassStages{}, name, args, size, [&](const auto& a) {
            const Fit& f = fit(a, l->long_pass != 0 ? kPrefillBlocks : 1, kThreads, l->smem);
            l->need = a.smem(f, kThreads);
            l->fit = static_cast<int32_t>(&f - kFits);
            return 0;
        });
    }
    char text[512];
    if (stream == nullptr) {
        if (!rt::find_device(0, info, text, sizeof text)) return -1;
        if (const rt::Error e = allow_smem(PassStages{}, info.smem); e != 0) return e;
        if (const rt::Error e = rt::create(&stream); e != 0) return e;
    }
    if (name == nullptr) return rt::synchronize(stream);
    return with_stage(PassStages{}, name, args, size, [&]<class A>(const A& a) {
        const Fit& f = kFits[l->fit];
        return rt::launch({.grid = l->blocks,
                           .block = l->threads,
                           .smem = a.smem(f, l->threads),
                           .dependent = l->dependent != 0 && info.dependent,
                           .stream = stream},
                          kernel_of<A>(f.nb), a, f);
    });
}

extern "C" __attribute__((visibility("default"))) const deepcalm::DeviceApi* deepcalm_backend(int abi) {
    return abi == deepcalm::kDeviceAbi ? &deepcalm::kApi : nullptr;
}
