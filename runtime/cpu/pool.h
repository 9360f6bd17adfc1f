// A persistent SPMD pool: every thread runs the same pass from start to end and meets the others at barriers, as the blocks
// of a GPU grid do. No fork and join per product. Small work is dealt by a fixed rule (split()), the reading of weights and
// cache by arrival (deal()): two cores seldom read memory equally fast, and one may be busy with something else.
#pragma once

#include "runtime/result.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <unistd.h>
#include <vector>

namespace deepcalm {

struct Range {
    int begin, end;
};
// Contiguous share of [0, n) for thread tid of n_threads.
constexpr Range split(int64_t n, int tid, int n_threads) {
    return {static_cast<int>(n * tid / n_threads), static_cast<int>(n * (tid + 1) / n_threads)};
}

inline constexpr int kMaxThreads = 1024;

class ThreadPool {
  public:
    // Starts n_threads - 1 threads, or none: an error if n_threads is not 1..kMaxThreads or the system refuses one of them.
    static Result<std::unique_ptr<ThreadPool>> make(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return n_threads_; }
    int active() const { return active_; }  // threads of the current run()

    // Runs fn(tid) on every thread, the caller being thread 0, or `alone` on the caller; returns when all are done. One caller
    // at a time. Every thread computes in the default floating-point mode. What fn throws on a thread ends the run: the others
    // leave at their next barrier, and the error is returned.
    template <class Fn> Status run(Fn&& fn, bool alone = false) {
        call_ = [](void* ctx, int tid) { (*static_cast<std::remove_reference_t<Fn>*>(ctx))(tid); };
        ctx_ = &fn;
        return dispatch(alone);
    }

    // Every thread of the current run() must call it the same number of times.
    void barrier();

    // fn(Range) for pieces of [0, n) until all are taken: large pieces first, at last `least` at a time. Every thread of
    // the current run() calls it with the same n; at most once between two barriers, which give back the count.
    template <class Fn> void deal(int n, int least, Fn&& fn) {
        if (active_ == 1) {
            if (n > 0) fn(Range{0, n});
            return;
        }
        for (int begin = dealt_.load(std::memory_order_relaxed); begin < n;) {
            const int end = std::min(n, begin + std::max(least, (n - begin) / (2 * active_) / least * least));
            if (dealt_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
                fn(Range{begin, end});
                begin = dealt_.load(std::memory_order_relaxed);
            }
        }
    }

  private:
    explicit ThreadPool(int n_threads);
    Status start();
    void stop();
    Status dispatch(bool alone);
    void call(int tid);
    void worker(int tid, uint32_t seen);
    void await(std::atomic<uint32_t>& word, uint32_t seen);

    const int n_threads_;
    int active_ = 1;
    int full_spins_ = 4000;  // pauses before a waiting thread sleeps, while every thread has its core
    pid_t owner_pid_ = 0;    // workers do not survive fork(): the child starts its own
    void (*call_)(void*, int) = nullptr;
    void* ctx_ = nullptr;
    std::unique_ptr<std::vector<std::thread>> workers_;
    bool stop_ = false;
    std::exception_ptr error_;                          // what ended the run first
    std::atomic<bool> failed_{false};                   // then every barrier throws
    alignas(128) std::atomic<uint32_t> generation_{0};  // bumped to start a run
    alignas(128) std::atomic<int> arrived_{0};
    alignas(128) std::atomic<uint32_t> phase_{0};
    alignas(128) std::atomic<uint32_t> working_{0};  // workers that have not ended the run
    alignas(128) std::atomic<int> dealt_{0};         // of the deal() of this stage
    alignas(128) std::atomic<int> spin_limit_{1};    // the same as it turned out lately
    std::atomic<uint32_t> waits_{0};
};

// Which passes run on the caller's thread alone. Waking all threads and meeting them costs microseconds a stage, and time
// slices beside a process that keeps one of their cores: what passes of a kind took, either way, decides. The other way is
// tried seldom enough to lose 2 % at most; all threads not while cores are missing, one not while all are at work.
class ThreadChoice {
  public:
    // Kinds are passes whose costs compare: rows, at most kLong, and the same again for MTP passes.
    static constexpr int kLong = 9, kKinds = 2 * (kLong + 1);
    ThreadChoice() { kinds_[kLong].alone = kinds_[kKinds - 1].alone = false; }
    bool alone(int kind) const { return kinds_[kind].trying != kinds_[kind].alone; }
    // After a pass: its cost, in any unit; the share of their time that its threads waited for each other, 0..1.
    // crowded(): whether cores for all threads are missing at present.
    template <class Crowded> void ran(int kind, double cost, double waited, Crowded&& crowded) {
        Kind& k = kinds_[kind];
        double& mean = k.cost[alone(kind)];
        mean = mean == 0 || k.trying ? cost : mean + (cost - mean) / 4;
        k.keep -= 1;
        if (k.trying) k.keep = static_cast<int>(std::clamp(50 * (cost / k.cost[k.alone] - 1), 16.0, 5000.0));
        if (k.cost[0] != 0 && k.cost[1] != 0) k.alone = k.cost[1] < 1.03 * k.cost[0];
        k.trying = !k.trying && k.keep <= 0 && (k.alone || waited > 0.25);
        if (k.trying && k.alone && ++k.put_off < 10 && crowded()) {
            k.trying = false;
            k.keep = 16;
        }
        if (k.trying) k.put_off = 0;
    }

  private:
    struct Kind {
        double cost[2] = {};  // of passes on all threads, alone: running means; 0: unknown
        bool alone = true;    // the better way
        bool trying = false;  // the next pass goes the other way
        int keep = 2;         // passes before it does
        int put_off = 0;      // times that it did not for want of cores
    };
    Kind kinds_[kKinds];
};
// Whether the system has no idle processor for each of n more threads, as of now.
bool crowded(int n);

// Threads to use by default: distinct physical cores of the affinity mask.
int default_threads();

}  // namespace deepcalm
