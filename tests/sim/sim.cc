#include "tests/sim/sim.h"

#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <thread>

#if defined(__SANITIZE_THREAD__)
#define DC_TSAN 1
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* addr);
void __tsan_release(void* addr);
}
#else
#define DC_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define DC_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
}
#else
#define DC_ASAN 0
#endif

// --- context switch -------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(DEEPCALM_SIM_UCONTEXT)
extern "C" void dc_sim_switch(void** from, void* to);
asm(R"(
.text
.globl dc_sim_switch
.hidden dc_sim_switch
.type dc_sim_switch,@function
dc_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size dc_sim_switch,.-dc_sim_switch
)");
#else
#include <ucontext.h>
#define DC_UCONTEXT 1
#endif

namespace deepcalm::sim {
namespace {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kGuard = 4096, kStack = DC_TSAN || DC_ASAN ? 256 * 1024 : 64 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer

#ifdef DC_UCONTEXT
using Context = ucontext_t;
#else
using Context = void*;  // stack pointer
#endif

struct Warp {
    uint32_t arrived = 0;
    unsigned generation = 0;
    WarpOp op = WarpOp::kNone;
    alignas(16) unsigned char in[2][kWarp][kIn], out[2][kWarp][kOut];
};

struct PendingCopy {
    void* dst;
    const void* src;
    int bytes;
    int group;      // cp.async: commit group
    uint64_t* bar;  // bulk copy: its barrier
};

// A fixed list: a std::vector's own code would be instrumented, and its fibers taken for racing threads.
struct CopyList {
    static constexpr int kMax = 96;
    PendingCopy c[kMax];
    int n = 0;
};

struct Fiber {
    Context context{};
    char* stack = nullptr;
    bool done = false;
    const unsigned* waits_on = nullptr;  // not runnable while *waits_on == waits_for
    unsigned waits_for = 0;
    int committed = 0;           // cp.async groups
    CopyList* copies = nullptr;  // apart: the scheduler walks over the fibers
    void *tsan = nullptr, *fake_stack = nullptr;
};

// One grid in flight.
struct Grid {
    std::mutex m;
    std::condition_variable cv;
    bool released = true;          // dependent launches: the predecessor has finished
    int parked = 0, finished = 0;  // blocks
    std::atomic<int> next{0};
    int workers_left = 0;
};

struct Block {
    Place place;
    Launch launch;
    Grid* grid = nullptr;
    const std::function<void()>* body = nullptr;
    int current = 0, alive = 0;
    const std::vector<int>* order = nullptr;  // of this round; the threads before `turn` have had theirs
    size_t turn = 0;
    int arrived = 0;
    unsigned generation = 0;  // block barrier
    unsigned barrier_line = 0;
    const char* barrier_file = "";
    uint64_t progress = 0;
    bool at_dependency = false;
    unsigned char* smem = nullptr;
    CopyList bulk;
    Warp warp[kMaxThreads / kWarp];
    Fiber fiber[kMaxThreads];
    CopyList copies[kMaxThreads];
    Context main{};
    void *main_tsan = nullptr, *main_fake = nullptr;
    const void* main_bottom = nullptr;
    size_t main_size = 0;

    ~Block() {
        for (Fiber& f : fiber)
            if (f.stack) munmap(f.stack, kStack + kGuard);
    }
};
thread_local Block* b = nullptr;

[[noreturn]] DC_SIM_NOSAN void die(const char* what, const char* file = "", unsigned line = 0) {
    std::fprintf(stderr, "sim: %s (block %d, thread %d) %s:%u\n", what, b ? b->place.block : -1, b ? b->current : -1,
                 file, line);
    std::abort();
}

DC_SIM_NOSAN void acquire([[maybe_unused]] void* p) {
#if DC_TSAN
    __tsan_acquire(p);
#endif
}
DC_SIM_NOSAN void release([[maybe_unused]] void* p) {
#if DC_TSAN
    __tsan_release(p);
#endif
}

DC_SIM_NOSAN void switch_context(Context& from, Context& to) {
#ifdef DC_UCONTEXT
    swapcontext(&from, &to);
#else
    dc_sim_switch(&from, to);
#endif
}

// The next thread of the round that can go on, with its turn begun; null: the round is over.
DC_SIM_NOSAN Fiber* next_turn() {
    while (b->turn < b->order->size()) {
        b->current = b->place.thread = (*b->order)[b->turn++];
        Fiber& f = b->fiber[b->current];
        if (!f.done && !(f.waits_on && *f.waits_on == f.waits_for)) return &f;
    }
    return nullptr;
}

DC_SIM_NOSAN void yield() {
    [[maybe_unused]] Fiber& me = b->fiber[b->current];
#if !DC_TSAN && !DC_ASAN  // whose bookkeeping knows the way over the scheduler
    if (Fiber* next = next_turn()) {
        switch_context(me.context, next->context);
        return;
    }
#endif
#if DC_TSAN
    __tsan_switch_to_fiber(b->main_tsan, 1);
#endif
#if DC_ASAN
    __sanitizer_start_switch_fiber(me.done ? nullptr : &me.fake_stack, b->main_bottom, b->main_size);
#endif
    switch_context(me.context, b->main);
#if DC_ASAN
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

// Sleeps until *counter moves on from `value`; the scheduler checks without a switch.
DC_SIM_NOSAN void wait_while(const unsigned* counter, unsigned value) {
    Fiber& me = b->fiber[b->current];
    me.waits_on = counter;
    me.waits_for = value;
    yield();
    me.waits_on = nullptr;
}

DC_SIM_NOSAN void open_barrier_if_full() {
    if (b->arrived > 0 && b->arrived == b->alive) {
        b->arrived = 0;
        ++b->generation;
    }
}

DC_SIM_NOSAN void finish() {
    Fiber& me = b->fiber[b->current];
    if (me.copies->n > 0) die("thread ends with cp.async copies that it never waited for");
    me.done = true;
    --b->alive;
    ++b->progress;
    if (b->arrived > 0) die("thread ends while others wait at a block barrier", b->barrier_file, b->barrier_line);
    if (b->alive == 0 && b->bulk.n > 0) die("block ends with bulk copies that it never waited for");
    release(b);
}

DC_SIM_NOSAN void entry() {
#if DC_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &b->main_bottom, &b->main_size);
#endif
    (*b->body)();
    finish();
    yield();
    die("a finished thread was resumed");
}

DC_SIM_NOSAN void start_fiber(Fiber& f) {
    if (!f.stack) {
        void* p =
            mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) die("no memory for fiber stacks");
        f.stack = static_cast<char*>(p);
        mprotect(f.stack, kGuard, PROT_NONE);
    }
    f.copies = &b->copies[&f - b->fiber];
    f.done = false;
    f.waits_on = nullptr;
    f.committed = 0;
    f.fake_stack = nullptr;
#ifdef DC_UCONTEXT
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack + kGuard;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#else
    void** sp = reinterpret_cast<void**>(f.stack + kGuard + kStack - 64);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.context = sp;
#endif
#if DC_TSAN
    f.tsan = __tsan_create_fiber(0);
#endif
}

DC_SIM_NOSAN void resume(Fiber& f) {
#if DC_TSAN
    __tsan_switch_to_fiber(f.tsan, 1);
#endif
#if DC_ASAN
    __sanitizer_start_switch_fiber(&b->main_fake, f.stack + kGuard, kStack);
#endif
    switch_context(b->main, f.context);
#if DC_ASAN
    __sanitizer_finish_switch_fiber(b->main_fake, nullptr, nullptr);
#endif
}

// The order in which the threads of a block get their turns.
class Order {
  public:
    Order(int n, int block) : order_(static_cast<size_t>(n)) {
        const char* env = std::getenv("DEEPCALM_SIM_ORDER");
        const bool rev = env && std::strcmp(env, "rev") == 0;
        if (env && !rev) seed_ = static_cast<unsigned>(std::atoi(env));
        rng_ = seed_ + 2654435761U * static_cast<unsigned>(block) + 1;
        for (int i = 0; i < n; ++i) order_[static_cast<size_t>(i)] = rev ? n - 1 - i : i;
    }
    const std::vector<int>& next() {
        if (seed_ != 0) {
            for (size_t i = order_.size() - 1; i > 0; --i) {
                rng_ = rng_ * 1664525U + 1013904223U;
                std::swap(order_[i], order_[(rng_ >> 8) % (i + 1)]);
            }
        }
        return order_;
    }

  private:
    std::vector<int> order_;
    unsigned seed_ = 0, rng_ = 0;
};

DC_SIM_NOSAN void run_block(Block& block, int index) {
    b = &block;
    block.place.block = index;
    block.alive = block.place.threads;
    block.arrived = 0;
    block.at_dependency = false;
    block.bulk.n = 0;
    const auto smem_bytes = static_cast<size_t>((block.launch.smem + 127) / 128 * 128);
    block.smem = nullptr;
    if (smem_bytes > 0) {
        block.smem = static_cast<unsigned char*>(std::aligned_alloc(128, smem_bytes));
        std::memset(block.smem, kPoison, smem_bytes);
    }
#if DC_TSAN
    block.main_tsan = __tsan_get_current_fiber();
#endif
    for (Warp& w : block.warp) w.arrived = 0;
    for (int i = 0; i < block.place.threads; ++i) start_fiber(block.fiber[i]);
    Order order(block.place.threads, index);
    while (block.alive > 0) {
        const uint64_t before = block.progress;
        block.order = &order.next();
        block.turn = 0;
        while (Fiber* f = next_turn()) resume(*f);
        if (block.alive > 0 && block.progress == before) {
            if (!block.at_dependency)
                die("deadlock: no thread of the block can go on", block.barrier_file, block.barrier_line);
            std::unique_lock lock(block.grid->m);
            ++block.grid->parked;
            block.grid->cv.notify_all();
            block.grid->cv.wait(lock, [&] { return block.grid->released; });
            block.at_dependency = false;
        }
    }
    acquire(&block);
#if DC_TSAN
    for (int i = 0; i < block.place.threads; ++i) __tsan_destroy_fiber(block.fiber[i].tsan);
#endif
    std::free(block.smem);
    b = nullptr;
}

// Workers are created on demand and kept: a dependent grid needs one per block at the same time.
class Pool {
  public:
    static Pool& get() {
        static Pool pool;
        return pool;
    }
    ~Pool() {
        {
            const std::lock_guard lock(m_);
            stop_ = true;
        }
        cv_.notify_all();
        for (std::thread& t : threads_) t.join();
    }
    void submit(std::function<void(Block&)> task) {
        const std::lock_guard lock(m_);
        tasks_.push_back(std::move(task));
        if (idle_ < static_cast<int>(tasks_.size())) threads_.emplace_back([this] { work(); });
        cv_.notify_one();
    }

  private:
    void work() {
        const auto block = std::make_unique<Block>();
        std::unique_lock lock(m_);
        for (;;) {
            ++idle_;
            cv_.wait(lock, [&] { return stop_ || !tasks_.empty(); });
            --idle_;
            if (tasks_.empty()) return;
            const auto task = std::move(tasks_.front());
            tasks_.pop_front();
            lock.unlock();
            task(*block);
            lock.lock();
        }
    }
    std::mutex m_;
    std::condition_variable cv_;
    std::deque<std::function<void(Block&)>> tasks_;
    std::vector<std::thread> threads_;
    int idle_ = 0;
    bool stop_ = false;
};

class GridRun {
  public:
    // early: runs only up to dependency_wait() until release().
    GridRun(const Job& job, bool early) : job_(job) {
        const Launch& l = job.launch;
        if (l.block < kWarp || l.block > kMaxThreads || l.block % kWarp != 0)
            die("threads per block must be a multiple of 32");
        const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
        const int n = early ? l.grid : std::min(l.grid, cores);
        if (n > 256) die("dependent launches are limited to 256 blocks");
        grid_.released = !early;
        grid_.workers_left = n;
        for (int i = 0; i < n; ++i) Pool::get().submit([this](Block& block) { work(block); });
        if (early) {
            std::unique_lock lock(grid_.m);
            grid_.cv.wait(lock, [&] { return grid_.parked + grid_.finished >= l.grid; });
        }
    }
    void release_dependents() {
        release(&grid_);
        const std::lock_guard lock(grid_.m);
        grid_.released = true;
        grid_.cv.notify_all();
    }
    void join() {
        std::unique_lock lock(grid_.m);
        grid_.cv.wait(lock, [&] { return grid_.workers_left == 0; });
    }

  private:
    void work(Block& block) {
        block.launch = job_.launch;
        block.grid = &grid_;
        block.body = &job_.body;
        block.place.threads = job_.launch.block;
        block.place.blocks = job_.launch.grid;
        for (int i; (i = grid_.next.fetch_add(1)) < job_.launch.grid;) {
            run_block(block, i);
            const std::lock_guard lock(grid_.m);
            ++grid_.finished;
            grid_.cv.notify_all();
        }
        const std::lock_guard lock(grid_.m);
        --grid_.workers_left;
        grid_.cv.notify_all();
    }
    Job job_;
    Grid grid_;
};

// Land copies: raw, so that the sanitizers do not take the copy engine for a thread.
DC_SIM_NOSAN void land(const PendingCopy& c) {
    for (int i = 0; i < c.bytes; ++i)
        static_cast<volatile unsigned char*>(c.dst)[i] = static_cast<const volatile unsigned char*>(c.src)[i];
}
// The destination belongs to the copy from here on: a write that ThreadSanitizer sees.
void poison(void* dst, int bytes) {
    for (int i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(dst)[i] = kPoison;
}
// A read that AddressSanitizer sees.
void touch(const void* src, int bytes) {
    static_cast<void>(static_cast<const volatile unsigned char*>(src)[0]);
    static_cast<void>(static_cast<const volatile unsigned char*>(src)[bytes - 1]);
}

DC_SIM_NOSAN void add_copy(CopyList& list, const PendingCopy& c) {
    if (list.n == CopyList::kMax) die("too many asynchronous copies in flight");
    list.c[list.n++] = c;
}
// Lands and drops the copies of `bar`, or (bar == null) those of groups below `group`; returns their bytes.
DC_SIM_NOSAN int land_copies(CopyList& list, const uint64_t* bar, int group) {
    int kept = 0, bytes = 0;
    for (int i = 0; i < list.n; ++i) {
        const PendingCopy c = list.c[i];
        if (bar ? c.bar != bar : c.group >= group) {
            list.c[kept++] = c;
        } else {
            land(c);
            bytes += c.bytes;
        }
    }
    list.n = kept;
    return bytes;
}

// What the 64 bits of a barrier hold. `live` marks an initialised one: shared memory starts as all ones.
struct Barrier {
    int32_t bytes;
    int8_t pending, count, phase;
    uint8_t live;
};
constexpr uint8_t kLive = 0x5a;
DC_SIM_NOSAN Barrier* barrier(uint64_t* p) {
    auto* m = reinterpret_cast<Barrier*>(p);
    if (m->live != kLive) die("barrier in shared memory used before its initialisation");
    return m;
}
DC_SIM_NOSAN void complete(Barrier* m) {
    if (m->pending == 0 && m->bytes == 0) {
        m->phase = static_cast<int8_t>(m->phase ^ 1);
        m->pending = m->count;
        ++b->progress;
    }
}

DC_SIM_NOSAN void queue_cp_async(void* dst, const void* src, int bytes) {
    Fiber& me = b->fiber[b->current];
    add_copy(*me.copies, {dst, src, bytes, me.committed, nullptr});
}
DC_SIM_NOSAN void queue_bulk(void* dst, const void* src, int bytes, uint64_t* bar) {
    add_copy(b->bulk, {dst, src, bytes, 0, bar});
}

const float* f16_table() {
    static const std::vector<float> table = [] {
        std::vector<float> t(65536);
        for (int i = 0; i < 65536; ++i) t[static_cast<size_t>(i)] = f16_to_f32(static_cast<uint16_t>(i));
        return t;
    }();
    return table.data();
}

struct MmaIn {  // of one lane
    uint32_t c[4], a[4], b[2];
};
static_assert(sizeof(MmaIn) <= kIn);

// D = A B + C of m16n8k16: every product exact, one rounding per output. The hardware rounds differently in the last bits.
template <class Value>
DC_SIM_NOSAN void mma_16816(const unsigned char (*in)[kIn], unsigned char (*out)[kOut], Value value) {
    double a[16][16], bt[8][16];
    for (int lane = 0; lane < kWarp; ++lane) {
        MmaIn m;
        __builtin_memcpy(&m, in[lane], sizeof m);
        const int g = lane / 4, q = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + (i & 1) * 8, k = 2 * q + (i >> 1) * 8;
            a[row][k] = value(m.a[i] & 0xffffU);
            a[row][k + 1] = value(m.a[i] >> 16);
        }
        for (int i = 0; i < 2; ++i) {
            bt[g][2 * q + 8 * i] = value(m.b[i] & 0xffffU);
            bt[g][2 * q + 8 * i + 1] = value(m.b[i] >> 16);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, q = lane % 4;
        float d[4];
        for (int i = 0; i < 4; ++i) {
            const int row = g + (i >> 1) * 8, col = 2 * q + (i & 1);
            float c;
            __builtin_memcpy(&c, in[lane] + 4 * i, 4);
            double sum = c;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * bt[col][k];
            d[i] = static_cast<float>(sum);
        }
        __builtin_memcpy(out[lane], d, sizeof d);
    }
}

}  // namespace

DC_SIM_NOSAN const Place& place() { return b->place; }
DC_SIM_NOSAN unsigned char* dynamic_smem() { return b->smem; }

DC_SIM_NOSAN void sync_block(const char* file, unsigned line) {
    if (b->alive != b->place.threads) die("block barrier after a thread has ended", file, line);
    if (b->arrived == 0) {
        b->barrier_file = file;
        b->barrier_line = line;
    } else if (b->barrier_line != line || std::strcmp(b->barrier_file, file) != 0) {
        die("threads of a block wait at different barriers", file, line);
    }
    release(b);
    const unsigned g = b->generation;
    ++b->arrived;
    ++b->progress;
    open_barrier_if_full();
    while (b->generation == g) wait_while(&b->generation, g);
    acquire(b);
}

DC_SIM_NOSAN const unsigned char (*meet(WarpOp op, const void* in, int bytes, WarpFn fn, void* out)) [kIn] {
    const int lane = b->current % kWarp;
    Warp& w = b->warp[b->current / kWarp];
    const unsigned g = w.generation;
    const unsigned half = g & 1;
    if (w.arrived == 0) {
        w.op = op;
    } else if (w.op != op) {
        die("lanes of a warp meet at different operations");
    }
    const auto* from = static_cast<const unsigned char*>(in);
    for (int i = 0; i < bytes; ++i) w.in[half][lane][i] = from[i];
    w.arrived |= 1U << lane;
    ++b->progress;
    if (w.arrived == ~0U) {
        if (fn) fn(w.in[half], w.out[half]);
        w.arrived = 0;
        ++w.generation;
    } else {
        while (w.generation == g) wait_while(&w.generation, g);
    }
    if (out) {
        for (int i = 0; i < kOut; ++i) static_cast<unsigned char*>(out)[i] = w.out[half][lane][i];
    }
    return w.in[half];
}

DC_SIM_NOSAN void sync_warp() {
    Warp& w = b->warp[b->current / kWarp];
    release(&w);
    meet(WarpOp::kSync, nullptr, 0, nullptr, nullptr);
    acquire(&w);
}

DC_SIM_NOSAN void dependency_wait() {
    if (b->launch.dependent) {
        ++b->progress;
        for (;;) {
            {
                const std::lock_guard lock(b->grid->m);
                if (b->grid->released) break;
            }
            b->at_dependency = true;
            yield();
        }
        ++b->progress;
        acquire(b->grid);
    }
}

void cp_async(void* dst, const void* src, int bytes) {
    if (((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) & 15) != 0 || bytes != 16)
        die("cp.async is not 16 aligned bytes");
    touch(src, bytes);
    poison(dst, bytes);
    queue_cp_async(dst, src, bytes);
}
DC_SIM_NOSAN void cp_commit() { ++b->fiber[b->current].committed; }
DC_SIM_NOSAN void cp_wait(int newer) {
    Fiber& me = b->fiber[b->current];
    land_copies(*me.copies, nullptr, me.committed - newer);
}

DC_SIM_NOSAN void mbar_init(uint64_t* bar, int count) {
    auto* m = reinterpret_cast<Barrier*>(bar);
    if (m->live == kLive) die("barrier in shared memory initialised twice");
    *m = {0, static_cast<int8_t>(count), static_cast<int8_t>(count), 0, kLive};
}
DC_SIM_NOSAN void mbar_inval(uint64_t* bar) { barrier(bar)->live = 0; }
DC_SIM_NOSAN void mbar_expect(uint64_t* bar, int bytes) {
    release(bar);
    Barrier* m = barrier(bar);
    m->bytes += bytes;
    m->pending = static_cast<int8_t>(m->pending - 1);
    ++b->progress;
    complete(m);
}
void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) {
    if (((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | static_cast<uintptr_t>(bytes)) & 15) !=
        0)
        die("bulk copy is not 16-byte aligned");
    touch(src, bytes);
    poison(dst, bytes);
    queue_bulk(dst, src, bytes, bar);
}
DC_SIM_NOSAN void mbar_wait(uint64_t* bar, int parity) {
    Barrier* m = barrier(bar);
    while (m->phase == parity) {
        m->bytes -= land_copies(b->bulk, bar, 0);
        complete(m);
        if (m->phase == parity) yield();
    }
    ++b->progress;
    acquire(bar);
}

DC_SIM_NOSAN void mma_bf16(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]) {
    mma_16816(in, out, [](uint32_t bits) {
        const uint32_t u = bits << 16;
        float f;
        __builtin_memcpy(&f, &u, 4);
        return f;
    });
}
DC_SIM_NOSAN void mma_f16(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]) {
    const float* table = f16_table();
    mma_16816(in, out, [table](uint32_t bits) { return table[bits]; });
}
DC_SIM_NOSAN void mma_s8(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]) {
    int8_t a[16][32], bt[8][32];
    for (int lane = 0; lane < kWarp; ++lane) {
        MmaIn m;
        __builtin_memcpy(&m, in[lane], sizeof m);
        const int g = lane / 4, q = lane % 4;
        for (int i = 0; i < 4; ++i) __builtin_memcpy(&a[g + (i & 1) * 8][4 * q + (i >> 1) * 16], &m.a[i], 4);
        for (int i = 0; i < 2; ++i) __builtin_memcpy(&bt[g][4 * q + 16 * i], &m.b[i], 4);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        int32_t d[4];
        __builtin_memcpy(d, in[lane], sizeof d);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + (i >> 1) * 8, col = lane % 4 * 2 + (i & 1);
            for (int k = 0; k < 32; ++k) d[i] += a[row][k] * bt[col][k];
        }
        __builtin_memcpy(out[lane], d, sizeof d);
    }
}
DC_SIM_NOSAN void ldmatrix_x4_trans(const unsigned char (*in)[kIn], unsigned char (*out)[kOut]) {
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int m = 0; m < 4; ++m) {  // rows of matrix m: lanes 8m .. 8m+7; this lane gets (2q, g) and (2q + 1, g)
            uint32_t r = 0;
            for (int half = 0; half < 2; ++half) {
                const uint16_t* row;
                __builtin_memcpy(&row, in[8 * m + lane % 4 * 2 + half], sizeof row);
                r |= static_cast<uint32_t>(row[lane / 4]) << (16 * half);
            }
            __builtin_memcpy(out[lane] + 4 * m, &r, 4);
        }
    }
}

void run(std::vector<Job> jobs) {
    std::unique_ptr<GridRun> ahead;
    for (size_t i = 0; i < jobs.size(); ++i) {
        if (jobs[i].launch.grid == 0) {
            jobs[i].body();
            continue;
        }
        std::unique_ptr<GridRun> current = std::move(ahead);
        const bool next_depends = i + 1 < jobs.size() && jobs[i + 1].launch.grid > 0 && jobs[i + 1].launch.dependent;
        if (next_depends) ahead = std::make_unique<GridRun>(jobs[i + 1], true);  // its prologue comes first
        if (current) {
            current->release_dependents();
        } else {
            current = std::make_unique<GridRun>(jobs[i], false);
        }
        current->join();
    }
}

}  // namespace deepcalm::sim
