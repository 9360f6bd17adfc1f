// The host's half of the seam kernels/cuda/rt.h: memory, copies, graphs and time. Every function returns rt::Error; 0 is
// success.
#pragma once

#include "kernels/cuda/rt.h"
#include "runtime/result.h"

#include <chrono>
#include <cstdio>
#include <string>

namespace deepcalm::rt {

struct DeviceInfo {
    std::string name, arch;       // as in Backend
    int sms = 0;                  // multiprocessors: blocks that run at once, one each
    int64_t smem = 0;             // dynamic shared memory that one block may have (Fit in kernels/cuda/args.h)
    bool dependent = false;       // programmatic dependent launches work (sm_90 and later)
    int64_t free = 0, total = 0;  // bytes of device memory
};

#if defined(__CUDACC__)

// At most: threads of a block, rows of a pass, repeats of a measurement, and the wait for a device that hangs.
inline constexpr int kMaxThreads = 1024, kMaxRows = 1 << 20, kMaxRepeats = 1 << 20;
inline constexpr std::chrono::seconds kPatience{10};

inline Error set_device(int index) { return cudaSetDevice(index); }
inline Result<DeviceInfo> find_device(int index) {
    const auto missing = [](const std::string& what) { return deepcalm::Error{ErrorCode::kUnsupported, what}; };
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    int count = 0, driver = 0, runtime = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const std::string needs = "this build needs " + version(runtime) + " or later)";
    if (driver == 0) return missing("the CUDA driver: none is installed (" + needs);
    if (e == cudaErrorInsufficientDriver) {
        return missing(std::string("the CUDA driver: ") + cudaGetErrorString(e) + " (found " + version(driver) + ", " +
                       needs);
    }
    if (e != cudaSuccess || index >= count) {
        return missing(std::string("no CUDA device: ") +
                       (e != cudaSuccess ? cudaGetErrorString(e) : "the driver shows none"));
    }
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, index) != cudaSuccess)
        return missing("no CUDA device: its properties cannot be read");
    DeviceInfo info{.name = p.name,
                    .arch = "sm_" + std::to_string(p.major) + std::to_string(p.minor),
                    .sms = p.multiProcessorCount,
                    .smem = static_cast<int64_t>(p.sharedMemPerBlockOptin),
                    .dependent = p.major >= 9};
    if (p.major < 8)  // A100; 86, 89, 120: RTX 30, 40, 50, A10, L4, L40; 90: H100, H200; 100: B200
        return missing("no CUDA device: " + info.name + " is " + info.arch + ", this build needs sm_80 or later");
    size_t free = 0, total = 0;
    if (cudaSetDevice(index) != cudaSuccess || cudaMemGetInfo(&free, &total) != cudaSuccess)
        return missing(std::string("no CUDA device: ") + cudaGetErrorString(cudaGetLastError()));
    info.free = static_cast<int64_t>(free);
    info.total = static_cast<int64_t>(total);
    return info;
}
inline Error allocate(void** p, int64_t bytes) { return cudaMalloc(p, static_cast<size_t>(bytes)); }
inline void release(void* p) { cudaFree(p); }
// Host memory that copies run from at full speed and kernels may write (same address on both sides).
inline Error allocate_pinned(void** p, int64_t bytes) {
    return cudaHostAlloc(p, static_cast<size_t>(bytes), cudaHostAllocMapped);
}
inline void release_pinned(void* p) { cudaFreeHost(p); }
inline Error create(Stream* s) { return cudaStreamCreateWithFlags(s, cudaStreamNonBlocking); }
inline void destroy(Stream s) { cudaStreamDestroy(s); }
inline Error copy(void* dst, const void* src, int64_t bytes, Stream s) {
    return cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault, s);
}
inline Error copy_rows(void* dst, int64_t dst_stride, const void* src, int64_t src_stride, int64_t bytes, int64_t rows,
                       Stream s) {
    return cudaMemcpy2DAsync(dst, static_cast<size_t>(dst_stride), src, static_cast<size_t>(src_stride),
                             static_cast<size_t>(bytes), static_cast<size_t>(rows), cudaMemcpyDefault, s);
}
inline Error zero(void* p, int64_t bytes, Stream s) { return cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), s); }
inline Error last_error() { return cudaGetLastError(); }
// Waits until nothing that was queued can run any more, be it because the device is lost.
inline void drain(Stream s) {
    if (cudaStreamSynchronize(s) != cudaSuccess) cudaGetLastError();
}
// True: everything queued has run, or failed (then error is set).
inline bool idle(Stream s, Error& error) {
    const cudaError_t e = cudaStreamQuery(s);
    error = e == cudaErrorNotReady ? 0 : e;
    return e != cudaErrorNotReady;
}

// What `enqueue(stream)` queues, recorded once and replayed.
class Graph {
  public:
    Graph() = default;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
    }
    template <class Fn> Error record(Stream s, Fn&& enqueue) {
        if (const cudaError_t e = cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal); e != cudaSuccess)
            return e;
        const Error queued = enqueue(s);
        cudaGraph_t graph = nullptr;
        const cudaError_t e = cudaStreamEndCapture(s, &graph);
        Error error = queued != 0 ? queued : static_cast<Error>(e);
        if (error == 0) error = cudaGraphInstantiate(&exec_, graph, 0);
        if (graph != nullptr) cudaGraphDestroy(graph);
        if (error == 0) error = cudaGraphUpload(exec_, s);
        return error;
    }
    Error launch(Stream s) const { return cudaGraphLaunch(exec_, s); }

  private:
    cudaGraphExec_t exec_ = nullptr;
};

class Event {
  public:
    Event() { cudaEventCreate(&e_); }
    ~Event() { cudaEventDestroy(e_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    Error record(Stream s) { return cudaEventRecord(e_, s); }
    double seconds_since(const Event& start) const {  // both have happened
        float ms = 0;
        cudaEventElapsedTime(&ms, start.e_, e_);
        return 1e-3 * static_cast<double>(ms);
    }

  private:
    cudaEvent_t e_ = nullptr;
};

#else

}  // namespace deepcalm::rt
#include "tests/sim/host.h"  // the same functions on a simulated GPU
namespace deepcalm::rt {

#endif

// Waits on leaving a scope, whose buffers work that is queued may use: an early return too.
struct Settled {
    Stream stream;
    ~Settled() { drain(stream); }
};

}  // namespace deepcalm::rt
