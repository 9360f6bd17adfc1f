#include "runtime/model.h"

#include "runtime/float_mode.h"

namespace deepcalm {
namespace {

constexpr int kKeptLogits = 64;  // rows whose memory stays: those of a step of many sequences

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
                                           const std::vector<TensorEntry>& entries, const MakeBackend& backend) {
    const FloatMode mode;
    DC_TRY_STATUS(validate(cfg));
    auto m = std::make_unique<Model>();
    BoundModel& b = m->bound_;
    b.cfg = cfg;
    b.path = path;
    b.file = std::move(file);
    DC_TRY(b.weights, bind_weights(cfg, b.file, entries, path));
    b.rope = make_rope(cfg);
    b.bytes = count_bytes(b.weights, cfg);
    DC_TRY(m->backend_, backend(b));
    return m;
}

Status Model::reserve_logits(int64_t n) {
    const int64_t bytes = n * cfg().logits_stride() * 4, kept = kKeptLogits * cfg().logits_stride() * 4;
    if (logits_.size() < bytes || logits_.size() > std::max(bytes, kept)) {
        DC_TRY(logits_, ZeroedBuffer::make(std::max(bytes, kept), "logits"));
    }
    return {};
}

float* Model::logits_row(int64_t i) const {
    return static_cast<float*>(static_cast<void*>(logits_.data())) + i * cfg().logits_stride();
}

}  // namespace deepcalm
