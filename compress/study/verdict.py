"""What the rows of the study come to: curves, where they break, what wins at equal bits, and what a user should do.

Costs are those of perplexity on held-out text: 0.04 is 4 % more than the model as it was. Their intervals are of differences
token by token (compress/quality.py).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from weft.compress.planted import correlation_by_group
from weft.compress.study.cells import DELETED, ORIGINAL, SMALLER, Cell, of_settings
from weft.compress.study.rows import Row
from weft.interpret.intervals import Estimate

SAVED = (0.10, 0.25, 0.50, 0.75, 0.85)
HELD_OUT, DOCS = 'held-out', 'documentation'
BREAKS = 0.10  # of perplexity: where a curve passes it, its method counts as broken
ROUNDS = 0.005  # shares are told in whole percent, and so 0.2532 is what 75 % saved leaves
FAMILIES = {
    'rounding': ('int8', 'fp8', 'int4', 'gptq-int8', 'gptq-int4'),
    'rounded pairs': ('svd-int8', 'svd-int4'),
    'pairs': ('svd', 'svd-slices', 'svd-shared'),
    'tensors': ('tucker', 'tucker-hooi', 'cp', 'tensor-train'),
    'single weights': ('magnitude', 'wanda', 'wanda-2:4'),
    'parts': ('layers', 'experts', 'heads', 'hidden-units'),
}
FAMILY = {method: family for family, methods in FAMILIES.items() for method in methods}


class Point(NamedTuple):
    """A cell that was measured, with the figures that most of the page is made of."""

    cell: Cell
    share: float  # of all bits that are left
    cost: Estimate  # of perplexity on held-out text
    figures: dict[str, Any]

    @property
    def docs_cost(self) -> Estimate:
        """Of perplexity on documentation."""
        return Estimate(**self.figures['quality'][DOCS]['perplexity_cost'])

    @property
    def kl(self) -> Estimate:
        """To the original on held-out text, in nats a token."""
        return Estimate(**self.figures['quality'][HELD_OUT]['kl'])

    @property
    def cloze(self) -> Estimate:
        """Accuracy above the original's on held-out text."""
        return Estimate(**self.figures['quality'][HELD_OUT]['cloze_change'])

    @property
    def excess(self) -> float:
        """Nats a token above the original's."""
        return math.log1p(self.cost.value)


def points(rows: Iterable[Row]) -> list[Point]:
    """Of all rows whose quality is relative to an original."""
    found = []
    for row in rows:
        figures = row['figures']
        cost = figures.get('quality', {}).get(HELD_OUT, {}).get('perplexity_cost')
        if cost is not None:
            found.append(Point(of_settings(row['settings']), figures['share'], Estimate(**cost), figures))
    return found


def plain(found: Iterable[Point], model: str) -> list[Point]:
    """A model's compressions: without what was trained again, deleted, or trained smaller."""
    left_out = (ORIGINAL, DELETED, SMALLER)
    return [
        one
        for one in found
        if one.cell.model == model and one.cell.measured == 'quality' and one.cell.method not in left_out
    ]


def best(found: Iterable[Point], saved: float, family: str | None = None) -> Point | None:
    """Of points (of one family of methods) that save a share of the bits at least the one that costs the least."""
    fit = [
        one
        for one in found
        if one.share <= 1 - saved + ROUNDS and (family is None or FAMILY.get(one.cell.method) == family)
    ]
    return min(fit, key=lambda one: one.cost.value, default=None)


def advised(found: Iterable[Point], saved: float) -> Point | None:
    """What a user should do: of points that save enough, and are not surely worse than the best, the simplest method.

    Methods are as simple as their place in FAMILIES: rounding to nearest needs no calibration text, and decodes as it is.
    """
    fit = [one for one in found if one.share <= 1 - saved + ROUNDS]
    top = best(fit, saved)
    if top is None:
        return None
    alike = [one for one in fit if one.cost.low <= top.cost.high and one.cell.method in FAMILY]
    order = list(FAMILY)
    return min(alike, key=lambda one: (order.index(one.cell.method), one.cost.value))


def curve(found: Iterable[Point], like: Cell) -> list[Point]:
    """The points that differ from a cell in the budget alone, most bits first."""
    of = [one for one in found if dataclasses.replace(one.cell, budget=like.budget) == like]
    return sorted(of, key=lambda one: -one.share)


class Break(NamedTuple):
    """The share of bits at which a curve passes BREAKS."""

    share: float
    within: str  # '': between two points; '<': not even the last point; '>': already the first


def breaks(of: Sequence[Point]) -> Break | None:
    """Where a curve, most bits first, passes BREAKS for the first time; between points the cost is taken as a power of e."""
    if not of:
        return None
    if of[0].cost.value > BREAKS:
        return Break(of[0].share, '>')
    for one, other in itertools.pairwise(of):
        if other.cost.value > BREAKS:
            # Nats above the original, in logarithms: costs span orders of magnitude.
            low, high, at = (
                math.log(max(math.log1p(cost), 1e-4)) for cost in (one.cost.value, other.cost.value, BREAKS)
            )
            return Break(one.share + (other.share - one.share) * (at - low) / (high - low), '')
    return Break(of[-1].share, '<')


class Duel(NamedTuple):
    """Two cells that differ in one thing."""

    one: Point
    other: Point

    @property
    def gain(self) -> float:
        """Of the first's nats above the original the share that the second does without; below 0 the second is worse."""
        return 1 - self.other.excess / self.one.excess if self.one.excess > 0 else 0.0

    @property
    def sure(self) -> bool:
        """Whether the intervals of both costs are apart."""
        return self.one.cost.low > self.other.cost.high or self.other.cost.low > self.one.cost.high


def duels(found: Iterable[Point], field: str, one: Any, other: Any) -> list[Duel]:
    """All pairs of cells of which one has a value of a field and the other another, all else equal."""
    by_cell = {point.cell: point for point in found}
    return [
        Duel(point, by_cell[there])
        for cell, point in by_cell.items()
        if getattr(cell, field) == one and (there := dataclasses.replace(cell, **{field: other})) in by_cell
    ]


class Score(NamedTuple):
    """How often one side wins."""

    wins: int
    losses: int
    open: int  # intervals overlap


def score(of: Iterable[Duel]) -> Score:
    """How often the second of each pair is surely better, surely worse, neither."""
    wins = losses = undecided = 0
    for duel in of:
        if not duel.sure:
            undecided += 1
        elif duel.other.cost.value < duel.one.cost.value:
            wins += 1
        else:
            losses += 1
    return Score(wins, losses, undecided)


def tensors_against_pairs(found: Sequence[Point]) -> list[Duel]:
    """For each cell of a tensor form the pairs (`svd`) of the same model, maps, spread and budget.

    Trains do not weigh inputs, so both kinds of pairs are held to them: the plain ones, which minimise the same error, and the
    whitened ones, which a user has.
    """
    by_cell = {one.cell: one for one in found}
    result = []
    for cell, point in by_cell.items():
        if FAMILY.get(cell.method) != 'tensors' or cell.budget is None:
            continue
        pair = dataclasses.replace(cell, method='svd', order=3)
        if pair in by_cell:
            result.append(Duel(by_cell[pair], point))
    return result


def correlations(found: Iterable[Point]) -> dict[str, Estimate]:
    """Spearman's correlation of what is known before a model is run with the nats that it costs; methods are drawn anew.

    Of cells that compress all maps alike, of all models.
    """
    some = [
        one
        for one in found
        if one.cell.maps == 'all' and one.cell.spread == 'uniform' and one.figures.get('error_of_outputs') is not None
    ]
    if len(some) < 8:
        return {}
    methods = sorted({(one.cell.model, one.cell.method) for one in some})
    groups = [methods.index((one.cell.model, one.cell.method)) for one in some]
    cost = [one.excess for one in some]
    measures = {
        'bits saved': [1 - one.share for one in some],
        'error of weights': [one.figures['error_of_weights'] for one in some],
        'error of outputs': [one.figures['error_of_outputs'] for one in some],
    }
    return {name: correlation_by_group(values, cost, groups) for name, values in measures.items()}


class Gains(NamedTuple):
    """What sharing was predicted to gain over pairs on real matrices, and what it gains."""

    kind: str
    model: str
    stacks: int
    won: int  # stacks on which some form that shares beats pairs by more than 1 % of the error
    real: list[float]  # log(error of pairs / error of the best form that shares)
    tucker: list[float]  # log(error of pairs / error of Tucker's form)
    tucker_predicted: list[float]
    tucker_beyond: list[float]  # what Tucker's form gains over the better of the two shared bases

    @property
    def tucker_won(self) -> int:
        """Stacks on which Tucker's form beats both bases and pairs by more than 1 % of the error."""
        return sum(
            beyond > 0.01 and best - 0.01 > 0 for beyond, best in zip(self.tucker_beyond, self.real, strict=True)
        )


def gains(rows: Iterable[Row], budget: float) -> list[Gains]:
    """Of each model's heads and experts at a budget."""
    found = []
    for row in rows:
        for kind in ('heads', 'experts'):
            of = [one for one in row['figures'].get('gains', []) if one['kind'] == kind and one['budget'] == budget]
            if of:
                real = [max(one['real'].values()) for one in of]
                tucker, predicted = ([one[what]['tucker'] for one in of] for what in ('real', 'predicted'))
                model = row['settings']['model']
                bases = [max(one['real']['shared_in'], one['real']['shared_out']) for one in of]
                beyond = [one['real']['tucker'] - base for one, base in zip(of, bases, strict=True)]
                won = sum(value > 0.01 for value in real)
                found.append(Gains(kind, model, len(of), won, real, tucker, predicted, beyond))
    return found


def gain_correlation(rows: Iterable[Row]) -> Estimate | None:
    """Spearman's, of predicted and real gains of Tucker's form on all stacks of all models at all budgets.

    Layers of a model are drawn anew as a whole.
    """
    real, predicted, groups = list[float](), list[float](), list[int]()
    number: dict[tuple[str, int], int] = {}
    for row in rows:
        for one in row['figures'].get('gains', []):
            real.append(one['real']['tucker'])
            predicted.append(one['predicted']['tucker'])
            groups.append(number.setdefault((row['settings']['model'], one['layer']), len(number)))
    return correlation_by_group(predicted, real, groups) if len(real) >= 8 else None
