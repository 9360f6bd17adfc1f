"""What README and docs/serve.md tell to type at a server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench_serve import Server, call
from deepcalm import wire

ROOT = Path(__file__).resolve().parents[2]
LOCAL = "http://127.0.0.1:8080"


@pytest.mark.parametrize("name", ["README.md", "docs/serve.md", "python/deepcalm/cli/serve.py"])
def test_curl_gets_a_text(server: Server, name: str) -> None:
    found = re.findall(rf"curl {LOCAL}(\S+) -H '(.+?): (.+?)' -d '(.+?)'", (ROOT / name).read_text(encoding="utf-8"))
    assert found
    for path, header, value, body in found:
        reply = call(server, "POST", path, body.encode(), {header: value})
        assert reply.status == 200 and reply.json["choices"][0]["text"]


def test_the_client_of_the_readme_prints_a_story(server: Server) -> None:
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert LOCAL in block and len(block.splitlines()) == 5
    code = block.replace(LOCAL, server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0 and len(done.stdout) > 20, done.stderr.decode()


def test_every_field_and_status_is_documented() -> None:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    fields = {*wire.IGNORED, *wire.NEUTRAL_CHAT, "n", "echo", "seed", "logprobs", "max_tokens", "top_k", "min_p"}
    assert not [name for name in fields if f"`{name}`" not in text]
    source = "".join(p.read_text() for p in (ROOT / "python/deepcalm/serve").glob("*.py"))
    statuses = {int(x) for x in re.findall(r"(?:status=|, )([45]\d\d)\)", source)}
    assert len(statuses) >= 9 and not [n for n in statuses if not re.search(rf"^\| [\d, ]*{n}\b", text, re.M)]
