"""How answers end early: readers that leave or do not read, signals, an engine that fails."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from typing import Any

import pytest

import deepcalm
import models
from bench_serve import Server, call, metrics
from deepcalm import wire
from deepcalm.serve import replies
from deepcalm.serve.engine import Answer
from serving import Inside

ENDLESS: dict[str, Any] = {"prompt": "abc", "max_tokens": 90_000, "temperature": 0}


def post(body: dict[str, Any]) -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "", "")  # fmt: skip
    return "\r\n".join(head).encode() + data


def begun(server: Any, body: dict[str, Any]) -> socket.socket:
    """A connection on which ``body`` was sent, and if it is a stream something has come."""
    sock = socket.create_connection(server.address, timeout=60)
    sock.sendall(post(body))
    if body.get("stream"):
        data = b""
        while data.count(b"data: ") < 2:
            data += sock.recv(4096)
    return sock


def rest(sock: socket.socket) -> bytes:
    """All that still comes."""
    with sock:
        return b"".join(iter(lambda: sock.recv(65536), b""))


def stuck(server: Inside) -> socket.socket:
    """A client that has asked for more than fits into buffers, and does not read."""
    sock = socket.socket()
    sock.settimeout(60)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # also of the connection it accepts
    sock.connect(server.address)
    prompts = [f"{i}" for i in range(4)]
    sock.sendall(post({"prompt": prompts, "max_tokens": 200, "logprobs": 5, "stream": True, "temperature": 1}))
    until(lambda: server.batch.running > 0)
    return sock


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def endless() -> deepcalm.Model:
    return deepcalm.Model(models.endless(), threads=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(
    endless: deepcalm.Model, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with Inside(endless, max_sequences=1, ctx=100_000) as server:
        steps, cancel = list[int](), server.api.engine.cancel

        def noted(answer: Answer) -> None:
            cancel(answer)
            steps.append(server.batch.stats.steps)  # behind the one that runs

        monkeypatch.setattr(server.api.engine, "cancel", noted)
        sock = begun(server, ENDLESS | {"stream": stream})
        until(lambda: server.batch.running == 1)
        sock.close()
        until(lambda: server.batch.idle and not server.api.engine.busy and steps)
        assert server.batch.stats.steps <= steps[0] + 1
        first, second = (begun(server, ENDLESS | {"stream": stream}), begun(server, ENDLESS | {"max_tokens": 2}))
        until(lambda: server.batch.waiting == 1)
        first.close()
        assert b'"length"' in rest(second)


def test_one_call_to_the_loop_a_step(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Inside(model, max_sequences=4) as server:
        calls, handles = [], server.loop.call_soon_threadsafe
        monkeypatch.setattr(server.loop, "call_soon_threadsafe",
                            lambda f, *a, **k: (calls.append(f.__name__), handles(f, *a, **k))[1])  # fmt: skip
        socks = [begun(server, {"prompt": p, "max_tokens": 30, "stream": True}) for p in ("A", "The", "Once", "In")]
        for sock in socks:
            until(lambda s=sock: b"[DONE]" in s.recv(65536))
            sock.close()
        assert 20 < calls.count("_deliver") <= server.batch.stats.steps


def test_a_reader_that_does_not_read_is_dropped(
    model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replies, "LINGER", 0.3)
    with Inside(model, max_sequences=12) as server:
        sock = stuck(server)
        quick = call(server, "POST", "/v1/completions", b'{"prompt": "A", "max_tokens": 2}')  # others are served
        assert quick.status == 200 and server.batch.running > 0
        until(lambda: not server.api.engine.busy, 60)
        until(lambda: not server.api.connections)
        assert b"[DONE]" not in rest(sock)  # only what the system had taken
    assert capfd.readouterr().err == ""


def test_a_full_queue_says_when_to_come_back(endless: deepcalm.Model) -> None:
    with Inside(endless, max_sequences=2, ctx=100_000) as server:
        socks = [begun(server, ENDLESS) for _ in range(10)]
        until(lambda: server.batch.waiting == 8)
        reply = call(server, "POST", "/v1/completions", b'{"prompt": "A"}')
        assert (reply.status, reply.headers["retry-after"]) == (429, "5")
        assert reply.json["error"]["code"] == "server_full"
        for sock in socks:
            sock.close()


def test_a_step_that_raises_ends_the_server(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Inside(model) as server:
        monkeypatch.setattr(server.batch, "step", lambda: 1 // 0)
        reply = call(server, "POST", "/v1/completions", b'{"prompt": "A"}')
        assert reply.status == 500 and reply.json["error"]["type"] == "server_error"
        until(lambda: server.raised)
        assert isinstance(server.raised[0], ZeroDivisionError)


def test_sigterm_ends_streams_with_their_reason() -> None:
    with Server("-m", models.endless(), "--ctx", "100000", "--threads", "1", "--grace", "0.5") as server:
        stream, whole = begun(server, ENDLESS | {"stream": True}), begun(server, ENDLESS)
        until(lambda: metrics(call(server, "GET", "/metrics"))["deepcalm_sequences_running"] == 2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        for path in ("/v1/models", "/health"):
            late = call(server, "GET", path)
            assert late.status == 503 and late.json["error"]["code"] == "shutdown"
        *_, error, done = re.findall(rb"data: (.*)\n\n", rest(stream))
        body = rest(whole).decode()
        assert server.process.wait(10) == 0
        assert json.loads(error)["error"]["code"] == "shutdown" and done == b"[DONE]"
        assert body.startswith("HTTP/1.1 503 ") and '"shutdown"' in body
        assert "Traceback" not in server.errors().decode()


def test_a_body_that_ends_after_the_server_is_refused(model: deepcalm.Model) -> None:
    with Inside(model) as server, socket.create_connection(server.address) as sock:
        data = post({"prompt": "A"})
        sock.sendall(data[:-1])
        until(lambda: any(c.cycle for c in server.api.connections))
        server.stop()
        until(lambda: server.api.engine._stopping)
        sock.sendall(data[-1:])
        head, _, body = rest(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and json.loads(body)["error"]["code"] == "shutdown"


def test_scores_of_prompts_end_with_their_client_and_with_the_server(
    model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, scores = list[int](), wire.prompt_scores
    monkeypatch.setattr(wire, "prompt_scores", lambda *args: (scored.append(0), scores(*args))[1])
    body = {"prompt": [[5] * 511] * 16, "echo": True, "logprobs": 0, "max_tokens": 1}
    with Inside(model, max_sequences=8) as server:
        with begun(server, body):
            until(lambda: scored)
        until(lambda: not server.api.engine.preparing, 60)
        with begun(server, body) as sock:
            until(lambda: server.api.engine.preparing)
            server.stop()
            assert rest(sock).startswith(b"HTTP/1.1 503 ")
    assert len(scored) < 16  # of 32


def test_sigterm_waits_for_answers() -> None:
    with Server("--threads", "1", "--grace", "30") as server:
        sock = begun(server, {"prompt": "A", "max_tokens": 300, "stream": True})
        server.process.send_signal(signal.SIGTERM)
        text = rest(sock)
        assert b'"finish_reason": "length"' in text or b'"finish_reason": "stop"' in text
        assert b"shutdown" not in text and b"[DONE]" in text and server.process.wait(10) == 0


def test_ctrl_c_is_130_and_a_second_signal_hurries() -> None:
    with Server("-m", models.endless(), "--ctx", "100000", "--threads", "1", "--grace", "60") as server:
        sock = begun(server, ENDLESS | {"stream": True})
        server.process.send_signal(signal.SIGINT)
        until(lambda: b"shutting down" in server.errors())
        server.process.send_signal(signal.SIGINT)
        assert b"shutdown" in rest(sock) and server.process.wait(10) == 130


def test_nothing_is_left_behind(model: deepcalm.Model) -> None:
    threads = threading.active_count()
    with Inside(model, max_sequences=2) as server:
        assert call(server, "POST", "/v1/completions", b'{"prompt": "A", "max_tokens": 3}').status == 200
        begun(server, {"prompt": "A", "max_tokens": 400, "stream": True}).close()
    assert threading.active_count() == threads and not server.raised


def test_a_server_does_not_wait_for_who_does_not_read(model: deepcalm.Model, capfd: pytest.CaptureFixture[str]) -> None:
    with Inside(model, max_sequences=12) as server:
        sock = stuck(server)
        until(lambda: server.batch.idle and not server.api.engine.busy, 60)
        began = time.monotonic()
    assert time.monotonic() - began < 10 and b"[DONE]" not in rest(sock)
    assert capfd.readouterr().err == ""
