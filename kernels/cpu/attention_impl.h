// The latent cache and absorbed attention over it (docs/model.md 4.1), on top of a SIMD layer.
//
// Chunks of 64 positions are converted to f32 twice, for the scores of all rows and heads a few positions at a time, for
// their values a few dims at a time: both pieces stay in the first-level cache, while a whole chunk in f32 spent 20 % of the
// time on its way to the second (Sapphire Rapids VM, 16 heads). The next chunk is asked for meanwhile. Order of a
// row's arithmetic, per chunk: scores (16 lanes over the dims, sum_block's tree), times softmax_scale; maximum;
// probabilities exp(s - m); l = l * alpha + sum(p); o = o * alpha, then o = fma(p_j, c_j, o) in position order.
// Cache type bf16: queries and probabilities are rounded to bf16 first (l sums the rounded ones), the rest is f32.
#pragma once

namespace deepcalm {
namespace {

constexpr float kMinusInf = -__builtin_inff();

// exp(x) for x <= 0, about 1 ulp; 0 below -87, where results leave the normal range; NaN stays NaN.
DC_INLINE F exp_neg(F x) {
    const F magic = set1(12582912.0F);  // 1.5 * 2^23: rounds to an integer that stays in the low bits
    const F n_biased = fma(x, set1(1.44269504088896341F), magic);
    const F n = n_biased - magic;
    const F r = fma(n, set1(2.12194440e-4F), fma(n, set1(-0.693359375F), x));  // ln 2 in two parts
    F p = set1(1.9875691500e-4F);                                              // Cephes expf
    p = fma(p, r, set1(1.3981999507e-3F));
    p = fma(p, r, set1(8.3334519073e-3F));
    p = fma(p, r, set1(4.1665795894e-2F));
    p = fma(p, r, set1(1.6666665459e-1F));
    p = fma(p, r, set1(5.0000001201e-1F));
    p = fma(p, r * r, r) + set1(1.0F);
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

// put(i - begin, values i .. i + 15) over dims [begin, end) of a cache row, multiples of 16, and of 32 in a q8 latent.
template <class Put>
DC_INLINE void read_dims(CacheType type, const std::byte* row, int c_pad, int begin, int end, Put put) {
    if (type == CacheType::kF32) {
        for (int i = begin; i < end; i += 16) put(i - begin, load(reinterpret_cast<const float*>(row) + i));
    } else if (type == CacheType::kBF16) {
        for (int i = begin; i < end; i += 16) put(i - begin, load_bf16(row + 2 * i));
    } else if (type == CacheType::kF16) {
        for (int i = begin; i < end; i += 16) put(i - begin, load_f16(row + 2 * i));
    } else {
        const std::byte* scales = row + c_pad;
        int i = begin;
        for (; i < end && i < c_pad; i += 32) {
            const F d = set1(first(load_f16(scales + i / 16)));  // reads on into the rope part, at least 32 bytes long
            put(i - begin, to_f(load_i8(row + i)) * d);
            put(i - begin + 16, to_f(load_i8(row + i + 16)) * d);
        }
        const std::byte* rope = scales + c_pad / 16;
        for (; i < end; i += 16) put(i - begin, load_f16(rope + 2 * (i - c_pad)));
    }
}

void cache_read(CacheType type, const std::byte* row, int c_pad, int r_pad, float* out) noexcept {
    read_dims(type, row, c_pad, 0, c_pad + r_pad, [&](int i, F v) { store(out + i, v); });
}

// Scores of NH heads against kScorePos positions: s[h, p] = scale * q_h . k_p.
template <int NH> DC_INLINE void score_block(const float* q, int width, const float* k, float scale, float* s) {
    F acc[kScoreHeads * kScorePos];
#pragma GCC unroll 16
    for (F& v : acc) v = set1(0);
    for (int d = 0; d < width; d += 16) {
        F kv[kScorePos];
#pragma GCC unroll 16
        for (int p = 0; p < kScorePos; ++p) kv[p] = load(k + p * width + d);
#pragma GCC unroll 16
        for (int h = 0; h < NH; ++h) {
            const F qv = load(q + h * width + d);
#pragma GCC unroll 16
            for (int p = 0; p < kScorePos; ++p) acc[h * kScorePos + p] = fma(qv, kv[p], acc[h * kScorePos + p]);
        }
    }
    alignas(64) float out[kScoreHeads * kScorePos];
    sum_block(acc, out);
#pragma GCC unroll 16
    for (int h = 0; h < NH; ++h)
#pragma GCC unroll 16
        for (int p = 0; p < kScorePos; ++p) s[h * kChunkLen + p] = out[h * kScorePos + p] * scale;
}

// o[h, d .. d + 16 ND) += sum_j p[h, j] * c[j, d ..], j in order.
template <int NH, int ND>
DC_INLINE void value_block(const float* p, const float* c, int width, int n_pos, float* o, int c_pad) {
    F acc[NH][ND];
#pragma GCC unroll 16
    for (int h = 0; h < NH; ++h)
#pragma GCC unroll 16
        for (int v = 0; v < ND; ++v) acc[h][v] = load(o + h * c_pad + 16 * v);
    for (int j = 0; j < n_pos; ++j) {
        F cv[ND];
#pragma GCC unroll 16
        for (int v = 0; v < ND; ++v) cv[v] = load(c + j * width + 16 * v);
#pragma GCC unroll 16
        for (int h = 0; h < NH; ++h) {
            const F pv = set1(p[h * kChunkLen + j]);
#pragma GCC unroll 16
            for (int v = 0; v < ND; ++v) acc[h][v] = fma(pv, cv[v], acc[h][v]);
        }
    }
#pragma GCC unroll 16
    for (int h = 0; h < NH; ++h)
#pragma GCC unroll 16
        for (int v = 0; v < ND; ++v) store(o + h * c_pad + 16 * v, acc[h][v]);
}

constexpr int kKeyPos = 8;               // positions converted at once for the scores
constexpr int kSlice = 16 * kValueVecs;  // dims converted at once for the values
static_assert(kKeyPos % kScorePos == 0 && kChunkLen % kKeyPos == 0 && kSlice % 32 == 0 && kSlice <= 64);

// The values of n_heads heads for ND vectors of dims.
template <int ND> void values(int n_heads, const float* p, const float* c, int stride, int n_pos, float* o, int c_pad) {
    int h = 0;
    for (; h + kValueHeads <= n_heads; h += kValueHeads)
        value_block<kValueHeads, ND>(p + h * kChunkLen, c, stride, n_pos, o + h * c_pad, c_pad);
    for (; h < n_heads; ++h) value_block<1, ND>(p + h * kChunkLen, c, stride, n_pos, o + h * c_pad, c_pad);
}

// One head's scores s [kChunkLen] of n_pos positions become probabilities; m, l and o [c_pad] follow the running maximum.
DC_INLINE void softmax_step(bool bf16, int n_pos, float* s, float& m, float& l, float* o, int c_pad) {
    const int n_vec = padded(n_pos, 16);
    for (int j = n_pos; j < n_vec; ++j) s[j] = kMinusInf;  // their probability is exactly 0
    F top = load(s);
    for (int j = 16; j < n_vec; j += 16) top = max(top, load(s + j));
    const float chunk_max = max_lane(top);
    const float m_new = chunk_max > m ? chunk_max : m;
    const float alpha = exp_neg(m - m_new);
    F total = set1(0);
    for (int j = 0; j < n_vec; j += 16) {
        F p = exp_neg(load(s + j) - set1(m_new));
        if (bf16) p = bf16_round(p);
        store(s + j, p);
        total = total + p;
    }
    l = l * alpha + sum(total);
    m = m_new;
    if (alpha != 1.0F)
        for (int d = 0; d < c_pad; d += 16) store(o + d, load(o + d) * set1(alpha));
}

void mla_partial(const MlaPartialArgs& a) noexcept {
    const int width = a.c_pad + a.r_pad;
    const bool bf16 = a.type == CacheType::kBF16;
    const auto address = (reinterpret_cast<uintptr_t>(a.scratch) + 63) & ~uintptr_t{63};
    float* keys = reinterpret_cast<float*>(address);                        // [kKeyPos, width]
    float* latents = keys + kKeyPos * width;                                // [kChunkLen, kSlice]
    float* scores = latents + kChunkLen * kSlice;                           // [n_rows, n_heads, kChunkLen]
    float* q_rounded = scores + int64_t{a.n_rows} * a.n_heads * kChunkLen;  // bf16: [n_rows, n_heads, width]
    const auto q_row = [&](int i) {
        return bf16 ? q_rounded + int64_t{i} * a.n_heads * width : a.q + i * a.q_row_stride;
    };
    const auto o_row = [&](int i) { return a.o + i * a.o_row_stride; };

    int end = a.pos_begin;
    for (int i = 0; i < a.n_rows; ++i) {
        end = a.row_end[i] > end ? a.row_end[i] : end;
        for (int h = 0; h < a.n_heads; ++h) {
            a.m[i * a.ml_row_stride + h] = kMinusInf;
            a.l[i * a.ml_row_stride + h] = 0;
        }
        for (int d = 0; d < a.n_heads * a.c_pad; d += 16) store(o_row(i) + d, set1(0));
        if (bf16)
            for (int64_t d = 0; d < int64_t{a.n_heads} * width; d += 16)
                store(q_rounded + int64_t{i} * a.n_heads * width + d, bf16_round(load(a.q + i * a.q_row_stride + d)));
    }
    // Every score block asks for its share of the positions that follow.
    const std::byte* stop = a.cache + end * a.row_bytes;
    const int64_t share =
        kKeyPos * a.row_bytes / (int64_t{a.n_rows} * a.n_heads / kScoreHeads * (kKeyPos / kScorePos) + 1);
    for (int begin = a.pos_begin; begin < end; begin += kChunkLen) {
        const std::byte* rows = a.cache + begin * a.row_bytes;
        const int filled = end - begin < kChunkLen ? end - begin : kChunkLen;
        const auto n_pos = [&](int i) { return a.row_end[i] - begin < filled ? a.row_end[i] - begin : filled; };

        for (int p0 = 0; p0 < filled; p0 += kKeyPos) {
            const std::byte* ahead = rows + (p0 + kKeyPos) * a.row_bytes;
            for (int j = 0; j < kKeyPos; ++j) {
                float* key = keys + j * width;
                if (p0 + j < filled) {
                    read_dims(a.type, rows + (p0 + j) * a.row_bytes, a.c_pad, 0, width,
                              [&](int d, F v) { store(key + d, v); });
                } else {  // read by the last score block, never used
                    for (int d = 0; d < width; d += 16) store(key + d, set1(0));
                }
            }
            for (int i = 0; i < a.n_rows; ++i) {
                const int n = n_pos(i) - p0 < kKeyPos ? n_pos(i) - p0 : kKeyPos;
                const float* q = q_row(i);
                float* s = scores + int64_t{i} * a.n_heads * kChunkLen + p0;
                int h = 0;
                for (; h + kScoreHeads <= a.n_heads; h += kScoreHeads)
                    for (int p = 0; p < n; p += kScorePos) {
                        score_block<kScoreHeads>(q + h * width, width, keys + p * width, a.softmax_scale,
                                                 s + h * kChunkLen + p);
                        for (int64_t b = 0; b < share && ahead < stop; b += 64, ahead += 64) prefetch(ahead);
                    }
                for (; h < a.n_heads; ++h)
                    for (int p = 0; p < n; p += kScorePos)
                        score_block<1>(q + h * width, width, keys + p * width, a.softmax_scale, s + h * kChunkLen + p);
            }
        }
        for (int i = 0; i < a.n_rows; ++i)
            for (int h = 0; h < a.n_heads && n_pos(i) > 0; ++h)
                softmax_step(bf16, n_pos(i), scores + (int64_t{i} * a.n_heads + h) * kChunkLen,
                             a.m[i * a.ml_row_stride + h], a.l[i * a.ml_row_stride + h],
                             o_row(i) + int64_t{h} * a.c_pad, a.c_pad);
        for (int d0 = 0; d0 < a.c_pad; d0 += kSlice) {
            const int n_dims = a.c_pad - d0 < kSlice ? a.c_pad - d0 : kSlice;
            for (int j = 0; j < filled; ++j)
                read_dims(a.type, rows + j * a.row_bytes, a.c_pad, d0, d0 + n_dims,
                          [&](int d, F v) { store(latents + j * kSlice + d, v); });
            for (int i = 0; i < a.n_rows; ++i) {
                if (n_pos(i) <= 0) continue;
                const float* p = scores + int64_t{i} * a.n_heads * kChunkLen;
                if (n_dims == kSlice) {
                    values<kValueVecs>(a.n_heads, p, latents, kSlice, n_pos(i), o_row(i) + d0, a.c_pad);
                } else {
                    for (int d = 0; d < n_dims; d += 16)
                        values<1>(a.n_heads, p, latents + d, kSlice, n_pos(i), o_row(i) + d0 + d, a.c_pad);
                }
            }
        }
    }
}

void mla_combine(const float* m, const float* l, int64_t ml_stride, const float* o, int64_t o_stride, int n_partials,
                 int c_pad, float* out) noexcept {
    float top = kMinusInf, total = 0;
    for (int p = 0; p < n_partials; ++p)
        if (l[p * ml_stride] != 0 && m[p * ml_stride] > top) top = m[p * ml_stride];
    for (int d = 0; d < c_pad; d += 16) store(out + d, set1(0));
    for (int p = 0; p < n_partials; ++p) {
        if (l[p * ml_stride] == 0) continue;
        const float weight = exp_neg(m[p * ml_stride] - top);
        total = total + l[p * ml_stride] * weight;
        for (int d = 0; d < c_pad; d += 16)
            store(out + d, fma(set1(weight), load(o + p * o_stride + d), load(out + d)));
    }
    if (total == 0) return;  // no position at all: zeros
    for (int d = 0; d < c_pad; d += 16) store(out + d, load(out + d) / set1(total));
}

}  // namespace
}  // namespace deepcalm
