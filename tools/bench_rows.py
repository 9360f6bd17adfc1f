#!/usr/bin/env python3
"""Measure every CPU row of the project's performance table: models x formats x threads x contexts.

    tools/bench_rows.py                        all of it, into docs/perf/rows.jsonl and a table beside it
    tools/bench_rows.py --quick                2 repeats, 8 tokens, contexts 0 and 4096
    tools/bench_rows.py --only lite27-q8       one model; may be given several times
    tools/bench_rows.py --dry-run              what would run, disk, memory and about how long

Random weights in the true geometry, written to --folder before a model's runs and deleted after them. Every run is
saved when it is done: the same command goes on where it stopped, --again measures anew. Needs a quiet machine: what
other processes used meanwhile is recorded, and shown where it exceeds 0.05 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import deepcalm
import jsonl
import lab
from deepcalm.measure import synthetic
from deepcalm.measure.bench import BenchResult, bench
from deepcalm.measure.report import linear_cost

DOCS = Path(__file__).resolve().parent.parent / "docs" / "perf"
V3_SLICE = ("first_k_dense_replace=1", "vocab_size=16384", "num_nextn_predict_layers=0")


@dataclass(frozen=True, slots=True)
class Model:
    """A synthetic model in one pure format: attention and head like the rest."""

    name: str
    spec: str
    dtype: str
    overrides: tuple[str, ...] = ()
    gigabytes: float = 0.0  # of the packed file, for the plan
    active: float = 0.0  # GB that a token reads, for the plan
    long: bool = False  # also 16384 positions, with all threads

    def write(self, path: Path) -> int:
        return synthetic.write_model(path, self.spec, self.dtype, attn_dtype=self.dtype, head_dtype=self.dtype,
                                     overrides=self.overrides)  # fmt: skip


MODELS = (
    Model("lite27-q8", "v2-lite", "q8", (), 16.9, 2.6, True),
    Model("lite27-q4", "v2-lite", "q4", (), 9.1, 1.4, True),
    Model("lite8-bf16", "v2-lite:8", "bf16", (), 9.5, 1.75),
    Model("lite8-f8", "v2-lite:8", "f8", (), 4.9, 0.9),
    Model("v3s-q4", "v3:2", "q4", V3_SLICE, 7.3, 0.8),
)


class Results:
    """Rows in a file of JSON lines, saved one by one: first the head (what holds for all), then a row and its key."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        lines = jsonl.read(path)
        self.head: dict[str, Any] = lines[0] if lines and not again else {}
        self.rows = {} if again else {row["key"]: row for row in lines[1:]}

    def has(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Saves a row, and reads it as whoever opens the file will."""
        self.rows[key] = jsonl.rounded({"key": key} | row)
        jsonl.write(self.path, [self.head, *self.rows.values()])


@contextlib.contextmanager
def packed(model: Model, folder: Path) -> Iterator[Path]:
    """The model's file while the block runs; a kept one is used and stays."""
    path = folder / f"{model.name}.dcalm"
    kept = path.exists()
    if not kept:
        start = time.monotonic()
        n = model.write(path)
        say(f"{path.name}: {n / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")
    try:
        yield path
    finally:
        if not kept:
            path.unlink(missing_ok=True)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def read_into_memory(path: Path) -> None:
    """Reads a file once, so that the page cache holds it."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def evict(path: Path) -> None:
    """Asks the kernel to forget a file's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def first_token(path: Path, threads: int) -> list[float]:
    """Seconds from the start of `deepcalm generate -n 1` to its end, three times, the file in the page cache."""
    command = [sys.executable, *f"-m deepcalm generate -n 1 -q --threads {threads} -m".split(), str(path)]
    env = {**os.environ, "PYTHONPATH": str(Path(deepcalm.__file__).parent.parent)}
    out = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*command, "the"], check=True, capture_output=True, env=env)
        out.append(time.perf_counter() - start)
    return out


def check_room(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes + 1:
        raise SystemExit(f"{folder}: {gigabytes:.0f} GB needed, {free:.0f} GB free")


def plan(args: argparse.Namespace) -> list[tuple[Model, int, str, list[int]]]:
    """(model, threads, cache type, contexts) of every run, model after model."""
    runs = []
    for m in MODELS:
        if args.only and m.name not in args.only:
            continue
        for threads in args.threads:
            contexts = [0, 4096] if args.quick else [0, 1024, 4096]
            if m.long and threads == max(args.threads) and not args.quick:
                contexts.append(16384)
            runs.append((m, threads, "f16", contexts))
            if m.name.startswith("lite27") and not args.quick:
                runs.append((m, threads, "bf16", [4096]))
    return runs


def estimate(m: Model, threads: int, contexts: list[int], repeats: int, tokens: int) -> float:
    """Seconds of a run at 12 GB/s and 150 G operations/s per thread, attention at 60."""
    step = m.active / (12 * threads)
    decode = sum(step + c * 27 * 35e3 / (60e9 * threads) for c in contexts) * tokens
    prefill = 512 * m.active * 2 / (0.15e3 * threads)
    return (repeats + 1) * (decode + prefill + 1.5 * (len(contexts) + 1)) + 6


def goal_seconds(gigabytes: float, read: float, operations: float, ceiling: float, kv: str) -> float:
    """Of a step at 90 % of the read (GB/s), attention (1e9 operations) at 65 % of f32's ceiling, or 60 % of bf16's."""
    return gigabytes / (0.90 * read) + operations / (ceiling * (0.60 if kv == "bf16" else 0.65))


def of_goal(d: dict[str, Any], kv: str) -> float:
    """Speed of a decode row over the goal's."""
    steps = next(s["calls"] for s in d["stages"] if s["stage"] == "head")
    attention = next(s for s in d["stages"] if s["stage"] == "attention")
    weights = d["bytes_per_token"] - attention["bytes"] / steps
    operations = d["attention_rate"] * attention["seconds"] / steps  # 1e9 of a step
    read = d["read_bandwidth"]["median"]
    return float(goal_seconds(1e-9 * weights, read, operations, d["attention_ceiling"], kv) * d["rate"]["median"])


def markdown(results: Results) -> str:
    """The rows as a table."""
    rows = list(results.rows.values())
    first = rows[0]
    m = first["machine"]
    commits = ", ".join(sorted({r["machine"]["commit"] for r in rows}))
    out = [
        "# CPU: every row of the performance table",
        "",
        f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB, {first['isa']}; deepcalm {m['version']}, commit",
        f"{commits}. Random weights in the true geometry, one format for all matrices (router f32, embedding bf16):",
        "lite27 is DeepSeek-V2-Lite, lite8 its first 8 layers, v3s a dense and a MoE layer of DeepSeek-V3 with 16384",
        "tokens of vocabulary. Contexts are filled with random cache rows.",
        "",
        f"    {results.head['command']}",
        "",
        "Median of the repeats, lowest and highest in brackets. Read: a plain read of memory by as many threads",
        "before every run. Bound of decode: every byte at the read bandwidth, attention at its instruction's ceiling",
        "where that is slower; of prefill: the same kernels run from the first-level cache. Goal: the speed at which",
        "weights take 1/0.90 of that read and attention 1/0.65 of the f32 instruction (bf16 cache: 1/0.60 of bf16's).",
        "Others: cores that other processes used, or the hypervisor took, during the whole run, where more than 0.05.",
        "",
        "| model | threads | cache | context | tok/s | GB/s | read | % of read | % of bound | % of goal | attn Gop/s | "
        "% of instruction | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lost = r["other_cores"] + r["stolen_cores"]
        others = f"{lost:.2f}" if lost > 0.05 else ""
        for d in r["decode"]:
            s = d["share"]
            out.append(
                f"| {r['name']} | {r['threads']} | {r['kv']} | {d['context']} | {brackets(d['rate'])} | "
                f"{d['bandwidth']['median']:.2f} | {d['read_bandwidth']['median']:.2f} | {100 * s['median']:.0f} "
                f"({100 * s['low']:.0f} - {100 * s['high']:.0f}) | {100 * d['bound_share']['median']:.0f} | "
                f"{100 * of_goal(d, r['kv']):.0f} | {d['attention_rate']:.0f} | "
                f"{100 * d['attention_rate'] / d['attention_ceiling']:.0f} | {others} |"
            )
    out += ["", "| model | threads | prefill tok/s | Gop/s | % of the kernels from L1 | % of the instructions |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        if r["kv"] == "f16":
            p = r["prefill"]
            out.append(
                f"| {r['name']} | {r['threads']} | {brackets(p['rate'])} | {p['operation_rate']['median']:.0f} | "
                f"{100 * p['kernel_share']['median']:.0f} | {100 * p['instruction_share']['median']:.0f} |"
            )
    out += [
        "",
        "| model | threads | ms per step | us per position | off a straight line by | MB besides weights and cache | "
        "during the prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["linear"]:
            a, b, off = r["linear"]
            other, prefill = (r["memory"][k] / 1e6 for k in ("other", "prefill"))
            out.append(
                f"| {r['name']} | {r['threads']} | {a:.2f} | {1e3 * b:.3f} | {100 * off:.1f} % | {other:.0f} | "
                f"{prefill:.0f} |"
            )
    out += ["", "![cost of a step against the context](rows.png)"]
    out += ["", "| model | threads | GB | process start to first token, s |", "|---|---|---|---|"]
    for r in rows:
        if r["first_token"]:
            seconds = ", ".join(f"{s:.2f}" for s in r["first_token"])
            out.append(f"| {r['name']} | {r['threads']} | {r['file_bytes'] / 1e9:.1f} | {seconds} |")
    return "\n".join(out) + "\n"


def plot(results: Results, path: Path) -> None:
    """Milliseconds of a decode step against the context, f16 cache, with the lines through them; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"{path.name} not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    rows = [r for r in results.rows.values() if r["linear"]]
    threads = sorted({r["threads"] for r in rows})
    for axes, t in zip(figure.subplots(1, len(threads), squeeze=False)[0], threads, strict=True):
        for i, r in enumerate(r for r in rows if r["threads"] == t):
            contexts, ms = [d["context"] for d in r["decode"]], [1e3 / d["rate"]["median"] for d in r["decode"]]
            lab.draw_cost(axes, contexts, ms, r["linear"], f"C{i}", r["name"])
        axes.set(xlabel="context, positions", ylabel="ms per token", title=f"{t} thread{'s' if t > 1 else ''}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def brackets(s: dict[str, float]) -> str:
    return f"{s['median']:.2f} ({s['low']:.2f} - {s['high']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="\n".join((__doc__ or "").splitlines()), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=[m.name for m in MODELS], help="these models")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")), help="for the models")
    parser.add_argument("--out", type=Path, default=DOCS / "rows.jsonl")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.tokens = args.tokens or (8 if args.quick else 24)
    results = Results(args.out, args.again)
    runs = [r for r in plan(args) if not results.has(key(*r[:3]))]
    seconds = sum(estimate(m, t, c, args.repeats, args.tokens) for m, t, _, c in runs)
    seconds += sum(2.5 * m.gigabytes for m in {m for m, *_ in runs})
    say(f"{len(runs)} runs, about {seconds / 60:.0f} minutes")
    if args.dry_run:
        for m, threads, kv, contexts in runs:
            say(f"{key(m, threads, kv)}: {m.gigabytes:.1f} GB, contexts {contexts}, "
                f"about {estimate(m, threads, contexts, args.repeats, args.tokens):.0f} s")  # fmt: skip
        return 0
    results.head["command"] = f"tools/bench_rows.py --repeats {args.repeats} --tokens {args.tokens}" + (
        " --quick" if args.quick else "")  # fmt: skip
    for m in dict.fromkeys(m for m, *_ in runs):
        if not (args.folder / f"{m.name}.dcalm").exists():
            check_room(args.folder, m.gigabytes)
        with packed(m, args.folder) as path:
            read_into_memory(path)
            for _, threads, kv, contexts in (r for r in runs if r[0] is m):
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # memory is read: nothing of the last run
                    r = fresh.submit(run, path, threads, contexts, args.tokens, args.repeats, kv).result()
                row = dataclasses.asdict(r) | {
                    "first_token": first_token(path, threads) if kv == "f16" else [],
                    "file_bytes": path.stat().st_size,
                    "name": m.name,
                    "file": path.name,
                    "linear": linear_cost([d.context for d in r.decode], [d.rate.median for d in r.decode]),
                }
                results.add(key(m, threads, kv), row | {"time": time.strftime("%Y-%m-%d %H:%M")})
                args.out.with_suffix(".md").write_text(markdown(results))
                plot(results, args.out.with_suffix(".png"))
                best = ", ".join(f"{d.context}: {d.rate.median:.2f} ({100 * d.share.median:.0f} %)" for d in r.decode)
                say(f"{key(m, threads, kv)}: prefill {r.prefill.rate.median:.0f} tok/s "
                    f"({100 * r.prefill.kernel_share.median:.0f} %); {best}")  # fmt: skip
    return 0


def run(path: Path, threads: int, contexts: list[int], tokens: int, repeats: int, kv: str) -> BenchResult:
    model = deepcalm.Model(path, threads=threads)
    return bench(model, 512, contexts, tokens, repeats, kv, random_weights=True)


def key(m: Model, threads: int, kv: str) -> str:
    return f"{m.name} T={threads} {kv}"


if __name__ == "__main__":
    sys.exit(main())
