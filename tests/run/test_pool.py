"""The thread pool where things go wrong: no threads, exceptions, fork, Ctrl-C, too few cores, other rounding."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import commands
import deepcalm
import models
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


def python(script: str, *args: str) -> None:
    """Runs a script; what it finds wrong is an exception there."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args], env=commands.environment(), timeout=60, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_fork_starts_new_threads() -> None:
    python(FORK, str(models.packed("v3", dtype="q8")))


FORK_IN_PASS = """
import os, signal, sys, threading, warnings
import deepcalm
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
model = deepcalm.Model(deepcalm.demo_path(), threads=2)
busy, other = (model.session(max_rows=512) for _ in range(2))
ids = [3 + i % 500 for i in range(500)]
want = other.prefill(ids[:40]).tobytes()
other.truncate(0)
end = threading.Event()
def passes():
    while not end.is_set():
        busy.truncate(0)
        busy.prefill(ids)
thread = threading.Thread(target=passes)
thread.start()
refused = 0
try:
    for i in range(12):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that hangs dies of it
            session = (busy, other)[i % 2]
            try:
                session.truncate(0)
                os._exit(0 if session.prefill(ids[:40]).tobytes() == want else 1)
            except deepcalm.SessionError as e:
                os._exit(7 if "forked" in str(e) else 2)
            except BaseException:
                os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 7), code
        refused += code == 7
finally:
    end.set()
    thread.join()
assert refused > 0, "no fork met a pass"
assert other.prefill(ids[:40]).tobytes() == want
"""


def test_fork_beside_a_pass_is_refused_in_the_child() -> None:
    """Locks that another thread held stay locked in a child, which hears of it; between passes it computes."""
    python(FORK_IN_PASS)


NO_THREADS = """
import resource, sys
import deepcalm
from deepcalm import _core
resource.setrlimit(resource.RLIMIT_AS, (3_000_000_000, 3_000_000_000))
for start in (
    lambda: deepcalm.Model(sys.argv[1], threads=1024),
    lambda: _core.read_bandwidth(1024, 1),
    lambda: _core.inner_loop_rate("scalar", "q8", 1024),
    lambda: _core.compute_ceilings("scalar", 1024),
    lambda: _core.read_bandwidth(1025, 1),
    lambda: _core.inner_loop_rate("scalar", "q8", 2_000_000_000),
):
    try:
        start()
    except deepcalm.ResourceError as e:
        assert str(e).startswith("threads: ") and len(str(e).splitlines()) == 1, e
    else:
        raise AssertionError("1024 threads in 3 GB")
deepcalm.Model(sys.argv[1], threads=8).session().prefill([3, 4])
"""


def test_threads_that_cannot_start_are_an_error() -> None:
    """8 MB of address space a thread is the system's default; those that did start have ended."""
    python(NO_THREADS, str(models.packed()))


FORK_WITHOUT_THREADS = """
import os, resource, sys, threading, warnings
import deepcalm
warnings.simplefilter("ignore", DeprecationWarning)
model = deepcalm.Model(sys.argv[1], threads=4)
s = model.session(ctx=64)
want = s.prefill([3, 4, 5]).tobytes()
s.truncate(2)
pid = os.fork()
if pid == 0:
    for _ in range(3):  # they take the stacks that the parent's threads left
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    size = int(open("/proc/self/statm").read().split()[0]) * 4096
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size + 4_000_000, hard))
    try:
        s.decode(5)
    except deepcalm.ResourceError as e:
        assert "threads: 4" in str(e) and s.pos == 2, e
    else:
        raise AssertionError("three more threads in 4 MB")
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert s.decode(5).tobytes() == want
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_child_without_room_for_threads_hears_of_it() -> None:
    python(FORK_WITHOUT_THREADS, str(models.packed()))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_an_exception_on_any_thread_ends_the_run_and_the_pool_lives_on(threads: int) -> None:
    stages = 4
    for tid, stage in itertools.product(range(threads), range(stages)):
        for _ in range(5):  # who arrives first is chance
            assert _core.testing.pool_runs(threads, stages, tid, stage) == ("out of memory", 64 * stages)


NO_MEMORY = """
import resource, sys
import deepcalm
from deepcalm.session import STAGES
model = deepcalm.Model(deepcalm.demo_path(), threads=int(sys.argv[1]))
ids = [3 + i % 500 for i in range(300)]
plain = model.session(ctx=512, max_rows=512)
want, after = plain.prefill(ids).tobytes(), plain.decode(9).tobytes()
s = model.session(ctx=512, max_rows=512)
s.prefill(ids[:100])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
size = int(open("/proc/self/statm").read().split()[0]) * 4096
before, rows = s.tokens.tolist(), s.stats.prefill_tokens
resource.setrlimit(resource.RLIMIT_AS, (size + 8_000_000, hard))  # the taps of 200 rows take more than 20 MB
try:
    with s.trace(*STAGES):
        s.prefill(ids[100:])
except deepcalm.ResourceError as e:
    assert "200 tokens: out of memory" in str(e), e
else:
    raise AssertionError("20 MB in 8")
finally:
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert s.tokens.tolist() == before and s.pos == 100 and s.stats.prefill_tokens == rows
assert s.prefill(ids[100:]).tobytes() == want and s.decode(9).tobytes() == after
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_that_ends_in_a_pass_leaves_the_session_as_it_was(threads: int) -> None:
    python(NO_MEMORY, str(threads))


def set_mxcsr(value: int | None) -> int:
    """Sets this thread's control and status register of SSE, unless None; what it was."""
    libm = ctypes.CDLL("libm.so.6")
    environment = ctypes.create_string_buffer(64)
    libm.fegetenv(environment)
    before = int.from_bytes(environment.raw[28:32], "little")
    if value is not None:
        environment[28:32] = value.to_bytes(4, "little")
        libm.fesetenv(environment)
    return before


def bits(threads: int) -> list[bytes]:
    """What computes: packing, the model's tables, passes, drafts, samples."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch, f"{dtype}.dcalm") for dtype in ("source", "q8", "q4", "f8")]
        for path in paths:
            folder = models.small_logits() if path.stem == "source" else models.checkpoint("moonlight", "f32")
            deepcalm.pack(folder, path, dtype=path.stem)
        model = deepcalm.Model(paths[0], threads=threads)
        out = [path.read_bytes() for path in paths]
    s = model.session(ctx=64, kv="f32", mtp=True)
    out += [s.prefill(list(range(3, 30))).tobytes(), s.decode(5).tobytes()]
    tokens = s.generate(max_tokens=8, temp=1.0, seed=3, draft=2)
    return [*out, bytes(str(list(tokens)), "ascii"), *(a.tobytes() for a in s.core.state().values())]


MXCSR = {"flush": 0x9FC0, "down": 0x3F80, "up": 0x5F80, "toward zero": 0x7F80}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the register of another architecture")
@pytest.mark.parametrize("mode", MXCSR)
def test_the_callers_floating_point_mode_changes_no_bit(mode: str) -> None:
    """Only thread 0 has it, and who computes what is chance: where it counted, two calls with two threads differed."""
    want = bits(1)
    for threads in (1, 2, 3):
        before = set_mxcsr(MXCSR[mode])
        try:
            found = bits(threads)
            assert set_mxcsr(None) & ~0x3F == MXCSR[mode], "the caller's own again"
        finally:
            set_mxcsr(before)
        assert [a == b for a, b in zip(found, want, strict=True)] == [True] * len(want)


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


def waits(model: deepcalm.Model, rows: int) -> float:
    """Seconds that the threads of eight passes of so many rows waited for each other."""
    s = model.session(ctx=512, max_rows=512)
    for _ in range(8):
        s.truncate(0)
        s.decode_many([9] * rows)
    return sum(stage[4] for stage in s.core.stage_stats())


def test_short_passes_of_a_small_model_wake_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model's weights lie in a cache: two threads halve its speed, beside a busy process they take a tenth."""
    monkeypatch.delenv("DEEPCALM_THREADS", raising=False)
    monkeypatch.setattr("deepcalm.limits.default_threads", lambda: 2)
    model = deepcalm.Model(deepcalm.demo_path())
    assert model.threads == 2
    assert waits(model, 1) == 0
    assert waits(model, 256) > 0, "a prompt is work for all"
    assert waits(deepcalm.Model(deepcalm.demo_path(), threads=2), 1) > 0, "who names a number gets it"


def test_threads_are_chosen_by_what_passes_took() -> None:
    """Costs of a pass on all threads and alone, and how much of the former is waiting: 5 % at most go to trying."""
    choose = _core.testing.thread_choice
    long = 9
    assert not any(choose([(1.0, 1.8, 0.05)] * 1000, kind=long)), "nobody waits: nothing to try"
    for kind, alone in itertools.product((1, long), (0.02, 0.1, 0.3, 0.9, 1.0, 1.1, 1.9, 3.0)):
        chosen = choose([(1.0, alone, 0.4)] * 2000, kind=kind)
        cost = sum(alone if c else 1.0 for c in chosen)
        assert cost <= 1.05 * 2000 * min(1.0, alone) + 3, (kind, alone, cost)
    assert sum(choose([(1.0, 1.8, 0.05)] * 1000)) == 2, "short passes begin alone"
    # a process that takes a core comes and goes
    quiet, busy = [(1.0, 1.8, 0.02)] * 500, [(5.0, 2.0, 0.45)] * 500
    chosen = choose(quiet + busy + quiet)
    assert sum(chosen[:500]) == 2
    assert sum(chosen[500:1000]) > 475
    assert sum(chosen[1000:]) < 200
    # where cores are missing all threads are tried later, not never: others' load may be on other cores
    assert all(choose(busy[:100], crowded=True))
    assert sum(choose(quiet, crowded=True)) < 200
