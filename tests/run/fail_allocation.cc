// Preloaded into a process of the tests: operator new that can be told to fail once.
#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> left{-1};  // allocations until one fails; below 0: never
}

// The n-th allocation from now on fails, n >= 0; -1: none. Returns how many were left of the last order.
extern "C" long fail_allocation(long n) { return left.exchange(n); }

void* operator new(std::size_t bytes) {
    void* p = left.load() >= 0 && left.fetch_sub(1) == 0 ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
    return p != nullptr ? p : throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
