"""Which devices the tests can use here, and why not the others."""

from __future__ import annotations

import functools
from pathlib import Path

import deepcalm
import surface_cases
from deepcalm import _core
from deepcalm.errors import ResourceError, UnsupportedError

NO_CUDA = r"this build has no libdeepcalm_cuda\.so|the CUDA driver: .+|no CUDA device: .+"


@functools.cache
def missing(device: str) -> str | None:
    """What is missing for `device`, in the words a user reads; None where it can be used."""
    try:
        deepcalm.Model(surface_cases.packed(), device=device)
    except (UnsupportedError, ResourceError) as e:
        return str(e)
    return None


def library(device: str) -> Path:
    return Path(_core.__file__).with_name(f"libdeepcalm_{device}.so")
