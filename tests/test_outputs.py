"""What commands write and read beside the model: whole files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

import deepcalm
import surface_cases
from deepcalm import container
from deepcalm.errors import PackedFileError, ResourceError, SessionError

FULL = "No space left on device"


def error(result: tuple[int, bytes, str]) -> str:
    """The one line of a failure."""
    code, out, err = result
    assert (code, out) == (1, b"") and err.startswith("deepcalm: error: ") and err.count("\n") == 1, result
    return err


# ---- files


def test_whole_file_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    (tmp_path / "link").symlink_to("f")
    with pytest.raises(ZeroDivisionError), container.whole_file(path) as name:
        name.write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(ResourceError, match=r"/f: cannot be written: No space"), container.whole_file(path):
        raise OSError(28, FULL)
    assert path.read_text() == "old"
    with container.whole_file(tmp_path / "link") as one, container.whole_file(path) as other:
        one.write_text("1")  # two writers do not meet
        other.write_text("2")
    assert path.read_text() == "1" and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "link"]
    for bad, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "f", "No such file")):
        with pytest.raises(ResourceError, match=reason), container.whole_file(bad):
            pytest.fail("worked in vain")


def test_whole_file_writes_to_devices_as_they_are() -> None:
    with container.whole_file(Path(os.devnull)) as name:
        assert name == Path(os.devnull)
        name.write_text("gone")
    assert Path(os.devnull).is_char_device()


def test_dump_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path, out = surface_cases.packed(), tmp_path / "out.npy"
    out.write_text("precious")
    assert "no.such.tensor" in error(surface_cases.run("inspect", path, "--dump", "no.such.tensor", out))
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]
    assert f"/dev/full: cannot be written: {FULL}" in error(
        surface_cases.run("inspect", path, "--dump", "embed", "/dev/full")
    )
    assert surface_cases.run("inspect", path, "--dump", "embed", out) == (0, b"", "")
    assert np.load(out).shape[0] == surface_cases.model().config["vocab_size"]


def test_saves_to_one_path_at_once_all_succeed(tmp_path: Path) -> None:
    sessions = [surface_cases.model().session(8) for _ in range(4)]
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
        surface_cases.model().session(8).restore(tmp_path / "pipe")
    with pytest.raises(PackedFileError, match="not a regular file"):
        deepcalm.Model(tmp_path / "pipe")
