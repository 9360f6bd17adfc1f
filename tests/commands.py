"""The command line as a process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deepcalm
from deepcalm import _core

Run = Callable[..., tuple[int, bytes, str]]
PACKAGE_PARENT = str(Path(deepcalm.__file__).parent.parent)
COMMAND = [sys.executable, "-m", "deepcalm"]


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


def ended_servers(patch: pytest.MonkeyPatch) -> None:
    """Servers listen at a free port of this machine, and end when they have begun."""
    from deepcalm.serve import server  # which most tests need not load

    listen, run = server.listen, server.run
    patch.setattr(server, "listen", lambda *_: listen("127.0.0.1", 0))
    patch.setattr(server, "run", lambda api, *rest: (api.stopping.set(), run(api, *rest))[1])


def cheap_probes(patch: pytest.MonkeyPatch) -> None:
    """Probes of the machine are tested where they are defined; elsewhere they would only cost time."""
    patch.setattr(_core, "read_bandwidth", lambda threads, *_: 10.0 * threads)
    patch.setattr(_core, "compute_ceilings", lambda *_: {"f32": 100.0, "int8": 400.0})
    patch.setattr(_core, "inner_loop_rate", lambda _isa, fmt, *_: {"f32": 50.0}.get(fmt, 200.0))
    patch.setattr(_core, "attention_rate", lambda *_: 40.0)


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
