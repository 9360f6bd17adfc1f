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
            // Eight pages at a time, line by line across them: a single stream does not fill a core's outstanding reads.
            constexpr int64_t kPage = 4096, kPages = 8;
            const int64_t blocks = bytes / (kPage * kPages);
            const int64_t begin = blocks * tid / pool.size(), end = blocks * (tid + 1) / pool.size();
            uint64_t sum[8] = {};
            for (int64_t block = begin; block < end; ++block) {
                const std::byte* base = buffer.data() + block * kPage * kPages;
                for (int64_t line = 0; line < kPage; line += 64) {
                    for (int64_t page = 0; page < kPages; ++page) {
                        const auto* p =
                            static_cast<const uint64_t*>(static_cast<const void*>(base + page * kPage + line));
                        for (int j = 0; j < 8; ++j) sum[j] += p[j];
                    }
                }
            }
            for (const uint64_t s : sum) sink += s;
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::max(best, static_cast<double>(bytes) / seconds / 1e9);
    }
    return best;
}

}  // namespace deepcalm
