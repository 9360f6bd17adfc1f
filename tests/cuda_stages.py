"""ctypes view of the stages in the simulator: mirrors of the structs in ``kernels/cuda/stages.h``, and their launch.

Arrays are passed by address, so every array given to a struct must stay alive until :func:`Stages.run` returns.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ref import formats

ROOT = Path(__file__).resolve().parent.parent
FORMAT = {"f32": 0, "bf16": 1, "f16": 2, "f8": 3, "q8": 4, "q4": 5, "q4b": 6}
CACHE = {"f32": 0, "f16": 1, "bf16": 2, "q8": 3}
PREFILL_BLOCKS = 4
I32, I64, F32, PTR, U8 = c.c_int32, c.c_int64, c.c_float, c.c_void_p, c.c_uint8


def struct(name: str, *fields: tuple[str, Any]) -> Any:
    return type(name, (c.Structure,), {"_fields_": [(f, t) for f, t in fields]})


Matrix = struct(
    "Matrix", ("data", PTR), ("scales", PTR), ("format", U8), ("rows", I32), ("cols", I32), ("row_tiles", I32), ("col_tiles", I32),
    ("tile_bytes", I32), ("scale_rows", I32), ("scale_cols", I32), ("slice_bytes", I64), ("slice_scales", I64),
)  # fmt: skip
Rows = struct("Rows", ("n", I32), ("n_live", PTR), ("pos", PTR))
Norm = struct("Norm", ("w", PTR), ("w2", PTR), ("width", I32), ("eps", F32), ("out", PTR), ("out_stride", I64))
Routing = struct(
    "Routing", ("logits", PTR), ("logits_stride", I64), ("bias", PTR), ("n_experts", I32), ("topk", I32), ("n_group", I32),
    ("topk_group", I32), ("scoring_func", U8), ("topk_method", U8), ("norm_topk_prob", c.c_bool), ("scale", F32),
    ("topk_idx", PTR), ("topk_weight", PTR),
)  # fmt: skip
ARGS = {
    "embed": struct(
        "Embed", ("rows", Rows), ("ids", PTR), ("table", PTR), ("format", U8), ("vocab", I32), ("d", I32), ("x", PTR),
        ("x_stride", I64), ("hidden", PTR), ("hidden_stride", I64),
    ),
    "product": struct(
        "Product", ("rows", Rows), ("w", Matrix), ("x", PTR), ("x_stride", I64), ("norm", Norm), ("y", PTR), ("y_stride", I64),
        ("add", c.c_bool), ("tap", PTR), ("tap_stride", I64),
    ),
    "absorb": struct(
        "Absorb", ("rows", Rows), ("w_uk", Matrix), ("n_heads", I32), ("dn", I32), ("dr", I32), ("r", I32), ("c_pad", I32),
        ("r_pad", I32), ("q", PTR), ("q_stride", I64), ("kv", PTR), ("kv_stride", I64), ("kv_norm", PTR), ("eps", F32),
        ("cos", PTR), ("sin", PTR), ("ctx", I32), ("type", U8), ("cache", PTR), ("row_bytes", I64), ("q_full", PTR),
        ("q_tap", PTR), ("c_tap", PTR), ("k_tap", PTR),
    ),
    "attend": struct(
        "Attend", ("rows", Rows), ("n_heads", I32), ("c_pad", I32), ("r_pad", I32), ("ctx", I32), ("softmax_scale", F32),
        ("q_full", PTR), ("type", U8), ("cache", PTR), ("row_bytes", I64), ("unit_chunks", I32), ("max_units", I32),
        ("part_o", PTR), ("part_ml", PTR),
    ),
    "value": struct(
        "Value", ("rows", Rows), ("w_uv", Matrix), ("n_heads", I32), ("dv", I32), ("c_pad", I32), ("ctx", I32),
        ("unit_chunks", I32), ("max_units", I32), ("part_o", PTR), ("part_ml", PTR), ("v", PTR), ("v_stride", I64),
        ("latent_tap", PTR),
    ),
    "ffn_in": struct(
        "FfnIn", ("rows", Rows), ("x", PTR), ("x_stride", I64), ("norm", Norm), ("w_gate_up", Matrix), ("width", I32), ("h", PTR),
        ("h_stride", I64), ("router", Matrix), ("logits", PTR), ("logits_stride", I64),
    ),
    "route": struct("Route", ("rows", Rows), ("routing", Routing)),
    "experts": struct(
        "Experts", ("rows", Rows), ("x", PTR), ("x_stride", I64), ("norm", Norm), ("w", Matrix), ("width", I32),
        ("routing", Routing), ("h", PTR), ("h_stride", I64),
    ),
    "down": struct(
        "Down", ("rows", Rows), ("experts", Matrix), ("routing", Routing), ("h", PTR), ("h_stride", I64), ("shared", Matrix),
        ("shared_h", PTR), ("shared_h_stride", I64), ("x", PTR), ("x_stride", I64), ("routed", PTR), ("shared_tap", PTR),
    ),
    "head": struct(
        "Head", ("rows", Rows), ("first_row", I32), ("x", PTR), ("x_stride", I64), ("norm", Norm), ("w", Matrix),
        ("n_valid", I32), ("logits", PTR), ("logits_stride", I64), ("choice", PTR), ("best_value", PTR), ("best_id", PTR),
        ("arrived", PTR),
    ),
}  # fmt: skip


class LaunchSpec(c.Structure):
    _fields_ = [("nb", I32), ("grid", I32), ("threads", I32), ("dependent", I32)]


def ptr(a: np.ndarray[Any, Any] | None) -> int | None:
    return None if a is None else a.ctypes.data


def aligned(shape: tuple[int, ...], dtype: Any = np.float32, fill: float | None = None) -> np.ndarray[Any, Any]:
    """An array at a multiple of 64 bytes; poisoned with 0xFF bytes (NaN) unless `fill` is given."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(n + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + n].view(dtype).reshape(shape)
    if fill is not None:
        out[...] = fill
    return out


def to_aligned(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = aligned(a.shape, a.dtype)
    out[...] = a
    return out


def rows(n: int, pos: np.ndarray[Any, Any] | None = None, live: np.ndarray[Any, Any] | None = None) -> Any:
    return Rows(n, ptr(live), ptr(pos))


def matrix(p: formats.Packed, keep: list[Any], rows: int | None = None) -> Any:
    """The struct of a packed tensor; its bytes are copied to aligned memory that `keep` holds. rows: of a slice, where
    the packed rows are padded."""
    data = to_aligned(p.data)
    scales = None if p.scales is None else to_aligned(p.scales)
    keep += [data, scales]
    _, nr, nc, tile = p.data.shape
    br, bc = p.scale_block
    r, cols = p.values.shape[1:]
    return Matrix(
        ptr(data), ptr(scales), FORMAT[p.fmt], rows or r, cols, nr, nc, tile, br, bc, nr * nc * tile,
        0 if scales is None else scales.shape[1] * scales.shape[2],
    )  # fmt: skip


class Stages:
    """The test library. Launches queue; :meth:`run` executes them in order."""

    def __init__(self, path: Path) -> None:
        self.lib = c.CDLL(str(path))
        for name, kind in ARGS.items():
            size = getattr(self.lib, f"dc_test_sizeof_{name}")
            size.restype = I64
            assert size() == c.sizeof(kind), f"{name}: {size()} bytes in C++, {c.sizeof(kind)} here"

    def launch(self, name: str, args: Any, nb: int = 1, grid: int = 3, threads: int = 64, dependent: bool = False) -> None:
        getattr(self.lib, f"dc_test_{name}")(c.byref(args), c.byref(LaunchSpec(nb, grid, threads, int(dependent))))

    def run(self) -> None:
        self.lib.dc_test_run()

    def __call__(self, name: str, args: Any, **kw: Any) -> None:
        self.launch(name, args, **kw)
        self.run()


@contextmanager
def thread_order(order: str) -> Iterator[None]:
    os.environ["DEEPCALM_SIM_ORDER"] = order
    try:
        yield
    finally:
        del os.environ["DEEPCALM_SIM_ORDER"]


def rmsnorm(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any], eps: float) -> np.ndarray[Any, Any]:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w.astype(np.float64)


def rounded(fmt: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a product with weights of `fmt` makes of f32 activations x [n, cols]: docs/model.md 7.1, and for f16 on the GPU f16 with
    a power-of-two scale per row and 512 columns."""
    if fmt != "f16":
        return formats.round_activations(formats.ACT_KIND[fmt], x)
    out = x.astype(np.float64)
    for at in range(0, x.shape[1], 512):
        part = out[:, at : at + 512]
        top = np.abs(part).max(1, keepdims=True)
        scale = np.exp2(14 - np.floor(np.log2(np.where(top > 0, top, 1))))
        out[:, at : at + 512] = (part * scale).astype(np.float16).astype(np.float64) / scale
    return out
