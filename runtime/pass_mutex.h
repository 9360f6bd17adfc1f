// A mutex that is first come, first served, and that knows fork(). Held or waited for by other threads at that moment it would
// stay locked in the child for ever, and what it guards be half done there: lock() throws InUseAtFork instead of waiting.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <unistd.h>

namespace deepcalm {

struct InUseAtFork : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class PassMutex {
  public:
    void lock() {
        enter_process();
        const uint32_t ticket = next_.fetch_add(1, std::memory_order_acq_rel);
        for (uint32_t now = 0; (now = serving_.load(std::memory_order_acquire)) != ticket;)
            serving_.wait(now, std::memory_order_relaxed);
    }
    void unlock() {
        serving_.fetch_add(1, std::memory_order_release);
        serving_.notify_all();
    }

  private:
    void enter_process() {
        const pid_t self = getpid();
        pid_t known = process_.load(std::memory_order_acquire);
        if (known == self) return;
        if (next_.load(std::memory_order_acquire) == serving_.load(std::memory_order_relaxed)) {
            process_.compare_exchange_strong(known, self, std::memory_order_acq_rel);
            return;
        }
        if (process_.load(std::memory_order_acquire) == self) return;  // another thread of the child was faster
        throw InUseAtFork("this process was forked while another thread was using the model: open it again here, or "
                          "fork between passes");
    }

    std::atomic<uint32_t> next_{0}, serving_{0};  // tickets: the next one's, that of the thread that holds the mutex
    std::atomic<pid_t> process_{getpid()};        // whose threads have tickets
};

}  // namespace deepcalm
