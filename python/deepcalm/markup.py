"""What a chat model writes beside plain text, its thoughts and its tool calls: OpenAI's messages to the form that a
family's template reads, and an answer's text back into messages, piece by piece.

A family is recognised by markers in its template. A call counts when all of it is there and its arguments are a JSON
object; whatever is no call is text, so that nothing is lost. White space behind a marker belongs to the marker.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import Error, ResourceError
from .files.safetensors import parse_json
from .template import any_of
from .text import may_begin

if TYPE_CHECKING:
    from .batch import Choice
    from .template import ChatTemplate
    from .text import Vocabulary

Json = dict[str, Any]
THINK, END_THINK = "<think>", "</think>"
CONTENT, REASONING, CALLS = "content", "reasoning_content", "tool_calls"
KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class MarkupError(Error):
    """What a client sent cannot be put into the model's prompt: ``param`` names the field, ``fault`` says why."""

    def __init__(self, param: str, fault: str) -> None:
        super().__init__(f"{param}: {fault}")
        self.param, self.fault = param, fault


@dataclass(frozen=True, slots=True)
class Family:
    """How a family writes calls: ``call`` around each, ``section`` around all; between a name and its arguments, which
    are a JSON object, ``middle``. GLM has pairs of KEY and VALUE instead."""

    name: str
    call: tuple[str, str]
    section: tuple[str, str] = ("", "")
    middle: str = ""

    @property
    def markers(self) -> list[str]:
        """What may be a token of its own."""
        arguments = self.middle or KEY + END_KEY + VALUE + END_VALUE
        return re.findall("<.*?>", "".join((THINK, END_THINK, *self.section, *self.call, arguments)))


DEEPSEEK = Family(
    "deepseek-v3.1",
    ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "<｜tool▁sep｜>",
)
DEEPSEEK_V3 = Family(  # R1 too
    "deepseek-v3",
    ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "```<｜tool▁call▁end｜>"),
    DEEPSEEK.section,
    "```json",
)
KIMI = Family(
    "kimi-k2",
    ("<|tool_call_begin|>", "<|tool_call_end|>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    "<|tool_call_argument_begin|>",
)
GLM = Family("glm-4", ("<tool_call>", "</tool_call>"))

# DeepSeek's own template of V3.1 reads no tools: the model was trained on this description behind the system prompt.
DEEPSEEK_TOOLS = r"""
{%- if tools %}
    {%- set described = namespace(text='## Tools\nYou have access to the following tools:\n', system=false) %}
    {%- for m in messages if m.role == 'system' %}{% set described.system = true %}{% endfor %}
    {%- for tool in tools %}
        {%- set described.text = described.text + '\n### ' + tool.function.name + '\nDescription: '
            + (tool.function.description or '') + '\n\nParameters: ' + (tool.function.parameters or {}) | tojson
            + '\n' %}
    {%- endfor %}
    {%- set described.text = described.text + '\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n'
        + '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments'
        + '<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n'
        + '- `tool_call_name` must be an exact match to one of the available tools\n'
        + '- `tool_call_arguments` must be valid JSON that strictly follows the tool\'s Parameters Schema\n'
        + '- For multiple tool calls, chain them directly without separators or spaces' %}
    {%- set messages = messages + [{'role': 'system',
        'content': ('' if described.system else '\n\n') + described.text}] %}
{%- endif %}"""


def family_of(literals: str) -> Family | None:
    """The family whose markers are in a template's text."""
    if DEEPSEEK.middle in literals:
        return DEEPSEEK_V3 if DEEPSEEK_V3.middle in literals else DEEPSEEK
    return next((f for f in (KIMI, GLM) if (f.middle or KEY) in literals), None)


class Markup:
    """The markup of one model.

    family: None where calls stay text. renders_tools: whether tools can be sent.
    """

    def __init__(self, template: ChatTemplate | None, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        literals = "" if template is None else template.literals
        self._family = family_of(literals)
        self.family = None if self._family is None else self._family.name
        self._thinks = END_THINK in literals
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {}}}
        self.renders_tools = "probe_tool" in _probe(template, [], tools=[tool])
        self._given = self._template = template
        if template is not None and self._family is DEEPSEEK and not self.renders_tools:
            self._template, self.renders_tools = template.after(DEEPSEEK_TOOLS), True
        arguments = '{"probe": 7}'
        call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        probe = _probe(template, [{"role": "assistant", "content": "", "tool_calls": [call]}])
        self._reads_text = arguments in probe  # of arguments; else an object, as transformers passes it

    def encode(self, messages: Sequence[Json], tools: Sequence[Json] | None = None, **options: Any) -> list[int]:
        """The token ids of a conversation, see ``ChatTemplate.encode``.

        Args:
            messages: as OpenAI's clients send them; content a str or None.
            tools: what the model may call, in OpenAI's form.

        Raises:
            MarkupError: tool calls that are none, or tools for a template that reads none.
            Error, ResourceError: as ``ChatTemplate.encode``.
        """
        if self._template is None or self._given is None:
            raise MarkupError("messages", "this model has no chat template")
        self._template.now = self._given.now
        if tools and not self.renders_tools:
            raise MarkupError("tools", "this model's chat template reads none")
        return self._template.encode(self._vocabulary, self.messages(messages), tools=tools or None, **options)

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        """The conversation as the template reads it: arguments as text or object, results in the order of their calls
        (most templates write no ids), Kimi's ids as it was trained on them (it stops calling when it sees others)."""
        out: list[Json] = []
        numbers: list[int] = []  # of each message of `out`: the call that it answers
        calls: dict[str, tuple[int, str, str]] = {}  # id -> number in the conversation, name, id in the prompt
        n = 0
        for i, m in enumerate(messages):
            message = {k: v for k, v in m.items() if k != CALLS} | {"content": m.get("content") or ""}
            at, number = len(out), -1
            made = m.get(CALLS) or []
            if not isinstance(made, list) or not isinstance(m.get("tool_call_id", ""), str):
                where = CALLS if made else "tool_call_id"
                raise MarkupError(f"messages[{i}].{where}", f"expected a {'list of calls' if made else 'string'}")
            for j, c in enumerate(made):
                call = self._call(c, f"messages[{i}].{CALLS}[{j}]")
                given, name = call.get("id", ""), call["function"]["name"]
                if self._family is KIMI:
                    call["id"] = f"functions.{name}:{n}"
                calls[given], n = (n, name, call.get("id", "")), n + 1
                message.setdefault(CALLS, []).append(call)
            if m.get("role") == "tool":
                given = m.get("tool_call_id", "")
                number, name, message["tool_call_id"] = calls.get(given, (sys.maxsize, "", given))
                if self._family is KIMI and name:
                    message.setdefault("name", name)
                while at and numbers[at - 1] > number:
                    at -= 1
            out.insert(at, message)
            numbers.insert(at, number)
        return out

    def _call(self, call: Any, where: str) -> Json:
        """A call of an earlier answer, copied."""
        function = call.get("function") if isinstance(call, dict) and isinstance(call.get("id", ""), str) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise MarkupError(where, 'expected {"id", "type": "function", "function": {"name", "arguments"}}')
        arguments = function.get("arguments") or "{}"
        text = arguments.strip() if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if not isinstance(value := _value(text), dict):
            raise MarkupError(f"{where}.function.arguments", "expected the text of a JSON object")
        return {**call, "function": {**function, "arguments": text if self._reads_text else value}}

    def shown(self, tools: Sequence[Json] | None) -> frozenset[int]:
        """The special tokens that ``Answer`` reads, to be decoded as text."""
        markers = [THINK, END_THINK] if self._thinks else []
        if tools and self._family is not None:
            markers = self._family.markers
        return self._vocabulary.special_ids(markers)

    def answer(self, ids: Sequence[int], answer_id: str, tools: Sequence[Json] | None = None) -> Answer:
        """The reader of one answer.

        Args:
            ids: the prompt's, whose end may be inside the model's thoughts.
            answer_id: what the ids of its calls are made from.
            tools: as in ``encode``; without any no call is read.
        """
        end = "".join(map(self._vocabulary.name, ids[-16:])).rstrip()
        marks = Accepted(self._vocabulary, self.shown(tools))
        thinks = None if not self._thinks else end.endswith(THINK)
        return Answer(self._family if tools else None, thinks, answer_id, tools or (), marks)


def _probe(template: ChatTemplate | None, messages: list[Json], **options: Any) -> str:
    """What a template makes of a conversation that begins with a user; nothing if it refuses."""
    try:
        return "" if template is None else template.render([{"role": "user", "content": "x"}, *messages], **options)
    except ResourceError:
        raise
    except Error:
        return ""


def _value(text: str) -> Any:
    """What ``text`` stands for as strict JSON; itself where it is none."""
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"), "", Error)
    except Error:
        return text


def typed(text: str, schema: object, root: object) -> Any:
    """The text of one argument as a value of a type that its schema allows; a string, as it stands, where it fits none.

    root: the schema that ``$ref`` looks into.
    """
    types, value = _types(schema, root), _value(text)
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        value = int(value)
    kind = _JSON_TYPES[type(value)]
    fits = not types or kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" else text


_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"} | {
    type(None): "null"
}


def _types(schema: object, root: object) -> set[str]:
    """The types that a JSON schema names; none if it says nothing. It comes from a client, and may be anything."""
    types: set[str] = set()
    todo, seen = [schema], set()
    while todo:
        if not isinstance(s := todo.pop(), dict) or id(s) in seen:
            continue
        seen.add(id(s))
        if isinstance(ref := s.get("$ref"), str):
            target = root
            for name in ref.split("/")[1:]:
                target = target.get(name) if isinstance(target, dict) else None
            todo.append(target)
        for key in ("anyOf", "oneOf", "allOf"):
            todo += branches if isinstance(branches := s.get(key), list) else ()
        named = s.get("type")
        named = [named] if isinstance(named, str) else named
        values = [s["const"]] if "const" in s else s.get("enum")
        if isinstance(named, list):
            types |= {t for t in named if isinstance(t, str)}
        elif isinstance(values, list):
            types |= {_JSON_TYPES[type(v)] for v in values}
        types |= {"null"} if s.get("nullable") is True else set()
    return types


@dataclass(slots=True)
class Delta:
    """A piece of a stream.

    body: what it adds to the message, as OpenAI's chunks have it. accepted: [from, to) in characters of its text,
    those that accepted drafts made.
    """

    body: Json
    accepted: list[list[int]]


class Accepted:
    """The text of a ``Choice`` as it grows, with the characters that accepted drafts made."""

    def __init__(self, vocabulary: Vocabulary, shown: Iterable[int] = ()) -> None:
        self._decoder = vocabulary.decoder(frozenset(shown))
        self._tokens, self._chars, self._flags = 0, 0, ""

    def new(self, choice: Choice) -> tuple[str, str]:
        """What is new since the last call: the text, and "1" or "0" for each of its characters."""
        for i in range(self._tokens, len(choice.tokens)):
            self._flags += "01"[choice.accepted[i]] * len(self._decoder.feed(choice.tokens[i]))
            self._tokens += 1
        text = choice.text[self._chars :]  # may lag behind the tokens: an end that could begin a stop string
        flags = self._flags[self._chars :][: len(text)].ljust(len(text), "0")
        self._chars += len(text)
        return text, flags

    def take(self, choice: Choice) -> list[Delta]:
        """The same as the one delta of a completion, or none."""
        text, flags = self.new(choice)
        return [Delta({"text": text}, _ranges(flags))] if text else []


def _ranges(flags: str) -> list[list[int]]:
    return [[m.start(), m.end()] for m in re.finditer("1+", flags)]


class _NoCall(Exception):
    """What began as a call is none."""


class _End(Exception):
    """The text has ended."""


Steps = Generator[None, None, Any]
MAX_NAME = 256
_NAME = re.compile(rf"[^\s<`]{{0,{MAX_NAME}}}")


class Answer:
    """An answer's text as deltas, whatever the pieces in which it comes.

    The reader is one generator that waits at every place where the text so far is not enough; what a marker may
    begin with, and a call that is not complete, are held back until then.

    Args:
        family: whose calls are read; None: none are.
        thinks: whether the text begins inside the model's thoughts; None: it has none.
        answer_id: see ``Markup.answer``.
        tools: the schemas of the calls' arguments.
        marks: for ``take``.
    """

    def __init__(
        self, family: Family | None, thinks: bool | None, answer_id: str, tools: Sequence[Json], marks: Accepted
    ) -> None:
        self._family, self._marks, self._id = family, marks, answer_id
        functions = [t["function"] for t in tools if isinstance(t.get("function"), dict)]
        self._schemas = {f.get("name"): f.get("parameters") for f in functions}
        self._text = self._flags = ""
        self._at = 0  # read up to here
        self._out = 0  # shown, or dropped as markup, up to here
        self._kind = REASONING if thinks else CONTENT
        self._fresh = family is not None or thinks is not None  # white space is dropped up to the first character
        self._ended = self._in_section = False
        self._deltas: list[tuple[str, Any, str]] = []
        self._texts = {CONTENT: "", REASONING: ""}
        self._calls: list[Json] = []
        self._steps = self._run(thinks is False)
        next(self._steps)

    def finish_reason(self, reason: str | None) -> str | None:
        """``reason``, OpenAI's; behind a call "tool_calls" for "stop"."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    @property
    def message(self) -> Json:
        """All of it so far, as a message of OpenAI's."""
        message: Json = {"role": "assistant", CONTENT: self._texts[CONTENT] or (None if self._calls else "")}
        if self._texts[REASONING]:
            message[REASONING] = self._texts[REASONING]
        return message | ({CALLS: self._calls} if self._calls else {})

    def take(self, choice: Choice) -> list[Delta]:
        """What is new in ``choice`` since the last call, and all that was held back once it has ended."""
        deltas = self.feed(*self._marks.new(choice))
        return deltas if choice.reason is None else deltas + self.flush()

    def feed(self, text: str, flags: str = "") -> list[Delta]:
        """The deltas that ``text`` makes certain; flags: "1" for each character that an accepted draft made."""
        self._text += text
        self._flags += flags or "0" * len(text)
        if text and not self._ended:
            next(self._steps, None)
        return self._taken()

    def flush(self) -> list[Delta]:
        """What is left at the end: a call that is not complete is text."""
        self._ended = True
        next(self._steps, None)
        return self._taken()

    def _taken(self) -> list[Delta]:
        out = [Delta({kind: value}, _ranges(flags)) for kind, value, flags in self._deltas]
        self._deltas.clear()
        return out

    def _show(self, end: int) -> None:
        """Everything up to ``end`` is text."""
        text, flags = self._text[self._out : end], self._flags[self._out : end]
        self._out = max(end, self._out)
        if self._fresh:
            text = text.lstrip()
            flags = flags[len(flags) - len(text) :]
            self._fresh = not text
        if not text:
            return
        self._texts[self._kind] += text
        if self._deltas and self._deltas[-1][0] == self._kind:
            _, before, marks = self._deltas.pop()
            text, flags = before + text, marks + flags
        self._deltas.append((self._kind, text, flags))

    def _drop(self) -> None:
        """What has been read is markup."""
        self._out, self._fresh = self._at, True

    # ---- the reader: methods that are generators yield where they need more text

    def _more(self) -> Steps:
        if self._ended:
            raise _End
        yield

    def _run(self, may_think: bool) -> Steps:
        yield
        try:
            if may_think:
                with suppress(_NoCall):
                    yield from self._one_of(THINK)
                    self._kind = REASONING
                    self._drop()
            while True:
                yield from self._next()
        except _End:
            self._show(len(self._text))

    def _next(self) -> Steps:
        """Text up to the next marker, and what that begins."""
        markers: tuple[str, ...] = (END_THINK,) if self._kind == REASONING else ()
        if self._family is not None:
            markers += (self._family.call[0], *filter(None, [self._family.section[self._in_section]]))
        while (found := any_of(markers).search(self._text, self._at)) is None:
            self._at = may_begin(self._text, self._at, markers)
            self._show(self._at)
            yield from self._more()
        self._show(found.start())
        self._at = found.end()
        if found[0] == END_THINK:
            self._kind = CONTENT
        elif self._family is not None and found[0] == self._family.section[1]:
            self._in_section = False
        elif self._family is not None:
            try:
                yield from self._call(self._family, found[0])
            except _NoCall:
                self._show(self._at)
                return
        self._drop()

    def _call(self, family: Family, marker: str) -> Steps:
        """A call behind its first marker; _NoCall says that it is none, all of it up to what has been read."""
        if marker == family.section[0]:
            yield from self._one_of(family.call[0])
        name = yield from self._name()
        arguments = yield from (self._json(family) if family.middle else self._pairs(family, self._schemas.get(name)))
        self._in_section |= marker == family.section[0]
        self._kind = CONTENT
        if family is KIMI and (parts := re.fullmatch(r"(?:functions\.)?(.+?)(?::\d+)?", name)):
            name = parts[1]  # functions.NAME:NUMBER
        n = len(self._calls)
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": f"call_{self._id}_{n}", "type": "function", "function": function})
        self._deltas.append((CALLS, [{"index": n, **self._calls[n]}], ""))

    def _json(self, family: Family) -> Steps:
        """The text of a JSON object; the end marker inside a string ends nothing."""
        yield from self._one_of(family.middle)
        start, quotes = self._at, 0
        while True:
            part = yield from self._until(family.call[1])
            quotes += sum(q == '"' for q in re.findall(r'\\.|"', part, re.DOTALL))
            if quotes % 2 == 0:
                break
        text = self._text[start : self._at - len(family.call[1])].strip() or "{}"
        if not isinstance(_value(text), dict):
            raise _NoCall
        return text

    def _pairs(self, family: Family, schema: object) -> Steps:
        """GLM's keys and values as the text of a JSON object."""
        properties = schema.get("properties") if isinstance(schema, dict) else None
        arguments: Json = {}
        while (yield from self._one_of(KEY, family.call[1])) == KEY:
            key = (yield from self._until(END_KEY)).strip()
            yield from self._one_of(VALUE)
            value = yield from self._until(END_VALUE)
            if key in arguments:
                raise _NoCall
            arguments[key] = typed(value, properties.get(key) if isinstance(properties, dict) else None, schema)
        return json.dumps(arguments, ensure_ascii=False)

    def _one_of(self, *options: str) -> Steps:
        """White space and one of ``options``, which is returned."""
        while True:
            self._skip_space()
            if found := next((o for o in options if self._text.startswith(o, self._at)), None):
                self._at += len(found)
                return found
            rest = self._text[self._at : self._at + max(map(len, options))]
            if not any(o.startswith(rest) for o in options):
                raise _NoCall
            yield from self._more()

    def _name(self) -> Steps:
        """White space and the name of a tool, behind which something stands."""
        while True:
            self._skip_space()
            name = _NAME.match(self._text, self._at)
            assert name is not None  # it may be empty
            if name.end() < len(self._text) or len(name[0]) == MAX_NAME:
                break
            yield from self._more()
        self._at = name.end()
        if not name[0]:
            raise _NoCall
        return name[0]

    def _until(self, end: str) -> Steps:
        """The text up to ``end``."""
        start = at = self._at
        while (found := self._text.find(end, at)) < 0:
            at = max(start, len(self._text) - len(end) + 1)
            yield from self._more()
        self._at = found + len(end)
        return self._text[start:found]

    def _skip_space(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
