"""The thread pool where things go wrong: after fork, under Ctrl-C, with more threads than cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import deepcalm
import surface_cases
from deepcalm import _core

FORK = """
import os, sys, warnings
import deepcalm
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
model = deepcalm.Model(sys.argv[1], threads=3)
s = model.session()
want = s.prefill(list(range(3, 43))).tobytes()
s.truncate(0)
for generation in range(2):  # a child of a child, too
    pid = os.fork()
    if pid:
        break
    assert s.prefill(list(range(3, 43))).tobytes() == want
    s.truncate(0)
    s.prefill([3]), s.decode(4)
    s.truncate(0)
else:
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert s.prefill(list(range(3, 43))).tobytes() == want, "the parent's own threads still work"
code = os.waitstatus_to_exitcode(status)
os._exit(code) if generation else sys.exit(code)
"""


def test_fork_starts_new_threads() -> None:
    path = surface_cases.packed("v3", dtype="q8")
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(path)],
        env=surface_cases.environment(),
        timeout=60,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_ctrl_c_in_a_long_prefill_keeps_whole_passes() -> None:
    model = deepcalm.Model(deepcalm.demo_path(), threads=2)
    ids = np.random.default_rng(1).integers(10, 2000, 500).tolist()
    s = model.session(ctx=512, max_rows=32)
    want = s.prefill(ids).tobytes()
    timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        until = time.monotonic() + 30  # an interrupt that is lost must not hang the suite
        while time.monotonic() < until:
            s.truncate(0)
            s.prefill(ids)
    assert s.pos % 32 == 0 or s.pos == len(ids)
    assert s.tokens.tolist() == ids[: s.pos]
    s.truncate(max(0, s.pos - 5))  # where it stopped may be the end
    assert s.prefill(ids[s.pos :]).tobytes() == want


def test_more_threads_than_cores_do_not_collapse() -> None:
    """Waiting threads sleep. Where they spun or yielded, a pass of 200 barriers took a time slice for each of them.

    Their processor time is what tells: the clock's is also what other processes leave, one second here.
    """
    ids = np.random.default_rng(2).integers(10, 2000, 256).tolist()
    clock, processor = [], []
    for threads in (1, 4 * _core.default_threads() + 1):
        s = deepcalm.Model(deepcalm.demo_path(), threads=threads).session(ctx=256)
        times = []
        for _ in range(5):
            s.truncate(0)
            start = time.perf_counter(), time.process_time()
            s.prefill(ids)
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        clock.append(min(t[0] for t in times))
        processor.append(min(t[1] for t in times))
    assert processor[1] < 4 * processor[0] + 0.1, processor
    assert clock[1] < 4 * clock[0] + 1, clock
