// A mutex that knows fork(). Held by another thread at that moment it would stay locked in the child for ever, and what it
// guards be half done there: lock() throws InUseAtFork instead of waiting.
#pragma once

#include <atomic>
#include <stdexcept>
#include <unistd.h>

namespace deepcalm {

struct InUseAtFork : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class PassMutex {
  public:
    void lock() {
        const pid_t self = getpid();
        for (pid_t holder = 0; !holder_.compare_exchange_weak(holder, self, std::memory_order_acquire); holder = 0) {
            if (holder == 0) continue;
            if (holder != self) {
                throw InUseAtFork(
                    "this process was forked while another thread was using the model: open it again here, or "
                    "fork between passes");
            }
            holder_.wait(holder, std::memory_order_relaxed);
        }
    }
    void unlock() {
        holder_.store(0, std::memory_order_release);
        holder_.notify_one();
    }

  private:
    std::atomic<pid_t> holder_{0};  // process of the thread that holds it
};

}  // namespace deepcalm
