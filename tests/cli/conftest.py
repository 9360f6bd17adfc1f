"""The command line in this process, and a tiny packed model."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import models
from commands import Run
from deepcalm import cli


@pytest.fixture
def run(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process: (exit code, stdout, stderr)."""

    def call(*args: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setenv("DEEPCALM_THREADS", "1")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsysbinary.readouterr()
        code = cli.main([str(a) for a in args])
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return call


@pytest.fixture
def path() -> Path:
    return models.packed()
