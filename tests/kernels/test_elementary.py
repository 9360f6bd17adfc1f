"""exp, log, sin and cos of kernels/elementary.h: accurate against 80-bit arithmetic, and the only ones in use."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepcalm import _core

T = _core.testing
Array = np.ndarray[Any, Any]
N = 50_000


def ulps(ours: Array, exact: Array) -> float:
    """Largest error in units of the last place; `exact` in extended precision."""
    assert np.finfo(np.longdouble).nmant > 52
    unit = np.spacing(np.abs(exact).astype(ours.dtype)).astype(np.longdouble)
    return float(np.abs((ours - exact) / unit).max())


def test_exp(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.uniform(-708, 709, N), rng.uniform(-1, 1, N), rng.normal(size=N) * 1e-8])
    border = np.arange(-1021, 1023) * np.log(2) + np.log(2) / 2  # where the reduction changes sides
    x = np.concatenate([x, border, np.nextafter(border, -np.inf), np.nextafter(border, np.inf)])
    assert ulps(T.exp(x), np.exp(x.astype(np.longdouble))) <= 1
    assert (np.diff(T.exp(np.sort(rng.uniform(-3, 3, N)))) >= 0).all()
    special = [0.0, -0.0, -708.1, -1e308, -np.inf, 709.1, np.inf, 5e-324]
    assert list(T.exp(special)) == [1, 1, 0, 0, 0, np.inf, np.inf, 1]
    assert np.isnan(T.exp(np.nan))


def test_log(rng: np.random.Generator) -> None:
    noise = (rng.integers(0, 2**52, N) + 0.5) * 2.0**-52  # the arguments of Gumbel noise, and those beside 1
    x = np.concatenate([np.exp(rng.uniform(-708, 709, N)), noise, 1 - 2.0 ** -rng.uniform(1, 53, N)])
    x = np.concatenate([x, 1 + rng.normal(size=N) * 1e-7, 2.0**-1022 * rng.uniform(0, 1, N)])
    x = x[(x > 0) & (x != 1)]
    assert ulps(T.log(x), np.log(x.astype(np.longdouble))) <= 1.1
    assert list(T.log([1.0, 0.0, -0.0, np.inf])) == [0, -np.inf, -np.inf, np.inf]
    assert np.isnan(T.log([-1.0, -np.inf, np.nan])).all()


def test_sin_and_cos_are_the_nearest_floats_up_to_the_last_position(rng: np.random.Generator) -> None:
    """2^24 is the longest context of a config; beside multiples of pi / 2 an inexact reduction shows."""
    turns = np.concatenate([np.arange(1, 5000), rng.integers(5000, 10_680_000, N)])
    quarters = (turns * (np.pi / 2)).astype(np.float32)
    around = [quarters, np.nextafter(quarters, np.float32(0)), np.nextafter(quarters, np.float32(1e9))]
    random = [rng.uniform(0, 2**24, N), 2.0 ** rng.uniform(-140, 24, N), -rng.uniform(0, 1e5, N), [0.0, 2.0**24]]
    x = np.concatenate([*around, *random]).astype(np.float32)
    for ours, exact in ((T.sin(x), np.sin(x.astype(np.longdouble))), (T.cos(x), np.cos(x.astype(np.longdouble)))):
        assert ours.dtype == np.float32
        assert ulps(ours, exact) <= 0.5001


def test_bits_are_those_of_every_machine_and_compiler() -> None:
    x = np.arange(-20_000, 20_000) / 64
    found = b"".join(np.ascontiguousarray(y).tobytes() for y in (T.exp(x), T.log(np.abs(x) + 0.3), T.sin(x), T.cos(x)))
    noise = np.array([_core.gumbel(seed, pos, v) for seed in (0, 2**63) for pos in range(30) for v in range(30)])
    assert hashlib.sha256(found).hexdigest()[:16] == "201f1fe113ce808f"
    assert hashlib.sha256(noise.tobytes()).hexdigest()[:16] == "1c00b9343a6e0bb8"


def test_nothing_calls_the_c_librarys() -> None:
    """But functions with one right result, as fma and sqrt, may be called."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    folder = Path(_core.__file__).parent
    functions = r"exp|log|pow|sin|cos|tan|sincos|atan|asin|acos|sinh|cosh|tanh|erf|gamma|cbrt|hypot"
    for library in (Path(_core.__file__), *folder.glob("libdeepcalm_*.so")):
        listing = subprocess.run([nm, "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
        assert not re.findall(rf"U ((?:l|t)?(?:{functions})(?:2|10|1p|m1)?[fl]?)(?:@|$)", listing.stdout, re.M), library
