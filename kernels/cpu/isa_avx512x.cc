// The kernel table `avx512x`.
#include "kernels/kernels.h"

#include "kernels/cpu/simd_scalar.h" // first: the others are written against it

#include "kernels/cpu/formats.h"

namespace deepcalm {
namespace {
using WeightBF16 = WeightBF16Plain;
using WeightF8 = WeightF8Plain;
}  // namespace
}  // namespace deepcalm

#include "kernels/cpu/kernels_impl.h"

namespace deepcalm {
extern const CpuKernels kernels_avx512x;
const CpuKernels kernels_avx512x = make_table("avx512x", kCpuAvx2 | kCpuAvx512 | kCpuAvx512X);
}  // namespace deepcalm
