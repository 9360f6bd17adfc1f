// Products of packed weights and activation rows: what is under every stage that reads a matrix.
//
// A block owns a range of units (row tiles, or gate/up pairs of them). Its warps deal the pairs (row tile, segment of 512
// columns) among themselves; each pair is one chain of mma (or integer mma, or fma) from zero in column order, its 16 x
// 8 * NB sums meet in shared memory, and one thread per output adds the segments in order. Weights are the 16-row operand,
// straight from the tile bytes; activations the 8-column operand, rounded once per block into shared memory.
// Weights stream through a ring of asynchronous copies per warp that starts before the stage's dependency wait and runs on
// across groups: which bytes come next depends on shapes only (or, for routed experts, on routing).
//
// Row r of a tile: lane g = lane / 4 holds rows 2g and 2g + 1 (as mma rows g and g + 8), so both come in one load.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/rt.h"
#include "kernels/elementary.h"

namespace deepcalm::gpu {

// --- rounding -------------------------------------------------------------------------------------------------------

DC_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
DC_DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
DC_DEVICE int ceil_to(int a, int b) { return (a + b - 1) / b; }

DC_DEVICE float bf16_round(float f) { return bf16_value(bf16_bits(f)); }
// exp(x) for x <= 0 with fused multiply-adds.
DC_DEVICE float exp_neg(float x) {
    return deepcalm::exp_neg(x, [](float a, float b, float c) { return rt::fma(a, b, c); });
}

// |f| as bits, in its order but that NaN is the largest.
DC_DEVICE uint32_t magnitude(float f) { return rt::bits(f) & 0x7fffffffU; }
// The power of two that moves values up to `top` into 2^14 .. 2^15, and its inverse.
struct F16Scale {
    float scale, inverse;
};
DC_DEVICE F16Scale f16_scale(uint32_t top) {
    const int k = min_int(14 + 127 - static_cast<int>(top >> 23), 126);
    return {rt::from_bits(static_cast<uint32_t>(127 + k) << 23), rt::from_bits(static_cast<uint32_t>(127 - k) << 23)};
}
DC_DEVICE int32_t i8_code(float c) {  // NaN: -127
    c = c > -127.0F ? c : -127.0F;
    c = c < 127.0F ? c : 127.0F;
    return static_cast<int32_t>(rt::rint(c));
}

struct alignas(16) Quad {
    float v[4];
    DC_DEVICE uint32_t top() const {
        return max_of(max_of(magnitude(v[0]), magnitude(v[1])), max_of(magnitude(v[2]), magnitude(v[3])));
    }
};
// x[0..3], zeros from `left` on.
DC_DEVICE Quad load4(const float* x, int left) {
    Quad q;
    if (left >= 4 && (reinterpret_cast<uintptr_t>(x) & 15) == 0) return *reinterpret_cast<const Quad*>(x);
    for (int i = 0; i < 4; ++i) q.v[i] = i < left ? x[i] : 0.0F;
    return q;
}

enum class Act : uint8_t { kF32, kBF16, kF16, kI8 };
DC_DEVICE Act act_of(Format f) {
    switch (f) {
    case Format::kF32: return Act::kF32;
    case Format::kF16: return Act::kF16;
    case Format::kBF16:
    case Format::kF8: return Act::kBF16;
    default: return Act::kI8;
    }
}
// Bytes between activation rows of one segment. After 512 elements: f16 the scale of (row, segment), i8 16 group scales.
DC_DEVICE int act_stride(Act a) {
    switch (a) {
    case Act::kF32: return 4 * kSegment + kActPad;
    case Act::kI8: return kSegment + 4 * kSegment / kTileCols + kActPad;
    default: return 2 * kSegment + kActPad;
    }
}

// One warp rounds one row of one segment: get(col) gives columns col..col+3 as a Quad, zeros past the width.
template <class Get> DC_DEVICE void round_row(Act act, unsigned char* out, Get&& get) {
    const int lane = rt::lane();
    Quad v[4];
    for (int t = 0; t < 4; ++t) v[t] = get(128 * t + 4 * lane);
    if (act == Act::kF32) {
        for (int t = 0; t < 4; ++t) *reinterpret_cast<Quad*>(out + 4 * (128 * t + 4 * lane)) = v[t];
        return;
    }
    if (act == Act::kI8) {  // per 32 columns, which 8 lanes hold: d = amax / 127, code = rint(x * (127 / amax))
        for (int t = 0; t < 4; ++t) {
            const float amax = rt::from_bits(rt::max_lanes(v[t].top(), 8));
            const bool zero = amax < 0x1p-119F;
            const float inv = zero ? 0.0F : 127.0F / amax;
            uint32_t codes = 0;
            for (int i = 0; i < 4; ++i) codes |= (static_cast<uint32_t>(i8_code(v[t].v[i] * inv)) & 255U) << (8 * i);
            *reinterpret_cast<uint32_t*>(out + 128 * t + 4 * lane) = codes;
            if (lane % 8 == 0)
                *reinterpret_cast<float*>(out + kSegment + 4 * (4 * t + lane / 8)) = zero ? 0.0F : amax / 127.0F;
        }
        return;
    }
    float scale = 1.0F;
    if (act == Act::kF16) {
        uint32_t top = 0;
        for (int t = 0; t < 4; ++t) top = max_of(top, v[t].top());
        const F16Scale f = f16_scale(rt::max_lanes(top));
        scale = f.scale;
        if (lane == 0) *reinterpret_cast<float*>(out + 2 * kSegment) = f.inverse;
    }
    for (int t = 0; t < 4; ++t) {
        uint32_t h[4];
        for (int i = 0; i < 4; ++i) h[i] = act == Act::kF16 ? rt::f16_bits(v[t].v[i] * scale) : bf16_bits(v[t].v[i]);
        auto* to = reinterpret_cast<uint32_t*>(out + 2 * (128 * t + 4 * lane));
        to[0] = h[0] | h[1] << 16;
        to[1] = h[2] | h[3] << 16;
    }
}

// --- one segment ----------------------------------------------------------------------------------------------------

DC_DEVICE int slot_tiles(Format f) {
    switch (f) {
    case Format::kF32: return 2;
    case Format::kBF16:
    case Format::kF16: return 4;
    case Format::kQ4:
    case Format::kQ4B: return 16;
    default: return 8;
    }
}

// Four e4m3 bytes as two pairs of bf16, exact: the exponent bits move into place, a multiplication by 2^120 rebiases them.
DC_DEVICE void e4m3_to_bf16(uint32_t w, uint32_t& lo, uint32_t& hi) {
    const uint32_t a = rt::byte_perm(w, 0, 0x1404), b = rt::byte_perm(w, 0, 0x3424);  // byte in the top of each half
    lo = rt::mul_bf16x2((a & 0x80008000U) | ((a >> 4) & 0x07f007f0U), 0x7b807b80U);
    hi = rt::mul_bf16x2((b & 0x80008000U) | ((b >> 4) & 0x07f007f0U), 0x7b807b80U);
}

// Activations of one segment as the warp reads them: rows of column block j are 8 * j + g.
struct ActView {
    const unsigned char* row;  // row g of column block 0
    int stride;                // bytes between rows
    int rows;                  // valid ones
};

// Running sums of a segment; c[j][i]: row 2 * g + i / 2, column 8 * j + 2 * q + i % 2.
template <int NB> struct SegmentSum {
    float c[NB][4], total[NB][4];  // total: f8 sums of finished scale blocks
    DC_DEVICE void clear(float (&x)[NB][4]) {
        for (int j = 0; j < NB; ++j)
            for (int i = 0; i < 4; ++i) x[j][i] = 0.0F;
    }
};

// `tiles` tiles at `w`, whose first is tile `at` of the segment.
template <int NB>
DC_DEVICE void add_f32(SegmentSum<NB>& s, const unsigned char* w, int tiles, int at, const ActView& x) {
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    for (int t = 0; t < tiles; ++t) {
        const auto* p = reinterpret_cast<const float*>(w) + t * kTileRows * kTileCols + 2 * g;
        DC_UNROLL_BY(8)
        for (int c = 0; c < kTileCols; ++c) {
            const float w0 = p[c * kTileRows], w1 = p[c * kTileRows + 1];
            for (int j = 0; j < NB; ++j)
                for (int i = 0; i < 2; ++i) {
                    const int col = 8 * j + 2 * q + i;
                    if (col >= x.rows) continue;
                    const float v =
                        *reinterpret_cast<const float*>(x.row + (col - g) * x.stride + 4 * ((at + t) * kTileCols + c));
                    s.c[j][i] = rt::fma(w0, v, s.c[j][i]);
                    s.c[j][i + 2] = rt::fma(w1, v, s.c[j][i + 2]);
                }
        }
    }
}

struct alignas(8) Pair32 {
    uint32_t v[2];
};

template <int NB, bool kHalf>
DC_DEVICE void add_16(SegmentSum<NB>& s, const unsigned char* w, int tiles, int at, const ActView& x) {
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    for (int k = 0; k < 2 * tiles; ++k) {  // steps of 16 columns
        const auto* p = reinterpret_cast<const Pair32*>(w) + (k * 8 + q) * 8 + g;
        const Pair32 lo = p[0], hi = p[4 * 8];
        const uint32_t a[4] = {lo.v[0], lo.v[1], hi.v[0], hi.v[1]};
        for (int j = 0; j < NB; ++j) {
            if (8 * j >= x.rows) continue;
            uint32_t b[2] = {0, 0};
            if (8 * j + g < x.rows) {
                const auto* v = reinterpret_cast<const uint32_t*>(x.row + 8 * j * x.stride) + at * 16 + k * 8 + q;
                b[0] = v[0];
                b[1] = v[4];
            }
            kHalf ? rt::mma_f16(s.c[j], a, b) : rt::mma_bf16(s.c[j], a, b);
        }
    }
}

template <int NB>
DC_DEVICE void add_f8(SegmentSum<NB>& s, const unsigned char* w, int tiles, int at, const ActView& x) {
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    for (int k = 0; k < 2 * tiles;
         ++k) {  // columns 4q..4q+3 of the step: the permutation of k is the same on both sides
        const Pair32 p = reinterpret_cast<const Pair32*>(w)[(k * 4 + q) * 8 + g];
        uint32_t a[4];
        e4m3_to_bf16(p.v[0], a[0], a[2]);
        e4m3_to_bf16(p.v[1], a[1], a[3]);
        for (int j = 0; j < NB; ++j) {
            if (8 * j >= x.rows) continue;
            uint32_t b[2] = {0, 0};
            if (8 * j + g < x.rows) {
                const auto v = reinterpret_cast<const Pair32*>(x.row + 8 * j * x.stride)[at * 8 + k * 4 + q];
                b[0] = v.v[0];
                b[1] = v.v[1];
            }
            rt::mma_bf16(s.c[j], a, b);
        }
    }
}

// q8 and q4: exact integer sum of a tile's 32 columns, then c = fma(sum, d_w * d_x, c).
template <int NB, bool kFour>
DC_DEVICE void add_int(SegmentSum<NB>& s, const unsigned char* w, int tiles, int at, const ActView& x,
                       bool bf16_scale) {
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    constexpr int kBytes = kFour ? static_cast<int>(sizeof(TileQ4)) : static_cast<int>(sizeof(TileQ8));
    for (int t = 0; t < tiles; ++t, w += kBytes) {
        const auto* p = reinterpret_cast<const Pair32*>(w) + q * 8 + g;
        uint32_t a[4];
        const Pair32 lo = p[0];
        if constexpr (kFour) {  // nibble + 0x78 in each byte, sign flipped: code - 8
            for (int i = 0; i < 2; ++i) {
                a[i] = ((lo.v[i] & 0x0f0f0f0fU) + 0x78787878U) ^ 0x80808080U;
                a[i + 2] = (((lo.v[i] >> 4) & 0x0f0f0f0fU) + 0x78787878U) ^ 0x80808080U;
            }
        } else {
            const Pair32 hi = p[4 * 8];
            for (int i = 0; i < 2; ++i) {
                a[i] = lo.v[i] ^ 0x80808080U;
                a[i + 2] = hi.v[i] ^ 0x80808080U;
            }
        }
        const uint32_t d =
            reinterpret_cast<const uint32_t*>(w + kBytes - 2 * kTileRows)[g];  // scales of rows 2g, 2g + 1
        const float d0 = bf16_scale ? bf16_value(d & 0xffffU) : rt::f16_value(d & 0xffffU);
        const float d1 = bf16_scale ? bf16_value(d >> 16) : rt::f16_value(d >> 16);
        for (int j = 0; j < NB; ++j) {
            if (8 * j >= x.rows) continue;
            const unsigned char* row = x.row + 8 * j * x.stride;
            uint32_t b[2] = {0, 0};
            if (8 * j + g < x.rows) {
                const auto* v = reinterpret_cast<const uint32_t*>(row) + (at + t) * 8 + q;
                b[0] = v[0];
                b[1] = v[4];
            }
            int32_t dot[4] = {0, 0, 0, 0};
            rt::mma_s8(dot, a, b);
            for (int i = 0; i < 2; ++i) {
                const int col = 2 * q + i;
                if (8 * j + col >= x.rows) continue;
                const float dx = *reinterpret_cast<const float*>(row + (col - g) * x.stride + kSegment + 4 * (at + t));
                s.c[j][i] = rt::fma(static_cast<float>(dot[i]), d0 * dx, s.c[j][i]);
                s.c[j][i + 2] = rt::fma(static_cast<float>(dot[i + 2]), d1 * dx, s.c[j][i + 2]);
            }
        }
    }
}

// --- groups of work -------------------------------------------------------------------------------------------------

// A segment of a product: columns [32 * tile0, + 32 * tiles) of slice `slice`.
struct Piece {
    const Matrix* w;
    int slice, tile0, tiles;
    int first_row_tile = 0;  // of the matrix: row tile 0 of the problem
};
DC_DEVICE int segments(const Matrix& w) { return ceil_to(w.col_tiles, kSegment / kTileCols); }
DC_DEVICE Piece segment(const Matrix& w, int slice, int s) {
    const int per = kSegment / kTileCols;
    return {&w, slice, s * per, min_int(per, w.col_tiles - s * per), 0};
}

// Units [begin, end) of a stage.
struct Units {
    int begin, end;
};
// This block's of n.
DC_DEVICE Units own_units(int n) {
    return {static_cast<int>(int64_t{n} * rt::block() / rt::blocks()),
            static_cast<int>(int64_t{n} * (rt::block() + 1) / rt::blocks())};
}

// What the threads of a block do together between two ordered sums: `units` units from `unit` on of one problem, one block
// of rows, pieces [p0, p0 + np).
struct Group {
    int problem, unit, units, row0, p0, np;
    bool first, last;  // panel of the pieces
};

struct ProductSmem {
    int slot_parts, items;  // of Fit
    unsigned char* ring;    // [warps, kRingSlots, kSlotBytes / slot_parts]
    uint64_t* bar;          // [warps, kRingSlots]
    unsigned char* act;     // the panel: [np, rows, act stride]
    float* sum;             // [items][8 * NB columns][16 rows]
    float* acc;             // the same shape: sums of earlier panels
    float* inv;             // [2][8 * NB] 1 / rms of the rows
    unsigned char* end;
};
template <int NB> DC_DEVICE ProductSmem carve(const Fit& fit) {
    ProductSmem s;
    const int slots = rt::warps() * kRingSlots, slot_bytes = kSlotBytes / fit.slot_parts;
    s.slot_parts = fit.slot_parts;
    s.items = fit.items;
    s.ring = rt::dynamic_smem();
    s.bar = reinterpret_cast<uint64_t*>(s.ring + slots * slot_bytes);
    s.act = s.ring + align16(slots * (slot_bytes + int64_t{8}));
    s.sum = reinterpret_cast<float*>(s.act + NB * kActBytes);
    s.acc = s.sum + NB * s.items * kTileRows * kBlockRows;
    s.inv = s.acc + NB * s.items * kTileRows * kBlockRows;
    s.end = reinterpret_cast<unsigned char*>(s.inv + NB * kBlockRows * 4);
    return s;
}

// What a stage tells run(): the base of every plan. Problems are numbered; unit u of the stage is unit
// u % units_per_problem of problem u / units_per_problem. rows(), pieces() and piece() must be known before the dependency
// wait, unless the plan runs after it. A plan adds
//     Piece piece(int problem, int p)                                     p < pieces of a problem
//     Quad get(int problem, int row, int j, int p, int col)               columns from col of piece p of activation row `row`, the
//                                                                         j-th of its block of rows; zeros past the width
//     void finish(int problem, int unit, int r, int row, float a, float b)  output row r of the unit: a; or a gate, b up
struct Plan {
    static constexpr bool kPair = false;  // units are gate/up pairs of row tiles
    PassRows pass;
    int units_per_problem = 1, n_pieces = 1;
    int act_bytes = 0;       // the largest act_stride among the pieces
    int max_tiles = 1 << 8;  // row tiles of a group
    int max_rows = 1 << 16;  // rows of a group
    int skip = 0;            // rows of the pass before the plan's row 0
    int n_live = 0;

    DC_DEVICE void begin() { n_live = pass.n_live ? min_int(pass.n, *pass.n_live - skip) : pass.n; }
    DC_DEVICE int rows(int) const { return pass.n; }
    DC_DEVICE int live(int) const { return n_live; }
    DC_DEVICE int act_id(int) const { return 0; }  // equal ids: the same activations
    DC_DEVICE void rows_start(const Group&, int, const ProductSmem&) {}
    // The ordered sum of row tile `tile` of the group; the sums of panels before the last stay in acc.
    DC_DEVICE static float total(const Group& g, int tile, const float* sum, float* acc, int n_sum) {
        float v = g.first ? 0.0F : acc[tile * n_sum];
        for (int p = 0; p < g.np; ++p) v += sum[(tile * g.np + p) * n_sum];
        if (!g.last) acc[tile * n_sum] = v;
        return v;
    }
};
// Adds the segments of output (unit, r, row j of the block of rows); sum, acc: at this output of item 0, n_sum apart.
template <class P>
DC_DEVICE void fold(P& plan, const Group& g, int unit, int r, int j, const float* sum, float* acc, int n_sum) {
    const int tile = unit * (P::kPair ? 2 : 1);
    const float a = Plan::total(g, tile, sum, acc, n_sum);
    const float b = P::kPair ? Plan::total(g, tile + 1, sum, acc, n_sum) : 0.0F;
    if (g.last) plan.finish(g.problem, g.unit + unit, r, g.row0 + j, a, b);
}

// Walks a block's groups and, inside them, one warp's items, in an order that the copies and the arithmetic share.
template <int NB, class P> struct Cursor {
    const P* plan;
    int slot_parts, max_items;
    int unit, end;  // units of the block
    Group g;
    int item, base;  // this warp's item of the group; items of all groups before, modulo warps
    int tile;        // next tile of the item's piece

    DC_DEVICE int group_rows() const { return min_int(kBlockRows * NB, plan->max_rows); }
    DC_DEVICE int per_panel(int problem) const {
        const int rows = min_int(group_rows(), plan->rows(problem));
        int p = NB * kActBytes / ((rows > 0 ? rows : 1) * plan->act_bytes);
        p = min_int(p > 0 ? p : 1, max_items / (P::kPair ? 2 : 1));
        const int n = plan->n_pieces;
        return ceil_to(n, ceil_to(n, p));
    }
    DC_DEVICE int items() const { return g.units * (P::kPair ? 2 : 1) * g.np; }
    DC_DEVICE void open() {  // the group at g.row0, g.p0 of the units from `unit` on
        g.problem = unit / plan->units_per_problem;
        g.unit = unit % plan->units_per_problem;
        const int per = per_panel(g.problem), tiles = P::kPair ? 2 : 1;
        int max_tiles = max_items / per;
        max_tiles = min_int(max_tiles, plan->max_tiles) / tiles;
        g.units = min_int(min_int(max_tiles > 0 ? max_tiles : 1, plan->units_per_problem - g.unit), end - unit);
        g.np = min_int(per, plan->n_pieces - g.p0);
        g.first = g.p0 == 0;
        g.last = g.p0 + g.np == plan->n_pieces;
    }
    DC_DEVICE void first_item() {
        const int w = rt::warps();
        item = (rt::warp() + w - base) % w;
        tile = 0;
    }
    DC_DEVICE void start(const P& p, const Units& units, const ProductSmem& s) {
        plan = &p;
        slot_parts = s.slot_parts;
        max_items = s.items;
        unit = units.begin;
        end = units.end;
        base = 0;
        g = {};
        if (!done()) open();
        first_item();
    }
    DC_DEVICE bool done() const { return unit >= end; }
    DC_DEVICE void next_group() {
        base = (base + items()) % rt::warps();
        if (!g.last) {
            g.p0 += g.np;
        } else {
            g.p0 = 0;
            g.row0 += group_rows();
            if (g.row0 >= plan->rows(g.problem)) {
                g.row0 = 0;
                unit += g.units;
            }
        }
        if (!done()) open();
        first_item();
    }
    // The next copy of this warp; false when there is none.
    DC_DEVICE bool next_copy(const std::byte*& src, int& bytes) {
        while (!done() && item >= items()) next_group();
        if (done()) return false;
        const Piece p = plan->piece(g.problem, g.p0 + item % g.np);
        const int row_tile = p.first_row_tile + g.unit * (P::kPair ? 2 : 1) + item / g.np;
        const int n = min_int(slot_tiles(p.w->format) / slot_parts, p.tiles - tile);
        src = p.w->data + p.slice * p.w->slice_bytes +
              (int64_t{row_tile} * p.w->col_tiles + p.tile0 + tile) * p.w->tile_bytes;
        bytes = n * p.w->tile_bytes;
        tile += n;
        if (tile >= p.tiles) {
            tile = 0;
            item += rt::warps();
        }
        return true;
    }
};

// A warp's ring of weight copies.
struct Ring {
    unsigned char* slots;
    uint64_t* bar;
    int slot_parts, started, used;
    DC_DEVICE unsigned char* slot(int i) const { return slots + i * (kSlotBytes / slot_parts); }
    template <class C> DC_DEVICE void feed(C& cursor) {
        const std::byte* src = nullptr;
        int bytes = 0;
        if (!cursor.next_copy(src, bytes)) bytes = 0;
        const int s = started % kRingSlots;
        rt::copy_start(slot(s), src, bytes, bar + s);
        ++started;
    }
    DC_DEVICE const unsigned char* wait() {
        const int s = used % kRingSlots;
        rt::copy_wait<kRingSlots - 1>(bar + s, used / kRingSlots & 1);
        return slot(s);
    }
};

// The 16 x 8 * NB sums of one (row tile, piece), through the ring, into `out` [8 * NB][16].
template <int NB, class C>
DC_DEVICE void sum_segment(Ring& ring, C& feed, const Piece& p, int row_tile, const ActView& x, float* out) {
    const Matrix& w = *p.w;
    SegmentSum<NB> s;
    s.clear(s.c);
    s.clear(s.total);
    const Format f = w.format;
    const int per = slot_tiles(f) / ring.slot_parts;
    const float* scales = nullptr;
    if (f == Format::kF8)
        scales = w.scales + p.slice * w.slice_scales +
                 int64_t{(p.first_row_tile + row_tile) * kTileRows / w.scale_rows} * ceil_to(w.cols, w.scale_cols);
    for (int at = 0; at < p.tiles; at += per) {
        const int tiles = min_int(per, p.tiles - at);
        const unsigned char* slot = ring.wait();
        switch (f) {
        case Format::kF32: add_f32<NB>(s, slot, tiles, at, x); break;
        case Format::kBF16: add_16<NB, false>(s, slot, tiles, at, x); break;
        case Format::kF16: add_16<NB, true>(s, slot, tiles, at, x); break;
        case Format::kF8:
            for (int t = 0; t < tiles;) {  // to the end of the slot or of the scale block
                const int per_block = w.scale_cols / kTileCols, tile = p.tile0 + at + t;
                const float scale = scales[tile / per_block];
                const int n = min_int(tiles - t, per_block - tile % per_block);
                add_f8<NB>(s, slot + t * static_cast<int>(sizeof(TileF8)), n, at + t, x);
                t += n;
                if ((tile + n) % per_block != 0 && at + t < p.tiles) continue;
                for (int j = 0; j < NB; ++j)
                    for (int i = 0; i < 4; ++i) s.total[j][i] = rt::fma(s.c[j][i], scale, s.total[j][i]);
                s.clear(s.c);
            }
            break;
        case Format::kQ8: add_int<NB, false>(s, slot, tiles, at, x, false); break;
        case Format::kQ4:
        case Format::kQ4B: add_int<NB, true>(s, slot, tiles, at, x, f == Format::kQ4B); break;
        }
        ++ring.used;
        ring.feed(feed);
    }
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    for (int j = 0; j < NB; ++j)
        for (int i = 0; i < 2; ++i) {
            const int col = 8 * j + 2 * q + i;
            float v0 = f == Format::kF8 ? s.total[j][i] : s.c[j][i];
            float v1 = f == Format::kF8 ? s.total[j][i + 2] : s.c[j][i + 2];
            if (f == Format::kF16 && col < x.rows) {
                const float scale = *reinterpret_cast<const float*>(x.row + (col - g) * x.stride + 2 * kSegment);
                v0 *= scale;
                v1 *= scale;
            }
            out[col * kTileRows + 2 * g] = v0;
            out[col * kTileRows + 2 * g + 1] = v1;
        }
}

// Runs those units of a plan. The dependency wait, unless it is behind us, comes when the first copies have started.
template <int NB, class P> DC_DEVICE void run(P& plan, const Units& units, const ProductSmem& s, bool wait = true) {
    constexpr int kSum = kTileRows * kBlockRows * NB;
    const int warp = rt::warp();
    Ring ring{s.ring + warp * kRingSlots * (kSlotBytes / s.slot_parts), s.bar + warp * kRingSlots, s.slot_parts, 0, 0};
    for (int i = 0; i < kRingSlots; ++i) rt::copy_open(ring.bar + i);
    Cursor<NB, P> feed, at;
    feed.start(plan, units, s);
    at = feed;
    DC_UNROLL_BY(1)
    for (int i = 0; i < kRingSlots; ++i) ring.feed(feed);
    if (wait) rt::dependency_wait();
    plan.begin();
    int act_id = -1, act_row0 = -1, act_p0 = -1;  // what s.act holds
    for (; !at.done(); at.next_group()) {
        const Group& g = at.g;
        const int live = plan.live(g.problem) - g.row0;
        const int rows = live < 0 ? 0 : min_int(live, at.group_rows());
        const int id = plan.act_id(g.problem);
        if (id != act_id || g.row0 != act_row0 || g.p0 != act_p0) {
            if (id != act_id || g.row0 != act_row0)
                plan.rows_start(g, rows, s);  // ends with a barrier if it did anything
            for (int u = warp; u < rows * g.np; u += rt::warps()) {
                const int p = u % g.np, j = u / g.np;
                const Piece piece = plan.piece(g.problem, g.p0 + p);
                const Act act = act_of(piece.w->format);
                round_row(act, s.act + (int64_t{p} * rows + j) * plan.act_bytes,
                          [&](int col) { return plan.get(g.problem, g.row0 + j, j, g.p0 + p, col); });
            }
            act_id = id;
            act_row0 = g.row0;
            act_p0 = g.p0;
            rt::sync_block();
        }
        for (int i = at.item; i < at.items(); i += rt::warps()) {
            const int p = i % g.np, tile = g.unit * (P::kPair ? 2 : 1) + i / g.np;
            const ActView x{s.act + (int64_t{p} * rows + rt::lane() / 4) * plan.act_bytes, plan.act_bytes, rows};
            sum_segment<NB>(ring, feed, plan.piece(g.problem, g.p0 + p), tile, x, s.sum + i * kSum);
        }
        rt::sync_block();
        for (int e = rt::thread(); e < g.units * kTileRows * rows; e += rt::threads()) {
            const int unit = e / (kTileRows * rows), rest = e % (kTileRows * rows);
            fold(plan, g, unit, rest % kTileRows, rest / kTileRows, s.sum + rest, s.acc + rest, kSum);
        }
        rt::sync_block();
    }
    for (int i = 0; i < kRingSlots; ++i) rt::copy_close(ring.bar + i);
}

// --- rows and plans of them -----------------------------------------------------------------------------------------

DC_DEVICE int live_rows(const PassRows& r) { return r.n_live ? min_int(r.n, *r.n_live) : r.n; }

// inv[run * stride + j] = 1 / sqrt(mean square of run `run` of row j + eps). Eight warps' worth of partial sums per run, in
// order, whatever the block: x(j) points at row j. Ends with a barrier; partial: [rows * runs * 8] f32.
template <class X>
DC_DEVICE void rms_rows(int rows, int runs, int width, float eps, float* partial, float* inv, int stride, X&& x) {
    constexpr int kParts = 8;
    const int lane = rt::lane();
    for (int u = rt::warp(); u < rows * runs * kParts; u += rt::warps()) {
        const int part = u % kParts, run = u / kParts % runs, j = u / kParts / runs;
        const float* row = x(j) + int64_t{run} * width;
        float sum = 0;
        for (int c = 4 * (part * 32 + lane); c < width; c += 4 * 32 * kParts) {
            const Quad v = load4(row + c, width - c);
            for (int i = 0; i < 4; ++i) sum = rt::fma(v.v[i], v.v[i], sum);
        }
        sum = rt::sum_lanes(sum);
        if (lane == 0) partial[u] = sum;
    }
    rt::sync_block();
    for (int u = rt::thread(); u < rows * runs; u += rt::threads()) {
        float sum = 0;
        for (int p = 0; p < kParts; ++p) sum += partial[u * kParts + p];
        inv[u % runs * stride + u / runs] = 1.0F / rt::sqrt(sum / static_cast<float>(width) + eps);
    }
    rt::sync_block();
}

// Four columns from `col` of a row under the norm; inv: of the row, runs `stride` apart.
DC_DEVICE Quad normed(const Norm& norm, const float* row, int col, int cols, const float* inv, int stride) {
    Quad v = load4(row + col, cols - col);
    if (!norm.w || col >= cols) return v;
    for (int i = 0; i < 4; ++i) {
        const int c = col + i;
        if (c >= cols) break;
        const bool second = c >= norm.width;
        const float w = second ? norm.w2[c - norm.width] : norm.w[c];
        v.v[i] = w * (v.v[i] * inv[second ? stride : 0]);
    }
    return v;
}

// norm.out: blocks deal the rows. Every thread; scratch as rms_rows wants it for one row.
DC_DEVICE void write_normed(const Norm& norm, const View<const float>& x, int cols, int rows, const ProductSmem& s) {
    if (!norm.out.data || !norm.w) return;
    const int runs = norm.w2 ? 2 : 1;
    for (int i = rt::block(); i < rows; i += rt::blocks()) {
        const float* row = x.row(i);
        rms_rows(1, runs, norm.width, norm.eps, s.sum, s.inv, 1, [&](int) { return row; });
        for (int c = 4 * rt::thread(); c < cols; c += 4 * rt::threads()) {
            const Quad v = normed(norm, row, c, cols, s.inv, 1);
            for (int k = 0; k < 4 && c + k < cols; ++k) norm.out.row(i)[c + k] = v.v[k];
        }
        rt::sync_block();
    }
}

DC_DEVICE Plan plan_of(const PassRows& pass, const Matrix& w, int units_per_problem) {
    Plan plan;
    plan.pass = pass;
    plan.units_per_problem = units_per_problem;
    plan.n_pieces = segments(w);
    plan.act_bytes = act_stride(act_of(w.format));
    return plan;
}

// Plans whose activations are rows of x, normed or not.
template <int NB> struct NormedPlan : Plan {
    View<const float> x;
    int cols;
    const Norm* norm;  // null: none
    const float* inv = nullptr;
    // source(j): row of x that is the j-th of the block of rows
    template <class Source> DC_DEVICE void start(int rows, const ProductSmem& s, Source&& source) {
        inv = s.inv;
        if (!norm || !norm->w) return;
        rms_rows(rows, norm->w2 ? 2 : 1, norm->width, norm->eps, s.sum, s.inv, NB * kBlockRows,
                 [&](int j) { return x.row(source(j)); });
    }
    DC_DEVICE Quad row_quad(int64_t row, int j, int col) const {
        if (!norm) return load4(x.row(row) + col, cols - col);
        return normed(*norm, x.row(row), col, cols, inv + j, NB * kBlockRows);
    }
};

// One product of all rows, kGateUp: of pairs of row tiles; put(o, row, a, b) takes output o < width of a row: a; or a gate, b up.
template <int NB, bool kGateUp, class Put> struct RowsPlan : NormedPlan<NB> {
    static constexpr bool kPair = kGateUp;
    const Matrix* w;
    int width;
    Put put;
    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem& s) {
        this->start(rows, s, [&](int j) { return g.row0 + j; });
    }
    DC_DEVICE Piece piece(int, int p) const { return segment(*w, 0, p); }
    DC_DEVICE Quad get(int, int row, int j, int p, int col) const { return this->row_quad(row, j, p * kSegment + col); }
    DC_DEVICE void finish(int, int unit, int r, int row, float a, float b) const {
        const int o = unit * kTileRows + r;
        if (o < width) put(o, row, a, b);
    }
};
template <int NB, bool kGateUp = false, class Put>
DC_DEVICE RowsPlan<NB, kGateUp, Put> rows_plan(const PassRows& pass, const Matrix& w, const View<const float>& x,
                                               const Norm* norm, int width, Put put) {
    return {{plan_of(pass, w, w.row_tiles / (kGateUp ? 2 : 1)), x, w.cols, norm}, &w, width, put};
}

// A product for every head, w's slices.
struct HeadsPlan : Plan {
    const Matrix* w;
    DC_DEVICE int act_id(int head) const { return head; }
    DC_DEVICE Piece piece(int head, int p) const { return segment(*w, head, p); }
};

}  // namespace deepcalm::gpu
