"""Requests as JSON (deepcalm.wire): what is read, what is refused and by which name, what answers look like."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import commands
import deepcalm
import models
from deepcalm import wire
from deepcalm.markup import Markup
from deepcalm.sampling import Sampling, Scores
from deepcalm.session import MAX_ROWS
from deepcalm.template import ChatTemplate
from deepcalm.text import Vocabulary
from deepcalm.wire import RequestError, parse_fields, parse_object

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Hi"}


@pytest.fixture
def model() -> deepcalm.Model:
    return models.model()


def refused(body: dict[str, Any], chat: bool = False, **options: Any) -> tuple[str | None, str]:
    """The field that a body is refused for, and the code."""
    with pytest.raises(RequestError) as e:
        parse_fields((CHAT if chat else TEXT) | body, chat, **options)
    assert e.value.status == 400 and "\n" not in str(e.value) and len(str(e.value)) <= 300
    error = {"message": str(e.value), "type": "invalid_request_error", "param": e.value.param, "code": e.value.code}
    assert e.value.body() == {"error": error}
    return e.value.param, e.value.code


# ---- JSON


def test_json_is_strict() -> None:
    deep = wire.MAX_DEPTH - 1
    assert parse_object(b'{"a": ' + b"[" * deep + b"]" * deep + b"}")["a"]
    assert (
        parse_object(b'{"a": "\\ud83d\\ude00", "b": 1e308, "c": 123456789012345678901234567890}')["a"] == "\U0001f600"
    )
    for data in (
        *(b"", b"{", b'{"a" 1}', b'"a"', b"[]", b"null", b"\xff{}", b'{"a": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"a": 1}'),
        *(b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"\\uDFFF": 1}', b'{"a": 01}'),
        *(b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\x01"}', b"{} {}"),
        b'{"a": ' + b"[" * (deep + 1) + b"]" * (deep + 1) + b"}",
        *(b'{"a": ' * 100_000, b"[" * 100_000 + b"]" * 100_000),
    ):
        with pytest.raises(RequestError) as e:
            parse_object(data)
        assert (e.value.code, e.value.status) == ("invalid_json", 400), data[:40]
    with pytest.raises(RequestError, match="longer than 16777216 bytes") as e:
        parse_object(b" " * (wire.MAX_BYTES - 1) + b"{}")
    assert (e.value.code, e.value.status) == ("too_large", 413)


def test_deep_json_is_refused_with_the_same_words_wherever_the_stack_ends() -> None:
    """A result line may not depend on how deep the interpreter's stack was when the line was read."""
    found = set()
    for depth in (wire.MAX_DEPTH + 1, 900, 5000, 200_000):
        with pytest.raises(RequestError) as e:
            parse_object(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        found.add(str(e.value))
    assert len(found) == 1


def test_too_little_memory_is_nobodys_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(MemoryError):
        parse_object(b"{}")


# ---- fields


def test_fields_of_a_completion() -> None:
    body = {
        "model": "m", "prompt": ["a", "b"], "temperature": 0.5, "top_p": 1, "top_k": -1, "min_p": 0.1, "seed": -1,
        "stop": "x", "max_tokens": 0, "n": 3, "logprobs": 0, "echo": True, "stream": True,
        "stream_options": {"include_usage": True}, "best_of": 3, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto",
    }  # fmt: skip
    f = parse_fields(body, chat=False, streams=True)
    assert (f.chat, f.model, f.prompts, f.seed, f.stop, f.max_tokens, f.n) == (
        *(False, "m", ("a", "b"), 2**64 - 1, ("x",), 0, 3),
    )
    assert f.given == {"temp": 0.5, "top_p": 1, "top_k": 0, "min_p": 0.1}
    assert (f.logprobs, f.echo, f.stream, f.include_usage) == (0, True, True, True)
    assert parse_fields({"prompt": [1, 2]}, False).prompts == ([1, 2],)
    assert parse_fields({"prompt": [[1], [2, 3]]}, False).prompts == ([1], [2, 3])


def test_fields_of_a_chat_completion() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {
        "messages": [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "user", "content": None},
        ],
        "tools": [tool], "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2, "stop": ["x", "y"],
        "chat_template_kwargs": {"thinking": True}, "response_format": {"type": "text"}, "parallel_tool_calls": True,
    }  # fmt: skip
    f = parse_fields(body, chat=True)
    assert f.messages == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "a\nb", "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": ""},
    ]
    assert f.template == {"thinking": True} and f.tools == [tool]
    assert (f.max_tokens, f.logprobs, f.stop) == (5, 2, ("x", "y"))
    without = parse_fields(body | {"tool_choice": "none", "top_logprobs": None}, chat=True)
    assert without.tools is None and without.template == {"thinking": True} and without.logprobs == 0
    assert parse_fields(CHAT | {"tools": [], "logprobs": False}, True).logprobs is None


def test_null_is_absent() -> None:
    for chat, body in ((True, CHAT), (False, TEXT)):
        names = set(wire.CHAT if chat else wire.COMPLETIONS) - body.keys()
        assert parse_fields(body | dict.fromkeys(names), chat) == parse_fields(body, chat)


@pytest.mark.parametrize(
    ("chat", "body", "param"),
    [
        *((c, {n: v}, n) for c in (False, True) for n, v in (
            ("temperature", -0.1), ("temperature", 1e39), ("temperature", True), ("temperature", "1"), ("top_p", 0),
            ("top_p", 1.5), ("top_k", -2), ("top_k", 0.5), ("top_k", 2**31), ("min_p", 2), ("min_p", [1]),
            ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 1.0), ("seed", True), ("stop", ""), ("stop", ["a"] * 17),
            ("stop", "x" * 257), ("stop", [1]), ("stop", {}), ("max_tokens", 0), ("max_tokens", "7"), ("n", 0),
            ("n", 129), ("stream", 1), ("stream", True), ("stream_options", {}), ("model", 1),
            ("presence_penalty", 0.5), ("frequency_penalty", 1), ("logit_bias", {"5": 1}), ("max_tokens", 10**4000))),
        *((False, {n: v}, n) for n, v in (
            ("best_of", 2), ("logprobs", 21), ("logprobs", True), ("echo", "yes"), ("prompt", []), ("prompt", [[]]),
            ("prompt", [True]), ("prompt", {}), ("prompt", 5), ("prompt", ["a", [1]]), ("prompt", [1, "a"]),
            ("prompt", ["a"] * 2049))),
        *((True, {n: v}, n) for n, v in (
            ("top_logprobs", 1), ("logprobs", 1), ("response_format", {"type": "json_object"}), ("tools", {}),
            ("tool_choice", "required"), ("tool_choice", {"type": "function"}), ("messages", []), ("messages", "Hi"),
            ("chat_template_kwargs", []), ("chat_template_kwargs", {"messages": []}))),
        (True, {"tools": [{"type": "function"}]}, "tools[0]"),
        (True, {"messages": ["Hi"]}, "messages[0]"),
        (True, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (True, {"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
        (True, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (True, {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(chat: bool, body: dict[str, Any], param: str) -> None:
    assert refused(body, chat) == (param, "invalid_value")


def test_unknown_and_missing_fields_are_named() -> None:
    assert refused({"suffix": None}) == ("suffix", "unknown_field")
    assert refused({"messages": []}) == ("messages", "unknown_field")
    assert refused({"echo": False}, chat=True) == ("echo", "unknown_field")
    assert refused({"\n" * 99 + "x" * 999: 1})[1] == "unknown_field"
    assert refused({"messages": [{"role": "user"}]}, chat=True) == ("messages[0].content", "missing_field")
    assert refused({"prompt": None}) == ("prompt", "missing_field")
    assert refused({"stream_options": {"include_usage": True}}, streams=True) == ("stream_options", "invalid_value")


def test_the_first_fault_is_named_in_every_process() -> None:
    """Whatever the order of sets is there: a result line is the same after a restart."""
    code = """
from deepcalm.wire import parse_fields
names = ("top_p", "presence_penalty", "frequency_penalty", "logit_bias", "response_format", "b", "a")
wrong = {name: 9 for name in names}
wrong["chat_template_kwargs"] = {name: 1 for name in ("tools", "self", "vocabulary", "messages")}
for names in (wrong, [n for n in wrong if n > "b"], ["frequency_penalty", "logit_bias"], ["chat_template_kwargs"]):
    try:
        parse_fields({"messages": [{"role": "user", "content": "x"}]} | {n: wrong[n] for n in names}, True)
    except Exception as e:
        print(e)
"""
    found = {
        subprocess.run([sys.executable, "-c", code], env=commands.environment(PYTHONHASHSEED=seed), check=True,
                       capture_output=True).stdout
        for seed in "1234"
    }  # fmt: skip
    assert len(found) == 1 and found.pop().count(b"\n") == 4


NAMES = st.sampled_from(sorted({*wire.CHAT, *wire.COMPLETIONS, "role", "content", "type", "text", "function", "name"}))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "text", "function", "auto", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.booleans())
def test_any_object_is_read_or_refused(body: dict[str, Any], chat: bool) -> None:
    try:
        fields = parse_fields({"messages" if chat else "prompt": "x"} | body, chat, streams=True)
    except RequestError as e:
        assert e.param and "\n" not in str(e)
    else:
        assert fields.chat == chat and 1 <= fields.n <= 128
        Sampling(**fields.given)  # type: ignore[arg-type]


# ---- prompts


def encoded(model: deepcalm.Model, body: dict[str, Any], chat: bool = False, ctx: int = 100) -> list[list[int]]:
    return [p.ids for p in wire.encode(parse_fields(body, chat), model, ctx, "f16")]


def test_prompts_become_ids(model: deepcalm.Model) -> None:
    assert encoded(model, {"prompt": ["Hello", "a b"]}) == [model.encode("Hello"), model.encode("a b")]
    assert encoded(model, {"prompt": [[5, 6], [7]]}) == [[5, 6], [7]]
    assert encoded(model, CHAT, True) == [model.encode_chat(CHAT["messages"])]
    plain = models.model("moonlight")
    if not plain.has_chat_template:
        with pytest.raises(RequestError, match="no chat template"):
            encoded(plain, CHAT, True)


def test_prompts_that_cannot_be(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = int(model.config["vocab_size"])
    for ids in ([vocab], [-1], [2**70], [2**63]):
        with pytest.raises(RequestError, match="prompt: ") as e:
            encoded(model, {"prompt": ids})
        assert e.value.param == "prompt"
    assert len(encoded(model, {"prompt": [5] * 99})[0]) == 99
    for body in ({"prompt": [5] * 100}, {"prompt": "ab, " * 100}):
        with pytest.raises(RequestError, match="context has 100 positions") as e:
            encoded(model, body)
        assert (e.value.param, e.value.code) == ("prompt", "context_length_exceeded")
    monkeypatch.setattr(type(model), "encode", lambda *_: pytest.fail("tokenised"))
    monkeypatch.setattr(Markup, "encode", lambda *_, **__: pytest.fail("rendered"))
    long = "é" * (50 * model.vocabulary.longest_token + 1)
    said = {"role": "user", "content": "x"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": long}}
    for chat, body in (
        (False, {"prompt": long}),
        (True, {"messages": [said | {"content": long}]}),
        (True, {"messages": [said], "tools": [{"type": "function", "function": {"name": "f", "description": long}}]}),
        (True, {"messages": [{"role": "assistant", "tool_calls": [call]}]}),
    ):
        with pytest.raises(RequestError, match="more than 100 tokens can hold") as e:
            encoded(model, body, chat)
        assert e.value.code == "context_length_exceeded"


def test_what_the_template_makes_too_long_is_not_tokenised(
    model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Vocabulary.encode
    monkeypatch.setattr(Vocabulary, "encode", lambda *a, **k: (seen.append(len(a[1])), encode(*a, **k))[1])
    short = [{"role": "user", "content": "x"}]
    for options in ({"bos_token": "ab " * 10_000}, {"bos_token": "<|end_of_text|>" * 2000}):
        with pytest.raises(RequestError, match=r"messages: \d+ characters, more than") as e:
            encoded(model, {"messages": short, "chat_template_kwargs": options}, True)
        assert e.value.code == "context_length_exceeded" and not seen
    assert encoded(model, {"messages": short, "chat_template_kwargs": {"bos_token": "ab"}}, True) and seen


def test_a_template_that_refuses_is_the_requests_fault_and_a_killed_one_is_not(
    model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise error

    monkeypatch.setattr(Markup, "encode", fail)
    error: Exception = deepcalm.Error("chat template: roles must alternate")
    with pytest.raises(RequestError, match="roles must alternate") as e:
        encoded(model, CHAT, True)
    assert (e.value.param, e.value.code) == ("messages", "template_failed")
    for error in (deepcalm.ResourceError("no process"), MemoryError()):
        with pytest.raises(type(error)):
            encoded(model, CHAT, True)


def test_how_to_sample() -> None:
    model = deepcalm.Model(models.packed())
    fields = parse_fields(TEXT | {"top_p": 0.5}, False)
    assert wire.sampling(fields, model, 7) == Sampling(top_p=0.5, seed=7)
    model._text.__dict__["sampling"] = {"temp": 0.6, "top_p": 0.9, "top_k": 5}
    assert wire.sampling(fields, model, 7, {"temp": 0.2}) == Sampling(temp=0.2, top_p=0.5, top_k=5, seed=7)
    assert wire.sampling(parse_fields(TEXT | {"seed": 3}, False), model, 7).seed == 3


# ---- answers


def run(model: deepcalm.Model, body: dict[str, Any], chat: bool = False, cached: bool = False) -> dict[str, Any]:
    fields = parse_fields(body, chat)
    with model.batch(ctx=100) as batch:
        prompts = wire.encode(fields, model, batch.ctx, batch.kv)
        how = wire.sampling(fields, model, 5)
        requests = wire.submit(fields, prompts, batch, how, max_tokens=4)
        while not all(r.done for r in requests):
            batch.step()
        return wire.answer({"id": "x"}, fields, prompts, requests, model, cached)


def test_answer_of_a_completion(model: deepcalm.Model) -> None:
    body: dict[str, Any] = {"prompt": ["Hello", "a b"], "n": 2, "temperature": 1.0}
    got = run(model, body, cached=True)
    assert (got["id"], got["object"], got["seed"]) == ("x", "text_completion", 5)
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
    assert {c["finish_reason"] for c in got["choices"]} <= {"stop", "length"} and got["choices"][0]["logprobs"] is None
    counts = got["usage"]
    assert (
        counts["prompt_tokens"] == sum(len(model.encode(p)) for p in body["prompt"])
        and counts["completion_tokens"] <= 16
    )
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
    assert list(counts["prompt_tokens_details"]) == ["cached_tokens"]
    # every choice is what a request of its own gets
    for i, prompt in enumerate(body["prompt"]):
        for j in range(2):
            alone = run(model, {"prompt": prompt, "temperature": 1.0, "seed": 5 + j})
            assert alone["choices"][0]["text"] == got["choices"][2 * i + j]["text"]
            assert "prompt_tokens_details" not in alone["usage"]


def test_answer_of_a_chat(model: deepcalm.Model) -> None:
    got = run(model, CHAT | {"logprobs": True, "top_logprobs": 2}, chat=True)
    choice = got["choices"][0]
    assert got["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    data = b"".join(bytes(t["bytes"]) for t in content)
    assert data.decode("utf-8", "replace") == choice["message"]["content"]
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] <= t["top_logprobs"][0]["logprob"] for t in content)


def test_answer_with_a_tool_call(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model writes is planted; its markers are no special tokens."""
    template = (
        "{%- for t in tools or [] %}<tool_call><arg_key>{{ t }}{% endfor %}{% for m in messages %}{{ m }}{% endfor %}"
    )
    monkeypatch.setitem(model.__dict__, "markup", Markup(ChatTemplate(template, {}), model.vocabulary))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
    fields = parse_fields(CHAT | {"n": 2, "tools": tools, "temperature": 1.0}, True)
    with model.batch(ctx=900) as batch:
        prompts = wire.encode(fields, model, batch.ctx, batch.kv)
        assert "integer" in model.decode(prompts[0].ids)
        requests = wire.submit(fields, prompts, batch, Sampling(), max_tokens=1)
        list(batch.run())
    written = "So. <tool_call>f<arg_key>n</arg_key><arg_value>5</arg_value></tool_call>"
    first, second = requests[0].choices
    first.text, first.reason, second.text, second.reason = written, "eos", written[:-1], "eos"
    called, text = wire.answer({"id": "x"}, fields, prompts, requests, model, cached=False)["choices"]
    call = {"id": "call_x-0_0", "type": "function", "function": {"name": "f", "arguments": '{"n": 5}'}}
    assert called["message"] == {"role": "assistant", "content": "So. ", "tool_calls": [call]}
    assert called["finish_reason"] == "tool_calls"
    assert text["message"] == {"role": "assistant", "content": written[:-1]} and text["finish_reason"] == "stop"
    with pytest.raises(RequestError, match=r"tool_calls\[0\].function.arguments: expected") as e:
        wrong = {"role": "assistant", "tool_calls": [call | {"function": {"name": "f", "arguments": "{"}}]}
        wire.encode(parse_fields({"messages": [wrong]}, True), model, 900, "f16")
    assert e.value.param == "messages[0].tool_calls[0].function.arguments"


def test_echo_has_the_prompts_own_scores(model: deepcalm.Model) -> None:
    """As lm-eval asks for them: the scores of a text without a word of answer."""
    ids = model.encode("Some text of a few hundred tokens. " * 10)
    assert MAX_ROWS < len(ids) < 400
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}
    fields = parse_fields(body, False)
    with model.batch(ctx=400) as batch:
        prompts = wire.encode(fields, model, batch.ctx, batch.kv)
        requests = wire.submit(fields, prompts, batch, Sampling(), max_tokens=4)
        assert requests[0].done and batch.idle
        got = wire.answer({}, fields, prompts, requests, model, cached=False)
    choice = got["choices"][0]
    assert choice["text"] == model.decode(ids) and choice["finish_reason"] == "length"
    assert got["usage"]["completion_tokens"] == 0
    with model.session(400, mtp=False) as session:
        logits = session.prefill(ids, all_logits=True)
    want = [Scores.of(t, x, model.n_valid, 1).logprob for t, x in zip(ids[1:], logits[:-1], strict=True)]
    assert choice["logprobs"]["token_logprobs"] == [None, *want]
    assert choice["logprobs"]["top_logprobs"][0] is None and len(choice["logprobs"]["top_logprobs"][1]) == 1
    text = choice["text"]
    for token, at in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert token == "<s>" or text.startswith(token, at)
    echoed = run(model, {"prompt": "Hello", "echo": True})["choices"][0]["text"]
    assert echoed == "Hello" + run(model, {"prompt": "Hello"})["choices"][0]["text"]


def test_minus_infinity_is_written_as_a_number(model: deepcalm.Model) -> None:
    scores = [Scores(5, -math.inf, [(6, 0.0), (7, -math.inf)])]
    got = wire.chat_logprobs(model.vocabulary, scores)["content"][0]
    assert got["logprob"] == got["top_logprobs"][1]["logprob"] == -9999.0
    assert wire.text_logprobs(model.vocabulary, scores, 7)["text_offset"] == [7]
    json.dumps([got, wire.text_logprobs(model.vocabulary, scores)], allow_nan=False)


def test_completion_tokens_count_the_one_that_ended_it(model: deepcalm.Model) -> None:
    with model.batch(ctx=100) as batch:
        request = batch.submit([5], max_tokens=3)
        for choice in batch.run():
            last = choice
        assert wire.completion_tokens(last) == 3 and last.reason == "length"
        ended = batch.submit([5], max_tokens=3, eos_ids=last.tokens[1:2])
        list(batch.run())
        assert len(ended.choices[0].tokens) == 1 and wire.completion_tokens(ended.choices[0]) == 2
        assert wire.usage([request, ended], cached=False)["completion_tokens"] == 5


def test_submit_refuses_and_leaves_nothing_behind(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = parse_fields({"prompt": [[5], [6]], "stop": "a<|end_of_sentence|>"}, False)
    with model.batch(ctx=100) as batch:
        prompts = wire.encode(fields, model, batch.ctx, batch.kv)
        submit = batch.submit
        for error, seen in (
            (deepcalm.SessionError("stop"), RequestError),
            (ValueError("n"), RequestError),
            (deepcalm.ResourceError("memory"), deepcalm.ResourceError),
        ):
            calls = iter([lambda *a, **k: submit(*a, **k | {"stop": ()}), mock.Mock(side_effect=error)])
            monkeypatch.setattr(batch, "submit", lambda *a, calls=calls, **k: next(calls)(*a, **k))
            with pytest.raises(seen):
                wire.submit(fields, prompts, batch, Sampling(), 4)
            list(batch.run())
            assert batch.stats.decode_tokens == 0


def test_fingerprint_names_what_bits_depend_on(model: deepcalm.Model) -> None:
    assert wire.fingerprint(model) == f"deepcalm-{deepcalm.__version__}-{model.header_sha256[:12]}-{model.isa}"
