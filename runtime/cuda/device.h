// A device library, opened: what the core needs to run passes on it. CUDA is never linked, only found (docs/model.md 8).
#pragma once

#include "runtime/cuda/abi.h"

#include <memory>

namespace deepcalm {

struct Device {
    const DeviceApi* api = nullptr;
    int index = 0;     // of several GPUs: CUDA_VISIBLE_DEVICES order
    std::string name;  // "NVIDIA H200"
    std::string arch;  // names its bits, as an ISA name does: "sm_90" | "sim"
};

// Opens the library at `path` (once per process) and finds a device. Errors (kUnsupported) say what is missing: the library,
// its entry point, a driver, a device.
Result<Device> open_device(const std::string& path);

// open_model(), open_session() with failures as Results; closed with the pointer.
struct DeviceModelCloser {
    const DeviceApi* api;
    void operator()(DeviceModel* m) const { api->close_model(m); }
};
struct DeviceSessionCloser {
    const DeviceApi* api;
    void operator()(DeviceSession* s) const { api->close_session(s); }
};
using DeviceModelPtr = std::unique_ptr<DeviceModel, DeviceModelCloser>;
using DeviceSessionPtr = std::unique_ptr<DeviceSession, DeviceSessionCloser>;

inline Error to_error(const DeviceError& e) { return {e.code, e.text}; }

}  // namespace deepcalm
