// A packed model, opened: the mapping, its bound weights, the kernel table and the thread pool that all its sessions share;
// on a device, its copy there instead of kernels and pool.
#pragma once

#include "runtime/cpu/pool.h"
#include "runtime/cuda/device.h"
#include "runtime/rope.h"
#include "runtime/weights.h"

#include <memory>
#include <mutex>  // the lock_guard of pass_mutex()

namespace deepcalm {

// Weight bytes that one pass reads, split by what they depend on.
struct WeightBytes {
    int64_t fixed = 0;       // attention, dense and shared FFN, routers, norms of the main layers
    int64_t experts = 0;     // one routed expert of every main layer that has some, together: formats may differ
    int64_t head = 0;        // head and final norm
    int64_t embed_row = 0;   // one row of the embedding
    int n_moe_layers = 0;    // main layers with routed experts
    int64_t mtp_fixed = 0;   // the MTP layer without experts and head
    int64_t mtp_head = 0;    // the head that drafts read
    int64_t mtp_expert = 0;  // one of its routed experts
};

class Model {
  public:
    // isa: null = best supported. n_threads: 0 = default_threads(). adaptive: at most so many, as it pays (ThreadChoice).
    Model() = default;
    // path: for messages.
    static Result<std::unique_ptr<Model>> open(MappedFile file, const std::string& path, const ModelConfig& cfg,
                                               const std::vector<TensorEntry>& entries, const char* isa, int n_threads,
                                               bool adaptive = false);
    // The same on a device; fill_seed not 0: weights drawn there instead of read (measurements).
    static Result<std::unique_ptr<Model>> open_on(Device device, MappedFile file, const std::string& path,
                                                  const ModelConfig& cfg, const std::vector<TensorEntry>& entries,
                                                  uint64_t fill_seed);

    const ModelConfig& cfg() const { return cfg_; }
    const ModelWeights& weights() const { return weights_; }
    const CpuKernels& kernels() const { return *kernels_; }
    const CpuPolicy& policy() const { return policy_; }
    void set_policy(const CpuPolicy& policy) { policy_ = policy; }  // for tests: another processor's
    const char* isa() const { return on_device() ? device_.arch.c_str() : kernels_->isa; }
    bool on_device() const { return device_model_ != nullptr; }
    const Device& device() const { return device_; }
    DeviceModel* device_model() { return device_model_.get(); }
    const Rope& rope() const { return rope_; }
    const WeightBytes& weight_bytes() const { return weight_bytes_; }
    int64_t file_bytes() const { return file_.size(); }
    int fd() const { return file_.fd(); }
    Status lock(const std::string& path) const { return file_.lock(path); }
    ThreadPool& pool() { return *pool_; }
    ThreadChoice* thread_choice() { return adaptive_ ? &choice_ : nullptr; }  // null: every pass on all threads
    PassMutex& pass_mutex() { return pass_mutex_; }                           // passes of all sessions are serialised

    // Bytes that decoding one token at cache length n_ctx reads: weights once, experts in use, cache rows.
    int64_t active_bytes(int n_ctx, int64_t cache_row_bytes) const;

  private:
    Status bind(MappedFile file, const std::string& path, const ModelConfig& cfg,
                const std::vector<TensorEntry>& entries);

    ModelConfig cfg_;
    MappedFile file_;
    ModelWeights weights_;
    const CpuKernels* kernels_ = nullptr;
    CpuPolicy policy_ = cpu_policy();
    Rope rope_;
    WeightBytes weight_bytes_;
    std::unique_ptr<ThreadPool> pool_;
    bool adaptive_ = false;
    ThreadChoice choice_;
    PassMutex pass_mutex_;
    Device device_;
    DeviceModelPtr device_model_{nullptr, {}};
};

}  // namespace deepcalm
