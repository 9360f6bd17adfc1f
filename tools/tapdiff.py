#!/usr/bin/env python3
"""Where do two runs of a model part? Records every tap of a pass, or compares two such records in pass order.

    tools/tapdiff.py --record a.npz model.dcalm --prompt "Once upon a time" --isa avx2
    tools/tapdiff.py --record b.npz model.dcalm --prompt "Once upon a time" --isa avx512 --threads 2
    tools/tapdiff.py a.npz b.npz [--tol 1e-5]

Compared are bits, or with --tol relative differences (of the tap's largest value). Exit code 1 when something differs:
the first differing tap is printed with coordinate, both values and the largest difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

import deepcalm
from deepcalm import _core

Array = np.ndarray[Any, Any]


def record(path: Path, ids: Array, isa: str | None, threads: int, kv: str, rows: int | None) -> dict[str, Array]:
    """Taps of ids [n] from an empty cache, in pass order, rows of all passes joined; then those of the MTP layer."""
    model = deepcalm.Model(path, threads=threads, isa=isa)
    core = _core.Session(model.core, len(ids), kv, rows or len(ids), False)
    core.trace(["*"])
    parts, hidden = [], []
    for begin in range(0, len(ids), core.max_rows):
        core.forward(ids[begin : begin + core.max_rows], "all")
        parts.append(core.taps())
        hidden.append(core.hidden())
    out = {name: np.concatenate([p[name] for p in parts]) for name in in_order(parts[0])}
    if model.config["num_nextn_predict_layers"] and len(ids) > 1:
        parts, before = [], np.concatenate(hidden)[:-1]
        for begin in range(0, len(ids) - 1, core.max_rows):
            part = slice(begin, begin + core.max_rows)
            core.mtp_forward(ids[1:][part], before[part], "all")
            parts.append(core.taps())
        out |= {name: np.concatenate([p[name] for p in parts]) for name in in_order(parts[0])}
    return out


def in_order(names: Any) -> list[str]:
    """Tap names in the order in which a pass makes them."""
    from deepcalm.session import STAGES

    def key(name: str) -> tuple[bool, int, int]:
        stage, parts = name.rpartition(".")[2], name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else 1 << 20 if stage in ("final_norm", "logits") else -1
        if parts[0] == "mtp" and layer == -1 and stage != "embed":
            layer = 0
        return parts[0] == "mtp", layer, STAGES.index(stage)

    return sorted(names, key=key)


def difference(name: str, a: Array, b: Array, tol: float) -> str:
    """What differs between two taps, in words; "" if nothing does."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        delta = np.abs(x - y)
    delta = np.where(np.isnan(x) & np.isnan(y), 0, np.nan_to_num(delta, nan=np.inf))
    same_bits = a.view(np.uint32) == b.view(np.uint32)
    size = float(np.nan_to_num(np.abs(y)).max(initial=0)) or 1.0
    bad = ~same_bits if tol == 0 else delta > tol * size
    if not bad.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    worst = float(delta.max())
    return (f"{name} at {list(at)}: found {a[at]!s}, expected {b[at]!s}; {int(bad.sum())} of {bad.size} differ, "
            f"largest difference {worst:.3g}, {worst / size:.3g} of the largest value")  # fmt: skip


def compare(a: dict[str, Array], b: dict[str, Array], tol: float) -> list[str]:
    """One line for every tap that differs, in pass order."""
    out = []
    for name in in_order({**a, **b}):
        if name not in a or name not in b:
            out.append(f"{name}: only in the {'first' if name in a else 'second'} file")
        elif line := difference(name, a[name], b[name], tol):
            out.append(line)
    return out


def main(args: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--record", type=Path, metavar="OUT.npz", help="run a model and write its taps here")
    p.add_argument("files", type=Path, nargs="+", help="two records to compare, or with --record the packed model")
    p.add_argument("--prompt", default="Once upon a time there was a lamp", help="text to run")
    p.add_argument("--ids", help="token ids to run instead, 1,2,3")
    p.add_argument("--isa")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--kv", default="f16", choices=["f16", "bf16", "f32", "q8"])
    p.add_argument("--rows", type=int, help="tokens of a pass (default: all)")
    p.add_argument("--tol", type=float, default=0.0, help="relative tolerance (default: bit for bit)")
    p.add_argument("--all", action="store_true", help="print every tap that differs, not only the first")
    o = p.parse_args(args)
    if len(o.files) != (1 if o.record else 2):
        p.error("expected one packed model with --record, else two records")
    try:
        if o.record:
            text = o.ids.split(",") if o.ids else deepcalm.Model(o.files[0], threads=1).encode(o.prompt)
            ids = np.array([int(i) for i in text], np.int32)
            taps: dict[str, Any] = {**record(o.files[0], ids, o.isa, o.threads, o.kv, o.rows)}
            np.savez(o.record, **taps)
            return 0
        a, b = ({k: z[k] for k in z.files} for z in (np.load(f, allow_pickle=False) for f in o.files))
    except (deepcalm.Error, OSError, ValueError) as e:
        print(f"tapdiff: {e}", file=sys.stderr)
        return 2
    lines = compare(a, b, o.tol)
    print("\n".join(lines if o.all else lines[:1]) if lines else f"{len(a)} taps, no difference")
    if len(lines) > 1 and not o.all:
        print(f"{len(lines) - 1} more taps differ")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
