#!/usr/bin/env python3
"""What each drafter is good for: acceptance, counted bytes and time, by kind of text; and of a second model.

    tools/bench_drafters.py --checkpoint DIR --out docs/perf/zen4

Texts: tests/data. Models: the demo model; random mixtures of experts, small, in about the proportions of V2-Lite and V3
that are taken to write the same texts; and the demo model in f32, packed from its checkpoint DIR, for which a copy in
q4 drafts. Bytes are exact whatever the load ("auto" is told times that go with them); times are ratios of interleaved
runs and want a quiet machine. Writes drafters.jsonl and, from it, drafters.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import textwrap
import time
import tracemalloc
from array import array
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import deepcalm
import jsonl
import lab
from deepcalm import drafters
from deepcalm.files import packed
from deepcalm.measure import drafts, synthetic

TEXTS = ("records.json", "edits.txt", "quotes.txt", "stories.txt", "books.txt")
KS = (1, 2, 3, 5, 7, "auto")
OWN = "its own"  # text
MOST = {"demo": 2500}  # tokens of each text; 600 where a token takes longer
# Narrow: a token reads some 10 MB, and of them routed experts about the share that they have in the real model.
SLICES: dict[str, tuple[str, dict[str, Any]]] = {
    "V2-Lite": ("v2-lite:6", {"hidden_size": 256, "num_attention_heads": 2, "kv_lora_rank": 64,
                              "intermediate_size": 1376, "moe_intermediate_size": 192}),
    "deeper": ("v2-lite:18", {"hidden_size": 512, "num_attention_heads": 4, "kv_lora_rank": 128,
                              "intermediate_size": 2752, "moe_intermediate_size": 352}),
    "V3": ("v3:6", {"hidden_size": 256, "num_attention_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 32,
                    "intermediate_size": 672, "moe_intermediate_size": 96, "first_k_dense_replace": 1,
                    "num_nextn_predict_layers": 0}),
}  # fmt: skip


def slices(demo: deepcalm.Model, folder: Path) -> Iterator[Path]:
    """Random models with the demo model's tokenizer."""
    with packed.PackedFile(demo.path) as file:
        made = (file.tokenizer_file("tokenizer.json") or b"").decode(), dict(demo.tokenizer_config)
    synthetic.make_tokenizer = lambda *_: made
    keys = {"vocab_size": "vocab_size", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_ids"}
    for name, (spec, sizes) in SLICES.items():
        own = sizes | {key: demo.config[of] for key, of in keys.items()}
        synthetic.write_model(folder / name, spec, overrides=[f"{k}={json.dumps(v)}" for k, v in own.items()])
        yield folder / name


Job = tuple[str, Path, str, Path | None, tuple[int | str, ...], tuple[str, ...]]


def jobs(demo: deepcalm.Model, folder: Path, checkpoint: Path | None) -> Iterator[Job]:
    """(model, its file, drafter, its file, drafts a round, texts)."""
    files = {"demo": demo.path} | {path.name: path for path in slices(demo, folder)}
    for name in ("demo", "V2-Lite", "V3"):
        yield name, files[name], "ngram", None, KS if name == "demo" else (1, 3, "auto"), TEXTS
    yield "demo", demo.path, "mtp", None, (1,), TEXTS
    yield "demo", demo.path, "mtp,ngram", None, ("auto",), TEXTS
    yield "deeper", files["deeper"], "model:demo", demo.path, KS[:-1], ("stories.txt",)
    if checkpoint is not None:
        for dtype in ("f32", "q4"):
            deepcalm.pack(checkpoint, folder / dtype, dtype=dtype)
        yield "demo in f32", folder / "f32", "model:demo in q4", folder / "q4", KS[:-1], (OWN,)


def measure(demo: deepcalm.Model, job: Job, done: list[dict[str, Any]], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each text and number of drafts, unless it is there."""
    name, path, drafter, other, ks, texts = job
    model = deepcalm.Model(path, threads=demo.threads)
    for text, k in product(texts, ks):
        key = {"model": name, "drafter": drafter, "text": text, "k": k}
        if any(key.items() <= row.items() for row in done):
            continue
        ids = demo.encode((lab.ROOT / "tests/data" / (TEXTS[3] if text == OWN else text)).read_text(), bos=True)
        how: drafts.Options = {"drafter": f"model:{other}" if other else drafter, "steady": not other}
        prompt: Any = ids[:64] if text == OWN else 128
        if text != OWN:
            how["text"] = ids[: MOST.get(name, 600)]
        r = drafts.bench_draft(model, k, None, prompt, 256 if text == OWN else None, repeats, **how)
        made = [sum(n) for n in zip(*r.drafters.values(), strict=True)]
        row = key | dataclasses.asdict(r) | {"drafter": drafter, "drafters": made, "load": os.getloadavg()[0]}
        del row["file"]
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row


def search(ids: list[int]) -> Iterator[dict[str, Any]]:
    """What looking for a match takes behind so many tokens, the texts over and over."""
    for n in (512, 4096, 32_768, 100_000):
        text, times = array("i", (ids * (n // len(ids) + 1))[:n]), []
        for _ in range(30):
            start = time.perf_counter()
            drafters.continuation(text, 7)
            times.append(time.perf_counter() - start)
        tracemalloc.start()
        drafters.continuation(text, 7)
        yield {"tokens": n, "seconds": sorted(times)[len(times) // 2], "peak_bytes": tracemalloc.get_traced_memory()[1]}
        tracemalloc.stop()


def table(rows: list[dict[str, Any]], cell: Any) -> list[str]:
    """One line for each model, drafter and text; a column for each K."""
    lines = ["| model | drafter | text | " + " | ".join(f"K = {k}" if k != "auto" else "auto" for k in KS) + " |",
             "|---" * (3 + len(KS)) + "|"]  # fmt: skip
    for key in dict.fromkeys((r["model"], r["drafter"], r["text"]) for r in rows):
        found = {r["k"]: cell(r) for r in rows if (r["model"], r["drafter"], r["text"]) == key}
        lines.append("| " + " | ".join([*key, *(found.get(k, "") for k in KS)]) + " |")
    return [*lines, ""]


def wrapped(text: str) -> list[str]:
    """A paragraph."""
    return [*textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False), ""]


def markdown(lines: list[dict[str, Any]]) -> str:
    """The page of the measurements' file: a line that says where it is from, then the rows."""
    head, *rest = lines
    rows, searches = [r for r in rest if "k" in r], [r for r in rest if "k" not in r]
    loads = [r["load"] for r in rows if r.get("load")]
    errors = [abs(r["predicted_bytes"] / r["gain_bytes"] - 1) for r in rows]
    machine = f"{head['machine']['processor']}, {head['machine']['cores']} cores, commit {head['machine']['commit']}"
    out = [
        "# Drafters\n",
        *wrapped(f"{machine}, `{head['command']}`; load average {min(loads):.1f} to {max(loads):.1f}."),
        *wrapped(f"The text is what the model is taken to write, behind {rows[0]['context']} tokens of each window as "
                 f'a prompt; "{OWN}": what the model writes. {WHAT}'),
        "## Gain in bytes\n",
        *wrapped("Counted bytes of plain decoding over those of drafted, and of the drafts the share that was "
                 'accepted; of "auto" also the gain in its worst window. Times, which the load made worth little, are '
                 "in drafters.jsonl only."),
        *table(rows, lambda r: f"{r['gain_bytes']:.2f}, {100 * r['acceptance']:.0f} %"
                               + (f", worst {r['worst_bytes']:.2f}" if r["k"] == "auto" else "")),
        *wrapped(f"The cost model predicts these {len(rows)} gains from the drafts that were made: "
                 f"{100 * max(errors):.1f} % off at most."),
        "## Looking for a match\n",
        "| tokens | microseconds | peak of memory |", "|---|---|---|",
        *(f"| {r['tokens']:,} | {1e6 * r['seconds']:.0f} | {r['peak_bytes'] / 1e6:.2f} MB |" for r in searches),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


WHAT = """`records.json`: records with the same keys; `edits.txt`: three short programs, each edited once or twice;
`quotes.txt`: passages and lessons that quote them; `stories.txt` and `books.txt` do not repeat themselves: the control.
V2-Lite, V3: random weights, six layers, narrow, routed as in these models; deeper: 18 layers, twice as wide."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="the demo model's, for a copy of it in f32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=lab.ROOT / "docs" / "perf" / "zen4")
    args = parser.parse_args()
    demo = deepcalm.Model(deepcalm.demo_path(), threads=args.threads)
    path = args.out / "drafters.jsonl"
    rows = [r for r in jsonl.read(path)[1:] if "k" in r] if args.resume else []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(demo, Path(folder), args.checkpoint):
            for row in measure(demo, job, rows, args.repeats):
                rows.append(row)
                jsonl.write(path, [{}, *rows])
    rows += search([i for name in TEXTS for i in demo.encode((lab.ROOT / "tests/data" / name).read_text())])
    words = ["tools/bench_drafters.py", *["--checkpoint DIR"] * bool(args.checkpoint), f"--repeats {args.repeats}",
             f"--threads {args.threads}"]  # fmt: skip
    head = {"machine": lab.machine(), "command": " ".join(words)}
    jsonl.write(path, [head, *rows])
    path.with_suffix(".md").write_text(markdown(jsonl.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
