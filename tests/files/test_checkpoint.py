"""Checkpoint folders: configurations of both styles, shards, weights, and one test per refusal."""

# ruff: noqa: E501  (tables of refusals: one case, one line)
from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import golden_cases
import models
import tiny
from deepcalm import _core, geometry
from deepcalm.errors import CheckpointError, ConfigError, Error
from deepcalm.files.checkpoint import Checkpoint, Weight
from deepcalm.files.config import normalise, unwrap
from deepcalm.files.pack import plan
from deepcalm.files.safetensors import File, read_header
from ref import checkpoint as ref_checkpoint
from ref.model import Settings, meaning, settings_of

pytestmark = pytest.mark.sanitize


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    return {name: tiny.write(folder / name, name) for name in tiny.PRESETS}


@pytest.fixture
def copy(base: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(base[name], tmp_path / name))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **keys: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    if change is not None:
        change(config)
    path.write_text(json.dumps(config))
    return folder


def refused(folder: Path, message: str, error: type[Error] = CheckpointError) -> None:
    with pytest.raises(error, match=message) as e:
        Checkpoint(folder).close()
    assert "\n" not in str(e.value) and type(e.value) in (CheckpointError, ConfigError)


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_normalised_config_is_the_preset(preset: str, base: dict[str, Path]) -> None:
    spec = tiny.PRESETS[preset]
    with Checkpoint(base[preset]) as c:
        got = c.config
    rope = spec.config["rope_scaling"] or {}
    for key, value in spec.config.items():
        if key not in ("rope_scaling", "eos_token_id", "q_lora_rank", "scale_emb", "scale_depth", "dim_model_base"):
            assert got[key] == value, key
    assert got["q_lora_rank"] == (spec.config["q_lora_rank"] or 0)
    eos = spec.config["eos_token_id"]
    assert got["eos_token_ids"] == sorted({*(eos if isinstance(eos, list) else [eos]), *spec.generation_eos})
    assert (got["rope_type"], got["rope_layout"]) == (rope.get("type", "default"), "half")
    names = {
        "rope_factor": "factor",
        "original_max_position_embeddings": "",
        "beta_fast": "",
        "beta_slow": "",
        "mscale": "",
    }
    for key, name in names.items():
        if got["rope_type"] == "yarn":
            assert got[key] == rope[name or key]
    # the reference reads the same file with code of its own
    assert meaning(settings_of(got)) == meaning(Settings.of(ref_checkpoint.config(base[preset])))


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_old_and_new_style_say_the_same(preset: str, tmp_path: Path) -> None:
    configs = []
    for style in ("old", "new"):
        with Checkpoint(tiny.write(tmp_path / style, preset, style=style)) as c:
            configs.append(c.config)
    assert configs[0] == configs[1]


def test_keys_that_change_nothing_are_accepted(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    with Checkpoint(folder) as c:
        want = c.config
    rope = json.loads((folder / "config.json").read_text())["rope_scaling"] | {
        "truncate": None,
        "attention_factor": None,
    }
    harmless: dict[str, Any] = {
        "layer_types": ["full_attention"] * 3,
        "sliding_window": None,
        "head_dim": 16,
        "rope_scaling": rope,
    }
    edit_config(
        folder, **harmless, partial_rotary_factor=1.0, moe_layer_freq=1, transformers_version="5.23.0", auto_map={}
    )
    with Checkpoint(folder) as c:
        assert c.config == want


DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6}
FULL = {  # config.json -> billions of parameters as published: all, and those that a token reads (sarvam counts no head)
    "sarvam-105b": (
        {
            "model_type": "sarvam_mla", "vocab_size": 262144, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 64, "intermediate_size": 16384, "moe_intermediate_size": 2048, "num_experts": 128,
            "num_experts_per_tok": 8, "num_shared_experts": 1, "q_lora_rank": None, "head_dim": 576, "q_head_dim": 192,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "rope_theta": 10000.0, "max_position_embeddings": 131072, **DIMS,
            "rope_scaling": {"type": "deepseek_yarn", "factor": 40, "original_max_position_embeddings": 4096,
                             "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        (105, 10.3),
    ),
    "DeepSeek-V2": (
        {
            "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "num_hidden_layers": 60,
            "num_attention_heads": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "n_routed_experts": 160, "num_experts_per_tok": 6, "n_shared_experts": 2, "q_lora_rank": 1536,
            "first_k_dense_replace": 1, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0, "norm_topk_prob": False, "rope_theta": 10000,
            "max_position_embeddings": 163840, **DIMS,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                             "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        (235.7, 20.9),
    ),
    "Kimi-K2.5": (
        {
            "model_type": "kimi_k25", "vision_config": {}, "bos_token_id": 163584, "eos_token_id": 163585,
            "text_config": {
                "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "num_hidden_layers": 61,
                "num_attention_heads": 64, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "q_lora_rank": 1536,
                "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
                "norm_topk_prob": True, "rope_theta": 50000.0, "max_position_embeddings": 262144, **DIMS,
                "rope_scaling": {"type": "yarn", "factor": 64, "original_max_position_embeddings": 4096,
                                 "beta_fast": 1, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
        },
        (1026, 31.7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_full_size_configurations_have_the_published_parameters(name: str) -> None:
    raw, (total, active) = FULL[name]
    config = normalise(unwrap(raw, name)[0], {}, 0, name)
    count = geometry.parameters(config)
    head = config["vocab_size"] * config["hidden_size"] if name == "sarvam-105b" else 0
    assert (count.total - head) / 1e9 == pytest.approx(total, rel=0.005)
    assert (count.active - head) / 1e9 == pytest.approx(active, rel=0.005)


def yarn(**keys: Any) -> dict[str, Any]:
    rope = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {k: v for k, v in (rope | keys).items() if v is not ...}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected one of deepseek_v2, .*, minicpm3, kimi_k25"),
        ({"model_type": "kimi_vl"}, "model_type is 'kimi_vl', a wrapper whose tensor names are not known for certain: save its"),
        ({"model_type": "deepseek_vl_v2"}, "'deepseek_vl_v2', a wrapper whose"),
        ({"use_mla": False}, r"use_mla is False, expected True \(a model with other attention\)"),
        ({"model_type": "sarvam_mla", "num_experts": 8}, "num_experts is 8, expected n_routed_experts's 9"),
        ({"model_type": "deepseek_v4"}, r"model_type is 'deepseek_v4' \(planned, not supported yet\)"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "kimi_k25"}, "text_config is None, expected an object"),
        ({"hidden_size": ...}, "hidden_size is missing, expected an integer"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"hidden_size": 70.0}, "hidden_size is 70.0, expected an integer"),
        ({"hidden_size": "70"}, "hidden_size is '70', expected an integer"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776, expected an integer"),
        ({"hidden_size": -1}, "hidden_size is -1, expected an integer"),
        ({"hidden_size": 65537}, r"hidden_size is 65537, expected 1\.\.65536"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0, expected 1\.\.1024"),
        ({"num_attention_heads": 1025}, r"num_attention_heads is 1025, expected 1\.\.1024"),
        ({"kv_lora_rank": 0}, r"kv_lora_rank is 0, expected 1\.\."),
        ({"qk_rope_head_dim": 11}, "qk_rope_head_dim is 11, expected an even number"),
        ({"v_head_dim": 4097}, r"v_head_dim is 4097, expected 1\.\.4096"),
        ({"intermediate_size": 0}, r"intermediate_size is 0, expected 1\.\."),
        ({"vocab_size": 1 << 23}, r"vocab_size is 8388608, expected 1\.\.4194304"),
        ({"max_position_embeddings": 1 << 25}, r"max_position_embeddings is 33554432, expected 1\.\."),
        ({"n_routed_experts": ...}, "n_routed_experts is missing"),
        ({"n_routed_experts": 4097}, r"n_routed_experts is 4097, expected 0\.\.4096"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0, expected 1\.\.9"),
        ({"num_experts_per_tok": 10}, r"num_experts_per_tok is 10, expected 1\.\.9"),
        ({"n_shared_experts": 4096, "moe_intermediate_size": 1 << 20}, r"n_shared_experts \* moe_intermediate_size is 4294967296"),
        ({"n_group": 2}, "n_group is 2, expected a divisor of n_routed_experts 9"),
        ({"n_group": 9}, "n_group is 9, expected groups of at least 2 experts"),
        ({"n_group": 3, "topk_group": 4}, r"topk_group is 4, expected 1\.\.3"),
        ({"n_group": 3, "topk_group": 1, "num_experts_per_tok": 4}, r"num_experts_per_tok is 4, expected 1\.\.3"),
        ({"n_group": ...}, "n_group is missing"),
        ({"first_k_dense_replace": -1}, r"first_k_dense_replace is -1, expected an integer in 0\.\."),
        ({"first_k_dense_replace": ...}, "first_k_dense_replace is missing"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq is 2, expected 1 \(every layer"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types is .*, expected 3 entries, 'dense' ones first"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types is .*, expected 3 entries"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "first_k_dense_replace is 1, expected 2 as mlp_layer_types"),
        ({"topk_method": "best"}, "topk_method is 'best', expected one of greedy, group_limited_greedy, noaux_tc"),
        ({"scoring_func": "softplus"}, "scoring_func is 'softplus', expected one of softmax, sigmoid"),
        ({"scoring_func": "softmax"}, "norm_topk_prob is True, expected false with softmax routing .*codes disagree"),
        ({"scoring_func": "softmax", "norm_topk_prob": False}, r"scoring_func is softmax, expected sigmoid \(topk_method noaux_tc\)"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', expected true or false"),
        ({"norm_topk_prob": ...}, "norm_topk_prob is missing"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0, expected a finite number > 0"),
        ({"routed_scaling_factor": 1e60}, "routed_scaling_factor is inf, expected a finite number > 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0, expected a finite number > 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 1000.*\.\.\., expected a finite number"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, r"attention_bias is True, expected False \(not implemented\)"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is .*, expected"),
        ({"layer_types": 3}, "layer_types is 3, expected"),
        ({"index_topk": 2048}, "index_topk is 2048, expected absent"),
        ({"rope_interleave": "no"}, "rope_interleave is 'no', expected True or False"),
        ({"rope_theta": ...}, "rope_theta is missing, expected a number"),
        ({"rope_theta": 1.0}, "rope_theta is 1, expected a finite number > 1"),
        ({"rope_scaling": {}}, "rope_scaling: type is missing, expected default, yarn or longrope"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object or null"),
        ({"rope_scaling": yarn(type="dynamic")}, "rope_scaling: type is 'dynamic', expected one of default, yarn"),
        ({"rope_scaling": yarn(rope_type="default")}, "rope_type is 'default', expected the same as type 'yarn'"),
        ({"rope_scaling": yarn(factor=...)}, "rope_scaling: factor is missing"),
        ({"rope_scaling": yarn(factor=0.5)}, "rope_factor is 0.5, expected a finite number >= 1"),
        ({"rope_scaling": yarn(original_max_position_embeddings=...)}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": yarn(original_max_position_embeddings=0)}, r"original_max_position_embeddings is 0, expected 1\.\."),
        ({"rope_scaling": yarn(beta_fast=0)}, "beta_fast is 0, expected a finite number > 0"),
        ({"rope_scaling": yarn(mscale=-1)}, "mscale is -1, expected a finite number >= 0"),
        ({"rope_scaling": yarn(truncate=1)}, "truncate is 1, expected true or false"),
        ({"rope_scaling": yarn(llama_4_scaling_beta=0.1)}, "rope_scaling: 'llama_4_scaling_beta' is not a known key"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}, "rope_theta is 2.0, expected the top level's 50000.0"),
        ({"rope_parameters": {}, "rope_scaling": yarn()}, "rope_scaling is .*, expected null beside rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
        ({"eos_token_id": [1, 299]}, r"eos_token_id is \[1, 299\], expected token ids in 0\.\.298"),
        ({"bos_token_id": "1"}, r"bos_token_id is '1', expected token ids in 0\.\.298"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq', expected fp8, compressed-tensors or modelopt"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method is 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}}, "quant_algo is 'INT4_AWQ', expected 'NVFP4' or"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method is 'mxfp4'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is that of an mlx 4-bit checkpoint, which is not read"),
        ({"quantization_config": {"group_size": 32, "bits": 8, "mode": "affine"}}, "quantization_config is that of an mlx 8-bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is missing, expected two block sizes"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, r"weight_block_size is \[128\]"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}}, "fmt is 'e5m2'"),
    ],
)  # fmt: skip
def test_config_refusals_name_the_key(keys: dict[str, Any], message: str, copy: Callable[[str], Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        for key, value in keys.items():
            config.pop(key, None)
            if value is not ...:
                config[key] = value

    refused(edit_config(copy("moonlight"), change), r"config.json: .*" + message, ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 2}, r"n_group is 2, expected 1 \(groups"),
        ({"rope_parameters": {"llama_4_scaling_beta": ...}}, "rope_parameters: llama_4_scaling_beta is missing"),
        ({"rope_parameters": {"llama_4_scaling_beta": -1}}, r"llama_4_scaling_beta is -1, expected a finite number >= 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25, expected 1 or 1.0 or 0.5"),
        ({"rope_parameters": {"max_position_embeddings": 5}}, "max_position_embeddings is 5, expected 4096"),
        ({"rope_parameters": {"original_max_position_embeddings": 0}}, r"original_max_.* is 0, expected 1\.\."),
    ],
)  # fmt: skip
def test_mistral4_refusals(changes: dict[str, Any], message: str, copy: Callable[[str], Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        for key, value in changes.items():
            both = config[key] | value if isinstance(value, dict) else value
            config[key] = {k: v for k, v in both.items() if v is not ...} if isinstance(both, dict) else both

    refused(edit_config(copy("mistral4"), change), message, ConfigError)


LONGROPE = tiny.PRESETS["minicpm3"].config["rope_scaling"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale_emb": ...}, "scale_emb is missing, expected a number"),
        ({"scale_emb": 0}, "embed_scale is 0, expected a finite number > 0"),
        ({"scale_depth": -1}, "residual_scale is -0.5773.*, expected a finite number > 0"),
        ({"dim_model_base": "x"}, "dim_model_base is 'x', expected a number"),
        ({"rope_interleave": True}, r"rope_interleave is True, expected False \(its rope rows are half-split\)"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, r"short_factor is \[1.0\], expected 6 numbers"),
        ({"rope_scaling": LONGROPE | {k: [1, 1, 1, 1, 1, "6"] for k in ("short_factor", "long_factor")}}, "short_factor is '6', expected a n"),
        ({"rope_scaling": LONGROPE | {k: [10**400] * 6 for k in ("short_factor", "long_factor")}}, "expected a finite number"),
        ({"rope_scaling": LONGROPE | {"long_factor": [2.0] * 6}}, r"long_factor is \[2.0, .* not implemented"),
        ({"rope_scaling": LONGROPE | {k: [1, 1, 1, 1, 1, 0] for k in ("short_factor", "long_factor")}}, "short_factor is 0, expected"),
        ({"rope_scaling": LONGROPE | {"mscale_all_dim": 1.0}}, "mscale_all_dim is 1.0, expected 0 or 0.0"),
        ({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}}, "original_max_.* is 1, expected 2 or more"),
    ],
)  # fmt: skip
def test_minicpm3_refusals(keys: dict[str, Any], message: str, copy: Callable[[str], Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        config |= {key: value for key, value in keys.items() if value is not ...}
        for key in [key for key, value in keys.items() if value is ...]:
            del config[key]

    refused(edit_config(copy("minicpm3"), change), r"config.json: .*" + message, ConfigError)


def test_what_a_dense_model_s_config_need_not_say(copy: Callable[[str], Path]) -> None:
    """The head is tied, rope_theta is 10000, null is no factor; the model's earlier name is as good."""
    folder = copy("minicpm3")
    with Checkpoint(folder) as c:
        want = c.config
    edit_config(folder, lambda config: config.pop("tie_word_embeddings"), rope_theta=10000, v_head_dim=28)
    with Checkpoint(folder) as c:
        assert c.config == want and want["tie_word_embeddings"]
    edit_config(folder, scale_depth=None, dim_model_base=None)
    with Checkpoint(folder) as c:
        assert (c.config["residual_scale"], c.config["logit_scale"], c.config["embed_scale"]) == (1, 1, 1.6)
    folder = copy("youtu")
    with Checkpoint(folder) as c:
        want = c.config
    with Checkpoint(edit_config(folder, model_type="youtu_llm")) as c:
        assert c.config == want
    folder = copy("axk1")
    with Checkpoint(folder) as c:
        want = c.config
    with Checkpoint(edit_config(folder, model_type="AXK1", topk_method="none")) as c:
        assert c.config == want and c.config["topk_method"] == "noaux_tc"


def test_keys_that_files_need_not_have(base: dict[str, Path]) -> None:
    """They say nothing where they are absent, and are written where they say something."""
    with Checkpoint(base["v3"]) as c:
        plain = c.config
    silent = {"llama_4_scaling_beta": 0, "embed_scale": 1, "residual_scale": 1.0, "logit_scale": 1, "short_factor": []}
    silent["post_moe_norm"] = 0
    assert not set(silent) & set(plain)
    _core.validate_config(plain | silent)
    for key in silent:
        for bad in (None, "x", -1.0, [1.0], [None]):
            with pytest.raises(ConfigError, match=f"config: {key} "):
                _core.validate_config(plain | {key: bad})


def test_norm_topk_prob_with_softmax_is_refused(copy: Callable[[str], Path]) -> None:
    refused(
        edit_config(copy("v2_lite"), norm_topk_prob=True),
        "norm_topk_prob is True, expected false with softmax",
        ConfigError,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, "num_bits is 3, expected 4 or 8 of type int or float"),
        ({"num_bits": [4]}, r"num_bits is \[4\], expected 4 or 8"),
        ({"num_bits": True}, "num_bits is True, expected 4 or 8"),
        ({"symmetric": False}, "symmetric is False, expected True"),
        ({"symmetric": None}, "symmetric is None, expected True"),
        ({"strategy": "token"}, "strategy is 'token', expected 'group' or 'channel'"),
        ({"strategy": ["group"]}, r"strategy is \['group'\], expected 'group' or 'channel'"),
        ({"strategy": "tensor", "type": "int", "num_bits": 8}, "strategy is 'tensor', expected 'group' or 'channel'"),
        ({"type": "complex"}, "num_bits is 4, expected 4 or 8 of type int or float"),
        ({"type": "float", "num_bits": 8, "strategy": "block"}, "block_structure is missing, expected two block sizes"),
        (
            {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [0, 1]},
            r"block_structure is \[0, 1\]",
        ),
        ({"actorder": "group"}, "actorder is 'group'"),
        ({"actorder": True}, "actorder is True, expected False or 'static' or 'weight'"),
        ({"group_size": 16}, "group_size is 16, expected a multiple of 32"),
        ({"group_size": 48}, "group_size is 48, expected a multiple of 32"),
        ({"num_bits": None}, "num_bits is None, expected 4 or 8"),
    ],
)
def test_compressed_tensors_refusals(change: dict[str, Any], message: str, copy: Callable[[str], Path]) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change

    refused(edit_config(copy("kimi_k2"), edit), message, ConfigError)


def test_compressed_tensors_formats_and_groups(copy: Callable[[str], Path]) -> None:
    folder = copy("kimi_k2")
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(format="marlin-24")),
        "format is 'marlin-24', expected pack-quantized or",
        ConfigError,
    )
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(format="pack-quantized", config_groups={})),
        "config_groups is {}",
        ConfigError,
    )
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"})),
        "sparsity_config is {'format': .*sparse or rotated weights are not read",
        ConfigError,
    )
    rotated = {"config_groups": {"R1": {"type": "hadamard"}}}
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(sparsity_config={}, transform_config=rotated)),
        "transform_config is {'config_groups': .*rotated weights are not read",
        ConfigError,
    )
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    two = {"a": {"weights": weights}, "b": {"weights": weights | {"group_size": 128}}}
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(config_groups=two, transform_config={})),
        "config_groups: b is .*, expected the int8_group of the group before it, 64",
        ConfigError,
    )
    refused(
        edit_config(folder, lambda c: c["quantization_config"].update(config_groups={"a\nb": False})),
        r"config_groups: 'a\\nb' is False, expected an object or null$",
        ConfigError,
    )


JSON_TEXTS = [
    (b'{"model_type": "deepseek_v3", "model_type": "kimi_k2"}', "key 'model_type' appears twice"),
    (b'{"model_type": "deepseek_v3", "hidden_size": NaN}', "hidden_size is nan, expected an integer"),
    (b'{"model_type": Infinity}', "model_type is inf"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 50_000, "nested too deeply"),
    (b'{"x": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"", "not valid JSON"),
    (b"[]", "expected a JSON object"),
    (b'{"model_type": "\\ud800"}', "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), JSON_TEXTS)
def test_hostile_json(text: bytes, message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("moonlight")
    (folder / "config.json").write_bytes(text)
    refused(folder, message)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_git_lfs_pointer_is_called_one(file: str, copy: Callable[[str], Path]) -> None:
    folder = copy("moonlight")
    (folder / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n")
    refused(folder, f"{file}: a git-LFS pointer, not the file itself; fetch it with: git lfs pull")


def test_missing_and_odd_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path / "no\0where", "cannot open: embedded null byte")
    for name, message in [
        ("x.gguf", "x.gguf: is a GGUF file, which is not read; pack the Hugging Face checkpoint"),
        ("x y.dcalm", r"is packed already; run it: deepcalm generate -m '.*/x y.dcalm'$"),
        ("x.safetensors", "is one file of a checkpoint; give its folder: "),
        ("x.txt", "is a file, expected the folder of a Hugging Face checkpoint"),
    ]:
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, message)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json in it, expected a Hugging Face checkpoint")
    (tmp_path / "empty" / "x.gguf").write_bytes(b"")
    refused(tmp_path / "empty", r"no config.json in it, only \['x.gguf'\], expected")
    folder = copy("moonlight")
    model = folder / "model.safetensors"
    model.rename(folder / "pytorch_model.bin")
    refused(folder, r"neither model.safetensors nor .*\['pytorch_model.bin'\] \(pickle files are not read")
    os.mkfifo(model)
    refused(folder, "model.safetensors: not a regular file")
    model.unlink()
    model.mkdir()
    refused(folder, "model.safetensors: not a regular file")
    (folder / "config.json").write_bytes(b" " * ((16 << 20) + 1))
    refused(folder, "config.json: 16777217 bytes, expected at most 16777216")


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "model.bin",
        "",
        ".safetensors",
        "x\n.safetensors",
        3,
        None,
    ],
)
def test_index_names_only_files_of_the_folder(name: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    refused(folder, "'lm_head.weight' is in .*, expected the name of a .safetensors file in the same folder")


def test_index_must_agree_with_the_shards(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    path.write_text('{"weight_map": []}')
    refused(folder, "weight_map is missing or empty")
    path.write_text(json.dumps(index))
    shutil.copy(folder / names[0], folder / names[1])
    refused(folder, "is also in " + names[0])


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_what_an_index_lists_must_be_there_if_it_is_needed(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    a, b = sorted(set(index.values()))
    ghosts = {"model.ghost": "gone.safetensors", "lm_head.weight_scale_inv": a}
    write_index(folder, index | ghosts | {"lm_head.weight": b})
    assert plan(folder).notes == [
        f"model.safetensors.index.json lists tensors that no file holds and nothing needs: {', '.join(ghosts)}",
        "model.safetensors.index.json lists tensors in other files than they are in: lm_head.weight",
    ]
    norm, eh_proj = "model.layers.1.input_layernorm.weight", "model.layers.3.eh_proj.weight"
    for shard in (a, b):
        tiny.rewrite(folder, lambda t: [t.pop(name, None) for name in (norm, eh_proj)], shard)
    for file, message in [(index[norm], index[norm]), ("gone.safetensors", "gone.safetensors, which does not exist")]:
        write_index(folder, index | {norm: file})
        with pytest.raises(
            CheckpointError, match=f"tensor {norm} is missing, the index lists it in {message}, expected shape"
        ):
            plan(folder)
    with Checkpoint(folder) as ckpt:
        assert ckpt.mtp_dropped == f"{eh_proj} is missing, the index lists it in {index[eh_proj]}"


PLACES = {  # what lies beside model.safetensors -> what is read, what is not
    "pickles": ("model.safetensors", ["pytorch_model-00001-of-00001.bin"]),
    "consolidated": ("model.safetensors", ["consolidated.safetensors", "x\udcff.pth"]),
    "index": ("model.safetensors", ["model.safetensors.index.json"]),
    "index and shards": ("model.safetensors", ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
    "transformers_weights": ("other.safetensors", ["model.safetensors"]),
}


def in_two_places(folder: Path, beside: str) -> Path:
    """The checkpoint v2_lite with a final norm of ones in model.safetensors, and other files beside it."""
    tiny.write(folder, "v2_lite")
    _, unread = PLACES[beside]
    for name in unread:
        if not name.startswith("model."):
            shutil.copy(folder / "model.safetensors", folder / name)
    if "index" in beside:
        with Checkpoint(folder) as ckpt:
            write_index(folder, dict.fromkeys(ckpt.tensors, "model-00001-of-00001.safetensors"))
    if beside == "transformers_weights":
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        edit_config(folder, transformers_weights="other.safetensors")
    return tiny.rewrite(folder, lambda t: t.update({"model.norm.weight": ("BF16", (78,), b"\x80\x3f" * 78)}))


@pytest.mark.parametrize("beside", PLACES)
def test_the_weights_are_in_the_files_that_transformers_reads(beside: str, tmp_path: Path) -> None:
    read, unread = PLACES[beside]
    with Checkpoint(in_two_places(tmp_path, beside)) as ckpt:
        norm = as_f32(ckpt, ckpt.weight("model.norm.weight", (78,)))
        assert (norm == 1).all() == (read == "model.safetensors")
        names = ", ".join(n if n.isprintable() else repr(n) for n in unread)
        assert ckpt.notes == [f"not read: {names}; the weights are those of {read}"]
        assert list(ckpt.identity()["files"]) == [read]


@pytest.mark.reference
@pytest.mark.parametrize("beside", PLACES)
def test_transformers_reads_the_same_files(beside: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(in_two_places(tmp_path, beside))
    assert (model.model.norm.weight == 1).all() == (PLACES[beside][0] == "model.safetensors")


@pytest.mark.reference
def test_both_layouts_of_kimi_k25_are_those_of_transformers(tmp_path: Path) -> None:
    """A wrapper that transformers reads and writes, in the authors' names and in its own, has its text model's logits."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    golden = golden_cases.load("kimi_k2")
    text, tensors = ref_checkpoint.load(models.golden_checkpoint("kimi_k2"))
    del text["quantization_config"]
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    outer = {"model_type": "kimi_k25", "text_config": text, "vision_config": vision, "projection_hidden_size": 16}
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(outer | {"tie_word_embeddings": False}))
    contiguous = {"language_model." + name: np.ascontiguousarray(t) for name, t in tensors.items()}
    save_file(contiguous, ours / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(ours, dtype=torch.float32)
        logits = model(input_ids=torch.tensor(golden.ids.astype(np.int64))[None]).logits[0].numpy()
        assert np.abs(logits - golden.logits).max() < 1e-4
        for original in (True, False):
            model.save_pretrained(tmp_path / f"{original}", save_original_format=original)
    for folder in (ours, tmp_path / "True", tmp_path / "False"):
        run = models.Run(models.open_model(models.pack(folder), models.ISAS[0]), golden.ids)
        assert np.abs(run.logits - golden.logits).max() <= 1e-4
        with Checkpoint(folder) as c:
            assert (c.lm_head == "lm_head.weight") == (folder.name == "False")


def test_transformers_weights_names_a_file_of_the_folder(copy: Callable[[str], Path]) -> None:
    folder = copy("moonlight")
    for name, message in [
        ("../x.safetensors", "transformers_weights is '../x.safetensors', expected the name of a .safetensors file"),
        (["x"], r"transformers_weights is \['x'\], expected the name"),
        ("x.safetensors", "neither x.safetensors nor"),
        ("../x.safetensors.index.json", "x.safetensors.index.json: no such file, config.json names it"),
    ]:
        refused(edit_config(folder, transformers_weights=name), message)


def build(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: list[tuple[bytes, str]] = [
    (b"", "0 bytes, expected a safetensors file"),
    (b"1234567", "7 bytes, expected a safetensors file"),
    ((1 << 63).to_bytes(8, "little"), "header of 9223372036854775808 bytes in a file of 8"),
    ((100_000_001).to_bytes(8, "little") + b"{}", "header of 100000001 bytes"),
    ((1).to_bytes(8, "little") + b"{}", "header of 1 bytes"),
    (build(b"[]"), "header starts with b'\\[\\]'"),
    (build(b"{" * 90_000), "not valid JSON|nested too deeply"),
    (build(b'{"a":' * 90_000), "nested too deeply"),
    (build(b'{"a":{},"a":{}}'), "key 'a' appears twice"),
    (build(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "key 'dtype' appears twice"),
    (build(b'{"__metadata__":{"a":1}}'), "__metadata__ must map strings to strings"),
    (build(b'{"__metadata__":[]}'), "__metadata__ must map strings to strings"),
    (build(b'{"a":3}'), "tensor 'a': expected an object with dtype, shape and data_offsets"),
    (build(b'{"a\\u0007":{}}'), "the name is too long or not printable"),
    *(
        (build(json.dumps({"a": e}).encode(), bytes(8)), message)
        for e, message in [
            ({"dtype": "F32", "shape": [2]}, "expected an object with dtype"),
            (entry() | {"x": 1}, "expected an object with dtype"),
            (entry("F4"), "dtype 'F4' is not one of"),
            (entry(3), "dtype 3 is not one of"),
            (entry(shape=2), "shape 2, expected at most 8 sizes"),
            (entry(shape=[2.0]), r"shape \[2.0\], expected at most 8 sizes"),
            (entry(shape=[True, 2]), r"shape \[True, 2\]"),
            (entry(shape=[-2]), r"shape \[-2\]"),
            (entry(shape=[1] * 9), "expected at most 8 sizes"),
            (entry(shape=[1 << 63]), "expected at most 8 sizes"),
            (entry(shape=[1 << 62, 1 << 62]), "8 bytes at data_offsets"),
            (entry(offsets=[0]), r"data_offsets \[0\], expected two byte positions"),
            (entry(offsets=[0, 8, 8]), "expected two byte positions"),
            (entry(offsets=["0", 8]), "expected two byte positions"),
            (entry(offsets=[8, 0]), "-8 bytes at data_offsets"),
            (entry(offsets=[-8, 0]), "expected two byte positions"),
            (entry(shape=[3], offsets=[0, 12]), "ends at byte .* of a file of .* bytes: truncated"),
            (entry(offsets=[1 << 62, (1 << 62) + 8]), "ends at byte .*: truncated"),
            (entry(shape=[1], offsets=[4, 8]), "starts at byte .*: it leaves a hole before it"),
            (entry(shape=[1], offsets=[0, 4]), "bytes after the last tensor"),
        ]
    ),
    (build(json.dumps({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}).encode(), bytes(8)), "'b' starts at byte .*: it overlaps"),
]  # fmt: skip


@pytest.mark.parametrize(("blob", "message"), HEADERS)
def test_hostile_safetensors_headers(blob: bytes, message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("moonlight")
    (folder / "model.safetensors").write_bytes(blob)
    refused(folder, "model.safetensors: .*" + message)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_headers_open_or_refuse(
    data: st.DataObject, base: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    blob = bytearray((base["moonlight"] / "model.safetensors").read_bytes())
    n = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, n - 1))
        blob[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    blob = blob[: data.draw(st.sampled_from([len(blob), len(blob) - 1, n, n // 2]))]
    path = tmp_path_factory.mktemp("m") / "x.safetensors"
    path.write_bytes(blob)
    with File(path, CheckpointError) as f:
        try:
            header = read_header(f)
        except CheckpointError as e:
            assert "\n" not in str(e)
            return
        assert sum(t.nbytes for t in header.tensors.values()) == len(blob) - header.data_offset


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_configs_open_or_refuse(
    data: st.DataObject, base: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    preset = data.draw(st.sampled_from(["moonlight", "glm4_moe_lite", "gigachat3", "kimi_k2"]))
    config = json.loads((base[preset] / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        target = config
        for nested in ("rope_parameters", "quantization_config"):
            if nested in config and isinstance(config[nested], dict) and data.draw(st.booleans()):
                target = config[nested]
        target[data.draw(st.sampled_from([*sorted(target), "rope_scaling", "mlp_layer_types"]))] = data.draw(
            JSON_VALUES
        )
    folder = tmp_path_factory.mktemp("c")
    (folder / "model.safetensors").symlink_to(base[preset] / "model.safetensors")  # as in the hub's cache
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with Checkpoint(folder) as c:
            _core.validate_config(c.config)
            for spec in _core.expected_tensors(c.config):
                assert spec["n_slices"] * spec["rows"] * max(spec["cols"], 1) < 1 << 62
    except CheckpointError as e:
        assert "\n" not in str(e)


# --- weights --------------------------------------------------------------------------------------------------------


def as_f32(ckpt: Checkpoint, w: Weight, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Rows begin..end-1 [n, cols] as the packer reads and converts them."""
    end = w.rows if end is None else end
    out = np.empty((end - begin, w.cols), np.float32)
    source = w.source(ckpt.read_rows(w, begin, end), begin, ckpt.read_scale(w, begin, end))
    assert _core.convert_rows(out, "f32", source)[0] is None
    return out


@pytest.mark.parametrize("preset", ["v3", "gigachat3", "kimi_k2"])
def test_weights_are_those_of_the_independent_reader(preset: str, base: dict[str, Path]) -> None:
    want = ref_checkpoint.load(base[preset])[1]
    with Checkpoint(base[preset]) as c:
        for name, value in want.items():
            got = as_f32(c, c.weight(name, value.shape))
            np.testing.assert_array_equal(got.reshape(value.shape), value, err_msg=name)
            if value.ndim == 2 and value.shape[0] > 3:
                part = as_f32(c, c.weight(name, value.shape), 1, 3)
                np.testing.assert_array_equal(part, value[1:3])


def zeros(dtype: str, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    size = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F64": 8, "I8": 1, "I32": 4, "I64": 8, "U8": 1}[dtype]
    return dtype, shape, bytes(size * math.prod(shape))


KV_B = "model.layers.0.self_attn.kv_b_proj."
UP = "model.layers.1.mlp.experts.2.up_proj."
FUSED, SWITCH = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.switch_mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("preset", "add", "message"),
    [
        ("moonlight", {KV_B + "weight": None}, rf"tensor {KV_B}weight is missing, expected shape \[80, 34\]"),
        ("moonlight", {"lm_head.weight": None}, r"tensor lm_head.weight is missing, expected shape \[299, 70\]"),
        ("moonlight", {UP + "weight": None}, rf"tensor {UP}weight is missing"),
        ("moonlight", {"model.layers.1.mlp.gate.e_score_correction_bias": None}, "e_score_correction_bias is missing"),
        ("moonlight", {KV_B + "weight": zeros("BF16", 34, 80)}, rf"{KV_B}weight: BF16 \[34, 80\], expected .* \[80, 34\]"),
        ("moonlight", {KV_B + "weight": zeros("BF16", 80, 34, 1)}, r"BF16 \[80, 34, 1\], expected"),
        ("moonlight", {KV_B + "weight": zeros("I8", 80, 34)}, rf"{KV_B}weight: I8 \[80, 34\], expected F32 or BF16 or F16 or F8_E4M3"),
        ("moonlight", {KV_B + "weight": zeros("F64", 80, 34)}, "F64"),
        ("moonlight", {KV_B + "weight": zeros("F8_E4M3", 80, 34)}, rf"{KV_B}weight: F8_E4M3 needs {KV_B}weight_scale_inv or weight_scale, found none"),
        ("moonlight", {KV_B + "weight": zeros("F8_E4M3", 80, 34), KV_B + "weight_scale": zeros("F32", 7)}, r"F8_E4M3 with \[7\] scales, but"),
        ("moonlight", {KV_B + "weight": zeros("F8_E4M3", 80, 34), KV_B + "weight_scale": zeros("I32", 1)}, r"weight_scale: I32 \[1\], expected F32"),
        ("moonlight", {KV_B + "weight": zeros("F8_E4M3", 80, 34), KV_B + "weight_scale_inv": zeros("F32", 2, 1)}, "no weight_block_size"),
        ("moonlight", {KV_B + "weight_scale_inv": zeros("F32", 1, 1)}, "BF16 with a scale beside it, expected none"),
        ("moonlight", {UP + "weight": None, UP + "qweight": zeros("I32", 9, 33)}, rf"{UP}qweight: GPTQ or AWQ is not supported"),
        ("moonlight", {UP + "SCB": zeros("F32", 33)}, "SCB: bitsandbytes int8 is not supported"),
        ("moonlight", {UP + "weight_scale_2": zeros("F32", 1)}, "weight_scale_2: NVFP4 of such a tensor is not supported"),
        ("moonlight", {UP + "pre_quant_scale": zeros("F32", 70)}, "pre_quant_scale: AWQ is not supported"),
        ("moonlight", {UP + "weight": None, UP + "weight_blocks": zeros("U8", 3)}, "weight_blocks: MXFP4 is not supported"),
        ("moonlight", {UP + "weight": None, UP + "weight_packed": zeros("I32", 33, 9)}, "config.json announces no int4 here"),
        ("moonlight", {UP + "weight_packed": zeros("I32", 33, 9)}, r"expected a plain tensor \[33, 70\] and no other"),
        ("kimi_k2", {UP + "weight_zero_point": zeros("I32", 4, 3)}, "weight_zero_point: zero points is not supported"),
        ("kimi_k2", {UP + "weight_g_idx": zeros("I32", 96)}, "weight_g_idx: activation ordering is not supported: column 32 is in group 0, expected 1"),
        ("kimi_k2", {UP + "weight_g_idx": zeros("I32", 95)}, r"weight_g_idx: I32 \[95\], expected I32 or I64 \[96\]"),
        ("kimi_k2", {UP + "weight": zeros("BF16", 32, 96), UP + "weight_packed": None, UP + "weight_g_idx": zeros("I32", 96)}, "g_idx: activation ordering"),
        ("kimi_k2", {UP + "weight_scale": None}, f"{UP}weight_scale is missing"),
        ("kimi_k2", {UP + "weight_scale": zeros("F32", 32, 3)}, r"weight_scale: F32 \[32, 3\], expected BF16 or F16 \[32, 3\] for"),
        ("kimi_k2", {UP + "weight_scale": zeros("BF16", 32, 1)}, r"weight_scale: BF16 \[32, 1\], expected .* in groups of 32"),
        ("kimi_k2", {UP + "weight_packed": zeros("I32", 32, 11)}, r"weight_packed: I32 \[32, 11\], expected I32 \[32, 12\]"),
        ("kimi_k2", {UP + "weight_shape": zeros("I64", 2)}, r"weight_shape: says \[0, 0\], expected \[32, 96\]"),
        ("kimi_k2", {UP + "weight": zeros("BF16", 32, 96)}, "expected a plain tensor"),
        ("gigachat3", {KV_B + "weight_scale_inv": zeros("F32", 5, 1)}, r"weight_scale_inv: F32 \[5, 1\], expected .* \[5, 2\] for"),
        ("gigachat3", {KV_B + "weight_scale_inv": zeros("I32", 5, 2)}, r"I32 \[5, 2\], expected F32 or BF16 or F16 or F8_E8M0"),
        ("moonlight", {UP + "weight": None, UP + "scales": zeros("F16", 33, 9)}, rf"{UP}scales: mlx quantisation is not supported"),
        ("moonlight", {UP + "weight": None, SWITCH: zeros("BF16", 9, 33, 70)}, "up_proj.weight is missing, .* as mlx does are not read"),
        ("moonlight", {UP + "weight": None, FUSED: zeros("BF16", 8, 66, 70)}, r"BF16 \[8, 66, 70\], expected \[9 experts, rows of gate and up"),
        ("moonlight", {UP + "weight": None, FUSED: zeros("BF16", 9, 66)}, r"gate_up_proj: BF16 \[9, 66\], expected \[9 experts"),
        ("moonlight", {UP + "weight": None, FUSED: zeros("BF16", 9, 70, 66)}, r"gate_up_proj: BF16 \[35, 66\], expected .* \[33, 70\]"),
        ("moonlight", {UP + "weight": None, FUSED: zeros("F8_E4M3", 9, 66, 70)}, "gate_up_proj: F8_E4M3 needs .*gate_up_proj_scale_inv or weight_scale, found none"),
        ("moonlight", {UP + "weight": zeros("I8", 33, 70), UP + "weight_scale": zeros("F32", 33, 1)}, "config.json announces no int8 here"),
        ("kimi_k2", {UP + "weight_packed": None, UP + "weight": zeros("I8", 32, 96)}, "announces no int8 here"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 48)}, r"weight_scale: BF16 \[32, 3\], expected F8_E4M3 or U8 or F8_E8M0"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 47)}, r"weight_packed: U8 \[32, 47\], expected U8 \[32, 48\]"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 48), UP + "weight_scale": zeros("U8", 32, 6)}, r"expected .* \[32, 3\] for .* groups of 32"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 48), UP + "weight_scale": zeros("F8_E4M3", 32, 6)}, "found none, expected one weight_global_scale or"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 48), UP + "weight_scale": zeros("U8", 32, 3), UP + "weight_global_scale": zeros("F32", 1)}, "expected no scale of the whole tensor"),
        ("kimi_k2", {UP + "weight_packed": zeros("U8", 32, 48), UP + "weight_scale": zeros("F8_E4M3", 32, 6), UP + "weight_global_scale": zeros("F32", 2)}, r"weight_global_scale: F32 \[2\], expected F32 \[\]"),
    ],
)  # fmt: skip
def test_weight_refusals_name_the_tensor(
    preset: str, add: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    from deepcalm.files.pack import plan

    def change(tensors: dict[str, Any]) -> None:
        for name, value in add.items():
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value

    folder = tiny.rewrite(copy(preset), change)
    with pytest.raises(CheckpointError, match=message) as e:
        plan(folder)
    assert "\n" not in str(e.value)


def test_a_shard_that_shrinks_while_it_is_read(copy: Callable[[str], Path]) -> None:
    folder = copy("moonlight")
    with Checkpoint(folder) as c:
        os.truncate(folder / "model.safetensors", 100_000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte 100000, expected"):
            for name, info in c.tensors.items():
                as_f32(c, c.weight(name, info.shape))


# --- the typed configuration ----------------------------------------------------------------------------------------


def test_validate_config_is_strict_about_types_and_keys(base: dict[str, Path]) -> None:
    with Checkpoint(base["v3"]) as c:
        good = c.config
    _core.validate_config(good)
    for key, value in good.items():
        if key in ("bos_token_id", "eos_token_ids", "tie_word_embeddings"):
            continue
        wrong: list[Any] = [None, [value], {}, b"x", 10**400, float("nan"), "x\0y", "\ud800"]
        wrong += [not value] if type(value) is int else [3.5] if isinstance(value, str | bool) else []
        for bad in wrong:
            with pytest.raises(ConfigError, match=f"config: {key} "):
                _core.validate_config(good | {key: bad})
        if key != "rope_layout":
            with pytest.raises(ConfigError, match=f"config: {key} is missing"):
                _core.validate_config({k: v for k, v in good.items() if k != key})
    with pytest.raises(ConfigError, match="'surprise' is not a known key"):
        _core.validate_config(good | {"surprise": 1})
    with pytest.raises(ConfigError, match="config: 3 is not a known key"):
        _core.validate_config(good | {3: 1})
