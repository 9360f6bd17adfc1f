"""An ISA object exports its table and nothing else.

A weak symbol (an inline function or a template of some header) would be merged by the linker with the copies of other
objects, and code compiled for AVX-512 could then run on a processor without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive  # compiles every instruction set twice
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "cpu"
# rows of CMakeLists.txt: a name and the flags that it adds to those of the rows above
CMAKE = (ROOT / "CMakeLists.txt").read_text().split("set(isas ")[1].split("endif()")[0]
ROWS = [row.split() for row in re.findall(r'"([a-z]\w+(?: -m\S+)*)"', CMAKE)]
ISAS = [name for name, *_ in ROWS]
# What an object exports; that of avx512x has amx's tables too, whose own kernels are in the object of isa_amx.cc.
EXPORTS = {isa: {f"kernels_{isa}"} for isa in ISAS}
AMX = ("peak_bf16", "matmul_bf16", "matmul_f8", "mla_partial")
EXPORTS["amx"] = {f"{n}::{f}" for n in ("amx", "amx_emulated") for f in AMX}
EXPORTS["avx512x"] |= {"kernels_amx", "kernels_amx_emulated"}


def isa_object(isa: str, tmp_path: Path, optimised: bool = True) -> Path:
    """The newest object of a build (build/, or $DEEPCALM_BUILD_DIR), else one compiled here with the build's flags."""
    builds = [Path(os.environ["DEEPCALM_BUILD_DIR"])] if "DEEPCALM_BUILD_DIR" in os.environ else []
    builds += (ROOT / "build").glob("*")
    name, isa = ("isa_amx.cc", "avx512x") if isa == "amx" else ("isa.cc", isa)
    found = [b / "CMakeFiles" / f"dc_isa_{isa}.dir" / "kernels" / "cpu" / f"{name}.o" for b in builds]
    newest = max(p.stat().st_mtime for p in [SOURCES / name, *(ROOT / "kernels").rglob("*.h")])
    fresh = [p for p in found if p.exists() and p.stat().st_mtime > newest]
    if fresh and optimised:
        return fresh[0]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no object in build/ and no compiler")
    common = ["-std=c++20", "-O3" if optimised else "-O0", "-fPIC", "-fvisibility=hidden", f"-DDEEPCALM_ISA={isa}"]
    common += ["-fvisibility-inlines-hidden", "-ffp-contract=off", "-fno-math-errno"]
    common += ["-DDEEPCALM_AMX"] if isa == "avx512x" else []
    common += ["-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", f"-I{ROOT}"]
    flags = [flag for _, *row in ROWS[: ISAS.index(isa) + 1] for flag in row]
    out = tmp_path / f"{isa}.o"
    subprocess.run([compiler, *common, *flags, "-c", SOURCES / name, "-o", out], check=True)
    return out


@pytest.mark.parametrize(("isa", "optimised"), [*((isa, True) for isa in EXPORTS), (ISAS[-1], False), ("amx", False)])
def test_isa_object_exports_only_its_tables(isa: str, optimised: bool, tmp_path: Path) -> None:
    """Where functions of headers are not inlined, as in a debugger's build, none may be left to the linker either."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    found = isa_object(isa, tmp_path, optimised)
    listing = subprocess.run([nm, "-C", found], check=True, capture_output=True, text=True).stdout
    kinds = [re.match(r"[0-9a-f ]{16} (\w) (.*)", line) for line in listing.splitlines()]
    symbols = [(m.group(1), m.group(2)) for m in kinds if m]
    assert symbols
    undefined = {name for kind, name in symbols if kind == "U"}
    if any("asan" in name or "ubsan" in name for name in undefined):
        pytest.skip("sanitizer build: its objects carry the sanitizer's symbols")
    exported = [re.sub(r"^deepcalm::|\(.*", "", name) for kind, name in symbols if kind.isupper() and kind != "U"]
    assert sorted(exported) == sorted(EXPORTS[isa])
    assert not [name for kind, name in symbols if kind in "wvuWV"], "weak symbols"
    others = {"avx512x": "deepcalm::amx", "amx": "deepcalm::kernels_avx512x"}.get(isa, "_GLOBAL")
    undefined = {name for name in undefined if not name.startswith(others)}
    assert undefined <= {"memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
