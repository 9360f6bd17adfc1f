// The engine on the CPU: kernels of an instruction set on a pool of threads.
#pragma once

#include "runtime/cpu/buffers.h"
#include "runtime/cpu/kv_cache.h"
#include "runtime/cpu/pool.h"
#include "runtime/engine.h"

namespace deepcalm {

struct CpuBackend final : Backend {
    const BoundModel& model;
    const CpuKernels& kernels;
    CpuPolicy policy = cpu_policy();  // tests choose another processor's
    std::unique_ptr<ThreadPool> pool;
    bool adaptive = false;  // passes for which all threads do not pay run on one
    ThreadChoice choice;
    Buffers buffers;
    int touched_rows = 0;  // of the longest pass whose buffers are still resident
    int short_passes = 0;  // since the last long one

    // isa: null = best supported. n_threads: 0 = default_threads(). adaptive: at most so many, as it pays (ThreadChoice).
    static Result<std::unique_ptr<Backend>> open(const BoundModel& model, const char* isa, int n_threads,
                                                 bool adaptive);
    CpuBackend(const BoundModel& m, const CpuKernels& k) : model(m), kernels(k) {}
    Result<std::unique_ptr<Engine>> make_engine(const EngineArgs& args) override;
    Status reserve(int n) override;
    // forward.cc: the pass, CPU transcription.
    Result<PassResult> forward(const PassArgs& args) override;
    Status each(int n, const std::function<void(int)>& fn) override;
};

struct CpuEngine final : Engine {
    KvCache cache, mtp_cache;
    Status copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) override;
};

}  // namespace deepcalm
