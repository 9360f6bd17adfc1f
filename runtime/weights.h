// The packed file, mapped and bound: every pointer below points into the mapping and was checked against the file's size,
// the manifest and the format table before it was made.
#pragma once

#include "runtime/manifest.h"

#include <string>
#include <vector>

namespace deepcalm {

// One row of the file's tensor table, as Python read it. Nothing here is trusted.
struct TensorEntry {
    std::string name, kind;     // kind: tiled | plain | scale
    std::string format, scale;  // names of kFormats
    int64_t n_slices = 1, rows = 0, cols = 0;
    int64_t scale_rows = 0, scale_cols = 0;  // f8 only
    int64_t offset = 0, bytes = 0;           // absolute in the file; true length
};

class MappedFile {
  public:
    MappedFile() = default;
    MappedFile(MappedFile&& o) noexcept
        : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)), fd_(std::exchange(o.fd_, -1)) {}
    MappedFile& operator=(MappedFile&& o) noexcept {
        std::swap(data_, o.data_);
        std::swap(bytes_, o.bytes_);
        std::swap(fd_, o.fd_);
        return *this;
    }
    ~MappedFile();
    // Maps the whole file of an open descriptor, of which it keeps a copy. `path` is for messages.
    static Result<MappedFile> map(int fd, const std::string& path);
    const std::byte* data() const { return data_; }
    int64_t size() const { return bytes_; }
    // Reads the file and keeps it in memory until it is unmapped (mlock). `path` is for the message.
    Status lock(const std::string& path) const;
    int fd() const { return fd_; }  // of the same file, for reading without mapping pages

  private:
    const std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
    int fd_ = -1;
};

// Checks every entry (64-bit arithmetic, real file size, manifest shape, allowed format) and binds it. `path` is for messages.
Result<ModelWeights> bind_weights(const ModelConfig& cfg, const MappedFile& file,
                                  const std::vector<TensorEntry>& entries, const std::string& path);

}  // namespace deepcalm
