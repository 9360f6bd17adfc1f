"""Many sequences on one model: weights are read once per pass, whoever's rows it holds.

``Batch.step`` runs one pass: the next token of every running sequence, and chunks of the prompts that are not computed
yet. What a sequence gets depends on nothing but its prompt and its sampling: its tokens are those of
``Session.generate``, whoever shares its passes, wherever its first rows were copied from, and however often it was
dropped for want of memory and computed again.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _core, limits
from .arguments import integer, token_ids
from .closing import Closing
from .errors import Error, ResourceError, SessionError
from .generation import check_draft
from .sampling import Sampling, Scores
from .session import SessionLock, StageStats, Stats
from .text import AnswerText

if TYPE_CHECKING:
    from .model import Model

MAX_SEQUENCES = 64  # rows of a pass that may have logits
MAX_ROWS = 256  # of a pass
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
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return all(c.reason for c in self.choices)

    def cancel(self) -> None:
        """Ends what has not ended, before the next step; from any thread."""
        with self._batch.news:
            self.cancelled = True
            self._batch.news.notify_all()


@dataclass(eq=False, slots=True)
class _Sequence:
    """A choice at work: its tokens, and how many of them are in its cache."""

    choice: Choice
    age: int  # of two, the one with the lower number came first
    ids: list[int]  # prompt and answer
    reserved: int  # rows that it may take
    sampling: Sampling
    max_tokens: int
    eos_ids: frozenset[int]
    n_top: int  # of log probabilities; -1: none
    text: AnswerText | None
    core: _core.Session | None = None
    pos: int = 0  # ids in the cache
    skipped: int = 0  # passes in a row that left its prompt out
    source: tuple[_Sequence, int] | None = None  # whose row it waits for

    @property
    def missing(self) -> int:
        """Ids that must be passed for the next token: 1 where the answer goes on."""
        return len(self.ids) - self.pos

    def shared(self, other: _Sequence) -> int:
        """How many first ids both have, leaving one for a pass."""
        pairs = zip(self.ids[:-1], other.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids) - 1, len(other.ids)))


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
        self, model: Model, max_sequences: int, ctx: int, kv: str, cache_bytes: int | None, draft: str | int
    ) -> None:
        check_draft(draft)
        self.model, self.ctx, self.kv, self.draft = model, ctx, kv, draft
        self.max_sequences = integer("max_sequences", max_sequences, 1, MAX_SEQUENCES)
        self._mtp = draft not in ("off", 0) and (draft != "auto" or bool(model.config["num_nextn_predict_layers"]))
        self._drafts = 0 if draft in ("off", "auto") else int(draft)
        self._row_bytes = -(-self._session().cache_bytes // ctx)
        if cache_bytes is None:
            available = limits.available_memory() if model.device == "cpu" else None
            cache_bytes = max_sequences * ctx * self._row_bytes
            cache_bytes = cache_bytes if available is None else min(cache_bytes, available)
        self.cache_bytes = integer("cache_bytes", cache_bytes, 0)
        self._rows = cache_bytes // self._row_bytes  # that all caches may take together
        self._passes: Turns | None = Turns()
        self._waiting: list[_Sequence] = []  # by age
        self._running: list[_Sequence] = []
        self._idle: list[_Sequence] = []  # least recently used first
        self._stepping = SessionLock()
        self._in_pass: list[_Sequence] = []  # whose caches may be ahead of what is known
        self.news = threading.Condition()  # guards what other threads change
        self._submitted: list[_Sequence] = []
        self._age = 0
        self._sums: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Batch({self.model!r}, kv={self.kv!r}, running={self.running}, waiting={self.waiting})"

    def _session(self) -> _core.Session:
        return _core.Session(self.model.core, self.ctx, self.kv, min(MAX_ROWS, self.ctx), self._mtp)

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
        sequences = []
        for i in range(n):
            how = replace(sampling, seed=(sampling.seed + i) % 2**64)
            text = AnswerText(model.vocabulary, stop, shown) if model.has_tokenizer else None
            request.choices.append(Choice(request, i, how.seed))
            sequences.append(
                _Sequence(request.choices[i], 0, [*prompt], reserved, how, longest, frozenset(ends), n_top, text)
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
            changed = self._begin()
            self._admit()
            work = self._compose()
            if work:
                self._in_pass = [s for s, _, _ in work]
                for (s, n, _), r in zip(work, self._pass(work), strict=True):
                    if r["tokens"] or r["error"]:
                        changed.append(s.choice)
                    self._take(s, n, r)
                    self._in_pass.remove(s)
                self._sums["steps"] += 1
            return changed

    def close(self) -> None:
        """Ends all choices ("cancelled") and frees the caches; a pass that is running ends before."""
        with self._stepping, self.news:
            self._passes = None
            for s in [*self._running, *self._waiting, *self._submitted]:
                self._end(s, "cancelled")
            self._submitted, self._idle = [], []
            self.news.notify_all()

    @property
    def stats(self) -> BatchStats:
        """What the batch has done so far."""
        with self._stepping:
            if self._passes is None:
                raise SessionError("the batch is closed")
            core = self._passes.stats()
            counted = {k: v for k, v in core.items() if k in Stats.__dataclass_fields__}
            stages = {row[0]: StageStats(*row[1:]) for row in self._passes.stage_stats()}
            return BatchStats(**counted, **self._sums, pass_seconds=core["seconds"], stages=stages)

    def _begin(self) -> list[Choice]:
        """Takes what other threads did; the choices that ended by it."""
        for s in self._in_pass:  # of a step that was interrupted
            if s.core is not None and s.core.pos > s.pos:
                s.core.truncate(s.pos)
        self._in_pass = []
        with self.news:
            self._waiting += self._submitted
            self._submitted = []
        ended = []
        for s in [*self._waiting, *self._running]:
            full = len(s.ids) == self.ctx
            if s.choice.request.cancelled or full:
                self._end(s, "context" if full else "cancelled")
                ended.append(s.choice)
        return ended

    # ---- admission: places, memory, rows that are there already

    def _admit(self) -> None:
        for s in [*self._waiting]:
            if len(self._running) >= self.max_sequences:
                break
            if s.source and s.source[0] in self._running and s.source[0].pos < s.source[1]:
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
        idle = [o for o in self._idle if o is not source]
        younger = sorted((o for o in self._running if o.age > s.age and o is not source), key=lambda o: -o.age)
        free = self._rows - sum(o.reserved for o in self._running) - sum(o.pos for o in self._idle)
        kept = source is not None and source in self._idle
        take = source is not None and kept and n == source.pos
        most = free + sum(o.pos for o in idle) + sum(o.reserved for o in younger)
        if source is not None and kept and (take or most < s.reserved):
            take, free, most = True, free + source.pos, most + source.pos
        if most < s.reserved:
            return None
        for o in [*idle, *younger]:
            if free >= s.reserved:
                break
            free += o.pos if o in self._idle else o.reserved
            self._drop(o)
        return take

    def _drop(self, o: _Sequence) -> None:
        """Frees its rows; a running sequence waits again."""
        if o in self._running:
            self._running.remove(o)
            bisect.insort(self._waiting, o, key=lambda s: s.age)
        else:
            self._idle.remove(o)
        o.core, o.pos = None, 0

    def _start(self, s: _Sequence, source: _Sequence | None, n: int, take: bool) -> None:
        if source is None or source.core is None:
            s.core = self._session()
        elif take:
            s.core = source.core
            self._idle.remove(source)
            if source.pos > n:
                s.core.truncate(n)
        else:
            s.core = fork(source.core, self._session(), n)
            if source in self._idle:
                self._idle.append(self._idle.pop(self._idle.index(source)))
        s.pos = n
        cached = min(n, s.choice.request.prompt_tokens) if not s.choice.tokens else 0
        if s.choice.index == 0:
            s.choice.request.cached_tokens += cached
        self._sums["cached_tokens"] += cached
        self._waiting.remove(s)
        self._running.append(s)

    # ---- passes

    def _compose(self) -> list[tuple[_Sequence, int, int]]:
        """The next pass: (sequence, ids, drafts behind them)."""
        answers = [s for s in self._running if s.missing == 1]
        prompts = [s for s in self._running if s.missing > 1]
        most = MAX_SEQUENCES // max(len(self._running), 1) - 1
        work = [(s, 1, min(self._drafts, most, s.reserved - len(s.ids) - 1)) for s in answers]
        room = min(CHUNK if answers else MAX_ROWS, MAX_ROWS - sum(1 + k for _, _, k in work))
        late = [s for s in prompts if s.skipped >= PATIENCE]
        share = max(room // len(late), 1) if late else 0
        for s in sorted(prompts, key=lambda s: (s.skipped < PATIENCE, s.missing)):
            n = min(s.missing, room, share if s.skipped >= PATIENCE else room)
            s.skipped = 0 if n else s.skipped + 1
            room -= n
            if n:
                work.append((s, n, 0))
        return work

    def _pass(self, work: list[tuple[_Sequence, int, int]]) -> list[dict[str, Any]]:
        """Results of ``work``. If the whole pass fails, each is tried alone, so that only those end that fail again."""
        assert self._passes is not None
        n_valid = self.model.n_valid
        items = [
            (s.core, s.ids[s.pos : s.pos + n], k, s.sampling if n == s.missing else None, n_valid, 0.0, s.n_top)
            for s, n, k in work
        ]
        try:
            results, info = self._passes.step(items)
        except (Error, MemoryError) as e:
            if len(work) == 1:
                return [{"tokens": [], "drafted": 0, "accepted": 0, "error": e}]
            return [r for w in work for r in self._pass([w])]
        prompt = sum(n for s, n, _ in work if n > 1)
        share = prompt / max(info["rows"], 1)
        for kind, part in (("prefill", share), ("decode", 1 - share)):
            self._sums[f"{kind}_seconds"] += part * (info["draft_seconds"] + info["verify_seconds"])
            self._sums[f"{kind}_bytes"] += round(part * (info["draft_bytes"] + info["verify_bytes"]))
        self._sums["prefill_tokens"] += prompt
        made = [len(r["tokens"]) for (_, n, _), r in zip(work, results, strict=True) if n == 1]
        self._sums["decode_tokens"] += sum(made)
        return results

    def _take(self, s: _Sequence, n: int, r: dict[str, Any]) -> None:
        """The result of ``n`` ids of ``s``."""
        if r["error"] is not None:
            self._end(s, "failed", r["error"])
            return
        s.pos += n + r["accepted"]
        self._sums["drafts_offered"] += r["drafted"]
        self._sums["drafts_accepted"] += r["accepted"]
        c, reason = s.choice, None
        for i, token in enumerate(r["tokens"]):
            if token in s.eos_ids:
                reason = "eos"
                break
            s.ids.append(token)
            c.tokens.append(token)
            c.accepted.append(i < r["accepted"])
            if s.n_top >= 0:
                c.scores.append(Scores(*r["scores"][i]))
            c.text += s.text.feed(token) if s.text else ""
            if s.text and s.text.stopped:
                reason = "stop"
            elif len(c.tokens) == s.max_tokens:
                reason = "length"
            elif len(s.ids) == self.ctx:
                reason = "context"
            if reason:
                break
        if reason:
            self._end(s, reason)

    def _end(self, s: _Sequence, reason: str, error: Exception | None = None) -> None:
        """Ends a choice; its rows are kept for prompts that begin like it."""
        c = s.choice
        if s.text and not s.text.stopped:
            c.text += s.text.flush()
            reason = "stop" if s.text.stopped else reason
        for group in (self._running, self._waiting):
            if s in group:
                group.remove(s)
        if s.core is not None and reason != "failed" and s.pos and self._passes is not None:
            if s.pos > len(s.ids):
                s.pos = len(s.ids)
                s.core.truncate(s.pos)
            self._idle = [*self._idle, s][-MAX_IDLE:]
        c.error, c.reason = error, reason


def fork(core: _core.Session, new: _core.Session, n: int) -> _core.Session:
    """``new`` with the first ``n`` tokens of ``core`` and their rows."""
    state = core.state()
    m = min(state["mtp_cache"].shape[1], max(n - 1, 0))
    pending = n - m if m == state["mtp_cache"].shape[1] else 0
    new.load_state(
        state["tokens"][:n],
        np.ascontiguousarray(state["cache"][:, :n]),
        np.ascontiguousarray(state["mtp_cache"][:, :m]),
        state["hidden"][:pending],
    )
    return new


class Turns:
    """One pass after the other, where sequences cannot share one."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._stages: dict[str, StageStats] = {}

    def stats(self) -> dict[str, Any]:
        """As ``_core.Session.stats``, of all sequences."""
        return {"seconds": 0.0} | self._sums

    def stage_stats(self) -> list[tuple[Any, ...]]:
        """As ``_core.Session.stage_stats``, of all sequences."""
        return [(name, s.calls, s.bytes, s.seconds, s.wait_sum, s.wait_max) for name, s in self._stages.items()]

    def step(self, work: list[tuple[Any, ...]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Passes each item: (session, ids, drafts, sampling, n_valid, min_confidence, n_top)."""
        results = []
        info: Counter[str] = Counter()
        for item in work:
            core = item[0]
            pos, before = core.pos, core.stats()
            stages = {row[0]: StageStats(*row[1:]) for row in core.stage_stats()}
            try:
                results.append(self._one(*item))
            except (Error, MemoryError) as e:
                core.truncate(pos)
                results.append({"tokens": [], "drafted": 0, "accepted": 0, "error": e})
            done = {key: value - before[key] for key, value in core.stats().items()}
            self._sums.update(done)
            for row in core.stage_stats():
                gained = StageStats(*row[1:]).plus(stages.get(row[0], StageStats()), -1)
                self._stages[row[0]] = self._stages.get(row[0], StageStats()).plus(gained)
            r = results[-1]
            info.update(
                rows=done["rows"] - done["mtp_rows"],
                mtp_rows=done["mtp_rows"],
                experts_verify=r.get("experts_verify", done["experts_touched"]),
                draft_bytes=r.get("draft_bytes", 0),
                verify_bytes=done["weight_bytes"] + done["cache_bytes"] - r.get("draft_bytes", 0),
                draft_seconds=r.get("draft_seconds", 0.0),
                verify_seconds=done["seconds"] - r.get("draft_seconds", 0.0),
            )
        return results, dict(info)

    @staticmethod
    def _one(
        core: _core.Session,
        ids: list[int],
        k: int,
        sampling: Sampling | None,
        n_valid: int,
        min_confidence: float,
        n_top: int,
    ) -> dict[str, Any]:
        if len(ids) == 1 and sampling is not None:
            r = core.draft_round(ids[0], k, sampling, n_valid, min_confidence, n_top >= 0) | {"error": None}
        else:
            logits = core.forward(np.array(ids, np.int32), "none" if sampling is None else "last")
            tokens = [] if sampling is None else [_core.sample(logits[0], sampling, core.pos, n_valid)]
            r = {"tokens": tokens, "drafted": 0, "accepted": 0, "logits": logits, "error": None}
        if n_top >= 0:
            pairs = zip(r["tokens"], r["logits"], strict=True)
            r["scores"] = [tuple(Scores.of(token, row, n_valid, n_top)) for token, row in pairs]
        return r
