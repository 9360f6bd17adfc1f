"""The machine under a measurement: what it is, what else used it, what this process holds of its memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .. import _core
from ..limits import number, read_text

PROC = Path("/proc")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the version that was measured."""
    found = re.search(r"^model name\s*:(.*)", read_text(PROC / "cpuinfo"), re.MULTILINE)
    return {
        "processor": " ".join(found[1].split()) if found else "unknown",
        "cores": _core.default_threads(),
        "memory_gb": round((number(PROC / "meminfo", "MemTotal:") or 0) * 1024 / 1e9, 1),
        "version": _core.__version__,
    }


class Others:
    """What else used the processor since this was made, from /proc/stat; zeros where that does not exist."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Seconds: on the clock, of processor time in use, of it by this process, and taken by the hypervisor."""
        t, tick = os.times(), os.sysconf("SC_CLK_TCK")
        words = read_text(PROC / "stat").split(maxsplit=10)[1:9]
        if len(words) < 8:
            return t.elapsed, 0.0, 0.0, 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words)
        return t.elapsed, (user + nice + system + irq + softirq) / tick, t.user + t.system, steal / tick

    def cores(self) -> tuple[float, float]:
        """Cores in use by other processes, and taken by the hypervisor (steal), on average."""
        (t0, busy0, own0, steal0), (t, busy, own, steal) = self.start, self._now()
        seconds = max(t - t0, 1e-9)
        return max(busy - busy0 - (own - own0), 0.0) / seconds, (steal - steal0) / seconds


def resident() -> tuple[int, int]:
    """Bytes of this process in memory, and those of them that no file backs; zeros where /proc does not exist."""
    rss, anonymous = (number(PROC / "self/status", key) or 0 for key in ("VmRSS:", "RssAnon:"))
    return rss * 1024, anonymous * 1024
