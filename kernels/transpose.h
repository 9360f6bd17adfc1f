// 16 x 16 floats in 16 vectors, transposed without going through memory.
#pragma once

#include <utility>

namespace deepcalm {
namespace {

using Vector16 = float __attribute__((vector_size(64)));

template <int kStep, int... kLane>
__attribute__((always_inline)) inline void swap_blocks(Vector16& a, Vector16& b, std::integer_sequence<int, kLane...>) {
    const Vector16 lo = __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + 16 : kLane)...);
    b = __builtin_shufflevector(a, b, (kLane & kStep ? kLane + 16 : kLane + kStep)...);
    a = lo;
}
template <int kStep> __attribute__((always_inline)) inline void transpose_step(Vector16* v) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        if ((i & kStep) == 0) swap_blocks<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, 16>());
}
// v[i][j] and v[j][i] change places.
__attribute__((always_inline)) inline void transpose(Vector16* v) {
    transpose_step<8>(v);
    transpose_step<4>(v);
    transpose_step<2>(v);
    transpose_step<1>(v);
}

}  // namespace
}  // namespace deepcalm
