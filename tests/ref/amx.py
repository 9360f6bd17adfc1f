"""Products of the instruction set amx by their definition (docs/model.md 7.2), bit for bit: TDPBF16PS in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from ref.formats import E4M3

Array = np.ndarray[Any, Any]


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
