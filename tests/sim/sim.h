// The GPU, simulated on the CPU for the seam rt.h: what a block, a warp, an asynchronous copy and a dependent launch mean.
//
// A block is an OS thread, a CUDA thread a fiber, so a warp operation is a rendezvous of 32 fibers. The simulation is on
// purpose as unkind as the hardware may be: shared memory is poisoned, an asynchronous copy poisons its destination and
// lands only when it is waited for, a dependent grid runs up to its wait before its predecessor starts, and threads run in
// the order that DEEPCALM_SIM_ORDER asks for (fwd, rev, or a seed). Deadlocks, lanes meeting at different operations,
// barriers met at different lines, misaligned or unwaited copies stop the process with a message. Under
// ThreadSanitizer a missing barrier is a data race, under AddressSanitizer a wrong row is an overflow.
// It says nothing about speed, bank conflicts, registers, occupancy, or the order of memory between blocks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <thread>
#include <vector>

namespace deepcalm::sim {

#define DC_SIM_NOSAN __attribute__((no_sanitize("thread", "address")))

// --- inside a kernel ------------------------------------------------------------------------------------------------

struct Place {
    int thread = 0, threads = 0, block = 0, blocks = 0;
};
const Place& place();
unsigned char* dynamic_smem();

void sync_block(const char* file, unsigned line);
void sync_warp();
void dependency_wait();  // the end of the prologue of a dependent launch

enum class WarpOp : uint8_t { kNone, kSync, kShfl, kShflXor, kMmaBF16, kMmaF16, kMmaS8, kLdmatrix };
inline constexpr int kIn = 48, kOut = 16;  // bytes that a lane gives to and takes from a warp operation
using WarpFn = void (*)(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]);
// All 32 lanes meet: each gives `bytes`, the last one runs fn (may be null), each gets its own kOut bytes in `out` (may be
// null) and, as the result, everybody's input, valid until the lane's next warp operation.
const unsigned char (*meet(WarpOp op, const void* in, int bytes, WarpFn fn, void* out))[kIn];

void cp_async(void* dst, const void* src, int bytes);
void cp_commit();
void cp_wait(int newer);  // all but the newest `newer` groups of this thread have landed
void mbar_init(uint64_t* bar, int count);
void mbar_inval(uint64_t* bar);
void mbar_expect(uint64_t* bar, int bytes);  // arrives and adds bytes to wait for
void mbar_wait(uint64_t* bar, int parity);
void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar);

void mma_bf16(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]);  // in: c[4] f32, a[4], b[2]
void mma_f16(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]);
void mma_s8(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]);
void ldmatrix_x4_trans(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]);  // in: pointer to an 8-element row

// --- on the host ----------------------------------------------------------------------------------------------------

// What the simulated device plays; tests change it through deepcalm_sim().
struct Device {
    std::atomic<int64_t> smem{227 << 10};  // bytes of dynamic shared memory that a block may have
    std::atomic<int64_t> calls{0};         // of the seam, so far
    std::atomic<int64_t> fail_at{0};       // the call that fails ...
    std::atomic<int64_t> throw_at{0};      // ... or throws
    std::atomic<int64_t> hang{0};          // not 0: nothing that is queued ends
};
inline Device device;
// Every call of the seam passes here: 0, or the error that a test asked for.
inline int call() {
    const int64_t n = ++device.calls;
    if (n == device.throw_at) throw std::bad_alloc();
    return n == device.fail_at ? 1 : 0;
}

struct Launch {
    int grid = 1, block = 32;
    int64_t smem = 0;
    bool dependent = false;
};
struct Job {
    Launch launch;
    std::function<void()> body;  // a kernel call; or, with launch.grid == 0, host work in stream order
};
// A queue of work in order. Nothing runs before sync().
struct Stream {
    std::vector<Job> queue;
    bool capturing = false;  // its queue becomes a graph
};
void run(std::vector<Job> jobs);
inline void drain(Stream& s) {
    while (device.hang != 0) std::this_thread::yield();
    std::vector<Job> jobs;
    jobs.swap(s.queue);
    run(std::move(jobs));
}
inline int sync(Stream& s) {
    const int e = call();
    if (e != 0) s.queue.clear();  // the device is lost, and what was queued with it
    drain(s);
    return e;
}

}  // namespace deepcalm::sim
