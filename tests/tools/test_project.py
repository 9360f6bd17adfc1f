"""The project's promises about itself: budgets, commands that the README names, no loose ends in tracked files."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
import sz

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN_COMMAND = 'pip install . && deepcalm generate "Once upon a time"'
TEST_COMMAND = "pip install '.[test]' && pytest"


@cache
def tracked() -> tuple[Path, ...]:
    """Tracked files relative to the root; all of the source folders' files where there is no git checkout."""
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=False)
    if git.returncode == 0 and git.stdout:
        return tuple(Path(p) for p in git.stdout.decode().split("\0") if p and (ROOT / p).is_file())
    folders = ("kernels", "runtime", "python", "tools", "tests", "docs")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return tuple(p.relative_to(ROOT) for p in [*files, *ROOT.glob("*.*"), ROOT / ".ci" / "run"])


def text_files() -> dict[Path, str]:
    out = {}
    for path in tracked():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:4096] and len(data) < 1 << 20:
            out[path] = data.decode("utf-8")
    return out


@pytest.mark.parametrize("area", [a for a in sz.AREAS if a.budget is not None], ids=lambda a: a.name)
def test_project_area_is_within_its_line_budget(area: sz.Area) -> None:
    lines = sz.count_lines(ROOT, area)
    assert area.budget is not None
    assert sum(lines.values()) <= area.budget, sorted(lines.items(), key=lambda kv: -kv[1])[:5]


# Functions of more than sz.MAX_LINES lines or sz.MAX_ARGUMENTS arguments: the list is to become shorter. The module
# definition of pybind11 is a list of what there is; a command of click takes its options.
TOO_LARGE = {
    "verify.py: verify",
    "bench.py: bench",
    "check.py: verify",
    "check.py: perplexity",
    "files.py: pack",
    "run.py: generate",
    "chat.py: chat_command",
    "synthetic.py: write_model",
}


def test_project_functions_are_small() -> None:
    product = tuple(a for a in sz.AREAS if a.budget is not None)
    found = {f"{f.file}: {f.name}" for f in sz.functions(ROOT, product) if f.too_large}
    assert not found - TOO_LARGE, "too large: see tools/sz.py"
    assert not TOO_LARGE - found, "small enough now: take them off the list"


def test_project_functions_are_measured(tmp_path: Path) -> None:
    (tmp_path / "a.cc").write_text(
        """#define F(x) { x
namespace n {  // f(a, b) {
constexpr int kTable[] = {1, 2};
template <class T, int N = (1 < 2)> struct S : Base<T, 3> {
  public:
    explicit S(int a, std::map<int, int> b = {})
        : a_(f(a, 1)) {
        if (a) call([&](int x, int y) { return "}" + x; });
    }
    bool operator==(const S& o) const { return '{' == o.a_; }
    int a_{0};
};
[[nodiscard]] __attribute__((noinline)) auto f(void (*fn)(int, int),
                                               int n) -> std::vector<int> {
    return {};
}
int declared(int a);
}
"""
    )
    (tmp_path / "b.py").write_text("class A:\n    def f(self, a, *, b, **c):\n        def g():\n            pass\n")
    area = sz.Area("all", ("*.cc", "*.py"), None)
    assert [(f.name, f.lines, f.arguments) for f in sz.functions(tmp_path, (area,))] == [
        ("S", 4, 2), ("operator==", 1, 1), ("f", 4, 2), ("f", 3, 3), ("g", 2, 0)
    ]  # fmt: skip


def test_project_tracked_files_name_no_machine_path() -> None:
    pattern = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]", "[A-Z]:" + r"\\Users")))
    found = [
        f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {m.group()}"
        for path, text in text_files().items()
        for m in pattern.finditer(text)
    ]
    assert not found


def test_project_documents_that_are_named_exist() -> None:
    known = {p.name for p in tracked()}
    missing = {
        f"{path}: {m.group(1)}"
        for path, text in text_files().items()
        for m in re.finditer(r"\b([A-Za-z_\-]+\.md)\b", text)
        if m.group(1) not in known
    }
    assert not missing


def test_project_readme_commands_are_the_ones_that_ci_runs() -> None:
    blocks = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
    assert any(b.strip() == MAIN_COMMAND for b in blocks) and any(b.strip() == TEST_COMMAND for b in blocks)
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^.*pip install -q '\.\[test\]'\n(.*\n)*?pytest( |\n)", ci, re.M) and "pytest -m reference" in ci
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'deepcalm = "deepcalm.__main__:main"' in pyproject


def test_project_readme_names_files_that_exist() -> None:
    names = re.findall(r"`((?:kernels|runtime|python|tools|tests|docs|\.ci)/[\w./]*)`", README)
    names += [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(names) > 10
    assert not [n for n in names if not (ROOT / n).exists()]


def test_project_readme_stays_a_page() -> None:
    assert len(README.splitlines()) <= 150
    extend = README[README.index("### How to extend it") :].partition("\n\n`.ci/run`")[0]
    assert 4 < len(set(re.findall(r"`((?:kernels|runtime|python|tools|tests)/[^`]*|CMakeLists.txt)`", extend))) <= 11


def test_project_readme_counts_the_lines_to_read() -> None:
    """As many as there are, or a seventh more: what is promised as an afternoon's reading does not grow unseen."""
    areas = {a.name: sum(sz.count_lines(ROOT, a).values()) for a in sz.AREAS}
    promised = re.search(r"the CPU path, ([\d,]+) lines.*?the GPU path \(([\d,]+)\)", README, re.S)
    assert promised is not None
    for name, number in zip(("C++", "CUDA"), promised.groups(), strict=True):
        assert 0 <= int(number.replace(",", "")) - areas[name] <= 0.15 * areas[name], (name, areas[name])


def test_project_readme_lists_the_environment_variables_that_are_read() -> None:
    folders = ("runtime", "kernels", "python")
    sources = [t for p, t in text_files().items() if p.parts[0] in folders and p.suffix != ".md"]
    read = {m for t in sources for m in re.findall(r"(?:environ\S*?\(|environ\[|getenv\()\"([A-Z_]+)\"", t)}
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", README, re.M))
    assert {n for n in read if n.startswith("DEEPCALM_")} == {n for n in listed if n.startswith("DEEPCALM_")}
    assert "NO_COLOR" in listed


def test_project_versions_agree() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version and newest and version.group(1) == newest.group(1)


def test_project_python_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    oldest, *_ = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)
    assert f'\nrequires-python = ">={oldest}"\n' in pyproject and f"needs Python {oldest} " in README
    assert f"find_package(Python {oldest} REQUIRED" in (ROOT / "CMakeLists.txt").read_text()


def test_project_source_archive_holds_what_the_build_reads() -> None:
    excluded = re.search(r"^sdist\.exclude = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert excluded
    folders = {p.parts[0] for p in tracked() if len(p.parts) > 1 and not p.parts[0].startswith(".")}
    left_out = set(re.findall(r'"(\w+)"', excluded.group(1)))
    assert folders - left_out == {"kernels", "runtime", "python"}
    assert not [name for name in left_out if f"{name}/" in (ROOT / "CMakeLists.txt").read_text()]


def test_project_readme_names_the_compilers_that_the_build_accepts() -> None:
    oldest = dict(re.findall(r"^set\(oldest_(\w+) (\d+)\)", (ROOT / "CMakeLists.txt").read_text(), re.M))
    assert f"g++ {oldest['GNU']} or clang {oldest['Clang']}, or newer" in README


def test_project_wheel_holds_no_simulator() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "tests/" not in cmake and set(re.findall(r"install\(TARGETS (\S+)", cmake)) == {"_core", "deepcalm_cuda"}
    installed = [f.name for f in importlib.metadata.files("deepcalm") or () if f.suffix == ".so"]
    assert not [n for n in installed if not re.fullmatch(r"_core\..*|libdeepcalm_cuda\.so", n)]
    product = {p: t for p, t in text_files().items() if p.parts[0] in ("kernels", "runtime")}
    assert {p.name for p, t in product.items() if '#include "tests/' in t} == {"rt.h", "host.h"}, "the two seams"


def test_project_runtime_knows_no_processor() -> None:
    """Session, sampler and drafting see ``runtime/engine.h``; the bindings choose an engine."""
    includes = {p: re.findall(r'^#include "(runtime/.+?)"', t, re.M) for p, t in text_files().items()}
    shared = {p for p in includes if p.parent == Path("runtime")}
    engines = {Path("runtime/cpu"), Path("runtime/cuda")}
    assert len(shared) > 15 and engines < {p.parent for p in includes}
    across = {f"{p}: {name}" for p, names in includes.items() for name in names
              if p in shared or p.parent in engines if Path(name).parent in engines - {p.parent}}  # fmt: skip
    assert not across


def test_project_package_stays_small() -> None:
    sizes = {p: (ROOT / p).stat().st_size for p in tracked() if p.parts[:2] == ("python", "deepcalm")}
    assert sum(sizes.values()) < 24 << 20, "the wheel holds this, plus the extension module"
    demo = Path("python/deepcalm/demo/demo.dcalm")
    assert sizes.get(demo, 0) < 20 << 20
    large = [p for p in tracked() if (ROOT / p).stat().st_size > 1 << 20 and p != demo]
    assert not large


def test_a_test_run_removes_what_a_killed_one_left() -> None:
    living, dead = models.root(), Path(tempfile.mkdtemp(prefix="deepcalm-models-"))
    (dead / "m.dcalm").touch()
    shutil.rmtree(models.root.__wrapped__())
    assert living.exists() and not dead.exists()


def test_project_products_by_turns_take_every_value_and_every_choice(pytestconfig: pytest.Config) -> None:
    hook = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py")).pytest_collection_modifyitems
    marked, mark = list[tuple[int, int]](), pytest.mark.by_turns("b", 3, always=2).mark
    items = [
        SimpleNamespace(
            nodeid=f"t[{a}-{b}]", callspec=SimpleNamespace(params={"a": a, "b": b}),
            iter_markers=lambda name: [mark] if name == "by_turns" else [],
            get_closest_marker=lambda _: None, add_marker=lambda _, pair=(a, b): marked.append(pair),
        )
        for a in range(4) for b in range(3)
    ]  # fmt: skip
    hook(pytestconfig, items)
    assert marked == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 1)]
