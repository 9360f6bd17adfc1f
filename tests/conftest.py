"""Fixtures shared by the suites."""

from __future__ import annotations

import os

import numpy as np
import pytest


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
