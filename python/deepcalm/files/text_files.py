"""A checkpoint's tokenizer and template files, read as transformers 5.24 reads them (``tokenization_utils_base.py``).

tokenizer.json is not the whole tokenizer: tokens, their flags and the names of the special ones are also declared in
tokenizer_config.json, or in the files that older checkpoints have in its place. The packer and the runtime both read
them here, so that what one accepts the other can use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Error, UnsupportedError, one_line, show
from ..text import Vocabulary, _guarded, decode_utf8, load_tokenizer
from .safetensors import parse_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from ..template import ChatTemplate

T = TypeVar("T")
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
LEGACY = ("added_tokens.json", "special_tokens_map.json")  # not read where tokenizer_config.json declares the tokens
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TextFiles:
    """The files by name (None: not there), each read when it is first asked for.

    where: what stands before a file's name in messages ("FOLDER/", "FILE: "); error: what they are raised as.
    """

    def __init__(self, files: Mapping[str, bytes | None], where: str, error: type[Error]) -> None:
        self._files = files
        self._where = where
        self._error = error
        self.has_tokenizer = files.get("tokenizer.json") is not None

    def sha256(self, name: str) -> str | None:
        """Hash of a file as it is stored, shortened; None: there is none."""
        data = self._files.get(name)
        return None if data is None else hashlib.sha256(data).hexdigest()[:16]

    def _named(self, call: Callable[[], T], file: str) -> T:
        """``call()``, its errors with the file's full name."""
        try:
            return call()
        except Error as e:
            raise self._error(f"{self._where}{file}: {str(e).removeprefix(file + ': ')}") from None

    def _json(self, name: str) -> dict[str, Any]:
        data = self._files.get(name)
        value = {} if data is None else parse_json(data, self._where + name, self._error, lenient=True)
        if not isinstance(value, dict):
            raise self._error(f"{self._where}{name}: expected a JSON object")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json; if it has no ``added_tokens_decoder``, with special_tokens_map.json over it."""
        config = self._json("tokenizer_config.json")
        if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
            config["extra_special_tokens"] = config.pop("additional_special_tokens")
        if "added_tokens_decoder" not in config:
            for key, value in self._json("special_tokens_map.json").items():
                old = config.get(key) or []
                if key == "extra_special_tokens" and isinstance(value, list) and isinstance(old, list):
                    config[key] = old + [t for t in value if t not in old]
                elif key in _NAMES or not (key.endswith("_token") and isinstance(old, str)):
                    config[key] = value | {"special": True} if isinstance(value, dict) else value
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """tokenizer.json with the tokens that only the other files declare."""
        source = self._files.get("tokenizer.json")
        if source is None:
            raise self._error(f"{self._where}holds no tokenizer; only token ids can be used")
        tokenizer = self._named(lambda: load_tokenizer(source), "tokenizer.json")
        tokens = self._declared(tokenizer)
        self._named(lambda: _guarded("tokenizer.json", lambda: tokenizer.add_tokens(tokens)), "tokenizer.json")
        return tokenizer

    def _declared(self, tokenizer: Tokenizer) -> list[AddedToken]:
        """All declared tokens, in the order in which transformers adds them: ids and flags follow from it."""
        from tokenizers import AddedToken

        config, known = self.config, tokenizer.get_added_tokens_decoder()
        extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
        named: dict[str, Any] = {k: config.get(k) for k in _NAMES}
        for kind in (dict, str):
            named |= {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, kind)}
        if isinstance(extra, dict):
            named, extra = named | extra, []
        if not isinstance(extra, list):
            raise self._refuse("extra_special_tokens", extra)
        specials = {key: t for key, value in named.items() if (t := self._token(key, value))}
        extras = [t for value in extra if (t := self._token("extra_special_tokens", value))]
        names = {t.content for t in specials.values()}

        declared: dict[int, AddedToken | None] = {}
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"]
            for i, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
                if not (i.isascii() and i.isdigit() and len(i) < 11 and isinstance(entry, dict)):
                    raise self._refuse("added_tokens_decoder", {i: entry})
                declared[int(i)] = self._token("added_tokens_decoder", entry)
        else:
            special = names | {t.content for t in extras if "extra_special_tokens" in config}
            for text, i in self._json("added_tokens.json").items():
                if type(i) is not int or i < 0:
                    raise self._error(f"{self._where}added_tokens.json: {show(text)} is {show(i)}, expected an id")
                declared[i] = AddedToken(text, normalized=text not in special, special=text in special)
        by_text = {t.content: t for t in declared.values() if t}
        specials |= {key: by_text.get(t.content, t) for key, t in specials.items() if key in _NAMES}
        if "added_tokens_decoder" not in config:
            declared |= known
        out = [t for _, t in sorted(declared.items()) if t]
        seen = {t.content for t in (*known.values(), *out)}
        out += [t for t in specials.values() if t.content not in seen]
        seen |= {value for value in named.values() if isinstance(value, str)}
        out += [t for t in extras if t.content not in seen]
        for token in out:
            token.special = token.special or token.content in names
        return out

    def _token(self, key: str, value: object) -> AddedToken | None:
        """A declared token: its text, which is special, or an object with ``content`` and flags; None for none."""
        from tokenizers import AddedToken

        text, flags = value, {"special": True}
        if isinstance(value, dict):
            text, flags = value.get("content"), {k: v for k, v in value.items() if k in _FLAGS}
        if not (text is None or isinstance(text, str)) or not all(isinstance(v, bool) for v in flags.values()):
            raise self._refuse(key, value)
        return AddedToken(text, **flags) if text else None

    def _refuse(self, key: str, value: object) -> Error:
        file = f"{self._where}tokenizer_config.json"
        return self._error(f"{file}: {key} is {show(value)}, expected texts of tokens or objects with content")

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty without."""
        return self._json("generation_config.json")

    @cached_property
    def sampling(self) -> dict[str, float]:
        """What it says of sampling, in our names; empty: greedy."""
        from ..sampling import Sampling

        c = self.generation
        ours = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        values = {"temp": 1.0} | {k: c[name] for k, name in ours.items() if c.get(name) is not None}
        if values.get("top_k") == -1:  # as others write it: off
            values["top_k"] = 0
        try:
            if not isinstance(c.get("do_sample"), bool | None):
                raise ValueError(f"do_sample: {one_line(repr(c['do_sample']), 40)}, expected true or false")
            if c.get("do_sample"):
                Sampling(**values)
        except (TypeError, ValueError) as e:
            raise self._error(f"{self._where}generation_config.json: {e}") from None
        return values if c.get("do_sample") and values["temp"] else {}

    def vocabulary(self, config: Mapping[str, Any]) -> Vocabulary:
        """Text in and out for a model with the normalised configuration ``config``."""
        tokenizer, own = self.tokenizer, self.config
        return self._named(lambda: Vocabulary(tokenizer, own, config), "tokenizer.json")

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, compiled or not."""
        return bool(self._files.get("chat_template.jinja")) or self.config.get("chat_template") is not None

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, compiled, or None."""
        from ..template import ChatTemplate

        data, config = self._files.get("chat_template.jinja"), self.config
        file = "chat_template.jinja" if data else "tokenizer_config.json"
        jinja = self._named(lambda: decode_utf8(data, file), file) if data else None
        return self._named(lambda: ChatTemplate.from_files(config, jinja), file)

    def tried(self, config: Mapping[str, Any]) -> list[str]:
        """Uses every file once, as the runtime will: refuses what that cannot use, returns what it will miss."""
        notes = []
        self.sampling  # noqa: B018  # refuses what it cannot read
        if self.has_tokenizer:
            self._json("tokenizer.json")  # a key twice: the tokenizers package takes the last
            vocabulary = self.vocabulary(config)
            try:
                vocabulary.decoder()
            except UnsupportedError as e:
                raise self._error(f"{self._where}{e}; without this file only token ids can be used") from None
            highest = max(self.tokenizer.get_vocab().values(), default=-1)
            if highest >= config["vocab_size"]:
                notes.append(f"the tokenizer has ids up to {highest}, the model rows for {config['vocab_size']}: text "
                             "with those tokens cannot be used")  # fmt: skip
        names = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        try:
            notes += _tried_template(tuple((name, self._files.get(name)) for name in names))
        except Error as e:
            raise self._error(f"{self._where}{e}") from None
        return notes


@lru_cache(maxsize=4)  # a process of its own takes a third of a second, and many checkpoints have the same template
def _tried_template(files: tuple[tuple[str, bytes | None], ...]) -> list[str]:
    template = TextFiles(dict(files), "", Error).template
    try:
        if template is not None:
            template.render([{"role": "user", "content": "x"}])
    except Error as e:
        return [f"the chat template fails on a plain message: {one_line(e)}"]
    return []
