// The SIMD layer on AVX-512 with VNNI (int8 dot), BF16 (bf16 dot) and VBMI (byte tables for e4m3).
#pragma once

#include "kernels/cpu/vectors_avx512.h"

namespace deepcalm {
namespace {

constexpr uint32_t kRequired = kCpuAvx2 | kCpuAvx512 | kCpuAvx512X;

DC_INLINE __m512 dot_bf16(__m512 acc, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

// vpdpbusd multiplies unsigned weight bytes with signed activations: the stored offset comes off through the group sum.
struct DotQ8 {
    using Acc = __m512i;
    using Unit = __m512i;
    static DC_INLINE Acc start(int32_t group_sum) { return _mm512_set1_epi32(-128 * group_sum); }
    static DC_INLINE Unit load(const std::byte* p) { return _mm512_loadu_si512(p); }
    static DC_INLINE void mac(Acc& acc, Unit w, const int8_t* x) { acc = _mm512_dpbusd_epi32(acc, w, broadcast_4(x)); }
    static DC_INLINE F value(Acc acc) { return to_f({acc}); }
};

struct DotQ4 : Nibbles {
    using Acc = __m512i;
    static DC_INLINE Acc start(int32_t group_sum) { return _mm512_set1_epi32(-8 * group_sum); }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {
        acc = _mm512_dpbusd_epi32(acc, u.lo, broadcast_4(x));
        acc = _mm512_dpbusd_epi32(acc, u.hi, broadcast_4(x + 16));
    }
    static DC_INLINE F value(Acc acc) { return to_f({acc}); }
};

struct DotBF16 {
    using Reg = __m512i;
    static constexpr int64_t kOps = 2 * 32;
    static DC_INLINE Reg step(Reg acc, Reg a) { return _mm512_castps_si512(dot_bf16(_mm512_castsi512_ps(acc), a, a)); }
    static DC_INLINE F dot(F acc, I a, I b) { return {dot_bf16(acc.v, a.v, b.v)}; }
    // even, odd [32] bf16 -> 16 words each: even's in the low halves, odd's in the high ones
    static DC_INLINE void zip(const std::byte* even, const std::byte* odd, float* out, float* more) {
        const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd), half = _mm512_set1_epi16(16);
        const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                               39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, order, b));
        _mm512_storeu_si512(more, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, half), b));
    }
};
struct DotI8 {
    using Reg = __m512i;
    static constexpr int64_t kOps = 2 * 64;
    static DC_INLINE Reg step(Reg acc, Reg a) { return _mm512_dpbusd_epi32(acc, a, a); }
};

template <> struct WeightBF16<DotBF16> {
    using X = uint16_t;
    using Acc = __m512;
    using Unit = __m512i;
    static constexpr int kTileBytes = sizeof(Tile16);
    static constexpr int kCols = 2;
    static constexpr bool kScaled = false;
    static DC_INLINE Acc start() { return _mm512_setzero_ps(); }
    static DC_INLINE Unit load(const std::byte* p) { return _mm512_loadu_si512(p); }
    static DC_INLINE void mac(Acc& acc, Unit w, const X* x) { acc = dot_bf16(acc, w, broadcast_4(x)); }
    static DC_INLINE F value(Acc acc) { return {acc}; }
};

// 256 times a non-negative e4m3 code in bf16, low bytes and high bytes apart. Every value but 0 is a normal bf16: vdpbf16ps
// flushes denormals.
struct E4m3Table {
    alignas(64) uint8_t lo[128], hi[128];
};
constexpr E4m3Table make_e4m3_table() {
    constexpr int kHalves[8] = {0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4020, 0x4040, 0x4060};  // 0, 1/2, 1, ... 7/2
    E4m3Table t = {};
    for (int code = 0; code < 128; ++code) {
        const int normal = ((code >> 3) + 128) << 7 | (code & 7) << 4;
        const int bits = code < 8 ? kHalves[code] : normal;
        t.lo[code] = static_cast<uint8_t>(bits & 255);
        t.hi[code] = static_cast<uint8_t>(bits >> 8);
    }
    return t;
}
constexpr E4m3Table kE4m3 = make_e4m3_table();

// Codes become 256 times their value in bf16: their bits moved by four places beside an exponent of 128, where all of them are
// normal numbers; through the tables where one is not (few are: one in 140 of 64 normally distributed weights).
// Unpacking bytes inside 128-bit lanes gives dwords
//   a: row 4i columns (0, 1), (2, 3), row 4i + 1 columns (0, 1), (2, 3)        b: the same of rows 4i + 2, 4i + 3
// so a lane keeps half of a row's columns, and value() adds the two halves and restores the row order.
template <> struct WeightF8<DotBF16> {
    using X = uint16_t;
    struct Acc {
        __m512 a, b;
    };
    struct Unit {
        __m512i a, b;
    };
    static constexpr int kTileBytes = sizeof(TileF8);
    static constexpr int kCols = 4;
    static constexpr bool kScaled = true;
    static DC_INLINE Acc start() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
    static DC_INLINE __m512i normal(__m512i high_byte) {  // (bits >> 4 & 0x87f0) | 0x4000
        const __m512i kept = _mm512_set1_epi32(static_cast<int32_t>(0x87f087f0)), exponent = _mm512_set1_epi16(0x4000);
        return _mm512_ternarylogic_epi32(_mm512_srai_epi16(high_byte, 4), kept, exponent, 0xEA);
    }
    static DC_INLINE __m512i find(const uint8_t* table, __m512i code) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
    }
    static DC_INLINE Unit load(const std::byte* p) {
        const __m512i code = _mm512_loadu_si512(p), zero = _mm512_setzero_si512();
        // a zero exponent: twice the code is below 16
        if (__builtin_expect(_mm512_cmplt_epu8_mask(_mm512_add_epi8(code, code), _mm512_set1_epi8(16)) == 0, 1))
            return {normal(_mm512_unpacklo_epi8(zero, code)), normal(_mm512_unpackhi_epi8(zero, code))};
        const __m512i lo = find(kE4m3.lo, code), sign = _mm512_set1_epi8(-128);
        const __m512i hi =
            _mm512_ternarylogic_epi32(find(kE4m3.hi, code), code, sign, 0xF8);  // magnitude | (code & sign)
        return {_mm512_unpacklo_epi8(lo, hi), _mm512_unpackhi_epi8(lo, hi)};
    }
    static DC_INLINE void mac(Acc& acc, const Unit& w, const X* x) {
        int64_t v;
        __builtin_memcpy(&v, x, 8);
        const __m512i xv = _mm512_set1_epi64(v);
        acc.a = dot_bf16(acc.a, w.a, xv);
        acc.b = dot_bf16(acc.b, w.b, xv);
    }
    static DC_INLINE F value(const Acc& acc) {
        const __m512 even = _mm512_shuffle_ps(acc.a, acc.b, 0x88), odd = _mm512_shuffle_ps(acc.a, acc.b, 0xdd);
        return {_mm512_mul_ps(_mm512_add_ps(even, odd), _mm512_set1_ps(0x1p-8F))};
    }
};

}  // namespace
}  // namespace deepcalm
