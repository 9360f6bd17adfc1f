"""Packed tiles and activation rounding in numpy, written from the comment at the top of ``kernels/format.h``.

The C++ code is not consulted: these decoders are the other half of every format test. ``q4b`` names the q4 tile whose
scales are bf16 (in a packed file: format ``q4``, scale ``bf16``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TILE_ROWS, TILE_COLS = 16, 32
TILE_BYTES = {"f32": 2048, "bf16": 1024, "f16": 1024, "f8": 512, "q8": 544, "q4": 288, "q4b": 288}
FORMATS = tuple(TILE_BYTES)
ACT_KIND = {"f32": "f32", "bf16": "bf16", "f16": "f32", "f8": "bf16", "q8": "i8", "q4": "i8", "q4b": "i8"}
MIN_AMAX = np.float32(2.0**-119)  # smaller int8 groups count as zero: 127 / amax would overflow


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


# --- small floats ---------------------------------------------------------------------------------------------------


def bf16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float32 -> bf16 bits, round to nearest even; NaN stays NaN (quiet)."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (u >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_value(bits: npt.ArrayLike) -> F32:
    """Bf16 bits -> float32 (exact)."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf16_round(x: npt.ArrayLike) -> F32:
    return bf16_value(bf16_bits(x))


def f16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def f16_value(bits: npt.ArrayLike) -> F32:
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def _e4m3_table() -> F64:
    t = np.empty(256)
    for b in range(256):
        exp, man = (b >> 3) & 15, b & 7
        v = man / 8 * 2.0**-6 if exp == 0 else (1 + man / 8) * 2.0 ** (exp - 7)
        t[b] = -v if b & 0x80 else v
    return t


E4M3 = _e4m3_table()  # [256] value of every byte of a packed file; e4m3's NaN codes 0x7F and 0xFF are +-480


def e4m3_encode(x: npt.ArrayLike) -> U8:
    """Nearest e4m3 byte, ties to the even code, saturating at 448; NaN -> 0x7F."""
    v = np.asarray(x, np.float64)
    mag = np.minimum(np.abs(v), 448.0)
    hi = np.clip(np.searchsorted(E4M3[:127], mag), 0, 126)
    lo = np.maximum(hi - 1, 0)
    d_lo, d_hi = mag - E4M3[lo], E4M3[hi] - mag
    code = np.where((d_lo < d_hi) | ((d_lo == d_hi) & (lo % 2 == 0)), lo, hi)
    code = np.where(np.isnan(v), 0x7F, code | np.where(np.signbit(v), 0x80, 0))
    return code.astype(np.uint8)


# --- tiles ----------------------------------------------------------------------------------------------------------


def _pad(a: npt.NDArray[np.generic], rows: int, cols: int, fill: int = 0) -> npt.NDArray[np.generic]:
    out = np.full((rows, cols), fill, a.dtype)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def _to_tiles(a: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[16*R, 32*C] -> [R, C, 16, 32]."""
    r, c = a.shape[0] // TILE_ROWS, a.shape[1] // TILE_COLS
    return a.reshape(r, TILE_ROWS, c, TILE_COLS).transpose(0, 2, 1, 3)


def _from_tiles(t: npt.NDArray[np.generic], rows: int, cols: int) -> npt.NDArray[np.generic]:
    r, c = t.shape[:2]
    return t.transpose(0, 2, 1, 3).reshape(r * TILE_ROWS, c * TILE_COLS)[:rows, :cols]


def encode_tiles(fmt: str, codes: npt.NDArray[np.generic], scales: npt.NDArray[np.uint16] | None = None) -> U8:
    """Lays out one matrix as tiles.

    codes [rows, cols]: f32 float32; bf16, f16 uint16 bits; f8 uint8 bytes; q8 codes -127..127; q4, q4b codes -8..7.
    scales [rows, ceil(cols/32)]: uint16 bits of the f16 (q8, q4) or bf16 (q4b) scales, else None.
    Returns uint8 [row_tiles, col_tiles, tile_bytes]; padding elements are code 0 with scale 0.
    """
    rows, cols = codes.shape
    nr, nc = ceil_div(rows, TILE_ROWS), ceil_div(cols, TILE_COLS)
    t = _to_tiles(_pad(codes, nr * TILE_ROWS, nc * TILE_COLS))  # [nr, nc, r, c]
    if fmt == "f32":
        body = np.ascontiguousarray(t.astype("<f4").transpose(0, 1, 3, 2))
    elif fmt in ("bf16", "f16"):
        body = np.ascontiguousarray(t.astype("<u2").reshape(nr, nc, 16, 16, 2).transpose(0, 1, 3, 2, 4))
    elif fmt == "f8":
        body = np.ascontiguousarray(t.astype(np.uint8).reshape(nr, nc, 16, 8, 4).transpose(0, 1, 3, 2, 4))
    elif fmt == "q8":
        stored = (t.astype(np.int16) + 128).astype(np.uint8)
        body = np.ascontiguousarray(stored.reshape(nr, nc, 16, 8, 4).transpose(0, 1, 3, 2, 4))
    elif fmt in ("q4", "q4b"):
        stored = (t.astype(np.int16) + 8).astype(np.uint8)
        packed = stored[..., :16] | stored[..., 16:] << 4  # [nr, nc, r, c%16]
        body = np.ascontiguousarray(packed.reshape(nr, nc, 16, 4, 4).transpose(0, 1, 3, 2, 4))
    else:
        raise ValueError(f"unknown format {fmt}")
    out = body.reshape(nr, nc, -1).view(np.uint8)
    if fmt in ("q8", "q4", "q4b"):
        if scales is None or scales.shape != (rows, nc):
            raise ValueError(f"{fmt}: scales must be [{rows}, {nc}]")
        s = _pad(scales.astype("<u2"), nr * TILE_ROWS, nc).reshape(nr, 16, nc).transpose(0, 2, 1)
        out = np.concatenate([out, np.ascontiguousarray(s).view(np.uint8)], axis=2)
    assert out.shape == (nr, nc, TILE_BYTES[fmt])
    return np.ascontiguousarray(out)


def decode_codes(fmt: str, data: npt.NDArray[np.uint8], rows: int, cols: int) -> npt.NDArray[np.generic]:
    """The inverse of :func:`encode_tiles` without the scales: [rows, cols] codes, bits or values."""
    nr, nc = ceil_div(rows, TILE_ROWS), ceil_div(cols, TILE_COLS)
    t = np.ascontiguousarray(data).reshape(nr, nc, TILE_BYTES[fmt])
    if fmt == "f32":
        v = t.view("<f4").reshape(nr, nc, 32, 16).transpose(0, 1, 3, 2)
    elif fmt in ("bf16", "f16"):
        v = t.view("<u2").reshape(nr, nc, 16, 16, 2).transpose(0, 1, 3, 2, 4).reshape(nr, nc, 16, 32)
    elif fmt in ("f8", "q8"):
        v = t[..., :512].reshape(nr, nc, 8, 16, 4).transpose(0, 1, 3, 2, 4).reshape(nr, nc, 16, 32)
        if fmt == "q8":
            v = v.astype(np.int16) - 128
    else:
        b = t[..., :256].reshape(nr, nc, 4, 16, 4).transpose(0, 1, 3, 2, 4).reshape(nr, nc, 16, 16)
        v = np.concatenate([b & 15, b >> 4], axis=3).astype(np.int16) - 8
    return _from_tiles(v, rows, cols)


def decode_scales(fmt: str, data: npt.NDArray[np.uint8], rows: int, cols: int) -> npt.NDArray[np.uint16]:
    """Scale bits [rows, ceil(cols/32)] of q8, q4 and q4b tiles."""
    nr, nc = ceil_div(rows, TILE_ROWS), ceil_div(cols, TILE_COLS)
    t = np.ascontiguousarray(data).reshape(nr, nc, TILE_BYTES[fmt])
    s = np.ascontiguousarray(t[..., -32:]).view("<u2")  # [nr, nc, 16]
    return s.transpose(0, 2, 1).reshape(nr * 16, nc)[:rows]


def decode_tiles(
    fmt: str,
    data: npt.NDArray[np.uint8],
    rows: int,
    cols: int,
    scales: npt.NDArray[np.float32] | None = None,
    scale_block: tuple[int, int] = (128, 128),
) -> F64:
    """Values [rows, cols] float64 of one slice; f8 needs its scales [ceil(rows/r), ceil(cols/c)]."""
    v = decode_codes(fmt, data, rows, cols)
    if fmt == "bf16":
        return bf16_value(v).astype(np.float64)
    if fmt == "f16":
        return f16_value(v).astype(np.float64)
    if fmt == "f8":
        if scales is None:
            raise ValueError("f8 needs scales")
        full = np.repeat(np.repeat(scales, scale_block[0], 0), scale_block[1], 1)[:rows, :cols]
        return E4M3[v.astype(np.uint8)] * full.astype(np.float64)
    if fmt in ("q8", "q4", "q4b"):
        s = decode_scales(fmt, data, rows, cols)
        d = bf16_value(s) if fmt == "q4b" else f16_value(s)
        return v.astype(np.float64) * np.repeat(d.astype(np.float64), TILE_COLS, 1)[:, :cols]
    return v.astype(np.float64)


@dataclass(frozen=True)
class Packed:
    """A random packed tensor with the values it stands for."""

    fmt: str
    data: U8  # [n_slices, row_tiles, col_tiles, tile_bytes]
    scales: F32 | None  # f8: [n_slices, ceil(rows/r), ceil(cols/c)]
    scale_block: tuple[int, int]
    values: F64  # [n_slices, rows, cols]


def random_packed(
    fmt: str,
    rng: np.random.Generator,
    rows: int,
    cols: int,
    n_slices: int = 1,
    scale_block: tuple[int, int] = (128, 128),
) -> Packed:
    """Every code of the format equally likely (f8: no NaN), scales over two decades; standard deviation about 0.05."""
    nc = ceil_div(cols, TILE_COLS)
    slices, scale_list, values = [], [], []
    for _ in range(n_slices):
        codes: npt.NDArray[np.generic]
        bits: npt.NDArray[np.uint16] | None = None
        scales: F32 | None = None
        w = (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32)
        if fmt == "f32":
            codes = w
        elif fmt == "bf16":
            codes = bf16_bits(w)
        elif fmt == "f16":
            codes = f16_bits(w)
        elif fmt == "f8":
            codes = rng.integers(0, 254, (rows, cols)).astype(np.uint8)
            codes = codes + (codes >= 0x7F)  # skip 0x7F; 0xFF is never drawn
            shape = (ceil_div(rows, scale_block[0]), ceil_div(cols, scale_block[1]))
            scales = np.exp(rng.uniform(-9, -5, shape)).astype(np.float32)
        else:
            lim = 127 if fmt == "q8" else 8
            codes = rng.integers(-lim, 128 if fmt == "q8" else 8, (rows, cols)).astype(np.int16)
            d = np.exp(rng.uniform(-4, 0, (rows, nc))) * 0.1 / lim
            bits = bf16_bits(d) if fmt == "q4b" else f16_bits(d)
        data = encode_tiles(fmt, codes, bits)
        slices.append(data)
        if scales is not None:
            scale_list.append(scales)
        values.append(decode_tiles(fmt, data, rows, cols, scales, scale_block))
    return Packed(fmt, np.stack(slices), np.stack(scale_list) if scale_list else None, scale_block, np.stack(values))


# --- activations (docs/model.md 7.1) ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Rows:
    """codes int8 [n, cols_pad], d float32 [n, cols_pad/32], sum int32 [n, cols_pad/32]."""

    codes: npt.NDArray[np.int8]
    d: F32
    sum: npt.NDArray[np.int32]


def quantise_rows(x: npt.ArrayLike) -> Int8Rows:
    """int8 groups of 32 columns: d = amax / 127, code = rint(x * (127 / amax)), all in float32, ties to even."""
    a = np.asarray(x, np.float32)
    n, cols = a.shape
    padded = np.zeros((n, round_up(cols, 32)), np.float32)
    padded[:, :cols] = a
    g = padded.reshape(n, -1, 32)
    amax = np.abs(g).max(axis=2)
    zero = amax < MIN_AMAX
    d = np.where(zero, np.float32(0), amax / np.float32(127)).astype(np.float32)
    inv = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), amax)).astype(np.float32)
    codes = np.clip(np.rint(g * inv[..., None]), -127, 127).astype(np.int8)
    return Int8Rows(codes.reshape(n, -1), d, codes.astype(np.int32).sum(axis=2).astype(np.int32))


def round_activations(kind: str, x: npt.ArrayLike) -> F64:
    """The float64 values [n, cols] that a product of activation kind ``f32``, ``bf16`` or ``i8`` really uses."""
    a = np.asarray(x, np.float32)
    if kind == "f32":
        return a.astype(np.float64)
    if kind == "bf16":
        return bf16_round(a).astype(np.float64)
    if kind != "i8":
        raise ValueError(f"unknown activation kind {kind}")
    q = quantise_rows(a)
    v = q.codes.astype(np.float64).reshape(a.shape[0], -1, 32) * q.d.astype(np.float64)[..., None]
    return v.reshape(a.shape[0], -1)[:, : a.shape[1]]
