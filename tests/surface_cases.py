"""Tiny packed models for the tests of the Python surface, packed once per run, and the command line as a process."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import deepcalm
import tiny

Run = Callable[..., tuple[int, bytes, str]]
PACKAGE_PARENT = str(Path(deepcalm.__file__).parent.parent)
COMMAND = [sys.executable, "-m", "deepcalm"]


@functools.cache
def root() -> Path:
    """A directory that lives as long as the test run."""
    path = tempfile.mkdtemp(prefix="deepcalm-surface-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def checkpoint(preset: str = "v3", seed: int = 0) -> Path:
    """Folder of a tiny checkpoint in f32."""
    return tiny.write(root() / f"{preset}-{seed}", preset, dtype="f32", seed=seed)


@functools.cache
def packed(preset: str = "v3", seed: int = 0, dtype: str = "source") -> Path:
    """Its packed file."""
    path = root() / f"{preset}-{seed}-{dtype}.dcalm"
    deepcalm.pack(checkpoint(preset, seed), path, dtype=dtype, force=True)
    return path


@functools.cache
def model(preset: str = "v3", threads: int = 1) -> deepcalm.Model:
    """The opened model."""
    return deepcalm.Model(packed(preset), threads=threads)


@functools.cache
def small_logits() -> Path:
    """Folder of a tiny checkpoint in f32 whose logits are subnormal for every second id."""
    from safetensors.numpy import load_file, save_file

    folder = tiny.write(root() / "small", "v3", dtype="f32", n_shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][::2] *= np.float32(1e-38)
    save_file(tensors, folder / "model.safetensors")
    return folder


@functools.cache
def endless() -> Path:
    """A packed model that never ends a greedy text by itself: the rows of its end tokens in the head are zero."""
    from safetensors.numpy import load_file, save_file

    folder = tiny.write(root() / "endless", "v3", dtype="f32", n_shards=1, max_position_embeddings=100_000)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][266:270] = 0
    tensors["model.layers.3.shared_head.head.weight"][266:270] = 0
    save_file(tensors, folder / "model.safetensors")
    deepcalm.pack(folder, root() / "endless.dcalm")
    return root() / "endless.dcalm"


def environment(**extra: str) -> dict[str, str]:
    """The environment for a command: this package, no colours, no wide terminal."""
    return {**os.environ, "PYTHONPATH": PACKAGE_PARENT, "NO_COLOR": "1", "COLUMNS": "80", **extra}


def run(
    *args: str | bytes | Path, stdin: bytes = b"", env: dict[str, str] | None = None, **options: Any
) -> tuple[int, bytes, str]:
    """Runs a command: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [*COMMAND, *args], input=stdin, env=environment(**(env or {})), timeout=60, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip
    return done.returncode, done.stdout or b"", (done.stderr or b"").decode()


def error(result: tuple[int, bytes, str]) -> str:
    """The one line of a command's failure."""
    code, out, err = result
    assert (code, out) == (1, b"") and err.startswith("deepcalm: error: ") and err.count("\n") == 1, result
    return err


class Terminal:
    """A command whose three streams are a pseudo-terminal."""

    def __init__(self, *args: str | Path, width: int = 80, **env: str) -> None:
        self._fd, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *args], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env=environment(TERM="xterm", COLUMNS=str(width), **env),
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 30) -> str:
        """Reads until ``pattern`` has appeared since the last call; what was shown by then, without escapes."""
        new, end = "", time.monotonic() + seconds
        while not re.search(pattern, plain(new)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self._fd], [], [], left)[0], f"{pattern!r} not in {plain(new)!r}"
            try:
                new += os.read(self._fd, 65536).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"ended; {pattern!r} not in {plain(new)!r}") from None
        self.shown += new
        return plain(new)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def ends(self) -> int:
        """Its exit code, once all that it shows has been read."""
        with contextlib.suppress(OSError):
            while piece := os.read(self._fd, 65536):
                self.shown += piece.decode("utf-8", "replace")
        os.close(self._fd)
        return self.process.wait(timeout=30)


def plain(text: str) -> str:
    """Without the escapes of line editing."""
    return re.sub(r"\x1b(\[[\d;?]*[A-Za-z]|[=>])", "", text).replace("\r", "")
