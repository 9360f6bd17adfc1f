// One kernel table. CMake compiles this file once for every instruction set, whose name is DEEPCALM_ISA.
#define DC_PASTE_(a, b) a##b
#define DC_PASTE(a, b) DC_PASTE_(a, b)
#define DC_QUOTE_(x) #x
#define DC_QUOTE(x) DC_QUOTE_(x)

#include DC_QUOTE(DC_PASTE(simd_, DEEPCALM_ISA).h)

#include "kernels/cpu/formats.h"

#include "kernels/cpu/kernels_impl.h"

#ifdef DEEPCALM_AMX
#include "kernels/cpu/isa_amx.h"
#endif

namespace deepcalm {
extern const CpuKernels DC_PASTE(kernels_, DEEPCALM_ISA);
constinit const CpuKernels DC_PASTE(kernels_, DEEPCALM_ISA) = make_table(DC_QUOTE(DEEPCALM_ISA));
#ifdef DEEPCALM_AMX
extern const CpuKernels kernels_amx, kernels_amx_emulated;
constinit const CpuKernels kernels_amx = amx_table(make_table("amx"), false);
constinit const CpuKernels kernels_amx_emulated = amx_table(make_table("amx"), true);
#endif
}  // namespace deepcalm
