"""The pictures of docs/history.md: PNG files, drawn from figures of pieces of work."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from weft.interpret.history.scaling import PowerLaw
from weft.storage import files as disk

Figures = Mapping[str, Any]
Sizes = Mapping[int, tuple[float, float]]  # by width or depth: parameters, bits per byte
# Tol's bright colours, which most people with any kind of colour blindness tell apart, and a dash for each curve.
STYLES = {
    'elman': ('#ccbb44', '-', 'Elman 1990'),
    'lstm': ('#228833', '-', 'LSTM 1997'),
    'decoder-2017': ('#66ccee', '-', 'decoder of 2017'),
    'dense': ('#4477aa', '-', 'dense of today'),
    'mixture': ('#aa3377', '-', 'mixture'),
}
GREY, RED = '#666666', '#ee6677'


def draw(path: Path, columns: int, paint: Callable[..., None], width: float = 8.0, height: float = 4.2) -> None:
    """A picture of so many panels side by side, which `paint` is given; whole or not there."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=110, squeeze=False)
    paint(*axes[0])
    for axis in axes[0]:
        axis.grid(alpha=0.2)
        axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format='png', metadata={'Software': None})
    plt.close(figure)
    disk.write(path, picture.getvalue())


def budgets(path: Path, found: Mapping[str, Figures]) -> None:
    """Bits per byte against seconds, FLOPs and parameters."""

    def paint(seconds: Axes, flops: Axes, parameters: Axes) -> None:
        for name, (colour, dash, label) in STYLES.items():
            figures = found[name]
            tokens, times, bits = np.array(figures['curve']).T
            seconds.plot(times, bits, dash, color=colour, label=label)
            flops.plot(tokens * figures['flops_per_token'], bits, dash, color=colour)
            parameters.plot(figures['parameters'], bits[-1], 'o', color=colour)
        orders = found['n-gram']['orders']
        for axis, what in ((seconds, 'seconds'), (parameters, 'parameters')):
            x, bits = ([one[key] for one in orders[1:]] for key in (what, 'bits_per_byte'))
            axis.plot(x, bits, 'x:', color=GREY, label='n-grams, orders 2 to 5')
            for one in orders[1:]:
                place = (one[what], one['bits_per_byte'])
                axis.annotate(str(one['order']), place, (4, 4), textcoords='offset points', color=GREY)
        best = found['n-gram']['bits_per_byte']
        flops.axhline(best, color=GREY, linestyle=':')
        flops.annotate(
            'n-grams: counting, no products', (0.03, best), xycoords=('axes fraction', 'data'), va='bottom', color=GREY
        )
        seconds.set(xscale='log', xlabel='seconds of training', ylabel='bits per byte, validation')
        flops.set(xscale='log', xlabel='FLOPs of training')
        parameters.set(xscale='log', xlabel='parameters; n-grams kept')
        seconds.legend(frameon=False, fontsize=8)
        top = max(orders[1]['bits_per_byte'], *(found[name]['curve'][0][-1] for name in STYLES))
        low = min(best, *(found[name]['bits_per_byte'] for name in STYLES))
        for axis in (seconds, flops, parameters):
            axis.set_ylim(low - 0.05, top + 0.1)

    draw(path, 3, paint, width=12)


def norms(path: Path, found: Mapping[str, Figures]) -> None:
    """Bits per byte against tokens for each norm."""

    def paint(axis: Axes) -> None:
        rows = (
            ('layer', '#4477aa', 'layer norm'),
            ('batch', RED, 'batch norm, running statistics'),
            ('none', GREY, 'no norm'),
        )
        for kind, colour, label in rows:
            tokens, _, bits = np.array(found[f'norm-{kind}']['curve']).T
            axis.plot(tokens, bits, 'o-', color=colour, markersize=3, label=label)
        batch = found['norm-batch']
        axis.plot(
            batch['tokens'], batch['bits_of_batch'], 'D', color=RED, mfc='none', label='batch norm, the batch’s own'
        )
        axis.set(xlabel='tokens', ylabel='bits per byte, validation')
        axis.legend(frameon=False)

    draw(path, 1, paint)


def gradients(path: Path, shares: Mapping[str, list[float]]) -> None:
    """The gradient's norm by distance, as a share of that of the last token."""

    def paint(axis: Axes) -> None:
        colours = {'elman': STYLES['elman'], 'lstm': STYLES['lstm'], 'dense decoder': STYLES['dense']}
        least = 1.0
        for name, by_distance in shares.items():
            net, _, state = name.partition(', ')
            colour, _, label = colours[net]
            share = np.array(by_distance)
            born = state == 'at birth'
            axis.plot(share, ':' if born else '-', color=colour, label=f'{label}{", at birth" if born else ""}')
            least = min(least, float(share[share > 0].min(initial=1.0)))
        axis.set(
            yscale='log',
            ylim=(max(least / 3, 1e-24), 3),
            xlabel='tokens back',
            ylabel='gradient, by that of the last token',
        )
        axis.legend(frameon=False, ncols=5, fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1))

    draw(path, 1, paint)


def scaling(path: Path, widths: Sizes, depths: Sizes, law: PowerLaw) -> None:
    """Bits per byte by parameters, of models of several widths and depths, and the fitted law."""

    def paint(axis: Axes) -> None:
        for points, colour, mark, what in ((widths, '#4477aa', 'o', 'wide'), (depths, RED, 's', 'layers')):
            size, bits = np.array(list(points.values())).T
            axis.plot(size, bits, mark, color=colour, mfc='none', label='widths' if what == 'wide' else 'depths')
            for label, place in points.items():
                below, text = what == 'layers', f'{label} {what}' if label > 1 else '1 layer'
                axis.annotate(text, place, (4, -12 if below else 6), textcoords='offset points', fontsize=8)
        sizes = [size for points in (widths, depths) for size, _ in points.values()]
        at = np.geomspace(min(sizes) / 1.3, max(sizes) * 2, 100)
        axis.plot(at, law(at), '-', color=GREY, label=f'{law.offset:.2f} + {law.factor:.3g} · N^−{law.exponent:.2f}')
        if law.offset > 0.7 * float(law(at).min()):  # else the points would be pressed together
            axis.axhline(law.offset, color=GREY, linestyle=':')
        axis.set(xscale='log', xlabel='parameters N', ylabel='bits per byte, validation')
        axis.legend(frameon=False)

    draw(path, 1, paint)
