// The product of packed weights and activation rows: templates over R rows x T row tiles of a register block. The
// operations behind an output element and their order do not depend on R, T or the path (L1).
//
// Weights that come from memory are read 4 row tiles at a time, because 4 streams in different pages read 1.5 times as fast
// as one (measured on a Sapphire Rapids VM: 16 against 10.5 GB/s per core). On Zen 4 one stream is the faster, and one row
// reads one row tile at a time (MatmulArgs::one_stream); more rows need 4 for their arithmetic. Many rows of a chained
// format: 4 row tiles x a panel of columns stay in the first-level cache for kChunkRows rows, unpacked once where the
// register form of a unit is not its bytes. (q8 and q4 gain nothing from panels: 7 of 8 register operations are arithmetic,
// the second-level cache keeps up, and unpacked q4 is twice the traffic.)
#pragma once

namespace deepcalm {
namespace {

constexpr int kSumCols = 128;   // columns of one block sum of a chained format, and of a panel
constexpr int kPanelRows = 9;   // activation rows from which on panels pay
constexpr int kChunkRows = 64;  // activation rows that share a panel

template <class W>
concept Chained = requires { typename W::X; };
template <class W> constexpr int64_t column_bytes(int64_t c) { return c / kTileCols * W::kTileBytes; }

// Prefetches bytes that come from memory long before their use: into the second level. A line on its way to the first holds one of
// its few miss buffers meanwhile, and loads that hit the second level wait for one (Zen 4: a fifth of bf16's prefill).
DC_INLINE void fetch(const std::byte* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch_far(p + i);
}

// Weights of row tiles where they lie, `step` bytes apart, from memory: prefetches `ahead` bytes onward, and where a row tile
// ends there, as far into the row tile that follows in its stream, `next` bytes away; far: into the second level only.
// One stream: also one line 4 pages ahead for every sum block, so that no page begins cold (Zen 4: q8 6 % with one thread,
// q4 4; a second line there costs q4 a third).
template <class W> struct Streamed {
    const std::byte* w;  // first row tile, column 0
    int64_t step, ahead, next;
    bool far;

    // 64-byte unit u of row tile s, counted from column c, a multiple of 32 (q8, q4: inside its tile)
    DC_INLINE typename W::Unit unit(int s, int c, int u) const {
        const std::byte* p = w + s * step + column_bytes<W>(c) + int64_t{u} * 64;
        if (far) {
            prefetch_far(p + ahead);
        } else {
            prefetch(p + ahead);
        }
        return W::load(p);
    }
    DC_INLINE F scale(int s, int c) const { return W::scale(w + s * step + column_bytes<W>(c) + W::kScaleAt); }
    // the weights to use for the sum block of column c
    template <int T> DC_INLINE Streamed at(int c) const {
        if constexpr (T == 1) prefetch_far(w + column_bytes<W>(c) + 4 * 4096);
        return {w, step, column_bytes<W>(c) + ahead < step ? ahead : ahead + next - step, next, far};
    }
};
// The same from a cache. Blocks of many rows prefetch what lies `ahead` meanwhile: chained formats with every unit, q8 and q4
// in every 32 columns for the 64-byte lines [lo, hi) of a tile, a share for each block: memory is read all the time.
template <class W> struct Cached {
    const std::byte* w;
    int64_t step, ahead = 0;
    int lo = 0, hi = 0;

    DC_INLINE typename W::Unit unit(int s, int c, int u) const {
        const std::byte* p = w + s * step + column_bytes<W>(c) + int64_t{u} * 64;
        if constexpr (Chained<W>) prefetch_far(p + ahead);
        return W::load(p);
    }
    DC_INLINE F scale(int s, int c) const { return W::scale(w + s * step + column_bytes<W>(c) + W::kScaleAt); }
    template <int T> DC_INLINE const Cached& at(int c) const {
        DC_EACH (s, T) fetch(w + s * step + ahead + column_bytes<W>(c) + 64 * lo, 64 * (hi - lo));
        return *this;
    }
};

template <class W> constexpr bool kUnpack = sizeof(typename W::Unit) > 64;

// Weights of kWideTiles row tiles x one panel, column `first` on, in register form.
template <class W> struct Unpacked {
    static constexpr int kPerTile = W::kTileBytes / 64;
    typename W::Unit units[kWideTiles][kSumCols / kTileCols * kPerTile];
    int first;

    void fill(const std::byte* w, int64_t step, int begin, int end) {
        const Streamed<W> from{w, step, 1024, step, false};
        first = begin;
        for (int c = begin; c < end; c += kTileCols)
            for (int s = 0; s < kWideTiles; ++s)
                DC_EACH (u, kPerTile) units[s][(c - begin) / kTileCols * kPerTile + u] = from.unit(s, c, u);
    }
};
// Row tiles s0, s0 + 1, ... of an unpacked panel.
template <class W> struct InPanel {
    const Unpacked<W>* panel;
    int s0;
    DC_INLINE const typename W::Unit& unit(int s, int c, int u) const {
        return panel->units[s0 + s][(c - panel->first) / kTileCols * Unpacked<W>::kPerTile + u];
    }
    template <int T> DC_INLINE const InPanel& at(int) const { return *this; }
};

// Activation rows i .. i+R-1.
template <class W, int R> struct Rows {
    const typename W::X* x[R];
    Rows(const MatmulArgs& a, int i) {
        DC_EACH (r, R)
            x[r] = static_cast<const typename W::X*>(a.x.x) + (a.x_row ? a.x_row[i + r] : i + r) * a.x.stride;
    }
};
template <class W, int R>
    requires(!Chained<W>)
struct Rows<W, R> {
    const int8_t* x[R];
    const float* d[R];
    const int32_t* sum[R];
    Rows(const MatmulArgs& a, int i) {
        DC_EACH (r, R) {
            const int64_t row = a.x_row ? a.x_row[i + r] : i + r;
            x[r] = static_cast<const int8_t*>(a.x.x) + row * a.x.stride;
            d[r] = a.x.d + row * (a.x.stride / kTileCols);
            sum[r] = a.x.sum + row * (a.x.stride / kTileCols);
        }
    }
};

// The columns of a row, a chained format's sum blocks of them and their scales.
template <class W> struct Blocks {
    int cols;
    explicit Blocks(const MatmulArgs& a) : cols(a.w->col_tiles() * kTileCols) {}
};
template <Chained W> struct Blocks<W> {
    int cols, block = kSumCols, scale_cols = 0;
    bool regular = true;            // f8: false where 128-column blocks and scale blocks do not line up
    const float* scales = nullptr;  // f8: [ceil(rows / scale_rows), per_row] of the slice
    int64_t per_row = 0;

    explicit Blocks(const MatmulArgs& a) : cols(a.w->col_tiles() * kTileCols) {
        if constexpr (W::kScaled) {
            scale_cols = a.w->scale_cols;
            if (scale_cols < block) block = scale_cols;
            regular = scale_cols % block == 0;
            scales = a.w->scales + a.slice * a.w->slice_scales();
            per_row = ceil_div(a.w->cols, scale_cols);
        }
    }
    int end(int c) const {  // of the block that begins at column c
        int end = c + block < cols ? c + block : cols;
        if constexpr (W::kScaled) {
            const int edge = (c / scale_cols + 1) * scale_cols;
            if (!regular && edge < end) end = edge;
        }
        return end;
    }
    DC_INLINE F add(const MatmulArgs& a, F acc, F sum, int t, int c) const {
        if constexpr (W::kScaled) {
            return fma(sum, set1(scales[t * kTileRows / a.w->scale_rows * per_row + c / scale_cols]), acc);
        } else {
            return acc + sum;
        }
    }
};

// Block sums of columns c .. c+n_cols-1: R rows x S row tiles.
template <class W, int R, int S, class Src>
DC_INLINE void chain(const Src& src, const Rows<W, R>& rows, int c, int n_cols, F (&out)[R][S]) {
    typename W::Acc sum[R][S];
    DC_EACH (r, R)
        DC_EACH (s, S) sum[r][s] = W::start();
    const int units = n_cols / W::kCols;
    for (int u = 0; u < units; ++u) {
        DC_EACH (s, S) {
            const auto& unit = src.unit(s, c, u);  // no copy: g++ makes it in pieces that loads wait for
            DC_EACH (r, R) W::mac(sum[r][s], unit, rows.x[r] + c + u * W::kCols);
        }
    }
    DC_EACH (r, R)
        DC_EACH (s, S) out[r][s] = W::value(sum[r][s]);
}

// acc[r][j] += row r x row tile t + j over columns [c, end), which begin and end with a sum block.
template <class W, int R, int T, class Src>
    requires Chained<W>
DC_INLINE void accumulate(const MatmulArgs& a, const Blocks<W>& blocks, const Src& src, int t, const Rows<W, R>& rows,
                          int c, int end, F (&acc)[R][T]) {
    while (c < end) {
        const int next = blocks.end(c);
        F sums[R][T];
        chain<W, R, T>(src.template at<T>(c), rows, c, next - c, sums);
        DC_EACH (r, R)
            DC_EACH (j, T) acc[r][j] = blocks.add(a, acc[r][j], sums[r][j], t + j, c);
        c = next;
    }
}

// q8 and q4: an exact integer sum per tile, then one scaled addition.
template <class W, int R, int T, class Src>
DC_INLINE void accumulate(const MatmulArgs&, const Blocks<W>&, const Src& src, int, const Rows<W, R>& rows, int c,
                          int end, F (&acc)[R][T]) {
    for (; c < end; c += kTileCols) {
        const int group = c / kTileCols;
        const auto& now = src.template at<T>(c);
        typename W::Acc sum[R][T];
        DC_EACH (r, R)
            DC_EACH (j, T) sum[r][j] = W::start(rows.sum[r][group]);
        DC_EACH (u, W::kUnits)
            DC_EACH (j, T) {
                const typename W::Unit unit = now.unit(j, c, u);
                DC_EACH (r, R) W::mac(sum[r][j], unit, rows.x[r] + c + 4 * u);
            }
        DC_EACH (j, T) {
            const F dw = now.scale(j, c);
            DC_EACH (r, R) acc[r][j] = fma(W::value(sum[r][j]), dw * set1(rows.d[r][group]), acc[r][j]);
        }
    }
}

// fn.template operator()<R>(i, block, blocks) for the fewest blocks of at most kMax rows that cover 0 .. n-1, of almost equal
// size, at least kMin: a small block reads as many weights as a large one.
template <int R, int kMin, class Fn> DC_INLINE void block_of(int rows, Fn&& fn) {
    if constexpr (R > kMin) {
        if (rows < R) return block_of<R - 1, kMin>(rows, fn);
    }
    fn.template operator()<R>();
}
template <int kMin, int kMax, class Fn> DC_INLINE void row_blocks(int n, Fn&& fn) {
    const int blocks = (n + kMax - 1) / kMax;
    for (int b = 0; b < blocks; ++b) {
        const int i = n * b / blocks, rows = n * (b + 1) / blocks - i;
        block_of<kMax, kMin>(rows, [&]<int R>() { fn.template operator()<R>(i, b, blocks); });
    }
}
constexpr int kFewRows = kBlockRows / 2;  // up to here, weights are streamed from memory 4 row tiles at a time

// y of rows i .. i+R-1 and the first kT row tiles of src, which is row tile t.
template <class W, int R, int kT, class Src>
DC_INLINE void whole_rows(const MatmulArgs& a, const Src& src, int cols_end, int t, int i) {
    const Blocks<W> blocks(a);
    F acc[R][kT];
    DC_EACH (r, R)
        DC_EACH (s, kT) acc[r][s] = set1(0);
    accumulate<W, R, kT>(a, blocks, src, t, Rows<W, R>(a, i), 0, cols_end, acc);
    // not row(i): g++ 12 spills the register block in another order then, 2 % of q4's inner loop
    float* y = a.y.data + i * a.y.stride + int64_t{t - a.tile_begin} * kTileRows;
    DC_EACH (r, R)
        DC_EACH (s, kT) store(y + r * a.y.stride + kTileRows * s, acc[r][s]);
}

// Row tiles t .. t+T-1, w the first: few rows, or the tiles that no block of many rows takes.
template <class W, int T> void few_rows(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t) {
    // Prefetch distance, measured: 5 to 20 % over none with 4 streams. Of one stream on Zen 4, 2 KiB and more halve the rate.
    const int64_t near = T == 1 || W::kTileBytes == sizeof(TileQ8) ? 4096 : 2048;
    const int64_t best = !a.one_stream ? near : T == 1 ? 512 : 1024;
    const int64_t ahead = best < w_step ? best : w_step;
    const int64_t next = t + 2 * T <= a.tile_end ? T * w_step : w_step - ahead;  // the last row tiles: nothing new
    row_blocks<1, kFewRows>(a.n, [&]<int R>(int i, int, int) {
        whole_rows<W, R, T>(a, Streamed<W>{w, w_step, ahead, next, a.one_stream}, a.w->col_tiles() * kTileCols, t, i);
    });
}
// Row tiles t .. t+kWideTiles-1.
template <class W> void many_rows(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t) {
    const int cols = a.w->col_tiles() * kTileCols;
    row_blocks<kFewRows, kBlockRows>(a.n, [&]<int R>(int i, int b, int blocks) {
        constexpr int kLines = Chained<W> ? 0 : (W::kTileBytes + 63) / 64;
        const int share = (kLines + blocks - 1) / blocks, lo = b * share < kLines ? b * share : kLines;
        const int hi = lo + share < kLines ? lo + share : kLines;
        for (int j = 0; j < kWideTiles; j += kBlockTiles) {
            const Cached<W> src{w + j * w_step, w_step, (blocks > 1 ? kWideTiles : kBlockTiles) * w_step, lo, hi};
            whole_rows<W, R, kBlockTiles>(a, src, cols, t + j, i);
        }
    });
}

// The same panel by panel; sums wait in `sums` between panels.
template <class W> void by_panels(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t) {
    const Blocks<W> blocks(a);
    alignas(64) float sums[kChunkRows][kWideTiles][kTileRows];
    const int chunks = (a.n + kChunkRows - 1) / kChunkRows;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int i0 = a.n * chunk / chunks, n = a.n * (chunk + 1) / chunks - i0;
        for (int begin = 0; begin < blocks.cols;) {
            const int end = blocks.end(begin);
            const std::byte* here = w + column_bytes<W>(begin);
            const std::byte* next = end == blocks.cols ? w + kWideTiles * w_step : w + column_bytes<W>(end);
            const auto part = [&]<int R>(const auto& src, int i, int j) {
                F acc[R][kBlockTiles];
                DC_EACH (r, R)
                    DC_EACH (s, kBlockTiles) acc[r][s] = begin == 0 ? set1(0) : load(sums[i + r][j + s]);
                accumulate<W, R, kBlockTiles>(a, blocks, src, t + j, Rows<W, R>(a, i0 + i), begin, end, acc);
                float* to = sums[i][j];
                int64_t stride = kWideTiles * kTileRows;
                if (end == blocks.cols) {
                    to = a.y.data + (i0 + i) * a.y.stride + int64_t{t + j - a.tile_begin} * kTileRows;
                    stride = a.y.stride;
                }
                DC_EACH (r, R)
                    DC_EACH (s, kBlockTiles) store(to + r * stride + kTileRows * s, acc[r][s]);
            };
            const auto all_rows =
                [&](auto source) {  // source(j, first): row tile j and on; `first` reader: prefetch the next panel
                    row_blocks<kFewRows, kBlockRows>(n, [&]<int R>(int i, int b, int n_blocks) {
                        for (int j = 0; j < kWideTiles; j += kBlockTiles) {
                            const bool first = chunk == 0 && j / kBlockTiles % n_blocks == b;
                            part.template operator()<R>(source(j, first), i, j);
                        }
                    });
                };
            if constexpr (kUnpack<W>) {
                Unpacked<W> panel;
                panel.fill(w, w_step, begin, end);
                all_rows([&](int j, bool first) {
                    for (int s = j; first && s < j + kBlockTiles; ++s)
                        fetch(next + s * w_step, column_bytes<W>(kSumCols));
                    return InPanel<W>{&panel, j};
                });
            } else {
                all_rows([&](int j, bool first) { return Cached<W>{w + j * w_step, w_step, first ? next - here : 0}; });
            }
            begin = end;
        }
    }
}

template <class W> void matmul(const MatmulArgs& a) noexcept {
    const int64_t w_step = int64_t{a.w->col_tiles()} * W::kTileBytes;  // bytes of one row tile
    const std::byte* w = a.w->data + int64_t{a.slice} * a.w->row_tiles() * w_step;
    int t = a.tile_begin;
    const int wide_end = a.one_stream && a.n == 1 ? t : a.tile_end;
    for (; t + kWideTiles <= wide_end; t += kWideTiles) {
        if (a.n <= kFewRows) {
            few_rows<W, kWideTiles>(a, w + t * w_step, w_step, t);
            continue;
        }
        if constexpr (Chained<W>) {
            if (a.n >= kPanelRows) {
                by_panels<W>(a, w + t * w_step, w_step, t);
                continue;
            }
        }
        many_rows<W>(a, w + t * w_step, w_step, t);
    }
    for (; t < a.tile_end; ++t) few_rows<W, 1>(a, w + t * w_step, w_step, t);
}

}  // namespace
}  // namespace deepcalm
