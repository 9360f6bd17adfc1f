"""What this process may use of the machine: processors and memory, as affinity and control groups leave them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from . import _core

ROOT = Path("/")


def read_text(path: Path) -> str:
    """A small file; empty if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def number(path: Path, key: str = "") -> int | None:
    """The number in a file, or behind ``key`` in a table; None if there is none: "max", -1, no such file."""
    words = ["", *read_text(path).split()]
    text = words[words.index(key) + 1] if key in words[:-1] else ""
    return int(text) if text.isdigit() else None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's control group and of those above it, in versions 2 and 1; some may not exist."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, names, path = (line + "::").split(":", 3)[:3]
        if names and controller not in names.split(","):
            continue
        for mount in {names, controller} if names else (".", "unified"):
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")  # in a container perhaps the host's path: then only the top is there
            yield from (top, *(g for g in (group, *group.parents) if top in g.parents))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors whose time the control groups allow, 1.5 for instance; None: no limit."""
    found = []
    for group in _groups("cpu", root):
        words = read_text(group / "cpu.max").split() or [
            read_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(words) == 2 and all(w.isdigit() for w in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def processors(root: Path = ROOT) -> int:
    """How many threads of this process can run at the same time."""
    n, quota = len(os.sched_getaffinity(0)), cpu_quota(root)
    return n if quota is None else max(1, min(n, int(quota)))  # a started one would be held up while others wait for it


def default_threads(root: Path = ROOT) -> int:
    """One per physical core, of the processors that this process may use."""
    return min(_core.default_threads(), processors(root))


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that can be allocated without swapping, of the system and of the control groups; None: unknown."""
    system = number(root / "proc/meminfo", "MemAvailable:")
    found = [] if system is None else [system * 1024]
    for group in _groups("memory", root):
        for limit, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most = number(group / limit)
            if most is not None and (used := number(group / usage)) is not None:
                # pages of files count as used and are given back when memory is wanted
                files = (number(group / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
                found.append(max(0, most - max(0, used - sum(n or 0 for n in files))))
    return min(found, default=None)
