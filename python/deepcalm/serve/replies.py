"""What goes back for a request for text: the whole answer, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .. import wire
from ..errors import ResourceError
from ..markup import Accepted
from ..sampling import Scores
from ..wire import RequestError
from .engine import Answer, Seen, shutdown

if TYPE_CHECKING:
    from .app import Api

UNFINISHED = ("failed", "cancelled")
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip
LINGER = 60.0  # seconds in which an answer that has ended must be read


class Reply(Response):
    """Sends an answer until all of it is sent, the client has left, or it has not been read for long.

    Whatever ends it: no sequence is computed for it any more.
    """

    def __init__(self, api: Api, answer: Answer) -> None:
        super().__init__()
        self.api, self.answer, self.fields = api, answer, answer.fields
        name = ("chatcmpl-" if self.fields.chat else "cmpl-") + uuid.uuid4().hex
        self.head = {"id": name, "created": int(time.time()), "model": api.name, "system_fingerprint": api.fingerprint}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        sending, late, _ = tasks = [*map(asyncio.create_task, (self.send(send), self._late(), gone(receive)))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if late.done() and not sending.done():
                self.api.abort(scope)
        finally:
            self.api.engine.cancel(self.answer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def send(self, send: Send) -> None:
        """Sends the response."""
        raise NotImplementedError

    async def _late(self) -> None:
        await self.answer.ended.wait()
        await asyncio.sleep(LINGER)

    def failure(self) -> RequestError | None:
        """If a choice ended without an answer."""
        for seen in self.answer.seen:
            if seen.reason == "failed":
                memory = isinstance(seen.error, (ResourceError, MemoryError))
                return RequestError(seen.error, code="failed", status=503 if memory else 500)
            if seen.reason == "cancelled":
                return shutdown()
        return None


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Whole(Reply):
    """One JSON object."""

    async def send(self, send: Send) -> None:
        """Sends it when all of it is there."""
        await self.answer.ended.wait()
        failure = self.failure()
        body = failure.body() if failure else await self.api.work(self._body)
        response = JSONResponse(body, failure.status if failure else 200)
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body})

    def _body(self) -> dict[str, Any]:
        a = self.answer
        return wire.answer(self.head, a.fields, a.prompts, a.requests, self.api.model, cached=True)


class Stream(Reply):
    """Server-sent events: chunks of the answer, and ``[DONE]``.

    A reader that is slow gets fewer and larger chunks: what it has not taken is nowhere but in the answer itself.
    """

    async def send(self, send: Send) -> None:
        """Sends chunks as they come."""
        kind = "chat.completion.chunk" if self.fields.chat else "text_completion"
        self._start = json.dumps({**self.head, "object": kind, "seed": self.answer.choices[0].seed})[:-1]
        self._end = ', "usage": null}' if self.fields.include_usage else "}"
        parts = [Part(self, i) for i in range(len(self.answer.choices))]
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send(send, map(self._chunk, [c for part in parts for c in part.opening()]))
        ended = False
        while not ended:
            await self.answer.changed.wait()
            self.answer.changed.clear()
            ended = self.answer.ended.is_set()
            new = [c for part, seen in zip(parts, self.answer.seen, strict=True) for c in part.take(seen)]
            await self._send(send, map(self._chunk, new))
        last = [json.dumps(failure.body()) for failure in [self.failure()] if failure]
        if self.fields.include_usage and not last:
            usage = json.dumps(wire.usage(self.answer.requests, cached=True))
            last = [f'{self._start}, "choices": [], "usage": {usage}}}']
        await self._send(send, [*last, "[DONE]"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _chunk(self, choice: dict[str, Any]) -> str:
        return f'{self._start}, "choices": [{json.dumps(choice, ensure_ascii=False)}]{self._end}'

    async def _send(self, send: Send, events: Iterable[str]) -> None:
        if data := "".join(f"data: {event}\n\n" for event in events):
            await send({"type": "http.response.body", "body": data.encode(), "more_body": True})


class Part:
    """One choice of a stream: what each look at it brings."""

    def __init__(self, stream: Stream, index: int) -> None:
        api, fields = stream.api, stream.fields
        self._fields, self._index, self._vocabulary, self._ended = fields, index, api.vocabulary, False
        self._prompt = stream.answer.prompts[index // fields.n]
        self._reader: Any = Accepted(self._vocabulary)
        if fields.chat:
            self._reader = api.markup.answer(self._prompt.ids, f"{stream.head['id']}-{index}", fields.tools)
        self._decoder = self._vocabulary.decoder()
        # Of the tokens with log probabilities: how many the decoder has had and the characters they made; how many end
        # with a whole character; how many went out, and the characters before the next.
        self._fed, self._characters = 0, sum(len(self._decoder.feed(s.token)) for s in self._prompt.scores)
        self._whole = self._sent = (0, self._characters)

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token: the role, or the prompt that is echoed."""
        if self._fields.chat:
            return [self._piece({"role": "assistant", "content": ""})]
        if not self._fields.echo:
            return []
        logprobs = wire.text_logprobs(self._vocabulary, self._prompt.scores) if self._prompt.scores else None
        return [self._piece({"text": self._prompt.text}) | {"logprobs": logprobs}]

    def take(self, seen: Seen) -> list[dict[str, Any]]:
        """What is new; at the end an empty piece with the reason."""
        if self._ended:
            return []
        pieces = []
        for delta in self._reader.take(seen):
            pieces.append(self._piece(delta.body) | ({"accepted": delta.accepted} if delta.accepted else {}))
        self._ended = seen.reason is not None
        if self._ended and seen.reason not in UNFINISHED:
            reason = wire.finish_reason(seen.reason)
            pieces.append(self._piece({} if self._fields.chat else {"text": ""}))
            pieces[-1]["finish_reason"] = self._reader.finish_reason(reason) if self._fields.chat else reason
        if pieces and self._fields.logprobs is not None:
            pieces[0]["logprobs"] = self._logprobs(seen.scores)
        return pieces

    def _logprobs(self, scores: Sequence[Scores]) -> dict[str, Any] | None:
        """Of the tokens since the last piece; those that end inside a character wait for the one that completes it."""
        for i, score in enumerate(scores[self._fed :], self._fed + 1):
            self._characters += len(self._decoder.feed(score.token))
            if self._decoder.complete or self._ended:
                self._whole = i, self._characters
        self._fed = len(scores)
        (begin, offset), (end, _) = self._sent, self._whole
        self._sent = self._whole
        if begin == end:
            return None
        if self._fields.chat:
            return wire.chat_logprobs(self._vocabulary, scores[begin:end])
        return wire.text_logprobs(self._vocabulary, scores[begin:end], offset)

    def _piece(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"delta": body} if self._fields.chat else body
        return {"index": self._index, **body, "logprobs": None, "finish_reason": None}
