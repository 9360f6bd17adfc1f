"""``deepcalm batch``: lines in, results out, and the same bytes however it was cut."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import commands
import deepcalm
import models
import tiny
from commands import Run, Terminal, error
from deepcalm import batch_lines
from deepcalm.batch import Batch
from deepcalm.batch_lines import Line, Lines, Settings, read_lines, unique
from deepcalm.files.pack import pack
from deepcalm.template import ChatTemplate

N_LINES = int(os.environ.get("DEEPCALM_BATCH_LINES", "250"))  # of the run that is killed ten times


def lines_of(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def answer(run: Run, path: Path, tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """``deepcalm batch`` of an input's lines: (exit code, result lines, stderr)."""

    def call(text: str | bytes, *options: str, model: Path = path) -> tuple[int, list[dict[str, Any]], str]:
        (tmp_path / "in.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
        out = tmp_path / "out.jsonl"
        code, shown, err = run("batch", "-m", model, tmp_path / "in.jsonl", out, "-n", "4", "-c", "200", *options)
        assert not shown
        return code, lines_of(out) if out.exists() else [], err

    return call


Answer = Callable[..., tuple[int, list[dict[str, Any]], str]]


# ---- reading lines


def reference_lines(data: bytes, limit: int) -> list[tuple[int, bytes | None]]:
    out: list[tuple[int, bytes | None]] = []
    for i, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        text = line.rstrip(b"\r")
        if len(text) > limit:
            out.append((i, None))
        elif text.strip():
            out.append((i, text))
    return out


PIECES = st.sampled_from(
    [b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b" ", b"\t", b"a", b"bcd", b"1234567890", b"\xff", b"\0"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map(b"".join))
def test_lines_are_cut_at_newlines_and_counted(data: bytes) -> None:
    before, batch_lines.MAX_BYTES = batch_lines.MAX_BYTES, 10
    try:
        digest = hashlib.sha256()
        got = list(read_lines(io.BytesIO(data), digest))
    finally:
        batch_lines.MAX_BYTES = before
    blank = [(i, line) for i, line in got if line is not None or data.split(b"\n")[i - 1].strip()]
    assert blank == [(i, line) for i, line in reference_lines(data, 10) if line or data.split(b"\n")[i - 1].strip()]
    assert digest.digest() == hashlib.sha256(data).digest()


def test_long_lines_take_no_memory() -> None:
    class Endless(io.RawIOBase):
        left = 64 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            n = min(len(buffer), self.left)
            self.left -= n
            buffer[:n] = b"x" * n
            return n

    lines = read_lines(io.BufferedReader(Endless()))
    assert list(lines) == [(1, None)]
    line = Line.parse(None, 1)
    assert line.error is not None and (line.id, line.error.code) == (None, "too_large")


LINES = st.binary(max_size=60) | st.dictionaries(
    st.sampled_from(["id", "custom_id", "body", "url", "method", "prompt", "messages", "n", "seed", "temperature"]),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5)
        | st.sampled_from(["POST", "/v1/completions", "/v1/chat/completions"]),
        lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["prompt", "role"]), x, max_size=2),
        max_leaves=5,
    ),
    max_size=5,
).map(lambda value: json.dumps(value).encode())  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(LINES, st.integers(1, 99))
def test_any_bytes_are_a_line_or_an_error_line(data: bytes, number: int) -> None:
    line = Line.parse(data, number)
    assert (line.fields is None) == (line.error is not None)
    if line.error is not None:
        result = json.loads(batch_lines.error_line(line))
        assert line.has(result) and not Line.parse(data, number + 1).has(result | {"line": number})
        assert not Line(number, id="another", openai=line.openai).has(result)


def test_ids() -> None:
    def ids(*lines: str) -> list[tuple[Any, str | None]]:
        parsed = unique(Line.parse(line.encode(), i) for i, line in enumerate(lines, 1))
        return [(x.id, x.error and str(x.error)) for x in parsed]

    p = '"prompt": "x"'
    assert ids(f'{{"id": "a", {p}}}', f"{{{p}}}", f'{{"id": null, {p}}}') == [("a", None), (2, None), (3, None)]
    assert ids(f'{{"id": 5, {p}}}', f'{{"id": "5", {p}}}') == [(5, None), ("5", "id: line 1 has the same")]
    assert ids(f'{{"id": "2", {p}}}', f"{{{p}}}")[1] == (2, "id: line 1 has the same")
    # a line in error has its id, and an unreadable one has none
    assert ids('{"id": "a", "prompt": 5}', f'{{"id": "a", {p}}}')[1][1] == "id: line 1 has the same"
    assert ids("{", "{")[1][1] != "id: line 1 has the same"
    assert ids('{"custom_id": "a", "body": {}}', f'{{"id": "a", {p}}}')[1][1] == "id: line 1 has the same"
    for bad in ("1.0", "true", "[]", "{}"):
        assert ids(f'{{"id": {bad}, {p}}}') == [(None, "id: expected a string or an integer")]
    assert ids(f'{{"id": "", {p}}}', f'{{"id": -7, {p}}}') == [("", None), (-7, None)]


def test_ids_of_a_million_lines_fit() -> None:
    """A hundred thousand take a tenth of what is bearable."""
    code = """
import resource
from deepcalm.batch_lines import Line, unique
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for line in unique(Line(i, id=f"request-{i:040d}") for i in range(1, 100_001)):
    assert line.error is None
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], env=commands.environment(), capture_output=True, check=True)
    assert int(done.stdout) < 20_000  # KiB


# ---- results


def test_own_lines(answer: Answer, path: Path) -> None:
    text = """
{"prompt": "Hello"}
{"id": "b", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "logprobs": true, "top_logprobs": 1}

{"id": 5, "prompt": [5, 6, 7], "logprobs": 1, "max_tokens": 2, "seed": 3}
{"id": "z", "prompt": "Hello", "stop": ["zzzz"], "model": "anything"}
"""
    code, (first, chat, ids, last), err = answer(text)
    assert code == 0 and "4 lines, 0 of them in error, complete; " in err
    model = deepcalm.Model(path, threads=1)
    assert first == {
        "id": 2,
        "text": deepcalm.generate("Hello", model, max_tokens=4, ctx=200),
        "finish_reason": "length",
        "seed": seed_of(0, "2"),
        "usage": {"prompt_tokens": len(model.encode("Hello")), "completion_tokens": 4},
    }
    assert list(chat) == ["id", "message", "finish_reason", "seed", "usage", "logprobs"]
    assert chat["message"]["role"] == "assistant" and len(chat["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert (ids["id"], ids["seed"], ids["usage"]) == (5, 3, {"prompt_tokens": 3, "completion_tokens": 2})
    assert len(ids["logprobs"]["tokens"]) == 2 and last["id"] == "z"


def seed_of(seed: int, name: str) -> int:
    return int(struct.unpack("<Q", hashlib.sha256(struct.pack("<Q", seed) + name.encode()).digest()[:8])[0])


def test_seeds_come_from_the_id_and_a_lines_own_wins(answer: Answer) -> None:
    text = '{"id": "é", "prompt": "a", "temperature": 1}\n{"id": 7, "prompt": "a", "seed": 9}\n'
    _, (a, b), _ = answer(text, "--seed", str(2**64 - 1))
    assert (a["seed"], b["seed"]) == (seed_of(2**64 - 1, "é"), 9)
    _, (again, _), _ = answer(text, "--seed", "5", "--overwrite")
    assert again["seed"] == seed_of(5, "é") and again["text"] != a["text"]


def test_openai_lines(answer: Answer) -> None:
    text = "\n".join(
        json.dumps(line)
        for line in (
            {"custom_id": "a", "method": "POST", "url": "/v1/completions",
             "body": {"model": "gpt", "prompt": ["x", "y"], "n": 2, "temperature": 1}},
            {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
             "body": {"messages": [{"role": "user", "content": "Hi"}]}},
            {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [], "n": 1}},
            {"custom_id": "d", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
            {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}},
            {"custom_id": "f", "body": 5},
            {"custom_id": "g", "method": "GET", "body": {"prompt": "x"}},
            {"body": {"prompt": "x"}, "url": None},
            {"custom_id": "h", "body": {"prompt": "x"}, "priority": 1},
        )
    )  # fmt: skip
    code, got, err = answer(text)
    assert code == 0 and "9 lines, 6 of them in error" in err
    assert all(list(line) == ["custom_id", "response", "error"] for line in got)
    body = got[0]["response"]["body"]
    assert got[0]["response"]["status_code"] == 200 and got[0]["error"] is None
    assert list(body) == [*("id", "created", "model", "system_fingerprint", "object", "choices", "usage", "seed")]
    assert (body["id"], body["created"], body["seed"]) == ("cmpl-a", 0, seed_of(0, "a")) and len(body["choices"]) == 4
    assert list(body["usage"]) == ["prompt_tokens", "completion_tokens", "total_tokens"]
    assert got[1]["response"]["body"]["id"] == "chatcmpl-b"
    failed = got[2]["response"]
    assert failed["status_code"] == 400 and failed["body"]["error"]["param"] == "messages"
    assert [line["response"]["body"]["error"]["param"] for line in (got[3], *got[5:7])] == ["url", "body", "method"]
    assert got[4] == {
        "custom_id": "a",
        "response": None,
        "error": {"code": "duplicate_id", "message": "custom_id: line 1 has the same"},
    }
    assert got[7]["custom_id"] == 8 and got[7]["response"]["status_code"] == 200
    assert got[8]["response"]["body"]["error"]["param"] == "priority"


def test_error_lines(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_BYTES", 500)
    text = b"\xef\xbb\xbf" + b"\r\n".join(
        [
            b'{"id": "bom", "prompt": "x"}',
            b'{"id": "utf8", "prompt": "\xff"}',
            b'{"id": "json" "prompt": "x"}',
            b"  \t ",
            b'{"id": "nan", "prompt": "x", "temperature": NaN}',
            b'{"id": "inf", "prompt": "x", "temperature": 1e999}',
            b'{"id": "long", "prompt": "' + b"x" * 500 + b'"}',
            b'{"id": "two", "prompt": "x", "n": 2}',
            b'{"id": "many", "prompt": ["x", "y"]}',
            b'{"id": "big", "prompt": "' + b"a, " * 150 + b'"}',
            b'{"id": "range", "prompt": "x", "top_p": 2}',
            b'{"id": "end", "prompt": "x"}',
        ]
    )
    code, got, err = answer(text)
    assert code == 0 and "11 lines, 9 of them in error" in err
    assert [(line["id"], line.get("line"), line.get("error", {}).get("code")) for line in got] == [
        ("bom", None, None), (None, 2, "invalid_json"), (None, 3, "invalid_json"), (None, 5, "invalid_json"),
        (None, 6, "invalid_json"), (None, 7, "too_large"), ("two", 8, "invalid_value"), ("many", 9, "invalid_value"),
        ("big", 10, "context_length_exceeded"), ("range", 11, "invalid_value"), ("end", None, None),
    ]  # fmt: skip
    assert all(list(line["error"]) == ["code", "message"] for line in got if "error" in line)


def test_messages_without_a_template(answer: Answer) -> None:
    code, (line,), _ = answer('{"messages": [{"role": "user", "content": "Hi"}]}', model=models.without_template())
    assert code == 0 and (line["id"], line["line"], line["error"]["code"]) == (1, 1, "no_chat_template")


def test_an_echo_needs_no_answer(answer: Answer) -> None:
    """As lm-eval scores a text; an answer to it would be behind it."""
    text = '{"prompt": "Hello", "echo": true, "max_tokens": 0, "logprobs": 1}\n{"prompt": "Hello", "echo": true}\n'
    _, (echo, more), _ = answer(text)
    assert (echo["text"], echo["finish_reason"], echo["usage"]["completion_tokens"]) == ("Hello", "length", 0)
    assert echo["logprobs"]["token_logprobs"][0] is None and len(echo["logprobs"]["tokens"]) > 1
    assert more["text"].startswith("Hello") and more["usage"]["completion_tokens"] == 4


def test_options_are_what_lines_do_not_say(answer: Answer) -> None:
    text = '{"prompt": "a"}\n{"prompt": "a", "temperature": 0, "max_tokens": 1}\n'
    _, (a, b), _ = answer(text, "--temp", "1.5", "--stop", "\\n", "-n", "6", "-s", "3")
    assert a["usage"]["completion_tokens"] > 1 == b["usage"]["completion_tokens"]
    _, (c, _), _ = answer(text, "-n", "6", "-s", "3", "--overwrite")
    assert a["text"] != c["text"]


# ---- order, reading ahead


class FakeBatch:
    """Requests that end in any order, a random few of them in each step."""

    def __init__(self, model: deepcalm.Model, seed: int) -> None:
        self.model, self.ctx, self.kv, self.random = model, 100, "f16", random.Random(seed)
        self.open: list[Any] = []

    def submit(self, ids: list[int], *, n: int, **_: Any) -> Any:
        choices = [
            SimpleNamespace(reason=None, error=None, tokens=[1], text=f"{ids}", scores=[], seed=5) for _ in range(n)
        ]
        request = SimpleNamespace(choices=choices, prompt_tokens=len(ids), cached_tokens=0, done=False)
        self.open.append(request)
        return request

    def step(self) -> None:
        assert self.open
        for request in self.random.sample(self.open, self.random.randint(0, min(3, len(self.open)))):
            self.open.remove(request)
            request.done = True
            for choice in request.choices:
                choice.reason = "length"


@pytest.mark.parametrize("seed", range(5))
def test_results_are_in_order_and_few_lines_are_read_ahead(seed: int) -> None:
    fake: Any = FakeBatch(models.model(), seed)
    read = written = most = 0

    def lines() -> Iterator[Line]:
        nonlocal read, most
        for i in range(1, 101):
            read, most = i, max(most, i - written)
            yield Line.parse(b"{" if i % 7 == 0 else b'{"prompt": [%d]}' % i, i)

    for result in Lines(fake, Settings("m", "2026-02-03")).run(lines(), ahead=12):
        written += 1
        value = json.loads(result.data)
        assert result.error == (written % 7 == 0)
        assert value["line"] == written if written % 7 == 0 else value["text"] == f"[{written}]"
    assert (read, written, most) == (100, 100, 12)


def test_a_sequence_that_fails_is_an_error_line_and_want_of_memory_ends_the_run() -> None:
    fake: Any = FakeBatch(models.model(), 0)
    work = Lines(fake, Settings("m", "2026-02-03"))
    for failure, raised in ((deepcalm.SessionError("token 5 is NaN"), None),
                            (deepcalm.ResourceError("no memory"), deepcalm.ResourceError),
                            (MemoryError("no memory"), MemoryError)):  # fmt: skip
        started = work.start(Line.parse(b'{"prompt": [1]}', 3))
        started.requests[0].choices[0].error = failure
        if raised is None:
            want = {"id": 3, "line": 3, "error": {"code": "failed", "message": "token 5 is NaN"}}
            assert json.loads(work.result(started).data) == want
        else:
            with pytest.raises(raised):
                work.result(started)


def test_without_ray_the_option_says_what_to_install(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = answer('{"prompt": "the"}\n', "--ray", "127.0.0.1:1")
    assert (code, out) == (1, []) and err == "deepcalm: error: Ray is not installed: pip install 'deepcalm[ray]'\n"
    code, _, err = answer('{"prompt": "the"}\n', "--device", "auto", "--ray")
    assert code == 1 and "not with --device auto" in err


# ---- the same bytes however it was cut


def many_lines(n: int) -> bytes:
    """Short lines of every kind, and some that are wrong."""
    rng = random.Random(7)
    out = []
    for i in range(1, n + 1):
        sampling = rng.choice([{}, {"temperature": 1}, {"temperature": 0.7, "top_p": 0.9, "seed": i}, {"stop": "e"}])
        few = {"max_tokens": rng.randint(1, 12)}
        kind = rng.randrange(12)
        prompt = "The quick brown fox " * rng.randint(1, 3) if rng.random() < 0.3 else rng.choice("abcdefgh")
        body: dict[str, Any] = {"prompt": prompt, **sampling, **few}
        if kind == 0:
            body = {"messages": [{"role": "user", "content": prompt}], **sampling, **few, "logprobs": True}
        elif kind == 1:
            body = {"prompt": [rng.randrange(200) for _ in range(rng.randint(1, 90))], "logprobs": 1, **few}
        line: dict[str, Any] = {"id": f"line-{i}", **body}
        if kind == 2:
            line = {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "n": 2}}
        elif kind == 3:
            line = body
        elif kind == 4:
            line["id"] = rng.choice(["twice", i])
        text = json.dumps(line)
        out.append(text[:-5] if kind == 5 else text)
        out.extend([""] * (kind == 6))
    return "\n".join(out).encode() + b"\n"


# Imports everything, and then forks for each command line: a start takes milliseconds.
FORKER = """
import json, os, sys
import numpy, tokenizers
import deepcalm.batch, deepcalm.batch_file, deepcalm.cli, deepcalm.model
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        for fd in range(3):
            os.dup2(null := os.open(os.devnull, os.O_RDWR), fd)
        os._exit(deepcalm.cli.main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
Batching = Callable[..., int]


@pytest.fixture(scope="module")
def batching() -> Iterator[Batching]:
    """Runs the command and returns its exit code, -signal if one ended it."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER],
        env=commands.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    answers = process.stdout

    def call(source: Path, target: Path, *options: str, size: int | None = None, number: int = signal.SIGKILL) -> int:
        """size: sends a signal once the output has so many bytes."""
        arguments = ["batch", "-m", models.packed(), source, target, "-c", "200", "-t", "1", *options]
        process.stdin.write(json.dumps([*map(str, arguments)]).encode() + b"\n")
        pid = int(answers.readline())
        while size is not None and not select.select([answers], [], [], 0.0005)[0]:
            if target.exists() and target.stat().st_size >= size:
                os.kill(pid, number)
                break
        return int(answers.readline())

    with process:
        yield call
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(batching: Batching, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An input and the output of one run over it, one sequence at a time without drafts."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_bytes(many_lines(N_LINES))
    assert batching(folder / "in.jsonl", folder / "out.jsonl", "--max-sequences", "1", "--draft", "off") == 0
    return folder / "in.jsonl", (folder / "out.jsonl").read_bytes()


def test_killed_ten_times_it_writes_the_same_bytes(
    batching: Batching, whole: tuple[Path, bytes], tmp_path: Path
) -> None:
    """At moments of no kind, with other numbers of sequences and drafts each time."""
    source, want = whole
    assert len(want.splitlines()) > N_LINES * 0.9
    out, rng = tmp_path / "out.jsonl", random.Random()
    sizes = sorted(rng.randrange(1, len(want)) for _ in range(10))
    codes = []
    for i, size in enumerate(sizes):
        options = (
            "--max-sequences",
            str(rng.choice([1, 2, 5, 8, 30])),
            "--draft",
            rng.choice(["off", "1", "2", "auto"]),
        )
        codes.append(batching(source, out, *options, size=size))
        have = out.read_bytes()
        assert want.startswith(have) and codes[-1] in (-signal.SIGKILL, 0), (i, options)
        if rng.random() < 0.5:  # as a kill in the middle of a write leaves it
            out.write_bytes(have[: len(have) - rng.randint(1, 9)])
    assert codes.count(-signal.SIGKILL) >= 5
    assert batching(source, out) == 0
    assert out.read_bytes() == want


def test_it_is_the_same_in_one_go_with_many_sequences(
    batching: Batching, whole: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, want = whole
    assert batching(source, tmp_path / "out.jsonl", "--max-sequences", "32", "--draft", "2") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == want


def test_lines_dealt_to_several_batches_get_the_same_bytes(whole: tuple[Path, bytes]) -> None:
    """As a driver of several machines deals them: it sees bytes and line numbers only."""
    source, want = whole
    with source.open("rb") as file:
        lines = [*unique(Line.parse(data, number) for number, data in read_lines(file))]
    results: dict[int, bytes] = {}
    for part in range(3):
        model = deepcalm.Model(models.packed(), threads=1)
        settings = Settings(model.path.stem, "2026-02-03T04:05:06")
        with model.batch(max_sequences=6, ctx=200) as batch:
            answers = Lines(batch, settings).run(iter(lines[part::3]), ahead=24)
            for line, result in zip(lines[part::3], answers, strict=True):
                results[line.number] = result.data
    assert b"".join(results[line.number] for line in lines) == want


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_whole_lines(
    batching: Batching, whole: tuple[Path, bytes], tmp_path: Path, number: int
) -> None:
    source, want = whole
    out = tmp_path / "out.jsonl"
    assert batching(source, out, size=len(want) // 3, number=number) == 130
    have = out.read_bytes()
    assert want.startswith(have) and have.endswith(b"\n") and len(have) < len(want)
    assert batching(source, out) == 0 and out.read_bytes() == want


def test_an_interrupt_says_how_to_go_on(run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n' * 40)
    step, left = Batch.step, [25]

    def interrupted(self: Batch) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Batch, "step", interrupted)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    arguments = ("batch", "-m", path, source, out, "-n", "9", "-c", "100", "--draft", "off")
    code, _, err = run(*arguments)
    n = len(lines_of(out))
    assert code == 130 and 0 < n < 40
    assert err == f"\ninterrupted after {n} lines; the same command goes on from there\n"
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL
    code, _, err = run(*arguments)
    assert code == 0 and f"40 lines ({n} were there), 0 of them in error, complete; " in err


def test_want_of_memory_ends_the_run_which_can_go_on(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n' * 30 + '{"prompt": "a", "max_tokens": 90}\n' + '{"prompt": "b"}\n')
    arguments = ("batch", "-m", path, source, out, "-n", "4", "-c", "100", "-t", "1")
    model = deepcalm.Model(path, threads=1)
    rows = model.session(100).cache_bytes // 100
    few = ("--max-sequences", "2", "--cache-bytes", str(rows * 60))
    line = error(run(*arguments, *few))
    assert "cache_bytes is" in line and re.search(
        r"; \d+ lines are done; the same command goes on from there$", line[:-1]
    )
    assert 20 < len(lines_of(out)) <= 30
    step = Batch.step
    for failure in (MemoryError(), deepcalm.ResourceError("the cache does not fit")):
        monkeypatch.setattr(Batch, "step", lambda _self, failure=failure: (_ for _ in ()).throw(failure))
        assert "lines are done; the same command goes on from there" in error(run(*arguments))
    monkeypatch.setattr(Batch, "step", step)
    assert run(*arguments)[0] == 0
    assert [line["id"] for line in lines_of(out)] == list(range(1, 33)) and "error" not in out.read_text()


def test_a_full_disk_names_the_file(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    line = error(run("batch", "-m", path, tmp_path / "in", "/dev/full", "-n", "2", "--quiet"))
    assert line.startswith("deepcalm: error: /dev/full: No space left on device; 0 lines are done")


# ---- OUT and OUT.run


def test_what_was_begun_otherwise_is_refused(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments: list[Any] = ["batch", "-m", path, source, out, "-n", "4", "-c", "100"]
    assert run(*arguments)[0] == 0
    have, record = out.read_bytes(), Path(f"{out}.run").read_bytes()
    assert set(json.loads(record)) == {
        "deepcalm", "python", "tokenizers", "jinja2", "model", "model_sha256", "device", "isa", "kv", "ctx", "seed",
        "max_tokens", "sampling", "stop", "date", "input_bytes", "input_sha256",
    }  # fmt: skip
    other = models.packed(seed=1)
    isas = [name for name in models.ISAS if name != deepcalm.Model(path).isa]
    for options, key in (
        (["-n", "5"], "max_tokens 4, this is 5"), (["--kv", "q8"], "kv f16, this is q8"), (["-c", "99"], "ctx 100"),
        (["--seed", "1"], "seed 0, this is 1"), (["--temp", "0.5"], "sampling {}, this is {'temp': 0.5}"),
        (["--stop", "x"], r"stop [], this is ['x']"), (["-m", other], "model_sha256 "),
        *((["--isa", isa], "isa ") for isa in isas[-1:]),
    ):  # fmt: skip
        line = error(run(*arguments, *options))
        assert f"{out}: was begun with {key}" in line and line.endswith("; --overwrite starts it anew\n")
    source.write_text('{"prompt": "a"}\n{"prompt": "c"}\n')
    assert "was begun with input_sha256 " in error(run(*arguments))
    assert (out.read_bytes(), Path(f"{out}.run").read_bytes()) == (have, record)
    # what changes no bytes may change
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, _, err = run(*arguments, "--draft", "off", "--max-sequences", "3", "-t", "2")
    assert (code, err) == (0, "2 lines (2 were there), 0 of them in error, complete\n")
    assert out.read_bytes() == have
    assert run(*arguments, "--kv", "q8", "--overwrite")[0] == 0
    assert json.loads(Path(f"{out}.run").read_bytes())["kv"] == "q8"
    monkeypatch.setattr(deepcalm._core, "__version__", "9.9")
    assert "was begun with deepcalm " in error(run(*arguments, "--kv", "q8"))


def test_another_model_of_the_same_name_is_refused(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    for i, file in enumerate((path, models.packed(seed=1))):
        (tmp_path / "m.dcalm").write_bytes(file.read_bytes())
        result = run("batch", "-m", tmp_path / "m.dcalm", tmp_path / "in", tmp_path / "out", "-n", "4")
        assert "was begun with model_sha256 " in error(result) if i else result[0] == 0


def test_an_output_without_a_record_is_never_touched(run: Run, path: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n')
    out.write_text("mine")
    for options in ((), ("--overwrite",)):
        line = error(run("batch", "-m", path, source, out, *options))
        assert "exists and is left as it is, as no out.run says that deepcalm batch wrote it" in line
    assert out.read_text() == "mine" and not Path(f"{out}.run").exists()
    assert "left as it is" in error(run("batch", "-m", path, source, source))
    record = Path(f"{source}.run")
    record.write_text(source.read_text())
    assert "in.run: is there, and no record" in error(run("batch", "-m", path, record, source, "--overwrite"))
    assert record.read_text() == source.read_text() == '{"prompt": "a"}\n'
    out.write_text("")  # as mktemp makes it: there is nothing to lose
    assert run("batch", "-m", path, source, out, "-n", "2")[0] == 0


def test_names_need_not_be_text(run: Run, path: Path, tmp_path: Path) -> None:
    names = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in (b"\xff.dcalm", b"in\xff", b"out\xff")]
    names[0].symlink_to(path)
    names[1].write_text('{"custom_id": "a", "body": {"prompt": "x"}}\n' * 2)
    assert run("batch", "-m", *names, "-n", "2")[0] == 0
    first, second = lines_of(names[2])
    assert first["response"]["body"]["model"] == "\\udcff" and second["error"]["code"] == "duplicate_id"
    code, _, err = run("batch", "-m", *names, "-n", "2")
    assert (code, err) == (0, "2 lines (2 were there), 1 of them in error, complete\n")


def test_kept_lines_must_be_those_of_the_input(run: Run, path: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"id": 5, "prompt": "a"}\n{"prompt": "b"}\n{\n{"id": "d", "prompt": "d"}\n')
    arguments = ("batch", "-m", path, source, out, "-n", "4")
    assert run(*arguments)[0] == 0
    have = out.read_bytes()
    lines = have.splitlines(keepends=True)
    for damaged in (
        [lines[1], lines[0], *lines[2:]], [lines[0].replace(b"5", b'"5"', 1)], [lines[0][:-9] + b"\n"], [b"\n"],
        [b"null\n"], [b"{}\n"], [lines[0], lines[1], lines[2].replace(b'"line": 3', b'"line": 4')],
        [b'{"id": 5, "id": 5}\n'], [*lines, lines[3]], [b"\xff\n"],
    ):  # fmt: skip
        out.write_bytes(b"".join(damaged))
        line = error(run(*arguments))
        assert f"{out}: line " in line
        assert out.read_bytes() == b"".join(damaged)
    out.write_bytes(b'{"id": 5, "response": 7}\n' + b"".join(lines[1:]))
    assert run(*arguments)[0] == 0  # somebody's own words, under its id
    for end in (b"".join(lines[:2]) + b'{"id": nul', b"x", b"".join(lines) + b"xyz"):
        out.write_bytes(end)
        assert run(*arguments)[0] == 0 and out.read_bytes() == have
    out.unlink()  # the record alone: nothing is there yet
    assert run(*arguments)[0] == 0 and out.read_bytes() == have
    for record in (b"", b"[]", b"{}", b"{"):
        Path(f"{out}.run").write_bytes(record)
        assert "out.run" in error(run(*arguments)) or "was begun with" in error(run(*arguments))
        assert out.read_bytes() == have


def test_two_cannot_write_one_output(run: Run, path: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n')
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another deepcalm batch is writing it" in error(run("batch", "-m", path, source, out, "--overwrite"))
    assert run("batch", "-m", path, source, out, "-n", "2")[0] == 0


def test_an_input_that_changes_meanwhile_is_noticed(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n' * 100)
    step = Batch.step

    def changing(self: Batch) -> Any:
        source.write_text('{"prompt": "a"}\n' * 101)
        return step(self)

    monkeypatch.setattr(Batch, "step", changing)
    assert "changed while it was read" in error(run("batch", "-m", path, source, out, "-n", "2"))


def test_streams(run: Run, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = b'{"prompt": "a"}\n{"prompt": "b"}'
    code, shown, err = run("batch", "-m", path, "-", "-", "-n", "4", stdin=text)
    assert code == 0 and len(shown.splitlines()) == 2
    assert err.count("note: - is a stream: this run cannot be gone on with\n") == 2
    code, _, err = run("batch", "-m", path, "-", out, "-n", "4", stdin=text)
    assert code == 0 and out.read_bytes() == shown and err.count("note: ") == 1
    assert "was made from a stream; --overwrite starts it anew" in error(
        run("batch", "-m", path, "-", out, "-n", "4", "-q", stdin=text)
    )
    assert run("batch", "-m", path, "-", out, "-n", "4", "-q", "--overwrite", stdin=text) == (0, b"", "")
    (tmp_path / "in").write_bytes(text)
    assert run("batch", "-m", path, tmp_path / "in", "-", "-n", "4", "-q") == (0, shown, "")
    assert run("batch", "-m", path, tmp_path / "none", "-", "-q")[2].endswith("none: No such file or directory\n")


def test_lines_are_written_as_they_are_done(path: Path) -> None:
    """One question and its answer, then the next: a program at the other end of two pipes."""
    process = subprocess.Popen(
        [*commands.COMMAND, "batch", "-m", path, "-", "-", "-n", "4", "-q", "--max-sequences", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=commands.environment(DEEPCALM_THREADS="1"),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for _ in range(5):
        process.stdin.write(b'{"prompt": "a"}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["id"] == 1  # while the input is still open
    process.stdin.close()
    assert len(process.stdout.readlines()) == 4 and process.wait(30) == 0
    process.stdout.close()


def test_templates_are_told_the_date_of_the_first_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path / "dated", "v3", dtype="f32", n_shards=1)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pack(folder, tmp_path / "dated.dcalm")
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 3)
    arguments = ("batch", "-m", tmp_path / "dated.dcalm", source, out, "-n", "3")
    assert run(*arguments)[0] == 0
    record = json.loads(Path(f"{out}.run").read_text())
    assert abs(time.mktime(time.strptime(record["date"], "%Y-%m-%dT%H:%M:%S")) - time.time()) < 120
    have = out.read_bytes()
    out.write_bytes(have.splitlines(keepends=True)[0])
    Path(f"{out}.run").write_text(json.dumps(record | {"date": "2001-02-03T04:05:06"}))
    seen: list[str] = []
    encode = ChatTemplate.encode

    def listening(self: ChatTemplate, vocabulary: Any, messages: Any, **options: Any) -> list[int]:
        ids = encode(self, vocabulary, messages, **options)
        seen.append(vocabulary.decode(ids))
        return ids

    monkeypatch.setattr(ChatTemplate, "encode", listening)
    assert run(*arguments)[0] == 0
    assert seen == ["03 Feb 2001"] * 2


# ---- at a terminal


def test_a_bar_shows_lines_speed_and_the_time_left(path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n' * 120)
    terminal = Terminal("batch", "-m", path, tmp_path / "in", tmp_path / "out", "-n", "20", width=120)
    shown = terminal.until(r"lines, \d+ of them in error, complete")
    assert re.search(r"lines .*\d+/120 +[1-9]\d* tok/s +\d+:\d\d:\d\d", shown), shown
    assert terminal.ends() == 0


def test_options_that_change_bytes_and_those_that_do_not(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt": "a", "seed": 1}\n' * 3)
    arguments = ("batch", "-m", path, tmp_path / "in", "-", "-q", "-n", "8")
    want = run(*arguments, "--temp", "1")
    assert want[0] == 0 and want[2] == ""
    for same in (
        ("--device", "cpu"),
        ("--threads", "2"),
        ("--lock",),
        ("--top-k", "0"),
        ("--top-p", "1"),
        ("--min-p", "0"),
    ):
        assert run(*arguments, "--temp", "1", *same) == want
    greedy = run(*arguments)
    for narrow in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
        assert run(*arguments, "--temp", "1", *narrow) == greedy != want


def test_weights_and_caches_that_exceed_the_memory_are_said(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    monkeypatch.setattr("deepcalm.limits.available_memory", lambda: path.stat().st_size)
    err = run("batch", "-m", path, tmp_path / "in", "-", "-n", "1", "-c", "50")[2]
    assert re.search(r"note: weights \S+ GB and cache \S+ GB exceed the \S+ GB of memory available", err)


def test_examples_of_the_page_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 2
    for block in blocks:
        script = f'set -eu\ndeepcalm() {{ {sys.executable} -m deepcalm "$@"; }}\n{block}'
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=commands.environment(), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert [line["id"] for line in lines_of(tmp_path / "answers.jsonl")] == ["cat", "dog", 3, "chat"]
    assert b"2 lines (1 were there), 0 of them in error, complete" in done.stderr
