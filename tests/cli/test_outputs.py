"""What commands write and read beside the model: whole files, closed streams, signals at any time."""

from __future__ import annotations

import os
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
from commands import error
from deepcalm.errors import PackedFileError, ResourceError, SessionError
from deepcalm.files import safetensors

FULL = "No space left on device"


# ---- files


def test_whole_file_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    (tmp_path / "link").symlink_to("f")
    with pytest.raises(ZeroDivisionError), safetensors.whole_file(path) as name:
        name.write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(ResourceError, match=r"/f: cannot be written: No space"), safetensors.whole_file(path):
        raise OSError(28, FULL)
    assert path.read_text() == "old"
    with safetensors.whole_file(tmp_path / "link") as one, safetensors.whole_file(path) as other:
        one.write_text("1")  # two writers do not meet
        other.write_text("2")
    assert path.read_text() == "1" and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "link"]
    for bad, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "f", "No such file")):
        with pytest.raises(ResourceError, match=reason), safetensors.whole_file(bad):
            pytest.fail("worked in vain")


def test_whole_file_writes_to_devices_as_they_are() -> None:
    with safetensors.whole_file(Path(os.devnull)) as name:
        assert name == Path(os.devnull)
        name.write_text("gone")
    assert Path(os.devnull).is_char_device()
    with tempfile.TemporaryFile() as f, safetensors.whole_file(Path(f"/proc/self/fd/{f.fileno()}")) as name:
        name.write_text("kept")
        assert f.read() == b"kept"


def test_dump_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path, out = models.packed(), tmp_path / "out.npy"
    out.write_text("precious")
    assert "no.such.tensor" in error(commands.run("inspect", path, "--dump", "no.such.tensor", out))
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]
    assert f"/dev/full: cannot be written: {FULL}" in error(
        commands.run("inspect", path, "--dump", "embed", "/dev/full")
    )
    assert commands.run("inspect", path, "--dump", "embed", out) == (0, b"", "")
    assert np.load(out).shape[0] == models.model().config["vocab_size"]


def test_saves_to_one_path_at_once_all_succeed(tmp_path: Path) -> None:
    sessions = [models.model().session(8) for _ in range(4)]
    for i, s in enumerate(sessions):
        s.prefill([i + 1] * (i + 1))
    failures: list[Exception] = []

    def save(s: deepcalm.Session) -> None:
        try:
            for _ in range(8):
                s.save(tmp_path / "s")
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=save, args=(s,)) for s in sessions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and [p.name for p in tmp_path.iterdir()] == ["s"]
    sessions[0].restore(tmp_path / "s")
    assert sessions[0].pos in range(1, 5)


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionError, match="not a regular file"):
        models.model().session(8).restore(tmp_path / "pipe")
    with pytest.raises(PackedFileError, match="not a regular file"):
        deepcalm.Model(tmp_path / "pipe")


# ---- closed streams


@pytest.mark.parametrize(
    ("closed", "args", "code", "reason"),
    [
        ("<&-", ("generate", "-n", "2", "-"), 1, "standard input: Bad file descriptor"),
        ("<&-", ("chat", "-q"), 1, "standard input: Bad file descriptor"),
        ("<&-", ("perplexity", "{}", "-"), 1, "standard input: Bad file descriptor"),
        ("<&-", ("generate", "-q", "-n", "2", "the"), 0, ""),
        (">&-", ("generate", "-n", "2", "the"), 1, "standard output: Bad file descriptor"),
        (">&-", ("inspect", "{}"), 1, "standard output: Bad file descriptor"),
        (">&-", ("--help",), 1, "standard output: Bad file descriptor"),
        (">/dev/full", ("--version",), 1, f"standard output: {FULL}"),
        ("2>&-", ("generate", "-n", "2", "the"), 0, ""),
        ("<&- >&- 2>&-", ("generate", "-n", "2", "the"), 1, ""),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_closed_streams(closed: str, args: tuple[str, ...], code: int, reason: str) -> None:
    path = str(models.packed())
    words = [a.format(path) for a in args]
    if args[0] in ("generate", "chat"):
        words[1:1] = ["-m", path, "--threads", "1"]
    command = ["/bin/sh", "-c", f'exec "$0" "$@" {closed}', *commands.COMMAND, *words]
    r = subprocess.run(command, env=commands.environment(), capture_output=True, timeout=60, check=False)
    err = r.stderr.decode()
    assert r.returncode == code and "Traceback" not in err and "Exception ignored" not in err, err
    assert err == (f"deepcalm: error: {reason}\n" if reason else "")


# ---- signals


def test_ctrl_c_at_any_time_is_130_without_a_traceback() -> None:
    """From the first import on: the interpreter's own start, some 10 ms, is not ours."""
    script = (
        "import runpy, sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'deepcalm.cli': print(flush=True)\n"
        "sys.meta_path.insert(0, Tell())\n"
        "runpy.run_module('deepcalm', run_name='__main__')\n"
    )
    for delay in np.linspace(0, 0.35, 12):
        p = subprocess.Popen(
            [sys.executable, "-c", script, "generate", "-m", models.endless(), "-n", "90000", "--ctx", "90000",
             "--threads", "1", "the"],
            env=commands.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert p.stdout is not None
        p.stdout.readline()
        time.sleep(delay)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
        assert p.returncode in (130, -signal.SIGINT) and b"Traceback" not in err, (delay, p.returncode, err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_commands_that_are_ended_leave_no_temporary_files(tmp_path: Path, number: signal.Signals) -> None:
    """``bench --synthetic`` in the middle of its file, where it is for a long time."""
    script = (
        "import os, sys, time\n"
        "import deepcalm.measure.synthetic as synthetic, deepcalm.cli\n"
        "def write(*_):\n"
        "    print(*map(os.path.realpath, os.scandir('/proc/self/fd')), flush=True)\n"
        "    time.sleep(60)\n"
        "synthetic._write = write\n"
        "sys.argv[1:] = ['bench', '--synthetic', 'v2-lite:1']\n"
        "sys.exit(deepcalm.cli.main())\n"
    )
    env = commands.environment(TMPDIR=str(tmp_path))
    p = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout is not None
    assert str(tmp_path).encode() in p.stdout.readline()
    p.send_signal(number)
    _, err = p.communicate(timeout=60)
    assert (p.returncode, err) == (-number if number == signal.SIGKILL else 128 + number, b"")
    assert not list(tmp_path.iterdir())
