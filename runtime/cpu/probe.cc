#include "runtime/cpu/probe.h"

#include "runtime/cpu/buffers.h"
#include "runtime/memory.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <numeric>
#include <vector>

namespace deepcalm {
namespace {

double thread_seconds() {  // processor time: what else the machine runs does not lower a ceiling
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// 1e9 operations per second of call(tid), which returns the operations it did, summed over the threads.
template <class Call> Result<double> best_rate(ThreadPool& pool, Call&& call) {
    std::vector<double> rate(static_cast<size_t>(pool.size()));
    double best = 0;
    for (int run = 0; run < 5; ++run) {
        DC_TRY_STATUS(pool.run([&](int tid) {
            double seconds = 0, ops = 0;
            for (int64_t calls = 1; seconds < 0.01; calls *= 2) {
                const double start = thread_seconds();
                ops = 0;
                for (int64_t i = 0; i < calls; ++i) ops += static_cast<double>(call(tid));
                seconds = thread_seconds() - start;
            }
            rate[static_cast<size_t>(tid)] = ops / seconds / 1e9;
        }));
        best = std::max(best, std::accumulate(rate.begin(), rate.end(), 0.0));
    }
    return best;
}

// Finite operands in every format, none of them denormal: f32 and bf16 0.0115, f16 1.06, e4m3 1.5, int8 60.
constexpr int kAnyByte = 0x3c;

}  // namespace

Result<double> read_bandwidth(int n_threads, int64_t bytes, int repeats) {
    DC_TRY(const ZeroedBuffer buffer, ZeroedBuffer::make(bytes, "bandwidth probe"));
    std::memset(buffer.data(), 1, static_cast<size_t>(buffer.size()));
    DC_TRY(const auto pool, ThreadPool::make(n_threads));
    double best = 0;
    // Eight pages at a time, line by line across them (Intel: a single stream does not fill a core's outstanding reads), or one
    // after the other (AMD: a third faster by one thread): the best of both.
    for (int i = 0; i < 2 * repeats; ++i) {
        std::atomic<uint64_t> sink{0};
        const auto start = std::chrono::steady_clock::now();
        DC_TRY_STATUS(pool->run([&](int tid) {
            constexpr int64_t kPage = 4096;
            const int64_t pages = i % 2 == 0 ? 8 : 1, blocks = bytes / (kPage * pages);
            const int64_t begin = blocks * tid / pool->size(), end = blocks * (tid + 1) / pool->size();
            uint64_t sum[8] = {};
            for (int64_t block = begin; block < end; ++block) {
                const std::byte* base = buffer.data() + block * kPage * pages;
                for (int64_t line = 0; line < kPage; line += 64) {
                    for (int64_t page = 0; page < pages; ++page) {
                        const void* p = base + page * kPage + line;
                        for (int j = 0; j < 8; ++j) sum[j] += static_cast<const uint64_t*>(p)[j];
                    }
                }
            }
            for (const uint64_t s : sum) sink += s;
        }));
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::max(best, static_cast<double>(bytes) / seconds / 1e9);
    }
    return best;
}

Result<double> compute_ceiling(const CpuKernels& k, ActKind kind, int n_threads) {
    const auto peak = k.peak[static_cast<int>(kind)];
    if (peak == nullptr) return 0.0;
    DC_TRY(const auto pool, ThreadPool::make(n_threads));
    return best_rate(*pool, [&](int) {
        alignas(64) std::byte buf[kPeakBytes];
        std::memset(buf, kAnyByte, sizeof buf);
        return peak(10000, buf);
    });
}

Result<double> inner_loop_rate(const CpuKernels& k, Format format, int n_threads, int rows) {
    struct Operands {
        std::vector<std::byte> bytes;
        PackedTensor w;
        MatmulArgs args;
    };
    constexpr int kTiles = 4, kCols[kNumActKinds] = {64, 128, 256};
    const auto kind = static_cast<int>(info(format).act);
    const int cols = kCols[kind];
    DC_TRY(const auto pool, ThreadPool::make(n_threads));
    std::vector<Operands> threads(static_cast<size_t>(n_threads));
    for (Operands& t : threads) {
        t.w = {.format = format, .rows = kTiles * kTileRows, .cols = cols};
        const int64_t x_bytes = round_up(int64_t{rows} * cols * kActBytes[kind], 64);
        const int64_t groups = round_up(int64_t{rows} * cols / kTileCols, 16), y_bytes = int64_t{rows} * t.w.rows * 4;
        t.bytes.assign(static_cast<size_t>(64 + 64 + t.w.n_bytes() + x_bytes + 8 * groups + y_bytes),
                       std::byte{kAnyByte});
        std::byte* p = t.bytes.data() + (64 - reinterpret_cast<uintptr_t>(t.bytes.data()) % 64);
        t.w.scales = reinterpret_cast<float*>(p);
        t.w.data = p + 64;
        p += 64 + t.w.n_bytes();
        std::memset(p + x_bytes + 4 * groups, 0, static_cast<size_t>(4 * groups));  // group sums: int32, in their range
        t.args = {.w = &t.w,
                  .tile_end = kTiles,
                  .x = {.x = p,
                        .d = reinterpret_cast<float*>(p + x_bytes),
                        .sum = reinterpret_cast<int32_t*>(p + x_bytes + 4 * groups),
                        .stride = cols},
                  .n = rows,
                  .y = {reinterpret_cast<float*>(p + x_bytes + 8 * groups), t.w.rows}};
    }
    return best_rate(*pool, [&](int tid) {
        k.matmul[static_cast<int>(format)](threads[static_cast<size_t>(tid)].args);
        return 2 * int64_t{rows} * kTiles * kTileRows * cols;
    });
}

Result<double> attention_rate(const CpuKernels& k, CacheType kv, int heads, int rows, int positions) {
    constexpr int kC = 512, kR = 64;
    const int row_block = rows <= kSplitRows ? rows : kAttnRowBlock;
    const int head_block = rows <= kSplitRows ? heads : kAttnHeadBlock;
    const int64_t row_bytes = cache_row_bytes(kv, kC, kR), row_q = int64_t{heads} * (kC + kR);
    const int64_t row_o = int64_t{head_block} * kC, ml = round_up(int64_t{row_block} * head_block, 16);
    const int64_t floats = round_up(rows * row_q, 16) + row_block * row_o + 2 * ml;
    DC_TRY(const ZeroedBuffer buffer, ZeroedBuffer::make(round_up(positions * row_bytes, 64) + 4 * floats +
                                                             mla_scratch_bytes(kC, kR, row_block, heads),
                                                         "attention probe"));
    std::byte* p = buffer.data() + round_up(positions * row_bytes, 64);
    float* q = reinterpret_cast<float*>(p);
    uint32_t state = 1;
    const auto random = [&] {  // -1..1
        state = state * 1664525 + 1013904223;
        return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31F;
    };
    std::generate_n(q, rows * row_q, random);
    float row[kC + kR];
    for (int64_t j = 0; j < positions; ++j) {
        std::generate_n(row, kC + kR, random);
        k.cache_write(kv, row, kC, row + kC, kR, buffer.data() + j * row_bytes);
    }
    std::vector<int32_t> ends(static_cast<size_t>(row_block));
    MlaPartialArgs a{.type = kv, .cache = {buffer.data(), row_bytes}, .c_pad = kC, .r_pad = kR};
    a.bf16_dot = cpu_policy().bf16_dot;
    a.row_end = ends.data();
    a.softmax_scale = 0.1F;
    a.o = {q + round_up(rows * row_q, 16), row_o};
    a.m = {a.o.row(row_block), head_block};
    a.l = {a.m.data + ml, head_block};
    a.scratch = a.l.data + ml;
    DC_TRY(const auto pool, ThreadPool::make(1));
    return best_rate(*pool, [&](int) {
        for (int i = 0; i < rows; i += row_block) {
            a.n_rows = std::min(row_block, rows - i);
            for (int h = 0; h < heads; h += head_block) {
                a.n_heads = std::min(head_block, heads - h);
                a.q = {q + i * row_q + int64_t{h} * (kC + kR), row_q};
                for (a.pos_begin = 0; a.pos_begin < positions; a.pos_begin += kPartialLen) {
                    std::fill(ends.begin(), ends.end(), std::min(positions, a.pos_begin + kPartialLen));
                    a.same_q = a.pos_begin > 0;
                    k.mla_partial(a);
                }
            }
        }
        return 2 * int64_t{rows} * heads * positions * (2 * kC + kR);
    });
}

}  // namespace deepcalm
