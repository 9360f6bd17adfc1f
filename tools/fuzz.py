#!/usr/bin/env python3
"""Hostile files: seeded mutations of packed files, checkpoint folders and saved sessions, opened and run.

    tools/fuzz.py --cases 20000 --seed 1 -j 2        as many as you like; prints every failure with its seed
    tools/fuzz.py --one packed v3-q8 4711            one case again, in this process, with a traceback

A case must end in a correct run (finite logits, expert indices in range) or in a deepcalm.Error with a one-line
message. Any other exception, a crash, more than 20 seconds or more than 1 GB of memory is a failure. Cases run in
worker processes, many in each; one that dies or hangs names its case, and a new one goes on with the next.
tests/files/test_hostile.py runs 150 of them, a thousand with -m exhaustive. For a sanitizer build, preload its
libraries as .ci/run does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 20.0
MEMORY_BYTES = 1 << 30
N_IDS, N_NEW = 11, 2  # tokens of the prompt and generated after it
Json = Any

# Numbers that break arithmetic, types that break code, and near misses.
WEIRD: tuple[Json, ...] = (
    0, -1, 1, 2, 3, 7, 17, 31, 33, 63, 65, 255, 4095, 65537, 10**6, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1,
    2**63, 2**64, 10**40, -(2**63), 0.5, -0.0, 1e-300, 1e308, math.inf, -math.inf, math.nan, None, True, False, "", "0",
    "x" * 300, "\u0000", "a\nb", "\ud800", [], [1], [[]], {}, {"a": 1}, [2**40, 2**40], "bf16", "F32", "greedy", "yarn",
)  # fmt: skip


# --- containers ---------------------------------------------------------------------------------------------------
def split_container(data: bytes) -> tuple[dict[str, Json], bytes]:
    n = int.from_bytes(data[:8], "little")
    header: dict[str, Json] = json.loads(data[8 : 8 + n])
    return header, data[8 + n :]


def join_container(header: Json, data: bytes) -> bytes:
    """The container with this header (any JSON at all), padded as packed files are."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("utf-8", "surrogatepass")
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def near(rng: random.Random, value: Json) -> Json:
    """Something else in the place of `value`: close to it, or from the list of horrors."""
    if isinstance(value, bool) or not isinstance(value, int) or rng.random() < 0.4:
        return rng.choice(WEIRD)
    flipped = value ^ (1 << rng.randrange(40))
    return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value + 64, flipped))


def mutate_json(rng: random.Random, value: Json) -> str:
    """Change one place somewhere inside a JSON object or list. Returns what was done."""
    path = ""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return path + " is empty"
        key = rng.choice(keys)
        path += f"/{key}"
        child = value[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.7:
            value = child
            continue
        action = rng.randrange(6)
        if action == 0:
            del value[key]
            return f"delete {path}"
        if action == 1 and isinstance(value, dict):
            suffix = rng.choice(("x", " ", ".weight", "\n", "\u0000", "\ud800", "\u4e00" * 60))
            value[str(key) + suffix] = value.pop(key)
            return f"rename {path}"
        if action == 2 and len(keys) > 1:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
            return f"swap {path} and {other}"
        value[key] = near(rng, child)
        return f"{path} = {str(value[key])[:40]!r}"


def mutate_bytes(rng: random.Random, data: bytearray, start: int = 0) -> str:
    """Damage the bytes from `start` on."""
    size = len(data) - start
    if size < 16:
        data.extend(rng.randbytes(64))
        return "append 64 bytes"
    at = start + rng.randrange(size - 8)
    action = rng.randrange(6)
    if action == 0:
        del data[at:]
        return f"truncate to {at}"
    if action == 1:
        extra = rng.choice((1, 8, 63, 64, 4096))
        data.extend(rng.choice((b"\0" * extra, rng.randbytes(extra))))
        return f"append {extra} bytes"
    if action == 2:  # non-finite f32, f16, bf16; NaN e4m3
        nan, inf = struct.pack("<f", math.nan), struct.pack("<f", math.inf)
        pattern = rng.choice((nan, inf, b"\x00\x7e", b"\x00\x7c", b"\xff" * 8))
        at -= at % len(pattern)
        data[at : at + len(pattern)] = pattern
        return f"{pattern.hex()} at {at}"
    if action == 3:
        n = min(rng.choice((64, 1024, 16384)), len(data) - at)
        data[at : at + n] = rng.choice((b"\xff" * n, b"\0" * n, rng.randbytes(n)))
        return f"overwrite {n} bytes at {at}"
    for _ in range(rng.choice((1, 4, 64))):
        data[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
    return "flip bits"


def mutate_container(rng: random.Random, data: bytes, nested: Sequence[str] = ()) -> tuple[bytes, str]:
    """A damaged safetensors file. `nested`: keys of __metadata__ that hold JSON of their own."""
    action = rng.randrange(10)
    header, body = split_container(data)
    if action == 0:
        n = len(data) - len(body) - 8
        length = rng.choice((0, 1, 2, n - 1, n + 1, n - 64, n + 64, len(data), 2**31, 2**63 - 8, 2**64 - 1)) % 2**64
        return length.to_bytes(8, "little") + data[8:], f"header length {length}"
    if action == 1:
        damaged = bytearray(data)
        return bytes(damaged[:8]) + flip(rng, damaged[8 : len(data) - len(body)]) + body, "flip bits of the header"
    if action == 2:
        damaged = bytearray(data)
        what = mutate_bytes(rng, damaged)
        return bytes(damaged), what
    if action == 3:
        damaged = bytearray(body)
        what = mutate_bytes(rng, damaged)
        return join_container(header, bytes(damaged)), f"data: {what}"
    if action == 4:
        names = [k for k in header if k != "__metadata__"]
        a, b = rng.choice(names), rng.choice(names)
        field = rng.choice(("data_offsets", "shape", "dtype", None))
        if field:
            header[a][field], header[b][field] = header[b][field], header[a][field]
        else:
            header[a], header[b] = header[b], header[a]
        return join_container(header, body), f"swap {field or 'entries'} of {a} and {b}"
    if action >= 6 and nested:
        key = rng.choice(nested)
        inner = json.loads(header["__metadata__"][key])
        what = mutate_json(rng, inner)
        header["__metadata__"][key] = json.dumps(inner)
        return join_container(header, body), f"{key}: {what}"
    what = mutate_json(rng, header)
    if rng.random() < 0.2:
        what += ", " + mutate_json(rng, header)
    return join_container(header, body), f"header: {what}"


def flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b'{}[]",:0-9e'))
    return bytes(data)


# --- the three kinds of cases -------------------------------------------------------------------------------------
def check_run(model: Any) -> None:
    """A short run on an open model: prompt, a few tokens, experts in range. Raises what the runtime raises."""
    import numpy as np

    rng = random.Random(0)
    config = model.config
    session = model.session(ctx=min(N_IDS + N_NEW + 2, config["max_position_embeddings"]), kv=rng.choice(("f16", "q8")))
    with session.trace() as taps:
        logits = session.prefill([rng.randrange(config["vocab_size"]) for _ in range(min(N_IDS, session.ctx - N_NEW))])
    for name, tap in taps.items():
        if name.endswith("topk_idx") and not all(0 <= e < config["n_routed_experts"] for e in tap.flat):
            raise AssertionError(f"{name}: {tap.min()}..{tap.max()} of {config['n_routed_experts']} experts")
    for token in session.generate(max_tokens=N_NEW):  # refuses logits that are not finite
        if not 0 <= token < config["vocab_size"]:
            raise AssertionError(f"token {token} of {config['vocab_size']}")
    if session.stats.decode_tokens and not np.isfinite(logits[: model.n_valid]).all():  # the rest is padding, masked
        raise AssertionError("logits are not finite, and generation went on")


def run_packed(rng: random.Random, base: Path, scratch: Path) -> tuple[str, Callable[[], None]]:
    import deepcalm

    path = scratch / "case.dcalm"
    data, what = mutate_container(rng, base.read_bytes(), ("config", "config", "tensors", "tensors", "source"))
    path.write_bytes(data)

    def run() -> None:
        model = deepcalm.Model(path, threads=1)
        if model.has_tokenizer:
            model.encode("Once upon a time")
            model.decode([1, 2, 3])
        check_run(model)

    return what, run


def run_checkpoint(rng: random.Random, base: Path, scratch: Path) -> tuple[str, Callable[[], None]]:
    import deepcalm

    folder, packed = scratch / "checkpoint", scratch / "out.dcalm"
    shutil.copytree(base, folder)
    target = rng.choice([p for p in sorted(folder.iterdir()) for _ in range(4 if p.suffix == ".safetensors" else 2)])
    if rng.random() < 0.03:
        target.unlink()
        what = "delete"
    elif target.suffix == ".safetensors":
        data, what = mutate_container(rng, target.read_bytes())
        target.write_bytes(data)
    elif target.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(target.read_text())
        what = mutate_json(rng, value)
        target.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    else:
        damaged = bytearray(target.read_bytes())
        what = mutate_bytes(rng, damaged)
        target.write_bytes(damaged)
    dtype = rng.choice(("source", "q8", "q4", "bf16", "f32"))

    def run() -> None:
        try:
            deepcalm.pack(folder, packed, dtype=dtype)
        except BaseException:
            if packed.exists():
                raise AssertionError("packing failed and left its output behind") from None
            raise
        check_run(deepcalm.Model(packed, threads=1))

    return f"{target.name}: {what}, packed as {dtype}", run


def run_saved(rng: random.Random, base: Path, scratch: Path) -> tuple[str, Callable[[], None]]:
    """`base` is a packed file; the session saved beside it is what gets damaged."""
    import deepcalm

    path = scratch / "case.session"
    data, what = mutate_container(rng, base.with_suffix(".session").read_bytes())
    path.write_bytes(data)

    def run() -> None:
        model = deepcalm.Model(base, threads=1)
        session = model.session(ctx=N_IDS + N_NEW + 2)
        session.restore(path, force=rng.random() < 0.5)
        session.truncate(min(session.pos, N_IDS))
        list(session.generate([1], max_tokens=N_NEW))

    return what, run


def run_self_test(_rng: random.Random, base: Path, _scratch: Path) -> tuple[str, Callable[[], None]]:
    """What the harness must notice; never part of a plan."""

    def run() -> None:
        if base.name == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif base.name == "hang":
            time.sleep(3600)
        elif base.name == "memory":
            bytearray(MEMORY_BYTES + (64 << 20))
        elif base.name == "exception":
            raise KeyError("gone")

    return base.name, run


KINDS = {"packed": run_packed, "checkpoint": run_checkpoint, "saved": run_saved, "self-test": run_self_test}


# --- base files ---------------------------------------------------------------------------------------------------
def make_bases(folder: Path) -> dict[str, list[str]]:
    """Write the undamaged files below `folder`. Returns the base names of every kind."""
    sys.path.insert(0, str(ROOT / "tests"))
    import compressed
    import deepcalm
    import tiny

    small: dict[str, Any] = {"num_hidden_layers": 2}
    checkpoints = {
        "v2_lite": tiny.write(folder / "v2_lite", "v2_lite", **small),
        "v3": tiny.write(folder / "v3", "v3", **small),
        "gigachat3": tiny.write(folder / "gigachat3", "gigachat3"),
        "kimi_k2": tiny.write(folder / "kimi_k2", "kimi_k2", **small),
        "moonlight": tiny.write(folder / "moonlight", "moonlight", tokenizer="tiktoken", **small),
        "sarvam": tiny.write(folder / "sarvam", "sarvam", **small),
        "mistral4": tiny.write(folder / "mistral4", "mistral4", **small),
        "minicpm3": tiny.write(folder / "minicpm3", "minicpm3", **small),
    }
    for scheme in ("fp8 channel", "int8 channel", "int8 group 128", "mxfp4", "nvfp4", "modelopt nvfp4"):
        name = scheme.replace(" ", "-")
        checkpoints[name] = compressed.write(folder / name, scheme)
    packed = []
    for name, dtype in (("v2_lite", "bf16"), ("v3", "q8"), ("gigachat3", "source"), ("kimi_k2", "q4"), ("v3", "f32"),
                        ("mistral4", "source"), ("minicpm3", "q8")):  # fmt: skip
        packed.append(f"{name}-{dtype}.dcalm")
        deepcalm.pack(checkpoints[name], folder / packed[-1], dtype=dtype)
    for name in packed[:2]:
        session = deepcalm.Model(folder / name, threads=1).session(ctx=N_IDS + N_NEW + 2)
        session.prefill(list(range(N_IDS)))
        session.save((folder / name).with_suffix(".session"))
    return {"packed": packed, "checkpoint": list(checkpoints), "saved": packed[:2]}


# --- worker -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    base: str
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended: "ok", "refused" (a deepcalm.Error) or "bad"; `detail` is the message or what went wrong."""

    case: Case
    status: str
    detail: str


def run_case(case: Case, bases: Path, raise_it: bool = False) -> Outcome:
    """Run one case in this process."""
    from deepcalm import Error

    rng = random.Random(f"{case.kind}/{case.base}/{case.seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=bases) as scratch:
        what, run = KINDS[case.kind](rng, bases / case.base, Path(scratch))
        if raise_it:
            print(f"{case}: {what}")
        try:
            run()
        except Error as e:
            message = str(e)
            if raise_it:
                print(f"refused: {type(e).__name__}: {message}")
            if not message.strip() or len(message) > 1000 or not all(c.isprintable() for c in message):
                return Outcome(case, "bad", f"{what}: message is not one printable line: {message!r}")
            return Outcome(case, "refused", f"{what}: {message}")
        except BaseException as e:
            if raise_it:
                raise
            return Outcome(case, "bad", f"{what}: {type(e).__name__}: {e}"[:2000])
    return Outcome(case, "ok", what)


def worker(bases: Path) -> None:
    """Read cases from stdin, one JSON list per line, and answer each with [status, detail]."""
    import deepcalm

    deepcalm.Model(next(bases.glob("*.dcalm")), threads=1)  # load everything before measuring
    with Path("/proc/self/statm").open() as f:
        virtual, resident = (int(x) * resource.getpagesize() for x in f.read().split()[:2])
    sanitized = "libasan" in Path("/proc/self/maps").read_text()
    if not sanitized:  # a sanitizer reserves terabytes
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, virtual + MEMORY_BYTES))
    for line in sys.stdin:
        outcome = run_case(Case(*json.loads(line)), bases)
        status, detail = outcome.status, outcome.detail
        # ru_maxrss would begin with that of the process that started this one
        status_lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(s.split()[1]) for s in status_lines if s.startswith("VmHWM")) * 1024
        if peak > resident + MEMORY_BYTES * (3 if sanitized else 1):
            status, detail = "bad", f"{detail}: {peak - resident} bytes of memory"
        print(json.dumps([status, detail]), flush=True)


class Worker:
    """A worker process that is replaced when it dies or hangs."""

    def __init__(self, bases: Path, timeout: float = TIMEOUT_S) -> None:
        self.bases, self.timeout = bases, timeout
        self.process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def run(self, case: Case) -> Outcome:
        errors = self.bases / f"stderr-{threading.get_ident()}.txt"
        if self.process is None:
            with errors.open("w") as err:
                self.process = subprocess.Popen(
                    [sys.executable, "-W", "error", __file__, "--worker", str(self.bases)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True,
                )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([case.kind, case.base, case.seed]) + "\n")
            self.process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(self.timeout):
                    self.close()
                    return Outcome(case, "bad", f"no answer in {self.timeout:.0f} s")
            line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.close()
            return Outcome(case, "bad", f"worker died with {code}: {errors.read_text()[-3000:]}")
        return Outcome(case, *json.loads(line))


def run_cases(cases: Sequence[Case], bases: Path, jobs: int) -> Iterator[Outcome]:
    """Run the cases in `jobs` worker processes; outcomes in no particular order."""
    results: list[Outcome] = []
    todo = iter(cases)
    lock = threading.Lock()

    def serve() -> None:
        own = Worker(bases)
        while True:
            with lock:
                case = next(todo, None)
            if case is None:
                break
            outcome = own.run(case)
            with lock:
                results.append(outcome)
        own.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for t in threads:
        t.start()
    seen = 0
    while seen < len(cases):
        alive = any(t.is_alive() for t in threads)
        with lock:
            fresh = results[seen:]
        yield from fresh
        seen += len(fresh)
        if not fresh and not alive:
            break
        if not fresh:
            time.sleep(0.05)


def plan(bases: dict[str, list[str]], n: int, seed: int) -> list[Case]:
    """`n` cases: three packed files to one checkpoint folder, and a few saved sessions."""
    kinds = ("packed", "packed", "checkpoint", "packed", "packed", "checkpoint", "packed", "saved")
    out = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        names = bases[kind]
        out.append(Case(kind, names[(i // len(kinds) + i) % len(names)], seed * 1_000_000 + i))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "BASE", "SEED"))
    parser.add_argument("--show", action="store_true", help="print every outcome")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    with tempfile.TemporaryDirectory(prefix="deepcalm-fuzz-") as folder:
        bases = make_bases(Path(folder))
        if args.one:
            kind, base, seed = args.one
            print(run_case(Case(kind, base, int(seed)), Path(folder), raise_it=True).status)
            return 0
        count = {"ok": 0, "refused": 0, "bad": 0}
        for outcome in run_cases(plan(bases, args.cases, args.seed), Path(folder), args.jobs):
            count[outcome.status] += 1
            if args.show or outcome.status == "bad":
                c = outcome.case
                print(f"{outcome.status} {c.kind} {c.base} {c.seed}: {outcome.detail}", flush=True)
        print(", ".join(f"{n} {status}" for status, n in count.items()))
        return int(count["bad"] > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
