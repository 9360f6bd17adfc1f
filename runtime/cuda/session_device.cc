// What a session does differently when its cache and passes live on a device. The bookkeeping is Session's own.
#include "runtime/session.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace deepcalm {
namespace {

// What a device pass asks of a trace and hands to it. The library's frames are no place for an exception.
struct Taps {
    Trace& to;
    std::map<std::string, std::vector<float>>& feed;
    std::vector<std::string> fed{};
    bool out_of_memory = false;
    template <class Fn> void guarded(Fn&& fn) noexcept {
        try {
            fn();
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    }
};
DeviceTrace callbacks(Taps& taps) {
    return {.ctx = &taps,
            .wants =
                [](void* ctx, const char* name) noexcept {
                    auto* t = static_cast<Taps*>(ctx);
                    bool wanted = false;
                    t->guarded([&] { wanted = t->to.wants(name); });
                    return wanted;
                },
            .record =
                [](void* ctx, const char* name, const void* data, bool is_int, int64_t rows, const int64_t* dims,
                   int n_dims, int64_t stride) noexcept {
                    auto* t = static_cast<Taps*>(ctx);
                    t->guarded([&] {
                        std::vector<int64_t> shape(dims, dims + n_dims);
                        if (is_int) {
                            t->to.record(name, static_cast<const int32_t*>(data), rows, std::move(shape), stride);
                        } else {
                            t->to.record(name, static_cast<const float*>(data), rows, std::move(shape), stride);
                        }
                    });
                },
            .take = [](void* ctx, const char* name, int64_t* n) noexcept -> const float* {
                auto* t = static_cast<Taps*>(ctx);
                const float* data = nullptr;
                t->guarded([&] {
                    const auto it = t->feed.find(name);
                    if (it == t->feed.end()) return;
                    t->fed.push_back(it->first);
                    *n = static_cast<int64_t>(it->second.size());
                    data = it->second.data();
                });
                return data;
            }};
}

}  // namespace

Status Session::not_decoding(const char* what) const {
    if (!decoding_) return {};
    return Error{ErrorCode::kSession, std::string(what) + ": decoding on the device is not finished"};
}

Status Session::forward_device(const PassArgs& a) {
    const ModelConfig& c = model_.cfg();
    const auto n = static_cast<int>(a.ids.size());
    const int first = a.mtp ? c.num_hidden_layers : 0, end = a.mtp ? first + 1 : c.num_hidden_layers;
    const int first_moe = std::max(first, c.n_routed_experts > 0 ? c.first_k_dense_replace : end);
    const int moe_layers = std::max(end - first_moe, 0), k = moe_layers > 0 ? c.num_experts_per_tok : 0;
    std::vector<int32_t> topk(static_cast<size_t>(moe_layers) * a.ids.size() * static_cast<size_t>(k));
    std::map<std::string, std::vector<float>> feed;
    feed.swap(a.trace.feed);
    Taps taps{a.trace, feed};
    const DeviceTrace trace = callbacks(taps);
    DeviceError error;
    const DevicePass pass{.ids = a.ids.data(),
                          .n = n,
                          .mtp = a.mtp,
                          .hidden = a.hidden,
                          .pos = a.pos,
                          .n_logits = a.n_logits,
                          .logits = a.logits,
                          .logits_stride = c.logits_stride(),
                          .final_h = state_.final_h.f32,
                          .hidden_stride = state_.final_h.stride(),
                          .topk = topk.data(),
                          .trace = a.trace.on() || !feed.empty() ? &trace : nullptr};
    const int64_t start = now_ns();
    if (!model_.device().api->forward(device_.get(), pass, error)) return to_error(error);
    if (taps.out_of_memory) return Error{ErrorCode::kResource, "trace: no memory for the taps of this pass"};
    for (const std::string& name : taps.fed) feed.erase(name);
    if (!feed.empty()) {
        return Error{ErrorCode::kSession,
                     "feed: '" + feed.begin()->first + "' is no embed, gate_logits or layer_out of this pass"};
    }
    stats_.seconds += 1e-9 * static_cast<double>(now_ns() - start);

    const size_t per_layer = a.ids.size() * static_cast<size_t>(k);
    const bool window = !a.mtp && n <= ExpertUnion::kMaxWindow;
    if (!a.mtp) state_.pass_experts.clear();
    const ModelWeights& w = model_.weights();
    std::vector<bool> seen(static_cast<size_t>(c.n_routed_experts));
    for (int l = 0; l < moe_layers; ++l) {
        std::fill(seen.begin(), seen.end(), false);
        int64_t touched = 0;
        for (size_t i = 0; i < per_layer; ++i) {
            const int32_t e = topk[static_cast<size_t>(l) * per_layer + i];
            if (e < 0 || e >= c.n_routed_experts) {
                return Error{ErrorCode::kResource, "device: expert " + std::to_string(e) + " of layer " +
                                                       std::to_string(first_moe + l) + " does not exist"};
            }
            touched += seen[static_cast<size_t>(e)] ? 0 : 1;
            seen[static_cast<size_t>(e)] = true;
            if (window) state_.pass_experts.push_back((first_moe + l) * c.n_routed_experts + e);
        }
        stats_.experts_touched += touched;
        stats_.weight_bytes +=
            touched * (a.mtp ? w.mtp_layer : w.layers[static_cast<size_t>(first_moe + l)]).expert_bytes();
    }
    // Stage by stage, a device pass is timed by report("stages"), not here.
    const WeightBytes& b = model_.weight_bytes();
    stats_.passes += 1;
    stats_.rows += n;
    stats_.mtp_passes += a.mtp ? 1 : 0;
    stats_.mtp_rows += a.mtp ? n : 0;
    stats_.weight_bytes += (a.mtp ? b.mtp_fixed : b.fixed) + n * b.embed_row +
                           (a.n_logits == 0 ? 0
                            : a.mtp         ? b.mtp_head
                                            : b.head);
    stats_.cache_bytes += (a.pos + n) * a.cache.row_bytes() * a.cache.n_layers();
    return {};
}

Status Session::decode_start(int32_t token, const SampleParams& p, int n_valid, int64_t max_tokens,
                             std::span<const int32_t> eos) {
    const std::lock_guard lock(model_.pass_mutex());
    if (device_ == nullptr)
        return Error{ErrorCode::kUnsupported, "decode: this session runs on the CPU, which decodes round by round"};
    DC_TRY_STATUS(check(cache_, {&token, 1}, "decode"));
    if (eos.size() > kMaxEos) {
        return Error{ErrorCode::kSession, "decode: " + std::to_string(eos.size()) + " end tokens, at most " +
                                              std::to_string(kMaxEos) + " on a device"};
    }
    if (keep_mtp_) DC_TRY_STATUS(restore_pending());
    emitted_ = tokens_;
    emitted_.push_back(token);
    DeviceError error;
    const DeviceDecode d{.tokens = emitted_.data(),
                         .n = cache_.len,
                         .keeps_mtp = keep_mtp_,
                         .n_pending = keep_mtp_ ? n_pending() : 0,
                         .pending = pending_.data(),
                         .max_tokens = max_tokens,
                         .n_valid = std::min(n_valid, model_.cfg().vocab_size),
                         .temp = p.temp,
                         .top_p = p.top_p,
                         .min_p = p.min_p,
                         .top_k = p.top_k,
                         .seed = p.seed,
                         .eos = eos.data(),
                         .n_eos = static_cast<int>(eos.size())};
    if (!model_.device().api->decode_start(device_.get(), d, error)) return to_error(error);
    decoding_ = true;
    recent_.clear();
    last_rows_ = 0;
    return {};
}

Status Session::decode_step(int k) {
    const std::lock_guard lock(model_.pass_mutex());
    if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
    if (k < 0 || k >= kMaxRound || (k > 0 && !keep_mtp_)) {
        return Error{ErrorCode::kSession, "decode: " + std::to_string(k) + " drafts, expected 0.." +
                                              std::to_string(keep_mtp_ ? kMaxRound - 1 : 0)};
    }
    DeviceError error;
    if (!model_.device().api->decode_step(device_.get(), k, error)) return to_error(error);
    return {};
}

Result<std::vector<DeviceRound>> Session::decode_poll(int& left, std::chrono::milliseconds patience) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + patience;; std::this_thread::sleep_for(std::chrono::microseconds(20))) {
        const std::lock_guard lock(model_.pass_mutex());
        if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
        auto rounds = poll_rounds(left);
        if (!rounds.ok() || !rounds.value().empty() || left == 0 || Clock::now() >= end) return rounds;
    }
}

Result<std::vector<DeviceRound>> Session::poll_rounds(int& left) {
    std::vector<DeviceRound> out(64);
    DeviceError error;
    const int n =
        model_.device().api->decode_poll(device_.get(), out.data(), static_cast<int>(out.size()), left, error);
    if (n < 0) return to_error(error);
    out.resize(static_cast<size_t>(n));
    for (const DeviceRound& r : out) {
        if (r.n_tokens < 0 || r.n_tokens > kMaxRound)
            return Error{ErrorCode::kResource, "device: a round of " + std::to_string(r.n_tokens) + " tokens"};
        emitted_.insert(emitted_.end(), r.tokens, r.tokens + r.n_tokens);
    }
    return out;
}

Result<DeviceDecodeState> Session::decode_finish() {
    const std::lock_guard lock(model_.pass_mutex());
    if (!decoding_) return Error{ErrorCode::kSession, "decode: not started"};
    decoding_ = false;
    const DeviceApi* api = model_.device().api;
    const auto d = static_cast<size_t>(model_.cfg().hidden_size);
    std::vector<float> pending(keep_mtp_ ? (kMaxPending + kMaxRound) * d : 0);
    DeviceDecodeState s;
    DeviceError error;
    bool ok = api->decode_finish(device_.get(), s, pending.data(), error);
    for (int left = 1; ok && left > 0;) {  // what nobody polled
        DC_TRY([[maybe_unused]] const auto rounds, poll_rounds(left));
    }
    if (ok && (s.n < cache_.len || s.n > cache_.ctx() || s.n >= static_cast<int64_t>(emitted_.size()))) {
        ok = false;
        std::snprintf(error.text, sizeof error.text, "device: %d cached tokens of %zu", s.n, emitted_.size());
    }
    if (!ok) return to_error(error);  // the session is as it was before decode_start()
    emitted_.resize(static_cast<size_t>(s.n));
    tokens_ = std::move(emitted_);
    cache_.len = s.n;
    if (keep_mtp_) {
        mtp_cache_.len = s.n - s.n_pending;
        pending.resize(static_cast<size_t>(s.n_pending) * d);
        pending_ = std::move(pending);
    }
    const WeightBytes& b = model_.weight_bytes();
    stats_.passes += s.passes + s.mtp_passes;
    stats_.rows += s.rows + s.mtp_rows;
    stats_.mtp_passes += s.mtp_passes;
    stats_.mtp_rows += s.mtp_rows;
    stats_.experts_touched += s.experts + s.mtp_experts;
    stats_.weight_bytes += s.passes * (b.fixed + b.head) + s.mtp_passes * (b.mtp_fixed + b.mtp_head) +
                           (s.rows + s.mtp_rows) * b.embed_row + s.mtp_experts * b.mtp_expert +
                           s.experts * b.experts / std::max(b.n_moe_layers, 1);  // of all layers alike
    stats_.cache_bytes += cache_.row_bytes() * (s.cache_rows * cache_.n_layers() + s.mtp_cache_rows);
    if (keep_mtp_ && n_pending() > kMaxPending) DC_TRY_STATUS(catch_up(nullptr, 0));
    return s;
}

}  // namespace deepcalm
