"""Reads a Hugging Face checkpoint folder: configuration, shards, and every weight by rows in the form it is stored.

Nothing is mapped and nothing is read before it is asked for; sizes are checked against the files first.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import _core
from ..closing import Closing
from ..errors import CheckpointError, show
from . import config
from .safetensors import MAX_HEADER_BYTES, File, Header, TensorInfo, parse_json, read_file, read_header
from .text_files import FILES, LEGACY, TextFiles

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".gguf")  # the first three are pickles
TOKENIZER_FILES = (*FILES, *LEGACY)

# kind -> as it is stored
SOURCE_DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "f8": "F8_E4M3", "i8": "I8", "i4": "I4", "fp4": "FP4"}
KINDS = {dtype: kind for kind, dtype in SOURCE_DTYPES.items() if kind not in ("i8", "i4", "fp4")}
# dtypes of f8 block scales, and how they are read
SCALES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F8_E8M0": np.uint8}
FP4_GROUPS = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}  # dtype of fp4 group scales -> columns of a group: NVFP4, MXFP4
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)  # twice the values of codes 0..7; 8..15 are the negative ones
# [256] both values of a byte, the low nibble's first, as the two bytes of one number
_PAIRS = np.append(E2M1, -E2M1)[np.arange(256)[:, None] >> [0, 4] & 15].view(np.uint16)[:, 0]
Bytes = npt.NDArray[np.uint8]
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)([0-9]{1,6})\.(gate|up|down)_proj\.weight(_scale_inv)?")
# Tensors that only other quantisations have, and whose they are. One of these beside a weight refuses it.
_FOREIGN = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "scales": "mlx quantisation", "g_idx": "GPTQ",
    "weight_zero_point": "zero points", "weight_g_idx": "activation ordering", "pre_quant_scale": "AWQ",
    "weight_scale_2": "NVFP4 of such a tensor",
    "weight_blocks": "MXFP4", "weight_scales": "MXFP4", "SCB": "bitsandbytes int8", "weight_format": "bitsandbytes",
    "weight.absmax": "bitsandbytes 4-bit", "weight.quant_map": "bitsandbytes 4-bit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical weight: its name in the checkpoint, natural shape and how it is stored.

    kind: "f32" | "bf16" | "f16" | "f8" (e4m3 * block scale) | "i8" (code * group scale) | "fp4" (e2m1 * group scale)
    | "i4" ((code - 8) * group scale). A vector is [1, cols].
    """

    name: str
    kind: str
    rows: int
    cols: int
    data: TensorInfo
    scale: TensorInfo | None = None  # f8: grid over blocks, of SCALES; others [rows, ceil(cols / group)]
    block: tuple[int, int] = (1, 1)  # f8: scale block; others: (1, group)
    extra: tuple[str, ...] = ()  # further tensors that belong to it (weight_shape, weight_g_idx, weight_global_scale)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row (those in I32 tensors are whole words)."""
        return self.data.nbytes // self.rows

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return self.data.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all checkpoint tensors that make up this weight: none where it is zeros."""
        return (*([self.data.name] if self.data.name else []), *([self.scale.name] if self.scale else []), *self.extra)

    @property
    def scale_dtype(self) -> str:
        """ "bf16" | "f16" | "f32" of the scales as ``read_scale`` gives them, "" without."""
        return "" if self.scale is None else self.scale.dtype.lower() if self.kind == "i4" else "f32"

    @property
    def q8_codes(self) -> bool:
        """Whether q8 holds its codes and scales: groups of whole 32 columns, scales of 8 to 11 bits."""
        groups = self.block[1] % 32 == 0 or self.block[1] >= self.cols
        return self.kind in ("i8", "fp4") and groups and self.scale is not None and self.scale.dtype != "F32"

    def source(self, data: npt.NDArray[np.uint8], first_row: int, scale: npt.NDArray[Any] | None, cols: int = 0) -> Any:
        """Stored rows from ``first_row`` on and their scales of ``read_scale``, as the extension module takes them."""
        kind = self.kind
        if kind == "fp4":
            assert scale is not None
            kind, data, scale = "i8", _PAIRS[data].view(np.uint8), scale / np.float32(2)
        elif kind == "i8" and self.data.dtype == "I32":  # code + 128
            data = data ^ np.uint8(128)
        return _core.Source(kind, data, cols or self.cols, first_row, scale, self.block, self.scale_dtype)


class Checkpoint(Closing):
    """An open checkpoint folder. Use as a context manager, or close().

    ``raw_config``: config.json (of the text model); ``generation``: generation_config.json or {}; ``config``: the
    normalised configuration; ``prefix`` of the text model's tensors and ``lm_head``, the name of its head; ``tensors``:
    name -> TensorInfo; ``mtp_dropped``: why an MTP layer in the files is not used, or ""; ``untied``: the files have a
    head of their own though config.json ties it; ``notes``: sentences about what is not read. Raises CheckpointError or
    its subclass ConfigError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, File] = {}
        self._headers: dict[str, Header] = {}
        self._file_of: dict[str, str] = {}
        self._listed: dict[str, str] = {}  # tensor -> file, as the index says it
        self.notes: list[str] = []
        self.untied = False
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the shards."""
        for f in self._files.values():
            f.close()

    # ---- opening ----------------------------------------------------------------------------------------------------

    def _object(self, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
        path = self.path / name
        value = parse_json(read_file(path, limit, CheckpointError), str(path), CheckpointError, lenient=True)
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        return value

    def _open(self) -> None:
        self._names = _names_in(self.path)
        where = str(self.path / "config.json")
        if "config.json" not in self._names:
            found = [name for name in self._names if name.endswith(WEIGHT_SUFFIXES)]
            what = "no config.json in it" + (f", only {show(found)}" if found else "")
            raise CheckpointError(f"{self.path}: {what}, expected a Hugging Face checkpoint")
        raw = self._object("config.json")
        self.raw_config, layouts = config.unwrap(raw, where)
        self.quantisation = config.quantisation(self.raw_config, where)
        self.generation = self._object("generation_config.json") if "generation_config.json" in self._names else {}
        self.config = self._normalised(0)
        self._open_shards(raw.get("transformers_weights"))
        at = (layout for layout in layouts if self.has_weight(layout[0] + _TOP["final_norm"]))
        self.prefix, self.lm_head = next(at, layouts[0])
        embed, head = self.prefix + _TOP["embed"], self.lm_head
        if self.config["tie_word_embeddings"] and self.has_weight(embed) and self.has_weight(head):
            self.untied = not (embed in self.tensors and head in self.tensors and self.same_bytes(embed, head))
        if self.untied:
            self.notes.append(f"{head} differs from {embed} although config.json ties them; each is used")
            self.config = self._normalised(0)
        if self.config["model_type"] == "axk1" and not any(n.endswith("e_score_correction_bias") for n in self.tensors):
            self.notes.append("the files hold no e_score_correction_bias: zeros, as in transformers")
        self.mtp_prefix = f"{self.prefix}layers.{self.config['num_hidden_layers']}."
        eh_proj = self.mtp_prefix + "eh_proj.weight"
        self.has_mtp = self.has_weight(eh_proj) or eh_proj in self._listed
        self.mtp_dropped = self._mtp_missing() if self.has_mtp else ""
        if self.has_mtp and not self.mtp_dropped:
            self.config = self._normalised(1)

    def _normalised(self, n_mtp: int) -> dict[str, Any]:
        normalised = config.normalise(self.raw_config, self.generation, n_mtp, str(self.path / "config.json"))
        return normalised | ({"tie_word_embeddings": False} if self.untied else {})

    def _open_shards(self, chosen: Any) -> None:
        """Opens the files that transformers reads: the ``chosen`` one, else model.safetensors, else the index's."""
        single = (self.path / SINGLE).is_file() or INDEX not in self._names
        source = chosen or (SINGLE if single else INDEX)
        shards = [source]
        if str(source).endswith(".index.json"):
            shards = self._read_index(source)
        elif not _is_shard(source):
            raise CheckpointError(f"{self.path / 'config.json'}: transformers_weights is {show(source)}, {_SHARD}")
        elif source not in self._names:
            found = [name for name in self._names if name.endswith(WEIGHT_SUFFIXES)]
            pickled = any(name.endswith(WEIGHT_SUFFIXES[:3]) for name in found)
            hint = " (pickle files are not read: convert to safetensors)" if pickled else ""
            raise CheckpointError(f"{self.path}: neither {source} nor {INDEX}; found {show(found)}{hint}")
        for shard in shards:
            if self._listed and shard not in self._names:
                continue  # refused when one of its tensors is needed
            f = self._files[shard] = File(self.path / shard, CheckpointError)
            self._headers[shard] = read_header(f)
            for name, info in self._headers[shard].tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{f.path}: tensor {show(name)} is also in {self._file_of[name]}")
                self.tensors[name] = info
                self._file_of[name] = shard
        unread = [n for n in self._names if (n.endswith(WEIGHT_SUFFIXES) or n == INDEX) and n not in (*shards, source)]
        if unread:
            self.notes.append(f"not read: {_some(unread)}; the weights are those of {source}")
        if absent := [name for name in self._listed if name not in self.tensors]:
            self.notes.append(f"{source} lists tensors that no file holds and nothing needs: {_some(absent)}")
        if moved := [name for name, shard in self._listed.items() if self._file_of.get(name, shard) != shard]:
            self.notes.append(f"{source} lists tensors in other files than they are in: {_some(moved)}")

    def _read_index(self, name: str) -> list[str]:
        """File names of an index, sorted."""
        if name not in self._names:
            raise CheckpointError(f"{self.path / name}: no such file, config.json names it in transformers_weights")
        weight_map = self._object(name, MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / name}: weight_map is missing or empty")
        for tensor, shard in weight_map.items():
            if not _is_shard(shard):
                raise CheckpointError(f"{self.path / name}: {show(tensor)} is in {show(shard)}, {_SHARD}")
        self._listed = weight_map
        return sorted(set(weight_map.values()))

    def _lists(self, name: str) -> str:
        """What the index says of a tensor that no file holds, to follow "is missing"."""
        shard = self._listed.get(name) or self._listed.get(name.removesuffix("weight") + "weight_packed")
        where = f", the index lists it in {shard}" if shard else ""
        return where + (", which does not exist" if shard and shard not in self._files else "")

    def _mtp_missing(self) -> str:
        for spec in _core.expected_tensors(self._normalised(1)):
            if spec["name"].startswith("mtp."):
                for name in source_names(spec["name"], spec["n_slices"], self):
                    if not self.has_weight(name) and not self._zero_bias(name):
                        return f"{name} is missing{self._lists(name)}"
        return ""

    # ---- weights ----------------------------------------------------------------------------------------------------

    def where(self, tensor: str) -> str:
        """File and tensor, for messages."""
        return f"{self.path / self._file_of[tensor]}: tensor {tensor}"

    def has_weight(self, name: str) -> bool:
        """Whether ``name`` ("...weight" or a bias) is stored in any form, supported or not."""
        base = name.removesuffix("weight")
        forms = (name, base + "weight_packed", base + "qweight", base + "weight_blocks")
        return any(n in self.tensors for n in forms) or self._find(name) is not None

    def _zero_bias(self, name: str) -> bool:
        """Whether a router's bias that no file holds is zeros, as in transformers."""
        return name.endswith("e_score_correction_bias") and self.config["model_type"] == "axk1"

    def _find(self, name: str) -> TensorInfo | None:
        """Where a tensor lies; an expert's may be a share of one of all experts, as transformers 5 can save them.

        ``experts.gate_up_proj`` is [n_routed_experts, rows of gate, then of up, cols], ``experts.down_proj`` alike; the
        names of block scales end in ``_scale_inv``.
        """
        if name in self.tensors or (match := _EXPERT.fullmatch(name)) is None:
            return self.tensors.get(name)
        prefix, expert, part, suffix = match.groups()
        parts = ("down",) if part == "down" else ("gate", "up")
        info, n = self.tensors.get(f"{prefix}{'_'.join(parts)}_proj{suffix or ''}"), self.config["n_routed_experts"]
        if info is None or int(expert) >= n:
            return None
        if suffix and info.shape[1:2] == (1,):  # one scale for gate and up
            parts = (part,)
        if len(info.shape) != 3 or info.shape[0] != n or info.shape[1] % len(parts):
            expected = f"[{n} experts, rows of {' and '.join(parts)}, cols]"
            raise CheckpointError(f"{self.where(info.name)}: {info.dtype} {list(info.shape)}, expected {expected}")
        nbytes = info.nbytes // n // len(parts)
        offset = info.offset + (int(expert) * len(parts) + parts.index(part)) * nbytes
        return replace(info, shape=(info.shape[1] // len(parts), info.shape[2]), offset=offset, nbytes=nbytes)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The weight ``name`` of natural ``shape`` (1-D or 2-D); refuses other shapes, dtypes and quantisations."""
        base = name.removesuffix("weight")
        for suffix, what in _FOREIGN.items():
            read = suffix == "weight_g_idx" and base + "weight_packed" in self.tensors
            read |= suffix == "weight_scale_2" and name in self.tensors and self.tensors[name].dtype == "U8"
            if base != name and base + suffix in self.tensors and not read:
                raise CheckpointError(f"{self.where(base + suffix)}: {what} is not supported")
        packed = self.tensors.get(base + "weight_packed")
        if packed is not None and base != name:
            if len(shape) != 2 or name in self.tensors:
                raise CheckpointError(f"{self.where(packed.name)}: expected a plain tensor {list(shape)} and no other")
            return self._fp4(name, packed, shape) if packed.dtype == "U8" else self._integer(name, packed, shape)
        info = self._find(name)
        if info is None and self._zero_bias(name):
            return Weight(name, "f32", 1, shape[0], TensorInfo("", "F32", shape, 0, 4 * shape[0]))
        if info is None:
            found = f"tensor {name} is missing{self._lists(name)}"
            mlx = ": experts stored as mlx does are not read" if any(".switch_mlp." in n for n in self.tensors) else ""
            raise CheckpointError(f"{self.path}: {found}, expected shape {list(shape)}{mlx}")
        scale = self._find(name + "_scale_inv") or self.tensors.get(base + "weight_scale")
        if info.dtype in ("I8", "U8") and scale is not None and len(shape) == 2:
            return self._fp4(name, info, shape) if info.dtype == "U8" else self._integer(name, info, shape)
        self._check(info, tuple(KINDS), shape, "")
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if info.dtype != "F8_E4M3":
            if scale is not None:
                raise CheckpointError(f"{self.where(info.name)}: {info.dtype} with a scale beside it, expected none")
            return Weight(name, KINDS[info.dtype], rows, cols, info)
        if scale is None:
            found = f"{info.name}_scale_inv or weight_scale, found none{self._lists(name + '_scale_inv')}"
            raise CheckpointError(f"{self.where(info.name)}: F8_E4M3 needs {found}")
        block, grid, why = self.quantisation.get("fp8_block"), scale.shape, ""
        if math.prod(grid) == 1:
            block = (rows, cols)
        elif grid in ((rows,), (rows, 1)) and (block is None or block[1] < cols):
            block = (1, cols)
        elif block is None:
            found = f"{list(grid)} scales, but config.json has no weight_block_size or block_structure"
            raise CheckpointError(f"{self.where(info.name)}: F8_E4M3 with {found}")
        else:
            grid = (-(-rows // block[0]), -(-cols // block[1]))
            why = f" for {list(shape)} in blocks of {list(block)}"
        return Weight(name, "f8", rows, cols, info, self._check(scale, tuple(SCALES), grid, why), block)

    def _beside(self, data: TensorInfo, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where(data.name)}: {name} is missing{self._lists(name)}")
        return self.tensors[name]

    def _fp4(self, name: str, data: TensorInfo, shape: tuple[int, ...]) -> Weight:
        """e2m1 codes, two a byte: MXFP4, or NVFP4 with a scale of the whole tensor."""
        rows, cols = shape
        base = name.removesuffix("weight")
        scale = self._beside(data, base + "weight_scale")
        group = FP4_GROUPS.get(scale.dtype, 32)
        why = f" for {list(shape)} in groups of {group}"
        self._check(data, ("U8",), (rows, cols // 2), f" for {list(shape)}")
        self._check(scale, tuple(FP4_GROUPS), (rows, cols // group), why)
        whole = tuple(n for n in (base + "weight_global_scale", base + "weight_scale_2") if n in self.tensors)
        if cols % group or len(whole) != (group == 16):
            expected = "one weight_global_scale or weight_scale_2" if group == 16 else "no scale of the whole tensor"
            raise CheckpointError(
                f"{self.where(data.name)}: found {_some([*whole]) or 'none'}, expected {expected}{why}"
            )
        for n in whole:
            self._check(self.tensors[n], ("F32",), self.tensors[n].shape if self.tensors[n].nbytes == 4 else (), "")
        return Weight(name, "fp4", rows, cols, data, scale, (1, group), whole)

    def _integer(self, name: str, data: TensorInfo, shape: tuple[int, ...]) -> Weight:
        """int4, or int8 in words or by itself."""
        base = name.removesuffix("weight")
        scale, extra, g_idx = (base + f"weight_{part}" for part in ("scale", "shape", "g_idx"))
        rows, cols = shape
        announced = [bits for bits in (4, 8) if f"int{bits}_group" in self.quantisation]
        if not announced or (data.dtype == "I8" and 8 not in announced):
            what = "int8" if data.dtype == "I8" else "int4"
            raise CheckpointError(
                f"{self.where(data.name)}: expected a plain tensor: config.json announces no {what} here"
            )
        fits = (bits for bits in announced if data.shape == (rows, -(-cols * bits // 32)))
        bits = 8 if data.dtype == "I8" else next(fits, announced[0])
        group = self.quantisation[f"int{bits}_group"] or -(-cols // 32) * 32  # 0: one group a row
        if data.dtype == "I8":
            self._check(data, ("I8",), shape, "")
        else:
            self._check(data, ("I32",), (rows, -(-cols * bits // 32)), f" for {list(shape)}")
        why = f" for {list(shape)} in groups of {group}"
        dtypes = ("BF16", "F16") if bits == 4 else ("BF16", "F16", "F32")
        scales = self._check(self._beside(data, scale), dtypes, (rows, -(-cols // group)), why)
        if extra in self.tensors:
            got = self._integers(extra, 2)
            if got.tolist() != list(shape):
                raise CheckpointError(f"{self.where(extra)}: says {got.tolist()}, expected {list(shape)}")
        if g_idx in self.tensors:  # the group of every column, or -1: in order
            got, expected = self._integers(g_idx, cols), np.arange(cols) // group
            if (got != expected).any() and (got != -1).any():
                at = int((got != expected).argmax())
                found = f"column {at} is in group {got[at]}, expected {expected[at]}"
                raise CheckpointError(f"{self.where(g_idx)}: activation ordering is not supported: {found}")
        used = tuple(name for name in (extra, g_idx) if name in self.tensors)
        return Weight(name, f"i{bits}", rows, cols, data, scales, (1, group), used)

    def _integers(self, name: str, n: int) -> npt.NDArray[Any]:
        """[n] values of a small I32 or I64 tensor."""
        info = self._check(self.tensors[name], ("I32", "I64"), (n,), "")
        return np.frombuffer(self.read(info), "<i4" if info.dtype == "I32" else "<i8")

    def _check(self, info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> TensorInfo:
        if info.dtype not in dtypes or info.shape != shape:
            expected = f"{' or '.join(dtypes)} {list(shape)}{why}"
            raise CheckpointError(f"{self.where(info.name)}: {info.dtype} {list(info.shape)}, expected {expected}")
        return info

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def read(self, info: TensorInfo) -> bytes:
        """All stored bytes of a tensor."""
        return self._files[self._file_of[info.name]].read(info.offset, info.nbytes)

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes."""
        x, y = self.tensors[a], self.tensors[b]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        buffers = np.empty((2, 1 << 20), np.uint8)
        for begin in range(0, x.nbytes, buffers.shape[1]):
            views = buffers[:, : x.nbytes - begin]
            for info, view in zip((x, y), views, strict=True):
                self._files[self._file_of[info.name]].read_into(view.data, info.offset + begin)
            if not np.array_equal(views[0], views[1]):
                return False
        return True

    def read_rows(self, w: Weight, begin: int, end: int, out: Bytes | None = None) -> Bytes:
        """Stored bytes of rows begin..end-1: uint8 [end - begin, w.row_bytes], in the front of ``out`` if given."""
        n = (end - begin) * w.row_bytes
        buffer = np.empty(n, np.uint8) if out is None else out[:n]
        if not w.data.name:
            buffer[:] = 0
            return buffer.reshape(end - begin, w.row_bytes)
        self._files[self._file_of[w.data.name]].read_into(buffer.data, w.data.offset + begin * w.row_bytes)
        return buffer.reshape(end - begin, w.row_bytes)

    def read_scale(self, w: Weight, begin: int = 0, end: int = 0) -> npt.NDArray[Any] | None:
        """Scales of w: the whole f32 grid; i4: uint16 [end - begin, groups] of those rows; None without scales.

        One of a grid that is not finite, or so large that 448 times it is not, is refused with its position.
        """
        if w.scale is None:
            return None
        if w.kind == "i4":
            row = w.scale.nbytes // w.rows
            file = self._files[self._file_of[w.scale.name]]
            data = np.frombuffer(file.read(w.scale.offset + begin * row, (end - begin) * row), np.uint16)
            return data.reshape(end - begin, row // 2)
        dtypes = SCALES | {"U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
        grid: npt.NDArray[Any] = np.frombuffer(self.read(w.scale), dtypes[w.scale.dtype])
        if w.scale.dtype in ("F8_E8M0", "U8"):  # 2^(code - 127); 255, which is NaN, becomes infinity
            bits = grid.astype(np.uint32) << 23
            grid = np.where(bits == 0, np.uint32(1 << 22), bits).view(np.float32)
        grid = grid.astype(np.float32)
        for name in w.extra if w.kind == "fp4" else ():
            whole = np.frombuffer(self.read(self.tensors[name]), np.float32)
            with np.errstate(all="ignore"):
                grid = grid / whole if name.endswith("global_scale") else grid * whole
        limit = np.finfo(np.float32).max / 448
        bad = np.flatnonzero(~(np.abs(grid) <= limit))
        if len(bad):
            found = f"scale at {self._position(w.scale, int(bad[0]))} is {grid[bad[0]]}"
            raise CheckpointError(f"{self.where(w.scale.name)}: {found}, expected a finite number up to {limit:.3g}")
        return grid.reshape(-(-w.rows // w.block[0]), -1)

    def bad_value(self, w: Weight, row: int, col: int, to: str) -> CheckpointError:
        """The error for a value that does not fit format ``to``."""
        line = np.full((1, w.cols), np.nan, np.float32)
        data, scale = self.read_rows(w, row, row + 1), self.read_scale(w, row, row + 1)
        _core.convert_rows(line, "f32", w.source(data, row, scale))  # stops at a NaN
        packed = w.kind in ("i8", "i4", "fp4")
        found, at = line[0, col], [row, col] if packed else self._position(w.data, row * w.cols + col)
        limits = {"f16": "|w| <= 65504", "bf16": "|w| <= 3.39e38"}
        expected = limits.get(to, f"one whose {to} scale fits its type") if np.isfinite(found) else "a finite number"
        return CheckpointError(f"{self.where(w.data.name)}: value at {at} is {found:.6g}, expected {expected} for {to}")

    def _position(self, info: TensorInfo, element: int) -> list[int]:
        """Where an element of ``info``, which may be a share of a tensor, is in the stored one."""
        whole = self.tensors[info.name]
        before = (info.offset - whole.offset) * math.prod(whole.shape) // whole.nbytes
        return [int(i) for i in np.unravel_index(before + element, whole.shape)]

    # ---- files beside the weights -----------------------------------------------------------------------------------

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json (converted from tiktoken.model where there is no other), tokenizer_config.json, ...

        All are tried: what ``generate`` and ``chat`` cannot use is refused, what they will miss is said in ``notes``.
        """
        out = {}
        for name in TOKENIZER_FILES:
            if name in self._names:
                limit = MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_CONFIG_BYTES
                out[name] = read_file(self.path / name, limit, CheckpointError)
        model = self.path / "tiktoken.model"
        if "tokenizer.json" not in out and model.name in self._names:
            from .tiktoken import convert

            ranks = read_file(model, MAX_TOKENIZER_BYTES, CheckpointError)
            out["tokenizer.json"] = convert(ranks, out.get("tokenizer_config.json", b"{}"), str(model))
        text = TextFiles(out, f"{self.path}/", CheckpointError)
        self.notes += text.tried(self.config)
        unread = LEGACY if "added_tokens_decoder" in text.config else ()
        return {name: out[name] for name in TOKENIZER_FILES if out.get(name) and name not in unread}

    def identity(self) -> dict[str, Any]:
        """What the packed file records about its source: {name, files: {name: bytes}, config_sha256, index_sha256}.

        From a hub's cache with the revision too, the commit; the name is then the model's, ORG/NAME.
        index_sha256 covers the shard names and headers: every tensor's name, shape, dtype and place.
        """
        index = hashlib.sha256()
        for shard, header in self._headers.items():
            index.update(shard.encode() + b"\0" + header.raw)
        file = read_file(self.path / "config.json", MAX_CONFIG_BYTES, CheckpointError)
        return {
            **_origin(self.path.resolve()),
            "files": {shard: f.size for shard, f in self._files.items()},
            "config_sha256": hashlib.sha256(file).hexdigest(),
            "index_sha256": index.hexdigest(),
        }

    def mtimes(self) -> dict[str, int]:
        """Modification time of every shard, ns: a resumed pack starts over when one has changed."""
        return {shard: f.mtime_ns for shard, f in self._files.items()}


_SHARD = "expected the name of a .safetensors file in the same folder"


def _is_shard(name: object) -> bool:
    plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable()
    return plain and "/" not in str(name) and "\\" not in str(name) and not str(name).startswith(".")


def _some(names: list[str], limit: int = 8) -> str:
    """A list of names for a message; a stranger's are escaped."""
    shown = ", ".join(n if n.isprintable() else repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _origin(folder: Path) -> dict[str, str]:
    """Name, and revision where .../models--ORG--NAME/snapshots/COMMIT tells it; bytes that are not UTF-8 as \\xNN."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return {"name": repo.removeprefix("models--").replace("--", "/"), "revision": folder.name}
    return {"name": os.fsencode(folder.name).decode("utf-8", "backslashreplace")}


def _names_in(path: Path) -> list[str]:
    """Names in a checkpoint folder, sorted. What is no folder is refused, with what to do instead."""
    try:
        return sorted(p.name for p in path.iterdir())
    except NotADirectoryError:
        what = {
            ".dcalm": f"packed already; run it: deepcalm generate -m {shlex.quote(str(path))}",
            ".gguf": "a GGUF file, which is not read; pack the Hugging Face checkpoint that it was made from: "
            "deepcalm pack ORG/NAME FILE.dcalm",
            ".safetensors": f"one file of a checkpoint; give its folder: {shlex.quote(str(path.parent))}",
        }.get(path.suffix, "a file, expected the folder of a Hugging Face checkpoint")
        raise CheckpointError(f"{path}: is {what}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such folder, expected a Hugging Face checkpoint") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot open: {getattr(e, 'strerror', None) or e}") from None


# ---- packed tensor -> checkpoint weights ----------------------------------------------------------------------------

_TOP = {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}
_LAYER = {
    "attn_norm": ["input_layernorm"],
    "q_a_norm": ["self_attn.q_a_layernorm"],
    "kv_a_norm": ["self_attn.kv_a_layernorm"],
    "wq_b": ["self_attn.q_b_proj"],
    "w_uk": ["self_attn.kv_b_proj"],
    "w_uv": ["self_attn.kv_b_proj"],
    "wo": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "w_gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "w_down": ["mlp.down_proj"],
    "router": ["mlp.gate"],
    "experts.w_gate_up": ["mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"],
    "experts.w_down": ["mlp.experts.{}.down_proj"],
    "shared.w_gate_up": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
    "shared.w_down": ["mlp.shared_experts.down_proj"],
    "post_moe_norm": ["post_mlp_layernorm"],
    "enorm": ["enorm"],
    "hnorm": ["hnorm"],
    "eh_proj": ["eh_proj"],
    "final_norm": ["shared_head.norm"],
}


def source_names(packed: str, n_slices: int, ckpt: Checkpoint) -> Iterator[str]:
    """Names of the checkpoint weights that make up a packed tensor: its parts in order, expert after expert."""
    cfg = ckpt.config
    top = "head" if packed == "mtp.head" else packed
    if top == "head" or top in _TOP:
        tied = cfg["tie_word_embeddings"] and top != "final_norm"  # the files hold either, or the same twice
        name = ckpt.prefix + _TOP["embed" if tied else top] if tied or top in _TOP else ckpt.lm_head
        yield ckpt.lm_head if tied and not ckpt.has_weight(name) else name
        return
    p, rest = ckpt.mtp_prefix, packed.removeprefix("mtp.")
    if packed.startswith("layers."):
        _, layer, rest = packed.split(".", 2)
        p = f"{ckpt.prefix}layers.{layer}."
    if rest == "router_bias":
        yield p + "mlp.gate.e_score_correction_bias"
        return
    first = "self_attn.q_a_proj" if cfg["q_lora_rank"] else "self_attn.q_proj"
    names = [first, "self_attn.kv_a_proj_with_mqa"] if rest == "wqkv_a" else _LAYER[rest]
    for e in range(n_slices if rest.startswith("experts.") else 1):
        for name in names:
            yield f"{p}{name.format(e)}.weight"
