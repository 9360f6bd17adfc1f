// The simulator's half of runtime/cuda/host.h. Included by it alone.
#pragma once

#include "tests/sim/sim.h"

#include <chrono>
#include <cstdlib>
#include <functional>

namespace deepcalm::rt {

inline constexpr int kMaxThreads = 64, kMaxRows = 48, kMaxRepeats = 1;  // slow, and tests meet passes of several parts
inline constexpr std::chrono::milliseconds kPatience{100};

inline Error set_device(int) { return sim::call(); }
inline Result<DeviceInfo> find_device(int) {
    if (sim::call() != 0) return deepcalm::Error{ErrorCode::kUnsupported, "no CUDA device: a test asked for none"};
    constexpr int64_t kTotal = int64_t{8} << 30;
    return DeviceInfo{.name = "simulated GPU",
                      .arch = "sim",
                      .sms = 3,  // few and odd: work never divides evenly
                      .smem = sim::device.smem,
                      .dependent = true,
                      .free = kTotal,
                      .total = kTotal};
}
inline Error allocate(void** p, int64_t bytes) {  // poisoned: NaN in every float format
    if (const Error e = sim::call(); e != 0) return e;
    const size_t n = static_cast<size_t>((bytes + 255) / 256 * 256);
    *p = std::aligned_alloc(256, n);
    if (*p == nullptr) return 1;
    std::memset(*p, 0xFF, n);
    return 0;
}
inline void release(void* p) { std::free(p); }
inline Error allocate_pinned(void** p, int64_t bytes) { return allocate(p, bytes); }
inline void release_pinned(void* p) { std::free(p); }
inline Error create(Stream* s) {
    if (const Error e = sim::call(); e != 0) return e;
    *s = new sim::Stream;
    return 0;
}
inline void destroy(Stream s) { delete s; }
inline Error host_work(Stream s, std::function<void()> fn) {
    if (const Error e = sim::call(); e != 0) return e;
    s->queue.push_back({{.grid = 0}, std::move(fn)});
    return 0;
}
inline Error copy(void* dst, const void* src, int64_t bytes, Stream s) {
    return host_work(s, [=] { std::memcpy(dst, src, static_cast<size_t>(bytes)); });
}
inline Error copy_rows(void* dst, int64_t dst_stride, const void* src, int64_t src_stride, int64_t bytes, int64_t rows,
                       Stream s) {
    return host_work(s, [=] {
        for (int64_t i = 0; i < rows; ++i)
            std::memcpy(static_cast<char*>(dst) + i * dst_stride, static_cast<const char*>(src) + i * src_stride,
                        static_cast<size_t>(bytes));
    });
}
inline Error zero(void* p, int64_t bytes, Stream s) {
    return host_work(s, [=] { std::memset(p, 0, static_cast<size_t>(bytes)); });
}
inline Error last_error() { return 0; }
inline void drain(Stream s) { sim::drain(*s); }
inline bool idle(Stream s, Error& error) {  // nothing runs by itself: waiting is running
    error = 0;
    if (sim::device.hang != 0) return false;
    error = synchronize(s);
    return true;
}

class Graph {
  public:
    template <class Fn> Error record(Stream, Fn&& enqueue) {
        sim::Stream capture{.queue = {}, .capturing = true};
        Error e = sim::call();
        if (e == 0) e = enqueue(&capture);
        if (e == 0) jobs_ = std::move(capture.queue);
        return e;
    }
    Error launch(Stream s) const {
        if (const Error e = sim::call(); e != 0) return e;
        s->queue.insert(s->queue.end(), jobs_.begin(), jobs_.end());
        return 0;
    }

  private:
    std::vector<sim::Job> jobs_;
};

class Event {
  public:
    Error record(Stream s) {
        return host_work(s, [this] { at_ = std::chrono::steady_clock::now(); });
    }
    double seconds_since(const Event& start) const { return std::chrono::duration<double>(at_ - start.at_).count(); }

  private:
    std::chrono::steady_clock::time_point at_;
};

}  // namespace deepcalm::rt
