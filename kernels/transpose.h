// As many vectors as they have lanes, transposed without going through memory.
#pragma once

#include <utility>

namespace deepcalm {
namespace {

using Vector16 = float __attribute__((vector_size(64)));

template <int kStep, class V, int... kLane>
__attribute__((always_inline)) inline void swap_blocks(V& a, V& b, std::integer_sequence<int, kLane...>) {
    constexpr int kLanes = sizeof...(kLane);
    const V lo = __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kLanes : kLane)...);
    b = __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kLanes : kLane + kStep)...);
    a = lo;
}
// v[i][j] and v[j][i] change places; V: floats.
template <class V, int kStep = sizeof(V) / 8> __attribute__((always_inline)) inline void transpose(V* v) {
    constexpr int kLanes = sizeof(V) / 4;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if ((i & kStep) == 0) swap_blocks<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes>());
    if constexpr (kStep > 1) transpose<V, kStep / 2>(v);
}

}  // namespace
}  // namespace deepcalm
