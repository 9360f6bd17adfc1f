// The latent cache and absorbed attention over it (docs/model.md 4.1), on top of a SIMD layer.
//
// A vector holds 16 (row, head) pairs. A chunk of 64 positions is walked twice, a few dims at a time, so that what is
// converted stays in the first-level cache: for the scores, which multiply a vector of queries with one key element, and
// for the values, which multiply a vector of dims with one probability. The next chunk is prefetched meanwhile. Order of a
// row's arithmetic, per chunk: scores (one chain over all dims), times softmax_scale; maximum; probabilities exp(s - m);
// l = l * alpha + sum(p); o = o * alpha (0 in a partial's first chunk), then o = fma(p_j, c_j, o). Dims 2i and 2i + 1 of a
// score, positions 2j and 2j + 1 of a value: the odd one is added first, as vdpbf16ps does.
// Cache type bf16: queries and probabilities are rounded to bf16 first (l sums the rounded ones), the rest is f32; or
// (bf16_dot) both products go two dims, or positions, at a time through that instruction. The bits are the same but for
// products and sums below 2^-126, which it takes for 0.
#pragma once

#include "kernels/elementary.h"
#include "kernels/transpose.h"

namespace deepcalm {
namespace {

constexpr float kMinusInf = -__builtin_inff();

// exp(x) for x <= 0, about 1 ulp; 0 below -87, where results leave the normal range; NaN stays NaN.
DC_INLINE F exp_neg(F x) {
    const auto [p, n_biased] = exp_parts(x, set1, fma);
    return select_lt(x, set1(-87.0F), set1(0), as_f(as_i(p) + shl<23>(as_i(n_biased))));
}
DC_INLINE float exp_neg(float x) { return first(exp_neg(set1(x))); }

DC_INLINE I bf16_bits(F a) {  // nearest even, in the low half of each lane
    const I u = as_i(a), top = shr<16>(u);
    const I rounded = shr<16>(u + iset1(0x7fff) + (top & iset1(1)));
    return iselect_lt(iset1(0x7f800000), u & iset1(0x7fffffff), top | iset1(0x40), rounded);
}
DC_INLINE F bf16_round(F a) { return as_f(shl<16>(bf16_bits(a))); }
DC_INLINE F load_bf16(const void* p) { return as_f(shl<16>(load_u16(p))); }

// x[i .. i+15], zeros at and beyond n.
DC_INLINE F load_padded(const float* x, int i, int n) {
    return n - i >= 16 ? load(x + i) : load_n(x + i, n > i ? n - i : 0);
}
DC_INLINE int padded(int n, int to) { return (n + to - 1) / to * to; }

template <class Store> DC_INLINE void put_row(const float* x, int n, int n_pad, Store put) {
    for (int i = 0; i < n_pad; i += 16) put(i, load_padded(x, i, n));
}

DC_INLINE I round_to_i8(F v) {  // clamps to +-127, ties to even; NaN -> -127
    const F magic = set1(12582912.0F);
    return as_i(min(max(v, set1(-127.0F)), set1(127.0F)) + magic) - as_i(magic);
}
DC_INLINE float amax32(F a, F b) {  // max |x| of 32 values; NaN if one is
    const I mag = iset1(0x7fffffff);
    return first(as_f(iset1(max_lane(imax(as_i(a) & mag, as_i(b) & mag)))));
}

void cache_write(CacheType type, const float* c_kv, int c, const float* k_rope, int dr, std::byte* row) noexcept {
    const int c_pad = padded(c, 32), r_pad = padded(dr, 16);
    if (type == CacheType::kF32) {
        float* out = reinterpret_cast<float*>(row);
        put_row(c_kv, c, c_pad, [&](int i, F v) { store(out + i, v); });
        put_row(k_rope, dr, r_pad, [&](int i, F v) { store(out + c_pad + i, v); });
    } else if (type == CacheType::kBF16) {
        put_row(c_kv, c, c_pad, [&](int i, F v) { store_u16(row + 2 * i, bf16_bits(v)); });
        put_row(k_rope, dr, r_pad, [&](int i, F v) { store_u16(row + 2 * (c_pad + i), bf16_bits(v)); });
    } else if (type == CacheType::kF16) {
        put_row(c_kv, c, c_pad, [&](int i, F v) { store_f16(row + 2 * i, v); });
        put_row(k_rope, dr, r_pad, [&](int i, F v) { store_f16(row + 2 * (c_pad + i), v); });
    } else {
        std::byte* scales = row + c_pad;
        std::byte* rope = scales + c_pad / 16;
        for (int i = 0; i < c_pad; i += 32) {
            const F a = load_padded(c_kv, i, c), b = load_padded(c_kv, i + 16, c);
            alignas(64) uint16_t bits[16];
            store_f16(bits, set1(amax32(a, b) / 127.0F));
            __builtin_memcpy(scales + i / 16, bits, 2);
            const float d = first(load_f16(bits));  // codes follow the rounded scale
            const F inv = set1(d > 0 ? 1.0F / d : d);
            store_i8(row + i, round_to_i8(a * inv));
            store_i8(row + i + 16, round_to_i8(b * inv));
        }
        put_row(k_rope, dr, r_pad, [&](int i, F v) { store_f16(rope + 2 * i, v); });
    }
}

// A lane is a (row, head) pair: 16 of them are a vector, a vector's scores and probabilities of a chunk [kChunkLen, 16].
constexpr int kLanes = 16, kVectorScores = kChunkLen * kLanes;
// Dims converted at once: of the latent, whose width is a multiple of 32, or of the rope part.
constexpr int kSlice = 32;
static_assert(kChunkLen % kScoreAccs == 0);

// 16 dims from dim i on, a multiple of 16, of a cache row of f32, bf16 or f16, as f32.
template <CacheType kType> DC_INLINE F read_dims(const std::byte* row, int i) {
    if constexpr (kType == CacheType::kF32) {
        return load(reinterpret_cast<const float*>(row) + i);
    } else if constexpr (kType == CacheType::kBF16) {
        return load_bf16(row + 2 * i);
    } else {
        return load_f16(row + 2 * i);
    }
}
template <class Fn> DC_INLINE void with_type(CacheType type, Fn&& fn) {
    switch (type) {
    case CacheType::kF32: return fn.template operator()<CacheType::kF32>();
    case CacheType::kBF16: return fn.template operator()<CacheType::kBF16>();
    case CacheType::kF16: return fn.template operator()<CacheType::kF16>();
    case CacheType::kQ8: return fn.template operator()<CacheType::kQ8>();
    }
}
// Dims begin .. begin + n of n_rows cache rows as f32 [n_rows, kSlice]; begin a multiple of 32, n 16 or 32.
void read_rows(CacheType type, const std::byte* row, int64_t row_bytes, int n_rows, int c_pad, int begin, int n,
               float* out) {
    with_type(type, [&]<CacheType kType>() {
        const std::byte *scale = row + c_pad + begin / 16, *values = row;
        int dim = begin;  // of `values`
        if constexpr (kType == CacheType::kQ8) {
            for (int j = 0; begin < c_pad && j < n_rows; ++j, row += row_bytes, scale += row_bytes, out += kSlice) {
                const F d = set1(first(load_f16(scale)));  // reads on into the rope part, at least 32 bytes long
                store(out, to_f(load_i8(row + begin)) * d);
                store(out + 16, to_f(load_i8(row + begin + 16)) * d);
            }
            if (begin < c_pad) return;
            values = row + c_pad + c_pad / 16;  // the rope part is f16
            dim -= c_pad;
        }
        for (int i = 0; i < n; i += 16)
#pragma GCC unroll 4
            for (int j = 0; j < n_rows; ++j)
                store(out + j * kSlice + i, read_dims<kType>(values + j * row_bytes, dim + i));
    });
}

void cache_read(CacheType type, const std::byte* row, int c_pad, int r_pad, float* out) noexcept {
    for (int begin = 0; begin < c_pad + r_pad; begin += kSlice) {
        alignas(64) float dims[kSlice];
        const int n = c_pad + r_pad - begin < kSlice ? c_pad + r_pad - begin : kSlice;
        read_rows(type, row, 0, 1, c_pad, begin, n, dims);
        __builtin_memcpy(out + begin, dims, static_cast<size_t>(n) * 4);
    }
}

// n words of each of n_rows rows -> out [n_rows, kSlice]
DC_INLINE void copy_words(const std::byte* rows, int64_t row_bytes, int n_rows, int n, float* out) {
    for (int j = 0; j < n_rows; ++j, rows += row_bytes, out += kSlice) {
        const float* row = reinterpret_cast<const float*>(rows);
        store(out, load_padded(row, 0, n));
        store(out + 16, load_padded(row, 16, n));
    }
}

// rows [16] of 16 f32 -> out [16, 16], out[d, i] = rows[i][d]
DC_INLINE void transpose(const float* const (&rows)[16], float* out) {
    Vector16 v[16];
    DC_EACH (i, 16) __builtin_memcpy(&v[i], rows[i], 64);
    transpose(v);
    __builtin_memcpy(out, v, sizeof v);
}

// Memory that the next chunk and the next dims need, prefetched a few bytes at a time: bursts wait for each other.
struct Ahead {
    const std::byte *next, *dims;
    int64_t step, dims_step;
    template <bool kPairs> DC_INLINE void fetch() {
        for (int line = 0; line < (kPairs ? 2 : 1); ++line, next += step) {  // pairs come in half as many steps
            prefetch_far(next);
            prefetch(dims + 64 * line);
        }
        dims += dims_step;
    }
};

// acc + a * b; with kPairs, of the two bf16 in every lane of a and of b.
template <bool kPairs, class Op = DotBF16> DC_INLINE F multiply_add(F a, F b, F acc) {
    if constexpr (kPairs) {
        return Op::dot(acc, as_i(a), as_i(b));
    } else {
        return fma(a, b, acc);
    }
}
// Words with a bf16 in each half, of f32 that are bf16 already.
DC_INLINE F pair_up(F low, F high) { return as_f(shr<16>(as_i(low)) | as_i(high)); }

// Sums of n dims (pairs), on top of s unless they are the first: s[v, p, lane] of NV vectors of q [n, 16] and kPos positions
// of k [n].
template <bool kPairs, int NV, int kPos>
DC_INLINE void score_block(const float* q, int64_t q_stride, const float* k, int n, bool first, float* s,
                           Ahead& ahead) {
    F acc[NV][kPos];
    DC_EACH (v, NV)
        DC_EACH (p, kPos) acc[v][p] = first ? set1(0) : load(s + v * kVectorScores + p * kLanes);
    for (int d0 = 0; d0 < n; d0 += 2) {
        ahead.template fetch<kPairs>();
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const int d = kPairs ? d0 + i : d0 + 1 - i;
            F qv[NV];
            DC_EACH (v, NV) qv[v] = load(q + v * q_stride + d * kLanes);
            DC_EACH (p, kPos) {
                const F kv = set1(k[p * kSlice + d]);
                DC_EACH (v, NV) acc[v][p] = multiply_add<kPairs>(qv[v], kv, acc[v][p]);
            }
        }
    }
    DC_EACH (v, NV)
        DC_EACH (p, kPos) store(s + v * kVectorScores + p * kLanes, acc[v][p]);
}

// Running softmax of a vector: maximum, sum of exponentials, and what the last chunk multiplies older sums by.
struct LaneSums {
    float m[kLanes], l[kLanes], alpha[kLanes];
};
// Dims from d on of n_pos rows of values. With kPairs a row holds two positions; of an odd n_pos the last
// one's second half is not used.
struct Values {
    View<const std::byte> rows;
    int d, n_pos;
};
// o[h, 16 ND dims] = o alpha[h] (alpha null: 0) + sum_j p[j, h] * c[j, d ..], j in order; alpha, p: lanes of a vector.
template <bool kPairs, CacheType kType, int NH, int ND>
DC_INLINE void value_block(const float* alpha, const float* p, const Values& c, float* o, int c_pad) {
    F acc[NH][ND];
    DC_EACH (h, NH)
        DC_EACH (v, ND) acc[h][v] = alpha ? load(o + h * c_pad + 16 * v) * set1(alpha[h]) : set1(0);
    const auto add = [&](int j, I used) __attribute__((always_inline)) {
        F cv[ND];
        DC_EACH (v, ND) {
            cv[v] = read_dims<kType>(c.rows.row(j), c.d + 16 * v);
            if (kPairs) cv[v] = as_f(as_i(cv[v]) & used);
        }
        DC_EACH (h, NH) {
            const F pv = set1(p[j * kLanes + h]);
            DC_EACH (v, ND) acc[h][v] = multiply_add<kPairs>(pv, cv[v], acc[h][v]);
        }
    };
    const I all = iset1(-1);
    int j = 0;
    if constexpr (kPairs) {
        for (; 2 * j + 1 < c.n_pos; ++j) add(j, all);
        if (2 * j < c.n_pos) add(j, iset1(0xffff));
    } else {
        for (; j + 1 < c.n_pos; j += 2) {
            add(j + 1, all);
            add(j, all);
        }
        if (j < c.n_pos) add(j, all);
    }
    DC_EACH (h, NH)
        DC_EACH (v, ND) store(o + h * c_pad + 16 * v, acc[h][v]);
}
// Two vectors of dims for n_heads lanes from `lane` on, which are one row's: in blocks of heads that stay inside a vector.
// sums: what older chunks have summed up to, null if there are none.
template <bool kPairs, CacheType kType, int NH = kPairs ? kValueHeads / 2 : kValueHeads>
DC_INLINE int value_heads(const LaneSums* sums, const float* scores, int lane, int n_heads, const Values& c, float* o,
                          int c_pad) {
    if constexpr (NH > 1) {
        if (lane % NH != 0 || n_heads < NH)
            return value_heads<kPairs, kType, NH == 4 ? 1 : NH / 2>(sums, scores, lane, n_heads, c, o, c_pad);
    }
    constexpr int ND = NH > kValueAccs / 2 ? 1 : 2;
    const float* alpha = sums ? sums[lane / kLanes].alpha + lane % kLanes : nullptr;
    const float* p = scores + lane / kLanes * kVectorScores + lane % kLanes;
#pragma GCC unroll 2
    for (int v = 0; v < 2; v += ND)
        value_block<kPairs, kType, NH, ND>(alpha, p, {c.rows, c.d + 16 * v, c.n_pos}, o + 16 * v, c_pad);
    return NH;
}

// Scores s of n positions from `begin` on become probabilities (with kPairs two in a word); 0 from lane_end [16] on.
template <bool kPairs>
DC_INLINE void softmax_step(bool bf16, int begin, int n, const float* lane_end, float scale, float* s, LaneSums& sums) {
    const F end = load(lane_end) - set1(static_cast<float>(begin)), none = set1(kMinusInf);
    F top = load(sums.m);
    for (int j = 0; j < n; ++j) {
        const F v = select_lt(set1(static_cast<float>(j)), end, load(s + j * kLanes) * set1(scale), none);
        store(s + j * kLanes, v);
        top = max(v, top);
    }
    const F base = select_lt(none, top, top, set1(0));  // lanes that have seen nothing yet
    const F alpha = exp_neg(load(sums.m) - base);
    F total = set1(0);
    for (int j = 0; j < n; ++j) {
        F p = exp_neg(load(s + j * kLanes) - base);
        if (bf16) p = bf16_round(p);
        store(s + j * kLanes, p);
        total = total + p;
    }
    for (int j = 0; kPairs && j < n; j += 2)
        store(s + j / 2 * kLanes, pair_up(load(s + j * kLanes), j + 1 < n ? load(s + (j + 1) * kLanes) : set1(0)));
    store(sums.m, top);
    store(sums.l, fma(load(sums.l), alpha, total));
    store(sums.alpha, alpha);
}

// What a partial begins with: ends [n_vectors, 16], sums of nothing, and q [n_vectors, c_pad + r_pad, 16], a (row, head) pair
// to a lane, rounded as the type is; with kPairs two dims in a word.
template <bool kPairs>
DC_INLINE void begin_partial(const MlaPartialArgs& a, int n_vectors, float* q, float* ends, LaneSums* sums) {
    const int width = a.c_pad + a.r_pad, n_lanes = a.n_rows * a.n_heads;
    const bool bf16 = a.type == CacheType::kBF16;
    for (int u = 0; u < n_vectors * kLanes; ++u)
        ends[u] = u < n_lanes ? static_cast<float>(a.row_end[u / a.n_heads] - a.pos_begin) : 0.0F;
    for (int v = 0; v < n_vectors; ++v) {
        store(sums[v].m, set1(kMinusInf));
        store(sums[v].l, set1(0));
    }
    for (int v = 0; v < n_vectors && !a.same_q; ++v) {
        const float* row[kLanes];
        for (int u = 0; u < kLanes; ++u) {
            const int lane = v * kLanes + u < n_lanes ? v * kLanes + u : n_lanes - 1;  // the rest repeat the last
            row[u] = a.q.row(lane / a.n_heads) + int64_t{lane % a.n_heads} * width;
        }
        for (int d = 0; d < width; d += 16) {
            float* to = q + (int64_t{v} * width + d) * kLanes;
            transpose(row, to);
            for (int u = 0; u < kLanes; ++u) {
                row[u] += 16;
                if (bf16) store(to + u * kLanes, bf16_round(load(to + u * kLanes)));
            }
            for (int u = 0; kPairs && u < 16; u += 2)
                store(to + (u - d) / 2 * kLanes, pair_up(load(to + u * kLanes), load(to + (u + 1) * kLanes)));
        }
    }
}

template <bool kPairs, class Op = DotBF16> void partial(const MlaPartialArgs& a) noexcept {
    const int width = a.c_pad + a.r_pad, n_lanes = a.n_rows * a.n_heads, n_vectors = (n_lanes + kLanes - 1) / kLanes;
    const bool bf16 = a.type == CacheType::kBF16, direct = !kPairs && kDirectValues && a.type != CacheType::kQ8;
    const auto address = (reinterpret_cast<uintptr_t>(a.scratch) + 63) & ~uintptr_t{63};
    float* dims = reinterpret_cast<float*>(address);                      // [kChunkLen, kSlice]
    float* q = dims + kChunkLen * kSlice;                                 // [n_vectors, width, 16]
    float* scores = q + int64_t{n_vectors} * width * kLanes;              // [n_vectors, kChunkLen, 16]
    float* ends = scores + int64_t{n_vectors} * kVectorScores;            // [n_vectors, 16] after pos_begin
    auto* sums = reinterpret_cast<LaneSums*>(ends + n_vectors * kLanes);  // [n_vectors]

    int end = a.pos_begin;
    for (int i = 0; i < a.n_rows; ++i) end = a.row_end[i] > end ? a.row_end[i] : end;
    begin_partial<kPairs>(a, n_vectors, q, ends, sums);
    const int words = kPairs ? width / 2 : width;
    // prefetches of score blocks in a chunk: something for every two words of a query
    const int64_t fetches =
        int64_t{words} / 2 * (kChunkLen / kScoreAccs) * (n_vectors / kScoreVecs * kScoreVecs + n_vectors % kScoreVecs);
    for (int begin = a.pos_begin; begin < end || begin == a.pos_begin; begin += kChunkLen) {
        const std::byte* rows = a.cache.row(begin);
        const int64_t row_bytes = a.cache.stride;
        const int filled = end - begin < kChunkLen ? end - begin : kChunkLen;
        const std::byte* next = begin + kChunkLen < end ? rows + kChunkLen * row_bytes : a.next;
        Ahead ahead{next ? next : rows, rows, next ? kChunkLen * row_bytes / (kPairs ? 2 * fetches : fetches) : 0, 0};
        for (int d0 = 0; d0 < words; d0 += kSlice) {
            const int n = words - d0 < kSlice ? words - d0 : kSlice;
            if constexpr (kPairs) {
                copy_words(rows + 4 * d0, row_bytes, filled, n, dims);
            } else {
                read_rows(a.type, rows, row_bytes, filled, a.c_pad, d0, n, dims);
            }
            const auto score = [&]<int NV, int kPos>(int v) {
                ahead.dims = rows + (d0 + kSlice) * row_bytes / words;
                ahead.dims_step = v == 0 ? row_bytes * kPos / (kSlice / 2) : 0;
                for (int p = 0; p < filled; p += kPos) {
                    score_block<kPairs, NV, kPos>(q + (int64_t{v} * width + d0) * kLanes, int64_t{width} * kLanes,
                                                  dims + p * kSlice, n, d0 == 0, scores + (v * kChunkLen + p) * kLanes,
                                                  ahead);
                }
            };
            int v = 0;
            for (; v + kScoreVecs <= n_vectors; v += kScoreVecs)
                score.template operator()<kScoreVecs, kScoreAccs / kScoreVecs>(v);
            for (; v < n_vectors; ++v) score.template operator()<1, kScoreAccs>(v);
        }
        for (int v = 0; v < n_vectors; ++v)
            softmax_step<kPairs>(bf16, begin - a.pos_begin, filled, ends + v * kLanes, a.softmax_scale,
                                 scores + v * kVectorScores, sums[v]);
        const auto values = [&]<CacheType kType>(View<const std::byte> c, int d, int out) {
            for (int i = 0; i < a.n_rows; ++i) {
                const int n_pos = a.row_end[i] - begin < filled ? a.row_end[i] - begin : filled;
                for (int h = 0; h < a.n_heads;)
                    h += value_heads<kPairs, kType>(begin > a.pos_begin ? sums : nullptr, scores, i * a.n_heads + h,
                                                    a.n_heads - h, {c, d, n_pos},
                                                    a.o.row(i) + int64_t{h} * a.c_pad + out, a.c_pad);
            }
        };
        for (int d = 0; d < a.c_pad; d += kSlice) {
            if (direct) {
                with_type(a.type, [&]<CacheType kType>() {
                    if constexpr (kType != CacheType::kQ8) values.template operator()<kType>({rows, row_bytes}, d, d);
                });
            } else {
                if constexpr (kPairs) {
                    for (int j = 0; j < filled; j += 2) {
                        const std::byte* row = rows + j * row_bytes + 2 * d;
                        float* to = dims + j / 2 * kSlice;
                        Op::zip(row, j + 1 < filled ? row + row_bytes : row, to, to + 16);
                    }
                } else {
                    read_rows(a.type, rows, row_bytes, filled, a.c_pad, d, kSlice, dims);
                }
                values.template operator()<CacheType::kF32>({reinterpret_cast<std::byte*>(dims), kSlice * 4}, 0, d);
            }
        }
    }
    for (int u = 0; u < n_lanes; ++u) {
        a.m.row(u / a.n_heads)[u % a.n_heads] = sums[u / kLanes].m[u % kLanes];
        a.l.row(u / a.n_heads)[u % a.n_heads] = sums[u / kLanes].l[u % kLanes];
    }
}

template <class Op> void mla_partial(const MlaPartialArgs& a) noexcept {
    constexpr bool kDot = requires { Op::kOps; };
    if (kDot && a.bf16_dot && a.type == CacheType::kBF16) return partial<kDot>(a);
    partial<false>(a);
}

void mla_merge(const MlaSums& sum, const MlaSums& later, int n, int c_pad) noexcept {
    for (int i = 0; i < n; ++i) {
        if (later.l[i] == 0) continue;
        const bool first = sum.l[i] == 0;
        const float top = first || later.m[i] > sum.m[i] ? later.m[i] : sum.m[i];
        const float old_weight = first ? 0 : exp_neg(sum.m[i] - top), weight = exp_neg(later.m[i] - top);
        sum.m[i] = top;
        sum.l[i] = first ? later.l[i] : sum.l[i] * old_weight + later.l[i] * weight;
        const F old = set1(old_weight), w = set1(weight);
        float* o = sum.o.row(i);
        const float* x = later.o.row(i);
        for (int d = 0; d < c_pad; d += 16) store(o + d, first ? load(x + d) : fma(w, load(x + d), load(o + d) * old));
    }
}

void mla_finish(const MlaSums& sum, int c_pad, float* out) noexcept {
    const bool none = *sum.l == 0;
    for (int d = 0; d < c_pad; d += 16) store(out + d, none ? set1(0) : load(sum.o.data + d) / set1(*sum.l));
}

}  // namespace
}  // namespace deepcalm
