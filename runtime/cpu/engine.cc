#include "runtime/cpu/engine.h"

#include <cstring>

namespace deepcalm {

Result<std::unique_ptr<Backend>> CpuBackend::open(const BoundModel& model, const char* isa, int n_threads,
                                                  bool adaptive) {
    const CpuKernels* kernels = select_cpu_kernels(isa);
    if (kernels == nullptr) {
        std::string have;
        for (const CpuKernels* const* k = all_cpu_kernels(); *k != nullptr; ++k) {
            if (select_cpu_kernels((*k)->isa) == *k) have += std::string(have.empty() ? "" : ", ") + (*k)->isa;
        }
        return Error{ErrorCode::kResource,
                     std::string("isa: '") + isa + "' is unknown or not supported here; this processor runs: " + have};
    }
    auto b = std::make_unique<CpuBackend>(model, *kernels);
    DC_TRY(b->pool, ThreadPool::make(n_threads == 0 ? default_threads() : n_threads));
    b->arch = kernels->isa;
    b->pass_rows = kernels->pass_rows;
    b->n_threads = b->pool->size();
    b->adaptive = adaptive && b->n_threads > 1;
    return std::unique_ptr<Backend>(std::move(b));
}

Result<std::unique_ptr<Engine>> CpuBackend::make_engine(const EngineArgs& args) {
    const ModelConfig& c = model.cfg;
    auto e = std::make_unique<CpuEngine>();
    DC_TRY(e->cache, KvCache::make(args.kv, c.num_hidden_layers, args.ctx, c));
    DC_TRY(e->mtp_cache, KvCache::make(args.kv, c.num_nextn_predict_layers, args.ctx, c));
    return std::unique_ptr<Engine>(std::move(e));
}

Status CpuBackend::reserve(int n) {
    if (n > max_rows) {
        DC_TRY(buffers, Buffers::make(model.cfg, n, n_threads, kernels.one_stride));
        touched_rows = 0;
    }
    return Backend::reserve(n);
}

Status CpuBackend::each(int n, const std::function<void(int)>& fn) {
    return pool->run(
        [&](int) {
            pool->deal(n, 1, [&](Range range) {
                for (int i = range.begin; i < range.end; ++i) fn(i);
            });
        },
        n <= 1);
}

Status CpuEngine::copy_rows(bool mtp, int layer, int n, std::byte* host, bool to_cache) {
    const KvCache& c = mtp ? mtp_cache : cache;
    std::memcpy(to_cache ? c.layer(layer) : host, to_cache ? host : c.layer(layer),
                static_cast<size_t>(n * c.row_bytes));
    return {};
}

}  // namespace deepcalm
