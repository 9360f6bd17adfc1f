// Every CPU kernel, written once on a SIMD layer (simd.h) and its formats.
#pragma once

#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/matmul_impl.h"

namespace deepcalm {
namespace {

void prepare_f32(const float* x, int cols, const Activation& out, int64_t row) noexcept {
    float* to = static_cast<float*>(out.x) + row * out.stride;
    put_row(x, cols, padded(cols, kTileCols), [&](int i, F v) { store(to + i, v); });
}

void prepare_bf16(const float* x, int cols, const Activation& out, int64_t row) noexcept {
    uint16_t* to = static_cast<uint16_t*>(out.x) + row * out.stride;
    put_row(x, cols, padded(cols, kTileCols), [&](int i, F v) { store_u16(to + i, bf16_bits(v)); });
}

void prepare_i8(const float* x, int cols, const Activation& out, int64_t row) noexcept {
    int8_t* to = static_cast<int8_t*>(out.x) + row * out.stride;
    const int64_t group0 = row * (out.stride / kTileCols);
    for (int i = 0; i < cols; i += kTileCols) {
        const F a = load_padded(x, i, cols), b = load_padded(x, i + 16, cols);
        const float amax = amax32(a, b);
        const bool zero = amax < 0x1p-119F;  // 127 / amax would overflow
        const F inv = set1(zero ? 0.0F : 127.0F / amax);
        const I ca = round_to_i8(a * inv), cb = round_to_i8(b * inv);
        store_i8(to + i, ca);
        store_i8(to + i + 16, cb);
        out.d[group0 + i / kTileCols] = zero ? 0.0F : amax / 127.0F;
        out.sum[group0 + i / kTileCols] = sum(ca + cb);
    }
}

void rmsnorm(const float* x, const float* w, float* out, int n, float eps) noexcept {
    F s0 = set1(0), s1 = s0, s2 = s0, s3 = s0;
    int i = 0;
    for (; i + 64 <= n; i += 64) {
        const F a = load(x + i), b = load(x + i + 16), c = load(x + i + 32), d = load(x + i + 48);
        s0 = fma(a, a, s0);
        s1 = fma(b, b, s1);
        s2 = fma(c, c, s2);
        s3 = fma(d, d, s3);
    }
    for (; i < n; i += 16) {
        const F a = load_padded(x, i, n);
        s0 = fma(a, a, s0);
    }
    const float mean = sum((s0 + s1) + (s2 + s3)) / static_cast<float>(n);
    const F inv = set1(1.0F / __builtin_sqrtf(mean + eps));
    for (i = 0; i + 16 <= n; i += 16) store(out + i, load(w + i) * (load(x + i) * inv));
    if (i < n) store_n(out + i, load_n(w + i, n - i) * (load_n(x + i, n - i) * inv), n - i);
}

void rope(float* v, const float* cos, const float* sin, int half) noexcept {
    for (int i = 0; i < half; i += 16) {
        const int n = half - i < 16 ? half - i : 16;
        const F a = load_n(v + i, n), b = load_n(v + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
        store_n(v + i, a * c - b * s, n);
        store_n(v + half + i, a * s + b * c, n);
    }
}

// silu through exp(-|x|), so neither side overflows: sigmoid = 1 / (1 + e) for x >= 0, e / (1 + e) below.
void swiglu(const float* gate_up, float* out, int n) noexcept {
    const F one = set1(1.0F);
    for (int i = 0; i < n; i += 16) {
        const F gate = load(gate_up + 2 * i), up = load(gate_up + 2 * i + 16);
        const F e = exp_neg(as_f(as_i(gate) | iset1(INT32_MIN)));
        const F silu = gate * select_lt(gate, set1(0), e, one) / (one + e);
        if (n - i >= 16) {
            store(out + i, silu * up);
        } else {
            store_n(out + i, silu * up, n - i);
        }
    }
}

void axpy(float a, const float* x, float* y, int n) noexcept {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, fma(set1(a), load(x + i), load(y + i)));
    if (i < n) store_n(y + i, fma(set1(a), load_n(x + i, n - i), load_n(y + i, n - i)), n - i);
}

// Ceilings: an Op names a register, its operations per step and the step; an Op without kOps is an instruction not there.
struct PeakF32 {
    using Reg = F;
    static constexpr int64_t kOps = 2 * 16;
    static DC_INLINE Reg step(Reg acc, Reg a) { return fma(a, a, acc); }
};
template <class Op> int64_t peak(int64_t rounds, void* buf) noexcept {
    constexpr int kChains = kBlockRows * kBlockTiles;
    static_assert(kChains < kPeakBytes / 64);
    typename Op::Reg acc[kChains], a;  // chains that start alike would be merged by the compiler
    __builtin_memcpy(acc, buf, sizeof acc);
    __builtin_memcpy(&a, static_cast<std::byte*>(buf) + kPeakBytes - 64, sizeof a);
    for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 32
        for (auto& v : acc) v = Op::step(v, a);
    __builtin_memcpy(buf, acc, sizeof acc);
    __asm__ volatile("" : : "r"(buf) : "memory");
    return rounds * kChains * Op::kOps;
}
template <class Op> constexpr decltype(&peak<PeakF32>) peak_of() {
    if constexpr (requires { Op::kOps; }) {
        return peak<Op>;
    } else {
        return nullptr;
    }
}

constexpr CpuKernels make_table(const char* isa) {
    return {
        .isa = isa,
        .required = kRequired,
        .peak = {peak<PeakF32>, peak_of<DotBF16>(), peak_of<DotI8>()},  // in the order of ActKind
        .prepare = {prepare_f32, prepare_bf16, prepare_i8},             // in the order of ActKind
        .matmul = {matmul<WeightF32>, matmul<WeightBF16<DotBF16>>, matmul<WeightF16>, matmul<WeightF8<DotBF16>>,
                   matmul<WeightQ8>, matmul<WeightQ4>, matmul<WeightQ4B>},  // in the order of Format
        .rmsnorm = rmsnorm,
        .rope = rope,
        .swiglu = swiglu,
        .axpy = axpy,
        .cache_write = cache_write,
        .cache_read = cache_read,
        .mla_partial = mla_partial<DotBF16>,
        .mla_merge = mla_merge,
        .mla_finish = mla_finish,
    };
}

}  // namespace
}  // namespace deepcalm
