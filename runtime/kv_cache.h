// The latent cache: per layer and position one row of normed c_kv and rotated k_rope (kernels/format.h), nothing else.
#pragma once

#include "runtime/config.h"
#include "runtime/memory.h"

namespace deepcalm {

class KvCache {
  public:
    // on_device: the rows live there; layer() and row() are null.
    static Result<KvCache> make(CacheType type, int n_layers, int ctx, const ModelConfig& cfg, bool on_device);

    CacheType type() const { return type_; }
    int n_layers() const { return n_layers_; }
    int ctx() const { return static_cast<int>(ctx_); }
    int64_t row_bytes() const { return row_bytes_; }
    int64_t n_bytes() const { return n_layers_ * ctx_ * row_bytes_; }
    std::byte* layer(int i) const { return buffer_.data() + i * ctx_ * row_bytes_; }  // [ctx, row_bytes]
    std::byte* row(int layer_idx, int pos) const { return layer(layer_idx) + pos * row_bytes_; }

    int len = 0;  // valid rows; truncation is an assignment, later rows are overwritten before they are read

  private:
    CacheType type_ = CacheType::kF16;
    int n_layers_ = 0;
    int64_t ctx_ = 0;
    int64_t row_bytes_ = 0;
    ZeroedBuffer buffer_;
};

}  // namespace deepcalm
