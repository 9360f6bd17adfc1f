// Absorbed attention over a bf16 cache on tile registers (tiles.h). Chunks, partials, softmax and rounding are those of
// attention_impl.h, both products are tiles' dots, sums of blocks of 32 added in order:
//   scores [positions, lanes] = 0 + cache rows as they lie x queries in pairs of dims
//   o [lanes, dims] = o * alpha (0 in a partial's first chunk) + probabilities x cache rows zipped in pairs of positions
// A partial runs in tiles' mode, softmax too. Zeros stand for what is not there, dims behind a row's and positions that a row
// does not see: they change a sum at most in the sign of a zero, which the last step of a partial makes positive. So a row's
// bits do not depend on the rows beside it, as long as positions that it does not see hold numbers; where they do not,
// values are added row by row.
#pragma once

#include "kernels/cpu/matmul_tiles.h"

#include "kernels/cpu/attention_impl.h"

namespace deepcalm {
namespace {

constexpr int kPaddedRows = 32;            // cache rows of a block of scores
constexpr int kZipDims = 64;               // dims of values that are zipped at once
constexpr int kLaneWords = kChunkLen / 2;  // probabilities of a lane, in pairs
constexpr int64_t kTileBytes = kTileLines * kLineBytes;

// Queries of two vectors, and what is prefetched meanwhile: `per` lines with every dot.
struct Queries {
    const float* q;
    int64_t step;  // floats from vector to vector
    const std::byte* next;
    int per;

    DC_INLINE const float* tile(int j, int k) const { return q + j * step + k * (kTileBytes / 4); }
    template <int kB> DC_INLINE void ask(int k) const {
        for (int i = k * per; i < (k + 1) * per; ++i) prefetch_far(next + 64 * i);
    }
};
// Values of tiles of 16 dims, each [64 positions / 2, 16 pairs].
struct Zipped {
    const std::byte* z;

    DC_INLINE const std::byte* tile(int j, int k) const { return z + (2 * j + k) * kTileBytes; }
    template <int kB> DC_INLINE void ask(int) const {}
};

template <class T> struct TiledPartial {
    explicit TiledPartial(const MlaPartialArgs& args) : a(args) {}

    const MlaPartialArgs& a;
    T tiles;
    const int n_lanes = a.n_rows * a.n_heads, n_vectors = (n_lanes + kLanes - 1) / kLanes;
    const int width = a.c_pad + a.r_pad, n_dots = padded(width, kTileCols) / kTileCols;
    const int64_t q_step = int64_t{width} * kLanes, row_bytes = a.cache.stride, o_stride = a.c_pad + 16;
    // of a.scratch
    std::byte* const zipped =
        reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(a.scratch) + 63) & ~uintptr_t{63});
    float* const q =
        reinterpret_cast<float*>(zipped + 2 * kZipDims * kChunkLen);  // [n_vectors, width, 16], half of it used
    float* const scores = q + n_vectors * q_step;                     // [n_vectors, kChunkLen, 16]
    float* const ends = scores + int64_t{n_vectors} * kVectorScores;  // [n_vectors, 16] after pos_begin
    LaneSums* const sums = reinterpret_cast<LaneSums*>(ends + n_vectors * kLanes);  // [n_vectors]
    float* const o = reinterpret_cast<float*>(sums + n_vectors);                    // [n_vectors * 16, o_stride]
    float* const rows = o + n_vectors * kLanes * o_stride;  // [kPaddedRows, n_dots * 32] bf16; [16, kZipDims] f32

    DC_INLINE float* probabilities(int v) const {  // [16, kChunkLen] bf16, where the second half of the scores was
        return scores + int64_t{v} * kVectorScores + kVectorScores / 2;
    }

    // Scores of the chunk of n positions that lies at `from`; the bytes that come after it are prefetched.
    void score(const std::byte* from, int n, const std::byte* next) {
        const int blocks = (n + kPaddedRows - 1) / kPaddedRows * ((n_vectors + 1) / 2);
        const auto per = static_cast<int>(ceil_div(row_bytes, blocks * n_dots));  // row_bytes lines in kChunkLen rows
        for (int p = 0; p < n; p += kPaddedRows) {
            const bool whole = n - p >= kPaddedRows && width % kTileCols == 0;
            const std::byte* block = whole ? from + p * row_bytes : pad(from + p * row_bytes, n - p);
            const int64_t stride = whole ? row_bytes : 2 * kTileCols * n_dots;
            const auto* x0 = reinterpret_cast<const uint16_t*>(block);
            const uint16_t* const x[2] = {x0, x0 + 8 * stride};
            for (int v = 0; v < n_vectors; v += 2, next += int64_t{64} * per * n_dots) {
                const Queries w{q + v * q_step, q_step, next, per};
                const auto sum = [&]<int kB>() {
                    zero_sums<2, kB>(tiles);
                    dots<2, kB>(tiles, x, stride, n_dots, w);
                    each_sum<2, kB>([&]<int C>(int i, int j) {
                        tiles.template store<C>(scores + (v + j) * kVectorScores + (p + 16 * i) * kLanes, 64);
                    });
                };
                v + 1 < n_vectors ? sum.template operator()<2>() : sum.template operator()<1>();
            }
        }
    }
    // n rows, at most kPaddedRows of them, and zeros around them
    std::byte* pad(const std::byte* from, int n) {
        auto* to = reinterpret_cast<std::byte*>(rows);
        const int64_t stride = 2 * kTileCols * n_dots;
        __builtin_memset(to, 0, kPaddedRows * stride);
        for (int j = 0; j < n && j < kPaddedRows; ++j)
            __builtin_memcpy(to + j * stride, from + j * row_bytes, 2 * width);
        return to;
    }

    // Scores of n positions from `begin` on become probabilities; older sums are multiplied by alpha.
    void softmax(int v, int begin, int n) {
        float* s = scores + int64_t{v} * kVectorScores;
        softmax_step<true>(true, begin - a.pos_begin, n, ends + v * kLanes, a.softmax_scale, s, sums[v]);
        for (int j = (n + 1) / 2; j < kLaneWords; ++j) store(s + j * kLanes, set1(0));
        Vector16 w[kLaneWords];
        __builtin_memcpy(w, s, sizeof w);
        for (int k = 0; k < kLaneWords; k += 16) {
            transpose(w + k);
            for (int i = 0; i < kLanes; ++i) __builtin_memcpy(probabilities(v) + i * kLaneWords + k, w + k + i, 64);
        }
        bool same = true;
        for (float alpha : sums[v].alpha) same &= alpha == 1;
        for (int i = 0; i < kLanes && !same && begin > a.pos_begin; ++i) {
            float* to = o + (v * kLanes + i) * o_stride;
            for (int d = 0; d < a.c_pad; d += 16) store(to + d, load(to + d) * set1(sums[v].alpha[i]));
        }
    }

    // Dims d .. d + n - 1 of the first n_pos positions of a chunk, in pairs of positions; zeros follow.
    void zip(const std::byte* from, int n_pos, int d, int n) {
        alignas(64) static constexpr std::byte kNone[64] = {};
        for (int i = 0; i < n; i += 32)
            for (int j = 0; j < padded(n_pos, kTileCols); j += 2) {
                const std::byte* row = from + j * row_bytes + 2 * (d + i);
                float* to = reinterpret_cast<float*>(zipped + i / 8 * kTileBytes + 32 * j);
                DotBF16::zip(j < n_pos ? row : kNone, j + 1 < n_pos ? row + row_bytes : kNone, to, to + kTileBytes / 2);
            }
    }
    // `to` [16 kA, n_dims] = o of kA vectors from v on (first: 0) + probabilities x what is zipped: dims d and on of n positions.
    template <int kA, int kB>
    void sum_values(int v, int d, int n_dims, int n, bool first, float* to, int64_t to_stride) {
        const auto* p = reinterpret_cast<const uint16_t*>(probabilities(v));
        const uint16_t* const x[2] = {p, p + (kA - 1) * 2 * kVectorScores};
        for (int j = 0; j < n_dims / 16; j += kB) {
            float* older = o + v * kLanes * o_stride + d + 16 * j;
            float* const from[2] = {older, older + (kA - 1) * kLanes * o_stride};
            float* const into[2] = {to + 16 * j, to + 16 * j + (kA - 1) * kLanes * to_stride};
            first ? zero_sums<kA, kB>(tiles) : load_sums<kA, kB>(tiles, from, o_stride);
            dots<kA, kB>(tiles, x, 2 * kChunkLen, padded(n, kTileCols) / kTileCols,
                         Zipped{zipped + 2 * j * kTileBytes});
            store_sums<kA, kB>(tiles, into, to_stride);
        }
    }
    // Lanes begin .. end - 1 go on with the first n positions of a chunk.
    void add_values(const std::byte* from, int n, int begin, int end, bool first) {
        const bool all = end - begin == n_lanes;
        for (int d = 0; d < a.c_pad; d += kZipDims) {
            const int n_dims = a.c_pad - d < kZipDims ? a.c_pad - d : kZipDims;
            zip(from, n, d, n_dims);
            for (int v = begin / kLanes, vectors = 1; v * kLanes < end; v += vectors) {
                vectors = all && (v + 1) * kLanes < end ? 2 : 1;
                float* to = all ? o + v * kLanes * o_stride + d : rows;  // [kLanes, kZipDims]
                const int64_t stride = all ? o_stride : kZipDims;
                if (vectors == 2) {
                    sum_values<2, 2>(v, d, n_dims, n, first, to, stride);
                } else if (n_dims == kZipDims) {
                    sum_values<1, 4>(v, d, n_dims, n, first, to, stride);
                } else {
                    sum_values<1, 1>(v, d, n_dims, n, first, to, stride);
                }
                for (int i = 0; i < kLanes && !all; ++i)
                    if (const int lane = v * kLanes + i; lane >= begin && lane < end)
                        __builtin_memcpy(o + lane * o_stride + d, rows + i * kZipDims, 4 * static_cast<size_t>(n_dims));
            }
        }
    }
    // Whether the latent parts of n rows are numbers.
    bool finite(const std::byte* row, int n) const {
        const I exponents = iset1(0x7f807f80), high = iset1(0x7f800000);
        I top = iset1(0);
        for (int j = 0; j < n; ++j, row += row_bytes)
            for (int d = 0; d < a.c_pad; d += 32) {
                const I e = iload(row + 2 * d) & exponents;
                top = imax(imax(top, e & high), shl<16>(e));
            }
        return max_lane(top) < 0x7f800000;
    }

    void run() {
        int end = a.pos_begin;
        for (int i = 0; i < a.n_rows; ++i) end = a.row_end[i] > end ? a.row_end[i] : end;
        begin_partial<true>(a, n_vectors, q, ends, sums);
        for (int v = 0; v < n_vectors && width % kTileCols > 0; ++v)
            __builtin_memset(q + v * q_step + width / 2 * kLanes, 0, kTileBytes / 2);
        configure(tiles, kTileLines, kTileLines);
        for (int begin = a.pos_begin; begin < end || begin == a.pos_begin; begin += kChunkLen) {
            const std::byte* from = a.cache.row(begin);
            const int n = end - begin < kChunkLen ? end - begin : kChunkLen;
            const std::byte* next = begin + kChunkLen < end ? from + kChunkLen * row_bytes : a.next;
            if (n > 0) score(from, n, next ? next : from);
            for (int v = 0; v < n_vectors; ++v) softmax(v, begin, n);
            const auto seen = [&](int i) {  // positions of row i
                const int m = a.row_end[i] - begin < n ? a.row_end[i] - begin : n;
                return m > 0 ? m : 0;
            };
            int least = n;
            for (int i = 0; i < a.n_rows; ++i) least = seen(i) < least ? seen(i) : least;
            const bool first = begin == a.pos_begin, together = finite(from + least * row_bytes, n - least);
            if (together) add_values(from, n, 0, n_lanes, first);
            for (int i = 0; i < a.n_rows && !together; ++i)
                add_values(from, seen(i), i * a.n_heads, (i + 1) * a.n_heads, first);
        }
        tiles.release();
        for (int u = 0; u < n_lanes; ++u) {
            a.m.row(u / a.n_heads)[u % a.n_heads] = sums[u / kLanes].m[u % kLanes];
            a.l.row(u / a.n_heads)[u % a.n_heads] = sums[u / kLanes].l[u % kLanes];
            float* to = a.o.row(u / a.n_heads) + int64_t{u % a.n_heads} * a.c_pad;
            for (int d = 0; d < a.c_pad; d += 16) store(to + d, load(o + u * o_stride + d) + set1(0));
        }
    }
};

template <class T> [[gnu::noinline]] void partial_on_tiles(const MlaPartialArgs& a) { TiledPartial<T>(a).run(); }

}  // namespace
}  // namespace deepcalm
