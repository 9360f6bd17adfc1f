"""The thread that steps a ``Batch``, and what the event loop sees of its answers.

The loop never waits for a pass and the thread never for a reader: after each step it hands the loop one list of what
has changed, copied while nothing changes it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..batch import Batch, Choice, Request
from ..sampling import Sampling, Scores
from ..wire import Fields, Prompt, RequestError, submit

COMPLETION_TOKENS = 16  # of a completion that does not say how many; a chat goes on to the context's end
WINDOW = 0.5  # seconds over which the speed of reading is taken


def shutdown() -> RequestError:
    """What those hear who ask, or still wait, when the server ends."""
    return RequestError("this server is shutting down", code="shutdown", status=503)


class Seen(NamedTuple):
    """A ``Choice`` as it was between two steps."""

    text: str = ""
    tokens: Sequence[int] = ()
    accepted: Sequence[bool] = ()
    scores: Sequence[Scores] = ()
    reason: str | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, c: Choice) -> Seen:
        """A copy."""
        return cls(c.text, [*c.tokens], [*c.accepted], [*c.scores], c.reason, c.error)


class Answer:
    """The choices of one HTTP request: prompts in their order, each with its ``n``.

    ``changed`` is set when ``seen`` is newer, ``ended`` when nothing more will come.
    """

    def __init__(self, fields: Fields, prompts: list[Prompt], requests: list[Request]) -> None:
        self.fields, self.prompts, self.requests = fields, prompts, requests
        self.choices = [c for r in requests for c in r.choices]
        self.seen = [Seen.of(c) if c.reason else Seen() for c in self.choices]  # an echo alone has ended already
        self.changed, self.ended = asyncio.Event(), asyncio.Event()
        self.tell()

    def tell(self) -> None:
        """Wakes who waits."""
        self.changed.set()
        if all(s.reason for s in self.seen):
            self.ended.set()


class Numbers(NamedTuple):
    """Sequences, tokens of answers, GB/s that passes read, drafts."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    speed: float = 0.0
    offered: int = 0
    accepted: int = 0


class Engine:
    """Runs ``batch`` in a thread of its own, from ``start`` to ``close``.

    Args:
        limit: choices that may run or wait.
        failed: called on the loop when a step raises, after which nothing runs any more.
    """

    def __init__(self, batch: Batch, limit: int, failed: Callable[[BaseException], None]) -> None:
        self.batch, self.limit, self._failed = batch, limit, failed
        self.numbers = Numbers()
        self.preparing = 0  # requests that have no place yet; the loop counts them
        self._lock = threading.Lock()  # guards what follows
        self._places: dict[Choice, tuple[Answer, int]] = {}  # those that have not ended
        self._ended_tokens = 0  # of the others
        self._stopping = self._closing = False
        self._thread = threading.Thread(target=self._run, name="deepcalm-engine")
        self._read = (0.0, 0)  # when, and how many bytes by then

    def start(self) -> None:
        """To be called on the event loop."""
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Cancels all answers, and takes no more."""
        with self._lock:
            self._stopping = True
            answers = {answer for answer, _ in self._places.values()}
        for answer in answers:
            self.cancel(answer)

    def close(self) -> None:
        """Ends what runs and waits for the thread: a pass at most."""
        self._closing = True
        self.batch.close()
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self.preparing or self._places)

    def check_running(self) -> None:
        """Raises RequestError after ``stop``."""
        if self._stopping:
            raise shutdown()

    def check_room(self, choices: int = 1) -> None:
        """Raises RequestError (429; 503 after ``stop``) unless so many more may run or wait."""
        self.check_running()
        if max(self.preparing, len(self._places) + choices) > self.limit:
            message = f"{len(self._places)} answers run or wait, this server takes {self.limit} at a time"
            raise RequestError(message, code="server_full", status=429)

    def submit(self, fields: Fields, prompts: list[Prompt], how: Sampling) -> Answer:
        """From any thread but the loop's.

        Raises:
            RequestError, ResourceError: it can never run (``wire.submit``), or there is no room now.
        """
        default = None if fields.chat else COMPLETION_TOKENS
        with self._lock:  # a step that ends meanwhile hands out its news after this
            self.check_room(fields.n * len(prompts))
            answer = Answer(fields, prompts, submit(fields, prompts, self.batch, how, default))
            for i, c in enumerate(answer.choices):
                if not answer.seen[i].reason:
                    self._places[c] = answer, i
        return answer

    def cancel(self, answer: Answer) -> None:
        """Nobody waits for it any more: its places are free after the step that runs."""
        if not answer.ended.is_set():
            for request in answer.requests:
                request.cancel()

    def _run(self) -> None:
        try:
            while not self._closing:
                if self.batch.wait(WINDOW) and not self._closing:
                    self._step()
                self._count()
        except BaseException as e:
            if not self._closing:
                with self._lock:
                    news = [(*place, Seen(reason="failed", error=e)) for place in self._places.values()]
                    self._places.clear()
                self.loop.call_soon_threadsafe(_deliver, news)
                self.loop.call_soon_threadsafe(self._failed, e)

    def _step(self) -> None:
        news, changed = [], self.batch.step()
        with self._lock:
            for c in changed:
                if place := self._places.get(c):
                    if c.reason:
                        self._ended_tokens += len(c.tokens)
                        del self._places[c]
                    if c.reason or place[0].fields.stream:
                        news.append((*place, Seen.of(c)))
        if news:
            self.loop.call_soon_threadsafe(_deliver, news)

    def _count(self) -> None:
        now, (then, bytes_then) = time.perf_counter(), self._read
        if now - then < WINDOW or self._closing:
            return
        s = self.batch.stats
        self._read = now, s.prefill_bytes + s.decode_bytes
        speed = (self._read[1] - bytes_then) / (now - then) / 1e9
        with self._lock:
            tokens = self._ended_tokens + sum(len(c.tokens) for c in self._places)
        self.numbers = Numbers(self.batch.running, self.batch.waiting, tokens, speed, s.drafts_offered,
                               s.drafts_accepted)  # fmt: skip


def _deliver(news: list[tuple[Answer, int, Seen]]) -> None:
    for answer, i, seen in news:
        answer.seen[i] = seen
        answer.tell()
