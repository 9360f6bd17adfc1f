// The byte-level definition of every weight format: f32 -> tiles, existing codes -> tiles, tiles -> f32.
//
// Packing is written once on vectors of kLanes rows of a tile, and compiled for 4 (baseline), 8 (AVX2) and 16 (AVX-512),
// as many as the processor has: wider ones compilers take apart, and compute choices lane by lane. Without contraction
// and without sums across lanes the three give the same bytes. Reading back is plain and slow.
#include "kernels/elementary.h"
#include "kernels/kernels.h"
#include "kernels/transpose.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace deepcalm {

static_assert(std::endian::native == std::endian::little, "packed files are little-endian and mapped as they are");

// Vectors never cross a function boundary here: everything that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#define DC_INLINE inline __attribute__((always_inline))

namespace {

// One lane per row. Operators are elementwise. (g++ drops the attribute of a `using`.)
template <int kLanes> struct Lanes {
    typedef float Floats __attribute__((vector_size(4 * kLanes)));
    typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
    typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
};
template <int kLanes> using Floats = typename Lanes<kLanes>::Floats;
template <int kLanes> using Bits = typename Lanes<kLanes>::Bits;
template <int kLanes> using Ints = typename Lanes<kLanes>::Ints;

constexpr uint32_t kInfBits = 0x7F800000U, kOneF32 = 0x3F800000U;
constexpr uint32_t kOverflowF16 = 0x477FF000U, kOverflowBF16 = 0x7F7F8000U;  // from here on, rounds to infinity
constexpr uint32_t kZeroF16 = 0x33000000U, kZeroBF16 = 0x8000U;              // 2^-25, 2^-134: up to here, to zero
constexpr uint32_t kZeroF8 = 0x2000U;  // 2^-136: up to here, to zero under the smallest scale that f8 is given
constexpr float kMinScaleF16 = 0x1p-24F, kMinScaleF8 = 0x1p-126F;

template <class U> DC_INLINE U bits_of(const auto& f) { return std::bit_cast<U>(f); }
DC_INLINE float to_float(uint32_t n) { return static_cast<float>(static_cast<int32_t>(n)); }
template <class U> DC_INLINE auto to_float(const U& n) {
    constexpr int kLanes = sizeof(U) / 4;
    return __builtin_convertvector(std::bit_cast<Ints<kLanes>>(n), Floats<kLanes>);
}

// Nearest even integer of x, |x| < 2^22, without a call or an instruction beyond the baseline.
template <class F> DC_INLINE F round_even(const F& x) { return (x + 12582912.0F) - 12582912.0F; }
template <class F> DC_INLINE F clamp(const F& x, float lo, float hi) {
    const F low = x < lo ? F{} + lo : x;
    return low > hi ? F{} + hi : low;
}

// The conversions, for one float (F = float, U = uint32_t) or for a vector. Finite input only where it says so.
template <class F, class U> DC_INLINE U to_bf16(const F& f) {  // finite
    const U u = bits_of<U>(f);
    return (u + 0x7FFFU + ((u >> 16) & 1U)) >> 16;
}

template <class F, class U> DC_INLINE U to_f16(const F& f) {  // finite; overflow gives infinity
    const U u = bits_of<U>(f), sign = (u >> 16) & 0x8000U, mag = u & 0x7FFFFFFFU;
    const U normal = (mag + 0xFFFU + ((mag >> 13) & 1U) - (112U << 23)) >> 13;  // carries into infinity by itself
    const U subnormal = bits_of<U>(bits_of<F>(mag) + 0.5F) - bits_of<uint32_t>(0.5F);  // the sum rounds at 2^-24
    const U infinity = U{} + 0x7C00U;
    return sign | (mag >= 0x47800000U ? infinity : mag >= 0x38800000U ? normal : subnormal);
}

template <class F, class U> DC_INLINE F from_f16(const U& h) {
    const U sign = (h & 0x8000U) << 16, mag = h & 0x7FFFU;
    const U normal = (mag << 13) + (112U << 23), special = (mag << 13) | kInfBits;  // special: infinity and NaN
    const U subnormal = bits_of<U>(to_float(mag) * 0x1p-24F);
    return bits_of<F>(sign | (mag >= 0x7C00U ? special : mag >= 0x400U ? normal : subnormal));
}

template <class F, class U> DC_INLINE U to_e4m3(const F& f) {  // not NaN; saturates at 448
    const U u = bits_of<U>(f), sign = (u >> 24) & 0x80U, limit = U{} + bits_of<uint32_t>(448.0F);
    const U raw = u & 0x7FFFFFFFU, mag = raw > limit ? limit : raw;
    const U normal = (mag + 0x7FFFFU + ((mag >> 20) & 1U) - (120U << 23)) >> 20;
    const U subnormal = bits_of<U>(bits_of<F>(mag) + 16384.0F) - bits_of<uint32_t>(16384.0F);  // rounds at 2^-9
    return sign | (mag >= bits_of<uint32_t>(0x1p-6F) ? normal : subnormal);
}

// kLanes zero-padded rows of a tile of the source, by columns.
template <int kLanes> struct Rows {
    Floats<kLanes> v[kTileCols];
    Bits<kLanes> amax;  // bits of max |v| of each row: their order is that of the magnitudes, NaN above infinity
};

template <int kLanes> DC_INLINE void load_rows(const PackArgs& a, int row0, int col0, Rows<kLanes>& t) {
    const int n_rows = std::min(kLanes, a.rows - row0), n_cols = std::min(kTileCols, a.cols - col0);
    const View<const float> src = a.w.from(row0).columns(col0);
    const bool whole = n_rows == kLanes && n_cols == kTileCols;
    for (int r = 0; r < kLanes; ++r) {
        float line[kTileCols] = {};
        if (!whole && r < n_rows) std::memcpy(line, src.row(r), sizeof(float) * static_cast<size_t>(n_cols));
        const float* from = whole ? src.row(r) : line;
        for (int c = 0; c < kTileCols; c += kLanes) std::memcpy(&t.v[c + r], from + c, sizeof t.v[0]);
    }
    for (int c = 0; c < kTileCols; c += kLanes) transpose(t.v + c);
    t.amax = Bits<kLanes>{};
    for (int c = 0; c < kTileCols; ++c) {
        const Bits<kLanes> m = bits_of<Bits<kLanes>>(t.v[c]) & 0x7FFFFFFFU;
        t.amax = m > t.amax ? m : t.amax;
    }
}

// The first row where `lanes` is not zero, or -1.
template <class I> DC_INLINE int first_row(const I& lanes) {
    for (int r = 0; r < static_cast<int>(sizeof lanes / 4); ++r) {
        if (lanes[r] != 0) return r;
    }
    return -1;
}

// Row r of the tile holds something that does not fit: points at its first element of magnitude >= limit.
bool fail(PackArgs& a, int row0, int col0, int r, uint32_t limit) {
    a.bad_row = row0 + r;
    a.bad_col = col0;
    const float* w = a.w.row(a.bad_row);
    while (a.bad_col + 1 < a.cols && (bits_of<uint32_t>(w[a.bad_col]) & 0x7FFFFFFFU) < limit) ++a.bad_col;
    return false;
}

// Four codes 0..255 of each row -> the 32-bit lanes of a tile.
template <class U> DC_INLINE void store_codes(const U* code, uint8_t (*out)[4]) {
    const U lanes = code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24;
    std::memcpy(out, &lanes, sizeof lanes);
}

template <class U> DC_INLINE void store_scales(const U& h, uint16_t* out) {
    for (size_t r = 0; r < sizeof h / 4; ++r) out[r] = static_cast<uint16_t>(h[r]);
}

// Of a tile, the rows from `row` on; adds to `near_zero` [kLanes].
template <int kLanes> DC_INLINE void encode_f32(const Rows<kLanes>& s, TileF32& t, int row) {
    for (int c = 0; c < kTileCols; ++c) std::memcpy(&t.v[c][row], &s.v[c], sizeof s.v[c]);
}

template <Format kFormat, int kLanes>
DC_INLINE void encode_16(const Rows<kLanes>& s, Tile16& t, int row, Ints<kLanes>& near_zero) {
    using F = Floats<kLanes>;
    using U = Bits<kLanes>;
    constexpr auto convert = kFormat == Format::kBF16 ? to_bf16<F, U> : to_f16<F, U>;
    near_zero -= (s.amax != 0U) & (s.amax <= (kFormat == Format::kBF16 ? kZeroBF16 : kZeroF16));
    for (int c = 0; c < kTileCols; c += 2) {
        const U pair = convert(s.v[c]) | convert(s.v[c + 1]) << 16;
        std::memcpy(t.v[c / 2][row], &pair, sizeof pair);
    }
}

// Returns the first of its rows whose scale does not fit f16, or -1.
template <int kLanes> DC_INLINE int encode_q8(const Rows<kLanes>& s, TileQ8& t, int row, Ints<kLanes>& near_zero) {
    using F = Floats<kLanes>;
    using U = Bits<kLanes>;
    const F amax = bits_of<F>(s.amax);
    U h = to_f16<F, U>(amax / 127.0F);
    near_zero -= (h == 0U) & (s.amax != 0U);
    // Where f16 is coarse (subnormal scales) the nearest one may be too small for the largest element: next one up.
    const F nearest = from_f16<F, U>(h);
    h = (amax > 127.5F * nearest) ? h + 1U : h;
    h = (s.amax <= kZeroF16) ? U{} : h;  // all codes would be 0
    const int bad = first_row(h >= 0x7C00U);
    if (bad >= 0) return bad;
    store_scales(h, t.scale + row);
    const F scale = h == 0U ? F{} + 1.0F : from_f16<F, U>(h);
    for (int c = 0; c < kTileCols; c += 4) {
        U code[4];
        for (int i = 0; i < 4; ++i) {
            const F q = clamp(round_even(s.v[c + i] / scale), -127.0F, 127.0F) + 128.0F;
            code[i] = std::bit_cast<U>(__builtin_convertvector(q, Ints<kLanes>));
        }
        store_codes(code, t.v[c / 4] + row);
    }
    return -1;
}

// 4-bit search: code of the element of largest magnitude under each candidate scale. Squared error is 1.2 % (Gaussian
// rows) and 0.6 % (Laplacian) above that of 122 candidates; -8 alone would be 7.9 % and 4.9 % above.
constexpr float kQ4Extremes[] = {-8.3F, -7.6F, -6.8F, -9.0F, 7.2F, 6.4F, 7.9F};

// For each candidate: codes, least-squares scale rounded to f16, gain = sum w^2 - squared error; the best gain wins, ties
// go to the earlier candidate; final codes are the nearest under the winning scale.
template <int kLanes> DC_INLINE int encode_q4(const Rows<kLanes>& s, TileQ4& t, int row, Ints<kLanes>& near_zero) {
    using F = Floats<kLanes>;
    using U = Bits<kLanes>;
    F extreme{}, best{}, best_gain = F{} - 1.0F;
    for (int c = kTileCols - 1; c >= 0; --c) {  // the first element of largest magnitude, with its sign
        extreme = (bits_of<U>(s.v[c]) & 0x7FFFFFFFU) == s.amax ? s.v[c] : extreme;
    }
    const F safe = s.amax <= kZeroF16 ? F{} + 1.0F : extreme;  // 1: all codes and scales become 0
    for (const float target : kQ4Extremes) {
        const F inverse = target / safe;
        F wq{}, qq{};
        for (int c = 0; c < kTileCols; ++c) {
            const F q = clamp(round_even(s.v[c] * inverse), -8.0F, 7.0F);
            wq += s.v[c] * q;
            qq += q * q;
        }
        const F scale = from_f16<F, U>(to_f16<F, U>(wq / (qq < 1.0F ? F{} + 1.0F : qq)));
        const F gain = scale * (2.0F * wq - scale * qq);
        best = gain > best_gain ? scale : best;
        best_gain = gain > best_gain ? gain : best_gain;
    }
    const Ints<kLanes> small =
        (best == 0.0F) & (s.amax != 0U) & (s.amax < kOneF32);  // all scales became 0, none infinity
    near_zero -= small;
    best = (small & (s.amax > kZeroF16)) ? F{} + kMinScaleF16 : best;
    const U h = to_f16<F, U>(best);
    const int bad = first_row(((h & 0x7FFFU) >= 0x7C00U) | ((best == 0.0F) & (s.amax > kZeroF16)));
    if (bad >= 0) return bad;
    store_scales(h, t.scale + row);
    const F scale = best == 0.0F ? F{} + 1.0F : best;
    for (int c = 0; c < kTileCols / 2; c += 4) {
        U code[4];
        for (int i = 0; i < 4; ++i) {
            const F lo = clamp(round_even(s.v[c + i] / scale), -8.0F, 7.0F) + 8.0F;
            const F hi = clamp(round_even(s.v[c + i + kTileCols / 2] / scale), -8.0F, 7.0F) + 8.0F;
            code[i] = std::bit_cast<U>(__builtin_convertvector(lo + 16.0F * hi, Ints<kLanes>));
        }
        store_codes(code, t.v[c / 4] + row);
    }
    return -1;
}

template <int kLanes> DC_INLINE bool pack_f8(PackArgs& a) {
    const int64_t row_tile_bytes = ceil_div(a.cols, kTileCols) * int64_t{sizeof(TileF8)};
    const int64_t scales_per_row = ceil_div(a.cols, a.scale_cols);
    using U = Bits<kLanes>;
    Rows<kLanes> s;
    for (int br = 0; br < a.rows; br += a.scale_rows) {
        const int row_end = std::min(a.rows, br + a.scale_rows);
        for (int bc = 0; bc < a.cols; bc += a.scale_cols) {
            const int col_end = std::min(a.cols, bc + a.scale_cols);
            uint32_t amax = 0;
            int largest = br;  // a row that has it
            for (int r = br; r < row_end; ++r) {
                const float* src = a.w.row(r);
                uint32_t row_max = 0;
                for (int c = bc; c < col_end; ++c) row_max = std::max(row_max, bits_of<uint32_t>(src[c]) & 0x7FFFFFFFU);
                largest = row_max > amax ? r : largest;
                amax = std::max(amax, row_max);
            }
            if (amax >= kInfBits) return fail(a, largest, bc, 0, kInfBits);
            const float nearest = bits_of<float>(amax) / 448.0F;
            const float scale = amax <= kZeroF8 ? 0.0F : std::max(nearest, kMinScaleF8);
            a.near_zero += amax != 0 && nearest < kMinScaleF8;
            a.scales[(br / a.scale_rows) * scales_per_row + bc / a.scale_cols] = scale;
            const float divisor = scale == 0.0F ? 1.0F : scale;
            for (int row0 = br; row0 < ceil_div(row_end, kTileRows) * kTileRows; row0 += kLanes) {
                auto* t = reinterpret_cast<TileF8*>(a.out + row0 / kTileRows * row_tile_bytes) + bc / kTileCols;
                for (int col0 = bc; col0 < col_end; col0 += kTileCols, ++t) {
                    load_rows(a, row0, col0, s);
                    for (int c = 0; c < kTileCols; c += 4) {
                        U code[4];
                        for (int i = 0; i < 4; ++i) code[i] = to_e4m3<Floats<kLanes>, U>(s.v[c + i] / divisor);
                        store_codes(code, t->v[c / 4] + row0 % kTileRows);
                    }
                }
            }
        }
    }
    return true;
}

template <int kLanes> DC_INLINE bool pack_any(PackArgs& a) {
    if (a.format == Format::kF8) return pack_f8<kLanes>(a);
    const int tile_bytes = info(a.format).tile_bytes;
    const uint32_t limit = a.format == Format::kF16    ? kOverflowF16
                           : a.format == Format::kBF16 ? kOverflowBF16
                                                       : kInfBits;
    std::byte* out = a.out;
    Rows<kLanes> s;
    Ints<kLanes> near_zero{};
    for (int row0 = 0; row0 < a.rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < a.cols; col0 += kTileCols, out += tile_bytes) {
            for (int row = 0; row < kTileRows; row += kLanes) {
                load_rows(a, row0 + row, col0, s);
                int r = first_row(s.amax >= limit);
                if (r >= 0) return fail(a, row0 + row, col0, r, limit);
                switch (a.format) {
                case Format::kF32: encode_f32(s, *reinterpret_cast<TileF32*>(out), row); break;
                case Format::kBF16: encode_16<Format::kBF16>(s, *reinterpret_cast<Tile16*>(out), row, near_zero); break;
                case Format::kF16: encode_16<Format::kF16>(s, *reinterpret_cast<Tile16*>(out), row, near_zero); break;
                case Format::kQ8: r = encode_q8(s, *reinterpret_cast<TileQ8*>(out), row, near_zero); break;
                case Format::kQ4: r = encode_q4(s, *reinterpret_cast<TileQ4*>(out), row, near_zero); break;
                default: r = 0; break;  // f8 is above; q4b tiles only come from existing codes
                }
                if (r >= 0) return fail(a, row0 + row, col0, r, s.amax[r]);
            }
        }
    }
    for (int r = 0; r < kLanes; ++r) a.near_zero += near_zero[r];
    return true;
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) bool pack_avx512(PackArgs& a) { return pack_any<16>(a); }
__attribute__((target("avx2"))) bool pack_avx2(PackArgs& a) { return pack_any<8>(a); }
#endif
bool pack_baseline(PackArgs& a) { return pack_any<4>(a); }

// e4m3 as every kernel reads it: NaN codes, 0x7F and 0xFF, which the packer refuses, count on to 480.
float e4m3_value(uint8_t b) {
    const uint32_t sign = (b & 0x80U) << 24, mag = b & 0x7FU;
    return bits_of<float>(sign | (mag >= 8U ? (mag << 20) + (120U << 23) : bits_of<uint32_t>(to_float(mag) * 0x1p-9F)));
}

// Value of element (r, c) of one tile; f8 without its scale.
float element(Format format, const std::byte* tile, int r, int c) {
    switch (format) {
    case Format::kF32: return reinterpret_cast<const TileF32*>(tile)->v[c][r];
    case Format::kBF16: return bf16_to_f32(reinterpret_cast<const Tile16*>(tile)->v[c / 2][r][c % 2]);
    case Format::kF16: return f16_to_f32(reinterpret_cast<const Tile16*>(tile)->v[c / 2][r][c % 2]);
    case Format::kF8: return e4m3_value(reinterpret_cast<const TileF8*>(tile)->v[c / 4][r][c % 4]);
    case Format::kQ8: {
        const auto& t = *reinterpret_cast<const TileQ8*>(tile);
        return static_cast<float>(t.v[c / 4][r][c % 4] - 128) * f16_to_f32(t.scale[r]);
    }
    case Format::kQ4:
    case Format::kQ4B: {
        const auto& t = *reinterpret_cast<const TileQ4*>(tile);
        const int byte = t.v[c % 16 / 4][r][c % 4];
        const float scale = format == Format::kQ4 ? f16_to_f32(t.scale[r]) : bf16_to_f32(t.scale[r]);
        return static_cast<float>((c < 16 ? byte & 15 : byte >> 4) - 8) * scale;
    }
    }
    return 0;
}

bool is_nan(float f) { return (bits_of<uint32_t>(f) & 0x7FFFFFFFU) > kInfBits; }
}  // namespace

float f16_to_f32(uint16_t h) noexcept { return from_f16<float, uint32_t>(h); }
uint16_t f32_to_f16(float f) noexcept {
    return static_cast<uint16_t>(is_nan(f) ? 0x7E00U | (std::signbit(f) ? 0x8000U : 0U) : to_f16<float, uint32_t>(f));
}
float bf16_to_f32(uint16_t h) noexcept { return bf16_value(h); }
uint16_t f32_to_bf16(float f) noexcept { return static_cast<uint16_t>(bf16_bits(f)); }
float e4m3_to_f32(uint8_t b) noexcept {
    return (b & 0x7FU) == 0x7FU ? bits_of<float>((b & 0x80U) << 24 | 0x7FC00000U) : e4m3_value(b);
}
uint8_t f32_to_e4m3(float f) noexcept { return static_cast<uint8_t>(is_nan(f) ? 0x7FU : to_e4m3<float, uint32_t>(f)); }

bool pack_tiles(PackArgs& args) noexcept {
#if defined(__x86_64__) && defined(__GNUC__)
    if (args.lanes >= 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return pack_avx512(args);
    }
    if (args.lanes >= 8 && __builtin_cpu_supports("avx2")) return pack_avx2(args);
#endif
    return pack_baseline(args);
}

bool pack_f8_codes(View<const uint8_t> codes, int rows, int cols, std::byte* out, int* bad_row, int* bad_col) noexcept {
    auto* t = reinterpret_cast<TileF8*>(out);
    for (int row0 = 0; row0 < rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < cols; col0 += kTileCols, ++t) {
            const int n_rows = std::min(kTileRows, rows - row0), n_cols = std::min(kTileCols, cols - col0);
            std::memset(t, 0, sizeof *t);
            for (int r = 0; r < n_rows; ++r) {
                uint8_t row[kTileCols] = {};
                std::memcpy(row, codes.row(row0 + r) + col0, static_cast<size_t>(n_cols));
                int nan = 0;
                for (const uint8_t b : row) nan |= (b & 0x7F) == 0x7F;
                if (nan) {
                    *bad_row = row0 + r;
                    *bad_col = col0;
                    while ((row[*bad_col - col0] & 0x7F) != 0x7F) ++*bad_col;
                    return false;
                }
                for (int g = 0; g < kTileCols / 4; ++g) std::memcpy(t->v[g][r], row + 4 * g, 4);
            }
        }
    }
    return true;
}

void keep_q8_codes(View<const uint8_t> codes, View<const float> scales, int rows, int cols, std::byte* out) noexcept {
    auto* t = reinterpret_cast<TileQ8*>(out);
    for (int row0 = 0; row0 < rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < cols; col0 += kTileCols, ++t) {
            for (int r = 0; r < std::min(kTileRows, rows - row0); ++r) {
                const float scale = scales.row(row0 + r)[col0 / kTileCols];
                const uint16_t h = f32_to_f16(scale);
                if (f16_to_f32(h) != scale) continue;
                t->scale[r] = h;
                const uint8_t* src = codes.row(row0 + r) + col0;
                for (int c = 0; c < std::min(kTileCols, cols - col0); ++c) t->v[c / 4][r][c % 4] = src[c] ^ 0x80U;
            }
        }
    }
}

bool pack_q4_codes(View<const uint8_t> nibbles, View<const uint16_t> scales, Format format, int rows, int cols,
                   std::byte* out, int* bad_row, int* bad_col) noexcept {
    const uint16_t limit = format == Format::kQ4 ? 0x7C00 : 0x7E00;  // infinity, NaN; bf16: 2^125, 8 times it is
    auto* t = reinterpret_cast<TileQ4*>(out);
    for (int row0 = 0; row0 < rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < cols; col0 += kTileCols, ++t) {
            const int n_rows = std::min(kTileRows, rows - row0), n_cols = std::min(kTileCols, cols - col0);
            std::memset(t->v, 0x88, sizeof t->v);
            std::memset(t->scale, 0, sizeof t->scale);
            for (int r = 0; r < n_rows; ++r) {
                const uint8_t* src = nibbles.row(row0 + r) + col0 / 2;
                const uint16_t scale = scales.row(row0 + r)[col0 / kTileCols];
                if ((scale & 0x7FFF) >= limit) {
                    *bad_row = row0 + r;
                    *bad_col = col0;
                    return false;
                }
                t->scale[r] = scale;
                for (int c = 0; c < kTileCols / 2; ++c) {
                    const int lo = c < n_cols ? src[c / 2] >> (4 * (c % 2)) & 15 : 8;
                    const int hi = c + 16 < n_cols ? src[(c + 16) / 2] >> (4 * (c % 2)) & 15 : 8;
                    t->v[c / 4][r][c % 4] = static_cast<uint8_t>(lo | hi << 4);
                }
            }
        }
    }
    return true;
}

void unpack_tiles(const PackedTensor& w, int slice, View<float> out) noexcept {
    const int tile_bytes = info(w.format).tile_bytes;
    const std::byte* data = w.data + slice * w.slice_bytes();
    const int64_t scales_per_row = ceil_div(w.cols, w.scale_cols);
    for (int row = 0; row < w.rows; ++row) {
        for (int col = 0; col < w.cols; ++col) {
            const std::byte* tile = data + row / kTileRows * w.row_tile_bytes() + int64_t{col / kTileCols} * tile_bytes;
            float v = element(w.format, tile, row % kTileRows, col % kTileCols);
            if (w.format == Format::kF8) {
                v *= w.scales[slice * w.slice_scales() + row / w.scale_rows * scales_per_row + col / w.scale_cols];
            }
            out.row(row)[col] = v;
        }
    }
}

}  // namespace deepcalm
