"""Token choice (_core.sample): filters against numpy, keyed noise against the target distribution, hostile logits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import deepcalm
import models
import tiny
from deepcalm import Error, SessionError, _core
from deepcalm.check.perplexity import perplexity
from deepcalm.sampling import Sampling

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def draw(logits: F32, n: int, n_valid: int | None = None, seed: int = 1, first: int = 0, **options: float) -> list[int]:
    """Tokens at positions first..first+n-1 for the same logits."""
    sampling = Sampling(seed=seed, **options)  # type: ignore[arg-type]
    return [
        sampling.choose(logits, pos, len(logits) if n_valid is None else n_valid) for pos in range(first, first + n)
    ]


def softmax(logits: F32, temp: float) -> F64:
    x = logits.astype(np.float64) / temp
    p = np.exp(x - x.max())
    return p / p.sum()


def kept(logits: F32, temp: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """The ids that survive the filters, after the definition in ``Sampling``."""
    p = softmax(logits, temp)
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(p[order] / p[order].sum())
        order = order[: int(np.searchsorted(mass, top_p, side="left")) + 1]
    return sorted(i for i in order if p[i] >= min_p * p[order[0]])


def test_greedy_takes_the_best_and_the_lowest_of_equals(rng: np.random.Generator) -> None:
    logits = rng.normal(size=301).astype(np.float32)
    assert draw(logits, 1) == [int(logits.argmax())]
    logits[[7, 200, 300]] = logits.max() + 1
    assert draw(logits, 1) == [7]
    assert draw(np.zeros(5, np.float32), 1) == [0]
    assert draw(np.array([-np.inf, -0.0, 0.0], np.float32), 1) == [1]  # the two zeros are equal


def test_ids_without_a_token_are_never_chosen(rng: np.random.Generator) -> None:
    logits = rng.normal(size=40).astype(np.float32)
    logits[30:] = 50
    assert draw(logits, 1, n_valid=30) == [int(logits[:30].argmax())]
    for options in ({}, {"top_k": 35}, {"top_p": 0.99}, {"min_p": 0.001}):
        assert max(draw(logits, 300, n_valid=30, temp=5.0, **options)) < 30


# Survival function of the chi-square distribution (Wilson-Hilferty), so that a limit is a probability.
def chi_square_p(statistic: float, freedom: int) -> float:
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0},
        {"temp": 0.6},
        {"temp": 2.5},
        {"temp": 1.0, "top_k": 6},
        {"temp": 1.3, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(options: dict[str, float]) -> None:
    # Fixed seeds: the p-values are facts, not chances. 1e-3 would be missed by one good generator in a thousand.
    logits = np.random.default_rng(5).normal(scale=1.5, size=24).astype(np.float32)
    n = 20_000
    ids = kept(logits, **options)  # type: ignore[arg-type]
    p = softmax(logits, options["temp"])[ids]
    p /= p.sum()
    for seed, first in ((1, 0), (2**63 + 11, 10**9)):
        counts = np.bincount(draw(logits, n, seed=seed, first=first, **options), minlength=24)
        assert counts.sum() == counts[ids].sum() == n
        statistic = float(((counts[ids] - n * p) ** 2 / (n * p)).sum())
        assert chi_square_p(statistic, len(ids) - 1) > 1e-3


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    logits = np.zeros(8, np.float32)
    n = 8_000
    rows = [draw(logits, n, seed=seed, temp=1.0) for seed in (0, 1, 1 << 32)]
    pairs = [(rows[0][:-1], rows[0][1:]), (rows[0], rows[1]), (rows[0], rows[2])]
    for a, b in pairs:
        table = np.bincount(np.array(a) * 8 + np.array(b), minlength=64)
        assert chi_square_p(float(((table - len(a) / 64) ** 2 / (len(a) / 64)).sum()), 63) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 1e-6},
        {"top_p": 0.35},
        {"top_p": 0.9},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 12, "min_p": 0.1},
        {"top_p": 0.95, "min_p": 0.2},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_keep_what_the_definition_keeps(options: dict[str, float], rng: np.random.Generator) -> None:
    for temp in (0.7, 1.0, 3.0):
        logits = rng.normal(scale=2, size=60).astype(np.float32)
        ids = kept(logits, temp, **options)  # type: ignore[arg-type]
        seen = set(draw(logits, 400, temp=temp, **options))
        assert seen <= set(ids)
        # Nothing likely is missing: an id of 5 % stays away from 400 draws once in 10^9 runs.
        p = softmax(logits, temp)[ids]
        likely = {i for i, q in zip(ids, p / p.sum(), strict=True) if q > 0.05}
        assert likely <= seen


def test_filter_borders_with_ties() -> None:
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    assert set(draw(logits, 200, temp=1.0, top_k=2)) == {1, 2}  # of equals the lowest ids
    assert set(draw(logits, 200, temp=1.0, min_p=1.0)) == {1, 2, 3}
    assert set(draw(np.zeros(4, np.float32), 200, temp=1.0, top_p=0.5)) == {0, 1}
    assert set(draw(np.zeros(4, np.float32), 200, temp=1.0, top_p=0.51)) == {0, 1, 2}


def test_choice_is_the_argmax_of_logits_plus_keyed_noise(rng: np.random.Generator) -> None:
    logits = rng.normal(size=50).astype(np.float32)
    for seed, pos, temp in ((0, 0, 1.0), (7, 3, 0.5), (2**64 - 1, 2**40, 2.0)):
        noise = np.array([_core.gumbel(seed, pos, v) for v in range(50)])
        want = int((logits.astype(np.float64) / np.float64(np.float32(temp)) + noise).argmax())
        assert Sampling(temp=temp, seed=seed).choose(logits, pos, 50) == want


def test_noise_is_standard_gumbel_and_depends_on_each_key() -> None:
    noise = np.array([_core.gumbel(3, pos, v) for pos in range(200) for v in range(100)])
    assert abs(noise.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * len(noise))
    assert abs(noise.var() - math.pi**2 / 6) < 0.1
    keys = [(s, p, v) for s in (0, 1, 1 << 32) for p in (0, 1, 1 << 32) for v in (0, 1, 2, 3)]
    assert len({_core.gumbel(*k) for k in keys}) == len(keys)
    assert _core.gumbel(5, 6, 7) == _core.gumbel(5, 6, 7)


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[np.nan, 0, 1], [0, 1, np.nan], [np.inf, 0, 0], [-np.inf] * 3])
def test_logits_that_are_not_finite_are_refused(bad: list[float], temp: float) -> None:
    with pytest.raises(SessionError, match="not finite"):
        draw(np.array(bad, np.float32), 1, temp=temp)


def test_latents_that_f16_cannot_hold_are_told_what_to_type(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "large", "v2_lite", dtype="f32", n_shards=1)
    tensors = load_file(folder / "model.safetensors")
    for name in (name for name in tensors if "kv_a_layernorm" in name):
        tensors[name] *= np.float32(3e4)
    save_file(tensors, folder / "model.safetensors")
    model = deepcalm.Model(models.pack(folder).path)
    said = "not finite.*; values too large for a cache in f16.* --kv bf16"
    with model.session(64, "f16") as s, pytest.raises(SessionError, match=said):
        list(s.generate([1, 2], max_tokens=4))
    with model.batch(ctx=64, kv="f16") as batch:
        choice = batch.submit([1, 2], max_tokens=4).choices[0]
        assert [*batch.run()] and re.search(said, str(choice.error))
    with pytest.raises(Error, match=said):
        perplexity(model, "Once upon a time", 64, "f16")
    texts = [[*model.session(64, kv).generate([1, 2], max_tokens=4, eos_ids=())] for kv in ("bf16", "f32")]
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_padding_rows_may_hold_anything() -> None:
    assert draw(np.array([0, 1, np.nan, np.inf], np.float32), 1, n_valid=2) == [1]


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"temp": -1},
            {"temp": math.nan},
            {"temp": math.inf},
            {"top_k": -1},
            {"top_k": 2**31},
            {"min_p": -0.1},
            {"min_p": 2},
        ),
        *({"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}, {"seed": -1}, {"seed": 2**64}),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_extreme_temperatures() -> None:
    logits = np.array([0, 5, 4], np.float32)
    assert draw(logits, 50, temp=1e-30) == [1] * 50
    assert set(draw(logits, 200, temp=1e30)) == {0, 1, 2}
