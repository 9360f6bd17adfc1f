"""Tool calls and thoughts (deepcalm.markup): in each family's form, and read back from any cut of the text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tiny
from chat_templates import FAMILIES, GLM_TOOLS, KIMI_TOOLS, QWEN3, R1, TOKENS
from deepcalm.markup import DEEPSEEK, DEEPSEEK_V3, GLM, KIMI, Answer, Delta, Family, Markup, MarkupError, typed
from deepcalm.template import ChatTemplate
from deepcalm.text import Vocabulary

DEEPSEEK_CALLS = """{{ bos_token }}{%- set ns = namespace(system='', user=false, tool=false, first=true) %}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = ns.system + ('' if ns.first else '\n\n')
    + m['content'] %}{% set ns.first = false %}{% endfor %}{{- ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{% set ns.user = true %}{{ '<｜User｜>' + m['content'] }}
    {%- elif m['role'] == 'assistant' %}
        {%- if ns.user %}{{ '<｜Assistant｜></think>' }}{% endif %}{% set ns.user = false %}
        {%- if m['tool_calls'] is defined and m['tool_calls'] is not none %}
            {%- for call in m['tool_calls'] %}
                {%- if loop.first %}{{ m['content'] + '<｜tool▁calls▁begin｜>' }}{% endif %}{{ '<｜tool▁call▁begin｜>'
                    + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments']
                    + '<｜tool▁call▁end｜>' }}
            {%- endfor %}{{ '<｜tool▁calls▁end｜>' + eos_token }}
        {%- else %}{{ m['content'] + eos_token }}{% endif %}
    {%- elif m['role'] == 'tool' %}{% set ns.user = false %}{{ '<｜tool▁output▁begin｜>' + m['content']
        + '<｜tool▁output▁end｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.user %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{%
    endif %}"""
KIMI_CALLS = "{%- set thoughts = '<think></think>' %}" + KIMI_TOOLS  # as K2-Thinking's, which knows of them
V3_CALLS = "{% if tools %}{{ tools }}{% endif %}" + (  # as those that vLLM brings for V3 and R1
    DEEPSEEK_CALLS.replace("'<｜tool▁call▁begin｜>'", "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>'")
    .replace("+ '<｜tool▁sep｜>' +", "+ '\n```json\n' +")
    .replace("'<｜tool▁call▁end｜>'", "'\n```<｜tool▁call▁end｜>'")
)
TEMPLATES = {"deepseek-v3.1": DEEPSEEK_CALLS, "deepseek-v3": V3_CALLS, "kimi-k2": KIMI_CALLS, "glm-4": GLM_TOOLS}
FAMILY = (DEEPSEEK, DEEPSEEK_V3, KIMI, GLM)
ADDED = tuple(dict.fromkeys(m for f in FAMILY for m in f.markers))


def vocabulary(special: bool) -> Vocabulary:
    """Bytes, and every marker as an added token, special or not."""
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(tiny.byte_alphabet())}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<bos>", "<eos>")])
    (t.add_special_tokens if special else t.add_tokens)([AddedToken(s, normalized=False) for s in ADDED])
    return Vocabulary(t, TOKENS, {"vocab_size": 400})


VOCABULARY = vocabulary(special=False)
MARKUPS = {name: Markup(ChatTemplate(source, TOKENS), VOCABULARY) for name, source in TEMPLATES.items()}
THOUGHTLESS = {
    name: Markup(ChatTemplate(source.replace("</think>", ""), TOKENS), VOCABULARY) for name, source in TEMPLATES.items()
}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {k: v if isinstance(v, dict) else {"type": v} for k, v in properties.items()},
    }
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOLS = [tool("weather", city="string", days="integer"), tool("now")]


def call(name: str, arguments: str, id: str = "a1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*ids: str) -> list[dict[str, Any]]:
    calls = [call("weather", '{"city": "Köln", "days": 2}', ids[0]), call("now", "", ids[1])]
    return [
        {"role": "system", "content": "SYS"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": ids[1], "content": "noon"},
        {"role": "tool", "tool_call_id": ids[0], "content": "17"},
        {"role": "assistant", "content": "Warm.", "tool_calls": []},
        {"role": "user", "content": "Thanks"},
    ]


def rendered(markup: Markup, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    ids = markup.encode(messages, tools, **options)
    decoder = VOCABULARY.decoder(VOCABULARY.special_ids(["<bos>", "<eos>", *ADDED]))
    return "".join(map(decoder.feed, ids)) + decoder.flush()


# ---- into the prompt


@pytest.mark.parametrize(
    ("source", "family", "renders"),
    [
        *((source, name, True) for name, source in TEMPLATES.items()),
        (FAMILIES["v2"][0], None, False),
        (FAMILIES["v3"][0], None, False),
        (QWEN3, None, True),
        (V3_CALLS.replace("tools", "documents"), "deepseek-v3", False),
    ],
)
def test_family_is_that_of_the_template(source: str, family: str | None, renders: bool) -> None:
    markup = Markup(ChatTemplate(source, TOKENS), VOCABULARY)
    assert (markup.family, markup.renders_tools) == (family, renders)


def test_deepseek_prompt() -> None:
    text = rendered(MARKUPS["deepseek-v3.1"], conversation("a1", "a2"))
    assert text == (
        "<bos>SYS<｜User｜>Hi<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Köln", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><eos><｜tool▁output▁begin｜>17<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon"
        "<｜tool▁output▁end｜>Warm.<eos><｜User｜>Thanks<｜Assistant｜></think>"
    )


@pytest.mark.parametrize("system", [True, False])
def test_deepseek_describes_tools_behind_the_system_prompt(system: bool) -> None:
    """In the words of the model card, for the template reads none; the markers in it are tokens."""
    messages = conversation("a1", "a2")[not system : 2]
    text = rendered(MARKUPS["deepseek-v3.1"], messages, TOOLS)
    assert text == ("<bos>SYS" if system else "<bos>") + (
        "\n\n## Tools\nYou have access to the following tools:\n\n### weather\nDescription: Does weather.\n\n"
        "Parameters: "
        '{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}\n\n'
        '### now\nDescription: Does now.\n\nParameters: {"type": "object", "properties": {}}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
        "<｜User｜>Hi<｜Assistant｜></think>"
    )
    marker = VOCABULARY.encode("<｜tool▁calls▁end｜>")
    assert len(marker) == 1 and marker[0] in MARKUPS["deepseek-v3.1"].encode(messages, TOOLS)


@pytest.mark.parametrize("ids", [("a1", "a2"), ("functions.weather:0", "functions.now:1"), ("functions.now:7", "x")])
def test_kimi_prompt_has_ids_as_the_model_was_trained_on_them(ids: tuple[str, str]) -> None:
    text = rendered(MARKUPS["kimi-k2"], conversation(*ids))
    assert (
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Köln", "days": 2}<|tool_call_end|>'
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
        "<|im_end|><|im_system|>weather<|im_middle|>## Return of functions.weather:0\n17<|im_end|>"
        "<|im_system|>now<|im_middle|>## Return of functions.now:1\nnoon<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Warm.<|im_end|>"
    ) in text


def test_kimi_numbers_calls_through_the_conversation() -> None:
    """Also where a client gives the calls of every turn the same ids."""
    messages = [*conversation("a1", "a2"), *conversation("a1", "a2")[2:5]]
    text = rendered(MARKUPS["kimi-k2"], messages)
    found = [text.count(f"{what}functions.{name}") for what in ("begin|>", "Return of ")
             for name in ("weather:0", "now:1", "weather:2", "now:3")]  # fmt: skip
    assert found == [1] * 8


def test_glm_prompt() -> None:
    text = rendered(MARKUPS["glm-4"], conversation("a1", "a2"), TOOLS)
    assert '# Tools\n{"name": "weather"' in text.replace("\n\n", "\n")
    assert text.endswith(
        "<|user|>Hi<|assistant|></think><tool_call>weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call><tool_call>now</tool_call>"
        "<|observation|><tool_response>17</tool_response><tool_response>noon</tool_response>"
        "<|assistant|></think>Warm.<|user|>Thanks<|assistant|><think>"
    )


@pytest.mark.parametrize(
    ("where", "value", "param"),
    [
        ("tool_calls", "call", "messages[0].tool_calls"),
        ("tool_calls", [5], "messages[0].tool_calls[0]"),
        ("tool_calls", [{"function": {"arguments": "{}"}}], "messages[0].tool_calls[0]"),
        ("tool_calls", [call("f", "{}") | {"id": []}], "messages[0].tool_calls[0]"),
        ("tool_calls", [call("f", "{}"), call("f", "{")], "messages[0].tool_calls[1].function.arguments"),
        ("tool_calls", [call("f", "[1]")], "messages[0].tool_calls[0].function.arguments"),
        ("tool_calls", [call("f", '{"x": NaN}')], "messages[0].tool_calls[0].function.arguments"),
        ("tool_calls", [call("f", "[" * 100_000)], "messages[0].tool_calls[0].function.arguments"),
        ("tool_call_id", 5, "messages[0].tool_call_id"),
    ],
)
@pytest.mark.parametrize("family", TEMPLATES)
def test_calls_of_a_client_that_are_none(family: str, where: str, value: Any, param: str) -> None:
    message = {"role": "tool" if where == "tool_call_id" else "assistant", "content": "", where: value}
    with pytest.raises(MarkupError) as e:
        MARKUPS[family].encode([message])
    assert e.value.param == param and str(e.value).startswith(param + ": expected ")


def test_tools_are_not_dropped_silently() -> None:
    with pytest.raises(MarkupError, match="tools: this model's chat template reads none"):
        Markup(ChatTemplate(FAMILIES["v2"][0], TOKENS), VOCABULARY).encode(conversation("a", "b")[:2], TOOLS)
    with pytest.raises(MarkupError, match="no chat template"):
        Markup(None, VOCABULARY).encode([])


# ---- out of an answer


def calls_of(family: Family, *calls: tuple[str, dict[str, Any]], number: int = 0) -> str:
    """The text of calls as the family's models write them."""
    out = ""
    for i, (name, arguments) in enumerate(calls):
        written = f"functions.{name}:{number + i}" if family is KIMI else name
        if family.middle:
            line = "\n" if family is DEEPSEEK_V3 else ""
            body = line.join((written, family.middle, json.dumps(arguments, ensure_ascii=False), ""))
        else:
            body = written + "".join(
                f"<arg_key>{k}</arg_key><arg_value>{v if isinstance(v, str) else json.dumps(v)}</arg_value>"
                for k, v in arguments.items()
            )
        out += family.call[0] + body + family.call[1]
    return family.section[0] + out + family.section[1]


def answer(family: Family, thinks: bool | None = None, tools: Any = TOOLS) -> Answer:
    """A reader whose prompt ends inside thoughts (True), elsewhere (False), or whose model has none (None)."""
    markup = (THOUGHTLESS if thinks is None else MARKUPS)[family.name]
    return markup.answer(VOCABULARY.encode("x <think>\n" if thinks else "<think> x"), "7", tools)


def read(reader: Answer, *pieces: str) -> dict[str, Any]:
    """The message; the deltas must add up to it."""
    deltas = [d for p in pieces for d in reader.feed(p)] + reader.flush()
    assert joined(deltas) == {k: v for k, v in reader.message.items() if v and k != "role"}
    return reader.message


def joined(deltas: list[Delta]) -> dict[str, Any]:
    """What a client makes of a stream."""
    out: dict[str, Any] = {}
    for delta in deltas:
        ((kind, value),) = delta.body.items()
        if kind == "tool_calls":
            assert [c["index"] for c in value] == [len(out.get(kind, ()))]
            value = [{k: v for k, v in c.items() if k != "index"} for c in value]
        assert value
        out[kind] = out[kind] + value if kind in out else value
    return out


def functions(message: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls", [])
    assert [c["id"] for c in calls] == [f"call_7_{i}" for i in range(len(calls))]
    assert all(c["type"] == "function" for c in calls)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


ALL = pytest.mark.parametrize("family", FAMILY, ids=lambda f: f.name)
CALLS = [("weather", {"city": 'Köln "x"\n', "days": 2}), ("now", {})]


@ALL
def test_calls_are_read(family: Family) -> None:
    reader = answer(family)
    message = read(reader, "Let me see.\n" + calls_of(family, *CALLS) + "\n")
    assert functions(message) == CALLS and message["content"] == "Let me see.\n"
    assert [reader.finish_reason(r) for r in (None, "stop", "length")] == [None, "tool_calls", "length"]
    assert answer(family).finish_reason("stop") == "stop"
    assert functions(read(answer(family), calls_of(family, *CALLS[1:]))) == CALLS[1:]
    assert read(answer(family), " \n" + calls_of(family, *CALLS))["content"] is None


@ALL
def test_what_is_read_renders_as_it_was_written(family: Family) -> None:
    """So that the next turn finds its rows in the cache."""
    written = calls_of(family, *CALLS)
    message = read(answer(family), "So. " + written)
    text = rendered(MARKUPS[family.name], [{"role": "user", "content": "x"}, message], add_generation_prompt=False)
    assert written in text and text.replace("So. ", "So.").count("So." + written) == 1


@ALL
def test_calls_are_text_without_tools(family: Family) -> None:
    text = " a" + calls_of(family, *CALLS)
    assert read(answer(family, tools=None), text) == {"role": "assistant", "content": text}


def test_glm_calls_over_several_lines() -> None:
    text = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>\n"
    text += "<tool_call>now\n</tool_call>"
    message = read(answer(GLM), text)
    assert functions(message) == [("weather", {"city": "Rome"}), ("now", {})] and message["content"] is None


@ALL
def test_the_end_of_a_call_inside_its_arguments(family: Family) -> None:
    """What an argument quotes neither ends its call nor begins another."""
    quoted = family.call[1] + calls_of(family, ("now", {})) + '\\"' + family.call[1]
    assert functions(read(answer(family), calls_of(family, ("weather", {"city": quoted})))) == [
        ("weather", {"city": quoted})
    ]


def broken_calls(family: Family) -> dict[str, str]:
    good = calls_of(family, CALLS[0])
    begin, end = family.call
    out = {"begin": begin, "name": begin + "now", "section": family.section[0] or begin,
           "cut": good[: good.rindex(end)], "prose": f"write {begin} in front", "no name": begin + end,
           "long name": begin + "x" * 300 + end}  # fmt: skip
    if family.middle:
        head = begin + "weather" + family.middle
        bad = ("{", "{]}", '"x"', "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "b}', "{} x")
        out |= {f"json {b}": head + b + end for b in bad} | {"deep": head + '{"a":' * 5000 + "1" + "}" * 5000 + end}
        out["quotes a call"] = head + '{"a": "' + calls_of(family, ("now", {})) + end
    else:
        head = begin + "weather<arg_key>a</arg_key>"
        value = "<arg_value>1</arg_value>"
        out |= {"value": head + end, "text": head + "x" + value + end, "open": head + "<arg_value>1" + end,
                "twice": head + value + "<arg_key>a</arg_key>" + value + end}  # fmt: skip
    return out


@ALL
def test_a_call_that_does_not_parse_is_text(family: Family) -> None:
    for name, text in broken_calls(family).items():
        whole = "See: " + text + " end"
        assert read(answer(family), whole) == {"role": "assistant", "content": whole}, name


@ALL
def test_calls_around_one_that_does_not_parse(family: Family) -> None:
    bad = family.call[0] + ("now" + family.middle + "{]" if family.middle else "now x") + family.call[1]
    good = family.call[0] + calls_of(family, CALLS[0]).removeprefix(family.section[0]).removeprefix(family.call[0])
    good = good.removesuffix(family.section[1])
    message = read(answer(family), family.section[0] + good + bad + good + family.section[1] + "So.")
    assert functions(message) == [CALLS[0]] * 2 and message["content"] == bad + "So."


@ALL
def test_thoughts(family: Family) -> None:
    text = "\n I think.\n</think>\n\nIt is <think>so</think>."
    want = {"role": "assistant", "reasoning_content": "I think.\n", "content": "It is <think>so</think>."}
    assert read(answer(family, True), text) == want
    assert read(answer(family, False), "\n<think>" + text) == want
    assert read(answer(family, False), "\nNo. " + text)["content"] == "No. " + text
    plain = "<think>" + text
    assert read(answer(family), plain) == {"role": "assistant", "content": plain}
    cut = read(answer(family, True), "I thi")
    assert cut == {"role": "assistant", "content": "", "reasoning_content": "I thi"}


@ALL
def test_a_call_ends_the_thoughts(family: Family) -> None:
    calls = calls_of(family, *CALLS)
    for text in (f"hm</think>{calls}So.", f"hm{calls}So."):
        message = read(answer(family, True), text)
        assert functions(message) == CALLS
        assert (message["reasoning_content"], message["content"]) == ("hm", "So.")
    bad = "hm" + family.call[0] + " and"
    assert read(answer(family, True), bad)["reasoning_content"] == bad


def test_thoughts_of_a_template_without_calls() -> None:
    """R1's prompt ends inside them, with a line break."""
    markup = Markup(ChatTemplate(R1, TOKENS), VOCABULARY)
    reader = markup.answer(markup.encode([{"role": "user", "content": "x"}]), "7")
    assert read(reader, "a</think>b")["reasoning_content"] == "a"
    user = markup.encode([{"role": "user", "content": "x <think>"}, {"role": "assistant", "content": "b"}],
                         add_generation_prompt=False)  # fmt: skip
    assert "reasoning_content" not in read(markup.answer(user, "7"), "a</think>b")


TEXTS = ["Hm. ", "\n", " ", "é", "<", "<think>", "</think>", "</", '{"a": "', '"}', "weather", "functions.now:0", "{}"]
PIECES = {
    f.name: st.lists(st.sampled_from([*TEXTS, *f.markers, *broken_calls(f).values(), calls_of(f, *CALLS),
                                      calls_of(f, CALLS[1])]) | st.text(max_size=5), max_size=12).map("".join)
    for f in FAMILY
}  # fmt: skip


@ALL
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_same(family: Family, data: st.DataObject) -> None:
    text = data.draw(PIECES[family.name].filter(lambda s: len(s) < 4000))
    thinks = data.draw(st.sampled_from([None, False, True]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    tools = data.draw(st.sampled_from([TOOLS, None]))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(answer(family, thinks, tools), text)
    assert whole == read(answer(family, thinks, tools), *pieces) == read(answer(family, thinks, tools), *text)
    assert kept(whole) == kept({"content": text}), "lost, or shown twice"


def kept(message: dict[str, Any]) -> tuple[int, int]:
    """How often pieces that are no markup stand in a message."""
    text = message.get("reasoning_content", "") + (message["content"] or "")
    for c in message.get("tool_calls", ()):
        f = c["function"]
        text += f["name"] + "".join(f"{k}{v}" for k, v in json.loads(f["arguments"]).items())
    return text.count("é"), text.count("Hm")


# ---- types


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("5", {"type": ["string", "null"]}, "5"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("5", {"type": ["integer", "string"]}, 5),
        (" true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, "True"),
        ('[1, "a"]', {"type": "array"}, [1, "a"]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("five", {"type": "integer"}, "five"),
        ('"five"', {"type": "string"}, '"five"'),
        ('"five"', None, '"five"'),
        ("5", None, 5),
        (" five ", {}, " five "),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"const": 5}, 5),
        ("5", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "5"),
        ("5", {"$ref": "#/$defs/n"}, 5),
        ("5", {"$ref": "#/$defs/loop"}, 5),
        ("5", {"$ref": "http://x/y"}, 5),
        ("5", {"type": 7, "enum": 8, "anyOf": 9, "$ref": []}, 5),
        ("1e999", {"type": "number"}, "1e999"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ('"\\ud800"', None, '"\\ud800"'),
    ],
)
def test_types_follow_the_schema(text: str, schema: Any, value: Any) -> None:
    root = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert typed(text, schema, root) == value and type(typed(text, schema, root)) is type(value)


def test_schemas_that_are_bombs() -> None:
    wide = {"anyOf": [{"$ref": "#"}] * 500}
    chain = {"$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(20_000)}} | {"$ref": "#/$defs/0"}
    assert typed("5", wide, wide) == 5 and typed("5", chain, chain) == 5


@ALL
def test_a_call_of_a_tool_that_was_not_offered(family: Family) -> None:
    """It parses: the client says so to the model, better than markup in the text."""
    assert functions(read(answer(family), calls_of(family, ("other", {"x": 5})))) == [("other", {"x": 5})]


# ---- from a batch's choices: markers that are special tokens, accepted drafts


@dataclass
class Choice:
    """As deepcalm.batch's, growing token by token."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    text: str = ""
    reason: str | None = None


@ALL
@pytest.mark.parametrize("special", [False, True])
def test_choice_with_markers_as_tokens(family: Family, special: bool) -> None:
    words = vocabulary(special)
    markup = Markup(ChatTemplate(TEMPLATES[family.name], TOKENS), words)
    text = "hé</think>Hé. " + calls_of(family, *CALLS)
    ids = words.encode(text)
    reader, choice = markup.answer(words.encode("<think>"), "7", TOOLS), Choice()
    decoder = words.decoder(markup.shown(TOOLS))
    deltas = []
    for i, token in enumerate(ids):
        choice.tokens.append(token)
        choice.accepted.append(i % 3 == 0)
        choice.text += decoder.feed(token)
        deltas += reader.take(choice)
    assert not reader.message["content"].endswith(family.call[0])
    choice.reason = "eos"
    deltas += reader.take(choice)
    assert joined(deltas) == {k: v for k, v in reader.message.items() if k != "role"}
    assert functions(reader.message) == CALLS and reader.message["reasoning_content"] == "hé"
    drafted = "".join(d.body["content"][a:b] for d in deltas if "content" in d.body for a, b in d.accepted)
    start, by = text.index("Hé. "), character_tokens(words, text)
    assert drafted == "".join(text[i] for i in range(start, start + 4) if by[i] % 3 == 0) != ""
    assert markup.shown(None) <= markup.shown(TOOLS) and bool(markup.shown(TOOLS)) == special


def character_tokens(words: Vocabulary, text: str) -> list[int]:
    """For each character the token that completes it."""
    decoder = words.decoder(words.special_ids(ADDED))
    return [i for i, token in enumerate(words.encode(text)) for _ in decoder.feed(token)]
