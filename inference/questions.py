"""What a user asks a model: plain prompts and conversations, from flags and files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.data.reading import joined, pieces, plain_name
from weft.data.sources import kind_of_text, objects
from weft.hub.chat import conversation, read_conversation
from weft.runtime.errors import UserError, nearest, shown

FIELDS = ('prompt', 'messages', 'tools', 'documents', 'chat_template_kwargs', 'id')  # of an object in a --prompts-file
LONGEST = 1 << 26  # characters of a file of prompts: all of them are held


@dataclasses.dataclass
class Question:
    """A plain prompt, or a conversation that the model is to go on with."""

    where: str  # the flag or the line of a file, for messages
    prompt: str = ''
    conversation: dict[str, Any] | None = None  # arguments of `ChatTemplates.render`
    id: Any = None  # of a line that has one: its answers have it too


def read_questions(
    prompts: Sequence[str], files: Sequence[str], messages: Sequence[str], chats: Sequence[str]
) -> list[Question]:
    """What the flags ask: texts, files of prompts, a user's messages and files of conversations."""
    questions = [Question('--prompt', text) for text in prompts]
    for path in files:
        questions += read_prompts_file(path)
    for text in messages:
        questions.append(Question('--message', conversation={'messages': [{'role': 'user', 'content': text}]}))
    for path in chats:
        text = joined(pieces(Path(path), '--chat ', streams=True), f'--chat {shown(path)}', LONGEST)
        questions.append(Question(shown(path), conversation=read_conversation(text, shown(path))))
    if not questions:
        raise UserError('no prompt: give --prompt TEXT, --prompts-file FILE, --message TEXT or --chat FILE.json')
    return questions


def read_prompts_file(path: str) -> list[Question]:
    """The lines of a file, empty ones left out, or the objects in one of JSON. Only line feeds end a line, and \\r before them.

    Raises UserError for .json that holds neither, such as a conversation over several lines, or an array of texts.
    """
    whole = joined(pieces(Path(path), '--prompts-file ', streams=True), f'--prompts-file {shown(path)}', LONGEST)
    kind, text = kind_of_text(Path(path), ('prompt', 'messages'), True, iter([whole]))
    rule = 'an object with either "prompt" or "messages"'
    if kind == 'text':
        if plain_name(Path(path)).suffix == '.json' and whole.strip():
            raise UserError(
                f'--prompts-file {shown(path)}: .json must hold {rule} a line, or an array of such; if it is one conversation, '
                'give it as --chat; if its lines are prompts, call it .txt'
            )
        lines = [line.removesuffix('\r') for line in ''.join(text).split('\n')]
        return [Question(f'{shown(path)}:{number}', line) for number, line in enumerate(lines, 1) if line]
    return [_question(name, value, rule) for name, value in objects(Path(path), kind, text, rule, FIELDS)]


def _question(where: str, said: dict[str, Any], rule: str) -> Question:
    if ('prompt' in said) == ('messages' in said):
        chat = '; if the file is one conversation, give it as --chat' if 'role' in said else ''
        raise UserError(f'{where}: it must be {rule}{chat}')
    for name in said:
        if name not in FIELDS:
            raise UserError(f'{where}: no field {shown(name, 60, quoted=True)} in a line{nearest(name, FIELDS)}')
    number = said.pop('id', None)
    if 'messages' in said:
        return Question(where, conversation=conversation(said, where), id=number)
    if not isinstance(said['prompt'], str) or len(said) > 1:
        raise UserError(f'{where}: prompt must be a text, and alone but for an id')
    return Question(where, said['prompt'], id=number)
