"""Requests and answers as programs exchange them: the JSON of OpenAI's completions and chat completions.

From bytes to a running request: ``parse_object``, ``parse_fields`` (quick), ``encode`` (templates, tokenising: slow),
``submit``. Back from finished choices: ``answer`` and its parts. ``deepcalm batch`` takes all of it but streams; the
server takes the fields, the encoding and the parts; neither files nor HTTP are known here. Every function may be called
from any thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from . import _core
from .arguments import integer, token_ids
from .errors import Error, ResourceError, SessionError, one_line
from .files.safetensors import parse_json
from .markup import MarkupError
from .names import TEMPLATE_PARAMETERS
from .sampling import Sampling, Scores
from .session import MAX_ROWS
from .template import TooLong

if TYPE_CHECKING:
    from .batch import Batch, Choice, Request
    from .model import Model
    from .text import Vocabulary

T = TypeVar("T")
MAX_BYTES = 16 << 20  # of a body, or of a line
MAX_DEPTH = 100  # of lists and objects in each other: a limit of our own, not one of the interpreter's stack
MAX_CHOICES, MAX_TOP = 2048, 20
SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}  # their names: ours
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields without effect, and fields that may only have a value that has none.
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
NEUTRAL: dict[str, object] = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
NEUTRAL_CHAT: dict[str, object] = {"response_format": {"type": "text"}}
COMMON = ("model", *SAMPLING, "seed", "stop", "max_tokens", "max_completion_tokens", "n", "logprobs",
          "stream", "stream_options", *IGNORED, *NEUTRAL)  # fmt: skip
CHAT = (*COMMON, *NEUTRAL_CHAT, "messages", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs")
COMPLETIONS = (*COMMON, "prompt", "echo", "best_of")


class RequestError(Error):
    """What is wrong with a request, in one line that begins with the field's name.

    ``param`` is that name (None: the body as a whole), ``code`` the kind of fault, ``status`` HTTP's.
    """

    def __init__(
        self, message: object, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        self.param = None if param is None else one_line(param, 60)
        super().__init__(one_line(message if param is None else f"{self.param}: {message}"))
        self.code, self.status = code, status

    def body(self) -> dict[str, Any]:
        """As a client gets it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object of at most ``MAX_BYTES`` and ``MAX_DEPTH``: UTF-8, no key twice, no NaN, 1e999 or lone surrogates.

    Raises:
        RequestError: it is none; ``code`` is "invalid_json" or "too_large".
    """
    if len(data) > MAX_BYTES:
        raise RequestError(f"longer than {MAX_BYTES} bytes", code="too_large", status=413)
    try:
        value = parse_json(data, "the request", Error)
    except Error as e:
        if isinstance(e.__context__, MemoryError):  # the machine's fault, not the sender's
            raise e.__context__ from None
        deep = isinstance(e.__context__, RecursionError)
        raise RequestError(_TOO_DEEP if deep else e, code="invalid_json") from None
    if _depth(value) > MAX_DEPTH:
        raise RequestError(_TOO_DEEP, code="invalid_json")
    if not isinstance(value, dict):
        raise RequestError(f"expected a JSON object, found {_kind(value)}", code="invalid_json")
    return value


_TOO_DEEP = f"JSON nested more than {MAX_DEPTH} deep"


def _depth(value: object) -> int:
    """How deep lists and objects are nested, counted no further than is too deep."""
    level, depth = [value], 0
    while depth <= MAX_DEPTH and (level := [v for v in level if isinstance(v, (dict, list))]):
        level, depth = [w for v in level for w in (v.values() if isinstance(v, dict) else v)], depth + 1
    return depth


def _kind(value: object) -> str:
    """What a JSON value is."""
    names = {dict: "an object", list: "a list", str: "a string", bool: str(value).lower(), type(None): "null"}
    return names.get(type(value), "a number")


@dataclass(frozen=True, slots=True)
class Fields:
    """The checked fields of a request; None where the body has none.

    ``chat``: of a chat completion, with ``messages`` (content a string, or None), ``tools`` (None too when tool_choice
    is none) and ``template`` (options for the chat template); else of a completion with ``prompts``,
    texts or lists of ids. ``given``: those of Sampling's temp, top_p, top_k, min_p that the body has. ``logprobs``: how
    many most probable tokens are wanted beside each.
    """

    chat: bool
    model: str | None = None
    prompts: tuple[str | list[int], ...] = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    template: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    given: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def parse_fields(body: Mapping[str, Any], chat: bool, streams: bool = False) -> Fields:
    """The fields of a body; null is as good as absent. streams: whether ``stream`` may be true.

    Raises:
        RequestError: the first field that is unknown, missing or wrong, by its name.
    """
    for name in body:
        if name not in (CHAT if chat else COMPLETIONS):
            raise RequestError(f"unknown field of a {'chat ' * chat}completion", name, "unknown_field")
    body = {k: v for k, v in body.items() if v is not None}
    if (needed := "messages" if chat else "prompt") not in body:
        raise RequestError("missing", needed, "missing_field")
    neutral = NEUTRAL | (NEUTRAL_CHAT if chat else {"best_of": body.get("n", 1)})
    for name, value in neutral.items():
        if body.get(name, value) != value:
            raise RequestError(f"not supported, expected {value!r} or nothing", name)
    read = _Reader(body)
    prompts = () if chat else _prompts(body["prompt"])
    echo = read.flag("echo")
    n = read.integer("n", 1, 128) or 1
    if n * len(prompts) > MAX_CHOICES:
        raise RequestError(f"{len(prompts)} of them, {n} answers each, at most {MAX_CHOICES} in all", "prompt")
    tools = read.tools()
    stream = read.flag("stream")
    if stream and not streams:
        raise RequestError("true, but only whole answers are written here", "stream")
    seed = read.integer("seed", -(2**63), 2**64 - 1)
    limits = [read.integer(name, 0 if echo else 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise RequestError("another number than max_tokens", "max_completion_tokens")
    return Fields(
        chat=chat,
        model=read.instance("model", str, "a string"),
        prompts=prompts,
        messages=_messages(body["messages"]) if chat else [],
        template=read.template(),
        tools=tools,
        given=read.sampling(),
        seed=None if seed is None else seed % 2**64,
        stop=read.stop(),
        max_tokens=limits[1] if limits[0] is None else limits[0],
        n=n,
        logprobs=read.chat_logprobs() if chat else read.integer("logprobs", 0, MAX_TOP),
        echo=echo,
        stream=stream,
        include_usage=read.include_usage(stream),
    )


class _Reader:
    """Fields of a body without nulls, each checked as it is read."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    def instance(self, name: str, kind: type[T], want: str) -> T | None:
        """A value of one JSON type."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{_kind(value)}, expected {want}", name)
        return value

    def flag(self, name: str) -> bool:
        return bool(self.instance(name, bool, "true or false"))

    def integer(self, name: str, low: int, high: int) -> int | None:
        if (value := self.body.get(name)) is None:
            return None
        return _checked(name, lambda: integer(name, value, low, high))

    def sampling(self) -> dict[str, float]:
        given = {}
        for name, ours in SAMPLING.items():
            if (value := self.body.get(name)) is not None:
                if isinstance(value, bool):
                    raise RequestError(f"{_kind(value)}, expected a number", name)
                given[ours] = 0 if (name, value) == ("top_k", -1) else value  # -1: off, as others write it
                _checked(name, lambda ours=ours: Sampling(**{ours: given[ours]}))  # type: ignore[misc]
        return given

    def stop(self) -> tuple[str, ...] | None:
        if (value := self.body.get("stop")) is None:
            return None
        stops = value if isinstance(value, list) else [value]
        if len(stops) > 16 or not all(isinstance(s, str) and 1 <= len(s) <= 256 for s in stops):
            raise RequestError("expected a string or up to 16, of 1 to 256 characters", "stop")
        return tuple(stops)

    def chat_logprobs(self) -> int | None:
        top, wanted = self.integer("top_logprobs", 0, MAX_TOP), self.flag("logprobs")
        if top is not None and not wanted:
            raise RequestError("needs logprobs true", "top_logprobs")
        return (top or 0) if wanted else None

    def tools(self) -> list[dict[str, Any]] | None:
        tools = self.instance("tools", list, "a list") or []
        for i, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise RequestError('expected {"type": "function", "function": {"name": ...}}', f"tools[{i}]")
        choice = self.body.get("tool_choice", "auto")
        if choice not in ("auto", "none"):
            raise RequestError("expected auto or none", "tool_choice")
        return tools if tools and choice == "auto" else None

    def template(self) -> dict[str, Any]:
        options = self.instance("chat_template_kwargs", dict, "an object") or {}
        if taken := [name for name in (*TEMPLATE_PARAMETERS, "tools") if name in options]:
            raise RequestError(f"{taken[0]} is no option of a template", "chat_template_kwargs")
        return options

    def include_usage(self, stream: bool) -> bool:
        options = self.instance("stream_options", dict, "an object")
        if options is None:
            return False
        if not stream or options.keys() - {"include_usage"} or not isinstance(options.get("include_usage"), bool):
            raise RequestError('expected {"include_usage": true or false}, with stream', "stream_options")
        return bool(options["include_usage"])


def _checked(name: str, check: Callable[[], T]) -> T:
    """``check()``; the TypeError or ValueError of a check in the core as one of the field's."""
    try:
        return check()
    except (TypeError, ValueError) as e:
        raise RequestError(str(e).partition(": ")[2], name) from None


def _prompts(value: object) -> tuple[str | list[int], ...]:
    def is_ids(x: object) -> bool:
        return isinstance(x, list) and bool(x) and all(type(i) is int for i in x)

    prompts: list[Any] = value if isinstance(value, list) and not is_ids(value) else [value]
    if not prompts or not (all(isinstance(p, str) for p in prompts) or all(map(is_ids, prompts))):
        raise RequestError("expected a text, token ids, or a list of texts or of lists of ids", "prompt")
    return tuple(prompts)


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RequestError("expected a list of messages, at least one", "messages")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(value)]


def _message(message: object, where: str) -> dict[str, Any]:
    """A message with its content as one text; that of an assistant may be None (it called tools)."""
    if not isinstance(message, dict):
        raise RequestError(f"{_kind(message)}, expected an object", where)
    if (role := message.get("role")) not in ROLES:
        raise RequestError(f"expected one of {', '.join(ROLES)}", f"{where}.role")
    if "content" not in message and role != "assistant":
        raise RequestError("missing", f"{where}.content", "missing_field")
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise RequestError('only {"type": "text", "text": ...} is supported', f"{where}.content[{i}]")
        content = "\n".join(part["text"] for part in content)
    elif content is None and role != "assistant":
        content = ""
    elif not isinstance(content, (str, type(None))):
        raise RequestError(f"{_kind(content)}, expected a text", f"{where}.content")
    return message | {"role": "system" if role == "developer" else role, "content": content}


# ---- from fields to requests


@dataclass(slots=True)
class Prompt:
    """A prompt as token ids; with ``echo`` the text that goes before the answers, and its scores if they are wanted."""

    ids: list[int]
    text: str = ""
    scores: list[Scores] = field(default_factory=list)


def encode(
    fields: Fields, model: Model, ctx: int, kv: str, check: Callable[[], None] = lambda: None
) -> list[Prompt]:  # fmt: skip
    """The prompts of a request, each shorter than ``ctx`` tokens. Slow: templates, tokenising, the scores of an echo.

    check: called again and again meanwhile; ends it by raising.

    Raises:
        RequestError: too long, no chat template, a template that refuses, ids that are none.
        ResourceError: no memory, no process for the template.
    """
    name = "messages" if fields.chat else "prompt"
    texts = [m["content"] or "" for m in fields.messages]
    called = [m["tool_calls"] for m in fields.messages if "tool_calls" in m]
    texts += [json.dumps(x, ensure_ascii=False) for x in (fields.tools or [], *called)]
    most = ctx * model.vocabulary.longest_token  # bytes that ctx tokens can hold
    for text in ("".join(texts), *(p for p in fields.prompts if isinstance(p, str))):
        if len(text.encode()) > most:
            raise _too_long(name, f"{len(text)} characters, more than {ctx} tokens can hold", ctx)
    if fields.chat and model.chat_template is None:
        raise RequestError("the model has no chat template, give a prompt", name, "no_chat_template")
    out = []
    for prompt in fields.prompts or ("",):
        check()
        try:
            if fields.chat:
                ids = model.markup.encode(fields.messages, fields.tools, max_chars=most, **fields.template)
            elif isinstance(prompt, str):
                ids = model.encode(prompt)
            else:
                ids = token_ids(prompt, int(model.config["vocab_size"])).tolist()
        except ResourceError:
            raise
        except TooLong as e:  # of what the pieces did not show: options, thoughts, what the template repeats
            raise _too_long(name, str(e), ctx) from None
        except MarkupError as e:
            raise RequestError(e.fault, e.param) from None
        except (Error, TypeError, ValueError, OverflowError) as e:
            raise RequestError(e, name, "template_failed" if fields.chat else "invalid_value") from None
        if len(ids) >= ctx:
            raise _too_long(name, f"{len(ids)} tokens", ctx)
        out.append(Prompt(ids))
        if fields.echo:
            out[-1].text = prompt if isinstance(prompt, str) else model.decode(ids)
            if fields.logprobs is not None:
                out[-1].scores = prompt_scores(model, ids, fields.logprobs, kv, check)
    return out


def _too_long(name: str, found: str, ctx: int) -> RequestError:
    return RequestError(f"{found}, the context has {ctx} positions", name, "context_length_exceeded")


def sampling(fields: Fields, model: Model, seed: int, defaults: Mapping[str, float] | None = None) -> Sampling:
    """How to sample: the body's values over ``defaults`` over the checkpoint's; ``seed`` where the body has none."""
    values: dict[str, Any] = {**model.sampling_defaults, **(defaults or {}), **fields.given}
    return Sampling(**values, seed=seed if fields.seed is None else fields.seed)


def submit(
    fields: Fields, prompts: Sequence[Prompt], batch: Batch, how: Sampling, max_tokens: int | None,
    stop: Sequence[str] = (),
) -> list[Request]:  # fmt: skip
    """A request for each of ``prompts``, with ``max_tokens`` and ``stop`` where the body has none.

    Raises:
        RequestError: it can never run.
        ResourceError: for want of memory.
    """
    stop = stop if fields.stop is None else fields.stop
    try:
        batch.model.vocabulary.stop_ids(stop)
    except SessionError as e:
        raise RequestError(str(e).removeprefix("stop "), "stop") from None
    limit = max_tokens if fields.max_tokens is None else fields.max_tokens
    requests: list[Request] = []
    shown = batch.model.markup.shown(fields.tools) if fields.chat else ()
    try:
        for prompt in prompts:
            if limit == 0:
                requests.append(_nothing_asked(batch, prompt.ids, how, fields.n))
            else:
                requests.append(
                    batch.submit(
                        prompt.ids, sampling=how, stop=stop, max_tokens=limit, logprobs=fields.logprobs, n=fields.n,
                        shown=shown,
                    )
                )  # fmt: skip
    except (SessionError, ValueError) as e:
        raise RequestError(e) from None
    finally:
        if len(requests) < len(prompts):
            for request in requests:
                request.cancel()
    return requests


def _nothing_asked(batch: Batch, ids: Sequence[int], how: Sampling, n: int) -> Request:
    """A request that ended before it began: an echo alone."""
    from .batch import Choice, Request

    request = Request(batch, len(ids))
    request.choices += [Choice(request, i, (how.seed + i) % 2**64) for i in range(n)]
    for choice in request.choices:
        choice.reason = "length"
    return request


# ---- from choices to bodies


def finish_reason(reason: str | None) -> str | None:
    """OpenAI's word for why a choice ended; None while it runs."""
    return None if reason is None else "length" if reason in ("length", "context") else "stop"


def completion_tokens(choice: Choice) -> int:
    """Tokens that were made for it: one that ended the text counts."""
    return len(choice.tokens) + (choice.reason == "eos")


def usage(requests: Sequence[Request], cached: bool) -> dict[str, Any]:
    """Counts of tokens. cached: with those of prompts that needed no pass, which depends on the neighbours."""
    prompt = sum(r.prompt_tokens for r in requests)
    completion = sum(completion_tokens(c) for r in requests for c in r.choices)
    out: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached:
        out["prompt_tokens_details"] = {"cached_tokens": sum(r.cached_tokens for r in requests)}
    return out


def _number(logprob: float) -> float | None:
    """JSON has no word for minus infinity; None: there is none, of the first token of a prompt."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def chat_logprobs(vocabulary: Vocabulary, scores: Sequence[Scores]) -> dict[str, Any]:
    """``logprobs`` of a chat completion for any run of its tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.token_bytes(token)
        return {"token": vocabulary.name(token), "logprob": _number(logprob), "bytes": list(data)}

    content = [entry(s.token, s.logprob) | {"top_logprobs": [entry(*x) for x in s.top]} for s in scores]
    return {"content": content, "refusal": None}


def text_logprobs(vocabulary: Vocabulary, scores: Sequence[Scores], offset: int = 0) -> dict[str, Any]:
    """``logprobs`` of a completion for a run of its tokens, before which its text has ``offset`` characters."""
    decoder, offsets = vocabulary.decoder(), []
    for s in scores:
        offsets.append(offset)
        offset += len(decoder.feed(s.token))
    tops = ({vocabulary.name(i): _number(x) for i, x in s.top} for s in scores)
    return {
        "tokens": [vocabulary.name(s.token) for s in scores],
        "token_logprobs": [_number(s.logprob) for s in scores],
        "top_logprobs": [None if math.isnan(s.logprob) else top for s, top in zip(scores, tops, strict=True)],
        "text_offset": offsets,
    }


def prompt_scores(
    model: Model, ids: Sequence[int], n_top: int, kv: str, check: Callable[[], None]
) -> list[Scores]:  # fmt: skip
    """The scores of a prompt's own tokens, from a session of its own; the first has none (NaN).

    Raises:
        ResourceError: no memory for its cache.
    """
    scores = [Scores(ids[0], math.nan, [])]
    with model.session(len(ids), kv, mtp=False) as session:
        for i in range(1, len(ids), MAX_ROWS):
            check()
            logits = session.prefill(ids[i - 1 : i - 1 + MAX_ROWS], all_logits=True)
            scores += [Scores.of(t, x, model.n_valid, n_top) for t, x in zip(ids[i : i + MAX_ROWS], logits)]  # noqa: B905
    return scores


def choice_body(
    fields: Fields, prompt: Prompt, choice: Choice, index: int, model: Model, answer_id: str
) -> dict[str, Any]:
    """One of ``choices`` in a whole answer. answer_id: what the ids of its tool calls are made from."""
    logprobs, out, reason = None, dict[str, Any](index=index), finish_reason(choice.reason)
    if fields.logprobs is not None:
        scores = prompt.scores + choice.scores
        logprobs = (chat_logprobs if fields.chat else text_logprobs)(model.vocabulary, scores)
    if fields.chat:
        reader = model.markup.answer(prompt.ids, f"{answer_id}-{index}", fields.tools)
        reader.take(choice)
        out["message"], reason = reader.message, reader.finish_reason(reason)
    else:
        out["text"] = prompt.text + choice.text
    return out | {"logprobs": logprobs, "finish_reason": reason}


def answer(
    head: Mapping[str, Any], fields: Fields, prompts: Sequence[Prompt], requests: Sequence[Request], model: Model,
    cached: bool,
) -> dict[str, Any]:  # fmt: skip
    """The whole body of an answer: ``head`` (id, created, model, ...), and what ``requests``, which are done, gave.

    ``seed`` is that of the first choice of each prompt. cached: as in ``usage``.
    """
    choices = [(p, c) for p, r in zip(prompts, requests, strict=True) for c in r.choices]
    return {
        **head,
        "object": "chat.completion" if fields.chat else "text_completion",
        "choices": [choice_body(fields, p, c, i, model, head.get("id", "")) for i, (p, c) in enumerate(choices)],
        "usage": usage(requests, cached),
        "seed": choices[0][1].seed,
    }


def fingerprint(model: Model) -> str:
    """``system_fingerprint``: the same one, the same bytes."""
    where = model.isa if model.device == "cpu" else model.device
    return f"deepcalm-{_core.__version__}-{model.header_sha256[:12]}-{where}"
