#include "runtime/weights.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <variant>

namespace deepcalm {
namespace {

using TensorSlot = std::variant<PackedTensor LayerWeights::*, const float* LayerWeights::*>;

// Name inside a layer -> where it is bound. Names and shapes come from the manifest; this is the only other list.
const std::map<std::string, TensorSlot>& layer_slots() {
    static const std::map<std::string, TensorSlot> slots = {
        {"attn_norm", &LayerWeights::attn_norm},
        {"wqkv_a", &LayerWeights::wqkv_a},
        {"q_a_norm", &LayerWeights::q_a_norm},
        {"wq_b", &LayerWeights::wq_b},
        {"kv_a_norm", &LayerWeights::kv_a_norm},
        {"w_uk", &LayerWeights::w_uk},
        {"w_uv", &LayerWeights::w_uv},
        {"wo", &LayerWeights::wo},
        {"ffn_norm", &LayerWeights::ffn_norm},
        {"w_gate_up", &LayerWeights::w_gate_up},
        {"w_down", &LayerWeights::w_down},
        {"router", &LayerWeights::router},
        {"router_bias", &LayerWeights::router_bias},
        {"experts.w_gate_up", &LayerWeights::experts_gate_up},
        {"experts.w_down", &LayerWeights::experts_down},
        {"shared.w_gate_up", &LayerWeights::shared_gate_up},
        {"shared.w_down", &LayerWeights::shared_down},
    };
    return slots;
}

std::string shape_text(int64_t slices, bool stacked, int64_t rows, int64_t cols) {
    std::string s = "[";
    if (stacked) s += std::to_string(slices) + ", ";
    s += std::to_string(rows);
    if (cols > 0) s += ", " + std::to_string(cols);
    return s + "]";
}

class Binder {
  public:
    Binder(const ModelConfig& cfg, const MappedFile& file, const std::vector<TensorEntry>& entries,
           const std::string& path)
        : cfg_(cfg), file_(file), path_(path) {
        for (const TensorEntry& e : entries) by_name_.emplace(e.name, &e);
    }

    Result<ModelWeights> bind() {
        ModelWeights w;
        w.layers.resize(static_cast<size_t>(cfg_.num_hidden_layers));
        for (int i = 0; i < cfg_.num_hidden_layers; ++i) w.layers[static_cast<size_t>(i)].moe = cfg_.is_moe(i);
        w.mtp_layer.moe = cfg_.is_moe(cfg_.num_hidden_layers);
        for (const TensorSpec& spec : expected_tensors(cfg_)) {
            DC_TRY(const Bound b, check(spec));
            const auto vector = static_cast<const float*>(static_cast<const void*>(b.data));
            if (spec.name == "embed") {
                w.embed = b.data;
                w.embed_format = b.tensor.format;
            } else if (spec.name == "final_norm") {
                w.final_norm = vector;
            } else if (spec.name == "head") {
                w.head = w.mtp_head = b.tensor;
            } else if (spec.name == "mtp.head") {
                w.mtp_head = b.tensor;
            } else if (spec.name == "mtp.enorm") {
                w.mtp_enorm = vector;
            } else if (spec.name == "mtp.hnorm") {
                w.mtp_hnorm = vector;
            } else if (spec.name == "mtp.final_norm") {
                w.mtp_final_norm = vector;
            } else if (spec.name == "mtp.eh_proj") {
                w.mtp_eh_proj = b.tensor;
            } else {
                const bool mtp = spec.name.starts_with("mtp.");
                const size_t prefix = mtp ? 4 : spec.name.find('.', 7) + 1;  // "mtp." or "layers.{i}."
                LayerWeights& layer = mtp ? w.mtp_layer : w.layers[static_cast<size_t>(std::stoi(spec.name.substr(7)))];
                const auto slot = layer_slots().find(spec.name.substr(prefix));
                DC_CHECK(slot != layer_slots().end());
                if (const auto* t = std::get_if<PackedTensor LayerWeights::*>(&slot->second)) {
                    layer.*(*t) = b.tensor;
                } else {
                    layer.*(std::get<const float* LayerWeights::*>(slot->second)) = vector;
                }
            }
        }
        return w;
    }

  private:
    struct Bound {
        const std::byte* data = nullptr;
        PackedTensor tensor;
    };

    Error error(const std::string& name, const std::string& what) const {
        return {ErrorCode::kPackedFile, path_ + ": tensor " + name + ": " + what};
    }

    Result<const TensorEntry*> find(const std::string& name) const {
        const auto it = by_name_.find(name);
        if (it == by_name_.end()) return error(name, "missing");
        return it->second;
    }

    // The entry's bytes lie inside the file, are aligned and as many as its shape needs.
    Result<const std::byte*> range(const TensorEntry& e, int64_t expected_bytes) const {
        if (e.bytes != expected_bytes) {
            return error(e.name, std::to_string(e.bytes) + " bytes, expected " + std::to_string(expected_bytes));
        }
        if (e.offset < 0 || e.offset % 64 != 0)
            return error(e.name, "offset " + std::to_string(e.offset) + " is not a multiple of 64");
        if (e.offset > file_.size() || e.bytes > file_.size() - e.offset) {
            return error(e.name, "bytes " + std::to_string(e.offset) + " + " + std::to_string(e.bytes) +
                                     " lie beyond the file's " + std::to_string(file_.size()) + " bytes: truncated?");
        }
        return file_.data() + e.offset;
    }

    Result<Bound> check(const TensorSpec& spec) const {
        DC_TRY(const TensorEntry* e, find(spec.name));
        if (e->kind != (spec.tiled ? "tiled" : "plain")) {
            return error(spec.name, "kind '" + e->kind + "', expected '" + (spec.tiled ? "tiled" : "plain") + "'");
        }
        const int64_t cols = spec.cols > 0 ? spec.cols : 0;
        if (e->n_slices != spec.n_slices || e->rows != spec.rows || e->cols != cols) {
            return error(spec.name, "shape " + shape_text(e->n_slices, spec.stacked, e->rows, e->cols) + ", expected " +
                                        shape_text(spec.n_slices, spec.stacked, spec.rows, cols) +
                                        " from the configuration");
        }
        int format = -1;
        for (int i = 0; i < kNumFormats; ++i) {
            if (e->format == kFormats[i].name && (!spec.tiled || e->scale == kFormats[i].scale)) {
                format = i;
                break;
            }
        }
        if (format < 0 || !format_allowed(spec.role, static_cast<Format>(format))) {
            return error(spec.name,
                         "format '" + e->format + "' (scale '" + e->scale + "') is not one that this tensor may have");
        }
        Bound b;
        PackedTensor& t = b.tensor;
        t.format = static_cast<Format>(format);
        t.n_slices = spec.n_slices;
        t.rows = spec.rows;
        t.cols = spec.tiled ? spec.cols : static_cast<int>(cols);
        if (!spec.tiled) {
            const int64_t elem = t.format == Format::kF32 ? 4 : 2;
            DC_TRY(b.data, range(*e, elem * spec.rows * (cols > 0 ? cols : 1)));
            return b;
        }
        DC_TRY(b.data, range(*e, t.n_bytes()));
        t.data = b.data;
        if (t.format == Format::kF8) {
            if (e->scale_rows < kTileRows || e->scale_rows > (1 << 20) || e->scale_rows % kTileRows != 0 ||
                e->scale_cols < kTileCols || e->scale_cols > (1 << 20) || e->scale_cols % kTileCols != 0) {
                return error(spec.name, "scale block [" + std::to_string(e->scale_rows) + ", " +
                                            std::to_string(e->scale_cols) + "], expected multiples of [16, 32]");
            }
            t.scale_rows = static_cast<int>(e->scale_rows);
            t.scale_cols = static_cast<int>(e->scale_cols);
            DC_TRY(const TensorEntry* s, find(spec.name + ".scale"));
            DC_TRY(const std::byte* scales, range(*s, 4 * t.n_slices * t.slice_scales()));
            t.scales = static_cast<const float*>(static_cast<const void*>(scales));
        }
        return b;
    }

    const ModelConfig& cfg_;
    const MappedFile& file_;
    const std::string& path_;
    std::map<std::string, const TensorEntry*> by_name_;
};

}  // namespace

MappedFile::~MappedFile() {
    if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), static_cast<size_t>(bytes_));
    if (fd_ >= 0) ::close(fd_);
}

Result<MappedFile> MappedFile::map(int fd, const std::string& path) {
    const auto fail = [&](const char* what) {
        return Error{ErrorCode::kPackedFile, path + ": " + what + ": " + std::strerror(errno)};
    };
    MappedFile f;
    f.fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (f.fd_ < 0) return fail("cannot be kept open");
    struct stat st{};
    if (fstat(f.fd_, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size <= 0)
        return Error{ErrorCode::kPackedFile, path + ": not a regular, non-empty file"};
    void* p = mmap(nullptr, static_cast<size_t>(st.st_size), PROT_READ, MAP_SHARED, f.fd_, 0);
    if (p == MAP_FAILED) return fail("cannot map");
    f.data_ = static_cast<const std::byte*>(p);
    f.bytes_ = st.st_size;
    return f;
}

Status MappedFile::lock(const std::string& path) const {
    if (mlock(data_, static_cast<size_t>(bytes_)) == 0) return {};
    const std::string why = std::strerror(errno);
    rlimit limit{};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    const bool unlimited = limit.rlim_cur == RLIM_INFINITY;
    return Error{ErrorCode::kResource, path + ": cannot lock " + std::to_string(ceil_div(bytes_, 1024)) +
                                           " kB in memory: " + why + "; the limit (ulimit -l) is " +
                                           (unlimited ? "unlimited" : std::to_string(limit.rlim_cur / 1024) + " kB")};
}

Result<ModelWeights> bind_weights(const ModelConfig& cfg, const MappedFile& file,
                                  const std::vector<TensorEntry>& entries, const std::string& path) {
    return Binder(cfg, file, entries, path).bind();
}

}  // namespace deepcalm
