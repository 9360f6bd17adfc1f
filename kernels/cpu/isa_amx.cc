// The kernels of the set amx that are not avx512x's: on the tile registers of the processor, and emulated without them.
#include "kernels/cpu/isa_amx.h"

#include "kernels/cpu/matmul_tiles.h"

namespace deepcalm {

int64_t amx::peak_bf16(int64_t rounds, void* buf) noexcept { return peak_tiles<HardwareTiles>(rounds, buf); }
int64_t amx_emulated::peak_bf16(int64_t rounds, void* buf) noexcept { return peak_tiles<EmulatedTiles>(rounds, buf); }
void amx::matmul_bf16(const MatmulArgs& args) noexcept { in_tile_mode(product_bf16<HardwareTiles>, args); }
void amx::matmul_f8(const MatmulArgs& args) noexcept { in_tile_mode(product_f8<HardwareTiles>, args); }
void amx_emulated::matmul_bf16(const MatmulArgs& args) noexcept { in_tile_mode(product_bf16<EmulatedTiles>, args); }
void amx_emulated::matmul_f8(const MatmulArgs& args) noexcept { in_tile_mode(product_f8<EmulatedTiles>, args); }

}  // namespace deepcalm
