"""The endpoints: who may call, what a body must be, and every error as {"error": {...}}."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .. import _core, wire
from ..batch import Batch
from ..errors import ResourceError, one_line, utf8
from ..wire import RequestError
from . import page
from .engine import Answer, Engine, shutdown
from .replies import Stream, Whole, gone

T = TypeVar("T")
BODY_SECONDS = 60.0  # for a body to arrive
SMALL_BODY = 64 << 10  # bytes that every request may have; the server holds as many for itself
BODIES = 8 * wire.MAX_BYTES  # of all requests that are read or prepared; longer ones are refused beyond
WORKERS = 4  # threads for templates and tokenising
OPEN = ("/", "/health")  # need no key
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Api(Collector):
    """One model behind HTTP: an ASGI application, and what Prometheus collects.

    Args:
        name: what clients call the model.
        max_waiting: choices that may wait beside those that run.
        key: that every request but those to ``OPEN`` must bear; "": none.
        hosts: names that the Host header may have, beside those of this machine for itself; "*": any.
        bandwidth: GB/s of a plain read on this machine.
    """

    def __init__(
        self, batch: Batch, name: str, *, max_waiting: int, key: str, hosts: Collection[str], bandwidth: float
    ) -> None:
        self.model, self.name, self.created = batch.model, name, int(time.time())
        self.vocabulary, self.markup = self.model.vocabulary, self.model.markup  # refuse now what they cannot read
        self.fingerprint = wire.fingerprint(self.model)
        self.engine = Engine(batch, batch.max_sequences + max_waiting, self._failed)
        self.failure: BaseException | None = None
        self.stopping = asyncio.Event()
        self.connections: set[Any] = set()  # the server's
        self._held = 0  # bytes of bodies
        self._workers = ThreadPoolExecutor(WORKERS, "deepcalm-work")
        self._key = hashlib.sha256(os.fsencode(key)).digest() if key else None
        self._hosts, self._bandwidth = {*LOOPBACK, *map(str.lower, hosts)}, bandwidth
        self._page, self._page_headers = page.read()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._app = self._routes()

    def _routes(self) -> FastAPI:
        app = FastAPI(title="deepcalm", version=_core.__version__, docs_url=None, redoc_url=None,
                      redirect_slashes=False)  # fmt: skip
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(RequestError, refused)
        app.add_exception_handler(Exception, _fault)
        for path, call, fields, needed in (
            ("/v1/completions", self.completions, wire.COMPLETIONS, "prompt"),
            ("/v1/chat/completions", self.chat_completions, wire.CHAT, "messages"),
        ):
            schema = {"type": "object", "properties": {name: {} for name in fields}, "required": [needed],
                      "additionalProperties": False}  # fmt: skip
            extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
            app.add_api_route(path, call, methods=["POST"], openapi_extra=extra)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.one_model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            self._check(scope)
        except RequestError as e:
            await refused(None, e)(scope, receive, send)
        else:  # uvicorn sends no body after a HEAD
            await self._app({**scope, "method": scope["method"].replace("HEAD", "GET")}, receive, send)

    def close(self) -> None:
        """Ends what runs; waits for the threads."""
        self.engine.close()
        self._workers.shutdown(cancel_futures=True)

    def _failed(self, e: BaseException) -> None:
        self.failure = e
        self.stopping.set()

    def abort(self, scope: Scope) -> None:
        """Closes the connection at once, whatever is not sent yet."""
        for connection in [c for c in self.connections if c.client == scope["client"]]:
            connection.transport.abort()

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        """``call(*args)`` in a thread for what takes long."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, call, *args)

    def _check(self, scope: Scope) -> None:
        """Raises RequestError for who comes from another site, without the key, or too late."""
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get(b"host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self._hosts and "*" not in self._hosts:
            message = f"{one_line(host, 80)!r} is not allowed; --allow-host NAME allows it"
            raise RequestError(message, "Host", "host_not_allowed", 403)
        if self._key is not None and scope["path"] not in OPEN:
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            given = hashlib.sha256(key.strip().encode("latin-1")).digest()
            if not hmac.compare_digest(given, self._key) or scheme.lower() != "bearer":
                raise RequestError("no valid key, expected Bearer KEY", "Authorization", "invalid_api_key", 401)
        if self.stopping.is_set():
            raise shutdown()

    # ---- endpoints

    async def page(self) -> Response:
        """To try the model in a browser."""
        return Response(self._page, headers=self._page_headers)

    async def models(self) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """The same by its name."""
        self._named(name)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        """Whether requests are taken."""
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Metric]:
        """What /metrics tells."""
        n = self.engine.numbers
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("deepcalm_sequences_running", "Sequences that get tokens.", n.running)
        yield gauge("deepcalm_sequences_waiting", "Sequences that wait.", n.waiting)
        yield counter("deepcalm_tokens", "Tokens of answers.", n.tokens)
        yield gauge("deepcalm_read_gigabytes_per_second", "What passes read, over half a second.", n.speed)
        yield gauge("deepcalm_read_share", "Of a plain read when the server started.", n.speed / self._bandwidth)
        yield counter("deepcalm_drafts_offered", "Drafts that were verified.", n.offered)
        yield counter("deepcalm_drafts_accepted", "Those of them that counted.", n.accepted)
        for i, what in enumerate(("offered", "accepted")):
            of = counter(f"deepcalm_drafter_{what}", f"Drafts {what}, by who made them.", labels=["drafter"])
            for name, counts in self.engine.batch.drafted.copy().items():
                of.add_metric([utf8(name)], counts[i])
            yield of

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "deepcalm",
                "chat_template": self.model.has_chat_template, "ctx": self.engine.batch.ctx}  # fmt: skip

    def _named(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"{one_line(name, 80)!r} is not here, this server has {self.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)

    async def completions(self, request: Request) -> Response:
        """Text that goes on from a prompt, or from each of several."""
        return await self._generate(request, False)

    async def chat_completions(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._generate(request, True)

    async def _generate(self, request: Request, chat: bool) -> Response:
        data = bytearray()
        try:
            await asyncio.wait_for(self._body(request, data), BODY_SECONDS)
            answer = await self._queue(request, data, chat)
        except ClientDisconnect:
            return Response()
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {BODY_SECONDS:.0f} s"
            raise RequestError(message, code="request_timeout", status=408) from None
        finally:
            self._held -= len(data)
        return (Stream if answer.fields.stream else Whole)(self, answer)

    async def _body(self, request: Request, data: bytearray) -> None:
        """Appends all of it to ``data``, counted as it comes; raises RequestError."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            message = f"{one_line(kind, 80)!r}, expected application/json"
            raise RequestError(message, "Content-Type", "unsupported_media_type", 415)
        too_large = RequestError(f"the body is longer than {wire.MAX_BYTES} bytes", code="too_large", status=413)
        if int(request.headers.get("content-length", "0")) > wire.MAX_BYTES:
            raise too_large
        async for piece in request.stream():
            data += piece
            self._held += len(piece)
            if len(data) > wire.MAX_BYTES:
                raise too_large
            if len(data) > SMALL_BODY and self._held > BODIES:
                raise RequestError("other requests fill the memory for bodies", code="server_full", status=429)

    async def _queue(self, request: Request, data: bytearray, chat: bool) -> Answer:
        left = asyncio.create_task(gone(request.receive))
        self.engine.preparing += 1
        try:
            self.engine.check_room()
            return await self.work(self._prepare, data, chat, left.done)
        finally:
            self.engine.preparing -= 1
            left.cancel()

    def _prepare(self, data: bytes, chat: bool, left: Callable[[], bool]) -> Answer:
        def check() -> None:
            engine.check_running()
            if left():
                raise ClientDisconnect

        fields, engine = wire.parse_fields(wire.parse_object(data), chat, streams=True), self.engine
        self._named(fields.model)
        if (n := fields.n * max(len(fields.prompts), 1)) > engine.limit:
            message = f"{n} answers, this server takes {engine.limit} at a time"
            raise RequestError(message, "n" if fields.n > 1 else "prompt")
        try:
            prompts = wire.encode(fields, self.model, engine.batch.ctx, engine.batch.kv, check)
        except (ResourceError, MemoryError) as e:  # now, or for this echo's scores
            raise RequestError(e, code="no_memory", status=503) from None
        how = wire.sampling(fields, self.model, secrets.randbelow(2**53))  # a number that JavaScript can hold
        try:
            return engine.submit(fields, prompts, how)
        except ResourceError as e:
            raise RequestError(e, "max_tokens") from None


def refused(_: object, e: Exception) -> Response:
    """What a ``RequestError`` is answered with."""
    assert isinstance(e, RequestError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Connection": "close"}}
    return JSONResponse(e.body(), e.status, headers.get(e.status))


def _http_error(_: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    body = RequestError(e.detail, code=HTTPStatus(e.status_code).name.lower(), status=e.status_code).body()
    return JSONResponse(body, e.status_code, e.headers)


def _fault(_request: Request, _error: Exception) -> Response:
    return refused(None, RequestError("an error of this server, which its log tells", code="fault", status=500))
