"""What a session's sequence is while and after it generates: every token returned, none other, whatever ended it.

Whoever goes on gets the bits of a fresh session that is given the whole sequence.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepcalm
import device_cases
import models
import tiny
from deepcalm.errors import SessionError
from deepcalm.generation import Generation
from deepcalm.sampling import Sampling

PROMPT = tiny.token_ids(tiny.N_TOKENS, 9, 4).tolist()
MORE = [5, 6, 7]
N = 7


@functools.cache
def model(device: str) -> deepcalm.Model:
    return deepcalm.Model(models.packed(), device=device, threads=1 if device == "cpu" else None)


@functools.cache
def text(device: str) -> list[int]:
    """The tokens that follow PROMPT, by one step of a session without drafts after the other."""
    s, out = model(device).session(64, mtp=False), []
    logits = s.prefill(PROMPT)
    for _ in range(24):
        out.append(int(logits[: tiny.N_TOKENS].argmax()))
        logits = s.decode(out[-1])
    return out


def fresh(device: str, tokens: list[int]) -> bytes:
    """Logits after ``tokens``."""
    return bytes(model(device).session(64, mtp=False).prefill(tokens).tobytes())


def stop_here(*_: object) -> None:
    raise KeyboardInterrupt


def by_length(s: deepcalm.Session, **how: Any) -> Generation:
    g = s.generate(PROMPT, max_tokens=N, eos_ids=[], **how)
    assert len(list(g)) == N and g.reason == "length"
    return g


def by_eos(s: deepcalm.Session, **how: Any) -> Generation:
    end = next(i for i in range(4, 20) if text(s.model.device)[i] not in text(s.model.device)[:i])
    g = s.generate(PROMPT, eos_ids=[text(s.model.device)[end]], **how)
    assert len(list(g)) == end and g.reason == "eos"
    return g


def by_stop_string(s: deepcalm.Session, **how: Any) -> Generation:
    g = s.generate(PROMPT, eos_ids=[], **how)
    made = g.text(s.model.decode(text(s.model.device)[:N])[-2:])
    assert "".join(made) is not None and made.reason == "stop" and g.reason == "closed"
    return g


def by_close(s: deepcalm.Session, **how: Any) -> Generation:
    g = s.generate(PROMPT, eos_ids=[], **how)
    for _ in range(N):
        next(g)
    g.close()
    g.close()
    assert g.reason == "closed" and next(g, None) is None
    return g


def by_interrupt(s: deepcalm.Session, **how: Any) -> Generation:
    """Between a round and the taking of its tokens."""
    g = s.generate(PROMPT, eos_ids=[], **how)
    for _ in range(3):
        next(g)
    g.drafts.observe = stop_here  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(g)
    assert g.reason == "interrupted" and next(g, None) is None
    return g


def by_leaving(s: deepcalm.Session, **how: Any) -> Generation:
    """The last reference goes with the loop."""
    gc.freeze()  # the search of garbage is for what comes: that of all tests' objects takes half a second
    for n, _ in enumerate(s.generate(PROMPT, eos_ids=[], **how)):
        if n == N:
            break
    gc.collect()
    gc.unfreeze()
    return s.generate(eos_ids=[], **how)


ENDS = (by_length, by_eos, by_stop_string, by_close, by_interrupt, by_leaving)


ON_SIM = [(by_length, 3), (by_eos, "off"), (by_interrupt, 3)]  # slow: fewer, and shorter below


@pytest.mark.parametrize(
    ("device", "end", "draft"),
    [*(("cpu", end, draft) for end in ENDS for draft in ("off", 3)), *(("sim", *case) for case in ON_SIM)],
)
def test_going_on_equals_one_long_text(
    end: Callable[..., Generation], draft: str | int, device: str, tmp_path: Path
) -> None:
    if device == "sim":
        device_cases.need("sim")

    def ended() -> tuple[deepcalm.Session, list[int]]:
        s = model(device).session(64)
        g = end(s, draft=draft)
        tokens = s.tokens.tolist()
        assert s.pos == len(tokens) and tokens == PROMPT + text(device)[: s.pos - len(PROMPT)]
        assert end is by_leaving or g.tokens == tokens[len(PROMPT) :]
        return s, tokens

    s, tokens = ended()
    assert s.prefill(MORE).tobytes() == fresh(device, tokens + MORE)
    assert s.tokens.tolist() == tokens + MORE
    if device == "sim":
        return  # from here on nothing asks where the rows came from
    s, tokens = ended()
    every = s.prefill(MORE, all_logits=True)
    assert every.shape[0] == 3 and every[0].tobytes() == fresh(device, [*tokens, MORE[0]])
    s, tokens = ended()
    assert s.decode(MORE[0]).tobytes() == fresh(device, [*tokens, MORE[0]])
    s, tokens = ended()
    new = list(s.generate(max_tokens=3, eos_ids=[], draft=draft))
    assert tokens + new == s.tokens.tolist() == PROMPT + text(device)[: s.pos - len(PROMPT)]
    s, tokens = ended()
    s.truncate(s.pos - 1)
    assert list(s.generate(max_tokens=3, eos_ids=[], draft=draft)) == text(device)[s.pos - len(PROMPT) - 3 :][:3]
    s, tokens = ended()
    s.save(tmp_path / "s")
    again = model(device).session(64)
    again.restore(tmp_path / "s")
    assert again.tokens.tolist() == s.tokens.tolist() == tokens
    for x in (s, again):
        assert list(x.generate(max_tokens=2, eos_ids=[])) == text(device)[len(tokens) - len(PROMPT) :][:2]
    s, tokens = ended()
    assert s.reuse([*tokens, *MORE]) == len(tokens)
    assert s.prefill(MORE).tobytes() == fresh(device, tokens + MORE)
    s, tokens = ended()
    r = s.draft_round(MORE[0], 2, Sampling(), tiny.N_TOKENS)
    assert s.tokens.tolist() == [*tokens, MORE[0], *r["tokens"][:-1]]
    assert s.decode(MORE[1]).tobytes() == fresh(device, [*s.tokens.tolist()[:-1], MORE[1]])


def test_a_full_context_ends_with_its_last_position() -> None:
    s = model("cpu").session(len(PROMPT) + 4)
    g = s.generate(PROMPT, eos_ids=[])
    assert (list(g), g.reason, s.pos) == (text("cpu")[:4], "context", s.ctx)
    again = s.generate(eos_ids=[])
    assert (list(again), again.reason) == ([], "context")
    with pytest.raises(SessionError, match="1 tokens after 13 do not fit the context of 13"):
        s.decode(1)
    s.truncate(s.pos - 1)
    assert list(s.generate(eos_ids=[])) == text("cpu")[3:4]


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("draft", ["off", 2])
def test_an_interrupt_anywhere_leaves_what_was_returned(draft: str | int, step: int) -> None:
    """Ctrl-C at every few lines of the loop and of the session: a sequence that is right, whatever was half done."""
    files = {f"{Path(deepcalm.__file__).parent}/{name}.py" for name in ("generation", "session", "text")}
    seen, at, reasons = 0, 0, set()

    def trace(frame: Any, event: str, _arg: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    while True:
        s = model("cpu").session(64, max_rows=6)
        g = s.generate(PROMPT, max_tokens=6, eos_ids=[], draft=draft)
        answer = g.text()
        seen, at = 0, at + step
        sys.settrace(trace)
        try:
            list(answer)
        except KeyboardInterrupt:
            answer.interrupt()
        else:
            break
        finally:
            sys.settrace(None)
        assert answer.text == s.model.decode(g.tokens), at
        reasons.add(g.reason)
        tokens = s.tokens.tolist()
        assert tokens == (PROMPT + text("cpu"))[: len(tokens)], at
        assert g.tokens == tokens[len(PROMPT) :], at
        assert s.prefill(MORE).tobytes() == fresh("cpu", tokens + MORE), at
    assert at > 300 and "interrupted" in reasons


CHANGES: dict[str, Callable[[deepcalm.Session, Path], object]] = {
    "prefill": lambda s, _: s.prefill(MORE),
    "decode": lambda s, _: s.decode(5),
    "decode_many": lambda s, _: s.decode_many(MORE),
    "draft_round": lambda s, _: s.draft_round(5, 0, Sampling(), tiny.N_TOKENS),
    "truncate": lambda s, _: s.truncate(3),
    "reuse": lambda s, _: s.reuse(PROMPT),
    "restore": lambda s, path: s.restore(path),
    "generate": lambda s, _: next(s.generate(MORE)),
}


@pytest.mark.parametrize(
    ("device", "change"), [*(("cpu", c) for c in CHANGES), ("sim", "prefill"), ("sim", "restore"), ("sim", "generate")]
)
def test_a_call_that_changes_the_sequence_ends_the_generation(change: str, device: str, tmp_path: Path) -> None:
    if device == "sim":
        device_cases.need("sim")
    s = model(device).session(64)
    s.prefill(PROMPT)
    s.save(tmp_path / "s")
    g = s.generate(eos_ids=[], draft=2)
    assert [next(g) for _ in range(3)] == text(device)[:3]
    before = s.tokens.tolist()
    CHANGES[change](s, tmp_path / "s")
    assert g.reason == "taken" and g.tokens == text(device)[:3]
    for _ in range(2):
        with pytest.raises(SessionError, match="used for something else"):
            next(g)
    assert s.tokens.tolist()[:3] == before[:3]
    tokens = s.tokens.tolist()
    assert s.prefill(MORE).tobytes() == fresh(device, tokens + MORE)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_call_that_only_reads_lets_it_go_on(device: str, tmp_path: Path) -> None:
    if device == "sim":
        device_cases.need("sim")
    s = model(device).session(64)
    g = s.generate(PROMPT, max_tokens=9, eos_ids=[], draft=2)
    made = [next(g), next(g)]
    s.save(tmp_path / "s")
    made += [next(g), next(g)]
    with s.trace("embed") as taps:
        made += [next(g), next(g)]
    assert len(taps["embed"]) >= 2 and s.tokens.tolist() == PROMPT + made == PROMPT + g.tokens
    _ = s.pos, s.stats, s.last_logits, s.mtp_pending, s.expert_union, s.generate(MORE)  # not begun
    assert made + list(g) == text(device)[:9] and g.reason == "length"


def test_traces_do_not_nest() -> None:
    s = model("cpu").session(64, mtp=False)
    with s.trace("embed") as taps:
        with pytest.raises(SessionError, match="a recording is running already"), s.trace("logits"):
            pass
        s.prefill(PROMPT)
    assert list(taps) == ["embed"] and not s.tracing
    with s.trace("logits") as taps:
        s.decode(1)
    assert list(taps) == ["logits"]


def test_sessions_draft_by_default_as_the_command_line_does() -> None:
    assert model("cpu").session().keeps_mtp and not models.model("moonlight").session().keeps_mtp
    demo = deepcalm.Model(deepcalm.demo_path(), threads=1)
    g = demo.session().generate(demo.encode("Once upon a time"), max_tokens=60)
    assert len(list(g)) == 60 and g.drafts.stats.drafted > 0
    plain = demo.session(mtp=False).generate(demo.encode("Once upon a time"), max_tokens=60)
    assert list(plain) == g.tokens and plain.drafts.stats.drafted == 0


def test_two_threads_take_turns() -> None:
    """A call from another thread waits for the token that is being made, then takes the session."""
    s = model("cpu").session(64)
    g = s.generate(PROMPT, max_tokens=20, eos_ids=[])
    next(g)
    thread = threading.Thread(target=s.prefill, args=(MORE,))
    thread.start()
    with contextlib.suppress(SessionError):
        list(g)
    thread.join()
    assert g.reason in ("taken", "length") and s.tokens.tolist() == PROMPT + text("cpu")[: len(g.tokens)] + MORE
    assert np.array_equal(s.last_logits, np.frombuffer(fresh("cpu", s.tokens.tolist()), np.float32))
