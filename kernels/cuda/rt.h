// The seam: kernels include this and nothing else of CUDA. Every inline PTX line stands in a function here, with its meaning
// in C++ in tests/sim/rt.h, which takes the place of this file's first half where g++ compiles the stages, for the tests.
//
// House rules for code above the seam: no <<<>>> (rt::launch), no __shared__ variables (rt::dynamic_smem), no cooperative
// groups, no implicit warp synchrony (rt::sync_warp), no early return of a lane before a warp operation, no loop that waits
// for another block, threads per block a multiple of 32 and never a constant.
#pragma once

#include "kernels/format.h"

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#define DC_DEVICE __device__ __forceinline__
#define DC_UNROLL _Pragma("unroll")  // before loops whose index must not become an address
#define DC_PRAGMA(text) _Pragma(#text)
#define DC_UNROLL_BY(n) DC_PRAGMA(unroll n)                            // where more would only be more code
#define DC_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks per SM to leave registers for
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DC_SM90 1
#endif

namespace deepcalm::rt {

DC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DC_DEVICE int threads() { return static_cast<int>(blockDim.x); }
DC_DEVICE int block() { return static_cast<int>(blockIdx.x); }
DC_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
DC_DEVICE unsigned char* dynamic_smem() {
    extern __shared__ __align__(128) unsigned char smem[];
    return smem;
}
DC_DEVICE void sync_block() { __syncthreads(); }
DC_DEVICE void sync_warp() { __syncwarp(); }
template <class T> DC_DEVICE T shfl(T v, int src) { return __shfl_sync(~0U, v, src); }
template <class T> DC_DEVICE T shfl_xor(T v, int mask) { return __shfl_xor_sync(~0U, v, mask); }

DC_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DC_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
DC_DEVICE float rint(float x) { return ::rintf(x); }
DC_DEVICE uint32_t bits(float f) { return __float_as_uint(f); }
DC_DEVICE float from_bits(uint32_t u) { return __uint_as_float(u); }
DC_DEVICE float f16_value(uint32_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<unsigned short>(h)));
    return f;
}
DC_DEVICE uint32_t f16_bits(float f) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Bytes of y:x (y above) picked by the four nibbles of `pick`.
DC_DEVICE uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t pick) { return __byte_perm(x, y, pick); }
// Two bf16 products, subnormals kept. sm_80 has only the fused form.
DC_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000U));
    return r;
}

// c += A B, m16n8k16 (f32 sums) and m16n8k32 (exact int32 sums); fragments as PTX defines them.
DC_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DC_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DC_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DC_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// Four 8x8 16-bit matrices, transposed: lane l points at row l % 8 of matrix l / 8 and gets elements (2q, g), (2q + 1, g) of each.
DC_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row)));
}

// Dependent launches: wait() returns when all earlier grids have finished and their writes are visible; trigger() lets the
// next grid start its prologue.
DC_DEVICE void dependency_wait() {
#ifdef DC_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DC_DEVICE void dependency_trigger() {
#ifdef DC_SM90
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DC_DEVICE unsigned atomic_add_acq_rel(unsigned* p, unsigned v) {
    unsigned old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
DC_DEVICE void store_release(unsigned* p, unsigned v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// For words that the host polls in mapped memory.
DC_DEVICE void store_release_system(unsigned* p, unsigned v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DC_DEVICE int64_t clock_ns() {  // of the whole device
    int64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
DC_DEVICE void prefetch_l2(const void* p, uint32_t bytes) {  // 16-byte aligned
#ifdef DC_SM90
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

DC_DEVICE void cp_async(void* dst, const void* src, int) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(dst)), "l"(src) : "memory");
}
DC_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewer> DC_DEVICE void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory"); }
#ifdef DC_SM90
DC_DEVICE void mbar_init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n\tfence.proxy.async.shared::cta;" ::"r"(smem_address(bar)),
                 "r"(count)
                 : "memory");
}
// Plain writes that this thread has seen, to shared and to global memory, come before asynchronous copies after it.
DC_DEVICE void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
DC_DEVICE void mbar_inval(uint64_t* bar) {
    asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(smem_address(bar)) : "memory");
}
DC_DEVICE void mbar_expect(uint64_t* bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes) : "memory");
}
DC_DEVICE void mbar_wait(uint64_t* bar, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(smem_address(bar)), "r"(parity)
            : "memory");
    } while (done == 0);
}
DC_DEVICE void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(dst)),
                 "l"(src), "r"(bytes), "r"(smem_address(bar))
                 : "memory");
}
#endif

// --- host -----------------------------------------------------------------------------------------------------------

using Stream = cudaStream_t;
using Error = int;  // 0: none
inline const char* error_string(Error e) { return cudaGetErrorString(static_cast<cudaError_t>(e)); }

struct LaunchConfig {
    int grid = 1, block = 32;
    int64_t smem = 0;
    bool dependent = false;  // its prologue may overlap the kernel before it
    Stream stream = nullptr;
};
// Once per kernel and device, before its first launch with more than 48 KB of dynamic shared memory.
template <class... P> Error allow_smem(void (*kernel)(P...), int64_t bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
template <class... P, class... A> Error launch(const LaunchConfig& c, void (*kernel)(P...), A... args) {
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = dim3(static_cast<unsigned>(c.grid));
    cfg.blockDim = dim3(static_cast<unsigned>(c.block));
    cfg.dynamicSmemBytes = static_cast<size_t>(c.smem);
    cfg.stream = c.stream;
    cudaLaunchAttribute attr;
    cfg.attrs = &attr;
    if (c.dependent) {
        cfg.numAttrs = 1;
        attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr.val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&cfg, kernel, P(args)...);
}
inline Error synchronize(Stream s) { return cudaStreamSynchronize(s); }

}  // namespace deepcalm::rt

#else
#include "tests/sim/rt.h"  // the same functions on a simulated GPU
#endif

namespace deepcalm::rt {

DC_DEVICE int lane() { return thread() & 31; }
DC_DEVICE int warp() { return thread() >> 5; }
DC_DEVICE int warps() { return threads() >> 5; }
DC_DEVICE int64_t grid_thread() { return int64_t{block()} * threads() + thread(); }
DC_DEVICE int64_t grid_threads() { return int64_t{blocks()} * threads(); }

// The sum, the largest v of groups of `lanes` neighbouring lanes, for each of them; lanes: a power of two.
template <class T> DC_DEVICE T sum_lanes(T v, int lanes = 32) {
    for (int m = lanes / 2; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}
template <class T> DC_DEVICE T max_lanes(T v, int lanes = 32) {
    for (int m = lanes / 2; m > 0; m /= 2) {
        const T other = shfl_xor(v, m);
        v = other > v ? other : v;
    }
    return v;
}

#ifdef DC_SM90
inline constexpr bool kBulk = true;  // copies report to a barrier; else to the thread that started them
#else
inline constexpr bool kBulk = false;
#endif

// One warp's asynchronous copies, all lanes calling: `bytes` a multiple of 16, both sides 16-byte aligned. A slot is one
// barrier; kNewer, the copies that may stay in flight, must be exactly the number started after this one (start empty ones).
DC_DEVICE void copy_open(uint64_t* bar) {
#ifdef DC_SM90
    if (lane() == 0) mbar_init(bar, 1);
    sync_warp();
#endif
}
DC_DEVICE void copy_close(uint64_t* bar) {
#ifdef DC_SM90
    sync_warp();
    if (lane() == 0) mbar_inval(bar);
#endif
}
DC_DEVICE void copy_start(void* dst, const void* src, int bytes, uint64_t* bar) {
    sync_warp();  // every lane is done with what the slot held
#ifdef DC_SM90
    if (lane() == 0 && bytes > 0) {
        mbar_expect(bar, bytes);
        bulk_copy(dst, src, bytes, bar);
    }
#else
    for (int i = 16 * lane(); i < bytes; i += 16 * 32)
        cp_async(static_cast<char*>(dst) + i, static_cast<const char*>(src) + i, 16);
    cp_commit();
#endif
}
// The same for n_rows rows of row_bytes each.
DC_DEVICE void copy_rows_start(unsigned char* dst, int64_t dst_stride, const unsigned char* src, int64_t src_stride,
                               int row_bytes, int n_rows, [[maybe_unused]] uint64_t* bar) {
    sync_warp();
#ifdef DC_SM90
    if (lane() == 0 && n_rows > 0) {
        proxy_fence();
        mbar_expect(bar, n_rows * row_bytes);
        for (int r = 0; r < n_rows; ++r) bulk_copy(dst + r * dst_stride, src + r * src_stride, row_bytes, bar);
    }
#else
    for (int r = 0; r < n_rows; ++r)
        for (int i = 16 * lane(); i < row_bytes; i += 16 * 32)
            cp_async(dst + r * dst_stride + i, src + r * src_stride + i, 16);
    cp_commit();
#endif
}
template <int kNewer> DC_DEVICE void copy_wait([[maybe_unused]] uint64_t* bar, [[maybe_unused]] int parity) {
#ifdef DC_SM90
    mbar_wait(bar, parity);
#else
    cp_wait<kNewer>();
    sync_warp();
#endif
}

}  // namespace deepcalm::rt
