"""JSON lines in, result lines out: what ``deepcalm batch`` does with a line, wherever the line comes from.

``Line.parse`` reads one (bytes and line number), ``Lines.start`` makes requests of it, ``Lines.result`` makes the bytes
of its result once they are done. Both forms, the project's own and OpenAI's, are in docs/batch.md. A result depends on
the line, the model and ``Settings``: never on the clock, on neighbours or on the machine's state.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from . import wire
from .errors import ResourceError
from .wire import MAX_BYTES, RequestError

if TYPE_CHECKING:
    from .batch import Batch, Request

AHEAD = 4  # lines at work or read before, for each of a batch's max_sequences
URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat


def read_lines(file: BinaryIO, digest: Any = None) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes without the line's end) of every line that is not blank; None: longer than ``MAX_BYTES``.

    digest: an object of hashlib that gets every byte of the file.
    """
    number = 0
    while piece := file.readline(MAX_BYTES + 5):  # a byte order mark and CR LF besides
        number += 1
        line, whole = piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece, True
        while piece:
            if digest is not None:
                digest.update(piece)
            piece = b"" if piece.endswith(b"\n") else file.readline(1 << 20)
            whole = whole and not piece
        line = line.rstrip(b"\r\n")
        if line.strip() or not whole:
            yield number, line if whole and len(line) <= MAX_BYTES else None


@dataclass(slots=True)
class Line:
    """A line of the input: its number, its id as the result has it, its fields, or what is wrong with it.

    ``id`` is the number for a line that has none, None for one that cannot be read. openai: OpenAI's form.
    """

    number: int
    id: str | int | None = None
    openai: bool = False
    fields: wire.Fields | None = None
    error: RequestError | None = None

    @classmethod
    def parse(cls, data: bytes | None, number: int) -> Line:
        """The line of these bytes (None: too many to be one); what is wrong is its ``error``."""
        line = cls(number)
        try:
            if data is None:
                raise RequestError(f"longer than {MAX_BYTES} bytes", code="too_large", status=413)
            line._read(wire.parse_object(data))
        except RequestError as e:
            line.error = e
        return line

    def _read(self, value: dict[str, Any]) -> None:
        self.openai = not value.keys().isdisjoint(("custom_id", "body"))
        name = "custom_id" if self.openai else "id"
        found = value.pop(name, None)
        if not isinstance(found, (str, int, type(None))) or isinstance(found, bool):
            raise RequestError("expected a string or an integer", name)
        self.id = self.number if found is None else found
        if not self.openai:
            fields = wire.parse_fields(value, chat="messages" in value)
            if fields.n > 1 or len(fields.prompts) > 1:
                name = "n" if fields.n > 1 else "prompt"
                raise RequestError("more than one answer takes OpenAI's form (custom_id, body)", name)
            self.fields = fields
            return
        body, url, method = (value.pop(key, None) for key in ("body", "url", "method"))
        if not isinstance(body, dict):
            raise RequestError("expected an object", "body")
        if url not in (None, *URLS):
            raise RequestError(f"expected {' or '.join(URLS)}", "url")
        if method not in (None, "POST"):
            raise RequestError("expected POST", "method")
        for key in value:
            raise RequestError("unknown field of a line", key, "unknown_field")
        self.fields = wire.parse_fields(body, URLS[url] if url else "messages" in body)

    def has(self, result: Any) -> bool:
        """Whether ``result``, a result line's JSON, is of this line."""
        name = "custom_id" if self.openai and self.id is not None else "id"
        return (
            isinstance(result, dict)
            and (type(result.get(name, 0.0)), result.get(name)) == (type(self.id), self.id)
            and result.get("line", self.number) == self.number
        )


def unique(lines: Iterable[Line]) -> Iterator[Line]:
    """``lines``, those in error whose id an earlier line has; 5 and "5" are the same."""
    seen: dict[int, int] = {}  # a hash of 64 bits, not ids: a million lines take 0.1 GB
    for line in lines:
        if line.id is not None:
            key = int.from_bytes(hashlib.blake2b(str(line.id).encode(), digest_size=8).digest(), "little")
            if (first := seen.setdefault(key, line.number)) != line.number:
                name = "custom_id" if line.openai else "id"
                line.fields, line.error = None, RequestError(f"line {first} has the same", name, "duplicate_id")
        yield line


@dataclass(frozen=True)
class Settings:
    """What a result depends on beside the line and the batch.

    model: its name in OpenAI's results. seed: from it and its id each line gets its own. max_tokens, stop, and
    sampling (temp, top_p, top_k, min_p, before the checkpoint's): for lines that do not have them. date: what templates
    are told, in ISO format.
    """

    model: str
    date: str
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)


class Result(NamedTuple):
    """The result line, LF at its end; whether the line is in error; how many tokens its answers have."""

    data: bytes
    error: bool
    tokens: int


class Lines:
    """Lines as requests of one batch, and finished requests as result lines."""

    def __init__(self, batch: Batch, settings: Settings) -> None:
        self.batch, self.model, self.settings = batch, batch.model, settings
        if self.model.has_chat_template and self.model.chat_template is not None:
            self.model.chat_template.now = datetime.fromisoformat(settings.date)

    def start(self, line: Line) -> Started:
        """Tokenises and submits it; what is wrong with it becomes its error.

        Raises:
            ResourceError: not the line's fault, such as too little memory.
        """
        started, fields = Started(line), line.fields
        if line.error is None and fields is not None:
            try:
                started.prompts = wire.encode(fields, self.model, self.batch.ctx, self.batch.kv)
                how = wire.sampling(fields, self.model, self._seed(str(line.id)), self.settings.sampling)
                more = self.settings.max_tokens, self.settings.stop
                started.requests = wire.submit(fields, started.prompts, self.batch, how, *more)
            except RequestError as e:
                line.fields, line.error = None, e
        return started

    def _seed(self, name: str) -> int:
        digest = hashlib.sha256(self.settings.seed.to_bytes(8, "little") + name.encode()).digest()
        return int.from_bytes(digest[:8], "little")

    def result(self, started: Started) -> Result:
        """Of a line whose requests are done.

        Raises:
            ResourceError: a request ended for want of memory.
        """
        data = self._result(started)
        tokens = sum(wire.completion_tokens(c) for r in started.requests for c in r.choices)
        return Result(data, started.line.error is not None, tokens)

    def _result(self, started: Started) -> bytes:
        line, fields = started.line, started.line.fields
        failed = next((c.error for r in started.requests for c in r.choices if c.error is not None), None)
        if isinstance(failed, (ResourceError, MemoryError)):
            raise failed
        if failed is not None:
            line.error = RequestError(failed, code="failed", status=500)
        if line.error is not None or fields is None:
            return error_line(line)
        kind = "chatcmpl" if fields.chat else "cmpl"
        head = {"id": f"{kind}-{line.id}", "created": 0, "model": self.settings.model}
        head["system_fingerprint"] = wire.fingerprint(self.model)
        body = wire.answer(head, fields, started.prompts, started.requests, self.model, cached=False)
        if line.openai:
            return _dump({"custom_id": line.id, "response": {"status_code": 200, "body": body}, "error": None})
        choice, counts = body["choices"][0], body["usage"]
        content = "message" if fields.chat else "text"
        out = {"id": line.id, content: choice[content], "finish_reason": choice["finish_reason"], "seed": body["seed"],
               "usage": {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}}  # fmt: skip
        return _dump(out if fields.logprobs is None else out | {"logprobs": choice["logprobs"]})

    def run(self, lines: Iterator[Line], ahead: int) -> Iterator[Result]:
        """Results of lines, in their order; at most ``ahead`` are read before the first is done."""
        window: deque[Started] = deque()
        while True:
            while len(window) < ahead and (line := next(lines, None)) is not None:
                window.append(self.start(line))
            if not window:
                return
            if window[0].done:
                yield self.result(window.popleft())
            else:
                self.batch.step()


@dataclass(slots=True)
class Started:
    """A line at work: a request for each of its prompts, none if it is in error."""

    line: Line
    requests: list[Request] = field(default_factory=list)
    prompts: list[wire.Prompt] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all of its answers are."""
        return all(r.done for r in self.requests)


def error_line(line: Line) -> bytes:
    """The result line of a line in error."""
    error = line.error
    assert error is not None
    reason = {"code": error.code, "message": str(error)}
    if not line.openai or line.id is None:
        return _dump({"id": line.id, "line": line.number, "error": reason})
    response = {"status_code": error.status, "body": error.body()}
    if error.code == "duplicate_id":
        return _dump({"custom_id": line.id, "response": None, "error": reason})
    return _dump({"custom_id": line.id, "response": response, "error": None})


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
