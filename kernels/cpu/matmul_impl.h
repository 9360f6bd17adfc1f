// The product of packed weights and activation rows: one driver for the chained formats, one for the int formats.
// Both are templates over R, the rows of a register block; a row's operations and their order do not depend on R (L1).
#pragma once

namespace deepcalm {
namespace {

constexpr int kSumCols = 128;         // columns of one block sum of a chained format
constexpr int kPrefetchBytes = 4096;  // ahead of the reads of a single row, whose weights come from memory

template <class X> DC_INLINE const X* act_row(const MatmulArgs& a, int i) {
    return static_cast<const X*>(a.x.x) + (a.x_row ? a.x_row[i] : i) * a.x.stride;
}

// Block sums of R rows x G equal blocks: blocks lie block_bytes apart in w and block_cols apart in x.
template <class W, int R, int G>
DC_INLINE void chain(const std::byte* w, int64_t block_bytes, int block_cols, const typename W::X* const (&x)[R],
                     F (&out)[R][G]) {
    typename W::Acc s[R][G];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) s[r][g] = W::start();
    const int units = block_cols / W::kCols;
    for (int u = 0; u < units; ++u) {
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) {
            const std::byte* p = w + g * block_bytes + int64_t{u} * 64;
            if constexpr (R == 1) prefetch(p + kPrefetchBytes);
            const typename W::Unit unit = W::load(p);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) W::mac(s[r][g], unit, x[r] + g * block_cols + u * W::kCols);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) out[r][g] = W::value(s[r][g]);
}

// One row tile x R rows. scales: f8 only, this row tile's scale blocks along the columns.
template <class W, int R>
void chained_rows(const MatmulArgs& a, const std::byte* w, const float* scales, int first_row, float* y) {
    constexpr int kG = R == 1 ? kBlocksInFlight : 1;
    constexpr int kColBytes = 64 / W::kCols;
    const typename W::X* x[R];
    F acc[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        x[r] = act_row<typename W::X>(a, first_row + r);
        acc[r] = set1(0);
    }
    const int cols = a.w->col_tiles() * kTileCols;
    int block = kSumCols;  // columns of a block sum
    bool regular = true;   // f8: false where 128-column blocks and scale blocks do not line up
    if constexpr (W::kScaled) {
        if (a.w->scale_cols < kSumCols) block = a.w->scale_cols;
        regular = a.w->scale_cols % block == 0;
    }
    const auto add = [&](const F& sum, int r, int col) {
        if constexpr (W::kScaled) {
            acc[r] = fma(sum, set1(scales[col / a.w->scale_cols]), acc[r]);
        } else {
            acc[r] = acc[r] + sum;
        }
    };
    const auto advance = [&](int n_cols) {
        w += int64_t{n_cols} * kColBytes;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) x[r] += n_cols;
    };
    int c = 0;
    if (regular && kG > 1) {
        for (; c + kG * block <= cols; c += kG * block) {
            F sums[R][kG];
            chain<W, R, kG>(w, int64_t{block} * kColBytes, block, x, sums);
#pragma GCC unroll 16
            for (int g = 0; g < kG; ++g)
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) add(sums[r][g], r, c + g * block);
            advance(kG * block);
        }
    }
    while (c < cols) {
        int end = c + block < cols ? c + block : cols;
        if constexpr (W::kScaled) {
            const int edge = (c / a.w->scale_cols + 1) * a.w->scale_cols;
            if (!regular && edge < end) end = edge;
        }
        F sums[R][1];
        chain<W, R, 1>(w, 0, end - c, x, sums);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) add(sums[r][0], r, c);
        advance(end - c);
        c = end;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(y + r * a.y_stride, acc[r]);
}

// One row tile x R rows of q8 or q4: an exact integer sum per tile, then one scaled addition.
template <class W, int R>
void int_rows(const MatmulArgs& a, const std::byte* w, const float*, int first_row, float* y) {
    const int8_t* x[R];
    const float* d[R];
    const int32_t* group_sum[R];
    F acc[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const int64_t row = a.x_row ? a.x_row[first_row + r] : first_row + r;
        x[r] = static_cast<const int8_t*>(a.x.x) + row * a.x.stride;
        d[r] = a.x.d + row * (a.x.stride / kTileCols);
        group_sum[r] = a.x.sum + row * (a.x.stride / kTileCols);
        acc[r] = set1(0);
    }
    const int tiles = a.w->col_tiles();
    for (int t = 0; t < tiles; ++t, w += W::kTileBytes) {
        if constexpr (R == 1) {
#pragma GCC unroll 16
            for (int u = 0; u <= W::kUnits; ++u) prefetch(w + kPrefetchBytes + 64 * u);
        }
        typename W::Acc s[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) s[r] = W::start(group_sum[r][t]);
#pragma GCC unroll 16
        for (int u = 0; u < W::kUnits; ++u) {
            const typename W::Unit unit = W::load(w + 64 * u);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) W::mac(s[r], unit, x[r] + int64_t{t} * kTileCols + 4 * u);
        }
        const F dw = W::scale(w + W::kScaleAt);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r] = fma(W::value(s[r]), dw * set1(d[r][t]), acc[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(y + r * a.y_stride, acc[r]);
}

template <class W> constexpr bool kIsChained = requires { typename W::X; };

template <class W, int R>
DC_INLINE void tile_rows(const MatmulArgs& a, const std::byte* w, const float* scales, int i, float* y) {
    if constexpr (kIsChained<W>) {
        chained_rows<W, R>(a, w, scales, i, y + i * a.y_stride);
    } else {
        int_rows<W, R>(a, w, scales, i, y + i * a.y_stride);
    }
}

template <class W> void matmul(const MatmulArgs& a) noexcept {
    const PackedTensor& w = *a.w;
    const int64_t tile_bytes = int64_t{w.col_tiles()} * W::kTileBytes;  // of one row tile
    const std::byte* slice = w.data + int64_t{a.slice} * w.row_tiles() * tile_bytes;
    const float* slice_scales = w.scales ? w.scales + a.slice * w.slice_scales() : nullptr;
    const int64_t scales_per_row = ceil_div(w.cols, w.scale_cols);
    for (int t = a.tile_begin; t < a.tile_end; ++t) {
        const std::byte* row_tile = slice + t * tile_bytes;
        const float* scales = slice_scales ? slice_scales + t * kTileRows / w.scale_rows * scales_per_row : nullptr;
        float* y = a.y + int64_t{t - a.tile_begin} * kTileRows;
        int i = 0;
        for (; a.n - i >= kBlockRows; i += kBlockRows) tile_rows<W, kBlockRows>(a, row_tile, scales, i, y);
        if constexpr (kBlockRows > 4)
            if (a.n - i >= 4) {
                tile_rows<W, 4>(a, row_tile, scales, i, y);
                i += 4;
            }
        if constexpr (kBlockRows > 3)
            if (a.n - i == 3) {
                tile_rows<W, 3>(a, row_tile, scales, i, y);
                i += 3;
            }
        if constexpr (kBlockRows > 2)
            if (a.n - i == 2) {
                tile_rows<W, 2>(a, row_tile, scales, i, y);
                i += 2;
            }
        if (a.n - i == 1) tile_rows<W, 1>(a, row_tile, scales, i, y);
    }
}

}  // namespace
}  // namespace deepcalm
