"""What the measuring tools share: what was measured and on what, and how it is drawn."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepcalm.measure.machine

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; "" outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> dict[str, Any]:
    """The machine as `deepcalm bench` describes it, and the commit."""
    return deepcalm.measure.machine.machine() | {"commit": commit()}


def draw_cost(
    axes: Any, contexts: list[int], ms: list[float], fit: Sequence[float] | None, color: str, label: str
) -> None:
    """Milliseconds of a step at each context, and the line of `report.linear_cost` through them."""
    axes.plot(contexts, ms, "o", color=color, label=label if fit is None else None)
    if fit is not None:
        line = f"{label}: {fit[0]:.2f} ms + {1e3 * fit[1]:.2f} us per position"
        axes.plot(contexts, [fit[0] + fit[1] * c for c in contexts], "-", color=color, linewidth=1, label=line)
