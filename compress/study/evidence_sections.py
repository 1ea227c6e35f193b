"""Sections of docs/compression.md on what matrices say before anything is compressed: sharing, and what predicts a cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.compress.study import plots
from weft.compress.study.verdict import correlations, gain_correlation, gains
from weft.compress.study.words import Found, number
from weft.interpret.history.markdown import listed, prose, table

GAINS_AT = 0.5  # of a stack's bits


def sharing_section(found: Found) -> list[str]:
    """What heads, layers and experts share."""
    rows, ranks, outliers = [], [], []
    for row in found.rows:
        model, figures = row['settings']['model'], row['figures']
        for one in figures.get('stacks', []):
            side = {'in': 'inputs', 'out': 'outputs'}[one['side']]
            rows.append(
                (
                    model,
                    f'{one["kind"]}: {one["map"]}' + (f', {side}' if one['kind'] == 'layers' else ''),
                    *(
                        number(one[field]['value'])
                        for field in ('energy', 'chance', 'most', 'above_chance', 'cosine', 'cosine_of_chance')
                    ),
                )
            )
        ranks += [
            (model, one['map'], f'{one["value"]:.1f} [{one["low"]:.1f}, {one["high"]:.1f}]', one['singular_values'])
            for one in figures.get('stable_ranks', [])
        ]
        if (one := figures.get('outliers')) is not None:
            base = one['before']
            outliers.append(
                (
                    model,
                    one['count'],
                    *(number(value - base, 5) for value in (one['without'], one['random']['value'], one['largest'])),
                )
            )
    if not rows:
        return []
    return [
        '## Do heads, experts and layers share subspaces?',
        prose(
            """One basis of a quarter of the dims for all slices of a stack: the share of their energy that the best one holds,
            beside stacks with the same singular values and random singular vectors (chance), and beside the most that the
            spectra allow. `above` is 0 at chance and 1 at the most. The last two columns are the mean cos² of the principal
            angles between leading subspaces, and that of random ones. Of heads and experts it is the model's side."""
        ),
        table(('model', 'stack', 'held', 'chance', 'most', 'above', 'cos²', 'by chance'), rows),
        prose(sharing_words(rows)),
        prose(
            """Stable ranks, ‖W‖² / ‖W‖₂², means over layers and experts, beside how many singular values there are:"""
        ),
        table(('model', 'map', 'stable rank', 'of'), ranks),
        prose(
            """Outlier weights: nats a token of calibration text that are lost without the few weights of the highest |w|·‖x‖
            (arXiv:2411.07191), beside as many random ones of the same maps and as many of the largest:"""
        ),
        table(('model', 'weights set to 0', 'outliers', 'random', 'largest'), outliers),
    ]


def sharing_words(rows: Sequence[tuple[Any, ...]]) -> str:
    """Which kinds of stacks share more than chance has it."""
    found = []
    for kind in ('heads', 'experts', 'layers'):
        above = [float(row[5].replace('−', '-')) for row in rows if str(row[1]).startswith(kind)]
        if above:
            found.append(
                f'{kind} {number(float(np.mean(above)))} (from {number(min(above))} to {number(max(above))}, {len(above)} rows)'
            )
    return f'Above chance on average: {listed(found)}.'


def measure_section(found: Found) -> list[str]:
    """Which measure predicts it."""
    known = correlations(found.points)
    rows = [(name, of.text().replace('-', '−'), of.of) for name, of in known.items()]
    plots.sharing(found.folder / 'sharing.png', found.rows, GAINS_AT)
    whole = gain_correlation(found.rows)
    by_stack = []
    for one in gains(found.rows, GAINS_AT):
        by_stack.append(
            (
                one.model,
                one.kind,
                one.stacks,
                one.won,
                number(float(np.mean(one.real)), 3),
                number(float(np.mean(one.tucker_beyond)), 3),
                one.tucker_won,
            )
        )
    blocks = ['## Which measure predicts it?']
    if rows:
        blocks += [
            prose(
                """Spearman's rank correlation with the nats that a cell costs, over all cells that compress all maps alike, of
                all models; methods are drawn anew as a whole:"""
            ),
            table(('known before the model is run', 'rank correlation', 'cells'), rows),
        ]
    if by_stack:
        blocks += [
            f'![Predicted and measured gains]({found.folder.name}/sharing.png)',
            prose(
                f"""What sharing gains at {100 * GAINS_AT:.0f} % of a stack's bits, in log error of the Frobenius norm over a
                pair for each slice (0.1: an error smaller by a tenth), the best of a basis for inputs, one for outputs and
                Tucker's form. A basis that heads share on the model’s side is the SVD of the whole matrix. `Tucker beyond` is
                what Tucker’s form gains over the better of the two shared bases; where its best ranks leave slices and units
                whole it is such a basis itself, and gains nothing beyond:"""
            ),
            table(('model', 'slices', 'stacks', 'sharing wins', 'mean gain', 'Tucker beyond', 'Tucker wins'), by_stack),
        ]
    if whole is not None:
        blocks.append(
            prose(
                f"""Predicted from singular values alone ([`predicted_gain`]({found.root}/compress/diagnosis.py)) and measured
                gain of Tucker's form, over all maps of all models at two budgets: rank correlation {whole.text()}
                ({whole.of} values). For shared bases the prediction is a theorem. On stacks in which sharing is planted, to a
                known degree, forms that share win where they should ([`planted`]({found.root}/compress/planted.py),
                `pytest tests/compress/test_planted.py`)."""
            )
        )
    return blocks if len(blocks) > 1 else []
