#include "runtime/weights.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

namespace deepcalm {
namespace {

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

    Result<ModelWeights> bind() const {
        ModelWeights w(cfg_);
        Status status;
        visit(w, cfg_, [&](const TensorSpec& spec, auto& member) {
            if (status.ok()) status = bind(spec, member);
        });
        if (!status.ok()) return status.error();
        return w;
    }

  private:
    Error error(const std::string& name, const std::string& what) const {
        return {ErrorCode::kPackedFile, path_ + ": tensor " + name + ": " + what};
    }

    Result<const TensorEntry*> find(const std::string& name) const {
        const auto it = by_name_.find(name);
        if (it == by_name_.end()) return error(name, "missing");
        return it->second;
    }

    // Where the entry's bytes are: inside the file, aligned and as many as its shape needs.
    template <class T> Status locate(const std::string& name, int64_t bytes, const T*& p) const {
        DC_TRY(const TensorEntry* e, find(name));
        if (e->bytes != bytes)
            return error(name, std::to_string(e->bytes) + " bytes, expected " + std::to_string(bytes));
        if (e->offset < 0 || e->offset % 64 != 0)
            return error(name, "offset " + std::to_string(e->offset) + " is not a multiple of 64");
        if (e->offset > file_.size() || bytes > file_.size() - e->offset) {
            return error(name, "bytes " + std::to_string(e->offset) + " + " + std::to_string(bytes) +
                                   " lie beyond the file's " + std::to_string(file_.size()) + " bytes: truncated?");
        }
        p = static_cast<const T*>(static_cast<const void*>(file_.data() + e->offset));
        return {};
    }

    // The format of an entry that is as the manifest says.
    Result<Format> check(const TensorSpec& spec, const TensorEntry& e) const {
        if (e.kind != (spec.tiled ? "tiled" : "plain")) {
            return error(spec.name, "kind '" + e.kind + "', expected '" + (spec.tiled ? "tiled" : "plain") + "'");
        }
        if (e.n_slices != spec.n_slices || e.rows != spec.rows || e.cols != spec.cols) {
            return error(spec.name, "shape " + shape_text(e.n_slices, spec.stacked, e.rows, e.cols) + ", expected " +
                                        shape_text(spec.n_slices, spec.stacked, spec.rows, spec.cols) +
                                        " from the configuration");
        }
        for (int i = 0; i < kNumFormats; ++i) {
            const auto format = static_cast<Format>(i);
            if (e.format == kFormats[i].name && (!spec.tiled || e.scale == kFormats[i].scale) &&
                format_allowed(spec.role, format))
                return format;
        }
        return error(spec.name,
                     "format '" + e.format + "' (scale '" + e.scale + "') is not one that this tensor may have");
    }

    template <class T> Status bind(const TensorSpec& spec, T& t) const {
        DC_TRY(const TensorEntry* e, find(spec.name));
        DC_TRY([[maybe_unused]] const Format format, check(spec, *e));
        if constexpr (!std::is_pointer_v<T>) {
            t.format = format;
            t.rows = spec.rows;
            t.cols = spec.cols;
        }
        if constexpr (std::is_same_v<T, PackedTensor>) {
            t.n_slices = spec.n_slices;
            if (format == Format::kF8) DC_TRY_STATUS(set_scale_block(*e, t));
        }
        Status status;
        pieces(spec, t, [&](auto*& p, int64_t bytes, const char* suffix) {
            if (status.ok()) status = locate(spec.name + suffix, bytes, p);
        });
        return status;
    }

    Status set_scale_block(const TensorEntry& e, PackedTensor& t) const {
        if (e.scale_rows < kTileRows || e.scale_rows > (1 << 20) || e.scale_rows % kTileRows != 0 ||
            e.scale_cols < kTileCols || e.scale_cols > (1 << 20) || e.scale_cols % kTileCols != 0) {
            return error(e.name, "scale block [" + std::to_string(e.scale_rows) + ", " + std::to_string(e.scale_cols) +
                                     "], expected multiples of [16, 32]");
        }
        t.scale_rows = static_cast<int>(e.scale_rows);
        t.scale_cols = static_cast<int>(e.scale_cols);
        return {};
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
