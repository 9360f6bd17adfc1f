"""The first five minutes: names that users of other programs type, and models that are none yet."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import deepcalm
import models
from commands import Run, error
from deepcalm.cli import check, common, files
from deepcalm.cli import run as run_commands
from deepcalm.sampling import Scores


def test_names_of_llama_cpp_mean_the_same(run: Run, path: Path, tmp_path: Path) -> None:
    want = run("generate", "--model", path, "--max-tokens", "6", "--ctx", "64", "--threads", "1", "--seed", "7",
               "--temp", "1", "--chat", "--system", "S", "the")  # fmt: skip
    (tmp_path / "p").write_text("the")
    for prompt in (("-p", "the"), ("-f", tmp_path / "p")):
        for names in (("-n", "-c", "--temp"), ("--n-predict", "--ctx-size", "--temperature")):
            values = (names[0], "6", names[1], "64", names[2], "1", "-t", "1", "-s", "7", "--system-prompt", "S")
            code, out, err = run("generate", "-m", path, *values, "--chat", *prompt)
            assert (code, out) == want[:2] and err.endswith("; seed 7\n")


def test_m_names_the_model_everywhere(run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path | None] = []
    find = common.model_file

    def spy(path: Path | None) -> Path:
        opened.append(path)
        raise deepcalm.Error(f"{find(path)} would be opened")

    (tmp_path / "t.txt").write_text("the other thing in the air")
    text, against = str(tmp_path / "t.txt"), ("--against", models.checkpoint(dtype="f32"))
    want = run("perplexity", path, text)
    assert run("perplexity", "-m", path, text)[:2] == run("perplexity", text, "-m", path)[:2] == want[:2]
    assert want[0] == 0 and run("inspect", "-m", path, "--json")[:2] == run("inspect", path, "--json")[:2]
    for module in (common, files, check):
        monkeypatch.setattr(module, "model_file", spy)
    for command in (("inspect",), ("bench",), ("verify", *against), ("perplexity", text)):
        assert f"{path} would be opened" in error(run(*command, "-m", path))
        assert run(*command, path, "-m", path)[0] == 2
    assert opened == [path] * 4
    for chat in (("chat", path), ("chat", "-m", path)):
        assert f"{path} would be opened" in error(run(*chat))
    assert run("chat", path, "-m", path)[0] == 2
    assert f"{path} is a packed file: -m names the model" in run("generate", path)[2].replace("\n", "")
    for too_few in (("verify", *against), ("perplexity", path), ("perplexity", "-m", path)):
        code, _, err = run(*too_few)
        assert code == 2 and "Missing argument" in err


def next_commands(run: Run, model: Path | str, tmp_path: Path) -> set[str]:
    """What every command that opens a model says of one."""
    (tmp_path / "t").write_text("x")
    commands = (
        ("generate", "x", "-m", model),
        ("chat", "-m", model),
        ("bench", model),
        ("inspect", model),
        ("perplexity", model, tmp_path / "t"),
        ("verify", model, "--against", models.checkpoint(dtype="f32")),
    )
    return {error(run(*c)) for c in commands if c[0] != "inspect" or not Path(model).is_dir()}


def test_a_model_that_is_none_comes_with_the_command_to_type(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.checkpoint(dtype="f32"), "tiny v3")
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
    assert "hint" not in run("generate", "-n", "2", "the")[2]  # the demo model is for both


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


# ---- log probabilities and saved prompts


def test_logprobs_are_those_of_the_raw_logits(run: Run, path: Path) -> None:
    model = models.model()
    sampling = ("--temp", "0.8", "--top-k", "3", "--seed", "5")
    args = ("generate", "-m", path, "-n", "9", "--raw", "the other")
    for more in ((), sampling, (*sampling, "--draft", "3"), ("--draft", "3")):
        value = json.loads(run(*args, *more, "--json", "--logprobs", "4")[1])
        assert value["tokens"] == json.loads(run(*args, *more, "--json")[1])["tokens"]
        ids = model.encode("the other")
        rows = model.session().prefill(ids + value["tokens"], all_logits=True)[len(ids) - 1 : -1]
        rows = rows[:, : model.n_valid].astype(np.float64)
        want = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        scores = value["logprobs"]
        assert [s["id"] for s in scores] == value["tokens"] and "logprobs" not in json.loads(run(*args, "--json")[1])
        for s, row in zip(scores, want, strict=True):
            assert s["logprob"] == pytest.approx(row[s["id"]], abs=1e-12)
            assert s["text"] == model.vocabulary.name(s["id"])
            assert [t["id"] for t in s["top"]] == np.argsort(-row, kind="stable")[:4].tolist()
            assert [t["logprob"] for t in s["top"]] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=1e-12)
    code, out, err = run(*args, "--logprobs", "2")
    table = err.splitlines()[:-1]
    assert (code, len(table)) == (0, 9) and out == run(*args)[1]
    assert all(re.match(r" *-\d+\.\d{4}  \S.*? -\d+\.\d{4} .* -\d+\.\d{4} ", line) for line in table), table
    assert len(run(*args, "--logprobs", "0")[2].split("\n")) == 11
    assert run(*args, "--logprobs", "2", "-q") == (0, out, "")


def test_scores_of_equal_and_extreme_logits() -> None:
    logits = np.array([0, 1e30, 1e30, -1e30, 5], np.float32)
    scores = Scores.of(3, logits, 4, 9)
    assert [i for i, _ in scores.top] == [1, 2, 0, 3] and scores.top[0][1] == pytest.approx(-math.log(2))
    assert Scores.of(0, np.zeros(3, np.float32), 3, 0).top == []
    assert [i for i, _ in Scores.of(0, np.zeros(9, np.float32), 9, 2).top] == [0, 1]


def test_prompt_cache_goes_on_where_prompts_agree(run: Run, path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s"
    args = ("generate", "-m", path, "-n", "6", "--raw")
    cases = (("the other thing", "off", False), ("the other thing", "2", True), ("the other", "off", True))
    for prompt, draft, cached in cases:
        code, out, err = run(*args, prompt, "--draft", draft, "--prompt-cache", saved)
        assert (code, out) == run(*args, prompt)[:2]
        got = re.search(r"; (\d+) of (\d+) prompt tokens were cached\n$", err)
        assert got and (int(got[1]) > 2) == cached and int(got[1]) < int(got[2])
    assert json.loads(run(*args, "the other way", "--prompt-cache", saved, "--json")[1])["cached_tokens"] > 2
    moonlight = models.packed("moonlight")
    assert run("generate", "-m", moonlight, "-n", "2", "--prompt-cache", tmp_path / "m", "the")[0] == 0
    assert "no MTP layer" in error(run("generate", "-m", moonlight, "--drafter", "mtp", "--prompt-cache", saved, "the"))


def test_prompt_cache_of_another_model_is_left_alone(run: Run, path: Path, tmp_path: Path) -> None:
    saved, text = tmp_path / "s", tmp_path / "thesis.txt"
    args = ("generate", "-m", path, "-n", "2", "the")
    assert run(*args, "--prompt-cache", saved)[0] == 0
    text.write_text("precious")
    before = saved.read_bytes()
    for wrong, *more in ((saved, "-m", models.packed("moonlight")), (text,), (saved, "--kv", "q8")):
        err = error(run(*args, *more, "--prompt-cache", wrong))
        assert err.endswith("; it is left as it is, name another file for --prompt-cache\n") and "force" not in err
    assert (saved.read_bytes(), text.read_text()) == (before, "precious")
    assert "Is a directory" in error(run(*args, "--prompt-cache", tmp_path))
    assert "No such file" in error(run(*args, "--prompt-cache", tmp_path / "no" / "s"))
