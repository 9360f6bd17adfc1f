"""Chat templates (deepcalm.chat): the families' rules, equality with transformers' environment, hostile templates."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from deepcalm import chat
from deepcalm.chat import ChatTemplate
from deepcalm.errors import Error

CONVERSATION = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Q2"},
]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}

# Templates written for these tests after the rules of each family, not copies of the published files.
V2 = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}
    {%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}
    {%- elif m.role == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
V3 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(system='') %}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}{% continue %}{% endif %}
    {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' %}
        {%- set text = m['content'] %}
        {%- if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}
        {%- generation %}{{ '<｜Assistant｜>' ~ text ~ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
R1 = V3.replace("{{ '<｜Assistant｜>' }}{% endif %}", "{{ '<｜Assistant｜><think>\\n' }}{% endif %}")
V31 = """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', first=true) %}
{%- for m in messages %}{% if m['role'] == 'system' %}
    {%- if ns.first %}{% set ns.system = m['content'] %}{% set ns.first = false %}
    {%- else %}{% set ns.system = ns.system + '\n\n' + m['content'] %}{% endif %}
{%- endif %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
    {%- elif m['role'] == 'assistant' %}{{ '<｜Assistant｜><think></think>' + m['content'] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '<think></think>' }}{% endif %}"""
GLM = """[gMASK]<sop>
{%- if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}{% endfor %}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<|assistant|></think>' + m.content.strip() }}
    {%- elif m.role == 'system' %}{{ '<|system|>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>{{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}{% endif %}"""
KIMI = """{% macro turn(role, name, text) -%}
<|im_{{ role }}|>{{ name }}<|im_middle|>{{ text }}<|im_end|>
{%- endmacro %}
{%- for m in messages %}{{ turn(m.role, m.get('name') or m.role, m.content) }}{% endfor %}
{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""

BAR, V3_TURNS = "<bos>SYS", "<｜User｜>Hi<｜Assistant｜>Yo<eos><｜User｜>Q2<｜Assistant｜>"
V31_TURNS = BAR + "<｜User｜>Hi<｜Assistant｜><think></think>Yo<eos><｜User｜>Q2<｜Assistant｜>"
GLM_TURNS = "[gMASK]<sop><|system|>SYS<|user|>Hi<|assistant|></think>Yo<|user|>Q2<|assistant|>"
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "v2": (V2, {}, "<bos>SYS\n\nUser: Hi\n\nAssistant: Yo<eos>User: Q2\n\nAssistant:"),
    "v3": (V3, {}, BAR + "\n\n" + V3_TURNS),
    "r1": (R1, {}, BAR + "\n\n" + V3_TURNS + "<think>\n"),
    "v31": (V31, {}, V31_TURNS + "<think></think>"),
    "v31-thinking": (V31, {"thinking": True}, V31_TURNS + "<think>"),
    "glm": (GLM, {}, GLM_TURNS + "<think>"),
    "glm-off": (GLM, {"enable_thinking": False}, GLM_TURNS + "</think>"),
    "kimi": (
        KIMI,
        {},
        "<|im_system|>system<|im_middle|>SYS<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Yo<|im_end|><|im_user|>user<|im_middle|>Q2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_rules(family: str) -> None:
    source, variables, want = FAMILIES[family]
    assert ChatTemplate(source, TOKENS).render(CONVERSATION, **variables) == want


def test_r1_history_loses_its_thoughts() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"}]
    assert (
        ChatTemplate(R1, TOKENS).render(turns, add_generation_prompt=False) == "<bos><｜User｜>a<｜Assistant｜>b<eos>"
    )


@pytest.mark.reference
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source, variables, _ = FAMILIES[family]
    want, _ = utils.render_jinja_template(
        [CONVERSATION], chat_template=source, add_generation_prompt=True, **TOKENS, **variables
    )
    assert ChatTemplate(source, TOKENS).render(CONVERSATION, **variables) == want[0]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, TOKENS).render(CONVERSATION, **variables)


def test_environment_is_that_of_transformers() -> None:
    tool = {"name": "<é>", "p": [1, None, True]}
    assert render("{{ tools[0] | tojson }}", tools=[tool]) == '{"name": "<é>", "p": [1, null, true]}'
    assert (
        render("{{ tools[0] | tojson(indent=2, ensure_ascii=True) }}", tools=[{"a": "é"}]) == '{\n  "a": "\\u00e9"\n}'
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}") == '{"a":2,"b":1}'
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("  {% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"  # trimmed and left-stripped blocks
    assert (
        render("{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ loop.length }}{% endfor %}")
        == "44"
    )
    assert render("{{ dict(a=1).a }}{{ namespace(b=2).b }}{{ tools is none }}{{ x is defined }}") == "12TrueFalse"
    assert render("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}") == "21"
    assert render("{% for m in messages recursive %}{{ loop.last }}{% endfor %}") == "False" * 3 + "True"
    assert render("{{ '%s=%5.1f' | format('a', 2.25) }}{{ '{:>4}'.format('b') }}") == "a=  2.2   b"
    assert render("{{ 1 }}{{ none }}{{ missing }}{{ 2 ** 8 }}{{ 'ab' * 2 }}") == "1None256abab"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "^chat template: roles must alternate$"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].update({}) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% include 'x' %}", "no loader"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "loop steps"),
        ("{% set l = range(9999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}", "loop steps"),
        ("{{ range(1000000) }}", "100000"),
        ("{{ 'x' * 10 ** 9 }}", "16777216 elements"),
        ("{{ [0] * 10 ** 9 }}", "16777216 elements"),
        ("{{ 9 ** (9 ** 9) }}", "512 bits"),
        ("{{ 'x' | center(10 ** 9) }}", "number above"),
        ("{{ 'x'.ljust(10 ** 9) }}", "number above"),
        ("{{ messages | tojson(indent=10 ** 9) }}", "number above"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '%*d' % (1000000000, 1) }}", "width"),
        ("{{ '%1000000000d' | format(1) }}", "width"),
        ("{{ '{:1000000000}'.format(1) }}", "width"),
        ("{{ ('x' * 99999).replace('', 'y' * 99999) }}", "too long"),
        ("{{ ('x' * 99999) | replace('x', 'y' * 99999) }}", "too long"),
        ("{{ (('y' * 99999) | list) | join('y' * 99999) }}", "too long"),
        ("{{ ('y' * 99999).join(('y' * 99999) | list) }}", "too long"),
        ("{{ ('y' * 9).translate({121: 'z'}) }}", "translate"),
        ("{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "16777216"),
        ("{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "16777216"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more"),
        ("{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}", "writes more"),
        ("{% set s %}{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endset %}", "loop steps"),
        ("x" * (chat.MAX_TEMPLATE_CHARS + 1), "at most"),
    ],
)
def test_hostile_templates_are_errors(source: str, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(Error, match=reason) as e:
        render(source)
    assert "\n" not in str(e.value)
    assert time.monotonic() - start < chat.MAX_SECONDS


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.02)
    with pytest.raises(Error, match=r"longer than 0\.02 seconds"):
        render("{% for a in range(99999) %}{{ 'ab' * 100 }}{% endfor %}")


def test_budget_starts_anew_with_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_STEPS", 1000)
    t = ChatTemplate("{% for a in range(900) %}{% endfor %}", {})
    assert [t.render([]) for _ in range(2)] == ["", ""]


def test_messages_must_be_json() -> None:
    with pytest.raises(Error, match="must be JSON values"):
        render("{{ tools }}", tools=[{"f": print}])


@pytest.mark.parametrize(
    ("config", "jinja", "want"),
    [
        ({}, None, None),
        ({"chat_template": "a{{ eos_token }}", "eos_token": {"content": "E"}}, None, "aE"),
        ({"chat_template": "a"}, "b", "b"),  # the newer file wins
        ({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}, None, "d"),
    ],
)
def test_template_source(config: dict[str, Any], jinja: str | None, want: str | None) -> None:
    template = ChatTemplate.from_files(config, jinja)
    assert (template and template.render([])) == want


def test_named_templates() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]
    template = ChatTemplate.from_files({"chat_template": named}, None)
    assert template is not None
    assert template.render([], tools=[{}]) == "t"
    with pytest.raises(Error, match="no 'default' among rag, tool_use"):
        template.render([])


@pytest.mark.parametrize("bad", [3, "", {}, [], [{"name": "x"}], ["x"], [{"name": 1, "template": "x"}]])
def test_template_of_wrong_type_is_refused(bad: object) -> None:
    with pytest.raises(Error, match="neither a string nor a list"):
        ChatTemplate.from_files({"chat_template": bad}, None)


def test_rendering_from_several_threads() -> None:
    template, out = ChatTemplate(V3, TOKENS), []
    threads = [threading.Thread(target=lambda: out.append(template.render(CONVERSATION))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert out == [FAMILIES["v3"][2]] * 4
