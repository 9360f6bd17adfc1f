"""Fixtures shared by the suites."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

# A shell's background job starts with SIGINT ignored, one under nohup with SIGHUP, and so would every process that the
# tests interrupt. SIGTERM (timeout) ends a run as Ctrl-C does, which cleans up.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The oracles' matrices are tiny: more BLAS threads only spin, and compete with the thread pool under test.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402  (reads them)
import pytest  # noqa: E402

from commands import Run, cheap_probes  # noqa: E402
from deepcalm import cli  # noqa: E402
from sim import build  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked exhaustive or ray, unless -m names the mark.

    ``by_turns(name, n)`` marks a product of parameters exhaustive, but for one of the ``n`` values of ``name`` with
    each choice of the others, the next one each time, and for the value of index ``always``.
    """
    known: dict[str, tuple[list[str], list[str]]] = {}  # of a test: values of the parameter, and choices of the others
    for item in items:
        for mark in item.iter_markers("by_turns"):
            params = dict(getattr(item, "callspec").params)  # noqa: B009  # pytest does not declare it
            (name, n), places = mark.args, list[int]()
            for seen, what in zip(
                known.setdefault(item.nodeid.partition("[")[0], ([], [])),
                (repr(params.pop(name)), repr(params)),
                strict=True,
            ):
                if what not in seen:
                    seen.append(what)
                places.append(seen.index(what))
            if places[0] not in (places[1] % n, mark.kwargs.get("always")):
                item.add_marker("exhaustive")
    for mark in ("exhaustive", "ray"):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


USED = Counter[str]()  # processor seconds of the tests of a file


def processor_seconds() -> float:
    """What this process and those that it has waited for have used, whoever else uses the machine."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = processor_seconds()
    try:
        return (yield)
    finally:
        USED[item.location[0]] += processor_seconds() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With --durations: the files that take most."""
    if config.option.durations is not None:
        terminalreporter.section(f"{processor_seconds():.0f} processor seconds")
        for path, seconds in USED.most_common(config.option.durations or None):
            terminalreporter.write_line(f"{seconds:.2f}s {path}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the simulator beside the first tests, which leave a processor free."""
    if {"cli", "device"} <= {item.path.parent.name for item in session.items} and not session.config.option.collectonly:
        build.start()


@pytest.fixture(params=["fixed", "fresh"])
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator with a fixed seed, then one with a new seed every run, printed for a failure's report.

    ``DEEPCALM_TEST_SEED=n`` repeats a fresh run.
    """
    seed = 20260
    if request.param == "fresh":
        seed = int(os.environ.get("DEEPCALM_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
        print(f"DEEPCALM_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def run(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, on a machine that is measured at once: (exit code, stdout, stderr)."""
    cheap_probes(monkeypatch)

    def call(*args: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setenv("DEEPCALM_THREADS", "1")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsysbinary.readouterr()
        code = cli.main([str(a) for a in args])
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return call
