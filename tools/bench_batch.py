#!/usr/bin/env python3
"""Measure sequences that share passes: tokens per second, bytes per token, and what a long prompt costs the others.

    tools/bench_batch.py                    1 to 32 sequences, into docs/perf/batch.jsonl and a table beside it
    tools/bench_batch.py --counts 1 8       so many sequences only
    tools/bench_batch.py --model FILE       a packed file instead of the synthetic model

Random weights in DeepSeek-V2-Lite's geometry, 14 layers, q8, written to --folder and deleted afterwards. A row is the
steps after the last prompt is in, all sequences running; its repeats are spread over the whole run. Needs a quiet
machine: what other processes used meanwhile is recorded. Every answer must be the same in every row, or it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import bench_rows
import deepcalm
import jsonl
import lab
from deepcalm import _core
from deepcalm.drafting import CostModel
from deepcalm.measure.machine import Others
from deepcalm.sampling import Sampling

LITE14 = bench_rows.Model("lite14-q8", "v2-lite:14", "q8", (), 8.9, 1.4)
HOW = {"greedy": Sampling(), "top_p 0.9": Sampling(temp=1.0, top_p=0.9)}


def submit(batch: deepcalm.Batch, i: int, how: Sampling, n_tokens: int, max_tokens: int) -> deepcalm.Request:
    """Request number ``i``: its prompt and seed are the same whoever else is there."""
    ids = np.random.default_rng(i).integers(0, batch.model.n_valid, n_tokens)
    return batch.submit(ids, sampling=dataclasses.replace(how, seed=i), max_tokens=max_tokens, eos_ids=())


def decode(model: deepcalm.Model, n: int, how: Sampling, prompt: int, tokens: int) -> dict[str, Any]:
    """``tokens`` steps of ``n`` sequences after their prompts."""
    with model.batch(max_sequences=n, ctx=prompt + 2 * tokens + n, draft="off") as batch:
        requests = [submit(batch, i, how, prompt, 2 * tokens + n) for i in range(n)]
        while not all(r.choices[0].tokens for r in requests):
            batch.step()
        before, others, start = batch.stats, Others(), time.perf_counter()
        for _ in range(tokens):
            batch.step()
        seconds, (busy, stolen) = time.perf_counter() - start, others.cores()
        done = batch.stats - before
        assert done.decode_tokens == n * tokens
        return {
            "rate": n * tokens / seconds,
            "bytes_per_token": done.decode_bytes / (n * tokens),
            "bandwidth": done.decode_bytes / seconds / 1e9,
            "union": done.experts_touched / done.steps,
            "pass_share": done.pass_seconds / seconds,
            "other_cores": busy + stolen,
            "texts": [r.choices[0].tokens[:tokens] for r in requests],
        }


def predicted(model: deepcalm.Model, n: int, pos: float) -> tuple[float, float]:
    """Bytes per token, and distinct (layer, expert) pairs of a pass, of ``n`` sequences routed at random."""
    cost = CostModel.of(model.core.weight_bytes, model.config)
    weights = model.active_bytes_per_token(0)
    shared = weights + (cost.union(n) - cost.union(1)) * cost.expert
    return shared / n + model.active_bytes_per_token(int(pos)) - weights, cost.union(n)


def gaps(model: deepcalm.Model, n: int, prompt: int, tokens: int, long: int) -> dict[str, Any]:
    """Longest time between an answer's tokens, of ``n`` of them alone, and while one more prompt is computed."""
    with model.batch(max_sequences=n + 1, ctx=max(long + 8, prompt + 4 * tokens + n + long), draft="off") as batch:
        requests = [submit(batch, i, Sampling(), prompt, 4 * tokens + n + long) for i in range(n)]
        while not all(r.choices[0].tokens for r in requests):
            batch.step()
        steps: list[list[float]] = [[], []]
        late: deepcalm.Request | None = None
        while len(steps[0]) < tokens or not (late and late.choices[0].tokens):
            if late is None and len(steps[0]) == tokens:
                late = submit(batch, n, Sampling(), long, 4)
            start, seen = time.perf_counter(), [len(r.choices[0].tokens) for r in requests]
            batch.step()
            steps[late is not None].append(time.perf_counter() - start)
            assert all(len(r.choices[0].tokens) == k + 1 for r, k in zip(requests, seen, strict=True))
        before, during = (1e3 * max(s) for s in steps)
        return {"before_ms": before, "median_ms": 1e3 * statistics.median(steps[0]), "during_ms": during,
                "steps": len(steps[1]), "ratio": during / before}  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of every number, and the hash of the texts, which must be one."""
    texts = [np.array(r["texts"], np.int32) for r in runs]
    if any((t != texts[0]).any() for t in texts):
        raise SystemExit("the same sequences got different tokens in two runs")
    numbers = {k: [r[k] for r in runs] for k in runs[0] if k != "texts"}
    out: dict[str, Any] = {
        k: {"median": statistics.median(v), "low": min(v), "high": max(v)} for k, v in numbers.items()
    }
    return out | {"sha256": hashlib.sha256(texts[0].tobytes()).hexdigest()[:16]}


def markdown(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    m, one = head["machine"], {r["how"]: r["rate"]["median"] for r in rows if r["n"] == 1}
    out = [
        "# Sequences that share passes",
        "",
        f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB, {head['isa']}, {head['threads']} threads;",
        f"deepcalm {m['version']}, commit {m['commit']}. {head['name']}; prompts of {head['prompt']} tokens, answers",
        f"of {head['tokens']}; a plain read of memory: {head['read']:.1f} GB/s.",
        "",
        f"    {head['command']}",
        "",
        "Median of the repeats, lowest and highest in brackets. Predicted: bytes and distinct (layer, expert) pairs of",
        "a pass if every row chose its experts at random. Text: hash of all answers; each is the same in every row.",
        "",
        "| sequences | sampling | tok/s | of one | GB/s | MB a token | predicted | pairs a pass | predicted | text | "
        "others |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        times = f"{r['rate']['median'] / one[r['how']]:.2f}" if r["how"] in one else ""
        others = f"{r['other_cores']['high']:.2f}" if r["other_cores"]["high"] > 0.05 else ""
        out.append(
            f"| {r['n']} | {r['how']} | {bench_rows.brackets(r['rate'])} | {times} | {r['bandwidth']['median']:.1f} | "
            f"{r['bytes_per_token']['median'] / 1e6:.0f} | {r['predicted_bytes'] / 1e6:.0f} | "
            f"{r['union']['median']:.0f} | {r['predicted_union']:.0f} | {r['sha256'][:8]} | {others} |"
        )
    if g := head.get("gaps"):
        out += [
            "",
            f"Longest time between two tokens of {g['n']} answers: {g['before_ms']:.1f} ms alone (median "
            f"{g['median_ms']:.1f}), {g['during_ms']:.1f} ms while",
            f"another prompt of {g['long']} tokens is computed in {g['steps']} steps: {g['ratio']:.2f} times as long.",
        ]
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="sequences")
    parser.add_argument("--model", type=Path, help="a packed file")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt that others meet; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")), help="for the model")
    parser.add_argument("--out", type=Path, default=bench_rows.DOCS / "batch.jsonl")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path = args.model
        if path is None:
            bench_rows.check_room(args.folder, LITE14.gigabytes)
            path = stack.enter_context(bench_rows.packed(LITE14, args.folder))
        bench_rows.read_into_memory(path)
        model = deepcalm.Model(path, threads=args.threads)
        measure(model, args)
    return 0


def measure(model: deepcalm.Model, args: argparse.Namespace) -> None:
    """All rows, saved at the end."""
    head: dict[str, Any] = {
        "machine": lab.machine(), "command": "tools/bench_batch.py " + " ".join(sys.argv[1:]), "isa": model.isa,
        "threads": model.threads, "name": model.path.stem, "prompt": args.prompt, "tokens": args.tokens,
        "read": _core.read_bandwidth(model.threads), "time": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for name, how in HOW.items():
            for n in args.counts:
                r = decode(model, n, how, args.prompt, args.tokens)
                runs.setdefault((n, name), []).append(r)
                bench_rows.say(f"{n} sequences, {name}: {r['rate']:.1f} tok/s, {r['bytes_per_token'] / 1e6:.0f} MB")
    rows = []
    for (n, name), found in runs.items():
        n_bytes, union = predicted(model, n, args.prompt + args.tokens / 2)
        rows.append({"n": n, "how": name, "predicted_bytes": n_bytes, "predicted_union": union} | summary(found))
        first = runs[args.counts[0], name][0]["texts"]
        if any(a != b for a, b in zip(first, found[0]["texts"], strict=False)):
            raise SystemExit(f"{n} sequences, {name}: other tokens than in a batch of {args.counts[0]}")
    if args.long:
        head["gaps"] = {"n": 8, "long": args.long} | gaps(model, 8, args.prompt, args.tokens, args.long)
    jsonl.write(args.out, [head, *rows])
    head, *rows = jsonl.read(args.out)
    args.out.with_suffix(".md").write_text(markdown(head, rows))
    print(markdown(head, rows))


if __name__ == "__main__":
    sys.exit(main())
