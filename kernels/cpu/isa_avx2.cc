// The kernel table `avx2`: AVX2, FMA and F16C.
#include "kernels/kernels.h"

#include "kernels/cpu/simd_avx2.h"

namespace deepcalm {
namespace {

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

}  // namespace
}  // namespace deepcalm

#include "kernels/cpu/formats.h"

namespace deepcalm {
namespace {
using WeightBF16 = WeightBF16Plain;
using WeightF8 = WeightF8Plain;
using PeakBF16 = NoDot;
using PeakI8 = NoDot;
}  // namespace
}  // namespace deepcalm

#include "kernels/cpu/kernels_impl.h"

namespace deepcalm {
extern const CpuKernels kernels_avx2;
constinit const CpuKernels kernels_avx2 = make_table("avx2", kCpuAvx2);
}  // namespace deepcalm
