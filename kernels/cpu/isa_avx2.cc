// The kernel table `avx2`.
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
extern const CpuKernels kernels_avx2;
const CpuKernels kernels_avx2 = make_table("avx2", kCpuAvx2);
}  // namespace deepcalm
