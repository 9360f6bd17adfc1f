"""The extension module (python/bindings.cc, bind_pack.cc, bind_probe.cc); raises the classes of deepcalm.errors."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

_U8 = npt.NDArray[np.uint8]
_I32 = npt.NDArray[np.int32]
_F32 = npt.NDArray[np.float32]

__version__: str
TILE_ROWS: int
TILE_COLS: int
testing: ModuleType  # addresses of kernels and hooks, for tests/

# ---- formats, manifest, packing (bind_pack.cc)

def formats() -> list[dict[str, Any]]: ...
def validate_config(config: Mapping[str, Any]) -> None: ...
def expected_tensors(config: Mapping[str, Any]) -> list[dict[str, Any]]: ...
def pack_rows(
    out: _U8,
    out_offset: int,
    tile_stride: int,
    format: str,
    format_scale: str,
    rows: int,
    cols: int,
    index: _I32,
    transpose: bool,
    exact: bool,
    kind: str,
    data: _U8,
    first_row: int = 0,
    scale: npt.NDArray[Any] | None = None,
    block_rows: int = 1,
    block_cols: int = 32,
    scale_dtype: str = "",
    out_scales: _F32 | None = None,
    scale_rows: int = 128,
    scale_cols: int = 128,
    near_zero: npt.NDArray[np.int64] | None = None,
) -> tuple[int, int] | None: ...
def convert_rows(
    out: npt.NDArray[Any],
    to: str,
    kind: str,
    data: _U8,
    cols: int,
    first_row: int = 0,
    scale: npt.NDArray[Any] | None = None,
    block_rows: int = 1,
    block_cols: int = 32,
    scale_dtype: str = "",
    near_zero: npt.NDArray[np.int64] | None = None,
) -> tuple[int, int] | None: ...
def unpack_slice(
    data: _U8,
    scales: _F32 | None,
    format: str,
    format_scale: str,
    n_slices: int,
    rows: int,
    cols: int,
    scale_rows: int = 128,
    scale_cols: int = 128,
    slice: int = 0,
) -> _F32: ...

# ---- rates (bind_probe.cc)

def read_bandwidth(threads: int, mib: int = 512, repeats: int = 3) -> float: ...
def compute_ceilings(isa: str, threads: int) -> dict[str, float]: ...
def inner_loop_rate(isa: str, format: str, threads: int, rows: int = 64) -> float: ...
def attention_rate(isa: str, kv: str, heads: int, rows: int, positions: int) -> float: ...

# ---- the runtime (bindings.cc)

def isas() -> list[dict[str, Any]]: ...
def default_threads() -> int: ...
def swap_float_mode(mode: bytes | None) -> bytes: ...
def sample(
    logits: _F32, temp: float, top_k: int, top_p: float, min_p: float, seed: int, pos: int, n_valid: int
) -> int: ...
def dlpack(
    owner: object, address: int, shape: Sequence[int], type: str, device_type: int, device_id: int
) -> object: ...
def gumbel(seed: int, pos: int, v: int) -> float: ...

class Model:
    def __init__(
        self,
        path: str | bytes,
        fd: int,
        cfg: Mapping[str, Any],
        tensors: Sequence[Mapping[str, Any]],
        isa: str | None = None,
        threads: int = 0,
        device: str | bytes | None = None,
        fill_seed: int = 0,
        adaptive: bool = False,
    ) -> None: ...
    @property
    def device_name(self) -> str: ...
    @property
    def weight_bytes(self) -> dict[str, int]: ...
    @property
    def isa(self) -> str: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    def fileno(self) -> int: ...
    def lock(self, path: str | bytes) -> None: ...
    def active_bytes_per_token(self, ctx_pos: int, kv: str) -> int: ...

class Session:
    def __init__(self, model: Model, ctx: int, kv: str, max_rows: int, mtp: bool = False) -> None: ...
    @property
    def pos(self) -> int: ...
    @property
    def mtp_pos(self) -> int: ...
    @property
    def ctx(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def tokens(self) -> _I32: ...
    def forward(self, ids: _I32, logits: str = "last") -> _F32: ...
    def mtp_forward(self, ids: _I32, hidden: _F32, logits: str = "last") -> tuple[_F32, _F32]: ...
    def draft_round(
        self,
        token: int,
        k: int,
        temp: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        n_valid: int,
        min_confidence: float = 0.0,
        want_logits: bool = False,
        forced: npt.NDArray[Any] | Sequence[int] | None = None,
    ) -> dict[str, Any]: ...
    def expert_union(self) -> list[tuple[int, int]]: ...
    def decode_start(
        self,
        token: int,
        temp: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        n_valid: int,
        max_tokens: int,
        eos: npt.NDArray[Any] | Sequence[int],
    ) -> None: ...
    def decode_step(self, k: int) -> None: ...
    def decode_poll(self) -> list[dict[str, Any]]: ...
    def decode_finish(self) -> None: ...
    def device_view(self, name: str) -> tuple[int, tuple[int, ...], str]: ...
    def device_report(self, what: str) -> str: ...
    def hidden(self) -> _F32: ...
    def truncate(self, n: int) -> None: ...
    def read_cache(self, mtp: bool) -> _U8: ...
    def state(self) -> dict[str, npt.NDArray[Any]]: ...
    def load_state(
        self, tokens: npt.NDArray[Any], cache: npt.NDArray[Any], mtp_cache: npt.NDArray[Any], hidden: npt.NDArray[Any]
    ) -> None: ...
    def trace(self, names: Sequence[str] | None, feed: dict[str, npt.NDArray[Any]] = ...) -> None: ...
    def taps(self) -> dict[str, npt.NDArray[Any]]: ...
    def stats(self) -> dict[str, Any]: ...
    def stage_stats(self) -> list[tuple[str, int, int, float, float, float]]: ...
