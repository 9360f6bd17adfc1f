// The latent cache and split absorbed attention over it (docs/model.md 4.1).
//
// A chunk of 64 positions aligned to 0 gives a maximum, a sum and unnormalised values of its own, computed from zero; chunks
// merge in order into partials of 16, partials merge in order. So a row's bits depend on its own position only, and are
// the same whether a unit holds one chunk (merged by the stage of ValueArgs) or a whole partial (merged as it is walked).
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

DC_DEVICE int row_end(const PassRows& rows, int i, int ctx) { return min_int(*rows.pos + i + 1, ctx); }

// --- cache rows -----------------------------------------------------------------------------------------------------

DC_DEVICE float cache_value(const LatentCache& cache, const std::byte* row, int i) {
    const int c_pad = cache.c_pad;
    const auto* u16 = reinterpret_cast<const uint16_t*>(row);
    switch (cache.type) {
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
template <class Get> DC_DEVICE void cache_write(const LatentCache& cache, std::byte* row, Get&& get) {
    const CacheType type = cache.type;
    const int c_pad = cache.c_pad, r_pad = cache.r_pad;
    if (type == CacheType::kQ8) {
        auto* scale = reinterpret_cast<uint16_t*>(row + c_pad);
        for (int i = rt::thread(); i < c_pad; i += rt::threads()) {  // a warp is a group of 32
            const float v = get(i);
            const uint32_t h = rt::f16_bits(rt::from_bits(rt::max_lanes(magnitude(v))) / 127.0F);
            const float d = rt::f16_value(h), inv = d > 0 ? 1.0F / d : d;
            reinterpret_cast<int8_t*>(row)[i] = static_cast<int8_t>(i8_code(v * inv));
            if (rt::lane() == 0) scale[i / 32] = static_cast<uint16_t>(h);
        }
        for (int i = rt::thread(); i < r_pad; i += rt::threads())
            scale[c_pad / 32 + i] = static_cast<uint16_t>(rt::f16_bits(get(c_pad + i)));
        return;
    }
    for (int i = rt::thread(); i < c_pad + r_pad; i += rt::threads()) {
        const float v = get(i);
        if (type == CacheType::kF32) {
            reinterpret_cast<float*>(row)[i] = v;
        } else {
            reinterpret_cast<uint16_t*>(row)[i] =
                static_cast<uint16_t>(type == CacheType::kF16 ? rt::f16_bits(v) : bf16_bits(v));
        }
    }
}

// --- absorb: W_UK, rope, cache write --------------------------------------------------------------------------------

// What multiplies the query of a row.
DC_DEVICE float query_scale(const AbsorbArgs& a, int64_t row) {
    return a.query_scale ? a.query_scale[min_int(*a.rows.pos + static_cast<int>(row), a.cache.ctx - 1)] : 1.0F;
}

struct AbsorbPlan : HeadsPlan {
    const AbsorbArgs* a;
    DC_DEVICE Quad get(int head, int row, int, int p, int col) const {
        const int c = p * kSegment + col;
        Quad q = load4(a->q.row(row) + int64_t{head} * (a->dn + a->dr) + c, a->dn - c);
        for (float& v : q.v) v *= query_scale(*a, row);
        return q;
    }
    DC_DEVICE void finish(int head, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->r) a->q_full[(int64_t{row} * a->n_heads + head) * a->cache.width() + o] = v;
    }
};

// Component i of v [dr] rotated half-split: (a, b) -> (a cos - b sin, a sin + b cos).
DC_DEVICE float rotated(const float* v, const float* cos, const float* sin, int dr, int i) {
    const int half = dr / 2;
    if (i < half) return v[i] * cos[i] - v[half + i] * sin[i];
    return v[i - half] * sin[i - half] + v[i] * cos[i - half];
}

template <int NB> DC_DEVICE void stage(const AbsorbArgs& a, const Fit& fit) {
    const ProductSmem s = carve<NB>(fit);
    AbsorbPlan plan{{plan_of(a.rows, a.w_uk, a.w_uk.row_tiles), &a.w_uk}, &a};
    run<NB>(plan, own_units(a.n_heads * a.w_uk.row_tiles), s);

    const int n = live_rows(a.rows), pos = *a.rows.pos, width = a.cache.width(), half = a.dr / 2, dqk = a.dn + a.dr;
    // everything of q_full but the product: rotated q, zeros in the pads
    const int rest = width - a.r;
    for (int64_t e = rt::grid_thread(); e < int64_t{n} * a.n_heads * rest; e += rt::grid_threads()) {
        const int i = a.r + static_cast<int>(e % rest), k = i - a.cache.c_pad;
        const int64_t row_head = e / rest, row = row_head / a.n_heads, head = row_head % a.n_heads;
        const float* q = a.q.row(row) + head * dqk + a.dn;
        const int64_t at = min_int(pos + static_cast<int>(row), a.cache.ctx - 1);
        const float v = k >= 0 && k < a.dr ? rotated(q, a.cos + at * half, a.sin + at * half, a.dr, k) : 0.0F;
        a.q_full[row_head * width + i] = v * query_scale(a, row);
        if (a.q_tap.data && k >= 0 && k < a.dr) a.q_tap.row(row)[head * dqk + a.dn + k] = v * query_scale(a, row);
    }
    if (a.q_tap.data)
        for (int64_t e = rt::grid_thread(); e < int64_t{n} * a.n_heads * a.dn; e += rt::grid_threads()) {
            const int64_t row = e / a.dn / a.n_heads, i = e / a.dn % a.n_heads * dqk + e % a.dn;
            a.q_tap.row(row)[i] = a.q.row(row)[i] * query_scale(a, row);
        }
    for (int i = rt::block(); i < n && pos + i < a.cache.ctx; i += rt::blocks()) {
        const float* kv = a.kv.row(i);
        rms_rows(1, 1, a.r, a.eps, s.sum, s.inv, 1, [&](int) { return kv; });
        const float *cos = a.cos + int64_t{pos + i} * half, *sin = a.sin + int64_t{pos + i} * half;
        const auto value = [&](int c) {
            if (c < a.cache.c_pad) return c < a.r ? a.kv_norm[c] * (kv[c] * s.inv[0]) : 0.0F;
            return c - a.cache.c_pad < a.dr ? rotated(kv + a.r, cos, sin, a.dr, c - a.cache.c_pad) : 0.0F;
        };
        cache_write(a.cache, a.cache.row(pos + i), value);
        if (a.c_tap.data)
            for (int c = rt::thread(); c < a.r; c += rt::threads()) a.c_tap.row(i)[c] = value(c);
        if (a.k_tap.data)
            for (int c = rt::thread(); c < a.dr; c += rt::threads()) a.k_tap.row(i)[c] = value(a.cache.c_pad + c);
        rt::sync_block();
    }
}

// --- one chunk ------------------------------------------------------------------------------------------------------

struct AttendSmem {
    unsigned char *q_hi, *q_lo;      // [16][row16] f16 or bf16; f32 [16][width] at q_hi for the plain path
    unsigned char* k;                // [64][k_stride] columns [begin, begin + k_cols) of the chunk
    int k_cols, k_stride;            // k_stride: bytes
    unsigned char *p_hi, *p_lo;      // [16][kProbStride]
    float* s;                        // [16][kScoreStride] scores, then probabilities
    float* o;                        // [16][c_pad], units of several chunks; null: in part.o
    float *q_scale, *m, *l, *a, *b;  // [16] each
    uint64_t* bar;                   // [warps]
};
DC_DEVICE AttendSmem carve_attend(const Fit& fit, const AttendArgs& a) {
    AttendSmem s;
    const int row16 = 2 * a.cache.width() + 16;
    s.k_cols = a.columns(fit);
    s.k_stride = 2 * s.k_cols + 16;
    s.bar = reinterpret_cast<uint64_t*>(rt::dynamic_smem());
    s.q_scale = reinterpret_cast<float*>(rt::dynamic_smem() + align16(8 * int64_t{rt::warps()}));
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
    s.o =
        reinterpret_cast<float*>(a.mma() ? s.p_lo + kHeadRows * kProbStride : s.q_hi + kHeadRows * 4 * a.cache.width());
    if (a.part.chunks == 1 || fit.halves) s.o = nullptr;
    return s;
}

DC_DEVICE void split_f16(float v, uint16_t& hi, uint16_t& lo) {  // v as a sum of two
    const uint32_t u = rt::f16_bits(v);
    hi = static_cast<uint16_t>(u);
    lo = static_cast<uint16_t>(rt::f16_bits(v - rt::f16_value(u)));
}

// Queries of 16 heads into shared memory; heads past the last are zeros. Warps deal the heads.
DC_DEVICE void load_queries(const AttendArgs& a, const AttendSmem& s, const float* q, int heads) {
    const int width = a.cache.width(), row16 = 2 * width + 16, lane = rt::lane();
    for (int h = rt::warp(); h < kHeadRows; h += rt::warps()) {
        const float* x = q + int64_t{h} * width;
        const bool live = h < heads;
        if (a.cache.type == CacheType::kF32 || a.cache.type == CacheType::kQ8) {
            for (int i = lane; i < width; i += 32) reinterpret_cast<float*>(s.q_hi)[h * width + i] = live ? x[i] : 0.0F;
            continue;
        }
        F16Scale f{1, 1};
        if (a.cache.type == CacheType::kF16) {
            uint32_t top = 0;
            for (int i = lane; i < width; i += 32) top = max_of(top, live ? magnitude(x[i]) : 0);
            f = f16_scale(rt::max_lanes(top));
        }
        if (lane == 0) s.q_scale[h] = f.inverse;
        auto* hi = reinterpret_cast<uint16_t*>(s.q_hi + h * row16);
        auto* lo = reinterpret_cast<uint16_t*>(s.q_lo + h * row16);
        for (int i = lane; i < width; i += 32) {
            const float v = live ? x[i] * f.scale : 0.0F;
            if (a.cache.type == CacheType::kF16) {
                split_f16(v, hi[i], lo[i]);
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
    const int width = a.cache.width(), row16 = 2 * width + 16, q = rt::lane() % 4, g = rt::lane() / 4;
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
            if (a.cache.type == CacheType::kF16) {
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
    const int width = a.cache.width();
    const auto* q = reinterpret_cast<const float*>(s.q_hi);
    for (int u = rt::thread(); u < kHeadRows * kChunk; u += rt::threads()) {
        const int h = u / kChunk, j = u % kChunk;
        float c = 0;
        if (j < n_pos)
            for (int i = 0; i < width; ++i)
                c = rt::fma(q[h * width + i], cache_value(a.cache, k + j * a.cache.row_bytes, i), c);
        s.s[h * kScoreStride + j] = j < n_pos ? c * a.softmax_scale : rt::from_bits(0xff800000U);
    }
}

// Maximum, probabilities and their sum of each head; then the factors that merge the chunk into the unit.
DC_DEVICE void softmax_chunk(const AttendArgs& a, const AttendSmem& s, bool first) {
    const int lane = rt::lane();
    for (int h = rt::warp(); h < kHeadRows; h += rt::warps()) {
        float* row = s.s + h * kScoreStride;
        auto* hi = reinterpret_cast<uint16_t*>(s.p_hi + h * kProbStride);
        float v[2] = {row[lane], row[lane + 32]};
        const float m = rt::max_lanes(v[1] > v[0] ? v[1] : v[0]);
        float l = 0;
        for (int i = 0; i < 2; ++i) {
            v[i] = exp_neg(v[i] - m);
            if (a.cache.type == CacheType::kBF16) v[i] = bf16_round(v[i]);
            const int j = lane + 32 * i;
            if (a.cache.type == CacheType::kF16) {
                split_f16(v[i] * kProbScale, hi[j], reinterpret_cast<uint16_t*>(s.p_lo + h * kProbStride)[j]);
            } else if (a.cache.type == CacheType::kBF16) {
                hi[j] = static_cast<uint16_t>(bf16_bits(v[i]));
            } else {
                row[j] = v[i];
            }
            l += v[i];
        }
        l = rt::sum_lanes(l);
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
    for (int t = begin / 16 + rt::warp(); t < min_int(end, a.cache.c_pad) / 16; t += rt::warps()) {
        float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        for (int step = 0; step < kChunk / 16; ++step) {
            uint32_t v[4], w[4];
            rt::ldmatrix_x4_trans(v, s.k + (16 * step + lane / 8 % 2 * 8 + lane % 8) * s.k_stride +
                                         2 * (16 * t - begin + lane / 16 * 8));
            const uint32_t b0[2] = {v[0], v[1]}, b1[2] = {v[2], v[3]};
            fragment_a(w, s.p_hi, kProbStride, step);
            if (a.cache.type == CacheType::kF16) {
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
        const float scale = a.cache.type == CacheType::kF16 ? 1.0F / kProbScale : 1.0F;
        for (int i = 0; i < 4; ++i) {
            put(g + (i >> 1) * 8, 16 * t + 2 * q + (i & 1), c[0][i] * scale);
            put(g + (i >> 1) * 8, 16 * t + 8 + 2 * q + (i & 1), c[1][i] * scale);
        }
    }
}

template <class Put>
DC_DEVICE void values_plain(const AttendArgs& a, const AttendSmem& s, const std::byte* k, int n_pos, Put&& put) {
    for (int u = rt::thread(); u < kHeadRows * a.cache.c_pad; u += rt::threads()) {
        const int h = u / a.cache.c_pad, i = u % a.cache.c_pad;
        float c = 0;
        for (int j = 0; j < n_pos; ++j)
            c = rt::fma(s.s[h * kScoreStride + j], cache_value(a.cache, k + j * a.cache.row_bytes, i), c);
        put(h, i, c);
    }
}

// --- the unit -------------------------------------------------------------------------------------------------------

DC_DEVICE void attend_unit(const AttendArgs& a, const AttendSmem& s, int row, int group, int unit, int& phase) {
    const int end = row_end(a.rows, row, a.cache.ctx), begin = unit * a.part.chunks * kChunk;
    if (begin >= end) return;  // the same for the whole block
    const int width = a.cache.width(), heads = min_int(kHeadRows, a.part.n_heads - group * kHeadRows);
    const bool mma = a.mma();
    const int parts = mma ? ceil_to(width, s.k_cols) : 1;
    const int64_t slot = a.part.slot(row, unit, group * kHeadRows);
    const int warp = rt::warp(), per = ceil_to(kChunk, rt::warps());
    float* out = s.o ? s.o : a.part.o + slot * a.cache.c_pad;
    load_queries(a, s, a.q_full + (int64_t{row} * a.part.n_heads + group * kHeadRows) * width, heads);
    for (int c = 0; c < a.part.chunks && begin + c * kChunk < end; ++c) {
        const int pos = begin + c * kChunk, n_pos = min_int(kChunk, end - pos);
        const std::byte* k = a.cache.row(pos);
        const auto load = [&](int first, int last) {  // columns of the chunk into s.k
            const int r0 = warp * per, n = min_int(per, n_pos - r0);
            rt::copy_rows_start(s.k + r0 * s.k_stride, s.k_stride,
                                reinterpret_cast<const unsigned char*>(k) + r0 * a.cache.row_bytes + 2 * first,
                                a.cache.row_bytes, 2 * (last - first), n, s.bar + warp);
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
            float* o = out + h * a.cache.c_pad + i;  // the same thread's in every chunk
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
        for (int i = rt::thread(); i < heads * a.cache.c_pad; i += rt::threads())
            a.part.o[slot * a.cache.c_pad + i] = s.o[i];
    for (int h = rt::thread(); h < heads; h += rt::threads()) {
        a.part.ml[2 * (slot + h)] = s.m[h];
        a.part.ml[2 * (slot + h) + 1] = s.l[h];
    }
    rt::sync_block();
}

template <int NB> DC_DEVICE void stage(const AttendArgs& a, const Fit& fit) {
    const AttendSmem s = carve_attend(fit, a);
    rt::copy_open(s.bar + rt::warp());
    rt::dependency_wait();
    const int n = live_rows(a.rows), groups = ceil_to(a.part.n_heads, kHeadRows);
    const int units =
        n > 0 ? ceil_to(row_end(a.rows, n - 1, a.cache.ctx), kChunk * a.part.chunks) : 0;  // of the longest row
    int phase = 0;
    for (int64_t u = rt::block(); u < int64_t{units} * n * groups; u += rt::blocks())
        attend_unit(a, s, static_cast<int>(u / groups % n), static_cast<int>(u % groups),
                    static_cast<int>(u / groups / n), phase);
    rt::copy_close(s.bar + rt::warp());
}

// --- value: partials merged, W_UV -----------------------------------------------------------------------------------

struct ValuePlan : HeadsPlan {
    const ValueArgs* a;
    float* factor = nullptr;  // [max_rows][factors][2]: of the chunks, from `partials` on of the partials
    float* total = nullptr;   // [max_rows] sum of probabilities
    float* latent = nullptr;  // [max_rows][c_pad]
    int factors = 0, partials = 0;
    DC_DEVICE Quad get(int, int, int j, int p, int col) const {
        const int c = p * kSegment + col;
        return load4(latent + j * a->part.c_pad + c, a->w_uv.cols - c);
    }
    DC_DEVICE void finish(int head, int unit, int r, int row, float v, float) const {
        const int o = unit * kTileRows + r;
        if (o < a->dv) a->v.row(row)[int64_t{head} * a->dv + o] = v;
    }

    // Factors of row j (this warp's): (a, b) of every chunk inside its partial, then of every partial.
    DC_DEVICE void merge_factors(int row, int j, int head) const {
        const int lane = rt::lane(), end = row_end(a->rows, row, a->ctx);
        const int units = ceil_to(end, kChunk * a->part.chunks), n_partials = ceil_to(end, kChunk * kPartialChunks);
        float* f = factor + 2 * j * factors;
        const int64_t slot = a->part.slot(row, 0, head);
        float m = 0, l = 0;
        for (int p = 0; p < n_partials; ++p) {
            float m1, l1;
            if (a->part.chunks > 1) {
                const float* ml = a->part.ml + 2 * (slot + int64_t{p} * a->part.n_heads);
                m1 = ml[0];
                l1 = ml[1];
            } else {
                const int u = p * kPartialChunks + lane, n = min_int(kPartialChunks, units - p * kPartialChunks);
                const float* ml =
                    a->part.ml + 2 * (slot + int64_t{lane < n ? u : p * kPartialChunks} * a->part.n_heads);
                const float mine = ml[0], sum = ml[1];
                float top = mine;  // running maximum up to this chunk
                for (int k = 1; k < kPartialChunks; k *= 2) {
                    const float other = rt::shfl(top, lane - k < 0 ? lane : lane - k);
                    if (lane >= k && other > top) top = other;
                }
                const float before = rt::shfl(top, lane > 0 ? lane - 1 : 0);
                const float fa = lane == 0 ? 0.0F : exp_neg(before - top), fb = lane == 0 ? 1.0F : exp_neg(mine - top);
                if (lane < n) {
                    f[2 * u] = fa;
                    f[2 * u + 1] = fb;
                }
                m1 = rt::shfl(top, n - 1);
                l1 = rt::shfl(sum, 0);
                for (int k = 1; k < n; ++k) l1 = rt::fma(rt::shfl(sum, k), rt::shfl(fb, k), l1 * rt::shfl(fa, k));
            }
            const Merge r = p == 0 ? Merge{m1, l1, 0, 1} : merge_stats(m, l, m1, l1);
            m = r.m;
            l = r.l;
            if (lane == 0) {
                f[2 * (partials + p)] = r.a;
                f[2 * (partials + p) + 1] = r.b;
            }
        }
        if (lane == 0) total[j] = l;
    }

    DC_DEVICE void rows_start(const Group& g, int rows, const ProductSmem&) const {
        for (int j = rt::warp(); j < rows; j += rt::warps()) merge_factors(g.row0 + j, j, g.problem);
        rt::sync_block();
        for (int e = rt::thread(); e < rows * a->part.c_pad; e += rt::threads()) {
            const int j = e / a->part.c_pad, c = e % a->part.c_pad, row = g.row0 + j,
                      end = row_end(a->rows, row, a->ctx);
            const int units = ceil_to(end, kChunk * a->part.chunks), per = kPartialChunks / a->part.chunks;
            const float* f = factor + 2 * j * factors;
            const float* o = a->part.o + a->part.slot(row, 0, g.problem) * a->part.c_pad + c;
            float v = 0;
            for (int u = 0; u < units;) {
                const int p = u / per, stop = min_int(u + per, units);
                float part = o[int64_t{u} * a->part.n_heads * a->part.c_pad];
                for (++u; u < stop; ++u)
                    part = merge_value(part, f[2 * u], o[int64_t{u} * a->part.n_heads * a->part.c_pad], f[2 * u + 1]);
                const float* fp = f + 2 * (partials + p);
                v = p == 0 ? part : merge_value(v, fp[0], part, fp[1]);
            }
            latent[e] = v / total[j];
            if (a->latent_tap.data && g.unit == 0 && c < a->w_uv.cols)
                a->latent_tap.row(row)[int64_t{g.problem} * a->w_uv.cols + c] = latent[e];
        }
        rt::sync_block();
    }
};

template <int NB> DC_DEVICE void stage(const ValueArgs& a, const Fit& fit) {
    const ProductSmem s = carve<1>(fit);
    ValuePlan plan{{plan_of(a.rows, a.w_uv, a.w_uv.row_tiles), &a.w_uv}, &a};
    plan.factors = a.factors();
    plan.partials = a.part.chunks == 1 ? a.part.max_units : 0;
    plan.max_rows = min_int(a.rows.n, fit.value_rows);
    plan.latent = reinterpret_cast<float*>(s.end);
    plan.factor = plan.latent + plan.max_rows * a.part.c_pad;
    plan.total = plan.factor + 2 * plan.max_rows * plan.factors;
    run<1>(plan, own_units(a.part.n_heads * a.w_uv.row_tiles), s);
}

}  // namespace deepcalm::gpu
