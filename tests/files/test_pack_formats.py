"""Packing primitives: golden bytes, conversions against numpy, own quantisers against numpy, exact codes, refusals."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deepcalm import _core
from ref import formats as F

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.sanitize
TILE_BYTES = {(f["name"], f["scale"]): f["tile_bytes"] for f in _core.formats()}
KINDS = {"f32": np.float32, "bf16": np.uint16, "f16": np.uint16, "f8": np.uint8}
SCALE = {"f32": "", "bf16": "", "f16": "", "f8": "f32", "q8": "f16", "q4": "f16"}


def pack(
    fmt: str,
    w: Array,
    *,
    kind: str = "f32",
    cols: int | None = None,
    index: Array | None = None,
    transpose: bool = False,
    exact: bool = False,
    first_row: int = 0,
    scale: Array | None = None,
    block: tuple[int, int] = (1, 32),
    scale_dtype: str = "f16",
    tile_scale: str | None = None,
    out_block: tuple[int, int] = (128, 128),
    near_zero: Array | None = None,
) -> tuple[Array, Array, tuple[int, int] | None]:
    """pack_rows of one matrix: (tiles uint8 [row_tiles, col_tiles, bytes], f8 scales, first value that does not fit)

    The same, to the last bit, in vectors of every width.
    """
    n_rows, n_cols = w.shape[0], cols or w.shape[1]
    index = np.arange(n_rows, dtype=np.int32) if index is None else index.astype(np.int32)
    rows, cols = (n_cols, len(index)) if transpose else (len(index), n_cols)
    tile_scale = SCALE[fmt] if tile_scale is None else tile_scale
    n_bytes = TILE_BYTES[fmt, tile_scale]
    row_tiles, col_tiles = -(-rows // 16), -(-cols // 32)
    data = np.ascontiguousarray(w).view(np.uint8).reshape(n_rows, -1)
    source = _core.Source(kind, data, rows if transpose else cols, first_row, scale, block, scale_dtype)
    seen = []
    for lanes in (16, 8, 4):
        out = np.full(row_tiles * col_tiles * n_bytes, 0xAA, np.uint8)
        scales = np.full((-(-rows // out_block[0]), -(-cols // out_block[1])), np.nan, np.float32)
        tiles = _core.Tiles(out, col_tiles * n_bytes, fmt, tile_scale, scales, out_block)
        bad, lost = _core.pack_rows(tiles, source, index, transpose, exact, lanes)
        seen.append((bad or out.tobytes(), bad or scales.tobytes(), lost))
    assert seen[0] == seen[1] == seen[2]
    if near_zero is not None:
        near_zero[0] += lost
    return out.reshape(row_tiles, col_tiles, n_bytes), scales, bad


def weights(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """f32 [rows, cols] of mixed magnitudes, a zero group, exact ties; nothing so small that its scale vanishes."""
    w = rng.standard_normal((rows, cols)) * np.exp(rng.uniform(-6, 1, (rows, 1)))
    w = np.where(np.abs(w) < 2e-5, 2e-5, w)
    w[0, : min(cols, 32)] = 0
    w[-1, 0] = 0.5
    return w.astype(np.float32)


# --- golden bytes: 2 x 33 with element (r, c) = (-1)^c * (c + 2) / 4 * 2^r in column 0..32; worked out by hand -------


def golden_matrix() -> Array:
    c = np.arange(33)
    return (np.where(c % 2, -1, 1) * (c + 2) / 4 * np.array([[1.0], [2.0]])).astype(np.float32)


def test_golden_f32() -> None:
    tiles, _, _ = pack("f32", golden_matrix())
    assert tiles.shape == (1, 2, 2048)
    assert tiles[0, 0, :8].tobytes() == bytes.fromhex("0000003f 0000803f")  # column 0: 0.5, 1.0, then 14 padding rows
    assert tiles[0, 0, 8:64].max() == 0
    assert tiles[0, 0, 64:72].tobytes() == bytes.fromhex("000040bf 0000c0bf")  # column 1: -0.75, -1.5
    assert tiles[0, 1, :8].tobytes() == bytes.fromhex("00000841 00008841")  # column 32: 8.5, 17.0
    assert tiles[0, 1, 8:].max() == 0


@pytest.mark.parametrize(
    ("fmt", "first", "second"),
    [("bf16", "003f40bf 803fc0bf", "0841 0000 8841 0000"), ("f16", "0038 00ba 003c 00be", "4048 0000 404c 0000")],
)
def test_golden_16_bit(fmt: str, first: str, second: str) -> None:
    tiles, _, _ = pack(fmt, golden_matrix())
    assert tiles[0, 0, :8].tobytes() == bytes.fromhex(first)  # (0, 0), (0, 1), (1, 0), (1, 1)
    assert tiles[0, 1, :8].tobytes() == bytes.fromhex(second)
    assert tiles[0, 1, 8:].max() == 0


def test_golden_f8() -> None:
    # one block: max 17 -> scale 17/448; 0.5 * 448 / 17 = 13.18 -> 13 = 0x55 (1.625 * 2^3); 1.0 -> 26.35 -> 26 = 0x5D
    tiles, scales, _ = pack("f8", golden_matrix())
    assert scales.tobytes() == np.float32(17 / 448).tobytes()
    assert tiles[0, 0, [0, 4]].tolist() == [0x55, 0x5D]
    assert tiles[0, 0, 1] == 0xDA  # -0.75 -> -19.76 -> -20 = 1.25 * 2^4
    assert tiles[0, 1, [0, 4]].tolist() == [0x76, 0x7E]  # 8.5 -> 224, 17 -> 448
    assert tiles[0, 1, 1:4].max() == 0
    assert tiles[0, 1, 8:].max() == 0


def test_golden_q8() -> None:
    # row 0, columns 0..31: max 8.25 -> 8.25/127 = 0.06496 -> f16 0x2C28 = 0.06494140625; 0.5 -> 7.699 -> 8
    tiles, _, _ = pack("q8", golden_matrix())
    assert tiles[0, 0, [0, 1, 2, 3]].tolist() == [128 + 8, 128 - 12, 128 + 15, 128 - 19]
    assert tiles[0, 0, 64 * 7 + 3] == 128 - 127  # (0, 31)
    assert tiles[0, 0, 4] == 128 + 8  # (1, 0): twice the value, twice the scale
    assert tiles[0, 0, 512:516].tobytes() == bytes.fromhex("282c 2830")
    assert tiles[0, 1, 0] == 255  # (0, 32), alone in its group
    assert tiles[0, 1, [1, 2, 3, 8, 511]].tolist() == [128] * 5  # padding columns and rows are code 0
    assert tiles[0, 1, 516:].max() == 0  # and scale 0
    assert tiles[0, 1, 512:514].tobytes() == np.float16(8.5 / 127).tobytes()


def test_golden_q4() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, 0], w[0, 1], w[0, 15], w[0, 16], w[0, 31] = -8, 7, 3, -1, 5  # exact at scale 1
    tiles, _, _ = pack("q4", w)
    assert tiles[0, 0, 256:258].tobytes() == bytes.fromhex("003c")
    assert tiles[0, 0, 0] == (0 | 7 << 4)  # (0, 0) = -8 low, (0, 16) = -1 high
    assert tiles[0, 0, 1] == (15 | 8 << 4)  # (0, 1) = 7
    assert tiles[0, 0, 64 * 3 + 3] == (11 | 13 << 4)  # (0, 15) = 3, (0, 31) = 5
    assert set(tiles[0, 0, 4:64].tolist()) == {0x88}  # the other rows


# --- conversions ----------------------------------------------------------------------------------------------------


def convert(to: str, kind: str, w: Array) -> tuple[Array, tuple[int, int] | None]:
    out = np.zeros(w.shape, np.float32 if to == "f32" else np.uint16)
    data = np.ascontiguousarray(w).view(np.uint8).reshape(len(w), -1)
    return out, _core.convert_rows(out, to, _core.Source(kind, data, w.shape[1]))[0]


def test_conversions_agree_with_numpy_on_every_code(rng: np.random.Generator) -> None:
    half = np.arange(1 << 16, dtype=np.uint16)
    half = half[np.isfinite(half.view(np.float16))]
    exact = half.view(np.float16).astype(np.float32)
    out, bad = convert("f32", "f16", half[None])
    assert bad is None and out.tobytes() == exact[None].tobytes()
    brain = np.arange(1 << 16, dtype=np.uint16)
    brain = brain[np.isfinite(brain.view(ml_dtypes.bfloat16).astype(np.float32))]
    out, bad = convert("f32", "bf16", brain[None])
    assert bad is None and out.tobytes() == (brain.astype(np.uint32) << 16).tobytes()
    # random bits, f16 values, and the midpoints between them (ties go to even)
    middle = np.concatenate([exact * np.float32(1 + 2.0**-11), exact + np.float32(2.0**-25)])
    x = np.concatenate([rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32), middle])
    x = np.append(x[np.isfinite(x)], np.float32(3.4e38))
    for to, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            want = x.astype(dtype)
        fits = np.isfinite(want.astype(np.float32))
        out, bad = convert(to, "f32", x[fits][None])
        assert bad is None
        np.testing.assert_array_equal(out[0], want[fits].view(np.uint16))
        assert convert(to, "f32", x[~fits][:1][None])[1] == (0, 0)


def test_conversion_names_the_first_value_that_does_not_fit() -> None:
    w = np.ones((3, 5), np.float32)
    for value, to in [(np.nan, "f32"), (np.inf, "bf16"), (-65520, "f16"), (3.4e38, "bf16"), (np.nan, "f16")]:
        w[1, 3] = value
        w[2, 0] = value
        assert convert(to, "f32", w)[1] == (1, 3)
    w[1:] = 65519.996
    assert convert("f16", "f32", w)[1] is None


def test_f8_source_conversion_multiplies_by_the_block_scale(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 127, (7, 70)).astype(np.uint8)
    scale = rng.uniform(0.1, 2, (5, 3)).astype(np.float32)
    out = np.empty((7, 70), np.float32)
    source = _core.Source("f8", codes, 70, 10, scale, (4, 32))  # rows 10..16 of the tensor
    assert _core.convert_rows(out, "f32", source) == (None, 0)
    want = F.E4M3[codes].astype(np.float32) * scale[(np.arange(7) + 10) // 4][:, np.arange(70) // 32]
    np.testing.assert_array_equal(out, want)
    codes[3, 69] = 0xFF
    assert _core.convert_rows(out, "f32", source)[0] == (3, 69)


# --- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (5, 100), (48, 64), (130, 140)])
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_16_and_32_bit_tiles_are_exact(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> None:
    w = weights(rng, *shape)
    stored = {"f32": w, "bf16": F.bf16_bits(w), "f16": F.f16_bits(w)}[kind]
    value = {"f32": w, "bf16": F.bf16_round(w), "f16": F.f16_value(F.f16_bits(w))}[kind]
    for fmt, codes in [("f32", value), ("bf16", F.bf16_bits(value)), ("f16", F.f16_bits(value))]:
        tiles, _, bad = pack(fmt, stored, kind=kind)
        assert bad is None
        np.testing.assert_array_equal(tiles, F.encode_tiles(fmt, codes))


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 100), (130, 140)])
def test_q8_is_nearest_under_f16_scales(shape: tuple[int, int], rng: np.random.Generator) -> None:
    w = weights(rng, *shape)
    padded = np.zeros((shape[0], -(-shape[1] // 32) * 32), np.float32)
    padded[:, : shape[1]] = w
    groups = padded.reshape(shape[0], -1, 32)
    amax = np.abs(groups).max(2)
    bits = F.f16_bits(amax / np.float32(127))
    bits = bits + ((bits != 0) & (amax > np.float32(127.5) * F.f16_value(bits))).astype(np.uint16)  # subnormal scales
    scale = F.f16_value(bits)[..., None]
    codes = np.where(scale == 0, 0, np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -127, 127))
    tiles, _, bad = pack("q8", w)
    assert bad is None
    want = F.encode_tiles("q8", codes.reshape(shape[0], -1)[:, : shape[1]].astype(np.int16), bits)
    np.testing.assert_array_equal(tiles, want)


def test_q8_subnormal_scales_round_up_instead_of_clipping() -> None:
    w = np.zeros((3, 32), np.float32)
    w[0, 0] = 127 * 2.0**-24 * 1.4  # nearest f16 scale is 2^-24: code 178 would not fit
    w[1, 0] = 127 * 2.0**-24
    w[2, 5] = 80 * 2.0**-24  # scale rounds up from 0.63 of the smallest f16
    tiles, _, bad = pack("q8", w)
    assert bad is None
    assert np.abs(F.decode_tiles("q8", tiles, 3, 32) - w).max() <= 2.0**-24


def numpy_q4(groups: Array) -> tuple[Array, Array]:
    """The documented search, in numpy: groups f32 [n, 32] -> (codes [n, 32], scale bits [n])."""
    f32, n = np.float32, len(groups)
    extreme = groups[np.arange(n), np.abs(groups).argmax(1)]
    safe = np.where(extreme == 0, f32(1), extreme)
    best, best_gain = np.zeros(n, f32), np.full(n, -1, f32)
    for target in (-8.3, -7.6, -6.8, -9.0, 7.2, 6.4, 7.9):
        q = np.clip(np.rint(groups * (f32(target) / safe)[:, None]), -8, 7).astype(f32)
        wq, qq = np.zeros(n, f32), np.zeros(n, f32)
        for c in range(32):
            wq += groups[:, c] * q[:, c]
            qq += q[:, c] * q[:, c]
        scale = F.f16_value(F.f16_bits(wq / np.maximum(qq, f32(1))))
        gain = scale * (f32(2) * wq - scale * qq)
        best, best_gain = np.where(gain > best_gain, scale, best), np.maximum(gain, best_gain)
    codes = np.clip(np.rint(groups / np.where(best == 0, f32(1), best)[:, None]), -8, 7)
    return codes.astype(np.int16), F.f16_bits(best)


@pytest.mark.parametrize("shape", [(1, 32), (17, 33), (40, 96), (130, 140)])
def test_q4_is_the_documented_search(shape: tuple[int, int], rng: np.random.Generator) -> None:
    w = weights(rng, *shape)
    padded = np.zeros((shape[0], -(-shape[1] // 32) * 32), np.float32)
    padded[:, : shape[1]] = w
    codes, bits = numpy_q4(padded.reshape(-1, 32))
    tiles, _, bad = pack("q4", w)
    assert bad is None
    want = F.encode_tiles("q4", codes.reshape(shape[0], -1)[:, : shape[1]], bits.reshape(shape[0], -1))
    np.testing.assert_array_equal(tiles, want)


def test_q4_search_beats_plain_rounding(rng: np.random.Generator) -> None:
    w = rng.standard_normal((512, 256)).astype(np.float32)
    tiles, _, _ = pack("q4", w)
    searched = ((F.decode_tiles("q4", tiles, *w.shape) - w) ** 2).sum()
    groups = w.reshape(-1, 32)
    d = groups[np.arange(len(groups)), np.abs(groups).argmax(1)][:, None] / -8
    plain = ((np.clip(np.rint(groups / d), -8, 7) * d - groups) ** 2).sum()
    assert searched < 0.95 * plain


@pytest.mark.parametrize("block", [(16, 32), (16, 128), (128, 128), (64, 32)])
def test_f8_quantises_blocks(block: tuple[int, int], rng: np.random.Generator) -> None:
    w = weights(rng, 150, 170)
    tiles, scales, bad = pack("f8", w, out_block=block)
    assert bad is None
    full = np.zeros((scales.shape[0] * block[0], scales.shape[1] * block[1]), np.float32)
    full[:150, :170] = np.abs(w)
    amax = full.reshape(scales.shape[0], block[0], scales.shape[1], block[1]).max((1, 3))
    np.testing.assert_array_equal(scales, amax / np.float32(448))
    each = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:150, :170]
    codes = F.e4m3_encode(np.where(each == 0, w, w / np.where(each == 0, 1, each)))
    np.testing.assert_array_equal(tiles, F.encode_tiles("f8", codes))


def test_f8_codes_are_kept(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 127, (40, 70)).astype(np.uint8) | (rng.integers(0, 2, (40, 70)) << 7).astype(np.uint8)
    scale = np.ones((1, 1), np.float32)
    index = rng.permutation(40)
    tiles, _, bad = pack("f8", codes, kind="f8", exact=True, scale=scale, block=(64, 128), index=index)
    assert bad is None
    np.testing.assert_array_equal(tiles, F.encode_tiles("f8", codes[index]))
    tiles, _, _ = pack("f8", codes, kind="f8", exact=True, scale=scale, block=(64, 128), transpose=True)
    np.testing.assert_array_equal(tiles, F.encode_tiles("f8", codes.T))
    codes[index[33], 69] = 0x7F
    assert pack("f8", codes, kind="f8", exact=True, scale=scale, block=(64, 128), index=index)[2] == (index[33], 69)


@pytest.mark.parametrize(("tile_scale", "group", "cols"), [("f16", 32, 96), ("bf16", 32, 40), ("bf16", 64, 160)])
def test_int4_codes_and_scales_are_kept(tile_scale: str, group: int, cols: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 16, (21, -(-cols // 8) * 8)).astype(np.uint8)
    nibbles = codes[:, ::2] | codes[:, 1::2] << 4
    to_bits = F.f16_bits if tile_scale == "f16" else F.bf16_bits
    bits = to_bits(rng.uniform(0.001, 0.1, (21, -(-cols // group))))
    fmt = "q4" if tile_scale == "f16" else "q4b"
    kw: dict[str, Any] = {"kind": "i4", "cols": cols, "scale": bits, "block": (1, group), "scale_dtype": tile_scale}
    tiles, _, bad = pack("q4", nibbles, exact=True, tile_scale=tile_scale, **kw)
    assert bad is None
    each = np.repeat(bits, group // 32, 1)[:, : -(-cols // 32)]
    np.testing.assert_array_equal(tiles, F.encode_tiles(fmt, codes[:, :cols].astype(np.int16) - 8, each))
    for transpose in (False, True):  # other targets see code * scale
        values, _, _ = pack("f32", nibbles, transpose=transpose, **kw)
        want = F.decode_tiles(fmt, tiles, 21, cols)
        got = F.decode_tiles("f32", values, *(want.T.shape if transpose else want.shape))
        np.testing.assert_array_equal(got, want.T if transpose else want)
    bits[20, -1] = 0x7F80 if tile_scale == "bf16" else 0x7C00
    assert pack("q4", nibbles, exact=True, tile_scale=tile_scale, **kw)[2] == (20, (cols - 1) // group * group)


@pytest.mark.parametrize(("block", "cols"), [((1, 32), 96), ((1, 128), 160), ((1, 70), 70), ((5, 64), 100)])
def test_int8_codes_and_scales_are_kept(block: tuple[int, int], cols: int, rng: np.random.Generator) -> None:
    codes = rng.integers(-128, 128, (21, cols)).astype(np.int8)
    grid = F.bf16_round(rng.uniform(0.001, 0.1, (-(-31 // block[0]), -(-cols // block[1]))))
    kw: dict[str, Any] = {"kind": "i8", "cols": cols, "scale": grid, "block": block, "first_row": 10}
    each = grid[(np.arange(21) + 10)[:, None] // block[0], np.arange(cols) // block[1]]
    index = rng.permutation(21)
    for transpose in (False, True):
        tiles, _, bad = pack("f32", codes.view(np.uint8), transpose=transpose, **kw)
        got = F.decode_tiles("f32", tiles, *((cols, 21) if transpose else (21, cols)))
        want = codes.astype(np.float32) * each
        np.testing.assert_array_equal(got, want.T if transpose else want)
    tiles, _, bad = pack("q8", codes.view(np.uint8), exact=True, index=index, **kw)
    assert bad is None
    bits = F.f16_bits(each[index][:, ::32])
    np.testing.assert_array_equal(tiles, F.encode_tiles("q8", codes[index].astype(np.int16), bits))
    # scales that are no f16 values: quantised again, the others kept
    grid[::2] *= np.float32(1.0001)
    each = grid[(np.arange(21) + 10)[:, None] // block[0], np.arange(cols) // block[1]]
    again, _, _ = pack("q8", codes.astype(np.float32) * each)
    tiles, _, _ = pack("q8", codes.view(np.uint8), exact=True, **kw)
    own = F.f16_value(F.f16_bits(each[:, ::32])) != each[:, ::32]
    for kept, out in ((False, again), (True, F.encode_tiles("q8", codes.astype(np.int16), F.f16_bits(each[:, ::32])))):
        found, want = (F.decode_codes("q8", t, 21, cols) for t in (tiles, out))
        same = np.repeat(own != kept, 32, 1)[:, :cols]
        np.testing.assert_array_equal(found[same], want[same])
        scales = (F.decode_scales("q8", t, 21, cols)[own != kept] for t in (tiles, out))
        np.testing.assert_array_equal(*scales)
    assert own.any() and not own.all()


# --- near zero: nothing underflows into a refusal, or by more than half a step --------------------------------------

HALF_STEP = {"q8": 2.0**-25, "q4": 2.0**-25, "f16": 2.0**-25, "bf16": 2.0**-134, "f8": 2.0**-136}  # of the smallest


def small_weights(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """f32 [rows, cols], magnitudes from 1e-3 to the smallest f32 by 16 rows; some rows with a few values only."""
    size = np.repeat(rng.permutation(np.linspace(np.log(1e-45), np.log(1e-3), -(-rows // 16))), 16)[:rows, None]
    w = rng.standard_normal((rows, cols)) * np.exp(size + rng.uniform(-3, 3, (rows, 1)))
    w *= rng.random((rows, cols)) < rng.choice([1.0, 0.05], (rows, 1))
    edges = [s * np.float32(h) for h in HALF_STEP.values() for s in (0.999, 1, 1.001, 2, 64, 127, 128, 447, 449)]
    w[: len(edges), 0] = edges
    return w.astype(np.float32)


@pytest.mark.parametrize("fmt", HALF_STEP)
@pytest.mark.parametrize("transpose", [False, True])
def test_near_zero_groups_are_within_half_a_step(fmt: str, transpose: bool, rng: np.random.Generator) -> None:
    w, block = small_weights(rng, 1200, 64), (16, 32)
    near_zero = np.full(1, 5, np.int64)
    source = np.ascontiguousarray(w.T) if transpose else w
    tiles, scales, bad = pack(fmt, source, transpose=transpose, out_block=block, near_zero=near_zero)
    assert bad is None
    got, exact = F.decode_tiles(fmt, tiles, *w.shape, scales, block), w.astype(np.float64)
    high, width = block if fmt == "f8" else (1, 32)
    amax = np.abs(w).reshape(1200 // high, high, 64 // width, width).max((1, 3))
    small = amax <= HALF_STEP[fmt]  # too small even for the smallest scale: zeros; others get a scale
    if fmt in ("q8", "q4", "f8"):
        scale = scales if fmt == "f8" else F.f16_value(F.decode_scales(fmt, tiles, *w.shape))
        np.testing.assert_array_equal(scale == 0, small)
        step = np.repeat(np.repeat(scale, high, 0), width, 1).astype(np.float64)
    half = np.full(w.shape, HALF_STEP[fmt])
    if fmt == "q8":
        small = F.f16_bits(amax / np.float32(127)) == 0
        half = np.maximum(half, step / 2)
    elif fmt == "q4":
        with np.errstate(all="ignore"):
            small = (numpy_q4(w.reshape(-1, 32))[1] & 0x7FFF == 0).reshape(amax.shape)
        half = np.maximum(half, np.abs(step) / 2)
        ends = np.sort([-8 * step, 7 * step], 0)  # the search may clip the largest
        exact = np.where(step == 0, exact, np.clip(exact, *ends))
    elif fmt == "f8":
        small = amax / np.float32(448) < 2.0**-126
        half = np.maximum(np.maximum(half, step * 2.0**-10), np.abs(exact) * 2.0**-4)
    else:
        half = np.maximum(half, np.abs(exact) * 2.0 ** (-11 if fmt == "f16" else -8))
    assert (np.abs(got - exact) <= half).all()
    assert near_zero[0] == 5 + (small & (amax > 0)).sum() > 20


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_plain_near_zero_groups_are_counted(to: str, rng: np.random.Generator) -> None:
    w = small_weights(rng, 1200, 70)
    out = np.zeros(w.shape, np.uint16)
    bad, near_zero = _core.convert_rows(out, to, _core.Source("f32", w.view(np.uint8).reshape(1200, -1), 70))
    assert bad is None
    lost = 0
    for c in range(0, 70, 32):
        lost += int(((w[:, c : c + 32] != 0).any(1) & ((out[:, c : c + 32] & 0x7FFF) == 0).all(1)).sum())
    assert near_zero == lost > 20


def test_transposed_and_gathered_rows(rng: np.random.Generator) -> None:
    w = weights(rng, 50, 37)
    index = rng.permutation(50)[:33]
    for fmt in ("f32", "q8", "f8"):
        straight, s, _ = pack(fmt, np.ascontiguousarray(w[index]))
        gathered, g, _ = pack(fmt, w, index=index)
        assert straight.tobytes() + s.tobytes() == gathered.tobytes() + g.tobytes()
        straight, s, _ = pack(fmt, np.ascontiguousarray(w[index].T))
        gathered, g, _ = pack(fmt, w, index=index, transpose=True)
        assert straight.tobytes() + s.tobytes() == gathered.tobytes() + g.tobytes()


@pytest.mark.parametrize("fmt", ["f32", "bf16", "f16", "f8", "q8", "q4"])
def test_values_that_do_not_fit_are_located(fmt: str) -> None:
    too_large = {"f16": 65520.0, "bf16": 3.4e38, "q8": 127 * 65520.0, "q4": 9 * 65520.0}
    for value in (np.nan, np.inf, -np.inf, *([too_large[fmt]] if fmt in too_large else [])):
        w = np.ones((20, 40), np.float32)
        w[17, 35] = value
        assert pack(fmt, w)[2] == (17, 35)
        assert pack(fmt, w, transpose=True)[2] == (17, 35)


@pytest.mark.parametrize(("fmt", "scale"), [(f["name"], f["scale"]) for f in _core.formats()])
def test_unpack_slice_agrees_with_the_independent_decoder(fmt: str, scale: str, rng: np.random.Generator) -> None:
    name = "q4b" if scale == "bf16" else fmt
    for rows, cols, block in [(1, 1, (128, 128)), (33, 70, (16, 64)), (130, 290, (64, 128))]:
        p = F.random_packed(name, rng, rows, cols, n_slices=3, scale_block=block)
        for s in (0, 2):
            got = _core.unpack_slice(p.data.reshape(-1), p.scales, fmt, scale, (3, rows, cols), block, s)
            np.testing.assert_array_equal(got, p.values[s].astype(np.float32))


def test_packing_calls_check_their_buffers() -> None:
    w, index = np.zeros((4, 128), np.uint8), np.arange(4, dtype=np.int32)
    out = np.zeros(2048, np.uint8)
    good: list[Any] = [out, 2048, "f32", "", "f32", w, 32, index, False]

    def pack_with(*args: Any) -> Any:
        out, stride, fmt, fmt_scale, kind, data, cols, index, exact = args
        tiles, source = _core.Tiles(out, stride, fmt, fmt_scale), _core.Source(kind, data, cols)
        return _core.pack_rows(tiles, source, index, exact=exact)

    assert pack_with(*good) == (None, 0)
    changes: dict[int, list[Any]] = {
        0: [np.zeros(2047, np.uint8), out[1:], np.zeros(2048, np.int8)], 1: [2047], 2: ["q8", "nope"], 3: ["f16"],
        4: ["f16x", "f8", "i4", "i8"], 5: [w[:, :127].copy(), w[0]], 6: [0, 33],
        7: [index + 1, index - 1, index[:0], index[None]], 8: [True],
    }  # fmt: skip
    for position, values in changes.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                pack_with(*[value if i == position else v for i, v in enumerate(good)])
    read_only = np.zeros(2048, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|not writeable"):
        pack_with(read_only, *good[1:])
