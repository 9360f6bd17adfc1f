// Preloaded into a process of the tests: operator new that can be told to fail once, or several times in a row.
#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> left{-1};  // allocations until one fails; below 0: never
std::atomic<long> more{0};   // that fail right behind it

bool fails() {
    if (left.load() < 0 || left.fetch_sub(1) != 0) return false;
    if (more.fetch_sub(1) > 0) left = 0;
    return true;
}
}  // namespace

// So many more behind the next one that fails. Returns the last order, less those that did.
extern "C" long fail_more(long n) { return more.exchange(n); }

// The n-th allocation from now on fails, n >= 0; -1: none. Returns how many were left of the last order.
extern "C" long fail_allocation(long n) { return left.exchange(n); }

void* operator new(std::size_t bytes) {
    void* p = fails() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
    return p != nullptr ? p : throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
