"""Every matmul kernel and activation rounding against float64, bit for bit against itself, and among poison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cpu_kernels as T
from cpu_kernels import ISAS
from deepcalm import _core
from ref import formats as F

TOL = {name: entry["dot_tol"] for name, entry in zip(F.FORMATS, _core.formats(), strict=True)}
SHAPES = [  # rows, cols, activation rows
    (1, 1, 1), (1, 32, 1), (16, 32, 2), (17, 33, 3), (5, 100, 4), (40, 7, 5), (24, 127, 6), (33, 129, 7),
    (48, 128, 8), (31, 257, 9), (16, 512, 16), (50, 640, 33), (70, 1056, 1), (19, 2048, 2), (33, 4096, 1),
    (16, 4097, 3),
]  # fmt: skip
SCALE_BLOCKS = [(128, 128), (16, 32), (64, 64), (16, 96), (128, 160), (32, 256), (48, 1024)]
pytestmark = pytest.mark.sanitize

isa_and_format = pytest.mark.parametrize(("isa", "fmt"), [(i, f) for i in ISAS for f in F.FORMATS])


def activations(rng: np.random.Generator, n: int, cols: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of different magnitude with a few outliers and an all-zero group now and then."""
    x = rng.standard_normal((n, cols)) * np.exp(rng.uniform(-3, 3, (n, 1)))
    x[rng.random((n, cols)) < 0.01] *= 30
    if cols > 64:
        x[:, 32:64] *= rng.integers(0, 2, (n, 1))
    return x.astype(np.float32)


def run(isa: str, p: F.Packed, x: np.ndarray[Any, Any], **kwargs: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows, cols = p.values.shape[1:]
    a, d, s = T.prepare(isa, F.ACT_KIND[p.fmt], x)
    y = T.matmul(isa, p.fmt, p.data, rows, cols, a, d, s, p.scales, p.scale_block, **kwargs)
    assert isinstance(y, np.ndarray)
    return y


@isa_and_format
def test_matmul_oracle(isa: str, fmt: str, rng: np.random.Generator, record_property: Any) -> None:
    shapes = SHAPES + [tuple(rng.integers(1, m)) for m in [(80, 700, 13)] * 5]
    worst = worst_relative = 0.0
    for i, (rows, cols, n) in enumerate(shapes):
        block = SCALE_BLOCKS[i % len(SCALE_BLOCKS)]
        p = F.random_packed(fmt, rng, rows, cols, n_slices=2, scale_block=block)
        x = activations(rng, n, cols)
        y = run(isa, p, x, slice=1)
        assert not y[:, rows:].any(), "padding rows are zero"
        xr, w = F.round_activations(F.ACT_KIND[fmt], x), p.values[1]
        want, size = xr @ w.T, np.abs(xr) @ np.abs(w.T)
        err = np.abs(y[:, :rows] - want)
        worst = max(worst, float((err / np.maximum(size, 1e-300)).max()))
        worst_relative = max(worst_relative, float(np.linalg.norm(err) / max(np.linalg.norm(want), 1e-300)))
        assert (err <= TOL[fmt] * size).all(), (rows, cols, n, block, float((err / size).max()))
    record_property("worst error over sum|w x|", worst)
    record_property("worst relative RMS", worst_relative)
    print(f"{isa} {fmt}: {worst:.1e} of sum|w x|, {worst_relative:.1e} relative RMS")


@isa_and_format
def test_matmul_bits_do_not_depend_on_the_call(isa: str, fmt: str, rng: np.random.Generator) -> None:
    for rows, cols, block in [(72, 1504, (16, 160)), (40, 672, (128, 128)), (16, 96, (16, 64))]:
        p = F.random_packed(fmt, rng, rows, cols, n_slices=3, scale_block=block)
        x = activations(rng, 33, cols)
        one = np.concatenate([run(isa, p, x[i : i + 1], slice=2, one_stream=i % 2 == 0) for i in range(33)])
        for n in [*range(2, 10), 16, 33]:
            for walk in (False, True):
                assert run(isa, p, x[:n], slice=2, one_stream=walk).tobytes() == one[:n].tobytes(), n
        order = rng.integers(0, 33, 21).astype(np.int32)
        assert run(isa, p, x, slice=2, x_row=order).tobytes() == one[order].tobytes()
        tiles = one.shape[1] // 16
        for begin in range(tiles):
            end = int(rng.integers(begin, tiles)) + 1
            for n, walk in [(3, False), (1, True), (1, False)]:
                part = run(isa, p, x[:n], slice=2, tile_begin=begin, tile_end=end, one_stream=walk)
                assert part.tobytes() == one[:n, 16 * begin : 16 * end].tobytes()


@isa_and_format
def test_matmul_reads_nothing_else(isa: str, fmt: str, rng: np.random.Generator) -> None:
    rows, cols, n = 50, 333, 5
    p = F.random_packed(fmt, rng, rows, cols, n_slices=3, scale_block=(16, 96))
    x = activations(rng, n, cols)
    clean = run(isa, p, x, slice=1, tile_begin=1, tile_end=3)
    data = np.full_like(p.data, 0xFF)  # NaN in every float format, and in every 16-bit scale
    data[1, 1:3] = p.data[1, 1:3]
    scales = None
    if p.scales is not None:
        scales = np.full_like(p.scales, np.nan)
        scales[1, 1:3] = p.scales[1, 1:3]
    a, d, s = T.prepare(isa, F.ACT_KIND[fmt], x)
    nan = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0), "i8": np.int8(-1)}[F.ACT_KIND[fmt]]
    wide = np.full((n + 3, a.shape[1] + 64), nan, a.dtype)  # beyond the row, and rows that x_row does not name
    wide[2 : n + 2, : a.shape[1]] = a
    if d is not None:
        pad = [(2, 1), (0, 2)]
        d = np.pad(d, pad, constant_values=np.nan)
        s = np.pad(s, pad, constant_values=2**30)
    x_row = np.arange(2, n + 2, dtype=np.int32)
    y = T.matmul(isa, fmt, data, rows, cols, wide, d, s, scales, p.scale_block, 1, 1, 3, x_row)
    assert y.tobytes() == clean.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x", [1.0, 2.0**-3, 2.0**-7])
def test_matmul_f8_every_code_is_exact(isa: str, x: float) -> None:
    codes = np.arange(256).astype(np.uint8)  # 0x7F and 0xFF, in no file of the packer's, are +-480 for everyone
    scale = np.ones((1, 2, 1), np.float32)
    data = F.encode_tiles("f8", codes[:, None])[None]
    assert np.array_equal(_core.unpack_slice(data.ravel(), scale, "f8", "f32", (1, 256, 1))[:, 0], F.E4M3)
    for column in range(32):
        w = np.zeros((len(codes), 32), np.uint8)
        w[:, column] = codes
        data = F.encode_tiles("f8", w)[None]
        a, _, _ = T.prepare(isa, "bf16", np.full((2, 32), x, np.float32))
        y = T.matmul(isa, "f8", data, len(codes), 32, a, scales=scale)
        assert np.array_equal(y[0, : len(codes)], F.E4M3[codes] * x), column
        assert np.array_equal(y[1], y[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["q8", "q4"])
def test_matmul_int_extremes_do_not_saturate(isa: str, fmt: str) -> None:
    lo, hi = (-128, 127) if fmt == "q8" else (-8, 7)  # q8 never stores -128, but a stranger's file may
    cols = 2048
    codes = np.empty((16, cols), np.int16)
    codes[0::4], codes[1::4], codes[2::4], codes[3::4] = lo, hi, 0, np.resize([lo, hi], cols)
    one = F.encode_tiles(fmt, codes, np.full((16, cols // 32), 0x3C00, np.uint16))[None]  # scale 1.0
    x = np.stack(
        [np.full(cols, 127), np.full(cols, -127), np.resize([127, -127], cols), np.resize([-127, 127, 3], cols)]
    )
    x[3, ::32] = 127
    a, d, s = T.prepare(isa, "i8", x.astype(np.float32))
    assert np.array_equal(a, x)
    assert (d == 1).all()
    y = T.matmul(isa, fmt, one, 16, cols, a, d, s)
    assert np.array_equal(y, x @ codes.T.astype(np.int64))


@pytest.mark.parametrize("isa", ISAS)
def test_matmul_f16_subnormal_and_large(isa: str) -> None:
    bits = np.array([0x0001, 0x03FF, 0x0400, 0x8001, 0x7BFF, 0xFBFF, 0x0000, 0x3C01] * 2, np.uint16)
    w = np.zeros((16, 32), np.uint16)
    w[np.arange(16), np.arange(16) * 2 + np.arange(16) // 8] = bits
    a, _, _ = T.prepare(isa, "f32", np.full((1, 32), 2.0, np.float32))
    y = T.matmul(isa, "f16", F.encode_tiles("f16", w)[None], 16, 32, a)
    assert np.array_equal(y[0], F.f16_value(bits) * 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", F.FORMATS)
def test_matmul_shows_non_finite_activations(isa: str, fmt: str) -> None:
    p = F.random_packed(fmt, np.random.default_rng(0), 16, 256)
    for bad in [np.nan, np.inf, -np.inf, -np.nan]:
        for column in [0, 45, 255]:
            x = np.ones((3, 256), np.float32)
            x[1, column] = bad
            y = run(isa, p, x)
            finite = np.isfinite(y)
            assert finite[[0, 2]].all()
            nonzero = p.values[0, :, column] != 0  # a zero weight times infinity is NaN in floats, 0 in codes
            assert not finite[1, nonzero].any()


# --- prepare --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 15, 16, 31, 32, 33, 48, 100, 2048, 2049])
def test_prepare_matches_the_definition(isa: str, cols: int, rng: np.random.Generator) -> None:
    x = activations(rng, 3, cols)
    x[1] *= np.float32(2.0) ** rng.integers(-140, 110)  # subnormal to nearly infinite
    pad = F.round_up(cols, 32) - cols
    f32, none, _ = T.prepare(isa, "f32", x)
    assert none is None
    assert np.array_equal(f32, np.pad(x, [(0, 0), (0, pad)]))
    bf16, _, _ = T.prepare(isa, "bf16", x)
    assert np.array_equal(bf16, F.bf16_bits(np.pad(x, [(0, 0), (0, pad)])))
    codes, d, s = T.prepare(isa, "i8", x)
    want = F.quantise_rows(x)
    assert np.array_equal(codes, want.codes)
    assert np.array_equal(d, want.d)
    assert np.array_equal(s, want.sum)


@pytest.mark.parametrize("isa", ISAS)
def test_prepare_special_values(isa: str) -> None:
    bits = np.array(
        [0x7FC00000, 0x7F800001, 0xFFBFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000001, 0x3F808000,
         0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000, 0x007FFFFF, 0x7F7F7FFF, 0x7F7F8000],
        np.uint32,
    )  # fmt: skip
    x = bits.view(np.float32)[None]
    got, _, _ = T.prepare(isa, "bf16", x)
    assert np.array_equal(got[0, :16], F.bf16_bits(x)[0])
    # ties of the int8 rounding: 127 / amax is a power of two, so x * inv is exact
    ties = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5, 0.49999997], np.float32) / 4
    codes, d, _ = T.prepare(isa, "i8", ties[None])
    assert codes[0, :11].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, 126, -126, 0]
    assert d[0, 0] == 0.25
    for amax, zero in [(2.0**-119, False), (np.nextafter(np.float32(2.0**-119), np.float32(0)), True), (1e-45, True)]:
        codes, d, s = T.prepare(isa, "i8", np.full((1, 32), amax, np.float32))
        assert (d[0, 0] == 0) == zero
        assert (codes == (0 if zero else 127)).all()
        assert s[0, 0] == codes.sum()
    x = np.ones((3, 64), np.float32)
    x[0, 3], x[1, 40], x[2, 63] = np.nan, np.inf, -np.inf
    codes, d, s = T.prepare(isa, "i8", x)
    assert np.isfinite(d).tolist() == [[False, True], [True, False], [True, False]]
    assert (np.abs(codes.astype(int)) <= 127).all()
    assert np.array_equal(s, codes.reshape(3, 2, 32).sum(2, dtype=np.int32))
