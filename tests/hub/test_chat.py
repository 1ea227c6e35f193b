"""Conversations to text: as transformers renders them, from any folder, whatever the template tries."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.hub.chat_cases import CASES, CHAT, NOW, PUBLISHED, SMOLLM2
from weft.hub.chat import (
    RENDERER,
    ChatTemplates,
    Renderer,
    answer_mask,
    chat_templates,
    conversation,
    read_conversation,
)
from weft.hub.published_folder import side_files
from weft.hub.published_tokenizer import JsonTokenizer
from weft.runtime.errors import UserError

GOLDENS = json.loads(Path(__file__).with_name('chat.json').read_text(encoding='utf-8'))
OURS = {'conversation': 'messages', 'chat_template': 'name'}
ARGUMENTS = ('messages', 'name', 'tools', 'documents', 'add_generation_prompt', 'continue_final_message')


def rendered(files, arguments):
    """By arguments of transformers' `apply_chat_template`."""
    given = {OURS.get(name, name): value for name, value in arguments.items()}
    more = {name: given.pop(name) for name in [*given] if name not in ARGUMENTS}
    given = {'add_generation_prompt': False} | given
    return chat_templates(files, 'runs/x').render(**given, variables=more, now=NOW)


@pytest.fixture(autouse=True, scope='module')
def ended():
    yield
    RENDERER.close()


@pytest.mark.parametrize('name', CASES)
def test_as_transformers(name):
    one, golden = CASES[name], GOLDENS['rendered'][name]
    files = {path: content.encode() for path, content in one['files'].items()}
    if 'error' in golden:
        with pytest.raises(UserError, match=r'^runs/x: ') as caught:
            rendered(files, one['arguments'])
        assert len(str(caught.value).splitlines()) == 1
        return
    found = rendered(files, one['arguments'])
    assert found == golden['text']
    assert found.goes_on == ('continue_final_message' in one['arguments'])
    if 'mask' in golden:
        tokenizer = JsonTokenizer(
            json.dumps(GOLDENS['about']['tokenizer']).encode(), {'bos': 0, 'eos': 1, 'prefix': [], 'ends': [1]}
        )
        assert tokenizer.encode(found) == golden['ids']
        assert answer_mask(tokenizer.spans(found), found) == [bool(one) for one in golden['mask']]
        assert 0 < sum(golden['mask']) < len(golden['mask'])


def of(template: str) -> ChatTemplates:
    return ChatTemplates('runs/x', {'default': template}, {})


TRICKS = {
    'memory at once': ("{{ 'a' * 10 ** 10 }}", 'needs more than 1024 MiB'),
    'memory by doubling': (
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        'needs more than 1024 MiB',
    ),
    'a long text': ("{% for i in range(90000) %}{{ 'a' * 999 }}{% endfor %}", 'writes more than 4194304 characters'),
    'no end': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'calls itself without end'),
    'a deep expression': (f'{{{{ {"(" * 5000}1{")" * 5000} }}}}', 'nested too deeply'),
    'a message in many lines': (
        "{{ raise_exception('a\n b\x1b[31m' ~ 'c' * 10000) }}",
        r'template: a b\[31mc{300,400}$',
    ),
    'a mistake': ('{{ 1 / 0 }}', 'ZeroDivisionError: division by zero'),
    'a mistake of grammar': ('\n\n{% if %}', 'line 3: '),
    'a file': ("{% include '/etc/passwd' %}", 'no loader|TypeError'),
}


@pytest.mark.parametrize('name', TRICKS)
def test_a_template_cannot_do_harm(name):
    template, said = TRICKS[name]
    with pytest.raises(UserError, match=said) as caught:
        of(template).render(CHAT)
    assert len(str(caught.value)) < 600
    assert of('fine').render(CHAT) == 'fine'


def test_time_is_limited_and_the_next_text_is_rendered():
    renderer = Renderer(seconds=1)
    request = {'template': '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'}
    assert renderer(request | {'messages': [], 'variables': {}}) == {'error': 'takes more than 1 seconds'}
    assert renderer({'template': 'fine', 'messages': [], 'variables': {}})['text'] == 'fine'
    os.kill(renderer.process.pid, signal.SIGKILL)
    renderer.process.wait()
    assert renderer({'template': 'fine', 'messages': [], 'variables': {}})['text'] == 'fine'
    renderer.close()


def test_no_template():
    assert chat_templates({}, 'runs/x') is None
    assert chat_templates({'tokenizer_config.json': b'{"chat_template": null, "bos_token": "<s>"}'}, 'runs/x') is None
    found = chat_templates({'chat_template.json': json.dumps({'chat_template': SMOLLM2}).encode()}, 'runs/x')
    assert found.render(CHAT).startswith('<|im_start|>system\n Be brief. <|im_end|>')


@pytest.mark.parametrize(
    ('name', 'content', 'said'),
    [
        ('tokenizer_config.json', b'{"chat_template": 3}', 'chat_template is 3: it must be a text'),
        ('tokenizer_config.json', b'{"chat_template": [{"name": "a"}]}', 'must be a text, or a list'),
        ('tokenizer_config.json', b'[]', 'must be a JSON object'),
        ('tokenizer_config.json', b'{"a', 'not readable as JSON'),
        ('tokenizer_config.json', b'[' * 100_000, 'not readable as JSON'),
        ('chat_template.jinja', b'ab\xff', 'chat_template.jinja: not UTF-8 at byte 2'),
    ],
)
def test_damaged_files_are_named(name, content, said):
    with pytest.raises(UserError, match=said):
        chat_templates({name: content}, 'runs/x')


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('{"messages": 3}', 'messages is 3: it must be a list'),
        ('[]', r'messages is \[\]: it must be a list of at least one'),
        ('{"message": []}', 'a conversation is a list of messages'),
        ('[{"content": "x"}]', 'message 1 is .* it must be an object with a "role"'),
        ('[{"role": "user", "content": "x"}, "y"]', 'message 2 is "y"'),
        ('{"messages": [{"role": "user"}], "tool": []}', "no field 'tool' in a conversation; did you mean 'tools'"),
        ('{"messages": [{"role": "user"}], "tools": [1]}', r'tools is \[1\]: it must be a list of objects'),
        ('{"messages": [{"role": "user"}], "chat_template_kwargs": {"tools": 1}}', "has 'tools', which is a field"),
        ('{"messages": [', 'not readable as JSON'),
        ('[' * 100_000, 'nested too deeply'),
    ],
)
def test_what_is_no_conversation(text, said):
    with pytest.raises(UserError, match=f'^chat.json: {said}|^chat.json: .*{said}') as caught:
        read_conversation(text, 'chat.json')
    assert len(str(caught.value)) < 300


def test_a_conversation_in_both_forms():
    asked = [{'role': 'user', 'content': 'Hi'}]
    plain = conversation(asked, 'chat.json')
    full = conversation({'messages': asked, 'tools': None, 'chat_template_kwargs': {'x': 'y'}}, 'chat.json')
    assert plain == {'messages': asked, 'tools': None, 'documents': None, 'variables': {}}
    assert full == plain | {'variables': {'x': 'y'}}
    assert of('{{ x }}{{ messages[0].content }}').render(**full) == 'yHi'


# What transformers made of folders that a user has: `make parity CHAT='FOLDER …'` names the file. Without it there is no test.
FOUND = os.environ.get('WEFT_CHAT_GOLDENS')
if FOUND:
    FOLDERS = json.loads(Path(FOUND).read_text(encoding='utf-8'))

    @pytest.mark.parametrize('folder', FOLDERS)
    def test_published_folders(folder):
        files, golden = side_files(Path(folder)), FOLDERS[folder]
        for name, one in PUBLISHED.items():
            if 'error' in golden[name]:
                with pytest.raises(UserError):
                    rendered(files, one)
            else:
                assert rendered(files, one) == golden[name]['text'], name
