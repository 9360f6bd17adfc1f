"""Norm, rotation, SwiGLU, axpy, router, cache rows and absorbed attention, against float64 and among poison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpu_kernels as T
from cpu_kernels import ISAS, PARTIAL
from deepcalm import _core
from deepcalm.check import reference
from ref import formats as F

CACHE_TYPES = ["f32", "f16", "bf16", "q8"]
Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.sanitize
every_isa = pytest.mark.parametrize("isa", ISAS)


def test_isas_are_those_of_the_processor() -> None:
    emulated = {str(i["name"]) for i in _core.isas() if i["emulated"]}
    best = ("avx512x", "amx") if emulated else ("amx", "avx512x")
    assert [name for name in (*best, "avx512", "avx2", "scalar") if name in ISAS] == ISAS, "best first"
    with pytest.raises(ValueError, match="isa sse9: unknown or not supported"):
        T.prepare("sse9", "f32", np.zeros((1, 1), np.float32))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
    if not flags:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    avx512x = avx512 and {"avx512_vnni", "avx512vbmi", "avx512_bf16"} <= flags
    compiled = {str(i["name"]) for i in _core.isas()}
    assert [str(i["name"]) for i in _core.isas() if i["supported"]] == ISAS
    amx = avx512x and {"amx_tile", "amx_bf16", "amx_int8"} <= flags and not _core.amx_refusal()
    assert emulated == ({"amx"} if avx512x and not amx else set())
    expected = {"scalar": True, "avx2": avx2, "avx512": avx512, "avx512x": avx512x, "amx": avx512x}
    assert {name for name in compiled if expected[name]} == set(ISAS)


@every_isa
def test_every_format_has_a_product(isa: str) -> None:
    """Where a format is new and the table lacks its kernel, the first model in it would call address 0."""
    assert all(T.table(isa).matmul) and len(T.table(isa).matmul) == len(_core.formats())


def test_what_a_kernel_writes_beside_its_output_is_seen() -> None:
    before, between, behind = range(-64, 0), range(5, 128), range(133, 256)
    for at in [*before, *between, *behind]:
        out = T.Guarded(2, 5)
        assert out.row(0) % 64 == out.row(1) % 64 == 0
        one = np.ones(1, np.float32)
        T.table("scalar").rmsnorm(one.ctypes.data, one.ctypes.data, out.data + 4 * at, 1, 1e-6)
        with pytest.raises(RuntimeError, match="kernel wrote outside its output"):
            out.check()


# --- element-wise ---------------------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("n", [1, 7, 16, 17, 63, 64, 100, 576, 2048, 7168])
def test_rmsnorm(isa: str, n: int, rng: np.random.Generator) -> None:
    x = (rng.standard_normal(n) * np.exp(rng.uniform(-6, 6))).astype(np.float32)
    w = rng.standard_normal(n).astype(np.float32)
    for eps in [1e-6, 1e-5]:
        y = T.rmsnorm(isa, x, w, eps)
        x64 = x.astype(np.float64)
        want = w * x64 / np.sqrt((x64 * x64).mean() + np.float32(eps))
        np.testing.assert_allclose(y, want, rtol=6e-7)
        assert T.rmsnorm(isa, x, w, eps, in_place=True).tobytes() == y.tobytes()
    assert np.array_equal(T.rmsnorm(isa, np.zeros(n, np.float32), w, 1e-6), np.zeros(n, np.float32))


@every_isa
def test_rope_vector_of_the_specification(isa: str) -> None:
    # dr 8, theta 1e4, position 3, interleaved input 1..8: de-interleave, rotate half-split, interleave again
    angle = 3.0 * 10000.0 ** (-np.arange(4) / 4)
    v = np.arange(1, 9, dtype=np.float32)
    half = T.rope(isa, np.concatenate([v[0::2], v[1::2]]), np.cos(angle).astype("f4"), np.sin(angle).astype("f4"))
    got = np.stack([half[:4], half[4:]], 1).reshape(-1)
    want = [-1.272232513, -1.838864985, 1.683928641, 4.707906576, 4.817777168, 6.147277704, 6.975968536, 8.020963969]
    np.testing.assert_allclose(got, want, rtol=2e-6)


@every_isa
@pytest.mark.parametrize("half", [1, 4, 8, 15, 16, 17, 32, 50])
def test_rope(isa: str, half: int, rng: np.random.Generator) -> None:
    v = rng.standard_normal(2 * half).astype(np.float32)
    angle = rng.uniform(0, 100, half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b, c, s = (t.astype(np.float64) for t in (v[:half], v[half:], cos, sin))
    want = np.concatenate([a * c - b * s, a * s + b * c])
    np.testing.assert_allclose(T.rope(isa, v, cos, sin), want, atol=3e-7 * np.abs(v).max(), rtol=0)


def interleave(gate: Array, up: Array) -> Array:
    n = len(gate)
    blocks = np.full((F.ceil_div(n, 16), 2, 16), np.nan, np.float32)  # the padding rows may hold anything
    for row, values in enumerate((gate, up)):
        padded = np.pad(values, (0, -n % 16), constant_values=np.nan)
        blocks[:, row] = padded.reshape(-1, 16)
    return blocks.reshape(-1)


@every_isa
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 1408])
def test_swiglu(isa: str, n: int, rng: np.random.Generator) -> None:
    gate = (rng.standard_normal(n) * 10).astype(np.float32)
    up = rng.standard_normal(n).astype(np.float32)
    gate[: min(n, 4)] = [0.0, -86.5, 50.0, -1e-30][: min(n, 4)]
    up[1:2] = np.copysign(np.maximum(np.abs(up[1:2]), 0.1), up[1:2])  # -86.5 e^-86.5 up stays a normal number
    g = gate.astype(np.float64)
    np.testing.assert_allclose(T.swiglu(isa, interleave(gate, up), n), g / (1 + np.exp(-g)) * up, rtol=5e-7)


@every_isa
def test_swiglu_extremes(isa: str) -> None:
    gate = np.array([200, -200, 3e38, -3e38, 0.0, -0.0, np.inf, np.nan, -87.5], np.float32)
    y = T.swiglu(isa, interleave(gate, np.ones(9, np.float32)), 9)
    assert y[0] == 200
    assert y[2] == np.float32(3e38)
    assert np.array_equal(np.abs(y[[1, 3, 4, 5]]), [0, 0, 0, 0])
    assert np.isinf(y[6])
    assert np.isnan(y[7])
    assert abs(y[8]) < 1e-35


@every_isa
@pytest.mark.parametrize("n", [1, 16, 37, 2048])
def test_axpy(isa: str, n: int, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, n)).astype(np.float32)
    a = np.float32(rng.standard_normal())
    exact = np.float64(a) * x + y  # the product is exact in float64
    got = T.axpy(isa, float(a), x, y)
    if isa == "scalar":
        assert np.array_equal(got, a * x + y)
    else:
        assert np.array_equal(got, exact.astype(np.float32))


# --- router ---------------------------------------------------------------------------------------------------------

Z = np.array([0.5, -1, 2, 0.1, -0.3, 1.2, 0, 0.9], np.float32)
BIAS = np.array([0.1, 0.9, -0.2, 0.05, 0.3, -0.1, 0.25, 0], np.float32)


def route(z: Array, bias: Array | None = None, k: int = 3, groups: tuple[int, int] = (1, 1), scoring: str = "softmax",
          method: str = "greedy", norm: bool = False, scale: float = 1.0) -> tuple[Array, Array]:  # fmt: skip
    z = np.atleast_2d(np.asarray(z, np.float32))
    idx, weight = T.route(z, bias, k, groups[0], groups[1], scoring, method, norm, scale)
    for row in idx:
        assert (np.diff(row) > 0).all(), "distinct and ascending"
        assert row[0] >= 0
        assert row[-1] < z.shape[1]
    return idx, weight


NOAUX: dict[str, Any] = {"scoring": "sigmoid", "method": "noaux_tc", "norm": True}


@pytest.mark.parametrize(
    ("kwargs", "want"),
    [
        (dict(bias=BIAS, groups=(4, 2), scale=2.5, **NOAUX), {1: 0.483221, 6: 0.898375, 0: 1.118404}),
        (dict(bias=BIAS, scale=2.5, **NOAUX), {1: 0.562875, 6: 1.046464, 4: 0.890661}),
        ({}, {2: 0.409789, 5: 0.184130, 7: 0.136407}),
        ({"groups": (4, 2), "method": "group_limited_greedy", "scale": 16.0}, {2: 6.556625, 5: 2.946081, 3: 0.980665}),
        ({"norm": True}, {2: 0.561104, 5: 0.252120, 7: 0.186775}),
    ],
    ids=["noaux_tc grouped", "noaux_tc", "softmax greedy", "group_limited_greedy", "softmax normalised"],
)
def test_route_vectors_of_the_specification(kwargs: dict[str, Any], want: dict[int, float]) -> None:
    idx, weight = route(Z, **kwargs)
    assert idx[0].tolist() == sorted(want)
    np.testing.assert_allclose(weight[0], [want[i] for i in sorted(want)], atol=1e-6, rtol=0)


def route_f64(z: Array, bias: Array | None, k: int, groups: tuple[int, int], scoring: str, method: str) -> Array:
    """Selected experts in float64, by full sorts instead of repeated maxima."""
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum() if scoring == "softmax" else 1 / (1 + np.exp(-z))
    u = p if bias is None else p + bias
    if method != "greedy" and groups[0] > 1:
        by_group = np.sort(u.reshape(groups[0], -1), 1)[:, ::-1]
        g = by_group[:, :2].sum(1) if method == "noaux_tc" else by_group[:, 0]
        keep = np.argsort(-g, kind="stable")[: groups[1]]
        fill = -np.inf if method == "noaux_tc" else 0.0
        u = np.where(np.isin(np.arange(len(z)) // (len(z) // groups[0]), keep), u, fill)
    chosen = np.sort(np.argsort(-u, kind="stable")[:k])
    return np.stack([chosen, p[chosen]])


@pytest.mark.parametrize(
    ("experts", "k", "groups"), [(64, 6, (1, 1)), (160, 6, (8, 3)), (256, 8, (8, 4)), (384, 8, (1, 1))]
)
@pytest.mark.parametrize(("scoring", "method"), [("softmax", "greedy"), ("softmax", "group_limited_greedy"),
                                                 ("sigmoid", "noaux_tc")])  # fmt: skip
def test_route_random(experts: int, k: int, groups: tuple[int, int], scoring: str, method: str,
                      rng: np.random.Generator) -> None:  # fmt: skip
    z = (rng.standard_normal((50, experts)) * 2).astype(np.float32)
    bias = (rng.standard_normal(experts) * 0.3).astype(np.float32) if method == "noaux_tc" else None
    idx, weight = route(z, bias, k, groups, scoring, method, scale=2.5)
    for row, i, w in zip(z, idx, weight, strict=True):
        want, p = route_f64(row.astype(np.float64), bias, k, groups, scoring, method)
        assert i.tolist() == want.tolist()
        np.testing.assert_allclose(w, 2.5 * p, rtol=2e-6)
    again = route(z[7], bias, k, groups, scoring, method, scale=2.5)
    assert again[1].tobytes() == weight[7].tobytes(), "a row alone"


def test_route_ties_take_the_lowest_index() -> None:
    assert route(np.zeros(16), k=4)[0].tolist() == [[0, 1, 2, 3]]
    assert route(np.zeros(16), np.zeros(16, "f4"), 4, (4, 2), **NOAUX)[0].tolist() == [[0, 1, 2, 3]]
    z = np.zeros(16)
    z[[5, 9, 12]] = 1
    assert route(z, k=2)[0].tolist() == [[5, 9]]
    assert route(z, None, 6, (4, 2), method="group_limited_greedy")[0].tolist() == [[4, 5, 6, 7, 8, 9]]


def test_route_masked_experts_never_win_over_negative_scores() -> None:
    bias = np.full(8, -3, np.float32)  # every allowed biased score is negative: a mask of 0 would win (pitfall 7)
    bias[:4] = -2
    idx, _ = route(np.zeros(8), bias, 4, (2, 1), **NOAUX)
    assert idx.tolist() == [[0, 1, 2, 3]]


def test_route_tiny_sigmoids_under_a_large_bias() -> None:
    z = np.full(8, -17, np.float32)  # sigmoid 4e-8, lost in p + bias at bias 12
    z[2] = -16
    _, weight = route(z, np.full(8, 12, np.float32), 4, **NOAUX)
    p = 1 / (1 + np.exp(-z[[0, 1, 2, 3]].astype(np.float64)))
    np.testing.assert_allclose(weight[0], p / p.sum(), rtol=2e-6)


@pytest.mark.parametrize(("scoring", "method"), [("softmax", "greedy"), ("softmax", "group_limited_greedy"),
                                                 ("sigmoid", "noaux_tc")])  # fmt: skip
def test_route_non_finite_input_still_gives_valid_indices(scoring: str, method: str, rng: np.random.Generator) -> None:
    specials = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0, 1], np.float32)
    for trial in range(200):
        z = rng.choice(specials, 16)
        bias = rng.choice(specials, 16) if trial % 2 else None
        route(z, bias, 5, (4, 2), scoring, method, norm=True)
    nan = np.full(16, np.nan, np.float32)
    _, weight = route(nan, nan, 5, (4, 2), scoring, method)
    assert np.isnan(weight).all(), "a NaN must reach the logits"


# --- cache rows -----------------------------------------------------------------------------------------------------

DIMS = [(512, 64), (256, 64), (64, 16), (24, 8), (32, 16), (40, 20), (33, 2)]


def reference_rows(kind: str, c: Array, k_rope: Array) -> tuple[Array, Array]:
    """Row bytes by the layout in format.h, and their values f64 [n, c_pad + r_pad]."""
    n = len(c)
    c_pad = np.pad(c, [(0, 0), (0, -c.shape[1] % 32)])
    r_pad = np.pad(k_rope, [(0, 0), (0, -k_rope.shape[1] % 16)])
    values = np.concatenate(reference.cache_round(kind, c_pad, r_pad), 1)
    if kind == "q8":
        groups = c_pad.reshape(n, -1, 32)
        scale = (np.abs(groups).max(2) / np.float32(127)).astype(np.float16)
        safe = np.where(scale > 0, scale, 1).astype(np.float64)
        codes = np.rint(values[:, : c_pad.shape[1]].reshape(groups.shape) / safe[..., None]).astype(np.int8)
        parts = [codes.reshape(n, -1), scale, r_pad.astype(np.float16)]
    elif kind == "bf16":
        parts = [F.bf16_bits(c_pad), F.bf16_bits(r_pad)]
    else:
        parts = [t.astype({"f32": np.float32, "f16": np.float16}[kind]) for t in (c_pad, r_pad)]
    return np.concatenate([np.ascontiguousarray(t).view(np.uint8).reshape(n, -1) for t in parts], 1), values


@every_isa
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_cache_rows(isa: str, kind: str, rng: np.random.Generator) -> None:
    for c, dr in DIMS:
        x = (rng.standard_normal((9, c)) * np.exp(rng.uniform(-4, 4, (9, 1)))).astype(np.float32)
        k_rope = rng.standard_normal((9, dr)).astype(np.float32)
        x[1] = 0
        x[2] *= 1e-9  # below the smallest f16
        k_rope[3, 0] = 65519.9  # the largest that does not overflow f16
        k_rope[4] *= 1e-6  # f16 subnormals
        want_bytes, want = reference_rows(kind, x, k_rope)
        rows = T.cache_write(isa, kind, x, k_rope)
        assert np.array_equal(rows, want_bytes), (c, dr)
        c_pad = F.round_up(c, 32)
        assert np.array_equal(T.cache_read(isa, kind, rows, c_pad, want.shape[1] - c_pad), want)


@every_isa
def test_cache_f16_every_value(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    rows = bits.view(np.uint8).reshape(-1, 2 * (32 + 16 * 2))
    got = T.cache_read(isa, "f16", np.ascontiguousarray(rows), 32, 32).reshape(-1)
    want = F.f16_value(bits)
    assert np.array_equal(got, want, equal_nan=True)
    # half way between neighbours, both sides of it, and the neighbours themselves: nearest even
    v = want[np.isfinite(want)].astype(np.float64)
    v = np.sort(np.unique(v))
    mid = ((v[1:] + v[:-1]) / 2).astype(np.float32)
    x = np.concatenate([mid, np.nextafter(mid, np.float32(np.inf)), np.nextafter(mid, np.float32(-np.inf)), v])
    x = np.concatenate([x, [65520.0, 1e9, np.inf, -np.inf, 1e-45]]).astype(np.float32)
    x = np.pad(x, (0, -len(x) % 64)).reshape(-1, 64)
    out = T.cache_write(isa, "f16", np.ascontiguousarray(x[:, :32]), np.ascontiguousarray(x[:, 32:])).view(np.uint16)
    assert np.array_equal(out, F.f16_bits(x))


# --- absorbed attention ---------------------------------------------------------------------------------------------


def attention_f64(q: Array, cache: Array, c_pad: int, row_end: Array, scale: float) -> Array:
    """[n, heads, c_pad] softmax(scale q.k) c, positions below row_end, all f64."""
    out = np.zeros((*q.shape[:2], c_pad))
    for i, end in enumerate(row_end):
        s = q[i].astype(np.float64) @ cache[:end].T * scale
        p = np.exp(s - s.max(1, keepdims=True))
        out[i] = p / p.sum(1, keepdims=True) @ cache[:end, :c_pad]
    return out


def attend(isa: str, kind: str, rows: Array, c_pad: int, r_pad: int, q: Array, row_end: Array, scale: float) -> Array:
    """All partials of every row and head, merged: [n, heads, c_pad]."""
    begins = range(0, int(row_end.max()), PARTIAL)
    parts = [
        T.mla_partial(isa, kind, rows, c_pad, r_pad, q, b, np.minimum(row_end, b + PARTIAL).astype(np.int32), scale)
        for b in begins
    ]
    out = np.empty((*q.shape[:2], c_pad), np.float32)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            m, l = (np.array([p[k][i, h] for p in parts], np.float32) for k in (0, 1))
            out[i, h] = T.mla_merge(isa, m, l, np.stack([p[2][i, h] for p in parts]))
    return out


def attention_case(rng: np.random.Generator, kind: str, isa: str, c: int, dr: int, heads: int, row_end: Array) -> Any:
    n_pos = int(row_end.max())
    c_pad, r_pad = F.round_up(c, 32), F.round_up(dr, 16)
    x = rng.standard_normal((n_pos, c)).astype(np.float32)
    k_rope = rng.standard_normal((n_pos, dr)).astype(np.float32)
    rows = T.cache_write(isa, kind, x, k_rope)
    q = np.zeros((len(row_end), heads, c_pad + r_pad), np.float32)
    q[..., :c] = rng.standard_normal((len(row_end), heads, c))
    q[..., c_pad : c_pad + dr] = rng.standard_normal((len(row_end), heads, dr))
    scale = float(rng.uniform(0.5, 3) / math.sqrt(c + dr))
    cache = T.cache_read(isa, kind, rows, c_pad, r_pad).astype(np.float64)
    return rows, cache, c_pad, r_pad, q, scale


@every_isa
@pytest.mark.parametrize("kind", CACHE_TYPES)
@pytest.mark.parametrize(
    ("c", "dr", "heads", "ends"),
    [
        (512, 64, 16, [1, 65]),
        (256, 64, 5, [64, 63, 2, 130]),
        (64, 16, 4, [512, 513, 511, 1, 1023, 1024, 1025, 1090]),
        (24, 8, 3, [1, 2, 3, 4, 5, 64, 65, 66, 127, 128, 129]),
        (40, 20, 1, [*range(2085, 2101)]),
    ],
)
def test_mla_oracle(
    isa: str, kind: str, c: int, dr: int, heads: int, ends: list[int], rng: np.random.Generator
) -> None:
    row_end = np.array(ends, np.int32)
    rows, cache, c_pad, r_pad, q, scale = attention_case(rng, kind, isa, c, dr, heads, row_end)
    got = attend(isa, kind, rows, c_pad, r_pad, q, row_end, scale)
    want = attention_f64(F.bf16_round(q) if kind == "bf16" else q, cache, c_pad, row_end, scale)
    tol = 2.0**-8 if kind == "bf16" else 1e-5  # rounding every probability to bf16 costs up to 2^-9 of each
    assert np.abs(got - want).max() <= tol * np.abs(cache).max()
    if kind == "bf16":  # the exact definition: rounded probabilities, relative to the running maximum of each chunk
        parts = (q[..., :c_pad], q[..., c_pad:], cache[:, :c_pad], cache[:, c_pad:])
        exact, _ = reference.attend("bf16", scale, *parts, ends=row_end)
        close = np.abs(got - exact).max(axis=2)
        # a score next to a rounding border may round the other way: rare, and bounded by one bf16 step
        assert (close > 3e-5).mean() < 0.2
        assert np.median(close) < 1e-5


@every_isa
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_mla_bits_do_not_depend_on_the_call(isa: str, kind: str, rng: np.random.Generator) -> None:
    row_end = np.array([3, 64, 65, 200, 131, 1, 190], np.int32)
    rows, _, c_pad, r_pad, q, scale = attention_case(rng, kind, isa, 64, 16, 7, row_end)
    m, l, o = T.mla_partial(isa, kind, rows, c_pad, r_pad, q, 0, row_end, scale)
    for i, end in enumerate(row_end):
        for heads in [slice(0, 1), slice(2, 7), slice(3, 7), slice(6, 7)]:
            qi = np.ascontiguousarray(q[i : i + 1, heads])
            one = T.mla_partial(isa, kind, rows[:end], c_pad, r_pad, qi, 0, row_end[i : i + 1], scale)
            for all_rows, alone in zip((m, l, o), one, strict=True):
                assert all_rows[i, heads].tobytes() == alone[0].tobytes()


@every_isa
def test_mla_dot_instruction_gives_the_bits_of_multiply_adds(isa: str, rng: np.random.Generator) -> None:
    """bf16 cache, odd and even numbers of positions, blocks of heads of every size; trivially so in sets without it."""
    for c, dr, heads in [(512, 64, 16), (64, 16, 5), (96, 48, 33), (40, 20, 1)]:
        row_end = np.array([*rng.integers(1, PARTIAL + 1, 3), 1, 64], np.int32)
        rows, _, c_pad, r_pad, q, scale = attention_case(rng, "bf16", isa, c, dr, heads, row_end)
        with_dot, without = (
            T.mla_partial(isa, "bf16", rows, c_pad, r_pad, q, 0, row_end, scale, dot) for dot in (True, False)
        )
        for a, b in zip(with_dot, without, strict=True):
            assert a.tobytes() == b.tobytes()


@every_isa
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_mla_never_uses_later_positions(isa: str, kind: str, rng: np.random.Generator) -> None:
    row_end = np.array([70, 5, 64, 130], np.int32)
    rows, _, c_pad, r_pad, q, scale = attention_case(rng, kind, isa, 64, 16, 5, row_end)
    clean = T.mla_partial(isa, kind, rows, c_pad, r_pad, q, 0, row_end, scale)
    for i, end in enumerate(row_end):  # NaN (q8: NaN scales) from each row's own end on, other rows present
        poisoned = rows.copy()
        poisoned[end:] = 0xFF
        got = T.mla_partial(isa, kind, poisoned, c_pad, r_pad, q, 0, np.minimum(row_end, 130).astype(np.int32), scale)
        for a, b in zip(clean, got, strict=True):
            assert a[i].tobytes() == b[i].tobytes()


@every_isa
def test_mla_rows_without_positions(isa: str, rng: np.random.Generator) -> None:
    row_end = np.array([2 * PARTIAL + 6, 2 * PARTIAL, 7], np.int32)
    rows, _, c_pad, r_pad, q, scale = attention_case(rng, "f32", isa, 32, 16, 2, row_end)
    m, l, o = T.mla_partial(isa, "f32", rows, c_pad, r_pad, q, 2 * PARTIAL, row_end, scale)
    assert np.isfinite(m[0]).all()
    assert (m[1:] == -np.inf).all()
    assert not l[1:].any()
    assert not o[1:].any()
    assert not T.mla_merge(isa, m[1:, 0], l[1:, 0], o[1:, 0]).any()
    first = T.mla_merge(isa, m[[1, 0], 0], l[[1, 0], 0], np.stack([np.full(c_pad, np.nan, np.float32), o[0, 0]]))
    assert np.allclose(first, o[0, 0] / l[0, 0], rtol=1e-6)


@every_isa
def test_mla_exponential_accuracy(isa: str, rng: np.random.Generator) -> None:
    """With one-hot latents o is the vector of exp(s_j - m) itself: 2 ulp down to the smallest normal number."""
    rows = np.zeros((64, 64 + 16), np.float32)
    rows[np.arange(64), np.arange(64)] = 1
    for spread in [1e-6, 0.1, 1, 10, 87]:
        s = -np.sort(rng.uniform(0, spread, 64)).astype(np.float32)
        s[0] = 0
        rows[:, 64] = s
        q = np.zeros((1, 1, 80), np.float32)
        q[..., 64] = 1
        m, l, o = T.mla_partial(isa, "f32", rows.view(np.uint8), 64, 16, q, 0, np.array([64], np.int32), 1.0)
        want = np.exp(s.astype(np.float64))
        ulp = np.abs(o[0, 0] - want) / np.spacing(want.astype(np.float32))
        assert ulp.max() <= 2, (spread, ulp.max())
        assert m[0, 0] == 0
        assert abs(l[0, 0] - want.sum()) <= 1e-6 * want.sum()
    rows[1:, 64] = [-87.4, -100, -1e30, *[-np.inf] * 60]
    o = T.mla_partial(isa, "f32", rows.view(np.uint8), 64, 16, q, 0, np.array([64], np.int32), 1.0)[2]
    assert np.array_equal(o[0, 0], [1] + [0] * 63)
    rows[5, 64] = np.nan
    m, l, o = T.mla_partial(isa, "f32", rows.view(np.uint8), 64, 16, q, 0, np.array([64], np.int32), 1.0)
    assert np.isnan(l[0, 0]), "a NaN must reach the logits"


# --- ceilings and rates ---------------------------------------------------------------------------------------------


@pytest.mark.by_turns("isa", 1)  # the best
@every_isa
def test_rates_stand_below_their_ceilings(isa: str) -> None:
    top = _core.compute_ceilings(isa, 1)
    assert set(top) == ({"f32", "bf16", "int8"} if isa in ("avx512x", "amx") else {"f32"})
    assert all(rate > 0.1 for rate in top.values())
    if isa in ("avx512x", "amx"):  # the instruction of each format bounds its kernel; 1.3 covers a changing clock
        for fmt, kind in [("f32", "f32"), ("bf16", "bf16"), ("f8", "bf16"), ("q8", "int8"), ("q4", "int8")]:
            assert 0 < _core.inner_loop_rate(isa, fmt, 1, 8) < 1.3 * top[kind], fmt
    assert 0 < _core.attention_rate(isa, "f16", 3, 9, 65) < 1.3 * top["f32"]
    with pytest.raises(ValueError, match="rows must be positive"):
        _core.inner_loop_rate(isa, "q8", 1, 0)
    with pytest.raises(ValueError, match="unknown or not supported"):
        _core.compute_ceilings("sse9", 1)
