"""The command ``serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..errors import Error, utf8
from .common import FILE, RUNTIME, open_model, options, say


@click.command(
    "serve",
    epilog="""\b
Examples:
  deepcalm serve -m v2-lite.dcalm
  DEEPCALM_API_KEY=secret deepcalm serve -m v2-lite.dcalm --host 0.0.0.0 --allow-host box.example
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'""",
)
@options("--model")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
              help="Port to listen at; 0: a free one, which is printed.")  # fmt: skip
@click.option("--alias", metavar="NAME", help="What clients call the model (default: the file's name).")
@options("--max-sequences", "--cache-bytes")
@click.option("--max-waiting", type=click.IntRange(0, 100_000), default=256, show_default=True, metavar="N",
              help="Answers that may wait; further requests are refused (429).")  # fmt: skip
@click.option("--grace", type=click.FloatRange(0, 86400), default=30, show_default=True, metavar="SECONDS",
              help="Time for answers to end after SIGTERM or Ctrl-C.")  # fmt: skip
@click.option("--api-key-file", "key_file", type=FILE, metavar="FILE",
              help="Holds the key that clients must send (default: $DEEPCALM_API_KEY, else none).")  # fmt: skip
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name of this machine that the Host "
              "header may have, beside --host and the loopback names; repeatable; *: any.")  # fmt: skip
@options("--draft", "--drafter", *RUNTIME, "--lock", "--quiet")
def serve_command(path: Path | None, host: str, port: int, grace: float, quiet: bool, **given: Any) -> int:
    """Answer requests over HTTP as OpenAI's API does, many at a time.

    \b
    /v1/completions, /v1/chat/completions, /v1/models; /health, /metrics (Prometheus), /openapi.json; / in a browser.
    The text of an answer does not depend on what else is asked at the time. Nothing of what is asked is logged.
    """
    try:
        from ..serve.app import LOOPBACK, Api
        from ..serve.server import listen, run
    except ImportError as e:
        raise Error(f"serve needs {e.name}: pip install 'deepcalm[serve]'") from None
    from .. import _core

    key, (device, threads, isa) = read_key(given["key_file"]), (given[k] for k in ("device", "threads", "isa"))
    with listen(host, port) as sock, open_model(path, device, threads, isa, quiet, given["lock"]) as model:
        shape = ("max_sequences", "ctx", "kv", "cache_bytes", "draft", "drafter")
        batch = model.batch(**{name: given[name] for name in shape})
        api = Api(
            batch,
            utf8(given["alias"] or model.path.stem),
            max_waiting=given["max_waiting"],
            key=key,
            hosts=(host, *given["hosts"]),
            bandwidth=_core.read_bandwidth(model.threads, 512, 2),
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        say(f"{api.name} at {url}/v1, in a browser {url}/, until Ctrl-C", quiet)
        if not key and host not in LOOPBACK:
            say(f"WARNING: whoever reaches {url} can use it: no key is asked for (--api-key-file, DEEPCALM_API_KEY)")
        return run(api, sock, grace, lambda text: say(text, quiet))


def read_key(file: Path | None) -> str:
    """The key that clients must send; "" for none. Raises Error for what is not one word."""
    text = os.environ.get("DEEPCALM_API_KEY", "") if file is None else file.read_text("utf-8", "surrogateescape")
    words = text.split()
    if file is None and not text:
        return ""
    if len(words) != 1:
        raise Error(f"{file or 'DEEPCALM_API_KEY'}: {len(words)} words, expected one key")
    return words[0]


COMMANDS = (serve_command,)
