#!/usr/bin/env python3
"""Load on `deepcalm serve`, and what HTTP costs beside the passes.

    tools/bench_serve.py load --requests 10000     32 clients, a third leaves: nothing lost or wrong, memory flat
    tools/bench_serve.py cost -m v2-lite.dcalm     processor time of a streamed chunk; a request beside `generate`

Without -m: the demo model. Each part starts a server of its own. Speeds mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import deepcalm
from deepcalm.generation import TextGeneration

PACKAGE = Path(deepcalm.__file__).resolve().parent.parent
PROMPTS = ("Once upon a time", "The little dog", "One day, Anna", "It was dark", "The old man said", "Rain fell")
FLAT = 1.05  # memory after the last request over memory when a fifth was answered


class Server:
    """`deepcalm serve` as a process, at a free port; ended by SIGTERM when the block ends."""

    def __init__(self, *args: str | Path, **environment: str) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        command = [sys.executable, "-m", "deepcalm", "serve", "--port", "0", *map(str, args)]
        env = os.environ | {"PYTHONPATH": str(PACKAGE)} | environment
        self.process = subprocess.Popen(command, stderr=self.log, env=env)
        end = time.monotonic() + 60
        while b"/v1, in" not in self.errors():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"no server: {self.errors().decode()}")
            time.sleep(0.02)
        self.url = self.errors().decode().partition(" at ")[2].partition("/v1, in")[0]
        self.address = urlsplit(self.url).hostname or "", urlsplit(self.url).port or 0

    def errors(self) -> bytes:
        """What it wrote to stderr so far."""
        return os.pread(self.log.fileno(), 1 << 20, 0)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end()
        self.log.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    @property
    def memory(self) -> int:
        """Bytes of its own, without the pages of files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    @property
    def held(self) -> tuple[int, int]:
        """Threads and descriptors."""
        folder = Path(f"/proc/{self.process.pid}")
        return len([*(folder / "task").iterdir()]), len([*(folder / "fd").iterdir()])

    def thread_seconds(self, pid: int | None = None) -> float:
        """Processor time of the main thread, which has the event loop."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@dataclass
class Reply:
    """A response: its JSON body, or the data of its events."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        return [line[6:] for line in self.body.decode().split("\n\n") if line]

    @property
    def text(self) -> str:
        """The text of choice 0."""
        if self.headers["content-type"] == "application/json":
            return str(self.json["choices"][0]["text"])
        chunks = [json.loads(e) for e in self.events[:-1]]
        return "".join(c["choices"][0]["text"] for c in chunks if c["choices"])


class Addressed(Protocol):
    """A server somewhere."""

    address: tuple[str, int]


async def ask(
    server: Addressed, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None,
    leave: int | None = None,
) -> Reply:  # fmt: skip
    """One request on a connection of its own; ``leave``: closes it after so many bytes of the response's body."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        given = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close",
                 "Content-Length": str(len(body))} | dict(headers or {})  # fmt: skip
        head = "".join(f"{k}: {v}\r\n" for k, v in given.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        if leave == 0:
            await writer.drain()
            return Reply(0, {}, b"")
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = dict(line.lower().split(": ", 1) for line in lines if line)
        data = bytearray()
        while piece := await reader.read(65536):
            data += piece
            if leave is not None and len(data) >= leave:
                break
        content = dechunked(bytes(data)) if "transfer-encoding" in found else bytes(data)
        return Reply(int(status.split()[1]), found, content, time.perf_counter() - began)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def dechunked(data: bytes) -> bytes:
    """A body of chunked transfer encoding, possibly cut off."""
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size or b"0", 16)
        out, data = out + data[:n], data[n + 2 :]
    return out


def call(
    server: Addressed, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Reply:
    """``ask`` without an event loop."""
    return asyncio.run(ask(server, method, path, body, headers))


def metrics(reply: Reply) -> dict[str, float]:
    lines = reply.body.decode().splitlines()
    return {k: float(v) for k, v in (line.split() for line in lines if line and line[0] != "#")}


@dataclass
class Load:
    """What many requests brought."""

    answered: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # ten times in equal parts


def alone(model: deepcalm.Model, prompt: str, temp: float, seed: int, max_tokens: int, stop: str = "") -> str:
    """What a session of its own says to a completion's prompt."""
    how: dict[str, Any] = {**model.sampling_defaults, "temp": temp, "seed": seed, "max_tokens": max_tokens}
    with model.session() as session:
        return "".join(TextGeneration(session.generate(model.encode(prompt), **how), [stop] if stop else ()))


def cases(model: deepcalm.Model) -> list[tuple[dict[str, Any], str]]:
    """Bodies, and the text that each must bring."""
    out = []
    for i, (prompt, temp) in enumerate(itertools.product(PROMPTS, (0.0, 0.9))):
        body = {"prompt": prompt, "temperature": temp, "seed": i, "max_tokens": 4 + i, "stop": "!"}
        out.append((body, alone(model, prompt, temp, i, 4 + i, "!")))
    return out


async def load(server: Server, expected: list[tuple[dict[str, Any], str]], requests: int, clients: int) -> Load:
    """``requests`` by ``clients`` at a time: a third leaves, before the answer or in the middle of it."""
    result, numbers = Load(), iter(range(requests))

    async def client() -> None:
        for i in numbers:
            body, text = expected[i % len(expected)]
            stream, leaves = i % 2 == 0, i % 3 == 2
            data = json.dumps({**body, "stream": stream}).encode()
            reply = await ask(server, "POST", "/v1/completions", data, leave=150 * (i % 4) if leaves else None)
            if leaves:
                result.left += 1
            elif reply.status != 200 or (stream and reply.events[-1] != "[DONE]") or reply.text != text:
                result.wrong.append(f"{data!r}: {reply}, expected {text!r}")
            else:
                result.answered += 1
            if (i + 1) % max(requests // 10, 1) == 0:
                result.memory.append(server.memory)

    await asyncio.gather(*(client() for _ in range(clients)))
    return result


def run_load(model: deepcalm.Model, options: list[str | Path], requests: int, clients: int) -> int:
    expected = cases(model)
    with Server(*options) as server:
        asyncio.run(load(server, expected, 2 * clients, clients))  # starts what threads there are
        time.sleep(1)
        held, began = server.held, time.perf_counter()
        result = asyncio.run(load(server, expected, requests, clients))
        seconds = time.perf_counter() - began
        time.sleep(1)
        after = metrics(call(server, "GET", "/metrics"))
        running = after["deepcalm_sequences_running"] + after["deepcalm_sequences_waiting"]
        print(f"{requests} requests by {clients} clients in {seconds:.1f} s: {result.answered} answered, "
              f"{result.left} left, {len(result.wrong)} wrong; {running:.0f} still run")  # fmt: skip
        print("memory, MB:", *(f"{m / 1e6:.1f}" for m in result.memory))
        print(f"threads and descriptors: {held} before, {server.held} after")
        print(*result.wrong[:3], sep="\n", end="")
        flat = result.memory[-1] <= FLAT * result.memory[1]
        return int(bool(result.wrong) or not flat or running > 0 or server.held != held)


def run_cost(model: deepcalm.Model, options: list[str | Path], pairs: int) -> int:
    prompt, n = PROMPTS[0], 128
    ids = model.encode(prompt)
    with Server(*options) as server:
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0}

        def send(**more: Any) -> Reply:
            return call(server, "POST", "/v1/completions", json.dumps(body | more).encode())

        send()
        times: list[tuple[float, float]] = []
        for _ in range(pairs):
            reply = send()
            began = time.perf_counter()
            tokens = len([*model.session().generate(ids, max_tokens=n)])  # greedy, as the request is
            times.append((reply.seconds, time.perf_counter() - began))
            if reply.json["usage"]["completion_tokens"] not in (tokens, tokens + 1):
                raise RuntimeError("another number of tokens")
        http, alone = (statistics.median(t) for t in zip(*times, strict=True))
        print(f"one request of {tokens} tokens: {1e3 * http:.1f} ms, generate {1e3 * alone:.1f} ms, "
              f"{100 * (http / alone - 1):+.1f} % (medians of {pairs} alternating pairs)")  # fmt: skip
        for options_of in ({}, {"logprobs": 5}):
            began_cpu, chunks = server.thread_seconds(), 0
            for _ in range(pairs):
                chunks += len(send(stream=True, **options_of).events)
            spent = server.thread_seconds() - began_cpu
            what = "streamed with logprobs" if options_of else "streamed"
            print(f"{what}: {1e3 * spent / chunks:.3f} ms of the event loop's processor time a chunk ({chunks} chunks)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=("load", "cost"))
    parser.add_argument("-m", "--model", type=Path, default=deepcalm.demo_path())
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    with deepcalm.Model(args.model) as model:
        options = ["-m", args.model]
        if args.part == "cost":
            return run_cost(model, options, args.pairs)
        return run_load(model, options, args.requests, args.clients)


if __name__ == "__main__":
    sys.exit(main())
