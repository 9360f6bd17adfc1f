#include "runtime/cuda/library.h"

#include <dlfcn.h>
#include <unistd.h>

namespace deepcalm {

Result<std::unique_ptr<Backend>> open_device(const std::string& path, const BoundModel& model, uint64_t fill_seed) {
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kUnsupported, text}; };
    if (model.cfg.post_moe_norm > 0)
        return fail("a norm behind the experts is not computed on a GPU: use --device cpu");
    if (access(path.c_str(), F_OK) != 0) return fail("this build has no " + path.substr(path.rfind('/') + 1));
    // Never closed: a driver that was initialised does not survive it.
    void* lib = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (lib == nullptr) return fail(std::string("cannot be opened: ") + dlerror());
    const auto* device = static_cast<const DeviceLibrary*>(dlsym(lib, kDeviceSymbol));
    if (device == nullptr) return fail(path + ": no symbol " + kDeviceSymbol + ": not a device library");
    const std::string build = device->build;
    if (build != DC_DEVICE_BUILD) {
        return fail(path + ": built from headers " + build +
                    ", this extension module from " DC_DEVICE_BUILD
                    "; build both from one tree, with one C++ compiler");
    }
    return device->open(model, fill_seed);
}

}  // namespace deepcalm
