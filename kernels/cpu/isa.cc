// One kernel table. CMake compiles this file once for every instruction set, whose name is DEEPCALM_ISA.
#define DC_PASTE_(a, b) a##b
#define DC_PASTE(a, b) DC_PASTE_(a, b)
#define DC_QUOTE_(x) #x
#define DC_QUOTE(x) DC_QUOTE_(x)

#include DC_QUOTE(DC_PASTE(simd_, DEEPCALM_ISA).h)

#include "kernels/cpu/formats.h"

#include "kernels/cpu/kernels_impl.h"

namespace deepcalm {
extern const CpuKernels DC_PASTE(kernels_, DEEPCALM_ISA);
constinit const CpuKernels DC_PASTE(kernels_, DEEPCALM_ISA) = make_table(DC_QUOTE(DEEPCALM_ISA));
}  // namespace deepcalm
