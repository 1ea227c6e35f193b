"""Two texts side by side: which tokens stand for the same, and from which layer on their vectors part.

Letters: L layers, T tokens of a text, D model, A aligned pairs.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.interpret.xray.contributions import cosine

PARTED = 0.9  # cosine below which two vectors are said to have parted

Pair = tuple[int | None, int | None]


class Comparison(NamedTuple):
    """Of two texts."""

    pairs: list[Pair]  # places in the first and in the second text, in their order; None: the other has no counterpart
    cosine_LA: np.ndarray  # float32 [L + 1, A]: of the residual stream; 0 for a token without a counterpart
    parted: list[int | None]  # of each pair of the same token the first row from which on the cosine was below PARTED


def align(one: Sequence[int], other: Sequence[int]) -> list[Pair]:
    """Pairs of places of two texts: the same tokens in the same order, and what stands between them, one for one."""
    pairs: list[Pair] = []
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    for _, begin, end, begin2, end2 in matcher.get_opcodes():
        for step in range(max(end - begin, end2 - begin2)):
            here, there = begin + step, begin2 + step
            pairs.append((here if here < end else None, there if there < end2 else None))
    return pairs


def compare(ids: tuple[Sequence[int], Sequence[int]], residual: tuple[np.ndarray, np.ndarray]) -> Comparison:
    """Of two texts' ids and residual streams [L + 1, T, D]."""
    pairs = align(*ids)
    cosine_LA = np.zeros((len(residual[0]), len(pairs)), np.float32)
    parted = list[int | None]()
    for at, (here, there) in enumerate(pairs):
        if here is None or there is None:
            parted.append(None)
            continue
        cosine_LA[:, at] = cosine(residual[0][:, here], residual[1][:, there])
        below = np.flatnonzero(cosine_LA[:, at] < PARTED)
        same = ids[0][here] == ids[1][there]
        parted.append(int(below[0]) if same and len(below) else None)
    return Comparison(pairs, cosine_LA, parted)


def differing(ids: tuple[Sequence[int], Sequence[int]], most: int) -> list[int]:
    """Places of two texts of the same length at which patching is worth its time: where they differ, what follows, the last.

    At most `most`, the earliest first, the last one always among them.
    """
    count = len(ids[0])
    places = [at for at in range(count) if ids[0][at] != ids[1][at]]
    wanted = dict.fromkeys([*places, *(at + 1 for at in places if at + 1 < count), count - 1])
    return sorted([*[at for at in wanted if at != count - 1][: most - 1], count - 1])


def answers(log_one_V: np.ndarray, log_other_V: np.ndarray) -> tuple[int, int]:
    """What each of two texts says next: its likeliest token or, where that is the same, what it says more than the other.

    The latter of the ten likeliest of both.
    """
    first, second = int(log_one_V.argmax()), int(log_other_V.argmax())
    if first != second:
        return first, second
    some = np.unique(np.concatenate([np.argsort(-one, kind='stable')[:10] for one in (log_one_V, log_other_V)]))
    more = log_one_V[some] - log_other_V[some]
    return int(some[more.argmax()]), int(some[more.argmin()])
