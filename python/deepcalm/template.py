"""Chat templates: a checkpoint's Jinja template rendered as transformers renders it, but as untrusted input.

Templates are compiled and rendered in a process of their own (template_process.py), with limits of memory and time that
the operating system keeps: whatever a template computes, this process only ever reads a bounded answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import Error, ResourceError, one_line
from .text import Vocabulary, token_content

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24
MAX_BYTES = 512 << 20  # of address space of the process that renders
MAX_SECONDS = 3.0  # of processor time for one rendering, or for compiling
_PROCESS = Path(__file__).with_name("template_process.py")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thoughts, the templates' first


class TooLong(Error):
    """A rendered conversation has more characters than are wanted."""


class ChatTemplate:
    """A checkpoint's chat template, compiled. Rendering is thread-safe.

    Args:
        source: the template; a dict maps names to templates (``default``, ``tool_use``).
        tokens: the special tokens that templates see by name (``bos_token``, ``eos_token``, ...).

    Raises:
        Error: the template does not compile.
    """

    def __init__(self, source: str | Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        if (length := sum(map(len, self._sources.values()))) > MAX_TEMPLATE_CHARS:
            raise Error(f"chat template: {length} characters, at most {MAX_TEMPLATE_CHARS} are accepted")
        #: What templates that ask for the date are told; None: now.
        self.now: datetime | None = None
        self._lock = threading.Lock()
        _TEMPLATES.add(self)
        self._literals: dict[str, str] = self._start()

    @classmethod
    def from_files(cls, tokenizer_config: Mapping[str, Any], jinja: str | None) -> ChatTemplate | None:
        """The template of ``chat_template.jinja`` if there is one, else of tokenizer_config.json; None without either.

        Raises:
            Error: it does not compile, or tokenizer_config.json holds something else under ``chat_template``.
        """
        source = jinja if jinja is not None else tokenizer_config.get("chat_template")
        if source is None:
            return None
        if isinstance(source, list):
            entries = [(e.get("name"), e.get("template")) if isinstance(e, dict) else (None, None) for e in source]
            source = dict(entries) if all(isinstance(x, str) for e in entries for x in e) else None
        if not source or not isinstance(source, (str, dict)):
            raise Error("tokenizer_config.json: chat_template is neither a string nor a list of {name, template}")
        tokens = {k: t for k, v in tokenizer_config.items() if k.endswith("_token") and (t := token_content(v))}
        return cls(source, tokens)

    @property
    def literals(self) -> str:
        """What the templates write out themselves, and their string constants."""
        return "\0".join(self._literals.values())

    def after(self, prelude: str) -> ChatTemplate:
        """These templates with another piece of template in front, which may set what they read."""
        return ChatTemplate({name: prelude + source for name, source in self._sources.items()}, self._tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as one prompt, special tokens written out; encode it without adding any.

        Args:
            messages: ``{"role": ..., "content": ...}`` and whatever else the template reads.
            options: ``tools`` and ``documents`` (lists of dicts), ``add_generation_prompt`` (default True), and
                switches of the template, such as ``thinking`` or ``enable_thinking``. All must be JSON values.

        Raises:
            Error: the template refuses the conversation, fails, or exceeds its budget.
        """
        name, values = self._values(messages, options)
        return self._render(name, values, "")

    def encode(
        self,
        vocabulary: Vocabulary,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_chars: int | None = None,
        **options: Any,
    ) -> list[int]:
        """The token ids of the rendered conversation, in which only the template writes control tokens.

        Control tokens are the special tokens, and the added tokens that are part of the template's own text. Where a
        message (a tool, a document, an option) holds the text of one, that text is encoded as plain text; everything
        else as transformers encodes it. An assistant's messages may hold added tokens that are not special: a model
        writes ``</think>`` as a token, and it shows as text.

        The occurrences are found by two private-use characters around each, chosen among those that the conversation
        and the template do not hold, which are taken out of the rendered text again.

        Raises:
            Error: as ``render``; TooLong before anything is tokenised, if the text has more than ``max_chars``.
        """
        name, values = self._values(messages, options)
        special, control = vocabulary.control_tokens(self._literals[name])
        everything = json.dumps([values, self._literals[name]]).lower()
        unused = (chr(c) for c in range(0xE000, 0xF900) if f"\\u{c:04x}" not in everything)  # also not as an escape
        start, end, *_ = *islice(unused, 2), "", ""
        if not end:
            raise Error("chat template: the messages hold every private-use character")

        def mark(value: Any, tokens: tuple[str, ...]) -> Any:
            if isinstance(value, str):
                return any_of(tokens).sub(rf"{start}\g<0>{end}", value)
            if isinstance(value, list):
                return [mark(v, tokens) for v in value]
            return {mark(k, tokens): mark(v, tokens) for k, v in value.items()} if isinstance(value, dict) else value

        marked = {k: mark(v, control) for k, v in values.items()}
        for i, m in enumerate(values["messages"]):
            if m.get("role") == "assistant":
                marked["messages"][i] = mark(m, special)
        text = self._render(name, marked, start + end)
        if max_chars is not None and len(text) > max_chars:
            raise TooLong(f"{len(text)} characters, more than {max_chars}")
        # Odd pieces are marked tokens; a template that splits text can leave single marks, which only divide.
        pieces = re.split(f"{start}({any_of(control).pattern}){end}|[{start}{end}]", text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += vocabulary.encode(piece or "", plain=i % 2 == 1, inside=i > 0)
        return ids

    def _values(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The template to take, and what it sees: JSON types only, messages as transformers passes them."""
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **options, "messages": messages}
        name = "tool_use" if values["tools"] is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise Error(f"chat template: no {name!r} among {', '.join(sorted(self._sources))}")
        try:  # objects would bring methods that the sandbox does not know
            values = json.loads(json.dumps(values))
            values["messages"] = [_message(m) for m in values["messages"]]
        except (TypeError, ValueError, RecursionError, AttributeError) as e:
            raise Error(f"chat template: messages and options must be JSON values: {one_line(e)}") from None
        return name, values

    def _render(self, name: str, values: dict[str, Any], marks: str) -> str:
        with self._lock:
            if self._process.poll() is not None:  # its last template ended it
                self._start()
            now = self.now and self.now.isoformat()
            values = self._tokens | values
            text: str = self._ask({"name": name, "values": values, "marks": marks, "now": now})["text"]
        if len(text) > MAX_OUTPUT_CHARS:
            raise Error(f"chat template: writes more than {MAX_OUTPUT_CHARS} characters")
        return text

    def _start(self) -> dict[str, Any]:
        """Starts the process and compiles the templates there; returns their literal text."""
        kept = {k: os.environ[k] for k in ("TZ", "LD_LIBRARY_PATH") if k in os.environ}
        command = [sys.executable, "-I", "-S", str(_PROCESS), str(MAX_BYTES), str(MAX_SECONDS), *map(str, sys.path)]
        try:  # in a session of its own, which the terminal's Ctrl-C does not reach; without this one's environment
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=kept,
                                             stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        except OSError as e:
            raise ResourceError(
                f"chat template: no process to render it in: {sys.executable or 'sys.executable'}: {e}"
            ) from None
        self._end = weakref.finalize(self, _end, self._process)
        return self._ask(self._sources)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request; an Error if it is one, or if the process has ended over it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            with suppress(OSError):
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
            line = stdout.readline(12 * MAX_OUTPUT_CHARS + 99)  # a character has at most 12 bytes
        except BaseException:
            self._end()
            raise
        if not line.endswith(b"\n"):
            code = self._end()
            slow = f"takes more than {MAX_SECONDS:g} seconds"
            error = ResourceError if code == -signal.SIGKILL else Error  # the system takes memory back like that
            raise error(f"chat template: {slow if code == -signal.SIGPROF else f'its process ended with code {code}'}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Error(f"chat template: {one_line(reply['error'])}")
        return reply


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ends a process of templates; returns its exit code, the negative signal if it had ended by itself."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    return process.wait()


# A child of fork() has the locks that other threads held then, and no thread to release them. (It has no process:
# waiting for the parent's fails there, and the next rendering starts another.)
_TEMPLATES: weakref.WeakSet[ChatTemplate] = weakref.WeakSet()


def _renew_locks() -> None:
    for template in _TEMPLATES:
        template._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


@functools.lru_cache(maxsize=8)
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of ``tokens``, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers: without keys that are None, and with the thoughts under the name that templates read."""
    kept = {k: v for k, v in message.items() if v is not None}
    thoughts = next((kept[k] for k in _REASONING if k in kept), None)
    return kept if thoughts is None else {"thinking": thoughts, **kept, "reasoning_content": thoughts}
