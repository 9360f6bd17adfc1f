// Shared by the binding files: errors as deepcalm.errors classes, the typed configuration from a dict, buffer checks.
#pragma once

#include "runtime/config.h"
#include "runtime/float_mode.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>

namespace py = pybind11;
using namespace pybind11::literals;

// deepcalm.errors.<class of error.code> with the error's message; raises it.
py::object as_exception(const deepcalm::Error& error);
[[noreturn]] void throw_error(const deepcalm::Error& error);

template <class T> T unwrap(deepcalm::Result<T> result) {
    if (!result.ok()) throw_error(result.error());
    return std::move(result.value());
}
inline void unwrap(deepcalm::Status status) {
    if (!status.ok()) throw_error(status.error());
}
// fn() while other Python threads run, in the default floating-point mode; it must not touch Python's objects. Whatever may wait
// for a lock or takes long runs in it: otherwise one thread's pass stops the interpreter for all.
template <class Fn> decltype(auto) without_gil(Fn&& fn) {
    const py::gil_scoped_release release;
    const deepcalm::FloatMode mode;
    return fn();
}
// Deletes what Python lets go of: unmapping takes its time, and a session on a device waits for the pass that runs.
struct DeleteWithoutGil {
    template <class T> void operator()(T* p) const {
        without_gil([p] { delete p; });
    }
};
// record("key", value, ...): a dict. Asks for no memory of C++'s, so that what has been done is told, whatever happens.
inline py::dict record(py::dict d = {}) { return d; }
template <class T, class... Rest> py::dict record(py::dict d, const char* key, T&& value, Rest&&... rest) {
    d[key] = std::forward<T>(value);
    return record(std::move(d), std::forward<Rest>(rest)...);
}
template <class... Entries> py::dict record(const char* key, Entries&&... rest) {
    return record(py::dict(), key, std::forward<Entries>(rest)...);
}
// The array at `data`, which `owner` holds; the array keeps the owner from now on.
template <class E, class Owner>
py::array_t<E> as_array(std::vector<py::ssize_t> shape, const void* data, Owner&& owner) {
    auto kept = std::make_unique<Owner>(std::move(owner));
    const py::capsule base(kept.get(), [](void* p) { delete static_cast<Owner*>(p); });
    kept.release();
    return py::array_t<E>(std::move(shape), static_cast<const E*>(data), base);
}

// The normalised configuration (keys = fields of ModelConfig, enums as strings), validated. Missing, mistyped and unknown
// keys are ConfigErrors that name the key; the Python-only keys rope_layout, bos_token_id, eos_token_ids and
// tie_word_embeddings are checked and not kept.
deepcalm::ModelConfig config_from_dict(const py::dict& d);

// The Format with this name and scale dtype, as in kFormats; ValueError if there is none.
deepcalm::Format format_from_name(const std::string& name, const std::string& scale);

// The cache type with this name; SessionError if there is none.
deepcalm::CacheType cache_type(const std::string& name);
