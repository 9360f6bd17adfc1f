// The set amx: avx512x, but for what isa_amx.cc computes with tile registers, or emulates.
#pragma once

#include "kernels/kernels.h"

namespace deepcalm {
namespace amx {
int64_t peak_bf16(int64_t rounds, void* buf) noexcept;
void matmul_bf16(const MatmulArgs& args) noexcept;
void matmul_f8(const MatmulArgs& args) noexcept;
void mla_partial(const MlaPartialArgs& args) noexcept;
}  // namespace amx
namespace amx_emulated {
int64_t peak_bf16(int64_t rounds, void* buf) noexcept;
void matmul_bf16(const MatmulArgs& args) noexcept;
void matmul_f8(const MatmulArgs& args) noexcept;
void mla_partial(const MlaPartialArgs& args) noexcept;
}  // namespace amx_emulated

constexpr CpuKernels amx_table(CpuKernels avx512x, bool emulated) {
    CpuKernels t = avx512x;
    t.isa = "amx";
    t.required |= emulated ? 0U : kCpuAmx;
    t.emulated = emulated;
    t.one_stride = true;
    t.pass_rows = 512;
    t.peak[static_cast<int>(ActKind::kBF16)] = emulated ? amx_emulated::peak_bf16 : amx::peak_bf16;
    t.matmul[static_cast<int>(Format::kBF16)] = emulated ? amx_emulated::matmul_bf16 : amx::matmul_bf16;
    t.matmul[static_cast<int>(Format::kF8)] = emulated ? amx_emulated::matmul_f8 : amx::matmul_f8;
    t.mla_partial = emulated ? amx_emulated::mla_partial : amx::mla_partial;
    return t;
}

}  // namespace deepcalm
