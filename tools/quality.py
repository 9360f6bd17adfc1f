#!/usr/bin/env python3
"""What each weight format, and each type of the cache, costs: the tables of docs/perf/quality.md.

    tools/quality.py --weights CHECKPOINT --text tests/data/stories.txt tests/data/books.txt
    tools/quality.py --caches demo.dcalm --text tests/data/stories.txt tests/data/books.txt
    tools/quality.py --caches v2-lite-4.dcalm --tokens 4096 --ctx 4096

Weights: one checkpoint packed every way, perplexity and KL divergence. For one format: `deepcalm perplexity q4.dcalm
TEXT --kl-against f32.dcalm`. Caches: one packed file, each type against f32, on texts or on random tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import deepcalm
from deepcalm.check.perplexity import log_softmax, perplexity, standard_error

FORMATS = ("f32", "bf16", "f16", "q8", "f8", "q4")
CACHES = ("f16", "bf16", "q8")
ROWS = 128  # of a pass: logits of each in double precision


def weights(checkpoint: Path, texts: Sequence[Path], ctx: int) -> None:
    """A row for every format."""
    print("| `--dtype` | file |" + "".join(f" {t.stem}: perplexity | KL | same argmax |" for t in texts))
    print("|---|---|" + "---|---|---|" * len(texts))
    with tempfile.TemporaryDirectory() as folder:
        exact: deepcalm.Model | None = None
        for name in FORMATS:
            path = Path(folder) / f"{name}.dcalm"
            deepcalm.pack(checkpoint, path, dtype=name)
            model = deepcalm.Model(path)
            exact = exact or model
            row = f"| {name} | {path.stat().st_size / 1e6:.1f} MB |"
            for text in texts:
                result = perplexity(model, text.read_text(encoding="utf-8"), ctx, against=exact)
                d = result.divergence
                assert d is not None
                row += f" {result.perplexity:.3f} | {d.kl_mean:.5f} | {100 * d.argmax_agreement:.1f} % |"
            print(row, flush=True)


def caches(model: deepcalm.Model, ids: Sequence[int], ctx: int) -> str:
    """KL of the next token's distribution with each type from that with f32 and its standard error, and same argmax."""
    names = ("f32", *CACHES)
    sessions = [model.session(ctx, kv, mtp=False) for kv in names]
    kl: dict[str, list[float]] = {kv: [] for kv in CACHES}
    same = dict.fromkeys(CACHES, 0)
    for i in range(0, len(ids), ctx):
        window = ids[i : i + ctx]
        for s in sessions:
            s.truncate(0)
        for j in range(0, len(window), ROWS):
            exact, *others = (s.prefill(window[j : j + ROWS], all_logits=True) for s in sessions)
            p = log_softmax(exact)
            for kv, logits in zip(CACHES, others, strict=True):
                kl[kv] += (np.exp(p) * (p - log_softmax(logits))).sum(axis=1).tolist()
                same[kv] += int((exact.argmax(axis=1) == logits.argmax(axis=1)).sum())
    parts = []
    for kv in CACHES:
        values = np.array(kl[kv])
        parts.append(f" {values.mean():.2e} ± {standard_error(values):.0e} | {100 * same[kv] / len(ids):.2f} % |")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", type=Path, metavar="CHECKPOINT")
    what.add_argument("--caches", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=1024, help="random ones, without a text")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--isa")
    args = parser.parse_args()
    if args.weights:
        weights(args.weights, args.text, args.ctx)
        return 0
    print("| model | tokens |" + "".join(f" {kv}: KL | same argmax |" for kv in CACHES))
    print("|---|---|" + "---|---|" * len(CACHES))
    for file in args.caches:
        model = deepcalm.Model(file, isa=args.isa)
        ctx = min(args.ctx, int(model.config["max_position_embeddings"]))
        texts = {f", {t.stem}": model.encode(t.read_text(encoding="utf-8"), bos=False) for t in args.text}
        random = np.random.default_rng(0).integers(0, model.n_valid, args.tokens).tolist()
        for name, ids in (texts or {"": random}).items():
            print(f"| {file.stem}{name} | {len(ids):,} in windows of {ctx:,} |{caches(model, ids, ctx)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
