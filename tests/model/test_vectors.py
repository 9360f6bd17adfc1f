"""Unit vectors of the specification: RoPE, YaRN tables, softmax scales, routers, e4m3. They pin the reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tiny
from deepcalm.check import reference
from deepcalm.check.reference import Settings
from ref import checkpoint, model

Array = np.ndarray[Any, Any]


def settings(yarn: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """Of a V3-shaped config.json (real head widths) with some keys changed, and with these keys of YaRN."""
    raw: dict[str, Any] = {**tiny.PRESETS["v3"].config, "q_lora_rank": 1536, "kv_lora_rank": 512}
    raw |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 1e4}
    rope = yarn and {"type": "yarn", "original_max_position_embeddings": 4096, **yarn}
    return Settings.of({**raw, "rope_scaling": rope, **changes})


V2_LITE = settings({"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707})
V3 = settings({"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0})
KIMI = {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
K2_32, K2_64 = (settings({**KIMI, "factor": factor}, rope_theta=5e4) for factor in (32.0, 64.0))
MISTRAL4 = settings(
    {"factor": 128.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 8192},
    qk_nope_head_dim=64,
)
MOONLIGHT = settings(rope_theta=5e4)
GLM = settings(rope_theta=1e6, qk_nope_head_dim=192)


def test_rope_interleaved_vector() -> None:
    """The checkpoint's own convention: channels (2j, 2j + 1) form a pair, and the result stays in place."""
    s = settings(qk_rope_head_dim=8)
    x = np.arange(1.0, 9.0)
    expected = [
        -1.272232513,
        -1.838864985,
        1.683928641,
        4.707906576,
        4.817777168,
        6.147277704,
        6.975968536,
        8.020963969,
    ]
    angle = 3 * reference.inv_freq(s)
    a, b = x[0::2], x[1::2]
    pairs = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    rotated = np.stack(pairs, axis=1).reshape(-1)
    np.testing.assert_allclose(rotated, expected, atol=1e-6)
    # the packed order: permute the input once, rotate half-split, and the result is the permuted result
    order = model.SourceWeights(s, {})._rope(8, 0)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    np.testing.assert_allclose(reference.rotate(s, x[None, order], 3)[0], rotated[order], rtol=1e-6)


@pytest.mark.parametrize(
    ("s", "values"),
    [
        (
            V3,
            {0: 1, 1: 0.749894209, 10: 0.0562341325, 11: 0.0390069266, 16: 0.0055, 20: 0.000790569415,
             22: 0.000177827941, 23: 3.33380358e-05, 31: 3.33380358e-06},
        ),
        (K2_64, {1: 0.713111085, 19: 0.00162175991, 20: 1.80702339e-05, 31: 4.38220646e-07}),
        (MISTRAL4, {12: 0.0316227766, 16: 0.00694711538, 24: 8.41346154e-05, 31: 1.04181362e-06}),
    ],
    ids=["v3", "kimi_k2_64", "mistral4"],
)  # fmt: skip
def test_inv_freq(s: Settings, values: dict[int, float]) -> None:
    f = reference.inv_freq(s)
    assert f.shape == (32,)
    np.testing.assert_allclose(f[list(values)], list(values.values()), rtol=2e-7)


def test_inv_freq_without_yarn() -> None:
    np.testing.assert_allclose(reference.inv_freq(MOONLIGHT), [5e4 ** (-2 * j / 64) for j in range(32)], rtol=1e-15)


@pytest.mark.parametrize(
    ("s", "square", "scale"),
    [
        (V2_LITE, 1.589626, 0.1147214),
        (V3, 1.873854, 0.1352338),
        (K2_32, 1.813260, 0.1308607),
        (K2_64, 2.004740, 0.1446796),
        (MISTRAL4, 2.205828, 0.1949695),
        (MOONLIGHT, 1.0, 0.0721688),
        (GLM, 1.0, 0.0625),
        (settings(qk_nope_head_dim=64, qk_rope_head_dim=32), 1.0, 0.1020621),
    ],
    ids=["v2", "v3", "k2_32", "k2_64", "mistral4", "moonlight", "glm", "minicpm3"],
)
def test_softmax_scale(s: Settings, square: float, scale: float) -> None:
    assert reference.softmax_scale(s) == pytest.approx(scale, rel=1e-6)
    assert reference.softmax_scale(s) / (s.dn + s.dr) ** -0.5 == pytest.approx(square, 1e-6)
    assert reference.amplitude(s) == 1


def test_rope_amplitude_order_of_precedence() -> None:
    def amplitude(**changes: float) -> float:
        return reference.amplitude(dataclasses.replace(V3, yarn={**(V3.yarn or {}), **changes}))

    m = 0.1 * math.log(40) + 1
    assert amplitude(mscale_all_dim=0.0) == pytest.approx(m)
    assert amplitude(mscale_all_dim=0.707) == pytest.approx(m / (0.0707 * math.log(40) + 1))
    assert amplitude(attention_factor=1.25) == 1.25
    assert amplitude(factor=1.0) == 1


Z = np.array([[0.5, -1, 2, 0.1, -0.3, 1.2, 0, 0.9]])
BIAS = np.array([0.1, 0.9, -0.2, 0.05, 0.3, -0.1, 0.25, 0])
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GREEDY = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
GROUPED = {**GREEDY, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}


def route(s: Settings, z: Array, bias: Array | None) -> tuple[Array, Array]:
    """Gate logits z [n, E] -> (experts [n, k], weights [n, k])."""
    p, u = reference.scores(s, z, bias)
    experts = reference.choose(s, u)
    return experts, reference.expert_weights(s, p, experts)


@pytest.mark.parametrize(
    ("keys", "groups", "bias", "expected"),
    [
        (NOAUX, (4, 2), BIAS, {0: 1.118404, 1: 0.483221, 6: 0.898375}),
        (NOAUX, (1, 1), BIAS, {1: 0.562875, 4: 0.890661, 6: 1.046464}),
        (GREEDY, (1, 1), None, {2: 0.409789, 5: 0.184130, 7: 0.136407}),
        (GROUPED, (4, 2), None, {2: 6.556625, 3: 0.980665, 5: 2.946081}),
    ],
    ids=["C grouped", "C", "A", "B"],
)
def test_router(keys: dict[str, Any], groups: tuple[int, int], bias: Any, expected: dict[int, float]) -> None:
    s = settings(**keys, n_routed_experts=8, num_experts_per_tok=3, n_group=groups[0], topk_group=groups[1])
    experts, weights = route(s, Z, bias)
    assert experts[0].tolist() == list(expected)
    np.testing.assert_allclose(weights[0], list(expected.values()), atol=1e-6)


def test_router_ties_go_to_the_lowest_index() -> None:
    s = settings(**GREEDY, n_routed_experts=256, num_experts_per_tok=8, n_group=1, topk_group=1)
    assert route(s, np.zeros((2, 256)), None)[0].tolist() == [list(range(8))] * 2


def test_router_keeps_tiny_scores_and_masks_with_minus_infinity() -> None:
    """Scores of 1e-8 survive a bias of 12; an allowed expert with a negative biased score beats a masked one."""
    s = settings(**NOAUX, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    z = np.array([[-18.0, -19.0, -18.5, -40.0]])
    experts, weights = route(s, z, np.array([12.0, 12.0, 11.0, 11.0]))
    p = np.exp(z[0, :2])
    assert experts[0].tolist() == [0, 1]
    np.testing.assert_allclose(weights[0], 2.5 * p / p.sum(), rtol=1e-6)

    s = settings(**NOAUX, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    experts, _ = route(s, np.zeros((1, 4)), np.array([-1.0, -2.0, -0.5, -3.0]))
    assert experts[0].tolist() == [0, 1]


def test_router_forced_selection_keeps_its_own_scores() -> None:
    s = settings(**NOAUX, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2)
    weights = reference.expert_weights(s, reference.scores(s, Z, BIAS)[0], np.array([[2, 3, 5]]))
    p = 1 / (1 + np.exp(-Z[0, [2, 3, 5]]))
    np.testing.assert_allclose(weights[0], 2.5 * p / p.sum(), rtol=1e-12)


E4M3 = {0x00: 0, 0x01: 0.001953125, 0x07: 0.013671875, 0x08: 0.015625, 0x38: 1, 0x3C: 1.5, 0x40: 2, 0x7E: 448, 0xB8: -1}


def test_e4m3_decoders_agree() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = checkpoint.e4m3_value(codes)
    assert {c: float(values[c]) for c in E4M3} == E4M3
    assert np.isnan(values[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(values, [0x7F, 0xFF])).all()
    theirs = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(values, theirs)
    np.testing.assert_array_equal(tiny.e4m3_table(), theirs)


def test_tiny_encoders_round_to_nearest_even() -> None:
    x = np.concatenate([tiny.normal(0, "x", 4000) * s for s in (1e-3, 1.0, 300.0)])
    finite = tiny.e4m3_table()[:127]
    x = np.concatenate([x, finite, -finite, (finite[1:] + finite[:-1]) / 2])  # exact values and exact ties
    x = x[np.abs(x) <= 448]
    np.testing.assert_array_equal(
        tiny.e4m3_bits(x), x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    f = x.astype(np.float32)
    np.testing.assert_array_equal(tiny.bf16_value(tiny.bf16_bits(f)), f.astype(ml_dtypes.bfloat16).astype(np.float32))


PINNED_UNIFORM = [-0.8120327785775079, -0.7732548749682122]
PINNED_NORMAL = [-1.5090429231348839, 0.02214750025547362]


def test_tiny_numbers_are_what_they_claim() -> None:
    u, g = tiny.uniform(1, "a", 100000), tiny.normal(1, "a", 100000)
    assert abs(u.mean()) < 0.01 and abs(u.std() - 3**-0.5) < 0.01 and u.min() >= -1 and u.max() < 1
    assert abs(g.mean()) < 0.01 and abs(g.std() - 1) < 0.01
    # pinned, because golden logits depend on every bit
    assert tiny.uniform(0, "pin", 2).tolist() == PINNED_UNIFORM
    assert tiny.normal(0, "pin", 2).tolist() == PINNED_NORMAL


def test_int4_round_trip() -> None:
    """Codes and scales that a stranger's decoder reads: -8..7, low nibble first, bf16 scales, groups of 32."""
    w = tiny.normal(0, "w", 6 * 96).reshape(6, 96)
    packed, scale = tiny.quantise_int4(w)
    assert packed.shape == (6, 12) and scale.shape == (6, 3)
    raw = {"x.weight_packed": packed, "x.weight_scale": tiny.bf16_value(scale), "x.weight_shape": np.array([6, 96])}
    back = checkpoint.dequantise(raw)["x.weight"]
    step = tiny.bf16_value(scale).repeat(32, 1)
    assert (np.abs(back - w) <= step * 0.55).all() and (back / step == np.rint(back / step)).all()
    assert (back / step).min() == -8 and back[0, 0] == ((int(packed.view(np.uint32)[0, 0]) & 15) - 8) * step[0, 0]
