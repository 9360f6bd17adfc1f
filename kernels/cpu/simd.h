// What every SIMD layer starts from, and what it is. simd_NAME.h holds all that the instruction set NAME has of its own:
// F and I, 16 lanes of f32 and i32 (one lane = one row of a weight tile), with
//   F: set1 load store load_n store_n + - * / fma max min select_lt (max, min: the second operand if one is NaN)
//   I: iset1 iload + - & | shl<k> shr<k> imax iselect_lt (signed);  as_f as_i (bits)  to_f (value)
//   load_u16 load_i8 (widening to I)  store_u16 store_i8 (low bits)  load_f16 store_f16 f16_pair
//   first, max_lane of I, sum (a fixed tree), prefetch, prefetch_far (second level)
// and
//   kRequired, CpuFeature bits; register block sizes kBlockRows .. kValueAccs
//   DotQ8, DotQ4: exact integer dots of a tile
//   DotBF16, DotI8: its dot instructions, or NoDot. With a DotBF16 (dot of F and two I of bf16 pairs, zip of two rows into
//   pairs) also the two formats that multiply with it.
// All of it has internal linkage: code compiled for one instruction set must not be merged with another's copy.
#pragma once

#include "kernels/kernels.h"

#define DC_INLINE __attribute__((always_inline)) inline
// for i in 0 .. n-1, unrolled: registers have no indices. (A function of the loop's body gives g++ 12 other code.)
#define DC_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

namespace deepcalm {
namespace {

struct NoDot {};
template <class Dot> struct WeightBF16;
template <class Dot> struct WeightF8;

}  // namespace
}  // namespace deepcalm
