// What this machine can do: the bounds that every speed figure is printed beside (law L5), and the rates of the real
// kernels on operands that stay in the first-level cache.
#pragma once

#include "kernels/kernels.h"
#include "runtime/cpu/pool.h"
#include "runtime/result.h"

namespace deepcalm {

// GB/s (1e9 bytes) of n_threads reading `bytes` of memory once, each its own contiguous share; best of `repeats`.
Result<double> read_bandwidth(int n_threads, int64_t bytes, int repeats);

// The rates below are in 1e9 operations per second of processor time over all threads, multiply and add counted apart,
// best of 5 runs of at least 10 ms.

// CpuKernels::peak; 0 where the set has no such instruction.
Result<double> compute_ceiling(const CpuKernels& k, ActKind kind, int n_threads);
// The matmul kernel of `format`, each thread on its own weights of 4 row tiles x 256 columns (q8, q4), 128 (bf16, f8) or 64
// (f16, f32): 8 to 17 KiB, beside 16 KiB of activations and 16 KiB of output at 64 rows.
Result<double> inner_loop_rate(const CpuKernels& k, Format format, int n_threads, int rows);
// The attention kernel on one thread, latent 512 + rope 64: every row sees all `positions`; 2 (576 + 512) operations per
// row, head and position. Rows and heads share a call as they do in the pass.
Result<double> attention_rate(const CpuKernels& k, CacheType kv, int heads, int rows, int positions);

}  // namespace deepcalm
