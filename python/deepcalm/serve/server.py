"""uvicorn on a socket that is open already, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Error
from ..wire import RequestError
from .app import Api, refused


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises Error: no such address here, or another program has the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as e:  # UnicodeError: a name that cannot be one
        why = getattr(e, "strerror", None) or e
        raise Error(f"cannot listen at {host}:{port}: {why}; --host and --port choose another") from None


LAST = 5.0  # seconds for what has ended to be read


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ``serve``'s."""
        yield


class _Protocol(H11Protocol):
    def send_400_response(self, _msg: str) -> None:
        """To what is no HTTP, as all other errors; nothing where a response has gone out already."""
        response = refused(None, RequestError("the request is no valid HTTP", code="invalid_http"))
        head = h11.Response(status_code=400, headers=[*response.raw_headers, (b"connection", b"close")])
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Faults:
    """What asyncio says of callbacks that fail; once, not a thousand times a second, that no descriptor is left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        e = context.get("exception")
        if not (isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif self._say is not None:
            self._say(f"connections wait: {e.strerror}")
            self._say = None


def run(api: Api, sock: socket.socket, grace: float, say: Callable[[str], None]) -> int:
    """Serves until SIGTERM, SIGHUP or Ctrl-C, or ``api.stopping`` is set; then waits ``grace`` seconds for answers.

    Requests are refused from then on. Answers that have not ended by then, or at a second signal, are cut off.

    Returns:
        The exit code: 130 after Ctrl-C.

    Raises:
        BaseException: what a step of the batch raised.
    """
    return asyncio.run(_serve(api, sock, grace, say))


async def _serve(api: Api, sock: socket.socket, grace: float, say: Callable[[str], None]) -> int:
    loop, codes = asyncio.get_running_loop(), list[int]()

    def stop(code: int) -> None:
        codes.append(code)
        api.stopping.set()

    main = threading.current_thread() is threading.main_thread()  # others get no signals
    for number, code in ((signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)) if main else ():
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            loop.add_signal_handler(number, stop, code)
    loop.set_exception_handler(_Faults(say))
    server = _Server(uvicorn.Config(api, log_level="error", access_log=False, lifespan="off", http=_Protocol,
                                    ws="none", proxy_headers=False, timeout_graceful_shutdown=1))  # fmt: skip
    api.connections = server.server_state.connections
    running = asyncio.create_task(server.serve([sock]))
    running.add_done_callback(lambda _: api.stopping.set())
    api.engine.start()
    try:
        await api.stopping.wait()
        if api.engine.busy:
            say(f"shutting down: answers have {grace:g} s to end; a second signal ends them at once")
        end = loop.time() + grace
        while api.engine.busy and len(codes) < 2 and loop.time() < end:
            await asyncio.sleep(0.05)
        api.engine.stop()
        for connection in [*api.connections]:
            connection.shutdown()  # once its response is sent
        end = loop.time() + LAST
        while api.connections and loop.time() < end:
            await asyncio.sleep(0.05)
    finally:
        for connection in [*api.connections]:
            connection.transport.abort()
        server.should_exit = True
        await running
        await asyncio.to_thread(api.close)
    if api.failure is not None:
        raise api.failure
    return codes[0] if codes else 0
