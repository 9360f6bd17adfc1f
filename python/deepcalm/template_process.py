"""The process in which chat templates run: compiled and rendered as transformers does it, within the system's limits.

``template.py`` starts this file as a script of a fresh interpreter, which needs nothing of the package: one JSON
object a line comes in and one goes out. A template comes from a stranger and may build anything in one expression, so
nothing is counted here: the system bounds the memory, a timer ends the process, and the parent says what happened.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[:] = sys.argv[3:]  # the parent's: an isolated interpreter has its own

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it a plain attribute

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of transformers 5.23, ``utils/chat_template_utils.py``.

    ``marks``: two characters that stand around control tokens in the messages, or "" (``ChatTemplate.encode``).
    ``now``: the time that templates are told; None: the clock's.
    """

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.marks = ""
        self.now: datetime | None = None
        self.filters["tojson"] = self._tojson
        self.globals.update(namespace=_Namespace, raise_exception=_raise_exception, strftime_now=self._strftime_now)

    def _strftime_now(self, form: str) -> str:
        return (self.now or datetime.now()).strftime(form)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A template that asks how a message starts or ends hears of the message, not of the marks."""
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if __self.marks and isinstance(text, str) and name in ("startswith", "endswith"):
            __obj = getattr(text.translate(dict.fromkeys(map(ord, __self.marks))), name)
        return super().call(__context, __obj, *args, **kwargs)

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Plain JSON (jinja's own filter escapes HTML); the marks stay characters."""
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        for mark in self.marks if ensure_ascii else "":
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text


class _Namespace(Namespace):
    """A namespace without underscore names, which could stand in for what the sandbox relies on."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args  # as in jinja: ``self`` may be a key
        Namespace.__init__(self)
        for name, value in dict(*positional, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _literals(environment: _Environment, source: str) -> str:
    """All constant text of a template: what it writes out itself, and its string constants."""
    tree = environment.parse(source)
    data = [n.data for n in tree.find_all(nodes.TemplateData)]
    return "\0".join(data + [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)])


def main(memory: int, seconds: float) -> None:
    """Serves until the input ends. The first request holds the sources, later ones a name, values, marks, time."""
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (lower, lower))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent's thread ignores or blocks
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    environment = _Environment()
    templates: dict[str, jinja2.Template] = {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time; its signal ends the process
        reply: dict[str, Any]
        try:
            ask = json.loads(line)
            if not templates:
                reply = {name: _literals(environment, source) for name, source in ask.items()}
                templates = {name: environment.from_string(source) for name, source in ask.items()}
            else:
                environment.marks, now = ask["marks"], ask["now"]
                environment.now = now and datetime.fromisoformat(now)
                reply = {"text": templates[ask["name"]].render(ask["values"])}
            data = json.dumps(reply).encode()
        except MemoryError:
            data = json.dumps({"error": f"needs more than {memory >> 20} MiB of memory"}).encode()
        except Exception as e:
            kind = "" if type(e) is jinja2.TemplateError else f"{type(e).__name__}: "
            data = json.dumps({"error": kind + (str(e)[:2000] or "failed")}).encode()
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
