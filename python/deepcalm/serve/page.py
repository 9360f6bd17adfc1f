"""The page of ``/``: one file that takes nothing from elsewhere, and the headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def read() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, which allow its own script and style by their hashes and nothing else."""
    data = Path(__file__).with_name("page.html").read_bytes()

    def own(tag: bytes) -> str:
        (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), data, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    policy = {
        "default-src": "'none'",
        "script-src": own(b"script"),
        "style-src": own(b"style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return data, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
