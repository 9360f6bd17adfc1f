// The forward pass, CUDA transcription: which stages run on which buffers, in order. Same sections and taps as
// runtime/cpu/forward.cc and tests/ref/model.py. Here a pass is only written down, as a list of stage calls that backend.cu
// runs as a graph of kernels.
#pragma once

#include "kernels/cuda/stages.h"
#include "runtime/cuda/decode.cuh"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace deepcalm::gpu {

#define DEEPCALM_CUDA_ALL_STAGES(X) DEEPCALM_CUDA_STAGES(X) DEEPCALM_CUDA_DECODE_STAGES(X)

#define X(name, Args)                                                                                                  \
    constexpr const char* stage_name(const Args&) { return #name; }                                                    \
    rt::Error launch_stage(const rt::LaunchConfig& config, const Fit& fit, const Args& args);
DEEPCALM_CUDA_ALL_STAGES(X)
#undef X

// One stage call.
struct Op {
    std::string name;  // of the stage; products with their shape, of which a layer has four
    int blocks = 1;
    int64_t smem = 0;   // with the session's threads a block
    int64_t need = 0;   // with kThreads: what a device must give
    int64_t bytes = 0;  // weights read by one row (of the chosen experts: by all rows, counted as if none were shared)
    int64_t row_bytes = 0;  // of the cache, read at every position
    std::function<rt::Error(const rt::LaunchConfig&)> launch;
};

// An intermediate to copy out after `op`: `vectors` vectors of `width`, `stride` apart, shape [rows, dims...].
struct TapOut {
    size_t op = 0;
    std::string name;
    void* data = nullptr;
    bool is_int = false;
    bool input = false;  // the buffer that the following stages read: new values there take effect
    int64_t vectors = 0, width = 0, stride = 0, rows = 0;
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
    float *x = nullptr, *eh = nullptr, *h = nullptr, *qkv = nullptr, *q = nullptr, *q_full = nullptr, *v = nullptr;
    float *ffn_h = nullptr, *expert_h = nullptr, *gate_logits = nullptr, *topk_weight = nullptr;
    float* routed = nullptr;  // [R, x_stride] routed sums of long passes
    int64_t x_stride = 0, eh_stride = 0, v_stride = 0, ffn_stride = 0, expert_stride = 0;
    int32_t* topk_idx = nullptr;  // [moe layers + 1 for MTP, R, topk]
    float *part_o = nullptr, *part_ml = nullptr;
    int64_t part_units = 0;   // (row, unit) pairs of `part`
    float* logits = nullptr;  // [max(kLogitRows, kBlockRows), logits_stride()]
    float* best_value = nullptr;
    int32_t* best_id = nullptr;
    unsigned* arrived = nullptr;
    float *cos = nullptr, *sin = nullptr;              // [ctx, dr / 2]
    std::byte *cache = nullptr, *mtp_cache = nullptr;  // [layers, ctx, row_stride]
    int64_t row_stride = 0;                            // bytes: cache_row_bytes rounded up to 16
    float* hidden = nullptr;                           // [R, d] MTP input of a pass from the host
    float* pend = nullptr;                             // [kMaxPending + kMaxRound, d]
    float* g = nullptr;                                // [d]
    int32_t *ids = nullptr, *pos = nullptr;            // [R] of a pass from the host; pos[i] = position of row i
    int32_t* tokens = nullptr;                         // [ctx + kMaxRound]
    int32_t* choice = nullptr;                         // [R]
    Loop* loop = nullptr;
    float* taps = nullptr;  // [R, tap_stride], allocated with the first trace
    int64_t tap_stride = 0;
};

// What one pass is made for.
struct PassShape {
    int n = 1;
    bool mtp = false;
    int n_logits = 0;                 // the last n_logits rows
    bool long_context = false;        // some position may reach kShortContext
    const int32_t* ids = nullptr;     // device
    const int32_t* pos = nullptr;     // device [n] or, for n <= kBlockRows, of row 0 alone
    const int32_t* n_live = nullptr;  // device or null
    const float* hidden = nullptr;    // MTP: device [n, d]
    int64_t hidden_stride = 0;
    int32_t* choice = nullptr;  // [n_logits] argmax
    int n_valid = 0;
    bool trace = false;
};

// Appends the stages of a pass.
class PassWriter {
  public:
    PassWriter(const ModelConfig& c, const ModelWeights& w, const Buffers& b, const DeviceSessionArgs& session,
               float softmax_scale, int sms, int threads, int64_t smem, Program& program)
        : c_(c), w_(w), b_(b), s_(session), softmax_scale_(softmax_scale), sms_(sms), threads_(threads), smem_(smem),
          p_(program) {}

    void pass(const PassShape& shape) {
        t_ = shape;
        n_ = t_.n;
        const int64_t d = c_.hidden_size;
        if (t_.mtp) {
            prefix_ = "mtp.";
            embed(b_.eh, b_.eh_stride);
            add(ProductArgs{
                .rows = rows(),
                .w = w_.mtp_eh_proj,
                .x = b_.eh,
                .x_stride = b_.eh_stride,
                .norm = {.w = w_.mtp_enorm, .w2 = w_.mtp_hnorm, .width = c_.hidden_size, .eps = c_.rms_norm_eps},
                .y = b_.x,
                .y_stride = b_.x_stride});
            tap("embed", b_.x, {d}, b_.x_stride);
            layer(w_.mtp_layer, 0, c_.num_hidden_layers);
            head(w_.draft_head(), w_.mtp_final_norm);
            return;
        }
        embed(b_.x, b_.x_stride);
        tap("embed", b_.x, {d}, b_.x_stride);
        for (int i = 0; i < c_.num_hidden_layers; ++i) {
            prefix_ = "layers." + std::to_string(i) + ".";
            layer(w_.layers[static_cast<size_t>(i)], i, i);
        }
        prefix_.clear();
        head(w_.head, w_.final_norm);
    }

    template <class A> void add(const A& args) {
        // kThreads: what a simulated device of fewer threads a block takes is what the real one would
        const Fit& f = fit(args, n_ <= kBlockRows ? 1 : kPrefillBlocks, kThreads, smem_);
        Op op{.name = stage_name(args),
              .blocks = std::max(1, std::min(stage_units(args), sms_)),
              .smem = smem_bytes(args, f, threads_),
              .need = smem_bytes(args, f, kThreads),
              .bytes = bytes_,
              .launch = [args, f](const rt::LaunchConfig& c) { return launch_stage(c, f, args); }};
        if constexpr (std::is_same_v<A, ProductArgs>)
            op.name += " " + std::to_string(args.w.rows) + "x" + std::to_string(args.w.cols);
        if constexpr (std::is_same_v<A, AttendArgs>) op.row_bytes = args.row_bytes;
        bytes_ = 0;
        p_.ops.push_back(std::move(op));
    }

    // Rows of a long pass whose attention shares the partial buffer: as many as it has room for.
    int attention_rows(int units) const { return static_cast<int>(std::max<int64_t>(1, b_.part_units / units)); }

  private:
    Rows rows() const { return {.n = n_, .n_live = t_.n_live, .pos = t_.pos}; }
    void reads(const PackedTensor& t, int64_t slices = 1) { bytes_ += slices * t.read_bytes(); }

    void tap(const char* name, void* data, std::vector<int64_t> dims, int64_t stride, bool is_int = false) {
        int64_t width = 1;
        for (const int64_t d : dims) width *= d;
        if (t_.trace) {
            p_.taps.push_back({.op = p_.ops.size() - 1,
                               .name = prefix_ + name,
                               .data = data,
                               .is_int = is_int,
                               .input = data == b_.x || data == b_.gate_logits,
                               .vectors = n_,
                               .width = width,
                               .stride = stride,
                               .rows = n_,
                               .dims = std::move(dims)});
        }
    }
    // Room for a tap of `width` columns; null when nobody records. Valid until the layer's next begin_taps().
    float* room(int64_t width) {
        if (!t_.trace) return nullptr;
        float* p = b_.taps + tap_used_;
        tap_used_ += b_.rows * round_up(width, 4);
        return p;
    }

    void embed(float* x, int64_t stride) {
        bytes_ = w_.embed.row_bytes();
        add(EmbedArgs{.rows = rows(),
                      .ids = t_.ids,
                      .table = w_.embed.data,
                      .format = w_.embed.format,
                      .vocab = c_.vocab_size,
                      .d = c_.hidden_size,
                      .x = x,
                      .x_stride = stride,
                      .hidden = t_.hidden,
                      .hidden_stride = t_.hidden_stride});
        if (t_.mtp) reads(w_.mtp_eh_proj);
    }

    // ---- attention -------------------------------------------------------------------------------------------------

    void attention(const LayerWeights& w, int cache_layer) {
        const int heads = c_.num_attention_heads, dn = c_.qk_nope_head_dim, dr = c_.qk_rope_head_dim,
                  r = c_.kv_lora_rank, dv = c_.v_head_dim;
        const int64_t d = c_.hidden_size, dqk = dn + dr;
        const int c_pad = c_.c_pad(), r_pad = c_.r_pad();
        std::byte* cache = (t_.mtp ? b_.mtp_cache : b_.cache) + cache_layer * s_.ctx * b_.row_stride;

        float* norm_tap = room(d);
        reads(w.wqkv_a);
        add(ProductArgs{.rows = rows(),
                        .w = w.wqkv_a,
                        .x = b_.x,
                        .x_stride = b_.x_stride,
                        .norm = {.w = w.attn_norm,
                                 .width = c_.hidden_size,
                                 .eps = c_.rms_norm_eps,
                                 .out = norm_tap,
                                 .out_stride = round_up(d, 4)},
                        .y = b_.qkv,
                        .y_stride = c_.qkv_a_stride()});
        tap("attn_norm", norm_tap, {d}, round_up(d, 4));
        if (c_.q_lora_rank > 0) {
            const int64_t rq = round_up(c_.q_lora_rank, 4);
            float* q_a_tap = room(rq);
            reads(w.wq_b);
            add(ProductArgs{
                .rows = rows(),
                .w = w.wq_b,
                .x = b_.qkv,
                .x_stride = c_.qkv_a_stride(),
                .norm =
                    {.w = w.q_a_norm, .width = c_.q_lora_rank, .eps = kLatentNormEps, .out = q_a_tap, .out_stride = rq},
                .y = b_.q,
                .y_stride = c_.q_stride()});
            tap("q_a", q_a_tap, {c_.q_lora_rank}, rq);
        }
        float *q_tap = room(c_.q_width()), *c_tap = room(r), *k_tap = room(dr);
        reads(w.w_uk, heads);
        add(AbsorbArgs{.rows = rows(),
                       .w_uk = w.w_uk,
                       .n_heads = heads,
                       .dn = dn,
                       .dr = dr,
                       .r = r,
                       .c_pad = c_pad,
                       .r_pad = r_pad,
                       .q = b_.q,
                       .q_stride = c_.q_stride(),
                       .kv = b_.qkv + c_.kv_offset(),
                       .kv_stride = c_.qkv_a_stride(),
                       .kv_norm = w.kv_a_norm,
                       .eps = kLatentNormEps,
                       .cos = b_.cos,
                       .sin = b_.sin,
                       .ctx = s_.ctx,
                       .type = s_.kv,
                       .cache = cache,
                       .row_bytes = b_.row_stride,
                       .q_full = b_.q_full,
                       .q_tap = q_tap,
                       .c_tap = c_tap,
                       .k_tap = k_tap});
        tap("c_kv", c_tap, {r}, r);
        tap("k_rope", k_tap, {dr}, dr);
        tap("q", q_tap, {heads, dqk}, c_.q_width());
        if (t_.trace) {
            tap("q_absorbed", b_.q_full, {heads, r}, c_.q_full_width());
            TapOut& q = p_.taps.back();  // one vector per (row, head)
            q.vectors = int64_t{n_} * heads;
            q.width = r;
        }

        const bool single = n_ <= kBlockRows && !t_.long_context;
        const int unit_chunks = single ? 1 : kPartialChunks;
        const int limit = single ? std::min(s_.ctx, kShortContext) : s_.ctx;
        const int units = static_cast<int>(ceil_div(limit, int64_t{kChunk} * unit_chunks));
        float* latent_tap = room(int64_t{heads} * r);
        const int step = attention_rows(units);
        for (int i = 0; i < n_; i += step) {  // all rows at once in short passes
            const Rows part{.n = std::min(step, n_ - i), .n_live = t_.n_live, .pos = t_.pos + i};
            add(AttendArgs{.rows = part,
                           .n_heads = heads,
                           .c_pad = c_pad,
                           .r_pad = r_pad,
                           .ctx = s_.ctx,
                           .softmax_scale = softmax_scale_,
                           .q_full = b_.q_full + int64_t{i} * heads * c_.q_full_width(),
                           .type = s_.kv,
                           .cache = cache,
                           .row_bytes = b_.row_stride,
                           .unit_chunks = unit_chunks,
                           .max_units = units,
                           .part_o = b_.part_o,
                           .part_ml = b_.part_ml});
            reads(w.w_uv, heads);
            add(ValueArgs{.rows = part,
                          .w_uv = w.w_uv,
                          .n_heads = heads,
                          .dv = dv,
                          .c_pad = c_pad,
                          .ctx = s_.ctx,
                          .unit_chunks = unit_chunks,
                          .max_units = units,
                          .part_o = b_.part_o,
                          .part_ml = b_.part_ml,
                          .v = b_.v + i * b_.v_stride,
                          .v_stride = b_.v_stride,
                          .latent_tap = latent_tap == nullptr ? nullptr : latent_tap + int64_t{i} * heads * r});
        }
        tap("attn_latent", latent_tap, {heads, r}, int64_t{heads} * r);
        float* out_tap = room(d);
        reads(w.wo);
        add(ProductArgs{.rows = rows(),
                        .w = w.wo,
                        .x = b_.v,
                        .x_stride = b_.v_stride,
                        .norm = {},
                        .y = b_.x,
                        .y_stride = b_.x_stride,
                        .add = true,
                        .tap = out_tap,
                        .tap_stride = round_up(d, 4)});
        tap("attn_out", out_tap, {d}, round_up(d, 4));
    }

    // ---- FFN -------------------------------------------------------------------------------------------------------

    void ffn(const LayerWeights& w, int layer_idx) {
        const int64_t d = c_.hidden_size, d4 = round_up(d, 4);
        const PackedTensor &gate_up = w.moe ? w.shared_gate_up : w.w_gate_up,
                           &shared = w.moe ? w.shared_down : w.w_down;
        float* norm_tap = room(d);
        const Norm norm{.w = w.ffn_norm, .width = c_.hidden_size, .eps = c_.rms_norm_eps};
        FfnInArgs in;
        in.rows = rows();
        in.x = b_.x;
        in.x_stride = b_.x_stride;
        in.norm = norm;
        in.norm.out = norm_tap;
        in.norm.out_stride = d4;
        in.w_gate_up = gate_up;
        in.width = w.moe ? c_.n_shared_experts * c_.moe_intermediate_size : c_.intermediate_size;
        in.h = b_.ffn_h;
        in.h_stride = b_.ffn_stride;
        if (w.moe) {
            in.router = w.router;
            in.logits = b_.gate_logits;
            in.logits_stride = c_.gate_logits_stride();
        }
        reads(gate_up);
        reads(w.router);
        add(in);
        tap("ffn_norm", norm_tap, {d}, d4);
        DownArgs down;
        down.rows = rows();
        if (w.moe) {
            const int k = c_.num_experts_per_tok;
            tap("gate_logits", b_.gate_logits, {c_.n_routed_experts}, c_.gate_logits_stride());
            const Routing routing{.logits = b_.gate_logits,
                                  .logits_stride = c_.gate_logits_stride(),
                                  .bias = w.router_bias,
                                  .n_experts = c_.n_routed_experts,
                                  .topk = k,
                                  .n_group = c_.n_group,
                                  .topk_group = c_.topk_group,
                                  .scoring_func = c_.scoring_func,
                                  .topk_method = c_.topk_method,
                                  .norm_topk_prob = c_.norm_topk_prob,
                                  .scale = c_.routed_scaling_factor,
                                  .topk_idx = topk_of(layer_idx),
                                  .topk_weight = b_.topk_weight};
            if (n_ > kBlockRows) add(RouteArgs{.rows = rows(), .routing = routing});
            reads(w.experts_gate_up, int64_t{n_} * k);
            add(ExpertsArgs{.rows = rows(),
                            .x = b_.x,
                            .x_stride = b_.x_stride,
                            .norm = norm,
                            .w = w.experts_gate_up,
                            .width = c_.moe_intermediate_size,
                            .routing = routing,
                            .h = b_.expert_h,
                            .h_stride = b_.expert_stride});
            tap("topk_idx", routing.topk_idx, {k}, k, true);
            tap("topk_weight", routing.topk_weight, {k}, k);
            reads(w.experts_down, int64_t{n_} * k);
            down.experts = w.experts_down;
            down.routing = routing;
            down.h = b_.expert_h;
            down.h_stride = b_.expert_stride;
        }
        down.shared = shared;
        down.shared_h = b_.ffn_h;
        down.shared_h_stride = b_.ffn_stride;
        down.x = b_.x;
        down.x_stride = b_.x_stride;
        down.routed = !w.moe ? nullptr : n_ > kBlockRows ? b_.routed : room(d);
        down.shared_tap = shared.rows > 0 ? room(d) : nullptr;
        reads(shared);
        add(down);
        if (w.moe) tap("routed_out", down.routed, {d}, b_.x_stride);
        if (shared.rows > 0) tap(w.moe ? "shared_out" : "ffn_out", down.shared_tap, {d}, b_.x_stride);
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
        tap("layer_out", b_.x, {c_.hidden_size}, b_.x_stride);
    }

    // ---- head ------------------------------------------------------------------------------------------------------

    // Final norm of every row (MTP reads all of them); logits of the last n_logits. A long pass leaves that to rows_head().
    void head(const PackedTensor& w, const float* norm) {
        const bool all = n_ <= kBlockRows || t_.n_logits <= 1;
        if (t_.n_logits > 0 && all) reads(w);
        add(HeadArgs{
            .rows = rows(),
            .first_row = all ? n_ - t_.n_logits : n_,
            .x = b_.x,
            .x_stride = b_.x_stride,
            .norm =
                {.w = norm, .width = c_.hidden_size, .eps = c_.rms_norm_eps, .out = b_.h, .out_stride = b_.x_stride},
            .w = w,
            .n_valid = t_.n_valid,
            .logits = b_.logits,
            .logits_stride = c_.logits_stride(),
            .choice = t_.choice,
            .best_value = b_.best_value,
            .best_id = b_.best_id,
            .arrived = b_.arrived});
        tap("final_norm", b_.h, {c_.hidden_size}, b_.x_stride);
    }

  public:
    // Logits of rows [begin, begin + n) of a long pass whose head() only made the norm.
    void rows_head(bool mtp, int begin, int n, int n_valid, const int32_t* pos) {
        n_ = n;
        const PackedTensor& w = mtp ? w_.draft_head() : w_.head;
        reads(w);
        add(HeadArgs{
            .rows = {.n = n, .n_live = nullptr, .pos = pos + begin},
            .first_row = 0,
            .x = b_.x + begin * b_.x_stride,
            .x_stride = b_.x_stride,
            .norm = {.w = mtp ? w_.mtp_final_norm : w_.final_norm, .width = c_.hidden_size, .eps = c_.rms_norm_eps},
            .w = w,
            .n_valid = n_valid,
            .logits = b_.logits,
            .logits_stride = c_.logits_stride(),
            .choice = b_.choice,
            .best_value = b_.best_value,
            .best_id = b_.best_id,
            .arrived = b_.arrived});
    }

  private:
    const ModelConfig& c_;
    const ModelWeights& w_;
    const Buffers& b_;
    const DeviceSessionArgs& s_;
    const float softmax_scale_;
    const int sms_, threads_;
    const int64_t smem_;  // bytes that a block may have
    Program& p_;
    PassShape t_;
    int n_ = 1;
    int64_t bytes_ = 0, tap_used_ = 0;
    std::string prefix_;
};

}  // namespace deepcalm::gpu
