"""The command line: exact text on stdout, exit codes, one clear line for every error, signals, pipes and terminals."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import commands
import deepcalm
import device_cases
import models
import tiny
from commands import Run, error
from deepcalm import _core, cli
from deepcalm.check.perplexity import perplexity
from deepcalm.cli import common
from deepcalm.cli import run as run_commands
from deepcalm.files import packed
from deepcalm.files.text_files import TextFiles
from deepcalm.generation import Generation
from deepcalm.measure import bench as measure_bench
from deepcalm.names import ISAS
from deepcalm.session import Stats

SUMMARY = (
    r"\d+ tokens, ended by (eos|stop|length|context|interrupted); prefill \d+ tokens, [\d.]+ tok/s"
    r"(; decode [\d.]+ tok/s, [\d.]+ GB/s(, \d+ % of a plain read)?)?"
    r"(; \d+ of \d+ drafts accepted \([^)]+\), [\d.]+ tokens and [\d.]+ experts a pass)?"
    r"(; drafting turned off, it did not pay)?"
    rf"; ({'|'.join(ISAS)}), cache (f32|f16|bf16|q8); (greedy|temp [\d.]+.*; seed \d+)"
)


def expected(prompt: str, n: int, **options: object) -> str:
    """What the API generates."""
    return deepcalm.generate(prompt, models.model(), max_tokens=n, **options)  # type: ignore[arg-type]


# ---- generate


def test_generate_prints_the_text_and_one_line_of_statistics(run: Run, path: Path) -> None:
    code, out, err = run("generate", "-m", path, "-n", "12", "--raw", "the other")
    assert (code, out.decode()) == (0, expected("the other", 12) + "\n")
    assert re.fullmatch(SUMMARY + "\n", err)
    assert run("generate", "-m", path, "-n", "12", "--quiet", "the other") == (0, out, "")


def test_generate_reads_prompts_byte_for_byte(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("naïve 深\r\n".encode())
    want = expected("naïve 深\r\n", 6).encode() + b"\n"
    assert run("generate", "-m", path, "-n", "6", "--file", tmp_path / "p.txt")[:2] == (0, want)
    assert run("generate", "-m", path, "-n", "6", "-", stdin="naïve 深\r\n".encode())[:2] == (0, want)
    assert run("generate", "-m", path, "-n", "6", "naïve 深\r\n")[:2] == (0, want)


def test_generate_json(run: Run, path: Path) -> None:
    code, out, err = run("generate", "-m", path, "-n", "5", "--json", "-q", "the")
    value = json.loads(out)
    assert (code, err, value["text"], value["reason"]) == (0, "", expected("the", 5), "length")
    assert len(value["tokens"]) == 5 and value["prompt_tokens"] == 1 and value["seed"] is None
    assert value["decode"]["tokens"] == 4 and value["decode"]["bytes"] > 0 and value["kv"] == "f16"


def test_generate_seed_is_reported_and_reproduces(run: Run, path: Path) -> None:
    args = ("generate", "-m", path, "-n", "16", "--temp", "1", "--top-p", "0.9", "--top-k", "50", "--min-p", "0.01")
    code, out, err = run(*args, "--raw", "the")
    seed = re.search(r"; seed (\d+)$", err.strip())
    assert code == 0 and seed is not None
    assert run(*args, "--seed", seed[1], "the")[:2] == (0, out)
    options = {"temp": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": int(seed[1])}
    assert out.decode() == expected("the", 16, **options) + "\n"


@functools.cache
def sampling(**generation: object) -> Path:
    """A packed model whose checkpoint's generation_config.json has these keys."""
    name = "-".join(str(v) for v in generation.values())
    folder = tiny.write(models.root() / f"sampling-{name}", "v3", dtype="f32")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    deepcalm.pack(folder, folder.with_suffix(".dcalm"))
    return folder.with_suffix(".dcalm")


def test_sampling_defaults_are_the_checkpoints(run: Run) -> None:
    path = sampling(do_sample=True, temperature=0.6, top_p=0.9, top_k=-1, repetition_penalty=1.1, num_beams=1)
    model = deepcalm.Model(path, threads=1)
    base = ("generate", "-m", path, "-n", "12", "--raw", "the")
    note = "note: the checkpoint's generation_config asks for repetition_penalty 1.1, which is not supported\n"
    cases: list[tuple[tuple[str, ...], dict[str, float], str]] = [
        (("--seed", "5"), {"temp": 0.6, "top_p": 0.9, "seed": 5}, "temp 0.6, top-p 0.9 (the checkpoint's); seed 5"),
        (("--seed", "5", "--temp", "2"), {"temp": 2, "top_p": 0.9, "seed": 5},
         "temp 2, top-p 0.9 (the checkpoint's for top-p); seed 5"),
        (("--seed", "5", "--temp", "2", "--top-p", "1", "--top-k", "9"), {"temp": 2, "top_k": 9, "seed": 5},
         "temp 2, top-k 9; seed 5"),
        (("--temp", "0"), {}, "greedy"),
    ]  # fmt: skip
    for options, how, said in cases:
        code, out, err = run(*base, *options)
        assert (code, out.decode()) == (0, deepcalm.generate("the", model, max_tokens=12, **how) + "\n"), options
        assert err.endswith(f"; {said}\n") and err.startswith(note) == (said != "greedy"), err
    value = json.loads(run(*base, "--json", "--seed", "5")[1])
    assert value["sampling"] == {"temp": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.0} and value["seed"] == 5
    off: list[dict[str, object]] = [{"do_sample": False, "temperature": 0.6}, {"temperature": 0.7}]
    for greedy in (*off, {"do_sample": True, "temperature": 0}):
        assert run("generate", "-m", sampling(**greedy), "-n", "2", "--raw", "the")[2].endswith("; greedy\n")
    with pytest.raises(deepcalm.CheckpointError, match=r"generation_config.json: top_p: 1.5, expected"):
        sampling(do_sample=True, top_p=1.5)
    with pytest.raises(deepcalm.CheckpointError, match="do_sample: 'yes', expected true"):
        sampling(do_sample="yes")


def test_options_without_effect_are_named(run: Run, path: Path) -> None:
    args = ("generate", "-m", path, "-n", "2", "the")
    want = run(*args)
    for options, names in (
        (("--top-k", "5", "--seed", "3"), "--top-k and --seed have"),
        (("--top-p", "0.5"), "--top-p has"),
        (("--min-p", "0.5", "--temp", "0"), "--min-p has"),
    ):
        code, out, err = run(*args, *options)
        assert (code, out) == want[:2]
        assert err.startswith(f"note: {names} no effect at temperature 0, give --temp\n") and err.count("note") == 1
        assert run(*args, *options, "-q") == (0, out, "")
    assert "note" not in run(*args, "--top-k", "5", "--seed", "3", "--temp", "1")[2]
    err = run("chat", "-m", path, "-n", "1", "--seed", "3", stdin=b"Hi\nHi\n")[2]
    assert err.count("note: --seed has no effect") == 1


def test_a_draft_head_without_an_mtp_layer_is_named(run: Run) -> None:
    for dtype, said in (("q4", True), ("none", False)):
        args = ("pack", models.checkpoint("moonlight", "f32"), "--dry-run", "--dtype", "q8", "--draft-head", dtype)
        assert ("note: draft head q4 has no effect: no MTP layer is packed" in run(*args)[2]) == said


def test_generate_ends_before_a_stop_string(run: Run, path: Path) -> None:
    whole = expected("the", 30)
    stop = whole[4:7]
    code, out, err = run("generate", "-m", path, "-n", "30", "--stop", "never", "--stop", stop, "the")
    assert (code, out.decode()) == (0, whole[: whole.index(stop)] + "\n")
    assert "ended by stop" in err


def test_stop_strings_understand_escapes(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[tuple[str, ...]] = []
    monkeypatch.setattr(run_commands, "start", lambda *_, stop, **__: stops.append(stop) or 1 / 0)
    typed = ("\\n", "a\\tb\\r", "\\\\n", "C:\\dir", "\\")
    with pytest.raises(ZeroDivisionError):
        run("generate", "-m", path, "the", *(x for s in typed for x in ("--stop", s)))
    assert stops == [("\n", "a\tb\r", "\\n", "C:\\dir", "\\")]


def test_stop_that_can_never_match_is_refused(run: Run, path: Path) -> None:
    assert "'<|user|>' is a special token" in error(run("generate", "-m", path, "--stop", "\\n<|user|>", "the"))


def test_generate_with_chat_template(run: Run, path: Path) -> None:
    m = models.model()
    ids = m.encode("<bos>SYS<|user|>Hi<|assistant|>", bos=False)
    want = m.decode(list(m.session().generate(ids, max_tokens=7)))
    code, out, _ = run("generate", "-m", path, "-n", "7", "--chat", "--system", "SYS", "Hi")
    assert (code, out.decode()) == (0, want + "\n")


def test_generate_ends_with_the_context(run: Run, path: Path) -> None:
    code, out, err = run("generate", "-m", path, "--ctx", "9", "the")
    assert (code, out.decode()) == (0, expected("the", 8) + "\n")
    assert "ended by context" in err


def test_generate_runs_with_every_cache_isa_and_thread_count(run: Run, path: Path) -> None:
    want = run("generate", "-m", path, "-n", "8", "the")[1]
    assert run("generate", "-m", path, "-n", "8", "--threads", "2", "the")[1] == want
    for kv in ("f32", "bf16", "q8"):
        assert run("generate", "-m", path, "-n", "8", "--kv", kv, "the")[0] == 0
    assert run("generate", "-m", path, "-n", "8", "--isa", "scalar", "--device", "auto", "the")[0] == 0


def test_device_auto_says_what_happens(run: Run, path: Path) -> None:
    _, _, err = run("generate", "-m", path, "-n", "2", "--device", "auto", "the")
    why = device_cases.missing("cuda")
    said = [line for line in err.splitlines() if line.startswith("device auto: cpu, ")]
    assert len(said) == (why is not None)  # once


@pytest.mark.parametrize("sampling", [(), ("--temp", "0.9", "--seed", "3")], ids=["greedy", "sampled"])
def test_text_is_the_same_with_any_draft(run: Run, path: Path, sampling: tuple[str, ...]) -> None:
    args = ("generate", "-m", path, "-n", "40", *sampling, "the other")
    want = run(*args, "--draft", "off")
    assert want[0] == 0 and "drafts" not in want[2]
    for draft in ("auto", "0", "1", "3", "7"):
        code, out, err = run(*args, "--draft", draft)
        assert (code, out) == (0, want[1]), draft
        assert re.search(r"; \d+ of \d+ drafts accepted", err) or draft in ("auto", "0"), err
    code, out, _ = run(*args, "--draft", "2", "--json")
    assert code == 0 and json.loads(out)["text"] == want[1].decode()[:-1] and json.loads(out)["drafts"]["offered"] > 0
    copy = f"model:{path}"
    for drafter, names in ((copy, {copy}), (f"ngram,{copy}", {"ngram", copy}), ("ngram", {"ngram"})):
        code, out, _ = run(*args, "--draft", "3", "--drafter", drafter, "--json")
        assert code == 0 and json.loads(out)["text"] == want[1].decode()[:-1]
        assert json.loads(out)["drafts"]["drafters"].keys() <= names
    assert run(*args, "--drafter", "eagle")[0] == 2
    plain = models.packed("moonlight")
    assert run("generate", "-m", plain, "-n", "4", "the")[0] == 0  # no MTP layer: auto does without


def test_demo_model_tells_a_story(run: Run) -> None:
    code, out, _ = run("generate", "-n", "60", "--temp", "0", "Once upon a time")
    text = out.decode("ascii")
    assert code == 0 and text.startswith(", there was a") and len(text.split()) > 40
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.!?;:'\"- \n")
    assert deepcalm.generate("Once upon a time", max_tokens=60) + "\n" == text
    code, out, _ = run("chat", "--temp", "0", "-n", "60", stdin=b"Once upon a time\n/reset\nHello!\n")
    story = run("generate", "--chat", "--temp", "0", "-n", "60", "Hello!")[1].decode()
    assert (code, out.decode()) == (0, text + story) and story.startswith("Once")


@pytest.mark.parametrize(
    "args",
    [
        ("generate",),
        ("generate", "a", "--file", "b"),
        ("generate", "a", "--ctx", "0"),
        ("generate", "a", "-n", "0"),
        ("generate", "a", "--threads", "0"),
        ("generate", "a", "--threads", "9999999999"),
        ("generate", "a", "--top-k", "9999999999"),
        ("generate", "a", "--temp", "-1"),
        ("generate", "a", "--temp", "nan"),
        ("generate", "a", "--top-p", "0"),
        ("generate", "a", "--kv", "f8"),
        ("generate", "a", "--seed", "-1"),
        ("generate", "a", "--stop", ""),
        ("generate", "a", "--system", "S"),
        ("generate", "a", "--draft", "much"),
        ("generate", "a", "--draft", "8"),
        ("generate", "a", "--what"),
        ("generate", "a", "--isa", "mmx"),
        ("verify",),
        ("perplexity",),
        ("chat", "--stop", ""),
        ("pack",),
        ("pack", "src"),
        ("inspect", "x.dcalm", "--dump", "embed", "x.npy", "--check"),
        ("inspect", "x.dcalm", "--dump", "embed", "x.npy", "--json"),
        ("inspect", "x.dcalm", "--dump", "embed", "x.npy", "--tensors"),
        ("pack", "src", "dst", "--dtype", "q3"),
        ("bench", "--repeats", "0"),
        ("perplexity", "x.dcalm"),
        ("nothing",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run: Run, args: tuple[str, ...]) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, b"")
    assert "Error: " in err and "Traceback" not in err


def test_no_arguments_shows_help(run: Run) -> None:
    code, _, err = run()
    assert code == 2 and "Examples:" in err


def test_every_command_that_has_defaults_runs_without_arguments(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are wrong usage (test_wrong_usage_is_2)."""
    measure = measure_bench.bench

    def quick(*args: object, **_options: object) -> object:
        model, prompt, contexts, tokens, _repeats, kv = args
        return measure(model, prompt, contexts, tokens, 1, kv)

    monkeypatch.setattr(measure_bench, "bench", quick)
    monkeypatch.setattr(measure_bench, "PROBE_MIB", 1)
    commands.ended_servers(monkeypatch)
    needs_arguments = {"batch", "generate", "pack", "verify", "perplexity"}
    assert {name for name in cli.cli.commands if run(name, stdin=b"")[0] != 0} == needs_arguments


def test_isa_names_are_those_of_the_kernels() -> None:
    assert set(ISAS) == {isa["name"] for isa in _core.isas()}


@pytest.mark.parametrize("command", ["", *cli.cli.commands])
def test_help_has_examples(run: Run, command: str) -> None:
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert re.search(rb"^ *Examples:\n +deepcalm ", out, re.MULTILINE)


def test_every_command_is_listed_and_documented(run: Run) -> None:
    out = run("--help")[1].decode()
    for name in cli.cli.commands:
        assert re.search(rf"^  {name} +\S.*\.$", out, re.MULTILINE), "a sentence that fits"
        for option in cli.cli.commands[name].params:
            assert option.param_type_name == "argument" or getattr(option, "help", ""), f"{name} {option.name}"


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    first, *_, last = out.decode().splitlines()
    assert code == 0 and re.fullmatch(r"deepcalm \d+\.\d+\.\d+", first)
    isas = last.removeprefix("instruction sets ").split(", ")
    assert {re.sub(r" \((not here|emulated)\)", "", s) for s in isas} == set(ISAS)


def test_version_tells_commit_and_compiler(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "__file__", str(tmp_path / "_core.so"))
    assert b"\ncommit and compiler unknown (not installed)\n" in run("--version")[1]
    (tmp_path / "build.txt").write_text("commit abc\ncompiler GNU 12\n")
    assert b"\ncommit abc\ncompiler GNU 12\ninstruction sets " in run("--version")[1]
    cmake = (Path(__file__).parents[2] / "CMakeLists.txt").read_text()
    assert "install(FILES ${CMAKE_CURRENT_BINARY_DIR}/build.txt DESTINATION deepcalm)" in cmake


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    code, out, _ = commands.run(env={"_DEEPCALM_COMPLETE": f"{shell}_source"})
    assert code == 0 and b"_DEEPCALM_COMPLETE" in out
    words = {"COMP_WORDS": "deepcalm generate --logp", "COMP_CWORD": "2" if shell != "fish" else "--logp"}
    got = commands.run(env={"_DEEPCALM_COMPLETE": f"{shell}_complete", **words})
    assert b"--logprobs" in got[1] and got[2] == ""


def test_errors_are_one_line_with_the_reason(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "not.dcalm").write_bytes(b"not a model")
    no_bos = models.packed("glm4_moe_lite")
    base = ("generate", "-m", path)
    cases = [
        (("generate", "-m", tmp_path / "missing.dcalm", "a"), r"missing\.dcalm"),
        (("generate", "-m", tmp_path / "not.dcalm", "a"), r"not\.dcalm"),
        (("generate", "-m", tmp_path, "a"), "is a directory, expected a packed file"),
        ((*base, "--file", tmp_path / "missing.txt"), r"missing\.txt: No such file"),
        ((*base, "--file", tmp_path), "Is a directory"),
        ((*base, "--file", tmp_path / "bad.txt"), r"bad\.txt: not valid UTF-8 at byte 2 \(0xff\)"),
        ((*base, "a\udcff"), r"the prompt: not valid UTF-8 at byte 1 \(0xff\)"),
        ((*base, "--ctx", "9", "a" * 9), r"the prompt has 9 tokens, the context 9 positions \(--ctx goes up to 1280\)"),
        ((*base, "--ctx", "1281", "a"), r"ctx: 1281, expected 1\.\.1280"),
        ((*base, "--ctx", "99999999999", "a"), r"ctx: 99999999999, expected 1\.\.1280"),
        (("generate", "-m", no_bos, ""), "the prompt is empty, and this model has no bos"),
        *([((*base, "--device", "cuda", "a"), device_cases.NO_CUDA)] if device_cases.missing("cuda") else []),
        (("generate", "-m", models.packed("moonlight"), "--drafter", "mtp", "a"), "no MTP layer"),
        ((*base, "--drafter", f"model:{deepcalm.demo_path()}", "a"), "cannot draft for .*: vocab_size is"),
        (("perplexity", path, tmp_path / "missing.txt"), r"missing\.txt: No such file"),
        (("perplexity", path, tmp_path / "bad.txt"), "not valid UTF-8"),
        (("bench", path, "--context", "5000"), "the model has 1280"),
        (("pack", tmp_path / "missing", tmp_path / "x.dcalm"), "missing"),
        (("pack", models.checkpoint(dtype="f32"), tmp_path), "is a directory, expected the name of the packed file"),
        (("pack", models.checkpoint(dtype="f32"), "/proc/x.dcalm"), "/proc/x.dcalm"),
    ]
    for args, reason in cases:
        assert re.search(reason, error(run(*args, stdin=b"\xfe"))), (args, reason)
    assert "standard input: not valid UTF-8 at byte 0 (0xfe)" in error(run(*base, "-", stdin=b"\xfe"))


def test_empty_prompt_starts_from_bos(run: Run, path: Path) -> None:
    m = models.model()
    want = m.decode(list(m.session().generate([265], max_tokens=5)))
    assert run("generate", "-m", path, "-n", "5", "")[:2] == (0, want.encode() + b"\n")


def test_unpacked_checkpoint_prints_the_pack_command(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "my model", "moonlight", dtype="f32")
    for command in (("generate", "a", "-m"), ("chat", "-m"), ("bench",)):
        err = error(run(*command, folder))
        assert err.rstrip().endswith(f"pack it first: deepcalm pack '{folder}' 'my model.dcalm'")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_thread_of_python_that_cannot_start_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    code, out, err = run("pack", models.checkpoint(dtype="f32"), tmp_path / "a.dcalm")
    assert (code, out) == (1, b"")
    assert err.splitlines()[-1].startswith("deepcalm: error: can't start new thread: ")


def test_memory_is_checked_before_anything_runs(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepcalm.limits.available_memory", lambda: 1_000_000)
    code, _, err = run("generate", "-m", path, "-n", "2", "--ctx", "64", "the")
    assert code == 0 and err.startswith("note: weights 0.0 GB and cache 0.0 GB exceed the 0.0 GB of memory available")
    monkeypatch.setattr("deepcalm.limits.available_memory", lambda: 10_000)
    assert "takes 0.00 GB, 0.00 GB of memory are available" in error(run("generate", "-m", path, "the"))


def test_interrupt_keeps_the_partial_text(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step = Generation.__next__

    def interrupted(self: Generation) -> int:
        if len(self.tokens) == 7:
            raise KeyboardInterrupt
        return one_step(self)

    want = models.model().decode(list(models.model().session().generate([257], max_tokens=7)))
    monkeypatch.setattr(Generation, "__next__", interrupted)
    code, out, err = run("generate", "-m", path, "the")
    assert (code, out.decode()) == (130, want + "\n")
    assert err.startswith("7 tokens, ended by interrupted")
    code, out, _ = run("generate", "-m", path, "--json", "the")
    assert code == 130 and json.loads(out)["reason"] == "interrupted" and json.loads(out)["text"] == want


def test_interrupt_while_writing_waits_for_the_write() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), common.deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    with pytest.raises(KeyboardInterrupt), common.deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1]


def start(*args: str | Path, **options: object) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0} | options
    return subprocess.Popen([*commands.COMMAND, *args], env=commands.environment(), **pipes)  # type: ignore[call-overload]


ENDLESS = ("-n", "90000", "--ctx", "90000", "--threads", "1")


def test_ctrl_c_during_generation() -> None:
    path = models.endless()
    p = start("generate", "-m", path, *ENDLESS, "the")
    assert p.stdout is not None
    first = b""
    while len(first) < 40:
        first += p.stdout.read(40)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and b"ended by interrupted" in err and b"Traceback" not in err
    text = (first + out).decode()
    whole = deepcalm.generate("the", deepcalm.Model(path, threads=1), max_tokens=len(text))
    shown = text[:-1].removesuffix("\ufffd")  # a character that was cut is shown as such
    assert text.endswith("\n") and len(shown) > 20 and whole.startswith(shown)


def test_closed_pipe_ends_quietly() -> None:
    p = start("generate", "-m", models.endless(), *ENDLESS, "the")
    assert p.stdout is not None and p.stderr is not None
    p.stdout.read(10)
    p.stdout.close()
    assert (p.wait(timeout=30), p.stderr.read()) == (0, b"")
    p.stderr.close()
    assert p.stdin is not None
    p.stdin.close()


def test_full_output_device_is_an_error(path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        code, _, err = commands.run("generate", "-m", path, "-n", "4", "-q", "the", stdout=full)
    assert (code, err) == (1, "deepcalm: error: standard output: No space left on device\n")


def test_process_accepts_bytes_that_are_no_text(path: Path) -> None:
    code, out, err = commands.run("generate", "-m", path, b"a\xff")
    assert (code, out) == (1, b"") and err == "deepcalm: error: the prompt: not valid UTF-8 at byte 1 (0xff)\n"
    want = expected("é", 4) + "\n"
    for locale in ("C", "POSIX"):
        code, out, _ = commands.run("generate", "-m", path, "-n", "4", "é", env={"LC_ALL": locale})
        assert (code, out.decode()) == (0, want)


# ---- chat


def test_chat_keeps_the_conversation_and_the_cache(run: Run, path: Path) -> None:
    m, opening = models.model(), {"role": "system", "content": "SYS"}

    def answer(messages: list[dict[str, str]]) -> str:
        ids = m.encode(m.apply_chat_template(messages), bos=False)
        return m.decode(list(m.session().generate(ids, max_tokens=6)))

    one = [opening, {"role": "user", "content": "Hi there"}]
    first = answer(one)
    two = [*one, {"role": "assistant", "content": first}, {"role": "user", "content": "the other"}]
    second = answer(two)
    lines = "Hi there\n\n  \nthe other\n/reset\nHi there\n/quit\nnever read\n"
    args = ("chat", "-m", path, "-n", "6", "--system", "SYS")
    code, out, err = run(*args, stdin=lines.encode())
    assert (code, out.decode()) == (0, "".join(t + "\n" for t in (first, second, first)))
    cached = re.findall(r"(\d+) of (\d+) prompt tokens were cached", err)
    assert len(cached) == 3 and cached[0][0] == cached[2][0] == "0"
    assert int(cached[1][0]) >= len(m.encode(m.apply_chat_template(one), bos=False))
    assert run(*args, "-q", stdin=b"Hi there")[:3] == (0, first.encode() + b"\n", "")  # ends with its input


def test_chat_errors_leave_the_conversation_going(run: Run, path: Path) -> None:
    lines = b"\xff\n" + b"a" * 70 + b"\nHi\n"
    code, out, err = run("chat", "-m", path, "-n", "3", "--ctx", "64", stdin=lines)
    m = models.model()
    ids = m.encode("<bos><|user|>Hi<|assistant|>", bos=False)
    assert (code, out.decode()) == (0, m.decode(list(m.session().generate(ids, max_tokens=3))) + "\n")
    assert "standard input: not valid UTF-8 at byte 0" in err
    assert "the prompt has 73 tokens, the context 64 positions" in err and "/reset starts over" in err


def test_chat_without_template_continues_the_text(run: Run) -> None:
    m = deepcalm.Model(models.without_template())
    for args in (("chat", "--system", "S"), ("generate", "--chat", "Hi")):
        assert "has no chat template; use a raw prompt" in error(run(*args, "-m", m.path))
    assert "has no chat template" in run("chat", "-m", m.path, stdin=b"/system S\n")[2]
    code, out, err = run("chat", "-m", m.path, "-n", "4", stdin=b"the\n/reset\nan\nthe other\n")
    texts = []
    for prompt in ("the", "an", "an{}\nthe other"):
        texts.append(deepcalm.generate(prompt.format(*texts[1:]), m, max_tokens=4))
    assert (code, out.decode()) == (0, "".join(t + "\n" for t in texts))
    assert err.startswith("this model has no chat template: it continues the text")


def test_chat_without_template_begins_anew_after_an_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A story that has ended is not continued, but answered again."""
    monkeypatch.setattr(TextFiles, "template", None)  # the demo model's
    code, out, err = run("chat", "--temp", "0", stdin=b"Once upon a time\nOnce upon a time\n/retry\n")
    assert code == 0 and out == out[: len(out) // 3] * 3 and err.count("ended by eos") == 3


def test_chat_ctrl_c_stops_the_answer_only() -> None:
    p = start("chat", "-m", models.endless(), "--ctx", "90000", "--threads", "1")
    assert p.stdin is not None and p.stdout is not None
    p.stdin.write(b"Hi\n")
    p.stdin.flush()
    p.stdout.read(30)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(b"/quit\n", timeout=30)
    assert p.returncode == 0 and out.endswith(b"\n")
    assert b"ended by interrupted" in err and b"Traceback" not in err


# ---- pack


def test_pack_writes_what_the_api_writes(run: Run, tmp_path: Path) -> None:
    code, out, err = run("pack", models.checkpoint(dtype="f32"), tmp_path / "m.dcalm", "--dtype", "q8")
    assert (code, out) == (0, b"")
    assert (tmp_path / "m.dcalm").read_bytes() == models.packed(dtype="q8").read_bytes()
    assert re.search(r"^F32 -> q8: [\d.]+ MB$", err, re.MULTILINE)
    assert re.search(r"^dropped .*: ", err, re.MULTILINE)  # the MTP layer's copies
    assert "weights per token" in err.splitlines()[-1]
    assert "\x1b" not in err and "\r" not in err  # no progress bar off a terminal
    assert [p.name for p in tmp_path.iterdir()] == ["m.dcalm"]


def test_pack_plan(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("pack", models.checkpoint(dtype="f32"), "--dry-run", "--dtype", "q4", "--head-dtype", "f16")
    table = out.decode().splitlines()
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert re.match(r"embed +F32 -> \w+ +311x76 +[\d.]+ kB$", table[0])
    assert any(re.match(r"head +F32 -> f16 ", line) for line in table)
    assert any(re.match(r"layers\.1\.experts\.w_down +F32 -> q4 +24x76x38", line) for line in table)
    assert re.match(r"total [\d.]+ MB, [\d.]+ kB of weights per token$", table[-1])
    code, out, err = run("pack", models.checkpoint(dtype="f32"), tmp_path / "m.dcalm", "--dry-run", "--json", "-q")
    plan = json.loads(out)
    assert (code, err) == (0, "") and not (tmp_path / "m.dcalm").exists()
    assert {t["name"] for t in plan["tensors"]} >= {"embed", "head", "mtp.eh_proj"}
    assert plan["dropped"] and plan["config"]["kv_lora_rank"] == 42 and plan["data_bytes"] > 0


def test_pack_reports_a_full_disk(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    code, out, err = commands.run(
        "pack", models.checkpoint(dtype="f32"), tmp_path / "m.dcalm", preexec_fn=small_files
    )  # fmt: skip
    assert (code, out) == (1, b"") and not (tmp_path / "m.dcalm").exists()
    assert err.startswith("deepcalm: error: ") and "m.dcalm" in err and err.count("\n") == 1


def on_terminal(*args: str | Path, env: dict[str, str]) -> tuple[int, str]:
    """Runs a command with stderr on a pseudo-terminal: (exit code, what it showed)."""
    main_fd, terminal = pty.openpty()
    p = subprocess.Popen([*commands.COMMAND, *args], stdout=subprocess.DEVNULL, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main_fd, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main_fd)
    return p.wait(timeout=30), shown.decode()


def test_progress_bar_only_on_a_terminal(tmp_path: Path) -> None:
    env = commands.environment(TERM="xterm-256color")
    code, plain = on_terminal("pack", models.checkpoint(dtype="f32"), tmp_path / "a.dcalm", env=env)
    assert code == 0 and "packing a.dcalm" in plain and "weights per token" in plain
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain)  # NO_COLOR
    del env["NO_COLOR"]
    code, colour = on_terminal("pack", models.checkpoint(dtype="f32"), tmp_path / "b.dcalm", env=env)
    assert code == 0 and re.search(r"\x1b\[[\d;]*3\d", colour)
    code, quiet = on_terminal("pack", models.checkpoint(dtype="f32"), tmp_path / "c.dcalm", "-q", env=env)
    assert (code, quiet) == (0, "")


def test_a_late_bar_appears_only_if_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    main_fd, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with common.progress("too soon", False, delay=3600) as update:
            assert update is not None
            update(1, 2)
        with common.progress("silent", True, delay=0.001) as update:
            assert update is None
        with common.progress("reading", False, delay=0.001) as update:
            assert update is not None
            update(256, 900)
            shown = ""
            while "256/900" not in shown:  # from another thread, while this one waits
                shown += os.read(main_fd, 4096).decode()
            update(512, 900)
            while "512/900" not in shown:
                shown += os.read(main_fd, 4096).decode()
    os.close(main_fd)
    assert "reading" in shown and "too soon" not in shown and "silent" not in shown
    assert not re.search(r"\x1b\[[\d;]*3\dm", shown)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_long_prompt_says_how_far_it_is(
    command: str, run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every pass, behind a second; the prompt and the answer are the same, and come after it."""
    bars: list[tuple[str, bool, float]] = []
    calls: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def spy(label: str, quiet: bool, delay: float) -> Iterator[Callable[[int, int], None]]:
        bars.append((label, quiet, delay))
        yield lambda done, total: calls.append((done, total))

    (tmp_path / "p").write_text("the other hour " * 60)
    given = {"generate": ("generate", "-m", path, "-n", "3", "-f", tmp_path / "p", "--raw"),
             "chat": ("chat", "-m", path, "-n", "3")}[command]  # fmt: skip
    stdin = (tmp_path / "p").read_bytes() + b"\n"
    want = run(*given, stdin=stdin)[:2]
    monkeypatch.setattr(run_commands, "progress", spy)
    assert run(*given, stdin=stdin)[:2] == want and want[0] == 0 and want[1]
    assert bars == [("reading prompt tokens", False, 1)]
    assert [done for done, _ in calls] == [*range(0, calls[0][1], 256)] and len(calls) > 1
    assert len({total for _, total in calls}) == 1
    run(*given, "-q", stdin=stdin)
    assert bars[1] == ("reading prompt tokens", True, 1)


def test_hub_download_is_optional(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert "*.safetensors" in allow_patterns
        return str(models.checkpoint(dtype="f32"))

    fake = type(sys)("huggingface_hub")
    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert run("pack", "some-org/some.model", tmp_path / "m.dcalm")[0] == 0
    assert asked == [("some-org/some.model", None)] and (tmp_path / "m.dcalm").is_file()
    assert "exists; add --force to replace it" in error(run("pack", "some-org/some.model", tmp_path / "m.dcalm"))
    assert len(asked) == 1  # not downloaded for nothing
    assert run("pack", "some-org/x", tmp_path / "m.dcalm", "--force", "--revision", "v1")[0] == 0
    assert asked[1:] == [("some-org/x", "v1")]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for src in ("models/foo", "./models/foo", "models/foo/", "a/b/c", "foo", "org/x.gguf", "~/x", "org/\u00e9"):
        assert f"{src.rstrip('/').removeprefix('./')}: no such folder" in error(run("pack", src, "n.dcalm"))
    assert "a model of the Hub? Then add --revision main" in error(run("pack", "models/foo", "n.dcalm"))
    assert len(asked) == 2
    assert run("pack", "models/foo", "--dry-run", "--revision", "main")[0] == 0
    assert asked[2:] == [("models/foo", "main")]
    for where in ("models", "foo", models.checkpoint(dtype="f32")):
        assert run("pack", where, "n.dcalm", "--revision", "main")[0] == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error(run("pack", "some-org/some.model", tmp_path / "n.dcalm"))


# ---- names


def test_file_names_need_not_be_utf8(run: Run, path: Path, tmp_path: Path) -> None:
    """No traceback, whatever a file is called; --json stays JSON, and a name in it can be turned back."""

    def name(text: bytes) -> Path:
        return Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + text))

    folder, file, text = name(b"f\xff"), name(b"m\xff.dcalm"), name(b"t\xff")
    shutil.copytree(models.checkpoint(dtype="f32"), folder)
    text.write_text("the other hour " * 9)
    assert json.loads(run("pack", folder, file, "--json")[1])["file"] == str(file)
    assert error(run("pack", folder, file)).endswith(": exists; add --force to replace it (in Python force=True)\n")
    info = json.loads(run("inspect", file, "--json")[1])
    assert (info["file"], info["source"]["name"]) == (str(file), "f\\xff")
    assert run("inspect", file, "--dump", "layers.0.wo", name(b"o\xff.npy"))[0] == 0
    assert run("generate", "-m", file, "-n", "3", "--file", text)[0] == 0
    assert json.loads(run("generate", "-m", file, "-n", "3", "the", "--json")[1])["model"] == str(file)
    assert json.loads(run("perplexity", file, text, "--ctx", "64", "--json", "--kl-against", file)[1])
    with packed.PackedFile(file) as f:
        os.truncate(file, 100_000)
        with pytest.raises(deepcalm.PackedFileError, match=r"m\udcff\.dcalm"):  # from C++
            _core.Model(os.fsencode(file), f.fileno(), f.config, f.tensor_table(), None, 1)
    generate = ("generate", "-m", path)
    for bad in (("generate", "-m", file, "x"), ("generate", "-m", folder, "x"), ("inspect", name(b"no\xff")),
                ("pack", name(b"\xff"), "x"), ("pack", "org/\udcff", "x"),
                (*generate, "--file", name(b"no\xff"))):  # fmt: skip
        error(run(*bad))
    assert run(*generate, "--isa", "\udcff", "x")[0] == 2


def test_json_output_has_no_nan(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    common.write_json({"a": [math.nan, -math.inf, 1.5], "b": {"c": math.inf}})
    assert json.loads(capsysbinary.readouterr().out) == {"a": [None, None, 1.5], "b": {"c": None}}
    common.write_json("\x1b\x7f\x9b é")  # nor what controls a terminal
    assert capsysbinary.readouterr().out.decode() == '"\\u001b\\u007f\\u009b é"\n'


# ---- inspect


def test_inspect_shows_the_file(run: Run, path: Path) -> None:
    info = json.loads(run("inspect", path, "--json")[1])
    assert info["file_bytes"] == path.stat().st_size and "bad_checksums" not in info


def test_inspect_finds_a_flipped_bit(run: Run, path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100_000] ^= 1
    (tmp_path / "m.dcalm").write_bytes(data)
    assert run("inspect", tmp_path / "m.dcalm")[0] == 0
    code, out, err = run("inspect", tmp_path / "m.dcalm", "--check")
    assert code == 1 and b"all right" not in out and "wrong checksum or padding, or NaN in f8: " in err
    assert len(json.loads(run("inspect", tmp_path / "m.dcalm", "--check", "--json")[1])["bad_checksums"]) == 1


def test_inspect_dumps_a_tensor(run: Run, path: Path, tmp_path: Path) -> None:
    assert run("inspect", path, "--dump", "layers.0.wo", tmp_path / "wo.npy") == (0, b"", "")
    assert (np.load(tmp_path / "wo.npy") == packed.PackedFile(path).unpack("layers.0.wo")).all()
    assert "no tensor" in error(run("inspect", path, "--dump", "layers.9.wo", tmp_path / "x.npy"))


# ---- perplexity


def test_perplexity_command(run: Run, path: Path, tmp_path: Path) -> None:
    text = "the other thing in the air over a town"
    (tmp_path / "t.txt").write_text(text)
    want = perplexity(models.model(), text, ctx=16)
    code, out, err = run("perplexity", path, tmp_path / "t.txt", "--ctx", "16")
    assert (code, err) == (0, "")
    lines = out.decode().splitlines()
    assert lines[0] == f"perplexity {want.perplexity:.4f} +- {want.standard_error:.4f}"
    assert (
        lines[2]
        == f"{want.n_scored} of {want.n_tokens} tokens scored, {want.n_windows} windows of 16 positions, without bos"
    )
    code, out, _ = run("perplexity", path, "-", "--ctx", "16", "--json", stdin=text.encode())
    assert code == 0 and json.loads(out)["nll_mean"] == want.nll_mean and json.loads(out)["divergence"] is None
    q8 = models.packed(dtype="q8")
    code, out, _ = run("perplexity", q8, tmp_path / "t.txt", "--ctx", "16", "--kl-against", path)
    assert code == 0 and re.search(rf"KL\({re.escape(str(path))} \|\| this\) 0\.\d+ \+- 0\.\d+ nats", out.decode())


# ---- memory, bandwidth


def test_long_runs_say_what_share_of_a_plain_read_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "read_bandwidth", lambda *_: 8.0)
    model = models.model()
    stats = Stats(decode_tokens=9, decode_seconds=1.5, decode_bytes=9_000_000_000)
    read = run_commands.bandwidth_now(model, stats)
    assert read == 8.0 and run_commands.bandwidth_now(model, Stats(decode_tokens=9, decode_seconds=0.4)) is None
    answer, _ = run_commands.start(model.session(), [1, 2], 2, stop=(), seed=None, temp=0.0)
    list(answer)
    assert ", 6.00 GB/s, 75 % of a plain read" in run_commands.summary(answer, stats, None, read)
    assert "plain read" not in run_commands.summary(answer, stats, None)


def few_locked_pages() -> None:
    """In a child: 64 kB of locked memory, without the capability that makes the limit void."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    ctypes.CDLL(None).prctl(
        24, 14, 0, 0, 0
    )  # PR_CAPBSET_DROP, CAP_IPC_LOCK: gone after exec; not root: nothing to drop


def test_lock(path: Path) -> None:
    done = commands.run("generate", "-m", path, "-n", "2", "-q", "--lock", "the")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        assert done[0] == 0 and done[2] == ""
    code, out, err = commands.run(
        "generate", "-m", path, "-n", "2", "--lock", "the", preexec_fn=few_locked_pages
    )  # fmt: skip
    kb = -(-path.stat().st_size // 1024)
    assert (code, out) == (1, b"")
    assert re.search(rf"\.dcalm: cannot lock {kb} kB in memory: .*; the limit \(ulimit -l\) is 64 kB", err), err


def test_a_cold_file_is_read_once_from_end_to_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepcalm.Model(path)
    model.path.read_bytes()
    assert model.cold_share() < 0.05  # just read, or the system does not tell
    bar: list[tuple[int, int]] = []
    monkeypatch.setattr(common, "progress", lambda *_: contextlib.nullcontext(lambda *step: bar.append(step)))
    common.read_cold(model, quiet=False)
    assert not bar

    def preadv(_fd: int, _buffers: object, offset: int, _flags: int) -> int:
        if offset > model.file_bytes // 2:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert 0.4 < model.cold_share() < 0.6
    common.read_cold(model, quiet=False)
    assert bar[-1] == (model.file_bytes, model.file_bytes)
    bar.clear()
    monkeypatch.setattr("deepcalm.limits.available_memory", lambda: model.file_bytes // 4)  # pages would not stay
    common.read_cold(model, quiet=False)
    assert not bar


# ---- start


def test_start_is_cheap() -> None:
    """Process start to first token in less than 1.5 s of processor time; elapsed time is the machine's load too."""
    p = start("generate", "-m", models.packed(), "-n", "1", "--threads", "1", "the")
    out, _ = p.communicate(timeout=30)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    p = start("generate", "-m", models.packed(), "-n", "1", "--threads", "1", "the")
    assert p.communicate(timeout=30)[0] == out
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_stdin_pipe_capacity_is_no_limit(path: Path) -> None:
    """A prompt longer than a pipe's buffer arrives whole."""
    text = b"the " * 30_000
    code, out, err = commands.run("generate", "-m", path, "-", stdin=text)
    assert (code, out) == (1, b"") and "the prompt has " in err
    assert int(re.search(r"has (\d+) tokens", err)[1]) > 29_000  # type: ignore[index]
