"""The first five minutes: names that users of other programs type, and models that are none yet."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import surface_cases
from deepcalm.cli import common
from deepcalm.cli import run as run_commands
from surface_cases import Run, error


def test_names_of_llama_cpp_mean_the_same(run: Run, path: Path, tmp_path: Path) -> None:
    want = run("generate", "--model", path, "--max-tokens", "6", "--ctx", "64", "--threads", "1", "--seed", "7",
               "--temp", "1", "--chat", "--system", "S", "the")  # fmt: skip
    (tmp_path / "p").write_text("the")
    for prompt in (("-p", "the"), ("-f", tmp_path / "p")):
        for names in (("-n", "-c", "--temp"), ("--n-predict", "--ctx-size", "--temperature")):
            values = (names[0], "6", names[1], "64", names[2], "1", "-t", "1", "-s", "7", "--system-prompt", "S")
            code, out, err = run("generate", "-m", path, *values, "--chat", *prompt)
            assert (code, out) == want[:2] and err.endswith("; seed 7\n")


def test_m_names_the_model_everywhere(run: Run, path: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the other thing in the air")
    folder = surface_cases.checkpoint()
    for by_option, by_place in (
        (("inspect", "-m", path, "--json"), ("inspect", path, "--json")),
        (("perplexity", "-m", path, text), ("perplexity", path, text)),
        (("perplexity", text, "-m", path), ("perplexity", path, text)),
        (("verify", "-m", path, "--against", folder, "--layers", "0", "--tokens", "8"),
         ("verify", path, "--against", folder, "--layers", "0", "--tokens", "8")),
    ):  # fmt: skip
        assert run(*by_option)[:2] == run(*by_place)[:2] and run(*by_place)[0] == 0
    bench = ("bench", "--prompt", "4", "--contexts", "0", "--tokens", "2", "--repeats", "1", "-t", "1", "--json")
    assert {json.loads(run(*bench, *m)[1])["runs"][0]["file"] for m in (("-m", path), (path,))} == {str(path)}
    for both in (("inspect",), ("bench",), ("verify", "--against", folder), ("perplexity", "x")):
        assert run(*both, path, "-m", path)[0] == 2
    for too_few in (("verify", "--against", folder), ("perplexity", path), ("perplexity", "-m", path)):
        code, _, err = run(*too_few)
        assert code == 2 and "Missing argument" in err


def next_commands(run: Run, model: Path | str, tmp_path: Path) -> set[str]:
    """What every command that opens a model says of one."""
    (tmp_path / "t").write_text("x")
    commands = (("generate", "x", "-m", model), ("chat", "-m", model), ("bench", model), ("inspect", model),
                ("perplexity", model, tmp_path / "t"), ("verify", model, "--against", surface_cases.checkpoint()))
    return {error(run(*c)) for c in commands if c[0] != "inspect" or not Path(model).is_dir()}


def test_a_model_that_is_none_comes_with_the_command_to_type(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(surface_cases.checkpoint(), "tiny v3")
    shutil.copytree("tiny v3", "awq")
    config = json.loads(Path("awq/config.json").read_text())
    Path("awq/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    Path("m.gguf").write_bytes(b"GGUF" + bytes(99))
    pack = "pack it first: deepcalm pack 'tiny v3' 'tiny v3.dcalm'"
    for model, reason in (
        ("tiny v3", f"tiny v3 is a checkpoint, not a packed file; {pack}"),
        ("tiny v3/config.json", f"is a file of a checkpoint, not a packed file; {pack}"),
        ("awq", "is 'awq', expected .*; pack what it was made from: deepcalm pack ORG/NAME FILE --dtype q4"),
        ("m.gguf", "m.gguf: a GGUF file, which is not read; pack the Hugging Face checkpoint it was made from"),
        ("no.dcalm", "no.dcalm: no such file; to make it from a checkpoint: deepcalm pack FOLDER no.dcalm"),
        ("some-org/Some.Model", "Then download and pack it: deepcalm pack some-org/Some.Model Some.Model.dcalm"),
    ):
        said = next_commands(run, model, tmp_path)
        assert len(said) == 1 and re.search(reason, *said), said
    Path("a.dcalm").touch()
    assert "no.dcalm: no such file; in . there is a.dcalm; to make" in error(run("generate", "x", "-m", "no.dcalm"))
    assert "is a directory, expected a packed file (.dcalm); in . there is a.dcalm" in error(run("chat", "-m", "."))


def test_a_chat_model_run_raw_is_named(run: Run, path: Path) -> None:
    args = ("generate", "-m", path, "-n", "2", "the")
    assert "\nhint: this model has a chat template" in run(*args)[2]
    for more in (("--chat",), ("--raw",), ("-q",)):
        assert "hint" not in run(*args, *more)[2]
    assert "hint" not in run("generate", "-n", "2", "the")[2]  # the demo model has none


def test_switches_of_the_template(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcalm.model import Model

    seen: list[dict[str, object]] = []
    encode = Model.encode_chat

    def spy(self: Model, messages: list[dict[str, str]], **options: object) -> list[int]:
        seen.append(options)
        return encode(self, messages, **options)

    monkeypatch.setattr(Model, "encode_chat", spy)
    switch = ("--chat-template-kwargs", '{"enable_thinking": false, "add_generation_prompt": false}')
    assert run("generate", "-m", path, "-n", "2", "--chat", *switch, "the")[0] == 0
    assert run("chat", "-m", path, "-n", "2", *switch, stdin=b"Hi\n")[0] == 0
    assert seen == [{"enable_thinking": False, "add_generation_prompt": False}] * 3
    for bad in ("{", "[]", '{"messages": []}', '{"self": 1}', "[" * 100_000):
        assert run("generate", "-m", path, "--chat", "--chat-template-kwargs", bad, "the")[0] == 2
    assert "--chat-template-kwargs needs --chat" in run("generate", "-m", path, *switch, "the")[2]


def test_a_model_does_not_control_the_terminal() -> None:
    assert run_commands.visible("a\tb\n\x1b]0;x\x07\r\x9b31m é 深") == "a\tb\n\\x1b]0;x\\x07\\x0d\\x9b31m é 深"


def test_hub_names_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/b").touch()
    assert common.is_hub_id("org/name") and common.is_hub_id("a/c")
    assert not any(map(common.is_hub_id, ("a/b", "org", "a/b/c", "~/x", "./x", "org/x.gguf", "org/x.dcalm")))
