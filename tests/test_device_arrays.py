"""Device buffers seen without a copy: by cupy on a GPU, by numpy on the simulated one."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import deepcalm
import device_cases
import surface_cases
from deepcalm.device import device_view
from deepcalm.errors import SessionError


def arrays(device: str) -> tuple[Any, Any]:
    """(array module, function that brings its arrays to numpy) for a device."""
    device_cases.need(device)
    if device == "sim":
        return np, np.asarray
    cupy: Any = pytest.importorskip("cupy", reason="cupy is not installed: device arrays are not tested")
    return cupy, importlib.import_module("cupy").asnumpy


@pytest.mark.parametrize("device", device_cases.DEVICES)
def test_device_arrays_show_what_a_pass_left(device: str) -> None:
    xp, to_numpy = arrays(device)
    s = deepcalm.Model(surface_cases.packed(), device=device).session(32)
    out = s.prefill([3, 1, 4, 1, 5], all_logits=True)
    config = s.model.config
    logits = xp.asarray(device_view(s, "logits"))
    np.testing.assert_array_equal(to_numpy(logits[:5, : config["vocab_size"]]), out)
    hidden = xp.asarray(device_view(s, "hidden"))[:5, : config["hidden_size"]]
    np.testing.assert_array_equal(to_numpy(hidden), s.core.hidden())
    cache = xp.asarray(device_view(s, "cache"))
    rows = s.core.read_cache(False)
    np.testing.assert_array_equal(to_numpy(cache)[:, :5, : rows.shape[2]], rows)
    # computing on the device with them: the head again, from the hidden rows
    head = xp.asarray(np.random.default_rng(0).standard_normal((config["hidden_size"], 7), np.float32))
    product = to_numpy(hidden @ head)
    np.testing.assert_allclose(product, s.core.hidden() @ to_numpy(head), rtol=1e-4, atol=1e-5)


def test_device_arrays_refuse() -> None:
    s = deepcalm.Model(surface_cases.packed()).session(8)
    with pytest.raises(SessionError, match="expected one of x, hidden"):
        device_view(s, "weights")
    with pytest.raises(SessionError, match="no buffer 'x'"):
        device_view(s, "x")
