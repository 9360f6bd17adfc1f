"""What a newcomer sees at a terminal, wide or narrow, with and without colours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import commands
import models
from commands import Run, Terminal, error, plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies around where somebody tries the program."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(models.checkpoint(dtype="f32"), folder / "v3")
    shutil.copytree(models.checkpoint(dtype="f32"), folder / "awq")
    config = folder / "awq" / "config.json"
    quantised = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantised))
    (folder / "m.gguf").write_bytes(b"GGUF" + bytes(99))
    return folder


@pytest.mark.parametrize(("width", "colour"), [(80, True), (40, False)])
def test_first_five_minutes(folder: Path, width: int, colour: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command ends in success, or in one line that ends with what to type."""
    monkeypatch.chdir(folder)
    for command, code, last in (
        ("generate -n 3 Once", 0, r"3 tokens, ended by length; .*; seed \d+"),
        ("generate -n 3 -m v3 Once", 1, "deepcalm pack v3 v3.dcalm"),
        ("pack v3 v3.dcalm --force", 0, "v3.dcalm: .* of weights per token"),
        ("generate -n 3 -m v3.dcalm the", 0, "hint: this model has a chat template, .*"),
        ("chat -m v4.dcalm", 1, "no such file; in . there is v3.dcalm; .*: deepcalm pack FOLDER v4.dcalm"),
        ("chat -m some-org/Some-Model", 1, "deepcalm pack some-org/Some-Model Some-Model.dcalm"),
        ("generate -m m.gguf Hi", 1, "the Hugging Face checkpoint it was made from: deepcalm pack ORG/NAME FILE.dcalm"),
        ("chat -m awq", 1, "deepcalm pack ORG/NAME FILE --dtype q4"),
        ("generate -m v3.dcalm -c 99999 Hi", 1, r"ctx: 99999, expected 1\.\.1280 \(max_position_embeddings\)"),
        ("generate", 2, r"Error: give either a PROMPT \('-' for stdin\) or --file"),
    )[:: 1 if width == 80 else 2]:
        t = Terminal(*command.split(), width=width, NO_COLOR="" if colour else "1")
        assert t.ends() == code, (command, t.shown)
        lines = plain(t.shown).splitlines()
        assert re.search(last + "$", lines[-1]), (command, t.shown)
        assert "Traceback" not in t.shown and (code != 1 or len(lines) == 1), t.shown
        if code == 0 and command.startswith("generate"):  # the prompt, dim, where there are colours
            assert ("\x1b[2m" in t.shown) == colour and lines[0].startswith(command.split()[-1])
        if width == 80:
            piped = run(*command.split())
            assert piped[0] == code and "\x1b" not in piped[1].decode() + piped[2]


def test_a_model_that_does_not_fit_says_what_to_do(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepcalm.limits.available_memory", lambda: 10_000)
    for command in (("generate", "-m", path, "the"), ("chat", "-m", path)):
        assert "; use a smaller ctx or another kv type" in error(run(*command))


def test_options_that_change_no_text(run: Run, path: Path) -> None:
    want = run("chat", "-m", path, "-n", "3", stdin=b"Hi\n")[:2]
    for more in (("--device", "cpu"), ("--isa", "scalar", "--kv", "f32"), ("--quiet", "--history")):
        got = run("chat", "-m", path, "-n", "3", *more, stdin=b"Hi\n")
        assert got[0] == 0 and (more[0] == "--isa" or got[:2] == want)
    assert commands.run("chat", "-m", path, "-n", "3", "-q", "--lock", stdin=b"Hi\n")[:2] == want
    assert run("generate", "-m", path, "-n", "3", "--prompt", "Hi", "--raw", "-q") == (
        *run("generate", "-m", path, "-n", "3", "Hi", "--raw")[:2], ""
    )  # fmt: skip
    assert (
        run("verify", path, "--against", models.checkpoint(dtype="f32"), "--layers", "0", "--tokens", "8", "-q")[2]
        == ""
    )
    plan = json.loads(run("pack", models.checkpoint(dtype="f32"), "--dry-run", "--json", "--attn-dtype", "q8")[1])
    assert {t["format"] for t in plan["tensors"] if t["name"].endswith(".wo")} == {"q8"}
