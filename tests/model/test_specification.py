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
from deepcalm.check import reference
from deepcalm.check.reference import Settings
from deepcalm.files.checkpoint import Checkpoint
from ref import model

# float64 against float32: the difference is the error of transformers' arithmetic, measured 1e-5 to 2.3e-5.
TOLERANCE = 5e-5

Loaded = tuple[golden_cases.Golden, Settings, model.SourceWeights]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    made: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if name not in made:
            golden = golden_cases.load(name)
            made[name] = golden, *model.load(golden.write_checkpoint(tmp_path_factory.mktemp(name)))
        return made[name]

    return load


def test_golden_covers_every_preset_and_dtype() -> None:
    cases = [golden_cases.load(name) for name in golden_cases.NAMES]
    assert {c.preset for c in cases} == set(tiny.PRESETS)
    assert {c.dtype for c in cases} == set(tiny.DTYPES)
    assert all(1.4 < c.logits.std() < 1.6 and len(c.ids) > 64 for c in cases)
    assert sum(c.mtp_logits is not None for c in cases) >= 3


@pytest.mark.parametrize("form", [reference.Reference, model.Expanded], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_logits_equal_golden(loaded: Callable[[str], Loaded], name: str, form: type[reference.Reference]) -> None:
    golden, s, weights = loaded(name)
    m = model.Model(s, weights, form=form)
    logits, hidden = m.forward(golden.ids)
    assert np.abs(logits - golden.logits).max() <= TOLERANCE
    assert (logits.argmax(1) == golden.logits.argmax(1)).all()
    if golden.mtp_logits is not None:
        mtp_logits, _ = m.mtp_forward(golden.ids[1:], hidden[:-1])
        assert np.abs(mtp_logits - golden.mtp_logits).max() <= TOLERANCE
        assert (mtp_logits.argmax(1) == golden.mtp_logits.argmax(1)).all()


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_the_package_reads_a_checkpoint_as_the_tests_do(name: str, tmp_path: Path) -> None:
    golden = golden_cases.load(name)
    with Checkpoint(golden.write_checkpoint(tmp_path)) as ckpt:
        s = Settings.of(ckpt.raw_config)
        m = model.Model(s, reference.SourceWeights(ckpt, s))
        logits, hidden = m.forward(golden.ids)
        assert np.abs(logits - golden.logits).max() <= TOLERANCE
        if golden.mtp_logits is not None:
            assert np.abs(m.mtp_forward(golden.ids[1:], hidden[:-1])[0] - golden.mtp_logits).max() <= TOLERANCE


def _replace(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda s: dataclasses.replace(s, **changes)


def _yarn(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda s: dataclasses.replace(s, yarn={**(s.yarn or {}), **changes})


# A golden test is worth what it detects: the known mistakes of other engines, as changes of the configuration.
MISTAKES: list[tuple[str, str, Callable[[Settings], Settings]]] = [
    ("no yarn", "v3", _replace(yarn=None)),
    ("softmax scale without the magnitude", "v3", _yarn(mscale_all_dim=0.0, attention_factor=1.0)),
    ("magnitude on cos and sin as well", "v3", _yarn(attention_factor=0.1 * np.log(40) + 1)),
    ("rope amplitude left out", "v2_grouped", _yarn(attention_factor=1.0)),
    ("frequencies ramped over the wrong range", "kimi_k2", _yarn(beta_fast=32.0)),
    ("softmax instead of sigmoid", "v3", _replace(softmax=True)),
    ("no group limit", "v3", _replace(groups=1, top_groups=1)),
    ("group score by maximum", "v3", _replace(grouping="max")),
    ("group score by the two best", "v2_grouped", _replace(grouping="top2")),
    ("scaling factor dropped", "v3", _replace(factor=1.0)),
    ("weights not normalised", "kimi_k2", _replace(normed=False)),
    ("softmax weights not normalised", "mistral4", _replace(normed=False)),
    ("sigmoid instead of softmax", "mistral4", _replace(softmax=False)),
    ("no norm behind the experts", "axk1", _replace(post_norm=False)),
    ("no group limit", "axk1", _replace(groups=1, top_groups=1)),
    ("rope rows taken for pairs", "minicpm3", _replace(pairs=True)),
    ("frequencies not divided by their factors", "minicpm3", _replace(factors=())),
    ("embedding not scaled", "minicpm3", _replace(on_embedding=1.0)),
    ("residual not scaled", "minicpm3", _replace(on_residual=1.0)),
    ("logits not scaled", "minicpm3", _replace(on_logits=1.0)),
    ("queries not scaled by their position", "mistral4", _replace(beta=0.0)),
    ("queries scaled from the first position on", "mistral4", _replace(original=1)),
]


@pytest.mark.parametrize(("what", "name", "change"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_golden_detects_mistake(
    loaded: Callable[[str], Loaded], what: str, name: str, change: Callable[[Settings], Settings]
) -> None:
    golden, s, weights = loaded(name)
    wrong = change(s)
    logits, _ = model.Model(wrong, model.SourceWeights(wrong, weights.tensors)).forward(golden.ids)
    assert np.abs(logits - golden.logits).max() > 0.3, what


def test_golden_detects_wrong_weights(loaded: Callable[[str], Loaded]) -> None:
    """Bias ignored, rope rows left interleaved, norm weights of one, MTP halves swapped, MTP fed the pre-norm state."""
    golden, s, weights = loaded("v3")
    assert golden.mtp_logits is not None

    def with_changed(part: str, change: Callable[[Any], Any]) -> model.SourceWeights:
        tensors = {name: change(t) if part in name else t for name, t in weights.tensors.items()}
        assert any(part in name for name in tensors)
        return model.SourceWeights(s, tensors)

    def error(w: model.SourceWeights) -> float:
        return float(np.abs(model.Model(s, w).forward(golden.ids)[0] - golden.logits).max())

    interleave = np.r_[0:42, 42 + np.argsort(np.r_[0:16:2, 1:16:2])]  # what de-interleaving then leaves as it was
    assert error(weights) <= TOLERANCE
    assert error(with_changed("e_score_correction_bias", lambda t: 0 * t)) > 0.3
    assert error(with_changed("kv_a_proj_with_mqa", lambda t: t[interleave])) > 0.3
    assert error(with_changed("q_a_layernorm", lambda t: 0 * t + 1)) > 0.3

    m = model.Model(s, weights)
    _, hidden = m.forward(golden.ids)
    swapped = with_changed("eh_proj", lambda t: np.concatenate([t[:, 76:], t[:, :76]], axis=1))
    for w, state in ((swapped, hidden), (weights, m.taps["layers.2.layer_out"])):
        logits, _ = model.Model(s, w).mtp_forward(golden.ids[1:], state[:-1])
        assert np.abs(logits - golden.mtp_logits).max() > 0.3


@pytest.mark.parametrize("name", ["moonlight", "glm4_moe_lite"])
def test_golden_detects_wrong_eps(loaded: Callable[[str], Loaded], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rms_norm_eps is 1e-5 here; the latent norms have their own 1e-6."""
    golden, s, weights = loaded(name)
    wrong = dataclasses.replace(s, eps=1e-6)
    assert np.abs(model.Model(wrong, weights).forward(golden.ids)[0] - golden.logits).max() > 3e-4
    monkeypatch.setattr(reference, "LATENT_EPS", s.eps)
    assert np.abs(model.Model(s, weights).forward(golden.ids)[0] - golden.logits).max() > 3e-4


class DeviceArray(np.ndarray):  # type: ignore[type-arg]
    """Stands for a cupy array: numpy's functions answer with such arrays, and refuse to mix them with the host's."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self._answer(func, args, kwargs, mixes=func is np.asarray)  # asarray(host, like=device) is the way in

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return self._answer(getattr(ufunc, method), inputs, kwargs)

    @staticmethod
    def _answer(func: Any, args: Any, kwargs: Any, mixes: bool = False) -> Any:
        def host(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(host(v) for v in x)
            if type(x) is np.ndarray and x.ndim and not mixes:
                raise TypeError(f"{func.__name__} mixes host and device arrays")
            return x.view(np.ndarray) if isinstance(x, DeviceArray) else x

        def device(x: Any) -> Any:
            return tuple(map(device, x)) if isinstance(x, tuple) else np.asarray(x).view(DeviceArray)

        return device(func(*map(host, args), **{k: host(v) for k, v in kwargs.items()}))


class DeviceModule:
    """Stands for cupy."""

    @staticmethod
    def asarray(x: Any) -> DeviceArray:
        return np.asarray(x).view(DeviceArray)


@pytest.mark.parametrize("module", ["stand-in", "cupy"])
@pytest.mark.parametrize("name", ["v3", "v2_grouped"])
def test_other_array_modules(name: str, module: str, tmp_path: Path) -> None:
    """The specification runs on whatever arrays the weights are: cupy's give the same."""
    golden = golden_cases.load(name)
    xp: Any = DeviceModule() if module == "stand-in" else device_cases.array_module("cuda")
    m = model.Model(*model.load(golden.write_checkpoint(tmp_path), xp))
    logits, hidden = m.forward(golden.ids)
    to_host = (lambda a: a.view(np.ndarray)) if module == "stand-in" else xp.asnumpy
    assert type(logits) is (DeviceArray if module == "stand-in" else xp.ndarray)
    assert np.abs(to_host(logits) - golden.logits).max() <= TOLERANCE
    if golden.mtp_logits is not None:
        mtp_logits, _ = m.mtp_forward(golden.ids[1:], hidden[:-1])
        assert np.abs(to_host(mtp_logits) - golden.mtp_logits).max() <= TOLERANCE
    if module == "stand-in":
        with pytest.raises(TypeError, match="mixes host and device"):
            logits + golden.logits


YARN_KEYS = {"rope_scaling": {**tiny.PRESETS["v3"].config["rope_scaling"], "truncate": False, "attention_factor": 1.3}}


MORE: list[tuple[str, dict[str, Any]]] = [
    ("minicpm3", {"max_position_embeddings": 2048}),  # an amplitude
    ("axk1", {"bias_dtype": "f32"}),
    ("minicpm3", {"scale_depth": None, "dim_model_base": None}),
    ("mistral4", {"rope_scaling": tiny.PRESETS["mistral4"].config["rope_scaling"] | {"llama_4_scaling_beta": 0.1}}),
]


@pytest.mark.reference
@pytest.mark.parametrize(
    ("preset", "changes"),
    [*((preset, {}) for preset in tiny.PRESETS), ("glm4_moe_lite", {"rms_norm_eps": 0.05}), ("v3", YARN_KEYS), *MORE],
)
def test_logits_equal_live_transformers(preset: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """A seed and a length that no golden file has (and whose router decisions are no near-ties)."""
    pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    from ref import hf

    folder = tiny.write(tmp_path, preset, seed=77, **changes)
    s, weights = model.load(folder)
    ids = tiny.token_ids(s.vocab, 50, 77)
    m = model.Model(s, weights)
    logits, hidden = m.forward(ids)
    theirs, _, their_mtp = hf.logits(folder, ids)
    assert np.abs(logits - theirs).max() <= TOLERANCE
    assert (their_mtp is not None) == any("eh_proj" in name for name in weights.tensors)
    if their_mtp is not None:
        assert np.abs(m.mtp_forward(ids[1:], hidden[:-1])[0] - their_mtp).max() <= TOLERANCE
