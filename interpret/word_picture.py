"""Words as points of a plane, with labels that stand beside their points and on no other label.

Letters: N words, C places of a label, K boxes that are taken; a box is left, bottom, right, top in pixels.
"""

import io
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

# Paul Tol's bright colours, which the colour-blind tell apart; then the same with other marks.
COLOURS = ('#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee', '#aa3377', '#888888')
MARKS = 'osD^v'
DPI = 120
GAPS = (5, 11, 19, 29, 41)  # pixels from a point to its label, the nearest first
LEADER = 11  # from this gap on a line leads to the label
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a point, the usual ones first
POINT = 3.5  # half of a point's width in pixels, that labels keep clear of


class WordPicture(NamedTuple):
    """A picture (PNG), and the words whose labels found no free place near their points: these are points alone."""

    png: bytes
    unlabelled: list[str]


def draw_words(
    at_N2: np.ndarray,
    words: Sequence[str],
    title: str,
    axes: tuple[str, str],
    groups: Sequence[str] | None = None,
) -> WordPicture:
    """Words at these places; with `groups`, one for each word, in a colour and mark each.

    Earlier words have their labels placed first. `axes` names the two axes.
    """
    logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)
    side = float(np.clip(math.sqrt(len(words)) * 0.85, 6, 16))
    figure, plane = plt.subplots(figsize=(side * 1.3, side), dpi=DPI, layout='constrained')
    try:
        names = list(dict.fromkeys(groups)) if groups else ['']
        of_N = np.array([names.index(group) for group in groups]) if groups else np.zeros(len(words), int)
        for number, name in enumerate(names):
            mine, mark = of_N == number, MARKS[number // len(COLOURS) % len(MARKS)]
            x, y = at_N2[mine].T
            plane.scatter(x, y, s=16, color=COLOURS[number % len(COLOURS)], marker=mark, label=name or None)
        plane.margins(0.08)
        plane.set(title=title, xlabel=axes[0], ylabel=axes[1])
        plane.title.set_parse_math(False)
        plane.grid(alpha=0.2)
        plane.spines[['top', 'right']].set_visible(False)
        if groups and names != ['']:
            legend = figure.legend(loc='outside right upper', frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
        figure.canvas.draw()
        figure.set_layout_engine('none')  # nothing moves any more: places of labels are pixels
        unlabelled = _label(figure, plane, at_N2, words, [COLOURS[number % len(COLOURS)] for number in of_N])
        picture = io.BytesIO()
        figure.savefig(picture, format='png')
    finally:
        plt.close(figure)
    return WordPicture(picture.getvalue(), unlabelled)


def _label(figure: Any, plane: Any, at_N2: np.ndarray, words: Sequence[str], colours: Sequence[str]) -> list[str]:
    """Writes each word beside its point where there is room; gives those for which there was none."""
    renderer = figure.canvas.get_renderer()
    pixel_N2 = plane.transData.transform(at_N2)
    sizes = []
    for word in words:
        text = figure.text(0, 0, word, fontsize=8, parse_math=False)
        box = text.get_window_extent(renderer)
        sizes.append((box.width, box.height))
        text.remove()
    places = place_labels(pixel_N2, np.array(sizes), plane.bbox.extents)
    back = plane.transData.inverted()
    left_out = []
    for word, point_2, place, colour in zip(words, pixel_N2, places, colours, strict=True):
        if place is None:
            left_out.append(word)
            continue
        x, y = back.transform(place[:2])
        plane.text(x, y, word, fontsize=8, parse_math=False, ha='left', va='bottom', color='#222222')
        near_2 = np.clip(point_2, place[:2], place[2:])
        if np.hypot(*(near_2 - point_2)) >= LEADER:
            plane.plot(*back.transform([point_2, near_2]).T, color=colour, linewidth=0.5, alpha=0.6)
    return left_out


def place_labels(point_N2: np.ndarray, size_N2: np.ndarray, inside_4: np.ndarray) -> list[np.ndarray | None]:
    """Of each label the box [left, bottom, right, top] that it gets; None where no place beside its point is free.

    A place is free where it lies inside, and on no label that was placed before and no point. Nearer places go first.

    Args:
        point_N2: the points, in pixels.
        size_N2: width and height of each label.
        inside_4: the box in which all must stand.
    """
    taken_K4 = np.concatenate([point_N2 - POINT, point_N2 + POINT], 1)
    found = list[np.ndarray | None]()
    for point_2, size_2 in zip(point_N2, size_N2, strict=True):
        box_C4 = np.array([_beside(point_2, size_2, gap, side) for gap in GAPS for side in SIDES])
        fits_C = (box_C4[:, :2] >= inside_4[:2]).all(1) & (box_C4[:, 2:] <= inside_4[2:]).all(1)
        apart_CK = (box_C4[:, None, :2] >= taken_K4[None, :, 2:]) | (box_C4[:, None, 2:] <= taken_K4[None, :, :2])
        free_C = fits_C & np.all(np.any(apart_CK, axis=-1), axis=1)
        if not free_C.any():
            found.append(None)
            continue
        box_4 = box_C4[int(free_C.argmax())]
        found.append(box_4)
        taken_K4 = np.concatenate([taken_K4, box_4[None]])
    return found


def _beside(point_2: np.ndarray, size_2: np.ndarray, gap: float, side: tuple[int, int]) -> np.ndarray:
    """The box of a label on one side of a point: its nearest edge or corner is `gap` away on each axis that the side names."""
    toward_2 = np.array(side)
    low_2 = np.where(toward_2 > 0, point_2 + gap, np.where(toward_2 < 0, point_2 - gap - size_2, point_2 - size_2 / 2))
    return np.concatenate([low_2, low_2 + size_2])
