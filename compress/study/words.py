"""Words of docs/compression.md: names of methods and cells, figures with their intervals, and what sections look up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from weft.compress.study.cells import DELETED, ORIGINAL, SMALLER, TRAINED_HERE, Cell
from weft.compress.study.rows import Row
from weft.compress.study.verdict import Point, plain
from weft.interpret.intervals import Estimate

NAMES = {
    'svd': 'SVD',
    'svd-slices': 'SVD of each head',
    'svd-shared': 'shared basis',
    'svd-int8': 'SVD in int8',
    'svd-int4': 'SVD in int4',
    'tucker': 'Tucker',
    'tucker-hooi': 'Tucker, HOOI',
    'cp': 'CP',
    'tensor-train': 'tensor train',
    'magnitude': 'magnitude',
    'wanda': 'Wanda',
    'wanda-2:4': 'Wanda 2:4',
    'layers': 'layers dropped',
    'experts': 'experts dropped (REAP)',
    'heads': 'heads dropped',
    'hidden-units': 'hidden units dropped',
    'int8': 'int8',
    'fp8': 'fp8',
    'int4': 'int4',
    'gptq-int8': 'int8, GPTQ',
    'gptq-int4': 'int4, GPTQ',
    ORIGINAL: 'as it was',
    DELETED: 'layers deleted',
    SMALLER: 'trained smaller',
}
NO = '–'


class Found(NamedTuple):
    """What the page is made of."""

    rows: Sequence[Row]
    points: Sequence[Point]
    folder: Path  # of pictures
    root: str  # the project's, from the page

    def model(self, name: str) -> list[Point]:
        """A model's compressions."""
        return plain(self.points, name)

    @property
    def models(self) -> list[str]:
        """That were trained here, and have rows."""
        return [name for name in TRAINED_HERE if self.model(name)]


def percent(value: float, digits: int = 1) -> str:
    """Such as `+6.3 %`; large ones without digits."""
    digits = digits if abs(value) < 1 else 0
    text = f'{100 * value:+,.{digits}f}'
    return '0 %' if float(text.replace(',', '')) == 0 else f'{text} %'.replace('-', '−')


def interval(of: Estimate) -> str:
    """Such as `+6.3 % [+5.9, +6.8]`."""
    digits = 2 if abs(of.value) < 0.01 else 1 if abs(of.value) < 1 else 0
    low, high = (f'{100 * end:+,.{digits}f}'.replace('-', '−') for end in (of.low, of.high))
    return f'{percent(of.value, digits)} [{low}, {high}]'


def number(value: float, digits: int = 2) -> str:
    """Plain, with a minus sign that is one, and no zero that is below zero."""
    text = f'{value:.{digits}f}'
    return text.removeprefix('-') if float(text) == 0 else text.replace('-', '−')


def share(value: float) -> str:
    """Of bits."""
    return f'{100 * value:.1f} %'


def said(cell: Cell) -> str:
    """A cell in words, without model and budget."""
    words = [NAMES[cell.method]]
    if cell.method in ('svd', 'tucker', 'cp', 'svd-shared') and cell.objective == 'frobenius':
        words.append('plain')
    if cell.method == 'tensor-train' and cell.order != 3:
        words.append(f'order {cell.order}')
    if cell.spread != 'uniform':
        words.append({'middle': 'middle layers', 'sensitivity': 'by sensitivity'}[cell.spread])
    if cell.maps in ('attention', 'experts'):
        words.append(f'{cell.maps} alone')
    if cell.group != 32:
        words.append(f'groups of {cell.group}')
    return ', '.join(words)


def told(one: Point | None) -> str:
    """A point's cost, or a dash."""
    return NO if one is None else interval(one.cost)


def at(found: Sequence[Point], cell: Cell) -> Point | None:
    """The point of a cell."""
    return next((one for one in found if one.cell == cell), None)


def figures_of(found: Found, cell: Cell) -> dict[str, Any] | None:
    """A row's figures, of cells that have no point."""
    return next((row['figures'] for row in found.rows if row['cell'] == cell.name), None)
