"""Device buffers, taps and single stages without a copy: through cupy on a GPU, through numpy on the simulated one."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import cuda_stages as cs
import deepcalm
import device_cases
import models
from deepcalm.device import device_view
from deepcalm.errors import SessionError
from ref import formats


def to_numpy(a: Any) -> np.ndarray[Any, Any]:
    return a if isinstance(a, np.ndarray) else np.asarray(a.get())


@pytest.mark.parametrize("device", device_cases.DEVICES)
def test_device_arrays_show_what_a_pass_left(device: str) -> None:
    xp = device_cases.array_module(device)
    s = deepcalm.Model(models.packed(), device=device).session(32, mtp=False)
    out = s.prefill([3, 1, 4, 1, 5], all_logits=True)
    config = s.model.config
    logits = xp.asarray(device_view(s, "logits"))
    np.testing.assert_array_equal(to_numpy(logits[:5, : config["vocab_size"]]), out)
    hidden = xp.from_dlpack(device_view(s, "hidden"))[:5, : config["hidden_size"]]
    np.testing.assert_array_equal(to_numpy(hidden), s.core.hidden())
    rows = s.core.read_cache(False)
    for read in (xp.asarray, xp.from_dlpack):
        cache = read(device_view(s, "cache"))
        np.testing.assert_array_equal(to_numpy(cache)[:, :5, : rows.shape[2]], rows)
    # computing on the device with them: the head again, from the hidden rows
    head = xp.asarray(np.random.default_rng(0).standard_normal((config["hidden_size"], 7), np.float32))
    product = to_numpy(hidden @ head)
    np.testing.assert_allclose(product, s.core.hidden() @ to_numpy(head), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", device_cases.DEVICES)
def test_device_arrays_show_taps(device: str) -> None:
    xp = device_cases.array_module(device)
    s = deepcalm.Model(models.packed(), device=device).session(32)
    with s.trace("q", "topk_idx", "layers.1.layer_out") as taps:
        s.prefill([3, 1, 4, 1, 5])
    assert len(taps) > 4 and taps["layers.0.q"].ndim == 3 and taps["layers.2.topk_idx"].dtype == np.int32
    for read in (xp.asarray, xp.from_dlpack):
        for name, value in taps.items():
            array = read(device_view(s, name))
            assert array.dtype == value.dtype
            np.testing.assert_array_equal(to_numpy(array), value, err_msg=name)
    s.decode(9)  # a pass without taps leaves them
    np.testing.assert_array_equal(to_numpy(xp.asarray(device_view(s, "layers.0.q"))), taps["layers.0.q"])
    with s.trace("k_rope"):
        s.decode(2)
    with pytest.raises(SessionError, match=r"no buffer 'layers\.0\.q'"):
        device_view(s, "layers.0.q")


@pytest.mark.parametrize("device", device_cases.DEVICES)
@pytest.mark.parametrize("fmt", cs.FORMAT)
def test_device_arrays_go_through_a_stage(fmt: str, device: str) -> None:
    """Products of 1 to 8 rows whose operands and result are arrays of the device, against the oracle computed there."""
    xp = device_cases.array_module(device)
    stages = cs.Stages(device_cases.library(device), xp)
    to = cs.to_aligned if device == "sim" else xp.asarray
    rng, keep = np.random.default_rng(14), list[Any]()
    p = formats.random_packed(fmt, rng, 40, 1100, scale_block=(16, 160))
    w, weights = xp.asarray(p.values[0]), cs.matrix(p, keep, to=to)
    for n in range(1, 9):
        x, y = to(rng.standard_normal((n, 1120), np.float32)), to(np.full((n, 40), np.nan, np.float32))
        stages("product", cs.ARGS["product"](rows=cs.rows(n), w=weights, x=cs.view(x), y=cs.view(y)))
        rounded = xp.asarray(cs.rounded(fmt, to_numpy(x)[:, :1100]))
        error = xp.abs(y - rounded @ w.T) / (xp.abs(rounded) @ xp.abs(w).T)
        assert float(error.max()) <= 1e-5, n


def test_device_arrays_refuse() -> None:
    s = deepcalm.Model(models.packed()).session(8)
    with pytest.raises(SessionError, match="no buffer 'x', expected on a device x, hidden"):
        device_view(s, "x")
    device_cases.need("sim")
    s = deepcalm.Model(models.packed(), device="sim").session(8)
    with pytest.raises(SessionError, match="no buffer 'weights'"):
        device_view(s, "weights")
    view = device_view(s, "x")
    assert view.__dlpack_device__() == (1, 0) and not hasattr(view, "__cuda_array_interface__")
    for options in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="no copy, no other device"):
            view.__dlpack__(**options)
    references = sys.getrefcount(view)
    for take in (True, False):  # a capsule that nobody takes frees itself
        kept = np.from_dlpack(view) if take else view.__dlpack__()
        assert sys.getrefcount(view) == references + 1, "the array keeps the session alive"
        del kept
        assert sys.getrefcount(view) == references


def test_a_pass_that_fails_has_ended() -> None:
    """What it had queued has run: nothing is left to read the buffers of a call that has returned."""
    device_cases.need("sim")
    s = deepcalm.Model(models.packed(), device="sim").session(32)
    s.core.trace(None, {"layers.0.layer_out": np.zeros(3, np.float32)})
    with pytest.raises(SessionError, match=r"feed: layers\.0\.layer_out has 3 values, expected"):
        s.core.forward(np.array([3, 1], np.int32), "last")
    x = np.asarray(device_view(s, "x"))[:2, : s.model.config["hidden_size"]]
    assert np.isfinite(x).all(), "memory of a simulated GPU is NaN until something has run"
