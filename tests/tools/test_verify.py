"""``deepcalm verify``: right models pass; planted mistakes, in files and in formulas, are found and named."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import commands
import deepcalm
import models
import tiny
from deepcalm.check import reference
from deepcalm.check.verify import Report, _Verifier, verify
from deepcalm.cli.check import verify_text
from deepcalm.files import packed
from ref import packed as ref_packed

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
PLANTED_DTYPES = ("f32", "q8", "q4")


def pack(folder: Path, **options: str) -> Path:
    return models.pack(folder, **options).path


# ---- right models pass ----------------------------------------------------------------------------------------------

RIGHT = [
    ("v3", "bf16", {"dtype": "q4"}),
    ("v3", "f32", {"dtype": "f32"}),
    ("v2_lite", "bf16", {"dtype": "q8", "attn_dtype": "q4"}),
    ("v2_grouped", "fp8", {"dtype": "source"}),
    ("gigachat3", "fp8", {"dtype": "source"}),
    ("kimi_k2", "int4", {"dtype": "source"}),
    ("kimi_k2", "int4", {"dtype": "q4", "attn_dtype": "bf16"}),
    ("glm4_moe_lite", "bf16", {"dtype": "f8"}),
    ("moonlight", "f16", {"dtype": "bf16"}),
    ("kanana2", "bf16", {"dtype": "q8"}),
    ("sarvam", "bf16", {"dtype": "q4"}),
]


@pytest.mark.parametrize(
    ("preset", "source", "options"), RIGHT, ids=["-".join([p, s, *o.values()]) for p, s, o in RIGHT]
)
def test_right_models_pass(preset: str, source: str, options: dict[str, str]) -> None:
    folder = models.checkpoint(preset, source)
    r = verify(pack(folder, **options), folder)
    assert r.ok and r.first_divergence is None, str(r.first_divergence)
    legs = {c.leg for c in r.checks}
    assert legs == {"config", "checksum", "texts", "weights", "arithmetic", "exactness"}
    assert not r.notes
    arithmetic = {c.what: c for c in r.checks if c.leg == "arithmetic"}
    mtp = tiny.PRESETS[preset].config["num_nextn_predict_layers"]
    assert ("mtp" in arithmetic) == bool(mtp) == ("mtp_argmax_agreement" in r.effect)
    # taps agree a hundred times better than allowed: the tolerance is for large models, not to hide anything in these
    assert max(c.error for c in arithmetic.values()) < 3e-6
    n_tensors = sum(c.items for c in r.checks if c.leg == "weights")
    assert n_tensors == sum(
        e.kind in ("tiled", "plain") for e in ref_packed.PackedFile(pack(folder, **options)).entries.values()
    )
    limit = {"f32": 1e-4, "source": 0.02, "bf16": 0.05}.get(options["dtype"], 1.0)
    assert 0 <= r.effect["kl"] < limit and 0 < r.effect["router_agreement"] <= 1


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_threads_of_the_comparison_change_nothing(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slices are compared at a time, and reported in their order; one that fails ends the comparison."""
    folder = models.checkpoint("v3", "bf16")
    against = models.checkpoint("v3", "bf16", seed=4) if wrong else folder
    want = verify(pack(folder, dtype="q4"), against, legs="weights", threads=1)
    assert want.ok != wrong and (len(want.divergences) > 9) == wrong
    together, compare = threading.Barrier(2), _Verifier.slice

    def meet(self: _Verifier, e: Any, i: int, keeps: bool) -> Any:
        if e.name.endswith("experts.w_down") and i < 2:
            together.wait(timeout=30)
        return compare(self, e, i, keeps)

    monkeypatch.setattr(_Verifier, "slice", meet)
    assert verify(pack(folder, dtype="q4"), against, legs="weights", threads=2) == want

    def fail(*_: Any) -> Any:
        raise deepcalm.CheckpointError("gone")

    monkeypatch.setattr(_Verifier, "slice", fail)
    with pytest.raises(deepcalm.CheckpointError, match="gone"):
        verify(pack(folder, dtype="q4"), against, legs="weights", threads=2)


def test_texts_beside_the_weights_are_compared(tmp_path: Path) -> None:
    file = pack(models.checkpoint("moonlight", "f16"), dtype="q8")
    folder = Path(shutil.copytree(models.checkpoint("moonlight", "f16"), tmp_path / "hf"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data[:99] + b" " + data[100:])
    (folder / "tokenizer_config.json").unlink()
    r = verify(file, folder, legs="texts")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert [(d.leg, d.where) for d in r.divergences] == [("texts", name) for name in names]
    assert "expected nothing" in str(r.divergences[1]) and "found nothing, expected 14 bytes" in str(r.divergences[2])
    assert "(they differ from byte 99 on)" in str(r.divergences[0])
    assert [c.ok for c in r.checks] == [True, False]


def test_what_was_not_compared_is_said() -> None:
    plain, odd = models.checkpoint("v3", "f32"), models.checkpoint("moonlight", "f16", tokenizer="tiktoken")
    usual = ("positions after 32", "caches but f16", "other instruction sets and devices")
    dropped = f"{len(packed.PackedFile(pack(plain, dtype='q8')).dropped)} tensors that packing dropped"
    assert dropped[0] != "0" and verify(pack(plain, dtype="q8"), plain).not_compared == (*usual, dropped)
    r = verify(pack(odd, dtype="q8"), odd, legs=("texts", "weights", "effects"))
    texts = "tokenizer.json, which was made from tiktoken.model"
    assert r.ok and r.not_compared == (*usual, "checksums", "arithmetic", "exactness", texts)
    assert f"\nnot compared: {', '.join(r.not_compared)}\n" in verify_text(r)


def test_the_file_that_was_compared_is_the_one_that_runs(tmp_path: Path) -> None:
    folder = models.checkpoint("v3", "bf16")
    path = tmp_path / "x.dcalm"
    deepcalm.pack(folder, path, "q8")
    r = verify(path, folder, progress=lambda *_: path.unlink(missing_ok=True))  # gone once it has been opened
    assert r.ok and {c.leg for c in r.checks} >= {"weights", "arithmetic", "exactness"}


def test_other_ways_to_store_weights_are_right(tmp_path: Path) -> None:
    """All experts of a layer in one tensor, block scales in bf16, a head of its own though config.json ties it."""
    folder = tiny.write(tmp_path / "hf", "v3", dtype="fp8", fp8_block=(19, 128), n_shards=1)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, tiny.Stored]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scales = tiny.bf16_bits(np.frombuffer(tensors[name][2], "<f4"))
            tensors[name] = ("BF16", tensors[name][1], scales.tobytes())
        tiny.fuse_experts(tensors)

    tiny.rewrite(folder, change)
    notes = deepcalm.pack(folder, tmp_path / "x.dcalm", "f32").notes
    assert len(notes) == 1 and "although config.json ties them" in notes[0]
    r = verify(tmp_path / "x.dcalm", folder, kv="f32")
    assert r.ok, str(r.first_divergence)
    assert r.effect["max_abs"] < 1e-4


@pytest.mark.parametrize("dtype", ["q8", "q4", "f8", "f16"])
def test_near_zero_groups_are_right(dtype: str) -> None:
    folder = models.checkpoint("v3", "f32", seed=7, n_shards=1)
    tensors: Tensors = load_file(folder / "model.safetensors")
    sizes = {"0.mlp.up_proj": 1e-6, "experts.3.": 1e-9, "experts.4.": 1e-38, "1.self_attn.o_proj": 1e-7}
    for part, factor in sizes.items():
        for name in (name for name in tensors if part in name):
            tensors[name] = (tensors[name] / np.abs(tensors[name]).max() * np.float32(factor)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    r = verify(pack(folder, dtype=dtype), folder, legs=("weights", "arithmetic"))
    assert r.ok, str(r.first_divergence)


@pytest.mark.parametrize("kv", ["f32", "bf16", "q8"])
def test_every_cache_type_passes_and_only_with_its_own_rounding(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.checkpoint("v3", "bf16")
    file, right = pack(folder, dtype="q8"), reference.cache_round
    r = verify(file, folder, kv=kv, tokens=80, legs=("arithmetic", "exactness"))  # 80: a second chunk of the cache
    assert r.ok and r.kv == kv, str(r.first_divergence)
    monkeypatch.setattr(reference, "cache_round", lambda _, c, k_rope: right("f16", c, k_rope))
    r = verify(file, folder, kv=kv, legs=("arithmetic",))
    assert [d.where for d in r.divergences[:1]] == ["layers.0.attn_latent"], str(r.first_divergence)


def test_a_bf16_cache_rounds_relative_to_its_own_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 512 starts a partial, whose running maximum the probabilities are rounded against."""
    folder = models.checkpoint("gigachat3", "fp8")
    file = pack(folder, dtype="source")
    text = "".join(np.random.default_rng(1).choice(list("abcdefghij klmnop"), 3000))
    r = verify(file, folder, kv="bf16", prompt=text, tokens=600, legs=("arithmetic",))
    assert r.ok, str(r.first_divergence)
    monkeypatch.setattr(reference, "CACHE_PARTIAL", 1024)
    r = verify(file, folder, kv="bf16", prompt=text, tokens=600, legs=("arithmetic",))
    assert not r.ok and str(r.first_divergence).startswith("arithmetic: layers.0.attn_latent")


def test_large_models_are_said_to_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.checkpoint("v3", "bf16")
    module = sys.modules["deepcalm.check.verify"]
    monkeypatch.setattr(module, "EFFECT_LIMIT", 1000)
    r = verify(pack(folder, dtype="q8"), folder, legs=("effects",))
    assert not r.effect and len(r.notes) == 1 and "effect not measured" in r.notes[0]


# ---- what packing costs ---------------------------------------------------------------------------------------------


def outlying(fmt: str) -> tuple[Path, Path]:
    """(packed, checkpoint): one weight in 4096 is so large that e4m3 codes of the others beside it are zeros."""
    folder = models.checkpoint("v3", "f32", n_shards=1, rms_norm_eps=1e-4)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "proj" in n]:
        tensors[name].reshape(-1)[5::4096] = 3e4
    save_file(tensors, folder / "model.safetensors")
    return pack(folder, dtype=fmt), folder


def test_a_model_that_packing_destroyed_is_not_right() -> None:
    """Every weight is within half a step of its format, every stage computes what the file says, and yet."""
    r = verify(*outlying("f8"))
    assert [(d.leg, d.where) for d in r.divergences] == [("effect", "kl")], r.verdict
    assert r.verdict.startswith("NOT RIGHT, 1 difference, first: effect: kl: found") and "pack it wider" in r.verdict
    assert r.effect["kl"] > r.effect["kl_without_text"] and r.effect["distance_of_weights"] > 0.5
    assert verify(*outlying("f32"), legs="effects").ok


@pytest.mark.parametrize("dtype", ["f32", "q8", "q4"])
def test_a_whole_pass_that_the_weights_do_not_explain_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = deepcalm.Session.prefill

    def late(self: Any, ids: Any, all_logits: bool = False) -> Any:
        return np.roll(right(self, ids, all_logits), 1, axis=0)

    folder = models.checkpoint("v3", "f32", n_shards=1)
    monkeypatch.setattr(deepcalm.Session, "prefill", late)
    r = verify(pack(folder, dtype=dtype), folder, legs="effects")
    assert r.first_divergence is not None and (r.first_divergence.leg, r.first_divergence.where) == ("effect", "logits")


@pytest.mark.parametrize("layers", [3, 6])
def test_random_models_in_q4_are_right(layers: int) -> None:
    """What q4 costs a deep model of random weights is large, and explained by its weights."""
    folder = models.checkpoint("v3", "f32", num_hidden_layers=layers, seed=layers)
    r = verify(pack(folder, dtype="q4"), folder, legs="effects")
    assert r.ok and r.effect["distance"] > 0.15, r.effect
    assert re.search(r"\n\nverdict: right; packing costs \S+ nats a token, .*\n$", verify_text(r))


def test_a_model_that_says_nothing_is_right() -> None:
    folder = models.checkpoint("moonlight", "f32", n_shards=1, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    assert verify(pack(folder, dtype="q8"), folder, legs="effects").ok


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_those_asked_for(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = sys.modules["deepcalm.check.verify"], list[int | None]()

    def model(path: Path, threads: int | None = None, isa: str | None = None) -> deepcalm.Model:
        made.append(threads)
        return deepcalm.Model(path, threads=threads, isa=isa)

    monkeypatch.setattr(module, "Model", model)
    folder = models.checkpoint("moonlight", "f16")
    assert verify(pack(folder, dtype="bf16"), folder, legs="exactness", threads=threads).ok
    assert made == ([1, 2] if threads == 1 else [3, 1])


# ---- mistakes in files ----------------------------------------------------------------------------------------------
# A wrong packer or a wrong file is the right packer fed a checkpoint with the mistake: its file is then compared with
# the checkpoint as it should be.

Edit = Callable[[dict[str, Any], Tensors], None]


def wrong(edit: Edit, dtype: str, legs: tuple[str, ...], preset: str = "v3", **overrides: Any) -> Report:
    folder = models.checkpoint(preset, "f32", n_shards=1, **overrides)
    with tempfile.TemporaryDirectory(dir=models.root()) as tmp:
        raw, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        edit(raw, tensors)
        (Path(tmp) / "config.json").write_text(json.dumps(raw))
        (Path(tmp) / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, Path(tmp) / "model.safetensors")
        deepcalm.pack(tmp, Path(tmp) / "x.dcalm", dtype=dtype)
        return verify(Path(tmp) / "x.dcalm", folder, legs=legs)


def swap(a: str, b: str) -> Edit:
    def edit(_raw: dict[str, Any], t: Tensors) -> None:
        t[a], t[b] = t[b], t[a]

    return edit


def on(name: str, change: Callable[[Array], Array]) -> Edit:
    def edit(_raw: dict[str, Any], t: Tensors) -> None:
        t[name] = change(t[name])

    return edit


def key(**values: Any) -> Edit:
    return lambda raw, _t: raw.update(values)


def rope(**values: Any) -> Edit:
    return lambda raw, _t: raw["rope_scaling"].update(values)


def interleave(plain: int, dr: int) -> Callable[[Array], Array]:
    """Undoes at the source what the packer will do: the packed rope rows are then those of the checkpoint."""
    order = [*range(plain), *(plain + (i // 2 if i % 2 == 0 else dr // 2 + i // 2) for i in range(dr))]
    return lambda w: w.reshape(-1, plain + dr, w.shape[1])[:, order].reshape(w.shape)


def heads(w: Array) -> Array:
    w = w.reshape(5, 48, 42).copy()
    w[[1, 2], :22] = w[[2, 1], :22]  # W_UK of two heads exchanged, W_UV not
    return w.reshape(240, 42)


def transposed(w: Array) -> Array:
    w = w.reshape(5, 48, 22).copy()
    w[:, :22] = w[:, :22].transpose(0, 2, 1)
    return w.reshape(240, 22)


def one_off(w: Array) -> Array:
    w = w.copy()
    w[10, 17] += 0.2
    return w


def plain_rope(raw: dict[str, Any], _t: Tensors) -> None:
    raw["rope_scaling"] = None


L1, MTP = "model.layers.1.", "model.layers.3."
PLANTED: dict[str, tuple[Edit, str, str]] = {  # mistake -> (edit, leg and place that must be named)
    "rope rows of q not permuted": (on(L1 + "self_attn.q_b_proj.weight", interleave(22, 16)), "weights",
        "layers.1.wq_b"),
    "rope rows of kv_a not permuted": (
        on(L1 + "self_attn.kv_a_proj_with_mqa.weight", interleave(42, 16)), "weights", "layers.1.wqkv_a"),
    "experts swapped": (
        swap(L1 + "mlp.experts.3.down_proj.weight", L1 + "mlp.experts.4.down_proj.weight"),
        "weights", "layers.1.experts.w_down"),
    "gate and up swapped": (
        swap(L1 + "mlp.experts.7.gate_proj.weight", L1 + "mlp.experts.7.up_proj.weight"),
        "weights", "layers.1.experts.w_gate_up"),
    "dense gate and up swapped": (
        swap("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        "weights", "layers.0.w_gate_up"),
    "router bias zeroed": (on(L1 + "mlp.gate.e_score_correction_bias", np.zeros_like), "weights",
        "layers.1.router_bias"),
    "heads of W_UK swapped": (on(L1 + "self_attn.kv_b_proj.weight", heads), "weights", "layers.1.w_uk"),
    "MTP norms swapped": (swap(MTP + "enorm.weight", MTP + "hnorm.weight"), "weights", "mtp.enorm"),
    "halves of eh_proj swapped": (on(MTP + "eh_proj.weight", lambda w: np.roll(w, 76, axis=1)), "weights",
        "mtp.eh_proj"),
    "final_norm used for the MTP layer": (
        lambda _raw, t: t.update({MTP + "shared_head.norm.weight": t["model.norm.weight"]}),
        "weights", "mtp.final_norm"),
    "one weight off": (on(L1 + "self_attn.o_proj.weight", one_off), "weights", "layers.1.wo"),
    "mscale dropped": (rope(mscale_all_dim=0.0, mscale=0.0, attention_factor=1.0), "config", "mscale"),
    "yarn dropped": (plain_rope, "config", "rope_type"),
    "other beta": (rope(beta_slow=0.2), "config", "beta_slow"),
    "eps": (key(rms_norm_eps=1e-5), "config", "rms_norm_eps"),
    "scaling factor": (key(routed_scaling_factor=1.0), "config", "routed_scaling_factor"),
    "groups": (key(topk_group=4), "config", "topk_group"),
    "weights not normed": (key(norm_topk_prob=False), "config", "norm_topk_prob"),
}  # fmt: skip
SEEN_IN_TAPS = {
    "mscale dropped": "layers.0.attn_latent", "yarn dropped": "layers.0.q", "other beta": "layers.0.q",
    "eps": "layers.0.attn_norm", "scaling factor": "layers.1.topk_weight", "groups": "layers.1.topk_idx",
    "weights not normed": "layers.1.topk_weight",
}  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    # a configuration is compared before any weight, and its mistake shows in the arithmetic of every format
    [
        pytest.param(m, d, marks=[pytest.mark.exhaustive] * (leg == "weights" and i % 3 != j))
        for i, (m, (_, leg, _)) in enumerate(PLANTED.items())
        for j, d in enumerate(PLANTED_DTYPES if leg == "weights" else ("q4",))
    ],
)
def test_planted_mistake_is_named(mistake: str, dtype: str) -> None:
    edit, leg, where = PLANTED[mistake]
    r = wrong(edit, dtype, ("checksums", "weights") if leg == "weights" else ("weights", "arithmetic"))
    first = r.first_divergence
    assert not r.ok and first is not None
    assert (first.leg, first.where) == (leg, where), str(first)
    if leg == "weights":
        others = {d.where for d in r.divergences} - {where}
        assert others <= ({"mtp.hnorm"} if "norms" in mistake else set()), others
        assert first.found != first.expected and len(first.index) == 3
    else:  # the configuration's mistake shows in the arithmetic, too, at the tap where it enters
        taps = [d.where for d in r.divergences if d.leg == "arithmetic"]
        assert taps[0] == SEEN_IN_TAPS[mistake], taps


SARVAM: dict[str, tuple[Edit, str]] = {  # mistake of sarvam's own names -> (edit, tap where it enters)
    "yarn dropped": (rope(type="default"), "layers.0.q"),
    "scaling factor": (key(routed_scaling_factor=1.0), "layers.1.topk_weight"),
    "weights not normed": (key(norm_topk_prob=False), "layers.1.topk_weight"),
}


@pytest.mark.parametrize("mistake", SARVAM)
def test_planted_mistake_in_sarvam_is_named(mistake: str) -> None:
    edit, tap = SARVAM[mistake]
    r = wrong(edit, "q4", ("arithmetic",), "sarvam")
    assert r.divergences[0].leg == "config"
    assert next(d.where for d in r.divergences if d.leg == "arithmetic") == tap
    bias = on("model.layers.1.mlp.gate.e_score_correction_bias", np.zeros_like)
    first = wrong(bias, "q4", ("weights",), "sarvam").first_divergence
    assert first is not None and first.where == "layers.1.router_bias"


@pytest.mark.parametrize("dtype", PLANTED_DTYPES)
def test_square_w_uk_not_transposed_is_named(dtype: str) -> None:
    r = wrong(on(L1 + "self_attn.kv_b_proj.weight", transposed), dtype, ("weights",), kv_lora_rank=22)
    assert r.first_divergence is not None and r.first_divergence.where == "layers.1.w_uk"
    assert wrong(lambda _raw, _t: None, dtype, ("weights",), kv_lora_rank=22).ok


def rewritten(path: Path, name: str, change: Callable[[Array], None], out: Path) -> Path:
    """A copy of a packed file with a tensor's bytes changed and the checksum following: only verify can see it."""
    file = ref_packed.PackedFile(path)
    old = hashlib.sha256(file.raw(name).tobytes()).hexdigest()
    change(file.raw(name))
    blob = file.blob.tobytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    new = hashlib.sha256(file.raw(name).tobytes()).hexdigest()
    assert blob[:end].count(old.encode()) == 1
    out.write_bytes(blob[:end].replace(old.encode(), new.encode()) + blob[end:])
    return out


def halve_a_scale(raw: Array) -> None:
    tile = {True: 544, False: 288}[raw.size % 544 == 0]
    scale = raw[tile * 2 - 32 : tile * 2 - 30].view(np.float16)
    scale[:] = scale / 2


def double_scale_halve_codes(raw: Array) -> None:  # every weight stays near its value: only the scale betrays it
    tile = raw[:544]
    tile[:512] = np.clip(np.rint((tile[:512].astype(np.float64) - 128) / 2) + 128, 0, 255)
    tile[512:].view(np.float16)[:] *= 2


def swap_nibbles(raw: Array) -> None:
    raw[:256] = raw[:256] << 4 | raw[:256] >> 4


BYTES = {
    "q8 scale halved": ("q8", "layers.1.wo", halve_a_scale),
    "q8 grid coarser": ("q8", "layers.1.wo", double_scale_halve_codes),
    "q4 scale halved": ("q4", "layers.1.experts.w_down", halve_a_scale),
    "q4 nibbles swapped": ("q4", "layers.1.experts.w_down", swap_nibbles),
    "router bit": ("q8", "layers.2.router", lambda raw: raw.__setitem__(64, raw[64] ^ 1)),
    "embedding bit": ("f32", "embed", lambda raw: raw.__setitem__(4000, raw[4000] ^ 1)),
    "padding": ("f32", "layers.1.wo", lambda raw: raw.__setitem__(slice(-4, None), [0, 0, 128, 63])),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BYTES)
def test_wrong_bytes_are_named(mistake: str, tmp_path: Path) -> None:
    dtype, name, change = BYTES[mistake]
    folder = models.checkpoint("v3", "f32", n_shards=1)
    file = rewritten(pack(folder, dtype=dtype), name, change, tmp_path / "x.dcalm")
    r = verify(file, folder, legs=("checksums", "weights"))
    assert [(d.leg, d.where) for d in r.divergences] == [("weights", name)]
    damaged = bytearray(file.read_bytes())
    damaged[-1000] ^= 1
    file.write_bytes(damaged)
    assert verify(file, folder, legs=("checksums",)).first_divergence.leg == "checksum"  # type: ignore[union-attr]


def test_f8_scale_and_code_are_exact(tmp_path: Path) -> None:
    folder = models.checkpoint("gigachat3", "fp8")
    file = pack(folder, dtype="source")
    for name in ("layers.1.w_uv.scale", "layers.1.w_uv"):
        r = verify(rewritten(file, name, lambda raw: raw.__setitem__(0, raw[0] ^ 4), tmp_path / "x.dcalm"), folder,
                   legs=("weights",))  # fmt: skip
        assert [d.where for d in r.divergences] == ["layers.1.w_uv"], name


# ---- mistakes in formulas (the table of common ones) ----------------------------------------------------------------


def settings(**values: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(m: pytest.MonkeyPatch) -> None:
        right = reference.Settings.of
        m.setattr(reference.Settings, "of", lambda raw: dataclasses.replace(right(raw), **values))

    return patch


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda m: m.setattr(reference, name, make(getattr(reference, name)))


def weightless(norm: str) -> Callable[[pytest.MonkeyPatch], None]:
    right = reference.PackedWeights.plain

    def plain(self: Any, name: str, rows: Any = None) -> Array:
        return np.ones_like(right(self, name)) if name.endswith(norm) else right(self, name, rows)

    return lambda m: m.setattr(reference.PackedWeights, "plain", plain)


def pairs_in_place(right: Any) -> Any:
    def rotate(s: Any, v: Array) -> Array:
        order = [*range(0, s.dr, 2), *range(1, s.dr, 2)]
        out = np.empty(v.shape)
        out[..., order] = right(s, v[..., order])
        return out

    return rotate


def swapped_halves(right: Any) -> Any:
    def mtp_input(self: Any, ids: Array, hidden: Array) -> Any:
        product = self.product
        self.product = lambda x, *a, **k: product(np.roll(x, x.shape[1] // 2, axis=1), *a, **k)
        try:
            return right(self, ids, hidden)
        finally:
            del self.product

    return mtp_input


def zero_for_masked(right: Any) -> Any:
    return lambda s, z, bias: tuple(np.where(np.isinf(v), 0, v) for v in right(s, z, bias))


def before_norm(m: pytest.MonkeyPatch) -> None:
    right = reference.Reference.mtp_input
    m.setattr(reference.Reference, "mtp_input", lambda self, ids, h: right(self, ids, h / self.w.plain("final_norm")))


MAGNITUDE = 0.1 * np.log(40) + 1  # of the v3 preset: factor 40, both mscales 1
FORMULAS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "half-split rope without permuting": (replaced("rotate", pairs_in_place), "layers.0.q"),
    "plain rope frequencies": (
        replaced("inv_freq", lambda f: lambda s: f(dataclasses.replace(s, yarn=None))), "layers.0.q"),
    "yarn magnitude on cos and sin": (replaced("amplitude", lambda _f: lambda _s: MAGNITUDE), "layers.0.q"),
    "no mscale squared": (
        replaced("softmax_scale", lambda f: lambda s: f(s) / MAGNITUDE**2), "layers.0.attn_latent"),
    "softmax routing": (settings(softmax=True), "layers.1.topk_"),
    "bias ignored": (replaced("scores", lambda f: lambda s, z, _b: f(s, z, None)), "layers.1.topk_idx"),
    "scale 1/sqrt(dn)": (
        replaced("softmax_scale", lambda f: lambda s: f(s) * ((s.dn + s.dr) / s.dn) ** 0.5), "layers.0.attn_latent"),
    "group score is the maximum": (settings(grouping="max"), "layers.1.topk_idx"),
    "no group limit": (settings(groups=1), "layers.1.topk_idx"),
    "scale 1/sqrt(r+dr)": (
        replaced("softmax_scale", lambda f: lambda s: f(s) * ((s.dn + s.dr) / (s.r + s.dr)) ** 0.5),
        "layers.0.attn_latent"),
    "scaling factor dropped": (settings(factor=1.0), "layers.1.topk_weight"),
    "weights from biased scores": (
        replaced("scores", lambda f: lambda s, z, b: (f(s, z, b)[0] + b, f(s, z, b)[1])), "layers.1.topk_weight"),
    "eps of the latent norms": (lambda m: m.setattr(reference, "LATENT_EPS", 1e-5), "layers.0.q_a"),
    "masked groups filled with 0": (replaced("scores", zero_for_masked), "layers.1.topk_idx"),
    "eps of the layer norms": (settings(eps=1e-5), "layers.0.attn_norm"),
    "halves of eh_proj": (
        lambda m: m.setattr(reference.Reference, "mtp_input", swapped_halves(reference.Reference.mtp_input)),
        "mtp.embed"),
    "hidden before the norm": (before_norm, "mtp.embed"),
}  # fmt: skip


_NEAR = {"rope_scaling": tiny.PRESETS["mistral4"].config["rope_scaling"] | {"original_max_position_embeddings": 8}}
OF_MODELS: dict[str, tuple[str, dict[str, Any], Callable[[pytest.MonkeyPatch], None], str]] = {
    "queries not scaled": ("mistral4", _NEAR, settings(beta=0.0), "layers.0.q"),
    "queries scaled from the start": ("mistral4", _NEAR, settings(original=1), "layers.0.q"),
    "norm behind the experts without weights": ("axk1", {}, weightless("post_moe_norm"), "layers.1.moe_out"),
    "embedding not scaled": ("minicpm3", {}, settings(on_embedding=1.0), "embed"),
    "residual not scaled": ("minicpm3", {}, settings(on_residual=1.0), "layers.0.ffn_norm"),
    "logits not scaled": ("minicpm3", {}, settings(on_logits=1.0), "logits"),
    "frequencies without factors": ("minicpm3", {}, settings(factors=()), "layers.0.q"),
    "rope rows taken for pairs": ("minicpm3", {}, replaced("rotate", pairs_in_place), "layers.0.q"),
    "weights not normed": ("mistral4", _NEAR, settings(normed=False), "layers.0.topk_weight"),
}
# The table's mistakes that another architecture can make as well.
_ANY = ("half-split rope without permuting", "scale 1/sqrt(dn)", "scale 1/sqrt(r+dr)", "eps of the latent norms")
_OF_YARN = ("plain rope frequencies", "yarn magnitude on cos and sin", "no mscale squared")
_OF_GROUPS = ("softmax routing", "group score is the maximum", "no group limit", "scaling factor dropped")
OF_MODELS |= {
    f"{preset}: {mistake}": (preset, {}, *FORMULAS[mistake])
    for preset, mistakes in {
        "mistral4": _ANY + _OF_YARN,
        "axk1": _ANY + _OF_YARN + _OF_GROUPS,
        "youtu": _ANY,
        "minicpm3": _ANY[1:],
    }.items()
    for mistake in mistakes
}


@functools.cache
def arithmetic_is_right(file: Path, folder: Path) -> bool:
    return verify(file, folder, legs=("arithmetic",)).ok


@pytest.mark.by_turns("dtype", 2)
@pytest.mark.parametrize("dtype", ["f32", "q4"])
@pytest.mark.parametrize("mistake", FORMULAS)
def test_mistake_in_a_formula_is_located(mistake: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtime and reference differ in one formula: whichever is wrong, the tap where it enters is the one named."""
    folder = biased() if "filled with 0" in mistake else models.checkpoint("v3", "f32", n_shards=1)
    file = pack(folder, dtype=dtype)
    assert arithmetic_is_right(file, folder)
    patch, where = FORMULAS[mistake]
    patch(monkeypatch)
    r = verify(file, folder, legs=("arithmetic",))
    assert r.first_divergence is not None and r.first_divergence.leg == "arithmetic"
    assert r.first_divergence.where.startswith(where), str(r.first_divergence)
    assert len(r.first_divergence.index) >= 1


@pytest.mark.parametrize("mistake", OF_MODELS)
def test_mistake_in_what_one_model_has_is_located(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, changes, patch, where = OF_MODELS[mistake]
    folder = models.checkpoint(preset, "f32", **changes)
    file = pack(folder, dtype="q8")
    assert arithmetic_is_right(file, folder)
    patch(monkeypatch)
    first = verify(file, folder, legs=("arithmetic",)).first_divergence
    assert first is not None and (first.where if where[-1] != "_" else first.where[: len(where)]) == where, str(first)


@functools.cache
def biased() -> Path:
    """All biased scores are negative: a masked group must be minus infinity, not 0."""
    folder = tiny.write(models.root() / "verify-biased", "v3", dtype="f32", n_shards=1)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("correction_bias")]:
        tensors[name] = tensors[name] - 3
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("what", ["chunks", "drafts"])
def test_logits_that_depend_on_the_pass_are_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.checkpoint("v3", "f32", n_shards=1)
    if what == "chunks":
        right = deepcalm.Session.prefill

        def prefill(self: Any, ids: Any, all_logits: bool = False) -> Any:
            out = right(self, ids, all_logits)
            if self._core.max_rows == 3 and all_logits:
                out[7, 2] = np.nextafter(out[7, 2], np.float32(9))
            return out

        monkeypatch.setattr(deepcalm.Session, "prefill", prefill)
    else:
        draft = deepcalm.Session.draft_round

        def draft_round(self: Any, token: int, k: int, *args: Any, **options: Any) -> Any:
            r = draft(self, token, k, *args, **options)
            return r if k != 2 else {**r, "tokens": [*r["tokens"][:-1], r["tokens"][-1] ^ 1]}

        monkeypatch.setattr(deepcalm.Session, "draft_round", draft_round)
    r = verify(pack(folder, dtype="f32"), folder, legs=("exactness",))
    first = r.first_divergence
    assert first is not None and first.leg == "exactness"
    assert (
        "passes of 3 tokens" in first.where and first.index == (7, 2) if what == "chunks" else "2 drafts" in first.where
    )


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_passes_and_prints_json() -> None:
    folder = models.checkpoint("v3", "f32", n_shards=1)
    options = ("--json", "--tokens", "12", "--threads", "2")
    code, out, err = commands.run("verify", pack(folder, dtype="q8"), "--against", folder, *options)
    assert (code, err) == (0, "")
    r = json.loads(out, parse_constant=pytest.fail)
    assert r["ok"] is True and r["first_divergence"] is None and r["tokens"] == 12 and r["divergences"] == []
    assert r["verdict"].startswith("right; packing costs ")
    assert set(r) == {"ok", "verdict", "first_divergence", "file", "against", "tokens", "kv", "checks", "divergences",
                      "effect", "notes", "not_compared"}  # fmt: skip
    assert {c["leg"] for c in r["checks"]} == {"config", "checksum", "texts", "weights", "arithmetic", "exactness"}
    assert all(set(c) == {"leg", "what", "items", "error", "allowed", "ok", "at"} and c["ok"] for c in r["checks"])


def test_command_fails_with_one_line(run: commands.Run) -> None:
    file, other = pack(models.checkpoint("v3", "f32", n_shards=1), dtype="q8"), models.checkpoint("v3", "f32", seed=4)
    code, out, err = run("verify", file, "--against", other, "--layers", "1", "--prompt", "a wind at sea")
    assert code == 1 and b"DIFFERS" in out and b"layers.0" not in out
    assert re.search(rb"\nverdict: NOT RIGHT, \d+ differences, first: weights: layers.1.attn_norm at .*\n$", out)
    assert re.search(rb"^note: only layers 1 were compared", out, re.M)
    assert re.search(
        rb"\nnot compared: positions after \d+, caches but f16, other instruction sets and devices, \d+ ten.*\n\n", out
    )
    place = r"layers\.1\.attn_norm at \[0, 0, 0\]: found \S+, expected \S+ "
    assert re.search(rf"^deepcalm: error: weights: {place}.*; and \d+ more$", err, re.M)
    code, out, err = run("verify", file, "--against", other, "--json", "--layers", "1")
    r = json.loads(out, parse_constant=pytest.fail)
    assert code == 1 and not r["ok"] and r["first_divergence"]["where"] == "layers.1.attn_norm"


def test_command_refuses_what_it_cannot_compare(run: commands.Run, tmp_path: Path) -> None:
    folder = models.checkpoint("v3", "f32", n_shards=1)
    file = pack(folder, dtype="q8")
    for args, code, message in (
        ((tmp_path / "no.dcalm", "--against", folder), 1, "no.dcalm: no such file"),
        ((file, "--against", tmp_path), 1, "no config.json in it"),
        ((file, "--against", folder, "--layers", "2-9"), 1, "layers: 4, expected 0..3"),
        ((file, "--against", folder, "--layers", "3-1"), 2, "expected numbers and ranges"),
        ((file, "--against", folder, "--tokens", "3"), 2, "--tokens"),
        ((file, "--against", folder, "--prompt", "a"), 1, "fewer than 8 tokens"),
        ((file,), 2, "--against"),
    ):
        found, _, err = run("verify", *map(str, args))
        assert found == code and message in err and "Traceback" not in err, err


def test_another_architecture_stops_at_the_configuration() -> None:
    r = verify(pack(models.checkpoint("v3", "f32", n_shards=1), dtype="q8"), models.checkpoint("moonlight", "f16"))
    assert {d.leg for d in r.divergences} == {"config"} and [c.leg for c in r.checks] == ["config"]
    assert r.notes and "different shapes" in r.notes[0]
    assert verify_text(r).count("not compared") == 0 and "\nnote: the two models have different shapes" in verify_text(
        r
    )


def test_restricted_layers_and_random_tokens() -> None:
    folder = models.checkpoint("v3", "f32", tokenizer="none")
    r = verify(pack(folder, dtype="f32"), folder, layers=[3], tokens=9)
    assert r.ok and r.tokens == 9 and not r.effect and len(r.notes) == 2
    assert [c.what for c in r.checks if c.leg == "weights"] == ["mtp"]
    assert [c.what for c in r.checks if c.leg == "arithmetic"] == ["mtp input", "mtp", "mtp head"]
    with pytest.raises(ValueError, match=r"legs: 'x'"):
        verify(pack(folder, dtype="f32"), folder, legs=("x",))
