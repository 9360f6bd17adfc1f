"""The packer: a Hugging Face checkpoint folder -> one ``.dcalm`` file in the layout in which it runs.

Work goes in slabs of row tiles, so memory is bounded whatever the checkpoint's size: this thread reads and converts, a
second one hashes and writes. The file is written as DST.partial beside a journal, and a later call resumes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import CheckpointError, ResourceError
from .checkpoint import Checkpoint, Weight
from .packed import FORMAT_VERSION, NO_SHA256, TILE_ROWS, Tensor, default_floats
from .plan import Part, Plan, make_plan
from .safetensors import build_header

SLAB_BYTES = 8 << 20  # bytes of output, and of source, of one step
LARGE_PAGE = 2 << 20  # the system keeps a file in such pages where one write covers all of one; decoding is faster then
Progress = Callable[[int, int], object]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@default_floats()
def plan(
    src: str | Path,
    dtype: str = "source",
    attn_dtype: str | None = None,
    head_dtype: str | None = None,
    draft_head_dtype: str | None = None,
) -> Plan:
    """What packing the checkpoint folder ``src`` would do; reads headers only (and an MTP layer's copies, to compare).

    dtype: "source" (every weight in its own precision, codes and scales unchanged; fp4 becomes q8) | "f32" | "bf16" |
    "f16" | "f8" | "q8" | "q4" (FFN and experts; attention and head q8). attn_dtype, head_dtype override it for those
    tensors. Norms, biases and router are f32; embedding and eh_proj never below bf16. draft_head_dtype: a second,
    cheaper copy of the head for the MTP layer's drafts, which never changes the text; "none", or by default "q4" with
    dtype "q8" and "q4". Raises CheckpointError, ConfigError, UnsupportedError (unknown dtype).
    """
    with Checkpoint(src) as ckpt:
        return make_plan(ckpt, dtype, attn_dtype, head_dtype, draft_head_dtype)


@default_floats()
def pack(
    src: str | Path,
    dst: str | Path,
    dtype: str = "source",
    attn_dtype: str | None = None,
    head_dtype: str | None = None,
    draft_head_dtype: str | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Plan:
    """Packs the checkpoint folder ``src`` into the file ``dst`` and returns the plan that was carried out.

    dtypes: see ``plan``. progress(done_bytes, total_bytes) is called from this thread every few
    MiB. ``dst`` appears only when complete (fsynced, then renamed); one that exists is replaced with ``force`` only, a
    file of the checkpoint never. After an interruption or a full disk ``dst.partial`` stays, and the same call resumes
    it with the same result; after a refusal it is removed. Raises CheckpointError, ConfigError, UnsupportedError,
    ResourceError (disk, permissions, ``dst``).
    """
    dst = Path(dst)
    with Checkpoint(src) as ckpt:
        sources = {os.path.realpath(file) for file in ckpt.path.iterdir() if file.suffix != ".dcalm"}
        if os.path.realpath(dst) in sources:  # a hub's cache has links to files elsewhere
            raise ResourceError(f"{dst}: would overwrite a file of the checkpoint itself")
        check_target(dst, force)
        p = make_plan(ckpt, dtype, attn_dtype, head_dtype, draft_head_dtype)
        tensors = [*p.tensors, *p.file_tensors()]
        total, versions = lay_out(p, tensors), json.dumps([_core.__version__, ckpt.mtimes()]).encode()
        identity = hashlib.sha256(versions + file_header(p, tensors) + b"".join(p.files.values()))
        try:
            _write(ckpt, p, tensors, _Partial(dst, tensors, total, identity.hexdigest(), force), total, progress)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = f"; {dst.name}.partial is kept: make room and run again, or delete it" if full else ""
            raise ResourceError(f"{dst}: cannot write the packed file: {e.strerror}{hint}") from None
    return p


def check_target(dst: Path, force: bool) -> None:
    """Raises ResourceError for a target that cannot be written, or that exists and is not to be replaced."""
    if dst.is_dir() or not dst.parent.is_dir():
        raise ResourceError(f"{dst}: {'is a folder' if dst.is_dir() else 'its folder does not exist'}")
    if os.path.lexists(dst) and not force:
        raise ResourceError(f"{dst}: exists; add --force to replace it (in Python force=True)")


def _work_file(path: Path) -> int:
    """A descriptor of a file beside the target, made if it is not there. No link is followed, symbolic or hard."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o644)
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
            return fd
        os.close(fd)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
    raise ResourceError(f"{path}: cannot write the packed file: this name is taken by a link or a device; remove it")


def file_header(p: Plan, tensors: Sequence[Tensor]) -> bytes:
    """The header with the checksums known so far; its length does not depend on them."""
    stored = [s for t in tensors for s in t.stored]
    entries = {s.name: s.entry() | {"sha256": s.sha256} for s in stored}
    dropped = [{"name": d.name, "why": d.why, "bytes": d.bytes} for d in p.dropped]
    texts = {"config": p.config, "source": p.source, "dropped": dropped, "tensors": entries}
    metadata = {"format": "deepcalm", "format_version": FORMAT_VERSION}
    metadata |= {key: json.dumps(value, separators=(",", ":"), sort_keys=True) for key, value in texts.items()}
    return build_header(metadata, {s.name: s.container() for s in stored})


def lay_out(p: Plan, tensors: Sequence[Tensor]) -> int:
    """Gives every tensor its place behind the header; returns the size of the file."""
    end = len(file_header(p, tensors))
    for s in (s for t in tensors for s in t.stored):
        s.offset, end = end, end + s.container()[2]
    return end


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def slabs(pieces: Iterable[Bytes], offset: int) -> Iterator[Bytes]:
    """The bytes of ``pieces``, for ``offset`` of a file on, in arrays that end where SLAB_BYTES divides the offset."""
    parts: list[Bytes] = []
    for piece in pieces:
        taken = 0
        while taken < len(piece):
            parts.append(piece[taken : taken + SLAB_BYTES - offset % SLAB_BYTES])
            taken, offset = taken + len(parts[-1]), offset + len(parts[-1])
            if offset % SLAB_BYTES == 0:
                yield np.concatenate(parts)
                parts.clear()
    if parts:
        yield np.concatenate(parts)


class _Partial:
    """DST.partial and its journal: exclusive, resumable, renamed to DST at the end.

    The journal is JSON lines: the key of what is packed, then name, checksums and near-zero groups of every finished
    tensor. What it claims is read back and hashed before it is believed (it may have outlived data that a power loss
    took).
    """

    def __init__(self, dst: Path, tensors: list[Tensor], total: int, key: str, force: bool) -> None:
        self.dst = dst
        self.force = force
        self.path = dst.with_name(dst.name + ".partial")
        self.journal = dst.with_name(dst.name + ".partial.journal")
        self.restarted = False
        with contextlib.ExitStack() as stack:
            self.fd = _work_file(self.path)
            stack.callback(os.close, self.fd)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(self.fd), self.path.lstat()):
                    raise FileNotFoundError  # the other one has ended in between, and this is the file that it made
            except (BlockingIOError, FileNotFoundError):
                raise ResourceError(f"{self.path}: another pack is writing this file") from None
            self._make_room(total)
            self.log = stack.enter_context(os.fdopen(_work_file(self.journal), "r+", encoding="utf-8"))
            self._resume(tensors, total, key)
            stack.pop_all()

    def _make_room(self, total: int) -> None:
        info, disk = os.fstat(self.fd), os.statvfs(self.dst.parent)
        room = disk.f_bavail * disk.f_frsize + info.st_blocks * 512
        if room < total:
            if info.st_size == 0:
                self.path.unlink()
            raise ResourceError(f"{self.dst.parent}: {room} bytes free, the packed file needs {total}")

    def _resume(self, tensors: list[Tensor], total: int, key: str) -> None:
        self.n_done = self._verified(tensors, key, os.fstat(self.fd).st_size == total)
        if self.n_done == 0:
            os.ftruncate(self.fd, 0)  # padding is never written: it must read as zeros
        os.ftruncate(self.fd, total)
        self.log.seek(0)
        self.log.truncate()
        self._note({"key": key})
        for t in tensors[: self.n_done]:
            self.done(t)

    def _verified(self, tensors: list[Tensor], key: str, right_size: bool) -> int:
        """How many leading tensors the journal calls done and whose bytes have the recorded checksums."""
        lines = []
        with contextlib.suppress(OSError, ValueError):
            for line in self.log.read().splitlines():
                lines.append(json.loads(line))
        self.restarted = bool(lines) and lines[0] != {"key": key}
        n = 0
        while right_size and not self.restarted and n < len(tensors) and n + 1 < len(lines):
            t = tensors[n]
            sha = [self._checksum(s.offset, s.nbytes) for s in t.stored]
            line = lines[n + 1]
            near_zero = line.pop("near_zero", -1) if isinstance(line, dict) else -1
            if line != {"name": t.name, "sha256": sha} or near_zero not in range(1 << 62):
                break
            t.near_zero[0] = near_zero
            for s, digest in zip(t.stored, sha, strict=True):
                s.sha256 = digest
            n += 1
        return n

    def _checksum(self, offset: int, size: int) -> str:
        sha = hashlib.sha256()
        for i in range(0, size, SLAB_BYTES):
            sha.update(os.pread(self.fd, min(SLAB_BYTES, size - i), offset + i))
        return sha.hexdigest()

    def _note(self, line: object) -> None:
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    def done(self, t: Tensor) -> None:
        """Notes that the bytes of a tensor, and of its scales, are written."""
        self._note({"name": t.name, "sha256": [s.sha256 for s in t.stored], "near_zero": int(t.near_zero[0])})

    def commit(self) -> None:
        """Makes the file durable and gives it its name."""
        os.fsync(self.fd)
        check_target(self.dst, self.force)  # it may have appeared meanwhile; the finished DST.partial stays then
        self.path.replace(self.dst)
        self.journal.unlink()
        folder = os.open(self.dst.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def discard(self) -> None:
        """Removes what was written: after a refusal there is nothing to resume."""
        self.path.unlink()
        self.journal.unlink()

    def close(self) -> None:
        """Releases the lock; files that are still there stay for a later resume."""
        self.log.close()
        os.close(self.fd)


def _write(
    ckpt: Checkpoint, p: Plan, tensors: list[Tensor], out: _Partial, total: int, progress: Progress | None
) -> None:
    if out.restarted:
        p.notes.append(f"{out.path.name} belonged to another source or other options and was started over")
    elif out.n_done:
        p.notes.append(f"resumed: {out.n_done} of {len(tensors)} tensors were packed already, with the right checksums")
    try:
        write_at(out.fd, file_header(p, tensors), 0)
        with _Writer(out) as writer:
            packer = _Packer(ckpt, writer)
            for t in tensors[out.n_done :]:
                for done in packer.run(t):
                    if progress:
                        progress(done, total)
        write_at(out.fd, file_header(p, tensors), 0)
        out.commit()
        p.notes.extend(_near_zero_notes(tensors))
        if progress:
            progress(total, total)
    except CheckpointError:
        out.discard()
        raise
    finally:
        out.close()


def _near_zero_notes(tensors: list[Tensor]) -> Iterator[str]:
    """How many groups were too small for their format: one sentence a format."""
    found: dict[str, list[Tensor]] = {}
    for t in tensors:
        if t.near_zero[0]:
            found.setdefault(t.format, []).append(t)
    for fmt, hit in found.items():
        names, n = [t.name for t in hit], sum(int(t.near_zero[0]) for t in hit)
        where = " and ".join(names) if len(names) < 3 else f"{len(names)} tensors ({names[0]}, ...)"
        yield f"{n} near-zero groups of {where} are too small for {fmt}: stored in its smallest steps or as zeros"


class _Writer:
    """Hashes and writes buffers in order on a thread of its own; three buffers take turns."""

    def __init__(self, out: _Partial) -> None:
        self.out = out
        self.pool = ThreadPoolExecutor(1, "deepcalm-pack")
        self.buffers: list[Bytes] = [np.empty(0, np.uint8)] * 3
        self.pending: list[Future[None]] = []
        self.turn = 0
        self.sha = hashlib.sha256()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self.pending:
                future.result()

    def buffer(self, size: int) -> Bytes:
        """The buffer whose turn it is, at least ``size`` bytes; raises what an earlier write failed with."""
        while len(self.pending) > 2:
            self.pending.pop(0).result()
        if len(self.buffers[self.turn]) < size:
            self.buffers[self.turn] = np.empty(size, np.uint8)
        return self.buffers[self.turn]

    def put(self, buffer: Bytes, offset: int, t: Tensor, last: bool) -> None:
        """Queues all of ``buffer`` for ``offset``; last: these are the last bytes of ``t``, then of its scales."""
        self.turn = (self.turn + 1) % 3
        self.pending.append(self.pool.submit(self._work, buffer, offset, t, last))

    def _work(self, buffer: Bytes, offset: int, t: Tensor, last: bool) -> None:
        self.sha.update(buffer.data)
        write_at(self.out.fd, buffer.data, offset)
        if last:
            ended = next(s for s in t.stored if s.sha256 == NO_SHA256)
            ended.sha256, self.sha = self.sha.hexdigest(), hashlib.sha256()
            if ended is t.stored[-1]:
                self.out.done(t)


class _Packer:
    """Turns planned tensors into packed bytes, slab by slab."""

    def __init__(self, ckpt: Checkpoint, writer: _Writer) -> None:
        self.ckpt = ckpt
        self.writer = writer
        self.rows = np.empty(SLAB_BYTES, np.uint8)  # stored source rows
        self.grid: tuple[str, npt.NDArray[Any] | None] = ("", None)  # scales of the last weight

    def run(self, t: Tensor) -> Iterator[int]:
        """Queues all bytes of a tensor and of its scales; yields the file offset reached."""
        if t.kind == "file":
            self.writer.put(np.frombuffer(t.data, np.uint8), t.offset, t, True)
            return
        own = t.scale_block is not None and not t.exact
        grid = np.zeros(t.scales.shape if t.scales else 0, np.float32)
        offset, fill = t.offset, 0
        buffer = self.writer.buffer(SLAB_BYTES)
        for s, begin, end in _units(t):
            size = (end - begin) * t.row_bytes
            if fill + size > len(buffer):
                rest = (offset + fill) % LARGE_PAGE  # of a large page: waits for the next write
                done, rest = (fill - rest, rest) if rest < fill else (fill, 0)
                left = buffer[done:fill]
                if done:
                    self.writer.put(buffer[:done], offset, t, False)
                offset, fill = offset + done, rest
                yield offset
                buffer = self.writer.buffer(rest + size)
                buffer[:rest] = left
            view = buffer[fill : fill + size]
            if t.kind == "plain":
                self._plain(t, begin, end, view)
            else:
                self._tiles(t, s, begin, end, view, grid if own else None)
            fill += size
        self.writer.put(buffer[:fill], offset, t, True)
        if t.scales is not None:
            if t.exact:
                self._exact_scales(t, grid)
            self.writer.put(grid.reshape(-1).view(np.uint8), t.scales.offset, t, True)
        yield offset + fill

    def _source(self, w: Weight, lo: int, hi: int) -> tuple[Bytes, npt.NDArray[Any] | None]:
        """Stored rows lo..hi-1 and their scales (the whole grid, but for i4)."""
        need = (hi - lo) * w.row_bytes
        if need > len(self.rows):
            self.rows = np.empty(need, np.uint8)
        if w.scale_dtype != "f32":
            return self.ckpt.read_rows(w, lo, hi, self.rows), self.ckpt.read_scale(w, lo, hi)
        if self.grid[0] != w.name:
            self.grid = (w.name, self.ckpt.read_scale(w))
        return self.ckpt.read_rows(w, lo, hi, self.rows), self.grid[1]

    def _plain(self, t: Tensor, begin: int, end: int, out: Bytes) -> None:
        """Rows begin..end-1 of a plain tensor."""
        w = t.slices[0][0].weight
        data, scale = self._source(w, begin, end)
        bad, near_zero = _core.convert_rows(out, t.format, w.source(data, begin, scale))
        t.near_zero[0] += near_zero
        if bad is not None:
            raise self.ckpt.bad_value(w, begin + bad[0], bad[1], t.format)

    def _tiles(self, t: Tensor, s: int, begin: int, end: int, out: Bytes, grid: Floats | None) -> None:
        """Row tiles begin..end-1 of slice s; grid [n_slices, ...] receives the scales of f8 that we quantise."""
        step, first = 2 if t.interleaved else 1, 0  # first: row tile at which a stacked part starts
        for i, part in enumerate(t.slices[s]):
            t0, t1, at = begin // 2, end // 2, i  # the part's own tiles, and where they go
            if not t.interleaved:
                n_tiles = -(-part.rows // TILE_ROWS)
                t0, t1, at = max(begin - first, 0), min(end - first, n_tiles), max(first - begin, 0)
                first += n_tiles
            if t0 < t1:
                scales = self._part(t, part, t0, t1, out[at * t.row_bytes :], step * t.row_bytes)
                if grid is not None and t.scale_block is not None:
                    g = (begin + at) * TILE_ROWS // t.scale_block[0]
                    grid[s, g : g + step * len(scales) : step] = scales

    def _part(self, t: Tensor, part: Part, t0: int, t1: int, out: Bytes, step: int) -> Floats:
        """Row tiles t0..t1-1 of a part, every ``step`` bytes of ``out``; their f8 scales."""
        w, r0, r1 = part.weight, t0 * TILE_ROWS, min(t1 * TILE_ROWS, part.rows)
        index = part.take.index() if part.transpose else part.take.index(r0, r1)
        lo, hi = int(index.min()), int(index.max()) + 1
        data, scale = self._source(w, lo, hi)
        block = t.scale_block or (16, 32)
        scales = np.empty((-(-(r1 - r0) // block[0]), -(-part.cols // block[1])), np.float32)
        tiles = _core.Tiles(out, step, t.format, t.scale, scales, block)
        cols = r1 - r0 if part.transpose else part.cols
        bad, near_zero = _core.pack_rows(tiles, w.source(data, lo, scale, cols), index - lo, part.transpose, t.exact)
        t.near_zero[0] += near_zero
        if bad is not None:
            raise self.ckpt.bad_value(w, lo + bad[0], bad[1], t.format)
        return scales

    def _exact_scales(self, t: Tensor, grid: Floats) -> None:
        """f8 with the source's codes: each packed block gets the scale of the source block that it lies in."""
        assert t.scale_block is not None
        for s, parts in enumerate(t.slices):
            first = 0
            for i, part in enumerate(parts):
                source = self._source(part.weight, 0, 0)[1]
                assert source is not None
                row_ids, col_ids = part.block_ids()
                row_ids, col_ids = row_ids[::TILE_ROWS], col_ids[:: t.scale_block[1]]
                n = len(row_ids)
                tiles = np.arange(i, 2 * n, 2) if t.interleaved else np.arange(first, first + n)
                first += n
                whole = source.T if part.transpose else source
                grid[s, tiles * TILE_ROWS // t.scale_block[0]] = whole[np.ix_(row_ids, col_ids)]


def _units(t: Tensor) -> Iterator[tuple[int, int, int]]:
    """(slice, begin, end) row tiles (plain: rows) of one step, at most about SLAB_BYTES of source and of output."""
    align = 2 if t.interleaved else t.scale_block[0] // TILE_ROWS if t.scale_block and not t.exact else 1
    for s, parts in enumerate(t.slices):
        source = max(p.weight.row_bytes for p in parts) * (1 if t.kind == "plain" else TILE_ROWS)
        n = max(1, SLAB_BYTES // max(t.row_bytes, source) // align) * align
        if parts[0].transpose:
            n = t.slice_rows  # a transposed slice is read whole
        for begin in range(0, t.slice_rows, n):
            yield s, begin, min(begin + n, t.slice_rows)
