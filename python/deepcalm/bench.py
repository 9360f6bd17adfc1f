"""Speed with its bytes: prefill and decode rates, what decoding moves, and the bandwidth measured beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import _core
from .errors import SessionError

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
