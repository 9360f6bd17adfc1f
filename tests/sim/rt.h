// The simulator's half of kernels/cuda/rt.h: what stands there in PTX and CUDA, here in C++. Included by it alone.
#pragma once

#include "kernels/kernels.h"
#include "tests/sim/sim.h"

#include <chrono>
#include <cmath>
#define DC_DEVICE inline
#define DC_UNROLL
#define DC_UNROLL_BY(n)
#define DC_KERNEL(...) inline void
#define __grid_constant__
#ifndef DEEPCALM_SIM_CP_ASYNC  // the copies of sm_80
#define DC_SM90 1
#endif

namespace deepcalm::rt {

inline int thread() { return sim::place().thread; }
inline int threads() { return sim::place().threads; }
inline int block() { return sim::place().block; }
inline int blocks() { return sim::place().blocks; }
inline unsigned char* dynamic_smem() { return sim::dynamic_smem(); }
// The caller's line; clang has no std::source_location before version 16.
inline void sync_block(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    sim::sync_block(file, line);
}
inline void sync_warp() { sim::sync_warp(); }
template <class T> T shfl(T v, int src) {
    T r;
    std::memcpy(&r, sim::meet(sim::WarpOp::kShfl, &v, sizeof v, nullptr, nullptr)[src & 31], sizeof r);
    return r;
}
template <class T> T shfl_xor(T v, int mask) {
    const int lane = thread() & 31;
    T r;
    std::memcpy(&r, sim::meet(sim::WarpOp::kShflXor, &v, sizeof v, nullptr, nullptr)[lane ^ mask], sizeof r);
    return r;
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float rint(float x) { return std::rint(x); }
inline uint32_t bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float f16_value(uint32_t h) { return f16_to_f32(static_cast<uint16_t>(h)); }
inline uint32_t f16_bits(float f) { return f32_to_f16(f); }

inline uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
    const uint64_t v = static_cast<uint64_t>(y) << 32 | x;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(v >> 8 * (pick >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    const uint32_t lo = f32_to_bf16(from_bits(a << 16) * from_bits(b << 16));
    const uint32_t hi = f32_to_bf16(from_bits(a & 0xffff0000U) * from_bits(b & 0xffff0000U));
    return lo | hi << 16;
}

namespace detail {
template <class C> void mma(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::WarpOp op, sim::WarpFn fn) {
    uint32_t in[10];
    std::memcpy(in, c, 16);
    std::memcpy(in + 4, a, 16);
    std::memcpy(in + 8, b, 8);
    sim::meet(op, in, sizeof in, fn, c);
}
}  // namespace detail
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    detail::mma(c, a, b, sim::WarpOp::kMmaBF16, sim::mma_bf16);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    detail::mma(c, a, b, sim::WarpOp::kMmaF16, sim::mma_f16);
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    detail::mma(c, a, b, sim::WarpOp::kMmaS8, sim::mma_s8);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    static_cast<void>(*static_cast<const volatile uint16_t*>(row));  // a read that the sanitizers see
    sim::meet(sim::WarpOp::kLdmatrix, &row, sizeof row, sim::ldmatrix_x4_trans, r);
}

inline void dependency_wait() { sim::dependency_wait(); }
inline void dependency_trigger() {}
inline unsigned atomic_add_acq_rel(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
inline void store_release(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void store_release_system(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline int64_t clock_ns() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
inline void prefetch_l2(const void*, uint32_t) {}

inline void cp_async(void* dst, const void* src, int bytes) { sim::cp_async(dst, src, bytes); }
inline void cp_commit() { sim::cp_commit(); }
template <int kNewer> void cp_wait() { sim::cp_wait(kNewer); }
inline void proxy_fence() {}
inline void mbar_init(uint64_t* bar, int count) { sim::mbar_init(bar, count); }
inline void mbar_inval(uint64_t* bar) { sim::mbar_inval(bar); }
inline void mbar_expect(uint64_t* bar, int bytes) { sim::mbar_expect(bar, bytes); }
inline void mbar_wait(uint64_t* bar, int parity) { sim::mbar_wait(bar, parity); }
inline void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) { sim::bulk_copy(dst, src, bytes, bar); }

// --- host -----------------------------------------------------------------------------------------------------------

using Stream = sim::Stream*;
using Error = int;
inline const char* error_string(Error) { return "simulator error"; }

struct LaunchConfig {
    int grid = 1, block = 32;
    int64_t smem = 0;
    bool dependent = false;
    Stream stream = nullptr;
};
template <class... P> Error allow_smem(void (*)(P...), int64_t bytes) { return bytes > sim::device.smem ? 1 : 0; }
// Queued; runs at synchronize(). Arguments are copied, as a real launch does.
template <class... P, class... A> Error launch(const LaunchConfig& c, void (*kernel)(P...), A... args) {
    if (c.smem > sim::device.smem) return 1;
    if (const Error e = c.stream->capturing ? 0 : sim::call(); e != 0) return e;
    c.stream->queue.push_back({{c.grid, c.block, c.smem, c.dependent}, [=] { kernel(static_cast<P>(args)...); }});
    return 0;
}
inline Error synchronize(Stream s) { return sim::sync(*s); }

}  // namespace deepcalm::rt
