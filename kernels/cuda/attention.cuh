// The latent cache and split absorbed attention over it (docs/model.md 4.1).
//
// A chunk of 64 positions aligned to 0 gives a maximum, a sum and unnormalised values of its own, computed from zero; chunks
// merge in order into partials of 16, partials merge in order. So a row's bits depend on its own position only, and are
// the same whether a unit holds one chunk (merged by stage_value) or a whole partial (merged as it is walked).
// f16 cache: tensor cores with f32-like operands, queries and probabilities as sums of two f16 (22 bits). bf16 cache: both
// rounded to bf16. f32 and q8 caches: plain fused multiply-adds.
#pragma once

#include "kernels/cuda/product.cuh"

namespace deepcalm::gpu {

constexpr float kProbScale = 4096.0F;  // keeps the low halves of probabilities normal in f16

// (m, l) of what came before and of what comes next; a, b: factors of both sides.
struct Merge {
    float m, l, a, b;
};
DC_DEVICE Merge merge_stats(float m0, float l0, float m1, float l1) {
    Merge r;
    r.m = m1 > m0 ? m1 : m0;
    r.a = exp_neg(m0 - r.m);
    r.b = exp_neg(m1 - r.m);
    r.l = rt::fma(l1, r.b, l0 * r.a);
    return r;
}
DC_DEVICE float merge_value(float before, float a, float next, float b) { return rt::fma(next, b, before * a); }

DC_DEVICE int row_end(const Rows& rows, int i, int ctx) { return min_int(*rows.pos + i + 1, ctx); }

// --- cache rows -----------------------------------------------------------------------------------------------------

DC_DEVICE float cache_value(CacheType type, const std::byte* row, int c_pad, int i) {
    const auto* u16 = reinterpret_cast<const uint16_t*>(row);
    switch (type) {
    case CacheType::kF32: return reinterpret_cast<const float*>(row)[i];
    case CacheType::kF16: return rt::f16_value(u16[i]);
    case CacheType::kBF16: return bf16_value(u16[i]);
    case CacheType::kQ8: break;
    }
    const auto* scale = reinterpret_cast<const uint16_t*>(row + c_pad);
    if (i < c_pad) return static_cast<float>(reinterpret_cast<const int8_t*>(row)[i]) * rt::f16_value(scale[i / 32]);
    return rt::f16_value(scale[c_pad / 32 + i - c_pad]);
}

// One cache row by the whole block: get(i) is value i of latent | rope, zero in the pads.
template <class Get> DC_DEVICE void cache_write(CacheType type, std::byte* row, int c_pad, int r_pad, Get&& get) {
    const int width = c_pad + r_pad;
    if (type == CacheType::kQ8) {
        auto* scale = reinterpret_cast<uint16_t*>(row + c_pad);
        for (int i = rt::thread(); i < c_pad; i += rt::threads()) {  // a warp is a group of 32
            const float v = get(i);
            uint32_t top = rt::bits(v) & 0x7fffffffU;
            for (int m = 1; m < 32; m *= 2) {
                const uint32_t u = rt::shfl_xor(top, m);
                top = u > top ? u : top;
            }
            const uint32_t h = rt::f16_bits(rt::from_bits(top) / 127.0F);
            const float d = rt::f16_value(h), inv = d > 0 ? 1.0F / d : d;
            float c = v * inv;
            c = c > -127.0F ? c : -127.0F;
            c = c < 127.0F ? c : 127.0F;
            reinterpret_cast<int8_t*>(row)[i] = static_cast<int8_t>(static_cast<int32_t>(rt::rint(c)));
            if (rt::lane() == 0) scale[i / 32] = static_cast<uint16_t>(h);
        }
        for (int i = rt::thread(); i < r_pad; i += rt::threads())
            scale[c_pad / 32 + i] = static_cast<uint16_t>(rt::f16_bits(get(c_pad + i)));
        return;
    }
    for (int i = rt::thread(); i < width; i += rt::threads()) {
        const float v = get(i);
        if (type == CacheType::kF32) {
            reinterpret_cast<float*>(row)[i] = v;
        } else {
            reinterpret_cast<uint16_t*>(row)[i] =
                static_cast<uint16_t>(type == CacheType::kF16 ? rt::f16_bits(v) : bf16_bits(v));
        }
    }
}

// --- one chunk ------------------------------------------------------------------------------------------------------

constexpr int kHeadRows = 16;                 // heads of a unit: the 16 rows of the mma
constexpr int kScoreStride = kChunk + 4;      // f32
constexpr int kProbStride = 2 * kChunk + 16;  // bytes

struct AttendSmem {
    unsigned char *q_hi, *q_lo;      // [16][row16] f16 or bf16; f32 [16][width] at q_hi for the plain path
    unsigned char* k;                // [64][k_stride] columns [begin, begin + k_cols) of the chunk
    int k_cols, k_stride;            // k_stride: bytes
    unsigned char *p_hi, *p_lo;      // [16][kProbStride]
    float* s;                        // [16][kScoreStride] scores, then probabilities
    float* o;                        // [16][c_pad], units of several chunks; null: in part_o
    float *q_scale, *m, *l, *a, *b;  // [16] each
    uint64_t* bar;                   // [warps]
};
DC_DEVICE AttendSmem carve_attend(const Smem& smem, const AttendArgs& a) {
    AttendSmem s;
    const int width = a.c_pad + a.r_pad, row16 = 2 * width + 16;
    s.k_cols = attend_columns(a, smem.fit);
    s.k_stride = 2 * s.k_cols + 16;
    s.bar = reinterpret_cast<uint64_t*>(smem.at);
    s.q_scale = reinterpret_cast<float*>(smem.at + align16(8 * int64_t{rt::warps()}));
    s.m = s.q_scale + kHeadRows;
    s.l = s.m + kHeadRows;
    s.a = s.l + kHeadRows;
    s.b = s.a + kHeadRows;
    s.s = s.b + kHeadRows;
    s.q_hi = reinterpret_cast<unsigned char*>(s.s + kHeadRows * kScoreStride);
    s.q_lo = s.q_hi + kHeadRows * row16;
    s.k = s.q_lo + kHeadRows * row16;
    s.p_hi = s.k + kChunk * s.k_stride;
    s.p_lo = s.p_hi + kHeadRows * kProbStride;
    s.o = reinterpret_cast<float*>(attend_mma(a) ? s.p_lo + kHeadRows * kProbStride : s.q_hi + kHeadRows * 4 * width);
    if (a.unit_chunks == 1 || smem.fit.halves) s.o = nullptr;
    return s;
}

// Queries of 16 heads into shared memory; heads past the last are zeros. Warps deal the heads.
DC_DEVICE void load_queries(const AttendArgs& a, const AttendSmem& s, const float* q, int heads) {
    const int width = a.c_pad + a.r_pad, row16 = 2 * width + 16, lane = rt::lane();
    for (int h = rt::warp(); h < kHeadRows; h += rt::warps()) {
        const float* x = q + int64_t{h} * width;
        const bool live = h < heads;
        if (a.type == CacheType::kF32 || a.type == CacheType::kQ8) {
            for (int i = lane; i < width; i += 32) reinterpret_cast<float*>(s.q_hi)[h * width + i] = live ? x[i] : 0.0F;
            continue;
        }
        float scale = 1.0F;
        if (a.type == CacheType::kF16) {
            uint32_t top = 0;
            for (int i = lane; i < width; i += 32) {
                const uint32_t u = live ? rt::bits(x[i]) & 0x7fffffffU : 0;
                top = u > top ? u : top;
            }
            for (int m = 1; m < 32; m *= 2) {
                const uint32_t u = rt::shfl_xor(top, m);
                top = u > top ? u : top;
            }
            const int k = min_int(14 + 127 - static_cast<int>(top >> 23), 126);
            scale = rt::from_bits(static_cast<uint32_t>(127 + k) << 23);
            if (lane == 0) s.q_scale[h] = rt::from_bits(static_cast<uint32_t>(127 - k) << 23);
        } else if (lane == 0) {
            s.q_scale[h] = 1.0F;
        }
        auto* hi = reinterpret_cast<uint16_t*>(s.q_hi + h * row16);
        auto* lo = reinterpret_cast<uint16_t*>(s.q_lo + h * row16);
        for (int i = lane; i < width; i += 32) {
            const float v = live ? x[i] * scale : 0.0F;
            if (a.type == CacheType::kF16) {
                const uint32_t u = rt::f16_bits(v);
                hi[i] = static_cast<uint16_t>(u);
                lo[i] = static_cast<uint16_t>(rt::f16_bits(v - rt::f16_value(u)));
            } else {
                hi[i] = static_cast<uint16_t>(bf16_bits(v));
            }
        }
    }
}

// A fragment of rows g, g + 8 and columns 16 * step ...
DC_DEVICE void fragment_a(uint32_t (&a)[4], const unsigned char* rows, int stride, int step) {
    const int q = rt::lane() % 4, g = rt::lane() / 4;
    const auto* top = reinterpret_cast<const uint32_t*>(rows + g * stride) + 8 * step + q;
    const auto* bottom = reinterpret_cast<const uint32_t*>(rows + (g + 8) * stride) + 8 * step + q;
    a[0] = top[0];
    a[1] = bottom[0];
    a[2] = top[4];
    a[3] = bottom[4];
}

// Scores over columns [begin, end), which s.k holds, added to those of the columns before.
DC_DEVICE void scores_mma(const AttendArgs& a, const AttendSmem& s, int begin, int end, int n_pos) {
    const int width = a.c_pad + a.r_pad, row16 = 2 * width + 16, q = rt::lane() % 4, g = rt::lane() / 4;
    for (int t = rt::warp(); t < kChunk / 8; t += rt::warps()) {
        float c[4] = {0, 0, 0, 0};
        float* score = s.s + g * kScoreStride + 8 * t + 2 * q;  // c[i]: head g + i / 2 * 8, position 8 t + 2 q + i % 2
        if (begin > 0)
            for (int i = 0; i < 4; ++i) c[i] = score[(i >> 1) * 8 * kScoreStride + (i & 1)];
        for (int step = begin / 16; step < end / 16; ++step) {
            const auto* k =
                reinterpret_cast<const uint32_t*>(s.k + (8 * t + g) * s.k_stride) + 8 * step - begin / 2 + q;
            const uint32_t b[2] = {k[0], k[4]};
            uint32_t w[4];
            fragment_a(w, s.q_hi, row16, step);
            if (a.type == CacheType::kF16) {
                rt::mma_f16(c, w, b);
                fragment_a(w, s.q_lo, row16, step);
                rt::mma_f16(c, w, b);
            } else {
                rt::mma_bf16(c, w, b);
            }
        }
        for (int i = 0; i < 4; ++i) {
            const int h = g + (i >> 1) * 8, j = 8 * t + 2 * q + (i & 1);
            const float v = j < n_pos ? c[i] * s.q_scale[h] * a.softmax_scale : rt::from_bits(0xff800000U);
            score[(i >> 1) * 8 * kScoreStride + (i & 1)] = end < width ? c[i] : v;
        }
    }
}

DC_DEVICE void scores_plain(const AttendArgs& a, const AttendSmem& s, const std::byte* k, int n_pos) {
    const int width = a.c_pad + a.r_pad;
    const auto* q = reinterpret_cast<const float*>(s.q_hi);
    for (int u = rt::thread(); u < kHeadRows * kChunk; u += rt::threads()) {
        const int h = u / kChunk, j = u % kChunk;
        float c = 0;
        if (j < n_pos)
            for (int i = 0; i < width; ++i)
                c = rt::fma(q[h * width + i], cache_value(a.type, k + j * a.row_bytes, a.c_pad, i), c);
        s.s[h * kScoreStride + j] = j < n_pos ? c * a.softmax_scale : rt::from_bits(0xff800000U);
    }
}

// Maximum, probabilities and their sum of each head; then the factors that merge the chunk into the unit.
DC_DEVICE void softmax_chunk(const AttendArgs& a, const AttendSmem& s, bool first) {
    const int lane = rt::lane();
    for (int h = rt::warp(); h < kHeadRows; h += rt::warps()) {
        float* row = s.s + h * kScoreStride;
        float v[2] = {row[lane], row[lane + 32]};
        float m = v[1] > v[0] ? v[1] : v[0];
        for (int k = 16; k > 0; k /= 2) {
            const float other = rt::shfl_xor(m, k);
            m = other > m ? other : m;
        }
        float l = 0;
        for (int i = 0; i < 2; ++i) {
            v[i] = exp_neg(v[i] - m);
            if (a.type == CacheType::kBF16) v[i] = bf16_round(v[i]);
            const int j = lane + 32 * i;
            if (a.type == CacheType::kF16) {
                const float p = v[i] * kProbScale;
                const uint32_t u = rt::f16_bits(p);
                reinterpret_cast<uint16_t*>(s.p_hi + h * kProbStride)[j] = static_cast<uint16_t>(u);
                reinterpret_cast<uint16_t*>(s.p_lo + h * kProbStride)[j] =
                    static_cast<uint16_t>(rt::f16_bits(p - rt::f16_value(u)));
            } else if (a.type == CacheType::kBF16) {
                reinterpret_cast<uint16_t*>(s.p_hi + h * kProbStride)[j] = static_cast<uint16_t>(bf16_bits(v[i]));
            } else {
                row[j] = v[i];
            }
            l += v[i];
        }
        for (int k = 16; k > 0; k /= 2) l += rt::shfl_xor(l, k);
        if (lane == 0) {
            const Merge r = first ? Merge{m, l, 0, 1} : merge_stats(s.m[h], s.l[h], m, l);
            s.m[h] = r.m;
            s.l[h] = r.l;
            s.a[h] = r.a;
            s.b[h] = r.b;
        }
    }
}

// value(head, column) of the chunk goes to put(head, column, value), for the columns [begin, end) that s.k holds.
template <class Put>
DC_DEVICE void values_mma(const AttendArgs& a, const AttendSmem& s, int begin, int end, Put&& put) {
    const int lane = rt::lane(), q = lane % 4, g = lane / 4;
    for (int t = begin / 16 + rt::warp(); t < min_int(end, a.c_pad) / 16; t += rt::warps()) {
        float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        for (int step = 0; step < kChunk / 16; ++step) {
            uint32_t v[4], w[4];
            rt::ldmatrix_x4_trans(v, s.k + (16 * step + lane / 8 % 2 * 8 + lane % 8) * s.k_stride +
                                         2 * (16 * t - begin + lane / 16 * 8));
            const uint32_t b0[2] = {v[0], v[1]}, b1[2] = {v[2], v[3]};
            fragment_a(w, s.p_hi, kProbStride, step);
            if (a.type == CacheType::kF16) {
                rt::mma_f16(c[0], w, b0);
                rt::mma_f16(c[1], w, b1);
                fragment_a(w, s.p_lo, kProbStride, step);
                rt::mma_f16(c[0], w, b0);
                rt::mma_f16(c[1], w, b1);
            } else {
                rt::mma_bf16(c[0], w, b0);
                rt::mma_bf16(c[1], w, b1);
            }
        }
        const float scale = a.type == CacheType::kF16 ? 1.0F / kProbScale : 1.0F;
        for (int i = 0; i < 4; ++i) {
            put(g + (i >> 1) * 8, 16 * t + 2 * q + (i & 1), c[0][i] * scale);
            put(g + (i >> 1) * 8, 16 * t + 8 + 2 * q + (i & 1), c[1][i] * scale);
        }
    }
}

template <class Put>
DC_DEVICE void values_plain(const AttendArgs& a, const AttendSmem& s, const std::byte* k, int n_pos, Put&& put) {
    for (int u = rt::thread(); u < kHeadRows * a.c_pad; u += rt::threads()) {
        const int h = u / a.c_pad, i = u % a.c_pad;
        float c = 0;
        for (int j = 0; j < n_pos; ++j)
            c = rt::fma(s.s[h * kScoreStride + j], cache_value(a.type, k + j * a.row_bytes, a.c_pad, i), c);
        put(h, i, c);
    }
}

// --- the unit -------------------------------------------------------------------------------------------------------

DC_DEVICE void attend_unit(const AttendArgs& a, const AttendSmem& s, int row, int group, int unit, int& phase) {
    const int end = row_end(a.rows, row, a.ctx), begin = unit * a.unit_chunks * kChunk;
    if (begin >= end) return;  // the same for the whole block
    const int width = a.c_pad + a.r_pad, heads = min_int(kHeadRows, a.n_heads - group * kHeadRows);
    const bool mma = attend_mma(a);
    const int parts = mma ? ceil_to(width, s.k_cols) : 1;
    const int64_t slot = (int64_t{row} * a.max_units + unit) * a.n_heads + group * kHeadRows;
    const int warp = rt::warp(), per = ceil_to(kChunk, rt::warps());
    float* out = s.o ? s.o : a.part_o + slot * a.c_pad;
    load_queries(a, s, a.q_full + (int64_t{row} * a.n_heads + group * kHeadRows) * width, heads);
    for (int c = 0; c < a.unit_chunks && begin + c * kChunk < end; ++c) {
        const int pos = begin + c * kChunk, n_pos = min_int(kChunk, end - pos);
        const std::byte* k = a.cache + pos * a.row_bytes;
        const auto load = [&](int first, int last) {  // columns of the chunk into s.k
            const int r0 = warp * per, n = min_int(per, n_pos - r0);
            rt::copy_rows_start(s.k + r0 * s.k_stride, s.k_stride,
                                reinterpret_cast<const unsigned char*>(k) + r0 * a.row_bytes + 2 * first, a.row_bytes,
                                2 * (last - first), n, s.bar + warp);
            for (int i = n_pos * s.k_stride / 4 + rt::thread(); i < kChunk * s.k_stride / 4; i += rt::threads())
                reinterpret_cast<uint32_t*>(s.k)[i] = 0;  // positions past the row's end may hold anything
            if (n > 0 || !rt::kBulk) rt::copy_wait<0>(s.bar + warp, phase);
            if (n > 0) phase ^= 1;
        };
        for (int p = 0; p < parts; ++p) {
            const int first = p * s.k_cols, last = min_int(first + s.k_cols, width);
            if (mma) load(first, last);
            rt::sync_block();
            if (mma) {
                scores_mma(a, s, first, last, n_pos);
            } else {
                scores_plain(a, s, k, n_pos);
            }
            rt::sync_block();
        }
        softmax_chunk(a, s, c == 0);
        rt::sync_block();
        const auto put = [&](int h, int i, float v) {
            if (h >= heads) return;
            float* o = out + h * a.c_pad + i;  // the same thread's in every chunk
            *o = c == 0 ? v : merge_value(*o, s.a[h], v, s.b[h]);
        };
        if (!mma) values_plain(a, s, k, n_pos, put);
        for (int p = mma ? parts - 1 : -1; p >= 0; --p) {  // the last part is still there
            const int first = p * s.k_cols, last = min_int(first + s.k_cols, width);
            if (p < parts - 1) {
                rt::sync_block();
                load(first, last);
                rt::sync_block();
            }
            values_mma(a, s, first, last, put);
        }
        rt::sync_block();
    }
    if (s.o)
        for (int i = rt::thread(); i < heads * a.c_pad; i += rt::threads()) a.part_o[slot * a.c_pad + i] = s.o[i];
    for (int h = rt::thread(); h < heads; h += rt::threads()) {
        a.part_ml[2 * (slot + h)] = s.m[h];
        a.part_ml[2 * (slot + h) + 1] = s.l[h];
    }
    rt::sync_block();
}

}  // namespace deepcalm::gpu
