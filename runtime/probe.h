// Read bandwidth of this machine: the bound that every speed figure is printed beside (law L5).
#pragma once

#include "runtime/parallel.h"
#include "runtime/result.h"

namespace deepcalm {

// GB/s (1e9 bytes) of n_threads reading `bytes` of memory once, each its own contiguous share; best of `repeats`.
Result<double> read_bandwidth(int n_threads, int64_t bytes, int repeats);

}  // namespace deepcalm
