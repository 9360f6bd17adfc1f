// The latent cache and absorbed attention over it (docs/model.md 4.1), on top of a SIMD layer.
//
// A chunk of 64 positions is converted to f32 once and serves as keys and as values of every row and head. Order of a
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

void cache_read(CacheType type, const std::byte* row, int c_pad, int r_pad, float* out) noexcept {
    const int width = c_pad + r_pad;
    if (type == CacheType::kF32) {
        for (int i = 0; i < width; i += 16) store(out + i, load(reinterpret_cast<const float*>(row) + i));
    } else if (type == CacheType::kBF16) {
        for (int i = 0; i < width; i += 16) store(out + i, load_bf16(row + 2 * i));
    } else if (type == CacheType::kF16) {
        for (int i = 0; i < width; i += 16) store(out + i, load_f16(row + 2 * i));
    } else {
        const std::byte* scales = row + c_pad;
        const std::byte* rope = scales + c_pad / 16;
        alignas(64) float d[16];
        for (int group = 0; group < c_pad / 32; group += 16) {
            const int n = c_pad / 32 - group < 16 ? c_pad / 32 - group : 16;
            alignas(64) uint16_t bits[16] = {};
            __builtin_memcpy(bits, scales + 2 * group, 2 * static_cast<size_t>(n));
            store(d, load_f16(bits));
            for (int g = 0; g < n; ++g) {
                const int i = 32 * (group + g);
                store(out + i, to_f(load_i8(row + i)) * set1(d[g]));
                store(out + i + 16, to_f(load_i8(row + i + 16)) * set1(d[g]));
            }
        }
        for (int i = 0; i < r_pad; i += 16) store(out + c_pad + i, load_f16(rope + 2 * i));
    }
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

// All heads for the dims d .. d + 16 ND: these columns of the chunk stay in the first-level cache.
template <int ND> void values(const MlaPartialArgs& a, const float* p, const float* c, int n_pos, float* o) {
    const int width = a.c_pad + a.r_pad;
    int h = 0;
    for (; h + kValueHeads <= a.n_heads; h += kValueHeads)
        value_block<kValueHeads, ND>(p + h * kChunkLen, c, width, n_pos, o + h * a.c_pad, a.c_pad);
    for (; h < a.n_heads; ++h) value_block<1, ND>(p + h * kChunkLen, c, width, n_pos, o + h * a.c_pad, a.c_pad);
}

// One row's heads against one converted chunk of n_pos positions (n_pos <= kChunkLen).
void attend_chunk(const MlaPartialArgs& a, const float* q, const float* chunk, int n_pos, float* scores, float* m,
                  float* l, float* o) {
    const int width = a.c_pad + a.r_pad;
    for (int p = 0; p < n_pos; p += kScorePos) {
        const float* k = chunk + p * width;
        int h = 0;
        for (; h + kScoreHeads <= a.n_heads; h += kScoreHeads)
            score_block<kScoreHeads>(q + h * width, width, k, a.softmax_scale, scores + h * kChunkLen + p);
        for (; h < a.n_heads; ++h) score_block<1>(q + h * width, width, k, a.softmax_scale, scores + h * kChunkLen + p);
    }

    const int n_vec = padded(n_pos, 16);
    for (int h = 0; h < a.n_heads; ++h) {
        float* s = scores + h * kChunkLen;
        for (int j = n_pos; j < n_vec; ++j) s[j] = kMinusInf;  // their probability is exactly 0
        F top = load(s);
        for (int j = 16; j < n_vec; j += 16) top = max(top, load(s + j));
        const float chunk_max = max_lane(top);
        const float m_new = chunk_max > m[h] ? chunk_max : m[h];
        const float alpha = exp_neg(m[h] - m_new);
        F total = set1(0);
        for (int j = 0; j < n_vec; j += 16) {
            F p = exp_neg(load(s + j) - set1(m_new));
            if (a.type == CacheType::kBF16) p = bf16_round(p);
            store(s + j, p);
            total = total + p;
        }
        l[h] = l[h] * alpha + sum(total);
        m[h] = m_new;
        if (alpha != 1.0F)
            for (int d = 0; d < a.c_pad; d += 16) store(o + h * a.c_pad + d, load(o + h * a.c_pad + d) * set1(alpha));
    }
    int d = 0;
    for (; d + 16 * kValueVecs <= a.c_pad; d += 16 * kValueVecs) values<kValueVecs>(a, scores, chunk + d, n_pos, o + d);
    for (; d < a.c_pad; d += 16) values<1>(a, scores, chunk + d, n_pos, o + d);
}

void mla_partial(const MlaPartialArgs& a) noexcept {
    const int width = a.c_pad + a.r_pad;
    const auto address = (reinterpret_cast<uintptr_t>(a.scratch) + 63) & ~uintptr_t{63};
    float* chunk = reinterpret_cast<float*>(address);            // [kChunkLen, width]
    float* scores = chunk + kChunkLen * width;                   // [n_heads, kChunkLen]
    float* q_rounded = scores + int64_t{a.n_heads} * kChunkLen;  // [n_heads, width], type bf16

    int end = a.pos_begin;
    for (int i = 0; i < a.n_rows; ++i) {
        end = a.row_end[i] > end ? a.row_end[i] : end;
        for (int h = 0; h < a.n_heads; ++h) {
            a.m[i * a.ml_row_stride + h] = kMinusInf;
            a.l[i * a.ml_row_stride + h] = 0;
            float* o = a.o + i * a.o_row_stride + int64_t{h} * a.c_pad;
            for (int d = 0; d < a.c_pad; d += 16) store(o + d, set1(0));
        }
    }
    for (int begin = a.pos_begin; begin < end; begin += kChunkLen) {
        const int filled = end - begin < kChunkLen ? end - begin : kChunkLen;
        for (int j = 0; j < filled; ++j)
            cache_read(a.type, a.cache + (begin + j) * a.row_bytes, a.c_pad, a.r_pad, chunk + j * width);
        for (int j = filled; j % kScorePos != 0; ++j)  // read by the last score block, never used
            for (int d = 0; d < width; d += 16) store(chunk + j * width + d, set1(0));
        for (int i = 0; i < a.n_rows; ++i) {
            int n_pos = a.row_end[i] - begin;
            if (n_pos <= 0) continue;
            if (n_pos > kChunkLen) n_pos = kChunkLen;
            const float* q = a.q + i * a.q_row_stride;
            if (a.type == CacheType::kBF16) {
                for (int d = 0; d < a.n_heads * width; d += 16) store(q_rounded + d, bf16_round(load(q + d)));
                q = q_rounded;
            }
            attend_chunk(a, q, chunk, n_pos, scores, a.m + i * a.ml_row_stride, a.l + i * a.ml_row_stride,
                         a.o + i * a.o_row_stride);
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
