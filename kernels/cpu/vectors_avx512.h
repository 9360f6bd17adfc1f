// The vectors of the SIMD layer (simd.h) on AVX-512 (F BW DQ VL): 16 lanes are one register. Each set with them adds its dots.
#pragma once

// g++ 12 takes the undefined operand of its own unmasked intrinsics for an uninitialised variable (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels/cpu/simd.h"

#include <immintrin.h>

namespace deepcalm {
namespace {

constexpr int kBlockRows = 8, kBlockTiles = 2;    // matmul: register block of many rows, in rows x row tiles
constexpr int kWideTiles = 4;                     // matmul: row tiles at once for fewer rows
constexpr int kScoreVecs = 4, kScoreAccs = 16;    // attention: vectors, and sums, of a block of scores
constexpr int kValueHeads = 16, kValueAccs = 16;  // attention: heads, and sums of 16 dims, of a block of values
constexpr bool kDirectValues = true;              // attention: values convert a cache row for every block of heads

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};

DC_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
DC_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
DC_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
DC_INLINE __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1U << n) - 1); }
DC_INLINE F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
DC_INLINE void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }
DC_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
DC_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
DC_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
DC_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
DC_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DC_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
DC_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
DC_INLINE F select_lt(F a, F b, F x, F y) {
    return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}

DC_INLINE I iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
DC_INLINE I iload(const void* p) { return {_mm512_loadu_si512(p)}; }
DC_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
DC_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
DC_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
DC_INLINE I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
DC_INLINE I imax(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
DC_INLINE I iselect_lt(I a, I b, I x, I y) {
    return {_mm512_mask_mov_epi32(y.v, _mm512_cmplt_epi32_mask(a.v, b.v), x.v)};
}
template <unsigned K> DC_INLINE I shl(I a) { return {_mm512_slli_epi32(a.v, K)}; }
template <unsigned K> DC_INLINE I shr(I a) { return {_mm512_srli_epi32(a.v, K)}; }
DC_INLINE F as_f(I a) { return {_mm512_castsi512_ps(a.v)}; }
DC_INLINE I as_i(F a) { return {_mm512_castps_si512(a.v)}; }
DC_INLINE F to_f(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

DC_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DC_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
DC_INLINE I load_u16(const void* p) { return {_mm512_cvtepu16_epi32(load_256(p))}; }
DC_INLINE I load_i8(const void* p) { return {_mm512_cvtepi8_epi32(load_128(p))}; }
DC_INLINE void store_u16(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v)); }
DC_INLINE void store_i8(void* p, I a) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
DC_INLINE F load_f16(const void* p) { return {_mm512_cvtph_ps(load_256(p))}; }
DC_INLINE void store_f16(void* p, F a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// An f16 in each half of a lane -> f32 of the low and of the high half.
DC_INLINE void f16_pair(I v, F& even, F& odd) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                           30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i h = _mm512_permutexvar_epi16(order, v.v);
    even = {_mm512_cvtph_ps(_mm512_castsi512_si256(h))};
    odd = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1))};
}

DC_INLINE float first(F a) { return _mm512_cvtss_f32(a.v); }
DC_INLINE __m256 halves(F a) { return _mm512_castps512_ps256(a.v); }
DC_INLINE __m256 upper(F a) { return _mm512_extractf32x8_ps(a.v, 1); }
DC_INLINE float sum(F a) {  // lanes i and i + 8, then i + 4, i + 2, i + 1
    const __m256 h = _mm256_add_ps(halves(a), upper(a));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
DC_INLINE int32_t max_lane(I a) { return _mm512_reduce_max_epi32(a.v); }
DC_INLINE int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
DC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
DC_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

DC_INLINE __m512i broadcast_4(const void* x) { return _mm512_set1_epi32(load_32(x)); }
// 16 rows of 8 q4 codes: those of the low and those of the high nibbles, a code a byte.
struct Nibbles {
    struct Unit {
        __m512i lo, hi;
    };
    static DC_INLINE Unit load(const std::byte* p) {
        const __m512i v = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
        return {_mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16(v, 4), low)};
    }
};

}  // namespace
}  // namespace deepcalm
