"""tiktoken.model (Kimi-K2, Moonlight) -> tokenizer.json: the same tokens from the ``tokenizers`` library."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from ..errors import CheckpointError, show
from ..text import BYTE_CHARS
from .safetensors import parse_json

MAX_TOKENS = 1 << 22
MAX_TOKEN_BYTES = 1024  # merges are found in quadratic time
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?" + _LETTERS[0] + "*" + _LETTERS[1] + "+" + _SUFFIX,
    r"[^\r\n\p{L}\p{N}]?" + _LETTERS[0] + "+" + _LETTERS[1] + "*" + _SUFFIX,
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


def convert(ranks: bytes, tokenizer_config: bytes, where: str) -> bytes:
    """tokenizer.json text for a rank table ("base64 rank" lines) and its tokenizer_config.json (special tokens).

    Byte-level BPE with the vocabulary of the table; reserved ids between the named specials get tiktoken's own names.
    ``where`` names the file in errors (CheckpointError).
    """
    table = _ranks(ranks, where)
    config = parse_json(tokenizer_config, f"{where}: tokenizer_config.json", CheckpointError, lenient=True)
    if not isinstance(config, dict) or config.get("tokenizer_class", "TikTokenTokenizer") != "TikTokenTokenizer":
        raise CheckpointError(f"{where}: tokenizer_class in tokenizer_config.json, expected TikTokenTokenizer")

    def text(token: bytes) -> str:
        return "".join(BYTE_CHARS[b] for b in token)

    merges = [pair for token, rank in table.items() if len(token) > 1 and (pair := _last_merge(table, token, rank))]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model["ignore_merges"] = True  # tiktoken looks a whole piece up before it merges
    model["vocab"] = {text(token): rank for token, rank in table.items()}
    model["merges"] = [[text(a), text(b)] for a, b in merges]
    out: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    out["added_tokens"] = _specials(config, len(table), where)
    out |= {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]}}
    out |= {"post_processor": None, "decoder": levels, "model": model}
    return json.dumps(out, ensure_ascii=False, separators=(",", ":")).encode()


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Token -> rank, in rank order; ranks 0..n-1 and every single byte are required."""
    table: dict[bytes, int] = {}
    for i, line in enumerate(data.splitlines()):
        fields = line.split()
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (IndexError, ValueError, binascii.Error):
            raise CheckpointError(f"{where}: line {i + 1} is {show(line)}, expected base64 and a rank") from None
        if len(fields) != 2 or rank != i or not 0 < len(token) <= MAX_TOKEN_BYTES or token in table or i >= MAX_TOKENS:
            raise CheckpointError(f"{where}: line {i + 1} is {show(line)}, expected a new token with rank {i}")
        table[token] = rank
    for b in range(256):
        if bytes([b]) not in table:
            raise CheckpointError(f"{where}: byte {b} is not a token")
    return table


def _last_merge(table: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes] | None:
    """The two tokens that merge into ``token``: BPE on its bytes with lower ranks only. None: it is never merged."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: table.get(parts[i] + parts[i + 1], rank))
        if table.get(parts[best] + parts[best + 1], rank) >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _specials(config: dict[str, Any], n_base: int, where: str) -> list[dict[str, Any]]:
    named = config.get("added_tokens_decoder", {})
    contents: dict[int, tuple[str, bool]] = {}
    for key, entry in named.items() if isinstance(named, dict) else [("", named)]:
        content = entry.get("content") if isinstance(entry, dict) else None
        digits = key.isascii() and key.isdigit() and len(key) < 8
        if not digits or not isinstance(content, str) or not content or not n_base <= int(key) < MAX_TOKENS:
            expected = f"ids from {n_base} on, each with a content"
            raise CheckpointError(f"{where}: added_tokens_decoder {show(key)} is {show(entry)}, expected {expected}")
        contents[int(key)] = content, bool(entry.get("special", True))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    out = []
    for i in range(n_base, max(contents, default=n_base - 1) + 1):
        content, special = contents.get(i, (f"<|reserved_token_{i}|>", True))
        out.append({"id": i, "content": content, "special": special, **flags})
    return out
