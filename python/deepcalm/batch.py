"""Many sequences on one model: weights are read once per pass, whoever's rows it holds.

``Batch.step`` runs one pass: the next token of every running sequence, and chunks of the prompts that are not computed
yet. What a sequence gets depends on nothing but its prompt and its sampling: its tokens are those of
``Session.generate``, whoever shares its passes, wherever its first rows were copied from, and however often it was
dropped for want of memory and computed again.
"""

from __future__ import annotations

import bisect
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from . import _core, limits
from .arguments import integer, token_ids
from .closing import Closing
from .drafters import Drafters, keeps_mtp
from .drafting import Controller, CostModel, Text, count_drafts
from .errors import Error, ResourceError, SessionError
from .generation import check_draft
from .sampling import Sampling, Scores
from .session import SessionLock, StageStats, Stats, cache_type
from .text import AnswerText

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .model import Model

MAX_SEQUENCES = 64  # rows of a pass that may have logits
CHUNK = 64  # prompt rows of a pass in which answers wait for their next token
PATIENCE = 3  # passes in a row that may leave a prompt out
SHARED = 64  # tokens that two prompts must share for one to wait until the other has computed them
MAX_CHOICES = 128  # of a request
MAX_IDLE = 64  # sequences kept for their rows


class Choice:
    """One answer of a ``Request``, which grows by ``Batch.step``.

    ``request``, ``index``, ``seed``: whose answer it is, which of its ``n``, and the seed of its sampling. ``tokens``:
    ids so far, without the one that ended it. ``text``: complete characters so far, ended before a stop string; what
    may become one is held back (no text without a tokenizer). ``accepted``: for each of ``tokens``, whether it was an
    accepted draft. ``scores``: for each of ``tokens``, where ``logprobs`` was given.

    ``reason`` is None while it runs, then "eos", "stop", "length" (``max_tokens``), "context" (it is full),
    "cancelled", or "failed": ``error`` says why.
    """

    def __init__(self, request: Request, index: int, seed: int) -> None:
        self.request, self.index, self.seed = request, index, seed
        self.tokens: list[int] = []
        self.text = ""
        self.accepted: list[bool] = []
        self.scores: list[Scores] = []
        self.reason: str | None = None
        self.error: Exception | None = None


class Request:
    """What ``Batch.submit`` returns.

    ``choices``: its answers, as many as were asked for. ``prompt_tokens``, and how many of them needed no pass because
    their rows were there: ``cached_tokens``.
    """

    def __init__(self, batch: Batch, prompt_tokens: int) -> None:
        self._batch = batch
        self.choices: list[Choice] = []
        self.prompt_tokens, self.cached_tokens = prompt_tokens, 0

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return all(c.reason for c in self.choices)

    def cancel(self) -> None:
        """Ends what has not ended, before the next step; from any thread."""
        with self._batch.news:
            self._batch.cancelled.add(self)
            self._batch.news.notify_all()


@dataclass(eq=False, slots=True)
class _Sequence:
    """A choice at work: its tokens, and how many of them are in its cache."""

    choice: Choice
    age: int  # of two, the one with the lower number came first
    ids: array[int]  # prompt and answer
    reserved: int  # rows that it may take; once it has ended, those that it holds
    sampling: Sampling
    max_tokens: int
    eos_ids: frozenset[int]
    n_top: int  # of log probabilities; -1: none
    new_text: Callable[[], AnswerText] | None
    core: _core.Session | None = None
    pos: int = 0  # ids in the cache
    skipped: int = 0  # passes in a row that left its prompt out
    source: tuple[_Sequence, int] | None = None  # whose row it waits for
    drafting: Text = field(init=False)  # while it runs
    text: AnswerText | None = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.new_text() if self.new_text else None

    @property
    def missing(self) -> int:
        """Ids that must be passed for the next token: 1 where the answer goes on."""
        return len(self.ids) - self.pos

    def shared(self, other: _Sequence) -> int:
        """How many first ids both have, leaving one for a pass."""
        pairs = zip(self.ids[:-1], other.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids) - 1, len(other.ids)))

    def over(self, ctx: int) -> str | None:
        """Why no token may follow those that it has."""
        if self.text and self.text.stopped:
            return "stop"
        if len(self.choice.tokens) == self.max_tokens:
            return "length"
        return "context" if len(self.ids) == ctx else None

    def settle(self) -> None:
        """Goes back to the tokens that the choice has: a step may have been interrupted at any line."""
        c, n = self.choice, len(self.choice.tokens)
        del self.ids[c.request.prompt_tokens + n :], c.accepted[n:], c.scores[n:]
        self.__post_init__()
        if self.text:
            c.text = "".join(map(self.text.feed, c.tokens))
        self.pos = min(self.pos, len(self.ids) - 1)
        if self.core is not None and self.core.pos > self.pos:
            self.core.truncate(self.pos)


@dataclass(frozen=True, slots=True)
class BatchStats(Stats):
    """``Stats`` of a whole batch; ``steps`` of it, and ``cached_tokens`` of prompts that needed no pass.

    A pass belongs to all of its rows: its seconds and bytes are split between prefill and decode by their rows.
    """

    steps: int = 0
    cached_tokens: int = 0


class Batch(Closing):
    """Sequences that share passes, made by ``Model.batch``.

        with model.batch() as batch:
            requests = [batch.submit(model.encode(p), max_tokens=64) for p in prompts]
            for choice in batch.run(): ...          # each time one of them has got further
            print(requests[0].choices[0].text)

    Prompts take chunks in turn, the one with least left first, none left out for more than 3 passes. One budget of
    memory holds running sequences and those kept for their rows: a prompt that begins as one of them does starts from
    its rows. What is kept gives way first, the least recently used before others; then the youngest sequence, which is
    computed again later.

    ``submit`` and ``Request.cancel`` may be called from any thread while another one steps.
    """

    def __init__(
        self, model: Model, max_sequences: int, ctx: int, kv: str, cache_bytes: int | None, draft: str | int,
        drafter: str = "auto",
    ) -> None:  # fmt: skip
        check_draft(draft)
        self.model, self.ctx, self.kv, self.draft = model, ctx, cache_type(kv, model.isa), draft
        self.max_sequences = integer("max_sequences", max_sequences, 1, MAX_SEQUENCES)
        self._lazy = model.device == "cpu"  # caches take the memory that is touched, not all of it as on a device
        mtp = keeps_mtp(draft, drafter)
        self._mtp = bool(model.config["num_nextn_predict_layers"]) if mtp is None else mtp
        self._control = Controller(CostModel.of(model.core.weight_bytes, model.config), draft)
        self._drafters = Drafters(model, drafter, draft, self._mtp)
        self.drafted: dict[str, tuple[int, int]] = {}  # drafts offered and accepted, by who made them
        self._row_bytes = -(-self._session(ctx).cache_bytes // ctx)
        if cache_bytes is None:
            available = limits.available_memory() if self._lazy else None
            cache_bytes = max_sequences * ctx * self._row_bytes
            cache_bytes = cache_bytes if available is None else min(cache_bytes, available)
        self.cache_bytes = integer("cache_bytes", cache_bytes, 0)
        self._rows = cache_bytes // self._row_bytes  # that all caches may take together
        self._passes: _core.Batch | None
        self._passes = passes = _core.Batch(model.core, model.core.pass_rows)
        self._waiting: list[_Sequence] = []  # by age
        self._running: list[_Sequence] = []
        self._idle: list[_Sequence] = []  # least recently used first
        self._stepping = SessionLock()
        self._at_work: list[_Sequence] = []  # what ran or waited when the step began that has not ended yet
        self.news = threading.Condition()  # guards what other threads change
        self._submitted: list[_Sequence] = []
        self.cancelled: set[Request] = set()
        self._age = 0
        self._sums: Counter[str] = Counter()
        self._counted = passes.stats(), passes.stage_stats()
        self._changed: dict[Choice, None] = {}  # since the last step that returned

    def __repr__(self) -> str:
        return f"Batch({self.model!r}, kv={self.kv!r}, running={self.running}, waiting={self.waiting})"

    def _session(self, ctx: int) -> _core.Session:
        return _core.Session(self.model.core, ctx, self.kv, min(self.model.core.pass_rows, ctx), self._mtp)

    # ---- requests

    def submit(
        self,
        ids: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: str | Sequence[str] = (),
        max_tokens: int | None = None,
        logprobs: int | None = None,
        n: int = 1,
        eos_ids: Sequence[int] | None = None,
        shown: Collection[int] = (),
    ) -> Request:
        """A request for ``n`` answers to a prompt; from any thread, at once: the work is ``step``'s.

        Args:
            ids: [k >= 1] token ids of the prompt.
            sampling: choice i is made with its seed + i, modulo 2^64.
            stop: a string, or several, that end an answer.
            max_tokens: of an answer, 1 or more; None: until something else ends it.
            logprobs: keep every token's probability and those of so many most probable ones; None: none.
            eos_ids: ids that end an answer; None: the model's own.
            shown: special tokens that show as their own text (``Markup.shown``).

        Raises:
            SessionError: no tokens, an id outside the vocabulary, more than the context holds, a batch that is closed.
            ResourceError: ``cache_bytes`` is too small for it, whatever else gives way.
            TypeError, ValueError: another argument that is wrong.
        """
        model, vocab = self.model, int(self.model.config["vocab_size"])
        prompt = token_ids(ids, vocab).tolist()
        if not 1 <= len(prompt) <= self.ctx:
            raise SessionError(f"a prompt of {len(prompt)} tokens, expected 1..{self.ctx}, the context")
        n = integer("n", n, 1, MAX_CHOICES)
        longest = self.ctx if max_tokens is None else integer("max_tokens", max_tokens, 1)
        n_top = -1 if logprobs is None else integer("logprobs", logprobs, 0)
        ends = model.eos_ids if eos_ids is None else frozenset(token_ids(eos_ids, vocab).tolist())
        reserved = min(self.ctx, len(prompt) + longest)
        request = Request(self, len(prompt))
        new_text = partial(AnswerText, model.vocabulary, stop, shown) if model.has_tokenizer else None
        sequences = []
        for i in range(n):
            how = replace(sampling, seed=(sampling.seed + i) % 2**64)
            request.choices.append(Choice(request, i, how.seed))
            sequences.append(
                _Sequence(
                    request.choices[i], 0, array("i", prompt), reserved, how, longest, frozenset(ends), n_top, new_text
                )
            )
        if reserved > self._rows:
            raise ResourceError(
                f"{reserved} positions in {self.kv} take {reserved * self._row_bytes} bytes, cache_bytes is "
                f"{self.cache_bytes}; use a smaller max_tokens or ctx, another kv type, or more cache_bytes"
            )
        with self.news:
            if self._passes is None:
                raise SessionError("the batch is closed")
            for s in sequences:
                self._age += 1
                s.age = self._age
            self._submitted += sequences
            self.news.notify_all()
        return request

    @property
    def running(self) -> int:
        """Sequences that have a cache and get tokens."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for memory, for one of ``max_sequences`` places, or for rows that another computes."""
        return len(self._waiting) + len(self._submitted)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self._submitted or self._waiting or self._running)

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until there is something to do for ``step``; False if ``timeout`` seconds have passed before."""
        with self.news:
            return self.news.wait_for(lambda: not self.idle or self._passes is None, timeout)

    # ---- steps

    def run(self) -> Iterator[Choice]:
        """Steps until the batch is idle: every choice each time it has got further."""
        while not self.idle:
            yield from self.step()

    def step(self) -> list[Choice]:
        """Runs one pass; the choices that got tokens or ended. Threads take turns.

        Raises:
            SessionError: the batch is closed.
        """
        with self._stepping:
            if self._passes is None:
                raise SessionError("the batch is closed")
            try:
                self._begin()
                self._admit()
                if work := self._compose():
                    for (s, n, _), r in zip(work, self._pass(work), strict=True):
                        self._take(s, n, r)
                changed, self._changed, self._at_work = self._changed, {}, []
                return list(changed)
            finally:
                self._settle()

    def close(self) -> None:
        """Ends all choices ("cancelled") and frees the caches; a pass that is running ends before."""
        with self._stepping, self.news:
            self._begin()
            self._passes = None
            for s in [*self._running, *self._waiting]:
                self._end(s, "cancelled")
            self._idle = []
            self.news.notify_all()

    @property
    def stats(self) -> BatchStats:
        """What the batch has done by its last step."""
        core, stages = self._counted
        counted = {k: v for k, v in core.items() if k in Stats.__dataclass_fields__}
        return BatchStats(**counted, **self._sums, pass_seconds=core["seconds"],
                          stages={row[0]: StageStats(*row[1:]) for row in stages})  # fmt: skip

    def _begin(self) -> None:
        """Takes what other threads did."""
        self._settle()
        with self.news:
            new, cancelled = self._submitted, {*self.cancelled}
            known = [*self._waiting, *new, *self._running]
            self._waiting, self._submitted, self._at_work = self._waiting + new, [], known
        for s in known if cancelled else new:
            if reason := "cancelled" if s.choice.request in cancelled else s.over(self.ctx):
                self._end(s, reason)
        with self.news:
            self.cancelled -= cancelled

    def _settle(self) -> None:
        """Where a step was interrupted, at any line: goes back to what the choices had got."""
        if not self._at_work:
            return
        known = sorted((s for s in self._at_work if s.choice.reason is None), key=lambda s: s.age)
        for s in known:
            s.settle()
        self._waiting = [s for s in known if s.core is None]
        self._running = [s for s in known if s.core is not None]
        self._idle = [s for s in self._idle if s.choice.reason]
        for s in known:
            if reason := s.over(self.ctx):
                self._end(s, reason)
        self._at_work = []

    # ---- admission: places, memory, rows that are there already

    def _admit(self) -> None:
        for s in self._waiting[:MAX_SEQUENCES]:  # no more at a step, however many wait
            if len(self._running) >= self.max_sequences:
                break
            if s.source and s.source[0] in self._running and s.source[0].pos < s.source[1]:
                continue
            if sum(o.reserved for o in self._running if o.age < s.age) + s.reserved > self._rows:
                continue
            source, n, computed = self._source(s)
            if source is not None and n > computed:
                s.source = (source, n)
                continue
            s.source = None
            taken = self._make_room(s, source, n)
            if taken is None:
                continue
            try:
                self._start(s, source, n, taken)
            except (Error, MemoryError) as e:
                self._end(s, "failed", e)

    def _source(self, s: _Sequence) -> tuple[_Sequence | None, int, int]:
        """The sequence that shares most with ``s``: how much it has computed, or will, and has now."""
        best, rows, now = None, 0, 0
        for o in [*self._idle, *self._running]:
            n = s.shared(o)
            have = min(n, o.pos)
            worth = 1 if o.choice.request is s.choice.request else SHARED
            coming = n if o in self._running and o.missing > 1 and n - have >= worth else have
            if coming > rows:
                best, rows, now = o, coming, have
        return best, rows, now

    def _make_room(self, s: _Sequence, source: _Sequence | None, n: int) -> bool | None:
        """Frees rows for ``s``: True to take over its idle ``source``, False to leave it, None where there are none."""
        others = [o for o in self._idle if o is not source]
        younger = (o for o in self._running if o.age > s.age and o is not source)
        others += sorted(younger, key=lambda o: -o.age)
        free = self._rows - sum(o.reserved for o in self._running + self._idle)
        most = free + sum(o.reserved for o in others)
        take = source is not None and source in self._idle and (n == source.pos or most < s.reserved)
        if source is not None and take:
            free, most = free + source.reserved, most + source.reserved
        if most < s.reserved:
            return None
        while free < s.reserved:
            free += others[0].reserved
            self._drop(others.pop(0))
        return take

    def _drop(self, o: _Sequence) -> None:
        """Frees its rows; a running sequence waits again."""
        if o in self._running:
            self._running.remove(o)
            bisect.insort(self._waiting, o, key=lambda s: s.age)
        else:
            self._idle.remove(o)
        o.core, o.pos = None, 0
        del o.drafting  # which holds it too

    def _start(self, s: _Sequence, source: _Sequence | None, n: int, take: bool) -> None:
        ctx = self.ctx if self._lazy else s.reserved
        if source in self._idle:  # the most recently used
            self._idle.remove(source)
            self._idle += [] if take else [source]
        if source is None or source.core is None:
            core = self._session(ctx)
        elif take and source.core.ctx >= ctx:
            core = source.core
            core.truncate(n)
        else:
            core = source.core.fork(self.model.core, n, ctx)
        s.drafting = Text(s.ids, core, s.sampling)
        s.core = core
        s.pos = n
        cached = min(n, s.choice.request.prompt_tokens) if not s.choice.tokens else 0
        if s.choice.index == 0:
            s.choice.request.cached_tokens += cached
        self._sums["cached_tokens"] += cached
        self._waiting.remove(s)
        self._running.append(s)

    # ---- passes

    def _compose(self) -> list[tuple[_Sequence, int, int | Sequence[int]]]:
        """The next pass: (sequence, ids, drafts behind them: those, or so many of the MTP layer)."""
        assert self._passes is not None
        answers = [s for s in self._running if s.missing == 1]
        prompts = [s for s in self._running if s.missing > 1]
        room = CHUNK if answers else self.model.core.pass_rows
        texts = [s.drafting for s in answers]
        for s in answers:
            s.drafting.left = s.reserved - len(s.ids)
        self._control.choose(
            texts,
            [self._drafters.offers(text) for text in texts],
            len(answers) + min(room, sum(s.missing for s in prompts)),
            MAX_SEQUENCES - len(self._running),
            self._passes.expert_union,
        )
        self._spent = self._drafters.make(texts)
        work = [(s, 1, s.drafting.drafts) for s in answers]
        late = [s for s in prompts if s.skipped >= PATIENCE]
        share = max(room // len(late), 1) if late else 0
        for s in sorted(prompts, key=lambda s: (s.skipped < PATIENCE, s.missing)):
            n = min(s.missing, room, share if s.skipped >= PATIENCE else room)
            s.skipped = 0 if n else s.skipped + 1
            room -= n
            if n:
                work.append((s, n, 0))
        return work

    def _pass(self, work: list[tuple[_Sequence, int, int | Sequence[int]]]) -> list[dict[str, Any]]:
        """Results of ``work``."""
        assert self._passes is not None
        rows = sum(n + (d if isinstance(d, int) else len(d)) for _, n, d in work)
        drafted = any(d for _, _, d in work)  # else the pass may have more rows than any with drafts
        n_valid, sure = self.model.n_valid, self._control.min_confidence(rows) if drafted else 0.0
        items: list[Any] = [
            (s.core, s.ids[s.pos : s.pos + n], d, s.sampling if n == s.missing else None, n_valid, sure, s.n_top)
            for s, n, d in work
        ]
        results, info = self._passes.step(items)
        info["mtp_bytes"] = info["draft_bytes"]
        for unit in ("bytes", "seconds"):
            info[f"draft_{unit}"] += self._spent[unit]
        self._counted = self._passes.stats(), self._passes.stage_stats()
        prompt = sum(n for s, n, _ in work if s.missing > 1)
        share = prompt / max(info["rows"], 1)
        for kind, part in (("prefill", share), ("decode", 1 - share)):
            self._sums[f"{kind}_seconds"] += part * (info["draft_seconds"] + info["verify_seconds"])
            self._sums[f"{kind}_bytes"] += round(part * (info["draft_bytes"] + info["verify_bytes"]))
        self._sums.update(steps=1, prefill_tokens=prompt)
        answers = [(s.drafting, r) for (s, _, _), r in zip(work, results, strict=True) if s.missing == 1]
        self._sums["decode_tokens"] += sum(len(r["tokens"]) for _, r in answers)
        self._control.observe(answers, info, prompt > 0, bool(self._waiting))
        return results

    def _take(self, s: _Sequence, n: int, r: dict[str, Any]) -> None:
        """The result of ``n`` ids of ``s``."""
        if r["error"] is not None:
            self._end(s, "failed", r["error"])
            return
        s.pos += n + r["accepted"]
        self._sums["drafts_offered"] += r["drafted"]
        self._sums["drafts_accepted"] += r["accepted"]
        count_drafts(self.drafted, s.drafting.key[0], r)
        c = s.choice
        if r["tokens"]:
            self._changed[c] = None
        for i, token in enumerate(r["tokens"]):
            if token in s.eos_ids:
                self._end(s, "eos")
                break
            s.ids.append(token)
            c.accepted.append(i < r["accepted"])
            if s.n_top >= 0:
                c.scores.append(Scores(*r["scores"][i]))
            c.text += s.text.feed(token) if s.text else ""
            c.tokens.append(token)  # last: all else follows from it, should this be interrupted
            if reason := s.over(self.ctx):
                self._end(s, reason)
                break

    def _end(self, s: _Sequence, reason: str, error: Exception | None = None) -> None:
        """Ends a choice; its rows are kept for prompts that begin like it."""
        c = s.choice
        if s.text and not s.text.stopped:
            c.text += s.text.flush()
            reason = "stop" if s.text.stopped else reason
        self._changed[c], c.error = None, error
        c.reason = reason  # from here on it has ended, should this be interrupted
        for group in (self._running, self._waiting):
            if s in group:
                group.remove(s)
        if s.core is not None and s.pos and reason != "failed" and self._passes is not None:
            s.pos = min(s.pos, len(s.ids))
            s.reserved = s.pos if self._lazy else s.reserved
            s.core.truncate(s.pos)
            self._drafters.forget(s.core)  # whose memory is not among that of the rows which are kept
            self._idle = [*self._idle, s][-MAX_IDLE:]
