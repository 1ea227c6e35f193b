"""Markdown of the page: paragraphs, tables, numbers, and text of models, which may hold anything."""

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 128  # characters of a line


def prose(*paragraphs: str) -> str:
    """Paragraphs, their lines broken anew."""
    fill = lambda text: textwrap.fill(' '.join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
    return '\n\n'.join(map(fill, paragraphs))


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, columns of numbers but the first to the right."""
    cells = [list(map(str, row)) for row in rows]
    numbers = [all(re.match(r'[-−+]?\d', row[column]) for row in cells) for column in range(len(heading))]
    lines = [heading, ['---', *('---:' if number else '---' for number in numbers[1:])], *cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in lines)


def power(number: float) -> str:
    """A number with two digits and a power of ten where it is far from 1."""
    if number == 0 or 0.01 <= abs(number) < 1000:
        return f'{number:.2g}'
    exponent = math.floor(math.log10(abs(number)))
    digits = str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))
    return f'{number / 10**exponent:.1f} · 10{digits}'


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them."""
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def printable(text: str) -> str:
    """Text with all but line ends and what prints as escapes."""
    return ''.join(c if c == '\n' or c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def fence(text: str, least: int) -> str:
    """So many backticks that a text cannot end what they begin."""
    return '`' * max([least, *(len(run) + 1 for run in re.findall('`+', text))])


def fenced(text: str) -> str:
    """Text of a model as a block of code."""
    text = printable(text)
    return f'{fence(text, 3)}\n{text}\n{fence(text, 3)}'


def code(text: str) -> str:
    """Text of a model as code in a line or a cell of a table."""
    text = printable(text).replace('\n', '\\n').replace('|', '\\|')
    ticks = fence(text, 1)
    space = ' ' if text.startswith('`') or text.endswith('`') else ''
    return f'{ticks}{space}{text}{space}{ticks}' if text.strip() else f'`{text!r}`'
