"""What is refused, and how: every fault is the client's own, in one form, with the field's name."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import commands
import deepcalm
from bench_serve import Reply, Server, ask, call, metrics
from deepcalm import wire
from deepcalm.cli.serve import read_key
from deepcalm.serve import app
from deepcalm.wire import MAX_BYTES
from serving import Inside

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    TEXT: {"model": "demo", "prompt": "Once", "max_tokens": 2},
    CHAT: {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}
# fmt: off
WRONG: dict[str, dict[str, list[Any]]] = {
    "both": {
        "model": [7, ["demo"]], "max_tokens": [0, -1, 1.5, "4", True, 2**40],
        "temperature": [-1, "hot", True, [], 1e308],
        "top_p": [0, 1.5, -1, "x"], "top_k": [-2, 0.5, 2**31], "min_p": [-0.1, 2], "seed": [0.5, 2**64, "7"],
        "stop": ["", [""], "<|endoftext|>x", ["x"] * 17, "x" * 257, [1], 3], "n": [0, 129, "2"], "stream": ["yes", 1],
        "stream_options": [{"include_usage": True}, 3, {"other": 1}], "presence_penalty": [0.5],
        "logit_bias": [{"5": 1}],
        "max_completion_tokens": [3, "x"], "unknown": [1, {}], "grammar": ["x"],
    },
    TEXT: {
        "prompt": [7, {}, [], [[]], ["a", 1], [-1], [10**30], [0.5], "word " * 100_000, [5] * 600, [5] * 512],
        "logprobs": [21, -1, "5"], "echo": ["x"], "best_of": [2], "messages": [[]], "suffix": ["x"],
    },
    CHAT: {
        "messages": ["Hi", [], [7], [{}], [{"role": "king", "content": "x"}], [{"role": "user"}],
                     [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}],
                     [{"role": "user", "content": "word " * 100_000}]],
        "logprobs": [3], "top_logprobs": [2, 21], "tools": [{}, [{}]], "tool_choice": ["required", {}],
        "response_format": [{"type": "json_object"}], "prompt": ["x"], "chat_template_kwargs": [[], {"messages": []}],
    },
}
# fmt: on


def mutations(seed: int, count: int) -> list[tuple[str, bytes, str | None]]:
    """(path, body, field's name): valid requests with one thing wrong."""
    rng, out = random.Random(seed), list[tuple[str, bytes, str | None]]()
    fields = [(path, name, value) for path in (TEXT, CHAT) for kind in ("both", path)
              for name, values in WRONG[kind].items() for value in values]  # fmt: skip
    out += [(path, json.dumps(GOOD[path] | {name: value}).encode(), name) for path, name, value in fields]
    while len(out) < count:
        path = rng.choice((TEXT, CHAT))
        data = json.dumps(GOOD[path] | {"seed": rng.randrange(100), "user": "é"}, ensure_ascii=False).encode()
        i = rng.randrange(1, len(data) - 1)
        broken = rng.choice((
            data[:i],
            data + data,
            data.replace(b'"seed": ', b'"seed": ' + rng.choice((b"NaN", b"-Infinity", b"1e999", b"0x", b"--"))),
            data.replace(b"\xc3\xa9", rng.choice((rb"\ud800", b"\xff", rb"\udc00\ud8", b"\xed\xa0\x80", b"\n", b"\0"))),
            data[:-1] + b', "seed": 5}',
            data[:-1] + b', "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b"[" + data + b"]",
            bytes(rng.randrange(256) for _ in range(50)),
            b"",
        ))  # fmt: skip
        out.append((path, broken, None))
    rng.shuffle(out)
    return out


def checked(reply: Reply) -> dict[str, Any]:
    """The error of a response, whatever it was."""
    assert 400 <= reply.status < 500 and reply.headers["content-type"] == "application/json", reply
    assert reply.json.keys() == {"error"}
    error: dict[str, Any] = reply.json["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"] and isinstance(error["code"], str)
    return error


def test_300_bad_bodies_are_the_clients_fault(server: Server) -> None:
    cases = mutations(1, 300)
    numbers = iter(range(len(cases)))
    assert len(cases) == 300

    async def client() -> None:
        for i in numbers:
            path, data, name = cases[i]
            reply = await ask(server, "POST", path, data)
            error = checked(reply)
            if name is not None:
                assert (error["param"] or "").startswith(name), (data[:200], error)
            else:
                assert (reply.status, error["code"]) == (400, "invalid_json"), (data[:200], error)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(8)))

    asyncio.run(clients())
    assert call(server, "POST", TEXT, json.dumps(GOOD[TEXT]).encode()).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", TEXT, 405), ("POST", "/health", 405),
     ("OPTIONS", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/docs", 404), ("GET", "/v1/models/gpt", 404)],
)  # fmt: skip
def test_wrong_addresses(server: Server, method: str, path: str, status: int) -> None:
    reply = call(server, method, path)
    assert (reply.status, checked(reply)["code"]) == (
        status, {404: "not_found", 405: "method_not_allowed"}[status] if "gpt" not in path else "model_not_found"
    )  # fmt: skip


@pytest.mark.parametrize("broken", [
    b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
])  # fmt: skip
def test_what_is_no_http_gets_json_too(server: Server, broken: bytes) -> None:
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(broken)
        head, _, body = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")
    status, *lines = head.decode().lower().split("\r\n")
    reply = Reply(int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body)
    assert reply.status == 400 and checked(reply)["code"] == "invalid_http"


def test_head_is_get_without_the_body(server: Server) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/models/demo", "/nothing", TEXT):
        get, head = (call(server, method, path) for method in ("GET", "HEAD"))
        assert (head.status, head.body) == (get.status, b"")
        assert {**head.headers, "date": ""} == {**get.headers, "date": ""}
    assert "head" not in json.dumps(call(server, "GET", "/openapi.json").json)


def test_another_model_is_not_found(server: Server) -> None:
    reply = call(server, "POST", TEXT, json.dumps(GOOD[TEXT] | {"model": "gpt-4"}).encode())
    assert reply.status == 404 and checked(reply)["code"] == "model_not_found" and checked(reply)["param"] == "model"


@pytest.mark.parametrize("prompt", [[5] * 512, "word " * 600, [5] * 5000])
def test_a_prompt_that_is_too_long_has_its_own_code(server: Server, prompt: Any) -> None:
    error = checked(call(server, "POST", TEXT, json.dumps({"prompt": prompt}).encode()))
    assert error["code"] == "context_length_exceeded" and "512" in error["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_read(server: Server, kind: str) -> None:
    reply = call(server, "POST", TEXT, json.dumps(GOOD[TEXT]).encode(), {"Content-Type": kind})
    assert reply.status == 415 and "application/json" in checked(reply)["message"]
    assert call(server, "POST", TEXT, json.dumps(GOOD[TEXT]).encode(),
                {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True])
def test_30_megabytes_are_refused_before_they_are_held(server: Server, chunked: bool) -> None:
    before = server.memory
    with socket.create_connection(server.address, timeout=60) as sock:
        size = 30_000_000
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", length, "", "")
        sock.sendall("\r\n".join(head).encode())
        piece = b" " * 1_000_000
        for _ in range(size // len(piece)):
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 413 and json.loads(answer.read())["error"]["param"] is None
    assert server.memory - before < 2 * MAX_BYTES


def test_a_body_that_does_not_come(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with Inside(model) as server, socket.create_connection(server.address, timeout=60) as sock:
        head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                "Content-Length: 100", "Connection: close", "", "{")  # fmt: skip
        sock.sendall("\r\n".join(head).encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")
        for _ in range(3):  # and those that leave in the middle of theirs
            with socket.create_connection(server.address, timeout=60) as other:
                other.sendall("\r\n".join(head).encode())


def test_bodies_are_bounded_together(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODIES", 1_000_000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    small, large = (json.dumps(GOOD[TEXT] | {"user": "x" * n}).encode() for n in (9, 300_000))
    with Inside(model) as server, contextlib.ExitStack() as stack:

        def begun(length: int, data: bytes) -> socket.socket:
            sock = stack.enter_context(socket.create_connection(server.address, timeout=60))
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % length + data)
            return sock

        socks = [begun(900_000, b" " * 300_000) for _ in range(3)]
        while server.api._held < 900_000:
            time.sleep(0.01)
        refused = http.client.HTTPResponse(begun(len(large), large))
        refused.begin()
        assert (refused.status, refused.getheader("retry-after")) == (429, "5") and b"server_full" in refused.read()
        assert begun(len(small), small).recv(65536).startswith(b"HTTP/1.1 200 ")
        socks.pop().close()
        while server.api._held > 600_000:
            time.sleep(0.01)
        assert begun(len(large), large).recv(65536).startswith(b"HTTP/1.1 200 ")
        stack.close()
        while server.api._held:
            time.sleep(0.01)


def test_what_never_fits_is_said_with_numbers(model: deepcalm.Model) -> None:
    with Inside(model, cache_bytes=100_000) as server:
        error = checked(call(server, "POST", TEXT, b'{"prompt": "A", "max_tokens": 500}'))
        assert error["param"] == "max_tokens" and "100000" in error["message"]
        error = checked(call(server, "POST", TEXT, b'{"prompt": "A", "n": 30}'))
        assert error["param"] == "n" and "16" in error["message"]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("localhost", True), ("LOCALHOST:8080", True), ("127.0.0.1:1", True), ("[::1]:80", True), ("evil.example", False),
     ("localhost.evil.example", False), ("127.0.0.1.evil.example:8080", False), ("", False), ("[::1", False)],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(server: Server, host: str, allowed: bool) -> None:
    reply = call(server, "GET", "/v1/models", headers={"Host": host})
    assert reply.status == 200 if allowed else checked(reply)["code"] == "host_not_allowed" and reply.status == 403


def test_no_other_site_may_read(server: Server) -> None:
    reply = call(server, "POST", TEXT, json.dumps(GOOD[TEXT]).encode(), {"Origin": "https://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_key_is_asked_for_everywhere_but(model: deepcalm.Model) -> None:
    with Inside(model, key="sécret") as server:
        paths = ("/v1/models", "/metrics", "/openapi.json", "/nothing")
        for wrong in ("", "Bearer", "Bearer secret", "Basic sécret", "Bearer sécret2"):
            for path in paths:
                reply = call(server, "GET", path, headers={"Authorization": wrong})
                assert reply.status == 401 and checked(reply)["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "bearer"
        assert [call(server, "GET", path, headers={"Authorization": "bearer sécret"}).status for path in paths] == [
            200,
            200,
            200,
            404,
        ]
        assert call(server, "GET", "/health").status == 200


def test_the_page_allows_nothing_from_elsewhere(server: Server) -> None:
    reply = call(server, "GET", "/")
    assert reply.status == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"] and b"<script>" in reply.body


def test_models_and_metrics_and_schema(server: Server) -> None:
    models = call(server, "GET", "/v1/models").json
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["demo"]
    assert call(server, "GET", "/v1/models/demo").json == models["data"][0]
    before = metrics(call(server, "GET", "/metrics"))
    by_drafter = {name for name in before if name.startswith("deepcalm_drafter_")}
    assert by_drafter <= {f'deepcalm_drafter_{what}_total{{drafter="{name}"}}'
                          for what in ("offered", "accepted") for name in ("mtp", "ngram")}  # fmt: skip
    assert before.keys() - by_drafter == {
        f"deepcalm_{name}"
        for name in ("sequences_running", "sequences_waiting", "tokens_total", "read_gigabytes_per_second",
                     "read_share", "drafts_offered_total", "drafts_accepted_total")
    }  # fmt: skip
    schema = call(server, "GET", "/openapi.json").json
    assert {TEXT, CHAT, "/v1/models", "/health", "/metrics"} <= schema["paths"].keys()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"] and {"stream", "tools", "top_k"} <= body["properties"].keys()


def test_start_that_fails_is_one_line(run: commands.Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = commands.error(commands.run("serve", "--port", str(taken.getsockname()[1])))
    assert "Address already in use" in message and "--port" in message
    assert "no.such.host.invalid" in commands.error(run("serve", "--host", "no.such.host.invalid"))
    for name in ("a" * 70, "h\udcff"):
        assert "cannot listen at" in commands.error(run("serve", "--host", name))
    (tmp_path / "key").write_text("\n")
    assert "expected one key" in commands.error(run("serve", "--api-key-file", tmp_path / "key", "--port", "0"))


def test_what_the_extra_lacks_is_named() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom deepcalm import cli; sys.exit(cli.main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], env=commands.environment(), capture_output=True, check=False)
    want = "deepcalm: error: serve needs fastapi: pip install 'deepcalm[serve]'\n"
    assert (done.returncode, done.stderr.decode()) == (1, want)


def test_names_and_keys_need_not_be_utf8(run: commands.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = tmp_path / "\udcff.dcalm", tmp_path / "key"
    path.symlink_to(deepcalm.demo_path())
    key.write_bytes(b"k\xff\n")
    head = b"Host: localhost\r\nAuthorization: Bearer k\xff\r\nConnection: close\r\n"
    body = b'{"prompt":"Once","max_tokens":9}'
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    with Server("-m", path, "--api-key-file", key, "--draft", "2", "--drafter", f"model:{path}") as server:
        for ask, more, answer in (
            (b"GET /v1/models", b"\r\n", b'"id":"\\\\udcff"'),
            (b"POST /v1/completions", kind + b"\r\n" + body, b'"text":'),
            (b"GET /metrics", b"\r\n", b'\\\\udcff.dcalm"} '),
        ):
            with socket.create_connection(server.address) as sock:
                sock.sendall(ask + b" HTTP/1.1\r\n" + head + more)
                assert answer in b"".join(iter(lambda sock=sock: sock.recv(4096), b""))  # type: ignore[misc]
    monkeypatch.setenv("DEEPCALM_API_KEY", os.fsdecode(b"k\xff"))
    assert read_key(None) == read_key(key)
    commands.ended_servers(monkeypatch)
    code, _, err = run("serve", "--alias", os.fsdecode(b"\xff"))
    assert code == 0 and "\\udcff at http://127.0.0.1:" in err


def test_another_address_without_a_key_is_said_loudly_and_strangers_do_not_fill_the_log() -> None:
    """Neither with what is no HTTP nor with more connections than there are descriptors."""
    named = ("--host", "0.0.0.0", "--alias", "mine", "--allow-host", "Box.example")
    with Server("--threads", "1", *named) as server, contextlib.ExitStack() as stack:
        assert "WARNING" in server.errors().decode()
        assert call(server, "GET", "/health", headers={"Host": "bOX.Example:80"}).status == 200
        before = server.errors()
        upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        chunked = b"POST /none HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"  # is answered at once
        for data in (b"\x16\x03\x01\r\n\r\n", upgrade, chunked):
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(data)
                assert sock.recv(65536).startswith(b"HTTP/1.1 ")
                if data == chunked:
                    sock.sendall(b"no chunk\r\n")
                    while sock.recv(65536):
                        pass
        assert server.errors() == before
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (server.held[1] + 4,) * 2)
        for _ in range(16):
            stack.enter_context(socket.create_connection(server.address))
        while server.errors() == before:
            time.sleep(0.01)
        stack.close()
        assert call(server, "GET", "/health").status == 200
        assert server.errors() == before + b"connections wait: Too many open files\n"


def test_want_of_memory_is_not_the_clients_fault(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise deepcalm.ResourceError("no memory for this")

    monkeypatch.setattr(wire, "encode", refuse)
    with Inside(model) as server:
        reply = call(server, "POST", TEXT, b'{"prompt": "A"}')
        assert reply.status == 503 and reply.json["error"]["type"] == "server_error"
        assert reply.json["error"]["message"] == "no memory for this"
