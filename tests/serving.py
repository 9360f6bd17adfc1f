"""A server in a thread of this process, whose parts tests can reach; ``bench_serve.Server`` is one as a process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import deepcalm
from deepcalm.serve.app import Api
from deepcalm.serve.server import listen, run


class Inside:
    """Has what ``bench_serve.ask`` needs of a server; ended with the block."""

    def __init__(self, model: deepcalm.Model, *, grace: float = 0, key: str = "", **batch: Any) -> None:
        self.batch = model.batch(**batch)
        self.api = Api(self.batch, "demo", max_waiting=8, key=key, hosts=(), bandwidth=1.0)
        self.grace, self.said, self.raised = grace, list[str](), list[BaseException]()
        self.sock = listen("127.0.0.1", 0)
        self.address = self.sock.getsockname()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a test that fails must not hang
        self._thread.start()
        while not hasattr(self.api.engine, "loop"):
            time.sleep(0.01)

    def _run(self) -> None:
        try:
            run(self.api, self.sock, self.grace, self.said.append)
        except BaseException as e:
            self.raised.append(e)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The server's."""
        return self.api.engine.loop

    def stop(self) -> None:
        """As SIGTERM does."""
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self.loop.call_soon_threadsafe(self.api.stopping.set)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
