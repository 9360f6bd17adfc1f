"""Python threads on one model: results are those of a serial run, and the interpreter runs on while calls wait."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import commands
import deepcalm
import device_cases
import models
import tiny
from deepcalm import _core
from deepcalm.errors import SessionError
from deepcalm.sampling import Sampling

SECONDS = 2.0
IDS = tiny.token_ids(tiny.N_TOKENS, 20)
HOW: dict[str, Any] = {"sampling": Sampling(), "n_valid": tiny.N_TOKENS}

# What can be asked of a session, by name of the member, on one that holds 3 tokens and keeps MTP rows.
CALLS: dict[str, Callable[[Any], Any]] = {
    "pos": lambda s: s.pos,
    "mtp_pos": lambda s: s.mtp_pos,
    "tokens": lambda s: s.tokens,
    "hidden": lambda s: s.hidden(),
    "read_cache": lambda s: s.read_cache(False),
    "state": lambda s: s.state(),
    "truncate": lambda s: s.truncate(2),
    "forward": lambda s: s.forward([5, 6]),
    "draft_round": lambda s: s.draft_round(5, 2, **HOW),
    "trace": lambda s: s.trace(["embed"]),
    "taps": lambda s: s.taps(),
    "stats": lambda s: s.stats(),
    "stage_stats": lambda s: s.stage_stats(),
    "expert_union": lambda s: s.expert_union(),
}
ON_A_DEVICE: dict[str, Callable[[Any], Any]] = {
    "decode_start": lambda s: s.decode_start(5, max_tokens=3, eos=[], **HOW),
    "decode_step": lambda s: s.decode_step(1),
    "decode_poll": lambda s: s.decode_poll(),
    "decode_finish": lambda s: s.decode_finish(),
    "device_view": lambda s: s.device_view("hidden"),
    "device_report": lambda s: s.device_report("device"),
}
NEVER_CHANGES = {"ctx", "max_rows", "cache_bytes"}


def session(model: deepcalm.Model, ctx: int = 32, mtp: bool = True) -> Any:
    return _core.Session(model.core, ctx, "f16", 8, mtp)


def waiting_calls(device: str) -> None:
    """Starts every call in a thread of its own while a pass runs; all wait, this thread runs on, and all end after it.

    Runs in a process of its own: a call that waits with the interpreter's lock in its hand stops it for ever.
    """
    model = deepcalm.Model(models.packed(), threads=1, device=device)
    one = session(model)
    one.forward([5])
    saved = one.state()
    sessions, calls = {}, CALLS | {"load_state": lambda s: s.load_state(**saved)}
    calls["fork"] = lambda s: s.fork(model.core, 2, 16)
    calls |= ON_A_DEVICE if device == "sim" else {}
    for name in calls:
        sessions[name] = s = session(model)
        s.forward([5, 6, 7])
        if name in ("decode_step", "decode_poll", "decode_finish"):
            s.decode_start(5, max_tokens=3, eos=[], **HOW)
            s.decode_step(1)
    plain = session(model, mtp=False)
    plain.forward([5, 6, 7])
    hidden = plain.hidden()
    calls["mtp_forward"] = lambda _: plain.mtp_forward([6, 7], hidden[:2])
    if device == "sim":  # a session on a device begins and ends with the device's memory
        calls["open"] = lambda _: session(model)
        calls["close"] = lambda _: sessions.pop("close")
        sessions["close"] = session(model)
    assert set(calls) | NEVER_CHANGES | set(ON_A_DEVICE) >= {m for m in vars(_core.Session) if m[0] != "_"}
    done: dict[str, str] = {}

    def call(name: str) -> None:
        try:
            calls[name](sessions.get(name))
            done[name] = "done"
        except Exception as e:
            done[name] = repr(e)

    threads = [threading.Thread(target=call, args=(name,)) for name in calls]

    def during_the_pass() -> None:
        for t in threads:
            t.start()
        for _ in range(20):
            time.sleep(0.005)
        assert all(getattr(sessions["pos"], name) is not None for name in NEVER_CHANGES)
        assert not done, f"did not wait for the pass: {sorted(done)}"

    _core.testing.hold_passes(model.core, during_the_pass)
    for t in threads:
        t.join()
    assert set(done.values()) == {"done"}, done


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_threads_interpreter_runs_on_while_calls_wait(device: str) -> None:
    if device == "sim":
        device_cases.need(device)
    code = f"import test_threads; test_threads.waiting_calls({device!r})"
    env = commands.environment(PYTHONPATH=":".join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=60, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


class Ones:
    """The states of sessions that hold nothing but n tokens 1, from a serial run; and checks against them."""

    N = 24

    def __init__(self, model: deepcalm.Model) -> None:
        self.model = model
        whole = session(model)
        self.logits = {whole.forward([1])[0].tobytes(): n for n in range(1, self.N + 1)}
        self.cache = whole.read_cache(False)
        plain = session(model, mtp=False)
        self.hidden = np.concatenate([plain.forward([1]) is not None and plain.hidden() for _ in range(self.N)])
        for i in range(0, self.N - 1, 8):
            part = self.hidden[i : min(i + 8, self.N - 1)]
            plain.mtp_forward([1] * len(part), part, "none")
        self.mtp_cache = plain.read_cache(True)
        rounds = session(model)
        self.round = {rounds.draft_round(1, 0, **HOW)["tokens"][0] for _ in range(self.N)}

    def check(self, state: dict[str, Any]) -> None:
        n, m = len(state["tokens"]), state["mtp_cache"].shape[1]
        assert (state["tokens"] == 1).all()
        assert np.array_equal(state["cache"], self.cache[:, :n])
        assert np.array_equal(state["mtp_cache"], self.mtp_cache[:, :m])
        assert len(state["hidden"]) == n - m or (len(state["hidden"]) == 0 and m + 1 == n)
        assert np.array_equal(state["hidden"], self.hidden[m : m + len(state["hidden"])])


def test_threads_on_one_session_see_whole_states() -> None:
    """Tokens are all the same, so that what a session holds is known from how many there are, whoever came first."""
    ones = Ones(models.model())
    shared, other = session(ones.model, ones.N), ones.model.session(mtp=True)
    saved = session(ones.model)
    saved.forward([1] * 5)
    snapshot = saved.state()
    own = np.ones(4, np.int32)  # a thread turns it into ids that do not exist, and back
    want = list(other.generate(IDS[:5].tolist(), max_tokens=8, eos_ids=[]))
    end = threading.Event()
    failed: list[BaseException] = []

    def logits_are_known() -> None:
        assert shared.forward(own)[0].tobytes() in ones.logits

    def round_is_known() -> None:
        assert shared.draft_round(1, 3, drafts=[1, 1, 1], **HOW)["tokens"][0] in ones.round

    def another_text() -> None:
        other.truncate(0)
        assert list(other.generate(IDS[:5].tolist(), max_tokens=8, eos_ids=[])) == want

    def reads() -> None:
        tokens, rows = shared.tokens, shared.read_cache(False)
        assert (tokens == 1).all() and np.array_equal(rows, ones.cache[:, : rows.shape[1]])
        hidden = shared.hidden()
        assert all(any(np.array_equal(h, w) for w in ones.hidden) for h in hidden)
        stats = shared.stats()
        assert stats["rows"] >= stats["passes"] and sum(s[2] for s in shared.stage_stats()) >= stats["cache_bytes"]
        shared.taps()
        assert 0 <= shared.pos <= ones.N and len(shared.expert_union()) == 8

    def spoils_ids() -> None:
        own[:] = 1 << 30
        own[:] = 1

    work = [logits_are_known, round_is_known, another_text, reads, spoils_ids]
    work += [
        lambda: shared.truncate(int(shared.pos) // 2),
        lambda: ones.check(shared.state()),
        lambda: shared.load_state(*snapshot.values()),
    ]
    refusals = ("context full", "truncate:", "token id 1073741824")

    def run(step: Callable[[], None]) -> None:
        try:
            while not end.is_set():
                try:
                    step()
                except SessionError as e:
                    assert any(text in str(e) for text in refusals), e
        except BaseException as e:
            failed.append(e)
            end.set()

    threads = [threading.Thread(target=run, args=(step,), daemon=True) for step in work]
    for t in threads:
        t.start()
    end.wait(SECONDS)
    end.set()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    if failed:
        raise failed[0]
    shared.truncate(0)
    assert shared.forward([1] * 3)[0].tobytes() == next(k for k, n in ones.logits.items() if n == 3)


def test_threads_arrays_stay_as_they_are() -> None:
    """What a session handed out does not change with later passes, nor a pass with what is done to it."""
    s = models.model().session(mtp=True)
    logits = s.prefill(IDS)
    held = {"tokens": s.tokens, "hidden": s.core.hidden(), "last": s.last_logits, **s.core.state()}
    before = {name: np.array(x) for name, x in held.items()}
    logits[:] = 0
    assert np.array_equal(s.last_logits, before["last"])
    with pytest.raises(ValueError, match="read-only"):
        held["last"][0] = 1
    s.truncate(0)
    s.prefill(IDS[::-1])
    del s
    assert all(np.array_equal(held[name], x) for name, x in before.items())


@pytest.mark.parametrize("ends", [True, False])
def test_ctrl_c_ends_a_long_pass_between_layers(ends: bool) -> None:
    """Its rows are not there afterwards; the next pass computes what it would have; a handler may ask the session."""
    model = deepcalm.Model(deepcalm.demo_path(), threads=2, isa=models.ISAS[-1])  # the slowest
    ids = np.random.default_rng(3).integers(10, 2000, 512).astype(np.int32)
    want = model.session(512, max_rows=512).prefill(ids)
    session = model.session(512, max_rows=512)
    session.prefill(ids[:1])

    class Interrupt(Exception):
        """No KeyboardInterrupt: one that comes late is to fail this test, not to end the run."""

    passes: list[int] = []

    def interrupt(*_: object) -> None:
        passes.append(session.stats.passes)
        if ends:
            raise Interrupt

    before = signal.signal(signal.SIGINT, interrupt)
    late = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    try:
        late.start()
        with pytest.raises(Interrupt) if ends else contextlib.nullcontext():
            session.prefill(ids[1:])
    finally:
        late.join()
        signal.signal(signal.SIGINT, before)
    assert passes == [1], "a pass that ended is counted"
    if ends:
        assert (session.pos, session.stats.passes) == (1, 1)
        session.prefill(ids[1:])
    assert session.last_logits is not None and np.array_equal(session.last_logits, want)
