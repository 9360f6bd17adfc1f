#include "runtime/kv_cache.h"

namespace deepcalm {

Result<KvCache> KvCache::make(CacheType type, int n_layers, int ctx, int kv_lora_rank, int qk_rope_head_dim,
                              bool on_device) {
    KvCache c;
    c.type_ = type;
    c.n_layers_ = n_layers;
    c.ctx_ = ctx;
    c.c_pad_ = static_cast<int>(round_up(kv_lora_rank, 32));
    c.r_pad_ = static_cast<int>(round_up(qk_rope_head_dim, 16));
    c.row_bytes_ = cache_row_bytes(type, c.c_pad_, c.r_pad_);
    if (!on_device) {
        DC_TRY(c.buffer_, ZeroedBuffer::make(c.n_bytes(), "key/value cache"));
    }
    return c;
}

}  // namespace deepcalm
