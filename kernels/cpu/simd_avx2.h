// The SIMD layer on AVX2, FMA and F16C: 16 lanes are two registers. The layer is described in simd.h.
#pragma once

#include "kernels/cpu/simd.h"

#include <immintrin.h>

namespace deepcalm {
namespace {

constexpr uint32_t kRequired = kCpuAvx2;

constexpr int kBlockRows = 4, kBlockTiles = 1;  // matmul: register block of many rows, in rows x row tiles
constexpr int kWideTiles = 4;                   // matmul: row tiles at once for fewer rows
constexpr int kScoreVecs = 1, kScoreAccs = 4;   // attention: vectors, and sums, of a block of scores
constexpr int kValueHeads = 2, kValueAccs = 4;  // attention: heads, and sums of 16 dims, of a block of values
constexpr bool kDirectValues = false;           // attention: values convert a cache row for every block of heads

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

DC_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DC_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DC_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
DC_INLINE I lanes_below(int n) {
    const __m256i v = _mm256_set1_epi32(n);
    return {_mm256_cmpgt_epi32(v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(v, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
DC_INLINE F load_n(const float* p, int n) {
    const I m = lanes_below(n);
    return {_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b)};
}
DC_INLINE void store_n(float* p, F x, int n) {
    const I m = lanes_below(n);
    _mm256_maskstore_ps(p, m.a, x.a);
    _mm256_maskstore_ps(p + 8, m.b, x.b);
}
DC_INLINE F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
DC_INLINE F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
DC_INLINE F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
DC_INLINE F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
DC_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
DC_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
DC_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
DC_INLINE F select_lt(F x, F y, F p, F q) {
    return {_mm256_blendv_ps(q.a, p.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(q.b, p.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

DC_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DC_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
DC_INLINE const std::byte* at(const void* p, int bytes) { return static_cast<const std::byte*>(p) + bytes; }
DC_INLINE I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
DC_INLINE I iload(const void* p) { return {load_256(p), load_256(at(p, 32))}; }
DC_INLINE I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
DC_INLINE I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
DC_INLINE I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
DC_INLINE I operator|(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
DC_INLINE I imax(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
DC_INLINE I iselect_lt(I x, I y, I p, I q) {
    return {_mm256_blendv_epi8(q.a, p.a, _mm256_cmpgt_epi32(y.a, x.a)),
            _mm256_blendv_epi8(q.b, p.b, _mm256_cmpgt_epi32(y.b, x.b))};
}
template <int K> DC_INLINE I shl(I x) { return {_mm256_slli_epi32(x.a, K), _mm256_slli_epi32(x.b, K)}; }
template <int K> DC_INLINE I shr(I x) { return {_mm256_srli_epi32(x.a, K), _mm256_srli_epi32(x.b, K)}; }
DC_INLINE F as_f(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
DC_INLINE I as_i(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
DC_INLINE F to_f(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

DC_INLINE I load_u16(const void* p) {
    return {_mm256_cvtepu16_epi32(load_128(p)), _mm256_cvtepu16_epi32(load_128(at(p, 16)))};
}
DC_INLINE I load_i8(const void* p) {
    const __m128i v = load_128(p);
    return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
DC_INLINE __m256i pack_u16(I x) {  // lanes 0..65535
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
DC_INLINE void store_u16(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), pack_u16(x & iset1(0xffff))); }
DC_INLINE void store_i8(void* p, I x) {  // the low bytes, kept from saturating by the masks
    const __m256i v = pack_u16(x & iset1(0xff));
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
DC_INLINE F f16_lanes(__m256i h) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
DC_INLINE F load_f16(const void* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(at(p, 16)))}; }
DC_INLINE void store_f16(void* p, F x) {
    __m128i* to = static_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
// An f16 in each half of a lane -> f32 of the low and of the high half.
DC_INLINE void f16_pair(I v, F& even, F& odd) {
    even = f16_lanes(pack_u16(v & iset1(0xffff)));
    odd = f16_lanes(pack_u16(shr<16>(v)));
}

DC_INLINE float first(F x) { return _mm256_cvtss_f32(x.a); }
DC_INLINE float sum(F x) {  // lanes i and i + 8, then i + 4, i + 2, i + 1
    const __m256 h = _mm256_add_ps(x.a, x.b);
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
DC_INLINE __m128i quarter(__m256i h) { return _mm256_castsi256_si128(h); }
DC_INLINE int32_t max_lane(I x) {
    const __m256i h = _mm256_max_epi32(x.a, x.b);
    __m128i q = _mm_max_epi32(quarter(h), _mm256_extracti128_si256(h, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
DC_INLINE int32_t sum(I x) {
    const __m256i h = _mm256_add_epi32(x.a, x.b);
    __m128i q = _mm_add_epi32(quarter(h), _mm256_extracti128_si256(h, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
DC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
DC_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

DC_INLINE __m256i broadcast_4(const void* x) { return _mm256_set1_epi32(load_32(x)); }

// |w| * (x with w's sign): the 16-bit pair sums of vpmaddubsw stay below 2 * 128 * 127 and never saturate.
struct DotQ8 {
    using Acc = I;
    struct Unit {
        I w, abs;
    };
    static DC_INLINE Acc start(int32_t) { return iset1(0); }
    static DC_INLINE Unit load(const std::byte* p) {
        const I v = iload(p);
        const __m256i flip = _mm256_set1_epi8(-128);
        const I w = {_mm256_xor_si256(v.a, flip), _mm256_xor_si256(v.b, flip)};
        return {w, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}};
    }
    static DC_INLINE __m256i dot(__m256i abs, __m256i w, __m256i x) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(abs, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
    }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {
        const __m256i b = broadcast_4(x);
        acc = acc + I{dot(u.abs.a, u.w.a, b), dot(u.abs.b, u.w.b, b)};
    }
    static DC_INLINE F value(const Acc& acc) { return to_f(acc); }
};

// Nibbles 0..15: a lane's 16-bit sum of all 8 products is below 8 * 2 * 15 * 127; the offset 8 comes off at the end.
struct DotQ4 {
    struct Acc {
        I pairs;
        int32_t offset;
    };
    struct Unit {
        I lo, hi;
    };
    static DC_INLINE Acc start(int32_t group_sum) { return {iset1(0), 8 * group_sum}; }
    static DC_INLINE Unit load(const std::byte* p) {
        const I v = iload(p), low = iset1(0x0f0f0f0f);
        return {v & low, shr<4>(v) & low};
    }
    static DC_INLINE void add(I& pairs, const I& w, __m256i x) {
        pairs.a = _mm256_add_epi16(pairs.a, _mm256_maddubs_epi16(w.a, x));
        pairs.b = _mm256_add_epi16(pairs.b, _mm256_maddubs_epi16(w.b, x));
    }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {
        add(acc.pairs, u.lo, broadcast_4(x));
        add(acc.pairs, u.hi, broadcast_4(x + 16));
    }
    static DC_INLINE F value(const Acc& acc) {
        const __m256i one = _mm256_set1_epi16(1);
        return to_f(I{_mm256_madd_epi16(acc.pairs.a, one), _mm256_madd_epi16(acc.pairs.b, one)} - iset1(acc.offset));
    }
};

using DotBF16 = NoDot;
using DotI8 = NoDot;

}  // namespace
}  // namespace deepcalm
