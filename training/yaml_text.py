"""YAML as configs use it: mappings, lists and scalars, each of which means what it looks like; all else is refused by its line.

Numbers are decimal, with `_` between digits where one likes (`1_000_000`); `true`, `false` and `null` are the only other words;
`010`, `1:30`, `yes` and dates are text. Every key stands once. There are no anchors, aliases, tags or second documents, so that
what is read is never larger than the text.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from weft.runtime.errors import UserError, shown

LARGEST = 1 << 18  # characters: a thousand times a usual config
DEEPEST = 32
SOME = '[0-9]+(?:_[0-9]+)*'  # digits; as in Python, what follows a `_` is one
INT = re.compile(f'[-+]?(0|(?!0){SOME})')
FLOAT = re.compile(rf'[-+]?({SOME}\.({SOME})?|\.{SOME}|{SOME}(?=[eE]))([eE][-+]?{SOME})?')
WORDS = {
    '': None, '~': None, 'null': None, 'Null': None, 'NULL': None, 'true': True, 'True': True, 'TRUE': True,
    'false': False, 'False': False, 'FALSE': False, '.inf': float('inf'), '-.inf': float('-inf'), '.nan': float('nan'),
}  # fmt: skip
DIGITS = 30  # of a whole number; any size is smaller


def scalar(text: str) -> Any:
    """What a plain scalar stands for. Raises ValueError for a number of more than DIGITS digits."""
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        if (digits := len(text.replace('_', ''))) > DIGITS:
            raise ValueError(f'a number of {digits:,} digits; at most {DIGITS} are read')
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


def read(text: str, source: str, resolve: Callable[[str], Any] = scalar) -> Any:
    """The value of a YAML text, plain scalars by `resolve`. Raises UserError of one line: `source`, and the text's line."""
    if len(text) > LARGEST:
        raise UserError(f'{source}: {len(text):,} characters; a config has at most {LARGEST:,}')
    try:
        return _value(yaml.parse(text, yaml.SafeLoader), source, resolve)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f'{source}: line {mark.line + 1}' if mark else source
        what = ', '.join(filter(None, (error.context, error.problem)))
        sign = any(word in what for word in ('token', 'alias', 'anchor'))
        hint = '; text with such a sign stands in quotes' if sign else ''
        raise UserError(f'{place}: not valid YAML: {shown(what)}{hint}') from None
    except yaml.YAMLError as error:  # a character that no YAML has
        what = f'character {getattr(error, "position", 0)} is {getattr(error, "character", 0):#04x}, which no text has'
        raise UserError(f'{source}: not valid YAML: {what}') from None


def dump(tree: Any) -> str:
    """A value as YAML; `read` gives it back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Text that would be read as something else stands in quotes."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        quoted = not isinstance(scalar(text), str)
    except ValueError:
        quoted = True
    # Other line ends would become spaces, but for escapes.
    style = '"' if not text.isprintable() else "'" if quoted else None
    return dumper.represent_scalar('tag:yaml.org,2002:str', text, style=style)


_Dumper.add_representer(str, _represent)


@dataclasses.dataclass
class _Open:
    """A mapping or list that is not complete."""

    value: Any
    key: str | None = None
    lines: dict[str, int] = dataclasses.field(default_factory=dict)  # where each key stands

    def add(self, value: Any, line: int, source: str) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        elif self.key is not None:
            self.value[self.key], self.key = value, None
        elif not isinstance(value, str):
            raise UserError(f'{source}: line {line}: key {shown(repr(value), 60)} is no text')
        elif value in self.lines:
            raise UserError(
                f'{source}: key {shown(value, 60, quoted=True)} stands on line {self.lines[value]} and on line {line}: '
                'leave one of them out'
            )
        else:
            self.key, self.lines[value] = value, line


def _value(events: Iterator[yaml.Event], source: str, resolve: Callable[[str], Any]) -> Any:
    whole = _Open([])
    stack = [whole]
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 0
        place = f'{source}: line {line}'
        if (anchor := getattr(event, 'anchor', None)) is not None:
            sign = '*' if isinstance(event, yaml.AliasEvent) else '&'
            raise UserError(
                f'{place}: {sign}{shown(anchor, 60)} would be YAML’s way to repeat a value, which is not read; text that '
                'begins with such a sign stands in quotes'
            )
        if (tag := getattr(event, 'tag', None)) is not None:
            raise UserError(f'{place}: tag {shown(tag, 60)} is not read; text that begins with ! stands in quotes')
        if isinstance(event, yaml.DocumentStartEvent) and whole.value:
            raise UserError(f'{place}: a second document begins; a config is one')
        if isinstance(event, yaml.ScalarEvent):
            try:
                found = resolve(event.value) if event.implicit[0] else event.value
            except ValueError as error:
                raise UserError(f'{place}: {error}') from None
            stack[-1].add(found, line, source)
        elif isinstance(event, yaml.CollectionStartEvent):
            made = _Open({} if isinstance(event, yaml.MappingStartEvent) else [])
            if stack[-1].key is None and isinstance(stack[-1].value, dict):
                raise UserError(f'{place}: a key must be text')
            stack[-1].add(made.value, line, source)
            stack.append(made)
            if len(stack) > DEEPEST:
                raise UserError(f'{place}: nested more than {DEEPEST} deep')
        elif isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
    return whole.value[0] if whole.value else None
