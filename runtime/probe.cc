#include "runtime/probe.h"

#include "runtime/memory.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace deepcalm {

Result<double> read_bandwidth(int n_threads, int64_t bytes, int repeats) {
    DC_TRY(const ZeroedBuffer buffer, ZeroedBuffer::make(bytes, "bandwidth probe"));
    std::memset(buffer.data(), 1, static_cast<size_t>(buffer.size()));
    ThreadPool pool(n_threads);
    double best = 0;
    for (int i = 0; i < repeats; ++i) {
        std::atomic<uint64_t> sink{0};
        const auto start = std::chrono::steady_clock::now();
        pool.run([&](int tid) {
            const int64_t lines = bytes / 64;
            const int64_t begin = lines * tid / pool.size(), end = lines * (tid + 1) / pool.size();
            const auto* p = static_cast<const uint64_t*>(static_cast<const void*>(buffer.data() + begin * 64));
            uint64_t sum[8] = {};
            for (int64_t line = begin; line < end; ++line, p += 8) {
                for (int j = 0; j < 8; ++j) sum[j] += p[j];
            }
            for (const uint64_t s : sum) sink += s;
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::max(best, static_cast<double>(bytes) / seconds / 1e9);
    }
    return best;
}

}  // namespace deepcalm
