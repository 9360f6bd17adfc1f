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
#include <stdexcept>

namespace deepcalm {
namespace {

// Least pieces of a product that a thread takes: row tiles that a kernel reads side by side, pairs of a gate and an up one.
constexpr int kDealtTiles = 4, kDealtPairs = 2;
// Bytes to read a layer, row and thread below which all threads never pay: stages of a few microseconds.
constexpr int64_t kLittle = 512 << 10;
constexpr int kKeepRows = 4 * kSplitRows;  // buffers of so many rows stay
constexpr int kKeepPasses = 8;             // and those of more, until so many passes did without them

class Pass {
  public:
    Pass(CpuBackend& b, const PassArgs& a, int tid)
        : a_(a), s_(b.buffers), c_(b.model.cfg), w_(b.model.weights), k_(b.kernels), rope_(b.model.rope),
          policy_(b.policy), pool_(*b.pool), clock_(s_.clocks[static_cast<size_t>(tid)]), tid_(tid),
          threads_(pool_.active()), n_(static_cast<int>(s_.rows.size())), d_(c_.hidden_size),
          heads_(c_.num_attention_heads),
          traced_(std::any_of(a.segments.begin(), a.segments.end(), [](const Segment& s) { return s.trace->on(); })) {}

    void run_main() {
        each_row([&](int i) {
            embed(row(i).id, s_.x.row(i));
            fill_rope(i);
        });
        done(Stage::kEmbed, "embed", s_.x, d_);
        for (int i = 0; i < c_.num_hidden_layers; ++i) {
            if (tid_ == 0 && n_ > kKeepRows && a_.interrupted != nullptr && a_.interrupted())
                throw std::runtime_error("interrupted");
            if (traced_) prefix_ = "layers." + std::to_string(i) + ".";
            layer(w_.layers[static_cast<size_t>(i)], i);
        }
        prefix_.clear();
        head(w_.head, w_.final_norm);
    }

    // docs/model.md 6.1: z = eh_proj [norm(embed(t_next)); norm(h)], a decoder layer with its own cache, own final norm.
    void run_mtp() {
        prefix_ = "mtp.";
        each_row([&](int i) {
            float *e = s_.h.row(i), *eh = s_.eh.row(i);
            embed(row(i).id, e);
            k_.rmsnorm(e, w_.mtp_enorm, eh, d_, c_.rms_norm_eps);
            k_.rmsnorm(row(i).hidden, w_.mtp_hnorm, eh + d_, d_, c_.rms_norm_eps);
            prepare(s_.eh, i, {&w_.mtp_eh_proj});
            fill_rope(i);
        });
        read_floats(2 * d_);
        done(Stage::kEmbed);
        product(w_.mtp_eh_proj, s_.eh, s_.x);
        done(Stage::kEhProj, "embed", s_.x, d_);
        layer(w_.mtp_layer, 0);
        head(w_.draft_head(), w_.mtp_final_norm);
    }

  private:
    // ---- helpers ---------------------------------------------------------------------------------------------------

    const PassRow& row(int i) const { return s_.rows[static_cast<size_t>(i)]; }

    // fn(i) for this thread's share of n rows; those of the pass.
    template <class Fn> void each(int64_t n, Fn&& fn) const {
        const Range rows = split(n, tid_, threads_);
        for (int i = rows.begin; i < rows.end; ++i) fn(i);
    }
    template <class Fn> void each_row(Fn&& fn) const { each(n_, fn); }

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
    // The stage ends, and what it made may be recorded.
    void done(Stage stage) const {
        meet(stage);
        clock_.stage[static_cast<int>(stage)].calls += 1;
    }
    template <class T> void done(Stage stage, const char* name, View<T> made, int width) const {
        done(stage);
        tap(name, made, width);
    }
    // Records rows [n, width] that all threads have made and none changes before the next barrier.
    template <class T> void tap(const char* name, View<T> rows, int width) const {
        if (!traced_) return;
        if (tid_ == 0) record(name, rows, {width}, &Segment::n);
        pool_.barrier();
    }
    // Every traced sequence's own of `rows`, of which it has count(segment), one segment's behind the other's.
    template <class T, class Count>
    void record(const char* name, View<T> rows, const std::vector<int64_t>& dims, Count count) const {
        int first = 0;
        for (const Segment& s : a_.segments) {
            const int n = std::invoke(count, s);
            if (s.trace->on() && n > 0) s.trace->record(prefix_ + name, rows.from(first), n, dims);
            first += n;
        }
    }
    // n f32 weights (norms, biases) that every thread reads: counted once.
    void read_floats(int64_t n) const {
        if (tid_ == 0) clock_.bytes += 4 * n;
    }

    using Readers = std::initializer_list<const PackedTensor*>;
    // Rounds x, row i of a site, for the weights that will read it.
    void prepare(const float* x, const ActSite& site, int64_t i, Readers readers) const {
        for (int kind = 0; kind < kNumActKinds; ++kind) {
            const bool read = std::any_of(readers.begin(), readers.end(), [&](const PackedTensor* t) {
                return t->rows > 0 && static_cast<int>(info(t->format).act) == kind;
            });
            const bool there = kind == static_cast<int>(ActKind::kF32) && x == site.row(i);
            if (read && !there) k_.prepare[kind](x, site.cols, site.kind[kind], i);
        }
    }
    void prepare(const ActSite& site, int64_t i, Readers readers) const { prepare(site.row(i), site, i, readers); }
    // A stage: the norm of x as the input of `readers`, which read all rows, or those that want logits.
    void norm(Stage stage, const char* name, const float* w, const ActSite& to, Readers readers,
              bool for_logits = false) const {
        each_row([&](int i) {
            k_.rmsnorm(s_.x.row(i), w, to.row(i), d_, c_.rms_norm_eps);
            if (!for_logits || row(i).logits) prepare(to, i, readers);
        });
        read_floats(d_);
        done(stage, name, to.f32, d_);
    }

    // Rows first, first + step, ... of a site as the activation operand for `t`.
    static Activation operand(const ActSite& site, const PackedTensor& t, int64_t first = 0, int64_t step = 1) {
        const auto kind = static_cast<int>(info(t.format).act);
        Activation x = site.kind[kind];
        const int64_t offset = first * x.stride;
        x.x = static_cast<std::byte*>(x.x) + offset * kActBytes[kind];
        if (x.d != nullptr) {
            x.d += offset / kTileCols;
            x.sum += offset / kTileCols;
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

    // y [n, ...] from column 0 on: where the first tile of the range goes. rows: those of x, if not 0 .. n-1.
    void matmul(const PackedTensor& t, int slice, Range tiles, const Activation& x, int n, View<float> y,
                const int32_t* rows = nullptr) const {
        if (tiles.begin >= tiles.end || n == 0) return;
        clock_.bytes += tile_bytes(t, tiles);
        k_.matmul[static_cast<int>(t.format)]({.w = &t,
                                               .slice = slice,
                                               .tile_begin = tiles.begin,
                                               .tile_end = tiles.end,
                                               .x = x,
                                               .x_row = rows,
                                               .n = n,
                                               .y = y,
                                               .one_stream = policy_.one_stream});
    }
    // All rows of the pass: y [n, rows of t]; then(tiles) where row tiles of y are done.
    template <class Fn> void product(const PackedTensor& t, const ActSite& site, View<float> y, Fn&& then) const {
        pool_.deal(t.row_tiles(), std::clamp(t.row_tiles() / threads_, 1, kDealtTiles), [&](Range tiles) {
            matmul(t, 0, tiles, operand(site, t), n_, y.columns(kTileRows * tiles.begin));
            then(tiles);
        });
    }
    void product(const PackedTensor& t, const ActSite& site, View<float> y) const {
        product(t, site, y, [](Range) {});
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
    // Every head's matrix times its vectors of a block of rows, read once a pass as counted; head h's y is h * head_step on.
    void product_of_heads(const PackedTensor& t, const ActSite& site, Range block, View<float> y,
                          int64_t head_step) const {
        pool_.deal(heads_ * t.row_tiles(), kDealtTiles, [&](Range range) {
            each_slice(range, t.row_tiles(), [&](int h, Range tiles) {
                matmul(t, h, tiles, operand(site, t, h, heads_), block.end - block.begin,
                       y.columns(h * head_step + kTileRows * tiles.begin));
            });
        });
        if (block.begin > 0) clock_.bytes = 0;
    }
    // to += scale * from, all rows of the pass, in the columns of row tiles.
    void add(View<float> from, View<float> to, Range tiles, float scale = 1) const {
        const int64_t j = kTileRows * tiles.begin;
        for (int i = 0; i < n_; ++i)
            k_.axpy(scale, from.row(i) + j, to.row(i) + j, kTileRows * (tiles.end - tiles.begin));
    }
    static void scale(float by, float* v, int n) {
        for (int i = 0; i < n && by != 1; ++i) v[i] *= by;
    }
    // A block's last product, and the residual.
    void product_onto_x(const PackedTensor& t, const ActSite& site) const {
        product(t, site, s_.out, [&](Range tiles) { add(s_.out, s_.x, tiles, c_.residual_scale); });
    }

    void embed(int32_t id, float* out) const {
        const PlainTensor& t = w_.embed;
        const std::byte* row = t.data + id * t.row_bytes();
        clock_.bytes += t.row_bytes();
        if (t.format == Format::kF32) {
            std::memcpy(out, row, static_cast<size_t>(d_) * 4);
        }
        for (int j = 0; j < d_ && t.format != Format::kF32; ++j) {
            uint16_t v;
            std::memcpy(&v, row + 2 * int64_t{j}, 2);
            out[j] = t.format == Format::kBF16 ? bf16_to_f32(v) : f16_to_f32(v);
        }
        scale(c_.embed_scale, out, d_);
    }

    // Cosines, then sines of row i's position: for the keys and queries of every layer.
    void fill_rope(int i) const {
        float* cos = s_.cos_sin.row(i);
        rope_.fill(row(i).pos, cos, cos + rope_.half());
    }
    void rotate(float* v, int i) const {
        const float* cos = s_.cos_sin.row(i);
        k_.rope(v, cos, cos + rope_.half(), rope_.half());
    }

    // ---- attention -------------------------------------------------------------------------------------------------

    void attention(const LayerWeights& w, int layer_idx) {
        const int dr = c_.qk_rope_head_dim, r = c_.kv_lora_rank, q_rank = c_.q_lora_rank;
        norm(Stage::kAttnNorm, "attn_norm", w.attn_norm, s_.h, {&w.wqkv_a});
        product(w.wqkv_a, s_.h, s_.qkv_a);
        done(Stage::kQkvA);

        // latent norms, key rotation, cache write; the cache row is what every later reader sees, this pass included
        each_row([&](int i) {
            const float* kv = s_.qkv_a.row(i) + c_.kv_offset();
            float *c_kv = s_.c_kv.row(i), *k_rope = s_.k_rope.row(i);
            k_.rmsnorm(kv, w.kv_a_norm, c_kv, r, kLatentNormEps);
            std::copy(kv + r, kv + r + dr, k_rope);
            rotate(k_rope, i);
            const KvCache& cache = *row(i).cache;
            k_.cache_write(cache.type, c_kv, r, k_rope, dr, cache.row(layer_idx, row(i).pos));
            if (q_rank > 0) {
                k_.rmsnorm(s_.qkv_a.row(i), w.q_a_norm, s_.q_a.row(i), q_rank, kLatentNormEps);
                prepare(s_.q_a, i, {&w.wq_b});
            }
        });
        read_floats(int64_t{r} + q_rank);
        done(Stage::kLatent, "c_kv", s_.c_kv, r);
        tap("k_rope", s_.k_rope, dr);
        if (q_rank > 0) {
            tap("q_a", s_.q_a.f32, q_rank);
            product(w.wq_b, s_.q_a, s_.q);
            done(Stage::kQB);
        }

        for (int i = 0; i < n_; i += s_.head_rows) head_block(w, layer_idx, {i, std::min(i + s_.head_rows, n_)});

        product_onto_x(w.wo, s_.attn_v);
        done(Stage::kWo, "attn_out", s_.out, d_);
    }

    // From queries to values, for a block of rows: what all heads have of a row are the widest buffers.
    void head_block(const LayerWeights& w, int layer_idx, Range block) {
        const int n = block.end - block.begin, r = c_.kv_lora_rank, dv = c_.v_head_dim;
        const int dn = c_.qk_nope_head_dim, dqk = c_.qk_head_dim();
        const int64_t q_full = s_.q_full.stride, latent = s_.attn_latent.f32.stride;
        const auto done = [&](Stage stage) { block.end == n_ ? this->done(stage) : meet(stage); };

        // rotate query heads; nope parts become operands of W_UK, rope parts stand beside its output
        each(int64_t{n} * heads_, [&](int u) {
            const int i = block.begin + u / heads_;
            float* q = s_.q.row(i) + int64_t{u % heads_} * dqk;
            rotate(q + dn, i);
            scale(rope_.query_scale(row(i).pos), q, dqk);
            prepare(q, s_.q_nope, u, {&w.w_uk});
            std::copy(q + dn, q + dqk, s_.q_full.row(u) + c_.c_pad());
        });
        done(Stage::kQRope);
        tap_heads("q", s_.q.from(block.begin), dqk, n, dqk);

        const View<float> absorbed{s_.q_full.data, heads_ * q_full};
        product_of_heads(w.w_uk, s_.q_nope, block, absorbed, q_full);
        done(Stage::kWUk);
        tap_heads("q_absorbed", absorbed, q_full, n, r);

        latent_attention(w, layer_idx, block);
        done(Stage::kAttention);
        tap_heads("attn_latent", {s_.attn_latent.f32.data, heads_ * latent}, latent, n, r);

        // tiles fit heads, or they are laid side by side afterwards
        const bool fits = dv % kTileRows == 0;
        const View<float> v = fits ? s_.attn_v.f32.from(block.begin) : s_.uv_tmp;
        product_of_heads(w.w_uv, s_.attn_latent, block, v, fits ? dv : s_.head_rows * v.stride);
        meet(Stage::kWUv);
        each(n, [&](int i) {
            for (int h = 0; h < heads_ && !fits; ++h) {
                const float* from = v.row(h * int64_t{s_.head_rows} + i);
                std::copy(from, from + dv, s_.attn_v.row(block.begin + i) + int64_t{h} * dv);
            }
            prepare(s_.attn_v, block.begin + i, {&w.wo});
        });
        done(Stage::kWUv);
    }

    // A vector of `width` per head of a block's n rows, head_step apart; all blocks' make [n_, heads, width].
    void tap_heads(const char* name, View<const float> rows, int64_t head_step, int n, int width) {
        if (!traced_) return;
        std::vector<float>& v = taps_[name];
        for (int u = 0; u < n * heads_ && tid_ == 0; ++u) {
            const float* p = rows.row(u / heads_) + u % heads_ * head_step;
            v.insert(v.end(), p, p + width);
        }
        if (v.size() == static_cast<size_t>(n_) * heads_ * width) {
            record(name, View<const float>{v.data(), int64_t{heads_} * width}, {heads_, width}, &Segment::n);
            v.clear();
        }
        pool_.barrier();
    }

    // Rows of a block that meet their sequence's cache together, with some of the heads.
    struct Group {
        Range rows, heads;
        int n_partials;
        bool last;  // rows of its segment

        int n_heads() const { return heads.end - heads.begin; }
        int n_vectors() const { return (rows.end - rows.begin) * n_heads(); }
        int64_t work() const { return int64_t{n_partials} * n_vectors(); }
    };
    // A group's positions of a partial; heads: not yet all of them where a round shares out what is left.
    struct Unit {
        int group, partial;
        int64_t slot;  // of its sums in s_.part
    };

    // docs/model.md 4.1 over the caches: partials of kPartialLen positions, merged in order. Where there is work for all, a
    // thread takes whole groups; a long context beside little else is dealt partial by partial.
    void latent_attention(const LayerWeights& w, int layer_idx, Range block) {
        std::vector<Group> whole, shared;
        int64_t total = 0;
        const std::vector<Group> groups = groups_of(block);
        for (const Group& g : groups) total += g.work();
        for (const Group& g : groups) (4 * threads_ * g.work() <= total || threads_ == 1 ? whole : shared).push_back(g);
        MlaPartialArgs args{.c_pad = c_.c_pad(),
                            .r_pad = c_.r_pad(),
                            .softmax_scale = rope_.softmax_scale,
                            .scratch = s_.mla_scratch[static_cast<size_t>(tid_)],
                            .bf16_dot = policy_.bf16_dot};
        const MlaSums sums = s_.part.from(2 * tid_ * group_vectors(heads_)), part = sums.from(group_vectors(heads_));
        pool_.deal(static_cast<int>(whole.size()), 1, [&](Range range) {
            for (int u = range.begin; u < range.end; ++u) {
                const Group& g = whole[static_cast<size_t>(u)];
                for (int p = 0; p < g.n_partials; ++p) {
                    partial(args, layer_idx, block, g, p, p + 1, p == 0 ? sums : part);
                    if (p > 0) k_.mla_merge(sums, part, g.n_vectors(), c_.c_pad());
                }
                for (int v = 0; v < g.n_vectors(); ++v) finish(w, block, g, v, sums.from(v));
            }
        });
        if (shared.empty()) return;
        meet(Stage::kAttention);
        share_out(w, layer_idx, block, shared, args);
    }

    std::vector<Group> groups_of(Range block) const {
        std::vector<Group> groups;
        for (int begin = block.begin, end = begin; begin < block.end; begin = end) {
            while (end < block.end && row(end).segment == row(begin).segment) ++end;
            const bool few = a_.segments[static_cast<size_t>(row(begin).segment)].n() <= kSplitRows;
            const int n_rows = few ? kSplitRows : kAttnRowBlock, n_heads = few ? heads_ : kAttnHeadBlock;
            for (int i = begin; i < end; i += n_rows) {
                const Range rows{i, std::min(i + n_rows, end)};
                const bool last = rows.end == n_ || row(rows.end).segment != row(i).segment;
                const auto n_partials = static_cast<int>(ceil_div(row(rows.end - 1).pos + 1, kPartialLen));
                for (int h = 0; h < heads_; h += n_heads)
                    groups.push_back({rows, {h, std::min(h + n_heads, heads_)}, n_partials, last});
            }
        }
        return groups;
    }

    // Groups partial by partial, in rounds whose sums fit into s_.part: a group that a round leaves unfinished is its last.
    void share_out(const LayerWeights& w, int layer_idx, Range block, const std::vector<Group>& groups,
                   MlaPartialArgs& args) {
        std::vector<Unit> round;
        int64_t used = 0;
        int carried = 0;  // where the group lies that earlier rounds left unfinished
        const auto end_round = [&](bool last) {
            attend(layer_idx, block, groups, round, args);
            meet(Stage::kAttention);
            for (auto u = round.begin(); u < round.end();) {
                const auto end = std::find_if(u, round.end(), [&](const Unit& x) { return x.group != u->group; });
                carried = merge(w, block, groups[static_cast<size_t>(u->group)], std::span(u, end), carried);
                u = end;
            }
            if (!last) meet(Stage::kAttention);
            round.clear();
            used = 0;
        };
        for (int g = 0; g < std::ssize(groups); ++g) {
            const Group& group = groups[static_cast<size_t>(g)];
            for (int p = 0; p < group.n_partials; ++p, used += group.n_vectors()) {
                if (used + group.n_vectors() > s_.part_slots) end_round(false);
                round.push_back({g, p, used});
            }
        }
        end_round(true);
    }
    // The units of a round, dealt to all threads: as many as there are in full rounds of threads, then what is left by heads.
    void attend(int layer_idx, Range block, const std::vector<Group>& groups, const std::vector<Unit>& round,
                MlaPartialArgs& args) const {
        const auto n = static_cast<int>(round.size()), parts = std::min(heads_, threads_);
        const int whole = n / threads_ * threads_;
        pool_.deal(whole + (n - whole) * parts, 1, [&](Range range) {
            for (int u = range.begin; u < range.end; ++u) {
                const int left = std::max(u - whole, 0);
                const Unit& unit = round[static_cast<size_t>(u < whole ? u : whole + left / parts)];
                const Group& g = groups[static_cast<size_t>(unit.group)];
                Group mine = g;
                if (u >= whole) {
                    const Range h = split(g.n_heads(), left % parts, parts);
                    mine.heads = {g.heads.begin + h.begin, g.heads.begin + h.end};
                }
                if (mine.n_heads() == 0) continue;
                const int next = unit.partial + (u + 1 < range.end ? 1 : threads_);
                partial(args, layer_idx, block, mine, unit.partial, next, s_.part.from(unit.slot), g.heads);
            }
        });
    }
    // Merges a group's partials of a round, behind those of earlier rounds (s_.carried[carried]). What is not complete then
    // goes on from where this returns: not where a group was that is, as others may still read there.
    int merge(const LayerWeights& w, Range block, const Group& g, std::span<const Unit> units, int carried) const {
        const bool first = units.front().partial == 0, complete = units.back().partial + 1 == g.n_partials;
        const int c_pad = c_.c_pad(), next = first && !complete ? carried ^ 1 : carried;
        each(g.n_vectors(), [&](int v) {
            const MlaSums sum = s_.carried[next].from(v);
            if (first && !complete) *sum.l = 0;
            const MlaSums into = first && complete ? s_.part.from(units.front().slot + v) : sum;
            for (const Unit& u : units.subspan(first && complete ? 1 : 0))
                k_.mla_merge(into, s_.part.from(u.slot + v), 1, c_pad);
            if (complete) finish(w, block, g, v, into);
        });
        return next;
    }

    // A group against partial p; to: a sum for each of its rows and of the heads `all` (its own, if they are not given).
    // Meanwhile rows of partial `next` are prefetched, which this thread is likely to come to then. args: of this thread's call
    // before, or of none.
    void partial(MlaPartialArgs& args, int layer_idx, Range block, const Group& g, int p, int next, MlaSums to,
                 std::optional<Range> all = {}) const {
        const Range heads = all.value_or(g.heads);
        const int n = g.rows.end - g.rows.begin, width = heads.end - heads.begin;
        int32_t ends[std::max(kSplitRows, kAttnRowBlock)];
        for (int i = 0; i < n; ++i) ends[i] = std::min(row(g.rows.begin + i).pos + 1, (p + 1) * kPartialLen);
        const KvCache& cache = *row(g.rows.begin).cache;
        const float* q = s_.q_full.row(int64_t{g.rows.begin - block.begin} * heads_ + g.heads.begin);
        args.same_q = q == args.q.data && n == args.n_rows && g.n_heads() == args.n_heads && cache.type == args.type;
        args.type = cache.type;
        args.cache = {cache.layer(layer_idx), cache.row_bytes};
        args.n_rows = n;
        args.n_heads = g.n_heads();
        args.q = {q, heads_ * s_.q_full.stride};
        args.pos_begin = p * kPartialLen;
        args.row_end = ends;
        const int next_pos = next * kPartialLen;
        args.next = next_pos + kChunkLen <= row(g.rows.begin).pos + 1 ? args.cache.row(next_pos) : nullptr;
        const MlaSums mine = to.from(g.heads.begin - heads.begin);
        args.m = {mine.m, width};
        args.l = {mine.l, width};
        args.o = {mine.o.data, width * mine.o.stride};
        k_.mla_partial(args);
        // A cache row counts once, where the last row of its sequence meets the first heads: it sees all of them.
        const int64_t seen = std::max(ends[n - 1] - args.pos_begin, 0);
        if (g.heads.begin == 0 && g.last) clock_.bytes += seen * args.cache.stride;
    }
    // Vector v of a group has met all its positions.
    void finish(const LayerWeights& w, Range block, const Group& g, int v, const MlaSums& sum) const {
        const int u = (g.rows.begin - block.begin + v / g.n_heads()) * heads_ + g.heads.begin + v % g.n_heads();
        k_.mla_finish(sum, c_.c_pad(), s_.attn_latent.row(u));
        prepare(s_.attn_latent, u, {&w.w_uv});
    }

    // ---- dense FFN -------------------------------------------------------------------------------------------------

    // Gate and up tiles [2*pairs.begin, 2*pairs.end) of one matrix, then silu(gate) * up for the same columns of `out`: a few
    // at a time, so that they wait in the second-level cache.
    void gate_up(const PackedTensor& t, int slice, Range pairs, const Activation& x, const int32_t* rows, int n,
                 const ActSite& out, int64_t out_first) const {
        if (n == 0) return;
        const int at_once = kPairsAtOnce * (s_.max_rows / n);
        const View<float> tmp{s_.gate_up[static_cast<size_t>(tid_)], 2 * kTileRows * int64_t{at_once}};
        for (int begin = pairs.begin; begin < pairs.end; begin += at_once) {
            const int end = std::min(begin + at_once, pairs.end);
            matmul(t, slice, {2 * begin, 2 * end}, x, n, tmp, rows);
            const int col = kTileRows * begin, cols = std::min(kTileRows * end, out.cols) - col;
            for (int i = 0; i < n; ++i) k_.swiglu(tmp.row(i), out.row(out_first + i) + col, cols);
        }
    }

    void dense_ffn(const LayerWeights& w) {
        const Activation h = operand(s_.h, w.w_gate_up);
        pool_.deal(w.w_gate_up.row_tiles() / 2, kDealtPairs,
                   [&](Range pairs) { gate_up(w.w_gate_up, 0, pairs, h, nullptr, n_, s_.ffn_h, 0); });
        meet(Stage::kFfnUp);
        each_row([&](int i) { prepare(s_.ffn_h, i, {&w.w_down}); });
        done(Stage::kFfnUp);
        product_onto_x(w.w_down, s_.ffn_h);
        done(Stage::kFfnDown, "ffn_out", s_.out, d_);
    }

    // ---- MoE -------------------------------------------------------------------------------------------------------

    void moe(const LayerWeights& w) {
        product(w.router, s_.h, s_.gate_logits);
        done(Stage::kRouter, "gate_logits", s_.gate_logits, c_.n_routed_experts);
        choose_experts(w);
        experts_up(w);
        experts_down(w);
    }

    void choose_experts(const LayerWeights& w) {
        each_row([&](int i) {
            route({.gate_logits = s_.gate_logits.row(i),
                   .bias = w.router_bias,
                   .n_routed_experts = c_.n_routed_experts,
                   .num_experts_per_tok = c_.num_experts_per_tok,
                   .n_group = c_.n_group,
                   .topk_group = c_.topk_group,
                   .scoring_func = c_.scoring_func,
                   .topk_method = c_.topk_method,
                   .norm_topk_prob = c_.norm_topk_prob,
                   .routed_scaling_factor = c_.routed_scaling_factor,
                   .scratch = s_.route_scratch.row(tid_),
                   .topk_idx = s_.topk_idx.row(i),
                   .topk_weight = s_.topk_weight.row(i)});
        });
        if (w.router_bias != nullptr) read_floats(c_.n_routed_experts);
        meet(Stage::kRoute);
        tap("topk_idx", s_.topk_idx, c_.num_experts_per_tok);
        tap("topk_weight", s_.topk_weight, c_.num_experts_per_tok);
        if (tid_ == 0) group_rows_by_expert();
        done(Stage::kRoute);
    }

    // What an expert reads, and in `rows` which rows of it: those of h, or where kernels want it a copy side by side, made once
    // by each thread that has a part of the expert.
    Activation operand_of(const ExpertRows& e, const PackedTensor& t, const int32_t*& rows) {
        const Activation h = operand(s_.h, t);
        const int n = e.end - e.begin;
        rows = s_.slot_row + e.begin;
        const bool apart = n > 2 && info(t.format).act == ActKind::kBF16;  // two lie one stride apart
        if (!apart || s_.together.empty()) return h;
        const Activation& x = s_.together[static_cast<size_t>(tid_)];
        const auto row_of = [](const Activation& a, int64_t i) { return static_cast<uint16_t*>(a.x) + i * a.stride; };
        const auto bytes = static_cast<size_t>(2 * round_up(d_, kTileCols));
        for (int i = 0; i < n && together_ != e.expert; ++i) std::memcpy(row_of(x, i), row_of(h, rows[i]), bytes);
        together_ = e.expert;
        rows = nullptr;
        return x;
    }

    // Every touched expert once for all its rows, then the shared expert, as one list of tile pairs.
    void experts_up(const LayerWeights& w) {
        const int pairs = w.experts_gate_up.row_tiles() / 2, shared_pairs = w.shared_gate_up.row_tiles() / 2;
        const int routed_pairs = static_cast<int>(s_.touched.size()) * pairs;
        const Activation h = operand(s_.h, w.shared_gate_up);
        together_ = -1;
        pool_.deal(routed_pairs + shared_pairs, kDealtPairs, [&](Range range) {
            each_slice({range.begin, std::min(range.end, routed_pairs)}, pairs, [&](int slice, Range p) {
                const ExpertRows& e = s_.touched[static_cast<size_t>(slice)];
                const int32_t* rows = nullptr;
                const Activation x = operand_of(e, w.experts_gate_up, rows);
                gate_up(w.experts_gate_up, e.expert, p, x, rows, e.end - e.begin, s_.expert_h, e.begin);
            });
            const Range p{std::max(range.begin - routed_pairs, 0), range.end - routed_pairs};
            gate_up(w.shared_gate_up, 0, p, h, nullptr, n_, s_.shared_h, 0);
        });
        meet(Stage::kExpertsUp);
        each(int64_t{n_} * c_.num_experts_per_tok, [&](int slot) { prepare(s_.expert_h, slot, {&w.experts_down}); });
        if (shared_pairs > 0) each_row([&](int i) { prepare(s_.shared_h, i, {&w.shared_down}); });
        done(Stage::kExpertsUp);
    }

    // By output columns: experts in ascending order, then the shared expert, then the residual.
    void experts_down(const LayerWeights& w) {
        const bool has_shared = w.shared_down.rows > 0;
        const auto routed = [&](Range tiles) {
            const int64_t col = kTileRows * tiles.begin;
            const View<float> y = s_.expert_out.columns(col), sum = s_.out.columns(col);
            const int cols = kTileRows * (tiles.end - tiles.begin);
            for (int i = 0; i < n_; ++i) std::fill_n(sum.row(i), cols, 0.0F);
            for (const ExpertRows& e : s_.touched) {
                const Activation x = operand(s_.expert_h, w.experts_down, e.begin);
                matmul(w.experts_down, e.expert, tiles, x, e.end - e.begin, y);
                for (int slot = e.begin; slot < e.end; ++slot)
                    k_.axpy(s_.slot_weight[slot], y.row(slot - e.begin), sum.row(s_.slot_row[slot]), cols);
            }
        };
        const auto shared = [&](Range tiles) {
            if (has_shared) {
                const View<float> y = s_.expert_out.columns(kTileRows * tiles.begin);
                matmul(w.shared_down, 0, tiles, operand(s_.shared_h, w.shared_down), n_, y);
                add(s_.expert_out, s_.out, tiles);
            }
            if (w.post_moe_norm == nullptr) add(s_.out, s_.x, tiles, c_.residual_scale);
        };
        const int tiles = static_cast<int>(ceil_div(d_, kTileRows));
        if (traced_) {
            pool_.deal(tiles, kDealtTiles, routed);
            pool_.barrier();
            tap("routed_out", s_.out, d_);
            pool_.deal(tiles, kDealtTiles, shared);
        } else {
            pool_.deal(tiles, kDealtTiles, [&](Range t) {
                routed(t);
                shared(t);
            });
        }
        if (w.post_moe_norm != nullptr) {
            meet(Stage::kExpertsDown);
            each_row([&](int i) {
                k_.rmsnorm(s_.out.row(i), w.post_moe_norm, s_.out.row(i), d_, c_.rms_norm_eps);
                k_.axpy(c_.residual_scale, s_.out.row(i), s_.x.row(i), d_);
            });
            read_floats(d_);
        }
        done(Stage::kExpertsDown);
        if (has_shared) tap("shared_out", s_.expert_out, d_);
        if (w.post_moe_norm != nullptr) tap("moe_out", s_.out, d_);
    }

    // Counting sort of the pass's (row, expert) pairs by expert; rows stay in order inside an expert. Thread 0 only.
    void group_rows_by_expert() const {
        const int k = c_.num_experts_per_tok;
        s_.touched.clear();
        const int32_t* idx = s_.topk_idx.data;
        std::vector<int>& first = expert_first_;  // [E + 1] pairs, then first slot, then next free slot of an expert
        first.assign(static_cast<size_t>(c_.n_routed_experts) + 1, 0);
        for (int i = 0; i < n_ * k; ++i) ++first[static_cast<size_t>(idx[i]) + 1];
        for (int e = 0; e < c_.n_routed_experts; ++e) {
            const int begin = first[static_cast<size_t>(e)];
            const int end = first[static_cast<size_t>(e) + 1] += begin;
            if (end > begin) s_.touched.push_back({e, begin, end});
        }
        for (int i = 0; i < n_ * k; ++i) {
            const int slot = first[static_cast<size_t>(idx[i])]++;
            s_.slot_row[slot] = i / k;
            s_.slot_weight[slot] = s_.topk_weight.data[i];
        }
        if (!a_.mtp() && n_ <= kMaxRound && a_.segments.size() == 1) {
            for (int i = 0; i < n_ * k; ++i) s_.pass_experts.push_back(layer_idx_ * c_.n_routed_experts + idx[i]);
        }
        a_.stats.experts_touched += static_cast<int64_t>(s_.touched.size());
    }

    // ---- layer, head -----------------------------------------------------------------------------------------------

    void layer(const LayerWeights& w, int layer_idx) {
        layer_idx_ = layer_idx;
        attention(w, layer_idx);
        norm(Stage::kFfnNorm, "ffn_norm", w.ffn_norm, s_.h, {&w.w_gate_up, &w.experts_gate_up, &w.shared_gate_up});
        w.moe ? moe(w) : dense_ffn(w);
        tap("layer_out", s_.x, d_);
    }

    // Final norm of every row (MTP reads all of them); logits for the rows that want them.
    void head(const PackedTensor& w, const float* norm_w) {
        const auto n_logits = static_cast<int>(s_.logit_rows.size());
        norm(Stage::kFinalNorm, "final_norm", norm_w, s_.final_h, {&w}, true);
        if (n_logits == 0) return;
        const View<float> y{a_.logits, c_.logits_stride()};
        pool_.deal(w.row_tiles(), kDealtTiles, [&](Range tiles) {
            const View<float> part = y.columns(kTileRows * tiles.begin);
            matmul(w, 0, tiles, operand(s_.final_h, w), n_logits, part, s_.logit_rows.data());
            for (int i = 0; i < n_logits; ++i)
                scale(c_.logit_scale, part.row(i), kTileRows * (tiles.end - tiles.begin));
        });
        done(Stage::kHead);
        if (traced_ && tid_ == 0) record("logits", y, {c_.vocab_size}, &Segment::n_logits);
    }

    const PassArgs& a_;
    Buffers& s_;
    const ModelConfig& c_;
    const ModelWeights& w_;
    const CpuKernels& k_;
    const Rope& rope_;
    const CpuPolicy& policy_;
    ThreadPool& pool_;
    StageClock& clock_;
    const int tid_, threads_, n_, d_, heads_;
    const bool traced_;  // any of the sequences
    int layer_idx_ = 0;
    int together_ = -1;  // the expert whose rows lie in this thread's s_.together
    std::string prefix_;
    mutable std::vector<int> expert_first_;
    std::map<std::string, std::vector<float>> taps_;  // of the blocks so far
};

const CpuEngine& engine_of(const Segment& s) { return static_cast<const CpuEngine&>(*s.engine); }

// The rows of a pass, and which of them want logits.
void lay_rows(const PassArgs& args, Buffers& b) {
    b.pass_experts.clear();
    b.rows.clear();
    b.logit_rows.clear();
    const int64_t d = b.final_h.cols;
    for (int segment = 0; const Segment& s : args.segments) {
        const CpuEngine& e = engine_of(s);
        for (int i = 0; i < s.n(); ++i) {
            const bool logits = i >= s.n() - s.n_logits;
            if (logits) b.logit_rows.push_back(static_cast<int32_t>(b.rows.size()));
            b.rows.push_back({.id = s.ids[static_cast<size_t>(i)],
                              .pos = s.pos + i,
                              .segment = segment,
                              .hidden = s.mtp() ? s.hidden + i * d : nullptr,
                              .cache = s.mtp() ? &e.mtp_cache : &e.cache,
                              .logits = logits});
        }
        ++segment;
    }
}

}  // namespace

Result<PassResult> CpuBackend::forward(const PassArgs& args) {
    const int n = args.n();
    if (n > buffers.max_rows) {
        return Error{ErrorCode::kSession,
                     "a pass of " + std::to_string(n) + " tokens, at most " + std::to_string(buffers.max_rows)};
    }
    // The buffers of a long pass, 0.4 MB a row in V2-Lite, are given back when short ones follow, beside others' prompts not
    // at once: nothing in them is read again.
    const bool decodes = n <= kSplitRows && args.segments.size() == 1;
    short_passes = n > kKeepRows ? 0 : decodes ? kKeepPasses : short_passes + 1;
    if (touched_rows > kKeepRows && short_passes >= kKeepPasses) {
        buffers.memory.release();
        touched_rows = 0;
    }
    touched_rows = std::max(touched_rows, n);
    lay_rows(args, buffers);
    std::vector<StageClock>& clocks = buffers.clocks;
    PassStats& stats = args.stats;
    int64_t work = 0;
    for (const Segment& s : args.segments)
        work += s.n() * model.active_bytes(s.pos + s.n(), engine_of(s).cache.row_bytes);
    const bool little = work < kLittle * pool->size() * model.cfg.num_hidden_layers;
    const int kind = std::min(n, ThreadChoice::kLong) + (args.mtp() ? ThreadChoice::kKinds / 2 : 0);
    const int64_t begin = now_ns(), experts_touched = stats.experts_touched;
    Status ran = pool->run(
        [&](int tid) {
            clocks[static_cast<size_t>(tid)] = {.mark = begin};
            Pass pass(*this, args, tid);
            args.mtp() ? pass.run_mtp() : pass.run_main();
        },
        adaptive && (little || choice.alone(kind)));
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
        for (const StageClock& clock : std::span(clocks).first(static_cast<size_t>(pool->active()))) {
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
    const bool traced =
        std::any_of(args.segments.begin(), args.segments.end(), [](const Segment& s) { return s.trace->on(); });
    if (adaptive && !little && !traced) {
        const auto ns = static_cast<double>(end - begin);
        choice.ran(kind, ns / static_cast<double>(n < ThreadChoice::kLong ? read : n),
                   static_cast<double>(waited) / (pool->active() * ns), [&] { return crowded(pool->size() - 1); });
    }
    stats.seconds += 1e-9 * static_cast<double>(end - begin);
    return PassResult{buffers.final_h.f32, buffers.pass_experts};
}

}  // namespace deepcalm
