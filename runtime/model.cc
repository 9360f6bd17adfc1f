#include "runtime/model.h"

#include "runtime/float_mode.h"

namespace deepcalm {
namespace {

WeightBytes count_bytes(const ModelWeights& w, const ModelConfig& c) {
    WeightBytes b;
    visit(w, c, [&](const TensorSpec& spec, const auto& member) {
        const bool mtp = spec.name.starts_with("mtp."), layer = spec.name.starts_with("layers.");
        if (spec.role == Role::kEmbed || spec.role == Role::kExpert || spec.role == Role::kDraftHead) return;
        pieces(spec, member, [&](auto*, int64_t bytes, auto) {
            (mtp ? b.mtp_fixed : layer ? b.fixed : b.head) += bytes;
        });
    });
    for (const LayerWeights& l : w.layers) {
        b.n_moe_layers += l.moe ? 1 : 0;
        b.experts += l.expert_bytes();
    }
    b.embed_row = w.embed.row_bytes();
    b.mtp_expert = w.mtp_layer.expert_bytes();
    if (c.num_nextn_predict_layers > 0) b.mtp_head = w.draft_head().read_bytes();
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
