"""Damaged files: every one ends in a correct run or in one line that says what is wrong (tools/fuzz.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fuzz

pytestmark = pytest.mark.sanitize


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("bases")
    return folder, fuzz.make_bases(folder)


@pytest.mark.parametrize("n", [150, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_hostile_files_are_refused_or_run(bases: tuple[Path, dict[str, list[str]]], n: int) -> None:
    folder, names = bases
    outcomes = list(fuzz.run_cases(fuzz.plan(names, n, seed=0), folder, jobs=2))
    bad = [f"--one {o.case.kind} {o.case.base} {o.case.seed}: {o.detail}" for o in outcomes if o.status == "bad"]
    assert not bad, f"{len(bad)} of {len(outcomes)}:\n" + "\n".join(bad[:20])
    assert len(outcomes) == n
    # The damage reaches both sides: most files are refused, a fair part still runs (flipped weights, ignored keys).
    refused = sum(o.status == "refused" for o in outcomes)
    assert 0.4 * n < refused < 0.95 * n


@pytest.mark.parametrize("kind", ["packed", "checkpoint", "saved"])
def test_hostile_undamaged_files_run(
    bases: tuple[Path, dict[str, list[str]]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the damage the same steps succeed, so a refusal is the damage's."""
    folder, names = bases
    monkeypatch.setattr(fuzz, "mutate_container", lambda _rng, data, _nested=(): (data, "nothing"))
    monkeypatch.setattr(fuzz, "mutate_bytes", lambda _rng, _data: "nothing")
    monkeypatch.setattr(fuzz, "mutate_json", lambda _rng, _value: "nothing")
    monkeypatch.setattr(Path, "unlink", lambda _path: None)
    for base in names[kind]:
        for seed in range(3):
            outcome = fuzz.run_case(fuzz.Case(kind, base, seed), folder)
            assert outcome.status == "ok", outcome.detail


def test_hostile_harness_notices(bases: tuple[Path, dict[str, list[str]]]) -> None:
    """A worker that crashes, hangs, eats memory or raises something else is reported, and the next case still runs."""
    folder, names = bases
    worker = fuzz.Worker(folder, timeout=5.0)
    expected = {"exception": "KeyError", "crash": "worker died with", "hang": "no answer in 5 s"}
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose address space cannot be limited
        expected["memory"] = "MemoryError"
    try:
        assert worker.run(fuzz.Case("saved", names["saved"][0], 1)).status in ("ok", "refused")
        for name, detail in expected.items():
            outcome = worker.run(fuzz.Case("self-test", name, 0))
            assert outcome.status == "bad" and detail in outcome.detail
        assert worker.run(fuzz.Case("saved", names["saved"][0], 1)).status in ("ok", "refused")
    finally:
        worker.close()
