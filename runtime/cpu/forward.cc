// The forward pass, CPU transcription. Every thread of the pool runs it from top to bottom; a barrier ends each stage.
// Sections: embed, attention, dense FFN, MoE, layer, main pass, MTP pass. docs/model.md section 3; the numpy
// transcription is python/deepcalm/check/reference.py, and taps of the same names compare the two.
//
// Law L1: a row's bits depend on its own history only. Rows, tiles, heads and experts are dealt to threads in any way that
// is convenient, by arrival too; sums never are: each output element is computed by one thread in the order its kernel fixes.
#include "runtime/cpu/engine.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace deepcalm {
namespace {

// Least pieces of a product that a thread takes: row tiles that a kernel reads side by side, pairs of a gate and an up one.
constexpr int kDealtTiles = 4, kDealtPairs = 2;
// Bytes to read a layer, row and thread below which all threads never pay: stages of a few microseconds.
constexpr int64_t kLittle = 512 << 10;
constexpr int kKeepRows = 4 * kSplitRows;  // buffers of so many rows stay

class Pass {
  public:
    Pass(CpuEngine& e, const PassArgs& a, int tid)
        : a_(a), s_(e.buffers), backend_(e.backend), model_(backend_.model), c_(model_.cfg), w_(model_.weights),
          k_(backend_.kernels), cache_(a.mtp() ? e.mtp_cache : e.cache), pool_(*backend_.pool),
          clock_(s_.clocks[static_cast<size_t>(tid)]), tid_(tid), threads_(pool_.active()), n_(a.n()),
          d_(c_.hidden_size), heads_(c_.num_attention_heads) {}

    void run_main() {
        const Range rows = split(n_, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) embed(a_.ids[static_cast<size_t>(i)], x_row(i));
        end(Stage::kEmbed);
        tap("embed", s_.x, {d_}, d_stride());
        for (int i = 0; i < c_.num_hidden_layers; ++i) {
            if (a_.trace.on()) prefix_ = "layers." + std::to_string(i) + ".";
            layer(w_.layers[static_cast<size_t>(i)], i);
        }
        prefix_.clear();
        head(w_.head, w_.final_norm);
    }

    // docs/model.md 6.1: z = eh_proj [norm(embed(t_next)); norm(h)], a decoder layer with its own cache, own final norm.
    void run_mtp() {
        prefix_ = "mtp.";
        const Range rows = split(n_, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) {
            float* eh = s_.eh.row(i);
            embed(a_.ids[static_cast<size_t>(i)], s_.h.row(i));
            k_.rmsnorm(s_.h.row(i), w_.mtp_enorm, eh, d_, c_.rms_norm_eps);
            k_.rmsnorm(a_.hidden + int64_t{i} * d_, w_.mtp_hnorm, eh + d_, d_, c_.rms_norm_eps);
            prepare(s_.eh, i, {&w_.mtp_eh_proj});
        }
        read_floats(2 * d_);
        end(Stage::kEmbed);
        product(w_.mtp_eh_proj, s_.eh, s_.out, d_stride(), [&](Range tiles) {
            for (int i = 0; i < n_; ++i) copy_tiles(s_.out + i * d_stride(), x_row(i), tiles);
        });
        end(Stage::kEhProj);
        tap("embed", s_.x, {d_}, d_stride());
        layer(w_.mtp_layer, 0);
        head(w_.draft_head(), w_.mtp_final_norm);
    }

  private:
    // ---- helpers ---------------------------------------------------------------------------------------------------

    // All threads meet; the time since the last meeting is charged to the stage, this thread's waiting apart.
    void meet(Stage stage) const {
        StageClock::Sum& sum = clock_.stage[static_cast<int>(stage)];
        const int64_t arrived = threads_ > 1 ? now_ns() : 0;
        pool_.barrier();
        const int64_t left = now_ns();
        if (threads_ > 1) sum.wait_ns += left - arrived;
        sum.ns += left - clock_.mark;
        sum.bytes += clock_.bytes;
        clock_.mark = left;
        clock_.bytes = 0;
        clock_.last = stage;
    }
    void end(Stage stage) const {
        meet(stage);
        clock_.stage[static_cast<int>(stage)].calls += 1;
    }
    // n f32 weights (norms, biases) that every thread reads: counted once.
    void read_floats(int64_t n) const {
        if (tid_ == 0) clock_.bytes += 4 * n;
    }

    int64_t d_stride() const { return s_.h.stride(); }
    float* x_row(int64_t i) const { return s_.x + i * d_stride(); }

    static bool needs(std::initializer_list<const PackedTensor*> readers, ActKind kind) {
        return std::any_of(readers.begin(), readers.end(),
                           [&](const PackedTensor* t) { return t->rows > 0 && info(t->format).act == kind; });
    }
    // Rounds row i of a site for the weights that will read it. The f32 form is the site itself.
    void prepare(const ActSite& site, int64_t i, std::initializer_list<const PackedTensor*> readers) const {
        for (const ActKind kind : {ActKind::kBF16, ActKind::kI8}) {
            if (needs(readers, kind)) {
                k_.prepare[static_cast<int>(kind)](site.row(i), site.cols, site.kind[static_cast<int>(kind)], i);
            }
        }
    }

    // Rows first, first + step, ... of a site as the activation operand for `t`.
    static Activation operand(const ActSite& site, const PackedTensor& t, int64_t first, int64_t step) {
        const ActKind kind = info(t.format).act;
        Activation x = site.kind[static_cast<int>(kind)];
        const int64_t offset = first * x.stride;
        switch (kind) {
        case ActKind::kF32: x.x = static_cast<float*>(x.x) + offset; break;
        case ActKind::kBF16: x.x = static_cast<uint16_t*>(x.x) + offset; break;
        case ActKind::kI8:
            x.x = static_cast<int8_t*>(x.x) + offset;
            x.d += offset / kTileCols;
            x.sum += offset / kTileCols;
            break;
        }
        x.stride *= step;
        return x;
    }

    // Bytes of row tiles of one slice; a row of scale blocks belongs to its first tile.
    static int64_t tile_bytes(const PackedTensor& t, Range tiles) {
        const int64_t bytes = (tiles.end - tiles.begin) * t.row_tile_bytes();
        if (t.scales == nullptr) return bytes;
        const int64_t per = t.scale_rows / kTileRows;
        return bytes + 4 * (ceil_div(tiles.end, per) - ceil_div(tiles.begin, per)) * ceil_div(t.cols, t.scale_cols);
    }

    // y: where the first tile of the range goes.
    void matmul(const PackedTensor& t, int slice, Range tiles, const ActSite& site, int n, float* y, int64_t y_stride,
                int64_t first = 0, int64_t step = 1, const int32_t* rows = nullptr) const {
        if (tiles.begin >= tiles.end || n == 0) return;
        clock_.bytes += tile_bytes(t, tiles);
        k_.matmul[static_cast<int>(t.format)]({.w = &t,
                                               .slice = slice,
                                               .tile_begin = tiles.begin,
                                               .tile_end = tiles.end,
                                               .x = operand(site, t, first, step),
                                               .x_row = rows,
                                               .n = n,
                                               .y = y,
                                               .y_stride = y_stride,
                                               .one_stream = backend_.policy.one_stream});
    }
    // A plain product over all rows of the pass; then(tiles) where row tiles of y are done.
    template <class Fn>
    void product(const PackedTensor& t, const ActSite& site, float* y, int64_t y_stride, Fn&& then) const {
        pool_.deal(t.row_tiles(), std::clamp(t.row_tiles() / threads_, 1, kDealtTiles), [&](Range tiles) {
            matmul(t, 0, tiles, site, n_, y + 16 * int64_t{tiles.begin}, y_stride);
            then(tiles);
        });
    }
    void product(const PackedTensor& t, const ActSite& site, float* y, int64_t y_stride) const {
        product(t, site, y, y_stride, [](Range) {});
    }
    // fn(slice, parts) for the slices that a range of n_slices x per_slice parts, counted through, touches.
    template <class Fn> static void each_slice(Range range, int per_slice, Fn&& fn) {
        for (int u = range.begin; u < range.end;) {
            const int slice = u / per_slice, begin = u % per_slice;
            const int end = std::min(per_slice, begin + range.end - u);
            fn(slice, Range{begin, end});
            u += end - begin;
        }
    }
    // Every head's matrix times its vectors of a block of rows, read once a pass as counted; head h's y is head_step on.
    void product_of_heads(const PackedTensor& t, const ActSite& site, Range block, float* y, int64_t head_step,
                          int64_t y_stride) const {
        const int n = block.end - block.begin;
        pool_.deal(heads_ * t.row_tiles(), kDealtTiles, [&](Range range) {
            each_slice(range, t.row_tiles(), [&](int h, Range tiles) {
                matmul(t, h, tiles, site, n, y + h * head_step + 16 * int64_t{tiles.begin}, y_stride, h, heads_);
            });
        });
        if (block.begin > 0) clock_.bytes = 0;
    }
    // Columns of `tiles` that exist in a vector of hidden_size.
    Range columns(Range tiles) const { return {std::min(16 * tiles.begin, d_), std::min(16 * tiles.end, d_)}; }
    void copy_tiles(const float* src, float* dst, Range tiles) const {
        const Range c = columns(tiles);
        std::copy(src + c.begin, src + c.end, dst + c.begin);
    }
    void add_tiles(const float* src, float* dst, Range tiles) const {
        const Range c = columns(tiles);
        for (int j = c.begin; j < c.end; ++j) dst[j] += src[j];
    }

    void add_residual(Range tiles) const {
        for (int i = 0; i < n_; ++i) add_tiles(s_.out + i * d_stride(), x_row(i), tiles);
    }

    template <class T> void tap(const char* name, const T* src, std::vector<int64_t> dims, int64_t stride) const {
        if (!a_.trace.on()) return;
        pool_.barrier();
        if (tid_ == 0) a_.trace.record(prefix_ + name, src, n_, std::move(dims), stride);
        pool_.barrier();
    }

    void embed(int32_t id, float* out) const {
        const PlainTensor& t = w_.embed;
        const std::byte* row = t.data + id * t.row_bytes();
        clock_.bytes += t.row_bytes();
        if (t.format == Format::kF32) {
            std::memcpy(out, row, static_cast<size_t>(d_) * 4);
            return;
        }
        for (int j = 0; j < d_; ++j) {
            uint16_t v;
            std::memcpy(&v, row + 2 * int64_t{j}, 2);
            out[j] = t.format == Format::kBF16 ? bf16_to_f32(v) : f16_to_f32(v);
        }
    }

    // ---- attention -------------------------------------------------------------------------------------------------

    void attention(const LayerWeights& w, int layer_idx) {
        const int dr = c_.qk_rope_head_dim, r = c_.kv_lora_rank;
        const Range rows = split(n_, tid_, threads_);
        const bool q_lora = c_.q_lora_rank > 0;
        const int64_t qkv_stride = c_.qkv_a_stride();

        for (int i = rows.begin; i < rows.end; ++i) {
            k_.rmsnorm(x_row(i), w.attn_norm, s_.h.row(i), d_, c_.rms_norm_eps);
            prepare(s_.h, i, {&w.wqkv_a});
        }
        read_floats(d_);
        end(Stage::kAttnNorm);
        tap("attn_norm", s_.h.f32, {d_}, d_stride());

        product(w.wqkv_a, s_.h, s_.qkv_a, qkv_stride);
        end(Stage::kQkvA);

        // latent norms, key rotation, cache write; the cache row is what every later reader sees, this pass included
        for (int i = rows.begin; i < rows.end; ++i) {
            const int pos = a_.pos + i;
            float* kv = s_.qkv_a + i * qkv_stride + c_.kv_offset();
            float* c_kv = s_.c_kv + int64_t{i} * r;
            float* k_rope = s_.k_rope + int64_t{i} * dr;
            k_.rmsnorm(kv, w.kv_a_norm, c_kv, r, kLatentNormEps);
            std::copy(kv + r, kv + r + dr, k_rope);
            model_.rope.fill(pos, cos_.data(), sin_.data());
            k_.rope(k_rope, cos_.data(), sin_.data(), dr / 2);
            k_.cache_write(cache_.type, c_kv, r, k_rope, dr, cache_.row(layer_idx, pos));
            s_.row_end[i] = pos + 1;
            if (q_lora) {
                k_.rmsnorm(s_.qkv_a + i * qkv_stride, w.q_a_norm, s_.q_a.row(i), c_.q_lora_rank, kLatentNormEps);
                prepare(s_.q_a, i, {&w.wq_b});
            }
        }
        read_floats(int64_t{r} + c_.q_lora_rank);
        end(Stage::kLatent);
        tap("c_kv", s_.c_kv, {r}, r);
        tap("k_rope", s_.k_rope, {dr}, dr);
        if (q_lora) {
            tap("q_a", s_.q_a.f32, {c_.q_lora_rank}, s_.q_a.stride());
            product(w.wq_b, s_.q_a, s_.q, c_.q_stride());
            end(Stage::kQB);
        }

        for (int i = 0; i < n_; i += s_.head_rows) head_block(w, layer_idx, {i, std::min(i + s_.head_rows, n_)});

        product(w.wo, s_.attn_v, s_.out, d_stride(), [&](Range tiles) { add_residual(tiles); });
        end(Stage::kWo);
        tap("attn_out", s_.out, {d_}, d_stride());
    }

    // From queries to values, for a block of rows: what all heads have of a row are the widest buffers.
    void head_block(const LayerWeights& w, int layer_idx, Range block) {
        const int n = block.end - block.begin, r = c_.kv_lora_rank, dv = c_.v_head_dim;
        const int dn = c_.qk_nope_head_dim, dr = c_.qk_rope_head_dim, dqk = dn + dr;
        const int64_t v_pad = round_up(dv, kTileRows), q_stride = c_.q_stride(), q_full = c_.q_full_width();
        const auto done = [&](Stage stage) { block.end == n_ ? end(stage) : meet(stage); };

        // rotate query heads; nope parts become operands of W_UK, rope parts stand beside its output
        const Range row_heads = split(int64_t{n} * heads_, tid_, threads_);
        for (int u = row_heads.begin; u < row_heads.end; ++u) {
            const int i = block.begin + u / heads_, h = u % heads_;
            float* q = s_.q + i * q_stride + int64_t{h} * dqk;
            if (u == row_heads.begin || h == 0) model_.rope.fill(a_.pos + i, cos_.data(), sin_.data());
            k_.rope(q + dn, cos_.data(), sin_.data(), dr / 2);
            std::copy(q, q + dn, s_.q_nope.row(u));
            prepare(s_.q_nope, u, {&w.w_uk});
            std::copy(q + dn, q + dqk, s_.q_full + u * q_full + c_.c_pad());
        }
        done(Stage::kQRope);
        tap_heads("q", s_.q + block.begin * q_stride, q_stride, dqk, n, dqk);

        product_of_heads(w.w_uk, s_.q_nope, block, s_.q_full, q_full, heads_ * q_full);
        done(Stage::kWUk);
        tap_heads("q_absorbed", s_.q_full, heads_ * q_full, q_full, n, r);

        latent_attention(w, layer_idx, block);
        done(Stage::kAttention);
        const int64_t stride = s_.attn_latent.stride();
        tap_heads("attn_latent", s_.attn_latent.f32, heads_ * stride, stride, n, r);

        product_of_heads(w.w_uv, s_.attn_latent, block, s_.uv_tmp, s_.head_rows * v_pad, v_pad);
        meet(Stage::kWUv);
        const Range rows = split(n, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) {
            for (int h = 0; h < heads_; ++h) {
                const float* v = s_.uv_tmp + (int64_t{h} * s_.head_rows + i) * v_pad;
                std::copy(v, v + dv, s_.attn_v.row(block.begin + i) + int64_t{h} * dv);
            }
            prepare(s_.attn_v, block.begin + i, {&w.wo});
        }
        done(Stage::kWUv);
    }

    // One vector of r per head of a block's n rows; all blocks' make [n_, heads, r].
    void tap_heads(const char* name, const float* src, int64_t row_stride, int64_t head_stride, int n, int r) {
        if (!a_.trace.on()) return;
        pool_.barrier();
        std::vector<float>& v = taps_[name];
        for (int64_t u = 0; u < int64_t{n} * heads_ && tid_ == 0; ++u) {
            const float* p = src + u / heads_ * row_stride + u % heads_ * head_stride;
            v.insert(v.end(), p, p + r);
        }
        if (v.size() == static_cast<size_t>(n_) * heads_ * r) {
            a_.trace.record(prefix_ + name, v.data(), n_, {heads_, r}, int64_t{heads_} * r);
            v.clear();
        }
        pool_.barrier();
    }

    // docs/model.md 4.1 over the cache: partials of kPartialLen positions, combined in order. Passes of up to kSplitRows
    // rows deal partials to threads, which meet in shared memory; longer ones deal whole (row block, head block) units.
    void latent_attention(const LayerWeights& w, int layer_idx, Range block) {
        const int c_pad = c_.c_pad();
        const int64_t q_full = c_.q_full_width();
        MlaPartialArgs m{.type = cache_.type,
                         .cache = cache_.layer(layer_idx),
                         .row_bytes = cache_.row_bytes,
                         .c_pad = c_pad,
                         .r_pad = c_.r_pad(),
                         .q_row_stride = heads_ * q_full,
                         .softmax_scale = model_.rope.softmax_scale,
                         .scratch = s_.mla_scratch[static_cast<size_t>(tid_)],
                         .bf16_dot = backend_.policy.bf16_dot};
        // Rows [i0, i1) x heads [h0, h1) x partial p; (row, head) goes to slot + (row - i0) * row_stride + (head - h0).
        // Meanwhile rows of partial `next` are asked for, which this thread is likely to come to then.
        const auto partial = [&](int i0, int i1, int h0, int h1, int p, int next, int64_t slot, int64_t row_stride) {
            for (int i = i0; i < i1; ++i)
                ends_[static_cast<size_t>(i - i0)] = std::min(s_.row_end[i], (p + 1) * kPartialLen);
            const float* q = s_.q_full + (int64_t{i0 - block.begin} * heads_ + h0) * q_full;
            m.same_q = q == m.q && i1 - i0 == m.n_rows && h1 - h0 == m.n_heads;
            m.n_rows = i1 - i0;
            m.n_heads = h1 - h0;
            m.q = q;
            m.pos_begin = p * kPartialLen;
            const int next_pos = next * kPartialLen;
            m.next = next_pos + kChunkLen <= s_.row_end[i0] ? m.cache + next_pos * m.row_bytes : nullptr;
            m.row_end = ends_.data();
            m.m = s_.part_m + slot;
            m.l = s_.part_l + slot;
            m.ml_row_stride = row_stride;
            m.o = s_.part_o + slot * c_pad;
            m.o_row_stride = row_stride * c_pad;
            k_.mla_partial(m);
            // A cache row counts once, where the last row of the pass meets the first heads: it sees all of them.
            const int64_t seen = ends_[static_cast<size_t>(i1 - 1 - i0)] - m.pos_begin;
            if (h0 == 0 && i1 == n_) clock_.bytes += std::max<int64_t>(seen, 0) * m.row_bytes;
        };
        const auto combine = [&](int i, int h, int64_t slot, int64_t partial_stride) {
            const int64_t u = int64_t{i - block.begin} * heads_ + h;
            k_.mla_combine(s_.part_m + slot, s_.part_l + slot, partial_stride, s_.part_o + slot * c_pad,
                           partial_stride * c_pad, static_cast<int>(ceil_div(s_.row_end[i], kPartialLen)), c_pad,
                           s_.attn_latent.row(u));
            prepare(s_.attn_latent, u, {&w.w_uv});
        };
        if (n_ <= kSplitRows) {
            // Whole partials in full rounds; the heads of what is left are split, so that every thread has work.
            const int n_partials = static_cast<int>(ceil_div(s_.row_end[n_ - 1], kPartialLen));
            const int whole = s_.row_end[0] / kPartialLen / threads_ * threads_;
            const int head_blocks = std::min(heads_, threads_);
            pool_.deal(whole + (n_partials - whole) * head_blocks, 1, [&](Range range) {
                for (int u = range.begin; u < range.end; ++u) {
                    const int v = u - whole, p = v < 0 ? u : whole + v / head_blocks;
                    const Range h = v < 0 ? Range{0, heads_} : split(heads_, v % head_blocks, head_blocks);
                    const int next = p + (u + 1 < range.end ? 1 : threads_);
                    partial(0, n_, h.begin, h.end, p, next, int64_t{p} * n_ * heads_ + h.begin, heads_);
                }
            });
            meet(Stage::kAttention);
            const Range row_heads = split(int64_t{n_} * heads_, tid_, threads_);
            for (int u = row_heads.begin; u < row_heads.end; ++u)
                combine(u / heads_, u % heads_, u, int64_t{n_} * heads_);
            return;
        }
        constexpr int64_t kBlock = int64_t{kAttnRowBlock} * kAttnHeadBlock;
        const int64_t base = tid_ * s_.max_partials * kBlock;
        const int row_blocks = static_cast<int>(ceil_div(block.end - block.begin, kAttnRowBlock));
        const int head_blocks = static_cast<int>(ceil_div(heads_, kAttnHeadBlock));
        pool_.deal(row_blocks * head_blocks, 1, [&](Range range) {
            for (int u = range.begin; u < range.end; ++u) {
                const int i0 = block.begin + u / head_blocks * kAttnRowBlock,
                          i1 = std::min(i0 + kAttnRowBlock, block.end);
                const int h0 = u % head_blocks * kAttnHeadBlock, h1 = std::min(h0 + kAttnHeadBlock, heads_);
                const int n_partials = static_cast<int>(ceil_div(s_.row_end[i1 - 1], kPartialLen));
                for (int p = 0; p < n_partials; ++p)
                    partial(i0, i1, h0, h1, p, p + 1, base + p * kBlock, kAttnHeadBlock);
                for (int i = i0; i < i1; ++i) {
                    for (int h = h0; h < h1; ++h) combine(i, h, base + (i - i0) * kAttnHeadBlock + (h - h0), kBlock);
                }
            }
        });
    }

    // ---- dense FFN -------------------------------------------------------------------------------------------------

    // Gate and up tiles [2*pairs.begin, 2*pairs.end) of one matrix, then silu(gate) * up for the same columns: a few at a
    // time, so that they wait in the second-level cache.
    void gate_up(const PackedTensor& t, int slice, Range pairs, const ActSite& in, const int32_t* rows, int n,
                 const ActSite& out, int64_t out_first) const {
        if (n == 0) return;
        const int at_once = kPairsAtOnce * (s_.max_rows / n);
        const int64_t stride = 2 * kTileRows * int64_t{at_once};
        float* tmp = s_.gate_up[static_cast<size_t>(tid_)];  // [n, stride]
        for (int begin = pairs.begin; begin < pairs.end; begin += at_once) {
            const int end = std::min(begin + at_once, pairs.end);
            matmul(t, slice, {2 * begin, 2 * end}, in, n, tmp, stride, 0, 1, rows);
            const int col = 16 * begin, cols = std::min(16 * end, out.cols) - col;
            for (int i = 0; i < n; ++i) k_.swiglu(tmp + i * stride, out.row(out_first + i) + col, cols);
        }
    }

    void norm_ffn_input(const LayerWeights& w) {
        const Range rows = split(n_, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) {
            k_.rmsnorm(x_row(i), w.ffn_norm, s_.h.row(i), d_, c_.rms_norm_eps);
            prepare(s_.h, i, {&w.w_gate_up, &w.experts_gate_up, &w.shared_gate_up});
        }
        read_floats(d_);
        end(Stage::kFfnNorm);
        tap("ffn_norm", s_.h.f32, {d_}, d_stride());
    }

    void dense_ffn(const LayerWeights& w) {
        norm_ffn_input(w);
        pool_.deal(w.w_gate_up.row_tiles() / 2, kDealtPairs,
                   [&](Range pairs) { gate_up(w.w_gate_up, 0, pairs, s_.h, nullptr, n_, s_.ffn_h, 0); });
        meet(Stage::kFfnUp);
        const Range rows = split(n_, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) prepare(s_.ffn_h, i, {&w.w_down});
        end(Stage::kFfnUp);
        product(w.w_down, s_.ffn_h, s_.out, d_stride(), [&](Range tiles) { add_residual(tiles); });
        end(Stage::kFfnDown);
        tap("ffn_out", s_.out, {d_}, d_stride());
    }

    // ---- MoE -------------------------------------------------------------------------------------------------------

    void moe(const LayerWeights& w) {
        norm_ffn_input(w);
        product(w.router, s_.h, s_.gate_logits, c_.gate_logits_stride());
        end(Stage::kRouter);
        tap("gate_logits", s_.gate_logits, {c_.n_routed_experts}, c_.gate_logits_stride());

        const int k = c_.num_experts_per_tok;
        const Range rows = split(n_, tid_, threads_);
        RouterArgs router = c_.router(w.router_bias);
        router.scratch = s_.route_scratch + tid_ * (2 * int64_t{c_.n_routed_experts} + c_.n_group);
        for (int i = rows.begin; i < rows.end; ++i) {
            router.gate_logits = s_.gate_logits + i * c_.gate_logits_stride();
            router.topk_idx = s_.topk_idx + int64_t{i} * k;
            router.topk_weight = s_.topk_weight + int64_t{i} * k;
            route(router);
        }
        if (w.router_bias != nullptr) read_floats(c_.n_routed_experts);
        meet(Stage::kRoute);
        tap("topk_idx", s_.topk_idx, {k}, k);
        tap("topk_weight", s_.topk_weight, {k}, k);
        if (tid_ == 0) group_rows_by_expert();
        end(Stage::kRoute);

        // up: every touched expert once for all its rows, then the shared expert, as one list of tile pairs
        const int pairs = w.experts_gate_up.row_tiles() / 2, shared_pairs = w.shared_gate_up.row_tiles() / 2;
        const int routed_pairs = static_cast<int>(s_.touched.size()) * pairs;
        pool_.deal(routed_pairs + shared_pairs, kDealtPairs, [&](Range range) {
            each_slice({range.begin, std::min(range.end, routed_pairs)}, pairs, [&](int slice, Range p) {
                const ExpertRows& e = s_.touched[static_cast<size_t>(slice)];
                gate_up(w.experts_gate_up, e.expert, p, s_.h, s_.slot_row + e.begin, e.end - e.begin, s_.expert_h,
                        e.begin);
            });
            const Range p{std::max(range.begin - routed_pairs, 0), range.end - routed_pairs};
            gate_up(w.shared_gate_up, 0, p, s_.h, nullptr, n_, s_.shared_h, 0);
        });
        meet(Stage::kExpertsUp);
        const Range slots = split(int64_t{n_} * k, tid_, threads_);
        for (int i = slots.begin; i < slots.end; ++i) prepare(s_.expert_h, i, {&w.experts_down});
        if (shared_pairs > 0) {
            for (int i = rows.begin; i < rows.end; ++i) prepare(s_.shared_h, i, {&w.shared_down});
        }
        end(Stage::kExpertsUp);

        // down, by output columns: experts in ascending order, then the shared expert, then the residual
        const auto routed = [&](Range tiles) {
            const int64_t col = 16 * int64_t{tiles.begin};
            const int cols = 16 * (tiles.end - tiles.begin);
            for (int i = 0; i < n_; ++i) std::fill_n(s_.out + i * d_stride() + col, cols, 0.0F);
            for (const ExpertRows& e : s_.touched) {
                matmul(w.experts_down, e.expert, tiles, s_.expert_h, e.end - e.begin, s_.expert_out + col, d_stride(),
                       e.begin);
                for (int slot = e.begin; slot < e.end; ++slot) {
                    k_.axpy(s_.slot_weight[slot], s_.expert_out + (slot - e.begin) * d_stride() + col,
                            s_.out + s_.slot_row[slot] * d_stride() + col, cols);
                }
            }
        };
        const auto shared = [&](Range tiles) {
            if (shared_pairs > 0) {
                float* y = s_.expert_out + 16 * int64_t{tiles.begin};
                matmul(w.shared_down, 0, tiles, s_.shared_h, n_, y, d_stride());
                for (int i = 0; i < n_; ++i) add_tiles(s_.expert_out + i * d_stride(), s_.out + i * d_stride(), tiles);
            }
            add_residual(tiles);
        };
        const int tiles = static_cast<int>(ceil_div(d_, kTileRows));
        if (a_.trace.on()) {
            pool_.deal(tiles, kDealtTiles, routed);
            tap("routed_out", s_.out, {d_}, d_stride());
            pool_.deal(tiles, kDealtTiles, shared);
        } else {
            pool_.deal(tiles, kDealtTiles, [&](Range t) {
                routed(t);
                shared(t);
            });
        }
        end(Stage::kExpertsDown);
        if (shared_pairs > 0) tap("shared_out", s_.expert_out, {d_}, d_stride());
    }

    // Counting sort of the pass's (row, expert) pairs by expert; rows stay in order inside an expert. Thread 0 only.
    void group_rows_by_expert() const {
        const int k = c_.num_experts_per_tok;
        s_.touched.clear();
        int slot = 0;
        if (n_ == 1) {  // already ascending
            for (; slot < k; ++slot) {
                s_.slot_row[slot] = 0;
                s_.slot_weight[slot] = s_.topk_weight[slot];
                s_.touched.push_back({s_.topk_idx[slot], slot, slot + 1});
            }
        } else {
            std::vector<int>& count = expert_count_;
            count.assign(static_cast<size_t>(c_.n_routed_experts) + 1, 0);
            for (int i = 0; i < n_ * k; ++i) ++count[static_cast<size_t>(s_.topk_idx[i]) + 1];
            for (int e = 0; e < c_.n_routed_experts; ++e) {
                const int begin = count[static_cast<size_t>(e)], m = count[static_cast<size_t>(e) + 1];
                if (m > 0) s_.touched.push_back({e, begin, begin + m});
                count[static_cast<size_t>(e) + 1] += begin;
            }
            for (int i = 0; i < n_ * k; ++i) {
                const int at = count[static_cast<size_t>(s_.topk_idx[i])]++;
                s_.slot_row[at] = i / k;
                s_.slot_weight[at] = s_.topk_weight[i];
            }
        }
        if (!a_.mtp() && n_ <= kMaxRound) {
            for (int i = 0; i < n_ * k; ++i)
                s_.pass_experts.push_back(layer_idx_ * c_.n_routed_experts + s_.topk_idx[i]);
        }
        a_.stats.experts_touched += static_cast<int64_t>(s_.touched.size());
    }

    // ---- layer, head -----------------------------------------------------------------------------------------------

    void layer(const LayerWeights& w, int layer_idx) {
        layer_idx_ = layer_idx;
        attention(w, layer_idx);
        if (w.moe) {
            moe(w);
        } else {
            dense_ffn(w);
        }
        tap("layer_out", s_.x, {d_}, d_stride());
    }

    // Final norm of every row (MTP reads all of them); logits for the last n_logits rows.
    void head(const PackedTensor& w, const float* norm) {
        const Range rows = split(n_, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) {
            k_.rmsnorm(x_row(i), norm, s_.final_h.row(i), d_, c_.rms_norm_eps);
            if (i >= n_ - a_.n_logits) prepare(s_.final_h, i, {&w});
        }
        read_floats(d_);
        end(Stage::kFinalNorm);
        tap("final_norm", s_.final_h.f32, {d_}, d_stride());
        if (a_.n_logits == 0) return;
        const int64_t stride = c_.logits_stride();
        pool_.deal(w.row_tiles(), kDealtTiles, [&](Range tiles) {
            float* y = a_.logits + 16 * int64_t{tiles.begin};
            matmul(w, 0, tiles, s_.final_h, a_.n_logits, y, stride, n_ - a_.n_logits);
        });
        end(Stage::kHead);
        if (a_.trace.on() && tid_ == 0)
            a_.trace.record(prefix_ + "logits", a_.logits, a_.n_logits, {c_.vocab_size}, stride);
    }

    const PassArgs& a_;
    Buffers& s_;
    const CpuBackend& backend_;
    const BoundModel& model_;
    const ModelConfig& c_;
    const ModelWeights& w_;
    const CpuKernels& k_;
    const KvCache& cache_;
    ThreadPool& pool_;
    StageClock& clock_;
    const int tid_, threads_, n_, d_, heads_;
    int layer_idx_ = 0;
    std::string prefix_;
    std::vector<float> cos_ = std::vector<float>(static_cast<size_t>(c_.qk_rope_head_dim / 2)), sin_ = cos_;
    std::vector<int32_t> ends_ = std::vector<int32_t>(static_cast<size_t>(std::max(kSplitRows, kAttnRowBlock)));
    mutable std::vector<int> expert_count_;
    std::map<std::string, std::vector<float>> taps_;  // of the blocks so far
};

}  // namespace

Result<PassResult> CpuEngine::forward(const PassArgs& args) {
    const BoundModel& model = backend.model;
    const int n = args.n();
    // The buffers of a long pass, 0.4 MB a row in V2-Lite, are given back before decoding: nothing in them is read again.
    if (n <= kSplitRows && touched_rows > kKeepRows) {
        buffers.memory.release();
        touched_rows = 0;
    }
    touched_rows = std::max(touched_rows, n);
    buffers.pass_experts.clear();
    std::vector<StageClock>& clocks = buffers.clocks;
    ThreadPool& pool = *backend.pool;
    PassStats& stats = args.stats;
    const int64_t work = n * model.active_bytes(args.pos + n, cache.row_bytes);
    const bool little = work < kLittle * pool.size() * model.cfg.num_hidden_layers;
    ThreadChoice& choice = backend.choice;
    const int kind = std::min(n, ThreadChoice::kLong) + (args.mtp() ? ThreadChoice::kKinds / 2 : 0);
    const int64_t begin = now_ns(), experts_touched = stats.experts_touched;
    Status ran = pool.run(
        [&](int tid) {
            clocks[static_cast<size_t>(tid)] = {.mark = begin};
            Pass pass(*this, args, tid);
            args.mtp() ? pass.run_mtp() : pass.run_main();
        },
        backend.adaptive && (little || choice.alone(kind)));
    if (!ran.ok()) {
        stats.experts_touched = experts_touched;
        return Error{ran.error().code, "a pass of " + std::to_string(n) + " tokens: " + ran.error().message};
    }
    const int64_t end = now_ns();
    StageClock& first = clocks[0];
    int64_t read = 0, waited = 0;
    first.stage[static_cast<int>(first.last)].ns += end - first.mark;  // until the pool has come to rest
    for (int i = 0; i < kNumStages; ++i) {
        StageStats& sum = stats.stages[args.mtp()][i];
        int64_t bytes = 0, wait_sum = 0, wait_max = 0;
        for (const StageClock& clock : std::span(clocks).first(static_cast<size_t>(pool.active()))) {
            bytes += clock.stage[i].bytes;
            wait_sum += clock.stage[i].wait_ns;
            wait_max = std::max(wait_max, clock.stage[i].wait_ns);
        }
        sum.calls += first.stage[i].calls;
        sum.bytes += bytes;
        sum.seconds += 1e-9 * static_cast<double>(first.stage[i].ns);
        sum.wait_sum += 1e-9 * static_cast<double>(wait_sum);
        sum.wait_max += 1e-9 * static_cast<double>(wait_max);
        read += bytes;
        waited += wait_sum;
        (static_cast<Stage>(i) == Stage::kAttention ? stats.cache_bytes : stats.weight_bytes) += bytes;
    }
    if (backend.adaptive && !little && !args.trace.on()) {
        const auto ns = static_cast<double>(end - begin);
        choice.ran(kind, ns / static_cast<double>(n < ThreadChoice::kLong ? read : n),
                   static_cast<double>(waited) / (pool.active() * ns), [&] { return crowded(pool.size() - 1); });
    }
    stats.seconds += 1e-9 * static_cast<double>(end - begin);
    return PassResult{n, {buffers.final_h.f32, buffers.final_h.stride()}, buffers.pass_experts};
}

}  // namespace deepcalm
