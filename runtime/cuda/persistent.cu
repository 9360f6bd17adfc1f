#include "runtime/cuda/persistent.h"

#include "kernels/cuda/stages.cuh"

namespace deepcalm::gpu {
namespace {

// The n-th meeting of all blocks, from 1 on. *barrier is zero at the start of the kernel.
struct GridBarrier {
    static constexpr int kMaxRows = kBlockRows;
    unsigned* barrier;
    int n;
    DC_DEVICE void operator()() const {
        rt::sync_block();
        if (rt::thread() == 0) {
            rt::atomic_add_acq_rel(barrier, 1);
            while (rt::load_acquire(barrier) < static_cast<unsigned>(n * rt::blocks())) rt::spin_pause();
        }
        rt::sync_block();
    }
};

// Every block takes part in every stage and meets the others where a stage waits, which each does once. All blocks must be
// resident: a cooperative launch of one block an SM, which may use all its registers (the compiler's own choice is two
// blocks, and spills).
DC_KERNEL(kThreads, 1) kernel_persistent(const Op* ops, int n_ops, unsigned* barrier) {
    for (int i = 0; i < n_ops; ++i) {
        const Op& op = ops[i];
        const GridBarrier wait{barrier, i + 1};
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
