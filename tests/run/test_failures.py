"""Memory that runs out at any point of a call: the session has the tokens it had, and goes on with the same bits.

The n-th allocation of C++ fails, for every n that a call comes to.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commands
import models
import tiny
from deepcalm import _core
from deepcalm.errors import ResourceError
from deepcalm.sampling import Sampling

IDS = tiny.token_ids(tiny.N_TOKENS, 300)
GREEDY: dict[str, Any] = {"sampling": Sampling(), "n_valid": tiny.N_TOKENS}
SAMPLED = GREEDY | {"sampling": Sampling(temp=0.9, top_p=0.95), "min_confidence": 1e-9}


def plain(n: int) -> Callable[[Any], object]:
    """n tokens one at a time, whose MTP rows are not computed yet."""
    return lambda s: [s.draft_round(int(i), 0, **GREEDY) for i in IDS[:n]]


def without_hidden(s: Any) -> None:
    """The hidden state of the last row is gone: it was cut off behind an MTP row."""
    s.forward(IDS[:3], "none")
    s.forward(IDS[3:6], "none")
    s.draft_round(5, 2, **GREEDY)
    s.truncate(5)


# what a session of at most max_rows a pass has done -> what fails then
CASES: dict[str, tuple[int, Callable[[Any], object], Callable[[Any], Any]]] = {
    "prefill, its MTP rows in passes of their own": (4, plain(9), lambda s: s.forward(IDS[9:13], "all")),
    "one token": (4, plain(2), lambda s: s.forward(IDS[2:3])),
    "a hidden state computed again, prefill": (4, without_hidden, lambda s: s.forward(IDS[6:9])),
    "a hidden state computed again, a round": (4, without_hidden, lambda s: s.draft_round(7, 2, **GREEDY)),
    "round after MTP rows in three passes": (4, plain(9), lambda s: s.draft_round(7, 3, want_logits=True, **GREEDY)),
    "sampled round": (8, plain(5), lambda s: s.draft_round(7, 3, want_logits=True, **SAMPLED)),
    "round that leaves as many hidden states as are kept": (
        64, plain(256), lambda s: s.draft_round(7, 0, want_logits=True, **GREEDY)
    ),
    "traced": (8, plain(3), lambda s: (s.trace(["*"]), s.forward(IDS[3:6]))[1]),
    "saved and restored": (8, plain(3), lambda s: s.load_state(**s.state())),
    "read": (8, plain(3), lambda s: [s.tokens, s.hidden(), s.read_cache(True), s.stats(), s.expert_union()][2]),
}  # fmt: skip


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit; seconds are not compared."""
    if isinstance(a, dict):
        a, b = ({k: v for k, v in x.items() if not k.endswith("seconds")} for x in (a, b))
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def rows(state: dict[str, Any]) -> dict[str, Any]:
    """What a failure does not change: a hidden state may be lost, MTP rows may be further."""
    return {"tokens": state["tokens"], "cache": state["cache"]}


def fail_everywhere(name: str) -> int:
    """Fails the case's call at every allocation, and lets it work after that; how many there are."""
    fail = ctypes.CDLL(os.environ["LD_PRELOAD"]).fail_allocation
    max_rows, prepare, call = CASES[name]
    model = models.model()
    start = _core.Session(model.core, 300, "f16", max_rows, True)
    prepare(start)
    before = start.state()

    def again() -> Any:
        s = _core.Session(model.core, 300, "f16", max_rows, True)
        s.load_state(**before)
        return s

    right = again()
    result = call(right)
    after = right.state()
    next_result = right.draft_round(9, 2, **GREEDY)
    for n in itertools.count():
        s = again()
        fail(n)
        try:
            call(s)
        except (MemoryError, ResourceError):  # before a pass or in one
            assert fail(-1) < 0
        else:
            assert fail(-1) >= 0, "an allocation failed and nobody said so"
            return n
        s.trace(None)
        assert_same(rows(s.state()), rows(before))
        assert s.pos - s.mtp_pos == len(s.state()["hidden"]) or s.pos - s.mtp_pos == 1
        got = call(s)
        if isinstance(got, dict):  # what was read depends on how much was left to do
            assert_same({k: got[k] for k in ("tokens", "accepted")}, {k: result[k] for k in ("tokens", "accepted")})
            assert_same(got.get("logits", 0), result.get("logits", 0))
        elif name != "read":
            assert_same(got, result)
        assert_same(rows(s.state()), rows(after))
        assert s.draft_round(9, 2, **GREEDY)["tokens"] == next_result["tokens"]
    raise AssertionError


def fail_public(saved: Path) -> None:
    """The same for what a user calls: the tokens in Python are those of the cache."""
    fail = ctypes.CDLL(os.environ["LD_PRELOAD"]).fail_allocation
    ids, model = IDS[:9].tolist(), models.model()
    other = model.session()
    other.prefill(ids[5:])
    other.save(saved)
    want = {len(t): model.session().prefill([*t, 7]) for t in (ids[5:], ids[:5], ids)}
    for call, then in ((lambda s: s.restore(saved), ids[5:]), (lambda s: s.prefill(ids[5:]), ids)):
        for n in itertools.count():
            s = model.session()
            s.prefill(ids[:5])
            fail(n)
            try:
                call(s)
            except (MemoryError, ResourceError):
                assert s.tokens.tolist() in (ids[:5], then)
            done = fail(-1) >= 0
            n_tokens = s.pos
            assert np.array_equal(s.decode(7), want[n_tokens])
            if done:
                assert n > 3 and s.tokens.tolist() == [*then, 7]
                break


def fail_steps(more: int) -> int:
    """A step of four sequences in which ``more`` + 1 allocations in a row fail, at every place; how many sequences that
    ended. The others have their tokens, and those that ended have them when they are tried again."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    core = models.model().core
    batch = _core.Batch(core, 64)
    # what it has done, ids of the step, drafts behind them, how the next token is chosen
    kinds: list[tuple[Callable[[Any], object], list[int], int, Sampling | None]] = [
        (plain(5), [7], 3, Sampling(temp=0.9, top_p=0.95)),
        (plain(3), IDS[3:12].tolist(), 0, None),
        (without_hidden, [7], 2, Sampling()),
        (plain(9), [8], 2, Sampling()),
    ]
    states = []
    for prepare, *_ in kinds:
        s = _core.Session(core, 300, "f16", 16, True)
        prepare(s)
        states.append(s.state())

    def again() -> list[Any]:
        sessions = [_core.Session(core, 300, "f16", 16, True) for _ in kinds]
        for s, state in zip(sessions, states, strict=True):
            s.load_state(**state)
        return sessions

    def work(sessions: list[Any]) -> list[Any]:
        rest = zip(sessions, kinds, strict=True)
        return [(s, ids, k, how, tiny.N_TOKENS, 0.0, 2 if how else -1) for s, (_, ids, k, how) in rest]

    sessions = again()
    right, _ = batch.step(work(sessions))
    after = [s.state() for s in sessions]
    ended = 0
    for n in itertools.count():
        sessions = again()
        items = work(sessions)
        library.fail_more(more)
        library.fail_allocation(n)
        try:
            results, cost = batch.step(items)
        except MemoryError:  # before the passes, or where their results are told
            results = [{"error": "told to nobody"} for _ in kinds]
            for s, state in zip(sessions, states, strict=True):
                s.truncate(min(s.pos, len(state["tokens"])))
        else:
            n_ended = sum(r["error"] is not None for r in results)
            assert n_ended <= more and cost["rows"] <= 18 + len(kinds)  # a row each computed again
            ended += n_ended
        library.fail_allocation(-1)
        none_failed = library.fail_more(0) == more
        for i, s in enumerate(sessions):
            got = results[i]
            if got["error"] is not None:
                assert_same(rows(s.state()), rows(states[i]))
                ((got,), _) = batch.step(items[i : i + 1])
                assert got["error"] is None
            n_tokens = len(got["tokens"])  # fewer drafts where a hidden state was lost
            assert got["tokens"] == right[i]["tokens"][:n_tokens] and bool(n_tokens) == bool(kinds[i][3])
            assert got["scores"] == right[i]["scores"][:n_tokens] and got["accepted"] == max(n_tokens - 1, 0)
            state = s.state()
            assert_same(state["tokens"], after[i]["tokens"][: s.pos])
            assert_same(state["cache"], after[i]["cache"][:, : s.pos])
        if none_failed:
            assert n > 50
            assert not any(passes for passes, _ in batch.expert_union()[18:]), (
                "a step of 18 rows counted with its failures"
            )
            return ended
    raise AssertionError


def fail_all(folder: Path) -> None:
    fail_public(folder / "saved")
    for more, least in ((0, 0), (1, 30), (2, 60)):
        print(f"a step, {more + 1} failures", file=sys.stderr)
        assert fail_steps(more) >= least
    for name in CASES:
        print(name, "*", file=sys.stderr)  # the last one is the one that fails
        assert fail_everywhere(name) > 3


def test_failures_leave_the_session_as_it_was(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("needs a C++ compiler, and no sanitizer in the way")
    source, library = Path(__file__).with_name("fail_allocation.cc"), tmp_path / "libfail_allocation.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    env = commands.environment(PYTHONPATH=":".join(sys.path), LD_PRELOAD=str(library))
    code = f"import pathlib, test_failures; test_failures.fail_all(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=200, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
