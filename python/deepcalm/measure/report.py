"""What ``bench`` measured, as tables for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..drafting import MAX_DRAFT
from ..tables import table, wrapped

if TYPE_CHECKING:
    from .bench import BenchResult, Decode, Spread, StageLine
    from .drafts import DraftBench

CACHED = 1.1  # of the read bandwidth: beyond it weights come from caches
NEAR = 0.5  # of a bound: below it something else takes more of the time
MEMORY, NEITHER = (
    "memory bandwidth",
    "neither memory bandwidth nor arithmetic, each explains less than half of the time",
)


def spread(s: Spread, form: str, scale: float = 1) -> str:
    """Median (lowest - highest)."""
    return f"{scale * s.median:{form}} ({scale * s.low:{form}} - {scale * s.high:{form}})"


def linear_cost(contexts: list[int], rates: list[float]) -> tuple[float, float, float] | None:
    """Tokens per second at these contexts as a straight line of the cost of a step; None for fewer than 3.

    (ms at context 0, ms per position, worst deviation as a share)
    """
    import numpy as np

    if len(contexts) < 3:
        return None
    x, y = np.array(contexts, float), 1e3 / np.array(rates)
    # Least squares of the relative error: a long context must not drown the short ones.
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)
    return float(a), float(b), float(np.abs((a + b * x) / y - 1).max())


def text(result: BenchResult, command: str, width: int | None = None) -> str:
    """Everything as text, ``width`` columns wide (None: the terminal's, 100 where there is none)."""
    r, width = result, max(width or shutil.get_terminal_size((100, 24)).columns, 72)
    notes = (fill(note, width, break_on_hyphens=False) + "\n" for note in _notes(r))
    parts = [wrapped(_head(r, command), width), _rates(r), "".join(notes), _prefill_stages(r)]
    parts += [*(_decode_stages(r, d) for d in r.decode[:1] + r.decode[1:][-1:])]
    return "\n".join([*parts, wrapped(conclusion(r).items(), width)]) + "\n"


def conclusion(r: BenchResult) -> dict[str, str]:
    """A sentence each: what binds, how far from it, what to try; none for what the numbers do not tell."""
    ends = r.decode[:1] + r.decode[1:][-1:]
    binds = {f"decode at context {d.context}": _binds(r, d) for d in ends}
    hints = _hints(r, ends[0], set(binds.values()))
    far = {f"decode at context {d.context}": d.bound_share.median for d in ends if d.share.median <= CACHED}
    reading = sum(s.bytes for s in r.prefill.stages) / (1e9 * r.read_bandwidth.median * r.prefill.seconds)
    share, what = max((r.prefill.kernel_share.median, "arithmetic"), (reading, MEMORY))
    if share <= CACHED:
        binds["prefill"], far["prefill"] = what if share >= NEAR else NEITHER, share
    out = {"what binds": "; ".join(f"{k}: {v}" for k, v in binds.items()) + "."}
    if far:
        out["how far"] = ", ".join(f"{k} reaches {100 * v:.0f} % of its bound" for k, v in far.items()) + "."
    return out | ({"to try": "; ".join(hints) + "."} if hints else {})


def _binds(r: BenchResult, d: Decode) -> str:
    """What the time of a step goes to, as far as its bound explains it."""
    if d.share.median > CACHED:
        return "not memory, the weights stay in the processor's caches"
    if d.bound_share.median < NEAR:
        read, peak = 1e9 * d.read_bandwidth.median, 1e9 * d.attention_ceiling
        lost, name = max((s.seconds - max(s.bytes / read, s.operations / peak), s.stage) for s in d.stages)
        return f"{NEITHER}; {name} loses most, {1e3 * lost / (d.tokens * r.repeats):.3f} ms a token"
    seconds = sum(s.operations for s in d.stages) / (1e9 * d.attention_ceiling)
    return "attention's arithmetic" if seconds * d.bound_rate > 0.5 * d.tokens * r.repeats else MEMORY


def _hints(r: BenchResult, d: Decode, binds: set[str]) -> list[str]:
    """What the numbers speak for, the most telling first."""
    hints, cores, away = list[str](), r.machine["cores"], r.other_cores + r.stolen_cores
    waits = sum(s.wait_sum for s in d.stages) / r.threads / d.seconds
    if away > 0.2:
        hints.append(f"a quieter machine, {away:.1f} cores were not ours")
    if r.threads > 1 and waits > 0.2:
        hints.append(f"--threads {r.threads // 2},{r.threads}, for {100 * waits:.0f} % of a step are waits at barriers")
    elif 2 * r.threads <= cores:
        hints.append(f"--threads {r.threads},{2 * r.threads}, for there are {cores} cores")
    if MEMORY in binds and "q4" not in r.kernels:
        hints.append(f"fewer bytes a weight, as pack --dtype {'q4' if {'q8', 'f8'} & set(r.kernels) else 'q8'} has")
    if MEMORY in binds and r.mtp_layers:
        hints.append("--draft 2, to see whether drafts pay")
    return hints


def draft_conclusion(r: DraftBench) -> dict[str, str]:
    """The same of drafts."""
    pay = "drafts pay" if r.speedup.low > 1 else "drafts do not pay" if r.speedup.high < 1 else "drafts change nothing"
    share = 1e-9 * r.drafted_bytes_per_token * r.drafted_rate.median / r.read_bandwidth.median
    far = f"; bytes at {100 * share:.0f} % of the read bandwidth" if share <= CACHED else ""
    k = MAX_DRAFT if r.k == "auto" else int(r.k)
    out = {
        "what binds": f"{pay}: {r.speedup.median:.2f} times plain with {100 * r.acceptance:.0f} % of them right.",
        "how far": f"{r.tokens_per_pass:.2f} of at most {k + 1} tokens a pass{far}.",
    }
    step = (pay == "drafts pay" and r.acceptance > 0.8) - (pay == "drafts do not pay")
    more = k + step if step and r.k != "auto" else 0
    return out | ({"to try": f"--draft {more}."} if 1 <= more <= 7 else {})


def _head(r: BenchResult, command: str) -> list[tuple[str, str]]:
    """What was measured, and on what."""
    m, memory = r.machine, r.memory
    threads = f"{r.threads} thread{'s' if r.threads > 1 else ''}"
    one = f"; {spread(r.read_bandwidth_1, '.1f')} with one" if r.threads > 1 else ""
    ceilings, kernels = (", ".join(f"{k} {v:.0f}" for k, v in rates.items()) for rates in (r.ceilings, r.kernels))
    rows = [
        ("command", command),
        ("machine", f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB; deepcalm {m['version']}"),
        ("meanwhile", f"others used {r.other_cores:.2f} cores, the hypervisor took {r.stolen_cores:.2f}"),
        ("model", f"{r.file}, {r.isa}, {threads}, cache {r.kv}; median (lowest - highest) of {r.repeats}"),
        ("read", f"{spread(r.read_bandwidth, '.1f')} GB/s, a plain read of memory by {threads} before every run{one}"),
        ("ceilings", f"{ceilings} G operations/s of the bare instructions, {threads}"),
        ("kernels", f"{kernels} G operations/s of the inner loops from the first-level cache"),
    ]
    if (e := r.experts) is not None:
        finite = "" if e.finite else "NOT "
        routes = f"the busiest of a layer takes {100 * e.busiest_share:.1f} % of its choices, {e.unused} unused"
        logits = f"logits {finite}finite, deviation {e.logit_deviation:.2f}"
        rows.append(("experts", f"{e.tokens} random tokens: {routes}; {logits}"))
    rows.append(("memory", f"{memory.resident / 1e9:.2f} GB resident = {memory.mapped / 1e9:.2f} weights touched + "
                 f"{memory.cache / 1e9:.3f} cache + {memory.other / 1e9:.3f} everything else, "
                 f"{memory.prefill / 1e9:.3f} during the prompt"))  # fmt: skip
    return rows


def _rates(r: BenchResult) -> str:
    p = r.prefill

    def row(name: str, rate: Spread, *cells: str) -> list[str]:
        speeds = (f"{v:.4g}" if v < 1000 else f"{v:.0f}" for v in (rate.median, rate.low, rate.high))
        return [name, *speeds, *cells]

    share = f"{100 * p.kernel_share.median:.1f}"
    rows = [row(f"prefill {p.tokens}", p.rate, "", "", "", "", share, f"{p.operation_rate.median:.0f}")]
    rows += [row(f"context {d.context}", d.rate, f"{d.bytes_per_token / 1e6:.1f}", f"{d.bandwidth.median:.2f}",
                 f"{d.read_bandwidth.median:.2f}", f"{100 * d.share.median:.0f}", f"{100 * d.bound_share.median:.1f}",
                 f"{d.attention_rate:.0f}") for d in r.decode]  # fmt: skip
    return table("speed", ("", "tok/s", "low", "high", "MB/tok", "GB/s", "of", "%", "bound", "Gop/s"), *rows)


def _notes(r: BenchResult) -> list[str]:
    """What the columns mean, and what else to know."""
    peak, ceiling = 100 * r.prefill.instruction_share.median, f"{r.decode[0].attention_ceiling:.0f} G op/s"
    notes = [
        "Decode: tokens per second after a context, bytes read per token, GB/s of the read bandwidth before each run, "
        "% of it. Bound: % of what the machine could do; prefill: its kernels run from the first-level cache, L1 (it "
        f"reaches {peak:.1f} % of the bare instructions); decode: every byte at the read bandwidth, attention at its "
        f"instruction's ceiling ({ceiling}) where that is slower. Gop/s: of all the prefill, of attention in decode."
    ]
    if (fit := linear_cost([d.context for d in r.decode], [d.rate.median for d in r.decode])) is not None:
        notes.append(f"A step costs {fit[0]:.2f} ms + {1e3 * fit[1]:.3f} us per position; the straight line is at most "
                     f"{100 * fit[2]:.1f} % off.")  # fmt: skip
    if any(d.context for d in r.decode):
        notes.append("Contexts are filled with random cache rows, not by a prefill.")
    if max(d.share.median for d in r.decode) > CACHED:
        notes.append("More than 100 % of the read bandwidth: the weights stay in the processor's caches.")
    return notes


def _prefill_stages(r: BenchResult) -> str:
    p = r.prefill

    def rates(s: StageLine) -> tuple[str, str]:
        if not s.operations:
            return "", ""
        return f"{1e-9 * s.operations / s.seconds:.0f}", f"{100 * s.bound_seconds / s.seconds:.0f}"

    title = f"prefill of {p.tokens} tokens, stage by stage; waiting at barriers in ms, mean of the threads"
    return _stages(title, ("Gop/s", "% L1"), p.stages, rates, r.repeats, r.threads)


def _decode_stages(r: BenchResult, d: Decode) -> str:
    def share(s: StageLine) -> tuple[str]:
        return (f"{1e-7 * s.bytes / s.seconds / d.read_bandwidth.median:.0f}" if s.bytes else "",)

    title = f"decoding a token at context {d.context}, stage by stage"
    return _stages(title, ("% of read",), d.stages, share, d.tokens * r.repeats, r.threads)


def _stages(
    title: str,
    header: tuple[str, ...],
    stages: list[StageLine],
    more: Callable[[StageLine], tuple[str, ...]],
    n: int,
    threads: int,
) -> str:
    """Sums over n units (tokens or prefills), per unit, and behind them all stages, so the wall time."""
    from .bench import StageLine

    sums: list[Any] = [sum(getattr(s, f) for s in stages) for f in list(StageLine.__dataclass_fields__)[1:]]
    total = StageLine("wall time", *sums)

    def row(s: StageLine) -> tuple[str, ...]:
        rate = f"{1e-9 * s.bytes / s.seconds:.2f}" if s.bytes else ""
        calls = f"{s.calls / n:g}" if s.calls and s is not total else ""
        megabytes = f"{1e-6 * s.bytes / n:.2f}" if s.bytes else ""
        wait = f"{1e3 * s.wait_sum / n / threads:.3f}" if threads > 1 and s.calls else ""
        share = f"{100 * s.seconds / total.seconds:.1f}"
        return s.stage, calls, megabytes, f"{1e3 * s.seconds / n:.3f}", share, rate, *more(s), wait

    return table(title, ("stage", "calls", "MB", "ms", "%", "GB/s", *header, "wait"), *map(row, stages), (), row(total))
