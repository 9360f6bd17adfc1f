// Tile instructions of AMX on a processor without them: a handler of SIGILL reads those that the kernels use from the bytes at
// RIP and does what Intel's manual says, in plain scalar code that shares nothing with the kernels' own emulation. What a
// processor would refuse with #GP or #UD ends the process with a line. The arithmetic of TDPBF16PS is the one measured on
// hardware: of each output two chains of fused multiply-adds from +0, even columns and odd ones, then c + (t0 + t1); rounded to
// nearest even, subnormal operands and results taken for zeros.
#include <atomic>
#include <cfenv>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <unistd.h>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
    bool configured = false;
    int rows[kTiles] = {}, row_bytes[kTiles] = {};
    uint8_t data[kTiles][kRows][kRowBytes] = {};
};
State states[256];  // one a thread that has used a tile
std::atomic<int> used{0};
std::atomic<int64_t> dots{0};
__attribute__((tls_model("initial-exec"))) thread_local State* mine = nullptr;
struct sigaction before;

void require(bool ok, const char* what) {
    if (ok) return;
    (void)!write(2, "tiles_by_signal: ", 17);
    (void)!write(2, what, std::strlen(what));
    (void)!write(2, "\n", 1);
    _exit(99);
}

void load_config(State& s, const uint8_t* p) {
    s = State();
    if (p[0] == 0) return;
    require(p[0] == 1 && p[1] == 0, "#GP: palette or start row");
    for (int i = 2; i < 64; ++i) {
        const bool field = (i >= 16 && i < 16 + 2 * kTiles) || (i >= 48 && i < 48 + kTiles);
        require(field || p[i] == 0, "#GP: reserved bytes of a configuration");
    }
    for (int t = 0; t < kTiles; ++t) {
        s.row_bytes[t] = p[16 + 2 * t] | p[17 + 2 * t] << 8;
        s.rows[t] = p[48 + t];
        require(s.row_bytes[t] <= kRowBytes && s.rows[t] <= kRows, "#GP: a tile is too large");
        require((s.row_bytes[t] == 0) == (s.rows[t] == 0), "#GP: a tile of rows without columns");
    }
    s.configured = true;
}
void need(const State& s, int t) {
    require(s.configured && t < kTiles && s.rows[t] > 0, "#UD: a tile without a shape");
}

float bf16(const uint8_t* p) {  // a subnormal one: zero of its sign
    uint32_t u = static_cast<uint32_t>(p[0] | p[1] << 8) << 16;
    if ((u & 0x7f800000) == 0) u &= 0x80000000;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
float flushed(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0F, f) : f; }

// x * y + z, once rounded; flushed if the result, rounded to 24 bits of any exponent, is below 2^-126. The product is exact
// in f64; the sum is rounded to odd there, so that rounding again is as good as rounding once.
float fused(float x, float y, float z) {
    const double p = static_cast<double>(x) * y;
    double s = p + z;
    if (!std::isfinite(s)) return static_cast<float>(s);
    const double part = s - p, rest = (p - (s - part)) + (z - part);
    if (rest != 0) {
        uint64_t u;
        std::memcpy(&u, &s, 8);
        if ((u & 1) == 0) u += (rest > 0) == (s > 0) ? 1 : -1;
        std::memcpy(&s, &u, 8);
    }
    if (std::fabs(s) >= 0x1p-100) return static_cast<float>(s);
    const float scaled = static_cast<float>(s * 0x1p100);
    return std::fabs(scaled) < 0x1p-26F ? std::copysign(0.0F, scaled) : scaled * 0x1p-100F;
}

void dot(State& s, int c, int a, int b) {
    need(s, a), need(s, b), need(s, c);
    require(c != a && a != b && c != b, "#UD: a tile twice");
    require(s.row_bytes[a] % 4 == 0 && s.row_bytes[b] % 4 == 0 && s.row_bytes[c] % 4 == 0, "#UD: columns");
    require(s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.row_bytes[a] / 4 == s.rows[b],
            "#UD: shapes that do not fit");
    for (int i = 0; i < s.rows[c]; ++i)
        for (int j = 0; j < s.row_bytes[c] / 4; ++j) {
            float t0 = 0, t1 = 0, old;
            for (int k = 0; k < s.rows[b]; ++k) {
                t0 = fused(bf16(s.data[a][i] + 4 * k), bf16(s.data[b][k] + 4 * j), t0);
                t1 = fused(bf16(s.data[a][i] + 4 * k + 2), bf16(s.data[b][k] + 4 * j + 2), t1);
            }
            std::memcpy(&old, s.data[c][i] + 4 * j, 4);
            old = fused(1, flushed(old), fused(1, t0, t1));
            std::memcpy(s.data[c][i] + 4 * j, &old, 4);
        }
    for (int i = s.rows[c]; i < kRows; ++i) std::memset(s.data[c][i], 0, kRowBytes);
    ++dots;
}

// One instruction: its ModRM, registers and memory operand.
struct Instruction {
    const uint8_t* at;
    greg_t* regs;
    int reg = 0, rm = 0, mod = 0, length = 0;
    int64_t address = 0,
            stride = 0;  // of a memory operand: without its index for a tile's rows, which the index is apart

    int64_t value(int r) const {
        static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return regs[kOrder[r]];
    }
    void decode() {  // bytes: C4, RXB.m, W.vvvv.L.pp, opcode, ModRM, SIB?, displacement?
        const int x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
        mod = at[4] >> 6, reg = (at[4] >> 3 & 7) + (at[1] & 0x80 ? 0 : 8), rm = (at[4] & 7) + b;
        length = 5;
        if (mod == 3) return;
        bool base = true;
        int displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
        if ((at[4] & 7) == 4) {
            const int sib = at[length++], index = (sib >> 3 & 7) + x;
            base = (sib & 7) != 5 || mod != 0;
            if (!base) displacement = 4;
            if (base) address = value((sib & 7) + b);
            if (index != 4) stride = value(index) << (sib >> 6);
        } else if ((at[4] & 7) == 5 && mod == 0) {
            displacement = 4;  // from the next instruction on
            address = reinterpret_cast<int64_t>(at) + length + 4;
        } else {
            address = value(rm);
        }
        int32_t d = displacement == 1 ? static_cast<int8_t>(at[length]) : 0;
        if (displacement == 4) std::memcpy(&d, at + length, 4);
        address += d;
        length += displacement;
    }
};

bool execute(Instruction& i) {
    if (i.at[0] != 0xc4 || (i.at[1] & 0x1f) != 2 || (i.at[2] & 0x84) != 0) return false;  // VEX.128.0F38.W0
    if (mine == nullptr) {
        const int n = used++;
        require(n < 256, "too many threads");
        mine = &states[n];
    }
    State& s = *mine;
    const int prefix = i.at[2] & 3, opcode = i.at[3], third = ~(i.at[2] >> 3) & 15;  // pp: none, 66, F3, F2
    i.decode();
    const bool memory = i.mod != 3, plain = third == 0;
    if (opcode == 0x49 && prefix == 0 && i.reg == 0 && plain) {
        if (memory) {
            load_config(s, reinterpret_cast<const uint8_t*>(i.address + i.stride));
        } else {
            s = State();  // TILERELEASE
        }
    } else if (opcode == 0x49 && prefix == 3 && !memory && i.rm == 0 && plain) {
        need(s, i.reg);
        std::memset(s.data[i.reg], 0, sizeof s.data[i.reg]);
    } else if (opcode == 0x4b && prefix != 0 && memory && (i.at[4] & 7) == 4 && plain) {
        need(s, i.reg);
        if (prefix != 2) std::memset(s.data[i.reg], 0, sizeof s.data[i.reg]);  // TILELOADD, TILELOADDT1
        for (int r = 0; r < s.rows[i.reg]; ++r) {
            auto* row = reinterpret_cast<uint8_t*>(i.address + r * i.stride);
            const auto n = static_cast<size_t>(s.row_bytes[i.reg]);
            prefix == 2 ? std::memcpy(row, s.data[i.reg][r], n) : std::memcpy(s.data[i.reg][r], row, n);
        }
    } else if (opcode == 0x5c && prefix == 2 && !memory) {
        dot(s, i.reg, i.rm, third);
    } else {
        return false;
    }
    return true;
}

void on_sigill(int, siginfo_t*, void* context) {
    auto* regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    Instruction i{reinterpret_cast<const uint8_t*>(regs[REG_RIP]), regs};
    std::fesetenv(FE_DFL_ENV);  // the interrupted thread's mode comes back with its context
    if (execute(i)) {
        regs[REG_RIP] += i.length;
    } else {
        sigaction(SIGILL, &before, nullptr);  // meets the instruction again
    }
}

}  // namespace

extern "C" {
// Carries tile instructions out from now on, or leaves SIGILL to whoever had it.
void tiles_by_signal(bool on) {
    struct sigaction action = {};
    action.sa_sigaction = on_sigill;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGILL, on ? &action : &before, on ? &before : nullptr) != 0) std::abort();
}
int64_t tile_dots() { return dots; }
// What a processor refuses: one of the mistakes that a kernel could make.
void mistake(int which) {
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 3; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
    if (which == 0) config[0] = 2;
    if (which == 1) config[5] = 1;
    if (which == 2) config[48] = 17;
    if (which == 3) config[49] = 15;  // activations have a row less than sums
    if (which == 4) config[50] = 15;  // weights have fewer rows than activations columns
    if (which == 5) config[48] = config[16] = 0;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
    if (which == 6) __asm__ volatile("tilerelease");
    if (which == 7) __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // assemblers refuse tmm1, tmm1, tmm0
    __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
}
}
