// The noise of keyed sampling: standard Gumbel of (seed, position, token), the same bits on CPU and GPU.
#pragma once

#include "kernels/elementary.h"

namespace deepcalm {

inline constexpr uint64_t kNoiseRange = uint64_t{1} << 52;

// Random bits of two neighbouring tokens. Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
struct NoiseBlock {
    uint32_t v[4];

    DC_CONSTEXPR uint64_t bits(int token) const {  // 0..kNoiseRange-1
        return (token % 2 ? uint64_t{v[2]} << 32 | v[3] : uint64_t{v[0]} << 32 | v[1]) >> 12;
    }
};
DC_CONSTEXPR NoiseBlock noise_block(uint64_t seed, int64_t pos, int token) {
    const auto p = static_cast<uint64_t>(pos);
    NoiseBlock c{{static_cast<uint32_t>(token / 2), static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), 0}};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53U} * c.v[0], p1 = uint64_t{0xCD9E8D57U} * c.v[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<uint32_t>(p1),
              static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<uint32_t>(p0)}};
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return c;
}
DC_CONSTEXPR double gumbel_of(uint64_t bits) {
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;  // never 0 or 1
    return -log_f64(-log_f64(u));
}
// The noise itself: u in (0, 1) from counter (token / 2, pos) and key seed.
DC_CONSTEXPR double gumbel(uint64_t seed, int64_t pos, int token) {
    return gumbel_of(noise_block(seed, pos, token).bits(token));
}

}  // namespace deepcalm
