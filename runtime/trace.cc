#include "runtime/trace.h"

#include <functional>
#include <numeric>

namespace deepcalm {
namespace {

template <class T> std::vector<T> gather(const T* src, int64_t rows, const std::vector<int64_t>& dims, int64_t stride) {
    const int64_t cols = std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<>());
    std::vector<T> out;
    out.reserve(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i) out.insert(out.end(), src + i * stride, src + i * stride + cols);
    return out;
}

std::vector<int64_t> with_rows(int64_t rows, std::vector<int64_t> dims) {
    dims.insert(dims.begin(), rows);
    return dims;
}

}  // namespace

bool Trace::wants(const std::string& name) const {
    const size_t dot = name.rfind('.');
    const std::string stage = dot == std::string::npos ? name : name.substr(dot + 1);
    for (const std::string& n : names_) {
        if (n == "*" || n == name || n == stage) return true;
    }
    return false;
}

void Trace::record(const std::string& name, const float* src, int64_t rows, std::vector<int64_t> dims, int64_t stride) {
    if (!wants(name)) return;
    taps[name] = {with_rows(rows, dims), false, gather(src, rows, dims, stride), {}};
}

void Trace::record(const std::string& name, const int32_t* src, int64_t rows, std::vector<int64_t> dims,
                   int64_t stride) {
    if (!wants(name)) return;
    taps[name] = {with_rows(rows, dims), true, {}, gather(src, rows, dims, stride)};
}

}  // namespace deepcalm
