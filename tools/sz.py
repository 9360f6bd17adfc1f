#!/usr/bin/env python3
"""Print lines per file, lines and characters per area against the project's budgets, and functions that are too large.

The budgets are tripwires, checked by the test suite: raise one only in a commit that says what it buys. Blank lines
and comments count: what a reader scrolls past is what is measured.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_ARGUMENTS = 80, 8  # of a function


@dataclass(frozen=True, slots=True)
class Area:
    """One budget: the files that match any of `globs` and none of `without`, relative to the project's root."""

    name: str
    globs: tuple[str, ...]
    budget: int | None  # lines; None: reported, not limited
    without: tuple[str, ...] = ()


AMX = tuple(f"kernels/cpu/{name}" for name in ("*tiles.h", "isa_amx.*"))
BATCH = tuple(f"python/deepcalm/{name}.py" for name in ("batch", "batch_lines", "batch_file", "cli/batch"))
WIRE = ("python/deepcalm/wire.py",)
MARKUP = ("python/deepcalm/markup.py",)
CLUSTER = ("python/deepcalm/cluster.py",)
SERVE = ("python/deepcalm/serve/*.py", "python/deepcalm/cli/serve.py")
AREAS = (
    Area(
        "C++",
        tuple(f"{d}/*.{e}" for d in ("kernels", "kernels/cpu", "runtime", "runtime/cpu") for e in ("h", "cc")),
        7189,
        without=AMX,
    ),
    Area("C++ of AMX", AMX, 778),
    Area("bindings", ("python/*.cc", "python/*.h"), 1518),
    Area("CUDA", ("kernels/cuda/*.*", "runtime/cuda/*.*"), 4441),
    Area("simulator of CUDA", ("tests/sim/*.h", "tests/sim/*.cc"), 1190),
    Area(
        "Python core, files and their commands",
        (
            *("python/deepcalm/*.py", "python/deepcalm/files/*.py"),
            *(f"python/deepcalm/cli/{name}.py" for name in ("__init__", "common", "run", "chat", "files")),
        ),
        7837,
        without=(*BATCH, *CLUSTER, *WIRE, *MARKUP),
    ),
    Area("Python batch", BATCH, 1128),
    Area("Python cluster", CLUSTER, 490),
    Area("Python requests", WIRE, 531),
    Area("Python markup", MARKUP, 535),
    Area("Python serve", SERVE, 902),
    Area("Python check", ("python/deepcalm/check/*.py", "python/deepcalm/cli/check.py"), 1692),
    Area("Python measure", ("python/deepcalm/measure/*.py", "python/deepcalm/cli/bench.py"), 1558),
    Area("tools", ("tools/**/*.py",), None),
    Area("tests", ("tests/**/*.py",), None),
)


PRODUCT = ("C++", "C++ of AMX", "bindings", "CUDA")  # areas that are to be 11,000 lines together
PRODUCT_GOAL = 11_000


def count_lines(root: Path, area: Area) -> dict[Path, int]:
    """Lines of every file of `area` below `root`, keyed by path relative to it."""
    without = {p for g in area.without for p in root.glob(g)}
    files = sorted({p for g in area.globs for p in root.glob(g) if p.is_file()} - without)
    return {p.relative_to(root): len(p.read_bytes().splitlines()) for p in files}


@dataclass(frozen=True, slots=True)
class Function:
    """One function with a body: its lines from head to closing brace, and how many arguments it takes."""

    file: str
    name: str
    lines: int
    arguments: int

    @property
    def too_large(self) -> bool:
        return self.lines > MAX_LINES or self.arguments > MAX_ARGUMENTS


def python_functions(path: Path) -> Iterator[Function]:
    """Every function of a Python file, methods and nested ones included; self and cls are no arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            count = len(named) + (a.vararg is not None) + (a.kwarg is not None)
            yield Function(path.name, node.name, (node.end_lineno or node.lineno) - node.lineno + 1, count)


# What is no code: comments, strings and characters, preprocessor lines. Their line ends stay.
NO_CODE = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*""", re.S | re.M
)
NO_NAME = {"requires", "__attribute__", "__launch_bounds__", "alignas", "decltype", "noexcept"}


def cpp_functions(path: Path) -> Iterator[Function]:
    """Every function of a C++ or CUDA file that stands in a namespace or a class; lambdas belong to it."""
    text = NO_CODE.sub(lambda m: "\n" * m.group().count("\n") or " ", path.read_text(encoding="utf-8"))
    head, depth = 0, 0  # where the declaration that is being read begins; open braces of its body
    function: tuple[str, int, int] | None = None
    for m in re.finditer(r"[{};]|\b(?:public|private|protected):", text):
        if function is not None:
            depth += {"{": 1, "}": -1}.get(m.group(), 0)
            if depth == 0:
                name, arguments, begin = function
                lines = text.count("\n", begin, m.start()) + 1
                yield Function(path.name, name, lines, arguments)
                function, head = None, m.end()
            continue
        declared = text[head : m.start()]
        if declared.count("(") > declared.count(")"):  # inside a list of arguments
            continue
        if m.group() == "{" and (found := name_and_arguments(declared)) is not None:
            function, depth = (*found, head + len(declared) - len(declared.lstrip())), 1
        head = m.end()


def name_and_arguments(declared: str) -> tuple[str, int] | None:
    """Of what stands before a brace: None unless it is the head of a function."""
    depth, arguments, name = 0, 0, ""
    for m in re.finditer(r"operator *\S[^\s\w(]*(?=\()|[\w~]+|->|\S", declared):
        token = m.group()
        if token in "(<[{":
            if depth == 0 and token == "(":
                name = re.findall(r"operator *\S+$|[\w~]+(?=\s*$)|$", declared[: m.start()].rstrip())[0]
                arguments = 0 if declared[m.end() :].lstrip().startswith(")") else 1
            depth += 1
        elif token in ")>]}":
            depth -= 1
            if depth == 0 and token == ")" and name not in ("", *NO_NAME):
                return (name, arguments)
        elif depth == 0 and token == "=":
            return None
        elif token == "," and depth == 1:
            arguments += 1
    return None


def functions(root: Path, areas: tuple[Area, ...]) -> Iterator[Function]:
    """Every function of the areas' files."""
    for area in areas:
        for path in count_lines(root, area):
            yield from (python_functions if path.suffix == ".py" else cpp_functions)(root / path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-q", "--quiet", action="store_true", help="areas only, no files")
    args = parser.parse_args()
    over = False
    totals = {}
    for area in AREAS:
        lines = count_lines(ROOT, area)
        totals[area.name] = total = sum(lines.values())
        if not args.quiet:
            for path, n in lines.items():
                print(f"{n:6d}  {path}")
        limit = f" of {area.budget}" if area.budget is not None else ""
        characters = sum((ROOT / path).stat().st_size for path in lines)
        print(f"{total:6d}{limit}  {area.name}, {characters / 1000:.0f} kB", end="\n" if args.quiet else "\n\n")
        over |= area.budget is not None and total > area.budget
    print(f"{sum(totals[name] for name in PRODUCT):6d}, goal {PRODUCT_GOAL}  {', '.join(PRODUCT)}")
    for f in functions(ROOT, tuple(a for a in AREAS if a.budget is not None)):
        if f.too_large:
            print(f"{f.lines:6d} lines, {f.arguments} arguments  {f.file}: {f.name}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
