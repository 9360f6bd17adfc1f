"""Every stage of the CUDA pass, single: against float64 oracles, and bit for bit across schedules.

In the simulator under three orders of its threads; on a GPU through cupy, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cpu_kernels
import cuda_stages as cs
import device_cases
from deepcalm.check.reference import cache_round
from ref import formats

Array = np.ndarray[Any, Any]
ORDERS = ("fwd", "rev", "17")
EPS = 1e-6


@pytest.fixture(scope="module", params=device_cases.DEVICES)
def stages(request: pytest.FixtureRequest) -> Iterator[cs.Stages]:
    if request.param == "sim":
        yield cs.Stages(device_cases.library("sim"))
        return
    cupy = device_cases.array_module("cuda")
    cs.mirror = cs.Mirror(cupy)
    yield cs.Stages(device_cases.library("cuda"), cupy)
    cs.mirror = None


@pytest.fixture(autouse=True)
def forget_arrays() -> Iterator[None]:
    yield
    if cs.mirror:
        cs.mirror.pairs.clear()


def vector(rng: np.random.Generator, n: int) -> Array:
    return cs.to_aligned((1 + 0.3 * rng.standard_normal(n)).astype(np.float32))


def rows_of(rng: np.random.Generator, n: int, cols: int, scale: float = 1.0) -> Array:
    """[n, stride] f32 with NaN in the columns past `cols`: nobody may read them."""
    x = cs.aligned((n, formats.round_up(cols, 32)))
    x[:, :cols] = scale * rng.standard_normal((n, cols))
    return x


def close(got: Array, want: Array, magnitude: Array, tol: float) -> None:
    assert np.isfinite(got).all()
    tol = max(tol, 1e-5 if cs.mirror else 0)  # a tensor core cuts bits off that the simulator's sums keep
    worst = (np.abs(got - want) / np.maximum(magnitude, 1e-30)).max()
    assert worst <= tol, f"{worst:.2e} > {tol:.0e}"


# --- products -------------------------------------------------------------------------------------------------------


def product(
    stages: cs.Stages,
    p: formats.Packed,
    x: Array,
    norm: Any = None,
    add: Array | None = None,
    tap: Array | None = None,
    live: Array | None = None,
    **kw: Any,
) -> Array:
    keep: list[Any] = []
    n = len(x)
    y = cs.aligned((n, formats.round_up(p.values.shape[1], 4) + 4))
    if add is not None:
        y[:, : add.shape[1]] = add
    args = cs.ARGS["product"](
        cs.rows(n, live=live),
        cs.matrix(p, keep),
        cs.view(x),
        norm or cs.Norm(),
        cs.view(y),
        add is not None,
        cs.view(tap),
    )
    stages("product", args, nb=kw.pop("nb", 1 if n <= 8 else cs.PREFILL_BLOCKS), **kw)
    assert np.isnan(y[:, p.values.shape[1] :]).all(), "wrote past the rows"
    return y[:, : p.values.shape[1]].copy()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", cs.FORMAT)
def test_product_matches_the_oracle(stages: cs.Stages, fmt: str, order: str) -> None:
    rng = cs.generator(1)
    with cs.thread_order(order):
        for rows, cols, n, block in ((40, 96, 1, (16, 32)), (21, 1096, 5, (16, 96)), (33, 560, 20, (128, 128))):
            p = formats.random_packed(fmt, rng, rows, cols, scale_block=block)
            x = rows_of(rng, n, cols)
            xr = cs.rounded(fmt, x[:, :cols])
            w = p.values[0]
            close(product(stages, p, x), xr @ w.T, np.abs(xr) @ np.abs(w.T), 1e-6)


def test_product_multiplies_every_e4m3_code_exactly(stages: cs.Stages) -> None:
    """A weight beside zeros: the output is the code's value times the activation, with no rounding at all."""
    codes = np.arange(256).astype(np.uint8)
    full = np.zeros((256, 32), np.uint8)
    full[np.arange(len(codes)), np.arange(len(codes)) % 32] = codes
    data = formats.encode_tiles("f8", full)
    scales = np.ones((1, 2, 1), np.float32)
    values = formats.decode_tiles("f8", data, 256, 32, scales[0])
    p = formats.Packed("f8", data[None], scales, (128, 128), values[None])
    for activation in (1.0, 2.0**-3, 2.0**-7):
        y = product(stages, p, cs.aligned((1, 32), fill=activation))
        assert np.array_equal(y[0], values.sum(1) * activation)


@pytest.mark.parametrize("fmt", cs.FORMAT)
def test_product_bits_depend_on_the_row_alone(stages: cs.Stages, fmt: str) -> None:
    """Law L1: 1..8 rows, a pass of 19 rows, grids, block sizes and the block kind of longer passes."""
    rng = cs.generator(2)
    p = formats.random_packed(fmt, rng, 37, 1060, scale_block=(32, 160))
    x = rows_of(rng, 19, 1060)
    norm_w = vector(rng, 1060)
    norm = cs.Norm(cs.ptr(norm_w), None, 1060, EPS)
    one = np.concatenate([product(stages, p, x[i : i + 1], norm) for i in range(8)])
    for n in range(2, 9):
        got = product(stages, p, cs.to_aligned(x[:n]), norm, grid=1 + n % 4, threads=32 * (1 + n % 5))
        assert np.array_equal(got, one[:n]), n
    assert np.array_equal(product(stages, p, x, norm)[:8], one)
    assert np.array_equal(product(stages, p, x, norm, nb=1, threads=256)[:8], one)


@pytest.mark.parametrize("order", ORDERS)
def test_product_norms_adds_and_taps(stages: cs.Stages, order: str) -> None:
    rng = cs.generator(3)
    n, width = 5, 76
    p = formats.random_packed("f32", rng, 50, 2 * width)
    x, w, w2 = rows_of(rng, n, 2 * width), vector(rng, width), vector(rng, width)
    residual, tap, normed = (
        rng.standard_normal((n, 50)).astype(np.float32),
        cs.aligned((n, 52)),
        cs.aligned((n, 2 * width)),
    )
    norm = cs.Norm(cs.ptr(w), cs.ptr(w2), width, 1e-3, cs.view(normed))
    live = np.array([4], np.int32)
    with cs.thread_order(order):
        y = product(stages, p, x, norm, add=residual, tap=tap, live=live, dependent=True)
    want = np.hstack([cs.rmsnorm(x[:, :width], w, 1e-3), cs.rmsnorm(x[:, width : 2 * width], w2, 1e-3)])
    close(normed[:4], want[:4], np.abs(want[:4]) + 1e-3, 1e-6)
    sums, magnitude = want @ p.values[0].T, np.abs(want) @ np.abs(p.values[0].T)
    close(tap[:4, :50], sums[:4], magnitude[:4], 1e-6)
    assert np.array_equal(y[:4], residual[:4] + tap[:4, :50])
    assert np.isnan(normed[4]).all() and np.isnan(tap[4]).all() and np.array_equal(y[4], residual[4]), (
        "a dead row was touched"
    )


def test_product_shows_activations_that_are_not_finite(stages: cs.Stages) -> None:
    rng = cs.generator(4)
    for fmt in cs.FORMAT:
        p = formats.random_packed(fmt, rng, 16, 64)
        x = rows_of(rng, 2, 64)
        x[0, 7] = np.nan
        y = product(stages, p, x)
        assert np.isnan(y[0]).all() and np.isfinite(y[1]).all(), fmt


def test_numpy_arrays_go_to_a_device_and_back() -> None:
    """What a GPU gets of these tests, with memory apart that is the host's too."""
    cs.mirror = cs.Mirror(np)
    try:
        stages = cs.Stages(device_cases.library("sim"))
        test_product_norms_adds_and_taps(stages, "fwd")
        test_attention_matches_the_oracle(stages, "q8", "fwd")
        assert len(cs.mirror.pairs) > 20
    finally:
        cs.mirror = None


# --- embed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ("f32", "bf16", "f16"))
def test_embed_reads_rows_and_puts_hidden_beside_them(stages: cs.Stages, fmt: str) -> None:
    rng = cs.generator(5)
    values = rng.standard_normal((7, 40)).astype(np.float32)
    bits = {"f32": lambda v: v, "bf16": formats.bf16_bits, "f16": formats.f16_bits}[fmt](values)
    want = {"f32": lambda v: v, "bf16": formats.bf16_value, "f16": formats.f16_value}[fmt](bits)
    table, ids = cs.to_aligned(bits), np.array([6, 0, 7, -1, 3], np.int32)
    hidden, x = rows_of(rng, 5, 40), cs.aligned((5, 96))
    args = cs.ARGS["embed"](
        cs.rows(5), cs.ptr(ids), cs.ptr(table), cs.FORMAT[fmt], 7, 40, cs.view(x), cs.view(hidden), 3
    )
    stages("embed", args)
    assert np.array_equal(x[[0, 1, 4], :40], 3 * want[[6, 0, 3]]) and not x[2:4, :40].any()
    assert np.array_equal(x[:, 40:80], hidden[:, :40]) and np.isnan(x[:, 80:]).all()


# --- attention ------------------------------------------------------------------------------------------------------


class Attention:
    """One layer's attention of random shape: q after q_b, kv after kv_a, a cache with `past` rows, and the oracle."""

    def __init__(
        self,
        kind: str,
        n: int,
        past: int,
        heads: int = 5,
        r: int = 40,
        dn: int = 24,
        dr: int = 12,
        dv: int = 20,
        fmt: str = "f32",
        seed: int = 6,
    ) -> None:
        rng = cs.generator(seed)
        self.kind, self.heads, self.r, self.dn, self.dr, self.dv = kind, heads, r, dn, dr, dv
        self.ctx = past + n + 3
        self.c_pad, self.r_pad = formats.round_up(r, 32), formats.round_up(dr, 16)
        bytes_ = {"f32": 4 * (self.c_pad + self.r_pad), "q8": self.c_pad + self.c_pad // 16 + 2 * self.r_pad}
        self.natural = bytes_.get(kind, 2 * (self.c_pad + self.r_pad))  # bytes of a row on the CPU
        self.row_bytes = formats.round_up(self.natural, 16)
        self.uk = formats.random_packed(fmt, rng, r, dn, heads)
        self.uv = formats.random_packed(fmt, rng, dv, r, heads)
        self.q = rows_of(rng, past + n, heads * (dn + dr))
        self.kv = rows_of(rng, past + n, r + dr, 3.0)
        self.kv_norm = vector(rng, r)
        angle = rng.uniform(-3, 3, (self.ctx, dr // 2))
        self.cos, self.sin = (
            cs.to_aligned(np.cos(angle).astype(np.float32)),
            cs.to_aligned(np.sin(angle).astype(np.float32)),
        )
        self.scale = np.float32(0.31)
        self.cache = cs.aligned((self.ctx, self.row_bytes), np.uint8)
        self.keep: list[Any] = []
        self.w_uk, self.w_uv = cs.matrix(self.uk, self.keep), cs.matrix(self.uv, self.keep)

    def cache_args(self) -> Any:
        kind = cs.CACHE[self.kind]
        return cs.LatentCache(kind, self.ctx, self.c_pad, self.r_pad, cs.ptr(self.cache), self.row_bytes)

    def absorb(self, stages: cs.Stages, first: int, n: int, taps: bool = False, **kw: Any) -> Array:
        pos, width = np.array([first], np.int32), self.c_pad + self.r_pad
        q, kv = cs.to_aligned(self.q[first : first + n]), cs.to_aligned(self.kv[first : first + n])
        q_full = cs.aligned((n, self.heads, width))
        self.taps = [cs.aligned((n, self.heads, self.dn + self.dr)), cs.aligned((n, self.r)), cs.aligned((n, self.dr))]
        args = cs.ARGS["absorb"](
            cs.rows(n, pos),
            self.w_uk,
            self.heads,
            self.dn,
            self.dr,
            self.r,
            cs.view(q),
            cs.view(kv),
            cs.ptr(self.kv_norm),
            EPS,
            cs.ptr(self.cos),
            cs.ptr(self.sin),
            self.cache_args(),
            cs.ptr(q_full),
            *(cs.view(t if taps else None) for t in self.taps),
        )
        stages("absorb", args, **kw)
        return q_full

    def attend(
        self, stages: cs.Stages, q_full: Array, first: int, unit: int = 1, tap: bool = False, **kw: Any
    ) -> Array:
        n, pos = len(q_full), np.array([first], np.int32)
        units = formats.ceil_div(self.ctx, 64 * unit)
        part_o, part_ml = cs.aligned((n, units, self.heads, self.c_pad)), cs.aligned((n, units, self.heads, 2))
        v, self.latent = cs.aligned((n, self.heads * self.dv + 4)), cs.aligned((n, self.heads, self.r))
        part = cs.Partials(self.heads, self.c_pad, unit, units, cs.ptr(part_o), cs.ptr(part_ml))
        attend = cs.ARGS["attend"](cs.rows(n, pos), self.scale, cs.ptr(q_full), self.cache_args(), part)
        latent = cs.view(self.latent if tap else None)
        value = cs.ARGS["value"](cs.rows(n, pos), self.w_uv, self.dv, self.ctx, part, cs.view(v), latent)
        stages.launch("attend", attend, **kw)
        stages.launch("value", value, dependent=True, **kw)
        stages.run()
        assert np.isnan(v[:, self.heads * self.dv :]).all()
        return v[:, : self.heads * self.dv].copy()

    def cached(self, begin: int, end: int) -> Array:
        """Cache rows as the CPU reads them, f32 [end - begin, c_pad + r_pad]."""
        return cpu_kernels.cache_read(
            "scalar", self.kind, self.cache[begin:end, : self.natural].copy(), self.c_pad, self.r_pad
        )

    def rotate(self, v: Array, first: int) -> Array:
        n = len(v)
        half = self.dr // 2
        shape = (n,) + (1,) * (v.ndim - 2) + (half,)
        cos, sin = (t[first : first + n].astype(np.float64).reshape(shape) for t in (self.cos, self.sin))
        a, b = v[..., :half].astype(np.float64), v[..., half:].astype(np.float64)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", cs.CACHE)
def test_absorb_writes_queries_and_cache_rows(stages: cs.Stages, kind: str, order: str) -> None:
    a = Attention(kind, n=3, past=4)
    with cs.thread_order(order):
        q_full = a.absorb(stages, 4, 3, taps=True)
    q = a.q[4:, : a.heads * (a.dn + a.dr)].reshape(3, a.heads, a.dn + a.dr)
    want = np.einsum("hrd,nhd->nhr", a.uk.values, q[..., : a.dn].astype(np.float64))
    magnitude = np.einsum("hrd,nhd->nhr", np.abs(a.uk.values), np.abs(q[..., : a.dn]))
    close(q_full[..., : a.r], want, magnitude, 1e-6)
    rope = a.rotate(q[..., a.dn :], 4)
    close(q_full[..., a.c_pad : a.c_pad + a.dr], rope, np.abs(rope) + 1, 1e-6)
    assert not q_full[..., a.r : a.c_pad].any() and not q_full[..., a.c_pad + a.dr :].any(), "padding"
    assert np.array_equal(a.taps[0], np.concatenate([q[..., : a.dn], q_full[..., a.c_pad : a.c_pad + a.dr]], -1))
    c, k = a.taps[1], a.taps[2]
    close(c, cs.rmsnorm(a.kv[4:, : a.r], a.kv_norm, EPS), np.abs(c) + 1e-3, 1e-6)
    close(k, a.rotate(a.kv[4:, a.r : a.r + a.dr], 4), np.abs(k) + 3, 1e-6)
    got = a.cached(4, 7)
    assert np.array_equal(
        np.hstack([got[:, : a.r], got[:, a.c_pad : a.c_pad + a.dr]]), np.hstack(cache_round(kind, c, k))
    )
    assert not got[:, a.r : a.c_pad].any() and not got[:, a.c_pad + a.dr :].any()
    assert (a.cache[:4] == 0xFF).all() and (a.cache[7:] == 0xFF).all(), "wrote another position"


def test_absorb_leaves_positions_past_the_context(stages: cs.Stages) -> None:
    a = Attention("f16", n=3, past=4)
    whole, a.ctx = a.ctx, 6
    a.absorb(stages, 4, 3)
    assert (a.cache[4:6] != 0xFF).any(1).all() and (a.cache[6:whole] == 0xFF).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", cs.CACHE)
def test_attention_matches_the_oracle(stages: cs.Stages, kind: str, order: str) -> None:
    """Two heads beyond a tile of 16, three chunks with an edge, junk in the cache behind the last row."""
    heads = 18 if kind == "f16" else 5
    a = Attention(kind, n=2, past=138, heads=heads)
    with cs.thread_order(order):
        a.absorb(stages, 0, 138, nb=cs.PREFILL_BLOCKS)
        q_full = a.absorb(stages, 138, 2)
        v = a.attend(stages, q_full, 138, tap=True, grid=12)  # every unit in fresh, poisoned shared memory
    got = a.cached(0, 140).astype(np.float64)
    q = formats.bf16_round(q_full) if kind == "bf16" else q_full
    score = a.scale * np.einsum("nhw,tw->nht", q.astype(np.float64), got)
    score[0, :, 139:] = -np.inf
    p = np.exp(score - score.max(-1, keepdims=True))
    tol = 2e-6
    if kind == "bf16":  # probabilities rounded relative to the maximum of their chunk
        for at in range(0, 140, 64):
            s = score[..., at : at + 64]
            top = s.max(-1, keepdims=True)
            p[..., at : at + 64] = formats.bf16_round(np.exp(s - top)) * np.exp(top - score.max(-1, keepdims=True))
        tol = 1e-3  # a probability at a tie may round either way
    latent = np.einsum("nht,tc->nhc", p, got[:, : a.r]) / p.sum(-1, keepdims=True)
    spread = np.einsum("nht,tc->nhc", p, np.abs(got[:, : a.r])) / p.sum(-1, keepdims=True)
    close(a.latent, latent, spread, tol)
    want = np.einsum("hvc,nhc->nhv", a.uv.values, a.latent.astype(np.float64)).reshape(2, -1)
    magnitude = np.einsum("hvc,nhc->nhv", np.abs(a.uv.values), np.abs(a.latent)).reshape(2, -1)
    close(v, want, magnitude, 1e-6)


@pytest.mark.parametrize("kind", ("f16", "bf16", "q8"))
def test_attention_bits_depend_on_the_position_alone(stages: cs.Stages, kind: str) -> None:
    """A chunk or a whole partial to a unit, 1 row or several, grids and block sizes; 17 chunks are three partials."""
    heads, past = 2, 1085
    a = Attention(kind, n=9, past=past, heads=heads, r=32, dn=16, dr=8, dv=16, fmt="q8")
    rng = cs.generator(7)
    latent = rng.standard_normal((past, 32)).astype(np.float32)
    rope = rng.standard_normal((past, 8)).astype(np.float32)
    a.cache[:past, :] = 0
    cached = cpu_kernels.cache_write("scalar", kind, latent, rope)
    a.cache[:past, : cached.shape[1]] = cached
    one = []
    for i in range(9):
        q_full = a.absorb(stages, past + i, 1)
        one.append((q_full, a.attend(stages, q_full, past + i)))
    before = a.cache.copy()
    for n, unit, grid, threads in ((9, 8, 2, 64), (3, 1, 5, 128), (1, 8, 1, 32)):
        kw = {"nb": 1 if n <= 8 else cs.PREFILL_BLOCKS, "grid": grid, "threads": threads}
        q_full = a.absorb(stages, past, n, **kw)
        assert np.array_equal(a.cache, before)
        assert np.array_equal(q_full, np.concatenate([q for q, _ in one[:n]]))
        assert np.array_equal(a.attend(stages, q_full, past, unit=unit, **kw), np.concatenate([v for _, v in one[:n]]))


# --- FFN ------------------------------------------------------------------------------------------------------------


def silu(z: Array) -> Array:
    return z / (1 + np.exp(-z))


def gate_up(
    rng: np.random.Generator, fmt: str, width: int, d: int, slices: int = 1
) -> tuple[formats.Packed, Array, Array]:
    """Interleaved as the packer does, and the gate and up values [slices, width, d]."""
    w16 = formats.round_up(width, 16)
    p = formats.random_packed(fmt, rng, 2 * w16, d, slices)
    tiles = p.values.reshape(slices, -1, 2, 16, d)
    return p, tiles[:, :, 0].reshape(slices, w16, d)[:, :width], tiles[:, :, 1].reshape(slices, w16, d)[:, :width]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", (3, 11))
def test_ffn_in_computes_router_logits_and_hidden_rows(stages: cs.Stages, n: int, order: str) -> None:
    rng = cs.generator(8)
    d, width, keep = 72, 40, []
    p, gate, up = gate_up(rng, "f32", width, d)
    router = formats.random_packed("f32", rng, 20, d)
    x, w = rows_of(rng, n, d), vector(rng, d)
    h, logits, normed = cs.aligned((n, width + 4)), cs.aligned((n, 24)), cs.aligned((n, d))
    args = cs.ARGS["ffn_in"](
        cs.rows(n),
        cs.view(x),
        cs.Norm(cs.ptr(w), None, d, EPS, cs.view(normed)),
        cs.matrix(p, keep),
        width,
        cs.view(h),
        cs.matrix(router, keep),
        cs.view(logits),
    )
    with cs.thread_order(order):
        stages("ffn_in", args, nb=1 if n <= 8 else cs.PREFILL_BLOCKS, grid=4)
    xn = cs.rmsnorm(x[:, :d], w, EPS)
    close(normed, xn, np.abs(xn) + 1e-3, 1e-6)
    close(logits[:, :20], xn @ router.values[0].T, np.abs(xn) @ np.abs(router.values[0].T), 1e-6)
    want = silu(xn @ gate[0].T) * (xn @ up[0].T)
    close(h[:, :width], want, np.abs(want) + 0.1, 1e-5)
    assert np.isnan(h[:, width:]).all() and np.isnan(logits[:, 20:]).all()
    args.router = cs.Matrix()  # a dense layer
    h[...] = np.nan
    stages("ffn_in", args, nb=1 if n <= 8 else cs.PREFILL_BLOCKS)
    close(h[:, :width], want, np.abs(want) + 0.1, 1e-5)


ROUTERS = {
    "v2-lite": ("softmax", "greedy", 64, 6, 1, 1, False, 1.0, False),
    "v2": ("softmax", "group_limited_greedy", 40, 6, 8, 3, False, 16.0, False),
    "v3": ("sigmoid", "noaux_tc", 64, 8, 8, 4, True, 2.5, True),
    "tiny": ("sigmoid", "noaux_tc", 6, 3, 3, 2, True, 1.0, True),
    "k2": ("sigmoid", "noaux_tc", 384, 8, 1, 1, True, 2.827, True),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ROUTERS)
def test_route_has_the_bits_of_the_cpu(stages: cs.Stages, name: str, order: str) -> None:
    scoring, method, e, k, groups, top_groups, norm, scale, biased = ROUTERS[name]
    rng = cs.generator(9)
    logits = cs.to_aligned((3 * rng.standard_normal((12, e))).astype(np.float32))
    logits[0] = 0  # ties everywhere
    logits[1] = np.round(logits[1])
    logits[2, : e // 2] = np.nan
    logits[3] = -200
    bias = cs.to_aligned(np.round(rng.standard_normal(e), 1).astype(np.float32)) if biased else None
    idx, weight = cs.aligned((12, k), np.int32), cs.aligned((12, k))
    routing = routing_args(logits, bias, e, k, groups, top_groups, scoring, method, norm, scale, idx, weight)
    with cs.thread_order(order):
        stages("route", cs.ARGS["route"](cs.rows(12), routing), grid=2, threads=96)
    want_idx, want_weight = cpu_kernels.route(logits, bias, k, groups, top_groups, scoring, method, norm, scale)
    assert np.array_equal(idx, want_idx)
    assert np.array_equal(weight.view(np.uint32), np.asarray(want_weight, np.float32).view(np.uint32))


def routing_args(
    logits: Array,
    bias: Array | None,
    e: int,
    k: int,
    groups: int,
    top_groups: int,
    scoring: str,
    method: str,
    norm: bool,
    scale: float,
    idx: Array,
    weight: Array,
) -> Any:
    router = cs.RouterArgs(
        bias=cs.ptr(bias),
        n_routed_experts=e,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=top_groups,
        scoring_func=("softmax", "sigmoid").index(scoring),
        topk_method=("greedy", "group_limited_greedy", "noaux_tc").index(method),
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
        topk_idx=cs.ptr(idx),
        topk_weight=cs.ptr(weight),
    )
    return cs.Routing(router, cs.view(logits))


class Moe:
    """One MoE layer: experts and shared experts of a format, f32 routing logits."""

    def __init__(self, fmt: str, shared_fmt: str | None = None, shared: bool = True) -> None:
        rng = cs.generator(10)
        self.e, self.k, self.d, self.width, self.keep = 6, 3, 84, 52, []
        self.up, self.gate_w, self.up_w = gate_up(rng, fmt, self.width, self.d, self.e)
        self.down = formats.random_packed(fmt, rng, self.d, self.width, self.e)
        self.shared = formats.random_packed(shared_fmt or fmt, rng, self.d, 100) if shared else None
        self.x, self.shared_h = rows_of(rng, 21, self.d), rows_of(rng, 21, 100)
        self.logits = cs.to_aligned((2 * rng.standard_normal((21, self.e))).astype(np.float32))
        self.norm = vector(rng, self.d)
        self.w_up, self.w_down = cs.matrix(self.up, self.keep), cs.matrix(self.down, self.keep)
        self.w_shared = cs.matrix(self.shared, self.keep) if self.shared else cs.Matrix()
        self.fmt, self.shared_fmt = fmt, shared_fmt or fmt

    def run(self, stages: cs.Stages, first: int, n: int, **kw: Any) -> dict[str, Array]:
        """Rows first..first+n-1 through route (long passes), experts, down; each row of hidden by (row, rank)."""
        o: dict[str, Array] = {
            "idx": cs.aligned((n, self.k), np.int32),
            "weight": cs.aligned((n, self.k)),
            "h": cs.aligned((n * self.k, 64)),
            "x": cs.to_aligned(self.x[first : first + n]),
            "routed": cs.aligned((n, self.x.shape[1])),
            "shared": cs.aligned((n, self.x.shape[1])),
        }
        logits, shared_h = (
            cs.to_aligned(self.logits[first : first + n]),
            cs.to_aligned(self.shared_h[first : first + n]),
        )
        routing = routing_args(
            logits, None, self.e, self.k, 1, 1, "softmax", "greedy", True, 1.5, o["idx"], o["weight"]
        )
        kw["nb"] = kw.get("nb", 1 if n <= 8 else cs.PREFILL_BLOCKS)
        if n > 8:
            stages.launch("route", cs.ARGS["route"](cs.rows(n), routing), **kw)
        norm = cs.Norm(cs.ptr(self.norm), None, self.d, EPS)
        stages.launch(
            "experts",
            cs.ARGS["experts"](cs.rows(n), cs.view(o["x"]), norm, self.w_up, self.width, routing, cs.view(o["h"])),
            dependent=True,
            **kw,
        )
        stages.launch(
            "down",
            cs.ARGS["down"](
                cs.rows(n),
                self.w_down,
                routing,
                cs.view(o["h"]),
                self.w_shared,
                cs.view(shared_h),
                cs.view(o["x"]),
                cs.ptr(o["routed"]),
                cs.ptr(o["shared"]),
                scale=1,
            ),
            dependent=True,
            **kw,
        )
        stages.run()
        slots = np.argsort(np.lexsort((np.repeat(np.arange(n), self.k), o["idx"].ravel())))
        o["h"] = o["h"][slots].reshape(n, self.k, 64)
        return o


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("fmt", "shared_fmt"), (("f32", "f32"), ("q4", "q8"), ("bf16", None), ("f8", "f32")))
@pytest.mark.parametrize("n", (2, 21))
def test_experts_and_down_match_the_oracle(
    stages: cs.Stages, fmt: str, shared_fmt: str | None, n: int, order: str
) -> None:
    m = Moe(fmt, shared_fmt, shared=shared_fmt is not None)
    with cs.thread_order(order):
        o = m.run(stages, 0, n)
    idx, weight = cpu_kernels.route(m.logits[:n].copy(), None, m.k, 1, 1, "softmax", "greedy", True, 1.5)
    assert np.array_equal(o["idx"], idx) and np.array_equal(o["weight"], np.asarray(weight, np.float32))
    assert np.isnan(o["h"][..., m.width :]).all()
    h = o["h"][..., : m.width]
    if fmt == "f32":
        xn = cs.rmsnorm(m.x[:n, : m.d], m.norm, EPS)
        want = silu(np.einsum("nkwd,nd->nkw", m.gate_w[idx], xn)) * np.einsum("nkwd,nd->nkw", m.up_w[idx], xn)
        close(h, want, np.abs(want) + 0.1, 1e-5)
    hr = cs.rounded(fmt, h.reshape(-1, m.width)).reshape(h.shape)
    parts = np.einsum("nkdw,nkw->nkd", m.down.values[idx], hr)
    sizes = np.einsum("nkdw,nkw->nkd", np.abs(m.down.values[idx]), np.abs(hr))
    routed = np.einsum("nk,nkd->nd", weight.astype(np.float64), parts)
    magnitude = np.einsum("nk,nkd->nd", weight.astype(np.float64), sizes)
    close(o["routed"][:, : m.d], routed, magnitude, 1e-6)
    total = o["routed"][:, : m.d].copy()
    if m.shared:
        sr, sw = cs.rounded(m.shared_fmt, m.shared_h[:n, :100]), m.shared.values[0]
        close(o["shared"][:, : m.d], sr @ sw.T, np.abs(sr) @ np.abs(sw.T), 1e-6)
        total += o["shared"][:, : m.d]
    assert np.array_equal(o["x"][:, : m.d], m.x[:n, : m.d] + total), "routed, then shared, then the residual"
    assert np.isnan(o["x"][:, m.d :]).all()


@pytest.mark.parametrize("fmt", ("q4", "bf16"))
def test_moe_bits_depend_on_the_row_alone(stages: cs.Stages, fmt: str) -> None:
    m = Moe(fmt)
    one = [m.run(stages, i, 1) for i in range(8)]
    for n, grid, threads, nb in ((8, 5, 96, 1), (3, 1, 32, 1), (21, 2, 64, cs.PREFILL_BLOCKS), (21, 9, 32, 1)):
        o = m.run(stages, 0, n, grid=grid, threads=threads, nb=nb)
        for i in range(min(n, 8)):
            assert np.array_equal(o["h"][i, :, : m.width], one[i]["h"][0, :, : m.width]), (n, i)
            assert np.array_equal(o["x"][i, : m.d], one[i]["x"][0, : m.d]), (n, i)


@pytest.mark.parametrize("fmt", cs.FORMAT)
def test_bits_do_not_depend_on_how_shared_memory_is_used(stages: cs.Stages, fmt: str) -> None:
    """Every way of kFits: smaller copies and panels, fewer rows to a weight, for short and long passes."""
    rng = cs.generator(15)
    p = formats.random_packed(fmt, rng, 37, 1060, scale_block=(32, 160))
    x = rows_of(rng, 35, 1060)
    m = Moe(fmt)
    for n, first in ((35, 0), (6, 3)):
        truth = product(stages, p, cs.to_aligned(x[:n]), fit=first)
        for fit in range(first + 1, cs.FITS):
            assert np.array_equal(product(stages, p, cs.to_aligned(x[:n]), fit=fit), truth), (n, fit)
    for n, first in ((21, 0), (6, 3)):
        whole = m.run(stages, 0, n, fit=first)
        for fit in (*range(first + 1, 5),):  # those behind differ in the rows of `value` alone
            o = m.run(stages, 0, n, fit=fit)
            for name in ("h", "x"):
                assert np.array_equal(o[name], whole[name], equal_nan=True), (n, fit, name)


@pytest.mark.parametrize("kind", cs.CACHE)
def test_attention_bits_do_not_depend_on_how_shared_memory_is_used(stages: cs.Stages, kind: str) -> None:
    """Chunks whole or in halves of their columns (of which one is narrower), latents of eight rows or fewer at once."""
    a = Attention(kind, n=11, past=130, heads=3, r=72, dn=16, dr=8, dv=16, fmt="q8")
    a.absorb(stages, 0, 130, nb=cs.PREFILL_BLOCKS)
    q_full = a.absorb(stages, 130, 11, nb=cs.PREFILL_BLOCKS)
    truth = a.attend(stages, q_full, 130, tap=True)
    latent = a.latent
    for unit in (1, 8):
        for fit in range(3, cs.FITS):
            assert np.array_equal(a.attend(stages, q_full, 130, unit=unit, tap=True, fit=fit), truth), (unit, fit)
            assert np.array_equal(a.latent, latent), (unit, fit)


def test_down_of_a_dense_layer(stages: cs.Stages) -> None:
    rng = cs.generator(11)
    keep: list[Any] = []
    p = formats.random_packed("q8", rng, 40, 1100)
    for n in (2, 9):
        h, x = rows_of(rng, n, 1100), rows_of(rng, n, 40)
        before, tap = x.copy(), cs.aligned(x.shape)
        args = cs.ARGS["down"](
            rows=cs.rows(n),
            shared=cs.matrix(p, keep),
            shared_h=cs.view(h),
            x=cs.view(x),
            shared_tap=cs.ptr(tap),
            scale=0.5,
        )
        stages("down", args, nb=1 if n <= 8 else cs.PREFILL_BLOCKS)
        hr = cs.rounded("q8", h[:, :1100])
        close(tap[:, :40], hr @ p.values[0].T, np.abs(hr) @ np.abs(p.values[0].T), 1e-6)
        assert np.array_equal(x[:, :40], before[:, :40] + np.float32(0.5) * tap[:, :40])


# --- head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_head_norms_multiplies_and_chooses(stages: cs.Stages, order: str) -> None:
    rng = cs.generator(12)
    n, d, vocab, valid, first, keep = 4, 48, 150, 140, 1, []
    p = formats.random_packed("f32", rng, vocab, d)
    w = np.array(p.values[0], np.float32)
    x, norm_w = rows_of(rng, n, d), vector(rng, d)
    xn = cs.rmsnorm(x[:, :d], norm_w, EPS)
    w[[17, 90, 139]] = 9 * xn[1] / np.linalg.norm(xn[1])  # three equal winners of row 1
    w[145] = 90 * xn[1]  # padding of the vocabulary wins nowhere
    p = formats.Packed("f32", formats.encode_tiles("f32", w)[None], None, (128, 128), w[None].astype(np.float64))
    x[3, 0] = np.inf  # row 3 has no number
    hidden, logits, choice = cs.aligned((n, d)), cs.aligned((3, 152)), cs.aligned((3,), np.int32)
    value, ids, arrived = cs.aligned((3, 5)), cs.aligned((3, 5), np.int32), np.zeros(1, np.uint32)
    args = cs.ARGS["head"](
        cs.rows(n),
        first,
        cs.view(x),
        cs.Norm(cs.ptr(norm_w), None, d, EPS, cs.view(hidden)),
        cs.matrix(p, keep),
        valid,
        cs.view(logits),
        cs.ptr(choice),
        cs.ptr(value),
        cs.ptr(ids),
        cs.ptr(arrived),
        scale=0.5,
    )
    with cs.thread_order(order):
        for _ in range(2):  # the counter is ready for the next launch
            choice[...] = -7
            stages("head", args, grid=5)
            close(hidden[:3], xn[:3], np.abs(xn[:3]) + 1e-3, 1e-6)
            close(2 * logits[:2, :vocab], xn[1:3] @ p.values[0].T, np.abs(xn[1:3]) @ np.abs(p.values[0].T), 1e-6)
            assert choice.tolist() == [17, int(logits[1, :valid].argmax()), -1]
            assert np.isnan(logits[:, vocab:]).all() and arrived[0] == 0
    hidden[...] = np.nan
    args.first_row = n  # the norm alone
    stages("head", args, grid=2)
    close(hidden[:3], xn[:3], np.abs(xn[:3]) + 1e-3, 1e-6)


def test_stages_read_live_rows_after_their_wait(stages: cs.Stages) -> None:
    """A head chooses token 2; the stages behind it, whose prologues run first, take that for their live rows."""
    rng = cs.generator(13)
    keep: list[Any] = []
    w = np.zeros((16, 32), np.float32)
    w[2] = 1
    head = formats.Packed("f32", formats.encode_tiles("f32", w)[None], None, (128, 128), w[None].astype(np.float64))
    ones, logits, choice = cs.aligned((1, 32), fill=1), cs.aligned((1, 16)), np.array([999], np.int32)
    value, ids, arrived = cs.aligned((1, 3)), cs.aligned((1, 3), np.int32), np.zeros(1, np.uint32)
    args = cs.ARGS["head"](
        rows=cs.rows(1),
        x=cs.view(ones),
        w=cs.matrix(head, keep),
        n_valid=16,
        logits=cs.view(logits),
        choice=cs.ptr(choice),
        best_value=cs.ptr(value),
        best_id=cs.ptr(ids),
        arrived=cs.ptr(arrived),
        scale=1,
    )
    p = formats.random_packed("bf16", rng, 16, 32)
    x, y = rows_of(rng, 4, 32), cs.aligned((4, 16))
    product_args = cs.ARGS["product"](rows=cs.rows(4, live=choice), w=cs.matrix(p, keep), x=cs.view(x), y=cs.view(y))
    table, embedded, zeros = cs.aligned((3, 32), fill=5), cs.aligned((3, 32)), np.zeros(3, np.int32)
    embed_args = cs.ARGS["embed"](
        rows=cs.rows(3, live=choice),
        ids=cs.ptr(zeros),
        table=cs.ptr(table),
        vocab=3,
        d=32,
        x=cs.view(embedded),
        scale=1,
    )
    stages.launch("head", args)
    stages.launch("product", product_args, dependent=True)
    stages.launch("embed", embed_args, dependent=True)
    stages.run()
    assert choice[0] == 2
    assert np.isfinite(y[:2]).all() and np.isnan(y[2:]).all()
    assert (embedded[:2] == 5).all() and np.isnan(embedded[2]).all()
