"""What clients get is what the model says: texts, log probabilities, counts, whoever else asks at the time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import pytest

import bench_serve
import deepcalm
from bench_serve import Server, call
from chat_templates import GLM_TOOLS, TOKENS
from deepcalm.generation import TextGeneration
from deepcalm.markup import Markup
from deepcalm.sampling import Sampling
from deepcalm.serve.engine import Seen
from deepcalm.serve.replies import Part
from deepcalm.template import ChatTemplate
from deepcalm.wire import Fields, Prompt

LENGTH = 12


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, float, int]]:
    """64 of (prompt, temperature, seed)."""
    names = ("Once upon a time", "The dog", "One day, Anna and her", "It was", "“Where”, he said,", "A", "In", "Rain")
    return [(f"{name}{' and' * (i % 3)}", 0.8 * (i % 2), 100 + i) for i, name in zip(range(64), itertools.cycle(names))]


@pytest.fixture(scope="module")
def alone(model: deepcalm.Model, asked: list[tuple[str, float, int]]) -> list[str]:
    """Their texts, each by a session of its own."""
    return [bench_serve.alone(model, *case, LENGTH) for case in asked]


def test_a_batch_says_what_sessions_say(
    model: deepcalm.Model, asked: list[tuple[str, float, int]], alone: list[str]
) -> None:
    with model.batch() as batch:
        requests = [batch.submit(model.encode(prompt), sampling=Sampling(temp, top_p=0.9, seed=seed), max_tokens=LENGTH)
                    for prompt, temp, seed in asked]  # fmt: skip
        for _ in batch.run():
            pass
    assert [r.choices[0].text for r in requests] == alone


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_texts_are_those_of_a_session_alone(
    client: openai.OpenAI, asked: list[tuple[str, float, int]], alone: list[str], concurrency: int
) -> None:
    def ask(i: int) -> str:
        prompt, temp, seed = asked[i]
        options: dict[str, Any] = {"model": "demo", "max_tokens": LENGTH, "temperature": temp, "seed": seed}
        if i % 4 < 2:
            return client.completions.create(prompt=prompt, **options).choices[0].text
        return "".join(c.choices[0].text for c in client.completions.create(prompt=prompt, stream=True, **options))

    with ThreadPoolExecutor(concurrency) as pool:
        assert [*pool.map(ask, range(64))] == alone


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI, model: deepcalm.Model) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me of a dog."}]
    tokens = model.session().generate(model.encode_chat(messages), max_tokens=30)
    text = "".join(TextGeneration(tokens))
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=30, temperature=0)
    assert whole.choices[0].message.content == text and whole.choices[0].message.role == "assistant"
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.usage
    chunks = [*client.chat.completions.create(model="demo", messages=messages, max_tokens=30, temperature=0,
                                              stream=True, stream_options={"include_usage": True})]  # fmt: skip
    *pieces, end, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == text
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason and not end.choices[0].delta.content
    assert last.choices == [] and last.usage and last.usage.total_tokens == whole.usage.total_tokens
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    assert all(c.usage is None and c.object == "chat.completion.chunk" for c in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(server: Server, model: deepcalm.Model, stream: bool) -> None:
    prompts = ["Once upon a time", "The dog"]
    body = {"prompt": prompts, "n": 2, "temperature": 0.7, "seed": 2**64 - 1, "max_tokens": 6, "stream": stream}
    reply = call(server, "POST", "/v1/completions", json.dumps(body).encode())
    assert reply.status == 200, reply
    texts = [""] * 4
    for chunk in [json.loads(e) for e in reply.events[:-1]] if stream else [reply.json]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    wanted = [(prompt, seed) for prompt in prompts for seed in (2**64 - 1, 0)]
    for text, (prompt, seed) in zip(texts, wanted, strict=True):
        assert text == bench_serve.alone(model, prompt, 0.7, seed, 6)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_the_log_probabilities_of_the_whole(server: Server, path: str) -> None:
    chat = "chat" in path
    body: dict[str, Any] = {"max_tokens": 20, "temperature": 0.9, "seed": 5}
    body |= {"messages": [{"role": "user", "content": "Ä dog"}], "logprobs": True, "top_logprobs": 2} if chat else {
        "prompt": "Ä dog", "logprobs": 2}  # fmt: skip
    whole = call(server, "POST", path, json.dumps(body).encode()).json["choices"][0]["logprobs"]
    parts: list[Any] = []
    for _ in range(20):  # who reads slowly gets fewer pieces, one for all 20 tokens at last
        events = call(server, "POST", path, json.dumps(body | {"stream": True}).encode()).events[:-1]
        parts = [c["logprobs"] for e in events for c in json.loads(e)["choices"] if c["logprobs"]]
        for key in ("content",) if chat else ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for p in parts for x in p[key]] == whole[key] and len(whole[key]) == 20
        if len(parts) > 1:
            break
    assert len(parts) > 1


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_echo_is_the_same_in_pieces(server: Server, tokens: int) -> None:
    """With max_tokens 0 nothing runs: lm-eval asks so."""
    body = {"prompt": ["Ä dog", "One day"], "echo": True, "logprobs": 1, "max_tokens": tokens, "temperature": 0}
    whole = call(server, "POST", "/v1/completions", json.dumps(body).encode()).json
    events = call(server, "POST", "/v1/completions", json.dumps(body | {"stream": True}).encode()).events
    assert events[-1] == "[DONE]" and len(whole["choices"]) == 2
    for choice in whole["choices"]:
        pieces = [c for e in events[:-1] for c in json.loads(e)["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in pieces) == choice["text"]
        assert choice["text"].startswith(body["prompt"][choice["index"]])  # type: ignore[index]
        for key, values in choice["logprobs"].items():
            assert [x for c in pieces if c["logprobs"] for x in c["logprobs"][key]] == values
        assert [c["finish_reason"] for c in pieces if c["finish_reason"]] == [choice["finish_reason"]] == ["length"]


def test_a_drawn_seed_is_returned_and_gives_the_same_again(server: Server) -> None:
    body = {"prompt": "The", "temperature": 1.5, "max_tokens": 8}
    first, other = (call(server, "POST", "/v1/completions", json.dumps(body).encode()) for _ in range(2))
    again = call(server, "POST", "/v1/completions", json.dumps(body | {"seed": first.json["seed"]}).encode())
    assert again.text == first.text and first.json["seed"] != other.json["seed"]


@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_load_of_many_requests(model: deepcalm.Model, requests: int) -> None:
    """32 clients, a third of which leave: nothing lost, nothing wrong, memory flat, nothing left behind."""
    assert bench_serve.run_load(model, ["--threads", "1"], requests, 32) == 0


def test_a_stream_has_calls_and_thoughts_and_accepted_drafts(model: deepcalm.Model) -> None:
    """What the model's markup reads, piece by piece; the family's own reading is tested in test_markup.py."""
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}
    ]
    markup = Markup(ChatTemplate(GLM_TOOLS, TOKENS), model.vocabulary)
    api = SimpleNamespace(vocabulary=model.vocabulary, markup=markup)
    answer = SimpleNamespace(prompts=[Prompt([1])])
    part = Part(SimpleNamespace(api=api, fields=Fields(chat=True, tools=tools), answer=answer, head={"id": "x"}), 0)
    text = "<think>hm</think>Yes.<tool_call>look<arg_key>at</arg_key><arg_value>cat</arg_value></tool_call>"
    tokens = model.encode(text, bos=False)
    pieces: list[dict[str, Any]] = []
    for n in range(1, len(tokens) + 1):
        pieces += part.take(Seen(model.decode(tokens[:n]), tokens[:n], [True] * n))
    pieces += part.take(Seen(text, tokens, [True] * len(tokens), reason="eos"))
    assert part.take(Seen(text, tokens, reason="eos")) == []
    said = {k: "".join(p["delta"].get(k, "") for p in pieces) for k in ("content", "reasoning_content")}
    assert said == {"content": "Yes.", "reasoning_content": "hm"}
    (call,) = [c for p in pieces for c in p["delta"].get("tool_calls", [])]
    assert call["function"] == {"name": "look", "arguments": '{"at": "cat"}'} and call["id"] == "call_x-0_0"
    assert pieces[-1]["finish_reason"] == "tool_calls" and not any(p["finish_reason"] for p in pieces[:-1])
    for p in pieces:
        if text := p["delta"].get("content", "") + p["delta"].get("reasoning_content", ""):
            assert p["accepted"] == [[0, len(text)]]
