// A device library (libdeepcalm_cuda.so, or the tests' simulator: the same sources on the CPU) as both sides see it. CUDA is
// never linked, only found (docs/development.md): the library is opened next to the core and makes a Backend.
#pragma once

#include "runtime/engine.h"

namespace deepcalm {

#define DC_TEXT_OF(x) #x
#define DC_TEXT(x) DC_TEXT_OF(x)
// What the types that cross depend on: the headers of this tree, DEEPCALM_HEADERS being a hash of them, and the C++ library,
// of which a process has one. A compiler for the host that nvcc was told to use may bring headers of another.
#define DC_DEVICE_BUILD DEEPCALM_HEADERS " with libstdc++ " DC_TEXT(_GLIBCXX_RELEASE)

struct DeviceLibrary {
    const char* build;  // the library's DC_DEVICE_BUILD; read before the rest is believed
    // fill_seed not 0: weights are drawn on the device instead of read (speed work on shapes that nobody ships).
    Result<std::unique_ptr<Backend>> (*open)(const BoundModel& model, uint64_t fill_seed);
};
inline constexpr const char* kDeviceSymbol = "deepcalm_device";  // extern "C" const DeviceLibrary

// Opens the library at `path` (once per process) and the model on the device that it finds. Errors (kUnsupported) say what is
// missing: the library, its entry, a driver, a device.
Result<std::unique_ptr<Backend>> open_device(const std::string& path, const BoundModel& model, uint64_t fill_seed);

}  // namespace deepcalm
