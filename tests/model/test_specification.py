"""The numpy reference against transformers: committed golden logits always, live transformers where it is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device_cases
import golden_cases
import tiny
from ref import checkpoint, model

# float64 against float32: the difference is the error of transformers' arithmetic, measured 1e-5 to 2.3e-5.
TOLERANCE = 5e-5

Loaded = tuple[golden_cases.Golden, model.Config, model.Weights]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    made: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if name not in made:
            golden = golden_cases.load(name)
            raw, tensors = checkpoint.load(golden.write_checkpoint(tmp_path_factory.mktemp(name)))
            cfg = model.Config.from_hf(raw, any(n.endswith("eh_proj.weight") for n in tensors))
            made[name] = golden, cfg, model.Weights.from_hf(cfg, tensors)
        return made[name]

    return load


def test_golden_covers_every_preset_and_dtype() -> None:
    cases = [golden_cases.load(name) for name in golden_cases.NAMES]
    assert {c.preset for c in cases} == set(tiny.PRESETS)
    assert {c.dtype for c in cases} == set(tiny.DTYPES)
    assert all(1.4 < c.logits.std() < 1.6 and len(c.ids) > 64 for c in cases)
    assert sum(c.mtp_logits is not None for c in cases) >= 3


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_logits_equal_golden(loaded: Callable[[str], Loaded], name: str, form: str) -> None:
    golden, cfg, weights = loaded(name)
    m = model.Model(cfg, weights, form)
    logits, hidden = m.forward(golden.ids)
    assert np.abs(logits - golden.logits).max() <= TOLERANCE
    assert (logits.argmax(1) == golden.logits.argmax(1)).all()
    if golden.mtp_logits is not None:
        mtp_logits, _ = m.mtp_forward(golden.ids[1:], hidden[:-1])
        assert np.abs(mtp_logits - golden.mtp_logits).max() <= TOLERANCE
        assert (mtp_logits.argmax(1) == golden.mtp_logits.argmax(1)).all()


@pytest.mark.parametrize("name", ["v3", "v2_lite"])
def test_cache_in_pieces_equals_one_pass(loaded: Callable[[str], Loaded], name: str) -> None:
    golden, cfg, weights = loaded(name)
    whole, hidden = model.Model(cfg, weights).forward(golden.ids)
    m = model.Model(cfg, weights)
    pieces = [m.forward(part)[0] for part in np.split(golden.ids, [1, 2, 18, 64])]
    assert np.abs(np.concatenate(pieces) - whole).max() <= 1e-11
    if golden.mtp_logits is not None:
        parts = [m.mtp_forward(golden.ids[i + 1 : i + 6], hidden[i : i + 5])[0] for i in range(0, 70, 5)]
        assert np.abs(np.concatenate(parts) - golden.mtp_logits[:70]).max() <= TOLERANCE


def _replace(**changes: Any) -> Callable[[model.Config], model.Config]:
    return lambda cfg: dataclasses.replace(cfg, **changes)


# A golden test is worth what it detects: the known mistakes of other engines, as changes of the configuration.
MISTAKES: list[tuple[str, str, Callable[[model.Config], model.Config]]] = [
    ("no yarn", "v3", _replace(rope_type="default")),
    ("softmax scale without the magnitude", "v3", _replace(mscale_all_dim=0.0, attention_factor=1.0)),
    ("magnitude on cos and sin as well", "v3", _replace(attention_factor=model.yarn_magnitude(40, 1))),
    ("rope amplitude left out", "v2_grouped", _replace(attention_factor=1.0)),
    ("frequencies ramped over the wrong range", "kimi_k2", _replace(beta_fast=32.0)),
    ("softmax instead of sigmoid", "v3", _replace(scoring_func="softmax")),
    ("no group limit", "v3", _replace(n_group=1, topk_group=1)),
    ("group score by maximum", "v3", _replace(topk_method="group_limited_greedy")),
    ("group score by the two best", "v2_grouped", _replace(topk_method="noaux_tc")),
    ("scaling factor dropped", "v3", _replace(routed_scaling_factor=1.0)),
    ("weights not normalised", "kimi_k2", _replace(norm_topk_prob=False)),
]


@pytest.mark.parametrize(("what", "name", "change"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_golden_detects_mistake(
    loaded: Callable[[str], Loaded], what: str, name: str, change: Callable[[model.Config], model.Config]
) -> None:
    golden, cfg, weights = loaded(name)
    logits, _ = model.Model(change(cfg), weights).forward(golden.ids)
    assert np.abs(logits - golden.logits).max() > 0.3, what


def test_golden_detects_wrong_weights(loaded: Callable[[str], Loaded]) -> None:
    """Bias ignored, rope rows left interleaved, norm weights of one, MTP halves swapped, MTP fed the pre-norm state."""
    golden, cfg, weights = loaded("v3")
    assert golden.mtp_logits is not None

    def error(changed: model.Weights) -> float:
        return float(np.abs(model.Model(cfg, changed).forward(golden.ids)[0] - golden.logits).max())

    def with_layers(**changes: Any) -> model.Weights:
        layers = [dataclasses.replace(w, **{k: f(w) for k, f in changes.items()}) for w in weights.layers]
        return dataclasses.replace(weights, layers=layers)

    interleave = np.argsort(np.r_[0:16:2, 1:16:2])
    rows = np.r_[0:42, 42 + interleave]
    assert error(weights) <= TOLERANCE
    assert error(with_layers(router_bias=lambda _: None)) > 0.3
    assert error(with_layers(kv_a=lambda w: model.Matrix(w.kv_a.w[rows]))) > 0.3
    assert error(with_layers(q_a_norm=lambda w: w.q_a_norm * 0 + 1)) > 0.3

    m = model.Model(cfg, weights)
    _, hidden = m.forward(golden.ids)
    mtp, pre_norm = weights.mtp, m.taps["layers.2.layer_out"]
    assert mtp is not None
    eh = mtp.eh_proj.w
    swapped = dataclasses.replace(mtp, eh_proj=model.Matrix(np.concatenate([eh[:, 76:], eh[:, :76]], axis=1)))
    for weights_, state in ((dataclasses.replace(weights, mtp=swapped), hidden), (weights, pre_norm)):
        logits, _ = model.Model(cfg, weights_).mtp_forward(golden.ids[1:], state[:-1])
        assert np.abs(logits - golden.mtp_logits).max() > 0.3


@pytest.mark.parametrize("name", ["moonlight", "glm4_moe_lite"])
def test_golden_detects_wrong_eps(loaded: Callable[[str], Loaded], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rms_norm_eps is 1e-5 here; the latent norms have their own 1e-6."""
    golden, cfg, weights = loaded(name)
    wrong = dataclasses.replace(cfg, rms_norm_eps=1e-6)
    assert np.abs(model.Model(wrong, weights).forward(golden.ids)[0] - golden.logits).max() > 3e-4
    monkeypatch.setattr(model, "LATENT_EPS", cfg.rms_norm_eps)
    assert np.abs(model.Model(cfg, weights).forward(golden.ids)[0] - golden.logits).max() > 3e-4


class DeviceArray(np.ndarray):  # type: ignore[type-arg]
    """Stands for a cupy array: usable through operators, methods and its own module; numpy functions refuse it."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{func.__name__} called on a device array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        operators = {"add", "subtract", "multiply", "divide", "matmul", "negative", "equal", "less_equal"}
        if method == "__call__" and ufunc.__name__ not in operators:
            raise TypeError(f"numpy.{ufunc.__name__} called on a device array")
        if any(type(x) is np.ndarray and x.ndim for x in inputs):
            raise TypeError(f"{ufunc.__name__} mixes host and device arrays")
        plain = [x.view(np.ndarray) if isinstance(x, DeviceArray) else x for x in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(x.view(np.ndarray) for x in kwargs["out"])
        return np.asarray(getattr(ufunc, method)(*plain, **kwargs)).view(DeviceArray)


class DeviceModule:
    """Stands for cupy: every function of numpy, taking and returning device arrays."""

    inf = np.inf

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)

        def host(x: Any) -> Any:
            if isinstance(x, list):
                return [host(v) for v in x]
            return x.view(np.ndarray) if isinstance(x, np.ndarray) else x

        def device(x: Any) -> Any:
            return tuple(map(device, x)) if isinstance(x, tuple) else np.asarray(x).view(DeviceArray)

        return lambda *args, **kw: device(function(*map(host, args), **kw))


@pytest.mark.parametrize("module", ["stand-in", "cupy"])
@pytest.mark.parametrize("name", ["v3", "v2_grouped"])
def test_other_array_modules(name: str, module: str, tmp_path: Path) -> None:
    """The reference never hands its arrays to numpy behind the back of the module it was given; cupy gives the same."""
    golden = golden_cases.load(name)
    raw, tensors = checkpoint.load(golden.write_checkpoint(tmp_path))
    cfg = model.Config.from_hf(raw, any(n.endswith("eh_proj.weight") for n in tensors))
    xp: Any = DeviceModule() if module == "stand-in" else device_cases.array_module("cuda")
    m = model.Model(cfg, model.Weights.from_hf(cfg, tensors, xp=xp), xp=xp)
    logits, hidden = m.forward(golden.ids)
    to_host = (lambda a: a.view(np.ndarray)) if module == "stand-in" else xp.asnumpy
    assert type(logits) is (DeviceArray if module == "stand-in" else xp.ndarray)
    assert np.abs(to_host(logits) - golden.logits).max() <= TOLERANCE
    if golden.mtp_logits is not None:
        mtp_logits, _ = m.mtp_forward(golden.ids[1:], hidden[:-1])
        assert np.abs(to_host(mtp_logits) - golden.mtp_logits).max() <= TOLERANCE
    if module == "stand-in":
        with pytest.raises(TypeError, match="device array"):
            np.exp(logits)


YARN_KEYS = {"rope_scaling": {**tiny.PRESETS["v3"].config["rope_scaling"], "truncate": False, "attention_factor": 1.3}}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("preset", "changes"),
    [*((preset, {}) for preset in tiny.PRESETS), ("glm4_moe_lite", {"rms_norm_eps": 0.05}), ("v3", YARN_KEYS)],
)
def test_logits_equal_live_transformers(preset: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """A seed and a length that no golden file has (and whose router decisions are no near-ties)."""
    pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    from ref import hf

    folder = tiny.write(tmp_path, preset, seed=77, **changes)
    raw, tensors = checkpoint.load(folder)
    cfg = model.Config.from_hf(raw, any(n.endswith("eh_proj.weight") for n in tensors))
    ids = tiny.token_ids(cfg.vocab_size, 50, 77)
    m = model.Model(cfg, model.Weights.from_hf(cfg, tensors))
    logits, hidden = m.forward(ids)
    theirs, _, their_mtp = hf.logits(folder, ids)
    assert np.abs(logits - theirs).max() <= TOLERANCE
    assert (their_mtp is None) == (cfg.num_nextn_predict_layers == 0)
    if their_mtp is not None:
        assert np.abs(m.mtp_forward(ids[1:], hidden[:-1])[0] - their_mtp).max() <= TOLERANCE
