"""Text in and out of a model: prompt encoding with the bos rule, incremental decoding, stop strings.

Token ids become bytes, bytes become complete characters, characters pass the stop strings; each step is a small class
that knows nothing of the others. Tokenizers are byte-level BPE (the packer converts tiktoken files), or spell spaces as
a mark and bytes without a token as <0xNN>, as SentencePiece does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import Error, PackedFileError, SessionError, UnsupportedError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

# Turn ends that some families leave out of both config.json and generation_config.json (docs/model.md section 8).
_TURN_ENDS = ("<|im_end|>", "<|user|>", "<|observation|>")


def _byte_chars() -> list[str]:
    """[256] the byte-level alphabet: printable latin-1 bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


BYTE_CHARS = _byte_chars()
_BYTE_OF = {c: b for b, c in enumerate(BYTE_CHARS)}


_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes as the error handler "surrogateescape" shows them


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a decoder that is not byte-level makes text of tokens."""

    replace: tuple[tuple[str, str], ...]  # in every token, in order
    byte_fallback: bool = False  # <0xNN> is a byte
    strip: int = 0  # spaces that a whole text loses at its beginning

    @classmethod
    def of(cls, decoder: Any) -> Spelling | None:
        """From the decoder of a tokenizer.json; None: byte-level.

        Raises:
            UnsupportedError: neither byte-level nor as SentencePiece's tokenizers have it.
        """
        kind = decoder.get("type") if isinstance(decoder, dict) else None
        if kind == "ByteLevel":
            return None
        if kind == "Metaspace":
            return cls(((decoder["replacement"], " "),), strip=int(decoder["prepend_scheme"] != "never"))
        steps = decoder["decoders"] if kind == "Sequence" else []
        names = " ".join(s["type"] for s in steps)
        strip: dict[str, Any] = steps[-1] if names.endswith("Strip") else {"content": " ", "start": 0, "stop": 0}
        replace = [(s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"]
        known = re.fullmatch(r"(Replace )+(ByteFallback )?Fuse( Strip)?", names)
        longer = any(not old or len(new.encode()) > len(old.encode()) for old, new in replace)  # a token never grows
        if not known or longer or (strip["content"], strip["stop"]) != (" ", 0):
            expected = "expected 'ByteLevel', 'Metaspace' or Replace, ByteFallback, Fuse and Strip"
            raise UnsupportedError(f"tokenizer.json: decoder {names or kind!r} is not supported, {expected}")
        return cls(tuple(replace), "ByteFallback" in names, strip["start"])

    def bytes_of(self, text: str) -> bytes:
        """The bytes that a token spells."""
        for old, new in self.replace:
            text = text.replace(old, new)
        byte = _BYTE.fullmatch(text) if self.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else text.encode("utf-8", "replace")


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json that puts no mark in front of a text."""
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [_without_prefix(p) for p in part[key] if p["type"] != "Prepend"]}
    return part | ({"prepend_scheme": "never"} if part["type"] == "Metaspace" else {})


def _guarded(what: str, call: Callable[[], T]) -> T:
    """``call()`` with the failures of the tokenizers package, Rust panics included, as PackedFileError."""
    try:
        return call()
    except BaseException as e:  # a pyo3 PanicException is no Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise PackedFileError(f"{what}: {one_line(e)}") from None


def load_tokenizer(source: bytes) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, with truncation and padding off.

    Raises:
        PackedFileError: not a tokenizer that the ``tokenizers`` package reads.
    """
    from tokenizers import Tokenizer

    def load() -> Tokenizer:
        tokenizer = Tokenizer.from_str(source.decode("utf-8-sig"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    return _guarded("tokenizer.json", load)


def token_content(value: object) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


class Vocabulary:
    """What text needs to know of a model: ids to bytes, prompt encoding, bos, and the ids that end generation.

    ``n_valid`` is one past the highest id below ``vocab_size`` that has a token; the rows beyond are padding of the
    embedding and are never sampled. An id below it that has none (a removed token) can be, and is no text.
    """

    def __init__(self, tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        added = _guarded("tokenizer.json", tokenizer.get_added_tokens_decoder)
        self._added = {i: t.content for i, t in added.items()}
        self._special = {i for i, t in added.items() if t.special}
        self._vocab_size = int(config["vocab_size"])
        ids = range(self._vocab_size, 0, -1)  # from the end: a whole vocabulary takes a quarter of a second to list
        self.n_valid = next((i for i in ids if tokenizer.id_to_token(i - 1) is not None), 0)

        self.bos_id: int | None = self._id(token_content(tokenizer_config.get("bos_token")))
        if self.bos_id is None:
            self.bos_id = config.get("bos_token_id")
        probe = _guarded("tokenizer.json", lambda: tokenizer.encode("x", add_special_tokens=True).ids)
        self.adds_bos = self.bos_id is not None and (
            tokenizer_config.get("add_bos_token") is True or probe[:1] == [self.bos_id]
        )
        eos = set(config.get("eos_token_ids") or ())
        eos.add(self._id(token_content(tokenizer_config.get("eos_token"))))
        eos.update(i for i in map(self._id, _TURN_ENDS) if i in self._special)
        self.eos_ids: frozenset[int] = frozenset(i for i in eos if i is not None)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def control_tokens(self, literals: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The special tokens, and with them the added tokens that a template with this literal text writes itself."""
        special = tuple(t for i, t in self._added.items() if t and i in self._special)
        return special, special + tuple(
            t for i, t in self._added.items() if i not in self._special and t.strip() and t in literals
        )

    def stop_ids(self, stops: Iterable[str]) -> frozenset[int]:
        """The special tokens among stop strings: they show as no text, and would never match.

        Raises:
            SessionError: a stop string holds the text of a special token beside other text.
        """
        special = {t: i for i, t in self._added.items() if t and i in self._special}
        for s in stops:
            if s not in special and (inside := next((t for t in special if t in s), None)):
                raise SessionError(f"stop {s!r}: {inside!r} is a special token, which shows as no text: name it alone")
        return frozenset(special[s] for s in stops if s in special)

    def encode(self, text: str, plain: bool = False, inside: bool = False) -> list[int]:
        """``text`` as token ids; special tokens written out in it count (not if ``plain``), none is added.

        ``inside``: it goes on from a ``plain`` text, and no space is put in front of it.

        Raises:
            SessionError: the text holds lone surrogates, or the tokenizer gives an id that the model has no row for.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise SessionError(f"the text is not valid Unicode: {one_line(e)}") from None
        if inside and not plain and self._spelling is not None:
            starts = (i for t in self._added.values() if t and (i := text.find(t)) >= 0)
            first = min(starts, default=len(text))  # from an added token on the tokenizer has the right text before it
            return self.encode(text[:first], plain=True) + self.encode(text[first:])
        tokenizer = self._plain_tokenizer if plain else self._tokenizer
        ids: list[int] = _guarded("tokenizer.json", lambda: tokenizer.encode(text, add_special_tokens=False).ids)
        if ids and max(ids) >= self._vocab_size:
            raise SessionError(f"the tokenizer gives id {max(ids)}, but the model has vocab_size {self._vocab_size}")
        if plain and len(text) > 1 and not self._added.keys().isdisjoint(ids):  # the vocabulary holds it as a word too
            return [i for c in text for i in self.encode(c, plain)]
        return ids

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without its added tokens, for text in the middle of another."""
        plain = type(self._tokenizer)(self._tokenizer.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(self._tokenizer, part)) is not None:
                value.__setstate__(json.dumps(_without_prefix(json.loads(value.__getstate__()))).encode())
                setattr(plain, part, value)
        return plain

    def encode_prompt(self, text: str) -> list[int]:
        """A raw prompt: exactly one bos in front if the tokenizer adds one, and never an empty list.

        Raises:
            SessionError: the prompt is empty and the model has no bos to start from.
        """
        ids = self.encode(text)
        start = self.bos_id is not None and (self.adds_bos or not ids)
        if start and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]  # type: ignore[list-item]  # start implies not None
        if not ids:
            raise SessionError("the prompt is empty, and this model has no bos token to start from")
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for: empty for special tokens and for ids without a token."""
        if token in self._special:
            return b""
        text = self._added.get(token) or self._tokenizer.id_to_token(token) or ""
        if self._spelling is not None:
            return self._spelling.bytes_of(text)
        if token in self._added:
            return text.encode("utf-8", "replace")
        try:
            return bytes([_BYTE_OF[c] for c in text])
        except KeyError:  # not in the byte-level alphabet: the token is its own text
            return text.encode("utf-8", "replace")

    @cached_property
    def longest_token(self) -> int:
        """Bytes of text that one token can stand for, at most."""
        return max(
            len(t.encode("utf-8", "replace")) for t in (*self._tokenizer.get_vocab(), *self._added.values(), "x")
        )

    @cached_property
    def _spelling(self) -> Spelling | None:
        decoder = self._tokenizer.decoder
        return Spelling.of(None if decoder is None else json.loads(decoder.__getstate__()))

    def name(self, token: int) -> str:
        """A token as one can print it: a special token's own text, bytes that are not UTF-8 as \\xNN."""
        return self._added.get(token) or self.token_bytes(token).decode("utf-8", "backslashreplace")

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those ``texts`` that are special tokens."""
        wanted = set(texts)
        return frozenset(i for i in self._special if self._added[i] in wanted)

    def decoder(self, shown: Collection[int] = (), whole: bool = False) -> Decoder:
        """An incremental decoder of text that goes on from another; ``whole``: of a text from its beginning, where a
        tokenizer that puts a space in front takes it away. shown: special tokens that come out as their own text.

        Raises:
            UnsupportedError: the tokenizer's decoder is of no kind that is read.
        """
        spelling = self._spelling
        strip, errors = (0, "replace") if spelling is None else (whole and spelling.strip, "surrogateescape")
        shows = lambda i: self._added[i].encode("utf-8", "replace") if i in shown else self.token_bytes(i)  # noqa: E731
        return Decoder(shows, errors, strip)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.decoder(whole=True)
        return "".join([decoder.feed(i) for i in ids]) + decoder.flush()


class Decoder:
    """Token ids to text, one at a time; only complete characters come out.

    errors "replace": a U+FFFD for what cannot be part of a character. "surrogateescape": one for every such byte, as
    tokenizers with a ``Spelling`` have it (which take the characters of the same run of bytes along: here those have
    been shown). strip: spaces that the text loses at its beginning.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], errors: str = "replace", strip: int = 0) -> None:
        self._token_bytes, self._strip = token_bytes, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def feed(self, token: int) -> str:
        """The characters that ``token`` completes; possibly none."""
        return self._shown(self._utf8.decode(self._token_bytes(token)))

    @property
    def complete(self) -> bool:
        """Whether no character is half there."""
        return not self._utf8.getstate()[0]

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return _NOT_UTF8.sub("\ufffd", text)


def may_begin(text: str, start: int, wanted: Iterable[str]) -> int:
    """From where on, ``start`` or behind it, the end of ``text`` may become one of ``wanted``; else its length."""
    wanted = tuple(wanted)
    starts = range(max(start, len(text) + 1 - max(map(len, wanted), default=0)), len(text))
    return next((i for i in starts if any(w.startswith(text[i:]) for w in wanted)), len(text))


class StopMatcher:
    """Ends a stream of text before the first stop string, wherever the borders between pieces lie.

    The match that ends first wins (of those the longest), so the result does not depend on how the text was cut.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string must not be empty")
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that is now safe to show; ``stopped`` is set once a stop string is complete."""
        text = self._held + piece
        found = [(i + len(s), i) for s in self._stops if (i := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = may_begin(text, 0, self._stops)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        text, self._held = self._held, ""
        return text


class AnswerText:
    """The text of an answer as its tokens come: complete characters, ended before the first stop string.

    A special token shows as no text: a stop string that is the text of one ends at that token. ``feed`` and ``flush``
    return the text that is certain with them; ``stopped`` is set once a stop string is complete.

    Args:
        stop: a string, or several.
        shown: special tokens that show as their own text.

    Raises:
        ValueError: a stop string is empty.
        SessionError: one holds the text of a special token beside other text.
    """

    def __init__(self, vocabulary: Vocabulary, stop: str | Iterable[str] = (), shown: Collection[int] = ()) -> None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) for s in stop):
            raise TypeError("a stop string must be a str")
        self._decoder = vocabulary.decoder(shown)
        self._stop_ids = vocabulary.stop_ids(stop)
        self._stops = StopMatcher(stop)
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that ``token`` makes certain; possibly none."""
        if token not in self._stop_ids:
            return self._match(self._decoder.feed(token))
        piece, self.stopped = self.flush(), True
        return piece

    def flush(self) -> str:
        """What was held back, at the end; the end of an incomplete character may complete a stop string."""
        piece = self._match(self._decoder.flush())
        return piece if self.stopped else piece + self._stops.flush()

    def _match(self, text: str) -> str:
        piece = self._stops.feed(text)
        self.stopped = self._stops.stopped
        return piece


def decode_utf8(data: bytes, where: str) -> str:
    """``data`` as text.

    Raises:
        Error: not UTF-8; names ``where`` and the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Error(f"{where}: not valid UTF-8 at byte {e.start} (0x{data[e.start]:02x})") from None
