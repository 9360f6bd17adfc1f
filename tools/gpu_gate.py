#!/usr/bin/env python3
"""Check the machine code of a CUDA library where there is no GPU to run it.

    tools/gpu_gate.py python/deepcalm/libdeepcalm_cuda.so
    tools/gpu_gate.py build/libdeepcalm_cuda.so --archs sm_80 sm_90        those it was built for

Reads the library's cubins with cuobjdump (from the toolkit, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
and fails when, on any architecture, a kernel has a stack frame, uses local memory, or more registers or static shared
memory than tools/gpu_budget.txt or the architecture allow; when a kernel that multiplies has no tensor core instruction
or no wide copy into shared memory; when a kernel of the budget or an architecture is missing; and when it cannot look.
--write notes the present use as the new budget.

The dynamic shared memory of a launch depends on the model: tests/device/test_cuda_memory.py holds it against
every device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUDGET = Path(__file__).with_name("gpu_budget.txt")
PRODUCTS = ("product", "absorb", "value", "ffn_in", "experts", "down", "head")  # weights through mma
THREADS = 256  # of a block (kThreads)
# What a device gives, by architecture: registers of a multiprocessor, bytes of its shared memory for one block.
ARCHS = {
    "sm_80": (65536, 163 << 10),  # A100
    "sm_86": (65536, 99 << 10),  # RTX 30, A10, A40
    "sm_89": (65536, 99 << 10),  # RTX 40, L4, L40
    "sm_90": (65536, 227 << 10),  # H100, H200
    "sm_100": (65536, 227 << 10),  # B200
    "sm_120": (65536, 99 << 10),  # RTX 50
}


@dataclass(slots=True)
class Kernel:
    """One kernel on one architecture."""

    arch: str
    name: str  # product<1>
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    mma: int = 0  # HMMA, IMMA
    copies: int = 0  # UBLKCP, LDGSTS
    wide: int = 0  # 128-bit loads
    spilled: int = 0  # LDL, STL


def short_name(mangled: str) -> str:
    """product<1> of the mangled stage_kernel<1, ProductArgs>, fill of kernel_fill."""
    if match := re.search(r"\d+stage_kernelILi(\d+)E.*?\d([A-Z]\w+?)Args", mangled):
        return f"{re.sub(r'(?<=[a-z])(?=[A-Z])', '_', match[2]).lower()}<{match[1]}>"
    match = re.search(r"\d+kernel_([a-z_]+?)(?:E|P)", mangled)
    return match[1] if match else mangled


def find_tool(name: str) -> str | None:
    """A program of the toolkit: on the path, or from its package in this Python."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    return shutil.which(name) or (str(packaged) if packaged.is_file() else None)


def read(library: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of every cubin of `library`."""
    env = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    kernels: dict[tuple[str, str], Kernel] = {}

    def lines(option: str) -> Iterator[str]:
        with subprocess.Popen([cuobjdump, option, str(library)], stdout=subprocess.PIPE, text=True, env=env) as p:
            assert p.stdout is not None
            yield from p.stdout
        if p.returncode:
            raise SystemExit(f"gpu_gate: {cuobjdump} {option} failed with code {p.returncode}")

    arch, kernel = "", Kernel("", "")
    for line in lines("--dump-resource-usage"):
        if line.startswith("arch ="):
            arch = line.split()[-1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = kernels.setdefault((arch, match[1]), Kernel(arch, short_name(match[1])))
        elif "REG:" in line:
            use = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            kernel.registers, kernel.stack = use["REG"], use["STACK"]
            kernel.shared, kernel.local = use["SHARED"], use["LOCAL"]
    for line in lines("-sass"):
        if line.startswith("arch ="):
            arch = line.split()[-1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.setdefault((arch, match[1]), Kernel(arch, short_name(match[1])))
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z0-9_.]+)", line):
            op = match[1]
            kernel.mma += op.startswith(("HMMA", "IMMA"))
            kernel.copies += op.startswith(("UBLKCP", "LDGSTS"))
            kernel.wide += op.startswith(("LD", "ST")) and ".128" in op
            kernel.spilled += op.split(".")[0] in ("LDL", "STL")
    return list(kernels.values())


def read_budget() -> dict[str, tuple[int, int]]:
    """Kernel -> registers, bytes of static shared memory."""
    out = {}
    for line in BUDGET.read_text().splitlines():
        if line and not line.startswith("#"):
            name, registers, shared = line.split()
            out[name] = (int(registers), int(shared))
    return out


def faults(kernels: list[Kernel], budget: dict[str, tuple[int, int]], archs: list[str]) -> list[str]:
    """What is wrong, one line each."""
    found = {k.arch for k in kernels}
    out = [f"{arch}: no kernel of it in the library" for arch in archs if arch not in found]
    out += [f"{arch}: what it gives is not known here, add a line to ARCHS" for arch in sorted(found - set(ARCHS))]
    for k in kernels:
        registers, shared = budget.get(k.name, (0, 0))
        most, most_shared = ARCHS.get(k.arch, (0, 0))
        checks: list[tuple[bool, str]] = [
            (k.stack == 0, f"a stack frame of {k.stack} bytes"),
            (k.spilled == 0 and k.local == 0, f"{k.spilled} accesses to local memory, {k.local} bytes of it"),
            (k.name in budget, "no line in gpu_budget.txt"),
            (k.registers <= registers, f"{k.registers} registers, {registers} allowed"),
            (k.registers * THREADS <= most, f"{k.registers} registers x {THREADS} threads, {most} in {k.arch}"),
            (k.shared <= min(shared, most_shared), f"{k.shared} bytes of static shared memory, {shared} allowed"),
        ]
        if k.name.split("<")[0] in PRODUCTS:
            checks += [(k.mma > 0, "no HMMA or IMMA"), (k.copies > 0, "no UBLKCP or LDGSTS")]
            checks += [(k.wide > 0, "no 128-bit access")]
        out += [f"{k.arch} {k.name}: {what}" for ok, what in checks if not ok]
    seen = {k.name for k in kernels}
    return out + [f"{name}: in gpu_budget.txt, not in the library" for name in sorted(set(budget) - seen)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--write", action="store_true", help="note the present use as the new budget")
    args = parser.parse_args()
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None or find_tool("nvdisasm") is None:
        raise SystemExit("gpu_gate: nothing checked: no cuobjdump and nvdisasm; "
                         "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")  # fmt: skip
    kernels = read(args.library, cuobjdump)
    if not kernels:
        raise SystemExit(f"gpu_gate: {args.library}: no kernels found")
    if args.write:
        use: dict[str, tuple[int, int]] = {}
        for k in kernels:
            old = use.get(k.name, (0, 0))
            use[k.name] = (max(old[0], -(-k.registers // 8) * 8), max(old[1], k.shared))
        text = "# kernel  registers (at most)  static shared memory, bytes (at most); tools/gpu_gate.py --write\n"
        BUDGET.write_text(text + "".join(f"{n} {r} {s}\n" for n, (r, s) in sorted(use.items())))
    print(f"{'arch':8} {'kernel':14} {'regs':>4} {'shared':>6} {'stack':>5} {'mma':>5} {'copies':>6} {'128 bit':>7}")
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        print(f"{k.arch:8} {k.name:14} {k.registers:4} {k.shared:6} {k.stack:5} {k.mma:5} {k.copies:6} {k.wide:7}")
    wrong = faults(kernels, read_budget(), args.archs)
    for line in wrong:
        print(f"gpu_gate: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
