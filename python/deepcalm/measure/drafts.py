"""What drafting gains: drafted against plain decoding of one text, beside what bytes and times predict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from .. import _core
from ..drafters import check_drafter, keeps_mtp
from ..drafting import MAX_DRAFT, CostModel, DraftStats
from ..errors import SessionError
from ..session import MAX_ROWS, Session
from .bench import PROBE_MIB, Spread

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model import Model
    from ..sampling import Sampling

LONGEST = 4096  # positions of a window of a text, as far as the model goes


class Options(TypedDict, total=False):
    """How ``bench_draft`` decodes.

    ``kv``: cache type. ``drafter``: as for ``generation.Options``. ``text``: token ids that the model is taken to write
    in place of its own greedy text: a draft counts where it is the text's next token. Documents (each up to one of the
    model's eos ids) are cut into windows that the model holds, of which each begins with a prompt of its own.
    ``steady``: "auto" is told times that go with the bytes, as on a machine where nothing else runs.
    """

    kv: str
    drafter: str
    text: Sequence[int] | None
    steady: bool


@dataclass(frozen=True, slots=True)
class DraftBench:
    """Drafted against plain decoding of the same text; rates in tokens per second, bytes counted by the passes.

    ``predicted``: speedup from the times of plain steps and of rounds whose drafts are all right, and the drafts and
    acceptance met; ``predicted_bytes``: from the cost model alone, beside ``gain_bytes``, which was counted
    (``worst_bytes``: in a window). ``speedup`` is measured, pair by pair.
    """

    file: str
    isa: str
    threads: int
    kv: str
    k: int | str  # drafts a round, or "auto"
    drafter: str
    accept: float | None  # probability that a draft was left right; None: the drafter's own
    context: int
    decode_tokens: int
    windows: int  # of a text that was given; 0: the model's own
    repeats: int
    drafters: dict[str, tuple[int, int]]  # drafts offered and accepted, by who made them
    acceptance: float  # accepted / drafted
    tokens_per_pass: float
    experts_per_pass: float  # distinct (layer, expert) pairs of a verification pass
    plain_experts: float
    plain_bytes_per_token: float
    drafted_bytes_per_token: float
    draft_bytes_share: float  # of all bytes, read by the drafter
    plain_rate: Spread
    drafted_rate: Spread
    speedup: Spread
    predicted: float
    gain_bytes: float
    worst_bytes: float
    predicted_bytes: float
    read_bandwidth: Spread


def bench_draft(
    model: Model,
    k: int | str,
    accept: float | None = None,
    prompt: Sequence[int] | int | None = None,
    decode_tokens: int | None = None,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[Options],
) -> DraftBench:
    """Measures ``k`` drafts a round, or "auto", against plain decoding of the same text, in interleaved repeats.

    Args:
        accept: the drafter works, but its drafts are replaced by the known next tokens, each spoiled with probability
            1 - accept; None: its own drafts.
        prompt: token ids, or how many: random ones, or of each window; None: 128, or what the model holds.
        decode_tokens: after each prompt; None: 64, or what is left of a window.
        progress: called with (repeats done, repeats in all).

    Raises:
        SessionError: drafts of an MTP layer that the model lacks; a maximum context or a text that is too short.
    """
    drafter, given = options.get("drafter", "auto"), options.get("text")
    limit, drafts = int(model.config["max_position_embeddings"]), MAX_DRAFT if k == "auto" else int(k)
    if prompt is None:
        prompt = max(1, min(128, limit - drafts - 1 - (decode_tokens or 64)))
    n = prompt if isinstance(prompt, int) else len(prompt)
    if not 1 <= drafts <= MAX_DRAFT or not (accept is None or 0 <= accept <= 1) or min(n, repeats) < 1:
        raise ValueError("draft: expected 1..7 or auto, accept 0..1, context and repeats >= 1")
    wanted = decode_tokens or (64 if given is None else max(min(limit, LONGEST) - n - drafts - 1, drafts + 3))
    if wanted < drafts + 3:
        raise ValueError(f"{wanted} tokens, expected at least {drafts + 3}: the first round is not timed")
    if (ctx := n + wanted + drafts + 1) > limit:
        raise SessionError(f"{wanted} tokens after {n} need {ctx} positions, the model has {limit}")
    session = _Replay(model, ctx, k, given is not None, **options)
    if given is None:
        ids = session.rng.integers(0, model.n_valid, prompt).tolist() if isinstance(prompt, int) else list(prompt)
        windows = [ids + session.write(ids, wanted + drafts, "off")]
    else:
        windows = cut(given, model.eos_ids, n + wanted, n + min(wanted, 32), drafts)
    span = slice(n, n + wanted)  # of a window: rounds near its end draft into what follows, where anything does
    full = max(r.result["drafted"] for r in session.run(windows, span, k, accept).rounds) or 1  # first touch, too
    # Rounds whose drafts are all right tell what verification and drafts take: the prediction never sees `drafted`.
    # They are timed beside it, for the machine's speed drifts.
    kinds: dict[str, tuple[str | int, float | None, int]]
    kinds = {"plain": ("off", None, 0), "drafted": (k, accept, 0), "full": (full, 1.0, full)}
    runs: dict[str, list[_Run]] = {kind: [] for kind in kinds}
    read = []
    for i in range(repeats):
        read.append(_core.read_bandwidth(model.threads, PROBE_MIB, 1))
        for kind in list(kinds)[:: 1 if i % 2 else -1]:
            runs[kind].append(session.run(windows, span, *kinds[kind]))
        if progress is not None:
            progress(i + 1, repeats)
    return DraftBench(
        file=str(model.path),
        isa=model.isa,
        threads=model.threads,
        kv=session.kv,
        k=k,
        drafter=drafter,
        accept=accept,
        context=n,
        decode_tokens=sum(len(ids[span]) for ids in windows),
        windows=0 if given is None else len(windows),
        repeats=repeats,
        read_bandwidth=Spread.of(read),
        **_counts(runs["plain"], runs["drafted"]),
        **_predictions(session, **runs),
    )


def cut(text: Sequence[int], ends: Collection[int], size: int, least: int, more: int = 0) -> list[list[int]]:
    """Windows of ``size`` tokens, at least ``least``, of a text's documents, each of which an id of ``ends`` ends; with
    up to ``more`` that follow.

    Raises:
        SessionError: there are none.
    """
    at = [-1, *(i for i, token in enumerate(text) if token in ends), len(text)]
    documents = [list(text[a + 1 : b]) for a, b in pairwise(at)]
    windows = [d[i : i + size + more] for d in documents for i in range(0, len(d) - least + 1, size)]
    if not windows:
        longest = max(map(len, documents))
        raise SessionError(f"the longest document of the text has {longest} tokens, expected at least {least}")
    return windows


@dataclass(slots=True)
class _Round:
    """A round as ``Session.draft_round`` reports it, with what its drafts took before it; who made them, "" if none.

    ``rows``: tokens that the drafter's first pass caught up with; ``end``: by the clock.
    """

    result: dict[str, Any]
    drafter: str
    rows: int
    end: float


@dataclass(slots=True)
class _Run:
    """A text decoded once; rounds of each window but the first, which may compute again what a cut took away.

    ``seconds``: by the clock, with what Python does between the passes.
    """

    windows: list[list[_Round]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rounds(self) -> list[_Round]:
        """Of all windows."""
        return [r for w in self.windows for r in w]


def _sum(rounds: Sequence[_Round]) -> DraftStats:
    stats = DraftStats()
    for r in rounds:
        stats.add(r.result, r.drafter)
    return stats


class _Replay(Session):
    """A session whose rounds know the text that is decoded again and again."""

    def __init__(self, model: Model, ctx: int, draft: str | int, given: bool, **options: Unpack[Options]) -> None:
        self.drafter, self.given, self.steady = options.get("drafter", "auto"), given, options.get("steady", False)
        mtp = keeps_mtp(draft, self.drafter)
        mtp = bool(model.config["num_nextn_predict_layers"]) if mtp is None else mtp
        super().__init__(model, ctx, options.get("kv", "auto"), min(MAX_ROWS, ctx), mtp)
        self.rng = np.random.default_rng(0)
        self.known: Sequence[int] = ()  # prompt and what follows
        self.accept: float | None = None
        self.full = 0  # so many drafts even where the drafter has none
        self.rounds: list[_Round] = []

    @property
    def last_logits(self) -> None:
        """None: the first token after a prompt comes from a round, as all others do."""

    def draft_round(
        self, token: int, k: int, sampling: Sampling, n_valid: int, min_confidence: float = 0.0, **options: Any
    ) -> dict[str, Any]:
        """A round of a generation."""
        ahead, rows = self.known[self.pos :], self.mtp_pending if k else 1
        given = len(options.get("drafts") or ())
        n = k or given or max(min(self.full, len(ahead) - 1), 0)
        if self.given:
            options["chosen"] = ahead[: n + 1]
        if n and self.accept is not None:
            right = self.rng.random(n) < self.accept
            options["drafts"] = [t if ok else (t + 1) % n_valid for t, ok in zip(ahead, right, strict=False)]
        r = super().draft_round(token, k, sampling, n_valid, min_confidence, **options)
        if self.steady:
            r |= {f"{part}_seconds": 1e-10 * r[f"{part}_bytes"] for part in ("draft", "verify")}
        who = "mtp" if k else "ngram" if given else ""
        self.rounds.append(_Round(dict(r), who, rows, time.perf_counter()))
        return r

    def count(self, kind: str, tokens: int, seconds: float, n_bytes: int) -> None:
        """Rows of a round, or what another model took to draft for the last one."""
        super().count(kind, tokens, seconds, n_bytes)
        if not tokens and n_bytes:
            last, before = self.rounds[-1], self.rounds[-2:-1]
            last.result["draft_bytes"] += n_bytes
            last.drafter, last.rows = "model", 1 + all(b.result["accepted"] == b.result["drafted"] for b in before)

    def write(self, prompt: list[int], n_tokens: int, draft: str | int) -> list[int]:
        """The tokens after a prompt."""
        if todo := prompt[self.reuse(prompt) : -1]:
            self.prefill(todo)
        self.returned(prompt[-1])
        self.rounds = []
        most = len(self.known) - self.pos if self.known else n_tokens
        return list(islice(self.generate(max_tokens=most, eos_ids=[], draft=draft, drafter=self.drafter), n_tokens))

    def run(
        self, windows: list[list[int]], span: slice, draft: str | int, accept: float | None = None, full: int = 0
    ) -> _Run:
        """The part ``span`` of each window."""
        run = _Run()
        self.accept, self.full = accept, full
        for self.known in windows:
            part = self.known[span]
            if self.write(self.known[: span.start], len(part), draft) != part:
                raise SessionError("drafted text differs from plain text: please report this")
            run.windows.append(self.rounds[1:])
            run.seconds += self.rounds[-1].end - self.rounds[0].end
        return run


def _counts(plain: list[_Run], drafted: list[_Run]) -> dict[str, Any]:
    """What was counted and timed."""
    p, d = (_sum([r for run in runs for r in run.rounds]) for runs in (plain, drafted))
    plain_rate, drafted_rate = ([_sum(run.rounds).tokens / run.seconds for run in runs] for runs in (plain, drafted))

    def costs(run: _Run) -> list[float]:
        return [s.bytes / s.tokens for s in map(_sum, run.windows)]

    return {
        "drafters": d.drafters,
        "acceptance": d.acceptance,
        "tokens_per_pass": d.tokens_per_pass,
        "experts_per_pass": d.experts_per_pass,
        "plain_experts": p.experts_per_pass,
        "plain_bytes_per_token": p.bytes / p.tokens,
        "drafted_bytes_per_token": d.bytes / d.tokens,
        "draft_bytes_share": d.draft_bytes / d.bytes,
        "plain_rate": Spread.of(plain_rate),
        "drafted_rate": Spread.of(drafted_rate),
        "speedup": Spread.of([b / a for a, b in zip(plain_rate, drafted_rate, strict=True)]),
        "gain_bytes": p.bytes / p.tokens * d.tokens / d.bytes,
        "worst_bytes": min(a / b for run in drafted for a, b in zip(costs(plain[0]), costs(run), strict=True)),
    }


def _predictions(session: _Replay, plain: list[_Run], drafted: list[_Run], full: list[_Run]) -> dict[str, Any]:
    """The speedup that follows from times of plain and of full rounds, and the gain from bytes alone."""
    model, union = session.model, session.expert_union
    costs = {"mtp": CostModel.of(model.core.weight_bytes, model.config)}
    for name in check_drafter(session.drafter):
        if name.startswith("model:"):
            costs["model"] = model.second(name[6:]).cost
    step = costs["mtp"].plain

    def price(r: _Round) -> float:
        """Bytes of a round, and one for each draft: a row takes time where it reads nothing."""
        k: int = r.result["drafted"]
        made = costs[r.drafter].draft_bytes(k, r.rows) if r.drafter in costs else 0.0
        return costs["mtp"].verify_bytes(k, union) + k + made

    prices = [[price(r) for r in run.rounds] for run in drafted]
    most = statistics.mean(price(r) for run in full for r in run.rounds)
    gains = []
    for p, d, f, own in zip(plain, drafted, full, prices, strict=True):
        even, slow = (x.seconds / len(x.rounds) for x in (p, f))
        steps = sum(1 + (slow / even - 1) * (c - step) / (most - step) for c in own)
        gains.append(_sum(d.rounds).tokens / steps)
    tokens = sum(_sum(d.rounds).tokens for d in drafted)
    return {"predicted": statistics.median(gains), "predicted_bytes": tokens * step / sum(map(sum, prices))}
