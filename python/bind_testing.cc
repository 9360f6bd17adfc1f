// Module deepcalm._core.testing: every kernel by instruction set, on numpy arrays, for the oracles in tests/.
// Shapes are checked here, because kernels check nothing. Output buffers carry guard elements on both sides of every
// row; a kernel that writes outside its output is reported as RuntimeError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/elementary.h"
#include "kernels/kernels.h"
#include "python/bind_common.h"
#include "runtime/model.h"
#include "runtime/probe.h"

namespace py = pybind11;
using namespace deepcalm;

namespace {

template <class T> using Array = py::array_t<T, py::array::c_style>;
using Floats = Array<float>;

void require(bool ok, const std::string& what) {
    if (!ok) throw py::value_error(what);
}
int dim(const py::array& a, int axis) {
    require(a.shape(axis) <= INT32_MAX, "axis too long");
    return static_cast<int>(a.shape(axis));
}
const CpuKernels& table(const std::string& isa) {
    const CpuKernels* k = select_cpu_kernels(isa.c_str());
    require(k != nullptr, "isa " + isa + ": unknown or not supported by this processor");
    return *k;
}
template <class E> E lookup(const char* const* names, int n, const std::string& name, const char* what) {
    for (int i = 0; i < n; ++i)
        if (name == names[i]) return static_cast<E>(i);
    throw py::value_error(std::string("unknown ") + what + " " + name);
}
constexpr const char* kFormatNames[] = {"f32", "bf16", "f16", "f8", "q8", "q4", "q4b"};
constexpr const char* kActNames[] = {"f32", "bf16", "i8"};
Format format_of(const std::string& s) { return lookup<Format>(kFormatNames, kNumFormats, s, "format"); }
ActKind act_of(const std::string& s) { return lookup<ActKind>(kActNames, kNumActKinds, s, "activation kind"); }
CacheType cache_of(const std::string& s) { return lookup<CacheType>(kCacheTypeNames, kNumCacheTypes, s, "cache type"); }

// Output rows of n elements, 64-byte aligned, with kGuard sentinel elements before and after each row.
template <class T> class Guarded {
  public:
    Guarded(int64_t rows, int64_t n) : rows_(rows), n_(n), stride_(round_up(n, 64) + kGuard), buf_(), base_(nullptr) {
        buf_.assign(static_cast<size_t>(kGuard + rows * stride_ + 64), sentinel());
        const auto address = reinterpret_cast<uintptr_t>(buf_.data() + kGuard);
        base_ = buf_.data() + kGuard + ((64 - address % 64) % 64) / sizeof(T);
    }
    T* row(int64_t i) { return base_ + i * stride_; }
    int64_t stride() const { return stride_; }
    py::array_t<T> take(std::vector<py::ssize_t> shape) {
        const T s = sentinel();
        for (int64_t i = -1; i < rows_; ++i) {
            const T* from = i < 0 ? base_ - kGuard : row(i) + n_;
            const T* to = i < 0 ? base_ : row(i) + stride_;
            for (; from < to; ++from)
                if (std::memcmp(from, &s, sizeof(T)) != 0) throw std::runtime_error("kernel wrote outside its output");
        }
        py::array_t<T> out(shape);
        for (int64_t i = 0; i < rows_; ++i)
            std::memcpy(out.mutable_data() + i * n_, row(i), static_cast<size_t>(n_) * sizeof(T));
        return out;
    }

  private:
    static constexpr int64_t kGuard = 64;
    static T sentinel() {
        T s;
        std::memset(&s, 0xA7, sizeof(T));
        return s;
    }
    int64_t rows_, n_, stride_;
    std::vector<T> buf_;
    T* base_;
};

// Rows of `width` elements with `width` guarded ones behind each: the layout of d and sum follows from x's stride.
template <class T> py::tuple prepare_as(const CpuKernels& k, ActKind kind, const Floats& x) {
    const int n = dim(x, 0), cols = dim(x, 1);
    const int64_t width = round_up(cols, kTileCols), groups = width / kTileCols;
    Guarded<T> out(n, width);
    const int64_t group_stride = out.stride() / kTileCols;
    Guarded<float> d(1, n * group_stride);
    Guarded<int32_t> sum(1, n * group_stride);
    const bool i8 = kind == ActKind::kI8;
    std::memset(d.row(0), 0xFF, static_cast<size_t>(n * group_stride) * 4);
    std::memset(sum.row(0), 0xFF, static_cast<size_t>(n * group_stride) * 4);
    const Activation a{
        .x = out.row(0), .d = i8 ? d.row(0) : nullptr, .sum = i8 ? sum.row(0) : nullptr, .stride = out.stride()};
    for (int i = n; i-- > 0;) k.prepare[static_cast<int>(kind)](x.data(i), cols, a, i);
    const py::object rows = out.take({n, width});
    if (!i8) return py::make_tuple(rows, py::none(), py::none());
    const py::slice all(0, n, 1), used(0, groups, 1), spare(groups, group_stride, 1);
    const py::object all_d = d.take({n, group_stride}), all_sum = sum.take({n, group_stride});
    const py::object untouched = all_sum[py::make_tuple(all, spare)].attr("__eq__")(-1).attr("all")();
    if (!untouched.cast<bool>()) throw std::runtime_error("kernel wrote outside its output");
    return py::make_tuple(rows, all_d[py::make_tuple(all, used)].attr("copy")(),
                          all_sum[py::make_tuple(all, used)].attr("copy")());
}

py::tuple prepare(const std::string& isa, const std::string& kind_name, const Floats& x) {
    require(x.ndim() == 2, "x must be [n, cols]");
    const CpuKernels& k = table(isa);
    const ActKind kind = act_of(kind_name);
    if (kind == ActKind::kF32) return prepare_as<float>(k, kind, x);
    if (kind == ActKind::kBF16) return prepare_as<uint16_t>(k, kind, x);
    return prepare_as<int8_t>(k, kind, x);
}

py::array_t<float> matmul(const std::string& isa, const std::string& format, const Array<uint8_t>& w, int rows,
                          int cols, const py::array& x, const std::optional<Floats>& d,
                          const std::optional<Array<int32_t>>& sum, const std::optional<Floats>& scales,
                          std::pair<int, int> scale_block, int slice, int tile_begin, int tile_end,
                          const std::optional<Array<int32_t>>& x_row, std::optional<bool> one_stream) {
    const CpuKernels& k = table(isa);
    PackedTensor t{.data = reinterpret_cast<const std::byte*>(w.data()),
                   .format = format_of(format),
                   .rows = rows,
                   .cols = cols,
                   .scale_rows = scale_block.first,
                   .scale_cols = scale_block.second};
    const FormatInfo& f = info(t.format);
    require(rows > 0 && cols > 0, "rows and cols must be positive");
    require(w.ndim() == 4 && w.shape(1) == t.row_tiles() && w.shape(2) == t.col_tiles() && w.shape(3) == f.tile_bytes,
            "w must be uint8 [n_slices, row_tiles, col_tiles, tile_bytes] of the format");
    t.n_slices = dim(w, 0);
    if (t.format == Format::kF8) {
        require(t.scale_rows > 0 && t.scale_rows % kTileRows == 0 && t.scale_cols > 0 && t.scale_cols % kTileCols == 0,
                "scale_block must be multiples of 16 and 32");
        require(scales && scales->size() == t.n_slices * t.slice_scales(),
                "f8 needs scales [n_slices, ceil(rows/r), ceil(cols/c)]");
        t.scales = scales->data();
    }
    if (tile_end < 0) tile_end = t.row_tiles();
    require(slice >= 0 && slice < t.n_slices && 0 <= tile_begin && tile_begin <= tile_end && tile_end <= t.row_tiles(),
            "slice or tile range outside the tensor");
    const int elem = f.act == ActKind::kF32 ? 4 : f.act == ActKind::kBF16 ? 2 : 1;
    require(x.ndim() == 2 && x.itemsize() == elem && (x.flags() & py::array::c_style) && x.shape(1) % kTileCols == 0 &&
                x.shape(1) >= round_up(cols, kTileCols),
            "x must be a prepared activation [m, stride] of the format's kind");
    MatmulArgs a;
    a.one_stream = one_stream.value_or(amd_core());
    a.w = &t;
    a.slice = slice;
    a.tile_begin = tile_begin;
    a.tile_end = tile_end;
    a.x.x = const_cast<void*>(x.data());
    a.x.stride = x.shape(1);
    if (f.act == ActKind::kI8) {
        require(d && sum && d->size() == x.size() / kTileCols && sum->size() == d->size(),
                "int8 activations need d, sum");
        a.x.d = const_cast<float*>(d->data());
        a.x.sum = const_cast<int32_t*>(sum->data());
    }
    a.n = dim(x, 0);
    if (x_row) {
        a.n = static_cast<int>(x_row->size());
        for (int i = 0; i < a.n; ++i)
            require(x_row->data()[i] >= 0 && x_row->data()[i] < x.shape(0), "x_row outside x");
        a.x_row = x_row->data();
    }
    require(a.n > 0, "no rows");
    const int width = (tile_end - tile_begin) * kTileRows;
    Guarded<float> y(a.n, width);
    a.y = y.row(0);
    a.y_stride = y.stride();
    without_gil([&] { k.matmul[static_cast<int>(t.format)](a); });
    return y.take({a.n, width});
}

py::array_t<float> rmsnorm(const std::string& isa, const Floats& x, const Floats& w, float eps, bool in_place) {
    require(x.ndim() == 1 && w.ndim() == 1 && x.size() == w.size() && x.size() > 0, "x and w must be [n]");
    Guarded<float> out(1, x.size());
    if (in_place) std::memcpy(out.row(0), x.data(), static_cast<size_t>(x.nbytes()));
    table(isa).rmsnorm(in_place ? out.row(0) : x.data(), w.data(), out.row(0), dim(x, 0), eps);
    return out.take({x.size()});
}

py::array_t<float> rope(const std::string& isa, const Floats& v, const Floats& cos, const Floats& sin) {
    require(v.ndim() == 1 && cos.size() * 2 == v.size() && sin.size() == cos.size(),
            "v must be [2 half], cos, sin [half]");
    Guarded<float> out(1, v.size());
    std::memcpy(out.row(0), v.data(), static_cast<size_t>(v.nbytes()));
    table(isa).rope(out.row(0), cos.data(), sin.data(), static_cast<int>(cos.size()));
    return out.take({v.size()});
}

py::array_t<float> swiglu(const std::string& isa, const Floats& gate_up, int n) {
    require(n > 0 && gate_up.ndim() == 1 && gate_up.size() == 2 * round_up(n, 16),
            "gate_up must be [2 * round_up(n, 16)]");
    Guarded<float> out(1, n);
    table(isa).swiglu(gate_up.data(), out.row(0), n);
    return out.take({n});
}

py::array_t<float> axpy(const std::string& isa, float a, const Floats& x, const Floats& y) {
    require(x.ndim() == 1 && y.size() == x.size(), "x and y must be [n]");
    Guarded<float> out(1, x.size());
    std::memcpy(out.row(0), y.data(), static_cast<size_t>(y.nbytes()));
    table(isa).axpy(a, x.data(), out.row(0), dim(x, 0));
    return out.take({x.size()});
}

py::array_t<uint8_t> cache_write(const std::string& isa, const std::string& type, const Floats& c_kv,
                                 const Floats& k_rope) {
    require(c_kv.ndim() == 2 && k_rope.ndim() == 2 && c_kv.shape(0) == k_rope.shape(0), "c_kv [n, r], k_rope [n, dr]");
    const CpuKernels& k = table(isa);
    const CacheType t = cache_of(type);
    const int n = dim(c_kv, 0), c = dim(c_kv, 1), dr = dim(k_rope, 1);
    const int64_t bytes = cache_row_bytes(t, static_cast<int>(round_up(c, 32)), static_cast<int>(round_up(dr, 16)));
    Guarded<uint8_t> out(n, bytes);
    for (int i = 0; i < n; ++i)
        k.cache_write(t, c_kv.data(i), c, k_rope.data(i), dr, reinterpret_cast<std::byte*>(out.row(i)));
    return out.take({n, bytes});
}

void require_cache(const Array<uint8_t>& rows, CacheType t, int c_pad, int r_pad) {
    require(c_pad > 0 && c_pad % 32 == 0 && r_pad > 0 && r_pad % 16 == 0, "c_pad, r_pad: multiples of 32, 16");
    require(rows.ndim() == 2 && rows.shape(1) == cache_row_bytes(t, c_pad, r_pad),
            "cache must be [positions, row_bytes]");
}

py::array_t<float> cache_read(const std::string& isa, const std::string& type, const Array<uint8_t>& rows, int c_pad,
                              int r_pad) {
    const CacheType t = cache_of(type);
    require_cache(rows, t, c_pad, r_pad);
    Guarded<float> out(rows.shape(0), c_pad + r_pad);
    for (int i = 0; i < dim(rows, 0); ++i)
        table(isa).cache_read(t, reinterpret_cast<const std::byte*>(rows.data(i)), c_pad, r_pad, out.row(i));
    return out.take({rows.shape(0), c_pad + r_pad});
}

py::tuple mla_partial(const std::string& isa, const std::string& type, const Array<uint8_t>& cache, int c_pad,
                      int r_pad, const Floats& q, int pos_begin, const Array<int32_t>& row_end, float softmax_scale,
                      bool bf16_dot) {
    const CpuKernels& k = table(isa);
    const CacheType t = cache_of(type);
    require_cache(cache, t, c_pad, r_pad);
    require(q.ndim() == 3 && q.shape(2) == c_pad + r_pad && row_end.size() == q.shape(0),
            "q [n, heads, c_pad + r_pad]");
    const int n = dim(q, 0), heads = dim(q, 1);
    require(pos_begin % kPartialLen == 0, "pos_begin must be a multiple of the partial length");
    for (int i = 0; i < n; ++i)
        require(row_end.data()[i] <= pos_begin + kPartialLen && row_end.data()[i] <= cache.shape(0),
                "row_end out of range");
    Guarded<float> m(n, heads), l(n, heads), o(n, int64_t{heads} * c_pad);
    Guarded<uint8_t> scratch(1, mla_scratch_bytes(c_pad, r_pad, n, heads));
    std::memset(scratch.row(0), 0xFF,
                static_cast<size_t>(mla_scratch_bytes(c_pad, r_pad, n, heads)));  // NaN everywhere
    const MlaPartialArgs a{.type = t,
                           .cache = reinterpret_cast<const std::byte*>(cache.data()),
                           .row_bytes = cache.shape(1),
                           .c_pad = c_pad,
                           .r_pad = r_pad,
                           .n_rows = n,
                           .n_heads = heads,
                           .q = q.data(),
                           .q_row_stride = q.shape(1) * q.shape(2),
                           .pos_begin = pos_begin,
                           .row_end = row_end.data(),
                           .softmax_scale = softmax_scale,
                           .m = m.row(0),
                           .l = l.row(0),
                           .ml_row_stride = m.stride(),
                           .o = o.row(0),
                           .o_row_stride = o.stride(),
                           .scratch = scratch.row(0),
                           .bf16_dot = bf16_dot};
    k.mla_partial(a);
    scratch.take({mla_scratch_bytes(c_pad, r_pad, n, heads)});
    return py::make_tuple(m.take({n, heads}), l.take({n, heads}), o.take({n, heads, c_pad}));
}

py::array_t<float> mla_combine(const std::string& isa, const Floats& m, const Floats& l, const Floats& o) {
    require(o.ndim() == 2 && m.size() == o.shape(0) && l.size() == m.size() && o.shape(1) % 32 == 0,
            "m, l [p], o [p, c_pad]");
    Guarded<float> out(1, o.shape(1));
    table(isa).mla_combine(m.data(), l.data(), 1, o.data(), o.shape(1), dim(o, 0), dim(o, 1), out.row(0));
    return out.take({o.shape(1)});
}

py::tuple route_rows(const Floats& gate_logits, const std::optional<Floats>& bias, int k, int n_group, int topk_group,
                     const std::string& scoring, const std::string& method, bool norm_topk_prob, float scale) {
    constexpr const char* kScoring[] = {"softmax", "sigmoid"};
    constexpr const char* kMethods[] = {"greedy", "group_limited_greedy", "noaux_tc"};
    require(gate_logits.ndim() == 2, "gate_logits must be [n, n_routed_experts]");
    const int n = dim(gate_logits, 0), experts = dim(gate_logits, 1);
    require(k > 0 && k <= experts && n_group > 0 && experts % n_group == 0 && topk_group > 0 && topk_group <= n_group,
            "k, n_group or topk_group out of range");
    require(!bias || bias->size() == experts, "bias must be [n_routed_experts]");
    Guarded<float> weight(n, k), scratch(1, 2 * experts + n_group);
    Guarded<int32_t> idx(n, k);
    for (int i = 0; i < n; ++i)
        route({.gate_logits = gate_logits.data(i),
               .bias = bias ? bias->data() : nullptr,
               .n_routed_experts = experts,
               .num_experts_per_tok = k,
               .n_group = n_group,
               .topk_group = topk_group,
               .scoring_func = lookup<ScoringFunc>(kScoring, 2, scoring, "scoring_func"),
               .topk_method = lookup<TopkMethod>(kMethods, 3, method, "topk_method"),
               .norm_topk_prob = norm_topk_prob,
               .routed_scaling_factor = scale,
               .scratch = scratch.row(0),
               .topk_idx = idx.row(i),
               .topk_weight = weight.row(i)});
    scratch.take({2 * experts + n_group});
    return py::make_tuple(idx.take({n, k}), weight.take({n, k}));
}

// Runs `stages` stages of 64 dealt items twice on one pool; the first time thread fail_tid throws in stage fail_stage. What
// the first run said, and the items that the second did.
py::tuple pool_runs(int threads, int stages, int fail_tid, int fail_stage) {
    const auto pool = unwrap(ThreadPool::make(threads));
    const auto run = [&](int failing, std::atomic<int>& items) {
        return pool->run([&](int tid) {
            for (int stage = 0; stage < stages; ++stage) {
                if (tid == failing && stage == fail_stage) throw std::bad_alloc();
                pool->deal(64, 1, [&](Range r) { items += r.end - r.begin; });
                pool->barrier();
            }
        });
    };
    std::atomic<int> before{0}, items{0};
    const std::string error = without_gil([&] {
        Status failed = run(fail_tid, before);
        return failed.ok() ? std::string() : failed.error().message;
    });
    unwrap(without_gil([&] { return run(-1, items); }));
    return py::make_tuple(error, items.load());
}

// [(cost on all threads, cost alone, share of waiting)] pass by pass -> what was chosen: alone?
std::vector<bool> thread_choice(const std::vector<std::array<double, 3>>& passes, bool crowded, int kind) {
    ThreadChoice choice;
    std::vector<bool> out;
    for (const auto& [all, alone, waited] : passes) {
        out.push_back(choice.alone(kind));
        choice.ran(kind, out.back() ? alone : all, out.back() ? 0 : waited, [&] { return crowded; });
    }
    return out;
}

}  // namespace

void init_probes(py::module_& m) {
    using namespace pybind11::literals;
    m.def(
        "compute_ceilings",
        [](const std::string& isa, int threads) {
            require(threads > 0, "threads must be positive");
            constexpr const char* kNames[] = {"f32", "bf16", "int8"};  // in the order of ActKind
            py::dict out;
            for (int kind = 0; kind < kNumActKinds; ++kind) {
                const double rate = unwrap(
                    without_gil([&] { return compute_ceiling(table(isa), static_cast<ActKind>(kind), threads); }));
                if (rate > 0) out[kNames[kind]] = rate;
            }
            return out;
        },
        "isa"_a, "threads"_a,
        "1e9 operations per second (multiply and add counted apart) from registers, best of 5: f32 multiply-adds, and "
        "the bf16 and int8 dot instructions where the set has them.");
    m.def(
        "inner_loop_rate",
        [](const std::string& isa, const std::string& format, int threads, int rows) {
            require(threads > 0 && rows > 0, "threads and rows must be positive");
            const CpuKernels& k = table(isa);
            const Format f = format_of(format);
            return unwrap(without_gil([&] { return inner_loop_rate(k, f, threads, rows); }));
        },
        "isa"_a, "format"_a, "threads"_a, "rows"_a = 64,
        "1e9 operations per second of the matmul kernel on operands in the first-level cache: 64 outputs x 256 columns "
        "(q8, q4), 128 (bf16, f8) or 64 (f16, f32), `rows` activation rows; best of 5.");
    m.def(
        "attention_rate",
        [](const std::string& isa, const std::string& kv, int heads, int rows, int positions) {
            require(heads > 0 && rows > 0 && positions > 0, "heads, rows and positions must be positive");
            const CpuKernels& k = table(isa);
            const CacheType type = cache_of(kv);
            return unwrap(without_gil([&] { return attention_rate(k, type, heads, rows, positions); }));
        },
        "isa"_a, "kv"_a, "heads"_a, "rows"_a, "positions"_a,
        "1e9 operations per second of the attention kernel on one thread, latent 512 + rope 64, every row seeing all "
        "positions: 2 (576 + 512) operations per row, head and position; best of 5.");
}

void init_testing(py::module_& m) {
    using namespace pybind11::literals;
    m.def(
        "pool_runs", &pool_runs, "threads"_a, "stages"_a, "fail_tid"_a, "fail_stage"_a,
        "(error of a run in which a thread throws, items of the 64 * stages that the next run on the same pool did).");
    m.def("thread_choice", &thread_choice, "passes"_a, "crowded"_a = false, "kind"_a = 1,
          "Which of the passes (cost on all threads, cost alone, share of waiting) are chosen to run alone.");
    m.def("prepare", &prepare, "isa"_a, "kind"_a, "x"_a,
          "Rounds x f32 [n, cols] for kind f32|bf16|i8: (x [n, round_up(cols, 32)], d, sum); d, sum only for i8.");
    m.def("matmul", &matmul, "isa"_a, "format"_a, "w"_a, "rows"_a, "cols"_a, "x"_a, "d"_a = py::none(),
          "sum"_a = py::none(), "scales"_a = py::none(), "scale_block"_a = std::pair<int, int>(128, 128), "slice"_a = 0,
          "tile_begin"_a = 0, "tile_end"_a = -1, "x_row"_a = py::none(), "one_stream"_a = py::none(),
          "y f32 [n, 16 * tiles] = x (prepared) times one slice of w (uint8 tiles), padding rows included.");
    m.def("rmsnorm", &rmsnorm, "isa"_a, "x"_a, "w"_a, "eps"_a, "in_place"_a = false, "w * x / rms(x), f32 [n].");
    m.def("rope", &rope, "isa"_a, "v"_a, "cos"_a, "sin"_a, "Half-split rotation of v f32 [2 half].");
    m.def("swiglu", &swiglu, "isa"_a, "gate_up"_a, "n"_a, "silu(gate) * up of 16-interleaved gate_up, f32 [n].");
    m.def("axpy", &axpy, "isa"_a, "a"_a, "x"_a, "y"_a, "fma(a, x, y), f32 [n].");
    m.def("cache_write", &cache_write, "isa"_a, "type"_a, "c_kv"_a, "k_rope"_a, "Cache rows, uint8 [n, row_bytes].");
    m.def("cache_read", &cache_read, "isa"_a, "type"_a, "rows"_a, "c_pad"_a, "r_pad"_a, "f32 [n, c_pad + r_pad].");
    m.def("mla_partial", &mla_partial, "isa"_a, "type"_a, "cache"_a, "c_pad"_a, "r_pad"_a, "q"_a, "pos_begin"_a,
          "row_end"_a, "softmax_scale"_a, "bf16_dot"_a = true,
          "(m [n, heads], l [n, heads], o [n, heads, c_pad]) of one partial.");
    m.def("mla_combine", &mla_combine, "isa"_a, "m"_a, "l"_a, "o"_a, "One head's partials -> f32 [c_pad].");
    m.def(
        "hold_passes",
        [](Model& model, const py::function& fn) {
            std::unique_lock held(model.pass_mutex(), std::defer_lock);
            without_gil([&] { held.lock(); });
            fn();
        },
        "model"_a, "fn"_a, "Calls fn() as if a pass of the model ran meanwhile.");
    m.def("route", &route_rows, "gate_logits"_a, "bias"_a, "k"_a, "n_group"_a, "topk_group"_a, "scoring"_a, "method"_a,
          "norm_topk_prob"_a, "scale"_a, "(topk_idx int32 [n, k], topk_weight f32 [n, k]).");
    m.def("exp", py::vectorize(exp_f64), "x"_a, "e^x, f64.");
    m.def("log", py::vectorize(log_f64), "x"_a, "Natural logarithm, f64.");
    m.def("sin", py::vectorize([](float x) { return sincos_f32(x).sin; }), "x"_a, "f32, radians.");
    m.def("cos", py::vectorize([](float x) { return sincos_f32(x).cos; }), "x"_a, "f32, radians.");
}
