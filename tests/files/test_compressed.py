"""Checkpoints that others quantised: every scheme element by element, what packing keeps of it, and what it says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compressed
import models
import tiny
from compressed import SCHEMES
from deepcalm.check.verify import verify
from deepcalm.files.pack import pack, plan
from deepcalm.model import Model
from ref import checkpoint as ref_checkpoint
from ref import formats as F
from ref import model as ref_model
from ref import packed as ref_packed

Array = np.ndarray[Any, Any]
LAYER = "layers.1."
EXACT = {  # schemes whose codes and scales the format keeps
    name: fmt for name, (_, _, fmt) in SCHEMES.items() if fmt != "f32" and "nvfp4" not in name
}  # fmt: skip


@functools.cache
def folder_of(scheme: str) -> Path:
    return compressed.write(models.root() / f"compressed-{scheme.replace(' ', '-')}", scheme)


def values(scheme: str, dtype: str) -> tuple[dict[str, Array], dict[str, Array], ref_packed.PackedFile]:
    """(what the checkpoint says, what the packed file holds, the file) of every tensor, by the tests' own readers."""
    file = models.pack(folder_of(scheme), dtype=dtype)
    _, source = ref_model.load(folder_of(scheme))
    want, got = (
        {n: ref_model.matrix(w, n, e.shape) for n, e in file.entries.items() if e.kind in ("tiled", "plain")}
        for w in (source, ref_model.PackedWeights(file))
    )
    return want, got, file


@pytest.mark.parametrize("scheme", SCHEMES)
def test_f32_is_what_the_checkpoint_says(scheme: str) -> None:
    want, got, _ = values(scheme, "f32")
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_source_keeps_codes_and_scales_where_a_format_can(scheme: str) -> None:
    want, got, file = values(scheme, "source")
    experts = LAYER + "experts.w_down"
    assert file.entries[experts].format == SCHEMES[scheme][2]
    for name in (LAYER + "experts.w_down", LAYER + "experts.w_gate_up", LAYER + "wqkv_a", LAYER + "wo", LAYER + "w_uv"):
        if scheme in EXACT or file.entries[name].format == "f32":
            np.testing.assert_array_equal(got[name].astype(np.float32), want[name].astype(np.float32), err_msg=name)
    notes = {t.name: t.note for t in plan(folder_of(scheme)).tensors}
    assert notes[experts] == (
        "FP4 quantised again" if "nvfp4" in scheme else
        "scale blocks do not fit 16 x 32 tiles: f32" if scheme == "fp8 channel" else
        "int8 that is transposed or has f32 scales: f32" if scheme == "int8 channel, f32 scales" else
        notes[experts] if "fp8" in scheme else ""
    )  # fmt: skip
    p = plan(folder_of(scheme))
    assert p.dropped[0].why.startswith("activation scale")
    said = [note for note in p.notes if note.startswith("not as the source has them: ")]
    for why in {note for note in notes.values() if "again" in note or note.endswith(": f32")}:
        n = sum(note == why for note in notes.values())
        assert any(f" {n} tensors (layers.0." in note and f"...): {why}; choose by --dtype" in note for note in said)
    assert len(said) == len({n for n in notes.values() if n and not n.startswith("scale block ")})
    assert not any(note.startswith("not as") for note in plan(folder_of(scheme), "q8").notes)


def test_int8_that_reaches_minus_128_keeps_it() -> None:
    file = models.pack(folder_of("int8 channel"), dtype="source")
    e = file.entries[LAYER + "experts.w_down"]
    codes = [F.decode_codes("q8", data, *e.shape[-2:]) for data in file.raw(e.name).reshape(e.shape[0], -1)]
    assert min(c.min() for c in codes) == -128
    for isa in models.ISAS:  # whose products are all exact with it
        r = verify(file.path, folder_of("int8 channel"), legs=("arithmetic", "exactness"), tokens=16, isa=isa)
        assert r.ok, (isa, str(r.first_divergence))


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        pytest.param(s, d, marks=[pytest.mark.exhaustive] * ((i + j) % 2))
        for i, s in enumerate(SCHEMES) for j, d in enumerate(("source", "q8"))
    ] + [(s, d) for s in ("mxfp4", "nvfp4") for d in ("bf16", "q4")],
)  # fmt: skip
def test_verify_finds_every_scheme_right(scheme: str, dtype: str) -> None:
    folder = folder_of(scheme)
    r = verify(models.pack(folder, dtype=dtype).path, folder, legs=("weights", "arithmetic"), tokens=16)
    assert r.ok, str(r.first_divergence)


@pytest.mark.parametrize("scheme", ["int8 group 128", "mxfp4", "nvfp4", "fp8 channel"])
def test_logits_are_those_of_the_decoded_weights(scheme: str) -> None:
    s, source = ref_model.load(folder_of(scheme))
    ids = tiny.token_ids(s.vocab, 72, 1)
    run = models.Run(models.open_model(models.pack(folder_of(scheme), dtype="f32"), models.ISAS[0]), ids)
    logits, hidden = (oracle := ref_model.Model(s, source)).forward(ids)
    assert np.abs(run.logits - logits).max() <= 1e-4
    assert np.abs(run.mtp(64)[0] - oracle.mtp_forward(ids[1:], hidden[:-1])[0]).max() <= 1e-4


PLANTED: dict[str, tuple[str, str, Any]] = {  # mistake of a packer -> (scheme, tensor, what it made of its bytes)
    "nibbles swapped": ("mxfp4", "weight_packed", lambda b: (b << 4 | b >> 4).tobytes()),
    "groups of scales moved on": ("int8 group 32", "weight_scale", lambda b: np.roll(b, 2).tobytes()),
    "global scale twice as large": ("nvfp4", "weight_global_scale", lambda b: (2 * b.view(np.float32)).tobytes()),
    "offset of the codes forgotten": ("int8 group 128", "weight_packed", lambda b: (b ^ 128).tobytes()),
    "one scale of int4 for all": (
        "int4 group 64", "weight_scale", lambda b: np.repeat(b.view(np.uint16)[::2], 2).tobytes()),
    "exponents off by one": ("mxfp4", "weight_scale", lambda b: (b + 1).tobytes()),
}  # fmt: skip


@pytest.mark.by_turns("dtype", 2)
@pytest.mark.parametrize("mistake", PLANTED)
@pytest.mark.parametrize("dtype", ["source", "bf16"])
def test_planted_mistakes_are_named(mistake: str, dtype: str, tmp_path: Path) -> None:
    scheme, part, change = PLANTED[mistake]
    folder = compressed.write(tmp_path / "hf", scheme)
    name = f"model.layers.1.mlp.experts.2.down_proj.{part}"

    def wrong(tensors: dict[str, tiny.Stored]) -> None:
        kind, shape, data = tensors[name]
        tensors[name] = (kind, shape, change(np.frombuffer(data, np.uint8)))

    pack(tiny.rewrite(folder, wrong), tmp_path / "x", dtype)
    r = verify(tmp_path / "x", folder_of(scheme), legs=("weights",))
    assert {d.where for d in r.divergences} == {LAYER + "experts.w_down"} and r.divergences[0].index[0] == 2


@pytest.mark.parametrize("scheme", ["int8 channel", "mxfp4", "fp8 tensor"])
def test_drafts_do_not_change_the_text(scheme: str) -> None:
    model = Model(models.pack(folder_of(scheme), dtype="source").path, threads=1)
    texts, drafted = [], 0
    for draft in (0, 1, 3):
        session = model.session(ctx=128)
        session.prefill(tiny.token_ids(session.model.config["vocab_size"], 20, 3))
        texts.append(list(session.generate(max_tokens=60, draft=draft)))
        drafted += session.stats.drafts_offered
    assert texts[0] == texts[1] == texts[2] and drafted > 60


def test_scales_that_f16_cannot_hold_are_quantised_again_and_counted(tmp_path: Path) -> None:
    folder = compressed.write(tmp_path / "hf", "int8 channel")
    name = "model.layers.1.mlp.experts.2.down_proj.weight_scale"

    def small(tensors: dict[str, tiny.Stored]) -> None:
        kind, shape, data = tensors[name]
        bits = np.frombuffer(data, "<u2").copy()
        bits[3:5] = tiny.bf16_bits(np.array([1.2e-9, 9.5e-7]))  # below f16, and where f16 is coarse
        tensors[name] = (kind, shape, bits.tobytes())

    tiny.rewrite(folder, small)
    notes = pack(folder, tmp_path / "x").notes
    assert "near-zero groups of layers.1.experts.w_down" in notes[-1]
    source = ref_model.matrix(ref_model.load(folder)[1], LAYER + "experts.w_down", (8, 128, 128))[2]
    found = ref_packed.PackedFile(tmp_path / "x").matrix(LAYER + "experts.w_down")[2]
    rest = [i for i in range(128) if i not in (3, 4)]
    np.testing.assert_array_equal(found[rest], source[rest])
    assert (np.abs(found[3] - source[3]) <= 2.0**-25).all()  # half the smallest step
    assert (np.abs(found[4] - source[4]) <= 5e-7).all() and (found[4] != source[4]).any()


@pytest.mark.parametrize(
    ("scheme", "part", "value", "message"),
    [
        ("mxfp4", "weight_scale", b"\xff", r"weight_scale: scale at \[0, 0\] is inf, expected a finite number"),
        ("nvfp4", "weight_scale", b"\x7f", r"weight_scale: scale at \[0, 0\] is nan"),
        ("nvfp4", "weight_global_scale", bytes(4), r"weight_scale: scale at \[0, 0\] is inf"),
        ("int8 channel", "weight_scale", b"\x80\x7f", r"weight_scale: scale at \[0, 0\] is inf"),
        ("modelopt fp8", "weight_scale", b"\x00\x00\xc0\x7f", r"weight_scale: scale at \[\] is nan"),
        ("int8 channel", "weight_scale", b"\x80\x47", r"up_proj\.weight: value at \[0, \d+\] is .*for q8"),
    ],
)  # fmt: skip
def test_scales_that_are_no_numbers_are_refused(
    scheme: str, part: str, value: bytes, message: str, tmp_path: Path
) -> None:
    folder = compressed.write(tmp_path / "hf", scheme)
    name = f"model.layers.1.mlp.experts.2.up_proj.{part}"

    def change(tensors: dict[str, tiny.Stored]) -> None:
        kind, shape, data = tensors[name]
        tensors[name] = (kind, shape, value + data[len(value) :])

    with pytest.raises(Exception, match=message) as e:
        pack(tiny.rewrite(folder, change), tmp_path / "x")
    assert type(e.value).__name__ == "CheckpointError"


@pytest.mark.reference
@pytest.mark.parametrize("scheme", [s for s, (config, _, _) in SCHEMES.items() if "config_groups" in config])
def test_compressed_tensors_reads_the_same(scheme: str) -> None:
    """Its own decompression in float32, module by module, against the decoder of these tests."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra `reference`)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from safetensors.torch import load_file

    config = SCHEMES[scheme][0]
    group = config["config_groups"]["group_0"]
    args = QuantizationScheme(targets=["Linear"], weights=group["weights"], format=config["format"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored = load_file(folder_of(scheme) / "model.safetensors")
    _, ours = ref_checkpoint.load(folder_of(scheme))
    n = 0
    names = [n for n in ours if n.endswith("_proj.weight") or n.endswith("_mqa.weight")]
    for name in [n for n in names if ".experts.3." in n or ".self_attn.kv" in n]:
        base = name.removesuffix("weight")
        state = {key.removeprefix(base): t for key, t in stored.items() if key.startswith(base + "weight")}
        wide = {key: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for key, t in state.items()}
        theirs = compressor.decompress(wide, args)["weight"]
        if "fp4" in scheme:  # which it decodes in bf16: the same again in float32
            assert np.abs(theirs.float().numpy() - ours[name]).max() <= 2.0**-7 * np.abs(ours[name]).max(), name
            packed = state["weight_packed"]
            codes = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
            scale = compressor._decompress_scale(state["weight_scale"], torch.float32)
            whole = state.get("weight_global_scale")
            theirs = dequantize(codes, scale, args=args.weights, dtype=torch.float32, global_scale=whole)
        np.testing.assert_array_equal(theirs.numpy(), ours[name], err_msg=name)
        n += 1
    assert n > 8
