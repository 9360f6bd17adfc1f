// The one description of a packed weight tensor: tile geometry, byte order, table of formats.
// Read by the packer, the loader, every kernel and (through _core) Python. Nothing here allocates or fails.
//
// A matrix [rows, cols] is cut into tiles of 16 rows x 32 columns, zero-padded at the edges. Tiles lie along the
// columns first: [n_slices, row_tiles, col_tiles][tile_bytes]. Inside a tile a 32-bit lane belongs to one row, so a
// 512-bit vector is 16 rows and an output element never leaves its lane (no horizontal sums, same bits for any number
// of activation rows). Byte of element (r, c), r in 0..15, c in 0..31:
//
//   FORMAT   TILE BYTES  ELEMENT (r, c)                                          SCALES
//   f32            2048  f32  at 4 * (16*c + r)                                  none
//   bf16, f16      1024  u16  at 2 * (32*(c/2) + 2*r + c%2)                      none
//   f8              512  e4m3 at 64*(c/4) + 4*r + c%4                            f32 beside the tensor, one per scale block
//   q8              544  code + 128 at 64*(c/4) + 4*r + c%4                      f16 at 512 + 2*r, one per row
//   q4, q4b         288  code + 8 at 64*((c%16)/4) + 4*r + c%4,                  f16 (q4) or bf16 (q4b) at 256 + 2*r
//                        low nibble for c < 16, high nibble for c >= 16
//
// Values: f8 = e4m3(byte) * scale_block; q8 = code * scale, code in -127..127 (-128 too where a
// source has it); q4 = code * scale, code in -8..7.
#pragma once

#include <cstddef>
#include <cstdint>

// Always inlined, unoptimised too: the linker would keep one copy for all objects, and that of an instruction set's object
// does not run on every processor.
#define DC_CONSTEXPR constexpr __attribute__((always_inline))
// Code that CPU and CUDA kernels share: where nvcc compiles it, of the device.
#ifdef __CUDACC__
#define DC_SHARED __device__ __forceinline__
#else
#define DC_SHARED DC_CONSTEXPR
#endif

namespace deepcalm {

inline constexpr int kTileRows = 16;
inline constexpr int kTileCols = 32;

enum class Format : uint8_t { kF32, kBF16, kF16, kF8, kQ8, kQ4, kQ4B };
inline constexpr int kNumFormats = 7;

// How the activations of a product are rounded; decided by the weight format alone (never by the number of rows).
enum class ActKind : uint8_t {
    kF32,   // f32, unrounded
    kBF16,  // nearest-even bf16
    kI8,  // int8 per row and group of 32 columns, in f32: d = amax / 127, code = rint(x * (127 / amax)), amax = max|x|;
          // amax < 2^-119 counts as zero (d = 0, codes 0); a NaN or Inf makes d not finite, so outputs show it
};
inline constexpr int kNumActKinds = 3;

struct FormatInfo {
    const char* name;    // name in the packed file's tensor table
    const char* scale;   // dtype of the scales ("" when there are none)
    int tile_bytes;      // bytes of one 16 x 32 tile
    int sum_block_cols;  // columns of one partial sum (see MatmulArgs in kernels.h)
    ActKind act;
    float dot_tol;  // |kernel - f64 oracle with the same rounded operands| / sum|w x|, worst case over the test sweep
};

inline constexpr FormatInfo kFormats[kNumFormats] = {
    {"f32", "", 2048, 128, ActKind::kF32, 1e-5F}, {"bf16", "", 1024, 128, ActKind::kBF16, 1e-5F},
    {"f16", "", 1024, 128, ActKind::kF32, 1e-5F}, {"f8", "f32", 512, 128, ActKind::kBF16, 1e-5F},
    {"q8", "f16", 544, 32, ActKind::kI8, 1e-5F},  {"q4", "f16", 288, 32, ActKind::kI8, 1e-5F},
    {"q4", "bf16", 288, 32, ActKind::kI8, 1e-5F},
};

DC_CONSTEXPR const FormatInfo& info(Format f) { return kFormats[static_cast<int>(f)]; }

struct TileF32 {
    float v[kTileCols][kTileRows];
};
struct Tile16 {
    uint16_t v[kTileCols / 2][kTileRows][2];
};
struct TileF8 {
    uint8_t v[kTileCols / 4][kTileRows][4];
};
struct TileQ8 {
    uint8_t v[kTileCols / 4][kTileRows][4];  // code + 128
    uint16_t scale[kTileRows];               // f16
};
struct TileQ4 {
    uint8_t v[kTileCols / 8][kTileRows][4];  // low nibble columns 0..15, high nibble 16..31, code + 8
    uint16_t scale[kTileRows];               // f16 or bf16
};
static_assert(sizeof(TileF32) == info(Format::kF32).tile_bytes);
static_assert(sizeof(Tile16) == info(Format::kBF16).tile_bytes && sizeof(Tile16) == info(Format::kF16).tile_bytes);
static_assert(sizeof(TileF8) == info(Format::kF8).tile_bytes);
static_assert(sizeof(TileQ8) == info(Format::kQ8).tile_bytes);
static_assert(sizeof(TileQ4) == info(Format::kQ4).tile_bytes && sizeof(TileQ4) == info(Format::kQ4B).tile_bytes);

__attribute__((always_inline)) inline int32_t load_32(const void* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
}
DC_CONSTEXPR int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DC_CONSTEXPR int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A view of one packed matrix or a stack of equal ones; the mapped file or a buffer owns the bytes.
struct PackedTensor {
    const std::byte* data = nullptr;  // [n_slices, row_tiles, col_tiles] tiles of `format`
    const float* scales = nullptr;    // f8: [n_slices, ceil(rows/scale_rows), ceil(cols/scale_cols)] f32; else null
    Format format = Format::kF32;
    int n_slices = 1;
    int rows = 0, cols = 0;  // natural (unpadded) shape of a slice; after stacking, of the stacked matrix
    int scale_rows = 128, scale_cols = 128;  // f8 scale block, multiples of 16 and 32

    DC_CONSTEXPR int row_tiles() const { return static_cast<int>(ceil_div(rows, kTileRows)); }
    DC_CONSTEXPR int col_tiles() const { return static_cast<int>(ceil_div(cols, kTileCols)); }
    DC_CONSTEXPR int64_t row_tile_bytes() const { return int64_t{col_tiles()} * info(format).tile_bytes; }
    DC_CONSTEXPR int64_t slice_bytes() const { return row_tiles() * row_tile_bytes(); }
    DC_CONSTEXPR int64_t n_bytes() const { return n_slices * slice_bytes(); }
    DC_CONSTEXPR int64_t slice_scales() const { return ceil_div(rows, scale_rows) * ceil_div(cols, scale_cols); }
    // What a product with one slice reads: tiles and scales.
    DC_CONSTEXPR int64_t read_bytes() const { return slice_bytes() + (scales != nullptr ? 4 * slice_scales() : 0); }
};

// Key/value cache row of one position and layer: the normed latent c_kv and the rotated k_rope, nothing else.
// Both parts are zero-padded so that kernels need no tails: c_pad = round_up(kv_lora_rank, 32), r_pad = round_up(dr, 16).
//   f32: (c_pad + r_pad) f32          f16, bf16: (c_pad + r_pad) u16
//   q8:  c_pad int8 codes | c_pad/32 f16 scales | r_pad f16
enum class CacheType : uint8_t { kF32, kF16, kBF16, kQ8 };
inline constexpr int kNumCacheTypes = 4;
inline constexpr const char* kCacheTypeNames[kNumCacheTypes] = {"f32", "f16", "bf16", "q8"};

DC_CONSTEXPR int64_t cache_row_bytes(CacheType type, int c_pad, int r_pad) {
    switch (type) {
    case CacheType::kF32: return 4 * (int64_t{c_pad} + r_pad);
    case CacheType::kF16:
    case CacheType::kBF16: return 2 * (int64_t{c_pad} + r_pad);
    case CacheType::kQ8: return c_pad + 2 * (int64_t{c_pad} / 32) + 2 * int64_t{r_pad};
    }
    return 0;
}

}  // namespace deepcalm
