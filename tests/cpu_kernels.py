"""Every CPU kernel of an instruction set on numpy arrays, called at the address in its table.

Kernels check nothing, so shapes are checked here. Output rows have guard elements on both sides, and scratch is NaN: a
kernel that writes elsewhere, or reads what nobody wrote, is seen.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np

from deepcalm import _core
from kernel_headers import constant, ctype, enum
from ref.formats import ACT_KIND, TILE_BYTES, ceil_div, round_up

Array = np.ndarray[Any, Any]
TABLES = {isa: ctype("CpuKernels").from_address(address) for isa, address in _core.testing.CPU_KERNELS.items()}
ISAS = list(TABLES)  # those that this processor runs, best first
ROUTE = c.CFUNCTYPE(None, c.c_void_p)(_core.testing.ROUTE)
PARTIAL = constant("kPartialLen")  # cache positions of a partial result
ACTIVATION = {"f32": np.float32, "bf16": np.uint16, "i8": np.int8}  # an element of each ActKind
for _name, _size in _core.testing.SIZES.items():
    assert c.sizeof(ctype(_name)) == _size, f"{_name}: the extension module was built from other headers"


def table(isa: str) -> Any:
    if isa not in TABLES:
        raise ValueError(f"isa {isa}: unknown or not supported by this processor")
    return TABLES[isa]


def take(a: Any, dtype: Any, *shape: int | None) -> Array:
    """`a` as kernels read it: contiguous, of the dtype and of the shape (None: any length)."""
    a = np.asarray(a)
    assert np.can_cast(a.dtype, dtype), a.dtype
    assert len(a.shape) == len(shape), a.shape
    assert all(want in (None, n) for n, want in zip(a.shape, shape, strict=True)), (a.shape, shape)
    out: Array = np.ascontiguousarray(a, dtype)
    return out


def view(a: Array) -> Any:
    """View of a contiguous array's rows."""
    return ctype("View")(a.ctypes.data, a.shape[1])


class Guarded:
    """Output rows [n, width], each at a multiple of 64 bytes and at least 64 guard elements away from anything else."""

    def __init__(self, n: int, width: int, dtype: Any = np.float32, fill: int = 0xA7) -> None:
        """fill: the byte that the rows hold until they are written; the guards hold 0xA7."""
        size = np.dtype(dtype).itemsize
        self.width, self.stride = width, round_up(width, 64) + 64
        raw = np.full((64 + n * self.stride) * size + 64, 0xA7, np.uint8)
        start = -raw.ctypes.data % 64
        self.all: Array = raw[start : start + (64 + n * self.stride) * size].view(dtype)
        self.rows = self.all[64:].reshape(n, self.stride)[:, :width]
        self.rows[...] = np.full(size, fill, np.uint8).view(dtype)[0]

    @property
    def data(self) -> int:
        return self.row(0)

    def row(self, i: int) -> int:
        return int(self.all.ctypes.data) + (64 + i * self.stride) * self.all.itemsize

    def view(self) -> Any:
        return ctype("View")(self.data, self.stride)

    def check(self) -> Array:
        """The rows, after a look at what lies before, between and behind them."""
        between = self.all[64:].reshape(-1, self.stride)[:, self.width :]
        for guard in (self.all[:64], np.ascontiguousarray(between)):
            if (guard.view(np.uint8) != 0xA7).any():
                raise RuntimeError("kernel wrote outside its output")
        out: Array = self.rows.copy()
        return out


def prepare(isa: str, kind: str, x: Array) -> tuple[Array, Any, Any]:
    """x f32 [n, cols] rounded for kind f32|bf16|i8: (x [n, round_up(cols, 32)], d, sum); d, sum only for i8."""
    x = take(x, np.float32, None, None)
    n, cols = x.shape
    out = Guarded(n, round_up(cols, 32), ACTIVATION[kind])
    groups = out.stride // 32  # the stride of d and sum follows from x's
    d, sums = Guarded(1, n * groups, np.float32, 0xFF), Guarded(1, n * groups, np.int32, 0xFF)
    a = ctype("Activation")(x=out.data, stride=out.stride)
    if kind == "i8":
        a.d, a.sum = d.data, sums.data
    for i in reversed(range(n)):
        table(isa).prepare[enum("ActKind")[kind]](x[i].ctypes.data, cols, c.byref(a), i)
    found = [g.check().reshape(n, groups) for g in (d, sums)]
    used = out.width // 32 if kind == "i8" else 0
    for g in found:
        if (np.ascontiguousarray(g[:, used:]).view(np.uint8) != 0xFF).any():
            raise RuntimeError("kernel wrote outside its output")
    rows = out.check()
    return (rows, found[0][:, :used].copy(), found[1][:, :used].copy()) if kind == "i8" else (rows, None, None)


def matmul(isa: str, fmt: str, w: Array, rows: int, cols: int, x: Array, d: Array | None = None,
           sum: Array | None = None, scales: Array | None = None, scale_block: tuple[int, int] = (128, 128),
           slice: int = 0, tile_begin: int = 0, tile_end: int = -1, x_row: Array | None = None,
           one_stream: bool | None = None) -> Array:  # fmt: skip
    """y f32 [n, 16 * tiles] = x (prepared) times one slice of w (uint8 tiles), padding rows included.

    one_stream: one of the two walks over a matrix; None: both, and their bits are the same.
    """
    if one_stream is None:
        args = isa, fmt, w, rows, cols, x, d, sum, scales, scale_block, slice, tile_begin, tile_end, x_row
        one, several = matmul(*args, True), matmul(*args, False)
        assert one.tobytes() == several.tobytes(), "bits depend on one_stream"
        return one
    w = take(w, np.uint8, None, ceil_div(rows, 16), ceil_div(cols, 32), TILE_BYTES[fmt])
    n_slices, row_tiles = w.shape[:2]
    tile_end = row_tiles if tile_end < 0 else tile_end
    assert 0 <= slice < n_slices
    assert 0 <= tile_begin <= tile_end <= row_tiles
    block_rows, block_cols = scale_block
    t = ctype("PackedTensor")(w.ctypes.data, None, enum("Format")[fmt], n_slices, rows, cols, block_rows, block_cols)
    if fmt == "f8":
        assert block_rows % 16 == block_cols % 32 == 0
        scales = take(scales, np.float32, n_slices, ceil_div(rows, block_rows), ceil_div(cols, block_cols))
        t.scales = scales.ctypes.data
    kind = ACT_KIND[fmt]
    x = take(x, ACTIVATION[kind], None, None)
    m, stride = x.shape
    assert stride % 32 == 0
    assert stride >= cols
    a = ctype("MatmulArgs")(w=c.addressof(t), slice=slice, tile_begin=tile_begin, tile_end=tile_end, n=m)
    a.x.x, a.x.stride, a.one_stream = x.ctypes.data, stride, one_stream
    if kind == "i8":
        d, sum = take(d, np.float32, m, stride // 32), take(sum, np.int32, m, stride // 32)
        a.x.d, a.x.sum = d.ctypes.data, sum.ctypes.data
    if x_row is not None:
        x_row = take(x_row, np.int32, None)
        assert 0 <= x_row.min() <= x_row.max() < m
        a.x_row, a.n = x_row.ctypes.data, len(x_row)
    y = Guarded(a.n, (tile_end - tile_begin) * 16)
    a.y = y.view()
    table(isa).matmul[t.format](c.byref(a))
    return y.check()


def rmsnorm(isa: str, x: Array, w: Array, eps: float, in_place: bool = False) -> Array:
    """w * x / rms(x), f32 [n]."""
    x, out = take(x, np.float32, None), Guarded(1, len(x))
    w = take(w, np.float32, len(x))
    if in_place:
        out.rows[0] = x
    table(isa).rmsnorm(out.data if in_place else x.ctypes.data, w.ctypes.data, out.data, len(x), eps)
    return out.check().reshape(-1)


def rope(isa: str, v: Array, cos: Array, sin: Array) -> Array:
    """Half-split rotation of v f32 [2 half]."""
    half, out = len(cos), Guarded(1, len(v))
    out.rows[0] = take(v, np.float32, 2 * half)
    cos, sin = take(cos, np.float32, half), take(sin, np.float32, half)
    table(isa).rope(out.data, cos.ctypes.data, sin.ctypes.data, half)
    return out.check().reshape(-1)


def swiglu(isa: str, gate_up: Array, n: int) -> Array:
    """silu(gate) * up of 16-interleaved gate_up, f32 [n]."""
    gate_up, out = take(gate_up, np.float32, 2 * round_up(n, 16)), Guarded(1, n)
    table(isa).swiglu(gate_up.ctypes.data, out.data, n)
    return out.check().reshape(-1)


def axpy(isa: str, a: float, x: Array, y: Array) -> Array:
    """fma(a, x, y), f32 [n]."""
    x, out = take(x, np.float32, None), Guarded(1, len(x))
    out.rows[0] = take(y, np.float32, len(x))
    table(isa).axpy(a, x.ctypes.data, out.data, len(x))
    return out.check().reshape(-1)


def cache_write(isa: str, kind: str, c_kv: Array, k_rope: Array) -> Array:
    """Cache rows of c_kv f32 [n, r] and k_rope f32 [n, dr], uint8 [n, row_bytes]."""
    c_kv = take(c_kv, np.float32, None, None)
    k_rope = take(k_rope, np.float32, len(c_kv), None)
    (n, r), dr = c_kv.shape, k_rope.shape[1]
    out = Guarded(n, _core.testing.cache_row_bytes(kind, round_up(r, 32), round_up(dr, 16)), np.uint8)
    for i in range(n):
        table(isa).cache_write(enum("CacheType")[kind], c_kv[i].ctypes.data, r, k_rope[i].ctypes.data, dr, out.row(i))
    return out.check()


def cache_read(isa: str, kind: str, rows: Array, c_pad: int, r_pad: int) -> Array:
    """f32 [n, c_pad + r_pad] of cache rows."""
    rows = take(rows, np.uint8, None, _core.testing.cache_row_bytes(kind, c_pad, r_pad))
    out = Guarded(len(rows), c_pad + r_pad)
    for i, row in enumerate(rows):
        table(isa).cache_read(enum("CacheType")[kind], row.ctypes.data, c_pad, r_pad, out.row(i))
    return out.check()


def mla_partial(isa: str, kind: str, cache: Array, c_pad: int, r_pad: int, q: Array, pos_begin: int, row_end: Array,
                softmax_scale: float, bf16_dot: bool = True) -> tuple[Array, Array, Array]:  # fmt: skip
    """(m [n, heads], l [n, heads], o [n, heads, c_pad]) of one partial; q f32 [n, heads, c_pad + r_pad]."""
    assert c_pad % 32 == r_pad % 16 == pos_begin % PARTIAL == 0
    cache = take(cache, np.uint8, None, _core.testing.cache_row_bytes(kind, c_pad, r_pad))
    q = take(q, np.float32, None, None, c_pad + r_pad)
    n, heads, width = q.shape
    row_end = take(row_end, np.int32, n)
    assert row_end.max() <= min(pos_begin + PARTIAL, len(cache))
    m, l, o = Guarded(n, heads), Guarded(n, heads), Guarded(n, heads * c_pad)
    scratch = Guarded(1, _core.testing.mla_scratch_bytes(c_pad, r_pad, n, heads), np.uint8, 0xFF)  # NaN everywhere
    a = ctype("MlaPartialArgs")(
        type=enum("CacheType")[kind],
        cache=view(cache),
        c_pad=c_pad,
        r_pad=r_pad,
        n_rows=n,
        n_heads=heads,
        q=view(q.reshape(n, heads * width)),
        pos_begin=pos_begin,
        row_end=row_end.ctypes.data,
        softmax_scale=softmax_scale,
        m=m.view(),
        l=l.view(),
        o=o.view(),
        scratch=scratch.data,
        bf16_dot=bf16_dot,
    )
    table(isa).mla_partial(c.byref(a))
    scratch.check()
    return m.check(), l.check(), o.check().reshape(n, heads, c_pad)


def mla_merge(isa: str, m: Array, l: Array, o: Array) -> Array:
    """One head's partials m, l [p], o [p, c_pad], merged in order and finished -> f32 [c_pad]."""
    o = take(o, np.float32, None, None)
    p, c_pad = o.shape
    assert c_pad % 32 == 0
    m, l = take(m, np.float32, p), take(l, np.float32, p)
    (sum_m, sum_l, sum_o, out), struct = (Guarded(1, n) for n in (1, 1, c_pad, c_pad)), ctype("MlaSums")
    sums = struct(m=sum_m.data, l=sum_l.data, o=sum_o.view())
    sum_m.rows[0], sum_l.rows[0], sum_o.rows[0] = m[0], l[0], o[0]
    for i in range(1, p):
        later = struct(m=m[i:].ctypes.data, l=l[i:].ctypes.data, o=ctype("View")(o[i:].ctypes.data, c_pad))
        table(isa).mla_merge(c.byref(sums), c.byref(later), 1, c_pad)
    table(isa).mla_finish(c.byref(sums), c_pad, out.data)
    for guarded in (sum_m, sum_l, sum_o):
        guarded.check()
    return out.check().reshape(-1)


def route(gate_logits: Array, bias: Array | None, k: int, n_group: int, topk_group: int, scoring: str, method: str,
          norm_topk_prob: bool, scale: float) -> tuple[Array, Array]:  # fmt: skip
    """(topk_idx int32 [n, k], topk_weight f32 [n, k]) of gate_logits f32 [n, n_routed_experts]."""
    gate_logits = take(gate_logits, np.float32, None, None)
    n, experts = gate_logits.shape
    assert 0 < k <= experts
    assert experts % n_group == 0
    assert 0 < topk_group <= n_group
    bias = None if bias is None else take(bias, np.float32, experts)
    idx, weight, scratch = Guarded(n, k, np.int32), Guarded(n, k), Guarded(1, 2 * experts + n_group)
    for i in range(n):
        args = ctype("RouterArgs")(
            gate_logits=gate_logits[i].ctypes.data,
            bias=None if bias is None else bias.ctypes.data,
            n_routed_experts=experts,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=enum("ScoringFunc")[scoring],
            topk_method=enum("TopkMethod")[method],
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=scale,
            scratch=scratch.data,
            topk_idx=idx.row(i),
            topk_weight=weight.row(i),
        )
        ROUTE(c.byref(args))
    scratch.check()
    return idx.check(), weight.check()
