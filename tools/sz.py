#!/usr/bin/env python3
"""Print lines per file and per area against the project's budgets.

The budgets are tripwires, checked by the test suite: raise one only in a commit that says what it buys. Blank lines
and comments count: what a reader scrolls past is what is measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Area:
    """One budget: the files that match any of `globs`, relative to the project's root."""

    name: str
    globs: tuple[str, ...]
    budget: int | None  # lines; None: reported, not limited


AREAS = (
    Area(
        "C++",
        tuple(f"{d}/*.{e}" for d in ("kernels", "kernels/cpu", "runtime", "runtime/cpu") for e in ("h", "cc")),
        6370,
    ),
    Area("bindings", ("python/*.cc", "python/*.h"), 1350),
    Area("CUDA", ("kernels/cuda/*.*", "runtime/cuda/*.*"), 5140),
    Area("simulator of CUDA", ("tests/sim/*.h", "tests/sim/*.cc"), 1180),
    Area(
        "Python core, files and their commands",
        (
            *("python/deepcalm/*.py", "python/deepcalm/files/*.py"),
            *(f"python/deepcalm/cli/{name}.py" for name in ("__init__", "common", "run", "files")),
        ),
        6250,
    ),
    Area("Python check", ("python/deepcalm/check/*.py", "python/deepcalm/cli/check.py"), 1680),
    Area("Python measure", ("python/deepcalm/measure/*.py", "python/deepcalm/cli/bench.py"), 1330),
    Area("tools", ("tools/**/*.py",), None),
    Area("tests", ("tests/**/*.py",), None),
)


def count_lines(root: Path, area: Area) -> dict[Path, int]:
    """Lines of every file of `area` below `root`, keyed by path relative to it."""
    files = sorted({p for g in area.globs for p in root.glob(g) if p.is_file()})
    return {p.relative_to(root): len(p.read_bytes().splitlines()) for p in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-q", "--quiet", action="store_true", help="areas only, no files")
    args = parser.parse_args()
    over = False
    for area in AREAS:
        lines = count_lines(ROOT, area)
        total = sum(lines.values())
        if not args.quiet:
            for path, n in lines.items():
                print(f"{n:6d}  {path}")
        limit = f" of {area.budget}" if area.budget is not None else ""
        print(f"{total:6d}{limit}  {area.name}\n" if not args.quiet else f"{total:6d}{limit}  {area.name}")
        over |= area.budget is not None and total > area.budget
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
