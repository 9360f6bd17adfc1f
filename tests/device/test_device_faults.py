"""A device that fails, at any call, by an error or by an exception: an Error, and a session in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import device_cases
import models
import tiny
from deepcalm import _core
from deepcalm.errors import Error, SessionError, UnsupportedError
from deepcalm.sampling import Sampling

pytestmark = pytest.mark.exhaustive
KB = 1024


@pytest.fixture(autouse=True)
def simulator() -> Iterator[None]:
    device_cases.need("sim")
    yield
    for name, value in (("smem", 227 * KB), ("fail_at", 0), ("throw_at", 0), ("hang", 0)):
        device_cases.play(name, value)


@pytest.fixture(scope="module")
def core() -> Any:
    """Of the fewest layers: what fails at a dense layer's launches fails at a MoE layer's."""
    return device_cases.open_core(models.small(0), "sim")


def session(core: Any, mtp: bool = True, ctx: int = 64, rows: int = 16) -> Any:
    return _core.Session(core, ctx, "f16", rows, mtp)


def start(s: Any, token: int, tokens: int = 4) -> None:
    s.decode_start(token, Sampling(), 270, tokens, [])


def text(s: Any, k: int) -> list[int]:
    """Decodes four tokens after token 9 on the device; leaves the session at rest whatever happens."""
    start(s, 9)
    rounds: list[dict[str, Any]] = []
    try:
        while not (rounds and rounds[-1]["stop"]):
            s.decode_step(k)
            rounds += s.decode_poll()
    finally:
        s.decode_finish()
    return [t for r in rounds for t in r["tokens"]]


def restored(s: Any) -> None:
    """What a session saved, put into it again."""
    saved = s.state()
    s.load_state(saved["tokens"], saved["cache"], saved["mtp_cache"], saved["hidden"])
    s.forward([6])


def traced(s: Any) -> None:
    s.trace(["layers.0.q", "final_norm", "logits"])
    try:
        s.forward([7, 8], "all")
        s.taps()
    finally:
        s.trace(None)


# name -> what is done to a session after its prompt
CALLS: dict[str, Callable[[Any], object]] = {
    "one token": lambda s: s.forward([5]),
    "a long pass": lambda s: s.forward(range(10, 22), "all"),
    "a hidden state that is gone": lambda s: (s.truncate(5), s.forward([5])),
    "traced": traced,
    "decoding": lambda s: text(s, 0),
    "decoding with drafts": lambda s: text(s, 2),
    "saved and restored": restored,
    "bandwidth": lambda s: s.device_report("bandwidth:100000"),
    "stages": lambda s: s.device_report("stages:2:3"),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.mark.parametrize("how", ["fail_at", "throw_at"])
@pytest.mark.parametrize("name", CALLS)
def test_device_failure_at_any_call_is_an_error(core: Any, name: str, how: str) -> None:
    """The n-th call of the seam fails, for n = 1, 2, ... until there is none: each time the session holds tokens that
    it had, and what it computes next has the bits of a session that was given them."""
    s, fresh = session(core), session(core)
    s.forward(PROMPT)
    saved, truth = s.state(), dict[tuple[int, ...], Any]()
    # Launches of one pass, and rounds, are each like the others: some of them fail by an error, others by an exception.
    step = {"a long pass": 5, "traced": 3, "stages": 7, "decoding": 2, "decoding with drafts": 3}.get(name, 1)
    for n in range(1 + (how == "throw_at" and step > 1), 2000, step):
        s.load_state(saved["tokens"], saved["cache"], saved["mtp_cache"], saved["hidden"])
        device_cases.play("calls", 0)
        device_cases.play(how, n)
        try:
            CALLS[name](s)
        except Error as e:
            assert str(e) and "\n" not in str(e)
        finally:
            device_cases.play(how, 0)
        if device_cases.play("calls", 0) < n:
            break
        tokens = tuple(s.tokens.tolist())
        try:
            ours = s.forward([11, 12], "all"), s.state()
        except SessionError as e:  # a report whose cache rows could not be put back
            assert name == "stages" and "this session is closed" in str(e)
            s = session(core)
            continue
        if tokens not in truth:
            fresh.truncate(0)
            if tokens:
                fresh.forward(tokens)
            truth[tokens] = fresh.forward([11, 12], "all"), fresh.state()
        logits, state = truth[tokens]
        models.assert_same_bits(f"logits after failure {n}", ours[0], logits)
        models.assert_same_bits(f"cache after failure {n}", ours[1]["cache"], state["cache"])
        m = min(ours[1]["mtp_cache"].shape[1], state["mtp_cache"].shape[1])
        models.assert_same_bits(f"MTP {n}", ours[1]["mtp_cache"][:, :m], state["mtp_cache"][:, :m])
    assert n > 3


def test_device_failure_while_opening_is_an_error() -> None:
    for how in ("fail_at", "throw_at"):
        for n in range(1, 400):
            device_cases.play("calls", 0)
            device_cases.play(how, n)
            try:
                core = device_cases.open_core.__wrapped__(models.small(), "sim")
                s = session(core)
            except Error:
                continue
            finally:
                device_cases.play(how, 0)
            break
        assert n > 15
        assert np.isfinite(s.forward([1, 2])).all()


def test_device_session_without_mtp_decodes_a_model_that_has_it(core: Any) -> None:
    """From an empty cache too, where no pending row tells that none are kept."""
    with_mtp, without = session(core), session(core, mtp=False)
    assert text(with_mtp, 0) == text(without, 0)
    assert without.tokens.tolist() == with_mtp.tokens.tolist() and without.mtp_pos == 0
    models.assert_same_bits("logits", without.forward([5]), with_mtp.forward([5]))


def test_device_report_leaves_the_session_as_it_is(core: Any) -> None:
    s, other = session(core), session(core)
    for x in (s, other):
        x.forward(PROMPT, "all")
    shown = {name: np.array(view(s, name)) for name in ("x", "hidden", "logits", "cache")}
    for what in ("stages:3:2", f"stages:8:{len(PROMPT) - 1}", "bandwidth:100000", "device"):
        s.device_report(what)
    for name, before in shown.items():
        assert np.array_equal(view(s, name).view(np.uint8), before.view(np.uint8)), name
    models.assert_same_bits("next logits", s.forward([5]), other.forward([5]))
    start(s, 9)
    s.decode_step(0)
    with pytest.raises(SessionError, match=r"decoding|rounds"):
        s.device_report("stages:1:0")
    s.decode_finish()


def view(s: Any, name: str) -> Any:
    import ctypes

    address, shape, typestr = s.device_view(name)
    kind = {"<f4": ctypes.c_float, "<i4": ctypes.c_int32, "|u1": ctypes.c_uint8}[typestr]
    flat = (kind * int(np.prod(shape))).from_address(address)
    return np.frombuffer(flat, np.dtype(typestr)).reshape(shape)


def test_device_that_hangs_stops_nobody_else(core: Any) -> None:
    """Ctrl-C ends the wait for a round, and meanwhile other threads use the model."""
    s, other = session(core), session(core)
    other.forward(PROMPT)
    start(s, 9)
    s.decode_step(0)
    device_cases.play("hang", 1)
    seen: list[int] = []

    def use_the_model() -> None:
        time.sleep(0.05)
        other.truncate(3)
        seen.append(other.pos)
        signal.raise_signal(signal.SIGINT)

    for wait in (s.decode_poll, s.decode_finish):
        thread = threading.Thread(target=use_the_model)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        thread.join()
    assert seen == [3, 3]
    device_cases.play("hang", 0)
    assert len(s.decode_poll()) == 1
    s.decode_finish()
    assert s.tokens.tolist() == [9]


def test_device_taps_of_a_pass_longer_than_one_on_the_device_hold_all_rows() -> None:
    """The simulated device takes 48 rows at a time."""
    file = models.pack(models.checkpoint("v2_lite", "bf16"), dtype="q8")
    core = device_cases.open_core(file, "sim")
    ids = tiny.token_ids(file.config["vocab_size"], 60, 5)
    names = ["embed", "layers.1.q_absorbed", "layers.1.topk_idx", "final_norm", "logits"]
    whole = session(core, mtp=False, ctx=128, rows=60)
    whole.trace(names)
    logits = whole.forward(ids, "all")
    taps = whole.taps()
    assert len(taps) == 5 and all(len(t) == 60 for t in taps.values())
    assert np.array_equal(taps["logits"], logits) and np.array_equal(view(whole, "embed"), taps["embed"])
    parts = session(core, mtp=False, ctx=128, rows=60)
    parts.trace(names)
    got: dict[str, list[Any]] = {name: [] for name in taps}
    for at in range(0, 60, 20):
        parts.forward(ids[at : at + 20], "all")
        for name, rows in parts.taps().items():
            got[name].append(rows)
    for name, rows in got.items():
        models.assert_same_bits(name, np.concatenate(rows), taps[name])
    fed = session(core, mtp=False, ctx=128, rows=60)
    fed.trace([], {"embed": taps["embed"]})
    models.assert_same_bits("fed", fed.forward(np.zeros(60, np.int32), "all"), logits)


# ---- devices of other sizes


def test_devices_of_every_size_compute_the_same_bits() -> None:
    """99, 163 and 227 KB of shared memory a block: other blocks, one result, decoding included."""
    results = []
    for smem in (227, 163, 99):
        device_cases.play("smem", smem * KB)
        there = device_cases.open_core.__wrapped__(models.small(), "sim")
        s = session(there, ctx=128, rows=64)
        logits = s.forward(tiny.token_ids(270, 20, 3), "all")
        results.append((logits, text(s, 2), s.state()["cache"]))
    for logits, tokens, cache in results[1:]:
        models.assert_same_bits("logits", logits, results[0][0])
        assert tokens == results[0][1]
        models.assert_same_bits("cache", cache, results[0][2])


def test_device_refuses_at_open_what_it_cannot_run() -> None:
    """Long contexts too, which no short pass reaches; never at the first pass that would need it."""
    device_cases.play("smem", 60 * KB)
    with pytest.raises(UnsupportedError, match=r"stage '.+' of this model needs \d+ bytes of shared memory a block at"):
        session(device_cases.open_core.__wrapped__(models.small(), "sim"))
