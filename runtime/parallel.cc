#include "runtime/parallel.h"

#include <cstdio>
#include <sched.h>
#include <set>
#include <utility>

namespace deepcalm {
namespace {

// Spinning covers every stage imbalance of a decode step; after that the thread sleeps, so that on a busy machine, or with
// more threads than cores, the one that is waited for gets the core. (sched_yield() instead let 2 threads on an overloaded
// machine fall to a fortieth of 1 thread's speed.)
constexpr int kMinSpins = 50;
constexpr uint32_t kRetry = 32;  // every so many waits spin in full

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads < 1 ? 1 : n_threads) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    // With more threads than processors the one that is waited for needs a waiting thread's place: always sleep soon.
    if (sched_getaffinity(0, sizeof mask, &mask) == 0 && n_threads_ > CPU_COUNT(&mask)) full_spins_ = kMinSpins;
    start();
}

ThreadPool::~ThreadPool() {
    if (owner_pid_ == getpid()) {
        stop();
    } else {
        for (auto& w : workers_) w.detach();  // threads of the parent process: not ours to join
    }
}

void ThreadPool::start() {
    owner_pid_ = getpid();
    stop_ = false;
    arrived_ = 0;
    const uint32_t seen = generation_.load();
    for (int tid = 1; tid < n_threads_; ++tid) workers_.emplace_back([this, tid, seen] { worker(tid, seen); });
}

void ThreadPool::stop() {
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
}

void ThreadPool::worker(int tid, uint32_t seen) {
    for (;;) {
        int spins = 0;
        while (generation_.load(std::memory_order_acquire) == seen) {
            if (++spins < full_spins_) {
                pause();
            } else {
                generation_.wait(seen, std::memory_order_acquire);  // idle: sleep until the next run
            }
        }
        ++seen;
        if (stop_) return;
        call_(ctx_, tid);
        barrier();
    }
}

void ThreadPool::dispatch() {
    if (owner_pid_ != getpid()) {  // after fork()
        for (auto& w : workers_) w.detach();
        workers_.clear();
        start();
    }
    if (n_threads_ > 1) {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    call_(ctx_, 0);
    barrier();
}

void ThreadPool::barrier() {
    if (n_threads_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        dealt_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();  // a system call only if somebody sleeps
        return;
    }
    // A wait that ends in sleep means that a core is missing: spin less next time, try in full again now and then.
    const int limit = waits_.fetch_add(1, std::memory_order_relaxed) % kRetry == 0
                          ? full_spins_
                          : spin_limit_.load(std::memory_order_relaxed);
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
        if (++spins < limit) {
            pause();
        } else {
            spin_limit_.store(kMinSpins, std::memory_order_relaxed);
            phase_.wait(phase, std::memory_order_acquire);
            return;
        }
    }
    if (limit == full_spins_) spin_limit_.store(full_spins_, std::memory_order_relaxed);
}

int default_threads() {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 1;
    std::set<std::pair<int, int>> cores;  // (package, core): hyperthreads share both
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &mask)) continue;
        const auto read = [cpu](const char* file) {
            char path[128];
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, file);
            int value = -1 - cpu;  // unknown topology: every processor counts as a core
            if (std::FILE* f = std::fopen(path, "r"); f != nullptr) {
                if (std::fscanf(f, "%d", &value) != 1) value = -1 - cpu;
                std::fclose(f);
            }
            return value;
        };
        cores.emplace(read("physical_package_id"), read("core_id"));
    }
    return cores.empty() ? 1 : static_cast<int>(cores.size());
}

}  // namespace deepcalm
