#!/usr/bin/env python3
"""Everything that needs a GPU, in one unattended run: build, tests, sanitizers, determinism, speed.

    tools/gpu_check.py OUT                all phases; OUT gets a log per phase, gpu_check.jsonl and the table
    tools/gpu_check.py OUT --only speed   some phases (sanitizer and speed name several), may be given again; earlier
                                          results in OUT stay
    tools/gpu_check.py OUT --device sim   the script itself, on the simulated GPU with toy shapes: no figure counts

Needs nvcc 13, a driver, this Python with the package's requirements, pybind11, cmake, pytest, for single stages cupy;
no network. Builds into build/gpu and python/deepcalm. Every phase has 10 minutes and a process of its own. Weights are
drawn on the device from a seed. Ends with code 1 when a phase failed; what is missing (a sanitizer, a profiler) is said
and is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonl

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 570  # seconds of a phase
# phase -> (name, geometry, format, goal: share of the measured read bandwidth at contexts 128 and 4096)
MODELS = {
    "speed-bf16": ("v2-lite bf16", "v2-lite", "bf16", 0.78),
    "speed-f8": ("v2-lite f8", "v2-lite", "f8", 0.66),
    "speed-q4": ("v2-lite q4", "v2-lite", "q4", 0.55),
    "speed-v3": ("v3 slice f8", "v3:8", "f8", 0.88),
}
SANITIZERS = ("sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-synccheck", "sanitizer-initcheck")
PHASES = ("build", "tests", *SANITIZERS, "bits", *MODELS, "ncu")
CONTEXTS = (128, 4096, 32768)
TOY = {
    **{"hidden_size": 256, "num_attention_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"qk_rope_head_dim": 32, "intermediate_size": 320, "moe_intermediate_size": 64, "n_routed_experts": 16},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 512, "n_group": 1, "topk_group": 1},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
Json = dict[str, Any]


class Check:
    """The run: where it writes, what it found."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device, self.toy = out, device, device == "sim"
        self.phases: dict[str, Json] = {}
        out.mkdir(parents=True, exist_ok=True)

    def command(self, name: str, *command: str, limit: int = LIMIT - 10, **env: str) -> tuple[bool, str]:
        """Runs a command into OUT/name.log; (ended well in time, the end of its output)."""
        log = self.out / f"{name}.log"
        with log.open("w") as f:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "python"), **env},
                    stdout=f, stderr=subprocess.STDOUT, timeout=limit, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = -1
                f.write(f"\nended after {limit} s\n")
            except OSError as e:
                code = -1
                f.write(str(e))
        return code == 0, log.read_text(errors="replace")[-2000:].strip()

    # ---- build, tests, sanitizers

    def build(self) -> Json:
        """The library for this GPU and the extension module, in place; then the gate on its machine code."""
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        cmake = ["cmake", "-S", ".", "-B", "build/gpu", *ninja, f"-DPython_EXECUTABLE={sys.executable}",
                 f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python' / 'deepcalm'}", "-DSKBUILD_PROJECT_VERSION=0",
                 "-DDEEPCALM_CUDA=ON", "-DDEEPCALM_CUDA_ARCHS=native"]  # fmt: skip
        if self.toy:
            return {"ok": True, "note": "the extension module is built by hand, the simulator where it is used"}
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        start = time.time()
        ok, tail = self.command("configure", *cmake, CUDACXX=os.environ.get("CUDACXX", nvcc))
        if ok:
            ok, tail = self.command("compile", "cmake", "--build", "build/gpu", "--parallel")
        if not ok:
            return {"ok": False, "end": tail}
        arch = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True,
                              text=True, check=False).stdout.split("\n")[0].replace(".", "")  # fmt: skip
        library = "python/deepcalm/libdeepcalm_cuda.so"
        _, gate = self.command("gate", sys.executable, "tools/gpu_gate.py", library, "--archs", f"sm_{arch}")
        return {"ok": True, "seconds": time.time() - start, "gate": gate.splitlines()[-1] if gate else ""}

    def tests(self) -> Json:
        """The tests of the simulator, on the device; the stages' values from a fresh seed."""
        seed = 0 if self.toy else int(time.time()) % 10**6
        ok, tail = self.command(
            "pytest", sys.executable, "-m", "pytest", "-q", "-rs", "tests/device", "-m", "exhaustive or not exhaustive",
            "-k", f"[{self.device} or {self.device}] or test_device.py", DEEPCALM_TEST_SEED=str(seed),
        )  # fmt: skip
        return {"ok": ok, "seed": seed, "end": tail.splitlines()[-1] if tail else ""}

    def sanitizer(self, tool: str) -> Json:
        """compute-sanitizer over the small shapes; its race check sees shared memory only."""
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).is_file():
            return {"ok": True, "note": "no compute-sanitizer here: not run"}
        stages = "product_norms or absorb_writes or attention_matches or ffn_in or experts_and_down or head_norms"
        ok, tail = self.command(
            f"compute-{tool}", program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
            "-m", "exhaustive or not exhaustive", "tests/device/test_device_run.py", "tests/device/test_cuda_stages.py",
            "-k",
            f"[{self.device} and (stages_equal_oracle and v3-bf16-q4 or session_goes_on or fwd and ({stages}))",
        )  # fmt: skip
        return {"ok": ok, "end": tail.splitlines()[-1] if tail else ""}

    # ---- models

    @contextmanager
    def model(self, spec: str, dtype: str) -> Iterator[Any]:
        """A synthetic model on the device; no weights travel."""
        sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]
        from deepcalm import _core
        from deepcalm.files import packed
        from deepcalm.measure import synthetic
        from sim import build

        overrides = [f"{k}={json.dumps(v)}" for k, v in TOY.items()] if self.toy else []
        if spec == "v3:8" and not self.toy:
            overrides = ["first_k_dense_replace=1"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.dcalm"
            synthetic.write_model(path, spec, dtype, overrides=overrides, sparse=True)
            with packed.PackedFile(path) as file:
                library = build.library() if self.toy else Path(_core.__file__).with_name("libdeepcalm_cuda.so")
                config = file.config
                table = file.tensor_table()
                core = _core.Model.open_on(str(library), str(path), file.fileno(), config, table, fill_seed=7)
            yield core, config

    @staticmethod
    def session(core: Any, ctx: int, mtp: bool = False, rows: int = 512) -> Any:
        from deepcalm import _core

        return _core.Session(core, ctx, "f16", min(rows, ctx), mtp)

    def bits(self) -> Json:
        """Law L1 on real shapes: replays, groupings, drafts."""
        import numpy as np

        found: Json = {"ok": True}
        n = 96 if self.toy else 640
        for spec, dtype in (("v2-lite", "q4"), ("v3:8" if self.toy else "v3:3", "f8")):
            with self.model(spec, dtype) as (core, config):
                ids = np.random.default_rng(3).integers(0, config["vocab_size"], n).astype(np.int32)
                wrong: list[str] = []

                def run(sizes: list[int], core: Any = core, ids: Any = ids) -> Any:
                    s = self.session(core, n + 64)
                    at, out = 0, None
                    for size in sizes:
                        out = s.forward(ids[at : at + size])[0]
                        at += size
                    return out, s.read_cache(False)

                truth = run([min(512, n), *([n - 512] if n > 512 else [])])
                for size in (16, 64):
                    other = run([size] * (n // size) + [n % size] * (n % size > 0))
                    if not all(np.array_equal(a, b) for a, b in zip(truth, other, strict=True)):
                        wrong.append(f"chunks of {size}")
                for rows in range(1, 9):
                    tail = (8 if self.toy else 24) // rows * rows
                    other = run([n - tail, *[rows] * (tail // rows)])
                    if not all(np.array_equal(a, b) for a, b in zip(truth, other, strict=True)):
                        wrong.append(f"{rows} rows")
                s = self.session(core, n + 64)
                s.forward(ids[: n - 1])
                first = None
                for i in range(20 if self.toy else 200):
                    s.truncate(n - 1)
                    again = s.forward(ids[n - 1 :])
                    first = again if first is None else first
                    if not np.array_equal(first, again):
                        wrong.append(f"replay {i}")
                        break
                ks = (0, 1, 3, 7) if config["num_nextn_predict_layers"] else (0,)
                texts = [self.decode(core, config, ids[:64], 24, k)[0] for k in ks]
                wrong += [f"the text differs with {k} drafts" for k, t in zip(ks, texts, strict=True) if t != texts[0]]
                found[f"{spec} {dtype}"] = wrong or "same bits"
                found["ok"] &= not wrong
        return found

    def decode(
        self, core: Any, config: Json, prompt: Any, tokens: int, k: int, ctx: int = 0
    ) -> tuple[list[int], float, list[Json]]:
        """A device text of rounds with k drafts: (tokens, seconds by the device's clock, rounds)."""
        from deepcalm.sampling import Sampling

        s = self.session(core, ctx or len(prompt) + tokens + 16, mtp=k > 0)
        for i in range(0, len(prompt), s.max_rows):
            s.forward(prompt[i : i + s.max_rows], "last")
        s.decode_start(int(prompt[-1]), Sampling(), config["vocab_size"], tokens, [])
        rounds: list[Json] = []
        queued = 0
        while not rounds or not rounds[-1]["stop"]:
            while queued - len(rounds) < 4:
                s.decode_step(k)
                queued += 1
            rounds += s.decode_poll()
        s.decode_finish()
        live = [r for r in rounds if r["tokens"]]
        return [t for r in live for t in r["tokens"]], 1e-9 * (live[-1]["end_ns"] - live[0]["end_ns"]), live

    # ---- speed

    def speed(self, phase: str) -> Json:
        """Bandwidth, then a model: whole steps, stages, prefill, drafting."""
        import numpy as np

        name, spec, dtype, goal = MODELS[phase]
        row: Json = {"goal": goal, "contexts": {}}
        found: Json = {"ok": True, "name": name, "model": row}
        with self.model(spec, dtype) as (core, config):
            contexts = (32, 96) if self.toy else CONTEXTS
            ctx = contexts[-1] + 64
            s = self.session(core, ctx)
            found["gpu"] = json.loads(s.device_report("device"))
            found["bandwidth"] = json.loads(s.device_report(f"bandwidth:{1 << (20 if self.toy else 32)}"))
            ids = np.random.default_rng(5).integers(0, config["vocab_size"], contexts[-1]).astype(np.int32)
            for at in contexts:
                while s.pos < at:
                    s.forward(ids[s.pos : min(at, s.pos + s.max_rows)], "last")
                report = json.loads(s.device_report(f"stages:1:{at}"))
                read = core.active_bytes_per_token(at, "f16")
                share = read / report["seconds"] / 1e9 / found["bandwidth"]["gbps"]
                row["contexts"][at] = {
                    **{"seconds": report["seconds"], "bytes": read, "share": share, "stages": report["stages"]},
                    "rows": {n: json.loads(s.device_report(f"stages:{n}:{at}"))["seconds"] for n in (2, 4, 8)},
                }
            short = ids[:128] if not self.toy else ids[:16]
            text, seconds, _ = self.decode(core, config, short, 16 if self.toy else 128, 0)
            row["decode"] = (len(text) - 1) / max(seconds, 1e-9)
            n = len(ids) if self.toy else 1024
            times = []
            for _ in range(3):
                s = self.session(core, n)
                start = time.perf_counter()
                for i in range(0, n, s.max_rows):
                    s.forward(ids[i : i + s.max_rows], "last" if i + s.max_rows >= n else "none")
                times.append(time.perf_counter() - start)
            row["prefill_rate"] = n / statistics.median(times)
            if dtype == "bf16" and (rate := self.matrix_rate()):
                # 2 bytes and 2 operations a weight; the head multiplies one row. Attention is not counted.
                per_token = core.active_bytes_per_token(0, "f16") - 2 * config["vocab_size"] * config["hidden_size"]
                row["matrix_rate"], row["prefill_share"] = rate, per_token * row["prefill_rate"] / rate
            if config["num_nextn_predict_layers"]:
                row["drafting"] = self.drafting(core, config, short)
        return found

    def matrix_rate(self) -> float | None:
        """Operations per second of cuBLAS on 16-bit matrices (f16 and bf16 run at one rate); None without cupy."""
        try:
            cupy: Any = importlib.import_module("cupy")
        except ImportError:
            return None
        a, times = cupy.ones((8192, 8192), cupy.float16), []
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            cupy.cuda.Device().synchronize()
            times.append(time.perf_counter() - start)
        return float(2 * 8192**3 / min(times))

    def drafting(self, core: Any, config: Json, prompt: Any) -> Json:
        """Seconds of a round with k drafts; random weights accept nothing: gains at an acceptance follow from them."""
        cost = {}
        for k in (0, 1, 2, 3):
            _, seconds, rounds = self.decode(core, config, prompt, 8 if self.toy else 96, k)
            cost[k] = seconds / max(len(rounds) - 1, 1)
        gains = {
            str(a): {k: sum(a**j for j in range(k + 1)) * cost[0] / cost[k] for k in (1, 2, 3)} for a in (0.7, 0.85)
        }
        return {"seconds_per_round": cost, "gain_at_acceptance": gains}

    def ncu(self) -> Json:
        """Two layers under Nsight Compute, a pass of 128 rows and one of 1: bytes moved, bank conflicts, occupancy."""
        program = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
        if not Path(program).is_file():
            return {"ok": True, "note": "no ncu here: not run"}
        metrics = ",".join((
            "dram__bytes_read.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "l1tex__data_bank_conflicts_pipe_lsu.sum", "sm__warps_active.avg.pct_of_peak_sustained_active",
        ))  # fmt: skip
        script = ("import sys; sys.path[:0] = ['tools']; from pathlib import Path; import gpu_check as g; "
                  f"c = g.Check(Path({str(self.out)!r}), {self.device!r})\n"
                  "with c.model('v2-lite:2', 'f8') as (core, config):\n"
                  "    s = c.session(core, 256)\n    s.forward(list(range(1, 129)))\n"
                  "    s.trace(['*']); s.forward([5])")  # fmt: skip
        ok, tail = self.command(
            "ncu-kernels", program, "--clock-control", "none",
            "--kernel-name", "regex:stage_kernel", "--launch-count", "200", "--metrics", metrics, "--csv",
            sys.executable, "-c", script,
        )  # fmt: skip
        return {"ok": True, "end": tail.splitlines()[-1] if ok and tail else f"failed: {tail[-200:]}"}

    # ---- the table

    def table(self) -> str:
        """What a person reads; Markdown."""
        out = []
        for name, phase in self.phases.items():
            note = phase.get("error") or phase.get("note") or phase.get("end") or ""
            out.append(f"- {name}: {'ok' if phase.get('ok') else 'FAILED'} ({phase['wall']:.0f} s) {note}".rstrip())
        speeds = [p for n, p in self.phases.items() if n in MODELS and "model" in p]
        if speeds:
            out += ["", "| model | read bandwidth | context | tok/s, share | goal |", "|---|---|---|---|---|"]
        for p in speeds:
            for at, cell in p["model"]["contexts"].items():
                speed = f"{1 / cell['seconds']:.0f}, {cell['share']:.0%}"
                goal = f"{p['model']['goal']:.0%}" if int(at) <= 4096 else ""
                gbps = f"{p['bandwidth']['gbps']:.0f} GB/s"
                out.append(f"| {p['name']} | {gbps} | {at} | {speed} | {goal} |")
        if speeds:
            out += ["", "| model | stage | calls | bytes | us | share of the bandwidth |", "|---|---|---|---|---|---|"]
        for p in speeds:
            for s in next(iter(p["model"]["contexts"].values()))["stages"]:
                share = f"{s['bytes'] / s['seconds'] / 1e9 / p['bandwidth']['gbps']:.0%}"
                values = (p["name"], s["stage"], s["calls"], s["bytes"], f"{1e6 * s['seconds']:.1f}", share)
                out.append(f"| {' | '.join(map(str, values))} |")
        for p in speeds:
            row = p["model"]
            share = f", {row['prefill_share']:.0%} of the matrix rate" if "prefill_share" in row else ""
            out += ["", f"{p['name']} on {p['gpu']['name']}: decoding on the device {row['decode']:.0f} tok/s; "
                    f"prefill {row['prefill_rate']:.0f} tok/s{share}"]  # fmt: skip
            if "drafting" in row:
                out.append(f"  drafting: {json.dumps(row['drafting'])}")
        return "\n".join(out)

    def run(self, phases: list[str]) -> int:
        """Phase after phase, each in a process of its own, so that a hang or a crash ends that phase alone."""
        path = self.out / "gpu_check.jsonl"
        head, *earlier = jsonl.read(path) or [{}]
        if head.get("device") == self.device and phases != list(PHASES):
            self.phases = {row.pop("phase"): row for row in earlier}
        for name in phases:
            start = time.time()
            done = self.out / f"{name}.json"
            done.unlink(missing_ok=True)
            ok, tail = self.command(f"phase-{name}", sys.executable, str(Path(__file__)), str(self.out), "--device",
                                    self.device, "--inside", name, limit=LIMIT)  # fmt: skip
            phase = json.loads(done.read_text()) if ok and done.is_file() else {"ok": False, "error": tail[-300:]}
            self.phases[name] = {**phase, "wall": time.time() - start}
            print(f"{name}: {'ok' if phase.get('ok') else 'FAILED'}, {time.time() - start:.0f} s", flush=True)
            self.save(path)  # after each: whoever ends this process loses one phase
        print(self.table())
        return 0 if all(p.get("ok") for p in self.phases.values()) else 1

    def save(self, path: Path) -> None:
        """The results so far, in the order of the phases, and the table of them."""
        self.phases = {name: self.phases[name] for name in PHASES if name in self.phases}
        program = shutil.which("nvidia-smi")
        facts = subprocess.run([program], capture_output=True, text=True, check=False).stdout if program else ""
        head = {"device": self.device, "nvidia_smi": facts}
        jsonl.write(path, [head, *({"phase": name} | phase for name, phase in self.phases.items())])
        (self.out / "table.txt").write_text(self.table() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=(*PHASES, "sanitizer", "speed"), action="append")
    parser.add_argument("--device", choices=("cuda", "sim"), default="cuda")
    parser.add_argument("--inside", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    check = Check(args.out.resolve(), args.device)
    if args.inside is None:
        only = args.only or PHASES
        return check.run([p for p in PHASES if p in only or p.split("-")[0] in only])
    group, _, part = args.inside.partition("-")
    phase: Callable[..., Json] = getattr(check, group)
    found = phase(args.inside) if group == "speed" else phase(part) if part else phase()
    (check.out / f"{args.inside}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
