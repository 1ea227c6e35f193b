"""Conversations with templates of our own that together use every construct, and folders in which templates are found.

tests/hub/make_chat.py has transformers render them; tests/hub/test_chat.py holds ours to that.
"""

import json

NOW = '2026-03-07T09:05:00'  # what templates that write the date are told
# Of SmolLM2-135M-Instruct (Apache-2.0), as its published files have it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    '{% endif %}'
)
PLAIN = (
    '{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}'
    '{% if add_generation_prompt %}[assistant]{% endif %}'
)
TRIMS = '{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}'
# trim_blocks and lstrip_blocks show in the white space around blocks.
CONSTRUCTS = """\
{#- a comment, which leaves nothing -#}
{% macro tagged(name, text='nothing', mark='*') %}
  <{{ name }}{{ mark }}>{{ text }}{% if caller %} ({{ caller(name) }}){% endif %}</{{ name }}>
{% endmacro %}
{% set ns = namespace(count=0, last=none, seen=[]) %}
{%- set system %}
  {% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% else %}none{% endif %}
{% endset -%}
system: {{ system | trim | upper }}
{% for message in messages if message.role != 'system' %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'stop' %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {%- set ns.last = message.role %}
    {{ loop.index }}/{{ loop.length }} {{ loop.cycle('odd', 'even') }}{{ ' first' if loop.first }}{{ ' last' if loop.last }}
    {{- ' after ' + loop.previtem.role if loop.previtem is defined else ' at the start' }}
    {{ tagged(message.role, message.content) }}
    {%- if message.content is string %}
    {{ message.content.split(' ')[-1] | capitalize }} {{ message.content[::-1] }} {{ message.content.startswith('Hi') }}
    {% elif message.content is mapping %}
    {% for key, value in message.content | dictsort %}{{ key }}={{ value }};{% endfor %}

    {% else %}
    {{ message.content | map(attribute='text') | select('defined') | join(' + ') }}
    {% endif %}
{% else %}
nobody spoke
{% endfor %}
{% call(who) tagged('call', mark='!') %}by {{ who }}{% endcall %}
{{ ns.count }} {{ ns.last }} {{ missing }}{{ missing | default('gone') }}
{{ dict(a=1, **{'b': 2}) | tojson }}
{{ (messages | selectattr('role', 'equalto', 'user') | list | length) }}
{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | unique | list }}
{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ '%s-%03d' | format('a', 7) }} {{ 'a' ~ 1 ~ none }}
{{ [1, 2, 3][1:] }} {{ range(3) | list }} {{ 1 is odd and 'x' in 'xy' }}
{% raw %}{{ not rendered }}{% endraw %}
{% filter replace('o', '0') %}foo{% endfilter %}
{% with x = 5 %}{{ x }}{% endwith %}

  {{- '\\n' ~ 'é ß <&> "quoted"' | tojson -}}
{% for a in [[1, [2, [3]]]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }},{% endif %}{% endfor %}
"""
TOOLS = """\
{{ bos_token }}{% if tools %}Tools:
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{{ tool.function | tojson(separators=(',', ':'), sort_keys=true) }} {{ tool | tojson(ensure_ascii=true) }}
{% endfor %}
{% endif %}{% if documents %}{% for d in documents %}{{ d.title }}: {{ d.text }}
{% endfor %}{% endif %}
{% for m in messages %}{{ m.role }}:{% for call in m.tool_calls or []
 %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{{ m.content }}{{ eos_token }}
{% endfor %}{{ pad_token }}{{ image_token }}{{ audio_token }}"""
ANSWERS = """\
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|a|>' }}{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ '<|' ~ m.role ~ '|>' ~ m.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"""
THINKS = (
    '{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}'
    '{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}\n{% endfor %}{% if enable_thinking is defined and not '
    'enable_thinking %}<think></think>{% endif %}{{ who }}'
)
CHAT = [
    {'role': 'system', 'content': ' Be brief. '},
    {'role': 'user', 'content': 'Hi there, ünïcode 😀'},
    {'role': 'assistant', 'content': 'Hello.  '},
    {'role': 'user', 'content': 'And <you> & "me"?'},
]
PARTS = [{'type': 'text', 'text': 'one'}, {'type': 'image'}, {'type': 'text', 'text': 'two '}]
MIXED = [
    {'role': 'user', 'content': PARTS},
    {'role': 'skip', 'content': 'unseen'},
    {'role': 'assistant', 'content': {'b': 1, 'a': [True, None]}},
    {'role': 'stop', 'content': 'unseen'},
    {'role': 'user', 'content': 'unseen'},
]
WEATHER = {
    'type': 'function',
    'function': {
        'name': 'weather',
        'description': 'Wetter für <Ort> & "Zeit"',
        'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}, 'required': ['city']},
    },
}
CALLS = [
    {'role': 'user', 'content': 'Rain?'},
    {
        'role': 'assistant',
        'content': None,
        'tool_calls': [{'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Köln', 'n': 1.5}}}],
    },
    {'role': 'tool', 'name': 'weather', 'content': '{"rain": true}', 'tool_calls': None},
]
THOUGHT = [
    {'role': 'user', 'content': 'Why?'},
    {'role': 'assistant', 'reasoning': 'as it is', 'content': 'Because.'},
    {'role': 'assistant', 'thinking': 'hm', 'content': 'So'},
    {'role': 'assistant', 'reasoning_content': 'well', 'thinking': 'other', 'content': 'Then'},
]
TOKENS = {
    'bos_token': '<s>',
    'eos_token': {'content': '</s>', 'lstrip': False, '__type': 'AddedToken'},
    'pad_token': None,
    'image_token': '<img>',
    'extra_special_tokens': {'audio_token': '<audio>'},
    'model_max_length': 100,
}


def files(template: str | list | None, more: dict[str, str] | None = None, **config) -> dict[str, str]:
    """A folder's files beside its tokenizer.json."""
    said = TOKENS | config | ({} if template is None else {'chat_template': template})
    return {'tokenizer_config.json': json.dumps(said), **(more or {})}


def case(template, messages=CHAT, more=None, config=None, **arguments) -> dict:
    """A folder, and what is asked of it: arguments of transformers' `apply_chat_template`."""
    return {'files': files(template, more, **(config or {})), 'arguments': {'conversation': messages, **arguments}}


SEVERAL = [
    {'name': 'default', 'template': PLAIN},
    {'name': 'tool_use', 'template': TOOLS},
    {'name': 'rag', 'template': TRIMS},
]
JINJA = 'chat_template.jinja'
MORE = 'additional_chat_templates/rag.jinja'
LAST = [*CHAT, {'role': 'assistant', 'content': 'I think  '}]
OPEN = {'continue_final_message': True}
LEGACY = {'special_tokens_map.json': json.dumps({'bos_token': '<other>', 'eos_token': {'content': '</other>'}})}
DECODER = {'added_tokens_decoder': {'1': {'content': '<s>', 'special': True}}}
CASES = {
    'smollm2': case(SMOLLM2, CHAT[1:], add_generation_prompt=True),
    'smollm2, its system': case(SMOLLM2, CHAT),
    'smollm2, continued': case(SMOLLM2, LAST, **OPEN),
    'constructs': case(CONSTRUCTS),
    'constructs, content of parts': case(CONSTRUCTS, MIXED),
    'constructs, nobody': case(CONSTRUCTS, CHAT[:1]),
    'tools and documents': case(TOOLS, CALLS, tools=[WEATHER, WEATHER], documents=[{'title': 'T', 'text': 'x\ny'}]),
    'no tools': case(TOOLS, CALLS),
    'the date': case("{{ strftime_now('%d %b %Y, %H:%M') }} {{ strftime_now('%-d/%j') }}"),
    'answers': case(ANSWERS, LAST, add_generation_prompt=True),
    'reasoning': case(THINKS, THOUGHT),
    'variables': case(THINKS, THOUGHT, enable_thinking=False, who='<b>', bos_token='mine'),
    'several': case(SEVERAL),
    'several, with tools': case(SEVERAL, CALLS, tools=[WEATHER]),
    'several, with an empty list of tools': case(SEVERAL, CALLS, tools=[]),
    'several, by name': case(SEVERAL, chat_template='rag'),
    'a name that is none': case(SEVERAL[1:]),
    'the file before the config': case(PLAIN, more={JINJA: 'file {{ bos_token }}\n'}),
    'files by name': case(PLAIN, more={JINJA: 'file', MORE: TRIMS}, chat_template='rag'),
    'only files by name': case(PLAIN, more={MORE: TRIMS}),
    'special tokens of an older folder': case(TRIMS, more=LEGACY),
    'special tokens of a newer folder': case(TRIMS, more=LEGACY, config=DECODER),
    'continued': case(PLAIN, LAST, **OPEN),
    'continued, trimmed': case(TRIMS, LAST, **OPEN),
    'continued, parts': case(
        '{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}',
        [{'role': 'assistant', 'content': PARTS[:2]}],
        **OPEN,
    ),
    'continued, reasoning': case(
        '{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}',
        THOUGHT[:3],
        continue_final_message='thinking',
    ),
    'continued, left out': case('{{ messages[0].content }}', LAST, **OPEN),
    'continued, of no such field': case(PLAIN, LAST, continue_final_message='thought'),
    'raises': case("{% if messages[0].role == 'system' %}{{ raise_exception('no system\n role here') }}{% endif %}"),
    'no such attribute': case('{{ messages[0].content.nothing.more }}'),
    'a mistake in it': case('{% for m in messages %}\n{{ m.'),
    'changes what it is given': case('{{ messages.pop() }}'),
    'leaves the sandbox': case("{{ ''.__class__.__mro__ }}"),
    'hides a name': case('{% set ns = namespace(__x=1) %}'),
    'too far': case('{% for i in range(100001) %}{% endfor %}'),
}

# What the templates of published folders are asked (`make parity CHAT='FOLDER …'`): where one refuses, ours must too.
ALTERNATE = CHAT[1:]
PUBLISHED = {
    'a question': {'conversation': ALTERNATE[:1], 'add_generation_prompt': True},
    'turns': {'conversation': ALTERNATE, 'add_generation_prompt': True},
    'a system message': {'conversation': CHAT, 'add_generation_prompt': True},
    'no generation prompt': {'conversation': CHAT},
    'an answer to continue': {'conversation': LAST, 'continue_final_message': True},
    'tools': {'conversation': CHAT, 'tools': [WEATHER], 'add_generation_prompt': True},
    'a call': {'conversation': CALLS, 'tools': [WEATHER], 'add_generation_prompt': True},
    'documents': {'conversation': CHAT, 'documents': [{'title': 'T', 'text': 'x'}], 'add_generation_prompt': True},
    'reasoning': {'conversation': THOUGHT[:2] + THOUGHT[:1], 'add_generation_prompt': True},
    'without thinking': {'conversation': ALTERNATE, 'add_generation_prompt': True, 'enable_thinking': False},
}
