"""The instruction set amx: its emulation against the definition, tile instructions against the emulation, bit for bit.

Where the processor has no AMX, a handler of SIGILL carries its tile instructions out (tiles_by_signal.cc): the kernels'
machine code runs all the same, and what a processor would refuse ends the test.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpu_kernels as T
import deepcalm
import models
from deepcalm import _core
from kernel_headers import ctype
from ref import amx as A
from ref import formats as F

Array = np.ndarray[Any, Any]
HERE = Path(__file__).resolve().parent
HAS_AMX = any(i["name"] == "amx" and i["supported"] and not i["emulated"] for i in _core.isas())
pytestmark = pytest.mark.skipif("amx" not in T.ISAS, reason="no avx512x here, on which amx is emulated")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiles_by_signal.cc, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no compiler")
    out = tmp_path_factory.mktemp("amx") / "tiles_by_signal.so"
    source = HERE / "tiles_by_signal.cc"
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", source, "-o", out], check=True
    )
    return out


@pytest.fixture(scope="module")
def tiles(library: Path) -> Iterator[str]:
    """The name in T.TABLES of the kernels that use tile instructions."""
    T.TABLES["tiles"] = ctype("CpuKernels").from_address(_core.testing.AMX_KERNELS["tiles"])
    T.TABLES["emulated"] = ctype("CpuKernels").from_address(_core.testing.AMX_KERNELS["emulated"])
    signals = ctypes.CDLL(str(library))
    signals.tile_dots.restype = ctypes.c_int64
    if not HAS_AMX:
        signals.tiles_by_signal(True)
    yield "tiles"
    if not HAS_AMX:
        signals.tiles_by_signal(False)
        assert signals.tile_dots() > 0
    del T.TABLES["tiles"], T.TABLES["emulated"]


# --- words ----------------------------------------------------------------------------------------------------------

KINDS = ["ordinary", "any bits", "any normal", "products near 2^-126", "cancellation", "zeros, subnormals",
         "products near 2^127", "infinities, NaN", "wide exponents", "products below 2^-126"]  # fmt: skip


def words(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    """bf16 bits of a kind that a wrong order or a wrong treatment of the borders shows on."""

    def pick(low: int, high: int) -> Array:  # signs, exponents in [low, high), any mantissa
        signs, exponents, rest = (rng.integers(*r, shape) for r in ((0, 2), (low, high), (0, 128)))
        return (signs << 15 | exponents << 7 | rest).astype(np.uint16)

    odd = rng.integers(0, 64, shape)
    match kind:
        case "ordinary":
            return F.bf16_bits(rng.uniform(-2, 2, shape).astype(np.float32))
        case "any bits":
            return rng.integers(0, 1 << 16, shape).astype(np.uint16)
        case "any normal":
            return pick(1, 255)
        case "products near 2^-126":
            return pick(58, 70)
        case "cancellation":
            few = pick(127, 130) & 0xFFF0
            few[..., 2::4] = few[..., 0::4] ^ 0x8000
            return few
        case "zeros, subnormals":
            return np.where(odd < 8, pick(0, 1) & 0x8000, np.where(odd < 32, pick(0, 1), pick(100, 160)))
        case "products near 2^127":
            return pick(187, 192)
        case "infinities, NaN":
            return np.where(odd == 0, pick(255, 256) & 0xFF80, np.where(odd == 1, pick(255, 256) | 1, pick(110, 150)))
        case "wide exponents":
            return pick(107, 148)
        case _:
            return pick(52, 68)


def same_bits(a: Array, b: Array) -> None:
    """Equal bits; any NaN is as good as another."""
    one, other = (np.where(np.isnan(v), np.float32(np.nan), v).astype(np.float32).view(np.uint32) for v in (a, b))
    assert np.array_equal(one, other), f"{(one != other).sum()} of {one.size} differ"


def product(isa: str, fmt: str, codes: Array, x: Array, scales: Array | None = None,
            block: tuple[int, int] = (128, 128)) -> Array:  # fmt: skip
    """codes [rows, cols] as tiles, times x among NaN: [n, 16 * tiles]."""
    n, cols = x.shape
    poisoned = np.full((n + 16, cols + 64), 0x7FC0, np.uint16)
    poisoned[:n, :cols] = x
    data = F.encode_tiles(fmt, codes)[None]
    scales = None if scales is None else scales[None]
    y = T.matmul(isa, fmt, data, *codes.shape, poisoned, None, None, scales, block,
                 x_row=np.arange(n, dtype=np.int32), one_stream=False)  # fmt: skip
    return y[:, : len(codes)]


# --- the definition, the emulation, the instructions ----------------------------------------------------------------

BLOCKS = [(128, 128), (64, 128), (64, 64), (16, 32), (128, 160), (32, 96), (16, 256)]  # (64, 128): GigaChat3's heads


@pytest.mark.parametrize("kind", KINDS)
def test_emulation_follows_the_definition(kind: str, rng: np.random.Generator) -> None:
    w, x = words(rng, kind, 33, 160), words(rng, kind, 19, 160)
    same_bits(product("amx", "bf16", w, x), A.product_bf16(x, w))


@pytest.mark.parametrize("block", BLOCKS)
def test_emulation_of_f8_follows_the_definition(block: tuple[int, int], rng: np.random.Generator) -> None:
    """With scales from the smallest on and codes below e4m3's normal numbers: block sums and products underflow."""
    rows, cols = 33, 320
    codes = rng.integers(0, 254, (rows, cols)).astype(np.uint8)
    codes += codes >= 0x7F
    codes[:, 64:128] &= 0x87  # zeros and subnormals
    shape = F.ceil_div(rows, block[0]), F.ceil_div(cols, block[1])
    scales = (2.0 ** rng.uniform(-126, -90, shape)).astype(np.float32)
    scales.flat[0], scales.flat[-1] = 2.0**-126, 1.5
    for exponent in (0, -20, -110):
        x = F.bf16_bits((rng.standard_normal((19, cols)) * 2.0**exponent).astype(np.float32))
        same_bits(product("amx", "f8", codes, x, scales, block), A.product_f8(x, codes, scales, block))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [60_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)])
def test_tiles_equal_their_emulation(tiles: str, kind: str, outputs: int, rng: np.random.Generator) -> None:
    for _ in range(outputs // (64 * 31)):
        w, x = words(rng, kind, 64, 64), words(rng, kind, 31, 64)
        same_bits(product(tiles, "bf16", w, x), product("emulated", "bf16", w, x))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 16, 17, 33, 50])
def test_f8_tiles_equal_their_emulation(tiles: str, n: int, block: tuple[int, int], rng: np.random.Generator) -> None:
    codes = rng.integers(0, 254, (72, 288)).astype(np.uint8)
    codes += codes >= 0x7F
    codes[:, 32:80] &= 0x87
    shape = F.ceil_div(72, block[0]), F.ceil_div(288, block[1])
    scales = (2.0 ** rng.uniform(-126, 20, shape)).astype(np.float32)
    x = words(rng, "wide exponents", n, 288)
    same_bits(product(tiles, "f8", codes, x, scales, block), product("emulated", "f8", codes, x, scales, block))


@pytest.mark.parametrize("fmt", ["bf16", "f8"])
def test_every_number_of_rows(tiles: str, fmt: str, rng: np.random.Generator) -> None:
    """1 to 600 rows, of 1 to 9 row tiles, and more columns than are multiplied at once."""
    shapes = [(16, 32, [1, 2, 15, 16, 31, 32, 600]), (136, 64, [1, 5, 17, 40, 257]), (40, 2112, [3, 35])]
    for rows, cols, numbers in shapes:
        p = F.random_packed(fmt, rng, rows, cols)
        x, _, _ = T.prepare("amx", "bf16", rng.standard_normal((max(numbers), cols)).astype(np.float32))
        args = rows, cols, x, None, None, p.scales, p.scale_block
        whole = T.matmul("emulated", fmt, p.data, *args)
        for n in numbers:
            order = rng.permutation(len(x))[:n].astype(np.int32)
            for x_row in (np.arange(n, dtype=np.int32), order, np.full(n, 2 % n, np.int32)):
                if n * cols * rows <= 2_000_000 or x_row is order:
                    got = T.matmul(tiles, fmt, p.data, *args, x_row=x_row, one_stream=False)
                    assert got.tobytes() == whole[x_row].tobytes(), n


@pytest.mark.parametrize("fmt", ["bf16", "f8"])
def test_the_callers_floating_point_mode_has_no_say(tiles: str, fmt: str, rng: np.random.Generator) -> None:
    """Nor is it changed."""
    p = F.random_packed(fmt, rng, 64, 256)
    x, _, _ = T.prepare("amx", "bf16", (rng.standard_normal((5, 256)) * 2.0**-118).astype(np.float32))
    before = _core.swap_float_mode(None)
    odd = before[:-4] + (0x1F80 | 0x6000).to_bytes(4, "little")  # MXCSR: towards zero
    try:
        for isa in (tiles, "emulated"):
            want = T.matmul(isa, fmt, p.data, 64, 256, x, None, None, p.scales, p.scale_block, one_stream=False)
            _core.swap_float_mode(odd)
            got = T.matmul(isa, fmt, p.data, 64, 256, x, None, None, p.scales, p.scale_block, one_stream=False)
            assert _core.swap_float_mode(None)[-4:-2] == odd[-4:-2]
            assert got.tobytes() == want.tobytes()
    finally:
        _core.swap_float_mode(before)


@pytest.mark.usefixtures("tiles")
def test_the_self_test_tells_tiles_from_another_order() -> None:
    tables = _core.testing.AMX_KERNELS
    assert _core.testing.same_tile(tables["tiles"], tables["emulated"])
    assert not _core.testing.same_tile(_core.testing.CPU_KERNELS["avx512x"], tables["emulated"])


def test_tiles_of_the_processor(tiles: str, rng: np.random.Generator) -> None:
    """Skipped aloud where everything above ran on instructions that are carried out by hand."""
    if not HAS_AMX:
        pytest.skip("no AMX here: a handler of SIGILL carried its instructions out, no hardware did")
    w, x = words(rng, "any bits", 256, 512), words(rng, "any bits", 100, 512)
    same_bits(product(tiles, "bf16", w, x), product("emulated", "bf16", w, x))


# --- attention over a bf16 cache ------------------------------------------------------------------------------------


def attention_case(rng: np.random.Generator, c: int, dr: int, heads: int, ends: list[int], kind: str) -> Any:
    """rows uint8 [n_pos, row bytes], c_pad, r_pad, q, ends, scale."""
    c_pad, r_pad, n = F.round_up(c, 32), F.round_up(dr, 16), max(*ends, 1)
    x = rng.standard_normal((n, c_pad + r_pad)).astype(np.float32)
    q = rng.standard_normal((len(ends), heads, c_pad + r_pad)).astype(np.float32)
    scale = float(np.float32(rng.uniform(0.5, 3) / math.sqrt(c + dr)))
    if kind == "tiny":  # products, sums and values around the smallest normal number, of either sign
        x *= np.exp2(rng.integers(-140, -20, x.shape)).astype(np.float32)
        q *= np.exp2(rng.integers(-110, -1, q.shape)).astype(np.float32)
    if kind == "steep":  # most probabilities are 0 or almost, values are small
        scale *= 40
        x[:, :c_pad] *= np.exp2(rng.integers(-90, 1, (n, c_pad))).astype(np.float32)
    return F.bf16_bits(x).view(np.uint8), c_pad, r_pad, q, np.array(ends, np.int32), scale


ATTENTION = [(64, 16, 5, [3, 64, 65, 200, 131, 1, 190]), (24, 8, 3, [1, 2, 33, 64, 65]), (96, 48, 17, [70, 69, 71]),
         (512, 64, 16, [77]), (32, 32, 1, [*range(125, 131)])]  # fmt: skip


@pytest.mark.by_turns("kind", 3)
@pytest.mark.parametrize("kind", ["usual", "tiny", "steep"])
@pytest.mark.parametrize(("c", "dr", "heads", "ends"), ATTENTION)
def test_attention_follows_the_definition(
    c: int, dr: int, heads: int, ends: list[int], kind: str, rng: np.random.Generator
) -> None:
    rows, c_pad, r_pad, q, row_end, scale = attention_case(rng, c, dr, heads, ends, kind)
    got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)
    want = A.mla_partial(q, rows, c_pad, 0, row_end, scale)
    for name, a, b in zip("mlo", got, want, strict=True):
        assert a.tobytes() == b.tobytes(), (name, np.argwhere(a != b)[:3])
    if kind == "usual":
        assert np.isfinite(got[2]).all() and got[2].any()


@pytest.mark.parametrize("kind", ["usual", "tiny", "steep"])
def test_attention_on_tiles_equals_its_emulation(tiles: str, kind: str, rng: np.random.Generator) -> None:
    """Also where an infinity that some rows see has values added row by row."""
    for c, dr, heads, ends in ATTENTION:
        rows, c_pad, r_pad, q, row_end, scale = attention_case(rng, c, dr, heads, ends, kind)
        for _ in range(2):
            one, other = (
                T.mla_partial(isa, "bf16", rows, c_pad, r_pad, q, 0, row_end, scale) for isa in (tiles, "emulated")
            )
            for a, b in zip(one, other, strict=True):
                same_bits(a, b)
            rows.view(np.uint16)[-1, 3] = 0x7F80


def test_a_later_partial_begins_anew(rng: np.random.Generator) -> None:
    ends = [T.PARTIAL + 70, T.PARTIAL, T.PARTIAL + 1, 9]
    rows, c_pad, r_pad, q, row_end, scale = attention_case(rng, 64, 16, 4, ends, "usual")
    got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, T.PARTIAL, row_end, scale)
    for a, b in zip(got, A.mla_partial(q, rows, c_pad, T.PARTIAL, row_end, scale), strict=True):
        assert a.tobytes() == b.tobytes()
    assert not got[1][[1, 3]].any() and (got[0][[1, 3]] == -np.inf).all()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x8001, 0x8080])
def test_what_lies_behind_a_row_does_not_reach_it(bits: int, rng: np.random.Generator) -> None:
    """Infinities, NaN, and what turns +0 into -0: in some dims of a position behind a row's last, which others see."""
    rows, c_pad, r_pad, q, row_end, scale = attention_case(rng, 64, 16, 5, [3, 40, 41, 33, 100, 101, 70], "steep")
    cache = rows.view(np.uint16)
    want = [A.mla_partial(q[i : i + 1], rows, c_pad, 0, row_end[i : i + 1], scale) for i in range(len(row_end))]
    for i, end in enumerate(row_end):
        kept = cache[end:].copy()
        cache[end:, rng.integers(0, 80, 9)] = bits
        got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)
        for a, b in zip(got, want[i], strict=True):
            assert a[i].tobytes() == b[0].tobytes(), end
        cache[end:] = kept


def test_a_value_that_is_no_number_reaches_those_that_see_it(rng: np.random.Generator) -> None:
    rows, c_pad, r_pad, q, row_end, scale = attention_case(rng, 64, 16, 3, [50, 51, 64], "usual")
    rows.view(np.uint16)[50, 7] = 0x7F80
    o = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)[2]
    assert np.isfinite(o[0]).all() and not np.isfinite(o[1:, :, 7]).any()


def test_a_sum_of_nothing_is_positive_whatever_follows() -> None:
    """-0 from flushed products alone, at the end of a dot: the next one, whose probabilities are 0, makes it +0."""
    cache = np.zeros((100, 48), np.float32)  # 32 latent dims, 16 of rope, of which the first is the score
    cache[:, 32] = -20
    cache[[0, 66, 94, 95], 32] = 0, 2, 0.5, 0.5
    cache[[0, 94, 95], 5] = -(2.0**-126)
    q = np.zeros((2, 1, 48), np.float32)
    q[..., 32] = 1
    rows, ends = F.bf16_bits(cache).view(np.uint8), np.array([96, 100], np.int32)
    both = T.mla_partial("amx", "bf16", rows, 32, 16, q, 0, ends, 1.0)[2]
    alone = T.mla_partial("amx", "bf16", rows, 32, 16, q[:1], 0, ends[:1], 1.0)[2]
    assert both[0].tobytes() == alone[0].tobytes() == np.zeros(32, np.float32).tobytes()


def test_zeros_stand_behind_the_last_position() -> None:
    """Of a row whose scores are all minus infinity, where an infinite query makes NaN of rows that are not there."""
    cache, q = np.ones((5, 48), np.float32), np.ones((1, 1, 48), np.float32)
    cache[:, 3], q[..., 3] = -1, np.inf
    m, l, o = T.mla_partial(
        "amx", "bf16", F.bf16_bits(cache).view(np.uint8), 32, 16, q, 0, np.array([5], np.int32), 1.0
    )
    assert m == -np.inf and not l.any() and not o.any()


# --- whole models ---------------------------------------------------------------------------------------------------

PASSES = """
import ctypes, hashlib, sys
import models
from deepcalm import _core
from kernel_headers import ctype
tables = {k: ctype("CpuKernels").from_address(a) for k, a in _core.testing.AMX_KERNELS.items()}
used, other = (tables[k] for k in (("tiles", "emulated") if sys.argv[2] == "True" else ("emulated", "tiles")))
page = ctypes.addressof(used) & -4096
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), 8192, 3) == 0
for name in ("matmul", "mla_partial"):  # models compute with the other of the two from here on
    field = getattr(ctype("CpuKernels"), name)
    ctypes.memmove(ctypes.addressof(used) + field.offset, ctypes.addressof(other) + field.offset, field.size)
signals = ctypes.CDLL(sys.argv[1])
signals.tile_dots.restype = ctypes.c_int64
if sys.argv[2] == "False":
    signals.tiles_by_signal(True)
for path in sys.argv[3:]:
    file = models.PackedFile(models.Path(path))
    for threads in (1, 2):
        run = models.Run(models.open_model(file, "amx", threads), list(range(5, 45)), "bf16", [33, *[1] * 3, 4])
        print(hashlib.sha256(run.logits.tobytes()).hexdigest())
assert (signals.tile_dots() > 0) == (sys.argv[2] == "False")
"""


def test_models_compute_the_same_on_tiles(library: Path) -> None:
    """The kernels of the table that models use are exchanged for the others, in a process of its own."""
    files = [models.pack(models.checkpoint("v3", "bf16"), dtype=dtype) for dtype in ("bf16", "f8")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PASSES, library, str(HAS_AMX), *(f.path for f in files)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    want = [models.Run(models.open_model(f, "amx"), list(range(5, 45)), "bf16", [33, *[1] * 3, 4]) for f in files]
    digests = [hashlib.sha256(r.logits.tobytes()).hexdigest() for r in want]
    assert run.stdout.split() == [digest for digest in digests for _ in (1, 2)]


@pytest.mark.skipif(HAS_AMX, reason="the processor refuses by itself")
@pytest.mark.parametrize("which", range(8))
def test_what_a_processor_refuses_ends_the_process(library: Path, which: int) -> None:
    code = f"import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.tiles_by_signal(True); l.mistake({which})"
    run = subprocess.run([sys.executable, "-S", "-c", code, library], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr.count("\n")) == (99, 1)
    assert "tiles_by_signal: #" in run.stderr


def test_passes_are_longer_than_on_other_sets() -> None:
    """The rows of a pass share every weight that is read."""
    sessions = [deepcalm.Model(deepcalm.demo_path(), threads=1, isa=isa).session() for isa in ("amx", "avx512x")]
    assert [s.core.max_rows for s in sessions] == [512, 256]
    ids = np.random.default_rng(1).integers(10, 2000, 300)
    logits = sessions[0].prefill(ids)
    assert sessions[0].stats.passes == 2, "one, and one of the MTP layer"
    other = deepcalm.Model(deepcalm.demo_path(), threads=1, isa="amx").session(max_rows=64)
    assert np.array_equal(other.prefill(ids), logits)
    with sessions[0].model.batch(ctx=512) as batch:
        for prompt in (ids[:4], np.resize(ids, 400)):  # a pass of a prompt alone after one that might have had drafts
            request = batch.submit(prompt, max_tokens=12, eos_ids=())
            list(batch.run())
            assert request.choices[0].reason == "length"


# --- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(HAS_AMX, reason="nothing is emulated")
def test_an_emulation_is_named_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = deepcalm.demo_path()
    assert deepcalm.Model(path, threads=1).isa == "avx512x"
    named = deepcalm.Model(path, threads=1, isa="amx")
    assert (named.isa, named.notes) == ("amx", ("isa amx: emulated, this processor has no AMX: the same bits, slower",))
    monkeypatch.setattr(_core, "amx_refusal", lambda: "why not")
    assert deepcalm.Model(path, threads=1).notes == ("isa avx512x: this processor has AMX, but why not",)
    named = deepcalm.Model(path, threads=1, isa="amx")
    assert named.notes == ("isa amx: emulated, this processor has AMX, but why not: the same bits, slower",)
    assert not deepcalm.Model(path, threads=1, isa="avx512x").notes
