"""Speed with its bytes: prefill and decode rates, what decoding moves, and the bandwidth measured beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from .draft import CostModel, DraftStats, expected_tokens
from .errors import SessionError
from .generate import Sampling

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The summary of ``values``, at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Rates in tokens per second; bandwidths in GB/s (1e9 bytes), bytes counted by the passes.

    ``read_bandwidth`` is a plain read of memory by as many threads, measured between the repeats of the same run;
    ``decode_share`` is decode_bandwidth / read_bandwidth, repeat by repeat.
    """

    file: str
    isa: str
    threads: int
    kv: str
    prompt_tokens: int
    context: int  # tokens in the cache when decoding starts
    decode_tokens: int
    repeats: int
    prefill_rate: Spread
    decode_rate: Spread
    decode_bytes_per_token: int
    active_bytes_per_token: int  # expected for distinct routing, see Model.active_bytes_per_token
    decode_bandwidth: Spread
    read_bandwidth: Spread
    decode_share: Spread


def bench(
    model: Model,
    prompt_tokens: int = 512,
    context: int = 128,
    decode_tokens: int = 32,
    repeats: int = 5,
    kv: str = "f16",
    probe_mib: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Measures ``model`` with random tokens (seeded: every run routes alike).

    Args:
        prompt_tokens: length of the prefill that is timed, into an empty cache.
        context: tokens in the cache before the decode steps that are timed.
        probe_mib: memory that the bandwidth probe reads; far beyond any cache.
        progress: called with (repeats done, repeats in all).

    Raises:
        SessionError: the model's maximum context is too short.
    """
    if min(prompt_tokens, context, decode_tokens, repeats) < 1:
        raise ValueError("prompt, context, tokens and repeats: expected numbers >= 1")
    ctx = max(prompt_tokens, context + decode_tokens)
    limit = int(model.config["max_position_embeddings"])
    if ctx > limit:
        raise SessionError(
            f"a prompt of {prompt_tokens} and {decode_tokens} tokens after {context} need {ctx} positions, "
            f"the model has {limit}; choose smaller ones"
        )
    session = model.session(ctx, kv)
    ids = np.random.default_rng(0).integers(0, model.n_valid, ctx).tolist()
    session.prefill(ids[:1])  # first touch of weights and buffers
    prefill, decode, bandwidth, read = [], [], [], []
    for i in range(repeats):
        session.truncate(0)
        start = time.perf_counter()
        session.prefill(ids[:prompt_tokens])
        prefill.append(prompt_tokens / (time.perf_counter() - start))
        session.truncate(min(context, prompt_tokens))
        if session.pos < context:
            session.prefill(ids[session.pos : context])
        read.append(_core.read_bandwidth(model.threads, probe_mib, 1))
        before = session.stats
        for token in ids[context : context + decode_tokens]:
            session.decode(token)
        done = session.stats - before
        decode.append(done.decode_rate)
        bandwidth.append(done.decode_bandwidth)
        if progress is not None:
            progress(i + 1, repeats)
    return BenchResult(
        file=str(model.path),
        isa=model.isa,
        threads=model.threads,
        kv=kv,
        prompt_tokens=prompt_tokens,
        context=context,
        decode_tokens=decode_tokens,
        repeats=repeats,
        prefill_rate=Spread.of(prefill),
        decode_rate=Spread.of(decode),
        decode_bytes_per_token=done.decode_bytes // decode_tokens,
        active_bytes_per_token=model.active_bytes_per_token(context, kv),
        decode_bandwidth=Spread.of(bandwidth),
        read_bandwidth=Spread.of(read),
        decode_share=Spread.of([b / r for b, r in zip(bandwidth, read, strict=True)]),
    )


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
    context: int = 128,
    decode_tokens: int = 64,
    repeats: int = 5,
    kv: str = "f16",
    probe_mib: int = 1024,
    seed: int = 0,
    prompt: list[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DraftBench:
    """Measures ``k`` drafts a round against plain decoding of the same greedy text, in interleaved repeats.

    Args:
        accept: the MTP layer runs, but its drafts are replaced by the known next tokens, each spoiled with probability
            1 - accept; None: its own drafts.
        seed: of the random prompt and of what is spoiled.
        prompt: token ids instead of ``context`` random ones.
        progress: called with (repeats done, repeats in all).

    Raises:
        SessionError: a model without MTP layer, or whose maximum context is too short.
    """
    if not 1 <= k <= 7 or not (accept is None or 0 <= accept <= 1) or min(context, decode_tokens, repeats) < 1:
        raise ValueError("draft: expected 1..7, accept 0..1, context, tokens and repeats >= 1")
    if not model.config["num_nextn_predict_layers"]:
        raise SessionError("this model has no MTP layer: nothing to draft with")
    rng = np.random.default_rng(seed)
    ids = prompt or rng.integers(0, model.n_valid, context).tolist()
    ctx, limit = len(ids) + decode_tokens + k + 1, int(model.config["max_position_embeddings"])
    if ctx > limit:
        raise SessionError(f"{decode_tokens} tokens after {len(ids)} need {ctx} positions, the model has {limit}")
    session, greedy, n = model.session(ctx, kv, mtp=True), Sampling(), len(ids)
    session.prefill(ids)
    assert session.last_logits is not None
    known = [greedy.choose(session.last_logits, n, model.n_valid)]
    while len(known) < decode_tokens + k:
        known += session.draft_round(known[-1], 0, greedy, model.n_valid)["tokens"]

    def run(k: int, accept: float | None) -> DraftStats:
        session.truncate(n)
        made, stats = known[:1], DraftStats()
        while len(made) < decode_tokens:
            options: dict[str, Any] = {}
            if accept is not None and k:
                right = rng.random(k) < accept
                ahead = zip(known[len(made) :], right, strict=False)
                forced = [t if ok else (t + 1) % model.n_valid for t, ok in ahead]
                options["forced"] = np.array(forced, np.int32)
            r = session.draft_round(made[-1], k, greedy, model.n_valid, **options)
            if len(made) > 1:  # the first round after truncate() also recomputes a hidden state
                stats.add(r)
            made += r["tokens"]
        if made != known[: len(made)]:
            raise SessionError("drafted text differs from plain text: please report this")
        return stats

    cost = CostModel.of(model.core.weight_bytes, model.config)
    run(k, 1.0)  # first touch; MTP rows of the prompt
    # Rounds whose drafts are all right tell what verification and drafts take: the prediction never sees `drafted`.
    # They are timed beside it, for the machine's speed drifts.
    kinds = {"plain": (0, None), "drafted": (k, accept), "full": (k, 1.0)}
    runs: dict[str, list[DraftStats]] = {kind: [] for kind in kinds}
    read = []
    for i in range(repeats):
        read.append(_core.read_bandwidth(model.threads, probe_mib, 1))
        order = list(kinds)[:: 1 if i % 2 else -1]
        for kind in order:
            runs[kind].append(run(*kinds[kind]))
        if progress is not None:
            progress(i + 1, repeats)
    plain, drafted, full = runs.values()
    tokens, rounds, offered = (sum(getattr(s, f) for s in drafted) for f in ("tokens", "rounds", "drafted"))
    taken = sum(s.accepted for s in drafted)
    # One by one: how often each position was right, for the layer's own drafts fade with it.
    own = [sum(s.taken[j] for s in drafted) / max(sum(s.offered[j] for s in drafted), 1) for j in range(1, k + 1)]
    per_round = expected_tokens(own, k)
    fewer = cost.draft_bytes(k, per_round) / cost.draft_bytes(k, k + 1)  # MTP rows caught up by the first draft

    def predict(plain: DraftStats, full: DraftStats) -> float:
        round_seconds = (full.seconds - full.draft_seconds * (1 - fewer)) / full.rounds
        return per_round * plain.seconds / plain.rounds / round_seconds

    plain_rate, drafted_rate = ([s.tokens / s.seconds for s in group] for group in (plain, drafted))
    return DraftBench(
        file=str(model.path),
        isa=model.isa,
        threads=model.threads,
        kv=kv,
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
        drafted_bytes_per_token=sum(s.bytes for s in drafted) / tokens,
        draft_bytes_share=sum(s.draft_bytes for s in drafted) / sum(s.bytes for s in drafted),
        plain_rate=Spread.of(plain_rate),
        drafted_rate=Spread.of(drafted_rate),
        speedup=Spread.of([d / p for d, p in zip(drafted_rate, plain_rate, strict=True)]),
        predicted=statistics.median(map(predict, plain, full)),
        predicted_bytes=cost.gain(k, own, session.expert_union),
        read_bandwidth=Spread.of(read),
    )
