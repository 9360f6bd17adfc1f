"""The safetensors container, for checkpoints and packed files: strict headers, positioned reads.

A file is 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes or overlaps. Every
number is checked against the real file size before anything is allocated.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..closing import Closing
from ..errors import Error, ResourceError, show

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
MAX_TENSORS = 2_000_000
ALIGN = 64  # packed files: the data section and every tensor start at multiples of this
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` is absolute in the file, ``nbytes`` = product(shape) * element size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``tensors`` is in the order of the JSON text."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int
    file_size: int
    raw: bytes


def parse_json(data: bytes, what: str, error: type[Error], lenient: bool = False) -> Any:
    """JSON without duplicate keys, NaN, Infinity, lone surrogates, nesting bombs or endless numbers; else ``error``.

    lenient: what Python writes and transformers reads is read, NaN and Infinity, and a byte order mark.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError(f"key {show(Counter(key for key, _ in pairs).most_common(1)[0][0])} appears twice")
        return out

    def number(text: str) -> float:
        value = float(text)
        if not (lenient or math.isfinite(value)):  # 1e999 too: written out again it would be Infinity
            raise ValueError(f"{text[:40]} is not JSON")
        return value

    try:
        text = data.decode("utf-8-sig" if lenient else "utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_float=number, parse_constant=number)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is not text: UnicodeEncodeError
        return value
    except RecursionError:
        raise error(f"{what}: JSON nested too deeply") from None
    except (ValueError, MemoryError) as e:
        raise error(f"{what}: not valid JSON: {str(e)[:160] or type(e).__name__}") from None


def check_output(path: Path) -> None:
    """Raises ResourceError unless a file can be written there: for long work, before it begins."""
    special = path.exists() and not path.is_file() and not path.is_dir()  # a device, a pipe
    code = 0
    if path.is_dir():
        code = errno.EISDIR
    elif not special and not path.resolve().parent.is_dir():
        code = errno.ENOENT
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        code = errno.EACCES
    if code:
        raise ResourceError(f"{path}: cannot be written: {os.strerror(code)}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends well; until then ``path`` stays as it was.

    The name is a temporary one beside it, one for each writer, and leaves nothing behind; a symbolic link is followed.
    What is no regular file (/dev/stdout, a pipe), or one without a name (/proc/self/fd/N), is written to as it is.

    Raises:
        ResourceError: it cannot be written.
    """
    check_output(path)
    target = path.resolve()
    name = target.with_name(f".{secrets.token_hex(8)}.tmp") if target.is_file() or not path.exists() else path
    try:
        yield name
        if name != path:
            with name.open("rb+") as f:
                os.fsync(f.fileno())
            name.replace(target)
    except OSError as e:
        raise ResourceError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        if name != path:
            name.unlink(missing_ok=True)


def _refuse_foreign(f: File) -> None:
    """A file that stands for another one, or is of another kind, is called by its name."""
    head = f.read(0, min(f.size, 40))
    if head.startswith(b"version https://git-lfs.github.com/"):
        raise f.error(f"{f.path}: a git-LFS pointer, not the file itself; fetch it with: git lfs pull")
    if head.startswith(b"GGUF"):
        raise f.error(f"{f.path}: a GGUF file, which is not read; pack the Hugging Face checkpoint it was made from: "
                      "deepcalm pack ORG/NAME FILE.dcalm")  # fmt: skip


class File(Closing):
    """An open regular file read by position; every failure is ``error`` with the file's name."""

    def __init__(self, path: Path, error: type[Error]) -> None:
        self.path = path
        self.error = error
        try:
            # O_NONBLOCK: a named pipe must be refused, not waited for
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as e:
            raise error(f"{path}: cannot open: {getattr(e, 'strerror', None) or e}") from None
        info = os.fstat(self.fd)
        if not stat.S_ISREG(info.st_mode):
            self.close()
            raise error(f"{path}: not a regular file")
        self.size = info.st_size
        self.mtime_ns = info.st_mtime_ns

    def close(self) -> None:
        """Closes the descriptor; safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer`` (writable bytes) from ``offset``; a short file is an error."""
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise self.error(f"{self.path}: read at byte {offset + done} failed: {e.strerror}") from None
            if n == 0:
                raise self.error(f"{self.path}: ends at byte {offset + done}, expected {offset + len(buffer)}")
            done += n

    def read(self, offset: int, n: int) -> bytes:
        """``n`` bytes from ``offset``, after checking that the file has them."""
        if n < 0 or offset + n > self.size:
            raise self.error(f"{self.path}: {self.size} bytes, expected at least {offset + n}: truncated")
        buffer = bytearray(n)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)


def read_file(path: Path, limit: int, error: type[Error]) -> bytes:
    """A whole small file; one larger than ``limit`` bytes is refused."""
    with File(path, error) as f:
        if f.size > limit:
            raise error(f"{path}: {f.size} bytes, expected at most {limit}")
        _refuse_foreign(f)
        return f.read(0, f.size)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(path: Path, name: str, entry: object, data_offset: int, file_size: int, error: type[Error]) -> TensorInfo:
    where = f"{path}: tensor {show(name)}"
    if len(name) > 1024 or not name.isprintable():
        raise error(f"{where}: the name is too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise error(f"{where}: dtype {show(dtype)} is not one of {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        raise error(f"{where}: shape {show(shape)}, expected at most 8 sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise error(f"{where}: data_offsets {show(offsets)}, expected two byte positions")
    nbytes = DTYPE_BYTES[dtype]
    for n in shape:
        nbytes *= n  # Python integers do not overflow
    begin, end = offsets
    if end - begin != nbytes:
        raise error(f"{where}: {end - begin} bytes at data_offsets {offsets}, expected {nbytes} for {dtype} {shape}")
    if data_offset + end > file_size:
        raise error(f"{where}: ends at byte {data_offset + end} of a file of {file_size} bytes: truncated or damaged")
    return TensorInfo(name, dtype, tuple(shape), data_offset + begin, nbytes)


def read_header(f: File) -> Header:
    """Reads and checks the header of an open file (limits: 100 MB of header, 2 million tensors)."""
    path, error = f.path, f.error
    _refuse_foreign(f)
    n = int.from_bytes(f.read(0, 8), "little") if f.size >= 8 else -1
    if n < 2 or n > MAX_HEADER_BYTES or 8 + n > f.size:
        found = f"{f.size} bytes" if n < 0 else f"header of {n} bytes in a file of {f.size}"
        raise error(f"{path}: {found}, expected a safetensors file (header of 2..{MAX_HEADER_BYTES} bytes)")
    raw = f.read(8, n)
    if raw[:1] != b"{":
        raise error(f"{path}: header starts with {show(raw[:8])}, expected '{{'")
    parsed = parse_json(raw, f"{path}: header", error)
    if not isinstance(parsed, dict) or len(parsed) > MAX_TENSORS:
        raise error(f"{path}: header is not an object of at most {MAX_TENSORS} tensors")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(f"{path}: __metadata__ must map strings to strings")
    data_offset = 8 + n
    tensors = {name: _tensor(path, name, entry, data_offset, f.size, error) for name, entry in parsed.items()}
    end = data_offset
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset != end:
            kind = "overlaps its neighbour" if t.offset < end else "leaves a hole before it"
            raise error(f"{path}: tensor {show(t.name)} starts at byte {t.offset}, expected {end}: it {kind}")
        end = t.offset + t.nbytes
    if end != f.size:
        raise error(f"{path}: {f.size} bytes, expected {end}: bytes after the last tensor")
    return Header(tensors, metadata, data_offset, f.size, raw)


def build_header(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Length and JSON of a packed file's header, padded with spaces so that the data start at a multiple of ALIGN.

    tensors: name -> (dtype, shape, byte count, a multiple of ALIGN), laid out in this order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text
