"""loss.png: a run's losses by step, and the last value above them."""

import io
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from weft.storage import files as disk

MOST_POINTS = 4000  # of a curve, that the legend looks out for


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss by step, and with experts the largest share of each step below."""
    routed = [row for row in rows if 'router.max_share' in row]
    ratios, height = ([3, 1], 6.5) if routed else ([1], 4.5)
    figure, axes = plt.subplots(
        len(ratios), 1, figsize=(8, height), dpi=120, sharex=True, squeeze=False, height_ratios=ratios
    )
    loss = axes[0, 0]
    loss.plot(*curve(rows, 'loss'), color='#4477aa', linewidth=1, label='training')
    steps, values = curve(rows, 'validation_loss')
    if steps:
        loss.plot(steps, values, 'o-', color='#ee6677', markersize=4, label='validation')
        if math.isfinite(values[-1]):
            bits = curve(rows, 'validation_bits_per_byte')[1][-1]
            title += f'\nvalidation: {values[-1]:.3f} nats = {bits:.3f} bits/byte'
    loss.set(title=title, ylabel='loss, nats a token')
    if routed:
        axes[1, 0].plot(*curve(rows, 'router.max_share'), color='#228833', linewidth=1)
        axes[1, 0].axhline(1 / routed[-1]['experts'], color='gray', linestyle=':', linewidth=1)
        axes[1, 0].set(ylabel='largest share\nof an expert', ylim=(0, None))
    axes[-1, 0].set_xlabel('step')
    for axis in axes[:, 0]:
        axis.grid(alpha=0.2)
        axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    loss.legend(frameon=False, loc='upper right' if len(rows) > MOST_POINTS else 'best')
    picture = io.BytesIO()
    figure.savefig(picture, format='png')
    plt.close(figure)
    disk.write(path, picture.getvalue())


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps of the rows that have a figure of this name, and the figures."""
    having = [row for row in rows if name in row]
    return [row['step'] for row in having], [row[name] for row in having]
