// The SIMD layer on AVX-512 F BW DQ VL, without dot instructions.
#pragma once

#include "kernels/cpu/vectors_avx512.h"

namespace deepcalm {
namespace {

constexpr uint32_t kRequired = kCpuAvx2 | kCpuAvx512;

// |w| * (x with w's sign): the 16-bit pair sums of vpmaddubsw stay below 2 * 128 * 127 and never saturate.
struct DotQ8 {
    using Acc = __m512i;
    struct Unit {
        __m512i abs;
        __mmask64 negative;
    };
    static DC_INLINE Acc start(int32_t) { return _mm512_setzero_si512(); }
    static DC_INLINE Unit load(const std::byte* p) {
        const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
        return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
    }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {
        const __m512i b = broadcast_4(x);
        const __m512i signed_x = _mm512_mask_sub_epi8(b, u.negative, _mm512_setzero_si512(), b);
        const __m512i pairs = _mm512_maddubs_epi16(u.abs, signed_x);
        acc = _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
    static DC_INLINE F value(const Acc& acc) { return to_f({acc}); }
};

// Nibbles 0..15: a lane's 16-bit sum of all 8 products is below 8 * 2 * 15 * 127; the offset 8 comes off at the end.
struct DotQ4 : Nibbles {
    struct Acc {
        __m512i pairs;
        int32_t offset;
    };
    static DC_INLINE Acc start(int32_t group_sum) { return {_mm512_setzero_si512(), 8 * group_sum}; }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {
        acc.pairs = _mm512_add_epi16(acc.pairs, _mm512_maddubs_epi16(u.lo, broadcast_4(x)));
        acc.pairs = _mm512_add_epi16(acc.pairs, _mm512_maddubs_epi16(u.hi, broadcast_4(x + 16)));
    }
    static DC_INLINE F value(const Acc& acc) {
        const __m512i dot = _mm512_madd_epi16(acc.pairs, _mm512_set1_epi16(1));
        return to_f({_mm512_sub_epi32(dot, _mm512_set1_epi32(acc.offset))});
    }
};

using DotBF16 = NoDot;
using DotI8 = NoDot;

}  // namespace
}  // namespace deepcalm
