// Single stages for tests: a C function per stage that launches it in the simulator on the caller's arrays. Part of
// libdeepcalm_sim.so, and a library of its own for tools/check_sim.
#include "kernels/cuda/stages.cuh"

#include <vector>

namespace deepcalm::gpu {
namespace {

struct LaunchSpec {
    int32_t nb, grid, threads, dependent;
};

#ifndef DEEPCALM_STAGE_KERNELS  // backend_sim.cc brings its own
#define X(name, Args)                                                                                                  \
    template <int NB> DC_KERNEL(kThreads, NB == 1 ? 2 : 1) kernel_##name(const __grid_constant__ Args a) {             \
        rt::dependency_trigger();                                                                                      \
        stage_##name<NB>(a, rt::block(), rt::blocks(), rt::dynamic_smem(), [] { rt::dependency_wait(); });             \
    }
DEEPCALM_CUDA_STAGES(X)
#undef X
#endif

sim::Stream test_stream;

}  // namespace
}  // namespace deepcalm::gpu

using namespace deepcalm::gpu;

#define X(name, Args)                                                                                                  \
    extern "C" __attribute__((visibility("default"))) void dc_test_##name(const Args* a, const LaunchSpec* l) {        \
        const deepcalm::rt::LaunchConfig c{.grid = l->grid,                                                            \
                                           .block = l->threads,                                                        \
                                           .smem = smem_bytes(*a, l->nb, l->threads),                                  \
                                           .dependent = l->dependent != 0,                                             \
                                           .stream = &test_stream};                                                    \
        deepcalm::rt::launch(c, l->nb == 1 ? kernel_##name<1> : kernel_##name<kPrefillBlocks>, *a);                    \
    }                                                                                                                  \
    extern "C" __attribute__((visibility("default"))) int64_t dc_test_sizeof_##name() { return sizeof(Args); }
DEEPCALM_CUDA_STAGES(X)
#undef X

// Runs what was launched, in order.
extern "C" __attribute__((visibility("default"))) void dc_test_run() { deepcalm::rt::synchronize(&test_stream); }
