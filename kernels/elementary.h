// exp, log, sin and cos of our own: those of C libraries and of CUDA differ from each other and between versions, and the
// bits of a logit or of a chosen token must not. Double multiplications and additions in one order, none of them fused, round
// to nearest: the same bits from every compiler that leaves them as they are written (-ffp-contract=off, -fmad=false), on
// hosts and on devices (nvcc takes constexpr functions for both).
#pragma once

#include "kernels/format.h"

#include <cstdint>

namespace deepcalm {

namespace elementary {
inline constexpr double kToInteger = 0x1.8p52;  // x + this: the nearest integer, in the low bits; - this: as a number
constexpr uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }
constexpr double value(uint64_t bits) { return __builtin_bit_cast(double, bits); }

// c0 + x (c1 + x (c2 + ...))
constexpr double polynomial(double, double c) { return c; }
template <class... C> constexpr double polynomial(double x, double c, C... more) {
    return polynomial(x, more...) * x + c;
}
inline constexpr double kLn2 = 0x1.62e42fefp-1, kLn2Low = 0x1.473de6af278edp-34;  // 33 bits, the rest
}  // namespace elementary

// e^x, at most 1 ulp off; 0 below -708 (the smallest normal results), infinity above 709, NaN for NaN.
constexpr double exp_f64(double x) {
    using namespace elementary;
    const double shifted = x * 0x1.71547652b82fep+0 + kToInteger, n = shifted - kToInteger;  // x / ln 2
    const double r = (x - n * kLn2) - n * kLn2Low, z = r * r;  // |r| <= ln(2) / 2: Taylor's even terms and odd ones
    const double even = polynomial(z, 1.0 / 2, 1.0 / 24, 1.0 / 720, 1.0 / 40320, 1.0 / 3628800, 1.0 / 479001600);
    const double odd = polynomial(z, 1.0 / 6, 1.0 / 120, 1.0 / 5040, 1.0 / 362880, 1.0 / 39916800, 1.0 / 6227020800);
    const double y = (1 + (r + z * (even + r * odd))) * value((bits(shifted) + 1023) << 52);
    return x < -708 ? 0 : x > 709 ? __builtin_inf() : y;
}

// Natural logarithm, at most 1.1 ulp off; -infinity for 0, NaN below.
constexpr double log_f64(double x) {
    using namespace elementary;
    if (!(x > 0)) return x == 0 ? -__builtin_inf() : __builtin_nan("");
    if (x > 0x1.fffffffffffffp1023) return x;
    const bool subnormal = x < 0x1p-1022;
    const uint64_t u = bits(subnormal ? x * 0x1p54 : x);
    // x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt(2); ln(1 + f) = 2 s + 2/3 s^3 + 2/5 s^5 + ..., and 2 s = f - s f
    const int64_t exponent = static_cast<int64_t>(u - bits(0x1.6a09e667f3bcdp-1)) >> 52;
    const double n = static_cast<double>(exponent - (subnormal ? 54 : 0));
    const double f = value(u - (static_cast<uint64_t>(exponent) << 52)) - 1, s = f / (2 + f), z = s * s;
    const double p =
        z * polynomial(z, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19);
    return n * kLn2 - ((s * (f - p) - n * kLn2Low) - f);
}

struct SinCos {
    float sin, cos;
};
// Of an angle in radians, |angle| <= 2^24: the nearest floats, but for 1 in 10^8.
constexpr SinCos sincos_f32(float angle) {
    using namespace elementary;
    // n quarter turns and r; pi / 2 in two parts of 26 bits, whose multiples are exact, and the rest
    const double x = angle, shifted = x * 0x1.45f306dc9c883p-1 + kToInteger, n = shifted - kToInteger;
    const double r = ((x - n * 0x1.921fb5p+0) - n * 0x1.110b46p-26) - n * 0x1.1a62633145c07p-54, z = r * r;
    const double s =
        r + r * z * polynomial(z, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800);
    const double c = 1 - z * polynomial(z, 1.0 / 2, -1.0 / 24, 1.0 / 720, -1.0 / 40320, 1.0 / 3628800, -1.0 / 479001600,
                                        1.0 / 87178291200);
    const uint64_t q = bits(shifted);
    const double sine = q & 1 ? c : s, cosine = q & 1 ? s : c;
    return {static_cast<float>(q & 2 ? -sine : sine), static_cast<float>((q + 1) & 2 ? -cosine : cosine)};
}

// exp(x) for -87 <= x <= 0 as p 2^n, about 1 ulp off, in f32, of one float or of many lanes. n is in the low bits of n_biased,
// to be shifted to p's exponent. splat(c): a constant in every lane; fma(a, b, c) = a * b + c, which rounds once or twice.
template <class F> struct ExpParts {
    F p, n_biased;
};
template <class F, class Splat, class Fma> DC_SHARED ExpParts<F> exp_parts(F x, Splat splat, Fma fma) {
    const F magic = splat(12582912.0F);  // 1.5 * 2^23: rounds to an integer that stays in the low bits
    const F n_biased = fma(x, splat(1.44269504088896341F), magic), n = n_biased - magic;
    const F r = fma(n, splat(2.12194440e-4F), fma(n, splat(-0.693359375F), x));  // ln 2 in two parts
    F p = splat(1.9875691500e-4F);                                               // Cephes expf
    p = fma(p, r, splat(1.3981999507e-3F));
    p = fma(p, r, splat(8.3334519073e-3F));
    p = fma(p, r, splat(4.1665795894e-2F));
    p = fma(p, r, splat(1.6666665459e-1F));
    p = fma(p, r, splat(5.0000001201e-1F));
    return {fma(p, r * r, r) + splat(1.0F), n_biased};
}
// Of one float <= 0; 0 below -87 (the smallest normal results); NaN stays NaN.
template <class Fma> DC_SHARED float exp_neg(float x, Fma fma) {
    if (x < -87.0F) return 0.0F;
    const auto [p, n_biased] = exp_parts(x, [](float c) { return c; }, fma);
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, p) + (__builtin_bit_cast(uint32_t, n_biased) << 23));
}

// Nearest even bf16, in the low half; NaN stays NaN.
DC_CONSTEXPR uint32_t bf16_bits(float f) {
    const uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffffU) > 0x7f800000U) return (u >> 16) | 0x40U;
    return (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
}
DC_CONSTEXPR float bf16_value(uint32_t h) { return __builtin_bit_cast(float, h << 16); }

}  // namespace deepcalm
