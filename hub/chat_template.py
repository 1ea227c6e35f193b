"""A chat template at work: conversations to text by jinja2's sandbox, with what transformers offers to templates.

A template comes with a model, and nobody has read it. So it runs in a process of its own (this file, started as a script by
hub/chat.py), which reads one JSON object a line and answers each with one: without files to write, with a limit on its
memory and on the time of each text. Nothing of Weft is imported here: the process is to be there at once.
"""

import datetime
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 2**30  # bytes that the process may use
SECONDS = 5  # of a processor, for one text
LONGEST = 2**22  # characters of a text
ENOUGH = 400  # characters of an error that are told
# A message's reasoning has had several names: templates read the first one, gpt-oss's the second.
REASONING = ('reasoning_content', 'thinking', 'reasoning')
HERE = 'THE-MODEL-GOES-ON-HERE '  # stands in the text where a message that is to be continued ends


class TooLong(Exception):
    """A text of more than LONGEST characters."""


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # a template may have a name `self`
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith('_'):
        raise jinja2.exceptions.SecurityError(f'namespace: {name!r} begins with an underscore, which is not allowed')


class MakesDicts:
    """What `dict` is in a template: the call, and no way from it to the type."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[str, Any]:
        return dict.fromkeys(keys, value)


class Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` holds what the assistant says; where it stands in the text is noted."""

    tags = {'generation'}  # noqa: RUF012 (as jinja2 declares it)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written = 0  # characters of the text so far
        self.found: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('_note'), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        self.found.append((self.written, self.written + len(text)))
        return text


def environment(now: datetime.datetime | None = None) -> jinja2.Environment:
    """jinja2's sandbox with what transformers adds to it. `now`: the clock stands there."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return (now or datetime.datetime.now()).strftime(form)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters['tojson'] = tojson
    made.globals |= {
        'raise_exception': raise_exception,
        'strftime_now': strftime_now,
        'dict': MakesDicts(),
        'namespace': Namespace,
    }
    return made


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any],
    now: str | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and [begin, end) of each `generation` block in it: see `ChatTemplates.render` (hub/chat.py).

    A message's field that is null counts as left out; special tokens are among the `variables`. Raises whatever the template
    does, ValueError for a message that cannot be continued, TooLong.
    """
    env = environment(None if now is None else datetime.datetime.fromisoformat(now))
    compiled = env.from_string(template)
    chat = [_reasoned({key: value for key, value in message.items() if value is not None}) for message in messages]
    ending = _mark(chat, continue_final_message, template) if continue_final_message else None
    blocks: Any = env.extensions[Generation.identifier]
    parts = []
    given = {'messages': chat, 'tools': tools, 'documents': documents, 'add_generation_prompt': add_generation_prompt}
    for part in compiled.generate(**{**variables, **given}):
        parts.append(part)
        blocks.written += len(part)
        if blocks.written > LONGEST:
            raise TooLong
    text = ''.join(parts)
    return (text if ending is None else _cut(text, ending)), blocks.found


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read."""
    said = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if said is None else {'thinking': said, **message, 'reasoning_content': said}


def _mark(chat: list[dict[str, Any]], field: bool | str, template: str) -> str:
    """Puts HERE behind what the last message says; what it says."""
    field = field if isinstance(field, str) else 'content'
    last = chat[-1]
    said = last.get(field)
    if said is None:
        raise ValueError(f'the last message has no {field!r} to continue')
    names = [name for name in REASONING if last.get(name) == said] if field in REASONING else [field]
    if not any(name in template for name in names):
        raise ValueError(f'the template does not read {field!r}, which is to be continued')
    if isinstance(said, str):
        for name in names:
            last[name] = said + HERE
        return said
    for number in reversed(range(len(said))):
        if 'text' in said[number]:
            last[field] = [*said[:number], said[number] | {'text': said[number]['text'] + HERE}, *said[number + 1 :]]
            return said[number]['text']
    raise ValueError(f'the last message has no text in its {field!r} to continue')


def _cut(text: str, ending: str) -> str:
    """A text up to HERE; without white space before it where the template cut off that of the message."""
    at = text.rfind(HERE.strip())
    if at < 0 or ending.strip() not in text:
        raise ValueError('the template leaves out or changes the last message, so that it cannot be continued')
    return text[:at] if text.startswith(HERE, at) else text[:at].rstrip()


def mistake_in(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, TooLong):
        return f'writes more than {LONGEST} characters'
    if isinstance(error, MemoryError):
        return f'needs more than {MEMORY >> 20} MiB of memory'
    if isinstance(error, RecursionError):
        return 'calls itself without end, or is nested too deeply'
    message = ' '.join(str(error).split())
    message = ''.join(character for character in message if character.isprintable())[:ENOUGH]
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f'line {error.lineno}: {message}'
    own = isinstance(error, (jinja2.exceptions.TemplateError, ValueError))
    return message if own and message else f'{type(error).__name__}: {message}'


def answer(line: bytes) -> dict[str, Any]:
    """What a request is answered with: the arguments of `render` as JSON, its results or an `error`."""
    try:
        text, answers = render(**json.loads(line))
        return {'text': text, 'answers': answers}
    except Exception as error:  # whatever a template may do, it is told
        return {'error': mistake_in(error)}


def main(seconds: int) -> None:
    """Answers until there is nothing more to read. `seconds` of a processor are for one text: more end the process."""
    # Where the limits are lower already, they stay.
    least = lambda kind, value: value if (most := resource.getrlimit(kind)[1]) < 0 else min(value, most)
    for kind, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (least(kind, value),) * 2)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (least(resource.RLIMIT_CPU, until), hard))
        found = json.dumps(answer(line)).encode()  # a line, whatever stands in the text
        sys.stdout.buffer.write(found + b'\n')
        sys.stdout.buffer.flush()


if __name__ == '__main__':
    main(int(sys.argv[1]))
