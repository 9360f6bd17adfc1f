"""Speed with its bounds: what prefill and decode reach, stage by stage, beside what the machine was measured to do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import SessionError
from ..sampling import Sampling
from ..session import Session, Stats
from .machine import Others, machine, resident

if TYPE_CHECKING:
    from ..model import Model

CONTEXTS = (0, 1024, 4096)
PROBE_MIB = 1024  # of memory that a probe of the bandwidth reads; far beyond any cache
INSTRUCTION = {"f32": "f32", "f16": "f32", "bf16": "bf16", "f8": "bf16", "q8": "int8", "q4": "int8"}
# The stage that multiplies with a tensor, by the end of its name (runtime/timing.h).
_STAGE_OF = {
    "wqkv_a": "qkv_a", "wq_b": "q_b", "w_uk": "w_uk", "w_uv": "w_uv", "wo": "wo", "router": "router", "head": "head",
    "w_gate_up": "ffn_up", "w_down": "ffn_down", "experts.w_gate_up": "experts_up", "experts.w_down": "experts_down",
    "shared.w_gate_up": "experts_up", "shared.w_down": "experts_down",
}  # fmt: skip


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
class StageLine:
    """One stage of the report, sums over the timed passes: see ``session.StageStats``.

    ``operations``: multiplies and adds, counted apart; ``bound_seconds``: these at the rate of their kernels from L1.
    """

    stage: str
    calls: int
    bytes: int
    seconds: float
    wait_sum: float
    operations: int = 0
    bound_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill of ``tokens`` random tokens into an empty cache.

    ``kernel_share``: of the rate that the same mix of kernels reaches with operands in L1; ``instruction_share``: of
    the rate of the bare multiply-add and dot instructions. ``stages``: sums over the repeats, the line "outside passes"
    included, so that they add up to ``seconds``.
    """

    tokens: int
    seconds: float
    rate: Spread  # tokens per second
    operations: int  # of one prefill
    operation_rate: Spread  # 1e9 operations per second
    kernel_share: Spread
    instruction_share: Spread
    stages: list[StageLine]


@dataclass(frozen=True, slots=True)
class Decode:
    """``tokens`` decode steps after ``context`` cached positions, repeat by repeat between probes of the bandwidth.

    ``share``: bandwidth / read_bandwidth. ``bound_rate``: tokens per second if weights were read at read_bandwidth and
    attention ran at the slower of that bandwidth and the instruction's ceiling; ``bound_share``: rate / bound_rate.
    """

    context: int
    tokens: int
    seconds: float
    rate: Spread  # tokens per second
    bytes_per_token: int
    active_bytes_per_token: int  # expected for distinct experts, see Model.active_bytes_per_token
    bandwidth: Spread  # GB/s (1e9 bytes)
    read_bandwidth: Spread
    share: Spread
    bound_rate: float
    bound_share: Spread
    attention_rate: float  # 1e9 operations per second
    attention_ceiling: float  # the instruction's
    stages: list[StageLine]


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of the process after the prompt and a decoded token: mapped files (the weights that were touched,
    and libraries), the cache, and everything else (interpreter, buffers); ``prefill``: everything else before that
    token, which gives the buffers of the prompt back."""

    resident: int
    mapped: int
    cache: int
    other: int
    prefill: int = 0


@dataclass(frozen=True, slots=True)
class Spreading:
    """How random tokens spread over the experts, and whether the logits are numbers."""

    tokens: int
    busiest_share: float  # of the slots of its layer
    unused: int  # experts of a layer that no token chose, the worst layer
    finite: bool
    logit_deviation: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What ``bench`` measured; ``machine``: see ``machine.machine``.

    ``ceilings``: 1e9 operations per second of the bare instructions on all threads, ``kernels``: of the inner loops
    from L1 by weight format, and "attention".
    """

    file: str
    machine: dict[str, Any]
    isa: str
    threads: int
    kv: str
    repeats: int
    other_cores: float  # in use by other processes meanwhile: 0 on a quiet machine
    stolen_cores: float  # taken by the hypervisor
    read_bandwidth: Spread  # GB/s of as many threads, all probes
    read_bandwidth_1: Spread  # of one thread
    ceilings: dict[str, float]
    kernels: dict[str, float]
    prefill: Prefill
    decode: list[Decode]
    experts: Spreading | None
    memory: Memory
    mtp_layers: int


def operations(model: Model, n: int, pos: int, n_logits: int = 1) -> dict[tuple[str, str], int]:
    """(stage, weight format or "attention") -> multiplies and adds of a main pass of ``n`` tokens after ``pos``."""
    c, out = model.config, dict[tuple[str, str], int]()
    for name, e in model.entries.items():
        leaf = name.split(".", 2)[2] if name.startswith("layers.") else name
        if (stage := _STAGE_OF.get(leaf)) is None or e.kind != "tiled":
            continue
        slices = c["num_experts_per_tok"] if e.role == "expert" else e.n_slices
        rows = n_logits if leaf == "head" else n
        key = (stage, e.format)
        out[key] = out.get(key, 0) + 2 * slices * e.shape[-2] * e.shape[-1] * rows
    seen = n * pos + n * (n + 1) // 2
    width = 2 * c["kv_lora_rank"] + c["qk_rope_head_dim"]
    out["attention", "attention"] = 2 * c["num_hidden_layers"] * c["num_attention_heads"] * width * seen
    return out


def fill(session: Session, n: int, seed: int = 0) -> None:
    """Makes the session hold ``n`` random tokens with random cache rows: a long context without its prefill."""
    if n == 0:
        session.truncate(0)
        return
    c, rng = session.model.config, np.random.default_rng(seed)
    r, dr = c["kv_lora_rank"], c["qk_rope_head_dim"]
    latent = np.zeros((n, -(-r // 32) * 32), np.float32)
    rope = np.zeros((n, -(-dr // 16) * 16), np.float32)
    latent[:, :r], rope[:, :dr] = rng.standard_normal((n, r)), rng.standard_normal((n, dr))
    if session.kv == "q8":
        scale = (np.abs(latent).reshape(n, -1, 32).max(2) / 127).astype(np.float16)
        codes = np.rint(latent.reshape(n, -1, 32) / scale[:, :, None]).clip(-127, 127).astype(np.int8)
        parts: list[npt.NDArray[Any]] = [codes.reshape(n, -1), scale, rope.astype(np.float16)]
    else:
        kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}[session.kv]
        parts = [latent.astype(kind), rope.astype(kind)]
    rows = np.concatenate([p.view(np.uint8) for p in parts], 1)
    tokens = rng.integers(0, session.model.n_valid, n).astype(np.int32)
    session.load_rows(tokens, np.ascontiguousarray(np.broadcast_to(rows, (c["num_hidden_layers"], *rows.shape))))


def _lines(stats: Stats, wall: float, work: dict[str, tuple[int, float]]) -> list[StageLine]:
    """The stages of the timed passes and what lies between them: sampling, copies, Python."""
    lines = [
        StageLine(name, s.calls, s.bytes, s.seconds, s.wait_sum, *work.get(name, (0, 0.0)))
        for name, s in stats.stages.items()
    ]
    return [*lines, StageLine("outside passes", 0, 0, wall - stats.pass_seconds, 0.0)]


def _memory(session: Session) -> Memory:
    rss, anonymous = resident()
    c = session.model.config
    layers = c["num_hidden_layers"] / (c["num_hidden_layers"] + c["num_nextn_predict_layers"])
    cache = min(anonymous, int(session.cache_bytes * layers * session.pos / session.ctx))
    return Memory(rss, rss - anonymous, cache, anonymous - cache)


def check_spreading(session: Session, tokens: Sequence[int]) -> Spreading:
    """Prefills ``tokens`` into the emptied session and looks at the routes and the logits."""
    session.truncate(0)
    with session.trace("topk_idx") as taps:
        logits = session.prefill(tokens)
    n = int(session.model.config["n_routed_experts"])
    counts = [np.bincount(t.reshape(-1), minlength=n) for t in taps.values()]
    return Spreading(
        tokens=len(tokens),
        busiest_share=max((float(c.max() / c.sum()) for c in counts), default=0.0),
        unused=max((int((c == 0).sum()) for c in counts), default=0),
        finite=bool(np.isfinite(logits).all()),
        logit_deviation=float(logits.std()),
    )


def bench(
    model: Model,
    prompt_tokens: int | None = None,
    contexts: Sequence[int] | None = None,
    decode_tokens: int = 32,
    repeats: int = 5,
    kv: str = "auto",
    random_weights: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Measures ``model`` with random tokens (seeded: every run routes alike).

    Every repeat runs the prefill and then every context, each after a probe of the read bandwidth. Contexts are filled
    with random cache rows, and a token is decoded before those that are timed: it gives the prompt's buffers back. One
    warm-up of each comes first.

    Args:
        prompt_tokens: length of the prefill that is timed, into an empty cache; None: 512, or what the model holds.
        contexts: cached positions before the decode steps that are timed; None: those of CONTEXTS that it holds.
        random_weights: also check how tokens spread over the experts.
        progress: called with (steps done, steps in all).

    Raises:
        SessionError: the model's maximum context is too short.
    """
    limit = int(model.config["max_position_embeddings"])
    if prompt_tokens is None:
        prompt_tokens = max(1, min(512, limit - 1))
    if contexts is None:
        contexts = [0, *(c for c in CONTEXTS if c + decode_tokens < limit)]
    if min(prompt_tokens, decode_tokens, repeats) < 1 or not contexts or min(contexts) < 0:
        raise ValueError("prompt, tokens and repeats: expected numbers >= 1; contexts: numbers >= 0")
    contexts = sorted(set(contexts))
    ctx = max(prompt_tokens, contexts[-1] + decode_tokens) + 1
    if ctx > limit:
        raise SessionError(
            f"a prompt of {prompt_tokens} and {decode_tokens + 1} tokens after {contexts[-1]} need {ctx} positions, "
            f"the model has {limit}; choose smaller ones"
        )
    session = model.session(ctx, kv, mtp=False)
    others, rates = Others(), _Rates(model, session.kv, operations(model, prompt_tokens, 0))
    runs = _Runs(session, prompt_tokens, decode_tokens)
    memory = runs.memory()
    points = [_Point(c) for c in (None, *contexts)]
    single: list[float] = []
    for i in range(repeats + 1):
        for j, point in enumerate(points):
            runs.time(point if i else _Point(point.context))  # the first round warms up
            if progress is not None:
                progress(i * len(points) + j + 1, (repeats + 1) * len(points))
        if i:
            single.append(_core.read_bandwidth(1, PROBE_MIB, 3))
    rates.measure()
    other_cores, stolen_cores = others.cores()
    return BenchResult(
        file=str(model.path),
        machine=machine(),
        isa=model.isa,
        threads=model.threads,
        kv=session.kv,
        repeats=repeats,
        other_cores=other_cores,
        stolen_cores=stolen_cores,
        read_bandwidth=Spread.of([r for p in points for r in p.read]),
        read_bandwidth_1=Spread.of(single),
        ceilings=rates.ceilings,
        kernels=rates.kernels,
        prefill=_prefill(points[0], prompt_tokens, rates),
        decode=[_decode(p, decode_tokens, rates) for p in points[1:]],
        experts=check_spreading(runs.session, runs.ids[: min(256, prompt_tokens)]) if random_weights else None,
        memory=memory,
        mtp_layers=int(model.config["num_nextn_predict_layers"]),
    )


class _Point:
    """What the repeats of one measurement gave: of the prefill (None) or of decoding after a context."""

    def __init__(self, context: int | None) -> None:
        self.context = context
        self.seconds: list[float] = []
        self.read: list[float] = []
        self.stats = Stats()


class _Rates:
    """Rates of the bare machine, and the operations of a prefill that they bound."""

    def __init__(self, model: Model, kv: str, work: dict[tuple[str, str], int]) -> None:
        self.model, self.kv, self.work = model, kv, work
        self.kernels: dict[str, float] = {}  # 1e9 operations a second from L1, by weight format; "attention"
        self.ceilings: dict[str, float] = {}  # of the bare instructions
        self.measure()

    def measure(self) -> None:
        """Best of the runs before and after: other work on the machine must not lower a bound."""
        m, formats = self.model, {f for _, f in self.work} - {"attention"}
        found = {f: _core.inner_loop_rate(m.isa, f, m.threads) for f in formats}
        heads = int(m.config["num_attention_heads"])
        found["attention"] = m.threads * _core.attention_rate(m.isa, self.kv, heads, 16, 64)
        for best, new in ((self.kernels, found), (self.ceilings, _core.compute_ceilings(m.isa, m.threads))):
            best.update({k: max(v, best.get(k, 0.0)) for k, v in new.items()})

    def peak(self, fmt: str) -> float:
        """The instruction's ceiling for a weight format or "attention"."""
        kind = ("bf16" if self.kv == "bf16" else "f32") if fmt == "attention" else INSTRUCTION[fmt]
        return self.ceilings.get(kind, self.ceilings["f32"])


class _Runs:
    """The passes that are timed, on one session."""

    def __init__(self, session: Session, prompt_tokens: int, decode_tokens: int) -> None:
        self.session, self.n_valid = session, session.model.n_valid
        self.ids = np.random.default_rng(0).integers(0, self.n_valid, prompt_tokens + decode_tokens).tolist()
        self.prompt_tokens = prompt_tokens

    def memory(self) -> Memory:
        """After a prompt and a token."""
        self.session.prefill(self.ids[: self.prompt_tokens])
        full = _memory(self.session)
        self.decode(self.ids[0])
        return replace(_memory(self.session), prefill=full.other)

    def decode(self, token: int) -> None:
        self.session.draft_round(token, 0, Sampling(), self.n_valid)

    def time(self, point: _Point) -> None:
        """One repeat: a probe of the bandwidth, then what is timed."""
        session = self.session
        if point.context is None:
            session.truncate(0)
        else:
            fill(session, point.context)
            self.decode(self.ids[0])
        point.read.append(_core.read_bandwidth(session.model.threads, PROBE_MIB, 3))
        before, start = session.stats, time.perf_counter()
        if point.context is None:
            session.prefill(self.ids[: self.prompt_tokens])
        else:
            for token in self.ids[self.prompt_tokens :]:
                self.decode(token)
        point.seconds.append(time.perf_counter() - start)
        point.stats = point.stats + (session.stats - before)


def _prefill(p: _Point, tokens: int, rates: _Rates) -> Prefill:
    bound: dict[str, tuple[int, float]] = {}
    for (stage, fmt), one in rates.work.items():
        n, (ops, seconds) = one * len(p.seconds), bound.get(stage, (0, 0.0))
        bound[stage] = (ops + n, seconds + 1e-9 * n / rates.kernels[fmt])
    ops = sum(rates.work.values())
    kernel_seconds = sum(1e-9 * n / rates.kernels[fmt] for (_, fmt), n in rates.work.items())
    instruction_seconds = sum(1e-9 * n / rates.peak(fmt) for (_, fmt), n in rates.work.items())
    return Prefill(
        tokens=tokens,
        seconds=sum(p.seconds),
        rate=Spread.of([tokens / s for s in p.seconds]),
        operations=ops,
        operation_rate=Spread.of([1e-9 * ops / s for s in p.seconds]),
        kernel_share=Spread.of([kernel_seconds / s for s in p.seconds]),
        instruction_share=Spread.of([instruction_seconds / s for s in p.seconds]),
        stages=_lines(p.stats, sum(p.seconds), bound),
    )


def _decode(p: _Point, tokens: int, rates: _Rates) -> Decode:
    context, repeats = p.context or 0, len(p.seconds)
    # The steps see context + 2, context + 3, ...: their mean, doubled to stay whole.
    attention = operations(rates.model, 1, 0)["attention", "attention"] * (2 * context + tokens + 3) // 2
    cache, steps, peak = p.stats.cache_bytes, tokens * repeats, rates.peak("attention")
    n_bytes = p.stats.weight_bytes + cache
    limits = [
        (n_bytes - cache) / steps / (1e9 * r) + max(cache / steps / (1e9 * r), 1e-9 * attention / peak) for r in p.read
    ]
    speeds = [tokens / s for s in p.seconds]
    moved = [n_bytes / repeats / s / 1e9 for s in p.seconds]
    return Decode(
        context=context,
        tokens=tokens,
        seconds=sum(p.seconds),
        rate=Spread.of(speeds),
        bytes_per_token=n_bytes // steps,
        active_bytes_per_token=rates.model.active_bytes_per_token(context, rates.kv),
        bandwidth=Spread.of(moved),
        read_bandwidth=Spread.of(p.read),
        share=Spread.of([m / r for m, r in zip(moved, p.read, strict=True)]),
        bound_rate=1 / statistics.median(limits),
        bound_share=Spread.of([r * limit for r, limit in zip(speeds, limits, strict=True)]),
        attention_rate=1e-9 * attention * steps / p.stats.stages["attention"].seconds,
        attention_ceiling=peak,
        stages=_lines(p.stats, sum(p.seconds), {"attention": (attention * steps, 0.0)}),
    )
