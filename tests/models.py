"""Tiny models, written, packed and opened once per test run, and passes over them.

Tests of the runtime read the packed file with a reader of their own (ref/packed.py) and hand it to ``_core``: what they
test is not the Python front end. ``model`` opens one as users do.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import deepcalm
import golden_cases
import tiny
from deepcalm import _core
from deepcalm.files.pack import pack as pack_checkpoint
from ref import model as ref_model
from ref import packed as ref_packed
from ref.packed import PackedFile

Array = np.ndarray[Any, Any]
ISAS = [isa["name"] for isa in _core.isas() if isa["supported"]]  # best first
CACHES = ("f32", "f16", "bf16", "q8")


@functools.cache
def root() -> Path:
    """A folder that lives as long as the test run; it holds a lock, by which a later run knows those of killed ones."""
    for old in Path(tempfile.gettempdir()).glob("deepcalm-models-*"):
        with contextlib.suppress(OSError):
            _locked(old)
            shutil.rmtree(old)
    path = Path(tempfile.mkdtemp(prefix="deepcalm-models-"))
    _locked(path)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _locked(folder: Path) -> None:
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def checkpoint(preset: str = "v3", dtype: str | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Folder of a tiny checkpoint; overrides as for ``tiny.write``."""
    folder = root() / "-".join(map(str, [preset, dtype, seed, *(f"{k}={v}" for k, v in overrides.items())]))
    return folder if folder.exists() else tiny.write(folder, preset, dtype=dtype, seed=seed, **overrides)


@functools.cache
def golden_checkpoint(name: str) -> Path:
    return golden_cases.load(name).write_checkpoint(root() / f"golden-{name}")


@functools.cache
def pack(folder: Path, **options: str) -> PackedFile:
    """The packed file of a checkpoint; options as for ``deepcalm.pack.pack`` (dtype, attn_dtype, head_dtype)."""
    path = folder.with_name(folder.name + "".join(f"-{k}-{v}" for k, v in options.items()) + ".dcalm")
    pack_checkpoint(folder, path, **options)
    return PackedFile(path)


@functools.cache
def small(n_dense: int = 1) -> PackedFile:
    """A packed model of dense layers, one MoE layer and an MTP layer."""
    layers = {"num_hidden_layers": n_dense + 1, "first_k_dense_replace": n_dense}
    return pack(checkpoint("v3", "bf16", **layers), dtype="q8")


@functools.cache
def weights(file: PackedFile) -> tuple[ref_model.Settings, ref_model.PackedWeights]:
    """The reference's view of a packed file."""
    return ref_model.settings_of(file.config), ref_model.PackedWeights(file)


@functools.cache
def open_model(file: PackedFile, isa: str, threads: int = 1) -> Any:
    table = ref_packed.core_tensors(file, _core.expected_tensors(file.config))
    with file.path.open("rb") as f:
        return _core.Model(str(file.path), f.fileno(), file.config, table, isa, threads)


@functools.cache
def packed(preset: str = "v3", seed: int = 0, dtype: str = "source") -> Path:
    """The packed file of a checkpoint in f32."""
    return pack(checkpoint(preset, "f32", seed), dtype=dtype).path


@functools.cache
def model(preset: str = "v3", threads: int = 1) -> deepcalm.Model:
    """The opened model."""
    return deepcalm.Model(packed(preset), threads=threads)


@functools.cache
def without_template() -> Path:
    """A packed model without a chat template, as base models have none."""
    folder = tiny.write(root() / "base", "moonlight", dtype="f32")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return pack(folder).path


@functools.cache
def with_nan(token: int) -> PackedFile:
    """A packed model in f32 whose embedding of one token is NaN, which no packer writes."""
    source = pack(checkpoint("v3", "f32"))
    path = shutil.copy(source.path, root() / f"nan-{token}.dcalm")
    table = ref_packed.core_tensors(source, _core.expected_tensors(source.config))
    embed = next(t for t in table if t["name"] == "embed")
    row = embed["bytes"] // embed["rows"]
    with path.open("r+b") as f:
        f.seek(embed["offset"] + token * row)
        f.write(np.full(row // 4, np.nan, np.float32).tobytes())
    return PackedFile(path)


@functools.cache
def small_logits() -> Path:
    """Folder of a tiny checkpoint in f32 whose logits are subnormal for every second id."""
    folder = tiny.write(root() / "small", "v3", dtype="f32", n_shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][::2] *= np.float32(1e-38)
    save_file(tensors, folder / "model.safetensors")
    return folder


@functools.cache
def endless() -> Path:
    """A packed model that never ends a greedy text by itself: the rows of its end tokens in the head are zero."""
    folder = tiny.write(root() / "endless", "v3", dtype="f32", n_shards=1, max_position_embeddings=100_000)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][266:270] = 0
    tensors["model.layers.3.shared_head.head.weight"][266:270] = 0
    save_file(tensors, folder / "model.safetensors")
    return pack(folder).path


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class Run:
    """One pass over ids in pieces, with everything it left behind."""

    def __init__(
        self,
        core: Any,
        ids: Array,
        kv: str = "f32",
        sizes: Sequence[int] | int = 64,
        taps: list[str] | None = None,
        session: Any = None,
    ) -> None:
        """sizes: rows of each pass, or one size for all. session: continue an existing one."""
        n = len(ids)
        if isinstance(sizes, int):
            sizes = [c.stop - c.start for c in chunks(n, sizes)]
        assert sum(sizes) == n
        self.ids, self.kv = ids, kv
        self.session = session or _core.Session(core, max(128, n), kv, max(96, *sizes))
        self.session.trace(taps)
        self.parts: list[slice] = []
        self.taps: list[dict[str, Array]] = []  # per pass
        logits, hidden, begin = [], [], 0
        for size in sizes:
            part = slice(begin, begin + size)
            logits.append(self.session.forward(ids[part], "all"))
            hidden.append(self.session.hidden())
            self.parts.append(part)
            self.taps.append(self.session.taps())
            begin += size
        self.logits = np.concatenate(logits)  # [n, V]
        self.hidden = np.concatenate(hidden)  # [n, d]
        self.cache = self.session.read_cache(False)  # [layers, n, row_bytes]

    def mtp(self, size: int, taps: list[str] | None = None) -> tuple[Array, Array, Array]:
        """Teacher-forced MTP rows 0..n-2 in passes of `size`: (logits [n-1, V], g [n-1, d], cache rows)."""
        self.session.trace(taps)
        self.mtp_parts, self.mtp_taps, out = chunks(len(self.ids) - 1, size), [], []
        for part in self.mtp_parts:
            out.append(self.session.mtp_forward(self.ids[1:][part], self.hidden[part], "all"))
            self.mtp_taps.append(self.session.taps())
        logits, g = (np.concatenate([o[i] for o in out]) for i in (0, 1))
        return logits, g, self.session.read_cache(True)


def rel_rms(ours: Array, theirs: Array) -> float:
    """Root mean square of the difference relative to that of `theirs` (0 / 0 is 0)."""
    difference = float(np.sqrt(np.mean((np.asarray(ours, np.float64) - theirs) ** 2)))
    return difference and difference / float(np.sqrt(np.mean(np.asarray(theirs, np.float64) ** 2)))


def assert_same_bits(what: str, a: Array, b: Array) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, what
    x, y = (np.ascontiguousarray(v).view(np.uint8) for v in (a, b))
    if not np.array_equal(x, y):
        first = np.argwhere(np.atleast_1d(x != y))[0].tolist()
        raise AssertionError(f"{what}: {(x != y).sum()} bytes differ, first at {first}")
