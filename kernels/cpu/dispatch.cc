// Which kernel tables are compiled in, and which of them this processor and operating system can run.
#include "kernels/router.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef DEEPCALM_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deepcalm {

extern const CpuKernels DEEPCALM_TABLES;  // of CMakeLists.txt, best first: kernels_avx2, kernels_scalar

namespace {
constexpr auto null_terminated(const auto&... table) {
    return std::array<const CpuKernels*, sizeof...(table) + 1>{&table..., nullptr};
}
constexpr auto kTables = null_terminated(DEEPCALM_TABLES);

#ifdef DEEPCALM_AMX
// "" if tiles can be used: the processor and the system keep them, the process may have them, and they compute as expected.
const char* try_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
        return "the system does not let this process use its tiles";
    if (!same_tile(kernels_amx, kernels_amx_emulated)) return "its tiles do not compute what they should";
    return "";
}
#endif
}  // namespace

const CpuKernels* const* all_cpu_kernels() noexcept { return kTables.data(); }

bool same_tile(const CpuKernels& one, const CpuKernels& other) noexcept {
    constexpr int kRows = 5;
    alignas(64) uint16_t w[kTileRows * kTileCols], x[kRows * kTileCols];
    alignas(64) float y[2][kRows][kTileRows];
    uint32_t state = 1;
    for (uint16_t* v : {w, x})
        for (int i = 0; i < (v == w ? kTileRows : kRows) * kTileCols; ++i) {
            state = state * 1664525 + 1013904223;
            const bool small = v == w ? i / 2 % kTileRows >= 8 : i >= 3 * kTileCols;
            v[i] = static_cast<uint16_t>((state >> 16 & 0x80ff) | (small ? 0x2000 : 0x3f00));  // 2^-63, or 2^-1
        }
    const PackedTensor t{
        .data = reinterpret_cast<const std::byte*>(w), .format = Format::kBF16, .rows = kTileRows, .cols = kTileCols};
    MatmulArgs args{.w = &t, .tile_end = 1, .x = {.x = x, .stride = kTileCols}, .n = kRows};
    for (int i = 0; i < 2; ++i) {
        args.y = {y[i][0], kTileRows};
        (i == 0 ? one : other).matmul[static_cast<int>(Format::kBF16)](args);
    }
    return std::memcmp(y[0], y[1], sizeof y[0]) == 0;
}

namespace {
// CPUID and XCR0: what the processor has and the system keeps.
uint32_t processor_features() noexcept {
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
    const bool vbmi_vnni = has(c, 1, 11), amx = has(d, 22, 24, 25) && has(xcr0, 17, 18);  // BF16 TILE INT8, tile state
    if (!vbmi_vnni || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, 5)) return features;  // BF16
    features |= kCpuAvx512X;
    if (amx) features |= kCpuAmx;
#endif
    return features;
}
}  // namespace

const char* amx_refusal() noexcept {
#ifdef DEEPCALM_AMX
    static const char* const refusal = (processor_features() & kCpuAmx) != 0 ? try_amx() : "";
    return refusal;
#else
    return "";
#endif
}

uint32_t cpu_features() noexcept {
    static const uint32_t features = processor_features() & ~(*amx_refusal() != 0 ? uint32_t{kCpuAmx} : 0U);
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
