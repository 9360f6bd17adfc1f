"""The simulator of the GPU catches what it is for: one mistake planted in a small chain of kernels at a time.

The sanitizer builds run where DEEPCALM_SIM_SANITIZE is set, as ``tools/check_sim`` does.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sim import build

SANITIZERS = {"plain": (), "thread": ("-fsanitize=thread", "-g"), "address": ("-fsanitize=address", "-g")}
# plant: (build, what the process prints or dies with), beside the plain build's "right" without a plant
PLANTS = {
    "early_read": ("plain", "wrong"),  # read before the dependency wait
    "unwaited": ("plain", "wrong"),  # a copy's destination read before its wait
    "reused": ("plain", "wrong"),  # a ring slot refilled before it was read
    "forgotten": ("plain", "never waited for"),
    "diverged": ("plain", "different barriers"),
    "lanes": ("plain", "lanes of a warp meet at different operations"),
    "misaligned": ("plain", "not 16-byte aligned"),
    "twice": ("plain", "initialised twice"),
    "barrier": ("thread", "data race"),  # no block barrier between write and read
    "row": ("address", "heap-buffer-overflow"),  # the last block reads a row past the end
}


@pytest.fixture(scope="module", params=SANITIZERS if "DEEPCALM_SIM_SANITIZE" in os.environ else ["plain"])
def program(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, build.compile_with("tests/sim/plants.cc", "-O0", *SANITIZERS[request.param])


def run(program: Path, plant: str, order: str = "fwd") -> str:
    env = {**os.environ, "DEEPCALM_SIM_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    env.pop("LD_PRELOAD", None)
    r = subprocess.run([program, plant], env=env, capture_output=True, text=True, timeout=120, check=False)
    return r.stdout + r.stderr


def test_a_build_is_kept_until_what_it_is_made_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SOURCES", {}), ("FLAGS", ()), ("CACHE", tmp_path / "cache")):
        monkeypatch.setattr(build, name, value)
    source, header = tmp_path / "a.cc", tmp_path / "a.h"
    source.write_text('#include "a.h"\nint main() { return kValue; }\n')
    header.write_text("constexpr int kValue = 3;\n")
    first = build.compile_with(str(source))
    assert subprocess.run([first], check=False).returncode == 3
    made = first.stat().st_mtime_ns
    assert build.compile_with(str(source)) == first and first.stat().st_mtime_ns == made
    header.write_text("constexpr int kValue = 4;\n")
    second = build.compile_with(str(source))
    assert subprocess.run([second], check=False).returncode == 4
    assert build.compile_with(str(source), "-O1") not in (first, second)
    header.write_text("constexpr int kValue = none;\n")
    with pytest.raises(subprocess.CalledProcessError):
        build.compile_with(str(source))
    assert len(list(build.CACHE.iterdir())) == 3, "a build that failed leaves nothing"


@pytest.mark.parametrize("order", ("fwd", "rev", "5"))
def test_correct_kernels_are_clean_under_every_sanitizer(program: tuple[str, Path], order: str) -> None:
    assert run(program[1], "none", order) == "right\n"


def test_planted_mistakes_are_caught(program: tuple[str, Path]) -> None:
    build, path = program
    for plant, (caught_by, message) in PLANTS.items():
        if caught_by == build:
            assert message in run(path, plant), plant


def test_a_missing_barrier_gives_wrong_results_in_some_order(program: tuple[str, Path]) -> None:
    """Also without ThreadSanitizer: shared memory starts poisoned."""
    if program[0] == "plain":
        assert "wrong" in "".join(run(program[1], "barrier", order) for order in ("fwd", "rev"))
