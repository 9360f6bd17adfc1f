// How each weight format is read and multiplied, on top of a SIMD layer.
//
// Every format is a stream of 64-byte units: kCols columns x 16 rows, lane = row. A chained format (f32, f16, bf16, f8)
// multiplies a unit into a running sum Acc; the int formats (q8, q4) sum a tile of 32 columns in integers first.
#pragma once

namespace deepcalm {
namespace {

// What the chained formats share where columns are multiplied in f32, one after the other.
template <class Tile, class XType> struct Chain {
    using X = XType;
    using Acc = F;
    static constexpr int kTileBytes = sizeof(Tile), kCols = 64 * kTileCols / kTileBytes;
    static constexpr bool kScaled = false;
    static DC_INLINE Acc start() { return set1(0); }
    static DC_INLINE F value(Acc acc) { return acc; }
};

struct WeightF32 : Chain<TileF32, float> {
    using Unit = F;
    static DC_INLINE Unit load(const std::byte* p) { return ::deepcalm::load(reinterpret_cast<const float*>(p)); }
    static DC_INLINE void mac(Acc& acc, Unit w, const X* x) { acc = fma(w, set1(x[0]), acc); }
};

struct WeightF16 : Chain<Tile16, float> {
    struct Unit {
        F even, odd;
    };
    static DC_INLINE Unit load(const std::byte* p) {
        Unit u;
        f16_pair(iload(p), u.even, u.odd);
        return u;
    }
    static DC_INLINE void mac(Acc& acc, const Unit& w, const X* x) {
        acc = fma(w.even, set1(x[0]), acc);
        acc = fma(w.odd, set1(x[1]), acc);
    }
};

// A bf16 pair in each 32-bit lane -> f32 of the low and of the high half.
struct Pair {
    F even, odd;
};
DC_INLINE Pair bf16_pair(I v) { return {as_f(shl<16>(v)), as_f(v & iset1(-65536))}; }

// Without a bf16 dot instruction: the same columns, one fused multiply-add each.
template <> struct WeightBF16<NoDot> : Chain<Tile16, uint16_t> {
    using Unit = Pair;
    static DC_INLINE Unit load(const std::byte* p) { return bf16_pair(iload(p)); }
    static DC_INLINE void mac(Acc& acc, const Unit& w, const X* x) {
        const Pair xp = bf16_pair(iset1(load_32(x)));
        acc = fma(w.even, xp.even, acc);
        acc = fma(w.odd, xp.odd, acc);
    }
};

// e4m3 in the top byte of each lane -> f32, exact, without denormal operands (slow, and zero where a thread has set DAZ):
// the exponent is moved by 120. A zero exponent then reads n = 2^-7 (1 + m/8) for 2^-6 m/8 = 2n - 2^-6, which is below n
// there and nowhere else.
DC_INLINE F e4m3_lanes(I v) {
    const F n = as_f(shr<4>(v & iset1(0x7f000000)) + iset1(120 << 23));
    const F magnitude = min(n, fma(n, set1(2.0F), set1(-0x1p-6F)));
    return as_f(as_i(magnitude) | (v & iset1(INT32_MIN)));
}

template <> struct WeightF8<NoDot> : Chain<TileF8, uint16_t> {
    static constexpr bool kScaled = true;
    struct Unit {
        F w[4];
    };
    static DC_INLINE Unit load(const std::byte* p) {
        const I v = iload(p);
        return {{e4m3_lanes(shl<24>(v)), e4m3_lanes(shl<16>(v)), e4m3_lanes(shl<8>(v)), e4m3_lanes(v)}};
    }
    static DC_INLINE void mac(Acc& acc, const Unit& w, const X* x) {
        const Pair lo = bf16_pair(iset1(load_32(x))), hi = bf16_pair(iset1(load_32(x + 2)));
        acc = fma(w.w[0], lo.even, acc);
        acc = fma(w.w[1], lo.odd, acc);
        acc = fma(w.w[2], hi.even, acc);
        acc = fma(w.w[3], hi.odd, acc);
    }
};

struct WeightQ8 : DotQ8 {
    static constexpr int kUnits = 8, kScaleAt = 512;
    static constexpr int kTileBytes = sizeof(TileQ8);
    static DC_INLINE F scale(const std::byte* p) { return load_f16(p); }
};
struct WeightQ4 : DotQ4 {
    static constexpr int kUnits = 4, kScaleAt = 256;
    static constexpr int kTileBytes = sizeof(TileQ4);
    static DC_INLINE F scale(const std::byte* p) { return load_f16(p); }
};
struct WeightQ4B : WeightQ4 {
    static DC_INLINE F scale(const std::byte* p) { return as_f(shl<16>(load_u16(p))); }
};

}  // namespace
}  // namespace deepcalm
