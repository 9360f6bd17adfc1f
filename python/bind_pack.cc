// formats, manifest, configuration and the packing primitives of deepcalm._core. Everything here takes and returns plain
// buffers; which tensor goes where is decided in deepcalm/files/plan.py.
#include "python/bind_common.h"
#include "runtime/manifest.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <span>
#include <tuple>
#include <vector>

namespace dc = deepcalm;

py::object as_exception(const dc::Error& error) {
    static constexpr const char* kNames[] = {"ConfigError", "PackedFileError", "SessionError", "ResourceError",
                                             "UnsupportedError"};
    const py::object type = py::module_::import("deepcalm.errors").attr(kNames[static_cast<int>(error.code)]);
    // a path in it may hold bytes that are not UTF-8
    const auto text = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(error.message.data(), static_cast<py::ssize_t>(error.message.size()), "surrogateescape"));
    if (!text) throw py::error_already_set();
    return type(text);
}

void throw_error(const dc::Error& error) {
    const py::object e = as_exception(error);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(e.ptr())), e.ptr());
    throw py::error_already_set();
}

dc::Format format_from_name(const std::string& name, const std::string& scale) {
    for (int i = 0; i < dc::kNumFormats; ++i) {
        if (name == dc::kFormats[i].name && scale == dc::kFormats[i].scale) return static_cast<dc::Format>(i);
    }
    throw py::value_error("unknown format " + name + " with scale dtype '" + scale + "'");
}

namespace {

// --- configuration ---------------------------------------------------------------------------------------------------

[[noreturn]] void bad_config(const std::string& key, const std::string& rest) {
    throw_error({dc::ErrorCode::kConfig, "config: " + key + rest});
}

// A stranger's value for a one-line message: Python's ascii(), cut.
std::string show(py::handle value) {
    const auto text = py::reinterpret_steal<py::object>(PyObject_ASCII(value.ptr()));
    if (!text) throw py::error_already_set();
    const std::string s = py::str(text);
    return s.size() <= 64 ? s : s.substr(0, 64) + "...";
}

enum class RopeLayout { kHalf };
constexpr std::array<const char*, 1> names_of(RopeLayout) { return {"half"}; }

class ConfigReader {
  public:
    explicit ConfigReader(const py::dict& d) : d_(d.attr("copy")()) {
        // what a file need not say
        for (const char* key : {"mtp_draft_head", "llama_4_scaling_beta", "post_moe_norm"})
            d_.attr("setdefault")(key, 0);
        for (const char* key : {"embed_scale", "residual_scale", "logit_scale"}) d_.attr("setdefault")(key, 1);
        d_.attr("setdefault")("short_factor", py::list());
        d_.attr("setdefault")("rope_layout", "half");
    }

    void get(const char* key, int& out) {
        const py::object v = take(key);
        int overflow = 0;
        const long long n = py::isinstance<py::int_>(v) && !PyBool_Check(v.ptr())
                                ? PyLong_AsLongLongAndOverflow(v.ptr(), &overflow)
                                : mistyped(key, v, "an integer");
        if (overflow != 0 || n < std::numeric_limits<int>::min() || n > std::numeric_limits<int>::max()) {
            bad_config(key, " does not fit 32 bits");
        }
        out = static_cast<int>(n);
    }
    void get(const char* key, bool& out) {
        const py::object v = take(key);
        if (!PyBool_Check(v.ptr())) mistyped(key, v, "true or false");
        out = v.ptr() == Py_True;
    }
    void get(const char* key, double& out) { out = number(key, take(key)); }
    void get(const char* key, std::vector<double>& out) {
        const py::object v = take(key);
        if (!PyList_Check(v.ptr())) mistyped(key, v, "a list");
        for (const py::handle each : v) out.push_back(number(key, py::reinterpret_borrow<py::object>(each)));
    }
    static double number(const char* key, const py::object& v) {
        if (PyBool_Check(v.ptr()) || (!PyFloat_Check(v.ptr()) && !PyLong_Check(v.ptr()))) mistyped(key, v, "a number");
        const double out = PyFloat_AsDouble(v.ptr());
        if (PyErr_Occurred() != nullptr) {  // an integer beyond the range of double
            PyErr_Clear();
            bad_config(key, " is out of range");
        }
        return out;
    }
    void get(const char* key, float& out) {
        double v = 0;
        get(key, v);
        out = static_cast<float>(v);  // out of range becomes infinity or zero, which validate() refuses
    }
    void get(const char* key, std::string& out) {
        const py::object v = take(key);
        if (!PyUnicode_Check(v.ptr())) mistyped(key, v, "a string");
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(v.ptr(), &size);
        if (text == nullptr) {
            PyErr_Clear();
            bad_config(key, " is not valid Unicode");
        }
        out.assign(text, static_cast<size_t>(size));
    }
    template <class E>
        requires std::is_enum_v<E>
    void get(const char* key, E& out) {
        std::string text, all;
        get(key, text);
        int i = 0;
        for (const char* name : names_of(E{})) {
            if (text == name) {
                out = static_cast<E>(i);
                return;
            }
            all += (i++ == 0 ? "" : ", ") + std::string(name);
        }
        bad_config(key, " is " + show(py::str(text)) + ", expected one of " + all);
    }
    void python_only(const char* key) { seen_.insert(key); }
    void refuse_unknown() {
        for (const auto& item : d_) {
            const char* key = PyUnicode_Check(item.first.ptr()) ? PyUnicode_AsUTF8(item.first.ptr()) : nullptr;
            PyErr_Clear();
            if (key == nullptr || !seen_.contains(key)) bad_config(show(item.first), " is not a known key");
        }
    }

  private:
    py::object take(const char* key) {
        seen_.insert(key);
        if (!d_.contains(key)) bad_config(key, " is missing");
        return d_[key];
    }
    [[noreturn]] static long long mistyped(const char* key, const py::object& v, const char* expected) {
        const std::string found = py::str(py::type::of(v).attr("__name__"));
        bad_config(key, " is a " + found + ", expected " + expected);
    }

    const py::dict d_;
    std::set<std::string> seen_;
};

}  // namespace

dc::ModelConfig config_from_dict(const py::dict& d) {
    dc::ModelConfig c;
    ConfigReader r(d);
#define X(type, name, values) r.get(#name, c.name);
    DEEPCALM_CONFIG(X)
#undef X
    RopeLayout layout{};
    r.get("rope_layout", layout);
    for (const char* key : {"bos_token_id", "eos_token_ids", "tie_word_embeddings"}) r.python_only(key);
    r.refuse_unknown();
    unwrap(dc::validate(c));
    return c;
}

namespace {

// --- packing ---------------------------------------------------------------------------------------------------------

enum class Kind { kF32, kBF16, kF16, kF8, kI4, kI8 };

Kind kind_from_name(const std::string& name) {
    static constexpr const char* kNames[] = {"f32", "bf16", "f16", "f8", "i4", "i8"};
    for (int i = 0; i < 6; ++i) {
        if (name == kNames[i]) return static_cast<Kind>(i);
    }
    throw py::value_error("unknown source kind " + name);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Rows = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Halves = py::array_t<uint16_t, py::array::c_style>;

void require(bool ok, const char* what) {
    if (!ok) throw py::value_error(std::string("packing call: ") + what);
}

// The array itself, never a converted copy: callers keep the pointer, or write through it.
template <class A> A same_array(const py::object& o) {
    require(py::isinstance<A>(o), "scales must be a contiguous array of the right dtype");
    return py::reinterpret_borrow<A>(o);
}

// Rows of one source tensor in memory, as the checkpoint stores them.
struct Source {
    Kind kind = Kind::kF32;
    const uint8_t* data = nullptr;  // [n_rows, stride bytes]
    int64_t stride = 0;             // bytes of a row; i4: two codes a byte, low nibble first
    int n_rows = 0, cols = 0;
    int first_row = 0;            // index of row 0 of `data` in the tensor; places it in the grid of scales
    const float* grid = nullptr;  // f8, i8: [*, grid_cols] one scale per block of the whole tensor
    int64_t grid_cols = 0;
    int block_rows = 1, block_cols = 1;
    const uint16_t* i4_scale = nullptr;  // [n_rows, i4_groups]
    int64_t i4_groups = 0;
    int group = 32;
    bool i4_bf16 = false;
    py::object arrays;  // whose memory this is

    const uint8_t* row(int i) const { return data + i * stride; }
    const float* scale_row(int i) const { return grid + (first_row + i) / block_rows * grid_cols; }

    // Row i as f32; value times scale is rounded once to f32.
    void load(int i, float* out) const {
        const uint8_t* p = row(i);
        switch (kind) {
        case Kind::kF32: std::memcpy(out, p, sizeof(float) * static_cast<size_t>(cols)); return;
        case Kind::kBF16:
            for (int c = 0; c < cols; ++c) {
                uint16_t h;
                std::memcpy(&h, p + 2 * c, 2);
                const uint32_t u = uint32_t{h} << 16;
                std::memcpy(out + c, &u, 4);
            }
            return;
        case Kind::kF16:
            for (int c = 0; c < cols; ++c) {
                uint16_t h;
                std::memcpy(&h, p + 2 * c, 2);
                out[c] = dc::f16_to_f32(h);
            }
            return;
        case Kind::kF8:
        case Kind::kI8: {
            static const auto tables = [] {
                std::array<std::array<float, 256>, 2> t{};
                for (size_t b = 0; b < 256; ++b) {
                    t[0][b] = dc::e4m3_to_f32(static_cast<uint8_t>(b));
                    t[1][b] = static_cast<float>(static_cast<int8_t>(b));
                }
                return t;
            }();
            const auto& table = tables[kind == Kind::kI8];
            const float* scale = scale_row(i);
            for (int begin = 0; begin < cols; begin += block_cols, ++scale) {
                for (int c = begin; c < std::min(cols, begin + block_cols); ++c) out[c] = table[p[c]] * *scale;
            }
            return;
        }
        case Kind::kI4: {
            const uint16_t* scales = i4_scale + i * i4_groups;
            for (int c = 0; c < cols; ++c) {
                const uint16_t h = scales[c / group];
                const int code = (p[c / 2] >> (4 * (c % 2)) & 15) - 8;
                out[c] = static_cast<float>(code) * (i4_bf16 ? dc::bf16_to_f32(h) : dc::f16_to_f32(h));
            }
            return;
        }
        }
    }
};

int64_t kind_bits(Kind kind) {
    return kind == Kind::kF32 ? 32 : kind == Kind::kI4 ? 4 : kind == Kind::kF8 || kind == Kind::kI8 ? 8 : 16;
}

// All sizes are checked here, so that the loops need not.
Source make_source(const std::string& kind, const Bytes& data, int cols, int first_row, const py::object& scale,
                   std::pair<int, int> block, const std::string& scale_dtype) {
    const auto [block_rows, block_cols] = block;
    Source s;
    s.arrays = py::make_tuple(data, scale);
    s.kind = kind_from_name(kind);
    require(data.ndim() == 2, "source must be [rows, row bytes]");
    require(data.shape(0) <= std::numeric_limits<int>::max(), "too many source rows");
    s.n_rows = static_cast<int>(data.shape(0));
    s.cols = cols;
    s.data = data.data();
    s.stride = data.shape(1);
    s.first_row = first_row;
    require(cols >= 1 && dc::ceil_div(int64_t{cols} * kind_bits(s.kind), 8) <= s.stride, "source rows are too short");
    if (s.kind == Kind::kF8 || s.kind == Kind::kI8) {
        const auto a = same_array<Floats>(scale);
        require(block_rows >= 1 && block_cols >= 1 && first_row >= 0, "bad scale block");
        require(a.ndim() == 2 && a.shape(0) >= dc::ceil_div(int64_t{first_row} + s.n_rows, block_rows) &&
                    a.shape(1) >= dc::ceil_div(cols, block_cols),
                "grid of scales is too small");
        s.grid = a.data();
        s.grid_cols = a.shape(1);
        s.block_rows = block_rows;
        s.block_cols = block_cols;
    } else if (s.kind == Kind::kI4) {
        const auto a = same_array<Halves>(scale);
        require(block_cols >= 32 && block_cols % 32 == 0, "i4 group must be a multiple of 32");
        require(a.ndim() == 2 && a.shape(0) == s.n_rows && a.shape(1) >= dc::ceil_div(cols, block_cols),
                "i4 scales are too few");
        s.i4_scale = a.data();
        s.i4_groups = a.shape(1);
        s.group = block_cols;
        s.i4_bf16 = scale_dtype == "bf16";
    }
    return s;
}

// Row tiles that rows are packed into.
struct Tiles {
    py::array_t<uint8_t> bytes;
    int64_t stride = 0;  // bytes between consecutive row tiles (twice a row tile when two parts alternate)
    dc::Format format = dc::Format::kF32;
    py::object scales;  // f8: one per block of `block`
    std::pair<int, int> block;
};
Tiles make_tiles(const Bytes& out, int64_t stride, const std::string& format, const std::string& scale,
                 const py::object& scales, std::pair<int, int> block) {
    return {out, stride, format_from_name(format, scale), scales, block};
}

// What does not fit first, (row of the source buffer, column), or None; and the groups too small for a scale of their own.
py::tuple outcome(bool ok, int row, int col, int64_t near_zero) {
    return py::make_tuple(ok ? py::object(py::none()) : py::make_tuple(row, col), near_zero);
}

struct PackCall {
    const Tiles& to;
    const Source& src;
    std::span<const int32_t> index;  // source row of each packed row; transposed: of each packed column
    bool transpose = false;
    int rows = 0, cols = 0;    // of the packed part
    std::byte* out = nullptr;  // its first tile
    float* scales = nullptr;   // [ceil(rows / block rows), ceil(cols / block columns)]; null: not f8, or the source's
    int lanes = 16;            // see PackArgs
    int bad_row = 0, bad_col = 0;
    int64_t near_zero = 0;

    int source_row(int i) const { return index[static_cast<size_t>(i)]; }

    // pack(first row, rows, first tile, bad row, bad column) of strips of `step` rows, until a value does not fit.
    template <class Fn> bool strips(int step, Fn&& pack) {
        for (int row0 = 0, r = 0, c = 0; row0 < rows; row0 += step) {
            if (pack(row0, std::min(step, rows - row0), out + row0 / dc::kTileRows * to.stride, r, c)) continue;
            bad_row = source_row(transpose ? c : row0 + r);
            bad_col = transpose ? row0 + r : c;
            return false;
        }
        return true;
    }

    bool run_values() {
        std::vector<float> all;  // transposed: the whole source block [cols, rows]
        if (transpose) {
            all.resize(static_cast<size_t>(cols) * static_cast<size_t>(rows));
            for (int c = 0; c < cols; ++c) src.load(source_row(c), all.data() + int64_t{c} * rows);
        }
        const auto [scale_rows, scale_cols] = to.block;
        const int step = scales != nullptr ? scale_rows : dc::kTileRows;
        std::vector<float> strip(static_cast<size_t>(step) * static_cast<size_t>(cols));
        dc::PackArgs args{.w = {strip.data(), cols},
                          .cols = cols,
                          .format = to.format,
                          .scales = scales,
                          .scale_rows = scale_rows,
                          .scale_cols = scale_cols,
                          .lanes = lanes};
        return strips(step, [&](int row0, int n, std::byte* dst, int& bad_r, int& bad_c) {
            for (int r = 0; r < n; ++r) {
                float* row = strip.data() + int64_t{r} * cols;
                if (!transpose) src.load(source_row(row0 + r), row);
                for (int c = 0; transpose && c < cols; ++c)
                    row[c] = all[static_cast<size_t>(int64_t{c} * rows + row0 + r)];
            }
            args.rows = n;
            args.out = dst;
            args.near_zero = 0;
            const bool ok = dc::pack_tiles(args);
            bad_r = args.bad_row;
            bad_c = args.bad_col;
            near_zero += ok ? args.near_zero : 0;
            if (scales != nullptr) args.scales += dc::ceil_div(cols, args.scale_cols);
            return ok;
        });
    }

    bool run_f8_codes() {
        std::vector<uint8_t> strip(static_cast<size_t>(dc::kTileRows) * static_cast<size_t>(cols));
        return strips(dc::kTileRows, [&](int row0, int n, std::byte* dst, int& bad_r, int& bad_c) {
            for (int r = 0; r < n; ++r) {
                uint8_t* row = strip.data() + int64_t{r} * cols;
                if (!transpose) std::memcpy(row, src.row(source_row(row0 + r)), static_cast<size_t>(cols));
                for (int c = 0; transpose && c < cols; ++c) row[c] = src.row(source_row(c))[row0 + r];
            }
            return dc::pack_f8_codes({strip.data(), cols}, n, cols, dst, &bad_r, &bad_c);
        });
    }

    bool run_q8_codes() {
        if (!run_values()) return false;
        const int64_t groups = dc::ceil_div(cols, dc::kTileCols);
        std::vector<uint8_t> strip(static_cast<size_t>(dc::kTileRows) * static_cast<size_t>(cols));
        std::vector<float> scale(static_cast<size_t>(dc::kTileRows * groups));
        return strips(dc::kTileRows, [&](int row0, int n, std::byte* dst, int&, int&) {
            for (int r = 0; r < n; ++r) {
                const int i = source_row(row0 + r);
                std::memcpy(strip.data() + int64_t{r} * cols, src.row(i), static_cast<size_t>(cols));
                for (int64_t g = 0; g < groups; ++g)
                    scale[static_cast<size_t>(r * groups + g)] = src.scale_row(i)[g * dc::kTileCols / src.block_cols];
            }
            dc::keep_q8_codes({strip.data(), cols}, {scale.data(), groups}, n, cols, dst);
            return true;
        });
    }

    bool run_q4_codes() {
        const int64_t stride = dc::ceil_div(cols, 2), groups = dc::ceil_div(cols, dc::kTileCols);
        std::vector<uint8_t> strip(static_cast<size_t>(dc::kTileRows * stride));
        std::vector<uint16_t> scale(static_cast<size_t>(dc::kTileRows * groups));
        return strips(dc::kTileRows, [&](int row0, int n, std::byte* dst, int& bad_r, int& bad_c) {
            for (int r = 0; r < n; ++r) {
                const int i = source_row(row0 + r);
                std::memcpy(strip.data() + r * stride, src.row(i), static_cast<size_t>(stride));
                const uint16_t* s = src.i4_scale + i * src.i4_groups;
                for (int64_t g = 0; g < groups; ++g)
                    scale[static_cast<size_t>(r * groups + g)] = s[g * dc::kTileCols / src.group];
            }
            return dc::pack_q4_codes({strip.data(), stride}, {scale.data(), groups}, to.format, n, cols, dst, &bad_r,
                                     &bad_c);
        });
    }
};

py::tuple pack_rows(const Tiles& to, const Source& src, const Rows& index, bool transpose, bool exact, int lanes) {
    require(index.ndim() == 1 && index.size() >= 1 && index.size() <= std::numeric_limits<int>::max(), "bad row index");
    const int n = static_cast<int>(index.size()), rows = transpose ? src.cols : n, cols = transpose ? n : src.cols;
    PackCall call{.to = to,
                  .src = src,
                  .index = {index.data(), static_cast<size_t>(n)},
                  .transpose = transpose,
                  .rows = rows,
                  .cols = cols,
                  .lanes = lanes};
    for (const int32_t i : call.index) require(i >= 0 && i < src.n_rows, "row index out of range");
    const bool is_f8 = to.format == dc::Format::kF8, is_q4b = to.format == dc::Format::kQ4B;
    require(!exact || (is_f8 && src.kind == Kind::kF8) ||
                (to.format == dc::Format::kQ8 && src.kind == Kind::kI8 && !transpose &&
                 (src.block_cols % dc::kTileCols == 0 || src.block_cols >= src.cols)) ||
                ((is_q4b || to.format == dc::Format::kQ4) && src.kind == Kind::kI4 && !transpose),
            "the source's codes are not of this format");
    require(exact || !is_q4b, "bf16-scaled q4 only keeps existing codes");
    const int64_t row_tiles = dc::ceil_div(rows, dc::kTileRows);
    const int64_t row_tile_bytes = dc::ceil_div(cols, dc::kTileCols) * dc::info(to.format).tile_bytes;
    require(to.stride >= row_tile_bytes && (row_tiles - 1) * to.stride + row_tile_bytes <= to.bytes.nbytes(),
            "output is too small");
    call.out = reinterpret_cast<std::byte*>(py::array_t<uint8_t>(to.bytes).mutable_data());
    if (is_f8 && !exact) {
        auto s = same_array<Floats>(to.scales);
        const auto [r, c] = to.block;
        require(r >= 16 && r % 16 == 0 && c >= 32 && c % 32 == 0, "bad scale block");
        require(r == 16 || to.stride == row_tile_bytes, "alternating parts need scale blocks of 16 rows");
        require(s.size() == dc::ceil_div(rows, r) * dc::ceil_div(cols, c), "wrong number of scales");
        call.scales = s.mutable_data();
    }
    const bool ok = without_gil([&] {
        return !exact                         ? call.run_values()
               : is_f8                        ? call.run_f8_codes()
               : to.format == dc::Format::kQ8 ? call.run_q8_codes()
                                              : call.run_q4_codes();
    });
    return outcome(ok, call.bad_row, call.bad_col, call.near_zero);
}

// Index of the first of n values whose exponent is all ones (infinity, NaN), or -1.
template <class T> int first_not_finite(const std::byte* p, int n, T exponent) {
    const auto is_special = [&](int i) {
        T v;
        std::memcpy(&v, p + int64_t{i} * int64_t{sizeof v}, sizeof v);
        return (v & exponent) == exponent;
    };
    int any = 0;
    for (int i = 0; i < n; ++i) any |= is_special(i);
    int i = any ? 0 : n;
    while (i < n && !is_special(i)) ++i;
    return i < n ? i : -1;
}

py::tuple convert_rows(const py::array& out, const std::string& to, const Source& src) {
    const int cols = src.cols;
    const Kind target = kind_from_name(to);
    require(target == Kind::kF32 || target == Kind::kBF16 || target == Kind::kF16, "target must be f32, bf16 or f16");
    const int64_t elem = kind_bits(target) / 8;
    require((out.flags() & py::array::c_style) != 0 && out.writeable() && out.nbytes() == elem * src.n_rows * cols,
            "output has the wrong size");
    auto* dst = static_cast<std::byte*>(py::array(out).mutable_data());
    int row = 0, bad = -1;
    int64_t n_near_zero = 0;
    {
        const py::gil_scoped_release release;
        const dc::FloatMode mode;
        std::vector<float> line(static_cast<size_t>(cols));
        for (; row < src.n_rows && bad < 0; ++row, dst += elem * cols) {
            if (target != src.kind) src.load(row, line.data());
            if (target == src.kind || target == Kind::kF32) {
                const void* from = target == src.kind ? static_cast<const void*>(src.row(row)) : line.data();
                std::memcpy(dst, from, static_cast<size_t>(elem * cols));
            } else {
                for (int c = 0; c < cols;) {
                    uint32_t given = 0, kept = 0;  // bits of the magnitudes of 32 columns
                    for (const int end = std::min(cols, c + dc::kTileCols); c < end; ++c) {
                        const float f = line[static_cast<size_t>(c)];
                        const uint16_t h = target == Kind::kBF16 ? dc::f32_to_bf16(f) : dc::f32_to_f16(f);
                        std::memcpy(dst + 2 * c, &h, 2);
                        given |= std::bit_cast<uint32_t>(f) << 1;
                        kept |= h & 0x7FFFU;
                    }
                    n_near_zero += given != 0 && kept == 0;
                }
            }
            bad = target == Kind::kF32    ? first_not_finite<uint32_t>(dst, cols, 0x7F800000U)
                  : target == Kind::kBF16 ? first_not_finite<uint16_t>(dst, cols, 0x7F80)
                                          : first_not_finite<uint16_t>(dst, cols, 0x7C00);
        }
    }
    return outcome(bad < 0, row - 1, bad, n_near_zero);
}

Floats unpack_slice(const Bytes& data, const py::object& scales, const std::string& format,
                    const std::string& format_scale, std::array<int, 3> shape, std::pair<int, int> block, int slice) {
    const auto [n_slices, rows, cols] = shape;
    const auto [scale_rows, scale_cols] = block;
    dc::PackedTensor w;
    w.format = format_from_name(format, format_scale);
    require(n_slices >= 1 && rows >= 1 && cols >= 1 && slice >= 0 && slice < n_slices, "bad shape");
    w.n_slices = n_slices;
    w.rows = rows;
    w.cols = cols;
    require(data.nbytes() >= w.n_bytes(), "data is too short");
    w.data = reinterpret_cast<const std::byte*>(data.data());
    Floats s;
    if (w.format == dc::Format::kF8) {
        s = same_array<Floats>(scales);
        require(scale_rows >= 16 && scale_rows % 16 == 0 && scale_cols >= 32 && scale_cols % 32 == 0,
                "bad scale block");
        w.scale_rows = scale_rows;
        w.scale_cols = scale_cols;
        require(s.size() == n_slices * w.slice_scales(), "wrong number of scales");
        w.scales = s.data();
    }
    Floats out({rows, cols});
    float* dst = out.mutable_data();
    without_gil([&] { dc::unpack_tiles(w, slice, {dst, w.cols}); });
    return out;
}

py::list formats() {
    static constexpr const char* kActNames[] = {"f32", "bf16", "i8"};
    py::list out;
    for (const dc::FormatInfo& f : dc::kFormats) {
        py::dict d;
        d["name"] = f.name;
        d["scale"] = f.scale;
        d["tile_bytes"] = f.tile_bytes;
        d["sum_block_cols"] = f.sum_block_cols;
        d["act"] = kActNames[static_cast<int>(f.act)];
        d["dot_tol"] = f.dot_tol;
        out.append(d);
    }
    return out;
}

py::list expected_tensors(const py::dict& cfg) {
    py::list out;
    for (const dc::TensorSpec& t : dc::expected_tensors(config_from_dict(cfg))) {
        py::dict d;
        py::list parts, allowed;
        for (const int rows : t.parts) parts.append(rows);
        for (int i = 0; i < dc::kNumFormats; ++i) {
            const auto f = static_cast<dc::Format>(i);
            const char* name = dc::info(f).name;
            if (dc::format_allowed(t.role, f) && !allowed.contains(name)) allowed.append(name);
        }
        d["name"] = t.name;
        d["role"] = dc::kRoleNames[static_cast<int>(t.role)];
        d["tiled"] = t.tiled;
        d["stacked"] = t.stacked;
        d["n_slices"] = t.n_slices;
        d["rows"] = t.rows;
        d["cols"] = t.cols;
        d["parts"] = parts;
        d["interleaved"] = t.interleaved;
        d["formats"] = allowed;
        out.append(d);
    }
    return out;
}

}  // namespace

void init_pack(py::module_& m) {
    m.attr("TILE_ROWS") = dc::kTileRows;
    m.attr("TILE_COLS") = dc::kTileCols;
    m.def("formats", &formats, "The weight formats: list of {name, scale, tile_bytes, sum_block_cols, act, dot_tol}.");
    m.def(
        "validate_config", [](const py::dict& cfg) { config_from_dict(cfg); }, "config"_a,
        "Checks a normalised configuration; raises ConfigError naming the key.");
    m.def("expected_tensors", &expected_tensors, "config"_a,
          "The tensors of a packed model in file order: list of {name, role, tiled, stacked, n_slices, rows, cols, "
          "parts, "
          "interleaved, formats}.");
    py::class_<Source>(m, "Source")
        .def(py::init(&make_source), "kind"_a, "data"_a.noconvert(), "cols"_a, "first_row"_a = 0,
             "scale"_a = py::none(), "block"_a = std::pair(1, 32), "scale_dtype"_a = "",
             "Rows of a tensor as the checkpoint stores them, uint8 [rows, row bytes]. kind: f32|bf16|f16|f8|i8|i4; "
             "scale: f32 grid (f8, i8) or uint16 [rows, groups] (i4), one for `block` rows x columns; first_row places "
             "the rows in it.");
    py::class_<Tiles>(m, "Tiles")
        .def(py::init(&make_tiles), "out"_a.noconvert(), "stride"_a, "format"_a, "format_scale"_a,
             "scales"_a = py::none(), "block"_a = std::pair(128, 128),
             "Where row tiles go, `stride` bytes apart, and f8's scales, f32, one for `block` rows x columns.");
    m.def(
        "pack_rows", &pack_rows, "tiles"_a, "source"_a, "index"_a.noconvert(), "transpose"_a = false, "exact"_a = false,
        "lanes"_a = 16,
        "Packs rows of a source. index: int32 source row of each packed row (transpose: of each packed column). exact: "
        "the source's codes are kept. lanes: rows at a time, at most 16, 8 or 4. Returns ((source row, source column) "
        "of the first value that does not fit, or "
        "None, and the number of groups that are too small for a scale of their own).");
    m.def(
        "convert_rows", &convert_rows, "out"_a, "to"_a, "source"_a,
        "Converts source rows to plain f32|bf16|f16 in `out`. Returns ((row, column) of the first value that does not "
        "fit, or None, and the number of groups of 32 columns that become zeros).");
    m.def("unpack_slice", &unpack_slice, "data"_a.noconvert(), "scales"_a, "format"_a, "format_scale"_a, "shape"_a,
          "block"_a = std::pair(128, 128), "slice"_a = 0,
          "One slice of a packed tensor [n_slices, rows, cols] as f32 [rows, cols]; data: uint8, all slices.");
}
