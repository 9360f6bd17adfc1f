"""Synthetic models: the geometry is the real one, the bytes are reproducible, transformers reads the checkpoints of
tools/make_synthetic.py, and the packed files of deepcalm.measure.synthetic run as they should."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import deepcalm
import make_synthetic
from deepcalm.errors import ResourceError, UnsupportedError
from deepcalm.files import packed
from deepcalm.measure import synthetic

TINY = [
    "hidden_size=64", "num_attention_heads=2", "num_key_value_heads=2", "kv_lora_rank=32", "qk_nope_head_dim=16",
    "qk_rope_head_dim=8", "v_head_dim=16", "intermediate_size=96", "moe_intermediate_size=32", "n_routed_experts=16",
    "vocab_size=512", "num_hidden_layers=3", "bos_token_id=1", "eos_token_id=2", "max_position_embeddings=256",
    "pad_token_id=2",
]  # fmt: skip


def write_tiny(out: Path, name: str, dtype: str = "bf16", extra: tuple[str, ...] = ()) -> dict[str, object]:
    known = synthetic.PRESETS[name][0]
    settings = [s for s in TINY if s.split("=")[0] in known] + list(extra)
    config, n_tokens = make_synthetic.make_config(name, settings, dtype, mtp=True)
    make_synthetic.write_checkpoint(out, config, n_tokens, dtype, seed=3, quiet=True)
    return config


@pytest.mark.parametrize(
    ("name", "main", "mtp"),  # billions of parameters as published
    [
        ("v2-lite", 15.71, 0),
        ("v3", 671.03, 11.6),
        ("moonlight", 15.96, 0),
        ("glm-4.7-flash", 29.94, 0.644),
        ("mistral-small-4", 118.97, 0),
        ("a.x-k1", 518.98, 0),
        ("youtu-2b", 1.96156, 0),
        ("minicpm3-4b", 4.07, 0),
    ],
)
def test_synthetic_parameter_count_is_the_published_one(name: str, main: float, mtp: float) -> None:
    def count(with_mtp: bool) -> float:
        config, _ = make_synthetic.make_config(name, [], "bf16", with_mtp)
        return sum(t.n_elems for t in make_synthetic.tensors(config, "bf16") if not t.seed_name) / 1e9

    assert count(False) == pytest.approx(main, abs=0.006)
    assert count(True) - count(False) == pytest.approx(mtp, abs=0.02)


def test_synthetic_bytes_are_reproducible_and_normal(tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "a", "v3", extra=("q_lora_rank=32",))
    write_tiny(tmp_path / "b", "v3", extra=("q_lora_rank=32",))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safetensors.safe_open(tmp_path / "a" / "model.safetensors", "np") as f:
        bias = f.get_tensor("model.layers.3.mlp.gate.e_score_correction_bias")
        assert bias.dtype == np.float32 and bias.shape == (16,) and 0 < bias.std() < 0.05
        assert {"model.layers.3.eh_proj.weight", "model.layers.3.shared_head.head.weight"} <= set(f.keys())
    raw = dict(safetensors.deserialize((tmp_path / "a" / "model.safetensors").read_bytes()))
    head, copy = raw["lm_head.weight"], raw["model.layers.3.shared_head.head.weight"]
    assert head["data"] == copy["data"]  # the MTP layer's copies are copies
    bits = np.frombuffer(bytes(head["data"]), "<u2").astype(np.uint32) << 16
    weights = bits.view(np.float32)
    assert abs(weights.mean()) < 0.01 and weights.std() * config["hidden_size"] ** 0.5 == pytest.approx(2, rel=0.05)


def test_synthetic_f8_has_one_scale_per_block(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", "f8", ("q_lora_rank=160",))
    raw = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    for name, t in raw.items():
        if t["dtype"] == "F8_E4M3":
            grid = raw[name + "_scale_inv"]
            assert grid["shape"] == [-(-n // 128) for n in t["shape"]]
            codes = np.frombuffer(bytes(t["data"]), np.uint8)
            assert not np.any(codes & 0x7F == 0x7F), f"{name}: NaN code"
            assert np.all(np.frombuffer(bytes(grid["data"]), "<f4") > 0)
    assert raw["model.layers.1.self_attn.q_a_proj.weight"]["dtype"] == "F8_E4M3"
    assert raw["model.layers.3.mlp.gate.weight"]["dtype"] == "BF16"


def test_synthetic_shards_are_listed_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_synthetic, "SHARD_BYTES", 100_000)
    write_tiny(tmp_path, "moonlight")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    for shard in shards:
        with safetensors.safe_open(tmp_path / shard, "np") as f:
            assert set(f.keys()) == {k for k, v in index["weight_map"].items() if v == shard}


# ---- packed directly

PACKED = [
    ("v2-lite", {"dtype": "q8"}, ()),
    ("v3", {"dtype": "q4"}, ("q_lora_rank=32", "first_k_dense_replace=1", "n_group=4", "topk_group=2")),
    ("moonlight", {"dtype": "f8"}, ()),
    ("glm-4.7-flash", {"dtype": "bf16", "head_dtype": "f16"}, ("q_lora_rank=64",)),
    ("v2-lite", {"dtype": "f32", "attn_dtype": "q4"}, ()),
]
ALIGNED = [s for s in TINY if not s.startswith(("hidden_size", "qk_nope", "qk_rope", "v_head"))] + [
    "hidden_size=128", "qk_nope_head_dim=32", "qk_rope_head_dim=16", "v_head_dim=32",
]  # fmt: skip


def pack_tiny(path: Path, name: str, dtypes: dict[str, str], extra: tuple[str, ...] = (), seed: int = 3) -> None:
    settings = [s for s in ALIGNED if s.split("=")[0] in synthetic.PRESETS[name][0]]
    size = synthetic.write_model(path, name, overrides=[*settings, *extra], seed=seed, **dtypes)
    assert size == path.stat().st_size


@pytest.mark.parametrize(("name", "dtypes", "extra"), PACKED, ids=[f"{p[0]}-{p[1]['dtype']}" for p in PACKED])
def test_synthetic_packed_file_runs(tmp_path: Path, name: str, dtypes: dict[str, str], extra: tuple[str, ...]) -> None:
    path = tmp_path / "m.dcalm"
    pack_tiny(path, name, dtypes, extra)
    with packed.PackedFile(path) as f:
        assert not f.check()  # checksums, padding
        formats = {e.role: e.format for e in f.entries.values()}
        wide = "q8" if dtypes["dtype"] == "q4" else dtypes["dtype"]
        assert formats["expert"] == dtypes["dtype"] and formats["router"] == formats["norm"] == "f32"
        assert formats["head"] == dtypes.get("head_dtype", wide)
        assert formats["attn"] == dtypes.get("attn_dtype", wide)
        w = f.unpack("layers.1.experts.w_down")
        assert w.std() * 32**0.5 * 6**0.5 == pytest.approx(1, rel=0.04) and abs(w.mean()) < 0.02 * w.std()
        assert not np.array_equal(w[0], w[1])
        assert f.unpack("head").std() * 128**0.5 == pytest.approx(2, rel=0.04)
    model = deepcalm.Model(path, threads=1)
    session = model.session()
    ids = np.random.default_rng(0).integers(0, model.n_valid, 200)
    with session.trace("topk_idx", "layer_out") as taps:
        logits = session.prefill(ids)
    assert np.isfinite(logits).all() and 1 < logits.std() < 4
    assert 0.8 < taps["layers.2.layer_out"].std() < 2
    for layer in (1, 2):
        counts = np.bincount(taps[f"layers.{layer}.topk_idx"].ravel(), minlength=16)
        assert counts.min() > 0 and counts.max() < 0.2 * counts.sum()
    assert model.decode(model.encode("Same", bos=False)) == "Same"
    if synthetic.PRESETS[name][0].get("num_nextn_predict_layers"):
        assert len(list(model.session(mtp=True).generate([1, 2, 3], max_tokens=4, draft=2, eos_ids=()))) == 4


def test_synthetic_packed_bytes_follow_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        pack_tiny(tmp_path / name, "v2-lite", {"dtype": "q4"}, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_synthetic_packed_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.dcalm"
    for spec, kind, text in (("v9", ValueError, "unknown model"), ("v3:0", ValueError, "expected a number 1..61")):
        with pytest.raises(kind, match=text):
            synthetic.write_model(path, spec)
    for override, text in (("colour=1", "no key 'colour'"), ("hidden_size=x", "not JSON")):
        with pytest.raises(ValueError, match=text):
            synthetic.write_model(path, "v3", overrides=[override])
    with pytest.raises(UnsupportedError, match=r"w_gate_up: .* expected multiples of 16 x 32"):
        synthetic.write_model(path, "v2-lite:2", overrides=["intermediate_size=1000"])
    with pytest.raises(UnsupportedError, match="dtype 'q5'"):
        synthetic.write_model(path, "v2-lite", "q5")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))
    with pytest.raises(ResourceError, match=rf"{tmp_path}: \d\d.\d+ GB, 0.00 GB are free"):
        synthetic.write_model(path, "v2-lite")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ResourceError, match="cannot be written: No space"):
        pack_tiny(path, "v2-lite", {"dtype": "q8"})
    assert not list(tmp_path.iterdir())


# ---- as a checkpoint, in transformers


@pytest.mark.reference
@pytest.mark.parametrize("name", ["v2-lite", "v3", "moonlight", "glm-4.7-flash"])
def test_synthetic_checkpoint_loads_in_transformers(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_tiny(tmp_path, name, extra=("q_lora_rank=48",) if name in ("v3", "glm-4.7-flash") else ())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(".layers.3." in key for key in info["unexpected_keys"])  # the MTP layer, which transformers leaves out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The same geometry, other numbers.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all() and 0.5 < logits.std() < 8
