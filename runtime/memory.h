// Zeroed anonymous memory: 64-byte aligned (page aligned), untouched pages cost nothing, failure is a value.
#pragma once

#include "runtime/result.h"

#include <cstddef>
#include <cstdint>
#include <sys/mman.h>

namespace deepcalm {

class ZeroedBuffer {
  public:
    ZeroedBuffer() = default;
    ZeroedBuffer(ZeroedBuffer&& o) noexcept
        : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
    ZeroedBuffer& operator=(ZeroedBuffer&& o) noexcept {
        std::swap(data_, o.data_);
        std::swap(bytes_, o.bytes_);
        return *this;
    }
    ~ZeroedBuffer() {
        if (data_ != nullptr) munmap(data_, bytes_);
    }

    static Result<ZeroedBuffer> make(int64_t bytes, const char* what) {
        ZeroedBuffer b;
        if (bytes <= 0) return b;
        void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            return Error{ErrorCode::kResource,
                         std::string(what) + ": cannot reserve " + std::to_string(bytes) + " bytes of memory"};
        }
        b.data_ = p;
        b.bytes_ = static_cast<size_t>(bytes);
        return b;
    }

    // Gives the pages back: zeros again, untouched again.
    void release() const {
        if (data_ != nullptr) madvise(data_, bytes_, MADV_DONTNEED);
    }
    std::byte* data() const { return static_cast<std::byte*>(data_); }
    int64_t size() const { return static_cast<int64_t>(bytes_); }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace deepcalm
