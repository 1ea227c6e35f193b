"""What the document and its paper say, each held to the rows: confirmed, contradicted, or neither, and because of what."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from weft.compress.study.cells import DELETED, ORIGINAL, PAPER_RANK, TRAINED_HERE, Cell
from weft.compress.study.rows import Row
from weft.compress.study.verdict import (
    FAMILIES,
    HELD_OUT,
    Point,
    duels,
    gains,
    plain,
    score,
    tensors_against_pairs,
)
from weft.compress.study.words import at, interval
from weft.interpret.intervals import Estimate

FREE = 0.05  # of perplexity: what a 4-bit model may cost to count as near the original
SHARES = 0.25  # above chance, of the way to the most: what counts as sharing


def paper_cell(layers: int) -> Cell:
    """The paper's recipe on so many layers."""
    return Cell(
        'dense', 'tensor-train', spread='middle', layers=layers, order=12, rank=PAPER_RANK, objective='frobenius'
    )


class Claim(NamedTuple):
    """A row of the page."""

    claim: str
    here: str
    because: str


Judge = Callable[[Sequence[Row], Sequence[Point]], Claim | None]


def claims(rows: Sequence[Row], found: Sequence[Point]) -> list[Claim]:
    """Those of which there are rows."""
    judges: tuple[Judge, ...] = (
        matrices_win,
        shared_subspaces,
        whitening_matters,
        four_bits,
        recipe_is_deletion,
        attention_saves_little,
        mixtures_are_harder,
        recovery_is_not_enough,
        outliers_matter,
    )
    return [claim for judge in judges if (claim := judge(rows, found)) is not None]


def matrices_win(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """The paper's main result."""
    every = [duel for name in TRAINED_HERE for duel in tensors_against_pairs(plain(found, name))]
    if not every:
        return None
    wins, losses, undecided = score(every)
    here = 'confirmed' if wins == 0 and losses else 'contradicted' if wins > losses else 'mostly so'
    if not wins and not losses:
        here = 'undecided'
    return Claim(
        'paper: tensor formats do not outperform matrix formats at equal bits',
        here,
        f'of {len(every)} comparisons with SVD at equal bits the tensor form is surely better in {wins}, surely worse in '
        f'{losses}, and neither in {undecided}',
    )


def shared_subspaces(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """The document's cause."""
    above: dict[str, list[float]] = {}
    for row in rows:
        for one in row['figures'].get('stacks', []):
            if one['kind'] == 'layers' and not reads_residual(one):
                continue
            above.setdefault(one['kind'], []).append(one['above_chance']['value'])
    if not above:
        return None
    share = {kind: float(np.mean(values)) for kind, values in above.items()}
    sharing = [kind for kind, value in share.items() if value >= SHARES]
    here = (
        'confirmed'
        if not sharing
        else 'contradicted'
        if len(sharing) == len(share)
        else f'not of {" and ".join(sharing)}'
    )
    means = ', '.join(f'{kind} {value:.2f}' for kind, value in share.items())
    won = [f'{one.won} of {one.stacks} stacks of {one.kind} in {one.model}' for one in gains(rows, 0.5)]
    beside = (
        f'; at half of a stack’s bits a form that shares beats a pair for each slice on {", ".join(won)}' if won else ''
    )
    return Claim(
        'document: heads, layers and experts do not share subspaces',
        here,
        f'on the residual stream’s side they share more than chance by (0 at chance, 1 at what spectra allow): {means}; from '
        f'{SHARES} on it counts as sharing{beside}',
    )


def reads_residual(stack: dict[str, object]) -> bool:
    """Whether a side of a stack of layers is the residual stream's."""
    writes = str(stack['map']).endswith(('.o', '.down'))
    return (stack['side'] == 'out') == writes


def whitening_matters(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """The paper's theory: the Frobenius norm is the wrong one."""
    of = [
        one
        for one in duels(found, 'objective', 'frobenius', 'whitened')
        if one.one.cell.method in ('svd', 'tucker', 'cp')
    ]
    if not of:
        return None
    wins, losses, undecided = score(of)
    return Claim(
        'paper: the Frobenius norm does not see what a model needs',
        'confirmed' if wins > losses + undecided else 'not shown',
        f'whitened by the inputs a form is surely better in {wins} of {len(of)} pairs of cells, surely worse in {losses}; '
        f'it saves {100 * float(np.median([one.gain for one in of])):.0f} % of the lost nats (median)',
    )


def four_bits(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """Rounding to nearest."""
    of = {name: one for name in TRAINED_HERE if (one := at(found, Cell(name, 'int4')))}
    if not of:
        return None
    told = '; '.join(f'{name} {interval(one.cost)} at {100 * one.share:.1f} % of the bits' for name, one in of.items())
    worst = max(one.cost.value for one in of.values())
    return Claim(
        'paper: 4 bits by rounding to nearest are close to the original',
        'confirmed' if worst < FREE else 'contradicted',
        f'int4 in groups of 32: {told}',
    )


def recipe_is_deletion(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """What the paper's curve measures."""
    told, worse, better = [], 0, 0
    for layers in (1, 2, 3, 4):
        train = at(
            found,
            Cell(
                'dense',
                'tensor-train',
                spread='middle',
                layers=layers,
                order=12,
                rank=PAPER_RANK,
                objective='frobenius',
            ),
        )
        gone = at(found, Cell('dense', DELETED, spread='middle', layers=layers))
        if train and gone:
            told.append(f'{layers}: {interval(train.cost)} against {interval(gone.cost)}')
            worse += train.cost.low > gone.cost.high
            better += train.cost.high < gone.cost.low
    if not told:
        return None
    same = len(told) - worse - better
    here = (
        'it is that of deleted layers'
        if same == len(told)
        else f'surely worse than deletion at {worse}, better at {better}'
    )
    return Claim(
        'paper: perplexity against bits saved is a curve of tensor trains',
        here,
        f'trains that keep as little as the paper’s, against the same layers deleted: {"; ".join(told)}',
    )


def attention_saves_little(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """Attention alone."""
    of = [
        one
        for one in plain(found, 'dense')
        if one.cell.maps == 'attention' and one.cell.budget == 0.85 and one.cell.method in FAMILIES['tensors']
    ]
    whole = [one for one in plain(found, 'dense') if one.cell == Cell('dense', 'svd', 0.75)]
    if not of or not whole:
        return None
    best = min(of, key=lambda one: one.cost.value)
    here = 'confirmed' if best.cost.value < whole[0].cost.value else 'contradicted'
    return Claim(
        'paper: compressing attention alone preserves perplexity and saves little',
        'contradicted: there is a better use of the bits' if here == 'contradicted' else here,
        f'the best tensor form of attention saves {100 * (1 - best.share):.0f} % at {interval(best.cost)}; whitened pairs of '
        f'all maps save {100 * (1 - whole[0].share):.0f} % at {interval(whole[0].cost)}',
    )


def mixtures_are_harder(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """Mixtures of experts."""
    harder = easier = total = 0
    told = []
    for name in ('mixture-8', 'mixture-32'):
        for budget in (0.9, 0.75, 0.5, 0.25):
            one, other = at(found, Cell('dense', 'svd', budget)), at(found, Cell(name, 'svd', budget))
            if one and other:
                total += 1
                harder += other.cost.low > one.cost.high
                easier += other.cost.high < one.cost.low
                if budget == 0.5:
                    told.append(f'{name} {interval(other.cost)} beside {interval(one.cost)}')
    if not total:
        return None
    here = 'confirmed' if harder > total / 2 else 'contradicted' if easier > total / 2 else 'undecided'
    return Claim(
        'paper: mixtures of experts are harder to compress',
        here,
        f'with pairs at equal shares of the bits surely harder in {harder} and surely easier in {easier} of {total} '
        f'comparisons; at half of the bits: {"; ".join(told)}',
    )


def recovery_is_not_enough(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """A short training afterwards."""
    base = at(found, Cell('dense', ORIGINAL, measured='recovered'))
    of = [
        one
        for one in found
        if one.cell.model == 'dense' and one.cell.measured == 'recovered' and one.cell.method in FAMILIES['tensors']
    ]
    if base is None or not of:
        return None
    told = []
    reached = 0
    for one in of:
        before = Estimate(**one.figures['before'][HELD_OUT]['perplexity_cost'])
        reached += one.cost.low <= base.cost.high
        told.append(f'{one.cell.method} at {100 * one.share:.0f} %: {interval(before)} to {interval(one.cost)}')
    return Claim(
        'paper: training afterwards is necessary, and not sufficient beyond 15 % of the bits',
        'contradicted'
        if reached == len(of)
        else 'confirmed'
        if not reached
        else f'so of {len(of) - reached} of {len(of)}',
        f'{"; ".join(told)}; the original after the same training: {interval(base.cost)}',
    )


def outliers_matter(rows: Sequence[Row], found: Sequence[Point]) -> Claim | None:
    """Super weights."""
    told = []
    strong = 0
    for row in rows:
        one = row['figures'].get('outliers')
        if one is not None:
            lost = one['without'] - one['before']
            strong += lost > 0.1
            told.append(f'{row["settings"]["model"]} {lost:+.4f} nats without its {one["count"]}')
    if not told:
        return None
    return Claim(
        'paper: few outlier weights carry much of a model',
        'confirmed' if strong == len(told) else 'not in models of this size' if not strong else 'of some',
        '; '.join(told),
    )
