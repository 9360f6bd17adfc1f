// The tile registers of AMX, and the same arithmetic on vectors of AVX-512: kernels are written once on either. 8 tiles of at
// most 16 rows x 64 bytes; what a dot computes follows Intel's definition of TDPBF16PS, with the order that processors keep:
//   t0 = the even columns', t1 = the odd columns' chain of fused multiply-adds from +0, in column order; c = c + (t0 + t1)
// every operation rounded to nearest even, subnormal operands taken for 0, subnormal results flushed to 0, whatever the
// thread's floating-point mode is. What stands beside tiles in f32 must have that mode, too: in_tile_mode().
#pragma once

#include "kernels/cpu/simd_avx512x.h"

namespace deepcalm {
namespace {

constexpr int kNumTiles = 8, kTileLines = 16, kLineBytes = 64;

// What LDTILECFG reads. A dot is [rows, 16 f32] += [rows, 2 k bf16] [k, 16 pairs of bf16].
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // tile: n rows of n_bytes, a multiple of 4
    DC_INLINE void set(int tile, int n, int n_bytes = kLineBytes) {
        rows[tile] = static_cast<uint8_t>(n);
        row_bytes[tile] = static_cast<uint16_t>(n_bytes);
    }
};
static_assert(sizeof(TileShapes) == 64);

// The registers of the processor. Volatile and in order; "memory": g++ 12's own intrinsics declare less than the instructions
// read, so that stores before them are moved or dropped.
struct HardwareTiles {
    static DC_INLINE void configure(const TileShapes& s) { __asm__ volatile("ldtilecfg %0" : : "m"(s) : "memory"); }
    static DC_INLINE void release() { __asm__ volatile("tilerelease"); }
    template <int T> static DC_INLINE void zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }
    // rows `stride` bytes apart
    template <int T> static DC_INLINE void load(const void* p, int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T> static DC_INLINE void store(void* p, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }
    // C += A B
    template <int C, int A, int B> static DC_INLINE void dot_bf16() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

// The same on a processor without them. dot_bf16() needs the mode of in_tile_mode().
struct EmulatedTiles {
    alignas(64) std::byte lines[kNumTiles][kTileLines][kLineBytes];
    TileShapes shapes;

    void configure(const TileShapes& s) {
        shapes = s;
        __builtin_memset(lines, 0, sizeof lines);
    }
    static void release() {}
    template <int T> void zero() { __builtin_memset(lines[T], 0, sizeof lines[T]); }
    template <int T> DC_INLINE void load(const void* p, int64_t stride) {
        const auto* from = static_cast<const std::byte*>(p);
        for (int i = 0; i < shapes.rows[T]; ++i, from += stride)
            store(line(T, i), load_n(reinterpret_cast<const float*>(from), shapes.row_bytes[T] / 4));
    }
    template <int T> DC_INLINE void store(void* p, int64_t stride) {
        auto* to = static_cast<std::byte*>(p);
        for (int i = 0; i < shapes.rows[T]; ++i, to += stride)
            store_n(reinterpret_cast<float*>(to), load(line(T, i)), shapes.row_bytes[T] / 4);
    }
    template <int C, int A, int B> DC_INLINE void dot_bf16() {
        int i = 0;
        for (; i + 4 <= shapes.rows[C]; i += 4) dot_rows<4>(C, A, B, i);
        for (; i < shapes.rows[C]; ++i) dot_rows<1>(C, A, B, i);
    }

  private:
    float* line(int tile, int i) { return reinterpret_cast<float*>(lines[tile][i]); }
    static DC_INLINE void store(float* p, F v) { ::deepcalm::store(p, v); }
    static DC_INLINE F load(const float* p) { return ::deepcalm::load(p); }
    template <int R> DC_INLINE void dot_rows(int c, int a, int b, int i) {
        F even[R], odd[R];
        DC_EACH (r, R) even[r] = odd[r] = set1(0);
        for (int k = 0; k < shapes.rows[b]; ++k) {
            const I w = iload(line(b, k));
            const F w0 = as_f(shl<16>(w)), w1 = as_f(w & iset1(-65536));
            DC_EACH (r, R) {
                const I x = iset1(load_32(line(a, i + r) + k));
                even[r] = fma(as_f(shl<16>(x)), w0, even[r]);
                odd[r] = fma(as_f(x & iset1(-65536)), w1, odd[r]);
            }
        }
        DC_EACH (r, R) store(line(c, i + r), load(line(c, i + r)) + (even[r] + odd[r]));
    }
};

// fn(args) with f32 as tiles have it: rounded to nearest even, subnormals taken for and flushed to 0, no traps. fn is a
// function that is not inlined: compilers move arithmetic across a change of mode that they can see through.
template <class Args> DC_INLINE void in_tile_mode(void (&fn)(const Args&), const Args& args) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9FC0);  // FTZ, DAZ, all exceptions masked
    fn(args);
    _mm_setcsr(mode);
}

}  // namespace
}  // namespace deepcalm
