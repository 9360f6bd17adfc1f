#include "runtime/cuda/persistent.h"

#include "kernels/cuda/stages.cuh"

namespace deepcalm::gpu {
namespace {

// Every block takes part in every stage and meets the others where a stage
// waits. *barrier is zero at the start. All blocks must be resident: a cooperative launch.
DC_KERNEL(kThreads) kernel_persistent(const Op* ops, int n_ops, unsigned* barrier) {
    unsigned arrivals = 0;
    const auto wait = [&] {
        arrivals += static_cast<unsigned>(rt::blocks());
        rt::sync_block();
        if (rt::thread() == 0) {
            rt::atomic_add_acq_rel(barrier, 1);
            while (rt::load_acquire(barrier) < arrivals) rt::spin_pause();
        }
        rt::sync_block();
    };
    for (int i = 0; i < n_ops; ++i) {
        const Op& op = ops[i];
        switch (op.kind) {
#define X(name, Args)                                                                                                  \
    case Kind::k_##name:                                                                                               \
        stage_##name<1>(*reinterpret_cast<const Args*>(op.args), rt::block(), rt::blocks(), rt::dynamic_smem(), wait); \
        break;
            DEEPCALM_CUDA_ALL_STAGES(X)
#undef X
        }
        rt::sync_block();  // the next stage's copies may overwrite what this one has read
    }
}

}  // namespace

rt::Error persistent_allow_smem(int64_t bytes) { return rt::allow_smem(kernel_persistent, bytes); }
rt::Error persistent_launch(const rt::LaunchConfig& config, const Op* ops, int n_ops, unsigned* barrier) {
    return rt::launch(config, kernel_persistent, ops, n_ops, barrier);
}

}  // namespace deepcalm::gpu
