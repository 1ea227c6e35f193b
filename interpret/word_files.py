"""Files of words in sections: `: NAME` begins a section, and the lines after it are its own, as in word2vec's questions.

Analogies have four words a line; lists of words any number. The format is that of word2vec's questions-words.txt.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from weft.data.reading import joined, lines_of, pieces
from weft.runtime.errors import UserError, nearest, shown

MOST = 1 << 26  # characters of a file: all of its words are held


class Section(NamedTuple):
    """A section's name, and the words of each of its lines."""

    name: str
    items: list[tuple[str, ...]]


def read_questions(option: str, path: str, wanted: Sequence[str] = ()) -> list[Section]:
    """The sections of a file of analogies, or those that are wanted; every line has four words.

    `option` names the file in messages. Raises UserError for a file that cannot be read, a line of other than four words, a
    question before the first section, and a section that is not there.
    """
    name = f'{option} {shown(path)}'
    found: dict[str, Section] = {}
    for where, section, words in _lines(option, path, name):
        if len(words) != 4:
            rule = 'a question has four, such as "Athens Greece Oslo Norway"'
            raise UserError(f'{where}: {len(words)} word{"s" * (len(words) != 1)}; {rule}')
        if section is None:
            raise UserError(f'{where}: a question before the first section; begin it with a line ": NAME"')
        found.setdefault(section, Section(section, [])).items.append(words)
    return _chosen(found, wanted, name, 'questions')


def read_words(option: str, path: str, wanted: Sequence[str] = ()) -> list[Section]:
    """The sections of a file of words, or those that are wanted; words before the first section are in one without a name.

    Each item is one word. Raises UserError for a file that cannot be read or has no words, and for a section that is not
    there.
    """
    name = f'{option} {shown(path)}'
    found: dict[str, Section] = {}
    for _, section, words in _lines(option, path, name):
        found.setdefault(section or '', Section(section or '', [])).items.extend((word,) for word in words)
    return _chosen(found, wanted, name, 'words')


def _lines(option: str, path: str, name: str) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
    """Of each line that begins no section: where it stands, its section (None before the first), its words."""
    section = None
    text = joined(pieces(Path(path), f'{option} ', streams=True), name, MOST)
    for number, line in lines_of(iter([text]), name):
        words = tuple(line.split())
        if not words[0].startswith(':'):
            yield f'{name}:{number}', section, words
            continue
        section = ' '.join(words).removeprefix(':').strip()
        if not section:
            raise UserError(f'{name}:{number}: a section without a name; write ": NAME"')


def _chosen(found: Mapping[str, Section], wanted: Sequence[str], name: str, what: str) -> list[Section]:
    for one in wanted:
        if one not in found:
            raise UserError(f'--section {shown(one)}: {name} has no such section with {what}{nearest(one, found)}')
    if not found:
        raise UserError(f'{name}: has no {what}')
    return [section for one, section in found.items() if not wanted or one in wanted]
