// The kernel table `avx512`.
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
extern const CpuKernels kernels_avx512;
const CpuKernels kernels_avx512 = make_table("avx512", kCpuAvx2 | kCpuAvx512);
}  // namespace deepcalm
