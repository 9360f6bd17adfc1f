"""Compiles the simulator of the GPU for the tests: once, and again where a source, the compiler or its flags change.

``DEEPCALM_SIM=$(python tests/sim/build.py)`` is what ``device="sim"`` needs outside of them. Reads CXX and CXXFLAGS.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = "-Wl,--version-script=runtime/cuda/exports.map"
CACHE = ROOT / "build" / "sim"  # a file per build; may be deleted at any time
# The simulator runs in every step of every thread; the stages' templates take twice as long to compile at -O2.
SOURCES = {"tests/sim/sim.cc": "-O2", "kernels/pack.cc": "-O1", "runtime/rope.cc": "-O1"}
FLAGS = (
    *("-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread", "-I."),
    *("-ftls-model=initial-exec", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion"),
)


def compile_with(source: str, *flags: str, link: Sequence[str] = ()) -> Path:
    """The program or library of ``source`` and the simulator, compiled now or by an earlier run."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    options = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *flags]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # sanitizers are for the tests
    sources = {source: "-O1", **SOURCES}

    def run(*args: str) -> bytes:
        command = [*compiler, *args, *options]  # which may set another -O
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout

    # The preprocessed sources: what they include too, the system's headers and the compiler's.
    text = run("-E", "-w", *sources) + run("--version") + repr((compiler, sources, options, link)).encode()
    path = CACHE / f"{Path(source).stem}-{hashlib.sha256(text).hexdigest()[:16]}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder, ThreadPoolExecutor(2) as pool:
            objects = {f"{folder}/{i}.o": (file, level) for i, (file, level) in enumerate(sources.items())}
            list(pool.map(lambda o: run(objects[o][1], "-c", objects[o][0], "-o", o), objects))
            run(*objects, *link, "-o", f"{folder}/out")
            Path(folder, "out").replace(path)  # other runs may do the same
    return path


def hash_of_headers() -> str:
    """What CMakeLists.txt calls DEEPCALM_HEADERS: of the headers whose types cross to the library."""
    headers = sorted(p for folder in ("kernels", "runtime") for p in (ROOT / folder).glob("*.h"))
    hashes = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in headers)
    return hashlib.sha256(hashes.encode()).hexdigest()


@functools.cache
def start() -> subprocess.Popen[bytes]:
    """Compiles the library beside what runs until somebody needs it."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(process.wait)
    return process


@functools.cache
def library() -> Path:
    """The device library on the simulator."""
    if start.cache_info().currsize:
        path, _ = start().communicate()
        if start().returncode == 0:
            return Path(os.fsdecode(path).removesuffix("\n"))
        # what went wrong there is said here
    headers = f'-DDEEPCALM_HEADERS="{hash_of_headers()}"'
    return compile_with("tests/sim/backend_sim.cc", headers, link=("-shared", EXPORTS))


if __name__ == "__main__":
    print(library())
