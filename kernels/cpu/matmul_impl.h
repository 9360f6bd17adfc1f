// The product of packed weights and activation rows: one driver for the chained formats, one for the int formats.
// Both are templates over R rows x T row tiles of a register block; the operations behind an output element and their
// order do not depend on R and T (L1). Few rows run 4 row tiles at once: their weights come from memory, and 4 streams
// in different pages read 1.5 times as fast as one (measured on a Sapphire Rapids VM: 16 against 10.5 GB/s per core).
#pragma once

namespace deepcalm {
namespace {

constexpr int kSumCols = 128;  // columns of one block sum of a chained format
// Prefetch distance of a weight stream while few rows share it, so that it comes from memory: best of 1, 2 and 4 KiB
// measured, 5 to 10 % over none with 4 streams.
template <int R, int S> constexpr int kAhead = R == kBlockRows ? 0 : S == 1 ? 4096 : 1024;

// Block sums of R rows x S weight streams that lie w_step bytes apart: row tiles, which share the columns of x, or
// (kBlocks) equal blocks of one row tile, block_cols apart in x.
template <class W, int R, int S, bool kBlocks>
DC_INLINE void chain(const std::byte* w, int64_t w_step, int block_cols, const typename W::X* const (&x)[R],
                     F (&out)[R][S]) {
    typename W::Acc sum[R][S];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) sum[r][s] = W::start();
    const int units = block_cols / W::kCols;
    for (int u = 0; u < units; ++u) {
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) {
            const std::byte* p = w + s * w_step + int64_t{u} * 64;
            if constexpr (kAhead<R, S> > 0) prefetch(p + (kBlocks ? S * w_step : kAhead<R, S>));
            const typename W::Unit unit = W::load(p);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) W::mac(sum[r][s], unit, x[r] + (kBlocks ? s * block_cols : 0) + u * W::kCols);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) out[r][s] = W::value(sum[r][s]);
}

// Row tiles t .. t+T-1 x rows i .. i+R-1 of f32, f16, bf16, f8. w: row tile t.
template <class W, int R, int T>
void block_sums(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t, int i, float* y) {
    constexpr int kG = R == 1 && T == 1 ? kBlocksInFlight : 1;
    constexpr int kColBytes = 64 / W::kCols;
    const typename W::X* x[R];
    F acc[R][T];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        x[r] = static_cast<const typename W::X*>(a.x.x) + (a.x_row ? a.x_row[i + r] : i + r) * a.x.stride;
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j) acc[r][j] = set1(0);
    }
    const int cols = a.w->col_tiles() * kTileCols;
    int block = kSumCols;         // columns of a block sum
    bool regular = true;          // f8: false where 128-column blocks and scale blocks do not line up
    const float* scales[T] = {};  // f8: [ceil(cols / scale_cols)] of each row tile
    if constexpr (W::kScaled) {
        const int64_t per_row = ceil_div(a.w->cols, a.w->scale_cols);
        if (a.w->scale_cols < kSumCols) block = a.w->scale_cols;
        regular = a.w->scale_cols % block == 0;
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j)
            scales[j] = a.w->scales + a.slice * a.w->slice_scales() + (t + j) * kTileRows / a.w->scale_rows * per_row;
    }
    const auto add = [&](const F& sum, int r, int j, int col) {
        if constexpr (W::kScaled) {
            acc[r][j] = fma(sum, set1(scales[j][col / a.w->scale_cols]), acc[r][j]);
        } else {
            acc[r][j] = acc[r][j] + sum;
        }
    };
    const auto advance = [&](int n_cols) {
        w += int64_t{n_cols} * kColBytes;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) x[r] += n_cols;
    };
    int c = 0;
    if constexpr (kG > 1) {
        for (; regular && c + kG * block <= cols; c += kG * block) {
            F sums[1][kG];
            chain<W, 1, kG, true>(w, int64_t{block} * kColBytes, block, x, sums);
#pragma GCC unroll 16
            for (int g = 0; g < kG; ++g) add(sums[0][g], 0, 0, c + g * block);
            advance(kG * block);
        }
    }
    while (c < cols) {
        int end = c + block < cols ? c + block : cols;
        if constexpr (W::kScaled) {
            const int edge = (c / a.w->scale_cols + 1) * a.w->scale_cols;
            if (!regular && edge < end) end = edge;
        }
        F sums[R][T];
        chain<W, R, T, false>(w, w_step, end - c, x, sums);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int j = 0; j < T; ++j) add(sums[r][j], r, j, c);
        advance(end - c);
        c = end;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j) store(y + r * a.y_stride + kTileRows * j, acc[r][j]);
}

// The same of q8 and q4: an exact integer sum per tile, then one scaled addition.
template <class W, int R, int T>
void int_sums(const MatmulArgs& a, const std::byte* w, int64_t w_step, int i, float* y) {
    const int8_t* x[R];
    const float* d[R];
    const int32_t* group_sum[R];
    F acc[R][T];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const int64_t row = a.x_row ? a.x_row[i + r] : i + r;
        x[r] = static_cast<const int8_t*>(a.x.x) + row * a.x.stride;
        d[r] = a.x.d + row * (a.x.stride / kTileCols);
        group_sum[r] = a.x.sum + row * (a.x.stride / kTileCols);
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j) acc[r][j] = set1(0);
    }
    const int tiles = a.w->col_tiles();
    for (int c = 0; c < tiles; ++c, w += W::kTileBytes) {
        typename W::Acc sum[R][T];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int j = 0; j < T; ++j) sum[r][j] = W::start(group_sum[r][c]);
#pragma GCC unroll 16
        for (int u = 0; u < W::kUnits; ++u)
#pragma GCC unroll 16
            for (int j = 0; j < T; ++j) {
                const std::byte* p = w + j * w_step + 64 * u;
                if constexpr (kAhead<R, T> > 0) prefetch(p + kAhead<R, T>);
                const typename W::Unit unit = W::load(p);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) W::mac(sum[r][j], unit, x[r] + int64_t{c} * kTileCols + 4 * u);
            }
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j) {
            const F dw = W::scale(w + j * w_step + W::kScaleAt);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) acc[r][j] = fma(W::value(sum[r][j]), dw * set1(d[r][c]), acc[r][j]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < T; ++j) store(y + r * a.y_stride + kTileRows * j, acc[r][j]);
}

// Row tiles t .. t+T-1 x R rows from row i on; the R rows of a full block take the tiles kBlockTiles at a time.
template <class W, int R, int T>
DC_INLINE void rows_by_tiles(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t, int& i) {
    constexpr int kT = R == kBlockRows && kBlockTiles < T ? kBlockTiles : T;
    for (int j = 0; j < T; j += kT) {
        float* y = a.y + i * a.y_stride + int64_t{t + j - a.tile_begin} * kTileRows;
        if constexpr (requires { typename W::X; }) {
            block_sums<W, R, kT>(a, w + j * w_step, w_step, t + j, i, y);
        } else {
            int_sums<W, R, kT>(a, w + j * w_step, w_step, i, y);
        }
    }
    i += R;
}

template <class W, int T> DC_INLINE void all_rows(const MatmulArgs& a, const std::byte* w, int64_t w_step, int t) {
    int i = 0;
    while (a.n - i >= kBlockRows) rows_by_tiles<W, kBlockRows, T>(a, w, w_step, t, i);
    if constexpr (kBlockRows > 4)
        if (a.n - i >= 4) rows_by_tiles<W, 4, T>(a, w, w_step, t, i);
    if constexpr (kBlockRows > 3)
        if (a.n - i == 3) rows_by_tiles<W, 3, T>(a, w, w_step, t, i);
    if constexpr (kBlockRows > 2)
        if (a.n - i == 2) rows_by_tiles<W, 2, T>(a, w, w_step, t, i);
    if (a.n - i == 1) rows_by_tiles<W, 1, T>(a, w, w_step, t, i);
}

template <class W> void matmul(const MatmulArgs& a) noexcept {
    const int64_t w_step = int64_t{a.w->col_tiles()} * W::kTileBytes;  // bytes of one row tile
    const std::byte* w = a.w->data + int64_t{a.slice} * a.w->row_tiles() * w_step;
    int t = a.tile_begin;
    for (; t + kWideTiles <= a.tile_end; t += kWideTiles) all_rows<W, kWideTiles>(a, w + t * w_step, w_step, t);
    if constexpr (kWideTiles > 1)
        for (; t < a.tile_end; ++t) all_rows<W, 1>(a, w + t * w_step, w_step, t);
}

}  // namespace
}  // namespace deepcalm
