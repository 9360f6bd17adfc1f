"""What ``bench`` measured, as tables for a terminal and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from rich.table import Table

    from .bench import BenchResult, Decode, Spread, StageLine


def spread(s: Spread, form: str, scale: float = 1) -> str:
    """Median (lowest - highest)."""
    return f"{scale * s.median:{form}} ({scale * s.low:{form}} - {scale * s.high:{form}})"


def linear_cost(decode: list[Decode]) -> tuple[float, float, float] | None:
    """(ms at context 0, ms per position, worst deviation as a share) of a straight line; None for fewer than 3."""
    import numpy as np

    if len(decode) < 3:
        return None
    x, y = np.array([d.context for d in decode], float), np.array([1e3 / d.rate.median for d in decode])
    # Least squares of the relative error: a long context must not drown the short ones.
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)
    return float(a), float(b), float(np.abs((a + b * x) / y - 1).max())


def text(result: BenchResult, command: str, width: int | None = None) -> str:
    """Everything as text, ``width`` columns wide (None: the terminal's, 100 where there is none)."""
    import shutil

    from rich.console import Console
    from rich.table import Table

    r, m = result, result.machine
    out = io.StringIO()
    columns = width or shutil.get_terminal_size((100, 24)).columns
    console = Console(file=out, width=max(columns, 72), color_system=None, highlight=False, emoji=False, markup=False)
    head = Table.grid(padding=(0, 2))

    def line(key: str, value: str) -> None:
        head.add_row(key, value)

    commit = f", commit {m['commit']}" if m["commit"] else ""
    threads = f"{r.threads} thread{'s' if r.threads > 1 else ''}"
    line("command", command)
    line("machine", f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB; deepcalm {m['version']}{commit}")
    line("meanwhile", f"others used {r.other_cores:.2f} cores, the hypervisor took {r.stolen_cores:.2f}")
    line("model", f"{r.file}, {r.isa}, {threads}, cache {r.kv}; median (lowest - highest) of {r.repeats}")
    one = f"; {spread(r.read_bandwidth_1, '.1f')} with one" if r.threads > 1 else ""
    line("read", f"{spread(r.read_bandwidth, '.1f')} GB/s, a plain read of memory by {threads} before every run{one}")
    rates = ", ".join(f"{k} {v:.0f}" for k, v in r.ceilings.items())
    line("ceilings", f"{rates} G operations/s of the bare instructions, {threads}")
    rates = ", ".join(f"{k} {v:.0f}" for k, v in r.kernels.items())
    line("kernels", f"{rates} G operations/s of the inner loops from the first-level cache")
    if (e := r.experts) is not None:
        finite = "" if e.finite else "NOT "
        line(
            "experts",
            f"{e.tokens} random tokens: the busiest of a layer takes {100 * e.busiest_share:.1f} % of its "
            f"choices, {e.unused} unused; logits {finite}finite, deviation {e.logit_deviation:.2f}",
        )
    line("memory", f"{r.memory.resident / 1e9:.2f} GB resident = {r.memory.mapped / 1e9:.2f} weights touched + "
                   f"{r.memory.cache / 1e9:.3f} cache + {r.memory.other / 1e9:.3f} everything else, "
                   f"{r.memory.prefill / 1e9:.3f} during the prompt")  # fmt: skip
    for part in (head, _rates(r), *_notes(r), _prefill_stages(r)):
        console.print(part)
        if not isinstance(part, str) or part == _notes(r)[-1]:
            console.print()
    for d in r.decode[:1] + r.decode[1:][-1:]:
        console.print(_decode_stages(r, d), "")
    return "\n".join(row.rstrip() for row in out.getvalue().splitlines()) + "\n"


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1),
                  pad_edge=False, show_edge=False,
                  collapse_padding=True)  # fmt: skip
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _rates(r: BenchResult) -> Table:
    p = r.prefill
    table = _table("speed", "", "tok/s", "low", "high", "MB/tok", "GB/s", "of", "%", "bound", "Gop/s")

    def row(name: str, rate: Spread, *cells: str) -> None:
        table.add_row(
            name, *(f"{v:.4g}" if v < 1000 else f"{v:.0f}" for v in (rate.median, rate.low, rate.high)), *cells
        )

    share = f"{100 * p.kernel_share.median:.1f}"
    row(f"prefill {p.tokens}", p.rate, "", "", "", "", share, f"{p.operation_rate.median:.0f}")
    for d in r.decode:
        row(f"context {d.context}", d.rate, f"{d.bytes_per_token / 1e6:.1f}", f"{d.bandwidth.median:.2f}",
            f"{d.read_bandwidth.median:.2f}", f"{100 * d.share.median:.0f}", f"{100 * d.bound_share.median:.1f}",
            f"{d.attention_rate:.0f}")  # fmt: skip
    return table


def _notes(r: BenchResult) -> list[str]:
    """What the columns mean, and what else to know."""
    peak, ceiling = 100 * r.prefill.instruction_share.median, f"{r.decode[0].attention_ceiling:.0f} G op/s"
    notes = [
        "Decode: tokens per second after a context, bytes read per token, GB/s of the read bandwidth before each run, "
        "% of it. Bound: % of what the machine could do; prefill: its kernels run from the first-level cache, L1 (it "
        f"reaches {peak:.1f} % of the bare instructions); decode: every byte at the read bandwidth, attention at its "
        f"instruction's ceiling ({ceiling}) where that is slower. Gop/s: of all the prefill, of attention in decode."
    ]
    if (fit := linear_cost(r.decode)) is not None:
        notes.append(f"A step costs {fit[0]:.2f} ms + {1e3 * fit[1]:.3f} us per position; the straight line is at most "
                     f"{100 * fit[2]:.1f} % off.")  # fmt: skip
    if any(d.context for d in r.decode):
        notes.append("Contexts are filled with random cache rows, not by a prefill.")
    if max(d.share.median for d in r.decode) > 1.1:
        notes.append("More than 100 % of the read bandwidth: the weights stay in the processor's caches.")
    return notes


def _prefill_stages(r: BenchResult) -> Table:
    p = r.prefill
    table = _table(f"prefill of {p.tokens} tokens, stage by stage; waiting at barriers in ms, mean of the threads",
                   "stage", "calls", "MB", "ms", "%", "GB/s", "Gop/s", "% L1", "wait")  # fmt: skip
    for s in [*p.stages, _total(p.stages)]:
        ops = (
            (f"{1e-9 * s.operations / s.seconds:.0f}", f"{100 * s.bound_seconds / s.seconds:.0f}")
            if s.operations
            else ("", "")
        )
        _row(table, s, p.seconds, r.repeats, r.threads, *ops)
    return table


def _decode_stages(r: BenchResult, d: Decode) -> Table:
    table = _table(f"decoding a token at context {d.context}, stage by stage",
                   "stage", "calls", "MB", "ms", "%", "GB/s", "% of read", "wait")  # fmt: skip
    for s in [*d.stages, _total(d.stages)]:
        share = f"{1e-7 * s.bytes / s.seconds / d.read_bandwidth.median:.0f}" if s.bytes else ""
        _row(table, s, d.seconds, d.tokens * r.repeats, r.threads, share)
    return table


def _total(stages: list[StageLine]) -> StageLine:
    """The last line: all stages, so the wall time."""
    from .bench import StageLine

    sums: list[Any] = [sum(getattr(s, f) for s in stages) for f in list(StageLine.__dataclass_fields__)[1:]]
    return StageLine("wall time", *sums)


def _row(table: Table, s: StageLine, seconds: float, n: int, threads: int, *more: str) -> None:
    """A line of sums over n units (tokens or prefills), per unit."""
    if s.stage == "wall time":
        table.add_section()
    rate = f"{1e-9 * s.bytes / s.seconds:.2f}" if s.bytes else ""
    calls = f"{s.calls / n:g}" if s.calls and s.stage != "wall time" else ""
    megabytes = f"{1e-6 * s.bytes / n:.2f}" if s.bytes else ""
    wait = f"{1e3 * s.wait_sum / n / threads:.3f}" if threads > 1 and s.calls else ""
    cells = (calls, megabytes, f"{1e3 * s.seconds / n:.3f}", f"{100 * s.seconds / seconds:.1f}", rate, *more, wait)
    table.add_row(s.stage, *cells)


def draw_cost(
    axes: Any, contexts: list[int], ms: list[float], fit: Sequence[float] | None, color: str, label: str
) -> None:
    """Milliseconds of a step at each context and the line of ``linear_cost`` through them, on matplotlib's axes."""
    axes.plot(contexts, ms, "o", color=color, label=label if fit is None else None)
    if fit is not None:
        line = f"{label}: {fit[0]:.2f} ms + {1e3 * fit[1]:.2f} us per position"
        axes.plot(contexts, [fit[0] + fit[1] * c for c in contexts], "-", color=color, linewidth=1, label=line)


def check_plot(path: Path) -> str:
    """The kind of image that ``path`` names by its suffix.

    Raises:
        UnsupportedError: matplotlib is not installed, or it does not know the suffix.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install 'deepcalm[plot]'") from None
    known, kind = FigureCanvasBase.get_supported_filetypes(), path.suffix[1:].lower()
    if kind not in known:
        raise UnsupportedError(f"{path}: no image format {path.suffix!r}; matplotlib knows {', '.join(sorted(known))}")
    return kind


def plot(results: list[BenchResult], path: Path, kind: str) -> None:
    """Achieved against bound per context, and the cost of a step against the context, as an image of this kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, r in enumerate(results):
        x, color = [d.context for d in r.decode], f"C{i}"
        label = f"{r.threads} thread{'s' if r.threads > 1 else ''}"
        left.plot(x, [d.rate.median for d in r.decode], "o-", color=color, label=f"achieved, {label}")
        left.plot(x, [d.bound_rate for d in r.decode], "--", color=color, label=f"bound, {label}")
        draw_cost(right, x, [1e3 / d.rate.median for d in r.decode], linear_cost(r.decode), color, label)
    left.set(xlabel="context, positions", ylabel="tokens per second", title="decode against its bound")
    right.set(xlabel="context, positions", ylabel="ms per token", title="cost of a step")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    first = results[0]
    figure.suptitle(
        f"{Path(first.file).name}, {first.isa}, cache {first.kv}: {first.machine['processor']}", fontsize=10
    )
    figure.savefig(path, dpi=120, format=kind)
