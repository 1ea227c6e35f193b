"""loss.png: a run's losses by step, with the last value written where no curve is."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox, BboxBase

from weft.storage import files as disk

PLACES = 25  # across and up, at which a label is tried
NEAR = 14  # points from what it names: no line leads there
HEADROOM = 0.15  # of the axes, added where no place is free
MOST_POINTS = 4000  # of a curve, that a label looks out for


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
    legend = loss.legend(frameon=False, loc='upper right' if len(rows) > MOST_POINTS else 'best')
    if steps and math.isfinite(values[-1]):
        note = f'{values[-1]:.3f} nats = {curve(rows, "validation_bits_per_byte")[1][-1]:.3f} bits/byte'
        label(loss, note, (steps[-1], values[-1]), legend)
    picture = io.BytesIO()
    figure.savefig(picture, format='png')
    plt.close(figure)
    disk.write(path, picture.getvalue())


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps of the rows that have a figure of this name, and the figures."""
    having = [row for row in rows if name in row]
    return [row['step'] for row in having], [row[name] for row in having]


def label(axes: Axes, text: str, point: tuple[float, float], legend: Artist) -> None:
    """Writes a text near a point, clear of curves and legend: the axes grow where there is no room, a line shows the point."""
    unit = axes.figure.dpi / 72  # pixels of a point
    note = axes.annotate(text, point, xytext=(0, 0), textcoords='offset points')
    for _ in range(2):
        covered, far, box = freest(axes, note.get_window_extent(), point, legend.get_window_extent(), 4 * unit)
        if not covered:
            break
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + HEADROOM * (high - low))
    x, y = axes.transData.transform(point)
    note.set_position(((box.x0 - x) / unit, (box.y0 - y) / unit))
    if far > NEAR * unit:
        end = (min(max(x, box.x0), box.x1) - x) / unit, ((box.y1 if box.y1 < y else box.y0) - y) / unit
        line = {'arrowstyle': '-', 'color': 'gray', 'linewidth': 0.7, 'shrinkA': 0}
        axes.annotate('', point, xytext=end, textcoords='offset points', arrowprops=line)


def freest(
    axes: Axes, size: BboxBase, point: tuple[float, float], taken: BboxBase, margin: float
) -> tuple[float, float, Bbox]:
    """The place of a text that covers the least, then the nearest to a point: points covered, distance, and the box."""
    x, y = axes.transData.transform(point)
    room = axes.bbox.padded(-margin)
    path = np.concatenate([dense(axes.transData.transform(np.asarray(line.get_xydata()))) for line in axes.lines])
    found = []
    for across, up in itertools.product(np.linspace(0, 1, PLACES), repeat=2):
        left, low = room.x0 + across * (room.width - size.width), room.y0 + up * (room.height - size.height)
        box = Bbox.from_bounds(left, low, size.width, size.height)
        around = box.padded(margin)
        covered = around.count_contains(path) + (len(path) if around.overlaps(taken) else 0)
        far = math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
        found.append((float(covered), far, box))
    return min(found, key=lambda place: place[:2])


def dense(line: np.ndarray) -> np.ndarray:
    """Points of a line in pixels, none much further than a text is high from the next; what is no number is left out."""
    line = line[np.isfinite(line).all(axis=1)]
    line = line[:: max(1, len(line) // MOST_POINTS)]
    many = np.maximum(1, np.ceil(np.linalg.norm(np.diff(line, axis=0), axis=1) / 4)).astype(int)
    parts = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(line, line[1:], many, strict=False)]
    return np.concatenate([*parts, line[-1:]])
