#include "runtime/model.h"

#include "runtime/float_mode.h"

namespace deepcalm {
namespace {

int64_t tensor_bytes(const PackedTensor& t) {
    if (t.rows == 0) return 0;
    return t.n_bytes() + (t.scales != nullptr ? 4 * t.n_slices * t.slice_scales() : 0);
}

int64_t fixed_bytes(const LayerWeights& w, const ModelConfig& c) {
    int64_t n = 4 * (2 * int64_t{c.hidden_size} + c.kv_lora_rank + c.q_lora_rank);
    for (const PackedTensor* t : {&w.wqkv_a, &w.wq_b, &w.w_uk, &w.w_uv, &w.wo, &w.w_gate_up, &w.w_down, &w.router,
                                  &w.shared_gate_up, &w.shared_down}) {
        n += tensor_bytes(*t);
    }
    return n + (w.router_bias != nullptr ? 4 * int64_t{c.n_routed_experts} : 0);
}

}  // namespace

int64_t expert_bytes(const LayerWeights& w, const ModelConfig& c) {
    return w.moe ? (tensor_bytes(w.experts_gate_up) + tensor_bytes(w.experts_down)) / c.n_routed_experts : 0;
}

namespace {

WeightBytes count_bytes(const ModelWeights& w, const ModelConfig& c) {
    WeightBytes b;
    for (const LayerWeights& l : w.layers) {
        b.fixed += fixed_bytes(l, c);
        b.n_moe_layers += l.moe ? 1 : 0;
        b.experts += expert_bytes(l, c);
    }
    b.head = tensor_bytes(w.head) + 4 * int64_t{c.hidden_size};
    b.embed_row = int64_t{c.hidden_size} * (w.embed_format == Format::kF32 ? 4 : 2);
    if (c.num_nextn_predict_layers > 0) {
        b.mtp_head = tensor_bytes(w.mtp_head);
        b.mtp_expert = expert_bytes(w.mtp_layer, c);
        b.mtp_fixed = fixed_bytes(w.mtp_layer, c) + tensor_bytes(w.mtp_eh_proj) + 12 * int64_t{c.hidden_size};
    }
    return b;
}

}  // namespace

Result<std::unique_ptr<Model>> Model::open(MappedFile file, const std::string& path, const ModelConfig& cfg,
                                           const std::vector<TensorEntry>& entries, const char* isa, int n_threads,
                                           bool adaptive) {
    auto m = std::make_unique<Model>();
    m->kernels_ = select_cpu_kernels(isa);
    if (m->kernels_ == nullptr) {
        std::string have;
        for (const CpuKernels* const* k = all_cpu_kernels(); *k != nullptr; ++k) {
            if (((*k)->required & ~cpu_features()) == 0) have += std::string(have.empty() ? "" : ", ") + (*k)->isa;
        }
        return Error{ErrorCode::kResource,
                     std::string("isa: '") + isa + "' is unknown or not supported here; this processor runs: " + have};
    }
    DC_TRY_STATUS(m->bind(std::move(file), path, cfg, entries));
    DC_TRY(m->pool_, ThreadPool::make(n_threads == 0 ? default_threads() : n_threads));
    m->adaptive_ = adaptive && m->pool_->size() > 1;
    return m;
}

Result<std::unique_ptr<Model>> Model::open_on(Device device, MappedFile file, const std::string& path,
                                              const ModelConfig& cfg, const std::vector<TensorEntry>& entries,
                                              uint64_t fill_seed) {
    auto m = std::make_unique<Model>();
    DC_TRY_STATUS(m->bind(std::move(file), path, cfg, entries));
    m->device_ = std::move(device);
    DeviceError error;
    const DeviceApi* api = m->device_.api;
    m->device_model_ = {api->open_model({.cfg = &m->cfg_,
                                         .weights = &m->weights_,
                                         .rope = &m->rope_,
                                         .path = path.c_str(),
                                         .fd = m->file_.fd(),
                                         .base = m->file_.data(),
                                         .bytes = m->file_.size(),
                                         .fill_seed = fill_seed,
                                         .device = m->device_.index},
                                        error),
                        {api}};
    if (m->device_model_ == nullptr) return to_error(error);
    DC_TRY(m->pool_, ThreadPool::make(1));
    return m;
}

Status Model::bind(MappedFile file, const std::string& path, const ModelConfig& cfg,
                   const std::vector<TensorEntry>& entries) {
    const FloatMode mode;
    DC_TRY_STATUS(validate(cfg));
    cfg_ = cfg;
    file_ = std::move(file);
    DC_TRY(weights_, bind_weights(cfg_, file_, entries, path));
    rope_ = make_rope(cfg);
    weight_bytes_ = count_bytes(weights_, cfg);
    return {};
}

int64_t Model::active_bytes(int n_ctx, int64_t cache_row_bytes) const {
    const WeightBytes& b = weight_bytes_;
    return b.fixed + b.head + b.embed_row + cfg_.num_experts_per_tok * b.experts +
           int64_t{cfg_.num_hidden_layers} * n_ctx * cache_row_bytes;
}

}  // namespace deepcalm
