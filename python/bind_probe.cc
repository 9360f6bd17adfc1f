// What measurements and tests reach below the model: rates of the bare machine and of single kernels in deepcalm._core; in
// deepcalm._core.testing the kernels' addresses, which tests/cpu_kernels.py calls, and hooks into the runtime.
#include "kernels/elementary.h"
#include "python/bind_common.h"
#include "runtime/cpu/engine.h"
#include "runtime/cpu/probe.h"
#include "runtime/model.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

using namespace deepcalm;

namespace {

void require(bool ok, const std::string& what) {
    if (!ok) throw py::value_error(what);
}
const CpuKernels& table(const std::string& isa) {
    const CpuKernels* k = select_cpu_kernels(isa.c_str());
    require(k != nullptr, "isa " + isa + ": unknown or not supported by this processor");
    return *k;
}

py::dict compute_ceilings(const std::string& isa, int threads) {
    require(threads > 0, "threads must be positive");
    constexpr const char* kNames[] = {"f32", "bf16", "int8"};  // in the order of ActKind
    py::dict out;
    for (int kind = 0; kind < kNumActKinds; ++kind) {
        const double rate =
            unwrap(without_gil([&] { return compute_ceiling(table(isa), static_cast<ActKind>(kind), threads); }));
        if (rate > 0) out[kNames[kind]] = rate;
    }
    return out;
}

double kernel_rate(const std::string& isa, const std::string& format, int threads, int rows) {
    require(threads > 0 && rows > 0, "threads and rows must be positive");
    for (int i = 0; i < kNumFormats; ++i)
        if (format == kFormats[i].name)
            return unwrap(
                without_gil([&] { return inner_loop_rate(table(isa), static_cast<Format>(i), threads, rows); }));
    throw py::value_error("unknown format " + format);
}

double cache_rate(const std::string& isa, const std::string& kv, int heads, int rows, int positions) {
    require(heads > 0 && rows > 0 && positions > 0, "heads, rows and positions must be positive");
    const CacheType type = cache_type(kv);
    return unwrap(without_gil([&] { return attention_rate(table(isa), type, heads, rows, positions); }));
}

// Runs `stages` stages of 64 dealt items twice on one pool; the first time thread fail_tid throws in stage fail_stage. What
// the first run said, and the items that the second did.
py::tuple pool_runs(int threads, int stages, int fail_tid, int fail_stage) {
    const auto pool = unwrap(ThreadPool::make(threads));
    const auto run = [&](int failing, std::atomic<int>& items) {
        return pool->run([&](int tid) {
            for (int stage = 0; stage < stages; ++stage) {
                if (tid == failing && stage == fail_stage) throw std::bad_alloc();
                pool->deal(64, 1, [&](Range r) { items += r.end - r.begin; });
                pool->barrier();
            }
        });
    };
    std::atomic<int> before{0}, items{0};
    const std::string error = without_gil([&] {
        Status failed = run(fail_tid, before);
        return failed.ok() ? std::string() : failed.error().message;
    });
    unwrap(without_gil([&] { return run(-1, items); }));
    return py::make_tuple(error, items.load());
}

// [(cost on all threads, cost alone, share of waiting)] pass by pass -> what was chosen: alone?
std::vector<bool> thread_choice(const std::vector<std::array<double, 3>>& passes, bool crowded, int kind) {
    ThreadChoice choice;
    std::vector<bool> out;
    for (const auto& [all, alone, waited] : passes) {
        out.push_back(choice.alone(kind));
        choice.ran(kind, out.back() ? alone : all, out.back() ? 0 : waited, [&] { return crowded; });
    }
    return out;
}

void hold_passes(Model& model, const py::function& fn) {
    const auto held = without_gil([&] { return model.hold_passes(); });
    fn();
}

template <class T> uintptr_t address(T* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

void init_probes(py::module_& m) {
    m.def(
        "read_bandwidth",
        [](int threads, int mib, int repeats) {
            return unwrap(without_gil([&] { return read_bandwidth(threads, int64_t{mib} << 20, repeats); }));
        },
        "threads"_a, "mib"_a = 512, "repeats"_a = 3,
        "Measured read bandwidth in GB/s (1e9 bytes) of `threads` threads over a buffer of `mib` MiB, best of "
        "`repeats`.");
    m.def(
        "compute_ceilings", &compute_ceilings, "isa"_a, "threads"_a,
        "1e9 operations per second (multiply and add counted apart) from registers, best of 5: f32 multiply-adds, and "
        "the bf16 and int8 dot instructions where the set has them.");
    m.def(
        "inner_loop_rate", &kernel_rate, "isa"_a, "format"_a, "threads"_a, "rows"_a = 64,
        "1e9 operations per second of the matmul kernel on operands in the first-level cache: 64 outputs x 256 columns "
        "(q8, q4), 128 (bf16, f8) or 64 (f16, f32), `rows` activation rows; best of 5.");
    m.def("attention_rate", &cache_rate, "isa"_a, "kv"_a, "heads"_a, "rows"_a, "positions"_a,
          "1e9 operations per second of the attention kernel on one thread, latent 512 + rope 64, every row seeing all "
          "positions: 2 (576 + 512) operations per row, head and position; best of 5.");
}

void init_testing(py::module_& m) {
    py::dict tables, amx;  // of the sets that this processor runs; of amx: "emulated", and "tiles" that it may not have
    for (const CpuKernels* const* k = all_cpu_kernels(); *k != nullptr; ++k) {
        if (select_cpu_kernels((*k)->isa) == *k) tables[(*k)->isa] = address(*k);
        if ((*k)->isa == std::string_view("amx")) amx[(*k)->emulated ? "emulated" : "tiles"] = address(*k);
    }
    m.attr("CPU_KERNELS") = tables;
    m.attr("AMX_KERNELS") = amx;
    m.def(
        "same_tile",
        [](uintptr_t one, uintptr_t other) {
            const auto at = [](uintptr_t address) { return reinterpret_cast<const CpuKernels*>(address); };
            return same_tile(*at(one), *at(other));
        },
        "one"_a, "other"_a, "What a processor's tiles must pass; of the addresses of two tables.");
    m.attr("ROUTE") = address(&route);
    m.attr("SIZES") = py::dict("PackedTensor"_a = sizeof(PackedTensor), "MatmulArgs"_a = sizeof(MatmulArgs),
                               "MlaPartialArgs"_a = sizeof(MlaPartialArgs), "RouterArgs"_a = sizeof(RouterArgs),
                               "CpuKernels"_a = sizeof(CpuKernels));
    m.def("mla_scratch_bytes", &mla_scratch_bytes, "c_pad"_a, "r_pad"_a, "n_rows"_a, "n_heads"_a);
    m.def(
        "cache_row_bytes", [](const std::string& t, int c, int r) { return cache_row_bytes(cache_type(t), c, r); },
        "type"_a, "c_pad"_a, "r_pad"_a);
    m.def(
        "pool_runs", &pool_runs, "threads"_a, "stages"_a, "fail_tid"_a, "fail_stage"_a,
        "(error of a run in which a thread throws, items of the 64 * stages that the next run on the same pool did).");
    m.def("thread_choice", &thread_choice, "passes"_a, "crowded"_a = false, "kind"_a = 1,
          "Which of the passes (cost on all threads, cost alone, share of waiting) are chosen to run alone.");
    m.def("hold_passes", &hold_passes, "model"_a, "fn"_a, "Calls fn() as if a pass of the model ran meanwhile.");
    m.def(
        "set_policy",
        [](const Model& model, bool one_stream, bool bf16_dot) {
            dynamic_cast<CpuBackend&>(model.backend()).policy = {one_stream, bf16_dot};
        },
        "model"_a, "one_stream"_a, "bf16_dot"_a, "Later passes use the kernels as another processor would.");
    m.def("exp", py::vectorize(exp_f64), "x"_a, "e^x, f64.");
    m.def("log", py::vectorize(log_f64), "x"_a, "Natural logarithm, f64.");
    m.def("sin", py::vectorize([](float x) { return sincos_f32(x).sin; }), "x"_a, "f32, radians.");
    m.def("cos", py::vectorize([](float x) { return sincos_f32(x).cos; }), "x"_a, "f32, radians.");
}
