"""What the instruction set amx defines (docs/model.md 7.2), bit for bit: TDPBF16PS in float64, products, attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from ref.formats import E4M3, bf16_round, bf16_value

Array = np.ndarray[Any, Any]
CHUNK, ONE = 64, np.float32(1)  # cache positions between two maxima


def bf16(bits: Array) -> Array:
    """float32 of bf16 bits; subnormals are zeros."""
    u = bits.astype(np.uint32) << 16
    return np.where(u & 0x7F800000, u, u & 0x80000000).astype(np.uint32).view(np.float32)


def fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32, rounded once to nearest even; operands and results below 2^-126 are zeros.

    x * y is exact in float64, where x and y have 12 bits or x is 1; the sum is rounded to odd there, after which the
    rounding to 24 bits is that of the exact sum.
    """
    tiny = np.float32(2.0**-126)
    x, y, z = (np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a) for a in (x, y, z))
    with np.errstate(invalid="ignore", over="ignore"):
        p = x.astype(np.float64) * y
        s = p + z
        part = s - p
        rest = (p - (s - part)) + (z - part)
        bits = s.view(np.int64)
        odd = np.isfinite(s) & (rest != 0) & (bits & 1 == 0)
        s = np.where(odd, bits + np.where((rest > 0) == (s > 0), 1, -1), bits).view(np.float64)
        small = np.abs(s) < 2.0**-100
        scaled = (np.where(small, s, 0) * 2.0**100).astype(np.float32)
        flushed = np.where(np.abs(scaled) < 2.0**-26, np.copysign(np.float32(0), scaled), scaled)
        return np.where(small, flushed * np.float32(2.0**-100), s.astype(np.float32)).astype(np.float32)


def blocks(x: Array, w: Array, acc: Array) -> Array:
    """acc [n, rows] after columns of x float32 [n, cols] and w [rows, cols] have been added, 32 at a time."""
    one = np.float32(1)
    for c in range(0, x.shape[1], 32):
        chains = [np.zeros_like(acc), np.zeros_like(acc)]
        for k in range(c, min(c + 32, x.shape[1])):
            chains[k % 2] = fused(x[:, k, None], w[None, :, k], chains[k % 2])
        acc = fused(one, acc, fused(one, chains[0], chains[1]))
    return acc


def product_bf16(x: Array, w: Array) -> Array:
    """float32 [n, rows] of bf16 bits x [n, cols], w [rows, cols]."""
    return blocks(bf16(x), bf16(w), np.zeros((len(x), len(w)), np.float32))


def product_f8(x: Array, codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """The same of e4m3 codes [rows, cols] with a scale for each block (rows, columns) of them."""
    w = (E4M3[codes] * 256).astype(np.float32)
    acc = np.zeros((len(x), len(codes)), np.float32)
    for c in range(0, x.shape[1], block[1]):
        sums = blocks(bf16(x[:, c : c + block[1]]), w[:, c : c + block[1]], np.zeros_like(acc))
        by = scales[np.arange(len(codes)) // block[0], c // block[1]]
        # 24 bits times 24: exact in float64 too
        acc = fused(fused(sums, np.float32(2.0**-8), np.float32(0)), by, acc)
    return acc


# --- attention over a bf16 cache: every row from its own positions alone ----------------------------------------------


def add(x: Array, y: Array) -> Array:
    return fused(ONE, x, y)


def mul(x: Array, y: Array) -> Array:
    return np.copysign(fused(x, y, np.float32(0)), np.copysign(ONE, x) * np.copysign(ONE, y))


def exp_neg(x: Array) -> Array:
    """Cephes' expf as kernels/elementary.h has it."""
    magic, f32 = np.float32(12582912), np.float32
    biased = fused(x, f32(1.44269504088896341), magic)
    n = add(biased, -magic)
    r = fused(n, f32(2.12194440e-4), fused(n, f32(-0.693359375), x))
    p = np.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fused(p, r, f32(c))
    bits = add(fused(p, mul(r, r), r), ONE).view(np.int32) + (biased.view(np.int32) << 23)
    return np.where(x < -87, f32(0), bits.view(np.float32))


@np.errstate(all="ignore")
def row_alone(q: Array, cache: Array, c_pad: int, begin: int, end: int, scale: Any) -> tuple[Array, Array, Array]:
    """(m [h], l [h], o [h, c_pad]) of the queries f32 [h, w] of one row, which sees positions begin .. end - 1."""
    m, q = np.full(len(q), -np.inf, np.float32), bf16_round(q)
    l, o = np.zeros_like(m), np.zeros((len(q), c_pad), np.float32)
    for first in range(begin, end, CHUNK):
        c = cache[first : min(first + CHUNK, end)]
        s = mul(blocks(q, c, np.zeros((len(q), len(c)), np.float32)), scale)
        top = np.maximum(m, s.max(1))
        base = np.where(top > -np.inf, top, np.float32(0))
        alpha, p = exp_neg(add(m, -base)), bf16_round(exp_neg(add(s, -base[:, None])))
        total = np.zeros_like(l)
        for j in range(len(c)):
            total = add(total, p[:, j])
        m, l = top, fused(l, alpha, total)
        o = blocks(p, np.ascontiguousarray(c[:, :c_pad].T), mul(o, alpha[:, None]))
    return m, l, o + np.float32(0)


def mla_partial(q: Array, rows: Array, c_pad: int, begin: int, row_end: Array, scale: float) -> list[Array]:
    """m [n, h], l [n, h], o [n, h, c_pad], every row from its own positions; q f32 [n, h, w], rows uint8."""
    cache = bf16_value(rows.view(np.uint16))
    alone = [row_alone(x, cache, c_pad, begin, int(e), np.float32(scale)) for x, e in zip(q, row_end, strict=True)]
    return [np.stack(part) for part in zip(*alone, strict=True)]
