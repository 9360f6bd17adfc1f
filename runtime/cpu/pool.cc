#include "runtime/cpu/pool.h"

#include "runtime/float_mode.h"

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

struct Abandoned {};  // thrown by barrier() where another thread has failed

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    // With more threads than processors the one that is waited for needs a waiting thread's place: always sleep soon.
    if (sched_getaffinity(0, sizeof mask, &mask) == 0 && n_threads_ > CPU_COUNT(&mask)) full_spins_ = kMinSpins;
}

Result<std::unique_ptr<ThreadPool>> ThreadPool::make(int n_threads) {
    if (n_threads < 1 || n_threads > kMaxThreads) {
        return Error{ErrorCode::kResource,
                     "threads: " + std::to_string(n_threads) + ", expected 1.." + std::to_string(kMaxThreads)};
    }
    std::unique_ptr<ThreadPool> pool(new ThreadPool(n_threads));
    DC_TRY_STATUS(pool->start());
    return pool;
}

ThreadPool::~ThreadPool() {
    if (owner_pid_ == getpid()) {
        stop();
    } else {
        (void)workers_
            .release();  // threads of the parent process: neither to join nor to detach, others may have their ids
    }
}

Status ThreadPool::start() {
    stop_ = false;
    const uint32_t seen = generation_.load();
    try {
        workers_ = std::make_unique<std::vector<std::thread>>();
        workers_->reserve(static_cast<size_t>(n_threads_ - 1));
        for (int tid = 1; tid < n_threads_; ++tid) workers_->emplace_back([this, tid, seen] { worker(tid, seen); });
    } catch (const std::exception& e) {
        const std::string started = std::to_string(workers_ == nullptr ? 1 : workers_->size() + 1);
        stop();
        return Error{ErrorCode::kResource, "threads: " + std::to_string(n_threads_) + ", of which the system allows " +
                                               started + " (" + e.what() + "); ask for fewer"};
    }
    owner_pid_ = getpid();
    return {};
}

void ThreadPool::stop() {
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    if (workers_ != nullptr) {
        for (auto& w : *workers_) w.join();
    }
    workers_.reset();
}

void ThreadPool::worker(int tid, uint32_t seen) {
    const FloatMode mode;
    for (;;) {
        int spins = 0;
        while (generation_.load(std::memory_order_acquire) == seen) {
            if (++spins < spin_limit_.load(std::memory_order_relaxed)) {
                pause();
            } else {
                generation_.wait(seen, std::memory_order_acquire);  // idle: sleep until the next run
            }
        }
        ++seen;
        if (stop_) return;
        call(tid);
        if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) working_.notify_one();
    }
}

// fn(tid) of this run. A thread that fails counts as arrived wherever others wait for it: they see why and leave.
void ThreadPool::call(int tid) {
    try {
        call_(ctx_, tid);
    } catch (const Abandoned&) {
    } catch (...) {
        if (!failed_.exchange(true, std::memory_order_acq_rel)) error_ = std::current_exception();
        phase_.fetch_add(1, std::memory_order_release);
        phase_.notify_all();
    }
}

Status ThreadPool::dispatch(bool alone) {
    if (!alone && owner_pid_ != getpid()) {  // after fork()
        (void)workers_.release();
        DC_TRY_STATUS(start());
    }
    active_ = alone ? 1 : n_threads_;
    arrived_ = 0;
    dealt_ = 0;
    failed_ = false;
    working_ = static_cast<uint32_t>(active_ - 1);
    if (active_ > 1) {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    {
        const FloatMode mode;
        call(0);
    }
    for (uint32_t n; (n = working_.load(std::memory_order_acquire)) != 0;) await(working_, n);
    if (!failed_) return {};
    try {
        std::rethrow_exception(std::exchange(error_, nullptr));
    } catch (const std::bad_alloc&) {
        return Error{ErrorCode::kResource, "out of memory"};
    } catch (const std::exception& e) {
        return Error{ErrorCode::kResource, e.what()};
    }
}

void ThreadPool::barrier() {
    if (active_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (!failed_.load(std::memory_order_acquire)) {
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == active_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            dealt_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();  // a system call only if somebody sleeps
            return;
        }
        await(phase_, phase);
    }
    if (failed_.load(std::memory_order_acquire)) throw Abandoned{};
}

// Returns when `word` is no longer `seen`.
void ThreadPool::await(std::atomic<uint32_t>& word, uint32_t seen) {
    // A wait that ends in sleep means that a core is missing: spin less next time, try in full again now and then.
    const int limit = waits_.fetch_add(1, std::memory_order_relaxed) % kRetry == 0
                          ? full_spins_
                          : spin_limit_.load(std::memory_order_relaxed);
    for (int spins = 0; word.load(std::memory_order_acquire) == seen;) {
        if (++spins < limit) {
            pause();
        } else {
            spin_limit_.store(kMinSpins, std::memory_order_relaxed);
            word.wait(seen, std::memory_order_acquire);
            return;
        }
    }
    if (limit == full_spins_) spin_limit_.store(full_spins_, std::memory_order_relaxed);
}

bool crowded(int n) {
    int running = 0;  // this thread among them
    if (std::FILE* f = std::fopen("/proc/loadavg", "r"); f != nullptr) {
        if (std::fscanf(f, "%*f %*f %*f %d/", &running) != 1) running = 0;
        std::fclose(f);
    }
    return running + n > sysconf(_SC_NPROCESSORS_ONLN);
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
