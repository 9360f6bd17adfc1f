"""The generation loop: tokens one at a time, and text on top of it. Why it ended is part of the result."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _core
from .draft import MAX_DRAFT, Controller, CostModel
from .errors import SessionError
from .text import StopMatcher

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

MAX_EOS = 32  # of a device; more end the text on the host, round by round
AHEAD = 4  # rounds queued on a device beyond the one whose tokens are awaited
REASONS = ("eos", "stop", "length", "context", "interrupted")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits.

    ``temp`` 0 takes the most probable token, ties to the lowest id. Otherwise the token of position i is the argmax of
    log p_i + Gumbel noise keyed by (seed, i): a function of the position, not of what was drawn before. Filters apply
    to softmax(logits / temp) in the order top_k (0: off), top_p (1: off), min_p (0: off).
    """

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temp", 0 <= self.temp < float("inf"), "a finite number >= 0"),
            ("top_k", 0 <= self.top_k < 1 << 31, "a number in 0..2^31-1"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("seed", 0 <= self.seed < 1 << 64, "a number in 0..2^64-1"),
        )
        for name, ok, want in checks:
            if not ok:
                raise ValueError(f"{name}: {getattr(self, name)}, expected {want}")

    def choose(self, logits: npt.NDArray[np.float32], pos: int, n_valid: int) -> int:
        """The token at position ``pos`` for logits [vocab_size] f32; ids from ``n_valid`` on are never chosen.

        Raises:
            SessionError: the logits are not finite.
        """
        return _core.sample(logits, self.temp, self.top_k, self.top_p, self.min_p, self.seed, pos, n_valid)


def check_draft(draft: str | int) -> None:
    """Raises ValueError unless ``draft`` is "auto", "off" or a number of drafts 0..7."""
    if draft not in ("auto", "off") and not (isinstance(draft, int) and 0 <= draft <= MAX_DRAFT):
        raise ValueError(f"draft: {draft!r}, expected auto, off or a number 0..{MAX_DRAFT}")


class Generation(Iterator[int]):
    """New token ids after ``ids``, made one per step; the work starts with the first.

    ``reason`` is None while it runs, then "eos", "length" (``max_tokens``) or "context" (the context is full); an eos
    token is not returned. ``tokens`` are the ids returned so far; the last of them is not in the cache yet. While it
    drafts, the cache may be ahead of them: ``close`` it before using the session if you stop taking tokens early.

    Args:
        ids: the prompt, appended to what the session holds; None: go on from the logits of its last call.
        max_tokens: at most this many; None: until something else ends it.
        temp, top_k, top_p, min_p, seed: see ``Sampling``.
        eos_ids: ids that end it; None: the model's own.
        draft: MTP drafts per round, "off", or "auto": as many as pay. The tokens are the same with any of them.

    ``drafts`` has the counts (``draft.DraftStats``) and the controller's predictions.

    Raises:
        SessionError: drafts asked for in a session without MTP state (``Model.session(mtp=True)``).
    """

    def __init__(
        self,
        session: Session,
        ids: Sequence[int] | None = None,
        max_tokens: int | None = None,
        temp: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
        draft: str | int = "auto",
    ) -> None:
        check_draft(draft)
        if not session.keeps_mtp:
            if draft not in ("auto", "off", 0):
                raise SessionError(f"draft {draft}: the session keeps no MTP state; make it with session(mtp=True)")
            draft = "off"
        self.session = session
        core = session.model.core
        cost = CostModel.of(core.weight_bytes, session.model.config) if session.keeps_mtp else None
        self.drafts = Controller(cost, draft)
        self.sampling = Sampling(temp, top_k, top_p, min_p, seed)
        self.max_tokens = max_tokens
        self.reason: str | None = None
        self.tokens: list[int] = []
        self._prompt = ids
        self._eos = session.model.eos_ids if eos_ids is None else frozenset(eos_ids)
        self._n_valid = session.model.n_valid
        self._ready: deque[int] = deque()  # chosen, not returned yet
        self._device: DeviceRounds | None = None

    def __next__(self) -> int:
        if self.reason is not None:
            raise StopIteration
        if self.max_tokens is not None and len(self.tokens) >= self.max_tokens:
            return self._end("length")
        if not self.tokens:
            logits = self._first_logits()
            if self.session.pos == self.session.ctx:
                return self._end("context")
            self._ready.append(self.sampling.choose(logits, self.session.pos, self._n_valid))
        elif not self._ready:
            if self._device is None and self.session.pos + 1 == self.session.ctx:
                return self._end("context")  # the last token returned takes the last position
            if self.session.model.device != "cpu" and not self.session.tracing and len(self._eos) <= MAX_EOS:
                self._device = self._device or DeviceRounds(self)
                self._ready.extend(self._device.next())
                if not self._ready:
                    return self._end(self._device.stop)
            else:
                self._ready.extend(self._round())
        token = self._ready.popleft()
        if token in self._eos:
            return self._end("eos")
        self.tokens.append(token)
        return token

    def _round(self) -> list[int]:
        """Drafts, verifies, and returns the tokens that are certain now."""
        control, counted = self.drafts, self.session.expert_union
        k = control.next_k(counted, self.session.mtp_pending)
        # No row is verified for a token that plain decoding would not return.
        k = min(k, self.session.ctx - self.session.pos - 2)
        if self.max_tokens is not None:
            k = min(k, self.max_tokens - len(self.tokens) - 1)
        r = self.session.draft_round(
            self.tokens[-1], k, self.sampling, self._n_valid, control.min_confidence(counted) if k else 0.0
        )
        control.observe(r)
        return list(r["tokens"])

    def _first_logits(self) -> npt.NDArray[np.float32]:
        if self._prompt is not None:
            return self.session.prefill(self._prompt)
        if self.session.last_logits is None:
            raise SessionError("nothing to go on from: prefill some tokens first, or pass ids")
        return self.session.last_logits

    def close(self) -> None:
        """Ends it from outside; drafts accepted beyond the last token returned leave the cache again."""
        self.reason = self.reason or "closed"
        if self._device is not None:
            self._device.finish(len(self.tokens) + (self.reason == "eos"))
            self._device = None
            self._ready.clear()
        if self._ready:
            self.session.truncate(self.session.pos - len(self._ready))
            self._ready.clear()

    def _end(self, reason: str) -> int:
        self.reason = reason
        self.close()
        raise StopIteration


class DeviceRounds:
    """The rounds of one text on a device, which chooses and verifies tokens by itself.

    Here rounds are only queued, a few ahead of the reader, and their results taken.

    ``stop``: why no more tokens come, "" while they do. Whoever owns the session waits for ``finish`` before using it.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.session = session = generation.session
        self.stop = ""
        self._base = session.pos + 1 - len(generation.tokens)  # rows of the cache before the first token
        self._cost = CostModel.of(session.model.core.weight_bytes, session.model.config)
        self._in_flight: deque[int] = deque()  # drafts of each queued round
        self._last_ns, self._start = 0, time.perf_counter()
        limit = generation.max_tokens
        session.decode_start(
            self,
            generation.tokens[-1],
            generation.sampling,
            generation.session.model.n_valid,
            2**62 if limit is None else limit - len(generation.tokens),
            sorted(generation._eos),
        )

    def next(self) -> list[int]:
        """Tokens of the rounds that have ended, at least one unless ``stop`` is set."""
        control, core = self.generation.drafts, self.session.core
        tokens: list[int] = []
        while not tokens and not self.stop:
            while len(self._in_flight) <= AHEAD:
                k = control.next_k(self.session.expert_union, 1)
                core.decode_step(k)
                self._in_flight.append(k)
            for r in core.decode_poll():
                k = self._in_flight.popleft()
                tokens += r["tokens"]
                self.stop = self.stop or r["stop"]
                if r["tokens"]:
                    control.observe(r | self._price(k, r))
        if self.stop == "not finite" and not tokens:
            what = "no finite maximum" if r["bad_id"] < 0 else f"token {r['bad_id']} is NaN"
            raise SessionError(f"logits are not finite: {what}")
        return tokens

    def _price(self, k: int, r: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes and seconds of a round, split as the bytes are: the device reports the round's time only."""
        plain, cost = self._cost.plain, self._cost
        verify = plain + (r["experts_verify"] - cost.layers * cost.top_k) * cost.expert
        draft = int(cost.draft_bytes(k, 1))
        first = int(1e9 * (time.perf_counter() - self._start))  # of which no earlier round's end is known
        ns, self._last_ns = max(r["end_ns"] - self._last_ns, 1) if self._last_ns else first, r["end_ns"]
        share = draft / (draft + verify)
        return {
            "draft_bytes": draft,
            "verify_bytes": verify,
            "draft_seconds": 1e-9 * ns * share,
            "verify_seconds": 1e-9 * ns * (1 - share),
        }

    def finish(self, n_tokens: int) -> None:
        """Waits, and leaves the first ``n_tokens`` tokens of the text in the cache but the last."""
        self.session.decode_finish()
        self.session.truncate(min(self.session.pos, self._base + n_tokens - 1))

    def close(self) -> None:
        """Ends the generation: the session is wanted for something else."""
        self.generation.close()


class TextGeneration(Iterator[str]):
    """A ``Generation`` as pieces of text: complete characters, ended by stop strings too.

    ``reason`` is as there, or "stop" (a stop string was completed; only the text before it is returned), or
    "interrupted" after ``interrupt``. ``text`` is all text returned so far. A special token shows as no text: a stop
    string that is the text of one ends at that token.

    Raises:
        ValueError: a stop string is empty, or holds the text of a special token beside other text.
    """

    def __init__(self, generation: Generation, stop: Sequence[str] = ()) -> None:
        self.generation = generation
        self.reason: str | None = None
        self.text = ""
        vocabulary = generation.session.model.vocabulary
        self._decoder = vocabulary.decoder()
        self._stop_ids = vocabulary.stop_ids(stop)
        self._stops = StopMatcher(stop)

    def __next__(self) -> str:
        while self.reason is None:
            token = next(self.generation, None)
            if token is None or token in self._stop_ids:
                self.reason = self.generation.reason or "stop"
                piece = self._flush()
            else:
                piece = self._stops.feed(self._decoder.feed(token))
            self.reason = "stop" if self._stops.stopped else self.reason
            if self.reason == "stop":
                self.generation.close()
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def _flush(self) -> str:
        """What was held back; the end of an incomplete character may complete a stop string."""
        piece = self._stops.feed(self._decoder.flush())
        return piece if self._stops.stopped else piece + self._stops.flush()

    def interrupt(self) -> str:
        """Ends it from outside; returns the text that was still held back."""
        self.reason = "interrupted"
        self.generation.close()
        piece = self._flush()
        self.text += piece
        return piece


def generate(
    prompt: str,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    max_tokens: int | None = 256,
    stop: Sequence[str] = (),
    ctx: int | None = None,
    kv: str = "f16",
    temp: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that a model writes after a raw prompt (without the prompt).

    Args:
        model: a ``Model`` or the path of a packed file; None: the embedded demo model.
        max_tokens: at most this many; None: until the model ends or the context is full.
        stop: strings that end the text; they are not part of it.
        ctx, kv: see ``Model.session``.
        temp, top_k, top_p, min_p, seed: see ``Sampling``; greedy by default.

    Raises:
        SessionError: the prompt is empty without a bos token to start from, or longer than the context.
    """
    from .model import Model, demo_path

    if not isinstance(model, Model):
        model = Model(demo_path() if model is None else model)
    ids = model.encode(prompt)
    tokens = model.session(ctx, kv).generate(
        ids, max_tokens=max_tokens, temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    return "".join(TextGeneration(tokens, stop))
