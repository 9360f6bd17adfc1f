// The byte-level definition of every weight format: f32 -> tiles, existing codes -> tiles, tiles -> f32.
//
// Packing is written once, lane by lane, and compiled three times (baseline, AVX2, AVX-512); without contraction and with
// every sum in a fixed order per lane the three give the same bytes. Reading back (unpack_tiles) is plain and slow.
#include "kernels/kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace deepcalm {

static_assert(std::endian::native == std::endian::little, "packed files are little-endian and mapped as they are");

#define DC_INLINE inline __attribute__((always_inline))

namespace {

constexpr uint32_t kInfBits = 0x7F800000U;

DC_INLINE uint32_t bits_of(float f) { return std::bit_cast<uint32_t>(f); }
DC_INLINE float float_of(uint32_t u) { return std::bit_cast<float>(u); }

// Nearest even integer of x, |x| < 2^22, without a call or an instruction beyond the baseline.
DC_INLINE float round_even(float x) { return (x + 12582912.0F) - 12582912.0F; }

DC_INLINE uint16_t to_bf16(float f) {
    const uint32_t u = bits_of(f);
    const uint32_t rounded = (u + 0x7FFFU + ((u >> 16) & 1U)) >> 16;
    const uint32_t nan = (u >> 16) | 0x40U;
    return static_cast<uint16_t>((u & 0x7FFFFFFFU) > kInfBits ? nan : rounded);
}

DC_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = (h & 0x8000U) << 16, mag = h & 0x7FFFU;
    const uint32_t normal = (mag << 13) + (112U << 23);
    const uint32_t special = (mag << 13) | kInfBits;  // infinity and NaN
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(mag)) * 0x1p-24F);
    return float_of(sign | (mag >= 0x7C00U ? special : mag >= 0x400U ? normal : subnormal));
}

DC_INLINE uint16_t to_f16(float f) {
    const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000U, mag = u & 0x7FFFFFFFU;
    const uint32_t normal =
        (mag + 0xFFFU + ((mag >> 13) & 1U) - (112U << 23)) >> 13;              // carries into infinity by itself
    const uint32_t subnormal = bits_of(float_of(mag) + 0.5F) - bits_of(0.5F);  // the sum rounds at 2^-24
    const uint32_t special = mag > kInfBits ? 0x7E00U : 0x7C00U;
    return static_cast<uint16_t>(sign | (mag >= 0x47800000U ? special : mag >= 0x38800000U ? normal : subnormal));
}

DC_INLINE float from_e4m3(uint8_t b) {
    const uint32_t sign = (b & 0x80U) << 24, mag = b & 0x7FU;
    const uint32_t normal = (mag << 20) + (120U << 23);
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(mag)) * 0x1p-9F);
    return float_of(sign | (mag == 0x7FU ? 0x7FC00000U : mag >= 8U ? normal : subnormal));
}

DC_INLINE uint8_t to_e4m3(float f) {
    const uint32_t u = bits_of(f), sign = (u >> 24) & 0x80U;
    const uint32_t mag = std::min(u & 0x7FFFFFFFU, bits_of(448.0F));
    const uint32_t normal = (mag + 0x7FFFFU + ((mag >> 20) & 1U) - (120U << 23)) >> 20;
    const uint32_t subnormal = bits_of(float_of(mag) + 16384.0F) - bits_of(16384.0F);  // the sum rounds at 2^-9
    const uint32_t code = mag >= bits_of(0x1p-6F) ? normal : subnormal;
    return static_cast<uint8_t>(sign | ((u & 0x7FFFFFFFU) > kInfBits ? 0x7FU : code));
}

// One zero-padded tile of the source, [row][col]; reports the first element that is not finite.
struct Strip {
    float v[kTileRows][kTileCols];
    uint32_t amax[kTileRows];  // bits of max |v| of each row
};

DC_INLINE void load_tile(const PackArgs& a, int row0, int col0, Strip& s) {
    const int n_rows = std::min(kTileRows, a.rows - row0), n_cols = std::min(kTileCols, a.cols - col0);
    const float* src = a.w + row0 * a.w_stride + col0;
    if (n_rows < kTileRows || n_cols < kTileCols) std::memset(s.v, 0, sizeof s.v);
    for (int r = 0; r < n_rows; ++r) {
        std::memcpy(s.v[r], src + r * a.w_stride, sizeof(float) * static_cast<size_t>(n_cols));
    }
    for (int r = 0; r < kTileRows; ++r) {
        uint32_t m = 0;  // integer order of the bits is the order of the magnitudes, NaN above infinity
        for (int c = 0; c < kTileCols; ++c) m = std::max(m, bits_of(s.v[r][c]) & 0x7FFFFFFFU);
        s.amax[r] = m;
    }
}

// Row r of the tile holds something that does not fit: points at its first element of magnitude >= limit.
bool fail(PackArgs& a, const Strip& s, int row0, int col0, int r, uint32_t limit_bits) {
    int c = 0;
    while (c < kTileCols - 1 && (bits_of(s.v[r][c]) & 0x7FFFFFFFU) < limit_bits) ++c;
    a.bad_row = row0 + r;
    a.bad_col = col0 + c;
    return false;
}

// Magnitudes from here on round to infinity.
constexpr uint32_t kOverflowF16 = 0x477FF000U, kOverflowBF16 = 0x7F7F8000U;

DC_INLINE int first_row_at_least(const Strip& s, uint32_t limit_bits) {
    for (int r = 0; r < kTileRows; ++r) {
        if (s.amax[r] >= limit_bits) return r;
    }
    return -1;
}

DC_INLINE void encode_f32(const Strip& s, TileF32& t) {
    for (int c = 0; c < kTileCols; ++c) {
        for (int r = 0; r < kTileRows; ++r) t.v[c][r] = s.v[r][c];
    }
}

template <uint16_t (*kConvert)(float)> DC_INLINE void encode_16(const Strip& s, Tile16& t) {
    for (int r = 0; r < kTileRows; ++r) {
        uint16_t row[kTileCols];
        for (int c = 0; c < kTileCols; ++c) row[c] = kConvert(s.v[r][c]);
        for (int p = 0; p < kTileCols / 2; ++p) std::memcpy(t.v[p][r], row + 2 * p, 4);
    }
}

// Returns the row whose scale does not fit f16, or -1.
DC_INLINE int encode_q8(const Strip& s, TileQ8& t) {
    for (int r = 0; r < kTileRows; ++r) {
        const float amax = float_of(s.amax[r]);
        uint16_t h = to_f16(amax / 127.0F);
        // Where f16 is coarse (subnormal scales) the nearest one may be too small for the largest element: next one up.
        if (h != 0 && amax > 127.5F * from_f16(h)) ++h;
        if (h >= 0x7C00U || (h == 0 && s.amax[r] != 0)) return r;
        t.scale[r] = h;
        const float scale = h == 0 ? 1.0F : from_f16(h);
        uint8_t row[kTileCols];
        for (int c = 0; c < kTileCols; ++c) {
            const float code = std::min(std::max(round_even(s.v[r][c] / scale), -127.0F), 127.0F);
            row[c] = static_cast<uint8_t>(static_cast<int>(code) + 128);
        }
        for (int g = 0; g < kTileCols / 4; ++g) std::memcpy(t.v[g][r], row + 4 * g, 4);
    }
    return -1;
}

// 4-bit search: code of the element of largest magnitude under each candidate scale. Squared error is 1.2 % (Gaussian
// rows) and 0.6 % (Laplacian) above that of 122 candidates; -8 alone would be 7.9 % and 4.9 % above.
constexpr float kQ4Extremes[] = {-8.3F, -7.6F, -6.8F, -9.0F, 7.2F, 6.4F, 7.9F};

// Lanes are rows. For each candidate: codes, least-squares scale rounded to f16, gain = sum w^2 - squared error; the best
// gain wins, ties go to the earlier candidate; final codes are the nearest under the winning scale.
DC_INLINE int encode_q4(const Strip& s, TileQ4& t) {
    float w[kTileCols][kTileRows], extreme[kTileRows];
    for (int c = 0; c < kTileCols; ++c) {
        for (int r = 0; r < kTileRows; ++r) w[c][r] = s.v[r][c];
    }
    for (int r = 0; r < kTileRows; ++r) extreme[r] = 0;
    for (int c = kTileCols - 1; c >= 0; --c) {  // the first element of largest magnitude, with its sign
        for (int r = 0; r < kTileRows; ++r) {
            extreme[r] = (bits_of(w[c][r]) & 0x7FFFFFFFU) == s.amax[r] ? w[c][r] : extreme[r];
        }
    }
    float best[kTileRows], best_gain[kTileRows];
    for (int r = 0; r < kTileRows; ++r) best[r] = 0, best_gain[r] = -1;
    for (const float target : kQ4Extremes) {
        float inv[kTileRows], wq[kTileRows], qq[kTileRows];
        for (int r = 0; r < kTileRows; ++r) {
            inv[r] = extreme[r] == 0 ? 0.0F : target / extreme[r];
            wq[r] = qq[r] = 0;
        }
        for (int c = 0; c < kTileCols; ++c) {
            for (int r = 0; r < kTileRows; ++r) {
                const float q = std::min(std::max(round_even(w[c][r] * inv[r]), -8.0F), 7.0F);
                wq[r] += w[c][r] * q;
                qq[r] += q * q;
            }
        }
        for (int r = 0; r < kTileRows; ++r) {
            const float ls = from_f16(to_f16(wq[r] / std::max(qq[r], 1.0F)));
            const float gain = ls * (2.0F * wq[r] - ls * qq[r]);
            const bool better = gain > best_gain[r];
            best[r] = better ? ls : best[r];
            best_gain[r] = better ? gain : best_gain[r];
        }
    }
    for (int r = 0; r < kTileRows; ++r) {
        t.scale[r] = s.amax[r] == 0 ? uint16_t{0} : to_f16(best[r]);
        if ((t.scale[r] & 0x7FFFU) >= 0x7C00U || ((t.scale[r] & 0x7FFFU) == 0 && s.amax[r] != 0)) return r;
    }
    for (int c = 0; c < kTileCols / 2; ++c) {
        for (int r = 0; r < kTileRows; ++r) {
            const float scale = s.amax[r] == 0 ? 1.0F : best[r];
            const float lo = std::min(std::max(round_even(w[c][r] / scale), -8.0F), 7.0F);
            const float hi = std::min(std::max(round_even(w[c + kTileCols / 2][r] / scale), -8.0F), 7.0F);
            t.v[c / 4][r][c % 4] = static_cast<uint8_t>((static_cast<int>(lo) + 8) | ((static_cast<int>(hi) + 8) << 4));
        }
    }
    return -1;
}

DC_INLINE bool pack_f8(PackArgs& a) {
    const int64_t row_tile_bytes = ceil_div(a.cols, kTileCols) * int64_t{sizeof(TileF8)};
    const int64_t scales_per_row = ceil_div(a.cols, a.scale_cols);
    Strip s;
    for (int br = 0; br < a.rows; br += a.scale_rows) {
        const int row_end = std::min(a.rows, br + a.scale_rows);
        for (int bc = 0; bc < a.cols; bc += a.scale_cols) {
            const int col_end = std::min(a.cols, bc + a.scale_cols);
            uint32_t m = 0;
            for (int r = br; r < row_end; ++r) {
                const float* src = a.w + r * a.w_stride;
                uint32_t row_max = 0;
                for (int c = bc; c < col_end; ++c) row_max = std::max(row_max, bits_of(src[c]) & 0x7FFFFFFFU);
                m = std::max(m, row_max);
            }
            const float scale = float_of(m) / 448.0F;
            a.scales[(br / a.scale_rows) * scales_per_row + bc / a.scale_cols] = scale;
            const bool bad = m >= kInfBits || (m != 0 && bits_of(scale) < 0x00800000U);
            for (int row0 = br; row0 < row_end; row0 += kTileRows) {
                for (int col0 = bc; col0 < col_end; col0 += kTileCols) {
                    load_tile(a, row0, col0, s);
                    if (bad) {
                        const int r = first_row_at_least(s, std::min(m, kInfBits));
                        if (r >= 0) return fail(a, s, row0, col0, r, std::min(m, kInfBits));
                        continue;
                    }
                    auto* t = reinterpret_cast<TileF8*>(a.out + row0 / kTileRows * row_tile_bytes) + col0 / kTileCols;
                    const float div = m == 0 ? 1.0F : scale;
                    for (int r = 0; r < kTileRows; ++r) {
                        uint8_t row[kTileCols];
                        for (int c = 0; c < kTileCols; ++c) row[c] = to_e4m3(s.v[r][c] / div);
                        for (int g = 0; g < kTileCols / 4; ++g) std::memcpy(t->v[g][r], row + 4 * g, 4);
                    }
                }
            }
        }
    }
    return true;
}

DC_INLINE bool pack_any(PackArgs& a) {
    if (a.format == Format::kF8) return pack_f8(a);
    const int tile_bytes = info(a.format).tile_bytes;
    const uint32_t limit = a.format == Format::kF16    ? kOverflowF16
                           : a.format == Format::kBF16 ? kOverflowBF16
                                                       : kInfBits;
    std::byte* out = a.out;
    Strip s;
    for (int row0 = 0; row0 < a.rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < a.cols; col0 += kTileCols, out += tile_bytes) {
            load_tile(a, row0, col0, s);
            int r = first_row_at_least(s, limit);
            if (r >= 0) return fail(a, s, row0, col0, r, limit);
            switch (a.format) {
            case Format::kF32: encode_f32(s, *reinterpret_cast<TileF32*>(out)); break;
            case Format::kBF16: encode_16<to_bf16>(s, *reinterpret_cast<Tile16*>(out)); break;
            case Format::kF16: encode_16<to_f16>(s, *reinterpret_cast<Tile16*>(out)); break;
            case Format::kQ8: r = encode_q8(s, *reinterpret_cast<TileQ8*>(out)); break;
            case Format::kQ4: r = encode_q4(s, *reinterpret_cast<TileQ4*>(out)); break;
            default: r = 0; break;  // f8 is above; q4b tiles only come from existing codes
            }
            if (r >= 0) return fail(a, s, row0, col0, r, s.amax[r]);
        }
    }
    return true;
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) bool pack_avx512(PackArgs& a) {
    return pack_any(a);
}
__attribute__((target("avx2"))) bool pack_avx2(PackArgs& a) { return pack_any(a); }
#endif
bool pack_baseline(PackArgs& a) { return pack_any(a); }

// Value of element (r, c) of one tile; f8 without its scale.
float element(Format format, const std::byte* tile, int r, int c) {
    switch (format) {
    case Format::kF32: return reinterpret_cast<const TileF32*>(tile)->v[c][r];
    case Format::kBF16: return bf16_to_f32(reinterpret_cast<const Tile16*>(tile)->v[c / 2][r][c % 2]);
    case Format::kF16: return f16_to_f32(reinterpret_cast<const Tile16*>(tile)->v[c / 2][r][c % 2]);
    case Format::kF8: return e4m3_to_f32(reinterpret_cast<const TileF8*>(tile)->v[c / 4][r][c % 4]);
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

}  // namespace

float f16_to_f32(uint16_t h) noexcept { return from_f16(h); }
uint16_t f32_to_f16(float f) noexcept { return to_f16(f); }
float bf16_to_f32(uint16_t h) noexcept { return float_of(uint32_t{h} << 16); }
uint16_t f32_to_bf16(float f) noexcept { return to_bf16(f); }
float e4m3_to_f32(uint8_t b) noexcept { return from_e4m3(b); }
uint8_t f32_to_e4m3(float f) noexcept { return to_e4m3(f); }

bool pack_tiles(PackArgs& args) noexcept {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return pack_avx512(args);
    }
    if (__builtin_cpu_supports("avx2")) return pack_avx2(args);
#endif
    return pack_baseline(args);
}

bool pack_f8_codes(const uint8_t* codes, int64_t stride, int rows, int cols, std::byte* out, int* bad_row,
                   int* bad_col) noexcept {
    auto* t = reinterpret_cast<TileF8*>(out);
    for (int row0 = 0; row0 < rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < cols; col0 += kTileCols, ++t) {
            const int n_rows = std::min(kTileRows, rows - row0), n_cols = std::min(kTileCols, cols - col0);
            std::memset(t, 0, sizeof *t);
            for (int r = 0; r < n_rows; ++r) {
                uint8_t row[kTileCols] = {};
                std::memcpy(row, codes + (row0 + r) * stride + col0, static_cast<size_t>(n_cols));
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

bool pack_q4_codes(const uint8_t* nibbles, int64_t stride, const uint16_t* scales, int64_t scale_stride, Format format,
                   int rows, int cols, std::byte* out, int* bad_row, int* bad_col) noexcept {
    const uint16_t inf = format == Format::kQ4 ? 0x7C00 : 0x7F80;  // exponent all ones: infinity or NaN
    auto* t = reinterpret_cast<TileQ4*>(out);
    for (int row0 = 0; row0 < rows; row0 += kTileRows) {
        for (int col0 = 0; col0 < cols; col0 += kTileCols, ++t) {
            const int n_rows = std::min(kTileRows, rows - row0), n_cols = std::min(kTileCols, cols - col0);
            std::memset(t->v, 0x88, sizeof t->v);
            std::memset(t->scale, 0, sizeof t->scale);
            for (int r = 0; r < n_rows; ++r) {
                const uint8_t* src = nibbles + (row0 + r) * stride + col0 / 2;
                const uint16_t scale = scales[(row0 + r) * scale_stride + col0 / kTileCols];
                if ((scale & inf) == inf) {
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

void unpack_tiles(const PackedTensor& w, int slice, float* out, int64_t out_stride) noexcept {
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
            out[row * out_stride + col] = v;
        }
    }
}

}  // namespace deepcalm
