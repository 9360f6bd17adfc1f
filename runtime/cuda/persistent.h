// Driver (ii): one cooperative kernel runs a whole list of stages, of passes with at most kBlockRows rows. A translation unit of
// its own, because it compiles as long as all other kernels together.
#pragma once

#include "runtime/cuda/forward.h"
#include "runtime/cuda/host.h"

namespace deepcalm::gpu {

rt::Error persistent_allow_smem(int64_t bytes);
// ops [n_ops] in device memory; *barrier is zero; config.cooperative is set, so that a grid that cannot be resident is refused.
rt::Error persistent_launch(const rt::LaunchConfig& config, const Op* ops, int n_ops, unsigned* barrier);

}  // namespace deepcalm::gpu
