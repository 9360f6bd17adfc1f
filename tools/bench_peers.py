#!/usr/bin/env python3
"""Measure deepcalm beside llama.cpp (and transformers), pair by pair between probes of the read bandwidth.

    tools/bench_peers.py --llama-bench PATH        everything, into docs/perf/peers.jsonl and a table
    tools/bench_peers.py --build FOLDER            first build llama.cpp natively there, from llama-cpp-python's sources
    tools/bench_peers.py --quick ...               1 round, contexts 0 and 4096, all threads only
    tools/bench_peers.py --dry-run                 what would run, and about how long
    tools/bench_peers.py --only lite14-q8 ...      one case; may be given several times

Both sides get random weights in the same geometry, every matrix in one format, output included; flash attention on. A
row is probe, ours, llama.cpp, ours, probe (at 4096 positions ours also with a bf16 cache); the rounds of a row are kept
apart. A pair counts where its probes agree within 15 %: the table says how many did; up to twice as many rounds as
asked for are run until enough do. lite27-q8 does not fit into memory twice: one engine at a time, files evicted
between, every round of one paired with every round of the other. Files are written to --folder before a case and
deleted after it. Every row is saved when it is done: the same command goes on where it stopped. Needs a quiet machine:
what others used meanwhile is recorded.

llama.cpp is built for this processor without AMX: with it, its scheduler stops at the stacked matrices of latent
attention (GGML_ASSERT(*cur_backend_id != -1)), release 0.3.36.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import bench_rows
import deepcalm
import gguf_synthetic
import lab
from bench_rows import Results, check_room, evict, read_into_memory, say
from deepcalm import _core
from deepcalm.measure import synthetic
from deepcalm.measure.bench import fill
from deepcalm.measure.machine import Others
from deepcalm.sampling import Sampling

AGREE = 0.15  # largest difference of the probes around a pair, relative
# V2-Lite's attention in a layer, of one step: operations and bytes of a 16-bit cache per position.
POSITION_OPERATIONS, POSITION_BYTES = 2 * 16 * (2 * 512 + 64), 2 * (512 + 64)
LLAMA_CPP = "llama-cpp-python==0.3.36"
PREFILL = 512
Run = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one format on both sides."""

    name: str
    layers: int
    dtype: str
    gguf: str
    gigabytes: float  # of each file
    apart: bool = False  # one engine at a time
    load: str = "mmap"  # of llama-bench
    transformers: bool = False

    @property
    def spec(self) -> str:
        return f"v2-lite:{self.layers}"


CASES = (
    Case("lite8-bf16", 8, "bf16", "BF16", 9.5, transformers=True),
    Case("lite14-q8", 14, "q8", "Q8_0", 8.8),
    # llama.cpp repacks Q4_0 into memory of its own: mapped as well, it would need both.
    Case("lite27-q4", 27, "q4", "Q4_0", 9.1, load="none"),
    Case("lite27-q8", 27, "q8", "Q8_0", 16.9, apart=True),
)


# ---- the engines


class Ours:
    """A packed file, timed as bench does: contexts of random cache rows, decoding with sampling."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = deepcalm.Model(path, threads=threads)
        ids = np.random.default_rng(0).integers(0, self.model.n_valid, PREFILL + 64)
        self.ids = [int(i) for i in ids]

    def run(self, what: str, context: int, tokens: int, kv: str = "f16") -> dict[str, float]:
        """Tokens per second and GB/s of a prefill, or of decoding after ``context`` positions; after a warm-up.

        Weights that nobody read while another engine ran are slower at first, 10 to 20 % over 16 tokens, with as many
        page faults as later: all experts are walked once. The peers get the same.
        """
        self.model.session(64, mtp=False).prefill(self.ids[:64])
        session = self.model.session(max(PREFILL, context + 64), kv, mtp=False)
        n = PREFILL if what == "prefill" else tokens
        for warm in (True, False):
            fill(session, context)
            before, start = session.stats, time.perf_counter()
            if what == "prefill":
                session.prefill(self.ids[: 64 if warm else n])
            else:
                for token in self.ids[PREFILL : PREFILL + (2 if warm else n)]:
                    session.draft_round(token, 0, Sampling(), self.model.n_valid)
            seconds, done = time.perf_counter() - start, session.stats - before
        return {"rate": n / seconds, "gb_s": 1e-9 * (done.weight_bytes + done.cache_bytes) / seconds}


class Llama:
    """llama-bench as a process per measurement."""

    def __init__(self, binary: Path, path: Path, threads: int, load: str, repeats: int) -> None:
        self.command = [str(binary), "-m", str(path), "-t", str(threads), "-fa", "on", "-lm", load, "-o", "jsonl"]
        self.repeats = repeats

    def run(self, what: str, context: int, tokens: int) -> dict[str, Any]:
        shape, first = ["-p", str(PREFILL), "-n", "0", "-r", "1"], 0
        if what == "decode":
            first = int(context == 0)  # its warm-up is one token; a context's prefill has been to all weights
            shape = ["-p", "0", "-n", str(tokens), "-r", str(self.repeats + first)]
        env = {**os.environ, "OMP_NUM_THREADS": self.command[4]}
        done = subprocess.run([*self.command, *shape, "-d", str(context)], capture_output=True, text=True, env=env,
                              check=False)  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise SystemExit(f"llama-bench failed ({done.returncode}): {done.stderr[-600:]}")
        return {"rate": statistics.median(lines[0]["samples_ts"][first:]), "samples": lines[0]["samples_ts"],
                "build": lines[0]["build_commit"]}  # fmt: skip


TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2])); torch.manual_seed(0)
raw = json.loads(sys.argv[1]); kind = raw.pop("model_type")
config = AutoConfig.for_model(kind, **raw)
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
model = model.to_empty(device="cpu").eval()
values = torch.randn(1 << 20)  # repeated: drawing 4.7e9 values takes minutes
for name, p in model.named_parameters():
    flat = p.data.view(-1)
    deviation = 0.1 if p.ndim == 1 else p.shape[-1] ** -0.5
    block = (values * deviation + (1 if p.ndim == 1 else 0)).to(p.dtype)
    for i in range(0, flat.numel(), block.numel()):
        flat[i : i + block.numel()] = block[: flat.numel() - i]
torch.set_default_dtype(torch.float32)
model.model.rotary_emb = type(model.model.rotary_emb)(config)
ids = torch.randint(0, config.vocab_size, (1, int(sys.argv[3])))
print("ready", flush=True)
for line in sys.stdin:  # one measurement per line: "prefill", or "decode" and the number of tokens
    what, n = line.split()[0], ids.shape[1]
    with torch.no_grad():
        out = model(ids[:, :64], logits_to_keep=1, use_cache=True)
        if what == "prefill":
            start = time.perf_counter()
            out = model(ids, logits_to_keep=1, use_cache=True)
        else:
            n, cache = int(line.split()[1]), out.past_key_values
            for i in range(-2, n):  # two to warm up
                if i == 0:
                    start = time.perf_counter()
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - start
    assert torch.isfinite(out.logits).all()
    print(json.dumps({"rate": n / seconds}), flush=True)
"""


class Transformers:
    """transformers in bf16 as a process that stays: its weights are made once. It sleeps between measurements."""

    def __init__(self, case: Case, threads: int, amx: bool) -> None:
        config, _ = synthetic.make_config(case.spec)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if not amx:
            env["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # the instructions that we use
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRANSFORMERS, json.dumps(config), str(threads), str(PREFILL)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("transformers failed: needs the extra 'reference'")
        return line

    def run(self, what: str, context: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None and context == 0
        self.process.stdin.write(f"{what} {tokens}\n")
        self.process.stdin.flush()
        return dict(json.loads(self._line()))

    def close(self) -> None:
        self.process.communicate()


# ---- rows


def probe(threads: int) -> dict[str, float]:
    """GB/s of a plain read, by as many threads and by one; 1e9 operations per second of the instructions."""
    top = _core.compute_ceilings(next(i["name"] for i in _core.isas() if i["supported"]), threads)
    return {"all": _core.read_bandwidth(threads, 1024, 3), "one": _core.read_bandwidth(1, 1024, 3),
            "f32": top["f32"], "bf16": top.get("bf16", top["f32"])}  # fmt: skip


def measure(ours: Run | None, peer: Run | None, bf16: Run | None, threads: int) -> dict[str, Any]:
    """probe, ours, peer, ours, probe; or one side between probes. bf16: ours again, with a bf16 cache.

    others: cores that other processes used beside the probes and our own runs; stolen: that the hypervisor took.
    """
    out: dict[str, Any] = {"probes": [], "others": 0.0, "stolen": 0.0}
    for name, run in (("probes", lambda: probe(threads)), ("ours", ours), ("peer", peer), ("ours", ours),
                      ("bf16", bf16), ("probes", lambda: probe(threads))):  # fmt: skip
        if run is not None:
            others = Others()
            out.setdefault(name, []).append(run())
            used, stolen = others.cores()
            out["others"] = max(out["others"], used * (name != "peer"))
            out["stolen"] = max(out["stolen"], stolen)
    return out


def agrees(rounds: list[dict[str, Any]]) -> bool:
    """Whether all probes of a pair lie within AGREE of each other."""
    seen = [p["all"] for r in rounds for p in r["probes"]]
    return bool(max(seen) / min(seen) - 1 <= AGREE)


def goal(row: dict[str, Any], ours: dict[str, Any], side: str) -> float:
    """Tokens per second at 90 % of the read for weights and 65 % of the f32 instruction for attention.

    With a bf16 cache at 60 % of bf16's. 0 where a row is a prefill or older than what this needs.
    """
    if row.get("what") != "decode" or "layers" not in row or "f32" not in ours["probes"][0]:
        return 0.0
    read, f32, bf16 = (statistics.mean(p[k] for p in ours["probes"]) for k in ("all", "f32", "bf16"))
    positions = row["layers"] * row["context"]
    weights = statistics.mean(o["gb_s"] / o["rate"] for o in ours["ours"]) - 1e-9 * POSITION_BYTES * positions
    ceiling = bf16 if side == "bf16" else f32
    return 1 / bench_rows.goal_seconds(weights, read, 1e-9 * POSITION_OPERATIONS * positions, ceiling, side)


def summary(row: dict[str, Any], side: str = "ours") -> dict[str, Any]:
    """Rates and ratio of a row, from the rounds whose probes agree (all of them where none do). side: ours | bf16."""
    pairs = [[o, p] for o in row["rounds"] for p in row["peer_rounds"]] if "peer_rounds" in row else [
        [r] for r in row["rounds"]
    ]  # fmt: skip
    good = [p for p in pairs if agrees(p)]
    ours, peers, ratios, shares, goals = [], [], [], [], []
    for pair in good or pairs:
        mine = statistics.mean(o["rate"] for r in pair for o in r.get(side, ()))
        theirs = statistics.mean(p["rate"] for r in pair for p in r.get("peer", ()))
        moved = statistics.mean(o["gb_s"] for r in pair for o in r.get(side, ()))
        ours.append(mine)
        peers.append(theirs)
        ratios.append(mine / theirs)
        shares.append(moved / statistics.mean(p["all"] for p in pair[0]["probes"]))
        goals.append(goal(row, pair[0], side) / theirs)
    read = [p["all"] for pair in pairs for r in pair for p in r["probes"]]
    others = max(r["others"] + r["stolen"] for pair in good or pairs for r in pair)
    return {"ours": statistics.median(ours), "peer": statistics.median(peers), "ratio": statistics.median(ratios),
            "low": min(ratios), "high": max(ratios), "share": statistics.median(shares), "agree": len(good),
            "peer_share": statistics.median(s / r for s, r in zip(shares, ratios, strict=True)),
            "of": len(pairs), "read": (min(read), max(read)), "others": others,
            "goal": statistics.median(goals)}  # fmt: skip


def markdown(results: Results) -> str:
    """The rows as a table of ratios."""
    m = results.head["machine"]
    out = [
        "# deepcalm beside llama.cpp and transformers, CPU",
        "",
        f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB; deepcalm {m['version']};",
        f"llama.cpp as in {LLAMA_CPP}, built natively without AMX (with it, it stops at these models), flash",
        "attention on; transformers in bf16, with AMX where the processor has it and without. DeepSeek-V2-Lite",
        "geometry of 8, 14 or 27 layers, random weights, every matrix in one format on both sides, output included.",
        "",
        f"    {results.head['command']}",
        "",
        "A pair is probe, ours, peer, ours, probe; ratios are of pairs whose probes agree within 15 % (all pairs where",
        "none do); median (lowest - highest). Share: of the read bandwidth that our decoding reaches. lite27-q8: one",
        "engine at a time. llama.cpp computes one row of the last feed-forward layer in prefill, deepcalm all of them.",
        "Others: cores that other processes used beside our runs, or the hypervisor took, where more than 0.05.",
        "Goal: the ratio at which weights take 1/0.90 of the probes' read and attention 1/0.65 of the f32 instruction",
        "measured with them (our cache bf16: 1/0.60 of bf16's). Commit: deepcalm's, when the row was measured.",
        "",
        "![decoding beside llama.cpp, as a share of the read bandwidth](peers.svg)",
        "",
        "| case | threads | what | ours tok/s | peer | peer tok/s | ratio | goal | share, % | read GB/s | agree | "
        "others | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = [(row, side) for row in results.rows.values() for side in ("ours", "bf16")]
    for row, side in lines:
        if not any(side in r for r in row["rounds"]):
            continue
        s = summary(row, side)
        what = f"prefill {PREFILL}" if row["what"] == "prefill" else f"decode at {row['context']}"
        share = "" if row["what"] == "prefill" else f"{100 * s['share']:.0f}"
        what += ", our cache bf16" if side == "bf16" else ""
        aim = f"{s['goal']:.2f}" if s["goal"] else ""
        others = f"{s['others']:.2f}" if s["others"] > 0.05 else ""
        read = f"{s['read'][0]:.1f} - {s['read'][1]:.1f}"
        out.append(
            f"| {row['case']} | {row['threads']} | {what} | {s['ours']:.2f} | {row['peer']} | {s['peer']:.2f} | "
            f"**{s['ratio']:.2f}** ({s['low']:.2f} - {s['high']:.2f}) | {aim} | {share} | {read} | "
            f"{s['agree']} of {s['of']} | {others} | {row['commit'][:7]} |"
        )
    return "\n".join(out) + "\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    case: Case
    threads: int
    what: str  # prefill | decode
    context: int
    peer: str = "llama.cpp"

    def rounds(self, wanted: int) -> int:
        """Pairs whose probes agree; one where llama.cpp has to prefill a context first, which takes minutes."""
        return 1 if self.context else wanted

    @property
    def key(self) -> str:
        return f"{self.case.name} T={self.threads} {self.what} {self.context} {self.peer}"


def plan(args: argparse.Namespace) -> list[Row]:
    """All rows, case by case; what takes long (deep contexts: llama.cpp has to prefill them) last."""
    rows = []
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        if args.layers:
            case = replace(case, layers=args.layers, gigabytes=case.gigabytes * (args.layers + 1) / case.layers)  # noqa: PLW2901
        threads = args.threads[-1:] if args.quick else args.threads
        contexts = [0, 4096] if args.quick else args.contexts
        shapes = [("decode", 0), ("prefill", 0), *(("decode", c) for c in reversed(contexts) if c)]
        for what, context in shapes:
            rows += [Row(case, t, what, context) for t in reversed(threads)]
        if case.transformers and not args.no_transformers:
            amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
            for peer in ("transformers", "transformers, no AMX") if amx else ("transformers",):
                rows += [Row(case, t, "prefill", 0, peer) for t in reversed(threads)]
            rows += [Row(case, t, "decode", 0, "transformers") for t in reversed(threads)]
    return rows


def estimate(row: Row, rounds: int, repeats: int, tokens: int) -> float:
    """Seconds: 12 GB/s and 120 G operations/s per thread for us, llama.cpp at 0.6 and 0.35 of that."""
    active: float = {"bf16": 0.22, "q8": 0.1, "q4": 0.055}[row.case.dtype] * (row.case.layers + 2)
    operations = 0.16e9 * row.case.layers
    prefill: float = PREFILL * operations / (120e9 * row.threads)
    step = active / (12 * row.threads)
    loading = 1.5 + 3 * (row.case.load == "none")
    if row.what == "prefill":
        return rounds * (2 * prefill * 1.2 + 2 * prefill / 0.35 + loading + 3)
    deep = row.context * operations / (120e9 * 0.35 * row.threads) * 1.3
    return rounds * (2 * (tokens * step + 1) + repeats * tokens * step / 0.5 + deep + loading + 3)


def run_case(case: Case, rows: list[Row], binary: Path, args: argparse.Namespace, results: Results) -> None:
    ours, theirs = args.folder / f"{case.name}.dcalm", args.folder / f"{case.name}.gguf"
    made = [p for p in (ours, theirs) if not p.exists()]

    def provide(path: Path) -> None:
        if path in made:
            check_room(args.folder, case.gigabytes)
            if path == ours:
                synthetic.write_model(path, case.spec, case.dtype, attn_dtype=case.dtype, head_dtype=case.dtype)
            else:
                gguf_synthetic.write(path, case.spec, case.gguf)
        say(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB")
        evict(path)

    try:
        provide(ours)
        if not case.apart:
            provide(theirs)
        read_into_memory(ours)
        if not case.apart and case.load == "mmap":
            read_into_memory(theirs)
        sides: list[tuple[str, ...]] = [("ours",), ("peer",)] if case.apart else [("ours", "peer")]
        half: dict[str, list[Any]] = {}
        for sides_now in sides:
            if sides_now == ("peer",):
                evict(ours)
                if ours in made:
                    ours.unlink()
                provide(theirs)
                read_into_memory(theirs)
            for row in rows:
                rounds = run_row(row, sides_now, ours, theirs, binary, args)
                if case.apart and sides_now == ("ours",):
                    half[row.key] = rounds
                    continue
                value = {"case": case.name, "threads": row.threads, "what": row.what, "context": row.context,
                         "peer": row.peer, "layers": row.case.layers, "commit": results.head["machine"]["commit"],
                         "time": time.strftime("%Y-%m-%d %H:%M")}  # fmt: skip
                value |= {"rounds": half[row.key], "peer_rounds": rounds} if case.apart else {"rounds": rounds}
                results.add(row.key, value)
                args.out.with_suffix(".md").write_text(markdown(results))
                s = summary(results.rows[row.key])
                say(f"{row.key}: {s['ours']:.2f} against {s['peer']:.2f}, ratio {s['ratio']:.2f}, "
                    f"{s['agree']} of {s['of']} agree, others {s['others']:.2f}")  # fmt: skip
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def run_row(row: Row, sides: tuple[str, ...], ours: Path, theirs: Path, binary: Path, args: argparse.Namespace) -> Any:
    engine = Ours(ours, row.threads) if "ours" in sides else None
    peer: Any = None
    if "peer" in sides:
        if row.peer.startswith("transformers"):
            evict(theirs)  # its weights take the place
            peer = Transformers(row.case, row.threads, "no AMX" not in row.peer)
        else:
            peer = Llama(binary, theirs, row.threads, row.case.load, args.repeats)
    shape = (row.what, row.context, args.tokens)

    def run_ours(*kv: str) -> dict[str, Any]:
        if peer and row.case.load == "none":  # what it read through the page cache has taken our pages' place
            evict(theirs)
            read_into_memory(ours)
        assert engine is not None
        return engine.run(*shape, *kv)

    mine, other = run_ours if engine else None, partial(peer.run, *shape) if peer else None
    bf16 = partial(run_ours, "bf16") if engine and row.context >= 4096 else None
    try:
        wanted, out = row.rounds(args.rounds), list[dict[str, Any]]()
        while sum(agrees([r]) for r in out) < wanted and len(out) < 2 * wanted:
            out.append(measure(mine, other, bf16, row.threads))
        return out
    finally:
        if isinstance(peer, Transformers):
            peer.close()


def build(folder: Path) -> Path:
    """llama-bench built from llama-cpp-python's source distribution, for this processor, without AMX."""
    binary = folder / "build" / "bin" / "llama-bench"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, cwd=folder)

    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        download = "-m pip download --no-deps --no-binary :all: --no-build-isolation"
        run(sys.executable, *download.split(), LLAMA_CPP)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    flags = "" if os.uname().machine != "x86_64" else "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    run("cmake", "-S", str(source), "-B", "build", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF",
        "-DBUILD_SHARED_LIBS=OFF", f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}")  # fmt: skip
    run("cmake", "--build", "build", "--target", "llama-bench", "-j", str(os.cpu_count() or 1))
    return binary


def main() -> int:
    parser = argparse.ArgumentParser(
        description="\n".join((__doc__ or "").splitlines()), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-bench", type=Path, default=shutil.which("llama-bench"), help="the program")
    parser.add_argument("--build", type=Path, metavar="FOLDER", help="build it there first")
    parser.add_argument("--only", action="append", choices=[c.name for c in CASES], help="these cases")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 1024, 4096])
    parser.add_argument("--layers", type=int, help="fewer layers than the cases have: to try the script")
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")), help="for the models")
    parser.add_argument("--out", type=Path, default=bench_rows.DOCS / "peers.jsonl")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--repeats", type=int, default=2, help="of llama-bench")
    parser.add_argument("--tokens", type=int, default=16, help="decoded per measurement")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 2)
    results = Results(args.out, args.again)
    rows = [r for r in plan(args) if not results.has(r.key)]
    cost = {r: estimate(r, r.rounds(args.rounds), args.repeats, args.tokens) for r in rows}
    seconds = sum(cost.values())
    seconds += sum(8 * c.gigabytes for c in {r.case for r in rows})
    say(f"{len(rows)} rows, about {seconds / 60:.0f} minutes")
    if args.dry_run:
        for row in rows:
            say(f"{row.key}: about {cost[row]:.0f} s")
        return 0
    binary = build(args.build) if args.build else args.llama_bench
    if binary is None or not Path(binary).exists():
        raise SystemExit("llama-bench is not there: --llama-bench PATH, or --build FOLDER")
    command = "tools/bench_peers.py" + " --quick" * args.quick + " --build FOLDER"
    results.head |= {"machine": lab.machine(), "command": command}
    for case in dict.fromkeys(r.case for r in rows):
        mine = [r for r in rows if r.case is case]
        run_case(case, mine, Path(binary), args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
