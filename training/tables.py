"""Tables for a terminal of any width: words are folded, numbers stand whole, rows become lines where columns have no room."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

TIE = '\xa0'  # a space at which no line is broken
GAP = 2  # cells between columns
INDENT = 2  # cells before what belongs to a row that became lines


@dataclasses.dataclass
class Fitted:
    """A table of plain text as wide as there is room. Columns that are not `no_wrap` are words, which may be folded."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        t = self.table
        widths = fitting(t, options.max_width)
        if widths is None:
            yield from as_lines(t, options.max_width)
            return
        title = Text(str(t.title)) if t.title else None
        folded = Table(title=title, title_justify=t.title_justify, pad_edge=False, box=None)
        cells = [
            [Text('\n'.join(wrapped(cell, width))) for cell in column]
            for column, width in zip(cells_of(t), widths, strict=True)
        ]
        for column, (head, *_), width in zip(t.columns, cells, widths, strict=True):
            folded.add_column(head, justify=column.justify, no_wrap=True, width=width)
        for row, parts in zip(t.rows, zip(*[column[1:] for column in cells], strict=True), strict=True):
            folded.add_row(*parts, end_section=row.end_section)
        yield folded


def fitting(table: Table, room: int) -> list[int] | None:
    """Widths of the columns with which a table has room; None where words can be folded no further."""
    cells = cells_of(table)
    widths = [max(map(cell_len, column)) for column in cells]
    least = [
        width if column.no_wrap else max(cell_len(word) for cell in texts for word in cell.split(' '))
        for column, texts, width in zip(table.columns, cells, widths, strict=True)
    ]
    room -= GAP * (len(widths) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:  # the widest that can be folded gives way
        place = max((n for n in range(len(widths)) if widths[n] > least[n]), key=lambda n: widths[n])
        widths[place] -= 1
    return widths


def as_lines(table: Table, room: int) -> Iterator[Text]:
    """Each row's first cell, and below it a line for each other cell that is not empty, with its column's name."""
    if table.title:
        yield Text(str(table.title), style='table.title')
    heads, *rows = zip(*cells_of(table), strict=True)
    for row in rows:
        for line in wrapped(row[0], room):
            yield Text(line)
        for head, cell in zip(heads[1:], row[1:], strict=True):
            for line in wrapped(f'{head}: {cell}' if head else cell, room - INDENT) if cell else ():
                yield Text(' ' * INDENT + line)


def wrapped(text: str, room: int) -> list[str]:
    """Text in lines of at most so many cells, broken between words that fit; a number keeps its unit."""
    lines = textwrap.wrap(bound(text), max(1, room), break_on_hyphens=False)
    return [line.replace(TIE, ' ') for line in lines] or ['']


def bound(text: str) -> str:
    """Text in which no line ends between a number and its unit."""
    return re.sub(r'(?<=\d) (?=[A-Za-z%])', TIE, text)


def cells_of(table: Table) -> list[list[str]]:
    """Of each column its head and its cells."""
    return [[bound(str(cell)) for cell in (column.header, *column.cells)] for column in table.columns]
