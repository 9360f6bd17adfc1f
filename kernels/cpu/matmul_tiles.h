// The products of bf16 and f8 weights on tile registers (tiles.h): a packed bf16 tile is the right operand of a dot as it lies,
// an f8 tile becomes one through a table. One instruction serves every number of rows, so law L1 holds without a second path.
// Order of a sum (docs/model.md 7.2): blocks of 32 columns, each the dot's two chains, added in order; f8: from +0 inside each
// scale block, of 256 times the weights, then acc = fma(block * 2^-8, scale, acc).
//
// A block of sums is 1 x 4 or 2 x 2 tiles: rows of activations x row tiles. Rows are read where they lie: one stride apart,
// which should be no multiple of 4096 bytes, or all lines of a tile fall into one set of the cache. Sapphire Rapids, one
// thread, bf16: 1.5 T operations/s of 16 rows, 1.8 of 32 to 128, weights from the second level.
#pragma once

#include "kernels/cpu/tiles.h"

namespace deepcalm {
namespace {

constexpr int kRunRows = 256, kRunCols = 2048;  // activations that stay in the second-level cache, for all row tiles
constexpr int kGroupTiles = 8;                  // row tiles that do, for rows that make no block of 32
constexpr int kPanelCols = 128;                 // f8: columns decoded for all rows of a run
constexpr int kTileBytes16 = sizeof(Tile16);

// Activation rows one stride apart and where their sums go.
struct Run {
    const uint16_t* x;  // [n, cols]
    int64_t x_bytes;    // between rows
    int n;
    View<float> y;  // [n, 16 * row tiles of the call]

    DC_INLINE const uint16_t* row(int i) const {
        return reinterpret_cast<const uint16_t*>(reinterpret_cast<const std::byte*>(x) + i * x_bytes);
    }
};

// fn(run) for all rows of a call: at most kRunRows, and what x_row names in runs that are one stride apart, as two rows are.
template <class Fn> DC_INLINE void each_run(const MatmulArgs& a, Fn&& fn) {
    const int chunks = (a.n + kRunRows - 1) / kRunRows, most = (a.n + chunks * 32 - 1) / (chunks * 32) * 32;
    const auto* x = static_cast<const uint16_t*>(a.x.x);
    for (int i = 0, n; i < a.n; i += n) {
        n = a.n - i < most ? a.n - i : most;
        int64_t row = i, apart = 1;
        if (a.x_row != nullptr) {
            row = a.x_row[i];
            if (n > 1) apart = int64_t{a.x_row[i + 1]} - row;
            for (int j = 2; j < n; ++j)
                if (a.x_row[i + j] - row != j * apart) n = j;
        }
        fn(Run{x + row * a.x.stride, 2 * apart * a.x.stride, n, a.y.from(i)});
    }
}

// Tiles of a block of sums: 0 .. 3 are kA x kB sums, 4 and 5 activations, 5 (6) to 7 weights. m0, m1: rows of activations.
template <class T> DC_INLINE void configure(T& tiles, int m0, int m1) {
    TileShapes s;
    for (int c = 0; c < 4; ++c) s.set(c, m1 > 0 && c >= 2 ? m1 : m0);
    s.set(4, m0);
    s.set(5, m1 > 0 ? m1 : kTileLines);
    s.set(6, kTileLines);
    s.set(7, kTileLines);
    tiles.configure(s);
}
// fn.operator()<C>(i, j): tile C sums activations i x row tile j.
template <int kA, int kB, class Fn> DC_INLINE void each_sum(Fn&& fn) {
    fn.template operator()<0>(0, 0);
    if constexpr (kB > 1) fn.template operator()<1>(0, 1);
    if constexpr (kA == 2) fn.template operator()<2>(1, 0);
    if constexpr (kA == 2 && kB > 1) fn.template operator()<3>(1, 1);
    if constexpr (kB == 4) fn.template operator()<2>(0, 2);
    if constexpr (kB == 4) fn.template operator()<3>(0, 3);
}
template <int kA, int kB, class T> DC_INLINE void zero_sums(T& tiles) {
    each_sum<kA, kB>([&]<int C>(int, int) { tiles.template zero<C>(); });
}
// c[i]: [rows, 16 kB] f32 of activations i
template <int kA, int kB, class T> DC_INLINE void load_sums(T& tiles, float* const (&c)[2], int64_t stride) {
    each_sum<kA, kB>([&]<int C>(int i, int j) { tiles.template load<C>(c[i] + 16 * j, 4 * stride); });
}
template <int kA, int kB, class T> DC_INLINE void store_sums(T& tiles, float* const (&c)[2], int64_t stride) {
    each_sum<kA, kB>([&]<int C>(int i, int j) { tiles.template store<C>(c[i] + 16 * j, 4 * stride); });
}
// The sums go on over n32 * 32 columns. x[i]: activations i, rows x_bytes apart. w.tile(j, k): weights of row tile j, columns
// 32 k and on, as bf16; w.ask(k): prefetches.
template <int kA, int kB, class T, class Weights>
DC_INLINE void dots(T& tiles, const uint16_t* const (&x)[2], int64_t x_bytes, int n32, Weights&& w) {
    for (int k = 0; k < n32; ++k) {
        w.template ask<kB>(k);
        if constexpr (kA == 2) {
            tiles.template load<6>(w.tile(0, k), kLineBytes);
            if constexpr (kB == 2) tiles.template load<7>(w.tile(1, k), kLineBytes);
            tiles.template load<4>(x[0] + 32 * k, x_bytes);
            tiles.template load<5>(x[1] + 32 * k, x_bytes);
            tiles.template dot_bf16<0, 4, 6>();
            tiles.template dot_bf16<2, 5, 6>();
            if constexpr (kB == 2) tiles.template dot_bf16<1, 4, 7>();
            if constexpr (kB == 2) tiles.template dot_bf16<3, 5, 7>();
        } else {
            tiles.template load<4>(x[0] + 32 * k, x_bytes);
            tiles.template load<5>(w.tile(0, k), kLineBytes);
            tiles.template dot_bf16<0, 4, 5>();
            if constexpr (kB > 1) {
                tiles.template load<6>(w.tile(1, k), kLineBytes);
                tiles.template dot_bf16<1, 4, 6>();
            }
            if constexpr (kB == 4) {
                tiles.template load<7>(w.tile(2, k), kLineBytes);
                tiles.template dot_bf16<2, 4, 7>();
                tiles.template load<5>(w.tile(3, k), kLineBytes);
                tiles.template dot_bf16<3, 4, 5>();
            }
        }
    }
}

// The bare dot on four chains: CpuKernels::peak.
template <class T> int64_t peak_tiles(int64_t rounds, void* buf) {
    auto* p = static_cast<std::byte*>(buf);
    constexpr int kTile = kTileLines * kLineBytes;
    static_assert(2 * kTile <= kPeakBytes);
    T tiles;
    configure(tiles, kTileLines, kTileLines);
    zero_sums<2, 2>(tiles);
    tiles.template load<4>(p, kLineBytes);
    tiles.template load<5>(p, kLineBytes);
    tiles.template load<6>(p + kTile, kLineBytes);
    tiles.template load<7>(p + kTile, kLineBytes);
    for (int64_t i = 0; i < rounds; ++i) {
        tiles.template dot_bf16<0, 4, 6>();
        tiles.template dot_bf16<2, 5, 6>();
        tiles.template dot_bf16<1, 4, 7>();
        tiles.template dot_bf16<3, 5, 7>();
    }
    tiles.template store<0>(p, kLineBytes);
    tiles.release();
    return rounds * 4 * 2 * kTileLines * kTileRows * kTileCols;
}

// --- bf16 ---------------------------------------------------------------------------------------------------------------

// Row tiles where they lie, `step` bytes apart, from one column on; `near` bytes ahead is prefetched (0: nothing), or of what
// comes later, `next`, in four streams `per` lines of each with every 32 columns.
struct WeightsBF16 {
    const std::byte* w;
    int64_t step, near = 0;
    const std::byte* next = nullptr;
    int64_t stream = 0;
    int per = 0;

    DC_INLINE const std::byte* tile(int j, int k) const { return w + j * step + int64_t{k} * kTileBytes16; }
    template <int kB> DC_INLINE void ask(int k) const {
        if (near > 0)
            for (int j = 0; j < kB; ++j)
                DC_EACH (l, 16) prefetch(tile(j, k) + near + 64 * l);
        for (int l = 0; l < per; ++l)
            DC_EACH (s, 4) prefetch_far(next + (s / 2) * step + (s % 2) * stream + 64 * (int64_t{k} * per + l));
    }
};

// Sums of kA tiles of rows from row i on, over columns [32 k0, 32 (k0 + n32)); those of the columns before lie in y.
template <int kA, int kB, class T>
DC_INLINE void block_bf16(T& tiles, const Run& r, int i, int k0, int n32, float* y, const WeightsBF16& w) {
    const uint16_t* const x[2] = {r.row(i) + 32 * k0, r.row(i) + 32 * k0 + (kA - 1) * kTileLines * (r.x_bytes / 2)};
    float* const c[2] = {y + i * r.y.stride, y + (i + (kA - 1) * kTileLines) * r.y.stride};
    if (k0 == 0) {
        zero_sums<kA, kB>(tiles);
    } else {
        load_sums<kA, kB>(tiles, c, r.y.stride);
    }
    dots<kA, kB>(tiles, x, r.x_bytes, n32, w);
    store_sums<kA, kB>(tiles, c, r.y.stride);
}
// Blocks of 32 rows x row tiles [t, end); what follows in w is prefetched meanwhile: each block asks for a share.
template <class T>
void blocks_bf16(T& tiles, const MatmulArgs& a, const Run& r, int t, int end, int k0, int n32, const std::byte* w) {
    const int64_t step = int64_t{a.w->col_tiles()} * kTileBytes16, stream = int64_t{n32} * kTileBytes16 / 2;
    const int blocks = r.n / 32;
    configure(tiles, kTileLines, kTileLines);
    for (; t < end; t += 2) {
        const std::byte* here = w + t * step + int64_t{k0} * kTileBytes16;
        float* y = r.y.data + int64_t{t - a.tile_begin} * kTileRows;
        const int per = t + 4 <= a.tile_end ? (8 + blocks - 1) / blocks : 0;
        for (int b = 0; b < blocks; ++b) {
            const WeightsBF16 from{here, step, 0, here + 2 * step + int64_t{b} * per * n32 * 64, stream, per};
            if (t + 2 <= end) {
                block_bf16<2, 2>(tiles, r, 32 * b, k0, n32, y, from);
            } else {
                block_bf16<2, 1>(tiles, r, 32 * b, k0, n32, y, from);
            }
        }
    }
}
// The rows that make no block, fewer than 32; from memory where they are the only ones.
template <class T>
void rest_bf16(T& tiles, const MatmulArgs& a, const Run& r, int t, int end, int k0, int n32, const std::byte* w) {
    const int64_t step = int64_t{a.w->col_tiles()} * kTileBytes16;
    const int first = r.n / 32 * 32, n = r.n - first;
    configure(tiles, n < kTileLines ? n : kTileLines, n - kTileLines);
    while (t < end) {
        const WeightsBF16 from{w + t * step + int64_t{k0} * kTileBytes16, step, first > 0 ? 0 : 2048};
        float* y = r.y.data + int64_t{t - a.tile_begin} * kTileRows;
        const int at_once = n > kTileLines ? 2 : 4, left = end - t;
        if (n > kTileLines && left >= at_once) {
            block_bf16<2, 2>(tiles, r, first, k0, n32, y, from);
        } else if (n > kTileLines) {
            block_bf16<2, 1>(tiles, r, first, k0, n32, y, from);
        } else if (left >= at_once) {
            block_bf16<1, 4>(tiles, r, first, k0, n32, y, from);
        } else {
            block_bf16<1, 1>(tiles, r, first, k0, n32, y, from);
        }
        t += left >= at_once ? at_once : 1;
    }
}

template <class T> [[gnu::noinline]] void product_bf16(const MatmulArgs& a) {
    const int col_tiles = a.w->col_tiles(), most = kRunCols / kTileCols;
    const std::byte* w = a.w->data + int64_t{a.slice} * a.w->row_tiles() * col_tiles * kTileBytes16;
    T tiles;
    each_run(a, [&](const Run& r) {
        for (int k0 = 0; k0 < col_tiles; k0 += most) {
            const int n32 = col_tiles - k0 < most ? col_tiles - k0 : most;
            for (int t = a.tile_begin; t < a.tile_end; t += kGroupTiles) {
                const int end = a.tile_end - t < kGroupTiles ? a.tile_end : t + kGroupTiles;
                if (r.n >= 32) blocks_bf16(tiles, a, r, t, end, k0, n32, w);
                if (r.n % 32 > 0) rest_bf16(tiles, a, r, t, end, k0, n32, w);
            }
        }
    });
    tiles.release();
}

// --- f8 -----------------------------------------------------------------------------------------------------------------

// 16 rows x 4 codes -> two lines of a right operand, 256 times the values: columns 0, 1 and 2, 3.
DC_INLINE void decode_f8(const std::byte* p, std::byte* out) {
    using W = WeightF8<DotBF16>;
    const __m512i code = _mm512_loadu_si512(p);
    // in 128-bit lanes: a zero byte, or the low one, below each of columns 0, 1 (2, 3) of four rows
    const __m512i spread =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-128, 0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13));
    const __m512i later = _mm512_add_epi8(spread, _mm512_set1_epi16(0x0200));
    if (__builtin_expect(_mm512_cmplt_epu8_mask(_mm512_add_epi8(code, code), _mm512_set1_epi8(16)) == 0, 1)) {
        _mm512_store_si512(out, W::normal(_mm512_shuffle_epi8(code, spread)));
        _mm512_store_si512(out + 64, W::normal(_mm512_shuffle_epi8(code, later)));
        return;
    }
    const __m512i lo = W::find(kE4m3.lo, code), sign = _mm512_set1_epi8(-128);
    const __m512i hi =
        _mm512_ternarylogic_epi32(W::find(kE4m3.hi, code), code, sign, 0xF8);  // magnitude | (code & sign)
    const auto both = [&](__m512i s) {
        return _mm512_or_si512(_mm512_shuffle_epi8(hi, s), _mm512_srli_epi16(_mm512_shuffle_epi8(lo, s), 8));
    };
    _mm512_store_si512(out, both(spread));
    _mm512_store_si512(out + 64, both(later));
}
// A tile; `ahead` bytes onward is prefetched.
DC_INLINE const std::byte* decode_tile(const std::byte* p, int64_t ahead, std::byte* out) {
    DC_EACH (u, 8) {
        prefetch(p + ahead + 64 * u);
        decode_f8(p + 64 * u, out + 128 * u);
    }
    return out;
}

// Weights of few rows: decoded where they are used.
struct WeightsF8 {
    const std::byte* w;
    int64_t step;
    std::byte (*scratch)[kTileBytes16];  // [4]

    DC_INLINE const std::byte* tile(int j, int k) const {
        return decode_tile(w + j * step + int64_t{k} * sizeof(TileF8), 1024, scratch[j]);
    }
    template <int kB> DC_INLINE void ask(int) const {}
};
// Decoded row tiles x columns.
struct PanelF8 {
    std::byte (*panel)[kPanelCols / kTileCols][kTileBytes16];

    DC_INLINE const std::byte* tile(int j, int k) const { return panel[j][k]; }
    template <int kB> DC_INLINE void ask(int) const {}
};

// kB row tiles of f8, from t on, for all rows of a run.
template <class T, int kB> struct ProductF8 {
    ProductF8(const MatmulArgs& args, const Run& run, int tile, const std::byte* tile_w, int64_t w_step, T& t_regs)
        : a(args), r(run), t(tile), w(tile_w), step(w_step), tiles(t_regs) {}

    const MatmulArgs& a;
    const Run& r;
    int t;
    const std::byte* w;  // row tile t
    int64_t step;
    T& tiles;
    alignas(64) float acc[kRunRows][16 * kB];
    alignas(64) float sums[kRunRows][16 * kB];  // of blocks of 32 rows
    alignas(64) std::byte decoded[kB][kPanelCols / kTileCols][kTileBytes16];

    // acc += scale * the block sums of the scale block at column c; acc[i + j] and sums[at + j] for j in [skip, n)
    void scale(int c, int i, int at, int skip, int n) {
        const int64_t per_row = ceil_div(a.w->cols, a.w->scale_cols);
        const float* scales = a.w->scales + a.slice * a.w->slice_scales() + c / a.w->scale_cols;
        F by[kB];
        DC_EACH (s, kB) by[s] = set1(scales[int64_t{t + s} * kTileRows / a.w->scale_rows * per_row]);
        for (int j = skip; j < n; ++j)
            DC_EACH (s, kB) {
                float* to = acc[i + j] + 16 * s;
                const F block = load(sums[at + j] + 16 * s) * set1(0x1p-8F);
                store(to, fma(block, by[s], c == 0 ? set1(0) : load(to)));
            }
    }
    // Few rows: columns [c, end) of a scale block.
    void few(int c, int end) {
        const uint16_t* const x[2] = {r.x + c, nullptr};
        float* const to[2] = {sums[0], nullptr};
        zero_sums<1, kB>(tiles);
        dots<1, kB>(tiles, x, r.x_bytes, (end - c) / kTileCols,
                    WeightsF8{w + int64_t{c} * kTileRows, step, reinterpret_cast<std::byte(*)[kTileBytes16]>(decoded)});
        store_sums<1, kB>(tiles, to, 16 * kB);
        scale(c, 0, 0, 0, r.n);
    }
    // A block's sums of a panel: kA tiles of rows from rows first[0], first[1] on, in sums[at] and on.
    template <int kA> DC_INLINE void block(const int (&first)[2], int at, int c, int n32, bool begins) {
        constexpr int kPair = kB < 2 ? 1 : 2;
        const uint16_t* const x[2] = {r.row(first[0]) + c, r.row(first[1]) + c};
        for (int j = 0; j < kB; j += kPair) {
            float* const to[2] = {sums[at] + 16 * j, sums[at + kTileLines] + 16 * j};
            if (begins) {
                zero_sums<kA, kPair>(tiles);
            } else {
                load_sums<kA, kPair>(tiles, to, 16 * kB);
            }
            dots<kA, kPair>(tiles, x, r.x_bytes, n32, PanelF8{decoded + j});
            store_sums<kA, kPair>(tiles, to, 16 * kB);
        }
    }
    // Many rows: columns [c, end) of a scale block, panel by panel. The last tiles of rows begin 16 before the end, and rows
    // that earlier tiles have are skipped where sums are scaled: while the next block is multiplied.
    void many(int begin, int end) {
        const bool at_once = end - begin <= kPanelCols;
        for (int c = begin; c < end; c += kPanelCols) {
            const int n32 = (end - c < kPanelCols ? end - c : kPanelCols) / kTileCols;
            for (int k = 0; k < n32; ++k)
                DC_EACH (s, kB)
                    decode_tile(w + s * step + int64_t{c / kTileCols + k} * sizeof(TileF8), 1024, decoded[s][k]);
            int before = -1;  // block whose sums are complete
            const auto add = [&] {
                for (int i = before; i >= 0 && i < before + 32 && i < r.n; i += kTileLines) {
                    const int first = i < r.n - kTileLines ? i : r.n - kTileLines;
                    scale(begin, first, (at_once ? before % 64 : before) + i % 32, i - first, kTileLines);
                }
            };
            for (int i = 0; i < r.n; i += 32) {
                const int last = r.n - kTileLines, first[2] = {i < last ? i : last, i + 16 < last ? i + 16 : last};
                const int at = at_once ? i % 64 : i;
                if (i + kTileLines < r.n) {
                    block<2>(first, at, c, n32, c == begin);
                } else {
                    block<1>(first, at, c, n32, c == begin);
                }
                if (c + kPanelCols < end) continue;
                add();
                before = i;
            }
            add();
        }
    }
    void run() {
        const int cols = a.w->col_tiles() * kTileCols;
        configure(tiles, r.n < kTileLines ? r.n : kTileLines, r.n <= kTileLines ? 0 : kTileLines);
        for (int c = 0, end; c < cols; c = end) {
            end = cols - c < a.w->scale_cols ? cols : c + a.w->scale_cols;
            if (r.n <= kTileLines) {
                few(c, end);
            } else {
                many(c, end);
            }
        }
        float* y = r.y.data + int64_t{t - a.tile_begin} * kTileRows;
        for (int i = 0; i < r.n; ++i)
            DC_EACH (s, kB) store(y + i * r.y.stride + 16 * s, load(acc[i] + 16 * s));
    }
};

template <class T> [[gnu::noinline]] void product_f8(const MatmulArgs& a) {
    const int64_t step = int64_t{a.w->col_tiles()} * sizeof(TileF8);
    const std::byte* w = a.w->data + int64_t{a.slice} * a.w->row_tiles() * step;
    T tiles;
    each_run(a, [&](const Run& r) {
        int t = a.tile_begin;
        for (; t + 4 <= a.tile_end; t += 4) ProductF8<T, 4>(a, r, t, w + t * step, step, tiles).run();
        for (; t < a.tile_end; ++t) ProductF8<T, 1>(a, r, t, w + t * step, step, tiles).run();
    });
    tiles.release();
}

}  // namespace
}  // namespace deepcalm
