// Module deepcalm._core: thin conversions between Python objects and the C++ runtime. No model knowledge here.
// Whatever takes the model's mutex runs without the GIL; arrays returned are fresh copies owned by Python, and arrays of ids
// are copied before they are checked, because another thread may write to them.
#include "bind_common.h"
#include "kernels/noise.h"
#include "runtime/batch.h"
#include "runtime/cpu/engine.h"
#include "runtime/cuda/library.h"

#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <functional>

using namespace deepcalm;

void init_pack(py::module_& m);     // bind_pack.cc: formats, manifest, packing
void init_probes(py::module_& m);   // bind_probe.cc: rates of the machine and of kernels
void init_testing(py::module_& m);  // bind_probe.cc: addresses of kernels, hooks

CacheType cache_type(const std::string& name) {
    for (int i = 0; i < kNumCacheTypes; ++i) {
        if (name == kCacheTypeNames[i]) return static_cast<CacheType>(i);
    }
    throw_error({ErrorCode::kSession, "kv: '" + name + "', expected f16, bf16, f32 or q8"});
}

namespace {

using F32Array = py::array_t<float, py::array::c_style | py::array::forcecast>;
using I32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using U8Array = py::array_t<uint8_t, py::array::c_style>;

Error session_error(std::string message) { return {ErrorCode::kSession, std::move(message)}; }

template <class T> T get(const py::dict& d, const char* key) {
    if (!d.contains(key))
        throw_error({ErrorCode::kPackedFile, std::string("tensor table: key '") + key + "' is missing"});
    try {
        return d[key].cast<T>();
    } catch (const py::cast_error&) {
        throw_error({ErrorCode::kPackedFile,
                     std::string("tensor table: key '") + key + "' has the wrong type or is out of range"});
    }
}

TensorEntry entry_from_dict(const py::dict& d) {
    return {.name = get<std::string>(d, "name"),
            .kind = get<std::string>(d, "kind"),
            .format = get<std::string>(d, "format"),
            .scale = get<std::string>(d, "scale"),
            .n_slices = get<int64_t>(d, "n_slices"),
            .rows = get<int64_t>(d, "rows"),
            .cols = get<int64_t>(d, "cols"),
            .scale_rows = get<int64_t>(d, "scale_rows"),
            .scale_cols = get<int64_t>(d, "scale_cols"),
            .offset = get<int64_t>(d, "offset"),
            .bytes = get<int64_t>(d, "bytes")};
}

WantLogits want_logits(const std::string& name) {
    if (name == "none") return WantLogits::kNone;
    if (name == "last") return WantLogits::kLast;
    if (name == "all") return WantLogits::kAll;
    throw_error(session_error("logits: '" + name + "', expected none, last or all"));
}

py::ssize_t logit_rows(WantLogits want, py::ssize_t n) {
    return want == WantLogits::kAll ? n : want == WantLogits::kLast ? 1 : 0;
}

std::vector<int32_t> copy_ids(const I32Array& ids) {
    if (ids.ndim() != 1) throw_error(session_error("ids: " + std::to_string(ids.ndim()) + " dimensions, expected 1"));
    return {ids.data(), ids.data() + ids.size()};
}

I32Array token_array(std::vector<int32_t> ids) {
    return as_array<int32_t>({static_cast<py::ssize_t>(ids.size())}, ids.data(), std::move(ids));
}
U8Array rows_array(CacheRows rows) {
    return as_array<uint8_t>({rows.n_layers, rows.n, static_cast<py::ssize_t>(rows.row_bytes)}, rows.bytes.get(),
                             std::move(rows.bytes));
}
F32Array hidden_array(std::vector<float> rows, py::ssize_t d) {
    return as_array<float>({static_cast<py::ssize_t>(rows.size()) / d, d}, rows.data(), std::move(rows));
}

// From a deepcalm.sampling.Sampling, which has checked them.
SampleParams sample_params(const py::object& s) {
    return {.temp = s.attr("temp").cast<float>(),
            .top_k = s.attr("top_k").cast<int>(),
            .top_p = s.attr("top_p").cast<float>(),
            .min_p = s.attr("min_p").cast<float>(),
            .seed = s.attr("seed").cast<uint64_t>()};
}

// DLPack's structs (dlpack.h, the layout without a version), as every reader of the protocol knows them.
struct DlTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t n_dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;    // [n_dims]
    int64_t* strides;  // null: contiguous
    uint64_t byte_offset;
};
struct DlManaged {
    DlTensor tensor;
    void* ctx;
    void (*deleter)(DlManaged*);
};
struct DlExport {
    DlManaged managed;  // first: its address is the export's
    std::vector<int64_t> shape;
    py::object owner;
};

// A "dltensor" capsule over memory that `owner` keeps alive; type: "<f4", "<i4" or "|u1".
py::capsule dlpack(py::object owner, uintptr_t address, std::vector<int64_t> shape, const std::string& type,
                   int device_type, int device_id) {
    const char kind = type.at(1);
    const uint8_t code = kind == 'i' ? 0 : kind == 'u' ? 1 : 2, bits = kind == 'u' ? 8 : 32;
    auto* e = new DlExport{{}, std::move(shape), std::move(owner)};
    e->managed.tensor = {.data = reinterpret_cast<void*>(address),
                         .device = {device_type, device_id},
                         .n_dims = static_cast<int32_t>(e->shape.size()),
                         .dtype = {code, bits, 1},
                         .shape = e->shape.data(),
                         .strides = nullptr,
                         .byte_offset = 0};
    e->managed.ctx = e;
    e->managed.deleter = [](DlManaged* m) {
        const py::gil_scoped_acquire gil;  // the reader may end in any thread
        delete static_cast<DlExport*>(m->ctx);
    };
    return py::capsule(&e->managed, "dltensor", [](PyObject* capsule) {
        if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;  // taken: the reader calls the deleter
        auto* m = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule, "dltensor"));
        m->deleter(m);
    });
}

py::dict stats_dict(const PassStats& t) {
    return record("passes", t.passes, "rows", t.rows, "weight_bytes", t.weight_bytes, "cache_bytes", t.cache_bytes,
                  "experts_touched", t.experts_touched, "seconds", t.seconds, "mtp_passes", t.mtp_passes, "mtp_rows",
                  t.mtp_rows);
}
py::list stage_list(const PassStats& stats) {
    py::list out;
    for (int i = 0; i < 2 * kNumStages; ++i) {
        const StageStats& t = stats.stages[i / kNumStages][i % kNumStages];
        const std::string name = std::string(i < kNumStages ? "" : "mtp.") + kStageNames[i % kNumStages];
        if (t.calls > 0) out.append(py::make_tuple(name, t.calls, t.bytes, t.seconds, t.wait_sum, t.wait_max));
    }
    return out;
}

class PySession {
    // A call of the session, which may wait for the passes of others.
    template <class Fn, class... Args> auto call(Fn fn, const Args&... args) const {
        return without_gil([&] { return std::invoke(fn, *s_, args...); });
    }

  public:
    PySession(Model& model, int ctx, const std::string& kv, int max_rows, bool mtp)
        : vocab_(model.cfg().vocab_size), d_(model.cfg().hidden_size) {
        const CacheType type = cache_type(kv);
        s_ = unwrap(without_gil([&] { return Session::make(model, ctx, type, max_rows, mtp); }));
    }

    F32Array forward(const I32Array& ids, const std::string& logits) {
        const WantLogits want = want_logits(logits);
        const auto copy = copy_ids(ids);
        F32Array out({logit_rows(want, ids.size()), vocab_});
        float* data = out.mutable_data();
        // Ctrl-C works between the layers of a long pass too. Its handler runs when the pass has ended, for it may ask the
        // model, which waits for passes; so may finalizers, which PyErr_CheckSignals runs since Python 3.12.
        using Clock = std::chrono::steady_clock;
        // In the block that a thread begins with: what is allocated later is freed where ThreadSanitizer sees no order.
        [[gnu::tls_model("initial-exec")]] static thread_local bool interrupted;
        [[gnu::tls_model("initial-exec")]] static thread_local Clock::time_point asked;
        const auto ask = +[] {  // seldom: where other threads are busy, the interpreter is to be had after 5 ms
            if (Clock::now() - asked < std::chrono::milliseconds(50)) return false;
            asked = Clock::now();
            const py::gil_scoped_acquire gil;
            return interrupted = PyOS_InterruptOccurred() != 0;
        };
        for (;;) {
            interrupted = false;
            asked = Clock::now();
            Status ran = call(&Session::forward, copy, want, data, ask);
            if (!interrupted) {
                unwrap(std::move(ran));
                return out;
            }
            PyErr_SetInterrupt();
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
    }

    py::tuple mtp_forward(const I32Array& ids, const F32Array& hidden, const std::string& logits) {
        const WantLogits want = want_logits(logits);
        const auto copy = copy_ids(ids);
        if (hidden.ndim() != 2 || hidden.shape(0) != ids.size() || hidden.shape(1) != d_) {
            throw_error(session_error("hidden: expected shape [" + std::to_string(ids.size()) + ", " +
                                      std::to_string(d_) + "]"));
        }
        F32Array out({logit_rows(want, ids.size()), vocab_}), g({ids.size(), d_});
        float *out_data = out.mutable_data(), *g_data = g.mutable_data();
        unwrap(without_gil([&] { return s_->mtp_forward(copy, hidden.data(), want, out_data, g_data); }));
        return py::make_tuple(out, g);
    }

    // One step of this sequence alone; its bytes and seconds are the session's.
    py::dict draft_round(int token, int k, const py::object& sampling, int n_valid, float min_confidence,
                         bool want_logits, const std::optional<I32Array>& drafts,
                         const std::optional<I32Array>& chosen) {
        Work w{.session = s_.get(),
               .ids = {token},
               .sample = sample_params(sampling),
               .n_valid = n_valid,
               .k = k,
               .drafts = drafts ? copy_ids(*drafts) : std::vector<int32_t>(),
               .min_confidence = min_confidence,
               .chosen = chosen ? copy_ids(*chosen) : std::vector<int32_t>()};
        F32Array logits({want_logits ? std::max(py::ssize_t{k}, std::ssize(w.drafts)) + 1 : py::ssize_t{0}, vocab_});
        w.logits = want_logits ? logits.mutable_data() : nullptr;
        const StepCost cost = without_gil([&] { return s_->step(w); });
        if (w.error) throw_error(*w.error);
        py::dict d = record("tokens", w.tokens, "drafted", w.n_drafted, "accepted", w.n_accepted, "experts_verify",
                            cost.experts_verify, "draft_bytes", cost.draft_bytes, "verify_bytes", cost.verify_bytes,
                            "draft_seconds", cost.draft_seconds, "verify_seconds", cost.verify_seconds);
        if (want_logits) d["logits"] = logits[py::slice(0, std::ssize(w.tokens), 1)];
        return d;
    }

    int pos(bool mtp) const { return call(&Session::pos, mtp); }

    F32Array hidden() const { return hidden_array(call(&Session::hidden), d_); }

    void truncate(int n) { unwrap(call(&Session::truncate, n)); }

    PySession(std::unique_ptr<Session> s, py::ssize_t vocab, py::ssize_t d) : s_(std::move(s)), vocab_(vocab), d_(d) {}
    std::unique_ptr<PySession, DeleteWithoutGil> fork(const Model&, int n, int ctx) const {
        return std::unique_ptr<PySession, DeleteWithoutGil>(
            new PySession(unwrap(call(&Session::fork, n, ctx)), vocab_, d_));
    }
    Session* get() const { return s_.get(); }

    U8Array read_cache(bool mtp) const { return rows_array(unwrap(call(&Session::read_cache, mtp))); }

    void decode_start(int token, const py::object& sampling, int n_valid, int64_t max_tokens, const I32Array& eos) {
        const auto ids = copy_ids(eos);
        const SampleParams p = sample_params(sampling);
        unwrap(call(&Session::decode_start, token, p, n_valid, max_tokens, ids));
    }
    void decode_step(int k) { unwrap(call(&Session::decode_step, k)); }
    // At least one round unless none is queued or one failed. Ctrl-C works however long that takes, as do other threads.
    Result<std::vector<DecodedRound>> wait_rounds(int& left) {
        for (;;) {
            auto rounds = without_gil([&] { return s_->decode_poll(left, std::chrono::milliseconds(50)); });
            if (!rounds.ok() || !rounds.value().empty() || left == 0) return rounds;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
    }
    py::list decode_poll() {
        int left = 0;
        py::list out;
        for (const DecodedRound& r : unwrap(wait_rounds(left))) {
            out.append(record("tokens", std::vector<int32_t>(r.tokens, r.tokens + r.n_tokens), "drafted", r.drafted,
                              "accepted", r.accepted, "experts_verify", r.experts, "stop", kStopNames[r.stop], "bad_id",
                              r.bad_id, "end_ns", r.end_ns));
        }
        return out;
    }
    void decode_finish() {
        for (int left = 1; left > 0 && wait_rounds(left).ok();) {
        }
        unwrap(call(&Session::decode_finish));
    }
    // (address, shape, type string) of a device buffer; for the oracles
    py::tuple device_view(const std::string& name) const {
        const ArrayView v = unwrap(call(&Session::device_view, name));
        return py::make_tuple(reinterpret_cast<uintptr_t>(v.data), py::tuple(py::cast(v.shape)), v.type);
    }
    std::string device_report(const std::string& what) const { return unwrap(call(&Session::device_report, what)); }

    I32Array tokens() const { return token_array(call(&Session::tokens)); }

    py::dict state() const {
        SessionState s = unwrap(call(&Session::state));
        return record("tokens", token_array(std::move(s.tokens)), "cache", rows_array(std::move(s.cache)), "mtp_cache",
                      rows_array(std::move(s.mtp_cache)), "hidden", hidden_array(std::move(s.pending), d_));
    }

    void load_state(const I32Array& tokens, const U8Array& rows, const U8Array& mtp_rows, const F32Array& hidden) {
        const auto ids = copy_ids(tokens);
        const auto require = [](const py::array& a, std::initializer_list<int64_t> shape, const char* name) {
            bool same = a.ndim() == static_cast<py::ssize_t>(shape.size());
            std::string text;
            for (py::ssize_t i = 0; const int64_t dim : shape) {
                same = same && a.shape(i) == dim;
                text += (i++ > 0 ? ", " : "") + std::to_string(dim);
            }
            if (!same)
                throw_error(session_error(std::string("saved session: ") + name + ": expected shape [" + text + "]"));
        };
        const Cache &main = s_->cache(false), &mtp = s_->cache(true);
        const int64_t m = mtp_rows.ndim() == 3 ? mtp_rows.shape(1) : 0;
        require(rows, {main.n_layers, static_cast<int64_t>(ids.size()), main.row_bytes}, "cache");
        require(mtp_rows, {mtp.n_layers, std::min<int64_t>(m, mtp.ctx), mtp.row_bytes}, "mtp_cache");
        require(hidden, {hidden.ndim() == 2 ? hidden.shape(0) : 0, d_}, "hidden");
        const auto *main_bytes = reinterpret_cast<const std::byte*>(rows.data()),
                   *mtp_bytes = reinterpret_cast<const std::byte*>(mtp_rows.data());
        const std::span pending(hidden.data(), static_cast<size_t>(hidden.size()));
        unwrap(without_gil([&] { return s_->load(ids, main_bytes, static_cast<int>(m), mtp_bytes, pending); }));
    }

    void trace(const std::optional<std::vector<std::string>>& names, const std::map<std::string, F32Array>& feed) {
        std::map<std::string, std::vector<float>> values;
        for (const auto& [name, array] : feed) values[name].assign(array.data(), array.data() + array.size());
        unwrap(without_gil([&] { return s_->trace(names.value_or(std::vector<std::string>{}), std::move(values)); }));
    }

    py::dict taps() {
        py::dict out;
        for (auto& [name, tap] : call(&Session::take_taps)) {
            const std::vector<py::ssize_t> shape(tap.shape.begin(), tap.shape.end());
            out[name.c_str()] = std::visit(
                [&]<class T>(std::vector<T>& v) -> py::array { return as_array<T>(shape, v.data(), std::move(v)); },
                tap.values);
        }
        return out;
    }

    py::dict stats() const { return stats_dict(call(&Session::stats)); }
    py::list stage_stats() const { return stage_list(call(&Session::stats)); }

    py::list expert_union() const {
        py::list out;
        const ExpertUnion u = call(&Session::expert_union);
        for (int j = 1; j <= ExpertUnion::kMaxWindow; ++j) out.append(py::make_tuple(u.windows[j], u.experts[j]));
        return out;
    }

    const Cache& cache(bool mtp) const { return s_->cache(mtp); }
    int max_rows() const { return s_->max_rows(); }

  private:
    std::unique_ptr<Session> s_;
    py::ssize_t vocab_, d_;
};

// Steps of several sequences, and what they read.
class PyBatch {
  public:
    PyBatch(Model& model, int max_rows) : model_(model), max_rows_(max_rows) {
        unwrap(without_gil([&] {
            const auto held = model.hold_passes();
            return model.backend().reserve(max_rows + kMaxSequences);  // each may compute a row again
        }));
    }

    py::tuple step(const py::list& items) {
        std::vector<Work> work;
        size_t rows = 0;
        for (const auto& item : items) {
            const auto t = item.cast<py::tuple>();
            const bool given = py::isinstance<py::sequence>(t[2]);
            work.push_back({.session = t[0].cast<PySession&>().get(),
                            .ids = t[1].cast<std::vector<int32_t>>(),
                            .n_valid = t[4].cast<int>(),
                            .k = given ? 0 : t[2].cast<int>(),
                            .drafts = given ? t[2].cast<std::vector<int32_t>>() : std::vector<int32_t>(),
                            .min_confidence = t[5].cast<float>(),
                            .n_top = t[6].cast<int>()});
            if (!t[3].is_none()) work.back().sample = sample_params(t[3]);
            const Work& w = work.back();
            rows += w.ids.size() + (given ? w.drafts.size() : static_cast<size_t>(std::max(w.k, 0)));
        }
        if (work.size() > kMaxSequences || rows > static_cast<size_t>(max_rows_))
            throw_error(session_error("step: " + std::to_string(work.size()) + " sequences with " +
                                      std::to_string(rows) + " rows, at most " + std::to_string(kMaxSequences) +
                                      " with " + std::to_string(max_rows_)));
        const int64_t before = stats_.passes - stats_.mtp_passes;
        const StepCost cost = without_gil([&] { return Step::run(model_, work, stats_); });
        if (stats_.passes - stats_.mtp_passes == before + 1 && cost.rows <= kMaxSequences) {
            union_[cost.rows].first += 1;
            union_[cost.rows].second += cost.experts_verify;
        }
        py::list results;
        for (Work& w : work) results.append(result(w));
        return py::make_tuple(results, record("rows", cost.rows, "mtp_rows", cost.mtp_rows, "experts_verify",
                                              cost.experts_verify, "draft_bytes", cost.draft_bytes, "verify_bytes",
                                              cost.verify_bytes, "draft_seconds", cost.draft_seconds, "verify_seconds",
                                              cost.verify_seconds));
    }

    py::dict stats() const { return stats_dict(stats_); }
    py::list stage_stats() const { return stage_list(stats_); }
    py::list expert_union() const {
        py::list out;
        for (int n = 1; n <= kMaxSequences; ++n) out.append(py::make_tuple(union_[n].first, union_[n].second));
        return out;
    }

  private:
    static py::dict result(const Work& w) {
        py::object error = py::none();
        if (w.error) error = as_exception(*w.error);
        py::list scores;
        for (const Scores& s : w.scores) scores.append(py::make_tuple(s.token, s.logprob, s.top));
        return record("tokens", w.error ? std::vector<int32_t>() : w.tokens, "drafted", w.n_drafted, "accepted",
                      w.n_accepted, "scores", scores, "error", error);
    }

    Model& model_;
    int max_rows_;
    PassStats stats_;  // written and read by the thread that steps
    std::pair<int64_t, int64_t> union_[kMaxSequences + 1] =
        {};  // [rows of a main pass] passes, distinct (layer, expert) pairs
};

using ModelHolder = std::unique_ptr<Model, DeleteWithoutGil>;
using SessionHolder = std::unique_ptr<PySession, DeleteWithoutGil>;

ModelHolder open_model(const std::string& path, int fd, const py::dict& cfg, const py::list& tensors,
                       const Model::MakeBackend& backend) {
    std::vector<TensorEntry> entries;
    for (const auto& t : tensors) entries.push_back(entry_from_dict(t.cast<py::dict>()));
    const ModelConfig c = config_from_dict(cfg);
    auto model = unwrap(without_gil([&]() -> Result<std::unique_ptr<Model>> {
        DC_TRY(MappedFile file, MappedFile::map(fd, path));  // a copy of fd: it need not stay open
        return Model::open(std::move(file), path, c, entries, backend);
    }));
    return ModelHolder(model.release());
}
ModelHolder open_cpu(const std::string& path, int fd, const py::dict& cfg, const py::list& tensors,
                     const std::optional<std::string>& isa, int threads, bool adaptive) {
    return open_model(path, fd, cfg, tensors, [&](const BoundModel& m) {
        return CpuBackend::open(m, isa ? isa->c_str() : nullptr, threads, adaptive);
    });
}
ModelHolder open_on(const std::string& library, const std::string& path, int fd, const py::dict& cfg,
                    const py::list& tensors, uint64_t fill_seed) {
    return open_model(path, fd, cfg, tensors, [&](const BoundModel& m) { return open_device(library, m, fill_seed); });
}

void bind_functions(py::module_& m) {
    m.def(
        "isas",
        [] {
            py::list out;
            for (const CpuKernels* const* k = all_cpu_kernels(); *k != nullptr; ++k) {
                const CpuKernels* used = select_cpu_kernels((*k)->isa);
                if (used == *k || (used == nullptr && !(*k)->emulated))
                    out.append(record("name", (*k)->isa, "supported", used == *k, "emulated", (*k)->emulated));
            }
            return out;
        },
        "Instruction sets compiled in, best first: dicts of name, supported (by this processor) and emulated (there: "
        "the "
        "same bits, slower, and not chosen unless it is named).");
    m.def("amx_refusal", &amx_refusal, "Why a processor that has AMX is not used as one: '' where it is, or has none.");
    m.def("default_threads", &default_threads, "Physical cores of the affinity mask.");
    m.def(
        "swap_float_mode",
        [](const std::optional<py::bytes>& mode) {
            std::fenv_t before, after;
            std::fegetenv(&before);
            if (!mode) {
                std::fesetenv(FE_DFL_ENV);
            } else {
                const std::string_view bytes = *mode;
                if (bytes.size() != sizeof after) throw py::value_error("mode: expected what swap_float_mode returned");
                std::memcpy(&after, bytes.data(), sizeof after);
                std::fesetenv(&after);
            }
            return py::bytes(static_cast<const char*>(static_cast<const void*>(&before)), sizeof before);
        },
        "mode"_a, "Sets this thread's floating-point mode (None: the default); returns what it was, opaque bytes.");
    m.def(
        "sample",
        [](const F32Array& logits, const py::object& sampling, int64_t pos, int n_valid) {
            const SampleParams p = sample_params(sampling);
            return unwrap(sample(logits.data(), static_cast<int>(logits.size()), n_valid, p, pos));
        },
        "logits"_a, "sampling"_a, "pos"_a, "n_valid"_a, py::call_guard<FloatMode>(),
        "Token for position `pos` from logits [vocab_size]: argmax at temp 0 (ties to the lowest id), else keyed "
        "Gumbel noise over the filtered distribution. sampling: a deepcalm.sampling.Sampling. Ids >= n_valid are never "
        "chosen. "
        "Raises SessionError if the logits are not finite.");
    m.def("not_finite", &not_finite, "what"_a = "", "What is said of logits that are not finite, and what to try.");
    m.def(
        "scores",
        [](const F32Array& logits, int n_valid, int token, int n_top) {
            const auto n = static_cast<int>(logits.size());
            if (n_valid < 1 || n_valid > n || token < 0 || token >= n_valid)
                throw_error(session_error("scores: token " + std::to_string(token) + " of " + std::to_string(n_valid)));
            const Scores s = scores_of(logits.data(), n_valid, token, n_top);
            return py::make_tuple(s.token, s.logprob, s.top);
        },
        "logits"_a, "n_valid"_a, "token"_a, "n_top"_a, py::call_guard<FloatMode>(),
        "(token, its log probability, [(id, log probability)] of the n_top most probable) by softmax over ids < "
        "n_valid.");
    m.def("dlpack", &dlpack, "owner"_a, "address"_a, "shape"_a, "type"_a, "device_type"_a, "device_id"_a,
          "DLPack capsule over memory that `owner` keeps alive.");
    m.def("gumbel", &gumbel, "seed"_a, "pos"_a, "v"_a, py::call_guard<FloatMode>(),
          "The noise that sample() adds to token v.");
}

void bind_model(py::module_& m) {
    py::class_<Model, ModelHolder>(m, "Model")
        .def(py::init(&open_cpu), "path"_a, "fd"_a, "cfg"_a, "tensors"_a, "isa"_a = py::none(), "threads"_a = 0,
             "adaptive"_a = false,
             "On the CPU. fd: of the packed file whose header was checked; a copy of it is mapped. path: its name in "
             "errors. adaptive: passes for which all threads do not pay run on one.")
        .def_static("open_on", &open_on, "library"_a, "path"_a, "fd"_a, "cfg"_a, "tensors"_a, "fill_seed"_a = 0,
                    "On a device. library: path of its library. fill_seed not 0: weights are drawn there, not read.")
        .def(
            "fileno", [](const Model& m) { return m.bound().file.fd(); },
            "Descriptor of the mapped file, open while the model is.")
        .def_property_readonly("isa", [](const Model& m) { return m.backend().arch; })
        .def_property_readonly("device_name", [](const Model& m) { return m.backend().device_name; })
        .def_property_readonly("pass_rows", [](const Model& m) { return m.backend().pass_rows; })
        .def_property_readonly("n_threads", [](const Model& m) { return m.backend().n_threads; })
        .def_property_readonly("file_bytes", [](const Model& m) { return m.bound().file.size(); })
        .def(
            "lock",
            [](const Model& m, const std::string& path) {
                unwrap(without_gil([&] { return m.bound().file.lock(path); }));
            },
            "path"_a, "Reads the packed file and keeps it in memory; `path` names it in the error.")
        .def_property_readonly(
            "weight_bytes",
            [](const Model& s) {
                const WeightBytes& b = s.bound().bytes;
                return record("fixed", b.fixed, "experts", b.experts, "head", b.head, "embed_row", b.embed_row,
                              "n_moe_layers", b.n_moe_layers, "mtp_fixed", b.mtp_fixed, "mtp_head", b.mtp_head,
                              "mtp_expert", b.mtp_expert);
            },
            "Weight bytes of one pass by what they depend on; `expert`: one routed expert of one layer.")
        .def(
            "active_bytes_per_token",
            [](const Model& s, int ctx_pos, const std::string& kv) {
                return s.bound().active_bytes(ctx_pos, s.cfg().cache_row_bytes(cache_type(kv)));
            },
            "ctx_pos"_a, "kv"_a, "Bytes that decoding one token at this cache length reads.");
}

void bind_batch(py::module_& m) {
    py::class_<PyBatch>(m, "Batch")
        .def(py::init<Model&, int>(), "model"_a, "max_rows"_a, py::keep_alive<1, 2>())
        .def(
            "step", &PyBatch::step, "work"_a, py::call_guard<FloatMode>(),
            "One step of several sessions, none twice: work is a list of (session, ids, drafts, sampling or None, "
            "n_valid, min_confidence, n_top). Passes `ids`, which follow the session's tokens, behind a single id with "
            "drafts, those given or as many of the MTP layer, "
            "and chooses the token after them unless sampling is None. Returns a list of dicts (tokens: accepted "
            "drafts, "
            "in the cache now, and the next token; drafted; accepted; scores: (token, logprob, [(id, logprob)]) for "
            "each "
            "of them if n_top >= 0; error: None, or what ended this sequence's step, as if it had not been) and a dict "
            "of what the step cost. One thread at a time.")
        .def("stats", &PyBatch::stats)
        .def("stage_stats", &PyBatch::stage_stats)
        .def("expert_union", &PyBatch::expert_union,
             "(main passes, distinct (layer, expert) pairs in them) for passes of 1..64 rows.");
}

void bind_session(py::module_& m) {
    py::class_<PySession, SessionHolder>(m, "Session")
        .def(py::init<Model&, int, const std::string&, int, bool>(), "model"_a, "ctx"_a, "kv"_a, "max_rows"_a,
             "mtp"_a = false, py::keep_alive<1, 2>())
        .def_property_readonly("pos", [](const PySession& s) { return s.pos(false); })
        .def_property_readonly("mtp_pos", [](const PySession& s) { return s.pos(true); })
        .def_property_readonly("ctx", [](PySession& s) { return s.cache(false).ctx; })
        .def_property_readonly("max_rows", &PySession::max_rows)
        .def_property_readonly("tokens", &PySession::tokens, "Token ids of the cached positions [pos] int32 (a copy).")
        .def_property_readonly("cache_bytes",
                               [](PySession& s) { return s.cache(false).n_bytes() + s.cache(true).n_bytes(); })
        .def("forward", &PySession::forward, "ids"_a, "logits"_a = "last",
             "Append ids [n <= max_rows] int32; returns logits [0 | 1 | n, vocab_size] float32 for logits = none | "
             "last | all.")
        .def("mtp_forward", &PySession::mtp_forward, "ids"_a, "hidden"_a, "logits"_a = "last",
             "Append MTP rows from next tokens ids [n] and post-norm hidden [n, hidden_size]; returns (logits, g [n, "
             "hidden_size]).")
        .def("draft_round", &PySession::draft_round, "token"_a, "k"_a, "sampling"_a, "n_valid"_a,
             "min_confidence"_a = 0.0, "want_logits"_a = false, "drafts"_a = py::none(), "chosen"_a = py::none(),
             py::call_guard<FloatMode>(),
             "One draft-verify-accept round after `token`, with k drafts of the MTP layer or those given (both: they "
             "replace the layer's after it has run), or a plain step. Returns tokens (accepted drafts and "
             "the next token), counts, bytes and seconds, and with want_logits the rows [len(tokens), vocab_size] they "
             "were chosen from. `chosen`: ids that are taken for the model's choices (for measurements).")
        .def("decode_start", &PySession::decode_start, "token"_a, "sampling"_a, "n_valid"_a, "max_tokens"_a, "eos"_a,
             py::call_guard<FloatMode>(),
             "Decoding on the device after `token`: queue rounds with decode_step, take tokens with decode_poll.")
        .def("decode_step", &PySession::decode_step, "k"_a, "Queues a round of k drafts; returns at once.")
        .def("decode_poll", &PySession::decode_poll,
             "Rounds that have ended since the last poll, as dicts; waits for one unless none is queued.")
        .def("decode_finish", &PySession::decode_finish,
             "Waits for the queued rounds and brings the session up to date.")
        .def("device_view", &PySession::device_view, "name"_a,
             "(address, shape, type string) of a device buffer, or of a tap of the last pass that recorded any.")
        .def("device_report", &PySession::device_report, "what"_a, "JSON text: device, stages.")
        .def("hidden", &PySession::hidden, "Post-final-norm hidden states [n, hidden_size] of the last forward().")
        .def("truncate", &PySession::truncate, "n"_a, "Keep the first n positions.")
        .def("fork", &PySession::fork, "model"_a, "n"_a, "ctx"_a, py::keep_alive<0, 2>(),
             "A new session of the same model with the first n positions, alike but for its ctx.")
        .def("read_cache", &PySession::read_cache, "mtp"_a, "Cache rows [layers, pos, row_bytes] uint8 (a copy).")
        .def("state", &PySession::state,
             "What a saved session holds: tokens [n], cache [layers, n, row_bytes], mtp_cache [0 | 1, m, row_bytes], "
             "hidden [k, d].")
        .def("load_state", &PySession::load_state, "tokens"_a, "cache"_a, "mtp_cache"_a, "hidden"_a,
             "Replaces the session's whole state by one that state() returned; shapes and ids are checked.")
        .def("trace", &PySession::trace, "names"_a, "feed"_a = std::map<std::string, F32Array>{},
             "Taps to record from now on; feed, on a device: f32 [n, ...] by name, in place of the next pass's own "
             "embed, gate_logits and layer_out.")
        .def("taps", &PySession::taps, "Taps of the last forward pass as arrays [n, ...]; clears them.")
        .def("stats", &PySession::stats)
        .def("stage_stats", &PySession::stage_stats,
             "(name, calls, bytes, seconds, wait_sum, wait_max) of every stage that ran, in the order of a pass; "
             "'mtp.' before those of MTP passes. Bytes and seconds add up to those of stats().")
        .def("expert_union", &PySession::expert_union,
             "(windows, distinct (layer, expert) pairs in them) for windows of 1..8 adjacent tokens.");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C++ runtime of deepcalm. Use the deepcalm package; this module has no stable interface of its own.";
    m.attr("__version__") = DEEPCALM_VERSION;
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            std::rethrow_exception(p);
        } catch (const InUseAtFork& e) {
            py::set_error(py::module_::import("deepcalm.errors").attr("SessionError"), e.what());
        }
    });
    bind_functions(m);
    bind_model(m);
    bind_session(m);
    bind_batch(m);
    init_pack(m);
    init_probes(m);
    py::module_ testing = m.def_submodule("testing", "Addresses of the CPU kernels, and hooks, for tests.");
    init_testing(testing);
}
