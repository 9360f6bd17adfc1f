// Taps: named intermediates of a pass, recorded by copy when asked for. Off costs one predictable branch per stage.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace deepcalm {

struct Tap {
    std::vector<int64_t> shape;
    bool is_int = false;  // topk_idx is int32, everything else f32
    std::vector<float> f32;
    std::vector<int32_t> i32;
};

class Trace {
  public:
    // Names as in "layers.3.c_kv", "mtp.c_kv", "final_norm"; a bare stage name ("c_kv") asks for it on every layer; "*" for all.
    void enable(std::vector<std::string> names) { names_ = std::move(names); }
    bool on() const { return !names_.empty(); }
    bool wants(const std::string& name) const;
    // src [rows, cols] f32, row stride `stride`; shape = {rows, dims...} with product cols after the first.
    void record(const std::string& name, const float* src, int64_t rows, std::vector<int64_t> dims, int64_t stride);
    void record(const std::string& name, const int32_t* src, int64_t rows, std::vector<int64_t> dims, int64_t stride);

    std::map<std::string, Tap> taps;
    // f32 values [rows, cols] that take a tap's place in the next pass, so that the stages behind it compute from them:
    // "embed", a layer's "gate_logits" and "layer_out". On a device only; empty after the pass.
    std::map<std::string, std::vector<float>> feed;

  private:
    std::vector<std::string> names_;
};

}  // namespace deepcalm
