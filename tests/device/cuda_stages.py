"""The single stages of a device library: the structs in ``kernels/cuda/args.h`` as ctypes, and their launch.

Arrays are passed by address, so every array given to a struct must stay alive until :func:`Stages.run` returns: numpy's
in the simulator, cupy's on a GPU, or numpy's there too where a :class:`Mirror` is in place.
"""

from __future__ import annotations

import ctypes as c
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kernel_headers import TEXT, ctype, enum
from ref import formats

FORMAT, CACHE = enum("Format"), enum("CacheType")
PREFILL_BLOCKS = 4
FIT = {PREFILL_BLOCKS: 0, 2: 1, 1: 3}  # the generous way of each number of column blocks in kFits, which has 8
FITS = 8
I32, I64 = c.c_int32, c.c_int64
Matrix, Rows, Norm, View = map(ctype, ("Matrix", "PassRows", "Norm", "View"))
Routing, RouterArgs, LatentCache, Partials = map(ctype, ("Routing", "RouterArgs", "LatentCache", "Partials"))
ARGS = {stage: ctype(args) for args, stage in re.findall(r'struct (\w+) {\s*static constexpr \w+ kStage{"(\w+)"', TEXT)}


class LaunchSpec(c.Structure):
    _fields_ = [
        *((name, I32) for name in ("fit", "grid", "threads", "dependent")),
        *((name, I64) for name in ("smem", "need")),
        ("long_pass", I32),
    ]


class Mirror:
    """Arrays of a device module ``xp`` beside the numpy arrays that stages get: written before launches, read after."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.pairs: dict[tuple[int, int], tuple[np.ndarray[Any, Any], Any]] = {}  # bytes on the host, on the device

    def address(self, a: np.ndarray[Any, Any]) -> int:
        key = a.ctypes.data, a.nbytes
        if key not in self.pairs:
            host = a.reshape(-1).view(np.uint8)
            assert np.shares_memory(host, a), "not contiguous"
            self.pairs[key] = host, self.xp.array(host)
        return device_address(self.pairs[key][1])

    def up(self) -> None:
        for host, there in self.pairs.values():
            there[...] = self.xp.asarray(host)

    def down(self) -> None:
        for host, there in self.pairs.values():
            if host.flags.writeable:
                host[...] = there.get() if hasattr(there, "get") else there


mirror: Mirror | None = None  # set while tests run on a GPU


def device_address(a: Any) -> int:
    """Of a cupy array or of anything else that shows its memory."""
    return int((getattr(a, "__cuda_array_interface__", None) or a.__array_interface__)["data"][0])


def ptr(a: Any | None) -> int | None:
    if a is None:
        return None
    return mirror.address(a) if mirror and isinstance(a, np.ndarray) else device_address(a)


def view(a: Any | None) -> Any:
    """The struct of an array's rows; null for None."""
    return View() if a is None else View(ptr(a), a.size // len(a))


def aligned(shape: tuple[int, ...], dtype: Any = np.float32, fill: float | None = None) -> np.ndarray[Any, Any]:
    """An array at a multiple of 64 bytes; poisoned with 0xFF bytes (NaN) unless `fill` is given."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(n + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64
    out: np.ndarray[Any, Any] = raw[start : start + n].view(dtype).reshape(shape)
    if fill is not None:
        out[...] = fill
    return out


def to_aligned(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = aligned(a.shape, a.dtype)
    out[...] = a
    return out


def rows(n: int, pos: np.ndarray[Any, Any] | None = None, live: np.ndarray[Any, Any] | None = None) -> Any:
    return Rows(n, ptr(live), ptr(pos))


def matrix(p: formats.Packed, keep: list[Any], rows: int | None = None, to: Any = to_aligned) -> Any:
    """The struct of a packed tensor; its bytes are copied `to` aligned memory that `keep` holds. rows: of a slice,
    where the packed rows are padded."""
    data = to(p.data)
    scales = None if p.scales is None else to(p.scales)
    keep += [data, scales]
    _, nr, nc, tile = p.data.shape
    br, bc = p.scale_block
    r, cols = p.values.shape[1:]
    return Matrix(
        ptr(data),
        ptr(scales),
        FORMAT[p.fmt],
        rows or r,
        cols,
        nr,
        nc,
        tile,
        br,
        bc,
        nr * nc * tile,
        0 if scales is None else scales.shape[1] * scales.shape[2],
    )


class Stages:
    """The single stages of a device library; ``xp``: cupy, on a GPU. Launches queue, :meth:`run` waits for them."""

    def __init__(self, path: Path, xp: Any = np) -> None:
        library = c.CDLL(str(path))
        self.call, self.xp, self.idle = library.deepcalm_stage, xp, True
        self.call.argtypes = (c.c_char_p, c.c_void_p, I64, c.c_void_p)

    def launch(
        self,
        name: str,
        args: Any,
        nb: int = 1,
        grid: int = 3,
        threads: int = 64,
        dependent: bool = False,
        fit: int | None = None,
    ) -> None:
        """nb: column blocks; fit: index of kFits instead."""
        if self.idle and mirror:
            mirror.up()
        self.idle = False
        if self.xp is not np:  # its arrays are filled by another stream
            self.xp.cuda.Device().synchronize()
        spec = LaunchSpec(FIT[nb] if fit is None else fit, grid, threads, int(dependent))
        self._call(name, args, spec)

    def _call(self, name: str, args: Any, spec: LaunchSpec) -> None:
        code = self.call(name.encode(), c.byref(args), c.sizeof(args), c.byref(spec))
        assert code == 0, f"{name}: error {code} (-2: its struct has another size in C++)"

    def run(self) -> None:
        code, self.idle = self.call(None, None, 0, None), True
        assert code == 0, f"error {code}"
        if mirror:
            mirror.down()

    def fit(self, name: str, args: Any, long_pass: bool, smem: int) -> tuple[int, int]:
        """(index of kFits, bytes of shared memory) of a stage on a device that gives a block ``smem`` bytes."""
        spec = LaunchSpec(smem=smem, long_pass=int(long_pass))
        self._call(name, args, spec)
        return spec.fit, spec.need

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
    out: np.ndarray[Any, Any] = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w.astype(np.float64)
    return out


def rounded(fmt: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The f64 values that a product with weights of `fmt` uses for x f32 [n, cols] (docs/model.md 7.1). Beside f16
    weights the GPU rounds to f16 under a power-of-two scale per row and 512 columns."""
    if fmt != "f16":
        return formats.round_activations(formats.ACT_KIND[fmt], x)
    out: np.ndarray[Any, Any] = x.astype(np.float64)
    for at in range(0, x.shape[1], 512):
        part = out[:, at : at + 512]
        top = np.abs(part).max(1, keepdims=True)
        scale = np.exp2(14 - np.floor(np.log2(np.where(top > 0, top, 1))))
        out[:, at : at + 512] = (part * scale).astype(np.float16).astype(np.float64) / scale
    return out


def generator(seed: int) -> np.random.Generator:
    """The values of a test; others where $DEEPCALM_TEST_SEED says so."""
    return np.random.default_rng(seed + 1000 * int(os.environ.get("DEEPCALM_TEST_SEED", "0")))
