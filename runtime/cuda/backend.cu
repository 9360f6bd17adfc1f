// The engine on a device: weights and sessions in device memory, passes as graphs of kernels, decoding. Compiled by nvcc
// into libdeepcalm_cuda.so and, for the tests, by g++ (tests/sim).
#include "runtime/cuda/fill.cuh"
#include "runtime/cuda/forward.h"
#include "runtime/cuda/host.h"
#include "runtime/cuda/library.h"

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>
#include <unistd.h>

namespace deepcalm {
namespace gpu {
namespace {

// --- errors ---------------------------------------------------------------------------------------------------------

__attribute__((format(printf, 2, 3))) Error fail(ErrorCode code, const char* format, ...) {
    char text[1000];
    std::va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return {code, text};
}
Status check(rt::Error code, const char* what) {
    if (code == 0) return {};
    rt::last_error();  // clears what can be cleared
    return fail(ErrorCode::kResource, "device: %s failed: %s", what, rt::error_string(code));
}
#define DC_RT(call) DC_TRY_STATUS(check(call, #call))

// fn(), where an exception is an error too.
template <class Fn> auto guarded(Fn&& fn) -> decltype(fn()) {
    try {
        return fn();
    } catch (const std::bad_alloc&) {
        return fail(ErrorCode::kResource, "device: no host memory left");
    } catch (const std::exception& e) {
        return fail(ErrorCode::kResource, "device: %s", e.what());
    }
}

double gb(int64_t bytes) { return 1e-9 * static_cast<double>(bytes); }

}  // namespace

// Device memory that goes with its owner.
struct Memory {
    struct Release {
        void operator()(std::byte* p) const { rt::release(p); }
    };
    std::unique_ptr<std::byte, Release> p;
    int64_t bytes = 0;
    rt::Error allocate(int64_t n) {
        p.reset();
        void* at = nullptr;
        const rt::Error e = rt::allocate(&at, n);
        if (e == 0) p.reset(static_cast<std::byte*>(at));
        bytes = e == 0 ? n : 0;
        return e;
    }
};

}  // namespace gpu

using namespace gpu;

// --- model ----------------------------------------------------------------------------------------------------------

struct DeviceBackend final : Backend {
    const BoundModel& model;
    const ModelConfig& cfg = model.cfg;
    rt::DeviceInfo info;
    int index = 0;         // of several GPUs: CUDA_VISIBLE_DEVICES order
    bool hangs = false;    // a session of it did not come to rest
    Memory memory;         // the packed file, byte for byte: a pointer there is the base + the offset in the file
    ModelWeights weights;  // pointers into `memory`

    explicit DeviceBackend(const BoundModel& m) : model(m) { one_segment = true; }
    ~DeviceBackend() override {
        if (hangs) (void)memory.p.release();  // what may still be read is given up, not waited for
    }
    Result<std::unique_ptr<Engine>> make_engine(const EngineArgs& args) override;
    Result<PassResult> forward(const PassArgs& args) override;

    std::byte* base() const { return memory.p.get(); }

    Status open(uint64_t fill_seed) {
        DC_TRY(info, rt::find_device(index));
        device_name = info.name;
        arch = info.arch;
        const int64_t bytes = model.file.size();
        if (bytes > info.free) {
            return fail(ErrorCode::kResource, "%s needs %.2f GB of device memory, %.2f GB of %.2f GB are free on %s",
                        model.path.c_str(), gb(bytes), gb(info.free), gb(info.total), info.name.c_str());
        }
        DC_RT(memory.allocate(bytes));
        weights = model.weights;
        visit(weights, cfg, [&](const TensorSpec& spec, auto& member) {
            pieces(spec, member, [&]<class T>(const T*& at, int64_t, const char*) {
                at = reinterpret_cast<const T*>(base() + (reinterpret_cast<const std::byte*>(at) - model.file.data()));
            });
        });
        if (fill_seed == 0) return upload(model.file.fd(), bytes);
        return check(fill_weights(weights, base(), fill_seed, cfg, info.sms), "drawing weights");
    }

    // Reads the file in pieces through pinned memory: one is read while another travels; no second copy on the host.
    Status upload(int fd, int64_t bytes) {
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
                    return fail(ErrorCode::kPackedFile, "%s: %s at byte %lld of %lld", model.path.c_str(),
                                r < 0 ? std::strerror(errno) : "ends early", static_cast<long long>(at + got),
                                static_cast<long long>(bytes));
                }
                got += r;
            }
            DC_RT(rt::copy(base() + at, l.pinned, n, l.stream));
        }
        for (const Lane& l : lanes) DC_RT(rt::synchronize(l.stream));
        return {};
    }
};

// --- session --------------------------------------------------------------------------------------------------------

// A pass or a round that is run many times.
struct Replay {
    Program program;
    rt::Graph graph;
};

// A session's buffers, graphs and passes; DeviceEngine is its face.
struct OnDevice {
    DeviceBackend& m;
    const EngineArgs args;
    rt::Stream stream = nullptr;
    Memory memory, tap_memory, kept[2];  // kept: copies of the taps of the last traced main pass, and MTP pass
    void* pinned = nullptr;
    std::map<std::string, ArrayView> kept_taps[2];
    std::vector<float> hidden;           // PassResult
    std::vector<int32_t> topk, experts;  // [moe layers, n, num_experts_per_tok] ids of the last pass; PassResult
    Buffers b;
    TokenRing* ring = nullptr;
    int threads = std::min(kThreads, rt::kMaxThreads);
    int pass_rows = std::min(kMaxPassRows, rt::kMaxRows);  // of the longest sub-pass
    // (mtp, n, n_logits, long context) of passes from the host; (k, parts, long context, sampled) of rounds
    using ReplayKey = std::tuple<int, int, int, bool, bool>;
    std::map<ReplayKey, std::unique_ptr<Replay>> replays;
    // a run of decoding
    DecodeArgs run;                  // its arrays are the caller's of decode_start()
    bool closed = false;             // it does not hold what it should: nothing more is computed
    unsigned queued = 0, taken = 0;  // rounds queued, rounds handed over
    int pend_bound = 0;              // pending rows at most
    int64_t pos_bound = 0;           // position that the queued rounds cannot pass

    OnDevice(DeviceBackend& model, const EngineArgs& a) : m(model), args(a) {}
    ~OnDevice() {
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
        b.cache = b.mtp_cache = {.type = args.kv,
                                 .ctx = args.ctx,
                                 .c_pad = c.c_pad(),
                                 .r_pad = c.r_pad(),
                                 .row_bytes = round_up(c.cache_row_bytes(args.kv), 16)};
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
            take(b.topk_idx, (moe_layers(false) + 1) * rows * k);
            take(b.topk_weight, rows * k);
            if (rows > kBlockRows) take(b.routed, rows * b.x.stride);
        }
        const int64_t ctx = args.ctx, one = ceil_div(std::min<int64_t>(ctx, kShortContext), kChunk),
                      long_units = ceil_div(ctx, int64_t{kChunk} * kPartialChunks);
        b.part_units = kBlockRows * std::max(one, long_units);
        take(b.part_o, b.part_units * heads * c.c_pad());
        take(b.part_ml, b.part_units * heads * 2);
        take_rows(b.logits, kLogitRows, c.logits_stride());
        take(b.best_value, kLogitRows * int64_t{m.info.sms});
        take(b.best_id, kLogitRows * int64_t{m.info.sms});
        take(b.arrived, 1);
        take(b.cos, ctx * c.qk_rope_head_dim / 2);
        take(b.sin, ctx * c.qk_rope_head_dim / 2);
        if (c.llama_4_scaling_beta > 0) take(b.query_scale, ctx);
        take(b.cache.data, c.num_hidden_layers * ctx * b.cache.row_bytes);
        take(b.ids, rows);
        take(b.pos, rows);
        take(b.tokens, ctx + kMaxRound);
        take(b.choice, rows);
        take(b.decode, 1);
        if (c.num_nextn_predict_layers > 0) {
            take(b.mtp_cache.data, ctx * b.mtp_cache.row_bytes);
            take_rows(b.eh, rows, 2 * d);
            take(b.hidden, rows * d);
            take(b.pend, (kMaxPending + kMaxRound) * d);
            take(b.g, d);
        }
        b.tap_stride = c.q_width() + 2 * round_up(heads * c.kv_lora_rank, 4) + round_up(c.q_lora_rank, 4) +
                       4 * b.x.stride + round_up(c.kv_lora_rank, 4) + round_up(c.qk_rope_head_dim, 4) + 64;
        return used;
    }
    int64_t moe_layers(bool mtp) const {
        if (m.cfg.n_routed_experts == 0) return 0;
        return mtp ? m.cfg.num_nextn_predict_layers : m.cfg.num_hidden_layers - m.cfg.first_k_dense_replace;
    }

    Status open() {
        DC_RT(rt::set_device(m.index));
        const int64_t bytes = lay_out(nullptr);
        DC_TRY(const rt::DeviceInfo now, rt::find_device(m.index));
        if (bytes > now.free) {
            return fail(ErrorCode::kResource,
                        "a session of %d positions needs %.2f GB of device memory, %.2f GB of %.2f GB are free on %s; "
                        "use a smaller ctx or max_rows, or another kv type",
                        args.ctx, gb(bytes), gb(now.free), gb(now.total), now.name.c_str());
        }
        DC_RT(memory.allocate(bytes));
        lay_out(memory.p.get());
        DC_RT(rt::create(&stream));
        DC_RT(rt::allocate_pinned(&pinned, sizeof(TokenRing)));
        ring = new (pinned) TokenRing;
        DC_RT(rt::zero(b.arrived, 4, stream));
        DC_RT(rt::zero(b.decode, sizeof(DecodeState), stream));
        const int half = m.cfg.qk_rope_head_dim / 2;
        std::vector<float> cos(static_cast<size_t>(args.ctx) * static_cast<size_t>(half)), sin(cos.size()), scale;
        for (int i = 0; i < args.ctx; ++i) {
            m.model.rope.fill(i, cos.data() + int64_t{i} * half, sin.data() + int64_t{i} * half);
            scale.push_back(m.model.rope.query_scale(i));
        }
        const rt::Settled settled{stream};
        DC_RT(rt::copy(b.cos, cos.data(), static_cast<int64_t>(cos.size()) * 4, stream));
        DC_RT(rt::copy(b.sin, sin.data(), static_cast<int64_t>(sin.size()) * 4, stream));
        if (b.query_scale != nullptr) DC_RT(rt::copy(b.query_scale, scale.data(), int64_t{4} * args.ctx, stream));
        DC_RT(allow_smem(PassStages{}, m.info.smem));
        DC_RT(rt::synchronize(stream));
        return fits();
    }
    // Every shape that this session can launch, or false and the stage that needs more shared memory than a block has.
    Status fits() const {
        Program p;
        for (const int n : {1, std::min(args.max_rows, kBlockRows), kBlockRows, std::min(args.max_rows, pass_rows)}) {
            for (const bool long_context : {false, args.ctx > kShortContext})
                writer(p).pass(shape(n, false, n, long_context, false));
        }
        for (const Op& op : p.ops) {
            if (op.need <= m.info.smem) continue;
            return fail(ErrorCode::kUnsupported,
                        "stage '%s' of this model needs %lld bytes of shared memory a block at ctx %d, %s gives %lld",
                        op.name.c_str(), static_cast<long long>(op.need), args.ctx, m.info.name.c_str(),
                        static_cast<long long>(m.info.smem));
        }
        return {};
    }

    PassWriter writer(Program& p) const {
        return {m.cfg, m.weights, b, m.model.rope.softmax_scale, m.info, threads, p};
    }
    // A pass whose inputs the host has put into b.ids, b.pos, b.hidden.
    PassShape shape(int n, bool mtp, int n_logits, bool long_context, bool trace) const {
        return {.rows = {.n = n, .pos = b.pos},
                .mtp = mtp,
                .n_logits = n_logits,
                .long_context = long_context,
                .ids = b.ids,
                .hidden = mtp ? View<const float>{b.hidden, m.cfg.hidden_size} : View<const float>{},
                .choice = b.choice,
                .n_valid = m.cfg.vocab_size,
                .trace = trace};
    }

    // ---- running a list of stages ----------------------------------------------------------------------------------

    rt::Error launch_all(const Program& p, rt::Stream s) const {
        rt::Error e = 0;
        for (size_t i = 0; i < p.ops.size() && e == 0; ++i) e = p.ops[i].launch(s, i > 0);
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
    // What was prepared under `key`, now or earlier.
    template <class Write> Result<Replay*> replay(const ReplayKey& key, Write&& write) {
        if (const auto it = replays.find(key); it != replays.end()) return it->second.get();
        auto r = std::make_unique<Replay>();
        write(r->program);
        DC_TRY_STATUS(check(prepare(*r), "recording a graph"));
        return (replays[key] = std::move(r)).get();
    }

    // ---- passes from the host --------------------------------------------------------------------------------------

    // What a traced pass is asked for and leaves.
    struct Taps {
        bool on = false;
        std::map<std::string, std::vector<float>> feed;
        std::vector<std::string> fed;
        std::map<std::string, ArrayView> views;  // of the names wanted: [rows of the pass, ...] in `kept`
    };

    Result<PassResult> forward(const PassArgs& args) {
        const Segment& p = args.segments[0];
        DC_RT(rt::set_device(m.index));
        const int64_t start = now_ns();
        Taps taps{.feed = std::exchange(p.trace->feed, {}), .fed = {}, .views = {}};
        taps.on = p.trace->on() || !taps.feed.empty();
        if (taps.on) kept_taps[p.mtp()].clear();
        hidden.resize(static_cast<size_t>(p.n()) * static_cast<size_t>(m.cfg.hidden_size));
        topk.resize(static_cast<size_t>(moe_layers(p.mtp()) * p.n() * m.cfg.num_experts_per_tok));
        for (int at = 0; at < p.n(); at += pass_rows)  // parts: the same bits (law L1)
            DC_TRY_STATUS(forward_part(p, args.logits, at, std::min(pass_rows, p.n() - at), taps));
        if (taps.on) DC_TRY_STATUS(record(p, args.logits, taps));
        for (const std::string& name : taps.fed) taps.feed.erase(name);
        if (!taps.feed.empty()) {
            return fail(ErrorCode::kSession, "feed: '%s' is no embed, gate_logits or layer_out of this pass",
                        taps.feed.begin()->first.c_str());
        }
        return count(p, args.stats, 1e-9 * static_cast<double>(now_ns() - start));
    }
    // Rows [first, first + n) of a pass.
    Status forward_part(const Segment& p, float* all_logits, int first, int n, Taps& taps) {
        const int64_t d = m.cfg.hidden_size, k = m.cfg.num_experts_per_tok, stride = m.cfg.logits_stride();
        const int first_logit = p.n() - p.n_logits, n_logits = std::clamp(first + n - first_logit, 0, n);
        float* logits = all_logits + std::max(first - first_logit, 0) * stride;
        std::vector<int32_t> pos(static_cast<size_t>(n));
        std::iota(pos.begin(), pos.end(), p.pos + first);
        const rt::Settled settled{stream};
        DC_RT(rt::copy(b.ids, p.ids.data() + first, 4 * int64_t{n}, stream));
        DC_RT(rt::copy(b.pos, pos.data(), 4 * int64_t{n}, stream));
        if (p.mtp()) DC_RT(rt::copy(b.hidden, p.hidden + first * d, 4 * n * d, stream));
        const bool long_context = p.pos + first + n > kShortContext;
        const PassShape s = shape(n, p.mtp(), n_logits, long_context, taps.on);
        if (taps.on) {
            DC_TRY_STATUS(traced(s, p, first, taps));
        } else if (n > kBlockRows) {
            Program program;
            writer(program).pass(s);
            DC_RT(launch_all(program, stream));
        } else {
            DC_TRY(const Replay* r, replay({p.mtp() ? -2 : -1, n, n_logits, long_context, false},
                                           [&](Program& program) { writer(program).pass(s); }));
            DC_RT(r->graph.launch(stream));
        }
        const auto take_logits = [&](int rows, int64_t to) {
            return rt::copy_rows(logits + to * stride, 4 * stride, b.logits.data, 4 * b.logits.stride,
                                 4 * int64_t{m.cfg.vocab_size}, rows, stream);
        };
        if (n <= kBlockRows || n_logits <= 1) {
            if (n_logits > 0) DC_RT(take_logits(n_logits, 0));
        } else {
            for (int i = 0; i < n_logits; i += kLogitRows) {
                const int rows = std::min(kLogitRows, n_logits - i);
                Program program;
                writer(program).rows_head(p.mtp(), n - n_logits + i, rows, m.cfg.vocab_size, b.pos);
                DC_RT(launch_all(program, stream));
                DC_RT(take_logits(rows, i));
            }
        }
        DC_RT(rt::copy_rows(hidden.data() + first * d, 4 * d, b.h.data, 4 * b.h.stride, 4 * d, n, stream));
        if (const int64_t layers = moe_layers(p.mtp()); layers > 0) {
            const int64_t skip = p.mtp() ? moe_layers(false) : 0;
            DC_RT(rt::copy_rows(topk.data() + first * k, 4 * p.n() * k, b.topk_idx + skip * b.rows * k, 4 * b.rows * k,
                                4 * n * k, layers, stream));
        }
        return check(rt::synchronize(stream), "a pass");
    }
    // Counts what a pass that has ended read.
    Result<PassResult> count(const Segment& p, PassStats& stats, double seconds) {
        const ModelConfig& c = m.cfg;
        const size_t per_layer = static_cast<size_t>(p.n()) * static_cast<size_t>(c.num_experts_per_tok);
        const int first = p.mtp() ? c.num_hidden_layers : c.first_k_dense_replace;
        const WeightBytes& b = m.model.bytes;
        PassStats s;
        experts.clear();
        std::vector<bool> seen(static_cast<size_t>(c.n_routed_experts));
        for (int l = 0; l < moe_layers(p.mtp()); ++l) {
            std::fill(seen.begin(), seen.end(), false);
            int64_t touched = 0;
            for (size_t i = 0; i < per_layer; ++i) {
                const int32_t e = topk[static_cast<size_t>(l) * per_layer + i];
                if (e < 0 || e >= c.n_routed_experts) {
                    return fail(ErrorCode::kResource, "device: expert %d of layer %d does not exist", e, first + l);
                }
                touched += seen[static_cast<size_t>(e)] ? 0 : 1;
                seen[static_cast<size_t>(e)] = true;
                if (!p.mtp() && p.n() <= kMaxRound) experts.push_back((first + l) * c.n_routed_experts + e);
            }
            const LayerWeights& layer =
                p.mtp() ? m.weights.mtp_layer : m.weights.layers[static_cast<size_t>(first + l)];
            s.experts_touched += touched;
            s.weight_bytes += touched * layer.expert_bytes();
        }
        s.weight_bytes += (p.mtp() ? b.mtp_fixed : b.fixed) + p.n() * b.embed_row;
        if (p.n_logits > 0) s.weight_bytes += p.mtp() ? b.mtp_head : b.head;
        stats.experts_touched += s.experts_touched;
        stats.weight_bytes += s.weight_bytes;
        stats.cache_bytes += (p.pos + p.n()) * c.cache_row_bytes(args.kv) * (p.mtp() ? 1 : c.num_hidden_layers);
        stats.seconds += seconds;  // stage by stage, a pass is timed by report("stages")
        return PassResult{{hidden.data(), c.hidden_size}, experts};
    }

    // The same stages one by one; behind each its intermediates are copied to `kept`, or replaced by what the host feeds.
    Status traced(const PassShape& s, const Segment& p, int first, Taps& taps) {
        if (tap_memory.p == nullptr) DC_RT(tap_memory.allocate(4 * b.rows * b.tap_stride));
        b.taps = reinterpret_cast<float*>(tap_memory.p.get());
        Program program;
        writer(program).pass(s);
        const auto row_bytes = [&](const TapOut& t) { return 4 * t.vectors / s.rows.n * t.width; };
        if (first == 0) {
            Memory& into = kept[p.mtp()];
            std::map<std::string, int64_t> at;
            int64_t bytes = 0;
            for (const TapOut& t : program.taps) {
                if (!p.trace->wants(t.name)) continue;
                at[t.name] = bytes;
                bytes += round_up(row_bytes(t) * p.n(), 256);
            }
            if (bytes > into.bytes) DC_RT(into.allocate(bytes));
            for (const TapOut& t : program.taps) {
                if (!at.contains(t.name)) continue;
                ArrayView& v = taps.views[t.name];
                v = {into.p.get() + at[t.name], t.is_int ? "<i4" : "<f4", t.dims};
                v.shape.insert(v.shape.begin(), p.n());
            }
        }
        size_t next = 0;
        for (size_t i = 0; i < program.ops.size(); ++i) {
            DC_RT(program.ops[i].launch(stream, i > 0));
            for (; next < program.taps.size() && program.taps[next].op == i; ++next) {
                const TapOut& t = program.taps[next];
                if (const auto v = taps.views.find(t.name); v != taps.views.end()) {
                    DC_RT(rt::copy_rows(static_cast<std::byte*>(v->second.data) + first * row_bytes(t), 4 * t.width,
                                        t.data, 4 * t.stride, 4 * t.width, t.vectors, stream));
                }
                const auto feed = t.input ? taps.feed.find(t.name) : taps.feed.end();
                if (feed == taps.feed.end()) continue;
                taps.fed.push_back(t.name);
                const int64_t per_row = row_bytes(t) / 4, fed = std::ssize(feed->second);
                if (fed != per_row * p.n()) {
                    return fail(ErrorCode::kSession, "feed: %s has %lld values, expected %lld", t.name.c_str(),
                                static_cast<long long>(fed), static_cast<long long>(per_row * p.n()));
                }
                DC_RT(rt::copy_rows(t.data, 4 * t.stride, feed->second.data() + first * per_row, 4 * t.width,
                                    4 * t.width, t.vectors, stream));
            }
        }
        return {};
    }
    // Hands the taps of all rows to the host.
    Status record(const Segment& p, const float* logits, Taps& taps) {
        std::vector<float> host;
        const rt::Settled settled{stream};
        for (const auto& [name, v] : taps.views) {
            const std::vector<int64_t> dims(v.shape.begin() + 1, v.shape.end());
            const int64_t per_row = std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
            host.resize(static_cast<size_t>(p.n() * per_row));
            DC_RT(rt::copy(host.data(), v.data, static_cast<int64_t>(host.size()) * 4, stream));
            DC_RT(rt::synchronize(stream));
            if (v.type[1] == 'i') {
                p.trace->record(name, View<int32_t>{reinterpret_cast<int32_t*>(host.data()), per_row}, p.n(), dims);
            } else {
                p.trace->record(name, View<float>{host.data(), per_row}, p.n(), dims);
            }
        }
        kept_taps[p.mtp()] = std::move(taps.views);
        if (p.n_logits > 0) {
            p.trace->record(p.mtp() ? "mtp.logits" : "logits", View<const float>{logits, m.cfg.logits_stride()},
                            p.n_logits, {m.cfg.vocab_size});
        }
        return {};
    }

    Status copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) {
        DC_RT(rt::set_device(m.index));
        const int64_t bytes = m.cfg.cache_row_bytes(args.kv);
        const LatentCache cache = (mtp ? b.mtp_cache : b.cache).layer(layer);
        DC_RT(to_cache ? rt::copy_rows(cache.data, cache.row_bytes, host, bytes, bytes, n, stream)
                       : rt::copy_rows(host, bytes, cache.data, cache.row_bytes, bytes, n, stream));
        return check(rt::synchronize(stream), "copying cache rows");
    }

    // ---- decoding --------------------------------------------------------------------------------------------------

    Status decode_start(const DecodeArgs& d) {
        if (d.eos.size() > kMaxEos) {
            return fail(ErrorCode::kSession, "decode: %zu end tokens, at most %d on a device", d.eos.size(), kMaxEos);
        }
        DC_RT(rt::set_device(m.index));
        DC_RT(rt::synchronize(stream));
        run = d;
        *ring = TokenRing{};
        queued = taken = 0;
        const auto n = static_cast<int>(d.tokens.size()) - 1;
        pend_bound = static_cast<int>(std::ssize(d.pending) / m.cfg.hidden_size);
        pos_bound = n;
        DecodeState s;
        const rt::Settled settled{stream};
        s.main.pos = n;
        s.main.n = 1;
        s.main.ids[0] = d.tokens.back();
        s.n_pend = pend_bound;
        s.left = d.max_tokens;
        s.ctx = args.ctx;
        s.n_valid = d.n_valid;
        s.sample = d.sample;
        s.n_eos = static_cast<int>(d.eos.size());
        std::copy(d.eos.begin(), d.eos.end(), s.eos);
        s.stop = d.max_tokens <= 0 ? kStopLength : n + 1 >= args.ctx ? kStopContext : kStopNone;
        DC_RT(rt::copy(b.decode, &s, sizeof s, stream));
        DC_RT(rt::copy(b.tokens, d.tokens.data(), 4 * std::ssize(d.tokens), stream));
        if (!d.pending.empty()) DC_RT(rt::copy(b.pend, d.pending.data(), 4 * std::ssize(d.pending), stream));
        return check(rt::synchronize(stream), "starting to decode");
    }

    // The stages of a round of k drafts that first brings the MTP cache up to date in `parts` passes.
    void write_round(Program& program, int k, int parts, bool long_context) const {
        PassWriter w = writer(program);
        DecodeState* s = b.decode;
        const int d = m.cfg.hidden_size, topk = m.cfg.num_experts_per_tok, rows = static_cast<int>(b.rows);
        const Routed routed{b.topk_idx, static_cast<int>(moe_layers(false)), rows, topk};
        const Routed mtp_routed{b.topk_idx + moe_layers(false) * b.rows * topk, static_cast<int>(moe_layers(true)),
                                rows, topk};
        const auto pass = [&](DecodeRows* r, int n, int n_logits, const float* hidden) {
            w.pass({.rows = {.n = n, .n_live = &r->n, .pos = &r->pos},
                    .mtp = r == &s->mtp,
                    .n_logits = n_logits,
                    .long_context = long_context,
                    .ids = r->ids,
                    .hidden = {hidden, d},
                    .choice = r->choice,
                    .n_valid = run.n_valid});
        };
        const auto choose = [&](DecodeRows* r, int n, bool last, int offset) {
            if (run.sample.temp <= 0) return;
            w.add(ChooseArgs{.state = s, .rows = r, .logits = b.logits, .n = n, .last = last, .offset = offset});
        };
        for (int i = 0; i < parts; ++i) {
            w.add(CatchUpArgs{.state = s,
                              .tokens = b.tokens,
                              .part = i,
                              .parts = parts,
                              .pend = b.pend,
                              .hidden = b.hidden,
                              .d = d,
                              .before = mtp_routed});
            pass(&s->mtp, kBlockRows, i + 1 == parts && k > 0 ? kBlockRows : 0, parts > 1 ? b.hidden : b.pend);
        }
        for (int j = 1; j <= k; ++j) {
            if (j > 1) pass(&s->mtp, 1, 1, b.g);
            choose(&s->mtp, kBlockRows, true, j);
            w.add(DraftArgs{.state = s, .j = j, .more = j < k, .h = b.h, .g = b.g, .d = d, .routed = mtp_routed});
        }
        pass(&s->main, k + 1, k + 1, nullptr);
        choose(&s->main, k + 1, false, 1);
        w.add(AcceptArgs{.state = s,
                         .ring = ring,
                         .tokens = b.tokens,
                         .caught_up = parts > 0,
                         .logits = b.logits,
                         .h = b.h,
                         .pend = run.keeps_mtp ? b.pend : nullptr,
                         .d = d,
                         .routed = routed});
    }

    Status decode_step(int k) {
        DC_RT(rt::set_device(m.index));
        if (queued - taken >= kRingRounds) {
            return fail(ErrorCode::kSession, "decode: %d rounds are queued and not polled, no more fit", kRingRounds);
        }
        const bool long_context = pos_bound + kMaxRound > kShortContext, sampled = run.sample.temp > 0;
        const bool catch_up = run.keeps_mtp && (k > 0 || pend_bound + 1 > kMaxPending);
        const int parts = catch_up ? static_cast<int>(ceil_div(pend_bound, kBlockRows)) : 0;
        // The writer keeps run.n_valid in the program: a run over another vocabulary is another program.
        DC_TRY(const Replay* r, replay({k, parts, run.n_valid * 2 + (run.keeps_mtp ? 1 : 0), long_context, sampled},
                                       [&](Program& p) { write_round(p, parts > 0 ? k : 0, parts, long_context); }));
        DC_RT(r->graph.launch(stream));
        ++queued;
        pend_bound = !run.keeps_mtp ? 0 : catch_up ? k + 1 : pend_bound + 1;
        pos_bound += k + 1;
        return {};
    }

    Result<std::vector<DecodedRound>> decode_poll(int& left) {
        rt::Error e = 0;
        const bool idle = rt::idle(stream, e);
        DC_TRY_STATUS(check(e, "decoding"));
        const unsigned done = __atomic_load_n(&ring->done, __ATOMIC_ACQUIRE);
        if (done == taken && idle && done != queued)
            return fail(ErrorCode::kResource, "device: %u rounds were queued, %u have ended", queued, done);
        std::vector<DecodedRound> rounds;
        for (; taken != done; ++taken) {
            rounds.push_back(ring->rounds[taken % kRingRounds]);
            if (const int n = rounds.back().n_tokens; n < 0 || n > kMaxRound)
                return fail(ErrorCode::kResource, "device: a round of %d tokens", n);
        }
        left = static_cast<int>(queued - taken);
        return rounds;
    }

    Result<DecodeResult> decode_finish(PassStats& stats) {
        DC_RT(rt::set_device(m.index));
        const ModelConfig& c = m.cfg;
        DecodeState s;
        DecodeResult end;
        const rt::Settled settled{stream};
        DC_RT(rt::copy(&s, b.decode, sizeof s, stream));
        DC_RT(rt::synchronize(stream));
        const DecodeRows &main = s.main, &mtp = s.mtp;
        if (s.n_pend < 0 || s.n_pend > (run.keeps_mtp ? std::min(main.pos, kMaxPending + kMaxRound) : 0))
            return fail(ErrorCode::kResource, "device: %d pending rows", s.n_pend);
        if (main.pos < std::ssize(run.tokens) - 1 || main.pos > args.ctx)
            return fail(ErrorCode::kResource, "device: %d cached tokens", main.pos);
        end.tokens.resize(static_cast<size_t>(main.pos));
        end.pending.resize(static_cast<size_t>(s.n_pend) * static_cast<size_t>(c.hidden_size));
        DC_RT(rt::copy(end.tokens.data(), b.tokens, 4 * std::ssize(end.tokens), stream));
        DC_RT(rt::copy(end.pending.data(), b.pend, 4 * std::ssize(end.pending), stream));
        DC_RT(rt::synchronize(stream));
        taken = queued;
        const WeightBytes& w = m.model.bytes;
        stats.passes += main.passes + mtp.passes;
        stats.rows += main.passed_rows + mtp.passed_rows;
        stats.mtp_passes += mtp.passes;
        stats.mtp_rows += mtp.passed_rows;
        stats.experts_touched += main.experts + mtp.experts;
        stats.weight_bytes += main.passes * (w.fixed + w.head) + mtp.passes * (w.mtp_fixed + w.mtp_head) +
                              (main.passed_rows + mtp.passed_rows) * w.embed_row + mtp.experts * w.mtp_expert +
                              main.experts * w.experts / std::max(w.n_moe_layers, 1);  // of all layers alike
        stats.cache_bytes += c.cache_row_bytes(args.kv) * (main.cache_rows * c.num_hidden_layers + mtp.cache_rows);
        return end;
    }

    std::optional<ArrayView> view(const std::string& name) const {
        const ModelConfig& c = m.cfg;
        const std::map<std::string, ArrayView> buffers = {
            {"x", {b.x.data, "<f4", {b.rows, b.x.stride}}},
            {"hidden", {b.h.data, "<f4", {b.rows, b.h.stride}}},
            {"logits", {b.logits.data, "<f4", {kLogitRows, b.logits.stride}}},
            {"cache", {b.cache.data, "|u1", {c.num_hidden_layers, args.ctx, b.cache.row_bytes}}},
            {"mtp_cache", {b.mtp_cache.data, "|u1", {1, args.ctx, b.cache.row_bytes}}},
        };
        for (const auto* named : {&buffers, &kept_taps[0], &kept_taps[1]}) {
            const auto it = named->find(name);
            if (it != named->end() && it->second.data != nullptr) return it->second;
        }
        return std::nullopt;
    }

    // report.h
    Result<std::string> report(const std::string& what);
    Status report_stages(int n, int pos, std::string& json);
    Result<double> seconds(int repeats, const std::function<rt::Error()>& queue);
};

#include "runtime/cuda/report.h"

// --- the engine -----------------------------------------------------------------------------------------------------

namespace {

class DeviceEngine final : public Engine {
  public:
    explicit DeviceEngine(std::unique_ptr<OnDevice> s) : s_(std::move(s)) {}
    // What a device that hangs may still write to is given up, not waited for: the process can end.
    ~DeviceEngine() override {
        bool rests = false;
        try {
            rests = s_->at_rest();
        } catch (const std::exception&) {
        }
        if (rests) return;
        s_->m.hangs = true;
        (void)s_.release();
    }
    Result<PassResult> forward(const PassArgs& p) {
        return call([&] { return s_->forward(p); });
    }
    Status copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) override {
        return call([&] { return s_->copy_rows(mtp, layer, n, host, to_cache); });
    }
    bool takes_feed() const override { return true; }
    Status decode_start(const DecodeArgs& d) override {
        return call([&] { return s_->decode_start(d); });
    }
    Status decode_step(int k) override {
        return call([&] { return s_->decode_step(k); });
    }
    Result<std::vector<DecodedRound>> decode_poll(int& left) override {
        return call([&] { return s_->decode_poll(left); });
    }
    Result<DecodeResult> decode_finish(PassStats& stats) override {
        return call([&] { return s_->decode_finish(stats); });
    }
    std::optional<ArrayView> view(const std::string& name) override { return s_->view(name); }
    Result<std::string> report(const std::string& what) override {
        return call([&] { return s_->report(what); });
    }

  private:
    // fn() of the session. Where it fails nothing that is queued may still use the caller's memory.
    template <class Fn> auto call(Fn&& fn) -> decltype(fn()) {
        if (s_->closed) {
            return fail(ErrorCode::kSession,
                        "device: this session is closed, a report could not put its cache rows back");
        }
        struct Drain {
            rt::Stream stream;
            bool needed = true;
            ~Drain() {
                if (needed) rt::drain(stream);
            }
        } drain{s_->stream};
        auto result = guarded(fn);
        drain.needed = !result.ok();
        return result;
    }

    std::unique_ptr<OnDevice> s_;
};

Result<std::unique_ptr<Backend>> open_backend(const BoundModel& model, uint64_t fill_seed) {
    return guarded([&]() -> Result<std::unique_ptr<Backend>> {
        auto m = std::make_unique<DeviceBackend>(model);
        DC_TRY_STATUS(m->open(fill_seed));
        return std::unique_ptr<Backend>(std::move(m));
    });
}

}  // namespace

Result<std::unique_ptr<Engine>> DeviceBackend::make_engine(const EngineArgs& args) {
    return guarded([&]() -> Result<std::unique_ptr<Engine>> {
        auto s = std::make_unique<OnDevice>(*this, args);
        DC_TRY_STATUS(s->open());
        return std::unique_ptr<Engine>(std::make_unique<DeviceEngine>(std::move(s)));
    });
}

Result<PassResult> DeviceBackend::forward(const PassArgs& args) {
    return static_cast<DeviceEngine*>(args.segments[0].engine)->forward(args);
}

}  // namespace deepcalm

extern "C" __attribute__((visibility("default")))
const deepcalm::DeviceLibrary deepcalm_device = {DC_DEVICE_BUILD, deepcalm::open_backend};

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
    if (stream == nullptr) {
        auto found = rt::find_device(0);
        if (!found.ok()) return -1;
        info = found.value();
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
