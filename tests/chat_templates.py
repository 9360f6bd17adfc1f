"""Chat templates for the tests, written after the rules of the families and of popular models, not copied from them.

``FAMILIES`` are the families that deepcalm runs, with what they must give; ``CONSTRUCTS`` gather what templates of
other models use of Jinja, and are compared with transformers only.
"""

from __future__ import annotations

from typing import Any

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Q2"},
]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}

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

_BAR, _V3_TURNS = "<bos>SYS", "<｜User｜>Hi<｜Assistant｜>Yo<eos><｜User｜>Q2<｜Assistant｜>"
_V31_TURNS = _BAR + "<｜User｜>Hi<｜Assistant｜><think></think>Yo<eos><｜User｜>Q2<｜Assistant｜>"
_GLM_TURNS = "[gMASK]<sop><|system|>SYS<|user|>Hi<|assistant|></think>Yo<|user|>Q2<|assistant|>"
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "v2": (V2, {}, "<bos>SYS\n\nUser: Hi\n\nAssistant: Yo<eos>User: Q2\n\nAssistant:"),
    "v3": (V3, {}, _BAR + "\n\n" + _V3_TURNS),
    "r1": (R1, {}, _BAR + "\n\n" + _V3_TURNS + "<think>\n"),
    "v31": (V31, {}, _V31_TURNS + "<think></think>"),
    "v31-thinking": (V31, {"thinking": True}, _V31_TURNS + "<think>"),
    "glm": (GLM, {}, _GLM_TURNS + "<think>"),
    "glm-off": (GLM, {"enable_thinking": False}, _GLM_TURNS + "</think>"),
    "kimi": (
        KIMI,
        {},
        "<|im_system|>system<|im_middle|>SYS<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Yo<|im_end|><|im_user|>user<|im_middle|>Q2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>",
    ),
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <é> & more",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Köln", "Rome"]}, "days": {"type": ["integer", "null"]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call_00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 2}}}
WITH_TOOLS: list[dict[str, Any]] = [
    *CONVERSATION,
    {"role": "assistant", "content": "", "reasoning_content": "\nthink of it\n", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_00001", "name": "weather", "content": "17 °C"},
    {"role": "tool", "tool_call_id": "call_00002", "name": "weather", "content": [{"type": "text", "text": " wet "}]},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nIt is wet."},
    {"role": "user", "content": [{"type": "text", "text": "Thanks. "}, {"type": "text", "text": "And Rome?"}]},
]
TEXT_OF = """{%- macro text(content) -%}
    {%- if content is string %}{{ content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content if item.type == 'text' %}{{ item['text'] }}{% if not loop.last %}{{ ' ' }}{%
            endif %}{% endfor %}
    {%- elif content is none or content is undefined %}{{ '' }}
    {%- else %}{{ raise_exception('Unexpected content type') }}{% endif %}
{%- endmacro -%}
"""
QWEN3 = (
    TEXT_OF
    + """{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- "<tools>" }}{% for tool in tools %}{{- "\n" }}{{- tool | tojson }}{% endfor %}{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%
            endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text(message.content) %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index or loop.last or (not loop.last and reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') +
            '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{% endif %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{% else %}{{-
            tool_call.arguments | tojson }}{% endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' }}{{- content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (loop.nextitem.role != "tool") %}{{- '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{%
            set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content']|trim %}{%
            set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{% endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}{% for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{% endfor %}{% endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if message['content'] is string %}{{- message['content'] | trim }}
        {%- else %}{% for c in message['content'] %}{% if c['type'] == 'image' %}{{- '<|image|>' }}{%
            elif c['type'] == 'text' %}{{- c['text'] | trim }}{% endif %}{% endfor %}{% endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{-
            raise_exception("This model only supports single tool-calls at once!") }}{% endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|>' + tool_call.name + ".call(" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}{{- arg_name + '="' ~ arg_val ~ '"' }}{%
            if not loop.last %}{{- ", " }}{% endif %}{% endfor %}
        {{- ")<|eom_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is
            not string %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{% endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{% set system_message = messages[0]["content"] %}{%
            set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages | rejectattr('tool_calls', 'defined') %}
    {%- if message["role"] == "user" or (message["role"] == "assistant" and message.tool_calls is
            not defined) %}{% set ns.index = ns.index + 1 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{% set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{% else %}{{-
            '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{- ", " }}{% endif %}
                {%- endfor %}{{- "}}" }}{% if not loop.last %}{{- ", " }}{% else %}{{- "]" }}{% endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{-
            "[INST] " + system_message + "\n\n" ~ message["content"] + "[/INST]" if message["content"] is
            string else message["content"] | map(attribute='text') | join('|') }}
        {%- else %}{{- "[INST] " ~ message["content"] ~ "[/INST]" }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}{% set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length < 9 %}{{-
            raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
            {{- ', "id": "' + tool_call.id[-9:] + '"}' }}{% if not loop.last %}{{- ", " }}{% else %}{{-
            "]" + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] in ("tool_results", "tool") %}{{-
            '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{%
            set first = (messages[0]['content'] if messages[0]['content'] is string else
            messages[0]['content'][0]['text']) + '\n\n' %}{% set loop_messages = messages[1:] %}{% else %}{%
            set first = '' %}{% set loop_messages = messages %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) and strict is defined %}{{
            raise_exception("Conversation roles must alternate") }}{% endif %}
    {%- if (message['role'] == 'assistant') %}{% set role = "model" %}{% else %}{%
            set role = message['role'] %}{% endif %}
    {{- '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string %}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable %}{% for item in message['content'] %}{%
            if item['type'] == 'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}{{
            item['text'] | trim }}{% endif %}{% endfor %}
    {%- else %}{{ raise_exception("Invalid content type") }}{% endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI = """{% for message in messages %}{%
            if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{
            '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' +
            '<|end|>' }}
{%- else %}{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
GLM_TOOLS = (
    TEXT_OF
    + """[gMASK]<sop>
{%- if tools -%}<|system|>
# Tools
{% for tool in tools %}
{{ tool.function | tojson(ensure_ascii=False) }}
{% endfor %}{%- endif -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user_index = loop.index0 -%}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' -%}<|user|>{{ text(m.content) }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning_content = '' %}{% set content = text(m.content) %}
{%- if m.reasoning_content is string %}{% set reasoning_content = m.reasoning_content %}
{%- elif '</think>' in content %}{%
            set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%
            set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}{{
            '<think>' + reasoning_content.strip() + '</think>' }}{% else %}{{ '</think>' }}{% endif %}
{%- if content.strip() -%}{{ content.strip() }}{% endif -%}
{% for tc in m.tool_calls or [] %}{% if tc.function %}{% set tc = tc.function %}{% endif %}
{{- '<tool_call>' + tc.name -}}
{% set _args = tc.arguments %}{% for k, v in _args.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{
            v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>{% endfor %}</tool_call>{%
            endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{ '<|observation|>' }}{%
            endif %}<tool_response>{{ text(m.content) }}</tool_response>
{%- elif m.role == 'system' -%}<|system|>{{ text(m.content) }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt -%}<|assistant|>{{
            '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}{% endif %}"""
)
KIMI_TOOLS = """{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{
            tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{% for message in messages %}
  {%- if loop.first and messages[0]['role'] != 'system' -%}<|im_system|>system<|im_middle|>A.<|im_end|>{% endif %}
  {%- set role_name = message.get('name') or message['role'] -%}
  {%- if message['role'] == 'user' -%}<|im_user|>{{ role_name }}<|im_middle|>
  {%- elif message['role'] == 'assistant' -%}<|im_assistant|>{{ role_name }}<|im_middle|>
  {%- else -%}<|im_system|>{{ role_name }}<|im_middle|>{%- endif %}
  {%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
    {%- if message['content'] %}{{ message['content'] }}{% endif -%}
    <|tool_calls_section_begin|>
    {%- for tool_call in message['tool_calls'] -%}<|tool_call_begin|>{{ tool_call['id'] }}<|tool_call_argument_begin|>
    {%- if tool_call['function']['arguments'] is string %}{{ tool_call['function']['arguments'] }}{% else %}{{
            tool_call['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>
    {%- endfor -%}<|tool_calls_section_end|>
  {%- elif message['role'] == 'tool' -%}{% set tool_call_id = message.tool_call_id %}## Return of {{ tool_call_id }}
{{ message['content'] }}
  {%- elif message['content'] is string -%}{{ message['content'] }}
  {%- elif message['content'] is not none -%}
    {%- for content in message['content'] -%}{%
            if content['type'] == 'image' or 'image' in content or
            'image_url' in content %}<|media_start|>image<|media_content|><|media_pad|><|media_end|>{%
            else %}{{ content['text'] }}{%- endif -%}{%- endfor -%}
  {%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
CONSTRUCTS: dict[str, str] = {
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI.replace("~ message['content'] ~", "~ message['content'] | string ~"),
    "glm-tools": GLM_TOOLS,
    "kimi-tools": KIMI_TOOLS,
    "dictsort": """{% for k, v in tools[0].function.parameters.properties | dictsort %}{{ loop.index }}/{{
            loop.length }} {{ k }}: {{ v.type if v.type is string else v.type | join(' | ') }}{{
            loop.cycle(';', ',') }}{% endfor %}""",
    "filters": """{{ messages | map(attribute='role') | unique | sort | join(', ') | upper }}{{
            messages | groupby('role') | map('first') | list }}{{ [3, 1, 2] | sort(reverse=true) | first }}{{
            ' a b ' | trim | replace(' ', '_') | capitalize | title | indent(2, true) }}{{
            messages | map(attribute='tool_calls') | select | list | length }}{{ 'a,b' | default('x') }}{{
            missing | default('x', true) }}{{ 2.567 | round(1) }}{{ '7' | int + 1 }}{{
            [1, 2, 3, 4] | batch(3) | list }}{{ [[1, 2], [3]] | sum(start=[]) }}{{ 'x' | center(5) }}{{
            'a b c d' | truncate(5) | wordwrap(3) }}{{ '<b>' | e }}{{ [1, 2] | min }}{{
            {'a': 1} | items | list }}{{ 'abc' | list | reverse | join | length }}{{ 'a b' | urlencode }}{{
            messages | last }}{{ '%s %d' | format('x', 3) }}{{ [0, 1] | reject | list }}""",
    "methods": """{% set s = '  A.b=C\\n' %}{{ s.strip().lower().split('.') }}{{
            s.upper().title().swapcase() }}{{ s.find('b') }}{{ s.count('.') }}{{
            s.rstrip('\\n').splitlines() }}{{ s.partition('=')[2] }}{{
            s.removeprefix('  ').removesuffix('C') }}{{ 'a'.isdigit() }}{{ ','.join(['a', 'b']) }}{{
            'x'.zfill(3) ~ 'y'.ljust(3) }}{{ '{}-{n}'.format(1, n=2) }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{
            {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | list }}{{
            [1, 2].index(2) }}{{ 'a=b'.replace('=', ':', 1) }}{{ '%05.1f|%-4s|%r' % (2.25, 'x', 'y') }}""",
    "statements": """{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller else '' }}{% endmacro %}{{
            f(1) }}{% call f(3, y=4) %}c{% endcall %}{% filter upper %}a{{ 'b' }}{% endfilter %}{%
            set block %}t{{ 1 + 1 }}{% endset %}{{ block }}{% with a = 1 %}{{ a }}{% endwith %}{%
            for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{
            i }}{{ loop.revindex }}{{ loop.previtem | default('-') }}{% else %}none{% endfor %}{% raw %}{{
            x }}{% endraw %}{# c #}{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 1 if false }}{{
            not true or 1 < 2 <= 2 }}{{ 'a' in 'abc' and 'd' not in 'abc' }}{% for k in tools recursive %}{{
            loop.depth }}{% endfor %}{% set ns = namespace(a=1, b=[]) %}{% set ns.b = ns.b + [ns.a] %}{{
            ns.b }}{{ cycler is defined }}{{ joiner is defined }}{{ dict(a=1, **{'b': 2}) }}{% generation %}{{
            'g' }}{% endgeneration %}""",
    "tests": """{{ 1 is odd }}{{ 2 is divisibleby 2 }}{{ x is undefined }}{{ none is none }}{{
            'a' is string }}{{ {} is mapping }}{{ [] is sequence }}{{ 1 is number }}{{ true is boolean }}{{
            1 is integer }}{{ 1.0 is float }}{{ 'a' is lower }}{{ 1 is sameas 1 }}{{ 1 is in [1] }}{{
            'x' is eq 'x' }}{{ f is callable }}{{ 'trim' is filter }}{{ 3 is gt 2 }}{{ false is false }}""",
}
