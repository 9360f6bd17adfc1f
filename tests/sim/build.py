"""Compiles the simulator of the GPU for the tests: once, and again where a source, the compiler or its flags change.

``DEEPCALM_SIM=$(python tests/sim/build.py)`` is what ``device="sim"`` needs outside of them. Reads CXX and CXXFLAGS.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "sim"  # a file per build; may be deleted at any time
SOURCES = ("tests/sim/sim.cc", "kernels/pack.cc", "runtime/rope.cc")
FLAGS = (
    *("-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread", "-I."),
    *("-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion"),
)
LIBRARY = ("-shared", "-Wl,--version-script=runtime/cuda/exports.map")


def compile_with(source: str, *flags: str) -> Path:
    """The program or library of ``source`` and the simulator, compiled now or by an earlier run."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *flags]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # sanitizers are for the tests

    def run(*args: str) -> bytes:
        return subprocess.run([*command, *args], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout

    # The preprocessed sources: what they include too, the system's headers and the compiler's.
    text = run("-E", "-w", source, *SOURCES) + run("--version") + repr(command).encode()
    path = CACHE / f"{Path(source).stem}-{hashlib.sha256(text).hexdigest()[:16]}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            run(source, *SOURCES, "-o", f"{folder}/out")
            Path(folder, "out").replace(path)  # other runs may do the same
    return path


@functools.cache
def library() -> Path:
    """The device library on the simulator; its C++ library is its own, but under a sanitizer."""
    own = () if "-fsanitize" in os.environ.get("CXXFLAGS", "") else ("-static-libstdc++", "-static-libgcc")
    return compile_with("tests/sim/backend_sim.cc", *LIBRARY, *own)


if __name__ == "__main__":
    print(library())
