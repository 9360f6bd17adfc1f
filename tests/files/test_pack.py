"""The packer end to end: values against the independent readers, exactness, plans, resuming, refusals, memory."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import tiny
from deepcalm.check.verify import verify
from deepcalm.errors import CheckpointError, ResourceError, UnsupportedError
from deepcalm.files import packed
from deepcalm.files.pack import pack, plan
from deepcalm.names import DTYPES
from ref import checkpoint as ref_checkpoint
from ref import formats as F
from ref import model as ref_model
from ref import packed as ref_packed

pytestmark = pytest.mark.sanitize
Array = np.ndarray[Any, Any]
PACK = sys.modules["deepcalm.files.pack"]


def both(folder: Path, file: Path) -> Iterator[tuple[str, Array, Array]]:
    """(name, checkpoint values, packed values) of every weight, read without the packer's code; experts one by one."""
    p, (_, source) = ref_packed.PackedFile(file), ref_model.load(folder)
    for name, e in p.entries.items():
        if e.kind not in ("tiled", "plain"):
            continue
        want, got = (ref_model.matrix(w, name, e.shape) for w in (source, ref_model.PackedWeights(p)))
        assert want.shape == got.shape, name
        for rows in p.part_rows(name) if len(e.shape) > 1 else [np.arange(e.shape[0])]:
            if ".experts." in name:
                yield from ((name, want[i, rows], got[i, rows]) for i in range(len(want)))
            else:
                yield (name, want[..., rows, :], got[..., rows, :]) if want.ndim > 1 else (name, want, got)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every preset in its own dtype and style, and one in the other dtypes."""
    base = tmp_path_factory.mktemp("checkpoints")
    out = {name: tiny.write(base / name, name) for name in tiny.PRESETS}
    out |= {f"v3-{d}": tiny.write(base / f"v3-{d}", "v3", dtype=d) for d in ("f16", "f32", "fp8")}
    return out


CASES = [*tiny.PRESETS, "v3-f16", "v3-f32", "v3-fp8"]


@pytest.mark.parametrize("case", CASES)
def test_source_and_f32_keep_every_value(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for dtype in ("source", "f32"):
        file = tmp_path / f"{dtype}.dcalm"
        pack(checkpoints[case], file, dtype)
        for name, want, got in both(checkpoints[case], file):
            # e4m3 * scale: the reference rounds the product to f32, f8 tiles keep the factors
            np.testing.assert_allclose(
                got, want, rtol=6e-8 if "fp8" in case or case in ("gigachat3", "mistral4") else 0, err_msg=name
            )


@pytest.mark.by_turns("case", 4)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in ("source", "f32")])
@pytest.mark.parametrize("case", ["v3", "v2_lite", "gigachat3", "kimi_k2"])
def test_targets_are_within_their_rounding(case: str, dtype: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pack(checkpoints[case], tmp_path / "x", dtype)
    bound = {"bf16": 2.0**-8, "f16": 2.0**-11, "f8": 2.0**-4, "q8": 1 / 254, "q4": 1 / 5}  # q4 may clip the largest
    for name, want, got in both(checkpoints[case], tmp_path / "x"):
        leaf = name.rpartition(".")[2]
        if "norm" in leaf or leaf.startswith("router"):
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        plain = "embed" in name or "eh_proj" in name
        kind = "bf16" if plain and dtype not in ("f16", "bf16") else dtype
        if kind == "q4" and leaf not in ("w_gate_up", "w_down"):
            kind = "q8"  # attention and head
        if name == "mtp.head":
            kind = "q4"
        if kind in ("q8", "q4"):  # error against the largest of its group; an upper bound: of the whole row or column
            axis = -2 if "w_uk" in name else -1
            limit = np.abs(want).max() if "w_uk" in name else np.abs(want).max(axis, keepdims=True)
        else:
            limit = np.abs(want) + (np.abs(want).max() * 2.0**-7 if kind == "f8" else 2.0**-13)
        error = np.abs(got - want)
        assert (error <= 1.01 * bound[kind] * limit).all(), name
        if kind == "q4":
            assert np.sqrt((error**2).mean() / (want**2).mean()) < 0.11, name


def test_plan_is_what_is_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for case, dtype in [("gigachat3", "source"), ("kimi_k2", "source"), ("v3", "q4"), ("v2_lite", "f8")]:
        before = plan(checkpoints[case], dtype)
        after = pack(checkpoints[case], tmp_path / "x", dtype, force=True)
        assert before == after
        with packed.PackedFile(tmp_path / "x") as f:
            assert f.check() == []
            assert f.header.file_size == f.data_offset + before.data_bytes
            assert f.config == before.config
            assert f.dropped == [dataclasses.asdict(d) for d in before.dropped]
            stored = {s.name: s.entry() for t in before.tensors for s in t.stored}
            assert stored == {n: e.entry() for n, e in f.entries.items() if e.kind != "file"}
            active = sum(e.active_bytes(f.config["num_experts_per_tok"]) for e in f.entries.values())
            assert before.active_bytes_per_token == active


def test_every_source_tensor_is_used_or_dropped(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        p = plan(folder)
        used = {n for t in p.tensors for parts in t.slices for part in parts for n in part.weight.tensors}
        names = set(ref_checkpoint.raw_tensors(folder))
        assert used | {d.name for d in p.dropped} == names
        assert not used & {d.name for d in p.dropped}
    drops = {d.name: d.why for d in plan(checkpoints["v2_lite"]).dropped}
    assert set(drops) == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)}


def test_dtype_policy(checkpoints: dict[str, Path]) -> None:
    def formats(dtype: str, **kw: str) -> dict[str, set[str]]:
        out: dict[str, set[str]] = {}
        for t in plan(checkpoints["v3"], dtype, **kw).tensors:
            out.setdefault(t.role, set()).add(t.format)
        return out

    def table(body: str, plain: str, attn: str, head: str, **other: str) -> dict[str, set[str]]:
        out = {"norm": "f32", "bias": "f32", "router": "f32", "embed": plain, "eh_proj": plain, "attn": attn}
        out |= {"head": head, "ffn": body, "expert": body, "shared": body} | other
        return {role: {fmt} for role, fmt in out.items()}

    assert formats("source") == table("bf16", "bf16", "bf16", "bf16")
    assert formats("f32") == table("f32", "f32", "f32", "f32")
    assert formats("f16") == table("f16", "f16", "f16", "f16")
    assert formats("q8") == table("q8", "bf16", "q8", "q8", draft_head="q4")
    assert formats("q4") == table("q4", "bf16", "q8", "q8", draft_head="q4")
    assert formats("q4", draft_head_dtype="none") == table("q4", "bf16", "q8", "q8")
    assert formats("q8", draft_head_dtype="q8") == table("q8", "bf16", "q8", "q8")  # the head serves as it is
    assert formats("source", draft_head_dtype="q8") == table("bf16", "bf16", "bf16", "bf16", draft_head="q8")
    assert "mtp_draft_head" not in plan(checkpoints["v2_lite"], "q8").config
    mixed = formats("q4", attn_dtype="source", head_dtype="f16")
    assert (mixed["attn"], mixed["head"], mixed["ffn"]) == ({"bf16"}, {"f16"}, {"q4"})
    with pytest.raises(UnsupportedError, match="head_dtype 'q5', expected one of source, bf16"):
        plan(checkpoints["v3"], head_dtype="q5")
    with pytest.raises(UnsupportedError, match=r"draft_head_dtype 'q5', expected one of source, .*, none"):
        plan(checkpoints["v3"], draft_head_dtype="q5")


# --- exact codes ----------------------------------------------------------------------------------------------------


def test_fp8_codes_and_scales_survive_576_rows_and_320_row_heads(tmp_path: Path) -> None:
    # DeepSeek's edge (512 + 64 = 576 rows, five block rows) and GigaChat3's heads (128 + 192 rows, 2.5 blocks)
    d = tiny.write(tmp_path / "hf", "gigachat3", kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=3)
    p = pack(d, tmp_path / "x")
    blocks = {t.name: t.scale_block for t in p.tensors if t.name.startswith("layers.0.")}
    assert blocks["layers.0.w_uk"] == (128, 64)
    assert blocks["layers.0.w_uv"] == (64, 128)
    assert blocks["layers.0.wqkv_a"] == (64, 128)  # q: 3 heads of 192 rows; kv_a starts at row 576
    assert blocks["layers.0.w_gate_up"] == (16, 128)
    assert blocks["layers.0.wo"] == (128, 128)
    assert {t.format for t in p.tensors if t.role in ("attn", "ffn", "expert", "shared")} == {"f8"}
    raw, file = ref_checkpoint.raw_tensors(d), ref_packed.PackedFile(tmp_path / "x")

    def codes(name: str, rows: int, cols: int, s: int = 0, n: int = 1) -> Array:
        return F.decode_codes("f8", file.raw(name).reshape(n, -1)[s], rows, cols).astype(np.uint8)

    kv_b, prefix = raw["model.layers.0.self_attn.kv_b_proj.weight"], "model.layers.0.self_attn."
    for h in range(3):
        np.testing.assert_array_equal(codes("layers.0.w_uk", 512, 128, h, 3), kv_b[320 * h : 320 * h + 128].T)
        np.testing.assert_array_equal(codes("layers.0.w_uv", 192, 512, h, 3), kv_b[320 * h + 128 : 320 * h + 320])
    stacked = codes("layers.0.wqkv_a", 3 * 192 + 576, 200)
    rope = np.concatenate([np.arange(512), 512 + np.arange(0, 64, 2), 512 + np.arange(1, 64, 2)])
    np.testing.assert_array_equal(stacked[576:], raw[prefix + "kv_a_proj_with_mqa.weight"][rope])
    # and the scales: every element's packed scale is its source block's
    scale = raw[prefix + "kv_b_proj.weight_scale_inv"]
    grid = file.plain("layers.0.w_uv.scale")  # [heads, 192 / 64, 512 / 128]
    for h in range(3):
        rows = (320 * h + 128 + 64 * np.arange(3)) // 128
        np.testing.assert_array_equal(grid[h], scale[rows])


def test_fp8_blocks_that_tiles_cannot_express_become_f32(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "gigachat3", fp8_block=(24, 128))
    p = pack(d, tmp_path / "x")
    t = next(t for t in p.tensors if t.name == "layers.0.wo")
    assert (t.format, t.note) == ("f32", "scale blocks do not fit 16 x 32 tiles: f32")
    with packed.PackedFile(tmp_path / "x") as f:
        raw = ref_checkpoint.raw_tensors(d)
        codes = raw["model.layers.0.self_attn.o_proj.weight"]
        scale = raw["model.layers.0.self_attn.o_proj.weight_scale_inv"]
        want = F.E4M3[codes].astype(np.float32) * scale[np.arange(200)[:, None] // 24, np.arange(384)[None] // 128]
        np.testing.assert_array_equal(f.unpack("layers.0.wo"), want)


@pytest.mark.parametrize("shared", [False, True])
def test_fp8_with_one_scale_for_a_tensor(shared: bool, tmp_path: Path) -> None:
    """Codes are kept, and each part of a joined tensor has its own scale; gate and up may share theirs."""
    d = tiny.write(tmp_path / "hf", "mistral4")
    gate_up = "model.layers.1.mlp.experts.gate_up_proj_scale_inv"

    def one_scale(tensors: dict[str, Any]) -> None:
        kind, shape, data = tensors[gate_up]
        assert (kind, shape) == ("F32", (14, 2, 1))
        tensors[gate_up] = (kind, (14, 1, 1), np.frombuffer(data, "<f4").reshape(14, 2)[:, 0].tobytes())

    if shared:
        tiny.rewrite(d, one_scale)
    p = pack(d, tmp_path / "x")
    assert {t.format for t in p.tensors if t.role in ("attn", "expert", "shared")} == {"f8"}
    assert {x.why for x in p.dropped} == {"activation scale: the runtime rounds activations by itself"}
    raw, file = ref_checkpoint.raw_tensors(d), ref_packed.PackedFile(tmp_path / "x")
    p1, scales = "model.layers.1.self_attn.", file.plain("layers.1.wqkv_a.scale")[0, :, 0]
    assert scales[0] == raw[p1 + "q_a_proj.weight_scale_inv"] != scales[-1]
    assert scales[-1] == raw[p1 + "kv_a_proj_with_mqa.weight_scale_inv"]
    of_tiles = file.plain("layers.1.experts.w_gate_up.scale")[:, :, 0]
    np.testing.assert_array_equal(of_tiles[:, :2], np.broadcast_to(raw[gate_up][:, :, 0], (14, 2)))


def test_axk1_without_a_router_bias(tmp_path: Path) -> None:
    """It is zeros, and said to be; dense layers have a norm that nothing reads."""
    d = tiny.write(tmp_path / "hf", "axk1")
    p = pack(d, tmp_path / "x")
    assert "the files hold no e_score_correction_bias: zeros, as in transformers" in p.notes
    assert {x.name: x.why for x in p.dropped} == {
        "model.layers.0.post_mlp_layernorm.weight": "only layers with experts use it"
    }
    file, raw = ref_packed.PackedFile(tmp_path / "x"), ref_checkpoint.raw_tensors(d)
    assert file.config["post_moe_norm"] == 1 and not file.plain("layers.2.router_bias").any()
    np.testing.assert_array_equal(file.plain("layers.2.post_moe_norm"), raw["model.layers.2.post_mlp_layernorm.weight"])
    p = plan(tiny.write(tmp_path / "biased", "axk1", bias_dtype="f32"))
    assert not any("correction_bias" in note for note in p.notes)


def test_int4_experts_keep_codes_and_scales(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    p = pack(checkpoints["kimi_k2"], tmp_path / "x")
    experts = [t for t in p.tensors if t.role == "expert"]
    assert {(t.format, t.scale, t.source_dtype) for t in experts} == {("q4", "bf16", "I4")}
    raw, file = ref_checkpoint.raw_tensors(checkpoints["kimi_k2"]), ref_packed.PackedFile(tmp_path / "x")
    data = file.raw("layers.1.experts.w_down").reshape(20, -1)
    for e in range(20):
        base = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        words = raw[base + "_packed"].view(np.uint32)
        nibbles = (words[:, np.arange(32) // 8] >> (4 * (np.arange(32) % 8)).astype(np.uint32)) & np.uint32(15)
        np.testing.assert_array_equal(F.decode_codes("q4b", data[e], 96, 32), nibbles.astype(np.int16) - 8)
        bits = F.bf16_bits(raw[base + "_scale"])
        np.testing.assert_array_equal(F.decode_scales("q4b", data[e], 96, 32), bits)


def same_tensors(a: Path, b: Path, dtype: str = "source") -> bool:
    """Whether two checkpoints pack to the same bytes, of whichever file they say they come from."""
    stored = []
    for folder in (a, b):
        pack(folder, folder / f"{dtype}.dcalm", dtype, force=True)
        with packed.PackedFile(folder / f"{dtype}.dcalm") as f:
            stored.append({n: (e.sha256, e.entry()) for n, e in f.entries.items()})
    return stored[0] == stored[1]


SCALE_DTYPES = {
    "BF16": (F.bf16_bits, F.bf16_value),
    "F16": (F.f16_bits, F.f16_value),
    "F8_E8M0": (lambda x: (127 + np.ceil(np.log2(x))).astype(np.uint8), lambda c: np.ldexp(1.0, c.astype(int) - 127)),
}


@pytest.mark.parametrize("stored", SCALE_DTYPES)
def test_block_scales_of_every_dtype_are_read(stored: str, tmp_path: Path) -> None:
    encode, decode = SCALE_DTYPES[stored]
    wide, narrow = (tiny.write(tmp_path / n, "gigachat3") for n in ("wide", "narrow"))

    def change(tensors: dict[str, Any], keep: bool) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            codes = encode(np.frombuffer(tensors[name][2], "<f4"))
            if name.endswith("experts.1.up_proj.weight_scale_inv"):
                codes[:] = 0  # 0 and, of F8_E8M0, 2^-127: the smallest there are
            values = decode(codes).astype("<f4")
            tensors[name] = (stored if keep else "F32", tensors[name][1], (codes if keep else values).tobytes())

    tiny.rewrite(narrow, lambda t: change(t, True))
    tiny.rewrite(wide, lambda t: change(t, False))
    assert same_tensors(wide, narrow) and same_tensors(wide, narrow, "q8")
    assert {t.format for t in plan(narrow).tensors if t.role in ("attn", "ffn", "expert")} == {"f8"}
    name, bits = "model.layers.1.mlp.experts.5.up_proj.weight_scale_inv", {"BF16": b"\x80\x7f", "F16": b"\x00\x7e"}
    poison(narrow, name, 1, bits.get(stored, b"\xff"))
    with pytest.raises(CheckpointError, match=rf"{name}: scale at \[0, 1\] is (inf|nan), expected a finite number"):
        pack(narrow, tmp_path / "x")


def test_int4_columns_in_order_are_read_whatever_the_ordering_is_called(tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "plain", "kimi_k2")
    for actorder in ("weight", "static", None):
        d = tiny.write(tmp_path / str(actorder), "kimi_k2")
        config = json.loads((d / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = actorder
        (d / "config.json").write_text(json.dumps(config))
        assert same_tensors(plain, d)

    def change(tensors: dict[str, Any]) -> None:
        for i, name in enumerate([n for n in tensors if n.endswith("weight_shape")]):
            cols = int(np.frombuffer(tensors[name][2], "<i8")[1])
            groups = (np.arange(cols) // 32 if i % 2 else np.full(cols, -1)).astype("<i4")
            tensors[name.replace("shape", "g_idx")] = ("I32", (cols,), groups.tobytes())

    tiny.rewrite(d, change)
    assert same_tensors(plain, d) and plan(d).dropped == []


@pytest.mark.parametrize(
    ("preset", "options"),
    [("v2_lite", {}), ("v3", {"dtype": "f32"}), ("glm4_moe_lite", {}), ("gigachat3", {"moe_intermediate_size": 128})],
)
def test_experts_saved_fused_pack_to_the_same_bytes(preset: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain, fused = (tiny.write(tmp_path / n, preset, n_shards=1, **options) for n in ("plain", "fused"))
    tiny.rewrite(fused, tiny.fuse_experts)
    raw = ref_checkpoint.raw_tensors(fused)
    assert "model.layers.1.mlp.experts.gate_up_proj" in raw and not any(".experts.0." in n for n in raw)
    for dtype in ("source", "q4"):
        assert same_tensors(plain, fused, dtype)
    p = plan(fused)
    assert p.config["num_nextn_predict_layers"] == tiny.PRESETS[preset].config["num_nextn_predict_layers"]
    assert not any("experts" in d.name for d in p.dropped)
    name, shape = "model.layers.1.mlp.experts.gate_up_proj", raw["model.layers.1.mlp.experts.gate_up_proj"].shape
    nan = {"F32": b"\0\0\xc0\x7f", "BF16": b"\xc0\x7f", "F8_E4M3": b"\x7f"}[
        next(t.source_dtype for t in p.tensors if t.role == "expert")
    ]
    poison(fused, name, int(np.ravel_multi_index((3, shape[1] - 2, 5), shape)), nan)  # of up
    with pytest.raises(CheckpointError, match=rf"{name}: value at \[3, {shape[1] - 2}, 5\] is nan"):
        pack(fused, tmp_path / "x")


@pytest.mark.reference
@pytest.mark.parametrize("preset", ["v3", "v2_lite", "glm4_moe_lite"])
def test_what_transformers_saves_packs_to_the_same_bytes(preset: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    d = tiny.write(tmp_path / "hf", preset, dtype="f32", n_shards=1, num_nextn_predict_layers=0)
    m: Any = transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)
    for original in (True, False):
        out = tmp_path / str(original)
        m.save_pretrained(out, save_original_format=original)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (d / file).exists():
                shutil.copy(d / file, out / file)
        assert any(n.endswith("experts.gate_up_proj") for n in ref_checkpoint.raw_tensors(out)) != original
        assert same_tensors(d, out) and same_tensors(d, out, "q8")


def test_mixed_parts_are_stored_f32(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "gigachat3")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    values = ref_checkpoint.load(d)[1][name]

    def change(tensors: dict[str, Any]) -> None:
        del tensors[name + "_scale_inv"]
        tensors[name] = ("BF16", values.shape, F.bf16_bits(values).tobytes())

    tiny.rewrite(d, change)
    p = pack(d, tmp_path / "x")
    t = next(t for t in p.tensors if t.name == "layers.0.wqkv_a")
    assert (t.format, t.source_dtype, t.note) == (
        "f32",
        "BF16+F8_E4M3",
        "BF16 and F8_E4M3 in one tensor: f32 keeps both",
    )
    for label, want, got in both(d, tmp_path / "x"):
        np.testing.assert_allclose(got, want, rtol=6e-8, err_msg=label)


def test_half_split_checkpoints_are_not_permuted(tmp_path: Path) -> None:
    a = tiny.write(tmp_path / "a", "glm4_moe_lite")
    b = tiny.write(tmp_path / "b", "glm4_moe_lite", extra_config={"rope_interleave": False})
    config = json.loads((b / "config.json").read_text()) | {"rope_interleave": False}
    (b / "config.json").write_text(json.dumps(config))
    pack(a, tmp_path / "xa")
    pack(b, tmp_path / "xb")
    with packed.PackedFile(tmp_path / "xa") as fa, packed.PackedFile(tmp_path / "xb") as fb:
        qa, qb = fa.unpack("layers.0.wq_b"), fb.unpack("layers.0.wq_b")
    raw = ref_checkpoint.load(b)[1]["model.layers.0.self_attn.q_b_proj.weight"]
    np.testing.assert_array_equal(qb, raw)
    assert (qa != qb).any()


def sources(t: packed.Tensor) -> set[str]:
    """Names of the checkpoint weights that a tensor is made of."""
    return {part.weight.name for parts in t.slices for part in parts}


def test_tied_head_is_a_second_tensor(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "moonlight", tie_word_embeddings=True)
    p = pack(d, tmp_path / "x", "q8")
    by_name = {t.name: t for t in p.tensors}
    assert sources(by_name["head"]) == sources(by_name["embed"]) == {"model.embed_tokens.weight"}
    assert (by_name["head"].format, by_name["embed"].format) == ("q8", "bf16")
    # a file that holds the copy as well: dropped
    name = "model.embed_tokens.weight"
    stored = ref_checkpoint.raw_tensors(d)[name]
    tiny.rewrite(d, lambda t: t.update({"lm_head.weight": t[name]}))
    after = plan(d, "q8")
    assert [(x.name, x.why) for x in after.dropped] == [("lm_head.weight", f"copy of {name}")]
    assert (after.config, after.notes) == (p.config, [])
    # or only the head: it serves as the embedding
    tiny.rewrite(d, lambda t: t.pop(name))
    after = pack(d, tmp_path / "y", "q8")
    assert {t.name: sources(t) for t in after.tensors}["embed"] == {"lm_head.weight"}
    with packed.PackedFile(tmp_path / "x") as a, packed.PackedFile(tmp_path / "y") as b:
        assert {n: e.sha256 for n, e in a.entries.items()} == {n: e.sha256 for n, e in b.entries.items()}
    # or another head: used, as transformers does
    tiny.rewrite(d, lambda t: t.update({name: (*t["lm_head.weight"][:2], F.bf16_bits(stored[::-1]).tobytes())}))
    after = pack(d, tmp_path / "z", "f32")
    assert after.dropped == [] and not after.config["tie_word_embeddings"]
    assert after.notes == [f"lm_head.weight differs from {name} although config.json ties them; each is used"]
    with packed.PackedFile(tmp_path / "z") as f:
        np.testing.assert_array_equal(f.unpack("head"), stored)
        np.testing.assert_array_equal(f.unpack("embed"), stored[::-1])


@pytest.mark.reference
@pytest.mark.parametrize("preset", ["moonlight", "v2_lite"])
def test_a_head_of_its_own_is_what_transformers_uses(preset: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    d = tiny.write(tmp_path / "hf", preset, dtype="f32", tie_word_embeddings=True)
    embed = ref_checkpoint.raw_tensors(d)["model.embed_tokens.weight"]
    for names, other in [(("head", "embed"), embed[::-1]), (("head", "embed"), embed), (("head",), embed)]:
        stored = {"head": ("lm_head.weight", other), "embed": ("model.embed_tokens.weight", embed)}
        files = {n: ("F32", w.shape, np.ascontiguousarray(w).tobytes()) for n, w in (stored[k] for k in names)}
        tiny.rewrite(d, lambda t, f=files: (t.pop("model.embed_tokens.weight", None), t.update(f)))
        m: Any = transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)
        pack(d, tmp_path / "x", "f32", force=True)
        with packed.PackedFile(tmp_path / "x") as f:
            np.testing.assert_array_equal(f.unpack("head"), m.lm_head.weight.detach().numpy())
            np.testing.assert_array_equal(f.unpack("embed"), m.model.embed_tokens.weight.detach().numpy())


# --- MTP ------------------------------------------------------------------------------------------------------------


def test_mtp_copies_are_compared_and_dropped(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "v3", n_shards=1)
    assert [x.why for x in plan(d).dropped] == ["copy of model.embed_tokens.weight", "copy of lm_head.weight"]
    head = "model.layers.3.shared_head.head.weight"
    tiny.rewrite(d, lambda t: t.update({head: (*t[head][:2], bytes(len(t[head][2])))}))
    p = plan(d)
    assert p.config["num_nextn_predict_layers"] == 1
    assert p.dropped[1].why == "differs from lm_head.weight, which is used instead"
    assert p.notes == [f"{head} differs from lm_head.weight, which is used instead; drafts may be accepted less often"]


def test_incomplete_mtp_layer_is_dropped_with_the_reason(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "v3", n_shards=1)
    tiny.rewrite(d, lambda t: t.pop("model.layers.3.mlp.experts.7.up_proj.weight"))
    p = pack(d, tmp_path / "x")
    missing = "model.layers.3.mlp.experts.7.up_proj.weight is missing"
    assert p.config["num_nextn_predict_layers"] == 0
    assert p.notes == [f"the MTP layer is dropped: {missing}; drafting will not be available"]
    assert {x.why for x in p.dropped} == {f"MTP layer incomplete: {missing}"}
    assert not any(t.name.startswith("mtp.") for t in p.tensors)


def test_announced_mtp_layer_without_tensors_is_noted_and_further_ones_dropped(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "moonlight")
    config = json.loads((d / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (d / "config.json").write_text(json.dumps(config))
    further = {"model.layers.4.enorm.weight": ("F32", (2,), bytes(8)), "model.extra": ("U8", (1,), b"x")}
    tiny.rewrite(d, lambda t: t.update(further))
    p = plan(d)
    assert p.notes == ["config.json names an MTP layer but the files hold none; drafting will not be available"]
    drops = {x.name: x.why for x in p.dropped}
    assert drops["model.layers.4.enorm.weight"] == "further MTP module: only the first is used"
    assert drops["model.extra"] == "not part of this architecture"


@pytest.mark.parametrize(
    ("wrapper", "preset", "model", "head", "vision"),
    [
        (
            "kimi_k25",
            "kimi_k2",
            "language_model.model.",
            "language_model.lm_head.weight",
            "vision_tower.",
        ),  # K2.5, K2.6, K2.7
        (
            "kimi_k25",
            "kimi_k2",
            "model.language_model.",
            "lm_head.weight",
            "model.vision_tower.",
        ),  # save_original_format=False
        ("mistral3", "mistral4", "language_model.model.", "language_model.lm_head.weight", "vision_tower."),
        ("mistral3", "mistral4", "model.language_model.", "lm_head.weight", "model.vision_tower."),
    ],
)
def test_wrappers(wrapper: str, preset: str, model: str, head: str, vision: str, tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", preset)
    config = json.loads((d / "config.json").read_text())
    ends = {"bos_token_id": config.pop("bos_token_id"), "eos_token_id": config.pop("eos_token_id")}
    outer = {"model_type": wrapper, "text_config": config, "vision_config": {}, "tie_word_embeddings": True}
    (d / "config.json").write_text(json.dumps(outer | ends))

    def wrap(tensors: dict[str, Any]) -> None:
        names = {name: model + name.removeprefix("model.") for name in tensors} | {"lm_head.weight": head}
        inner = {names[name]: t for name, t in tensors.items()}
        tensors.clear()
        tensors |= inner | {vision + "patch.weight": ("F32", (1,), bytes(4)), "mm_projector.b": ("U8", (1,), b"x")}

    plain = tiny.write(tmp_path / "plain", preset)
    tiny.rewrite(d, wrap)
    p = pack(d, tmp_path / "x")
    pack(plain, tmp_path / "y")
    assert {x.name: x.why for x in p.dropped if "activation_scale" not in x.name} == {
        vision + "patch.weight": "vision_tower is not part of the text model",
        "mm_projector.b": "mm_projector is not part of the text model",
    }
    with packed.PackedFile(tmp_path / "x") as a, packed.PackedFile(tmp_path / "y") as b:
        assert {n: e.sha256 for n, e in a.entries.items()} == {n: e.sha256 for n, e in b.entries.items()}
        assert a.config == b.config
    assert verify(tmp_path / "x", d).ok
    tiny.rewrite(d, lambda t: t.pop(model + "norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor language_model\.model\.\S+ is missing"):
        plan(d)


# --- the file -------------------------------------------------------------------------------------------------------


def test_container_is_valid_for_the_safetensors_package(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for case, dtype in [("gigachat3", "source"), ("v3", "q4")]:
        pack(checkpoints[case], tmp_path / "x", dtype, force=True)
        blob = (tmp_path / "x").read_bytes()
        entries = dict(safetensors.deserialize(blob))
        with packed.PackedFile(tmp_path / "x") as f:
            assert set(entries) == set(f.entries)
            for name, e in f.entries.items():
                assert entries[name]["data"][: e.nbytes] == f.read_bytes(name).tobytes()
                assert e.offset % 64 == 0


def test_stored_files_are_the_checkpoint_s(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pack(checkpoints["glm4_moe_lite"], tmp_path / "x")
    with packed.PackedFile(tmp_path / "x") as f:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            assert f.tokenizer_file(name) == (checkpoints["glm4_moe_lite"] / name).read_bytes()
        assert f.tokenizer_file("nope") is None
        assert f.config["eos_token_ids"] == [266, 268, 269] and f.config["bos_token_id"] is None


def test_packing_again_gives_the_same_bytes_and_replaces(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("something else")
    reached: list[tuple[int, int]] = []
    pack(checkpoints["v3"], tmp_path / "x", "q4", None, None, None, lambda *n: reached.append(n), force=True)
    first = (tmp_path / "x").read_bytes()
    pack(checkpoints["v3"], tmp_path / "x", "q4", force=True)
    assert (tmp_path / "x").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert reached == sorted(reached) and reached[-1] == (len(first), len(first))


def test_slab_size_does_not_change_the_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case, dtype in [("gigachat3", "source"), ("v3", "f8"), ("v2_lite", "q4"), ("kimi_k2", "source")]:
        pack(checkpoints[case], tmp_path / "x", dtype, force=True)
        with monkeypatch.context() as m:
            m.setattr(PACK, "SLAB_BYTES", 3000)
            pack(checkpoints[case], tmp_path / "y", dtype, force=True)
        assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_tensor_is_written_in_whole_large_pages(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(checkpoints["v3"], tmp_path / "x", "q8")
    inside: list[tuple[int, int]] = []
    put = PACK._Writer.put

    def watched(self: Any, buffer: Any, offset: int, job: Any, last: bool) -> None:
        if not last:
            inside.append((offset, len(buffer)))
        put(self, buffer, offset, job, last)

    monkeypatch.setattr(PACK, "SLAB_BYTES", 9000)
    monkeypatch.setattr(PACK, "LARGE_PAGE", 512)
    monkeypatch.setattr(PACK._Writer, "put", watched)
    pack(checkpoints["v3"], tmp_path / "y", "q8")
    assert len(inside) > 20
    assert all((offset + n) % 512 == 0 for offset, n in inside)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_slabs_end_on_boundaries_of_the_file(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACK, "SLAB_BYTES", 64)
    for _ in range(50):
        pieces = [rng.integers(0, 256, n, np.uint8) for n in rng.integers(0, 200, rng.integers(0, 6))]
        begin = at = int(rng.integers(0, 1000))
        got = list(PACK.slabs(pieces, begin))
        for i, slab in enumerate(got):
            at += len(slab)
            assert len(slab) and (at % 64 == 0 or i == len(got) - 1)
        assert b"".join(map(bytes, got)) == b"".join(map(bytes, pieces))


# --- resuming -------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from deepcalm.files.pack import pack
pack(sys.argv[1], sys.argv[2], "q8", progress=lambda done, total: time.sleep(0.002))
"""


def test_killed_packs_resume_with_identical_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    src, dst, partial = checkpoints["v3"], tmp_path / "x", tmp_path / "x.partial"
    pack(src, tmp_path / "whole", "q8")
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(src), str(dst)], env=dict(os.environ))
        deadline = time.monotonic() + 20
        while not partial.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.01, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if dst.exists():  # it was faster
            assert dst.read_bytes() == (tmp_path / "whole").read_bytes()
            dst.unlink()
    pack(src, dst, "q8")
    assert dst.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial.exists() and not (tmp_path / "x.partial.journal").exists()


class Stop(Exception):
    pass


def interrupted(src: Path, dst: Path, after: int, dtype: str = "q8") -> None:
    """A pack that is stopped after ``after`` progress calls."""
    calls = iter(range(1 << 30))

    def progress(_done: int, _total: int) -> None:
        if next(calls) >= after:
            raise Stop

    with pytest.raises(Stop):
        pack(src, dst, dtype, progress=progress)


def test_interrupted_packs_resume_only_what_is_missing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src, dst = checkpoints["gigachat3"], tmp_path / "x"
    pack(src, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    n_done = []
    for after in (3, 12, 15):
        interrupted(src, dst, after, "source")
        assert not dst.exists()
        n_done.append(len((tmp_path / "x.partial.journal").read_text().splitlines()) - 1)
    assert n_done == sorted(n_done) and n_done[-1] > 20, n_done
    assert (
        pack(src, dst).notes[0].startswith(f"resumed: {n_done[-1]} of {len(plan(src).tensors) + 4} tensors were packed")
    )
    assert dst.read_bytes() == whole


def test_resume_does_not_believe_the_journal(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src, dst, partial = checkpoints["v3"], tmp_path / "x", tmp_path / "x.partial"
    pack(src, tmp_path / "whole", "q8")
    whole = (tmp_path / "whole").read_bytes()
    journal = tmp_path / "x.partial.journal"
    for damage in ("bytes", "truncated", "torn", "garbage", "no journal"):
        interrupted(src, dst, 30)
        if damage == "bytes":  # lost in the page cache at a power cut
            with packed.PackedFile(tmp_path / "whole") as f, partial.open("r+b") as out:
                out.seek(f.entries["layers.0.wo"].offset)
                out.write(bytes(100))
        elif damage == "truncated":
            os.truncate(partial, 1000)
        elif damage == "torn":
            text = journal.read_text()
            journal.write_text(text[:-20])
        elif damage == "garbage":
            journal.write_text('[1, 2]\nnull\n{"name": 3}\n')
        else:
            journal.unlink()
        pack(src, dst, "q8")
        assert dst.read_bytes() == whole, damage
        dst.unlink()


def test_other_options_or_sources_start_over_and_say_so(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    interrupted(checkpoints["v3"], tmp_path / "x", 10)
    p = pack(checkpoints["v3"], tmp_path / "x", "q4")
    assert p.notes == ["x.partial belonged to another source or other options and was started over"]
    pack(checkpoints["v3"], tmp_path / "y", "q4")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    src = tiny.write(tmp_path / "hf", "moonlight")
    interrupted(src, tmp_path / "z", 10)
    os.utime(src / "model.safetensors", ns=(1, 1))
    assert "started over" in pack(src, tmp_path / "z", "q8").notes[0]


# --- near zero ------------------------------------------------------------------------------------------------------


def near_zero_checkpoint(folder: Path, preset: str, dtype: str) -> Path:
    """A checkpoint with rows, and a whole expert, whose values (or source scales) are next to nothing."""
    d = tiny.write(folder, preset, dtype=dtype, n_shards=1)

    def shrink(stored: tuple[str, tuple[int, ...], bytes], factor: float, rows: slice) -> tuple[Any, ...]:
        kind, shape, data = stored
        bits = np.frombuffer(data, "<f4" if kind == "F32" else "<u2").reshape(shape).copy()
        values = (bits if kind == "F32" else F.bf16_value(bits))[rows] * np.float32(factor)
        bits[rows] = values if kind == "F32" else F.bf16_bits(values)
        return kind, shape, bits.tobytes()

    def change(tensors: dict[str, Any]) -> None:
        every = slice(None)
        factors = {"lm_head.": (1e-6, slice(40, 45)), "experts.2.": (1e-38, every), "experts.3.": (0, every),
                   "0.mlp.up_proj.": (1e-38, slice(0, 2)), "0.self_attn.kv_b_proj.": (1e-8, slice(0, 1)),
                   "embed_tokens.": (1e-9, slice(7, 9))}  # fmt: skip
        for name, (factor, rows) in ((n, f) for n in list(tensors) for key, f in factors.items() if key in n):
            scaled = next(n for n in (name + "_scale_inv", name.removesuffix("packed") + "scale", name) if n in tensors)
            if name.endswith(("weight", "packed")):
                tensors[scaled] = shrink(tensors[scaled], factor, rows)

    tiny.rewrite(d, change)
    return d


@pytest.mark.by_turns("dtype", 4)
@pytest.mark.parametrize("dtype", ["f16", "f8", "q8", "q4"])
@pytest.mark.parametrize("source", ["v3-f32", "v3-bf16", "gigachat3-fp8", "kimi_k2-int4"])
def test_near_zero_groups_are_packed_and_counted(source: str, dtype: str, tmp_path: Path) -> None:
    d = near_zero_checkpoint(tmp_path / "hf", *source.split("-"))
    p = pack(d, tmp_path / "x", dtype)
    notes = [note for note in p.notes if "near-zero" in note]
    assert bool(notes) == ((source, dtype) != ("gigachat3-fp8", "f8")), notes  # codes and scales are kept
    quantised = {t.format for t in p.tensors if not t.exact} - {"f32"}
    formats = [note.rpartition(" are too small for ")[2].split(":")[0] for note in notes]
    assert len(formats) == len(set(formats)) and set(formats) <= quantised
    with packed.PackedFile(tmp_path / "x") as f:
        assert f.check() == []
    bound = {"bf16": 2.0**-8, "f16": 2.0**-11, "f8": 2.0**-4, "q8": 1 / 254, "q4": 1 / 5}.get(dtype, 6e-8)
    for name, want, got in both(d, tmp_path / "x"):
        limit = 1 / 5 if name == "mtp.head" else bound
        largest = np.abs(want).max() if "w_uk" in name or dtype == "f8" else np.abs(want).max(-1, keepdims=True)
        assert (np.abs(got - want) <= 1.01 * limit * largest + 2.0**-24).all(), name


def test_near_zero_groups_are_counted_by_format_and_tensor(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "moonlight", dtype="f32")
    down, values = "model.layers.1.mlp.shared_experts.down_proj.weight", np.full((70, 66), 0.5, "<f4")  # 3 groups a row
    values[4] = 1e-10
    values[5, :32] = -1e-7  # a few of the smallest steps
    values[6] = 0
    tiny.rewrite(d, lambda t: t.update({down: ("F32", values.shape, values.tobytes())}))
    for fmt, n in (("q8", 4), ("f16", 3)):
        note = f"{n} near-zero groups of layers.1.shared.w_down are too small for {fmt}: "
        assert pack(d, tmp_path / fmt, fmt).notes == [note + "stored in its smallest steps or as zeros"]
    assert pack(d, tmp_path / "f8", "f8").notes == pack(d, tmp_path / "f32", "f32").notes == []
    with packed.PackedFile(tmp_path / "q8") as f:
        got = f.unpack("layers.1.shared.w_down")
        data = ref_packed.PackedFile(tmp_path / "q8")
    bits = F.decode_scales("q8", data.raw("layers.1.shared.w_down"), 70, 66)
    codes = F.decode_codes("q8", data.raw("layers.1.shared.w_down"), 70, 66)
    assert not got[4].any() and not bits[4].any() and not codes[4].any()  # zero codes and zero scale
    assert np.abs(got[5, :32] - values[5, :32]).max() <= 2.0**-25 and bits[5, 0] == 1
    tiny.rewrite(d, lambda t: t.update({n: (k, s, (np.frombuffer(b, "<f4") * 1e-20).astype("<f4").tobytes())
                                   for n, (k, s, b) in t.items() if ".up_proj" in n}))  # fmt: skip
    notes = pack(d, tmp_path / "q8", "q8", force=True).notes
    interrupted(d, tmp_path / "x", 25)  # a resumed pack counts what was packed before as well
    assert pack(d, tmp_path / "x", "q8").notes[1:] == notes
    assert len(notes) == 1 and " near-zero groups of 6 tensors (layers.0.w_gate_up, ...) are too small" in notes[0]


# --- refusals -------------------------------------------------------------------------------------------------------


def poison(folder: Path, name: str, element: int, bits: bytes) -> None:
    def change(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[name]
        at = element * len(bits)
        tensors[name] = (dtype, shape, data[:at] + bits + data[at + len(bits) :])

    tiny.rewrite(folder, change)


@pytest.mark.parametrize(
    ("name", "element", "bits", "dtype", "message"),
    [
        (
            "model.layers.1.mlp.experts.3.down_proj.weight",
            33 * 5 + 7,
            b"\xc0\x7f",
            "source",
            r"value at \[5, 7\] is nan",
        ),
        ("model.layers.0.self_attn.kv_b_proj.weight", 34 * 30 + 1, b"\x80\xff", "f32", r"value at \[30, 1\] is -inf"),
        ("model.layers.2.input_layernorm.weight", 9, b"\xc0\x7f", "source", r"value at \[9\] is nan"),
        ("model.embed_tokens.weight", 70 * 298 + 69, b"\xc0\x7f", "q8", r"value at \[298, 69\] is nan"),
        ("lm_head.weight", 0, b"\x00\x48", "f16", r"value at \[0, 0\] is 131072, expected \|w\| <= 65504 for f16"),
        ("lm_head.weight", 70 * 8, b"\x00\x60", "q8", r"value at \[8, 0\] is 3.68935e\+19, expected one whose q8"),
        ("model.layers.1.mlp.gate.weight", 3, b"\x80\x7f", "q4", r"value at \[0, 3\] is inf, expected a finite number"),
    ],
)
def test_values_that_do_not_fit_refuse_by_name(
    name: str, element: int, bits: bytes, dtype: str, message: str, tmp_path: Path
) -> None:
    d = tiny.write(tmp_path / "hf", "moonlight")
    poison(d, name, element, bits)
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {name}: {message}"):
        pack(d, tmp_path / "x", dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # no target, nothing to resume


def test_bad_fp8_codes_and_scales_refuse_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"  # [136, 200], scales [2, 2]
    at = rf"{name}_scale_inv: scale at \[1, 0\] is "
    cases = [(name, 200 * 130 + 3, b"\xff", rf"{name}: value at \[130, 3\] is nan, expected a finite number")]
    cases += [(name + "_scale_inv", 2, b"\x00\x00\xc0\x7f", at + "nan, expected a finite")]
    cases += [(name + "_scale_inv", 2, b"\x00\x00\x80\xff", at + "-inf, expected a finite")]
    cases += [(name + "_scale_inv", 2, b"\x00\x00\x00\x7f", at + "1.70.*e.38, expected a finite number up to 7.6e.35")]
    for i, (tensor, element, bits, message) in enumerate(cases):
        d = tmp_path / str(i)
        shutil.copytree(checkpoints["gigachat3"], d)
        poison(d, tensor, element, bits)
        for dtype in ("source", "q8"):
            with pytest.raises(CheckpointError, match=message):
                pack(d, tmp_path / "x", dtype)


def test_bad_int4_scales_refuse_by_name(tmp_path: Path) -> None:
    d = tiny.write(tmp_path / "hf", "kimi_k2")
    name = "model.layers.2.mlp.experts.19.gate_proj.weight"  # [32, 96], scales [32, 3]
    poison(d, name + "_scale", 3 * 31 + 2, b"\x80\x7f")
    at = rf"{name}_packed: value at \[31, 64\] is "
    with pytest.raises(CheckpointError, match=at + r"-?(inf|nan), expected a finite number"):
        pack(d, tmp_path / "x")
    # 2^125: finite, but code -8 would give infinity
    tiny.rewrite(d, lambda t: t.update({name + "_packed": ("I32", (32, 12), bytes([0x99]) * (4 * 32 * 12))}))
    poison(d, name + "_scale", 3 * 31 + 2, b"\x00\x7e")
    with pytest.raises(CheckpointError, match=at + r"4.25353e\+37, expected one whose q4 scale fits its type"):
        pack(d, tmp_path / "x")
    poison(d, name + "_scale", 3 * 31 + 2, b"\xff\x7d")
    pack(d, tmp_path / "x")


def test_disk_problems_are_resource_errors(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = checkpoints["v3"]
    for dst, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "its folder does not exist"),
        (src / "config.json", "would overwrite a file of the checkpoint"),
        (Path("/proc/x.dcalm"), "cannot write the packed file"),
    ]:
        with pytest.raises(ResourceError, match=message):
            pack(src, dst, "q8")
    real = os.statvfs(tmp_path)
    few = os.statvfs_result([*real[:4], 1, *real[5:]])
    with monkeypatch.context() as m:
        m.setattr(os, "statvfs", lambda _path: few)
        with pytest.raises(ResourceError, match=r"\d+ bytes free, the packed file needs \d+"):
            pack(src, tmp_path / "x", "q8")
    assert list(tmp_path.iterdir()) == []

    calls, pwrite = iter(range(1 << 30)), os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if next(calls) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match=r"No space left on device; x.partial is kept: make room"):
            pack(src, tmp_path / "x", "q8")
    assert not (tmp_path / "x").exists()
    assert "resumed" in pack(src, tmp_path / "x", "q8").notes[0]
    pack(src, tmp_path / "y", "q8")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_an_existing_target_is_replaced_only_with_force(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src = checkpoints["moonlight"]
    (tmp_path / "x").write_text("precious")
    (tmp_path / "x").chmod(0o444)
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("x", "link", "dangling"):
        with pytest.raises(ResourceError, match=f"{name}: exists; add --force to replace it"):
            pack(src, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "x"]
    for name in ("dangling", "link"):  # the link is replaced, not what it points to
        pack(src, tmp_path / name, force=True)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "x").read_text() == "precious" and not (tmp_path / "nowhere").exists()
    pack(src, tmp_path / "x", force=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "link").read_bytes()


def test_a_target_that_appears_while_packing_stays(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src, dst = checkpoints["moonlight"], tmp_path / "x"
    with pytest.raises(ResourceError, match="x: exists; add --force"):
        pack(src, dst, progress=lambda *_: dst.exists() or dst.write_text("precious"))
    assert dst.read_text() == "precious"
    n = len(plan(src).tensors) + len(plan(src).files)
    assert pack(src, dst, force=True).notes[0].startswith(f"resumed: {n} of {n} tensors were packed already")
    with packed.PackedFile(dst) as f:
        assert f.check() == []


def hub_cache(folder: Path, src: Path, commit: str = "c0ffee" * 6) -> Path:
    """The checkpoint as huggingface_hub keeps it: links into a folder of blobs."""
    repo = folder / "models--some-org--Some.Model"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(sorted(src.iterdir())):
        shutil.copy(file, repo / "blobs" / str(i))
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{i}")
    return repo / "snapshots" / commit


def test_files_of_the_checkpoint_are_never_replaced(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src = hub_cache(tmp_path, checkpoints["moonlight"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "link").symlink_to(src / "config.json")
    (tmp_path / "folder").symlink_to(src)
    for dst in (src / "config.json", src / "model.safetensors", src.parents[1] / "blobs" / "0", tmp_path / "link",
                tmp_path / "folder" / "config.json"):  # fmt: skip
        for force in (False, True):
            with pytest.raises(ResourceError, match="would overwrite a file of the checkpoint itself"):
                pack(src, dst, force=force)
    assert before == {p: p.read_bytes() for p in before} and (src / "config.json").is_symlink()
    pack(src, src / "own.dcalm")
    pack(src, src / "own.dcalm", force=True)


def test_the_name_of_a_model_in_a_hub_cache_is_the_model_s(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    src = hub_cache(tmp_path, checkpoints["moonlight"])
    source = plan(src).source
    assert (source["name"], source["revision"]) == ("some-org/Some.Model", "c0ffee" * 6)
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme"))
    shutil.copytree(checkpoints["moonlight"], other)
    pack(other, tmp_path / "x.dcalm")
    with packed.PackedFile(tmp_path / "x.dcalm") as f:
        assert f.source["name"] == "na\\xffme" and "revision" not in f.source


def test_two_packs_of_one_target_do_not_mix(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(_done: int, _total: int) -> None:
        if not seen:
            with pytest.raises(ResourceError, match="another pack is writing this file") as error:
                pack(checkpoints["v3"], tmp_path / "x", "q8")
            seen.append(str(error.value))

    pack(checkpoints["v3"], tmp_path / "x", "q8", progress=progress)
    assert seen
    with packed.PackedFile(tmp_path / "x") as f:
        assert f.check() == []


@pytest.mark.parametrize("name", ["x.partial", "x.partial.journal"])
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "pipe"])
def test_a_link_in_the_way_is_not_followed(kind: str, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "hard":
        (tmp_path / name).hardlink_to(tmp_path / "victim")
    else:
        (tmp_path / name).symlink_to(tmp_path / ("victim" if kind == "symbolic" else "nowhere"))
    with pytest.raises(ResourceError, match=f"{name}: cannot write the packed file: this name is taken by a link or"):
        pack(checkpoints["v3"], tmp_path / "x", "q8")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "x").exists()
    (tmp_path / name).unlink()
    pack(checkpoints["v3"], tmp_path / "x", "q8")


def test_a_pack_that_ends_while_another_starts(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened DST.partial just before it got its name must not write into the finished file."""
    flock = PACK.fcntl.flock

    def late(fd: int, how: int) -> None:
        monkeypatch.undo()
        pack(checkpoints["v3"], tmp_path / "x", "q8", force=True)
        flock(fd, how)

    pack(checkpoints["v3"], tmp_path / "y", "q8")
    monkeypatch.setattr(PACK.fcntl, "flock", late)
    with pytest.raises(ResourceError, match="another pack is writing this file"):
        pack(checkpoints["v3"], tmp_path / "x", "q8", force=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from deepcalm.files import pack as module
pack, scale = module.pack, int(sys.argv[4])
module.SLAB_BYTES //= scale
module.LARGE_PAGE //= scale
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
pack(sys.argv[1], sys.argv[2], sys.argv[3])
print(before, peak())
"""


@pytest.mark.parametrize("scale", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", ["source", "f32", "q4"])
def test_memory_is_bounded_by_the_slabs(dtype: str, scale: int, tmp_path: Path) -> None:
    """Of a checkpoint whose embedding, head, and gate and up together have 100 MB each, or a quarter of all."""
    run = [sys.executable, "-c", MEASURE, str(large(tmp_path, scale)), str(tmp_path / "x"), dtype, str(scale)]
    before, peak = (int(n) for n in subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    fixed = 0 if scale == 1 else 4e6  # what is no smaller
    assert peak - before < fixed + 80e6 / scale, (before, peak)  # three slabs out, one in, one row of tiles; no tensor
    with packed.PackedFile(tmp_path / "x") as f:
        assert f.check() == []
    (tmp_path / "x").unlink()
    (tmp_path / "model.safetensors").unlink()


def large(folder: Path, scale: int) -> Path:
    """Repeated random bf16 values."""
    d = tiny.write(folder, "moonlight")
    config = json.loads((d / "config.json").read_text())
    config |= {"vocab_size": 24000 // scale, "hidden_size": 2048, "num_hidden_layers": 1}
    config |= {"intermediate_size": 12000 // scale}
    (d / "config.json").write_text(json.dumps(config))
    bits = F.bf16_bits(np.random.default_rng(0).standard_normal(1 << 20)).tobytes()
    tensors = {}
    for name, shape in tiny.tensor_shapes(config):
        n = 2 * int(np.prod(shape))
        tensors[name] = ("BF16", shape, (bits * (n // len(bits) + 1))[:n])
    tiny.write_safetensors(d / "model.safetensors", tensors)
    return d
