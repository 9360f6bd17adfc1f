#!/usr/bin/env python3
"""What drafting with the MTP layer gains: acceptance per kind of text and counted bytes; on a quiet machine, speed.

    tools/bench_draft.py counts --texts documents.json.xz      acceptance and bytes, whatever the load
    tools/bench_draft.py speed --slice glm.dcalm ...           gain, predicted and measured: demo model and these files
    tools/bench_draft.py auto --slice glm.dcalm ...            "auto" against "off" in interleaved pairs

Each part replaces its own in docs/perf/draft.jsonl, from which draft.md is written. Texts: {source: [text, ...]} as
JSON, plain or xz; prompts are the first 40 tokens of a document, 120 new tokens each, greedy, with the demo model.
Timed parts refuse to run when other processes use the machine (--max-load). Slices: `deepcalm bench --synthetic`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import lzma
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepcalm
import jsonl
import lab
from deepcalm import drafting
from deepcalm.measure.drafts import bench_draft

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, PAIRS, PAIR_SECONDS = 40, 120, 21, 100


def load_texts(path: Path) -> dict[str, list[str]]:
    data = path.read_bytes()
    texts: dict[str, list[str]] = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    return texts


def run(
    model: deepcalm.Model, ids: list[int], draft: str | int, new: int = NEW, **options: Any
) -> tuple[list[int], Any, int]:
    """(tokens, draft statistics, bytes read after the prompt)."""
    session = model.session(mtp=draft != "off")
    session.prefill(ids)
    before = session.stats
    generation = session.generate(max_tokens=new, draft=draft, **options)
    tokens = list(generation)
    done = session.stats - before
    return tokens, generation.drafts.stats, done.weight_bytes + done.cache_bytes


def prompts_of(model: deepcalm.Model, texts: list[str], n: int) -> list[list[int]]:
    ids = (model.encode(t) for t in texts)
    return [i[:PROMPT] for i in ids if len(i) > PROMPT][:n]


def acceptance(model: deepcalm.Model, texts: dict[str, list[str]], n: int) -> list[dict[str, Any]]:
    """Per source and K: drafts accepted by position, tokens a pass, bytes against plain decoding, same text or not."""
    rows = []
    for source, documents in texts.items():
        prompts = prompts_of(model, documents, n)
        plain = [run(model, ids, "off") for ids in prompts]
        for k in (1, 2, 3):
            drafted = [run(model, ids, k) for ids in prompts]
            total: dict[str, Any] = {f: sum(getattr(d[1], f) for d in drafted) for f in ("drafted", "accepted")}
            tokens, rounds = (sum(getattr(d[1], f) for d in drafted) for f in ("tokens", "rounds"))
            offered, taken = ([sum(getattr(d[1], f)[j] for d in drafted) for j in range(1, k + 1)]
                              for f in ("offered", "taken"))  # fmt: skip
            row = {
                "source": source, "k": k, "prompts": len(prompts), **total,
                "by_position": [t / max(o, 1) for t, o in zip(taken, offered, strict=True)],
                "tokens_per_pass": tokens / rounds,
                "bytes_gain": sum(p[2] for p in plain) / sum(d[2] for d in drafted),
                "identical": sum(p[0] == d[0] for p, d in zip(plain, drafted, strict=True)),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def quiet(limit: float) -> None:
    if os.getloadavg()[0] > limit:
        raise SystemExit(f"load {os.getloadavg()[0]:.1f}, at most {limit} wanted: others use the machine (or --counts)")


def auto_against_off(model: deepcalm.Model, ids: list[int], new: int, limit: float) -> dict[str, Any]:
    """Seconds and bytes of "auto" over those of "off" in interleaved pairs; a bootstrap interval of the median.

    One pair's noise is several times what is to be seen: at least PAIRS, and as many as fit into PAIR_SECONDS.
    """
    times: list[float] = []
    read: list[float] = []
    for draft in ("off", "auto"):  # first touch
        run(model, ids, draft, new, eos_ids=[])
    start = time.perf_counter()
    while (i := len(times)) < PAIRS or time.perf_counter() - start < PAIR_SECONDS:
        quiet(limit)
        pair = {}
        for draft in ("off", "auto") if i % 2 else ("auto", "off"):
            _, stats, n_bytes = run(model, ids, draft, new, eos_ids=[])
            pair[draft] = stats.seconds / stats.tokens, n_bytes
        times.append(pair["auto"][0] / pair["off"][0])
        read.append(pair["auto"][1] / pair["off"][1])
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(times, k=len(times))) for _ in range(2000))
    return {"file": model.path.name, "threads": model.threads, "pairs": len(times), "tokens": new,
            "seconds": statistics.median(times), "interval": [medians[50], medians[1949]], "ratios": times,
            "bytes": statistics.median(read), "bytes_worst": max(read)}  # fmt: skip


def counts_text(head: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Acceptance and bytes\n", source(head),
        f"Demo model, greedy, {NEW} tokens after {PROMPT} held-out ones. Bytes gain: plain over drafted, counted.",
        "K is fixed: no controller decides.\n",
        "| text | K | prompts | accepted | by position | tokens a pass | bytes gain | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for a in rows:
        by = " / ".join(f"{x:.2f}" for x in a["by_position"])
        accepted = f"{100 * a['accepted'] / a['drafted']:.1f} %"
        lines.append(f"| {a['source']} | {a['k']} | {a['prompts']} | {accepted} | {by} | "
                     f"{a['tokens_per_pass']:.2f} | {a['bytes_gain']:.3f} | "
                     f"{a['identical']} of {a['prompts']} |")  # fmt: skip
    first = [a for a in rows if a["k"] == 1]
    total, drafted = (sum(a[key] for a in first) for key in ("accepted", "drafted"))
    return [*lines, f"\nAll texts, K = 1: {total} of {drafted} drafts accepted ({100 * total / drafted:.1f} %).\n"]


def speed_text(head: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Gain, predicted and measured\n", source(head),
        "Drafted over plain speed on the same greedy text, median (lowest - highest) of interleaved repeats.",
        "Predicted: from the times of plain steps and of rounds whose drafts are all right, and the acceptance met.",
        "`accept`: every draft is the known next token, spoiled with probability 1 - accept, while the MTP layer runs",
        "for real; own: its own drafts. K is fixed: no controller decides.\n",
        "![gain predicted from bytes; measured against predicted](../drafting.svg)\n",
        "| file | threads | K | accept | met | tokens a pass | experts a pass, plain -> drafted | gain by bytes | "
        "predicted | measured | error | read GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for s in rows:
        m, bandwidth = s["speedup"], s["read_bandwidth"]
        lines.append(
            f"| {Path(s['file']).name} | {s['threads']} | {s['k']} | {s['accept'] or 'own'} | {s['acceptance']:.2f} | "
            f"{s['tokens_per_pass']:.2f} | {s['plain_experts']:.1f} -> {s['experts_per_pass']:.1f} | "
            f"{s['predicted_bytes']:.3f} | {s['predicted']:.3f} | {m['median']:.3f} ({m['low']:.3f} - "
            f"{m['high']:.3f}) | {100 * (s['predicted'] / m['median'] - 1):+.1f} % | {bandwidth['median']:.1f} |"
        )
    errors = [abs(s["predicted"] / s["speedup"]["median"] - 1) for s in rows]
    return [*lines, f"\nPrediction and measurement are {100 * statistics.median(errors):.1f} % apart in the median of "
            f"the {len(errors)} rows, {100 * max(errors):.1f} % at worst.\n"]  # fmt: skip


def auto_text(head: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    then, now = head["controller"], controller()
    changed = [", ".join(f"{k} {v:g}" for k, v in a.items() if b.get(k) != v) for a, b in ((then, now), (now, then))]
    state = "The controller is the present one." if then == now else (
        f"With an older controller, that of the commit; the present one was not measured so. Then: {changed[0]}. "
        f"Now: {changed[1]}. [notebook.md](notebook.md) has both, simulated.")  # fmt: skip
    lines = ["## auto against off\n", source(head), "Time and bytes of `--draft auto` over `--draft off`, greedy.",
             f"{state}\n",
             "| file | threads | pairs | tokens | time: median | 95 % interval of the median | bytes: median | worst |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for a in rows:
        lines.append(f"| {a['file']} | {a['threads']} | {a['pairs']} | {a['tokens']} | {a['seconds']:.3f} | "
                     f"{a['interval'][0]:.3f} - {a['interval'][1]:.3f} | {a['bytes']:.3f} | "
                     f"{a['bytes_worst']:.3f} |")  # fmt: skip
    return [*lines, ""]


def controller() -> dict[str, float]:
    """The constants that decide what "auto" does with one sequence, by name."""
    sources = map(inspect.getsource, (drafting.Controller, drafting.Kind, drafting.Acceptance))
    read = {n.id for text in sources for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    found = vars(drafting).items()
    return {k: v for k, v in found if k in read and isinstance(v, int | float) and k != "MAX_DRAFT"}


def source(head: dict[str, Any]) -> str:
    """Where a part's figures come from."""
    load = head["load"]
    loads = "" if load is None else f"; load average {load[0]:.1f} before, {load[1]:.1f} after"
    return f"{head['machine']}, commit {head['commit']}, `{head['command']}`{loads}.\n"


PARTS = {"counts": counts_text, "speed": speed_text, "auto": auto_text}


def markdown(lines: list[dict[str, Any]]) -> str:
    """The tables of the measurements' file: first a line that says where each part is from, then each part's rows."""
    head, *rows = lines
    texts = [text(head[part], [r for r in rows if r["part"] == part]) for part, text in PARTS.items() if part in head]
    return "# Drafting\n\n" + "\n".join(line for text in texts for line in text)


def machine() -> str:
    m = lab.machine()
    return f"{m['processor']}, {m['cores']} cores, {deepcalm.Model(deepcalm.demo_path()).isa}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--texts", type=Path, help="held-out texts; timed parts take a prompt from the first")
    parser.add_argument("--slice", type=Path, action="append", default=[], help="packed file for the timed parts")
    parser.add_argument("--prompts", type=int, default=18, help="per source")
    parser.add_argument("--repeats", type=int, default=7, help="of every row of `speed`")
    parser.add_argument("--tokens", type=int, default=256, help="of every run of `auto` with the demo model")
    parser.add_argument("--threads", type=int, nargs="+", default=[0], help="each in turn; default: one per core")
    parser.add_argument("--max-load", type=float, default=2.5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "perf")
    args = parser.parse_args()
    if args.part == "counts" and args.texts is None:
        parser.error("counts needs --texts")
    demo = deepcalm.Model(deepcalm.demo_path(), threads=args.threads[0] or None)
    opening = "Once upon a time there was a little girl who lived in a house near the sea, and every morning she walked"
    prompt = prompts_of(demo, next(iter(load_texts(args.texts).values())), 1)[0] if args.texts else demo.encode(opening)
    load = None if args.part == "counts" else [os.getloadavg()[0]]
    rows: list[dict[str, Any]] = []
    if args.part == "counts":
        rows = acceptance(demo, load_texts(args.texts), args.prompts)
    timed = () if args.part == "counts" else itertools.product([None, *args.slice], args.threads)
    for path, threads in timed:
        model = deepcalm.Model(path or deepcalm.demo_path(), threads=threads or None)
        ids = prompt if path is None else list(range(5, 45))
        quiet(args.max_load)
        if args.part == "auto":
            rows.append(auto_against_off(model, ids, args.tokens if path is None else 128, args.max_load))
            print(json.dumps(rows[-1]), file=sys.stderr)
            continue
        for k, accept in itertools.product((1, 2, 3), (None, 0.8) if path is None else (0.6, 0.8, 0.9)):
            quiet(args.max_load)
            result = bench_draft(model, k, accept, ids, 128 if path is None else 48, args.repeats)
            rows.append(dataclasses.asdict(result) | {"file": Path(result.file).name})
            print(json.dumps(rows[-1]), file=sys.stderr)
    words = ["tools/bench_draft.py", args.part, *(f"--slice {p.name}" for p in args.slice)]
    words += ["--threads", *map(str, args.threads)] if any(args.threads) else []
    part = {"machine": machine(), "commit": lab.commit(), "command": " ".join(words),
            "load": None if load is None else [*load, os.getloadavg()[0]], "controller": controller()}  # fmt: skip
    path = args.out / "draft.jsonl"
    head, *others = jsonl.read(path) or [{}]
    others = [r for r in others if r["part"] != args.part]
    jsonl.write(path, [head | {args.part: part}, *others, *({"part": args.part} | r for r in rows)])
    path.with_suffix(".md").write_text(markdown(jsonl.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
