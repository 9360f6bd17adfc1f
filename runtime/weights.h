// The packed file, mapped and bound: every pointer below points into the mapping and was checked against the file's size,
// the manifest and the format table before it was made.
#pragma once

#include "runtime/config.h"
#include "runtime/manifest.h"

#include <string>
#include <vector>

namespace deepcalm {

// One row of the file's tensor table, as Python read it. Nothing here is trusted.
struct TensorEntry {
    std::string name, kind;     // kind: tiled | plain | scale
    std::string format, scale;  // names of kFormats
    int64_t n_slices = 1, rows = 0, cols = 0;
    int64_t scale_rows = 0, scale_cols = 0;  // f8 only
    int64_t offset = 0, bytes = 0;           // absolute in the file; true length
};

class MappedFile {
  public:
    MappedFile() = default;
    MappedFile(MappedFile&& o) noexcept
        : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)), fd_(std::exchange(o.fd_, -1)) {}
    MappedFile& operator=(MappedFile&& o) noexcept {
        std::swap(data_, o.data_);
        std::swap(bytes_, o.bytes_);
        std::swap(fd_, o.fd_);
        return *this;
    }
    ~MappedFile();
    // Maps the whole file of an open descriptor, of which it keeps a copy. `path` is for messages.
    static Result<MappedFile> map(int fd, const std::string& path);
    const std::byte* data() const { return data_; }
    int64_t size() const { return bytes_; }
    // Reads the file and keeps it in memory until it is unmapped (mlock). `path` is for the message.
    Status lock(const std::string& path) const;
    int fd() const { return fd_; }  // of the same file, for reading without mapping pages

  private:
    const std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
    int fd_ = -1;
};

struct LayerWeights {
    bool moe = false;
    const float* attn_norm = nullptr;  // [hidden_size]
    PackedTensor wqkv_a;  // [pad16(q_lora_rank or n_heads * qk_head_dim) + pad16(kv_lora_rank + dr), hidden_size]
    const float* q_a_norm = nullptr;   // [q_lora_rank], null without q_lora
    PackedTensor wq_b;                 // [n_heads * qk_head_dim, q_lora_rank], empty without q_lora
    const float* kv_a_norm = nullptr;  // [kv_lora_rank]
    PackedTensor w_uk;                 // [n_heads][kv_lora_rank, qk_nope_head_dim]
    PackedTensor w_uv;                 // [n_heads][v_head_dim, kv_lora_rank]
    PackedTensor wo;                   // [hidden_size, n_heads * v_head_dim]
    const float* ffn_norm = nullptr;   // [hidden_size]
    PackedTensor w_gate_up,
        w_down;           // dense: [2 * pad16(intermediate_size), hidden_size], [hidden_size, intermediate_size]
    PackedTensor router;  // [n_routed_experts, hidden_size] f32
    const float* router_bias = nullptr;  // [n_routed_experts], null unless noaux_tc
    PackedTensor experts_gate_up,
        experts_down;  // [n_routed_experts] slices of the same two shapes, moe_intermediate_size
    PackedTensor shared_gate_up, shared_down;  // width n_shared_experts * moe_intermediate_size; rows == 0 when absent
};

struct ModelWeights {
    const std::byte* embed = nullptr;  // [vocab_size, hidden_size] in embed_format (f32, bf16, f16), row-major
    Format embed_format = Format::kF32;
    std::vector<LayerWeights> layers;
    const float* final_norm = nullptr;  // [hidden_size]
    PackedTensor head;                  // [vocab_size, hidden_size]
    // MTP layer, when cfg.num_nextn_predict_layers > 0 (docs/model.md 6.1)
    const float *mtp_enorm = nullptr, *mtp_hnorm = nullptr, *mtp_final_norm = nullptr;  // [hidden_size]
    PackedTensor mtp_eh_proj;  // [hidden_size, 2 * hidden_size]: embedding half, hidden half
    PackedTensor mtp_head;     // [vocab_size, hidden_size]: what drafts read, `head` itself without mtp_draft_head
    LayerWeights mtp_layer;
};

// Checks every entry (64-bit arithmetic, real file size, manifest shape, allowed format) and binds it. `path` is for messages.
Result<ModelWeights> bind_weights(const ModelConfig& cfg, const MappedFile& file,
                                  const std::vector<TensorEntry>& entries, const std::string& path);

}  // namespace deepcalm
