// Kernels with one planted mistake each, for the tests of the simulator: plants NAME runs one and prints "right" or
// "wrong". What a plant must lead to stands in test_sim.py.
#include "kernels/cuda/rt.h"

#include <cstdio>
#include <string_view>
#include <vector>

namespace deepcalm {
namespace {

enum Plant {
    kNone,
    kBarrier,
    kEarlyRead,
    kUnwaited,
    kForgotten,
    kRow,
    kDiverged,
    kLanes,
    kMisaligned,
    kTwice,
    kReused
};
constexpr const char* kNames[] = {"none",     "barrier", "early_read", "unwaited", "forgotten", "row",
                                  "diverged", "lanes",   "misaligned", "twice",    "reused"};
constexpr int kThreads = 64, kBlocks = 3;

DC_KERNEL(kThreads) produce(float* x) {
    rt::dependency_wait();
    x[rt::block() * kThreads + rt::thread()] = static_cast<float>(rt::block() * kThreads + rt::thread());
}

// y = x with each block's values reversed, plus weights, through shared memory and an asynchronous copy per warp.
DC_KERNEL(kThreads) consume(Plant plant, const float* x, const float* weights, float* y) {
    auto* smem = reinterpret_cast<float*>(rt::dynamic_smem());
    float* ring = smem + kThreads;
    auto* bar = reinterpret_cast<uint64_t*>(ring + kThreads) + rt::warp();
    const int t = rt::thread(), at = rt::block() * kThreads + t;
    rt::copy_open(bar);
    if (plant == kTwice) rt::copy_open(bar);
    rt::copy_start(ring + 32 * rt::warp(), weights + at / 32 * 32 + (plant == kMisaligned ? 1 : 0), 128, bar);
    const float early = plant == kEarlyRead ? x[at] : 0;
    rt::dependency_wait();
    smem[t] = plant == kEarlyRead ? early : x[plant == kRow ? at + kThreads : at];
    if (plant == kDiverged && t < 32) {
        rt::sync_block();
    } else if (plant != kBarrier) {
        rt::sync_block();
    }
    const float v = smem[kThreads - 1 - t];
    if (plant == kLanes && rt::lane() == 5) {
        rt::sync_warp();
    } else if (plant == kLanes) {
        rt::shfl_xor(v, 1);
    }
    if (plant != kUnwaited && plant != kForgotten) rt::copy_wait<0>(bar, 0);
    if (plant == kReused) rt::copy_start(ring + 32 * rt::warp(), weights, 128, bar);  // before the slot was read
    y[at] = v + ring[t];
    if (plant == kReused) rt::copy_wait<0>(bar, 1);
    if (plant == kUnwaited) rt::copy_wait<0>(bar, 0);
    rt::copy_close(bar);
}

int run(Plant plant) {
    constexpr int kN = kThreads * kBlocks;
    std::vector<float> x(kN, -1.0F), weights(kN + 4, 0.5F), y(kN, -1.0F);
    auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(weights.data()) + 15) / 16 * 16);
    sim::Stream stream;
    rt::LaunchConfig c{.grid = kBlocks, .block = kThreads, .stream = &stream};
    if (rt::launch(c, produce, x.data()) != 0) return 1;
    c.smem = 8 * kThreads + 64;
    c.dependent = true;
    const float *in = x.data(), *w = aligned;
    if (rt::launch(c, consume, plant, in, w, y.data()) != 0 || rt::synchronize(&stream) != 0) return 1;
    bool right = true;
    for (int i = 0; i < kN; ++i)
        right &= y[static_cast<size_t>(i)] ==
                 static_cast<float>(i / kThreads * kThreads + kThreads - 1 - i % kThreads) + 0.5F;
    std::puts(right ? "right" : "wrong");
    return 0;
}

}  // namespace
}  // namespace deepcalm

int main(int argc, char** argv) {
    for (int p = 0; p < static_cast<int>(std::size(deepcalm::kNames)); ++p)
        if (argc == 2 && std::string_view(argv[1]) == deepcalm::kNames[p])
            return deepcalm::run(static_cast<deepcalm::Plant>(p));
    return 2;
}
