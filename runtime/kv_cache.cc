#include "runtime/kv_cache.h"

namespace deepcalm {

Result<KvCache> KvCache::make(CacheType type, int n_layers, int ctx, const ModelConfig& cfg, bool on_device) {
    KvCache c;
    c.type_ = type;
    c.n_layers_ = n_layers;
    c.ctx_ = ctx;
    c.row_bytes_ = cfg.cache_row_bytes(type);
    if (!on_device) {
        DC_TRY(c.buffer_, ZeroedBuffer::make(c.n_bytes(), "key/value cache"));
    }
    return c;
}

}  // namespace deepcalm
