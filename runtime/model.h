// A packed model, opened: the bound file and the backend that all its sessions share.
#pragma once

#include "runtime/engine.h"
#include "runtime/memory.h"
#include "runtime/pass_mutex.h"

#include <functional>
#include <mutex>

namespace deepcalm {

class Model {
  public:
    using MakeBackend = std::function<Result<std::unique_ptr<Backend>>(const BoundModel&)>;
    // Checks and binds what was read of a packed file. path: for messages.
    static Result<std::unique_ptr<Model>> open(MappedFile file, const std::string& path, const ModelConfig& cfg,
                                               const std::vector<TensorEntry>& entries, const MakeBackend& backend);

    const BoundModel& bound() const { return bound_; }
    const ModelConfig& cfg() const { return bound_.cfg; }
    Backend& backend() const { return *backend_; }
    // While it is held no pass of any session runs; throws InUseAtFork.
    std::unique_lock<PassMutex> hold_passes() { return std::unique_lock(passes_); }
    // Logits of the latest passes, [n, logits_stride()], while passes are held.
    Status reserve_logits(int64_t n);
    float* logits_row(int64_t i) const;

  private:
    BoundModel bound_;
    std::unique_ptr<Backend> backend_;
    PassMutex passes_;
    ZeroedBuffer logits_;
};

}  // namespace deepcalm
