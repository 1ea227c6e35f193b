"""The pictures of docs/compression.md: PNG files, drawn from rows; legible at 1,400 and at 400 pixels of width."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from weft.compress.study.cells import DELETED, Cell
from weft.compress.study.rows import Row
from weft.compress.study.verdict import BREAKS, Point, curve, gains, plain
from weft.storage import files as disk

# Tol's bright and muted colours, which most people with any kind of colour blindness tell apart; a mark for each curve.
CURVES = (
    ('svd', 'whitened', '#4477aa', 'o-', 'SVD, whitened'),
    ('svd', 'frobenius', '#4477aa', 'o:', 'SVD, plain'),
    ('tucker', 'whitened', '#ee6677', 's-', 'Tucker, whitened'),
    ('cp', 'whitened', '#aa3377', 'v-', 'CP, whitened'),
    ('tensor-train', 'whitened', '#ccbb44', 'D-', 'tensor train'),
    ('wanda', 'whitened', '#228833', '^-', 'Wanda'),
    ('layers', 'whitened', '#666666', 'x-', 'layers dropped'),
    ('hidden-units', 'whitened', '#666666', '+:', 'hidden units dropped'),
    ('svd-int4', 'whitened', '#66ccee', 'P-', 'SVD in int4'),
)
POINTS = (
    ('int8', '#000000', '*', 'int8'),
    ('int4', '#000000', 'p', 'int4'),
    ('wanda-2:4', '#228833', '>', 'Wanda 2:4'),
)
MODELS = {'dense': '#4477aa', 'mixture-8': '#ee6677', 'mixture-32': '#228833'}
LEAST, MOST = 1e-3, 100.0  # of costs that are drawn: below and above there is the edge
TEXT = 13  # points: 8 pixels where the picture is 400 wide


def draw(path: Path, paint: Callable[..., None], columns: int = 1, height: float = 5.6) -> None:
    """A picture of so many panels side by side, which `paint` is given; whole or not there."""
    with plt.rc_context({'font.size': TEXT, 'axes.linewidth': 0.8}):
        figure, axes = plt.subplots(1, columns, figsize=(7.0, height), dpi=150, squeeze=False)
        paint(*axes[0])
        for axis in axes[0]:
            axis.grid(alpha=0.25)
            axis.spines[['top', 'right']].set_visible(False)
        figure.tight_layout()
        picture = io.BytesIO()
        figure.savefig(picture, format='png', metadata={'Software': None})
        plt.close(figure)
    disk.write(path, picture.getvalue())


def costs(axis: Axes) -> None:
    """Axes of cost against share: both logarithmic, in percent, and the line at which curves count as broken."""
    percent = FuncFormatter(lambda value, _: f'{100 * value:,g} %')
    axis.set(xscale='log', yscale='log', xlabel='bits that are left', ylabel='perplexity above the original')
    axis.set_ylim(LEAST * 0.8, None)
    axis.xaxis.set_major_formatter(percent)
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ''))
    axis.yaxis.set_major_formatter(percent)
    axis.set_xticks([0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1])
    axis.axhline(BREAKS, color='#666666', linewidth=0.8, linestyle='--')


def legend(axis: Axes, **how: Any) -> None:
    """Of what has been drawn, if anything."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, **how)


def below(axis: Axes) -> None:
    """A legend of many curves under the axis, where it covers none."""
    legend(
        axis,
        ncols=2,
        fontsize=12.5,
        loc='upper center',
        bbox_to_anchor=(0.44, -0.13),
        handlelength=1.6,
        columnspacing=1,
    )


def line(axis: Axes, of: Sequence[Point], colour: str, style: str, label: str) -> None:
    """A curve with its intervals."""
    if not of:
        return
    share = [one.share for one in of]
    cost = np.clip([one.cost.value for one in of], LEAST, MOST)
    low, high = (np.clip([getattr(one.cost, end) for one in of], LEAST, MOST) for end in ('low', 'high'))
    axis.plot(share, cost, style, color=colour, label=label, markersize=6, linewidth=1.6)
    axis.vlines(share, low, high, color=colour, linewidth=1.2)


def curves(path: Path, found: Iterable[Point]) -> None:
    """Of the dense model, each method's cost against the bits that it leaves."""
    of = [one for one in plain(found, 'dense') if one.cell.maps == 'all' and one.cell.group == 32]

    def paint(axis: Axes) -> None:
        for method, objective, colour, style, label in CURVES:
            like = Cell('dense', method, 0.5, objective=objective)  # type: ignore[arg-type]
            line(axis, curve(of, like), colour, style, label)
        for method, colour, mark, label in POINTS:
            line(axis, [one for one in of if one.cell == Cell('dense', method)], colour, mark, label)
        costs(axis)
        below(axis)

    draw(path, paint, height=7.4)


def models(path: Path, found: Sequence[Point]) -> None:
    """The dense model beside the mixtures: whitened pairs and int4 of all three."""

    def paint(axis: Axes) -> None:
        for model, colour in MODELS.items():
            of = plain(found, model)
            line(axis, curve(of, Cell(model, 'svd', 0.5)), colour, 'o-', f'{model}, SVD')
            line(axis, [one for one in of if one.cell == Cell(model, 'int4')], colour, 'p', f'{model}, int4')
            line(axis, curve(of, Cell(model, 'layers', 0.5)), colour, 'x:', f'{model}, layers')
        costs(axis)
        below(axis)

    draw(path, paint, height=6.8)


def calibration(path: Path, found: Sequence[Point]) -> None:
    """The paper's recipe in kind, the same layers deleted, and the same layers in int4."""
    what = (
        ('tensor-train', '#ccbb44', 'D-', 'tensor trains of order 12'),
        (DELETED, '#666666', 'x-', 'the same layers deleted'),
        ('int4', '#000000', 'p-', 'the same layers in int4'),
    )

    def paint(axis: Axes) -> None:
        for method, colour, style, label in what:
            of = [one for one in found if one.cell.method == method and one.cell.layers and one.cell.model == 'dense']
            line(axis, sorted(of, key=lambda one: -one.share), colour, style, label)
        costs(axis)
        axis.set(xscale='linear', xlim=(0.5, 1.01))
        axis.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{100 * value:g} %'))
        legend(axis, fontsize=12)

    draw(path, paint, height=4.8)


def sharing(path: Path, rows: Sequence[Row], budget: float) -> None:
    """Predicted gain of Tucker's form over pairs against the real one: a point a stack of heads or of experts."""
    marks = {'heads': 'o', 'experts': 's'}

    def paint(axis: Axes) -> None:
        ends = [0.0]
        for one in gains(rows, budget):
            colour = MODELS.get(one.model, '#666666')
            label = f'{one.kind} of {one.model}'
            axis.plot(
                one.tucker_predicted, one.tucker, marks[one.kind], color=colour, mfc='none', markersize=6, label=label
            )
            ends += [*one.tucker_predicted, *one.tucker]
        low, high = min(ends) - 0.02, max(ends) + 0.02
        axis.plot([low, high], [low, high], '-', color='#bbbbbb', linewidth=0.8)
        axis.axhline(0, color='#666666', linewidth=0.8, linestyle='--')
        axis.set(xlabel='predicted log gain of Tucker’s form', ylabel='measured', xlim=(low, high), ylim=(low, high))
        legend(axis, fontsize=11)

    draw(path, paint, height=5.4)
