"""The packer: a Hugging Face checkpoint folder -> one ``.dcalm`` file in the layout in which it runs.

``plan`` decides every tensor's format and says what is converted or dropped; ``pack`` carries the plan out in slabs of
row tiles, with bounded memory, in two threads (read and convert; hash and write), and can be resumed after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepcalm import _core
from deepcalm.checkpoint import Checkpoint, Weight, source_names
from deepcalm.container import ALIGN, build_header
from deepcalm.errors import CheckpointError, ResourceError, UnsupportedError

FORMAT_VERSION = "1"
DTYPES = ("source", "f32", "bf16", "f16", "f8", "q8", "q4")
SLAB_BYTES = 8 << 20  # output and source bytes of one step; three output buffers are in flight
_TILE_BYTES = {(f["name"], f["scale"]): f["tile_bytes"] for f in _core.formats()}
_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_SOURCE_NAMES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "f8": "F8_E4M3", "i4": "I4"}
Progress = Callable[[int, int], None]
Index = npt.NDArray[np.int32]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True, slots=True)
class RowMap:
    """Checkpoint rows start..start+count-1 in packed order.

    rope = (period, begin): in every period of rows, those from ``begin`` on are rotary pairs (2j, 2j+1) in the
    checkpoint and half-split (j, j + n/2) in the packed file.
    """

    start: int
    count: int
    rope: tuple[int, int] | None = None

    def index(self, begin: int, end: int) -> Index:
        """[end - begin] checkpoint row of each packed row begin..end-1."""
        rows = np.arange(self.start + begin, self.start + end, dtype=np.int32)
        if self.rope is not None:
            period, first = self.rope
            j = rows % period - first  # position inside the rope rows, negative before them
            half = (period - first) // 2
            rows = np.where(j < 0, rows, rows - j + 2 * (j % half) + j // half).astype(np.int32)
        return rows


@dataclass(frozen=True, slots=True)
class Part:
    """One source weight's share of a slice: packed [rows, cols]. transpose: ``take`` selects packed columns."""

    weight: Weight
    take: RowMap
    rows: int
    cols: int
    transpose: bool = False

    def block_ids(self) -> tuple[Index, Index]:
        """f8: which scale block of the source every packed row and every packed column comes from."""
        taken, other = self.take.index(0, self.take.count), np.arange(self.rows if self.transpose else self.cols)
        a, b = taken // self.weight.block[0], (other // self.weight.block[1]).astype(np.int32)
        return (b, a) if self.transpose else (a, b)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the packed file: what it is made of and how it is stored."""

    name: str
    role: str
    kind: str  # "tiled" | "plain"
    format: str
    scale: str  # dtype of the scales inside or beside the tiles, "" without
    shape: tuple[int, ...]
    parts: tuple[int, ...]  # natural rows of stacked parts, () for one
    interleaved: bool
    scale_block: tuple[int, int] | None  # f8
    exact: bool  # the source's own codes are kept
    source_dtype: str  # "BF16", or "BF16+F8_E4M3" for mixed parts
    note: str
    slices: list[list[Part]] = field(repr=False)

    @property
    def sources(self) -> list[str]:
        """Names of the checkpoint weights, each once, in order."""
        return list(dict.fromkeys(part.weight.name for parts in self.slices for part in parts))

    @property
    def row_tile_bytes(self) -> int:
        """Bytes of one row tile (tiled), or of one row (plain)."""
        cols = self.shape[-1]
        if self.kind == "plain":
            return cols * _ELEMENT_BYTES[self.format]
        return -(-cols // _core.TILE_COLS) * _TILE_BYTES[self.format, self.scale]

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        return self.row_tile_bytes * (rows if self.kind == "plain" else -(-rows // _core.TILE_ROWS))

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensor itself, without padding and without f8 scales."""
        return self.slice_bytes * len(self.slices)

    @property
    def scale_shape(self) -> tuple[int, int, int] | None:
        """[n_slices, block rows, block columns] of the f8 scales, else None."""
        if self.scale_block is None:
            return None
        rows, cols = self.shape[-2:]
        return len(self.slices), -(-rows // self.scale_block[0]), -(-cols // self.scale_block[1])

    @property
    def scale_bytes(self) -> int:
        """Bytes of the f8 scale tensor beside it, 0 without."""
        return 0 if self.scale_shape is None else 4 * int(np.prod(self.scale_shape))

    @property
    def bytes(self) -> int:
        """All stored bytes."""
        return self.data_bytes + self.scale_bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """A checkpoint tensor that is not in the packed file, and why."""

    name: str
    why: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that ``pack`` will do. ``notes`` are sentences the user should read."""

    config: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, str]
    tensors: list[PlannedTensor]
    files: dict[str, bytes] = field(repr=False)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors as stored, padding included."""
        sizes = [n for t in self.tensors for n in (t.data_bytes, t.scale_bytes)] + [len(d) for d in self.files.values()]
        return sum(_up(n, ALIGN) for n in sizes)

    @property
    def source_bytes(self) -> int:
        """Checkpoint bytes that are read; a weight used twice counts once."""
        weights = {p.weight.name: p.weight for t in self.tensors for parts in t.slices for p in parts}
        return sum(w.nbytes for w in weights.values())

    @property
    def active_bytes_per_token(self) -> int:
        """Weight bytes that decoding one token reads: see ``active_bytes``."""
        return sum(active_bytes(t.name, t.role, t.bytes, t.shape, self.config) for t in self.tensors)


def active_bytes(name: str, role: str, n_bytes: int, shape: tuple[int, ...], config: dict[str, Any]) -> int:
    """Bytes of one tensor that a decode step reads: chosen experts only, one embedding row, no MTP layer."""
    if name.startswith("mtp."):
        return 0
    if role == "embed":
        return n_bytes // shape[0]
    if role == "expert":
        return n_bytes // shape[0] * int(config["num_experts_per_tok"])
    return n_bytes


# ---- planning -------------------------------------------------------------------------------------------------------


def _slices(spec: dict[str, Any], ckpt: Checkpoint) -> list[list[Part]]:
    """The parts of every slice of an expected tensor."""
    cfg, name = ckpt.config, spec["name"]
    rest = name.split(".", 2)[2] if name.startswith("layers.") else name.removeprefix("mtp.")
    names = list(source_names(name, spec["n_slices"], ckpt))
    rows, cols = spec["rows"], spec["cols"]
    heads, dn, dr = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
    r, dv = cfg["kv_lora_rank"], cfg["v_head_dim"]
    interleaved = ckpt.raw_config.get("rope_interleave") is not False
    q_rope = (dn + dr, dn) if interleaved else None

    if not spec["cols"]:
        return [[Part(ckpt.weight(names[0], (rows,)), RowMap(0, 1), 1, rows)]]
    if rest in ("w_uk", "w_uv"):
        w = ckpt.weight(names[0], (heads * (dn + dv), r))
        if rest == "w_uk":
            return [[Part(w, RowMap(h * (dn + dv), dn), r, dn, transpose=True)] for h in range(heads)]
        return [[Part(w, RowMap(h * (dn + dv) + dn, dv), dv, r)] for h in range(heads)]
    if rest == "wqkv_a":
        ropes = (None if cfg["q_lora_rank"] else q_rope, (r + dr, r) if interleaved else None)
        weights = [ckpt.weight(n, (p, cols)) for n, p in zip(names, spec["parts"], strict=True)]
        return [[Part(w, RowMap(0, w.rows, rope), w.rows, cols) for w, rope in zip(weights, ropes, strict=True)]]
    parts = spec["parts"] or [rows]
    weights = [ckpt.weight(n, (parts[i % len(parts)], cols)) for i, n in enumerate(names)]
    rope = q_rope if rest == "wq_b" else None
    flat = [Part(w, RowMap(0, w.rows, rope), w.rows, cols) for w in weights]
    return [flat[i : i + len(parts)] for i in range(0, len(flat), len(parts))]


def _tile_ids(slice_parts: list[Part], interleaved: bool) -> tuple[list[int], list[int]] | None:
    """f8: source block of every row tile and column tile of a slice; None where one tile mixes blocks."""

    def per_tile(ids: Index, tile: int) -> list[int] | None:
        padded = np.pad(ids, (0, -len(ids) % tile), mode="edge").reshape(-1, tile)
        return None if (padded != padded[:, :1]).any() else padded[:, 0].tolist()

    rows: list[list[int]] = []
    cols: list[list[int]] = []
    for i, part in enumerate(slice_parts):
        row_ids, col_ids = part.block_ids()
        row_tiles, col_tiles = per_tile(row_ids, _core.TILE_ROWS), per_tile(col_ids, _core.TILE_COLS)
        if row_tiles is None or col_tiles is None:
            return None
        rows.append([n * len(slice_parts) + i for n in row_tiles])
        cols.append(col_tiles)
    if any(c != cols[0] for c in cols):
        return None
    flat = [t for pair in zip(*rows, strict=True) for t in pair] if interleaved else [t for part in rows for t in part]
    return flat, cols[0]


def _f8_block(slices: list[list[Part]], interleaved: bool) -> tuple[int, int] | None:
    """The largest scale block (multiple of 16 x 32) under which every element keeps its source scale, or None."""

    def largest(tile_ids: list[list[int]], tile: int, block: int) -> int:
        # powers of two: the kernels' 128-column sums must nest with the blocks
        n = 1 << (block // tile).bit_length() - 1 if block >= tile else 1
        while not all(len(set(ids[i : i + n])) == 1 for ids in tile_ids for i in range(0, len(ids), n)):
            n //= 2
        return n * tile

    seen: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
    for parts in slices:
        key = tuple((p.take, p.rows, p.cols, p.transpose, p.weight.block) for p in parts)
        if key not in seen:
            ids = _tile_ids(parts, interleaved)
            if ids is None:
                return None
            seen[key] = ids
    first = slices[0][0]
    rows, cols = first.weight.block[::-1] if first.transpose else first.weight.block
    row_tiles, col_tiles = [ids[0] for ids in seen.values()], [ids[1] for ids in seen.values()]
    return largest(row_tiles, _core.TILE_ROWS, rows), largest(col_tiles, _core.TILE_COLS, cols)


def _choose(spec: dict[str, Any], slices: list[list[Part]], dtype: str) -> tuple[str, str, tuple[int, int] | None, bool, str]:
    """(format, scale dtype, f8 scale block, exact codes, note) of a tensor under the requested dtype of its role."""
    parts = [p for s in slices for p in s]
    kinds = {(p.weight.kind, p.weight.scale_dtype) for p in parts}
    kind, scale = next(iter(kinds))
    names = " and ".join(sorted({_SOURCE_NAMES[k] for k, _ in kinds}))
    allowed = spec["formats"]
    if allowed == ["f32"]:
        return "f32", "", None, False, ""
    if not spec["tiled"] or "q8" not in allowed:  # embedding, eh_proj: 16 bits or more
        if dtype in allowed:
            return dtype, "", None, False, ""
        if len(kinds) == 1 and kind in ("bf16", "f16"):
            return kind, "", None, False, ""
        return ("f32" if dtype == "source" else "bf16"), "", None, False, "" if kind == "f32" else f"never below bf16: was {names}"
    custom_block = (16 if len(slices[0]) > 1 else 128, 128)
    if dtype == "source" and len(kinds) > 1:
        return "f32", "", None, False, f"{names} in one tensor: f32 keeps both"
    if kinds == {("f8", "f32")} and dtype in ("source", "f8"):
        block = _f8_block(slices, spec["interleaved"])
        if block is not None:
            return "f8", "f32", block, True, "" if block == parts[0].weight.block else f"scale block {block[0]} x {block[1]}"
        if dtype == "source":
            return "f32", "", None, False, "scale blocks do not fit 16 x 32 tiles: f32"
        return "f8", "f32", custom_block, False, "scale blocks do not fit 16 x 32 tiles: quantised again"
    if kind == "i4" and len(kinds) == 1 and dtype in ("source", "q4"):
        if not any(p.transpose for p in parts):
            return "q4", scale, None, True, ""
        if dtype == "source":
            return "f32", "", None, False, "int4 cannot be transposed: f32"
    target = kind if dtype == "source" else dtype
    scales = {"f8": "f32", "q8": "f16", "q4": "f16"}
    return target, scales.get(target, ""), custom_block if target == "f8" else None, False, ""


def _dropped(ckpt: Checkpoint, used: set[str], notes: list[str]) -> list[Dropped]:
    """Every tensor of the checkpoint that the plan does not use."""
    cfg, mtp = ckpt.config, ckpt.mtp_prefix
    layers = f"{ckpt.prefix}model.layers."
    copies = {
        mtp + "embed_tokens.weight": ckpt.prefix + "model.embed_tokens.weight",
        mtp + "shared_head.head.weight": ckpt.prefix + "lm_head.weight",
    }
    if cfg["tie_word_embeddings"]:
        copies |= {name: ckpt.prefix + "model.embed_tokens.weight" for name in (*list(copies)[1:], ckpt.prefix + "lm_head.weight")}
    out = []
    for name, info in ckpt.tensors.items():
        if name in used:
            continue
        layer = name[len(layers) :].partition(".")[0] if name.startswith(layers) else ""
        number = int(layer) if layer.isascii() and layer.isdigit() and len(layer) < 7 else -1
        if name.endswith("rotary_emb.inv_freq"):
            why = "rope frequencies are computed from the configuration"
        elif not name.startswith(ckpt.prefix):
            why = "not part of the text model"
        elif number > cfg["num_hidden_layers"]:
            why = "further MTP module: only the first is used"
        elif number == cfg["num_hidden_layers"] and not cfg["num_nextn_predict_layers"]:
            why = f"MTP layer incomplete: {ckpt.mtp_dropped}" if ckpt.mtp_dropped else "MTP layer without eh_proj"
        elif name in copies and copies[name] in ckpt.tensors:
            same = _equal(ckpt, name, copies[name])
            why = f"copy of {copies[name]}" if same else f"differs from {copies[name]}, which is used instead"
            if not same:
                effect = "drafts may be accepted less often" if name.startswith(mtp) else "the head is tied to the embedding"
                notes.append(f"{name} differs from {copies[name]}; the latter is used ({effect})")
        elif name.endswith(("input_scale", "activation_scale", "k_scale", "v_scale")):
            why = "activation scale: activations are not quantised by the checkpoint's scales"
        else:
            why = "not part of this architecture"
        out.append(Dropped(name, why, info.nbytes))
    return out


def _equal(ckpt: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes (compared in pieces)."""
    x, y = ckpt.tensors[a], ckpt.tensors[b]
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return all(ckpt.read(x, i, 4 << 20) == ckpt.read(y, i, 4 << 20) for i in range(0, x.nbytes, 4 << 20))


def plan(
    src: str | Path, dtype: str = "source", attn_dtype: str | None = None, head_dtype: str | None = None
) -> Plan:
    """What packing the checkpoint folder ``src`` would do; reads headers, and an MTP layer's copies to compare them.

    dtype: "source" (every weight in its own precision, codes and scales unchanged) | "f32" | "bf16" | "f16" | "f8" |
    "q8" | "q4" (FFN and experts; attention and head q8). attn_dtype, head_dtype override it for those tensors. Norms,
    biases and router are f32; embedding and eh_proj never below bf16. Raises CheckpointError, ConfigError,
    UnsupportedError (unknown dtype).
    """
    with Checkpoint(src) as ckpt:
        return _plan(ckpt, dtype, attn_dtype, head_dtype)


def _plan(ckpt: Checkpoint, dtype: str, attn_dtype: str | None, head_dtype: str | None) -> Plan:
    wide = "q8" if dtype == "q4" else dtype
    by_role = {"attn": attn_dtype or wide, "head": head_dtype or wide}
    for option, value in (("dtype", dtype), ("attn_dtype", by_role["attn"]), ("head_dtype", by_role["head"])):
        if value not in DTYPES:
            raise UnsupportedError(f"{option} {value!r}, expected one of {', '.join(DTYPES)}")
    tensors = []
    used: set[str] = set()
    for spec in _core.expected_tensors(ckpt.config):
        slices = _slices(spec, ckpt)
        used.update(n for parts in slices for p in parts for n in p.weight.tensors)
        fmt, scale, block, exact, note = _choose(spec, slices, by_role.get(spec["role"], dtype))
        shape = ([spec["n_slices"]] if spec["stacked"] else []) + [spec["rows"]] + ([spec["cols"]] if spec["cols"] else [])
        kinds = sorted({_SOURCE_NAMES[p.weight.kind] for parts in slices for p in parts})
        tensors.append(
            PlannedTensor(
                name=spec["name"], role=spec["role"], kind="tiled" if spec["tiled"] else "plain", format=fmt, scale=scale,
                shape=tuple(shape), parts=tuple(spec["parts"]), interleaved=spec["interleaved"], scale_block=block,
                exact=exact, source_dtype="+".join(kinds), note=note, slices=slices,
            )
        )  # fmt: skip
    notes: list[str] = []
    dropped = _dropped(ckpt, used, notes)
    if ckpt.mtp_dropped:
        notes.append(f"the MTP layer is dropped: {ckpt.mtp_dropped}; drafting will not be available")
    elif ckpt.raw_config.get("num_nextn_predict_layers") and not ckpt.has_mtp:
        notes.append("config.json names an MTP layer but the files hold none; drafting will not be available")
    files = ckpt.tokenizer_files()
    if "tokenizer.json" not in files:
        notes.append("no tokenizer.json or tiktoken.model: the packed file has no tokenizer")
    options = {"dtype": dtype, "attn_dtype": by_role["attn"], "head_dtype": by_role["head"]}
    return Plan(ckpt.config, ckpt.identity(), options, tensors, files, dropped, notes)


# ---- the file -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """One planned tensor, or one stored file, and where its bytes go. ``sha`` is filled while they are written."""

    tensor: PlannedTensor | None
    names: list[str]  # container tensors: [name] or [name, name.scale]
    sizes: list[int]  # true bytes of each
    offsets: list[int] = field(default_factory=list)  # absolute
    blob: bytes = b""
    sha: list[str] = field(default_factory=list)


def _jobs(p: Plan) -> list[_Job]:
    jobs = []
    for t in p.tensors:
        two = t.scale_block is not None
        jobs.append(_Job(t, [t.name, t.name + ".scale"][: 1 + two], [t.data_bytes, t.scale_bytes][: 1 + two]))
    jobs += [_Job(None, [f"file.{name}"], [len(data)], blob=data) for name, data in p.files.items()]
    return jobs


def _header(p: Plan, jobs: list[_Job]) -> bytes:
    """The header with the checksums known so far; its length does not depend on them."""
    entries: dict[str, Any] = {}
    layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for job in jobs:
        t = job.tensor
        for i, (name, size) in enumerate(zip(job.names, job.sizes, strict=True)):
            padded = _up(size, ALIGN)
            dtype, shape = "U8", (padded,)
            entry: dict[str, Any] = {"kind": "file", "format": "u8", "scale": "", "shape": [size], "source_dtype": ""}
            if t is not None and i == 1 and t.scale_shape is not None:
                entry |= {"kind": "scale", "format": "f32", "shape": list(t.scale_shape), "source_dtype": "F32"}
                if padded == size:
                    dtype, shape = "F32", t.scale_shape
            elif t is not None:
                entry |= {"kind": t.kind, "format": t.format, "scale": t.scale, "shape": list(t.shape)}
                entry["source_dtype"] = t.source_dtype
                if t.parts:
                    entry["parts"] = list(t.parts)
                if t.scale_block:
                    entry["scale_block"] = list(t.scale_block)
                if padded == size and t.kind == "plain":
                    dtype, shape = t.format.upper(), t.shape
                elif padded == size:
                    shape = (*t.shape[:-2], t.slice_bytes // t.row_tile_bytes, t.row_tile_bytes)
            entry |= {"bytes": size, "sha256": job.sha[i] if job.sha else "0" * 64}
            entries[name] = entry
            layout[name] = (dtype, shape, padded)

    def text(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=True, sort_keys=True)

    dropped = [{"name": d.name, "why": d.why, "bytes": d.bytes} for d in p.dropped]
    metadata = {"format": "deepcalm", "format_version": FORMAT_VERSION, "config": text(p.config), "source": text(p.source)}
    metadata |= {"options": text(p.options), "dropped": text(dropped), "tensors": text(entries)}
    return build_header(metadata, layout)


class _Reader:
    """Turns slices of planned tensors into packed bytes; keeps one source buffer and the last f8 scale grid."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.ckpt = ckpt
        self.buffer = np.empty(SLAB_BYTES, np.uint8)
        self.grid: tuple[str, npt.NDArray[Any] | None] = ("", None)

    def source(self, w: Weight, lo: int, hi: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any] | None]:
        """Stored rows lo..hi-1 and their scales."""
        need = (hi - lo) * w.row_bytes
        if need > len(self.buffer):
            self.buffer = np.empty(need, np.uint8)
        if w.kind == "f8":
            if self.grid[0] != w.name:
                self.grid = (w.name, self.ckpt.read_scale(w))
            return self.ckpt.read_rows(w, lo, hi, self.buffer), self.grid[1]
        return self.ckpt.read_rows(w, lo, hi, self.buffer), self.ckpt.read_scale(w, lo, hi)

    def plain(self, t: PlannedTensor, begin: int, end: int, out: npt.NDArray[np.uint8]) -> None:
        """Rows begin..end-1 of a plain tensor into ``out``."""
        w = t.slices[0][0].weight
        data, scale = self.source(w, begin, end)
        bad = _core.convert_rows(out, t.format, w.kind, data, w.cols, begin, scale, *w.block, w.scale_dtype)
        if bad is not None:
            raise self.ckpt.bad_value(w, begin + bad[0], bad[1], t.format)

    def tiles(self, t: PlannedTensor, s: int, begin: int, end: int, out: npt.NDArray[np.uint8], grid: npt.NDArray[np.float32] | None) -> None:
        """Row tiles begin..end-1 of slice s into ``out``; f8 that we quantise ourselves: its scales into ``grid``."""
        step = len(t.slices[s]) if t.interleaved else 1
        first = 0  # row tile at which the part starts (stacked parts)
        for i, part in enumerate(t.slices[s]):
            n_tiles = -(-part.rows // _core.TILE_ROWS)
            if t.interleaved:
                t0, t1, at = begin // step, end // step, i
            else:
                t0, t1, at = max(begin - first, 0), min(end - first, n_tiles), max(first - begin, 0)
                first += n_tiles
            if t0 < t1:
                self._run(t, s, part, t0, t1, out, at * t.row_tile_bytes, step, grid, begin + at)

    def _run(self, t: PlannedTensor, s: int, part: Part, t0: int, t1: int, out: npt.NDArray[np.uint8], offset: int,
             step: int, grid: npt.NDArray[np.float32] | None, tile0: int) -> None:  # fmt: skip
        r0, r1 = t0 * _core.TILE_ROWS, min(t1 * _core.TILE_ROWS, part.rows)
        index = part.take.index(0, part.take.count) if part.transpose else part.take.index(r0, r1)
        lo, hi = int(index.min()), int(index.max()) + 1
        data, scale = self.source(part.weight, lo, hi)
        block = t.scale_block or (16, 32)
        scales = None
        if grid is not None:
            n = -(-(r1 - r0) // block[0])
            scales = np.empty((n, grid.shape[2]), np.float32)
        w = part.weight
        bad = _core.pack_rows(
            out, offset, step * t.row_tile_bytes, t.format, t.scale, r1 - r0, part.cols, index - lo, part.transpose, t.exact,
            w.kind, data, lo, scale, *w.block, w.scale_dtype, scales, *block,
        )  # fmt: skip
        if bad is not None:
            raise self.ckpt.bad_value(w, lo + bad[0], bad[1], t.format)
        if grid is not None and scales is not None:
            g0 = tile0 * _core.TILE_ROWS // block[0]
            grid[s, g0 : g0 + step * len(scales) : step] = scales

    def exact_grid(self, t: PlannedTensor) -> npt.NDArray[np.float32]:
        """f8 with the source's codes: each packed scale block gets the scale of the source block it lies in."""
        assert t.scale_block is not None and t.scale_shape is not None
        grid = np.zeros(t.scale_shape, np.float32)
        tiles_per_block = t.scale_block[0] // _core.TILE_ROWS
        for s, parts in enumerate(t.slices):
            tile = 0
            for i, part in enumerate(parts):
                _, source = self.source(part.weight, 0, 0)
                assert source is not None
                row_ids, col_ids = part.block_ids()
                row_ids, col_ids = row_ids[:: _core.TILE_ROWS], col_ids[:: t.scale_block[1]]
                tiles = np.arange(i, 2 * len(row_ids), 2) if t.interleaved else np.arange(tile, tile + len(row_ids))
                tile += len(row_ids)
                whole = source.T if part.transpose else source
                grid[s, tiles // tiles_per_block] = whole[np.ix_(row_ids, col_ids)]
        return grid


class _Writer(threading.Thread):
    """Hashes and writes buffers in order; the first failure is kept and ends the work."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(name="deepcalm-pack-writer", daemon=True)
        self.fd = fd
        self.path = path
        self.queue: queue.Queue[tuple[npt.NDArray[np.uint8] | None, int, int, Callable[[str], None] | None]] = queue.Queue()
        self.free: queue.Queue[npt.NDArray[np.uint8]] = queue.Queue()
        for _ in range(3):
            self.free.put(np.empty(SLAB_BYTES, np.uint8))
        self.failure: BaseException | None = None
        self.sha = hashlib.sha256()

    def buffer(self, size: int) -> npt.NDArray[np.uint8]:
        """A free buffer of at least ``size`` bytes; raises what the thread failed with."""
        b = self.free.get()
        if self.failure is not None:
            raise self.failure
        return b if len(b) >= size else np.empty(size, np.uint8)

    def put(self, buffer: npt.NDArray[np.uint8], n: int, offset: int, done: Callable[[str], None] | None) -> None:
        """Queues n bytes for ``offset``; done: called with the tensor's checksum, these being its last bytes."""
        self.queue.put((buffer, n, offset, done))

    def finish(self) -> None:
        """Waits for everything queued; raises what failed."""
        self.queue.put((None, 0, 0, None))
        self.join()
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        while True:
            buffer, n, offset, done = self.queue.get()
            if buffer is None:
                return
            try:
                if self.failure is None:
                    view = memoryview(buffer)[:n]
                    self.sha.update(view)
                    _write_at(self.fd, view, offset)
                    if done is not None:
                        done(self.sha.hexdigest())
                        self.sha = hashlib.sha256()
            except BaseException as e:
                self.failure = e
            self.free.put(buffer)


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


class _Partial:
    """DST.partial and its journal: exclusive, resumable, renamed to DST at the end."""

    def __init__(self, dst: Path, jobs: list[_Job], total: int, key: str) -> None:
        self.dst = dst
        self.path = dst.with_name(dst.name + ".partial")
        self.journal = dst.with_name(dst.name + ".partial.journal")
        self.restarted = False
        if dst.is_dir():
            raise ResourceError(f"{dst}: is a folder, expected a file name")
        if not dst.parent.is_dir():
            raise ResourceError(f"{dst.parent}: no such folder")
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ResourceError(f"{self.path}: another pack is writing this file") from None
            info = os.fstat(self.fd)
            stat = os.statvfs(dst.parent)
            room = stat.f_bavail * stat.f_frsize + info.st_blocks * 512
            if room < total:
                with contextlib.suppress(OSError):
                    if info.st_size == 0:
                        self.path.unlink()
                raise ResourceError(f"{dst.parent}: {room} bytes free, the packed file needs {total}")
            self.resume_at = self._verified(jobs, key) if info.st_size == total else 0
            if self.resume_at == 0:
                os.ftruncate(self.fd, 0)  # padding is never written: it must read as zeros
            os.ftruncate(self.fd, total)
            lines = [json.dumps({"key": key})]
            lines += [json.dumps({"name": j.names[0], "sha256": j.sha}) for j in jobs[: self.resume_at]]
            self.journal.write_text("".join(line + "\n" for line in lines))
            self.log = self.journal.open("a")
        except BaseException:
            os.close(self.fd)
            raise

    def _verified(self, jobs: list[_Job], key: str) -> int:
        """How many leading jobs the journal calls done and whose bytes still have the recorded checksums."""
        try:
            lines = [json.loads(line) for line in self.journal.read_text().splitlines() if line.endswith("}")]
        except (OSError, ValueError):
            lines = []
        if not lines:
            return 0
        if lines[0] != {"key": key}:
            self.restarted = True
            return 0
        n = 0
        for job, line in zip(jobs, lines[1:], strict=False):
            got = [self._checksum(o, size) for o, size in zip(job.offsets, job.sizes, strict=True)]
            if line != {"name": job.names[0], "sha256": got}:
                break
            job.sha = got
            n += 1
        return n

    def _checksum(self, offset: int, size: int) -> str:
        sha = hashlib.sha256()
        for i in range(0, size, SLAB_BYTES):
            sha.update(os.pread(self.fd, min(SLAB_BYTES, size - i), offset + i))
        return sha.hexdigest()

    def done(self, job: _Job) -> None:
        """Notes in the journal that a job's bytes are written."""
        self.log.write(json.dumps({"name": job.names[0], "sha256": job.sha}) + "\n")
        self.log.flush()

    def commit(self) -> None:
        """Makes the file durable and gives it its name."""
        os.fsync(self.fd)
        self.path.replace(self.dst)
        self.close()
        self.journal.unlink()
        folder = os.open(self.dst.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Removes what was written: after a refusal there is nothing to resume."""
        self.close()
        for path in (self.path, self.journal):
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Releases the lock; the files stay for a later resume."""
        if self.fd >= 0:
            self.log.close()
            os.close(self.fd)
            self.fd = -1


def pack(
    src: str | Path,
    dst: str | Path,
    dtype: str = "source",
    attn_dtype: str | None = None,
    head_dtype: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Packs the checkpoint folder ``src`` into the file ``dst`` and returns the plan that was carried out.

    dtype, attn_dtype, head_dtype: see ``plan``. progress(done_bytes, total_bytes) is called from this thread after every
    few MiB written. ``dst`` appears only when complete (written as ``dst.partial``, fsynced, renamed). After an
    interruption or a full disk the partial file stays, and the same call resumes it with the same result; after a refusal
    it is removed. Raises CheckpointError, ConfigError, UnsupportedError, ResourceError (disk, permissions).
    """
    dst = Path(dst)
    with Checkpoint(src) as ckpt:
        p = _plan(ckpt, dtype, attn_dtype, head_dtype)
        if dst.resolve().parent == ckpt.path.resolve() and dst.name in {*p.source["files"], *p.files, "config.json"}:
            raise ResourceError(f"{dst}: is a file of the checkpoint itself")
        jobs = _jobs(p)
        header = _header(p, jobs)
        offset = len(header)
        for job in jobs:
            for size in job.sizes:
                job.offsets.append(offset)
                offset += _up(size, ALIGN)
        key = json.dumps([_core.__version__, ckpt.mtimes(), hashlib.sha256(header).hexdigest()])
        key = hashlib.sha256(key.encode() + b"".join(p.files.values())).hexdigest()
        try:
            _run(ckpt, p, jobs, _Partial(dst, jobs, offset, key), offset, progress)
        except OSError as e:
            hint = ""
            if e.errno == errno.ENOSPC:
                hint = f"; {dst.name}.partial is kept: make room and run again to resume, or delete it"
            raise ResourceError(f"{dst}: cannot write the packed file: {e.strerror}{hint}") from None
    return p


def _run(ckpt: Checkpoint, p: Plan, jobs: list[_Job], out: _Partial, total: int, progress: Progress | None) -> None:
    if out.restarted:
        p.notes.append(f"{out.path.name} belonged to another source or other options and was started over")
    elif out.resume_at:
        p.notes.append(f"resumed: {out.resume_at} of {len(jobs)} tensors were already packed and have the right checksums")
    try:
        _write_at(out.fd, memoryview(_header(p, jobs)), 0)
        writer = _Writer(out.fd, out.path)
        writer.start()
        try:
            reader = _Reader(ckpt)
            for job in jobs[out.resume_at :]:
                _pack_job(reader, writer, job, lambda job=job: out.done(job), lambda n: progress and progress(n, total))
            writer.finish()
        finally:
            if writer.is_alive():  # the main thread failed: let the writer drain and stop
                writer.queue.put((None, 0, 0, None))
                writer.join()
        _write_at(out.fd, memoryview(_header(p, jobs)), 0)
        out.commit()
        if progress:
            progress(total, total)
    except CheckpointError:
        out.discard()
        raise
    finally:
        out.close()


def _pack_job(
    reader: _Reader, writer: _Writer, job: _Job, finished: Callable[[], None], progress: Callable[[int], object]
) -> None:
    """Queues all bytes of one job, slab by slab; ``finished`` runs in the writer after the last one."""

    def last(digest: str) -> None:
        job.sha.append(digest)
        if len(job.sha) == len(job.names):
            finished()

    t = job.tensor
    if t is None:
        blob = np.frombuffer(job.blob, np.uint8)
        buffer = writer.buffer(len(blob))
        buffer[: len(blob)] = blob
        writer.put(buffer, len(blob), job.offsets[0], last)
        return
    own_scales = t.scale_block is not None and not t.exact
    grid = np.zeros(t.scale_shape, np.float32) if own_scales and t.scale_shape else None
    done, fill = 0, 0
    buffer = writer.buffer(SLAB_BYTES)
    for s, begin, end in _units(t):
        size = (end - begin) * t.row_tile_bytes
        if fill and fill + size > len(buffer):
            writer.put(buffer, fill, job.offsets[0] + done, None)
            done += fill
            progress(job.offsets[0] + done)
            buffer, fill = writer.buffer(size), 0
        if size > len(buffer):
            buffer = np.empty(size, np.uint8)
        view = buffer[fill : fill + size]
        if t.kind == "plain":
            reader.plain(t, begin, end, view)
        else:
            reader.tiles(t, s, begin, end, view, grid)
        fill += size
    writer.put(buffer, fill, job.offsets[0] + done, last)
    progress(job.offsets[0] + done + fill)
    if t.scale_block is not None:
        grid = reader.exact_grid(t) if grid is None else grid
        scales = np.ascontiguousarray(grid).reshape(-1).view(np.uint8)
        buffer = writer.buffer(len(scales))
        buffer[: len(scales)] = scales
        writer.put(buffer, len(scales), job.offsets[1], last)


def _units(t: PlannedTensor) -> Iterator[tuple[int, int, int]]:
    """(slice, first, end) row tiles (plain: rows) of one step each, at most about SLAB_BYTES of source and of output."""
    n_slice = t.slice_bytes // t.row_tile_bytes
    align = 1
    if t.interleaved:
        align = 2
    elif t.scale_block is not None and not t.exact:
        align = t.scale_block[0] // _core.TILE_ROWS
    for s, parts in enumerate(t.slices):
        rows_per_unit = 1 if t.kind == "plain" else _core.TILE_ROWS
        source = rows_per_unit * max(p.weight.row_bytes for p in parts)
        n = max(1, SLAB_BYTES // max(t.row_tile_bytes, source) // align) * align
        if any(p.transpose for p in parts):
            n = n_slice  # a transposed slice is read whole
        for begin in range(0, n_slice, n):
            yield s, begin, min(begin + n, n_slice)
