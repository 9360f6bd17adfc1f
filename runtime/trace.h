// Taps: named intermediates of a pass, recorded by copy when asked for. Off costs one predictable branch per stage.
#pragma once

#include "kernels/view.h"

#include <algorithm>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace deepcalm {

struct Tap {
    std::vector<int64_t> shape;
    std::variant<std::vector<float>, std::vector<int32_t>> values;  // topk_idx is int32, everything else f32
};

class Trace {
  public:
    // Names as in "layers.3.c_kv", "mtp.c_kv", "final_norm"; a bare stage name ("c_kv") asks for it on every layer; "*" for all.
    void enable(std::vector<std::string> names) { names_ = std::move(names); }
    bool on() const { return !names_.empty(); }
    bool wants(const std::string& name) const {
        const std::string stage = name.substr(name.rfind('.') + 1);  // npos + 1 is 0
        return std::any_of(names_.begin(), names_.end(),
                           [&](const std::string& n) { return n == "*" || n == name || n == stage; });
    }
    // n rows [dims...] of f32 or int32, if wanted.
    template <class T> void record(const std::string& name, View<T> rows, int64_t n, std::vector<int64_t> dims) {
        if (!wants(name)) return;
        int64_t width = 1;
        for (const int64_t d : dims) width *= d;
        std::vector<std::remove_const_t<T>> values;
        values.reserve(static_cast<size_t>(n * width));
        for (int64_t i = 0; i < n; ++i) values.insert(values.end(), rows.row(i), rows.row(i) + width);
        dims.insert(dims.begin(), n);
        taps[name] = {std::move(dims), std::move(values)};
    }

    std::map<std::string, Tap> taps;
    // f32 values [rows, cols] that take a tap's place in the next pass, so that the stages behind it compute from them:
    // "embed", a layer's "gate_logits" and "layer_out". On a device only; empty after the pass.
    std::map<std::string, std::vector<float>> feed;

  private:
    std::vector<std::string> names_;
};

}  // namespace deepcalm
