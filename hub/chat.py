"""Conversations as a published model reads them: its chat templates, found in its files and rendered.

    tokenizer_config.json               `chat_template`: one template, or a list of {name, template}
    chat_template.jinja                 one template, which stands before that of tokenizer_config.json
    additional_chat_templates/NAME.jinja    more, by name
    chat_template.json                  `chat_template`, as folders of models that see images have it

A template is rendered by hub/chat_template.py in a process of its own.
"""

import atexit
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from weft.hub import chat_template
from weft.hub.tokenizers.side_files import CONFIG, MAP, MOST_SAID, text_of
from weft.runtime.errors import UserError, nearest, shown
from weft.storage.foreign import read_object

SINGLE, OLD = 'chat_template.jinja', 'chat_template.json'
MORE, ENDING = 'additional_chat_templates/', '.jinja'
FIELDS = ('messages', 'tools', 'documents', 'chat_template_kwargs')  # of a conversation in a file
GIVEN = ('messages', 'tools', 'documents', 'add_generation_prompt')  # what templates read that we give them


class Rendered(str):
    """A conversation as its template writes it. Special tokens stand in it, so a tokenizer puts none before it."""

    answers: tuple[tuple[int, int], ...] = ()  # [begin, end) of what is the assistant's, where the template says so
    goes_on: bool = False  # it ends inside a message: what follows is no text of its own


class Renderer:
    """The process that renders templates; it is started when first needed, and again after one that a template ended."""

    def __init__(self, seconds: int = chat_template.SECONDS) -> None:
        self.seconds = seconds  # of a processor, for one text
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def start(self) -> subprocess.Popen[bytes]:
        """Has it start, so that it is ready when it is needed."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            # Ctrl-C is for us: the process ends when its input does.
            self.process = subprocess.Popen(
                [sys.executable, '-P', chat_template.__file__, str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self.process

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What it answers: see `hub.chat_template.answer`."""
        with self.lock:
            process = self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b'\n')
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b''
            except BaseException:  # an interrupt: the answer that is still to come is no later text's
                process.kill()
                self.close()
                raise
            if line.endswith(b'\n'):
                return json.loads(line)
            code = self.close()
            if code == -signal.SIGXCPU:
                return {'error': f'takes more than {self.seconds} seconds'}
            return {'error': f'ends the process that renders it (exit code {code})'}

    def close(self) -> int | None:
        """Ends it; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was still to be sent
            process.stdin.close()
        process.stdout.close()
        return process.wait()


RENDERER = Renderer()  # of all templates: they share nothing in it but the process
atexit.register(RENDERER.close)


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """A model's chat templates by name ('default' where there is one), and the special tokens that they may write."""

    where: str  # for messages: the run or folder that they are of
    templates: Mapping[str, str]
    special: Mapping[str, str]

    def template(self, name: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The one of a name; otherwise `tool_use` for a conversation with tools where there is one, or `default`."""
        if name is None:
            name = 'tool_use' if tools is not None and 'tool_use' in self.templates else 'default'
        if name not in self.templates:
            raise UserError(
                f'{self.where}: no chat template {shown(name, 60, quoted=True)}{nearest(name, self.templates)}'
            )
        return self.templates[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
        now: str | None = None,
    ) -> Rendered:
        """The text of a conversation, as of transformers' `apply_chat_template`.

        Args:
            messages: at least one, each an object of JSON with a `role`.
            tools, documents: objects of JSON that the template may describe to the model.
            name: of the template; see `template`.
            add_generation_prompt: the text ends where the assistant's next message begins.
            continue_final_message: the text ends inside the last message, after its content (or the field of this name).
            variables: more for the template (`enable_thinking`), before special tokens of the same name.
            now: ISO time that templates which write the date are told; the machine's own otherwise.

        Raises UserError for what the template refuses or does wrong.
        """
        continued = bool(continue_final_message)
        request = {
            'template': self.template(name, tools),
            'messages': list(messages),
            'tools': tools,
            'documents': documents,
            'add_generation_prompt': add_generation_prompt and not continued,
            'continue_final_message': continue_final_message,
            'variables': {**self.special, **(variables or {})},
            'now': now,
        }
        found = RENDERER(request)
        if 'error' in found:
            raise UserError(f'{self.where}: its chat template: {found["error"]}')
        rendered = Rendered(found['text'])
        rendered.goes_on = continued
        rendered.answers = tuple((begin, end) for begin, end in found['answers'])
        return rendered


def chat_templates(files: Mapping[str, bytes], where: str) -> ChatTemplates | None:
    """The templates among a published model's files, which are named by their paths in its folder; None if it has none.

    Which count is as in transformers: the files of templates, if there are any, and else tokenizer_config.json.
    """
    config = _object(files, CONFIG, where)
    named = {
        path.removeprefix(MORE).removesuffix(ENDING): text_of(content, f'{where}/{path}')
        for path, content in files.items()
        if path.startswith(MORE) and path.endswith(ENDING)
    }
    if SINGLE in files:
        named['default'] = text_of(files[SINGLE], f'{where}/{SINGLE}')
    if not named:
        for name, said in ((CONFIG, config), (OLD, _object(files, OLD, where))):
            if said.get('chat_template') is not None:
                named = _named(said['chat_template'], f'{where}/{name}')
                break
    if not named:
        return None
    special = {**config}
    if 'added_tokens_decoder' not in config:  # older folders keep them in a file of their own
        special |= _object(files, MAP, where)
    more = special.get('extra_special_tokens')
    special |= more if isinstance(more, dict) else {}
    tokens = {name: _token(value) for name, value in special.items() if name.endswith('_token')}
    return ChatTemplates(where, named, {name: token for name, token in tokens.items() if token is not None})


def answer_mask(spans: Sequence[tuple[int, int]], rendered: Rendered) -> list[bool]:
    """Which tokens, each of characters [begin, end) of the text, have any of the assistant's `generation` blocks in them."""
    return [any(begin < to and start < end for start, to in rendered.answers) for begin, end in spans]


def read_conversation(text: str, where: str) -> dict[str, Any]:
    """A conversation from JSON: a list of messages, or an object with `messages` and more, as arguments of `render`."""
    try:
        said = json.loads(text)
    except RecursionError:
        raise UserError(f'{where}: nested too deeply') from None
    except ValueError as error:
        raise UserError(f'{where}: not readable as JSON: {shown(error)}') from None
    return conversation(said, where)


def conversation(said: Any, where: str) -> dict[str, Any]:
    """The arguments of `render` for what a file says: a list of messages, or an object with `messages` and more."""
    said = {'messages': said} if isinstance(said, list) else said
    rule = (
        'a conversation is a list of messages such as {"role": "user", "content": "Hi"}, or an object with "messages"'
    )
    if not isinstance(said, dict) or 'messages' not in said:
        raise UserError(f'{where}: {rule}')
    for name in said:
        if name not in FIELDS:
            raise UserError(
                f'{where}: no field {shown(name, 60, quoted=True)} in a conversation{nearest(name, FIELDS)}'
            )
    check_messages(said['messages'], where)
    for name in ('tools', 'documents'):
        found = said.get(name)
        if found is not None and not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
            raise UserError(f'{where}: {name} is {_shown(found)}: it must be a list of objects')
    variables = said.get('chat_template_kwargs') or {}
    if not isinstance(variables, dict):
        raise UserError(f'{where}: chat_template_kwargs is {_shown(variables)}: it must be an object')
    for name in variables:
        if name in GIVEN:
            raise UserError(
                f'{where}: chat_template_kwargs has {shown(name, 60, quoted=True)}, which is a field beside it'
            )
    given = {'messages': said['messages'], 'variables': variables}
    return given | {name: said.get(name) for name in ('tools', 'documents')}


def check_messages(messages: Any, where: str) -> None:
    """Raises UserError for what is not a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: messages is {_shown(messages)}: it must be a list of at least one message')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get('role'), str):
            rule = 'it must be an object with a "role" such as "user" and a "content"'
            raise UserError(f'{where}: message {number} is {_shown(message)}: {rule}')


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f'{text[:57]}…'


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """What a file of JSON says; nothing where it is not there."""
    if name not in files:
        return {}
    return read_object(files[name], f'{where}/{name}', MOST_SAID)


def _named(said: Any, where: str) -> dict[str, str]:
    """Templates by name, of a `chat_template`."""
    if isinstance(said, str):
        return {'default': said}
    whole = lambda one: (
        isinstance(one, dict) and isinstance(one.get('name'), str) and isinstance(one.get('template'), str)
    )
    if not isinstance(said, list) or not all(whole(one) for one in said):
        raise UserError(f'{where}: chat_template is {_shown(said)}: it must be a text, or a list of {{name, template}}')
    return {one['name']: one['template'] for one in said}


def _token(said: Any) -> str | None:
    """The text of a special token; None where it is none."""
    said = said.get('content') if isinstance(said, dict) else said
    return said if isinstance(said, str) else None
