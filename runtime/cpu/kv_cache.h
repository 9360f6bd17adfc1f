// The latent cache: per layer and position one row of normed c_kv and rotated k_rope (kernels/format.h), nothing else.
#pragma once

#include "runtime/config.h"
#include "runtime/memory.h"

namespace deepcalm {

struct KvCache {
    CacheType type = CacheType::kF16;
    int64_t ctx = 0, row_bytes = 0;
    ZeroedBuffer memory;

    static Result<KvCache> make(CacheType type, int n_layers, int ctx, const ModelConfig& cfg) {
        KvCache c{.type = type, .ctx = ctx, .row_bytes = cfg.cache_row_bytes(type), .memory = {}};
        DC_TRY(c.memory, ZeroedBuffer::make(n_layers * c.ctx * c.row_bytes, "key/value cache"));
        return c;
    }
    std::byte* layer(int i) const { return memory.data() + i * ctx * row_bytes; }  // [ctx, row_bytes]
    std::byte* row(int layer_idx, int pos) const { return layer(layer_idx) + pos * row_bytes; }
};

}  // namespace deepcalm
