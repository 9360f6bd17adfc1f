// The CPU kernel contract: one table of function pointers per instruction set, and the structs they take.
//
// Every kernel is a pure function over pointers: no allocation, no I/O, no globals, no exceptions. Law L1 lives here:
// the bits of an output element depend on the operands of that element and on the ISA name, never on how many rows,
// tiles, heads or threads share a call. Buffers are 64-byte aligned unless said otherwise; strides are in elements.
#pragma once

#include "kernels/view.h"

namespace deepcalm {

inline constexpr int kActBytes[kNumActKinds] = {4, 2, 1};  // of an element of each ActKind

// Activation rows prepared for products of one ActKind, all rows with the same stride. cols_pad = round_up(cols, 32);
// elements cols..cols_pad-1 are zero.
struct Activation {
    void* x = nullptr;       // [n, stride] f32 | u16 bf16 | int8, by kind
    float* d = nullptr;      // kI8: [n, stride / 32] f32 group scales; else null
    int32_t* sum = nullptr;  // kI8: [n, stride / 32] sum of the codes of each group; else null
    int64_t stride = 0;      // elements between rows, a multiple of 32
};

// y[i, 16*(t - tile_begin) + r] = sum_c w[slice, 16*t + r, c] * x[row(i), c]   for t in [tile_begin, tile_end), i < n.
// All 16 lanes of every tile are written, padding rows included.
//
// Order of the sum (docs/model.md 7.2: the same for every n): blocks of sum_block_cols columns, counted from the start of
// each scale block for f8, so that no block crosses one; each block a chain of multiply-adds from zero in column order
// (avx512x: vdpbf16ps for bf16 pairs; for f8 two chains, columns 4k, 4k+1 and 4k+2, 4k+3, added at the block's end; amx: blocks
// of 32 columns, of the even and the odd ones a chain, kernels/cpu/matmul_tiles.h).
// Blocks are added in order from zero:
//   f32, f16, bf16:  acc = acc + block
//   f8:              acc = fma(block, scale, acc)
//   q8, q4:          acc = fma(float(int32 block), d_w * d_x, acc)
// The table `scalar` rounds every multiply-add twice (product, then sum), here and in all other kernels.
struct MatmulArgs {
    const PackedTensor* w = nullptr;
    int slice = 0;
    int tile_begin = 0, tile_end = 0;  // row tiles
    Activation x;
    const int32_t* x_row = nullptr;  // [n] row of x for output row i; null = identity
    int n = 0;                       // activation rows, >= 1
    View<float> y = {};              // [n, 16 * (tile_end - tile_begin)], 64-byte aligned rows not required
    bool one_stream = false;  // one row walks one row tile at a time; few rows prefetch into the second level of cache
};

// One partial of absorbed attention (docs/model.md 4.1): queries of n_rows tokens x n_heads heads against positions
// pos_begin <= j < row_end[i] of the cache. pos_begin is a multiple of kPartialLen and row_end[i] <= pos_begin + kPartialLen.
// Positions are walked in chunks of kChunkLen aligned to 0; inside a chunk: scores, running maximum, exponentials, then
// values, so a row's bits do not depend on the other rows of the call. Type bf16: q and the exponentials are rounded to bf16
// (l sums the rounded ones), everything else is f32, with or without the dot instruction; amx: on tiles, attention_tiles.h.
// Rows with row_end[i] <= pos_begin get m = -inf, l = 0, o = 0. Cache positions >= row_end[i] are not used for row i (they
// may hold anything, NaN included).
inline constexpr int kChunkLen = 64;     // positions that share one cache tile
inline constexpr int kPartialLen = 512;  // positions per partial (8 chunks)

struct MlaPartialArgs {
    CacheType type = CacheType::kF16;
    View<const std::byte> cache = {};  // rows of this layer's cache
    int c_pad = 0, r_pad = 0;          // padded widths of the latent and rope parts, see format.h
    int n_rows = 0, n_heads = 0;
    View<const float> q = {};  // [n_rows, n_heads, c_pad + r_pad]: q_absorbed | rotated q_rope, zeros
    int pos_begin = 0;
    const int32_t* row_end = nullptr;  // [n_rows] one past the last position that row i sees
    float softmax_scale = 0;           // multiplies the whole score
    View<float> m = {};                // [n_rows, n_heads] running maximum (natural-log units)
    View<float> l = {};                // [n_rows, n_heads] sum of exponentials relative to m
    View<float> o = {};                // [n_rows, n_heads, c_pad] unnormalised sum of exp * c_kv
    void* scratch = nullptr;           // mla_scratch_bytes(), private to the calling thread
    const std::byte* next = nullptr;   // kChunkLen cache rows that the caller will walk next, to be prefetched; or null
    bool same_q = false;    // scratch comes from a call with the same q, n_rows, n_heads, widths, type and bf16_dot
    bool bf16_dot = false;  // type kBF16: use the set's dot instruction, if it has one
};
DC_CONSTEXPR int64_t mla_scratch_bytes(int c_pad, int r_pad, int n_rows, int n_heads) {
    // in f32: 32 dims of a chunk; of every 16 (row, head) pairs their queries, scores, ends and running sums; of the set amx
    // also values' sums of a pair, 16 more than there are dims, and 32 cache rows in bf16
    const int64_t vectors = ceil_div(int64_t{n_rows} * n_heads, 16), width = int64_t{c_pad} + r_pad;
    return 4 * (32 * kChunkLen + vectors * 16 * (width + kChunkLen + 4 + c_pad + 16) + 512 * ceil_div(width, 32)) + 64;
}

inline constexpr int kPeakBytes = 33 * 64;

// Attention of (row, head) pairs over some of their positions: running maxima, sums relative to them.
struct MlaSums {
    float *m = nullptr, *l = nullptr;  // [n] maximum (natural-log units), sum of exponentials relative to it
    View<float> o = {};                // [n, c_pad] sum of exp * c_kv

    DC_CONSTEXPR MlaSums from(int64_t i) const { return {m + i, l + i, o.from(i)}; }
};

struct CpuKernels {
    const char* isa;        // name: kernels/cpu/simd_NAME.h, or amx: isa_amx.h
    uint32_t required;      // CpuFeature bits that the OS must have enabled
    bool emulated = false;  // the same bits without the set's own instructions, slower: taken where it is named only
    // bf16 and f8 read many rows one stride apart, no multiple of 4096 bytes: those of x_row are to be laid so before.
    bool one_stride = false;
    int pass_rows = 256;  // of a pass whose products are about as fast as those of longer ones

    // The bare multiply-add of f32, the dot instruction of bf16 and of int8 (null where the set has none), `rounds` times
    // on a register block of independent chains: the ceiling that rates are printed beside. buf: kPeakBytes of finite
    // operands, overwritten. Returns the operations done, multiply and add counted apart.
    int64_t (*peak[kNumActKinds])(int64_t rounds, void* buf) noexcept;

    // Rounds one row: x [cols] f32 -> out row `row` of kind k (zero-fills up to round_up(cols, 32); computes d and sum for
    // kI8, as ActKind says). Non-finite x gives non-finite d or bf16 and defined codes, never undefined behaviour.
    void (*prepare[kNumActKinds])(const float* x, int cols, const Activation& out, int64_t row) noexcept;
    void (*matmul[kNumFormats])(const MatmulArgs& args) noexcept;

    // out[i] = w[i] * x[i] / sqrt(mean(x^2) + eps); out may alias x.
    void (*rmsnorm)(const float* x, const float* w, float* out, int n, float eps) noexcept;
    // Half-split rotation in place: v [2*half]; cos, sin [half].  (a, b) -> (a cos - b sin, a sin + b cos)
    void (*rope)(float* v, const float* cos, const float* sin, int half) noexcept;
    // gate_up [2*n_pad16]: 16 gate, 16 up, 16 gate, ...; out[i] = silu(gate_i) * up_i for i < n, n_pad16 = round_up(n, 16).
    void (*swiglu)(const float* gate_up, float* out, int n) noexcept;
    // y[i] = fma(a, x[i], y[i])
    void (*axpy)(float a, const float* x, float* y, int n) noexcept;

    // Cache row of one position: c_kv [kv_lora_rank], k_rope [dr] -> row bytes of `type` (padding written as zeros).
    void (*cache_write)(CacheType type, const float* c_kv, int c, const float* k_rope, int dr, std::byte* row) noexcept;
    // The same row back as f32 [c_pad + r_pad]; used by taps, sessions and tests.
    void (*cache_read)(CacheType type, const std::byte* row, int c_pad, int r_pad, float* out) noexcept;
    void (*mla_partial)(const MlaPartialArgs& args) noexcept;
    // n pairs: sum becomes that of its own positions and of later ones. A pair without positions (l = 0) adds nothing.
    void (*mla_merge)(const MlaSums& sum, const MlaSums& later, int n, int c_pad) noexcept;
    // One pair: out [c_pad] = o / l, zeros without positions; out may be o.
    void (*mla_finish)(const MlaSums& sum, int c_pad, float* out) noexcept;
};

enum CpuFeature : uint32_t {
    kCpuAvx2 = 1U << 0,     // AVX2, FMA, F16C
    kCpuAvx512 = 1U << 1,   // F BW DQ VL (and the above)
    kCpuAvx512X = 1U << 2,  // VNNI VBMI BF16 (and the above)
    kCpuAmx = 1U << 3,      // AMX_TILE AMX_BF16 AMX_INT8 (and the above), permitted and tried
};
// CPUID and XCR0; for AMX also the system's permission, which is asked for once a process.
uint32_t cpu_features() noexcept;
// Whether both compute the same product of a tile around 2^-126: what a processor's tiles must pass before they are used.
bool same_tile(const CpuKernels& one, const CpuKernels& other) noexcept;
// Why a processor that has AMX is not used as one: "" where it is, or has none.
const char* amx_refusal() noexcept;
// How this processor is best used, whatever the table: both are AMD's (measured on Zen 4), where vdpbf16ps has twice the rate of
// f32's multiply-add; prefetching into the first-level cache what is in memory costs a quarter to a third of the read bandwidth,
// the second level nothing; one stream of a thread reads faster than four. On Intel none of this holds.
struct CpuPolicy {
    bool one_stream = false;  // of MatmulArgs
    bool bf16_dot = false;    // of MlaPartialArgs
};
CpuPolicy cpu_policy() noexcept;
// Null-terminated, best first; only those compiled in. A name may be there twice: emulated after what needs no emulation.
const CpuKernels* const* all_cpu_kernels() noexcept;
// The first supported table, or the one called `name`; null if unknown or unsupported by this processor.
const CpuKernels* select_cpu_kernels(const char* name /* may be null */) noexcept;

// kernels/router.h: routing of one token (docs/model.md section 5), f32, ties to the lowest index.
enum class ScoringFunc : uint8_t { kSoftmax, kSigmoid };
enum class TopkMethod : uint8_t { kGreedy, kGroupLimitedGreedy, kNoauxTc };
struct RouterArgs {
    const float* gate_logits = nullptr;  // [n_routed_experts]
    const float* bias = nullptr;         // [n_routed_experts] e_score_correction_bias; selection only; null = none
    int n_routed_experts = 0, num_experts_per_tok = 0, n_group = 1, topk_group = 1;
    ScoringFunc scoring_func = ScoringFunc::kSoftmax;
    TopkMethod topk_method = TopkMethod::kGreedy;
    bool norm_topk_prob = false;
    float routed_scaling_factor = 1;
    float* scratch = nullptr;     // [2 * n_routed_experts + n_group]
    int32_t* topk_idx = nullptr;  // [num_experts_per_tok] expert indices, distinct, ascending, in 0..n_routed_experts-1
    float* topk_weight = nullptr;  // [num_experts_per_tok]
};
void route(const RouterArgs& args) noexcept;

// kernels/pack.cc: the byte-level definition of every format, scalar and slow to read back, fast to write.
// Quantises w into row tiles [0, ceil(rows/16)) of a zero-padded matrix.
// f8: `scales` receives [ceil(rows/scale_rows), ceil(cols/scale_cols)] (amax / 448). Returns false, and says where in
// *bad_row, *bad_col, when an element or a scale is not finite or too large for the format. Too small is no failure: a
// scale is at least the smallest one (f16 2^-24, f32 2^-126), or 0 where half its step leaves nothing; near_zero counts.
struct PackArgs {
    View<const float> w = {};  // [rows, cols]
    int rows = 0, cols = 0;
    Format format = Format::kF32;
    std::byte* out = nullptr;
    float* scales = nullptr;
    int scale_rows = 128, scale_cols = 128;
    int bad_row = -1, bad_col = -1;
    int64_t near_zero = 0;  // groups (f8: blocks) below the smallest scale; f16, bf16: 32 columns that become zeros
    int lanes = 16;  // rows at a time, at most: 16, 8 or 4, where the processor has as many; the bytes are the same
};
bool pack_tiles(PackArgs& args) noexcept;
// Codes that already exist: e4m3 bytes [rows, cols] into f8 tiles (bytes unchanged). NaN codes (0x7F, 0xFF) are refused.
bool pack_f8_codes(View<const uint8_t> codes, int rows, int cols, std::byte* out, int* bad_row, int* bad_col) noexcept;
// int8 codes (value = code * scale): bytes [rows, cols], scales [rows, cols/32] -> q8 tiles, over the groups that are packed
// there already where f16 holds the scale; the others stay.
void keep_q8_codes(View<const uint8_t> codes, View<const float> scales, int rows, int cols, std::byte* out) noexcept;
// int4 codes 0..15 (value = (code - 8) * scale): nibbles [rows, cols/2] low first, 16-bit scales [rows, cols/32] -> q4/q4b tiles.
bool pack_q4_codes(View<const uint8_t> nibbles, View<const uint16_t> scales, Format format, int rows, int cols,
                   std::byte* out, int* bad_row, int* bad_col) noexcept;
// One slice back to f32 [rows, cols].
void unpack_tiles(const PackedTensor& w, int slice, View<float> out) noexcept;

// Scalar conversions shared by pack.cc, runtime and tests (exact definitions; round to nearest even).
float f16_to_f32(uint16_t h) noexcept;
uint16_t f32_to_f16(float f) noexcept;
float bf16_to_f32(uint16_t h) noexcept;
uint16_t f32_to_bf16(float f) noexcept;
float e4m3_to_f32(uint8_t b) noexcept;
uint8_t f32_to_e4m3(float f) noexcept;  // saturates at 448; NaN -> 0x7F

}  // namespace deepcalm
