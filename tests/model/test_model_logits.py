"""The runtime with f32 weights and an f32 cache against transformers and the reference: logits, MTP logits, every tap.

Law L2. Logit standard deviation is about 1.5, so 1e-4 is four digits; the argmax margins of the golden cases are 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import golden_cases
import models
import tiny
from deepcalm import _core
from deepcalm.check import reference
from ref import model

pytestmark = pytest.mark.sanitize
TOLERANCE = 1e-4


@pytest.fixture(params=golden_cases.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("isa", models.ISAS)
def test_logits_equal_transformers(name: str, isa: str) -> None:
    golden = golden_cases.load(name)
    file = models.pack(models.golden_checkpoint(name), dtype="f32")
    run = models.Run(models.open_model(file, isa), golden.ids, "f32")
    assert np.abs(run.logits - golden.logits).max() <= TOLERANCE
    assert (run.logits.argmax(1) == golden.logits.argmax(1)).all()
    if golden.mtp_logits is None:
        assert file.config["num_nextn_predict_layers"] == 0
        return
    mtp_logits, _, _ = run.mtp(64)
    assert np.abs(mtp_logits - golden.mtp_logits).max() <= TOLERANCE
    assert (mtp_logits.argmax(1) == golden.mtp_logits.argmax(1)).all()


def test_packed_f32_weights_are_the_checkpoint(name: str) -> None:
    """What the packer stored as f32 is exactly what the independent reader finds in the checkpoint."""
    s, source = model.load(models.golden_checkpoint(name))
    file = models.pack(models.golden_checkpoint(name), dtype="f32")
    packed_s, packed = models.weights(file)
    assert model.meaning(packed_s) == model.meaning(s)
    for key, e in file.entries.items():
        if e.kind in ("tiled", "plain"):
            ours, theirs = (model.matrix(w, key, e.shape) for w in (packed, source))
            np.testing.assert_array_equal(ours, theirs, err_msg=key)


@pytest.mark.by_turns("isa", len(models.ISAS))
@pytest.mark.parametrize("isa", models.ISAS)
def test_taps_equal_reference(name: str, isa: str) -> None:
    """Every tap of every layer, MTP included, free-running: the first wrong one names the stage that is wrong."""
    golden = golden_cases.load(name)
    file = models.pack(models.golden_checkpoint(name), dtype="f32")
    run = models.Run(models.open_model(file, isa), golden.ids, "f32", [40, 32], taps=["*"])
    oracle = model.Model(*models.weights(file))
    oracle.forward(golden.ids)
    seen = set()
    for part, taps in zip(run.parts, run.taps, strict=True):
        seen |= _compare(taps, oracle.taps, part)
    if golden.mtp_logits is not None:
        run.mtp(40, taps=["*"])
        oracle.mtp_forward(golden.ids[1:], run.hidden[:-1])
        for part, taps in zip(run.mtp_parts, run.mtp_taps, strict=True):
            seen |= _compare(taps, oracle.taps, part)
    of_ffn = "layers.1.topk_idx" if file.config["n_routed_experts"] else "layers.1.ffn_out"
    assert {"embed", "final_norm", "logits", of_ffn, "layers.1.q_absorbed"} <= seen
    assert ("mtp.layer_out" in seen) == (golden.mtp_logits is not None)


_YARN = tiny.PRESETS["v3"].config["rope_scaling"]
_LONGROPE, _MISTRAL = (tiny.PRESETS[name].config["rope_scaling"] for name in ("minicpm3", "mistral4"))
_TILES = {"hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
_ONES = {"qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 1, "moe_intermediate_size": 1}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "tied head": ("v3", {"tie_word_embeddings": True, "mtp_copies": False}),
    "no dense layer": ("v3", {"first_k_dense_replace": 0}),
    "routed experts in the MTP layer only": ("v3", {"first_k_dense_replace": 3}),
    "fewer layers than dense ones": ("moonlight", {"num_hidden_layers": 2, "first_k_dense_replace": 3}),
    "dense model": ("moonlight", {"n_routed_experts": 0}),
    "no shared expert": ("glm4_moe_lite", {"n_shared_experts": 0}),
    "every expert chosen": ("moonlight", {"num_experts_per_tok": 9}),
    "every group kept": ("v2_grouped", {"topk_group": 4}),
    "one head, one layer": ("v2_lite", {"num_attention_heads": 1, "num_hidden_layers": 1, "first_k_dense_replace": 0}),
    "whole tiles": ("v3", {**_TILES, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 320}),
    "heads of one row tile": ("v3", {"v_head_dim": 16, "num_attention_heads": 3}),
    "widths of one": ("moonlight", {**_ONES, "intermediate_size": 1, "hidden_size": 7}),
    "heads wider than the latent": ("v3", {"qk_nope_head_dim": 130, "v_head_dim": 70, "kv_lora_rank": 20}),
    "an eps that every norm feels": ("glm4_moe_lite", {"rms_norm_eps": 0.05}),
    "yarn range not truncated": ("v3", {"rope_scaling": {**_YARN, "truncate": False}}),
    "yarn with attention_factor": ("v3", {"rope_scaling": {**_YARN, "attention_factor": 1.3}}),
    "norm behind the experts of the MTP layer": ("axk1", {"num_nextn_predict_layers": 1}),
    "norm behind routed experts alone": ("axk1", {"n_shared_experts": 0}),
    "norm behind the experts, and a bias": ("axk1", {"bias_dtype": "f32", "n_group": 1, "topk_group": 1}),
    "longrope with an amplitude": ("minicpm3", {"max_position_embeddings": 2048}),
    "longrope with attention_factor": ("minicpm3", {"rope_scaling": {**_LONGROPE, "attention_factor": 0.9}}),
    "dense model with factors of one": ("minicpm3", {"scale_emb": 1, "scale_depth": None, "dim_model_base": None}),
    "queries scaled early": ("mistral4", {"rope_scaling": {**_MISTRAL, "original_max_position_embeddings": 8}}),
    "yarn without mscale": ("v3", {"rope_scaling": {k: v for k, v in _YARN.items() if not k.startswith("mscale")}}),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_variants_equal_reference(what: str, tmp_path: Path) -> None:
    """Shapes and settings at the edge of what a config.json may say."""
    preset, changes = VARIANTS[what]
    folder = tiny.write(tmp_path / "hf", preset, dtype="f32", seed=1, **changes)
    s, source = model.load(folder)
    file = models.pack(folder, dtype="f32")
    ids = tiny.token_ids(s.vocab, 70, 1)
    oracle = model.Model(s, source)
    logits, hidden = oracle.forward(ids)
    if file.config["num_nextn_predict_layers"]:
        mtp_logits, _ = oracle.mtp_forward(ids[1:], hidden[:-1])
    for isa in dict.fromkeys((models.ISAS[0], models.ISAS[-1])):  # the best and the scalar one
        run = models.Run(models.open_model(file, isa), ids, "f32")
        assert np.abs(run.logits - logits).max() <= TOLERANCE, isa
        if file.config["num_nextn_predict_layers"]:
            assert np.abs(run.mtp(64)[0] - mtp_logits).max() <= TOLERANCE, isa


ROPES: dict[str, dict[str, object]] = {
    "v3": {"rope_theta": 1e4, "rope_scaling": {**_YARN, "original_max_position_embeddings": 4096, "beta_fast": 32}},
    "kimi_k2": {
        "rope_theta": 5e4,
        "rope_scaling": {**_YARN, "factor": 64, "original_max_position_embeddings": 4096, "beta_fast": 1},
    },
    "glm": {"rope_theta": 1e6, "rope_scaling": None},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_far_out(rope: str, tmp_path: Path) -> None:
    """Real frequency tables (64 channels) at real positions: the float32 angle, and an accurate cosine of it."""
    widths = {"qk_rope_head_dim": 64, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    folder = tiny.write(
        tmp_path / "hf", "v2_lite", dtype="f32", max_position_embeddings=163840, **widths, **ROPES[rope]
    )
    file = models.pack(folder, dtype="f32")
    s, weights = models.weights(file)
    near = model.Model(s, weights)
    near.forward(np.array([5]))
    unrotated = near.taps["layers.0.k_rope"]  # position 0 rotates by nothing
    core = models.open_model(file, models.ISAS[0])
    for position in (1, 63, 4095, 100_000, 163_839):
        session = _core.Session(core, 163840, "q8", 1)
        fresh = session.state()
        rows = np.zeros((1, position, fresh["cache"].shape[2]), np.uint8)
        session.load_state(np.zeros(position, np.int32), rows, fresh["mtp_cache"], fresh["hidden"])
        session.trace(["k_rope"])
        session.forward(np.array([5], np.int32), "none")
        expected = reference.rotate(s, unrotated / reference.amplitude(s), position)
        assert np.abs(session.taps()["layers.0.k_rope"] - expected).max() <= 2e-6, position


def _compare(taps: dict[str, models.Array], whole: dict[str, models.Array], part: slice) -> set[str]:
    expected = {name: value[part] for name, value in whole.items()}
    assert set(taps) == set(expected)
    for tap, value in expected.items():  # in the order of computation
        assert taps[tap].shape == value.shape, tap
        if tap.endswith("topk_idx"):
            np.testing.assert_array_equal(taps[tap], value, err_msg=tap)
        else:
            scale = max(1.0, float(np.sqrt(np.mean(value**2))))
            assert np.abs(taps[tap] - value).max() <= TOLERANCE * scale, tap
    return set(taps)
