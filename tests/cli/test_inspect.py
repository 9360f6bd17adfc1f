"""``deepcalm inspect``: one screen, the same before and after packing, figures that hold against the runtime."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import commands
import deepcalm
import models
import tiny
from deepcalm import _core, cli, limits
from deepcalm.measure import synthetic

Show = Callable[..., str]


@pytest.fixture
def show(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Show:
    """What `inspect ARGS` prints, `columns` wide; a machine that reads 10 GB/s with 4 threads and has enough memory."""
    monkeypatch.setattr(_core, "read_bandwidth", lambda threads: 2.5 * threads)
    monkeypatch.setattr(limits, "default_threads", lambda: 4)
    monkeypatch.setattr(limits, "available_memory", lambda: 10**15)

    def call(*args: str | Path, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        code = cli.main(["inspect", *(str(a) for a in args)])
        out, err = capsysbinary.readouterr()
        assert (code, err) == (0, b"")
        return out.decode()

    return call


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in q4: a header of 61 layers, and a hole where the weights would be."""
    path = tmp_path_factory.mktemp("inspect") / "v3.dcalm"
    synthetic.write_model(path, "v3", "q4", sparse=True)
    return path


def test_inspect_fits_on_one_screen(show: Show, v3: Path) -> None:
    # A line is the prompt's; the longest paths are the user's own.
    for source in (None, v3, models.checkpoint(dtype="f32"), models.packed("v2_lite")):
        for columns in (80, 40):
            text = show(*([source] if source else []), columns=columns)
            first, *lines = text.splitlines()
            assert first == str(source or deepcalm.demo_path())
            assert max(map(len, lines)) <= columns and "\x1b" not in text
            assert columns < 80 or len(lines) + 1 <= 23, text


def test_inspect_shows_what_decides(show: Show, v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {line[:14].strip(): line[14:] for line in show(v3, columns=200).splitlines()[1:]}
    assert lines["model"] == "deepseek_v3, 61 layers, 128 heads, 8 of 256 experts a token, 1 shared"
    assert lines["parameters"] == "671.03 G, 36.63 G of them for a token; 11.61 G more in the MTP layer"
    assert lines["cache, f16"].split() == ["a", "token", "163,840", "tokens;", "instruction", "set", models.model().isa]
    monkeypatch.setenv("DEEPCALM_ISA", "amx")
    assert "\ncache, bf16 " in show(v3) and "instruction set amx\n" in show(v3)
    assert lines["MLA, its own"].split() == ["70.27", "kB", "11.51", "GB", "1.00x"]
    assert lines["as MHA"].split() == ["5.00", "MB", "818.73", "GB", "71.11x"]
    info = json.loads(show(v3, "--json"))
    step, full = info["active_bytes_per_token"], 163840 * info["cache"]["MLA"]
    assert lines["speed"].startswith(f"at most {1e10 / step:.3g} tok/s, {1e10 / (step + full):.3g} with a full cache")
    assert "an upper bound, 10.0 GB/s that 4 threads read" in lines["speed"] and "caches" not in lines["speed"]


def test_inspect_bounds_speed_by_the_disk_where_memory_is_short(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "more where weights stay in the processor's caches" in " ".join(show().split())
    monkeypatch.setattr(limits, "available_memory", lambda: 10**7)
    assert "that of the disk: the weights do not fit into the 10.00 MB of memory available" in " ".join(show().split())


@pytest.mark.parametrize("preset", ["v2_lite", "v3"])
def test_inspect_says_the_same_of_a_checkpoint_before_it_is_packed(show: Show, preset: str) -> None:
    folder, packed = models.checkpoint(preset, "f32"), models.packed(preset)
    before, after = (json.loads(show(p, "--json")) for p in (folder, packed))
    assert (before["packed"], after["packed"]) == (False, True)
    size = after.pop("file_bytes") - before.pop("file_bytes")
    assert size == deepcalm.files.packed.PackedFile(packed).data_offset, "the header, which is not made yet"
    for info in (before, after):
        for key in ("file", "packed", "header_sha256"):
            info.pop(key)
        for tensor in info["tensors"]:
            tensor.pop("sha256")
    assert before == after
    screens = [re.sub(r"(?m)^(file .*|/.*)\n", "", show(p, columns=200)) for p in (folder, packed)]
    assert screens[0] == screens[1]


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_inspect_counts_the_parameters_of_the_checkpoint(show: Show, preset: str) -> None:
    info = json.loads(show(models.packed(preset), "--json"))
    config, found = tiny.PRESETS[preset].config, info["parameters"]
    sizes = {name: math.prod(shape) for name, shape in tiny.tensor_shapes(config)}
    sizes.pop("model.layers.0.post_mlp_layernorm.weight", None)  # of a dense layer: nothing reads it
    mtp = f"model.layers.{config['num_hidden_layers']}."
    assert found["mtp"] == sum(n for name, n in sizes.items() if name.startswith(mtp))
    assert found["total"] + found["mtp"] == sum(sizes.values())
    k, experts = config["num_experts_per_tok"], config["n_routed_experts"] or 1
    unused = 0 if config["tie_word_embeddings"] else config["vocab_size"] - 1  # rows of the embedding
    routed = sum(n for name, n in sizes.items() if ".experts." in name and not name.startswith(mtp))
    assert found["routed"] == routed * k // experts
    assert found["active"] == found["total"] - routed + found["routed"] - unused * config["hidden_size"]


def test_inspect_counts_the_cache_of_a_session(show: Show) -> None:
    session, cache = deepcalm.Model(deepcalm.demo_path()).session(ctx=10), json.loads(show("--json"))["cache"]
    assert session.cache_bytes * 6 == 7 * 10 * cache["MLA"], "six main layers, and the MTP layer"


def test_inspect_lists_tensors_when_asked(show: Show) -> None:
    path = models.packed()
    assert "layers.1.experts.w_down" not in show(path)
    text = show(path, "--tensors", "--check")
    assert re.search(r"^kv_lora_rank +42$", text, re.M)
    assert re.search(r"^layers\.1\.experts\.w_down +f32 +24x76x38 +[\d.]+ kB +from F32$", text, re.M)
    assert re.search(r"^dropped +model\.layers\.3\.\S+: ", text, re.M)
    assert text.endswith("checksums     all right\n") and show(path) in text.replace("checksums     all right\n", "")


def test_inspect_checks_and_dumps_packed_files_only(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--check"], ["--dump", "embed", "x.npy"]):
        assert cli.main(["inspect", str(models.checkpoint(dtype="f32")), *option]) == 1
        assert "is a directory, and --check and --dump read a packed file" in capsys.readouterr().err


def test_inspect_in_a_pipe_is_plain_text() -> None:
    code, out, err = commands.run("inspect", models.packed(), env={"FORCE_COLOR": "1"})
    assert (code, err) == (0, "") and b"\x1b" not in out and max(map(len, out.splitlines()[1:])) <= 80
