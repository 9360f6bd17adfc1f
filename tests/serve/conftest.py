"""The demo model, and a server of it as a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import deepcalm
from bench_serve import Server


@pytest.fixture(scope="session")
def model() -> deepcalm.Model:
    return deepcalm.Model(deepcalm.demo_path(), threads=1)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server("--threads", "1", "--max-sequences", "6") as server:
        yield server
        assert server.end() == 0
        assert server.errors().count(b"\n") == 1, server.errors().decode()  # where it is, and nothing of what was asked
