"""Reading packed files: natural shapes, the runtime's table, checksums, inspect, and hostile headers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from deepcalm import _core
from deepcalm.errors import PackedFileError
from deepcalm.files import inspect, packed
from deepcalm.files.pack import pack
from deepcalm.files.safetensors import parse_json
from deepcalm.model import Model
from ref import checkpoint as ref_checkpoint
from ref import packed as ref_packed

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.sanitize


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed files: every source dtype and target."""
    base = tmp_path_factory.mktemp("packed")
    out = {}
    for preset, dtype in [
        ("v3", "q4"),
        ("gigachat3", "source"),
        ("kimi_k2", "source"),
        ("v2_lite", "f32"),
        ("moonlight", "q8"),
    ]:
        src = tiny.write(base / f"{preset}-hf", preset)
        out[preset] = base / f"{preset}.dcalm"
        pack(src, out[preset], dtype)
    return out


# --- contents -------------------------------------------------------------------------------------------------------


def test_unpack_gives_natural_shapes(files: dict[str, Path]) -> None:
    raw = ref_checkpoint.load(files["v2_lite"].parent / "v2_lite-hf")[1]
    p = "model.layers.1."
    gate, up = (raw[f"{p}mlp.shared_experts.{k}_proj.weight"] for k in ("gate", "up"))
    with packed.PackedFile(files["v2_lite"]) as f:
        np.testing.assert_array_equal(f.unpack("layers.1.shared.w_gate_up"), np.concatenate([gate, up]))
        np.testing.assert_array_equal(f.unpack("layers.1.attn_norm"), raw[p + "input_layernorm.weight"])
        np.testing.assert_array_equal(f.unpack("embed"), raw["model.embed_tokens.weight"])
        np.testing.assert_array_equal(f.unpack("layers.1.router"), raw[p + "mlp.gate.weight"])
        down = np.stack([raw[f"{p}mlp.experts.{e}.down_proj.weight"] for e in range(10)])
        np.testing.assert_array_equal(f.unpack("layers.1.experts.w_down"), down)
        np.testing.assert_array_equal(f.unpack("layers.1.experts.w_down", 7), down[7])
        np.testing.assert_array_equal(packed.PackedFile(files["v2_lite"]).unpack("layers.1.experts.w_down", 7), down[7])
        assert f.unpack("layers.1.experts.w_gate_up").shape == (10, 70, 78)
        kv_b = raw[p + "self_attn.kv_b_proj.weight"].reshape(3, 20 + 18, 36)
        np.testing.assert_array_equal(f.unpack("layers.1.w_uk"), kv_b[:, :20].transpose(0, 2, 1))
        np.testing.assert_array_equal(f.unpack("layers.1.w_uv"), kv_b[:, 20:])
        q = raw[p + "self_attn.q_proj.weight"].reshape(3, 32, 78)
        order = [*range(20), *range(20, 32, 2), *range(21, 32, 2)]  # rotary pairs de-interleaved
        kv_a = raw[p + "self_attn.kv_a_proj_with_mqa.weight"]
        order_a = [*range(36), *range(36, 48, 2), *range(37, 48, 2)]
        want = np.concatenate([q[:, order].reshape(96, 78), kv_a[order_a]])
        np.testing.assert_array_equal(f.unpack("layers.1.wqkv_a"), want)
        for name, slice_, message in [
            ("nope", None, "no tensor 'nope'"),
            ("layers.1.wo", 0, r"no slice 0, its shape is \[78, 54\]"),
            ("layers.1.experts.w_down", 10, "no slice 10"),
            ("file.tokenizer.json", None, "stored file"),
        ]:
            with pytest.raises(PackedFileError, match=message):
                f.unpack(name, slice_)


@pytest.mark.parametrize("preset", ["v3", "gigachat3", "kimi_k2", "moonlight"])
def test_unpack_agrees_with_the_independent_decoder(preset: str, files: dict[str, Path]) -> None:
    want = ref_packed.PackedFile(files[preset])
    with packed.PackedFile(files[preset]) as f:
        for name, e in f.entries.items():
            if e.kind == "tiled":
                natural = want.matrix(name)[..., np.concatenate(want.part_rows(name)), :]
                np.testing.assert_array_equal(f.unpack(name), natural.astype(np.float32), err_msg=name)
            elif e.kind != "file":
                np.testing.assert_array_equal(f.unpack(name), want.plain(name), err_msg=name)


def test_tensor_table_is_what_the_runtime_takes(files: dict[str, Path]) -> None:
    for preset, path in files.items():
        with packed.PackedFile(path) as f:
            table = {t["name"]: t for t in f.tensor_table()}
            specs = {t["name"]: t for t in _core.expected_tensors(f.config)}
            assert set(specs) <= set(table) and not any(name.startswith("file.") for name in table)
            for name, spec in specs.items():
                t = table[name]
                assert (t["n_slices"], t["rows"], t["cols"]) == (spec["n_slices"], spec["rows"], spec["cols"])
                assert t["offset"] % 64 == 0 and t["offset"] + t["bytes"] <= path.stat().st_size
                if t["format"] == "f8" and t["kind"] == "tiled":
                    s = table[name + ".scale"]
                    assert s["bytes"] == 4 * s["n_slices"] * s["rows"] * s["cols"]
                    assert (s["n_slices"], s["rows"]) == (t["n_slices"], -(-t["rows"] // t["scale_rows"]))
            model = _core.Model(str(path), f.fileno(), f.config, f.tensor_table(), None, 1)
            session = _core.Session(model, 16, "f16", 4)
            logits = session.forward(np.array([1, 2, 3], np.int32), "last")
            assert logits.shape == (1, f.config["vocab_size"]) and np.isfinite(logits).all(), preset


@pytest.mark.parametrize("replacement", [None, "shorter", "kimi_k2"])
def test_what_is_mapped_is_what_was_checked(
    replacement: str | None, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path names another file, or none, by the time that the checked one is mapped."""
    path, table = tmp_path / "m.dcalm", packed.PackedFile.tensor_table
    want = Model(files["gigachat3"], threads=1).session().prefill([1, 2, 3])
    path.write_bytes(files["gigachat3"].read_bytes())

    def replaced(file: packed.PackedFile) -> list[dict[str, Any]]:
        path.unlink()
        if replacement is not None:
            path.write_bytes(files[replacement].read_bytes() if replacement in files else b"not a model")
        return table(file)

    monkeypatch.setattr(packed.PackedFile, "tensor_table", replaced)
    model = Model(path, threads=1)
    assert (model.session().prefill([1, 2, 3]) == want).all()
    assert 0 <= model.cold_share() <= 1 and model.file_bytes == files["gigachat3"].stat().st_size


def test_descriptors_that_cannot_be_mapped_are_refused(files: dict[str, Path]) -> None:
    with packed.PackedFile(files["gigachat3"]) as f:
        config, table = f.config, f.tensor_table()
    with Path(os.devnull).open("rb") as device:
        for fd, why in (-1, "cannot be kept open: Bad file"), (device.fileno(), "not a regular, non-empty file"):
            with pytest.raises(PackedFileError, match=rf"^m\.dcalm: {why}"):
                _core.Model("m.dcalm", fd, config, table)


def test_places_are_checked_again_where_bytes_are_used(files: dict[str, Path], tmp_path: Path) -> None:
    """Whatever has read the table: the core reads nothing that does not lie in the file."""
    blob, cut = files["gigachat3"].read_bytes(), tmp_path / "cut"
    with packed.PackedFile(files["gigachat3"]) as f:
        config, table = f.config, f.tensor_table()
    last = max(table, key=lambda row: row["offset"])
    cut.write_bytes(blob[: last["offset"] + last["bytes"] - 1])
    inside, beyond = len(blob) // 64 * 64, "lie beyond the file's"
    for path, change, why in (
        (cut, {}, beyond), (files["gigachat3"], {"offset": inside}, beyond), (cut, {"offset": 2**62}, beyond),
        (cut, {"offset": 2**63 - 64}, beyond), (cut, {"offset": -64}, "is not a multiple"),
        (cut, {"offset": last["offset"] + 1}, "is not a multiple"), (cut, {"bytes": last["bytes"] - 1}, "expected"),
    ):  # fmt: skip
        rows = [row | change if row is last else row for row in table]
        with path.open("rb") as file, pytest.raises(PackedFileError, match=rf"{last['name']}: .*{why}"):
            _core.Model(str(path), file.fileno(), config, rows)


def test_check_finds_every_changed_byte(files: dict[str, Path], tmp_path: Path) -> None:
    blob = bytearray(files["gigachat3"].read_bytes())
    path = tmp_path / "x"
    with packed.PackedFile(files["gigachat3"]) as f:
        assert f.check() == []
        entries = f.entries
        padded = next(e for e in entries.values() if e.nbytes % 64)
    places = {
        entries[n].offset + entries[n].nbytes - 1: n
        for n in ("embed", "layers.0.wo", "layers.0.wo.scale", "file.tokenizer.json")
    }
    places[padded.offset + padded.nbytes] = padded.name  # padding
    for at, name in places.items():
        blob[at] ^= 1
        path.write_bytes(blob)
        steps: list[tuple[int, int]] = []
        with packed.PackedFile(path) as f:
            assert f.check(lambda done, total, s=steps: s.append((done, total))) == [name]
        assert steps == sorted(steps) and steps[-1][0] <= steps[-1][1]
        blob[at] ^= 1


def test_check_names_nan_codes_under_a_right_checksum(files: dict[str, Path], tmp_path: Path) -> None:
    """No packer writes them; every reader takes them for the same numbers (docs/format.md 2)."""
    header, data = parts_of(files["gigachat3"])
    with packed.PackedFile(files["gigachat3"]) as f:
        e = f.entries["layers.0.wo"]
        begin = e.offset - f.data_offset
    blob = bytearray(data)
    blob[begin : begin + 2] = b"\x7f\xff"
    changed = hashlib.sha256(blob[begin : begin + e.nbytes]).hexdigest()
    text = header["__metadata__"]["tensors"].replace(e.sha256, changed)
    path = write(tmp_path / "x", header | {"__metadata__": header["__metadata__"] | {"tensors": text}}, bytes(blob))
    with packed.PackedFile(path) as f:
        assert f.check() == ["layers.0.wo"]
        scale = f.unpack("layers.0.wo.scale").ravel()[0]
        assert list(f.unpack("layers.0.wo")[0, :2]) == [np.float32(480) * scale, np.float32(-480) * scale]


def test_inspect_describes_the_file(files: dict[str, Path]) -> None:
    for path in files.values():
        d = inspect.describe(path)
        json.dumps(d)
        assert d["file_bytes"] == path.stat().st_size
        with packed.PackedFile(path) as f:
            assert len(d["tensors"]) + len(d["files"]) == len(f.entries)
            assert d["header_sha256"] == f.header_sha256
            by_hand = 0
            for e in f.entries.values():
                n = e.nbytes + (e.scales.nbytes if e.scales else 0)
                if e.kind not in ("tiled", "plain") or e.name.startswith("mtp."):
                    continue
                if e.role == "expert":
                    n = n * f.config["num_experts_per_tok"] // f.config["n_routed_experts"]
                by_hand += n // f.config["vocab_size"] if e.role == "embed" else n
        assert d["active_bytes_per_token"] == by_hand
        assert sum(d["formats"].values()) == sum(d["roles"].values()) == d["weight_bytes"]


# --- hostile files --------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    blob = path.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + n]), blob[8 + n :]


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(PackedFileError, match=message) as e:
        packed.PackedFile(path).close()
    assert "\n" not in str(e.value) and str(e.value).startswith(str(path))


def edited(src: Path, dst: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]) -> Path:
    """A copy whose header, tensor table and config were changed by ``change(header, table, config)``."""
    header, data = parts_of(src)
    meta = header["__metadata__"]
    table, config = json.loads(meta["tensors"]), json.loads(meta["config"])
    change(header, table, config)
    if "__metadata__" in header:
        header["__metadata__"] |= {k: json.dumps(v) for k, v in (("tensors", table), ("config", config)) if k in meta}
    return write(dst, header, data)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "gguf", "a safetensors file, but not a packed deepcalm model"),
        ("format", None, "a safetensors file, but not a packed deepcalm model"),
        ("format_version", "2", "format_version '2', this build reads 1"),
        ("format_version", None, "format_version None"),
        ("source", None, "__metadata__ has no source"),
        ("source", "[]", "metadata source: expected a JSON object"),
        ("source", "{", "metadata source: not valid JSON"),
        ("source", '{"a": 1e999}', "metadata source: not valid JSON: 1e999 is not JSON"),
        ("dropped", "{}", "metadata dropped: expected a JSON list"),
        ("dropped", "[1]", "metadata dropped: expected objects with name, why and bytes"),
        ("dropped", '[{"name": "a", "why": "b", "bytes": "c"}]', "metadata dropped: expected objects"),
    ],
)
def test_metadata_refusals(key: str, value: str | None, message: str, files: dict[str, Path], tmp_path: Path) -> None:
    header, data = parts_of(files["moonlight"])
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    refused(write(tmp_path / "x", header, data), message)


WO = "layers.0.wo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _h, t, _c: t.pop(WO), f"tensor {WO}: is missing"),
        (lambda h, _t, _c: h.pop(WO), "leaves a hole before it"),
        (lambda _h, t, _c: t.update({WO: 3}), f"tensor {WO}: its table entry is not an object"),
        (lambda _h, t, _c: t.update(extra=t[WO]), "tensor 'extra' is not part of this model"),
        (lambda h, _t, _c: h.update({"extra": h.pop("head")}), "tensor 'head' is missing"),
        (
            lambda _h, t, _c: t[WO].update(format="q9"),
            f"tensor {WO}: format 'q9' with 'f16' scales, expected one of f32, bf16",
        ),
        (lambda _h, t, _c: t[WO].update(format=[]), r"format \[\] with"),
        (lambda _h, t, _c: t[WO].update(scale="bf16"), "format 'q8' with 'bf16' scales"),
        (lambda _h, t, _c: t[WO].update(format="f8", scale="f32"), "scale_block None, expected multiples of 16 and 32"),
        (lambda _h, t, _c: t[WO].update(format="f8", scale="f32", scale_block=[128, 100]), r"scale_block \[128, 100\]"),
        (lambda _h, t, _c: t[WO].update(format="f8", scale="f32", scale_block=[0, 128]), r"scale_block \[0, 128\]"),
        (lambda _h, t, _c: t[WO].update(format="f8", scale="f32", scale_block=[16, 1 << 40]), "scale_block"),
        (
            lambda _h, t, _c: t[WO].update(format="f8", scale="f32", scale_block=[16, 32]),
            f"tensor '{WO}.scale' is missing",
        ),
        (lambda _h, t, _c: t[WO].update(format="bf16", scale=""), "'bytes' is .*, expected"),
        (
            lambda _h, t, _c: t["layers.1.router"].update(format="q8", scale="f16"),
            "tensor layers.1.router: format 'q8' with 'f16' scales, expected one of f32",
        ),
        (lambda _h, t, _c: t["embed"].update(format="q8", scale="f16"), "tensor embed: format 'q8'"),
        (lambda _h, t, _c: t["embed"].update(scale="f16"), "tensor embed: format 'bf16' with 'f16' scales"),
        (lambda _h, t, _c: t[WO].update(kind="plain"), f"tensor '{WO}': 'kind' is 'plain', expected 'tiled'"),
        (lambda _h, t, _c: t[WO].update(shape=[70, 45]), r"'shape' is \[70, 45\], expected \[70, 44\]"),
        (lambda _h, t, _c: t[WO].update(shape=[70.0, 44]), None),
        (lambda _h, t, _c: t[WO].update(parts=[70]), r"'parts' is \[70\], expected None"),
        (lambda _h, t, _c: t[WO].update(bytes=True), "'bytes' is True"),
        (lambda _h, t, _c: t[WO].update(bytes=1 << 70), "'bytes' is 1180591620717411303424"),
        (lambda _h, t, _c: t[WO].update(surprise=1), "'surprise' is 1, expected None"),
        (lambda _h, t, _c: t[WO].update(sha256="0" * 63), "sha256 is .*, expected 64 hexadecimal digits"),
        (lambda _h, t, _c: t[WO].update(sha256="G" * 64), "sha256 is .*, expected 64 hexadecimal digits"),
        (lambda _h, t, _c: t[WO].update(source_dtype="\x1b[31m"), r"source_dtype '\\x1b\[31m', expected a name"),
        (lambda _h, t, _c: t["file.tokenizer.json"].update(kind="tiled"), "'kind' is 'tiled', expected 'file'"),
        (lambda _h, t, _c: t["file.tokenizer.json"].update(shape=[-5]), "expected"),
        (lambda _h, t, _c: t["file.tokenizer.json"].update(shape=[1 << 60]), "expected"),
        (lambda _h, t, _c: t["file.tokenizer.json"].update(shape=["x"]), "is not part of this model"),
        (lambda h, _t, _c: h[WO].update(dtype="I8"), f"tensor '{WO}': I8 .* bytes in the container, expected U8"),
        (lambda _h, _t, c: c.update(hidden_size=1 << 20), "x: config: hidden_size is 1048576"),
        (lambda _h, _t, c: c.update(num_hidden_layers=4), r"tensor layers\.3\.attn_norm: is missing"),
        (lambda _h, _t, c: c.update(kv_lora_rank=35), "expected"),
        (lambda _h, _t, c: c.pop("vocab_size"), "config: vocab_size is missing"),
        (lambda _h, _t, c: c.update(rope_layout="pairs"), "config: rope_layout is 'pairs', expected one of half"),
        (lambda _h, _t, c: c.update(eos_token_ids=[299]), r"eos_token_ids is \[299\], expected ids in 0\.\.298"),
        (lambda _h, _t, c: c.update(bos_token_id="1"), "bos_token_id is '1'"),
        (lambda _h, _t, c: c.update(eos_token_ids=7), "eos_token_ids is 7"),
        (lambda _h, _t, c: c.update(num_nextn_predict_layers=1), r"tensor mtp\.enorm: is missing"),
    ],
)
def test_table_and_config_refusals(change: Any, message: str | None, files: dict[str, Path], tmp_path: Path) -> None:
    path = edited(files["moonlight"], tmp_path / "x", change)
    if message is None:  # 70.0 == 70: the same number
        packed.PackedFile(path).close()
    else:
        refused(path, message)


def test_fp8_scale_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    def scale(_h: dict[str, Any], t: dict[str, Any], _c: dict[str, Any]) -> None:
        t[WO + ".scale"]["shape"] = [1, 1, 1]

    refused(edited(files["gigachat3"], tmp_path / "x", scale), r"'shape' is \[1, 1, 1\], expected \[1, 2, 3\]")

    def block(_h: dict[str, Any], t: dict[str, Any], _c: dict[str, Any]) -> None:
        t[WO]["scale_block"] = [64, 128]

    refused(edited(files["gigachat3"], tmp_path / "x", block), "'shape' is .*, expected")


def test_container_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    blob = files["moonlight"].read_bytes()
    n = int.from_bytes(blob[:8], "little")
    path = tmp_path / "x"
    for data, message in [
        (b"", "0 bytes, expected a safetensors file"),
        (blob[:-1], "truncated or damaged"),
        (blob[: 8 + n], "truncated or damaged"),
        (blob + b"\0", "bytes after the last tensor"),
        (
            (n + 1).to_bytes(8, "little") + blob[8 : 8 + n] + b" " + blob[8 + n :],
            "data start at byte .*, expected a multiple of 64",
        ),
        (blob[:8] + b"[" + blob[9:], "header starts with"),
        (b"GGUF" + blob, "a GGUF file, which is not read; pack the Hugging Face checkpoint"),
    ]:
        path.write_bytes(data)
        refused(path, message)
    path.unlink()
    refused(path, "cannot open: No such file")
    os.mkfifo(path)
    refused(path, "not a regular file")
    refused(tmp_path, "not a regular file")


def test_json_from_files() -> None:
    """Strict where a packed file is read; what Python writes and transformers reads in a checkpoint."""
    for text in (b"NaN", b"-Infinity", b"1e999", b"[-1e400]", b"\xef\xbb\xbf1"):
        with pytest.raises(PackedFileError, match=r"^f: not valid JSON"):
            parse_json(text, "f", PackedFileError)
        json.dumps(parse_json(text, "f", PackedFileError, lenient=True))
    assert parse_json(b"[1.5, 1e300, 12345678901234567890]", "f", PackedFileError)[2] == 12345678901234567890
    keys = ",".join(f'"k{i}":0' for i in range(200_000))  # quadratic, this takes minutes
    with pytest.raises(PackedFileError, match="key 'k199999' appears twice"):
        parse_json(f'{{{keys},"k199999":1}}'.encode(), "f", PackedFileError, lenient=True)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files_read_or_refuse(
    data: st.DataObject, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    blob = bytearray(files[data.draw(st.sampled_from(sorted(files)))].read_bytes())
    n = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, n - 1))
        blob[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("m") / "x"
    path.write_bytes(blob[: data.draw(st.sampled_from([len(blob), len(blob) - 64, n]))])
    opened(path)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([[], {}, "", "f8", "q4", "f16", "plain", [16, 32], [1, 1, 1], 0.5])
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_tables_read_or_refuse(
    data: st.DataObject, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def change(header: dict[str, Any], table: dict[str, Any], config: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            target = data.draw(st.sampled_from(["header", "table", "config"]))
            if target == "config":
                config[data.draw(st.sampled_from(sorted(config)))] = data.draw(VALUES)
                continue
            holder = header if target == "header" else table
            name = data.draw(st.sampled_from(sorted(set(holder) - {"__metadata__"})))
            if isinstance(holder[name], dict):
                holder[name][data.draw(st.sampled_from([*sorted(holder[name]), "scale_block"]))] = data.draw(VALUES)

    src = files[data.draw(st.sampled_from(["gigachat3", "kimi_k2"]))]
    opened(edited(src, tmp_path_factory.mktemp("t") / "x", change))


def opened(path: Path) -> None:
    """The file is refused with one line, or everything in it can be used."""
    try:
        with packed.PackedFile(path) as f:
            f.check()
            table = f.tensor_table()
            for name, e in f.entries.items():
                if e.kind != "file":
                    f.unpack(name)
            _core.Model(str(path), f.fileno(), f.config, table, None, 1)
    except PackedFileError as e:
        assert "\n" not in str(e)
