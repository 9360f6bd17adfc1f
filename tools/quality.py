#!/usr/bin/env python3
"""What each weight format costs: one checkpoint packed every way, perplexity and KL divergence on held-out text.

    tools/quality.py CHECKPOINT tests/data/stories.txt tests/data/books.txt

Prints the table of docs/perf/quality.md. For one format: `deepcalm perplexity q4.dcalm TEXT --against f32.dcalm`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import deepcalm
from deepcalm.check.perplexity import perplexity

FORMATS = ("f32", "bf16", "f16", "q8", "f8", "q4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--ctx", type=int, default=512)
    args = parser.parse_args()
    print("| `--dtype` | file |" + "".join(f" {t.stem}: perplexity | KL | same argmax |" for t in args.text))
    print("|---|---|" + "---|---|---|" * len(args.text))
    with tempfile.TemporaryDirectory() as folder:
        exact: deepcalm.Model | None = None
        for name in FORMATS:
            path = Path(folder) / f"{name}.dcalm"
            deepcalm.pack(args.checkpoint, path, dtype=name)
            model = deepcalm.Model(path)
            exact = exact or model
            row = f"| {name} | {path.stat().st_size / 1e6:.1f} MB |"
            for text in args.text:
                result = perplexity(model, text.read_text(encoding="utf-8"), args.ctx, against=exact)
                d = result.divergence
                assert d is not None
                row += f" {result.perplexity:.3f} | {d.kl_mean:.5f} | {100 * d.argmax_agreement:.1f} % |"
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
