"""Renders chat templates with `transformers` and writes the results to cases.json.

    python make_chat.py

The templates are written for these tests; together they use what the templates of Llama 3.x,
Mistral, Qwen 2.5 and 3, Gemma, Phi 3, Granite, OLMo 2, SmolLM2 and DeepSeek use.
"""

import datetime
import json
import pathlib

import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 2, 5, 15, 4, 9)


chat_template_utils.datetime = Clock

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & \"here\" — ça va?",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City"},
                    "days": {"type": "integer", "enum": [1, 2.5, 1e-5, 1e20, 3.0]},
                    "unit": {"type": ["string", "null"], "default": None, "strict": True},
                },
                "required": ["city"],
                "empty": {},
                "none": [],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "abc123def", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
    ],
}
PLAIN = [
    {"role": "system", "content": "  You are terse.\n"},
    {"role": "user", "content": " Hi <|im_end|> & \"you\" \U0001f600\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello.  "},
    {"role": "user", "content": "And now?"},
]
NO_SYSTEM = PLAIN[1:]
WITH_CALL = [PLAIN[0], PLAIN[1], CALL, {"role": "tool", "name": "get_weather", "tool_call_id": "abc123def", "content": "{\"t\": 3}"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}]
REASONING = [PLAIN[1], {"role": "assistant", "content": "Hello.", "reasoning": "hm"}, PLAIN[3]]

CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Block trimming, strip_blocks, comments, a loop's neighbours, trailing newline.
WHITESPACE = """{# a comment #}
{% for message in messages %}
    {% if loop.index0 is even %}
  [{{ loop.index }}/{{ loop.length }} {{ message.role }}]
    {% else %}
  ({{ message.role }}{{ ' after ' ~ loop.previtem.role if loop.previtem is defined }})
    {% endif %}
    {{ message.content | trim }}
{% endfor %}
{%- if not loop is defined %}!{% endif %}
end

"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- "<|start|>ipython\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<a>' }}
        {%- if loop.index0 > ns.last_query_index or (loop.last or reasoning_content) %}
            {{- '<think>' + reasoning_content.strip('\\n') + '</think>' }}
        {%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '</a>\\n' }}
    {%- else %}
        {{- '<' + message.role + '>' + content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<a>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}
"""

GEMMA = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"

GEMMA_PARTS = """{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + message['role'] + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate: " + message["role"]) }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{- raise_exception("id") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", \\"id\\": \\"" + message["tool_call_id"] + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_first = false %}{%- for tool in message['tool_calls'] %}{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```'}}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}
        {%- set system_message = system_message + " Both." %}
    {%- elif documents %}
        {%- set system_message = system_message + " Documents." %}
    {%- elif thinking %}
        {%- set system_message = system_message + " Thinking." %}
    {%- endif %}
    {%- if 'citations' in controls and documents %}
        {%- set system_message = system_message + " Cite." %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for document in documents or [] %}
    {{- loop.index ~ ': ' ~ document['text'] ~ '\\n' }}
{%- endfor %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
"""

GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
{% set inside = 'x' %}
<a>{{ message.content }}</a>
{% endgeneration %}
{{ inside is defined }}
{%- generation -%}  y {%- endgeneration -%}
{% else %}
{{ message.content }}
{% endif %}
{% endfor %}"""

# Values written as Python writes them, undefined things, loop controls, macros, string methods.
PYTHON = """{{ true }} {{ none }} {{ 1.0 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 2 ** 5 }} {{ [1, 'a', none, true] }} {{ {'k': 'v'} }}
{{ missing }}|{{ missing is defined }}|{{ missing | default('d') }}|{{ messages[0].missing }}|{{ 'x' if missing }}|
{%- for x in missing %}never{% endfor %}
{% for n in range(10) %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 5 %}{% break %}{% endif %}{{ n }}{% endfor %}
{% macro m(a, b='B') %}<{{ a }}{{ b }}>{% endmacro %}{{ m('1') }}{{ m('1', b='2') }}
{{ 'a-b-c'.split('-') }} {{ 'a b'.title() }} {{ 'abc'.upper() }} {{ ' x '.strip() }} {{ 'xxabxx'.strip('x') }} {{ 'abc'.replace('b', 'B') }} {{ 'a,b'.split(',', 1)[1] }}
{{ {'a': 1, 'b': 2}.items() | list }} {{ {'a': 1}.get('b', 'none') }} {{ {'a': 1}.get('z') }} {{ {'a': 1}.keys() | list }} {{ {'a': 1}.values() | list }}
{{ ['a', 'b'] | join(', ') }} {{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ [1, 2, 3][::-1] }} {{ [3, 1, 2] | sort }} {{ [1, 2] + [3] }}
{{ 'a' ~ 1 ~ none }} {{ 'b' in 'abc' }} {{ 'k' not in {'k': 1} }} {{ (1, 2) }} {{ 'A' | lower }} {{ messages | map(attribute='role') | list }}
{{ messages | rejectattr('role', 'equalto', 'user') | list | length }} {{ '%s-%d' | format('a', 3) }} {{ 'x' is string }} {{ 3 is number }} {{ {} is mapping }} {{ messages | first is mapping }}
{{ "quote's" }} {{ ["quote's", 'dou"ble'] }} {{ 'é\\n' | tojson }} {{ [1, {'a': [], 'b': {}}] | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }} {{ 'é😀' | tojson(ensure_ascii=true) }}
{{ messages[-1]['content'] }} {{ messages | length > 1 and not false }} {{ namespace(a=1).a }} {{ dict(a=1) }} {{ 'abc' | length }} {{ 5 | string + 'x' }} {{ '5' | int + 1 }}
{%- set text %}block {{ 1 }}{% endset %}{{ text }} {% raw %}{{ raw }}{% endraw %} {{ strftime_now('%A %-d %B %y %H:%M:%S %j %p %I %%') }}
{{ messages[0].content.split('<|im_end|>')[0].strip() }} {{ '<b>&"' }} {{ '<b>' | e }} {{ 'a\\tb' }} {{ '\\u00e9' }} {{ "a" "b" }} {{ 1 if false else 2 }} {{ ('a', 'b') | last }} {{ 'abc' | reverse }} {{ 'ab' * 2 }}
{{ none is iterable }} {{ missing is iterable }} {{ 'a' is iterable }} {{ [] is iterable }} {{ 1 is iterable }} {{ {} is iterable }} {{ missing | length }} {{ messages | length }} {{ messages[0] | length }} {{ {'a': 1} | count }} {{ none is none }} {{ missing is none }} {{ messages is sequence }} {{ 'a' is sequence }} {{ {} is sequence }} {{ missing is sequence }} {{ none is sequence }} {{ 1 is sequence }}"""

CASES = [
    ("chatml", CHATML, PLAIN, None, True, {}),
    ("chatml without a system prompt", CHATML, NO_SYSTEM, None, False, {}),
    ("whitespace", WHITESPACE, PLAIN, None, False, {}),
    ("llama3", LLAMA3, PLAIN, None, True, {}),
    ("llama3 with tools", LLAMA3, WITH_CALL, TOOLS, True, {}),
    ("llama3 with a date", LLAMA3, NO_SYSTEM, None, True, {"date_string": "1 Jan 2000"}),
    ("llama3 with too many calls", LLAMA3, [PLAIN[1], {**CALL, "tool_calls": CALL["tool_calls"] * 2}], None, False, {}),
    ("qwen3", QWEN3, PLAIN, None, True, {}),
    ("qwen3 with tools", QWEN3, WITH_CALL, TOOLS, True, {"enable_thinking": False}),
    ("qwen3 with reasoning", QWEN3, REASONING, None, True, {}),
    ("gemma", GEMMA, NO_SYSTEM, None, True, {}),
    ("gemma refuses system prompts", GEMMA, PLAIN, None, True, {}),
    ("gemma refuses two users", GEMMA, [PLAIN[1], PLAIN[3]], None, True, {}),
    ("gemma with parts", GEMMA_PARTS, PARTS, None, False, {}),
    ("mistral", MISTRAL, PLAIN, None, False, {}),
    ("mistral with tools", MISTRAL, WITH_CALL, TOOLS, False, {}),
    ("deepseek", DEEPSEEK, PLAIN, None, True, {}),
    ("deepseek with tools", DEEPSEEK, WITH_CALL, TOOLS, False, {}),
    ("granite", GRANITE, NO_SYSTEM, None, True, {"thinking": True}),
    ("granite with documents", GRANITE, NO_SYSTEM, None, True, {"controls": {"citations": True}, "documents": [{"text": "one"}, {"text": "two"}]}),
    ("generation tags", GENERATION, PLAIN, None, False, {}),
    ("attributes of what is undefined", "{{ missing.a }}", PLAIN, None, False, {}),
    ("text plus number", "{{ 'a' + 1 }}", PLAIN, None, False, {}),
]
CASES += [(f"python {index}", line, PLAIN, None, False, {}) for index, line in enumerate(PYTHON.split("\n"))]


def main():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])), bos_token="<s>", eos_token="</s>"
    )
    cases = []
    for name, template, messages, tools, prompt, extra in CASES:
        case = {"name": name, "template": template, "messages": messages, "tools": tools, "prompt": prompt, "extra": extra}
        try:
            case["expected"] = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, add_generation_prompt=prompt, tokenize=False, **extra
            )
        except Exception as error:
            case["error"] = str(error)
        cases.append(case)
    path = pathlib.Path(__file__).parent / "cases.json"
    path.write_text(json.dumps(cases, ensure_ascii=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
