// Weights drawn on the device from a seed: speed on shapes whose files are too large to ship. Values are uniform and scaled so
// that activations keep their size; the same seed gives the same bytes.
#pragma once

#include "runtime/cuda/host.h"
#include "runtime/manifest.h"

#include <algorithm>
#include <cmath>

namespace deepcalm::gpu {

struct FillArgs {
    uint32_t* data = nullptr;  // [words]
    int64_t words = 0;
    Format format = Format::kF32;
    int tile_words = 0;  // of a tile; q8, q4: the last kTileRows / 2 are scales
    bool constant = false;
    float a = 1;  // values in (-a, a); constant: all a (f32)
    uint64_t seed = 0;
};

DC_DEVICE uint32_t fill_hash(uint64_t x) {  // the finaliser of splitmix64
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}
DC_DEVICE uint32_t fill_16(uint32_t h, float a, Format f) {
    const float v = (static_cast<float>(h & 0xFFFF) + 0.5F) / 32768.0F * a - a;
    return f == Format::kF16 ? rt::f16_bits(v) : rt::bits(v) >> 16;
}
DC_KERNEL(256) kernel_fill(const __grid_constant__ FillArgs f) {
    for (int64_t i = rt::grid_thread(); i < f.words; i += rt::grid_threads()) {
        const uint32_t h = fill_hash(f.seed + static_cast<uint64_t>(i));
        uint32_t w = h;
        if (f.constant || f.format == Format::kF32) {
            w = rt::bits(f.constant ? f.a : (static_cast<float>(h) + 0.5F) / 2147483648.0F * f.a - f.a);
        } else if (f.format == Format::kBF16 || f.format == Format::kF16) {
            w = fill_16(h, f.a, f.format) | fill_16(h >> 16, f.a, f.format) << 16;
        } else if (f.format == Format::kF8) {
            w = (h & 0x9F9F9F9FU) + 0x20202020U;  // magnitudes 0.125..1.875
        } else {
            const bool q8 = f.format == Format::kQ8;
            if (i % f.tile_words >= f.tile_words - kTileRows / 2) {
                const float scale = f.a / (q8 ? 127.0F : 8.0F);
                const uint32_t s = f.format == Format::kQ4B ? rt::bits(scale) >> 16 : rt::f16_bits(scale);
                w = s | s << 16;
            } else if (q8) {
                w |= 0x01010101U;  // code + 128 is never 0
            }
        }
        f.data[i] = w;
    }
}

// Everything that `w` points at in the copy of a file at `memory` on the device.
inline rt::Error fill_weights(const ModelWeights& w, const std::byte* memory, uint64_t seed, const ModelConfig& c,
                              int sms) {
    rt::Stream stream = nullptr;
    rt::Error error = rt::create(&stream);
    visit(w, c, [&](const TensorSpec& spec, const auto& member) {
        const float a = spec.role == Role::kBias ? 0 : spec.tiled ? std::sqrt(3.0F / static_cast<float>(spec.cols)) : 1;
        pieces(spec, member, [&](const auto* p, int64_t bytes, const char*) {
            FillArgs args{.data = const_cast<uint32_t*>(reinterpret_cast<const uint32_t*>(p)),
                          .words = bytes / 4,
                          .constant = true,  // vectors and scales
                          .a = a};
            const auto offset = static_cast<uint64_t>(reinterpret_cast<const std::byte*>(p) - memory);
            args.seed = seed * 0x9E3779B97F4A7C15U + offset;
            if constexpr (!std::is_pointer_v<std::remove_cvref_t<decltype(member)>>) {
                args.format = member.format;
                args.tile_words = info(member.format).tile_bytes / 4;
                args.constant = static_cast<const void*>(p) != member.data;
            }
            if (error != 0) return;
            error = rt::launch({.grid = sms, .block = 256, .smem = 0, .dependent = false, .stream = stream},
                               kernel_fill, args);
        });
    });
    if (error == 0) error = rt::synchronize(stream);
    if (stream != nullptr) rt::destroy(stream);
    return error;
}

}  // namespace deepcalm::gpu
