#!/usr/bin/env python3
"""Measure the instruction set amx against avx512x: prefill, decoding, verification of 8 rows, in turn on the same file.

    tools/bench_amx.py                       the geometry of V2-Lite in bf16 and f8, prefill of 512 and 4096 tokens
    tools/bench_amx.py --layers 8 --rounds 5 a part of it
    tools/bench_amx.py --model FILE          a packed file

Every round runs one set and then the other, the first of them changing from round to round; ratios are medians of
rounds. GB/s are the bytes that passes counted over their seconds. Where the processor has no AMX its emulation runs,
and the table says that it is no speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import deepcalm
import lab
from deepcalm import _core
from deepcalm.measure import synthetic
from deepcalm.measure.bench import fill

ISAS = ("avx512x", "amx")
Rates = dict[tuple[str, str], list[float]]  # (what, set) -> a rate of each round


def each(call: Callable[[Any], object], arguments: Iterable[Any]) -> None:
    for argument in arguments:
        call(argument)


def rate(session: deepcalm.Session, run: Callable[[], object], tokens: int | None) -> float:
    """Tokens a second of run(), or the GB/s of its passes."""
    before, start = session.stats, time.perf_counter()
    run()
    seconds, did = time.perf_counter() - start, session.stats - before
    return tokens / seconds if tokens else (did.weight_bytes + did.cache_bytes) / 1e9 / did.pass_seconds


def measure(path: Path, threads: int, prompts: list[int], rounds: int) -> Rates:
    """Every rate of both sets, round by round; the first round warms up."""
    models = {isa: deepcalm.Model(path, threads=threads, isa=isa) for isa in ISAS}
    sessions = {isa: m.session(max(prompts) + 64, "bf16", mtp=False) for isa, m in models.items()}
    ids = np.random.default_rng(0).integers(0, models["amx"].n_valid, max(64, *prompts)).astype(np.int32)
    rates: Rates = defaultdict(list)
    for i in range(rounds + 1):
        for isa in ISAS[:: 1 if i % 2 else -1]:
            s = sessions[isa]
            found = {}
            for n in prompts:
                s.truncate(0)
                found[f"prefill of {n}, tok/s"] = rate(s, partial(s.prefill, ids[:n]), n)
            s.truncate(0)
            fill(s, 24)
            s.decode(int(ids[0]))  # gives the prompt's buffers back
            found["decode of a row, GB/s"] = rate(s, partial(each, s.decode, ids[:16].tolist()), None)
            found["8 rows, GB/s"] = rate(s, partial(each, s.decode_many, ids[:24].reshape(3, 8)), None)
            for what, value in found.items() if i else ():
                rates[what, isa].append(value)
    return rates


def files(o: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(name, file) of what is measured; files of random weights are deleted afterwards."""
    if o.model is not None:
        yield o.model.name, o.model
        return
    spec = o.synthetic + (f":{o.layers}" if o.layers else "")
    for dtype in o.dtypes:
        with tempfile.TemporaryDirectory(dir=o.folder) as folder:
            path = Path(folder) / "model.dcalm"
            synthetic.write_model(path, spec, dtype, attn_dtype=dtype, head_dtype=dtype)
            yield f"{spec} {dtype}", path


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="this file instead of random weights")
    p.add_argument("--layers", type=int, help="of the model (default: all 27)")
    p.add_argument("--synthetic", default="v2-lite", help="geometry, as for deepcalm bench")
    p.add_argument("--dtypes", nargs="+", default=["bf16", "f8"])
    p.add_argument("--prompts", type=int, nargs="+", default=[512, 4096])
    p.add_argument("--threads", type=int, default=_core.default_threads())
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--folder", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")), help="for the models")
    o = p.parse_args()
    how = {str(i["name"]): i for i in _core.isas()}.get("amx")
    if how is None or not how["supported"]:
        raise SystemExit("bench_amx: this processor has no avx512x, beside which amx is measured")
    m = lab.machine()
    note = "AMX by the processor" if not how["emulated"] else "amx EMULATED: not measured on this processor"
    print(f"{m['processor']}, {o.threads} threads, cache bf16, commit {m['commit']}; {note}\n")
    print("| model | what | avx512x | amx | ratio (lowest - highest) |\n|---|---|---:|---:|---:|")
    for name, path in files(o):
        rates = measure(path, o.threads, o.prompts, o.rounds)
        for what in dict.fromkeys(what for what, _ in rates):
            old, new = (rates[what, isa] for isa in ISAS)
            ratio = sorted(b / a for a, b in zip(old, new, strict=True))
            middle = [statistics.median(v) for v in (old, new, ratio)]
            cells = (f"{v:.{d}f}" for v, d in zip(middle, (1, 1, 2), strict=True))
            print(f"| {name} | {what} | {' | '.join(cells)} ({ratio[0]:.2f} - {ratio[-1]:.2f}) |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
