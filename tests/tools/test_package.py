"""The package's shape: what is public, which module may import which, and what a start does not load."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import commands
import deepcalm
from deepcalm import _core

PACKAGE = Path(deepcalm.__file__).parent
# A module or folder imports from its own line or from those above it.
FLOORS = (
    ("_core", "errors"),
    (
        *("arguments", "closing", "geometry", "limits", "names", "sampling", "tables", "template", "template_process"),
        "text",
    ),
    ("files",),
    (
        *("batch", "batch_file", "batch_lines", "device", "drafters", "drafting", "generation", "markup", "model"),
        *("session", "wire"),
    ),
    ("check", "cluster", "measure", "serve"),
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """Dotted name inside the package ("files.pack"; a folder's own: "files") -> file; the package itself left out."""
    names = {p: p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for p in PACKAGE.rglob("*.py")}
    return {n.removesuffix(".__init__"): p for p, n in names.items() if n != "__init__"}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that ``path`` imports, in functions too; those for type checkers apart."""
    found: set[str] = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "deepcalm" for a in node.names), f"{name}: import relatively"
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "deepcalm" or node.level, f"{name}: import relatively"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for a in node.names:
            whole, part = ".".join([*base, a.name]), ".".join(base)
            target = whole if whole in known else part
            assert target in known, f"{name} imports {whole}"
            found.add(target)
    return found


def test_imports_have_no_circle_and_follow_the_arrows() -> None:
    found = modules()
    graph = {name: imports(name, path, {*found, "_core"}) for name, path in found.items()}
    tuple(TopologicalSorter(graph).static_order())  # CycleError names a circle
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == {name.split(".")[0] for name in found} | {"_core"}
    for name, targets in graph.items():
        for target in targets:
            assert floor[target.split(".")[0]] <= floor[name.split(".")[0]], f"{name} imports {target}"


def test_public_names_resolve_and_no_module_hides_one() -> None:
    for module in pkgutil.walk_packages(deepcalm.__path__, "deepcalm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert not {module.name for module in pkgutil.iter_modules(deepcalm.__path__)} & set(deepcalm.__all__)
    for name in deepcalm.__all__:
        value = getattr(deepcalm, name)
        assert callable(value) or value == _core.__version__, name
    assert set(deepcalm.__all__) <= set(dir(deepcalm))
    with pytest.raises(AttributeError, match="nothing"):
        deepcalm.nothing  # noqa: B018


def test_import_and_help_load_nothing_heavy() -> None:
    heavy = ("numpy", "tokenizers", "jinja2", "rich", "prompt_toolkit", "safetensors", "ml_dtypes", "deepcalm._core")
    code = f"""
import io, sys, deepcalm.cli
sys.stdout = io.StringIO()
for command in ([], *([c] for c in deepcalm.cli.cli.commands)):
    assert deepcalm.cli.main([*command, "--help"]) == 0
assert sys.stdout.getvalue().count("Usage:") == 1 + len(deepcalm.cli.cli.commands)
print([m for m in {heavy!r} if m in sys.modules], file=sys.__stdout__)
"""
    done = subprocess.run([sys.executable, "-c", code], env=commands.environment(), capture_output=True, check=True)
    assert done.stdout.strip() == b"[]", done.stdout
