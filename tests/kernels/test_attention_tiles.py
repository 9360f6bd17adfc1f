"""Attention of the set amx over a bf16 cache, to the bit: against its order of sums written out, in tiles' mode."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import cpu_kernels as T
from cpu_kernels import ISAS, PARTIAL
from ref import formats as F

Array = np.ndarray[Any, Any]
CHUNK, BLOCK = 64, 32
SMALLEST = 2.0**-126  # normal number
pytestmark = [pytest.mark.sanitize, pytest.mark.skipif("amx" not in ISAS, reason="needs avx512x")]


# --- f32 as tiles have it: rounded once, to nearest even; subnormal numbers are zeros ---------------------------------


def flush(x: Array) -> Array:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


def rounded(exact: Array) -> Array:
    """f64 that is exact, or rounded to odd, as f32: 0 if less than the smallest normal number with 24 bits."""
    f32 = (exact * 2.0**100).astype(np.float32)
    small = np.abs(exact) < 2.0**-100
    x = np.where(small, np.where(np.abs(f32) < SMALLEST * 2.0**100, np.copysign(0, exact), exact), exact)
    return np.asarray(x.astype(np.float32))


def fma(x: Array | float, y: Array | float, z: Array | float) -> Array:
    x, y, z = (flush(np.asarray(v, np.float32)).astype(np.float64) for v in (x, y, z))
    product = x * y  # exact
    total = product + z
    part = total - product
    rest = (product - (total - part)) + (z - part)
    bits = np.array(total).view(np.int64)
    odd = bits + np.where((rest > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(total) & (rest != 0) & (bits % 2 == 0)
    return rounded(np.where(inexact, odd, bits).view(np.float64))


def add(x: Array | float, y: Array | float) -> Array:
    return fma(x, 1, y)


def mul(x: Array | float, y: Array | float) -> Array:
    return rounded(flush(np.asarray(x, np.float32)).astype(np.float64) * flush(np.asarray(y, np.float32)))


def exp_neg(x: Array) -> Array:
    """Cephes' expf as kernels/elementary.h has it."""
    magic = np.float32(12582912)
    biased = fma(x, np.float32(1.44269504088896341), magic)
    n = add(biased, -magic)
    r = fma(n, np.float32(2.12194440e-4), fma(n, np.float32(-0.693359375), x))
    p: Array = np.float32(1.9875691500e-4)  # type: ignore[assignment]
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, np.float32(c))
    p = add(fma(p, mul(r, r), r), 1)
    bits = p.view(np.int32) + (biased.view(np.int32) << 23)
    return np.where(x < -87, np.float32(0), bits.view(np.float32))


def dots(sums: Array, pairs: list[tuple[Array, Array, Array | bool]]) -> Array:
    """What sums become by tiles' dots: of each block of 32 products, even and odd ones are a chain from +0."""
    for begin in range(0, len(pairs), BLOCK):
        t = [np.zeros_like(sums), np.zeros_like(sums)]
        for k, (x, y, used) in enumerate(pairs[begin : begin + BLOCK]):
            t[k % 2] = np.where(used, fma(x, y, t[k % 2]), t[k % 2])
        sums = add(sums, add(*t))
    return sums


@np.errstate(all="ignore")
def partial(q: Array, rows: Array, c_pad: int, begin: int, row_end: Array, scale: float) -> tuple[Array, Array, Array]:
    """(m [n, h], l [n, h], o [n, h, c_pad]), every row from its own positions alone; q f32 [n, h, w], rows uint8."""
    q = F.bf16_round(q)
    cache = F.bf16_value(rows.view(np.uint16))
    m = np.full(q.shape[:2], -np.inf, np.float32)
    l, o = np.zeros_like(m), np.zeros((*m.shape, c_pad), np.float32)
    for first in range(begin, max(int(row_end.max()), begin + 1), CHUNK):
        seen = np.broadcast_to(np.arange(first, first + CHUNK) < row_end[:, None, None], (*m.shape, CHUNK))
        c = np.zeros((CHUNK, q.shape[2]), np.float32)
        c[: len(cache[first : first + CHUNK])] = cache[first : first + CHUNK]
        width = range(q.shape[2])
        s = dots(np.zeros((*m.shape, CHUNK), np.float32), [(q[..., d, None], c[:, d], True) for d in width])
        s = np.where(seen, mul(s, scale), np.float32(-np.inf))
        top = np.maximum(m, flush(s).max(-1))
        base = np.where(top > -np.inf, top, np.float32(0))
        alpha = exp_neg(add(m, -base))
        p = F.bf16_round(exp_neg(add(s, -base[..., None])))
        total = np.zeros_like(l)
        for j in range(CHUNK):
            total = add(total, p[..., j])
        m, l = top, fma(l, alpha, total)
        positions = [(p[..., j, None], c[j, :c_pad], seen[..., j, None]) for j in range(CHUNK)]
        o = dots(mul(o, alpha[..., None]), positions)
    return m, l, add(o, 0.0)


def a_case(rng: np.random.Generator, c: int, dr: int, heads: int, ends: list[int], kind: str) -> Any:
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


CASES = [(64, 16, 5, [3, 64, 65, 200, 131, 1, 190]), (24, 8, 3, [1, 2, 33, 64, 65]), (96, 48, 17, [70, 69, 71]),
         (512, 64, 16, [77]), (32, 32, 1, [*range(120, 140)])]  # fmt: skip


@pytest.mark.parametrize("kind", ["usual", "tiny", "steep"])
@pytest.mark.parametrize(("c", "dr", "heads", "ends"), CASES)
def test_bits_are_those_of_the_order_of_sums(
    c: int, dr: int, heads: int, ends: list[int], kind: str, rng: np.random.Generator
) -> None:
    rows, c_pad, r_pad, q, row_end, scale = a_case(rng, c, dr, heads, ends, kind)
    got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)
    want = partial(q, rows, c_pad, 0, row_end, scale)
    for name, a, b in zip("mlo", got, want, strict=True):
        assert a.tobytes() == b.tobytes(), (name, np.argwhere(a != b)[:3])
    if kind == "usual":
        assert np.isfinite(got[2]).all() and got[2].any()


def test_a_later_partial_begins_anew(rng: np.random.Generator) -> None:
    rows, c_pad, r_pad, q, row_end, scale = a_case(rng, 64, 16, 4, [PARTIAL + 70, PARTIAL, PARTIAL + 1, 9], "usual")
    got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, PARTIAL, row_end, scale)
    for a, b in zip(got, partial(q, rows, c_pad, PARTIAL, row_end, scale), strict=True):
        assert a.tobytes() == b.tobytes()
    assert not got[1][[1, 3]].any() and (got[0][[1, 3]] == -np.inf).all()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x8001, 0x8080])
def test_what_lies_behind_a_row_does_not_reach_it(bits: int, rng: np.random.Generator) -> None:
    """Infinities, NaN, and what turns +0 into -0: in some dims of a position behind a row's last, which others see."""
    rows, c_pad, r_pad, q, row_end, scale = a_case(rng, 64, 16, 5, [3, 40, 41, 33, 100, 101, 70], "steep")
    cache = rows.view(np.uint16)
    want = [partial(q[i : i + 1], rows, c_pad, 0, row_end[i : i + 1], scale) for i in range(len(row_end))]
    for i, end in enumerate(row_end):
        kept = cache[end:].copy()
        cache[end:, rng.integers(0, 80, 9)] = bits
        got = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)
        for a, b in zip(got, want[i], strict=True):
            assert a[i].tobytes() == b[0].tobytes(), end
        cache[end:] = kept


def test_a_value_that_is_no_number_reaches_those_that_see_it(rng: np.random.Generator) -> None:
    rows, c_pad, r_pad, q, row_end, scale = a_case(rng, 64, 16, 3, [50, 51, 64], "usual")
    rows.view(np.uint16)[50, 7] = 0x7F80
    o = T.mla_partial("amx", "bf16", rows, c_pad, r_pad, q, 0, row_end, scale)[2]
    assert np.isfinite(o[0]).all() and not np.isfinite(o[1:, :, 7]).any()


def test_a_sum_of_nothing_is_positive_whatever_follows() -> None:
    """-0 from flushed products alone, at the end of a dot: the next one, whose probabilities are 0, makes it +0."""
    cache = np.zeros((100, 48), np.float32)  # 32 latent dims, 16 of rope, of which the first is the score
    cache[:, 32] = -20
    cache[[0, 66, 94, 95], 32] = 0, 2, 0.5, 0.5
    cache[[0, 94, 95], 5] = -SMALLEST
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
