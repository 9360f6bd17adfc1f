// Which kernel tables are compiled in, and which of them this processor and operating system can run.
#include "kernels/router.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace deepcalm {

extern const CpuKernels DEEPCALM_TABLES;  // of CMakeLists.txt, best first: kernels_avx2, kernels_scalar

namespace {
constexpr auto null_terminated(const auto&... table) {
    return std::array<const CpuKernels*, sizeof...(table) + 1>{&table..., nullptr};
}
constexpr auto kTables = null_terminated(DEEPCALM_TABLES);
}  // namespace

const CpuKernels* const* all_cpu_kernels() noexcept { return kTables.data(); }

uint32_t cpu_features() noexcept {
    uint32_t features = 0;
#if defined(__x86_64__)
    uint32_t a = 0, b = 0, c = 0, d = 0;
    const auto has = [](uint32_t reg, auto... bits) { return (((reg >> bits) & 1U) && ...); };
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 12, 27, 28, 29)) return 0;  // FMA, OSXSAVE, AVX, F16C
    uint32_t xcr0 = 0, xcr0_hi = 0;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_hi) : "c"(0));
    if ((xcr0 & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;  // xmm, ymm state
    if (!has(b, 5)) return 0;
    features |= kCpuAvx2;
    const bool zmm_state = (xcr0 & 0xE6) == 0xE6;                // opmask, zmm0-15 high halves, zmm16-31
    if (!zmm_state || !has(b, 16, 17, 30, 31)) return features;  // F DQ BW VL
    features |= kCpuAvx512;
    const bool vbmi_vnni = has(c, 1, 11);
    if (vbmi_vnni && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5)) features |= kCpuAvx512X;  // BF16
#endif
    return features;
}

CpuPolicy cpu_policy() noexcept {
#if defined(__x86_64__)
    if (__builtin_cpu_is("amd")) return {.one_stream = true, .bf16_dot = true};
#endif
    return {};
}

const CpuKernels* select_cpu_kernels(const char* name) noexcept {
    const uint32_t features = cpu_features();
    for (const CpuKernels* const* t = kTables.data(); *t; ++t) {
        const bool supported = ((*t)->required & ~features) == 0;
        if (supported && (!name || std::strcmp(name, (*t)->isa) == 0)) return *t;
    }
    return nullptr;
}

void route(const RouterArgs& args) noexcept { router::route(args, router::OneLane{}); }

}  // namespace deepcalm
