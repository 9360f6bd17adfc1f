"""Reads a packed ``.dcalm`` file: checks its header against the format and the manifest, gives tensors back as numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deepcalm import _core
from deepcalm.container import ALIGN, File, Header, parse_json, read_header, show
from deepcalm.errors import ConfigError, Error, PackedFileError

FORMAT_VERSION = "1"
_PLAIN_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_TILE_BYTES = {(f["name"], f["scale"]): f["tile_bytes"] for f in _core.formats()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a packed file. ``shape`` is the true shape, [n_slices?, rows, cols]; see kernels/format.h."""

    name: str
    kind: str  # "tiled" | "plain" | "scale" | "file"
    format: str  # kFormats name; plain: f32 | bf16 | f16; scale: f32; file: u8
    scale: str  # dtype of the scales: "f16" | "bf16" | "f32" | ""
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    scale_block: tuple[int, int] | None
    source_dtype: str
    bytes: int
    sha256: str
    offset: int  # absolute in the file
    role: str = ""
    interleaved: bool = False
    stacked: bool = False

    @property
    def n_slices(self) -> int:
        """Slices of a stacked tensor, else 1."""
        return self.shape[0] if self.stacked else 1


class PackedFile:
    """A checked packed file. Close it, or use it as a context manager.

    ``config``: the normalised configuration; ``entries``: name -> Entry in file order; ``source``, ``options``,
    ``dropped``: what the packer recorded; ``metadata``: the raw strings. Raises PackedFileError or ConfigError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = File(self.path, PackedFileError)
        try:
            self.header = read_header(self._file)
            self._check()
        except Error:
            self._file.close()
            raise
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def metadata(self) -> dict[str, str]:
        """``__metadata__`` of the container."""
        return self.header.metadata

    @property
    def data_offset(self) -> int:
        """First byte of the tensors."""
        return self.header.data_offset

    @property
    def header_sha256(self) -> str:
        """Identity of the file: the hash of its header, which holds every tensor's checksum."""
        return hashlib.sha256(self.header.raw).hexdigest()

    # ---- checking ---------------------------------------------------------------------------------------------------

    def _refuse(self, text: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {text}")

    def _json(self, key: str, kind: type) -> Any:
        text = self.header.metadata.get(key)
        if text is None:
            raise self._refuse(f"__metadata__ has no {key}")
        value = parse_json(text.encode("utf-8", "replace"), f"{self.path}: metadata {key}", PackedFileError)
        if not isinstance(value, kind):
            raise self._refuse(f"metadata {key} is not a JSON {'object' if kind is dict else 'list'}")
        return value

    def _check(self) -> None:
        found = self.header.metadata.get("format"), self.header.metadata.get("format_version")
        if found[0] != "deepcalm":
            raise self._refuse("a safetensors file, but not a packed deepcalm model (run `deepcalm pack` first)")
        if found[1] != FORMAT_VERSION:
            raise self._refuse(f"format_version {show(found[1])}, this build reads {FORMAT_VERSION}")
        if self.header.data_offset % ALIGN:
            raise self._refuse(f"data start at byte {self.header.data_offset}, expected a multiple of {ALIGN}")
        self.config: dict[str, Any] = self._json("config", dict)
        self.source: dict[str, Any] = self._json("source", dict)
        self.options: dict[str, Any] = self._json("options", dict) if "options" in self.header.metadata else {}
        self.dropped: list[dict[str, Any]] = self._json("dropped", list)
        if not all(isinstance(d, dict) and isinstance(d.get("name"), str) and isinstance(d.get("why"), str) for d in self.dropped):
            raise self._refuse("metadata dropped: expected objects with name and why")
        table = self._json("tensors", dict)
        try:
            specs = {t["name"]: t for t in _core.expected_tensors(self.config)}
        except ConfigError as e:
            raise ConfigError(f"{self.path}: {e}") from None
        self._check_tokens()
        if set(table) != set(self.header.tensors):
            odd = sorted(set(table) ^ set(self.header.tensors))
            raise self._refuse(f"tensor {show(odd[0])} is in only one of the header and the tensor table")
        self.entries = {name: self._entry(name, table[name], specs) for name in self.header.tensors}
        for name in specs:
            if name not in self.entries:
                raise self._refuse(f"tensor {name} is missing")
            e = self.entries[name]
            if e.scale_block is not None and name + ".scale" not in self.entries:
                raise self._refuse(f"tensor {name}.scale is missing")

    def _check_tokens(self) -> None:
        vocab, bos, eos = self.config["vocab_size"], self.config.get("bos_token_id"), self.config.get("eos_token_ids", [])
        for key, ids in (("bos_token_id", [] if bos is None else [bos]), ("eos_token_ids", eos)):
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab for i in ids):
                raise ConfigError(f"{self.path}: config: {key} is {show(self.config[key])}, expected ids in 0..{vocab - 1}")
        if type(self.config.get("tie_word_embeddings", False)) is not bool:
            raise ConfigError(f"{self.path}: config: tie_word_embeddings is not true or false")

    def _entry(self, name: str, raw: object, specs: dict[str, dict[str, Any]]) -> Entry:
        where = f"tensor {show(name)}"
        info = self.header.tensors[name]
        if not isinstance(raw, dict):
            raise self._refuse(f"{where}: its table entry is not an object")
        known = {"kind", "format", "scale", "shape", "parts", "scale_block", "source_dtype", "bytes", "sha256"}
        if unknown := sorted(set(raw) - known):
            raise self._refuse(f"{where}: {show(unknown[0])} is not a known field")
        text = {key: raw.get(key) for key in ("kind", "format", "scale", "source_dtype", "sha256")}
        lists = {key: raw.get(key, []) for key in ("shape", "parts", "scale_block")}
        for key, value in text.items():
            if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
                raise self._refuse(f"{where}: {key} is {show(value)}, expected a string")
        for key, value in lists.items():
            if not isinstance(value, list) or len(value) > 8 or not all(type(n) is int and 0 <= n < 1 << 31 for n in value):
                raise self._refuse(f"{where}: {key} is {show(value)}, expected a short list of sizes")
        digest = text["sha256"]
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise self._refuse(f"{where}: sha256 is {show(digest)}, expected 64 hexadecimal digits")
        e = Entry(
            name=name, kind=text["kind"], format=text["format"], scale=text["scale"], shape=tuple(lists["shape"]),
            parts=tuple(lists["parts"]), scale_block=tuple(lists["scale_block"]) or None, source_dtype=text["source_dtype"],
            bytes=raw.get("bytes", -1), sha256=digest, offset=info.offset,
            role=specs[name]["role"] if name in specs else e_role(name),
            interleaved=name in specs and specs[name]["interleaved"], stacked=name in specs and specs[name]["stacked"],
        )  # fmt: skip
        expected = self._expected_bytes(e, specs, where)
        if type(e.bytes) is not int or e.bytes != expected:
            raise self._refuse(f"{where}: bytes is {show(e.bytes)}, expected {expected} for {e.format} {list(e.shape)}")
        padded = -(-expected // ALIGN) * ALIGN
        if info.nbytes != padded:
            raise self._refuse(f"{where}: {info.nbytes} bytes in the container, expected {padded}")
        return e

    def _expected_bytes(self, e: Entry, specs: dict[str, dict[str, Any]], where: str) -> int:
        """True byte count of an entry after checking kind, format and shape against the manifest."""
        if e.kind == "file" and e.name.startswith("file."):
            if (e.format, e.scale, len(e.shape), e.parts, e.scale_block) != ("u8", "", 1, (), None):
                raise self._refuse(f"{where}: expected a u8 vector")
            return e.shape[0]
        if e.kind == "scale":
            base = e.name.removesuffix(".scale")
            spec, raw = specs.get(base), json.loads(self.header.metadata["tensors"]).get(base) if base in specs else None
            block = raw.get("scale_block") if isinstance(raw, dict) else None
            if spec is None or base == e.name or not isinstance(block, list) or len(block) != 2:
                raise self._refuse(f"{where}: scales of no f8 tensor")
            if not all(type(n) is int and n > 0 for n in block):
                raise self._refuse(f"{where}: scale_block {show(block)}")
            grid = (spec["n_slices"], -(-spec["rows"] // block[0]), -(-spec["cols"] // block[1]))
            if (e.format, e.scale, e.shape, e.parts, e.scale_block) != ("f32", "", grid, (), None):
                raise self._refuse(f"{where}: {e.format} {list(e.shape)}, expected f32 {list(grid)}")
            return 4 * grid[0] * grid[1] * grid[2]
        spec = specs.get(e.name)
        if spec is None:
            raise self._refuse(f"{where}: kind {show(e.kind)} is not part of this model")
        kind = "tiled" if spec["tiled"] else "plain"
        shape = ([spec["n_slices"]] if spec["stacked"] else []) + [spec["rows"]] + ([spec["cols"]] if spec["cols"] else [])
        if e.kind != kind or list(e.shape) != shape or list(e.parts) != spec["parts"]:
            raise self._refuse(
                f"{where}: {show(e.kind)} {list(e.shape)} parts {list(e.parts)}, expected {kind} {shape} parts {spec['parts']}"
            )
        if e.format not in spec["formats"] or (kind == "tiled" and (e.format, e.scale) not in _TILE_BYTES):
            raise self._refuse(f"{where}: format {show(e.format)} scale {show(e.scale)}, expected one of {spec['formats']}")
        if (e.format == "f8") != (e.scale_block is not None):
            raise self._refuse(f"{where}: scale_block {show(e.scale_block)} with format {e.format}")
        if e.scale_block is not None and (
            len(e.scale_block) != 2 or e.scale_block[0] < 16 or e.scale_block[0] % 16 or e.scale_block[1] < 32 or e.scale_block[1] % 32
        ):
            raise self._refuse(f"{where}: scale_block {list(e.scale_block)}, expected multiples of 16 and 32")
        if kind == "plain":
            if e.scale:
                raise self._refuse(f"{where}: scale {show(e.scale)} on a plain tensor")
            return spec["rows"] * max(spec["cols"], 1) * _PLAIN_BYTES[e.format]
        row_tiles, col_tiles = -(-spec["rows"] // _core.TILE_ROWS), -(-spec["cols"] // _core.TILE_COLS)
        return spec["n_slices"] * row_tiles * col_tiles * _TILE_BYTES[e.format, e.scale]

    # ---- contents ---------------------------------------------------------------------------------------------------

    def tensor_table(self) -> list[dict[str, Any]]:
        """What ``_core.Model`` takes: one dict per weight (files left out), offsets absolute, bytes without padding."""
        out = []
        for e in self.entries.values():
            if e.kind == "file":
                continue
            vector = e.kind == "plain" and len(e.shape) == 1
            rows, cols = (e.shape[0], 0) if vector else e.shape[-2:]
            block = e.scale_block or (0, 0)
            out.append({
                "name": e.name, "kind": e.kind, "format": e.format, "scale": e.scale,
                "n_slices": e.shape[0] if e.kind == "scale" else e.n_slices, "rows": rows, "cols": cols,
                "scale_rows": block[0], "scale_cols": block[1], "offset": e.offset, "bytes": e.bytes,
            })  # fmt: skip
        return out

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The true bytes of a tensor, uint8 [bytes] (a copy)."""
        e = self._get(name)
        out = np.empty(e.bytes, np.uint8)
        self._file.read_into(memoryview(out), e.offset)
        return out

    def _get(self, name: str) -> Entry:
        if name not in self.entries:
            raise self._refuse(f"no tensor {show(name)}")
        return self.entries[name]

    def tokenizer_file(self, name: str) -> bytes | None:
        """A stored file ("tokenizer.json", "chat_template.jinja", ...) or None."""
        return self.read_bytes("file." + name).tobytes() if "file." + name in self.entries else None

    def unpack(self, name: str, slice: int | None = None) -> npt.NDArray[np.float32]:
        """A tensor as f32 in its natural shape: padding removed, stacked parts one under the other (gate, then up).

        slice: one slice of a stacked tensor as [rows, cols]; None: all, [n_slices, rows, cols].
        """
        e = self._get(name)
        data = self.read_bytes(name)
        if e.kind == "file":
            raise self._refuse(f"tensor {show(name)} is a stored file")
        if e.kind != "tiled":
            flat = np.empty((1, int(np.prod(e.shape))), np.float32)
            bad = _core.convert_rows(flat, "f32", e.format, data.reshape(1, -1), flat.size)
            if bad is not None:
                raise self._refuse(f"tensor {show(name)}: element {bad[1]} is not finite")
            return flat.reshape(e.shape)
        if slice is not None and not 0 <= slice < e.n_slices:
            raise self._refuse(f"tensor {name}: slice {slice}, expected 0..{e.n_slices - 1}")
        rows, cols = e.shape[-2:]
        scales = self.unpack(name + ".scale") if e.scale_block else None
        block = e.scale_block or (128, 128)
        take = self._natural_rows(e)
        which = range(e.n_slices) if slice is None else [slice]
        out = np.empty((len(which), len(take), cols), np.float32)
        for i, s in enumerate(which):
            out[i] = _core.unpack_slice(data, scales, e.format, e.scale, e.n_slices, rows, cols, *block, s)[take]
        return out if e.stacked and slice is None else out[0]

    def _natural_rows(self, e: Entry) -> npt.NDArray[np.intp]:
        """Packed row of every natural row, parts in order."""
        if not e.parts:
            return np.arange(e.shape[-2])
        tile, out, start = _core.TILE_ROWS, [], 0
        for i, n in enumerate(e.parts):
            rows = np.arange(n)
            out.append((rows // tile * len(e.parts) + i) * tile + rows % tile if e.interleaved else start + rows)
            start += -(-n // tile) * tile
        return np.concatenate(out)

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Names of the tensors whose bytes do not have the recorded checksum or whose padding is not zero."""
        total = sum(e.bytes for e in self.entries.values())
        buffer, done, bad = np.empty(8 << 20, np.uint8), 0, []
        for e in self.entries.values():
            sha, padded = hashlib.sha256(), self.header.tensors[e.name].nbytes
            for begin in range(0, e.bytes, len(buffer)):
                view = memoryview(buffer)[: min(len(buffer), e.bytes - begin)]
                self._file.read_into(view, e.offset + begin)
                sha.update(view)
                done += len(view)
                if progress:
                    progress(done, total)
            padding = self._file.read(e.offset + e.bytes, padded - e.bytes)
            if sha.hexdigest() != e.sha256 or any(padding):
                bad.append(e.name)
        return bad


def e_role(name: str) -> str:
    """Role of the entries that are not weights."""
    return "file" if name.startswith("file.") else "scale"


def read(path: str | Path) -> PackedFile:
    """Opens and checks a packed file; raises PackedFileError or ConfigError."""
    return PackedFile(path)


def unpack(path: str | Path, name: str, slice: int | None = None) -> npt.NDArray[np.float32]:
    """One tensor of a packed file as f32 in its natural shape; see ``PackedFile.unpack``."""
    with PackedFile(path) as f:
        return f.unpack(name, slice)
