// The device library on the simulator: the same sources, compiled by g++.
#include "runtime/cuda/backend.cu"

// Sets what the simulated device plays (sim::Device) and returns what it was; -1: no such name.
extern "C" __attribute__((visibility("default"))) int64_t deepcalm_sim(const char* name, int64_t value) {
    namespace sim = deepcalm::sim;
    const std::string n = name;
    auto* field = n == "smem"       ? &sim::device.smem
                  : n == "calls"    ? &sim::device.calls
                  : n == "fail_at"  ? &sim::device.fail_at
                  : n == "throw_at" ? &sim::device.throw_at
                  : n == "hang"     ? &sim::device.hang
                                    : nullptr;
    return field == nullptr ? -1 : field->exchange(value);
}
