#include "runtime/cuda/device.h"

#include <dlfcn.h>
#include <unistd.h>

namespace deepcalm {

Result<Device> open_device(const std::string& path) {
    const auto fail = [](const std::string& text) { return Error{ErrorCode::kUnsupported, text}; };
    if (access(path.c_str(), F_OK) != 0) return fail("this build has no " + path.substr(path.rfind('/') + 1));
    // Never closed: a driver that was initialised does not survive it.
    void* lib = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (lib == nullptr) return fail(std::string("cannot be opened: ") + dlerror());
    const auto entry = reinterpret_cast<DeviceEntry>(dlsym(lib, kDeviceSymbol));
    if (entry == nullptr) return fail(path + ": no symbol " + kDeviceSymbol + ": not a device library");
    Device d;
    d.api = entry(kDeviceAbi);
    if (d.api == nullptr || d.api->abi != kDeviceAbi || d.api->fingerprint != kDeviceFingerprint) {
        return fail(path + ": built from other sources than this extension module; install both together");
    }
    char text[512] = "", arch[16] = "";
    if (!d.api->probe(d.index, text, sizeof text, arch)) return fail(text);
    d.name = text;
    d.arch = arch;
    return d;
}

}  // namespace deepcalm
