"""The packed ``.dcalm`` file: the description of a stored tensor, and a reader that checks all of it before use."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..closing import Closing
from ..errors import ConfigError, PackedFileError, show
from .safetensors import ALIGN, DTYPE_BYTES, File, parse_json, read_header

if TYPE_CHECKING:
    from .plan import Part

FORMAT_VERSION = "1"
TILE_ROWS, TILE_COLS = _core.TILE_ROWS, _core.TILE_COLS
TILE_BYTES = {(f["name"], f["scale"]): int(f["tile_bytes"]) for f in _core.formats()}
SCALE_OF = {"f8": "f32", "q8": "f16", "q4": "f16"}  # dtype of the scales that a quantiser gives these formats
NO_SHA256 = "0" * 64  # not known yet; as long as one
MAX_SCALE_BLOCK = 1 << 20
Floats = npt.NDArray[np.float32]


@contextlib.contextmanager
def default_floats() -> Iterator[None]:
    """The default floating-point mode in this thread, then the caller's: Python's own float("1e-6") depends on it."""
    mode = _core.swap_float_mode(None)
    try:
        yield
    finally:
        _core.swap_float_mode(mode)


@dataclass(slots=True)
class Tensor:
    """One tensor of a packed file, from the plan to the bytes: what it is, what it is made of, where it lies.

    The first ten are what the tensor table says.
    """

    name: str
    role: str  # runtime/manifest.h, or "scale", "file"
    kind: str  # "tiled" | "plain" | "scale" (of an f8 tensor) | "file" (tokenizer, template)
    format: str  # kFormats name; plain: f32 | bf16 | f16; scale: f32; file: u8
    scale: str  # dtype of the scales: "f16" | "bf16" | "f32" | ""
    shape: tuple[int, ...]  # [n_slices?, rows, cols] or [n]; rows of stacked parts are padded to 16 each
    parts: tuple[int, ...]  # natural rows of stacked parts, () for one
    interleaved: bool  # two parts alternate tile by tile
    scale_block: tuple[int, int] | None  # f8: rows, cols
    source_dtype: str  # "BF16"; "BF16+F8_E4M3" for mixed parts

    # when it is packed
    slices: list[list[Part]] = field(default_factory=list, repr=False)
    exact: bool = False  # f8, q4: the source's own codes and scales are kept
    note: str = ""
    data: bytes = field(default=b"", repr=False)  # of a file
    near_zero: npt.NDArray[np.int64] = field(  # [1] groups too small for the format
        default_factory=lambda: np.zeros(1, np.int64), repr=False, compare=False
    )
    # in the file
    offset: int = field(default=0, compare=False)  # absolute
    sha256: str = field(default=NO_SHA256, compare=False)  # of the true bytes
    scales: Tensor | None = field(init=False, repr=False)  # of f8: f32 [n_slices, block rows, block cols]

    def __post_init__(self) -> None:
        self.scales = None
        if self.scale_block is not None:
            rows, cols = self.scale_block
            grid = (self.n_slices, -(-self.shape[-2] // rows), -(-self.shape[-1] // cols))
            self.scales = Tensor(self.name + ".scale", "scale", "scale", "f32", "", grid, (), False, None, "F32")

    @classmethod
    def of(cls, spec: dict[str, Any], fmt: str, scale: str, block: tuple[int, int] | None, source: str,
           **planned: Any) -> Tensor:  # fmt: skip
        """An entry of ``_core.expected_tensors``, stored in this format."""
        shape = [spec["n_slices"]] * spec["stacked"] + [spec["rows"]] + [spec["cols"]] * (spec["cols"] > 0)
        return cls(spec["name"], spec["role"], "tiled" if spec["tiled"] else "plain", fmt, scale, tuple(shape),
                   tuple(spec["parts"]), spec["interleaved"], block, source, **planned)  # fmt: skip

    @classmethod
    def file(cls, name: str, size: int, data: bytes = b"") -> Tensor:
        """A tokenizer file or template of ``size`` bytes."""
        return cls("file." + name, "file", "file", "u8", "", (size,), (), False, None, "", data=data)

    @property
    def stored(self) -> list[Tensor]:
        """The tensors in the container: this one, and its f8 scales."""
        return [self, self.scales] if self.scales else [self]

    @property
    def bytes(self) -> int:
        """All stored bytes, scales included, padding excluded."""
        return sum(s.nbytes for s in self.stored)

    @property
    def n_slices(self) -> int:
        """Slices of a stacked tensor, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def slice_rows(self) -> int:
        """Row tiles (tiled) or rows of a slice; a vector is one row."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        return -(-rows // TILE_ROWS) if self.kind == "tiled" else rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row tile (tiled) or of one row."""
        col_tiles = -(-self.shape[-1] // TILE_COLS)
        if self.kind == "tiled":
            return col_tiles * TILE_BYTES[self.format, self.scale]
        return self.shape[-1] * DTYPE_BYTES[self.format.upper()]

    @property
    def nbytes(self) -> int:
        """True bytes, without padding and without f8 scales."""
        return self.row_bytes * self.slice_rows * self.n_slices

    def entry(self) -> dict[str, Any]:
        """The tensor table's entry, without the checksum."""
        out: dict[str, Any] = {"kind": self.kind, "format": self.format, "scale": self.scale, "shape": list(self.shape)}
        out |= {"parts": list(self.parts)} if self.parts else {}
        out |= {"scale_block": list(self.scale_block)} if self.scale_block else {}
        return out | {"source_dtype": self.source_dtype, "bytes": self.nbytes}

    def container(self) -> tuple[str, tuple[int, ...], int]:
        """(dtype, shape, byte count) in the safetensors header; padded to ALIGN and then flat U8."""
        if self.nbytes % ALIGN:
            padded = -(-self.nbytes // ALIGN) * ALIGN
            return "U8", (padded,), padded
        if self.kind == "tiled":
            return "U8", (*self.shape[:-2], self.slice_rows, self.row_bytes), self.nbytes
        return self.format.upper(), self.shape, self.nbytes

    def active_bytes(self, num_experts_per_tok: int) -> int:
        """Bytes that decoding one token reads: chosen experts only, one embedding row, no MTP layer."""
        if self.name.startswith("mtp.") or self.kind in ("scale", "file"):
            return 0
        if self.role == "embed":
            return self.row_bytes
        return self.bytes // self.n_slices * num_experts_per_tok if self.role == "expert" else self.bytes


class PackedFile(Closing):
    """A checked packed file. Close it, or use it as a context manager.

    ``config``: the normalised configuration; ``entries``: name -> Tensor in file order; ``source``, ``dropped``: what
    the packer recorded; ``metadata``: the raw strings; ``data_offset``: first byte of the tensors.
    Raises PackedFileError.
    """

    @default_floats()
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = File(self.path, PackedFileError)
        try:
            self.header = read_header(self._file)
            self._check()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def fileno(self) -> int:
        """The open descriptor, which ``_core.Model`` maps: what was checked is what runs."""
        return self._file.fd

    @property
    def header_sha256(self) -> str:
        """Identity of the file: the hash of its header, which holds every tensor's checksum."""
        return hashlib.sha256(self.header.raw).hexdigest()

    # ---- checking ---------------------------------------------------------------------------------------------------

    def _refuse(self, text: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {text}")

    def _json(self, key: str, kind: type) -> Any:
        if key not in self.metadata:
            raise self._refuse(f"__metadata__ has no {key}")
        text = self.metadata[key].encode("utf-8", "replace")
        value = parse_json(text, f"{self.path}: metadata {key}", PackedFileError)
        if not isinstance(value, kind):
            raise self._refuse(f"metadata {key}: expected a JSON {'object' if kind is dict else 'list'}")
        return value

    def _check(self) -> None:
        self.metadata, self.data_offset = self.header.metadata, self.header.data_offset
        if self.metadata.get("format") != "deepcalm":
            raise self._refuse("a safetensors file, but not a packed deepcalm model (see `deepcalm pack`)")
        if self.metadata.get("format_version") != FORMAT_VERSION:
            found = show(self.metadata.get("format_version"))
            raise self._refuse(f"format_version {found}, this build reads {FORMAT_VERSION}")
        if self.data_offset % ALIGN:
            raise self._refuse(f"data start at byte {self.data_offset}, expected a multiple of {ALIGN}")
        self.config: dict[str, Any] = self._json("config", dict)
        self.source: dict[str, Any] = self._json("source", dict)
        self.dropped: list[dict[str, Any]] = self._json("dropped", list)
        for d in self.dropped:
            ok = isinstance(d, dict) and isinstance(d.get("name"), str) and isinstance(d.get("why"), str)
            if not ok or type(d.get("bytes")) is not int:
                raise self._refuse("metadata dropped: expected objects with name, why and bytes")
        try:
            specs = _core.expected_tensors(self.config)
            self._check_tokens()
        except ConfigError as error:
            raise self._refuse(str(error)) from None
        table = self._json("tensors", dict)
        expected: dict[str, Tensor] = {}
        for spec in specs:
            expected |= {t.name: t for t in self._described(spec, table.get(spec["name"])).stored}
        for name, raw in table.items():
            shape = raw.get("shape") if isinstance(raw, dict) else None
            if name.startswith("file.") and isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int:
                expected[name] = Tensor.file(name.removeprefix("file."), shape[0])
        for name in {**expected, **table, **self.header.tensors}:
            if not (name in expected and name in table and name in self.header.tensors):
                what = "is missing" if name in expected else "is not part of this model"
                raise self._refuse(f"tensor {show(name)} {what}")
        self.entries = {name: self._entry(expected[name], table[name]) for name in self.header.tensors}

    def _check_tokens(self) -> None:
        vocab: int = self.config["vocab_size"]
        bos, eos = self.config.get("bos_token_id"), self.config.get("eos_token_ids")
        for key, ids in (("bos_token_id", [] if bos is None else [bos]), ("eos_token_ids", eos or [])):
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab for i in ids):
                raise self._refuse(f"config: {key} is {show(self.config[key])}, expected ids in 0..{vocab - 1}")

    def _described(self, spec: dict[str, Any], raw: object) -> Tensor:
        """The tensor that the manifest expects, in the format that the table gives it."""
        where = f"tensor {spec['name']}"
        if not isinstance(raw, dict):
            raise self._refuse(f"{where}: {'is missing' if raw is None else 'its table entry is not an object'}")
        fmt, scale, source, block = (raw.get(k) for k in ("format", "scale", "source_dtype", "scale_block"))
        scales = [s for f, s in TILE_BYTES if f == fmt] if spec["tiled"] else [""]
        if not isinstance(fmt, str) or fmt not in spec["formats"] or scale not in scales:
            names = ", ".join(spec["formats"])
            raise self._refuse(f"{where}: format {show(fmt)} with {show(scale)} scales, expected one of {names}")
        pair: tuple[int, int] | None = None
        if fmt == "f8":
            b = block if isinstance(block, list) and all(type(n) is int and n > 0 for n in block) else []
            if len(b) != 2 or b[0] % TILE_ROWS or b[1] % TILE_COLS or max(b) > MAX_SCALE_BLOCK:
                raise self._refuse(f"{where}: scale_block {show(block)}, expected multiples of 16 and 32")
            pair = (b[0], b[1])
        if not isinstance(source, str) or len(source) > 64 or not source.isprintable():
            raise self._refuse(f"{where}: source_dtype {show(source)}, expected a name")
        return Tensor.of(spec, fmt, str(scale), pair, source)

    def _entry(self, t: Tensor, raw: object) -> Tensor:
        where, info = f"tensor {show(t.name)}", self.header.tensors[t.name]
        given = raw if isinstance(raw, dict) else {}  # what is no object lacks every key
        expected, sha256 = t.entry(), given.get("sha256")
        for key in {**expected, **given}:
            found, right = given.get(key), expected.get(key)
            if key != "sha256" and (found != right or type(found) is not type(right)):
                raise self._refuse(f"{where}: {show(key)} is {show(found)}, expected {show(right)}")
        if not isinstance(sha256, str) or len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise self._refuse(f"{where}: sha256 is {show(sha256)}, expected 64 hexadecimal digits")
        if (info.dtype, info.shape, info.nbytes) != (want := t.container()):
            found = f"{info.dtype} {list(info.shape)}, {info.nbytes} bytes in the container"
            raise self._refuse(f"{where}: {found}, expected {want[0]} {list(want[1])}, {want[2]} bytes")
        t.sha256, t.offset = sha256, info.offset
        return t

    # ---- contents ---------------------------------------------------------------------------------------------------

    def tensor_table(self) -> list[dict[str, Any]]:
        """What ``_core.Model`` takes: one dict per weight (files left out), offsets absolute, bytes without padding."""
        out = []
        for name, s in self.entries.items():
            if s.kind != "file":
                rows, cols = s.shape[-2:] if len(s.shape) > 1 else (s.shape[0], 0)
                block = s.scale_block or (0, 0)
                row = {"name": name, "kind": s.kind, "format": s.format, "scale": s.scale, "n_slices": s.n_slices}
                row |= {"rows": rows, "cols": cols, "scale_rows": block[0], "scale_cols": block[1]}
                out.append(row | {"offset": s.offset, "bytes": s.nbytes})
        return out

    def read_array(self, offset: int, n: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """``n`` numbers from byte ``offset`` of the file."""
        out = np.empty(n, dtype)
        self._file.read_into(out.view(np.uint8).data, offset)
        return out

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The true bytes of a tensor, uint8 [bytes] (a copy)."""
        if name not in self.entries:
            raise self._refuse(f"no tensor {show(name)}")
        return self.read_array(self.entries[name].offset, self.entries[name].nbytes)

    def tokenizer_file(self, name: str) -> bytes | None:
        """A stored file ("tokenizer.json", "chat_template.jinja", ...) or None."""
        return self.read_bytes("file." + name).tobytes() if "file." + name in self.entries else None

    def unpack(self, name: str, slice: int | None = None) -> Floats:
        """A tensor as f32 in its natural shape: padding removed, stacked parts one under the other (gate, then up).

        slice: one slice of a stacked tensor as [rows, cols]; None: all, [n_slices, rows, cols].
        """
        data, s = self.read_bytes(name), self.entries[name]
        if s.kind == "file":
            raise self._refuse(f"tensor {show(name)} is a stored file, not numbers")
        if slice is not None and not (len(s.shape) == 3 and 0 <= slice < s.n_slices):
            raise self._refuse(f"tensor {name}: no slice {slice}, its shape is {list(s.shape)}")
        if s.kind != "tiled":
            out = np.empty(s.shape, np.float32)
            bad, _ = _core.convert_rows(out, "f32", _core.Source(s.format, data.reshape(1, -1), out.size))
            if bad is not None:
                raise self._refuse(f"tensor {name}: element {bad[1]} is not finite")
            return out if slice is None else out[slice]
        scales = self.unpack(s.scales.name) if s.scales else None
        take, (rows, cols) = _natural_rows(s), s.shape[-2:]
        which = range(s.n_slices) if slice is None else [slice]
        out = np.empty((len(which), len(take), cols), np.float32)
        for i, n in enumerate(which):
            block = s.scale_block or (128, 128)
            out[i] = _core.unpack_slice(data, scales, s.format, s.scale, (s.n_slices, rows, cols), block, n)[take]
        return out if len(s.shape) == 3 and slice is None else out[0]

    def check(self, progress: Callable[[int, int], object] | None = None) -> list[str]:
        """Names of the tensors with a wrong checksum, with padding that is not zero, or with NaN in f8."""
        total = self.header.file_size - self.data_offset
        buffer, bad = np.empty(8 << 20, np.uint8), []
        for name, e in self.entries.items():
            sha, n, nan = hashlib.sha256(), e.nbytes, False
            for begin in range(0, n, len(buffer)):
                view = buffer[: n - begin]
                self._file.read_into(view.data, e.offset + begin)
                sha.update(view.data)
                nan |= e.format == "f8" and bool(((view & 0x7F) == 0x7F).any())
                if progress:
                    progress(e.offset + begin + len(view) - self.data_offset, total)
            if nan or sha.hexdigest() != e.sha256 or any(self._file.read(e.offset + n, e.container()[2] - n)):
                bad.append(name)
        return bad


def _natural_rows(s: Tensor) -> npt.NDArray[np.intp]:
    """Packed row of every natural row, parts in order."""
    out, start = [], 0
    for i, n in enumerate(s.parts or (s.shape[-2],)):
        rows = np.arange(n)
        tile = rows // TILE_ROWS * (len(s.parts) if s.interleaved else 1) + (i if s.interleaved else start)
        out.append(tile * TILE_ROWS + rows % TILE_ROWS)
        start += -(-n // TILE_ROWS)
    return np.concatenate(out)
