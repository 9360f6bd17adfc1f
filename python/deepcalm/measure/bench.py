"""Speed with its bounds: what prefill and decode reach, stage by stage, beside what the machine was measured to do."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import _core
from ..drafting import CostModel, DraftStats, expected_tokens
from ..errors import SessionError
from ..files.packed import PackedFile
from ..sampling import Sampling
from ..session import Session, Stats

if TYPE_CHECKING:
    from ..model import Model

CONTEXTS = (0, 1024, 4096)
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
    """What ``bench`` measured; ``machine``: see ``machine``.

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


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and what was measured: the version, and the commit in a checkout."""
    info: dict[str, Any] = {"processor": "unknown", "cores": _core.default_threads(), "memory_gb": 0.0}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                info["processor"] = " ".join(line.partition(":")[2].split())
                break
        info["memory_gb"] = round(int(Path("/proc/meminfo").read_text().split()[1]) * 1024 / 1e9, 1)
    except (OSError, ValueError, IndexError):
        pass
    info["version"] = _core.__version__
    here = Path(__file__)
    try:  # a checkout, not another project's repository around the installed package
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, check=True, capture_output=True
        )
        git = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
        info["commit"] = subprocess.run(git, cwd=here.parent, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        info["commit"] = ""
    return info


class Others:
    """What else used the processor since this was made, from /proc/stat; zeros where that does not exist."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Seconds: on the clock, of processor time in use, of it by this process, and taken by the hypervisor."""
        t = os.times()
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split(maxsplit=10)[1:9]]
        except (OSError, ValueError, IndexError):
            return t.elapsed, 0.0, 0.0, 0.0
        busy = sum(ticks[:3]) + sum(ticks[5:7])  # user, nice, system, irq, softirq; not idle, iowait
        return t.elapsed, busy / os.sysconf("SC_CLK_TCK"), t.user + t.system, ticks[7] / os.sysconf("SC_CLK_TCK")

    def cores(self) -> tuple[float, float]:
        """Cores in use by other processes, and taken by the hypervisor (steal), on average."""
        (t0, busy0, own0, steal0), (t, busy, own, steal) = self.start, self._now()
        seconds = max(t - t0, 1e-9)
        return max(busy - busy0 - (own - own0), 0.0) / seconds, (steal - steal0) / seconds


def operations(model: Model, n: int, pos: int, n_logits: int = 1) -> dict[tuple[str, str], int]:
    """(stage, weight format or "attention") -> multiplies and adds of a main pass of ``n`` tokens after ``pos``."""
    c, out = model.config, dict[tuple[str, str], int]()
    with PackedFile(model.path) as file:
        for name, e in file.entries.items():
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
    """From /proc/self/status; zeros where that does not exist."""
    found = {}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("VmRSS", "RssAnon"):
                found[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    resident, anonymous = found.get("VmRSS", 0), found.get("RssAnon", 0)
    c = session.model.config
    layers = c["num_hidden_layers"] / (c["num_hidden_layers"] + c["num_nextn_predict_layers"])
    cache = min(anonymous, int(session.cache_bytes * layers * session.pos / session.ctx))
    return Memory(resident, resident - anonymous, cache, anonymous - cache)


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
    kv: str = "f16",
    probe_mib: int = 1024,
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
        probe_mib: memory that the bandwidth probe reads; far beyond any cache.
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
    others = Others()
    session, greedy, n_valid = model.session(ctx, kv, mtp=False), Sampling(), model.n_valid
    ids = np.random.default_rng(0).integers(0, n_valid, prompt_tokens + decode_tokens).tolist()
    work = operations(model, prompt_tokens, 0)
    kernels: dict[str, float] = {}
    ceilings: dict[str, float] = {}

    def measure_rates() -> None:
        """Best of the runs before and after: other work on the machine must not lower a bound."""
        heads = int(model.config["num_attention_heads"])
        found = {f: _core.inner_loop_rate(model.isa, f, model.threads) for f in {f for _, f in work} - {"attention"}}
        found["attention"] = model.threads * _core.attention_rate(model.isa, kv, heads, 16, 64)
        for best, new in ((kernels, found), (ceilings, _core.compute_ceilings(model.isa, model.threads))):
            best.update({k: max(v, best.get(k, 0.0)) for k, v in new.items()})

    measure_rates()

    def peak(fmt: str) -> float:
        kind = ("bf16" if kv == "bf16" else "f32") if fmt == "attention" else INSTRUCTION[fmt]
        return ceilings.get(kind, ceilings["f32"])

    points = [_Point() for _ in range(1 + len(contexts))]  # the prefill, then each context
    single: list[float] = []

    def run(point: _Point, context: int | None) -> None:
        if context is None:
            session.truncate(0)
        else:
            fill(session, context)
            session.draft_round(ids[0], 0, greedy, n_valid)
        read = _core.read_bandwidth(model.threads, probe_mib, 3)
        before, start = session.stats, time.perf_counter()
        if context is None:
            session.prefill(ids[:prompt_tokens])
        else:
            for token in ids[prompt_tokens:]:
                session.draft_round(token, 0, greedy, n_valid)
        point.add(time.perf_counter() - start, session.stats - before, read)

    session.prefill(ids[:prompt_tokens])
    full = _memory(session)
    session.draft_round(ids[0], 0, greedy, n_valid)
    memory = replace(_memory(session), prefill=full.other)
    total = (repeats + 1) * len(points)
    for i in range(repeats + 1):
        for j, point in enumerate(points):
            run(point if i else _Point(), contexts[j - 1] if j else None)  # the first round warms up
            if progress is not None:
                progress(i * len(points) + j + 1, total)
        if i:
            single.append(_core.read_bandwidth(1, probe_mib, 3))

    measure_rates()
    bound: dict[str, tuple[int, float]] = {}
    for (stage, fmt), n in work.items():
        old = bound.get(stage, (0, 0.0))
        bound[stage] = (old[0] + n * repeats, old[1] + 1e-9 * n * repeats / kernels[fmt])
    ops = sum(work.values())
    kernel_seconds = sum(1e-9 * n / kernels[fmt] for (_, fmt), n in work.items())
    instruction_seconds = sum(1e-9 * n / peak(fmt) for (_, fmt), n in work.items())
    first = points[0]
    prefill = Prefill(
        tokens=prompt_tokens,
        seconds=sum(first.seconds),
        rate=Spread.of([prompt_tokens / s for s in first.seconds]),
        operations=ops,
        operation_rate=Spread.of([1e-9 * ops / s for s in first.seconds]),
        kernel_share=Spread.of([kernel_seconds / s for s in first.seconds]),
        instruction_share=Spread.of([instruction_seconds / s for s in first.seconds]),
        stages=_lines(first.stats, sum(first.seconds), bound),
    )
    decode = []
    for context, p in zip(contexts, points[1:], strict=True):
        # The steps see context + 2, context + 3, ...: their mean, doubled to stay whole.
        attention = operations(model, 1, 0)["attention", "attention"] * (2 * context + decode_tokens + 3) // 2
        n_bytes, cache = p.stats.weight_bytes + p.stats.cache_bytes, p.stats.cache_bytes
        steps = decode_tokens * repeats
        limits = [
            (n_bytes - cache) / steps / (1e9 * r) + max(cache / steps / (1e9 * r), 1e-9 * attention / peak("attention"))
            for r in p.read
        ]
        rates = [decode_tokens / s for s in p.seconds]
        moved = [n_bytes / repeats / s / 1e9 for s in p.seconds]
        seconds = p.stats.stages["attention"].seconds
        decode.append(
            Decode(
                context=context,
                tokens=decode_tokens,
                seconds=sum(p.seconds),
                rate=Spread.of(rates),
                bytes_per_token=n_bytes // steps,
                active_bytes_per_token=model.active_bytes_per_token(context, kv),
                bandwidth=Spread.of(moved),
                read_bandwidth=Spread.of(p.read),
                share=Spread.of([m / r for m, r in zip(moved, p.read, strict=True)]),
                bound_rate=1 / statistics.median(limits),
                bound_share=Spread.of([r * limit for r, limit in zip(rates, limits, strict=True)]),
                attention_rate=1e-9 * attention * steps / seconds,
                attention_ceiling=peak("attention"),
                stages=_lines(p.stats, sum(p.seconds), {"attention": (attention * steps, 0.0)}),
            )
        )
    other_cores, stolen_cores = others.cores()
    return BenchResult(
        file=str(model.path),
        machine=machine(),
        isa=model.isa,
        threads=model.threads,
        kv=kv,
        repeats=repeats,
        other_cores=other_cores,
        stolen_cores=stolen_cores,
        read_bandwidth=Spread.of([r for p in points for r in p.read]),
        read_bandwidth_1=Spread.of(single),
        ceilings=ceilings,
        kernels=kernels,
        prefill=prefill,
        decode=decode,
        experts=check_spreading(session, ids[: min(256, prompt_tokens)]) if random_weights else None,
        memory=memory,
    )


class _Point:
    """What the repeats of one measurement gave."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.read: list[float] = []
        self.stats = Stats()

    def add(self, seconds: float, done: Stats, read: float) -> None:
        self.seconds.append(seconds)
        self.read.append(read)
        self.stats = self.stats + done


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
    context: int | None = None,
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
        context: length of a random prompt; None: 128, or what the model holds.
        prompt: token ids instead of it.
        progress: called with (repeats done, repeats in all).

    Raises:
        SessionError: a model without MTP layer, or whose maximum context is too short.
    """
    limit = int(model.config["max_position_embeddings"])
    if context is None:
        context = max(1, min(128, limit - decode_tokens - k - 1))
    if not 1 <= k <= 7 or not (accept is None or 0 <= accept <= 1) or min(context, repeats) < 1:
        raise ValueError("draft: expected 1..7, accept 0..1, context and repeats >= 1")
    if decode_tokens < k + 3:
        raise ValueError(f"{decode_tokens} tokens, expected at least {k + 3}: the first round is not timed")
    if not model.config["num_nextn_predict_layers"]:
        raise SessionError("this model has no MTP layer: nothing to draft with")
    rng = np.random.default_rng(seed)
    ids = prompt or rng.integers(0, model.n_valid, context).tolist()
    ctx = len(ids) + decode_tokens + k + 1
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
