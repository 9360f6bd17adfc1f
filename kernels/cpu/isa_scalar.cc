// The kernel table `scalar`: any processor.
#include "kernels/kernels.h"

#include "kernels/cpu/simd_scalar.h"

#include "kernels/cpu/formats.h"

namespace deepcalm {
namespace {
using WeightBF16 = WeightBF16Plain;
using WeightF8 = WeightF8Plain;
using PeakBF16 = NoDot;
using PeakI8 = NoDot;
}  // namespace
}  // namespace deepcalm

#include "kernels/cpu/kernels_impl.h"

namespace deepcalm {
extern const CpuKernels kernels_scalar;
constinit const CpuKernels kernels_scalar = make_table("scalar", 0);
}  // namespace deepcalm
