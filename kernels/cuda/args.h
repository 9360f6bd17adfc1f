// The stages of the CUDA pass as their host sees them: what each computes, its arguments, what a launch must know. No CUDA
// construct appears here, so plain C++ (the host's side, tests) includes it too. What runs is in attention.cuh, ffn.cuh and
// stages.cuh, behind the seam rt.h.
//
// A stage is the work between two grid-wide dependencies:
//     template <int NB> __device__ void stage(const <Name>Args&, const Fit&)
// Every block of the grid calls it with all its threads. It starts its weight copies, calls rt::dependency_wait() exactly once
// and touches nothing that another stage writes before that (so neither pos, nor ids, nor activations); weights and args are
// constants. NB is the number of 8-row column blocks that share a weight: 1 decodes and verifies (n <= 8), more run longer
// passes; rows beyond 8 * NB are walked in blocks, for any n. Law L1: an output's bits depend on its own row alone: not on n,
// the number of blocks, threads per block, unit_chunks or how the shared memory is used (Fit); all sums are ordered sums of
// 512-column segments (docs/model.md 7.2).
//
// The arguments also say, for their launch:
//     kStage                       name; whether it is compiled for every NB of kFits, or for 1 alone
//     units()                      blocks beyond this number would be idle
//     smem(fit, threads)           bytes of shared memory of a block; what a stage copies ahead depends on shapes only
//
// All activations between stages are f32 rows; the consumer rounds them (and applies the RMS norm), block by block, in
// shared memory. Buffers are 16-byte aligned, row strides multiples of 4 elements; pads are neither read nor written unless said.
#pragma once

#include "kernels/kernels.h"
#include "kernels/view.h"

namespace deepcalm::gpu {

inline constexpr int kThreads = 256;      // threads per block the stages are tuned for; any multiple of 32 is correct
inline constexpr int kBlockRows = 8;      // activation rows of one mma column block
inline constexpr int kPrefillBlocks = 4;  // NB at most, in passes with more than kBlockRows rows
inline constexpr int kSegment = 512;      // columns of one partial sum
inline constexpr int kChunk = 64;         // cache positions of one attention chunk
inline constexpr int kPartialChunks = 8;  // chunks merged in order into a partial; partials are merged in order
inline constexpr int kMaxPassRows = 512;  // rows of one pass

// How a stage uses the dynamic shared memory of its block. A block has 227 KB on sm_90 and sm_100, 163 KB on sm_80 and 99 KB
// on sm_86, sm_89 and sm_120: the host takes the first of kFits that fits the device, its NB not above what the pass wants.
struct Fit {
    int nb = 1;
    int slot_parts = 1;           // a slot of the weight ring holds kSlotBytes / slot_parts
    int items = 16;               // (row tile, segment) pairs that meet in one ordered sum
    int value_rows = kBlockRows;  // rows whose latents the stage of ValueArgs holds at once
    bool halves = false;          // AttendArgs: half the columns of a chunk at a time, and values stay in `part_o`
};
inline constexpr Fit kFits[] = {
    {.nb = kPrefillBlocks},
    {.nb = 2},
    {.nb = 2, .slot_parts = 2, .items = 8, .halves = true},
    {.nb = 1},
    {.nb = 1, .slot_parts = 2, .halves = true},
    {.nb = 1, .slot_parts = 2, .value_rows = 4, .halves = true},
    {.nb = 1, .slot_parts = 2, .value_rows = 2, .halves = true},
    {.nb = 1, .slot_parts = 2, .value_rows = 1, .halves = true},
};
// The first of kFits with at most `nb` column blocks that needs no more than `smem` bytes; where none does, the most frugal.
template <class Args> constexpr const Fit& fit(const Args& a, int nb, int threads, int64_t smem) {
    for (const Fit& f : kFits)
        if (f.nb <= nb && a.smem(f, threads) <= smem) return f;
    return kFits[sizeof kFits / sizeof kFits[0] - 1];
}

struct StageInfo {
    const char* name;
    bool every_nb = false;
};

inline constexpr int kRingSlots = 2;     // weight copies in flight per warp
inline constexpr int kSlotBytes = 4608;  // of one copy: 2 f32, 4 16-bit, 8 f8 or q8, 16 q4 tiles
inline constexpr int kActBytes = 17408;  // x NB: rounded activations of a panel; one segment of f32 rows always fits
inline constexpr int kActPad = 16;       // bytes after each row of a segment, against bank conflicts

constexpr int64_t align16(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t product_smem(const Fit& f, int threads) {
    return align16(threads / 32 * kRingSlots * (kSlotBytes / f.slot_parts + int64_t{8})) + int64_t{f.nb} * kActBytes +
           int64_t{2} * f.nb * f.items * kTileRows * kBlockRows * 4 + int64_t{f.nb} * kBlockRows * 16;
}

// A packed matrix as kernels take it: PackedTensor with what they would have to look up in the table of formats.
struct Matrix {
    const std::byte* data = nullptr;  // [n_slices, row_tiles, col_tiles] tiles, bytes as in the file (kernels/format.h)
    const float* scales = nullptr;    // f8: [n_slices, ceil(rows/scale_rows), ceil(cols/scale_cols)] f32; else null
    Format format = Format::kF32;
    int rows = 0, cols = 0;  // of a slice; rows == 0: absent
    int row_tiles = 0, col_tiles = 0;
    int tile_bytes = 0;
    int scale_rows = 128, scale_cols = 128;
    int64_t slice_bytes = 0, slice_scales = 0;

    Matrix() = default;
    constexpr Matrix(const PackedTensor& t)  // NOLINT: implicit on purpose
        : data(t.data), scales(t.scales), format(t.format), rows(t.rows), cols(t.cols), row_tiles(t.row_tiles()),
          col_tiles(t.col_tiles()), tile_bytes(info(t.format).tile_bytes), scale_rows(t.scale_rows),
          scale_cols(t.scale_cols), slice_bytes(t.slice_bytes()), slice_scales(t.scales ? t.slice_scales() : 0) {}
};

// Rows of a pass. n fixes the launch; *n_live (device, null: n) of them count, the others may hold anything and are
// neither computed nor written.
struct PassRows {
    int n = 0;
    const int32_t* n_live = nullptr;
    const int32_t* pos = nullptr;  // device: position of row 0; row i is at *pos + i
};

// RMS norm applied to activation columns while they are rounded: each run of `width` columns has its own mean square;
// run 0 is weighted by w, run 1 by w2 (MTP's embedding | hidden). w == null: no norm.
struct Norm {
    const float* w = nullptr;   // [width]
    const float* w2 = nullptr;  // [width], null unless the input is two runs
    int width = 0;
    float eps = 0;
    View<float> out;  // [n, columns] or null: receives the normed rows (taps; the head's hidden rows)
};

// x[i] = embed[ids[i]] as f32, and, for MTP, hidden[i] beside it. Ids outside 0..vocab-1 give zeros.
struct EmbedArgs {
    static constexpr StageInfo kStage{"embed"};
    PassRows rows;
    const int32_t* ids = nullptr;      // device [n]
    const std::byte* table = nullptr;  // [vocab, d] f32, bf16 or f16, row-major
    Format format = Format::kF32;
    int vocab = 0, d = 0;
    View<float> x;             // [n, d], or [n, 2d] with hidden
    View<const float> hidden;  // [n, d] or null
    float scale = 1;           // on the embedding

    constexpr int units() const { return rows.n; }
    constexpr int64_t smem(const Fit&, int) const { return 0; }
};

// y[i, o] = sum_c w[o, c] * norm(x)[i, c], o < w.rows; `add`: added to what y holds (the residual), y[i, o] + add * sum.
// qkv_a, q_b, o_proj, eh_proj.
struct ProductArgs {
    static constexpr StageInfo kStage{"product", true};
    PassRows rows;
    Matrix w;
    View<const float> x;  // [n, w.cols]
    Norm norm;
    View<float> y;  // [n, w.rows]; not x
    float add = 0;
    View<float> tap = {};  // [n, w.rows] or null: the sum without the residual

    constexpr int units() const { return w.row_tiles; }
    constexpr int64_t smem(const Fit& f, int threads) const { return product_smem(f, threads); }
};

// One layer's latent cache (kernels/format.h).
struct LatentCache {
    CacheType type = CacheType::kF16;
    int ctx = 0, c_pad = 0, r_pad = 0;
    std::byte* data = nullptr;  // [ctx, row_bytes]
    int64_t row_bytes = 0;      // cache_row_bytes() rounded up to 16

    constexpr int width() const { return c_pad + r_pad; }
    DC_CONSTEXPR std::byte* row(int64_t pos) const { return data + pos * row_bytes; }
    // Of several layers' caches one behind the other, whose first this is.
    constexpr LatentCache layer(int i) const { return {type, ctx, c_pad, r_pad, row(int64_t{i} * ctx), row_bytes}; }
};

// q_full[i, h] = W_UK[h] * q_nope[i, h] | rope(q_rope[i, h]); cache row *pos + i = norm(c_kv) | rope(k_rope).
// Rows whose position is not below ctx write nothing.
struct AbsorbArgs {
    static constexpr StageInfo kStage{"absorb", true};
    PassRows rows;
    Matrix w_uk;  // [n_heads][r, dn]
    int n_heads = 0, dn = 0, dr = 0, r = 0;
    View<const float> q;                         // [n, n_heads, dn + dr]: nope | rope, as q_b (or qkv_a) left it
    View<const float> kv;                        // [n, r + dr]: c_kv | k_rope, as qkv_a left it, past the q part
    const float* kv_norm = nullptr;              // [r]
    float eps = 0;                               // kLatentNormEps
    const float *cos = nullptr, *sin = nullptr;  // [ctx, dr / 2] f32, scaled as Rope::fill gives them
    LatentCache cache;
    float* q_full = nullptr;             // [n, n_heads, c_pad + r_pad] f32; pads are written as zeros
    View<float> q_tap;                   // [n, n_heads, dn + dr] or null: q with its rope part rotated, scaled
    View<float> c_tap, k_tap;            // [n, r], [n, dr] or null: what the cache row was made from
    const float* query_scale = nullptr;  // [ctx] of a row's position, or null: 1

    constexpr int units() const { return n_heads * w_uk.row_tiles; }
    constexpr int64_t smem(const Fit& f, int threads) const { return product_smem(f, threads); }
};

// Split attention: a unit is (row, group of 16 heads, `chunks` chunks). Every unit leaves its maximum, sum and unnormalised
// values here. chunks is 1 (short contexts: many units) or kPartialChunks; the bits after ValueArgs are the same. Use 1 up to
// 8k of context and n <= kBlockRows, else kPartialChunks (ValueArgs keeps two floats per chunk and row in shared memory).
struct Partials {
    int n_heads = 0, c_pad = 0;
    int chunks = 1;
    int max_units = 0;    // units along the context that there is room for: ceil(ctx / (kChunk * chunks))
    float* o = nullptr;   // [n, max_units, n_heads, c_pad] f32
    float* ml = nullptr;  // [n, max_units, n_heads, 2] f32: maximum, sum

    DC_CONSTEXPR int64_t slot(int row, int unit, int head) const {
        return (int64_t{row} * max_units + unit) * n_heads + head;
    }
};

inline constexpr int kHeadRows = 16;                 // heads of a unit: the 16 rows of the mma
inline constexpr int kScoreStride = kChunk + 4;      // f32
inline constexpr int kProbStride = 2 * kChunk + 16;  // bytes

struct AttendArgs {
    static constexpr StageInfo kStage{"attend"};
    PassRows rows;
    float softmax_scale = 0;
    const float* q_full = nullptr;  // [n, n_heads, c_pad + r_pad]
    LatentCache cache;
    Partials part;

    constexpr bool mma() const { return cache.type == CacheType::kF16 || cache.type == CacheType::kBF16; }
    // Of a chunk, that shared memory holds.
    constexpr int columns(const Fit& f) const {
        return f.halves ? static_cast<int>(round_up(ceil_div(cache.width(), 2), 16)) : cache.width();
    }
    constexpr int units() const {
        return rows.n * static_cast<int>(ceil_div(part.n_heads, kHeadRows)) * part.max_units;
    }
    constexpr int64_t smem(const Fit& f, int threads) const {
        const int64_t width = cache.width(), q_row = 2 * width + 16, k_row = 2 * columns(f) + 16;
        return align16(threads / 32 * int64_t{8}) + kHeadRows * 4 * (5 + kScoreStride) +
               (mma() ? 2 * kHeadRows * q_row + kChunk * k_row + int64_t{2} * kHeadRows * kProbStride
                      : kHeadRows * 4 * width) +
               (part.chunks > 1 && !f.halves ? int64_t{kHeadRows} * part.c_pad * 4 : 0);
    }
};

// v[i, h] = W_UV[h] * (units of `part` merged in order, divided by the sum).
struct ValueArgs {
    static constexpr StageInfo kStage{"value"};
    PassRows rows;
    Matrix w_uv;  // [n_heads][dv, r]
    int dv = 0, ctx = 0;
    Partials part;
    View<float> v;           // [n, n_heads, dv]
    View<float> latent_tap;  // [n, n_heads, r] or null

    // Pairs of factors of one row: of every chunk where units are single chunks, and of every partial.
    constexpr int factors() const {
        return (part.chunks == 1 ? part.max_units : 0) +
               static_cast<int>(ceil_div(int64_t{part.max_units} * part.chunks, kPartialChunks));
    }
    constexpr int units() const { return part.n_heads * w_uv.row_tiles; }
    constexpr int64_t smem(const Fit& f, int threads) const {  // and sums, combined latents
        return product_smem(f, threads) + align16((rows.n < f.value_rows ? rows.n : f.value_rows) *
                                                  (int64_t{8} * factors() + 4 + 4 * int64_t{part.c_pad}));
    }
};

// Everything of an FFN that reads norm(x) and does not wait for routing: h = silu(gate) * up of a dense layer or of the
// shared experts (w_gate_up), router logits (router), either absent (rows == 0).
struct FfnInArgs {
    static constexpr StageInfo kStage{"ffn_in", true};
    PassRows rows;
    View<const float> x;  // [n, d]
    Norm norm;
    Matrix w_gate_up;  // [2 * pad16(width), d], gate and up alternate tile by tile
    int width = 0;
    View<float> h;       // [n, width]
    Matrix router;       // [E, d] f32
    View<float> logits;  // [n, E]

    constexpr int units() const { return router.row_tiles + w_gate_up.row_tiles / 2; }
    constexpr int64_t smem(const Fit& f, int threads) const { return product_smem(f, threads); }
};

// Routing of a layer.
struct Routing {
    RouterArgs router;         // topk_idx, topk_weight: [n, topk]; gate_logits, scratch unused
    View<const float> logits;  // [n, n_experts]

    constexpr int n_experts() const { return router.n_routed_experts; }
    constexpr int topk() const { return router.num_experts_per_tok; }
    constexpr int scratch() const { return 2 * router.n_routed_experts + router.n_group; }  // f32 of a warp
    // Scratch of every warp that routes a row, and one block of routed rows.
    constexpr int64_t smem(const PassRows& rows, int threads) const {
        const int warps = rows.n < threads / 32 ? rows.n : threads / 32;
        return align16(warps * int64_t{4} * scratch()) + align16(8 * int64_t{kBlockRows} * topk());
    }
    // The pass's (row, expert) pairs grouped by expert.
    constexpr int64_t lists_smem(const PassRows& rows) const {
        return align16(4 * (2 * int64_t{n_experts()} + 2)) + align16(2 * int64_t{rows.n} * topk());
    }
};

// Fills topk_idx and topk_weight. A stage of its own when n > kBlockRows; below, every block of stage_experts routes for
// itself and this stage is not launched.
struct RouteArgs {
    static constexpr StageInfo kStage{"route"};
    PassRows rows;
    Routing routing;

    constexpr int units() const { return rows.n; }
    constexpr int64_t smem(const Fit&, int threads) const { return routing.smem(rows, threads); }
};

// h[slot] = silu(gate_e) * up_e for every (row, chosen expert): slots ordered by expert, then row. Each touched expert is
// read once per block of rows.
struct ExpertsArgs {
    static constexpr StageInfo kStage{"experts", true};
    PassRows rows;
    View<const float> x;  // [n, d]
    Norm norm;            // out unused
    Matrix w;             // [E][2 * pad16(width), d]
    int width = 0;
    Routing routing;
    View<float> h;  // [n * topk, width]

    constexpr int units() const { return rows.n * routing.topk() * (w.row_tiles / 2); }
    constexpr int64_t smem(const Fit& f, int threads) const {
        return product_smem(f, threads) + routing.lists_smem(rows) +
               (rows.n <= kBlockRows ? routing.smem(rows, threads) : 0);
    }
};

// x[i] += (sum over chosen experts in ascending order, fma(weight, down_e(h_e), acc)) + shared_down(shared_h).
// A dense layer is this with experts absent and its w_down as `shared`.
struct DownArgs {
    static constexpr StageInfo kStage{"down", true};
    PassRows rows;
    Matrix experts;               // [E][d, width] or absent
    Routing routing;              // its choices are read
    View<const float> h;          // [n * topk, width]
    Matrix shared;                // [d, shared width] or absent
    View<const float> shared_h;   // [n, shared width]
    View<float> x;                // [n, d]
    float* routed = nullptr;      // [n, x.stride] the routed sum: needed when n > kBlockRows, else null or a tap
    float* shared_tap = nullptr;  // [n, x.stride] or null: output of the shared experts (dense layer: of the FFN)
    float scale = 1;              // on what is added to x

    constexpr int units() const { return shared.rows > 0 ? shared.row_tiles : experts.row_tiles; }
    constexpr int64_t smem(const Fit& f, int threads) const {
        return product_smem(f, threads) + (experts.rows > 0 ? routing.lists_smem(rows) : 0);
    }
};

// final norm, logits of rows first_row..n-1, and their argmax over ids < n_valid (ties to the lowest id; -1 when a valid
// logit is NaN or none is finite). norm.out receives the normed hidden rows, all n of them.
struct HeadArgs {
    static constexpr StageInfo kStage{"head", true};
    PassRows rows;
    int first_row = 0;    // == rows.n: norm only
    View<const float> x;  // [n, d]
    Norm norm;
    Matrix w;  // [vocab, d]
    int n_valid = 0;
    View<float> logits;         // [n - first_row, vocab]
    int32_t* choice = nullptr;  // [n - first_row]
    // Scratch of the device-wide argmax: [n - first_row, n_blocks] pairs (f32 value, i32 id; id -2 marks a NaN), and a counter
    // that is zero before the first launch (every launch leaves it zero).
    float* best_value = nullptr;
    int32_t* best_id = nullptr;
    unsigned* arrived = nullptr;
    float scale = 1;  // on logits

    constexpr int units() const { return first_row < rows.n ? w.row_tiles : rows.n; }
    constexpr int64_t smem(const Fit& f, int threads) const { return product_smem(f, threads); }
};

// Every stage: X(name, Args). stage_<name><NB>(args, block, n_blocks, smem, wait); kernels and their launches are generated
// from these lists. The first are compiled for every NB of kFits; the others do the same for every pass.
#define DEEPCALM_CUDA_PRODUCT_STAGES(X)                                                                                \
    X(product, ProductArgs)                                                                                            \
    X(absorb, AbsorbArgs)                                                                                              \
    X(ffn_in, FfnInArgs)                                                                                               \
    X(experts, ExpertsArgs)                                                                                            \
    X(down, DownArgs)                                                                                                  \
    X(head, HeadArgs)
#define DEEPCALM_CUDA_ROW_STAGES(X)                                                                                    \
    X(embed, EmbedArgs)                                                                                                \
    X(attend, AttendArgs)                                                                                              \
    X(value, ValueArgs)                                                                                                \
    X(route, RouteArgs)
#define DEEPCALM_CUDA_STAGES(X) DEEPCALM_CUDA_PRODUCT_STAGES(X) DEEPCALM_CUDA_ROW_STAGES(X)

// Those of a pass.
template <class... Args> struct StageList {};
using PassStages = StageList<EmbedArgs, ProductArgs, AbsorbArgs, AttendArgs, ValueArgs, FfnInArgs, RouteArgs,
                             ExpertsArgs, DownArgs, HeadArgs>;

}  // namespace deepcalm::gpu
