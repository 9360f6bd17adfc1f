"""Which devices the tests can use here, and why not the others."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepcalm
import models
from deepcalm import _core
from deepcalm.errors import ResourceError, UnsupportedError
from ref import packed
from sim import build

DEVICES = ("sim", "cuda")

NO_CUDA = r"this build has no libdeepcalm_cuda\.so|the CUDA driver: .+|no CUDA device: .+"


@functools.cache
def missing(device: str) -> str | None:
    """What is missing for `device`, in the words a user reads; None where it can be used."""
    library(device)
    try:
        deepcalm.Model(models.packed(), device=device)
    except (UnsupportedError, ResourceError) as e:
        return str(e)
    return None


def library(device: str) -> Path:
    """A device's library; the simulator's is built where it has to be, and opened for device="sim" from here on."""
    if device == "sim":
        os.environ["DEEPCALM_SIM"] = str(build.library())
        return build.library()
    return Path(_core.__file__).with_name("libdeepcalm_cuda.so")


def play(name: str, value: int) -> int:
    """Sets what the simulated device plays (``sim::Device`` in tests/sim/sim.h); returns what it was."""
    set_it = ctypes.CDLL(str(library("sim"))).deepcalm_sim
    set_it.argtypes, set_it.restype = (ctypes.c_char_p, ctypes.c_int64), ctypes.c_int64
    return int(set_it(name.encode(), value))


def need(device: str) -> None:
    """Skips the test where the device cannot be used."""
    why = missing(device)
    if why is not None:
        pytest.skip(why)


def array_module(device: str) -> Any:
    """numpy for the simulated GPU, cupy for a real one; skips the test where either is missing."""
    need(device)
    if device == "sim":
        return np
    return pytest.importorskip("cupy", reason="cupy is not installed: arrays on a GPU are not tested")


@functools.cache
def open_core(file: packed.PackedFile, device: str) -> Any:
    """A packed file opened on a device, by the tests' own reader."""
    need(device)
    table = packed.core_tensors(file, _core.expected_tensors(file.config))
    with file.path.open("rb") as f:
        return _core.Model.open_on(str(library(device)), str(file.path), f.fileno(), file.config, table)
