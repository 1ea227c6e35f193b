"""Where text comes from: the standard library's own source, or the user's files.

Mistakes in the user's files are named by file and line or byte offset.
"""

import itertools
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weft.data import reading
from weft.data.config import DataConfig
from weft.data.reading import lines_of, pieces, plain_name
from weft.data.walk import LeftOut, files_of, is_named, walk
from weft.runtime.errors import UserError, nearest, shown
from weft.storage.foreign import lone_surrogate, unique

# Not the standard library's own: what was installed beside it. Not like the rest: tests, with their tables of cases.
LEFT_OUT = frozenset({'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'})
# Lines that only the generated files of encodings/ have: character tables, and wrappers of the codecs in C, all alike.
TABLE_MARKS = '_table = ', '_table=', 'import _codecs_'


@dataclass(frozen=True)
class Document:
    name: str  # of its file, and the line or number in a file of several
    group: str  # documents of one group stay on the same side of the split: a top-level package, or a file
    text: str


def stdlib(root: Path, skipped: list[LeftOut]) -> Iterator[Document]:
    """The Python files under `root`, sorted, grouped by top-level package; undecodable ones are added to `skipped`."""
    for path in walk(root, LEFT_OUT, []):
        relative = path.relative_to(root)
        # _sysconfigdata is not source but this machine's build settings.
        if path.suffix != '.py' or path.name.startswith('_sysconfigdata'):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            skipped.append(LeftOut(relative.as_posix(), 'not UTF-8'))
            continue
        if relative.parts[0] == 'encodings' and any(mark in text for mark in TABLE_MARKS):
            continue
        if text:
            yield Document(relative.as_posix(), relative.parts[0], text)


def documents(config: DataConfig, skipped: list[LeftOut]) -> Iterator[Document]:
    """The documents of `config.source`, none of them empty, in the same order each time."""
    if config.paths == ('stdlib',):
        root = Path(sysconfig.get_path('stdlib'))
        if not (root / 'os.py').is_file():
            raise UserError(f"data.source='stdlib': no source of it in {root}; name files or folders of your own text")
        yield from stdlib(root, skipped)
        return
    for path, name, text in _read(config.paths, config.field, 'data.source', skipped):
        yield Document(name, str(path), text)


def texts(paths: Sequence[str], field: str = 'text', skipped: list[LeftOut] | None = None) -> Iterator[tuple[str, str]]:
    """(name, text) of each document in files, folders and globs: a file, or an object in JSON; empty ones are left out.

    UserError for a path that matches nothing, holds no text or cannot be read; for text that is not UTF-8, with file
    and byte offset; for a damaged packed file; for a line of JSON Lines that is no object with `field`, with its number.
    What is left out is added to `skipped`.
    """
    for _, name, text in _read(paths, field, '--data', [] if skipped is None else skipped):
        yield name, text


def _read(paths: Sequence[str], field: str, option: str, skipped: list[LeftOut]) -> Iterator[tuple[Path, str, str]]:
    seen: set[Path] = set()
    for given in paths:
        found = False
        for path in files_of(given, option, skipped):
            if (real := path.resolve()) in seen:
                found = True
                continue
            seen.add(real)
            empty = True
            key = 'data.field=' if option == 'data.source' else '--field '
            for name, text in _documents_of(path, field, key, is_named(path, given)):
                found, empty = True, False
                yield path, name, text
            if empty:
                skipped.append(LeftOut(str(path), 'an empty file'))
        if not found:
            raise UserError(
                f'{option}={shown(given)}: holds no text; a file must not be empty, and a folder must hold one that is not'
            )


def _documents_of(path: Path, field: str, key: str, named: bool) -> Iterator[tuple[str, str]]:
    asked = f'{key}{field!r}'
    kind, text = kind_of_text(path, (field,), named)
    if kind == 'text':
        if whole := reading.joined(text, shown(path)):
            yield str(path), whole
        return
    for name, value in objects(path, kind, text, f'an object with the text in {asked}', (field,)):
        if document := text_in(value, field, name, asked):
            yield name, document


Kind = Literal['text', 'lines', 'array']
SPACES = re.compile(r'[ \t\r\n]*')
LINES = ('.jsonl', '.ndjson', '.jsonlines', '.jl', '.ldjson')  # endings of JSON Lines


def kind_of_text(
    path: Path, fields: Sequence[str], named: bool, text: Iterator[str] | None = None
) -> tuple[Kind, Iterator[str]]:
    """What a file holds, by its name, and where that is silent by its content; and its text, which may be given.

    `lines`: JSON Lines. `array`: an array of objects in JSON. `text`: anything else, as it stands. Code, fixtures and settings
    are text: their first object has none of the `fields`. Where the user `named` this very file, objects in .json are meant to
    have them.
    """
    text, suffix = text or pieces(path), plain_name(path).suffix
    if suffix in LINES:
        return 'lines', text
    if suffix not in ('.json', ''):
        return 'text', text
    begin = _Held(text)
    at = begin.after_spaces(0)
    kind: Kind = 'text'
    if begin.held.startswith('{', at) and _are_lines(begin, at, fields, named, bool(suffix)):
        kind = 'lines'
    if begin.held.startswith('[', at) and suffix and _is_array(begin, begin.after_spaces(at + 1), fields, named):
        kind = 'array'
    return kind, itertools.chain([begin.held], text)


class _Held:
    """A text as far as it was read, from a place on: a block at first, and as much again each time."""

    def __init__(self, text: Iterator[str]) -> None:
        self.text, self.held, self.at = text, '', 0
        self.more()

    def more(self) -> bool:
        """Reads more, and lets go of what is before `at`. False if there is no more."""
        parts, before = [self.held[self.at :]], len(self.held) - self.at
        wanted = max(reading.BLOCK, before)
        while wanted > 0 and (piece := next(self.text, None)) is not None:
            parts.append(piece)
            wanted -= len(piece)
        self.held, self.at = ''.join(parts), 0
        return len(self.held) > before

    def grow(self) -> bool:
        """As `more`. False, too, if more is held than a value of JSON may have."""
        return len(self.held) <= reading.LINE and self.more()

    def after_spaces(self, at: int) -> int:
        """The place of the next character, from one on, that is no space; the end where there is none in what is held."""
        return SPACES.match(self.held, at).end()  # type: ignore[union-attr]

    def letter(self) -> str:
        """The next character that is no space, which `at` is moved to; '' where there is none."""
        while True:
            self.at = self.after_spaces(self.at)
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ''


def _are_lines(begin: _Held, at: int, fields: Sequence[str], named: bool, json_named: bool) -> bool:
    """Whether a text whose first object begins at a place has a document a line."""
    while (end := begin.held.find('\n', at)) < 0 and begin.grow():
        pass
    end = len(begin.held) if end < 0 else end
    try:
        value = parsed(begin.held[at:end])
    except (ValueError, RecursionError):
        return False
    if begin.after_spaces(end) == len(begin.held):
        begin.grow()
    after = begin.after_spaces(end)
    alone, several = after == len(begin.held), begin.held.startswith('{', after)
    if any(field in value for field in fields):
        return named or json_named or alone or several
    return named and json_named and several


def _is_array(begin: _Held, at: int, fields: Sequence[str], named: bool) -> bool:
    """Whether an array whose first element begins at a place is one of documents."""
    if named or not begin.held.startswith('{', at):
        return begin.held.startswith('{', at)
    while True:
        try:
            return any(field in DECODER.raw_decode(begin.held, at)[0] for field in fields)
        except (ValueError, RecursionError):
            if not begin.grow():  # damaged: whoever reads it as an array says where
                return any(json.dumps(field) in begin.held for field in fields)


def objects(
    path: Path, kind: Kind, text: Iterator[str], rule: str, fields: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of `lines` or an `array`, each with its place as messages show it.

    `rule` says what each must be, and `fields` which of its fields are read: none of them may stand twice.
    """
    if kind == 'array':
        yield from _elements(path, text, rule)
        return
    quoted = [json.dumps(field) for field in fields]
    file = shown(path)
    for number, line in lines_of(text, file):
        name = f'{file}:{number}'
        yield name, _object(line, name, f'every line must be {rule}', quoted)


def _object(line: str, name: str, rule: str, quoted: Sequence[str]) -> dict[str, Any]:
    try:
        # Perhaps a field stands twice: then all is looked at, which takes twice as long.
        twice = any(line.count(field) > 1 for field in quoted)
        value = parsed(line) if twice else _at_once(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: not JSON ({_why(error)}); {rule}') from None
    if not isinstance(value, dict):
        raise UserError(f'{name}: JSON, but no object; {rule}')
    return value


def _at_once(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # of a number of thousands of digits too
        return parsed(line)


def _elements(path: Path, text: Iterator[str], rule: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of an array, which is held a piece at a time."""
    rule = f'the file must be an array, and every element {rule}'
    file, part, number, expected = shown(path), _Held(text), 0, '['
    while True:
        name = f'{file}[{number}]'
        letter = part.letter()
        if letter == ']' and (expected == ',' or number == 0):
            part.at += 1
            if part.letter():
                raise UserError(f'{file}: not JSON (more follows after its array); {rule}')
            return
        if letter != expected:
            what = f'{expected} expected, {letter!r} found' if letter else 'it ends before its array does'
            raise UserError(f'{name}: not JSON ({what}); {rule}')
        part.at += 1
        if part.letter() == ']' and expected == '[':
            continue
        while True:
            try:
                value, end = DECODER.raw_decode(part.held, part.at)
                break
            except (ValueError, RecursionError) as error:
                if len(part.held) - part.at > reading.LINE:
                    raise UserError(
                        f'{name}: not JSON, or a value of more than {reading.LINE:,} characters ({_why(error)}); {rule}'
                    ) from None
                if not part.more():  # twice as much each time, so that an element is not tried too often
                    raise UserError(f'{name}: not JSON ({_why(error)}); {rule}') from None
        if not isinstance(value, dict):
            raise UserError(f'{name}: JSON, but no object; {rule}')
        yield name, value
        part.at, number, expected = end, number + 1, ','


def _why(error: Exception) -> str:
    return 'nested too deeply' if isinstance(error, RecursionError) else shown(error, 100)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= 4000 else float('inf')


# No text is a number: one of thousands of digits, which Python's own reading refuses, is of no concern.
DECODER = json.JSONDecoder(parse_int=_whole, object_pairs_hook=unique)


def parsed(line: str) -> Any:
    """The value that a line of JSON holds. Raises ValueError or RecursionError."""
    return DECODER.decode(line)


def text_in(value: dict[str, Any], field: str, name: str, asked: str) -> str:
    """The text in a field of an object, which messages call `asked`."""
    if field not in value:
        raise UserError(f'{name}: no field {asked}{nearest(field, value)}')
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f'{name}: field {field!r} is {shown(repr(text)[:200], 40)}; it must be text')
    if (at := lone_surrogate(text)) is not None:
        raise UserError(f'{name}: field {field!r} has half of a surrogate pair at character {at}; leave it out')
    return text
