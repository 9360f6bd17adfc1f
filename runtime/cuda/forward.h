// The forward pass, CUDA transcription: which stages run on which buffers, in order. Same sections and taps as
// runtime/cpu/forward.cc and python/deepcalm/check/reference.py. Here a pass is only written down, as a list of stage
// calls that backend.cu runs as a graph of kernels.
#pragma once

#include "kernels/cuda/stages.cuh"
#include "runtime/cuda/decode.cuh"
#include "runtime/cuda/host.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

namespace deepcalm::gpu {

// One stage call.
struct Op {
    std::string name;   // of the stage; products with their shape, of which a layer has four
    int64_t need = 0;   // bytes of shared memory that a device must give a block
    int64_t bytes = 0;  // weights read by one row (of the chosen experts: by all rows, counted as if none were shared)
    int64_t row_bytes = 0;  // of the cache, read at every position
    std::function<rt::Error(rt::Stream, bool dependent)> launch;
};

// An intermediate to copy out after `op`: `vectors` vectors of `width`, `stride` apart, shape [n, dims...].
struct TapOut {
    size_t op = 0;
    std::string name;
    void* data = nullptr;
    bool is_int = false;
    bool input = false;  // the buffer that the following stages read: new values there take effect
    int64_t vectors = 0, width = 0, stride = 0;
    std::vector<int64_t> dims;
};

struct Program {
    std::vector<Op> ops;
    std::vector<TapOut> taps;
};

inline constexpr int kLogitRows = 32;       // rows of one head stage in long passes
inline constexpr int kShortContext = 8192;  // below, attention units are single chunks: more of them than SMs

// Device buffers of a session, sized once for R = max_rows rows (at least kBlockRows); n = rows of the pass. Strides are in
// elements, multiples of 4.
struct Buffers {
    int64_t rows = 0;
    View<float> x, eh, h, qkv, q, q_full, v, ffn_h, gate_logits;  // [R]
    View<float> expert_h;                                         // [R * topk]
    float* routed = nullptr;                                      // [R, x.stride] routed sums of long passes
    int32_t* topk_idx = nullptr;                                  // [moe layers + 1 for MTP, R, topk]
    float* topk_weight = nullptr;                                 // [R, topk]
    float *part_o = nullptr, *part_ml = nullptr;
    int64_t part_units = 0;  // (row, unit) pairs of `part`
    View<float> logits;      // [max(kLogitRows, kBlockRows)]
    float* best_value = nullptr;
    int32_t* best_id = nullptr;
    unsigned* arrived = nullptr;
    float *cos = nullptr, *sin = nullptr;    // [ctx, dr / 2]
    float* query_scale = nullptr;            // [ctx], null where all are 1
    LatentCache cache, mtp_cache;            // of the first layer; the others follow
    float* hidden = nullptr;                 // [R, d] MTP input of a pass from the host
    float* pend = nullptr;                   // [kMaxPending + kMaxRound, d]
    float* g = nullptr;                      // [d]
    int32_t *ids = nullptr, *pos = nullptr;  // [R] of a pass from the host; pos[i] = position of row i
    int32_t* tokens = nullptr;               // [ctx + kMaxRound]
    int32_t* choice = nullptr;               // [R]
    DecodeState* decode = nullptr;
    float* taps = nullptr;  // [R, tap_stride], allocated with the first trace
    int64_t tap_stride = 0;
};

// What one pass is made for.
struct PassShape {
    PassRows rows;  // pos: of every row or, for n <= kBlockRows, of row 0 alone
    bool mtp = false;
    int n_logits = 0;               // the last n_logits rows
    bool long_context = false;      // some position may reach kShortContext
    const int32_t* ids = nullptr;   // device
    View<const float> hidden = {};  // MTP: device [n, d]
    int32_t* choice = nullptr;      // [n_logits] argmax
    int n_valid = 0;
    bool trace = false;
};

// Appends the stages of a pass.
class PassWriter {
  public:
    PassWriter(const ModelConfig& c, const ModelWeights& w, const Buffers& b, float softmax_scale,
               const rt::DeviceInfo& device, int threads, Program& program)
        : c_(c), w_(w), b_(b), softmax_scale_(softmax_scale), device_(device), threads_(threads), p_(program) {}

    void pass(const PassShape& shape) {
        t_ = shape;
        n_ = t_.rows.n;
        prefix_ = t_.mtp ? "mtp." : "";
        if (t_.mtp) {
            embed(b_.eh);
            Norm both = norm(w_.mtp_enorm);
            both.w2 = w_.mtp_hnorm;
            product(w_.mtp_eh_proj, b_.eh, both, b_.x);
            tap("embed", b_.x, {c_.hidden_size});
            layer(w_.mtp_layer, 0, c_.num_hidden_layers);
            head(w_.draft_head(), w_.mtp_final_norm);
            return;
        }
        embed(b_.x);
        tap("embed", b_.x, {c_.hidden_size});
        for (int i = 0; i < c_.num_hidden_layers; ++i) {
            prefix_ = "layers." + std::to_string(i) + ".";
            layer(w_.layers[static_cast<size_t>(i)], i, i);
        }
        prefix_.clear();
        head(w_.head, w_.final_norm);
    }

    // Logits of rows [begin, begin + n) of a long pass whose head() only made the norm.
    void rows_head(bool mtp, int begin, int n, int n_valid, const int32_t* pos) {
        t_ = {.rows = {.n = n, .pos = pos + begin}, .choice = b_.choice, .n_valid = n_valid};
        n_ = n;
        const PackedTensor& w = mtp ? w_.draft_head() : w_.head;
        reads(w);
        add_head(w, norm(mtp ? w_.mtp_final_norm : w_.final_norm), b_.x.from(begin), 0);
    }

    template <class A> void add(const A& args) {
        // kThreads: what a simulated device of fewer threads a block takes is what the real one would
        const Fit& f = fit(args, n_ <= kBlockRows ? 1 : kPrefillBlocks, kThreads, device_.smem);
        const rt::LaunchConfig config{.grid = std::max(1, std::min(args.units(), device_.sms)),
                                      .block = threads_,
                                      .smem = args.smem(f, threads_)};
        const auto launch = [args, f, config, can = device_.dependent](rt::Stream stream, bool dependent) {
            rt::LaunchConfig c = config;
            c.stream = stream;
            c.dependent = dependent && can;
            return rt::launch(c, kernel_of<A>(f.nb), args, f);
        };
        Op op{.name = A::kStage.name, .need = args.smem(f, kThreads), .bytes = bytes_, .launch = launch};
        if constexpr (std::is_same_v<A, ProductArgs>)
            op.name += " " + std::to_string(args.w.rows) + "x" + std::to_string(args.w.cols);
        if constexpr (std::is_same_v<A, AttendArgs>) op.row_bytes = args.cache.row_bytes;
        bytes_ = 0;
        p_.ops.push_back(std::move(op));
    }

  private:
    Norm norm(const float* w, const View<float>& out = {}) const {
        return {.w = w, .width = c_.hidden_size, .eps = c_.rms_norm_eps, .out = out};
    }
    void reads(const PackedTensor& t, int64_t slices = 1) { bytes_ += slices * t.read_bytes(); }

    // width: of a vector; 0: a row is one.
    template <class T> void tap(const char* name, const View<T>& v, std::vector<int64_t> dims, int64_t width = 0) {
        if (!t_.trace) return;
        const int64_t row = std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
        if (width == 0) width = row;
        p_.taps.push_back(
            {.op = p_.ops.size() - 1,
             .name = prefix_ + name,
             .data = v.data,
             .is_int = std::is_same_v<T, int32_t>,
             .input = v.data == static_cast<void*>(b_.x.data) || v.data == static_cast<void*>(b_.gate_logits.data),
             .vectors = n_ * (row / width),
             .width = width,
             .stride = v.stride,
             .dims = std::move(dims)});
    }
    // Room for a tap of `width` columns; null when nobody records. Valid until the next layer().
    View<float> room(int64_t width) {
        if (!t_.trace) return {};
        float* p = b_.taps + tap_used_;
        tap_used_ += b_.rows * round_up(width, 4);
        return {p, round_up(width, 4)};
    }

    void product(const PackedTensor& w, const View<float>& x, const Norm& norm, const View<float>& y,
                 float add_scaled = 0, const View<float>& tap = {}) {
        reads(w);
        add(ProductArgs{.rows = t_.rows, .w = w, .x = x, .norm = norm, .y = y, .add = add_scaled, .tap = tap});
    }

    void embed(const View<float>& x) {
        bytes_ = w_.embed.row_bytes();
        add(EmbedArgs{.rows = t_.rows,
                      .ids = t_.ids,
                      .table = w_.embed.data,
                      .format = w_.embed.format,
                      .vocab = c_.vocab_size,
                      .d = c_.hidden_size,
                      .x = x,
                      .hidden = t_.hidden,
                      .scale = c_.embed_scale});
    }

    // ---- attention -------------------------------------------------------------------------------------------------

    void attention(const LayerWeights& w, int cache_layer) {
        const int d = c_.hidden_size;
        const LatentCache cache = (t_.mtp ? b_.mtp_cache : b_.cache).layer(cache_layer);
        const View<float> norm_tap = room(d);
        product(w.wqkv_a, b_.x, norm(w.attn_norm, norm_tap), b_.qkv);
        tap("attn_norm", norm_tap, {d});
        if (c_.q_lora_rank > 0) {
            const View<float> q_a_tap = room(c_.q_lora_rank);
            const Norm q_a_norm{.w = w.q_a_norm, .width = c_.q_lora_rank, .eps = kLatentNormEps, .out = q_a_tap};
            product(w.wq_b, b_.qkv, q_a_norm, b_.q);
            tap("q_a", q_a_tap, {c_.q_lora_rank});
        }
        absorb(w, cache);
        latent_attention(w, cache);
        const View<float> out_tap = room(d);
        product(w.wo, b_.v, {}, b_.x, c_.residual_scale, out_tap);
        tap("attn_out", out_tap, {d});
    }

    void absorb(const LayerWeights& w, const LatentCache& cache) {
        const int heads = c_.num_attention_heads, dr = c_.qk_rope_head_dim, r = c_.kv_lora_rank;
        const View<float> q_tap = room(c_.q_width()), c_tap = room(r), k_tap = room(dr);
        reads(w.w_uk, heads);
        add(AbsorbArgs{.rows = t_.rows,
                       .w_uk = w.w_uk,
                       .n_heads = heads,
                       .dn = c_.qk_nope_head_dim,
                       .dr = dr,
                       .r = r,
                       .q = b_.q,
                       .kv = b_.qkv.columns(c_.kv_offset()),
                       .kv_norm = w.kv_a_norm,
                       .eps = kLatentNormEps,
                       .cos = b_.cos,
                       .sin = b_.sin,
                       .cache = cache,
                       .q_full = b_.q_full.data,
                       .q_tap = q_tap,
                       .c_tap = c_tap,
                       .k_tap = k_tap,
                       .query_scale = b_.query_scale});
        tap("c_kv", c_tap, {r});
        tap("k_rope", k_tap, {dr});
        tap("q", q_tap, {heads, c_.qk_head_dim()});
        tap("q_absorbed", View<float>{b_.q_full.data, c_.q_full_width()}, {heads, r}, r);
    }

    void latent_attention(const LayerWeights& w, const LatentCache& cache) {
        const int heads = c_.num_attention_heads, r = c_.kv_lora_rank;
        const bool single = n_ <= kBlockRows && !t_.long_context;
        const int limit = single ? std::min(cache.ctx, kShortContext) : cache.ctx, chunks = single ? 1 : kPartialChunks;
        const Partials part{.n_heads = heads,
                            .c_pad = cache.c_pad,
                            .chunks = chunks,
                            .max_units = static_cast<int>(ceil_div(limit, int64_t{kChunk} * chunks)),
                            .o = b_.part_o,
                            .ml = b_.part_ml};
        const View<float> latent_tap = room(int64_t{heads} * r);
        // as many rows at once as the buffer of partials has room for
        const int step = static_cast<int>(std::max<int64_t>(1, b_.part_units / part.max_units));
        for (int i = 0; i < n_; i += step) {  // all rows at once in short passes
            const PassRows rows{.n = std::min(step, n_ - i), .n_live = t_.rows.n_live, .pos = t_.rows.pos + i};
            add(AttendArgs{.rows = rows,
                           .softmax_scale = softmax_scale_,
                           .q_full = b_.q_full.row(i),
                           .cache = cache,
                           .part = part});
            reads(w.w_uv, heads);
            add(ValueArgs{.rows = rows,
                          .w_uv = w.w_uv,
                          .dv = c_.v_head_dim,
                          .ctx = cache.ctx,
                          .part = part,
                          .v = b_.v.from(i),
                          .latent_tap = t_.trace ? latent_tap.from(i) : View<float>{}});
        }
        tap("attn_latent", latent_tap, {heads, r});
    }

    // ---- FFN -------------------------------------------------------------------------------------------------------

    void ffn(const LayerWeights& w, int layer_idx) {
        const int d = c_.hidden_size, k = c_.num_experts_per_tok;
        const PackedTensor &gate_up = w.moe ? w.shared_gate_up : w.w_gate_up,
                           &shared = w.moe ? w.shared_down : w.w_down;
        const View<float> norm_tap = room(d);
        reads(gate_up);
        reads(w.router);
        add(FfnInArgs{.rows = t_.rows,
                      .x = b_.x,
                      .norm = norm(w.ffn_norm, norm_tap),
                      .w_gate_up = gate_up,
                      .width = w.moe ? c_.n_shared_experts * c_.moe_intermediate_size : c_.intermediate_size,
                      .h = b_.ffn_h,
                      .router = w.router,
                      .logits = b_.gate_logits});
        tap("ffn_norm", norm_tap, {d});
        Routing routing;
        if (w.moe) {
            tap("gate_logits", b_.gate_logits, {c_.n_routed_experts});
            routing = {.router = c_.router(w.router_bias), .logits = b_.gate_logits};
            routing.router.topk_idx = topk_of(layer_idx);
            routing.router.topk_weight = b_.topk_weight;
            if (n_ > kBlockRows) add(RouteArgs{.rows = t_.rows, .routing = routing});
            reads(w.experts_gate_up, int64_t{n_} * k);
            add(ExpertsArgs{.rows = t_.rows,
                            .x = b_.x,
                            .norm = norm(w.ffn_norm),
                            .w = w.experts_gate_up,
                            .width = c_.moe_intermediate_size,
                            .routing = routing,
                            .h = b_.expert_h});
            tap("topk_idx", View<int32_t>{routing.router.topk_idx, k}, {k});
            tap("topk_weight", View<float>{routing.router.topk_weight, k}, {k});
            reads(w.experts_down, int64_t{n_} * k);
        }
        reads(shared);
        const View<float> routed = !w.moe            ? View<float>{}
                                   : n_ > kBlockRows ? View<float>{b_.routed, b_.x.stride}
                                                     : room(d);
        const View<float> shared_tap = shared.rows > 0 ? room(d) : View<float>{};
        add(DownArgs{.rows = t_.rows,
                     .experts = w.experts_down,
                     .routing = routing,
                     .h = b_.expert_h,
                     .shared = shared,
                     .shared_h = b_.ffn_h,
                     .x = b_.x,
                     .routed = routed.data,
                     .shared_tap = shared_tap.data,
                     .scale = c_.residual_scale});
        if (w.moe) tap("routed_out", routed, {d});
        if (shared.rows > 0) tap(w.moe ? "shared_out" : "ffn_out", shared_tap, {d});
    }

    // Experts of each layer stay for the host and the counts: [moe layer, rows, topk].
    int32_t* topk_of(int layer_idx) const {
        const int slot = layer_idx - (c_.n_routed_experts > 0 ? c_.first_k_dense_replace : 0);
        return b_.topk_idx + slot * b_.rows * c_.num_experts_per_tok;
    }

    void layer(const LayerWeights& w, int cache_layer, int layer_idx) {
        tap_used_ = 0;
        attention(w, cache_layer);
        ffn(w, layer_idx);
        tap("layer_out", b_.x, {c_.hidden_size});
    }

    // ---- head ------------------------------------------------------------------------------------------------------

    // Final norm of every row (MTP reads all of them); logits of the last n_logits. A long pass leaves that to rows_head().
    void head(const PackedTensor& w, const float* final_norm) {
        const bool all = n_ <= kBlockRows || t_.n_logits <= 1;
        if (t_.n_logits > 0 && all) reads(w);
        add_head(w, norm(final_norm, b_.h), b_.x, all ? n_ - t_.n_logits : n_);
        tap("final_norm", b_.h, {c_.hidden_size});
    }
    void add_head(const PackedTensor& w, const Norm& norm, const View<float>& x, int first_row) {
        add(HeadArgs{.rows = t_.rows,
                     .first_row = first_row,
                     .x = x,
                     .norm = norm,
                     .w = w,
                     .n_valid = t_.n_valid,
                     .logits = b_.logits,
                     .choice = t_.choice,
                     .best_value = b_.best_value,
                     .best_id = b_.best_id,
                     .arrived = b_.arrived,
                     .scale = c_.logit_scale});
    }

    const ModelConfig& c_;
    const ModelWeights& w_;
    const Buffers& b_;
    const float softmax_scale_;
    const rt::DeviceInfo& device_;
    const int threads_;  // of a block
    Program& p_;
    PassShape t_;
    int n_ = 1;
    int64_t bytes_ = 0, tap_used_ = 0;
    std::string prefix_;
};

}  // namespace deepcalm::gpu
