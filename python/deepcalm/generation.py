"""The generation loop: tokens one at a time, and text on top of it. Why it ended is part of the result."""

from __future__ import annotations

import numbers
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from . import _core
from .arguments import integer, token_ids
from .drafters import Drafters
from .drafting import MAX_DRAFT, Acceptance, Controller, CostModel, Text
from .errors import SessionError
from .sampling import Sampling, Scores
from .text import AnswerText

if TYPE_CHECKING:
    from .session import F32, Progress, Session

MAX_EOS = 32  # of a device; more end the text on the host, round by round
AHEAD = 4  # rounds queued on a device beyond the one whose tokens are awaited


class Options(TypedDict, total=False):
    """What ``Session.generate`` takes; each may be left out.

    ``max_tokens``: at most this many, 1 or more; None: until something else ends it. ``temp``, ``top_k``, ``top_p``,
    ``min_p``, ``seed``: see ``Sampling``; greedy by default. ``eos_ids``: ids that end it; None: the model's own.
    ``draft``: drafts per round, "off", or "auto": as many as pay. ``drafter``: who makes them, "mtp" (the MTP layer),
    "ngram" (the text itself: what followed its last tokens before), "model:FILE" (another model with the same tokens),
    several with commas between, or "auto": the first two where they are at hand. The tokens are the same with any of
    them. ``logprobs``: keep every token's probability and those of so many most probable ones (``Generation.scores``);
    None: keep none.
    """

    max_tokens: int | None
    temp: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    eos_ids: Sequence[int] | None
    draft: str | int
    drafter: str
    logprobs: int | None


def check_draft(draft: str | int) -> None:
    """Raises ValueError unless ``draft`` is "auto", "off" or a number of drafts 0..7."""
    number = isinstance(draft, numbers.Integral) and not isinstance(draft, bool)
    if draft not in ("auto", "off") and not (number and 0 <= int(draft) <= MAX_DRAFT):
        raise ValueError(f"draft: {draft!r}, expected auto, off or a number 0..{MAX_DRAFT}")


class Generation(Iterator[int]):
    """New token ids after ``ids``, made one per step; the work starts with the first.

    Every token returned belongs to the session's sequence at once: whoever goes on (``prefill``, ``decode``, another
    ``generate``, ``save``) does so after the last one, however this ended.

    ``reason`` is None while it runs, then "eos" (that token is not returned), "length" (``max_tokens``), "context" (it
    is full), "closed" (``close``), "interrupted" (Ctrl-C), "failed" (another exception), or "taken": a call changed the
    session's sequence meanwhile. Asked for a token after that it raises SessionError, after the others StopIteration.

    ``scores``: with ``logprobs``, one ``sampling.Scores`` for each of ``tokens``.

    ``progress`` may be set before the first token: called as ``Session.prefill`` calls its own, for ``ids``.

    ``drafts``: the controller, with the counts (``drafting.DraftStats``).

    Raises:
        SessionError: nothing to go on from, ids that are none or do not fit, or drafts of the MTP layer asked for in a
            session without MTP state (``Model.session(mtp=True)``).
        TypeError, ValueError: another argument that is wrong.
    """

    def __init__(
        self,
        session: Session,
        ids: Sequence[int] | None,
        *,
        max_tokens: int | None = None,
        eos_ids: Sequence[int] | None = None,
        draft: str | int = "auto",
        drafter: str = "auto",
        logprobs: int | None = None,
        **sampling: Any,
    ) -> None:
        model = session.model
        ends = model.eos_ids if eos_ids is None else token_ids(eos_ids, int(model.config["vocab_size"])).tolist()
        self.eos_ids, self.n_valid = frozenset(ends), model.n_valid
        self.cost = CostModel.of(model.core.weight_bytes, model.config)
        self.sampling = Sampling(**sampling)
        check_draft(draft)
        if drafter == "auto" and model.device != "cpu" and (session.keeps_mtp or draft == "auto"):
            drafter, draft = "mtp", draft if session.keeps_mtp else "off"  # it drafts without waiting for the host
        self.drafters = Drafters(model, drafter, draft, session.keeps_mtp)
        self.session = session
        self.max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        self._prompt = None if ids is None else session.checked(ids)
        if ids is None and not session.pos:
            raise SessionError("nothing to go on from: prefill some tokens first, or pass ids")
        self.drafts = Controller(self.cost, draft)
        self._accepted: defaultdict[tuple[str, int], Acceptance] = defaultdict(Acceptance)
        self.progress: Progress | None = None
        self.reason: str | None = None
        self.stepping = False  # inside __next__: the session's calls are its own
        self._base: int | None = None  # tokens of the sequence before the first new one; None: not started
        self._tokens: list[int] = []  # of a generation that has ended
        self._ready: deque[tuple[int, F32 | None]] = deque()  # chosen, not returned yet; logits it was chosen from
        self.logprobs = None if logprobs is None else integer("logprobs", logprobs, 0)
        self.scores: list[Scores] = []
        self._device: DeviceRounds | None = None

    def text(self, stop: str | Sequence[str] = ()) -> TextGeneration:
        """An iterator over pieces of its text in place of ids; ``stop`` and what is raised: see ``TextGeneration``."""
        return TextGeneration(self, stop)

    @property
    def tokens(self) -> list[int]:
        """The ids returned so far, a copy."""
        with self.session.lock:
            running = self.reason is None and self._base is not None
            return self.session.since(self._base or 0) if running else [*self._tokens]

    def __next__(self) -> int:
        with self.session.lock:
            if self.reason == "taken":
                raise SessionError("the session was used for something else meanwhile, which ended this generation; "
                                   "session.generate() goes on from where it is")  # fmt: skip
            if self.reason is not None:
                raise StopIteration
            self.stepping = True
            try:
                token = self._step()
                if isinstance(token, int):
                    self.session.returned(token)
                    return token
                self.close(token)
            except BaseException as e:  # whatever is half done, the sequence is what was returned
                self.close("interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
                raise
            finally:
                self.stepping = False
            raise StopIteration

    def _step(self) -> int | str:
        """The next token, or why there is none."""
        session = self.session
        if self._base is None:
            if self._prompt is not None:
                session.prefill(self._prompt, progress=self.progress)
            session.attach(self)
            self._base = session.pos
            if session.last_logits is not None and session.pos < session.ctx:
                token = self.sampling.choose(session.last_logits, session.pos, self.n_valid)
                self._ready.append((token, session.last_logits))
        if self.max_tokens is not None and session.pos - self._base >= self.max_tokens:
            return "length"
        if not self._ready:
            if session.pos == session.ctx:
                return "context"
            on_host = session.model.device == "cpu" or session.tracing or self.logprobs is not None
            if not on_host and self.drafters.only_mtp and len(self.eos_ids) <= MAX_EOS:
                if self._device is None or not session.decoding:
                    self._device = DeviceRounds(self, self._left())
                self._ready.extend((token, None) for token in self._device.next())
                if not self._ready:
                    return self._device.stop
            else:
                self._ready.extend(self._round())
        token, logits = self._ready.popleft()
        if token in self.eos_ids:
            return "eos"
        if self.logprobs is not None and logits is not None:
            self.scores.append(Scores.of(token, logits, self.n_valid, self.logprobs))
        return token

    def _left(self) -> int:
        """Tokens that may still come."""
        assert self._base is not None
        return 2**62 if self.max_tokens is None else self.max_tokens - (self.session.pos - self._base)

    def _round(self) -> list[tuple[int, F32 | None]]:
        """Drafts, verifies, and returns the tokens that are certain now, with their logits if those are wanted."""
        control, session = self.drafts, self.session
        # No row is verified for a token that plain decoding would not return.
        left, pending = min(session.ctx - session.pos, self._left()), session.mtp_pending if session.keeps_mtp else 1
        text = self.text_now(left, pending)
        control.choose([text], [self.drafters.offers(text)], 1, MAX_DRAFT, session.core.expert_union)
        spent = self.drafters.make([text])
        k, drafts = (text.drafts, None) if isinstance(text.drafts, int) else (0, text.drafts)
        r = session.draft_round(
            text.ids[-1],
            k,
            self.sampling,
            self.n_valid,
            control.min_confidence(1 + k) if k else 0.0,
            drafts=drafts,
            want_logits=self.logprobs is not None,
        )
        if spent:
            session.count("decode", 0, spent["seconds"], spent["bytes"])
        self.observe(text, r, spent)
        return list(zip(r["tokens"], r.get("logits", [None] * len(r["tokens"])), strict=True))

    def text_now(self, left: int, pending: int) -> Text:
        """What drafters see of the sequence, its cache for no longer than a round; see ``Text``."""
        session = self.session
        return Text(session.sequence, session.core, self.sampling, left, pending, accepted=self._accepted)

    def observe(self, text: Text, r: dict[str, Any], spent: Mapping[str, Any]) -> None:
        """Takes a round into account, and what its drafts took beside it."""
        step = {**r, "mtp_bytes": r["draft_bytes"], "rows": 1 + r["drafted"]}
        for unit, more in spent.items():
            step[f"draft_{unit}"] += more
        self.drafts.stats.add(step, text.key[0])
        self.drafts.observe([(text, r)], step, False, True)

    def close(self, reason: str = "closed") -> None:
        """Ends it, once; the session comes to rest, its sequence stays what was returned."""
        with self.session.lock:
            if self.reason is None:
                self._tokens, self.reason = self.tokens, reason
                self._ready.clear()
                if self._base is not None:
                    self.session.detach()

    def forget(self) -> None:
        """What was chosen and not returned is not needed: the session comes to rest, and it goes on from there."""
        self._ready.clear()


class DeviceRounds:
    """Rounds on a device, which chooses and verifies tokens by itself.

    Here rounds are only queued, a few ahead of the reader, and their results taken, until the session comes to rest.

    ``stop``: why no more tokens come, "" while they do.
    """

    def __init__(self, generation: Generation, limit: int) -> None:
        self.generation = generation
        self.session = session = generation.session
        self.stop = ""
        self._in_flight: deque[Text] = deque()  # with the drafts of each queued round
        self._last_ns, self._start = 0, time.perf_counter()
        session.decode_start(generation.sampling, generation.n_valid, limit, sorted(generation.eos_ids))

    def next(self) -> list[int]:
        """Tokens of the rounds that have ended, at least one unless ``stop`` is set."""
        generation, core = self.generation, self.session.core
        tokens: list[int] = []
        while not tokens and not self.stop:
            while len(self._in_flight) <= AHEAD:
                text = generation.text_now(MAX_DRAFT + 1, 1)
                offers = generation.drafters.offers(text)
                generation.drafts.choose([text], [offers], 1, MAX_DRAFT, self.session.core.expert_union)
                core.decode_step(text.k)
                self._in_flight.append(text)
            for r in core.decode_poll():
                text = self._in_flight.popleft()
                tokens += r["tokens"]
                self.stop = self.stop or r["stop"]
                if r["tokens"]:
                    self.session.count_drafts(r)
                    generation.observe(text, r | self._price(text.k, r), Counter())
        if self.stop == "not finite" and not tokens:
            bad = r["bad_id"]
            raise SessionError(_core.not_finite(": no finite maximum" if bad < 0 else f": token {bad} is NaN"))
        return tokens

    def _price(self, k: int, r: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes and seconds of a round, split as the bytes are: the device reports the round's time only."""
        cost = self.generation.cost
        verify = cost.plain + (r["experts_verify"] - cost.layers * cost.top_k) * cost.expert
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


class TextGeneration(Iterator[str]):
    """A ``Generation`` as pieces of text: complete characters, ended by stop strings too.

    ``reason`` is as there, or "stop" (a stop string was completed; only the text before it is returned), or
    "interrupted" after ``interrupt``, which Ctrl-C calls. ``text`` is all text returned so far. A special token shows
    as no text: a stop string that is the text of one ends at that token. The tokens of a stop string belong to the
    session's sequence as all others do.

    Args:
        stop: a string, or several.

    Raises:
        ValueError: a stop string is empty.
        SessionError: one holds the text of a special token beside other text.
    """

    def __init__(self, generation: Generation, stop: str | Sequence[str] = ()) -> None:
        self.generation = generation
        self.reason: str | None = None
        self.text = ""
        self._new_answer = partial(AnswerText, generation.session.model.vocabulary, stop)
        self._answer = self._new_answer()

    def __next__(self) -> str:
        try:
            while self.reason is None:
                token = next(self.generation, None)
                if token is None:
                    self.reason = self.generation.reason
                    piece = self._answer.flush()
                else:
                    piece = self._answer.feed(token)
                if self._answer.stopped:
                    self.reason = "stop"
                    self.generation.close()
                if piece:
                    self.text += piece
                    return piece
        except KeyboardInterrupt:
            self.interrupt()
            raise
        raise StopIteration

    def interrupt(self) -> str:
        """Ends it from outside; returns the text that was still held back."""
        self.generation.close()
        shown, self._answer = len(self.text), self._new_answer()
        text = "".join(map(self._answer.feed, self.generation.tokens))  # of all: one may have been on its way
        self.reason = "stop" if self._answer.stopped else "interrupted"
        self.text = text if self._answer.stopped else text + self._answer.flush()
        return self.text[shown:]
