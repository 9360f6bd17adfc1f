"""What drafting gains: drafted against plain decoding of one text, beside what bytes and times predict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core
from ..drafting import CostModel, DraftStats, expected_tokens
from ..errors import SessionError
from ..sampling import Sampling
from .bench import PROBE_MIB, Spread

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True, slots=True)
class DraftBench:
    """Drafted against plain decoding of the same text; rates in tokens per second, bytes counted by the passes.

    ``predicted``: speedup from the times of plain steps and of rounds whose drafts are all right, the bytes of MTP rows
    and the acceptance met; ``predicted_bytes``: from bytes alone. ``speedup`` is measured, pair by pair.
    """

    file: str
    isa: str
    threads: int
    kv: str
    k: int
    accept: float | None  # probability that a draft was left right; None: the MTP layer's own drafts
    context: int
    decode_tokens: int
    repeats: int
    acceptance: float  # accepted / drafted
    tokens_per_pass: float
    experts_per_pass: float  # distinct (layer, expert) pairs of a verification pass
    plain_experts: float
    plain_bytes_per_token: float
    drafted_bytes_per_token: float
    draft_bytes_share: float  # of all bytes, read by the MTP layer
    plain_rate: Spread
    drafted_rate: Spread
    speedup: Spread
    predicted: float
    predicted_bytes: float
    read_bandwidth: Spread


def bench_draft(
    model: Model,
    k: int,
    accept: float | None = None,
    prompt: Sequence[int] | int | None = None,
    decode_tokens: int = 64,
    repeats: int = 5,
    kv: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> DraftBench:
    """Measures ``k`` drafts a round against plain decoding of the same greedy text, in interleaved repeats.

    Args:
        accept: the MTP layer runs, but its drafts are replaced by the known next tokens, each spoiled with probability
            1 - accept; None: its own drafts.
        prompt: token ids, or how many random ones; None: 128, or what the model holds.
        progress: called with (repeats done, repeats in all).

    Raises:
        SessionError: a model without MTP layer, or whose maximum context is too short.
    """
    limit = int(model.config["max_position_embeddings"])
    if prompt is None:
        prompt = max(1, min(128, limit - decode_tokens - k - 1))
    n = prompt if isinstance(prompt, int) else len(prompt)
    if not 1 <= k <= 7 or not (accept is None or 0 <= accept <= 1) or min(n, repeats) < 1:
        raise ValueError("draft: expected 1..7, accept 0..1, context and repeats >= 1")
    if decode_tokens < k + 3:
        raise ValueError(f"{decode_tokens} tokens, expected at least {k + 3}: the first round is not timed")
    if not model.config["num_nextn_predict_layers"]:
        raise SessionError("this model has no MTP layer: nothing to draft with")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.n_valid, prompt).tolist() if isinstance(prompt, int) else list(prompt)
    if (ctx := n + decode_tokens + k + 1) > limit:
        raise SessionError(f"{decode_tokens} tokens after {n} need {ctx} positions, the model has {limit}")
    text = _Text(model, ids, decode_tokens, k, kv, rng)
    text.run(k, 1.0)  # first touch; MTP rows of the prompt
    # Rounds whose drafts are all right tell what verification and drafts take: the prediction never sees `drafted`.
    # They are timed beside it, for the machine's speed drifts.
    kinds = {"plain": (0, None), "drafted": (k, accept), "full": (k, 1.0)}
    runs: dict[str, list[DraftStats]] = {kind: [] for kind in kinds}
    read = []
    for i in range(repeats):
        read.append(_core.read_bandwidth(model.threads, PROBE_MIB, 1))
        for kind in list(kinds)[:: 1 if i % 2 else -1]:
            runs[kind].append(text.run(*kinds[kind]))
        if progress is not None:
            progress(i + 1, repeats)
    plain, drafted, full = runs.values()
    tokens, rounds, offered, taken, n_bytes = (
        sum(getattr(s, f) for s in drafted) for f in ("tokens", "rounds", "drafted", "accepted", "bytes")
    )
    plain_rate, drafted_rate = ([s.tokens / s.seconds for s in group] for group in (plain, drafted))
    predicted, predicted_bytes = text.predict(plain, drafted, full)
    return DraftBench(
        file=str(model.path),
        isa=model.isa,
        threads=model.threads,
        kv=text.session.kv,
        k=k,
        accept=accept,
        context=n,
        decode_tokens=decode_tokens,
        repeats=repeats,
        acceptance=taken / max(offered, 1),
        tokens_per_pass=tokens / rounds,
        experts_per_pass=sum(s.experts for s in drafted) / rounds,
        plain_experts=plain[0].experts / plain[0].rounds,
        plain_bytes_per_token=plain[0].bytes / plain[0].tokens,
        drafted_bytes_per_token=n_bytes / tokens,
        draft_bytes_share=sum(s.draft_bytes for s in drafted) / n_bytes,
        plain_rate=Spread.of(plain_rate),
        drafted_rate=Spread.of(drafted_rate),
        speedup=Spread.of([d / p for d, p in zip(drafted_rate, plain_rate, strict=True)]),
        predicted=predicted,
        predicted_bytes=predicted_bytes,
        read_bandwidth=Spread.of(read),
    )


class _Text:
    """The greedy text after a prompt, decoded again and again."""

    def __init__(self, model: Model, ids: list[int], n_tokens: int, k: int, kv: str, rng: np.random.Generator) -> None:
        self.model, self.n, self.n_tokens, self.k, self.rng = model, len(ids), n_tokens, k, rng
        self.session = model.session(len(ids) + n_tokens + k + 1, kv, mtp=True)
        self.session.prefill(ids)
        assert self.session.last_logits is not None
        self.known = [Sampling().choose(self.session.last_logits, self.n, model.n_valid)]
        while len(self.known) < n_tokens + k:
            self.known += self.session.draft_round(self.known[-1], 0, Sampling(), model.n_valid)["tokens"]

    def run(self, k: int, accept: float | None) -> DraftStats:
        """The text once more with ``k`` drafts a round."""
        self.session.truncate(self.n)
        made, stats = self.known[:1], DraftStats()
        while len(made) < self.n_tokens:
            options: dict[str, Any] = {}
            if accept is not None and k:
                right = self.rng.random(k) < accept
                ahead = zip(self.known[len(made) :], right, strict=False)
                forced = [t if ok else (t + 1) % self.model.n_valid for t, ok in ahead]
                options["drafts"] = np.array(forced, np.int32)
            r = self.session.draft_round(made[-1], k, Sampling(), self.model.n_valid, **options)
            if len(made) > 1:  # the first round after truncate() also recomputes a hidden state
                stats.add(r)
            made += r["tokens"]
        if made != self.known[: len(made)]:
            raise SessionError("drafted text differs from plain text: please report this")
        return stats

    def predict(
        self, plain: list[DraftStats], drafted: list[DraftStats], full: list[DraftStats]
    ) -> tuple[float, float]:
        """The speedup that follows from times of plain and of full rounds, and from bytes alone."""
        cost, k = CostModel.of(self.model.core.weight_bytes, self.model.config), self.k
        # One by one: how often each position was right, for the layer's own drafts fade with it.
        own = [sum(s.taken[j] for s in drafted) / max(sum(s.offered[j] for s in drafted), 1) for j in range(1, k + 1)]
        per_round = expected_tokens(own, k)
        fewer = cost.draft_bytes(k, per_round) / cost.draft_bytes(k, k + 1)  # MTP rows caught up by the first draft
        gains = [
            per_round * p.seconds / p.rounds / ((f.seconds - f.draft_seconds * (1 - fewer)) / f.rounds)
            for p, f in zip(plain, full, strict=True)
        ]
        return statistics.median(gains), cost.gain(k, own, self.session.expert_union)
