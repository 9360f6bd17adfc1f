// The SIMD layer on no particular processor: 16 lanes as four GNU vectors of four, which every compiler target has.
// A multiply-add rounds twice here (a baseline x86 has no fused one and libm's takes 20 times as long), so `scalar`
// gives the same bits on every machine. The layer is described in simd.h.
#pragma once

#include "kernels/cpu/simd.h"

namespace deepcalm {
namespace {

constexpr uint32_t kRequired = 0;  // CpuFeature bits

constexpr int kBlockRows = 2, kBlockTiles = 1;  // matmul: register block of many rows, in rows x row tiles
constexpr int kWideTiles = 1;                   // matmul: row tiles at once for fewer rows
constexpr int kScoreVecs = 1, kScoreAccs = 2;   // attention: vectors, and sums, of a block of scores
constexpr int kValueHeads = 1, kValueAccs = 2;  // attention: heads, and sums of 16 dims, of a block of values
constexpr bool kDirectValues = false;           // attention: values convert a cache row for every block of heads

typedef float V4f __attribute__((vector_size(16)));
typedef int32_t V4i __attribute__((vector_size(16)));
typedef uint32_t V4u __attribute__((vector_size(16)));
struct F {
    V4f v[4];
};
struct I {
    V4i v[4];
};

template <class Op> DC_INLINE F each_f(Op op) { return {{op(0), op(1), op(2), op(3)}}; }
template <class Op> DC_INLINE I each_i(Op op) { return {{op(0), op(1), op(2), op(3)}}; }

DC_INLINE F set1(float x) {
    const V4f v = {x, x, x, x};
    return {{v, v, v, v}};
}
DC_INLINE F load(const float* p) {
    F r;
    __builtin_memcpy(&r, p, 64);
    return r;
}
DC_INLINE void store(float* p, F a) { __builtin_memcpy(p, &a, 64); }
DC_INLINE F load_n(const float* p, int n) {
    float t[16] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
DC_INLINE void store_n(float* p, F a, int n) {
    float t[16];
    store(t, a);
    for (int i = 0; i < n; ++i) p[i] = t[i];
}
DC_INLINE F operator+(F a, F b) {
    return each_f([&](int i) { return a.v[i] + b.v[i]; });
}
DC_INLINE F operator-(F a, F b) {
    return each_f([&](int i) { return a.v[i] - b.v[i]; });
}
DC_INLINE F operator*(F a, F b) {
    return each_f([&](int i) { return a.v[i] * b.v[i]; });
}
DC_INLINE F operator/(F a, F b) {
    return each_f([&](int i) { return a.v[i] / b.v[i]; });
}
DC_INLINE F fma(F a, F b, F c) { return a * b + c; }
DC_INLINE F max(F a, F b) {
    return each_f([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DC_INLINE F min(F a, F b) {
    return each_f([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
DC_INLINE F select_lt(F a, F b, F x, F y) {
    return each_f([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}

DC_INLINE I iset1(int32_t x) {
    const V4i v = {x, x, x, x};
    return {{v, v, v, v}};
}
DC_INLINE I iload(const void* p) {
    I r;
    __builtin_memcpy(&r, p, 64);
    return r;
}
DC_INLINE V4u wrapping(V4i a) { return reinterpret_cast<V4u>(a); }  // sums of bit patterns may overflow
DC_INLINE I operator+(I a, I b) {
    return each_i([&](int i) { return reinterpret_cast<V4i>(wrapping(a.v[i]) + wrapping(b.v[i])); });
}
DC_INLINE I operator-(I a, I b) {
    return each_i([&](int i) { return reinterpret_cast<V4i>(wrapping(a.v[i]) - wrapping(b.v[i])); });
}
DC_INLINE I operator&(I a, I b) {
    return each_i([&](int i) { return a.v[i] & b.v[i]; });
}
DC_INLINE I operator|(I a, I b) {
    return each_i([&](int i) { return a.v[i] | b.v[i]; });
}
DC_INLINE I imax(I a, I b) {
    return each_i([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DC_INLINE I iselect_lt(I a, I b, I x, I y) {
    return each_i([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
template <int K> DC_INLINE I shl(I a) {
    return each_i([&](int i) { return reinterpret_cast<V4i>(wrapping(a.v[i]) << K); });
}
template <int K> DC_INLINE I shr(I a) {  // logical
    return each_i([&](int i) { return reinterpret_cast<V4i>(wrapping(a.v[i]) >> K); });
}
DC_INLINE F as_f(I a) {
    return each_f([&](int i) { return reinterpret_cast<V4f>(a.v[i]); });
}
DC_INLINE I as_i(F a) {
    return each_i([&](int i) { return reinterpret_cast<V4i>(a.v[i]); });
}
DC_INLINE F to_f(I a) {
    return each_f([&](int i) { return __builtin_convertvector(a.v[i], V4f); });
}

template <class T> DC_INLINE I widen(const void* p) {
    T t[16];
    __builtin_memcpy(t, p, sizeof(t));
    return each_i([&](int i) { return V4i{t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]}; });
}
template <class T> DC_INLINE void narrow(void* p, I a) {  // keeps the low bits
    T t[16];
    for (int i = 0; i < 16; ++i) t[i] = static_cast<T>(a.v[i / 4][i % 4]);
    __builtin_memcpy(p, t, sizeof(t));
}
DC_INLINE I load_u16(const void* p) { return widen<uint16_t>(p); }
DC_INLINE I load_i8(const void* p) { return widen<int8_t>(p); }
DC_INLINE void store_u16(void* p, I a) { narrow<uint16_t>(p, a); }
DC_INLINE void store_i8(void* p, I a) { narrow<int8_t>(p, a); }

// f16 bits in the low half of every lane (high half zero) -> f32, exact.
DC_INLINE F f16_lanes(I h) {
    const I mag = h & iset1(0x7fff);
    const I normal = shl<13>(mag) + iset1(112 << 23);
    const I small = as_i(to_f(mag) * set1(0x1p-24F));  // subnormals and zero
    const I special = shl<13>(mag) | iset1(0x7f800000);
    const I finite = iselect_lt(mag, iset1(0x0400), small, normal);
    return as_f(iselect_lt(iset1(0x7bff), mag, special, finite) | shl<16>(h & iset1(0x8000)));
}
DC_INLINE F load_f16(const void* p) { return f16_lanes(load_u16(p)); }
// f32 -> f16 bits, round to nearest even (Giesen's construction: the float adder does the rounding).
DC_INLINE void store_f16(void* p, F a) {
    const I bits = as_i(a), sign = bits & iset1(INT32_MIN), mag = bits & iset1(0x7fffffff);
    const I small = as_i(as_f(mag) + set1(0.5F)) - iset1(126 << 23);  // below 2^-14: aligns the f16 subnormal grid
    const I odd = shr<13>(mag) & iset1(1);
    const I normal = shr<13>(mag + iset1(0xfff - (112 << 23)) + odd);
    const I finite = iselect_lt(mag, iset1(113 << 23), small, normal);
    const I inf = iselect_lt(iset1(0x7f800000), mag, iset1(0x7e00), iset1(0x7c00));
    store_u16(p, iselect_lt(iset1(0x477fffff), mag, inf, finite) | shr<16>(sign));  // 0x47800000 = 65536
}

DC_INLINE float sum(F a) {  // lanes i and i + 8, then i + 4, i + 2, i + 1
    const V4f q = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
DC_INLINE int32_t max_lane(I a) {
    int32_t m = INT32_MIN;
    for (int i = 0; i < 16; ++i) m = a.v[i / 4][i % 4] > m ? a.v[i / 4][i % 4] : m;
    return m;
}
DC_INLINE int32_t sum(I a) {
    const V4i q = a.v[0] + a.v[1] + a.v[2] + a.v[3];
    return q[0] + q[1] + q[2] + q[3];
}
DC_INLINE float first(F a) { return a.v[0][0]; }
DC_INLINE void prefetch(const void*) {}
DC_INLINE void prefetch_far(const void*) {}

// An f16 in each half of a lane -> f32 of the low and of the high half.
DC_INLINE void f16_pair(I v, F& even, F& odd) {
    even = f16_lanes(v & iset1(0xffff));
    odd = f16_lanes(shr<16>(v));
}

// Integer dots. A tile sum is below 2^24, so f32 carries it exactly, and SSE2 has no 32-bit multiply.
struct DotQ8 {
    using Acc = F;
    struct Unit {
        F w[4];
    };
    static DC_INLINE Acc start(int32_t) { return set1(0); }
    static DC_INLINE Unit load(const std::byte* p) {  // 4 columns x 16 rows, code + 128
        const I v = iload(p), low = iset1(255), off = iset1(128);
        return {{to_f((v & low) - off), to_f((shr<8>(v) & low) - off), to_f((shr<16>(v) & low) - off),
                 to_f(shr<24>(v) - off)}};
    }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {  // x: 4 columns
        for (int c = 0; c < 4; ++c) acc = acc + u.w[c] * set1(x[c]);
    }
    static DC_INLINE F value(Acc acc) { return acc; }
};
struct DotQ4 {
    using Acc = F;
    struct Unit {
        F lo[4], hi[4];
    };
    static DC_INLINE Acc start(int32_t) { return set1(0); }
    static DC_INLINE Unit load(const std::byte* p) {  // 4 + 4 columns x 16 rows, code + 8
        const I v = iload(p), low = iset1(15), off = iset1(8);
        return {{to_f((v & low) - off), to_f((shr<8>(v) & low) - off), to_f((shr<16>(v) & low) - off),
                 to_f((shr<24>(v) & low) - off)},
                {to_f((shr<4>(v) & low) - off), to_f((shr<12>(v) & low) - off), to_f((shr<20>(v) & low) - off),
                 to_f(shr<28>(v) - off)}};
    }
    static DC_INLINE void mac(Acc& acc, const Unit& u, const int8_t* x) {  // x: columns 0..3 and 16..19
        for (int c = 0; c < 4; ++c) acc = acc + u.lo[c] * set1(x[c]);
        for (int c = 0; c < 4; ++c) acc = acc + u.hi[c] * set1(x[16 + c]);
    }
    static DC_INLINE F value(Acc acc) { return acc; }
};

using DotBF16 = NoDot;
using DotI8 = NoDot;

}  // namespace
}  // namespace deepcalm
