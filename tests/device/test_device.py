"""Devices as the user meets them: what is missing is said exactly, "auto" falls back and says so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import deepcalm
import device_cases
import models
from deepcalm import _core
from deepcalm.errors import UnsupportedError
from deepcalm.files import packed
from sim import build


def open_with(library: Path) -> object:
    file = packed.PackedFile(models.packed())
    with file:
        return _core.Model.open_on(str(library), str(file.path), file.fileno(), file.config, file.tensor_table())


def test_device_cuda_says_what_is_missing_and_auto_falls_back() -> None:
    why = device_cases.missing("cuda")
    auto = deepcalm.Model(models.packed(), device="auto")
    if why is None:
        assert auto.device == "cuda" and not auto.notes
        return
    text = why.removeprefix("device 'cuda': ")
    assert why != text and re.fullmatch(device_cases.NO_CUDA, text)
    assert auto.device == "cpu" and auto.notes == (f"device auto: cpu, {text}",)
    assert auto.isa == deepcalm.Model(models.packed()).isa


def test_device_library_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libdeepcalm_cuda.so").write_bytes(b"not a library")
    stranger = Path(_core.__file__)  # a shared library, but another one
    for path, why in (
        (tmp_path / "none.so", r"this build has no none\.so"),
        (tmp_path / "libdeepcalm_cuda.so", "cannot be opened: .*invalid ELF header|cannot be opened: .*file too short"),
        (stranger, "no symbol deepcalm_device: not a device library"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            open_with(path)


def test_device_library_of_another_build_is_refused(tmp_path: Path) -> None:
    """Types cross to it that its headers, or those of its C++ library, may tell differently."""
    ours = build.hash_of_headers()
    shared, found = set(), {Path("runtime/engine.h")}
    while found - shared:
        header = (found - shared).pop()
        shared.add(header)
        found |= {Path(name) for name in re.findall(r'#include "(.+?)"', (build.ROOT / header).read_text())}
    assert {len(p.parts) for p in shared} == {2}, "every header whose types cross is hashed"
    for name in ("0" * 64 + " with libstdc++ 12", f"{ours} with libstdc++ 1"):
        source, library = tmp_path / "other.c", tmp_path / f"other-{name[-1]}.so"
        source.write_text(f'struct {{const char* build; void* open;}} deepcalm_device = {{"{name}", (void*)1}};')
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        why = rf"built from headers {name}, this extension module from {ours} with libstdc\+\+ \d+; build both"
        with pytest.raises(UnsupportedError, match=why.replace("++ ", r"\+\+ ")):
            open_with(library)


def test_device_sim_needs_the_library_that_the_tests_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPCALM_SIM", raising=False)
    with pytest.raises(UnsupportedError) as e:
        deepcalm.Model(models.packed(), device="sim")
    assert str(e.value) == (
        "device 'sim': DEEPCALM_SIM is not set, expected the library that tests/sim/build.py builds and names"
    )
    monkeypatch.setenv("DEEPCALM_SIM", "nowhere/sim.so")
    with pytest.raises(UnsupportedError, match=r"this build has no sim\.so"):
        deepcalm.Model(models.packed(), device="sim")


@pytest.mark.parametrize("device", ["cuda", "sim"])
def test_device_library_exports_its_entries_alone(device: str) -> None:
    path = device_cases.library(device)
    if not path.is_file():
        pytest.skip(f"this build has no {path.name}")
    names = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    strong = [line.split()[-1] for line in names.splitlines() if line.split()[-2] in "TDBR"]
    simulator = {"deepcalm_sim"} if device == "sim" else set()
    assert set(strong) == {"deepcalm_device", "deepcalm_stage"} | simulator
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.+?)\.so", needed))
    assert not {n for n in libraries if "cuda" in n}, libraries
    assert "libstdc++" in libraries, "its types and exceptions are those of the extension module"


def test_device_refuses_a_norm_behind_the_experts() -> None:
    with pytest.raises(UnsupportedError, match="a norm behind the experts is not computed on a GPU: use --device cpu"):
        device_cases.open_core(models.pack(models.checkpoint("axk1")), "sim")


def test_device_core_holds_no_cuda_symbol() -> None:
    names = subprocess.run(["nm", "-D", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\bcu(?:da)?[A-Z]\w+", names)
