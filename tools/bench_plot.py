#!/usr/bin/env python3
"""Draw what `deepcalm bench --json-file` wrote: achieved and bound, and the cost of a step against the context.

    deepcalm bench v2-lite.dcalm --contexts 0,1024,4096,16384 --threads 1,2 --json-file v2-lite.json
    tools/bench_plot.py v2-lite.json v2-lite.png

Needs matplotlib (pip install 'deepcalm[plot]'); the suffix names the kind of image.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import lab
from deepcalm.measure.report import linear_cost


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The plot of a result's runs, one per number of threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, r in enumerate(runs):
        contexts, rates = ([d["context"] for d in r["decode"]], [d["rate"]["median"] for d in r["decode"]])
        color, label = f"C{i}", f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        left.plot(contexts, rates, "o-", color=color, label=f"achieved, {label}")
        left.plot(contexts, [d["bound_rate"] for d in r["decode"]], "--", color=color, label=f"bound, {label}")
        lab.draw_cost(right, contexts, [1e3 / v for v in rates], linear_cost(contexts, rates), color, label)
    left.set(xlabel="context, positions", ylabel="tokens per second", title="decode against its bound")
    right.set(xlabel="context, positions", ylabel="ms per token", title="cost of a step")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    r = runs[0]
    title = f"{Path(r['file']).name}, {r['isa']}, cache {r['kv']}: {r['machine']['processor']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text())["runs"], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
