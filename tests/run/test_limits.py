"""Limits of control groups, from files as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import commands
import deepcalm
import models
from deepcalm import limits

GB = 10**9
STAT = {
    "": "anon 5\nactive_file {a}\ninactive_file {b}\n",
    "total_": "cache 9\ntotal_active_file {a}\ntotal_inactive_file {b}\n",
}


def fake(root: Path, cgroup: str, files: dict[str, str], free: int | None = 64 * GB) -> Path:
    """A file system with /proc/self/cgroup and files below /sys/fs/cgroup."""
    texts = {"proc/self/cgroup": cgroup} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    if free is not None:
        texts["proc/meminfo"] = f"MemTotal: 1 kB\nMemAvailable:   {free // 1024} kB\n"
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "12:pids:/a\n5:cpu,cpuacct:/docker/xyz\n4:memory:/docker/xyz\n1:name=systemd:/a\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 100000"}, 3.0),  # above
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/not/mounted\n", {"cpu.max": "200000 100000\n"}, 2.0),  # a container that shows the host's path
        (V1, {"cpu,cpuacct/docker/xyz/cpu.cfs_quota_us": "250000\n",
              "cpu,cpuacct/docker/xyz/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
        ("nonsense\n\n0::\n::\n", {"cpu.max": "1 0\n"}, None),
        ("0::/../x\n", {"cpu.max": "many\n"}, None),
    ],
)  # fmt: skip
def test_cpu_quota(tmp_path: Path, cgroup: str, files: dict[str, str], quota: float | None) -> None:
    assert limits.cpu_quota(fake(tmp_path, cgroup, files)) == quota


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("", {}, 64 * GB),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": f"{3 * GB}\n"}, 64 * GB),
        ("0::/a\n", {"a/memory.max": f"{8 * GB}\n", "a/memory.current": f"{3 * GB}\n"}, 5 * GB),
        ("0::/a\n", {"a/memory.max": f"{8 * GB}\n", "a/memory.current": f"{6 * GB}\n",
                     "a/memory.stat": STAT[""].format(a=GB, b=4 * GB)}, 7 * GB),  # five of the six are files
        ("0::/a/b\n", {"a/memory.high": f"{2 * GB}\n", "a/memory.current": f"{3 * GB}\n"}, 0),
        (V1, {"memory/docker/xyz/memory.limit_in_bytes": f"{4 * GB}\n",
              "memory/docker/xyz/memory.usage_in_bytes": f"{GB}\n",
              "memory/docker/xyz/memory.stat": STAT["total_"].format(a=0, b=GB // 2)}, 4 * GB - GB // 2),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"}, 64 * GB),
    ],
)  # fmt: skip
def test_available_memory(tmp_path: Path, cgroup: str, files: dict[str, str], free: int) -> None:
    assert limits.available_memory(fake(tmp_path, cgroup, files)) == free
    assert limits.available_memory(tmp_path / "nothing here") is None


def test_threads_keep_to_the_quota_and_more_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, half = (fake(tmp_path / f"{n}", "0::/\n", {"cpu.max": f"{n} 100000"}) for n in (199_000, 50_000))
    assert (limits.processors(one), limits.processors(half), limits.default_threads(one)) == (1, 1, 1)
    allowed = len(os.sched_getaffinity(0))
    assert limits.processors(fake(tmp_path / "c", "0::/\n", {"cpu.max": f"{allowed}00000 100000"})) == allowed
    path = models.packed()
    assert deepcalm.Model(path, threads=allowed).notes == ()
    monkeypatch.setattr(limits, "processors", lambda *_: 1)
    monkeypatch.delenv("DEEPCALM_THREADS", raising=False)
    model = deepcalm.Model(path)
    assert (model.threads, model.notes) == (1, ())
    (note,) = deepcalm.Model(path, threads=3).notes
    assert note.startswith("threads: 3, of which 1 can run at a time")


def test_more_threads_than_processors_are_said_on_the_command_line() -> None:
    n = limits.processors() + 1
    for args, env in ((("--threads", str(n)), {}), ((), {"DEEPCALM_THREADS": str(n)})):
        code, _, said = commands.run("generate", "Once", "-n", "2", *args, env=env)
        assert code == 0 and sum(line.startswith(f"threads: {n}, ") for line in said.splitlines()) == 1, said
