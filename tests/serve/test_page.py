"""The page of ``/`` in a browser (headless chromium, selenium), against a small server with answers of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench_serve import Addressed
from deepcalm.serve import page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
METRICS = """# HELP deepcalm_tokens_total tokens
# TYPE deepcalm_tokens_total counter
deepcalm_tokens_total{kind="answer"} %d
deepcalm_tokens_created 1.7e+09
deepcalm_sequences_running 2
deepcalm_sequences_waiting 1
deepcalm_read_share 0.873
deepcalm_drafts_offered_total 40
deepcalm_drafts_accepted_total 30
"""


class Server(ThreadingHTTPServer):
    """Answers as ``deepcalm serve`` does: whatever ``chunks`` holds, to whoever has ``key``.

    hold: keeps a stream open after its chunks; broken: ends it there. requests: the bodies that came. left: a client
    has gone from a stream.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.page, self.headers = page.read()
        self.key: str | None = None
        self.template = True
        self.chunks: list[dict[str, Any]] = []
        self.hold = self.broken = False
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.tokens = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return False
        self.send(401, b'{"error": {"message": "a key is needed"}}', {"Content-Type": "application/json"})
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            self.send(200, self.server.page, self.server.headers)
        elif self.refused():
            pass
        elif self.path == "/v1/models":
            data = {"data": [{"id": "tiny <b>&amp;", "chat_template": self.server.template}]}
            self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})
        elif self.path == "/metrics":
            self.server.tokens += 50
            self.send(200, (METRICS % self.server.tokens).encode(), {"Content-Type": "text/plain"})
        else:
            self.send(404, b"", {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.requests.append({"path": self.path, **body})
        self.send(200, b"", {"Content-Type": "text/event-stream"})
        try:
            for chunk in self.server.chunks:
                data = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
                for i in range(0, len(data), 5):  # also inside a character
                    self.wfile.write(data[i : i + 5])
            while self.server.hold:
                self.wfile.write(b": still here\n\n")
                time.sleep(0.05)
            self.wfile.write(b"" if self.server.broken else b"data: [DONE]\n\n")
        except OSError:
            self.server.left.set()


def content(text: str, accepted: Any = None, kind: str = "content") -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "delta": {kind: text}, "finish_reason": None}
    return {"choices": [choice | ({} if accepted is None else {"accepted": accepted})]}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
END: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
]


def test_page_takes_nothing_from_elsewhere() -> None:
    data, headers = page.read()
    text = data.decode()
    assert len(text.splitlines()) <= 250
    assert not re.findall(
        r"https?://(?!www\.w3\.org/2000/svg)|\bsrc=|@import|innerHTML|insertAdjacentHTML|eval\(", text
    )
    assert not re.findall(r"\son\w+=|\sstyle=", text), "the policy allows none"
    policy = headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        own = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(own).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-proxy-server"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a user does and sees."""

    server: Server

    def __init__(self, browser: Any, address: tuple[Any, ...]) -> None:
        self.browser = browser
        browser.set_window_size(1000, 800)
        browser.get_log("browser")  # of the page before
        browser.get(f"http://127.0.0.1:{address[1]}/")

    def __call__(self, id: str) -> Any:
        return self.browser.find_element("id", id)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.browser.find_elements("css selector", selector)]

    def type(self, *keys: str) -> None:
        """On the keyboard, wherever the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def focus(self) -> str:
        return str(self.browser.switch_to.active_element.get_attribute("id"))

    def until(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + 10
        while not what():
            assert time.monotonic() < end, (self.texts("#log"), self.complaints())
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """Of the console; that a request was refused is none."""
        return [e["message"] for e in self.browser.get_log("browser") if "401" not in e["message"]]

    def picture(self, name: str) -> None:
        """For a look at it: DEEPCALM_TEST_PICTURES names the folder."""
        if folder := os.environ.get("DEEPCALM_TEST_PICTURES"):
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture
def opened(browser: Any) -> Iterator[Page]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    view = Page(browser, server.server_address)
    view.server = server
    yield view
    browser.get("about:blank")
    server.shutdown()
    server.server_close()


ENTER, ESCAPE, TAB, SHIFT = "\ue007", "\ue00c", "\ue004", "\ue008"


def test_page_streams_a_turn(opened: Page) -> None:
    server = opened.server
    server.chunks = [
        ROLE,
        content("Let me ", kind="reasoning_content"),
        content("see.", [[0, 3]], "reasoning_content"),
        content("Hé 👍 <b>", [[0, 2], [3, 4]]),
        content("&amp; so", [[0, 8]]),
        content(" on", []),
        *END,
    ]
    opened.until(lambda: opened("model").text == "tiny <b>&amp;")
    assert opened.focus() == "text" and opened.browser.title == "tiny <b>&amp;"
    opened.type("one", SHIFT + ENTER + SHIFT, "two")
    opened.type(ENTER)
    opened.until(lambda: opened.texts("article footer"))
    assert opened.texts(".user") == ["one\ntwo"] and opened.texts("article summary") == ["Thoughts"]
    assert opened.texts("article details div") == ["Let me see."]
    assert opened.texts("article > div") == ["Hé 👍 <b>&amp; so on"]
    assert opened.texts("article mark") == ["see", "Hé", "👍", "&amp; so"]
    assert re.fullmatch(r"9 tokens, [\d.]+ tok/s, ended by stop", opened.texts("article footer")[0])
    assert opened.focus() == "text" and not opened("stop").is_enabled()
    opened("temperature").send_keys("0.7")
    opened("text").send_keys("three", ENTER)
    opened.until(lambda: len(opened.texts("article footer")) == 2)
    first, second = server.requests
    said = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "Hé 👍 <b>&amp; so on"},
            {"role": "user", "content": "three"}]  # fmt: skip
    assert first["path"] == "/v1/chat/completions" and first["messages"] == said[:1] and first["temperature"] is None
    assert second["messages"] == said and second["temperature"] == 0.7 and second["stream"] is True
    opened.picture("desktop")
    assert opened.complaints() == []


def test_page_shows_the_server_s_numbers(opened: Page) -> None:
    opened.until(lambda: opened("speed").text != "–")
    assert 25 < float(opened("speed").text) < 75
    numbers = {id: opened(id).text for id in ("share", "running", "waiting", "drafts")}
    assert numbers == {"share": "87 %", "running": "2", "waiting": "1", "drafts": "75 %"}
    opened.server.shutdown()
    opened.server.server_close()
    opened.until(lambda: opened("running").text == "–")


def test_page_stops_and_resets(opened: Page) -> None:
    server = opened.server
    server.chunks, server.hold = [ROLE, content("Once upon")], True
    opened.until(lambda: opened("model").text != "deepcalm")
    opened.type("a story", ENTER)
    opened.until(lambda: opened.texts("article > div") == ["Once upon"])
    assert not opened("send").is_enabled()
    opened.type("more", ENTER)  # waits for its turn
    opened.type(ESCAPE)
    assert server.left.wait(10)
    opened.until(lambda: opened.texts("article footer") == ["ended by you"])
    assert opened("text").get_attribute("value") == "more"
    opened.type(ENTER)
    opened.until(lambda: len(server.requests) == 2 and len(opened.texts("article > div")) == 2)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["a story", "Once upon", "more"]
    server.left.clear()
    opened("reset").click()
    assert server.left.wait(10)
    assert opened.texts("article") == [] and opened.focus() == "text"
    server.hold = False
    opened.type("anew", ENTER)
    opened.until(lambda: len(server.requests) == 3)
    assert [m["content"] for m in server.requests[2]["messages"]] == ["anew"]
    opened.until(lambda: opened.texts("article footer"))
    assert opened.complaints() == []


def test_page_by_keyboard_alone(opened: Page) -> None:
    opened.server.chunks, opened.server.hold = [ROLE, content("x\n" * 200)], True
    opened.until(lambda: opened("model").text != "deepcalm")
    order = []
    for _ in range(4):
        order.append(opened.focus())
        opened.type(TAB)
    assert order == ["text", "send", "reset", "temperature"]
    opened("text").send_keys("go", ENTER)
    opened.until(lambda: opened.texts("article > div"))
    opened.type(TAB)
    assert opened.focus() == "stop"
    opened.type(ENTER)
    opened.until(lambda: opened.texts("article footer") and opened.focus() == "text")
    opened.type(SHIFT + TAB + SHIFT)
    log = opened("log")
    assert opened.focus() == "log" and log.get_property("scrollTop") > 0
    opened.type("\ue011")  # Home
    opened.until(lambda: log.get_property("scrollTop") == 0)


def test_page_asks_for_a_key(opened: Page) -> None:
    server = opened.server
    server.key, server.chunks = "secret", [ROLE, content("Yes."), *END]
    opened.browser.refresh()
    opened.until(lambda: opened("unlock").is_displayed())
    opened("key").send_keys("wrong", ENTER)
    opened.until(lambda: opened("unlock").is_displayed() and opened.focus() == "key")
    opened.type("secret", ENTER)  # in its place
    opened.until(lambda: not opened("unlock").is_displayed() and opened.focus() == "text")
    opened.type("Is it?", ENTER)
    opened.until(lambda: opened.texts("article > div") == ["Yes."])
    opened.until(lambda: opened.texts("article footer"))
    server.key = "another"
    opened.type("And now?", ENTER)
    opened.until(lambda: opened.texts("[role=alert]") == ["a key is needed"])
    assert opened("text").get_attribute("value") == "And now?" and opened.texts(".user") == ["Is it?"]
    assert opened.complaints() == []


@pytest.mark.parametrize("broken", [False, True])
def test_page_shows_what_went_wrong(opened: Page, broken: bool) -> None:
    opened.server.chunks = [content("Ha"), {"error": {"message": "shutdown"}}][: 2 - broken]
    opened.server.broken = broken
    opened.until(lambda: opened("model").text != "deepcalm")
    opened.type("x", ENTER)
    opened.until(lambda: opened.texts("[role=alert]"))
    said = "the connection ended before the answer did" if broken else "shutdown"
    assert opened.texts("[role=alert]") == [said]
    assert opened.texts("article > div") == ["Ha"] and opened.texts("article footer") == ["ended by an error"]
    assert opened("send").is_enabled()


def test_page_continues_text_without_a_template(opened: Page) -> None:
    server = opened.server
    server.template = False
    server.chunks = [{"choices": [{"index": 0, "text": " time", "finish_reason": "length", "accepted": [[1, 5]]}]}]
    opened.browser.refresh()
    opened.until(lambda: "no chat template" in opened("text").get_attribute("placeholder"))
    for text in ("Once upon a", "there"):
        opened("text").send_keys(text, ENTER)
        opened.until(lambda: opened("send").is_enabled() and opened.texts("article footer"))
    assert [r["prompt"] for r in server.requests] == ["Once upon a", "Once upon a time\nthere"]
    assert server.requests[0]["path"] == "/v1/completions" and opened.texts("article mark") == ["time"] * 2


@pytest.mark.parametrize("width", [360, 1000])
def test_page_fits(opened: Page, width: int) -> None:
    server = opened.server
    server.chunks = [ROLE, content("word " * 60 + "x" * 300, [[10, 40]]), *END]
    phone = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened("text").send_keys("A question that is long enough for two lines on a phone.", ENTER)
        opened.until(lambda: opened.texts("article footer"))
        opened.until(lambda: opened("speed").text != "–")
        sizes = (
            "const all = document.documentElement; return [all.scrollWidth, all.scrollHeight, innerWidth, innerHeight]"
        )
        wide, high, *screen = opened.browser.execute_script(sizes)
        assert screen == [width, 740] and wide <= width and high <= 740
        for id in ("send", "stop", "reset"):
            assert opened(id).size["height"] >= 44, "for a finger"
        opened.picture(f"width{width}")
    finally:
        opened.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_with_the_server_itself(browser: Any, server: Addressed) -> None:
    opened = Page(browser, server.address)
    opened.until(lambda: opened("model").text == "demo")
    opened.type("Tell me about a dog!", ENTER)
    opened.until(lambda: opened.texts("article footer"))
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tok/s, ended by stop", opened.texts("article footer")[0])
    assert len(opened.texts("article > div")[0]) > 100
    opened.until(lambda: opened("running").text == "0" and opened("share").text.endswith(" %"))
    slow = {"offline": False, "latency": 0, "downloadThroughput": 3000, "uploadThroughput": -1}  # bytes per second
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    opened("text").send_keys("And a cat?", ENTER)
    opened.until(lambda: len(opened.texts("article > div")) == 2)
    opened.type(ESCAPE)
    opened.until(lambda: opened.texts("article footer")[1:] == ["ended by you"])
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow | {"downloadThroughput": -1})
    opened("reset").click()
    assert opened.texts("article") == []
    assert opened.complaints() == []
