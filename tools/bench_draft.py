#!/usr/bin/env python3
"""What drafting with the MTP layer gains: acceptance per kind of text, counted bytes, and on a quiet machine speed.

    tools/bench_draft.py --texts documents.json.xz --counts              acceptance and bytes, whatever the load
    tools/bench_draft.py --texts documents.json.xz --slice glm4.dcalm    also speed; --slice: files of make_synthetic.py

Texts: {source: [text, ...]} as JSON, plain or xz. Prompts are the first 40 tokens of a document, 120 new tokens each,
greedy, with the demo model. Timed parts refuse to run when other processes use the machine (--max-load). Writes
docs/perf/draft.json and draft.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import os
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepcalm
from deepcalm import _core
from deepcalm.bench import bench_draft

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, PAIRS = 40, 120, 21


def load_texts(path: Path) -> dict[str, list[str]]:
    data = path.read_bytes()
    texts: dict[str, list[str]] = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    return texts


def run(model: deepcalm.Model, ids: list[int], draft: str | int, new: int = NEW) -> tuple[list[int], Any, int]:
    """(tokens, draft statistics, bytes read after the prompt)."""
    session = model.session(mtp=draft != "off")
    session.prefill(ids)
    before = session.stats
    generation = session.generate(max_tokens=new, draft=draft)
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
                "acceptance": total["accepted"] / total["drafted"],
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


def auto_against_off(model: deepcalm.Model, ids: list[int], limit: float) -> dict[str, Any]:
    """Seconds and bytes of "auto" over those of "off" in interleaved pairs; a bootstrap interval of the median."""
    times, read = [], []
    for i in range(PAIRS):
        quiet(limit)
        pair = {}
        for draft in ("off", "auto") if i % 2 else ("auto", "off"):
            _, stats, n_bytes = run(model, ids, draft, 256)
            pair[draft] = stats.seconds, n_bytes
        times.append(pair["auto"][0] / pair["off"][0])
        read.append(pair["auto"][1] / pair["off"][1])
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(times, k=PAIRS)) for _ in range(2000))
    return {"file": model.path.name, "seconds": statistics.median(times), "interval": [medians[50], medians[1949]],
            "bytes": statistics.median(read), "bytes_worst": max(read)}  # fmt: skip


def markdown(r: dict[str, Any]) -> str:
    lines = [f"# Drafting\n\n{r['machine']}, commit {r['commit']}, `{r['command']}`.\n"]
    lines += [
        f"Demo model, greedy, {NEW} tokens after {PROMPT} held-out ones. Bytes: plain over drafted, counted.\n",
        "| text | K | prompts | accepted | by position | tokens a pass | bytes gain | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for a in r["acceptance"]:
        by = " / ".join(f"{x:.2f}" for x in a["by_position"])
        lines.append(f"| {a['source']} | {a['k']} | {a['prompts']} | {100 * a['acceptance']:.1f} % | {by} | "
                     f"{a['tokens_per_pass']:.2f} | {a['bytes_gain']:.3f} | "
                     f"{a['identical']} of {a['prompts']} |")  # fmt: skip
    first = [a for a in r["acceptance"] if a["k"] == 1]
    total, drafted = (sum(a[key] for a in first) for key in ("accepted", "drafted"))
    lines.append(f"\nAll texts, K = 1: {total} of {drafted} drafts accepted ({100 * total / drafted:.1f} %).")
    if not r["speed"]:
        lines.append("\nSpeed has not been measured in this run (`--counts`).")
    else:
        lines += ["\n| file | K | accepted | speedup (lowest - highest) | predicted | error | read GB/s |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in r["speed"]:
        m, error = s["speedup"], 100 * (s["predicted"] / s["speedup"]["median"] - 1)
        lines.append(f"| {Path(s['file']).name} | {s['k']} | {100 * s['acceptance']:.1f} % | "
                     f"{m['median']:.3f} ({m['low']:.3f} - {m['high']:.3f}) | {s['predicted']:.3f} | "
                     f"{error:+.1f} % | {s['read_bandwidth']['median']:.1f} |")  # fmt: skip
    for a in r["auto"]:
        low, high = a["interval"]
        lines.append(f"\n{a['file']}: auto takes {a['seconds']:.3f} of the time without drafts "
                     f"(95 %: {low:.3f} - {high:.3f}) and {a['bytes']:.3f} of the bytes.")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--slice", type=Path, action="append", default=[], help="packed file for the timed part")
    parser.add_argument("--counts", action="store_true", help="nothing timed")
    parser.add_argument("--prompts", type=int, default=18, help="per source")
    parser.add_argument("--max-load", type=float, default=2.5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "perf")
    args = parser.parse_args()
    demo, texts = deepcalm.Model(deepcalm.demo_path()), load_texts(args.texts)
    speed: list[dict[str, Any]] = []
    auto: list[dict[str, Any]] = []
    if not args.counts:
        first = prompts_of(demo, next(iter(texts.values())), 1)[0]
        for model in [demo, *map(deepcalm.Model, args.slice)]:
            quiet(args.max_load)
            own: Any = first if model is demo else None
            for accept in (None,) if model is demo else (0.6, 0.8, 0.9):
                for k in (1, 2, 3):
                    speed.append(dataclasses.asdict(bench_draft(model, k, accept, prompt=own)))
            auto.append(auto_against_off(model, own or list(range(5, 45)), args.max_load))
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    git = subprocess.run(head, capture_output=True, text=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    result = {
        "machine": f"{cpu}, {demo.threads} threads, {demo.isa}",
        "commit": git.stdout.strip(),
        "command": "tools/bench_draft.py" + (" --counts" if args.counts else ""),
        "read_bandwidth": None if args.counts else _core.read_bandwidth(demo.threads, 1024, 3),
        "acceptance": acceptance(demo, texts, args.prompts),
        "speed": speed,
        "auto": auto,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "draft.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "draft.md").write_text(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
