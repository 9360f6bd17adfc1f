"""The documents: what they name exists, what they show is what the script makes, what they tell to run runs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import api_page
import deepcalm
import make_docs
from deepcalm import geometry
from test_project import text_files

ROOT = Path(__file__).resolve().parents[2]
TAUGHT = ("docs/attention.md", "docs/moe-mtp.md", "docs/structure.md")
SOURCES = ("kernels", "runtime", "python", "tools")
NAME = r"`((?:\w+::)*\w+)\(\)`"
PATH = r"`((?:kernels|runtime|python|tools|tests|docs)/[\w./]*)`"


@cache
def sources() -> dict[str, str]:
    """Source files of the product and the tools by path, comments of C++ left out."""
    return {str(p): re.sub(r"//.*", "", t) for p, t in text_files().items()
            if p.parts[0] in SOURCES and p.suffix in (".h", ".cc", ".cu", ".cuh", ".py")}  # fmt: skip


def defines(text: str, path: str, name: str) -> bool:
    """Whether a source defines or declares a function: in C++ a type stands before it, or it is a kernel's pointer."""
    owner, _, leaf = name.rpartition("::")
    if path.endswith(".py"):
        return not owner and re.search(rf"^ *(async )?def {leaf}\(", text, re.M) is not None
    kind = r"(?!\s*(?:return|else|throw|case)\b)[\w:<>,&*\[\] ]*[\w>&*\]]"
    if not owner:
        return re.search(rf"^{kind} [*&]?(?:\w+::)*{leaf}\(|\(\*{leaf}\)\(", text, re.M) is not None
    inside = re.search(rf"^(?:class|struct) {owner}\b(?!::)", text, re.M) is not None
    return re.search(rf"^{kind} [*&]?{'' if inside else owner + '::'}{leaf}\(", text, re.M) is not None


@pytest.mark.parametrize("document", TAUGHT)
def test_docs_name_files_functions_and_stages_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths, names = re.findall(PATH, text), re.findall(NAME, text)
    assert len(paths) > 5 and len(names) > 10
    assert not [p for p in paths if not (ROOT / p).exists()]
    assert not [n for n in set(names) if not any(defines(t, p, n) for p, t in sources().items())]
    placed = re.findall(NAME + r"\s+in\s+" + PATH, text)
    assert len(placed) > 3
    assert not [(n, p) for n, p in placed if not defines(sources()[p], p, n)]
    stages = re.search(r"kStageNames\[\w+\] = \{(.*?)\}", "".join(sources().values()), re.S)
    lists = re.findall(r"stages? ((?:`\w+`(?:, | and )?)+)", text)
    used = {s for found in lists for s in re.findall(r"`(\w+)`", found)}
    assert stages and bool(used) == (document != "docs/structure.md")
    assert used <= set(re.findall(r'"(\w+)"', stages[1]))
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert not [o for o in options if not any(f'"{o}"' in t for t in sources().values())]


def test_docs_name_files_that_exist() -> None:
    made_later = {"kernels/cpu/simd_NAME.h"}
    missing = []
    for document in make_docs.documents():
        text = document.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        missing += [
            f"{document.name}: {n}" for n in re.findall(PATH, text) if not (ROOT / n).exists() and n not in made_later
        ]
        missing += [f"{document.name}: {n}" for n in links if not (document.parent / n).exists()]
    assert not missing


def test_docs_check_of_names_finds_what_does_not_exist() -> None:
    text = "float f(int);\n    return g(1);\nResult<Round> A::h(int x) {\n    void (*k)(int);\n"
    assert [n for n in ("f", "g", "h", "A::h", "B::h", "k", "m") if defines(text, "x.cc", n)] == ["f", "h", "A::h", "k"]


def test_docs_tables_and_pictures_are_what_the_script_makes() -> None:
    assert make_docs.stale() == []
    tables = [t for d in make_docs.documents() for _, t, _ in make_docs.MARKED.findall(d.read_text())]
    assert sorted(tables) == sorted(make_docs.TABLES)
    known = {"docs/perf/rows.png", "docs/perf/zen4/rows.png", *make_docs.PICTURES}
    shown = {str((d.parent / m).resolve().relative_to(ROOT)) for d in make_docs.documents()
             for m in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", d.read_text())}  # fmt: skip
    assert shown == known


def test_docs_api_has_every_public_name_and_member() -> None:
    *public, _ = api_page.SECTIONS.values()
    assert sorted(n for names in public for n in names) == sorted({*deepcalm.__all__} - {"__version__"})
    known, text = api_page.definitions(), api_page.text()
    for names in api_page.SECTIONS.values():
        assert not [n for n in names if f"### {n}\n" not in text and f"- `{n}(" not in text]
    for name in ("Model", "Session", "Generation"):
        members = {n for n in vars(getattr(deepcalm, name)) if not n.startswith("_")}
        shown = text.partition(f"### {name}\n")[2].partition("\n##")[0]
        missing = {n for n in members if not re.search(rf"^\*\*`{n}\b", shown, re.M)}
        assert missing == api_page.INTERNAL[name] & members
    for name, hidden in api_page.INTERNAL.items():
        source = ast.unparse(known[name][0])
        assert not [n for n in hidden if not re.search(rf"def {n}\(|self\.{n}\b", source)]


def test_docs_parameters_of_a_dense_tied_model_are_all_read() -> None:
    p = geometry.parameters(make_docs.config_of("youtu-2b"))
    assert p.total == p.active == 1_961_560_064


def test_docs_parameters_are_the_published_ones() -> None:
    """In billions, of the model cards; the script's figures must come from the same shapes."""
    for name, total, active in (("v2-lite", 15.7, 2.4), ("v3", 671, 37), ("moonlight", 16, 3)):
        p = geometry.parameters(make_docs.config_of(name))
        assert abs(p.total / 1e9 / total - 1) < 0.005 and abs(p.active / 1e9 - active) < 0.7


@pytest.mark.parametrize("document", [*TAUGHT, "docs/batch.md", "README.md"])
def test_docs_python_runs(document: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.S | re.M):
        exec(compile(block, document, "exec"), {})
