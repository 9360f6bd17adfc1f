// The kernels of the set amx that are not avx512x's: on the tile registers of the processor, and emulated without them.
#include "kernels/cpu/isa_amx.h"

// Of attention_impl.h a part is left to avx512x.
#pragma GCC diagnostic ignored "-Wunused-function"

#include "kernels/cpu/attention_tiles.h"

namespace deepcalm {

extern const CpuKernels kernels_avx512x;

namespace {
template <class T> void mla_partial_of(const MlaPartialArgs& args) {
    if (args.type != CacheType::kBF16) return kernels_avx512x.mla_partial(args);
    in_tile_mode(partial_on_tiles<T>, args);
}
}  // namespace

int64_t amx::peak_bf16(int64_t rounds, void* buf) noexcept { return peak_tiles<HardwareTiles>(rounds, buf); }
int64_t amx_emulated::peak_bf16(int64_t rounds, void* buf) noexcept { return peak_tiles<EmulatedTiles>(rounds, buf); }
void amx::matmul_bf16(const MatmulArgs& args) noexcept { in_tile_mode(product_bf16<HardwareTiles>, args); }
void amx::matmul_f8(const MatmulArgs& args) noexcept { in_tile_mode(product_f8<HardwareTiles>, args); }
void amx_emulated::matmul_bf16(const MatmulArgs& args) noexcept { in_tile_mode(product_bf16<EmulatedTiles>, args); }
void amx_emulated::matmul_f8(const MatmulArgs& args) noexcept { in_tile_mode(product_f8<EmulatedTiles>, args); }
void amx::mla_partial(const MlaPartialArgs& args) noexcept { mla_partial_of<HardwareTiles>(args); }
void amx_emulated::mla_partial(const MlaPartialArgs& args) noexcept { mla_partial_of<EmulatedTiles>(args); }

}  // namespace deepcalm
