"""Chat templates: a checkpoint's Jinja template rendered as transformers renders it, but as untrusted input.

The environment is that of transformers 5.23, ``utils/chat_template_utils.py``: trimmed blocks, loop controls, a
``generation`` block tag, plain-JSON ``tojson``, namespaces without underscore names, messages reduced to JSON types.
The template comes from a stranger: it runs in Jinja's immutable sandbox with a budget of steps, output, time and sizes.
The budget is checked between operations and bounds what one operation may build; it is no operating-system limit.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import Error
from .text import one_line, token_content

T = TypeVar("T")

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24
MAX_STRING_CHARS = 1 << 24  # of any one string or list that an expression builds
MAX_STEPS = 1_000_000  # loop iterations and calls
MAX_STEP_CHARS = 1 << 32  # steps times the template's own length: what constant text in loops can add up to
MAX_SECONDS = 10.0
MAX_INT_ARGUMENT = 100_000  # of a filter or method: widths, indents, counts
_WIDE_FORMAT = re.compile(r"\d{6}|%[^a-zA-Z%]*\*")  # a width in %-formatting or str.format


class _LimitError(jinja2.TemplateRuntimeError):
    pass


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it a plain attribute

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a budget. One rendering at a time: ``ChatTemplate`` holds the lock."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.steps = self.chars = self.source_chars = 0
        self.deadline = 0.0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=self._count_output,
        )
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items()}
        self.filters["tojson"] = self._bounded("tojson", _tojson)
        self.filters["_each"] = self._each
        self.filters["_sized"] = self._sized
        del self.globals["lipsum"]
        self.globals.update(namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now)

    def start(self, source_chars: int) -> None:
        self.source_chars = source_chars
        self.steps = self.chars = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Wraps what compiled templates do without a hook: iteration and string concatenation."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_each", [], [], None, None).set_lineno(loop.lineno)
        _WrapConcat().visit(tree)
        tree.set_environment(self)
        return tree

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS or self.steps * self.source_chars > MAX_STEP_CHARS:
            raise _LimitError(f"takes more than {self.steps - 1} loop steps and calls")
        if time.monotonic() > self.deadline:
            raise _LimitError(f"takes longer than {MAX_SECONDS:g} seconds")

    @jinja2.pass_context  # so that nothing is folded at compile time
    def _each(self, _context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._step()
            yield item

    def _count_output(self, value: Any) -> str:
        text = str(value)
        self.chars += len(text)
        if self.chars > MAX_OUTPUT_CHARS:
            raise _LimitError(f"writes more than {MAX_OUTPUT_CHARS} characters")
        return text

    def _sized(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > MAX_STRING_CHARS:
            raise _LimitError(f"builds a string or list of more than {MAX_STRING_CHARS} elements")
        if isinstance(value, int) and value.bit_length() > 64 * 8:
            raise _LimitError("computes an integer of more than 512 bits")
        return value

    def _check_product(self, left: object, right: object) -> None:
        for a, b in ((left, right), (right, left)):
            if isinstance(a, (str, bytes, list, tuple)) and isinstance(b, int) and len(a) * b > MAX_STRING_CHARS:
                raise _LimitError(f"builds a string or list of more than {MAX_STRING_CHARS} elements")

    def _check_call(self, name: str, subject: object, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Refuses what one call could blow up: widths and counts, ``replace`` and ``join`` with long strings."""
        self._step()
        values = [*args, *kwargs.values()]
        if any(isinstance(v, int) and abs(v) > MAX_INT_ARGUMENT for v in values):
            raise _LimitError(f"{name} with a number above {MAX_INT_ARGUMENT}")
        texts = [v for v in values if isinstance(v, str)]
        if name == "replace" and isinstance(subject, str) and texts:
            if (len(subject) + 1) * len(texts[-1]) > 4 * MAX_STRING_CHARS:
                raise _LimitError("replace could build too long a string")
        elif name == "join":
            parts = next((v for v in (subject, *args) if isinstance(v, (list, tuple, dict))), ())
            separators = [*texts, subject] if isinstance(subject, str) else texts
            if len(parts) * max((len(s) for s in separators), default=0) > 4 * MAX_STRING_CHARS:
                raise _LimitError("join could build too long a string")
        elif name in ("format", "format_map", "__mod__") and isinstance(subject, str) and _WIDE_FORMAT.search(subject):
            raise _LimitError("a format with a width above 99999")
        elif name == "translate":
            raise _LimitError("translate is not available to templates")

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment argument comes first

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if len(args) > passed:
                self._check_call(name, args[passed], args[passed + 1 :], kwargs)
            return self._sized(function(*args, **kwargs))

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 1) > 64 * 8:
                raise _LimitError("computes an integer of more than 512 bits")
        elif operator == "%" and isinstance(left, str):
            self._check_call("__mod__", left, (), {})
        return self._sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        __self._check_call(getattr(__obj, "__name__", ""), subject, args, kwargs)
        return __self._sized(super().call(__context, __obj, *args, **kwargs))


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


class _WrapConcat(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_sized", [], [], None, None).set_lineno(node.lineno)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
        self._lock = threading.Lock()
        self._environment = _Environment()
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._templates = {name: (self._compile(text), len(text)) for name, text in sources.items()}

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

    def _compile(self, text: str) -> jinja2.Template:
        if len(text) > MAX_TEMPLATE_CHARS:
            raise Error(f"chat template: {len(text)} characters, at most {MAX_TEMPLATE_CHARS} are accepted")
        return _template_errors(lambda: self._environment.from_string(text))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as one prompt, special tokens written out; encode it without adding any.

        Args:
            messages: ``{"role": ..., "content": ...}`` and whatever else the template reads.
            variables: switches of the template, such as ``thinking`` or ``enable_thinking``.

        Raises:
            Error: the template refuses the conversation, fails, or exceeds its budget.
        """
        wanted = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if wanted not in self._templates:
            raise Error(f"chat template: no {wanted!r} among {', '.join(sorted(self._templates))}")
        conversation = {"messages": messages, "tools": tools, "documents": documents}
        try:  # only JSON types: objects would bring methods that the sandbox does not know
            conversation = json.loads(json.dumps(conversation))
        except (TypeError, ValueError, RecursionError) as e:
            raise Error(f"chat template: messages, tools and documents must be JSON values: {one_line(e)}") from None
        values = self._tokens | variables | conversation | {"add_generation_prompt": add_generation_prompt}
        template, source_chars = self._templates[wanted]

        def run() -> str:
            self._environment.start(source_chars)
            pieces, size = [], 0
            for piece in template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT_CHARS:
                    raise _LimitError(f"writes more than {MAX_OUTPUT_CHARS} characters")
            return "".join(pieces)

        with self._lock:
            return _template_errors(run)


def _template_errors(call: Callable[[], T]) -> T:
    """``call()``; whatever the foreign template raises becomes one line."""
    try:
        return call()
    except Exception as e:
        kind = "" if type(e) in (jinja2.TemplateError, _LimitError) else f"{type(e).__name__}: "
        raise Error(f"chat template: {kind}{one_line(e) or 'failed'}") from None
