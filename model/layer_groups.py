"""What tells the layers of a stack apart, and how like ones are grouped to be scanned."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What tells one layer of a stack from another."""

    experts: bool = False  # a mixture of experts; else an MLP
    windowed: bool = False  # attention sees `window` tokens, and turns by `local_rope_theta`; else all of them
    turned: bool = True  # where positions are rotary: queries and keys turn; else the layer knows no positions


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers in a row that repeat one sequence of kinds: what one scan goes over."""

    specs: tuple[LayerSpec, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.specs) * self.repeats


@functools.cache
def group_layers(kinds: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Kinds in a row as repeated units: the fewest kinds written down, of those the fewest runs, of those the first longest."""
    L = len(kinds)
    number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    kind_L = np.array([number[kind] for kind in kinds])
    # Of the layers from each on: the kinds written down, the runs, and the first run's unit and length.
    written, runs, unit_of, length_of = np.zeros((4, L + 1), np.int64)
    alike = np.zeros(L + 1, np.int64)  # by a distance: how many layers from here on equal those so far behind
    for first in reversed(range(L)):
        left = L - first
        alike[1:left] = np.where(kind_L[first + 1 :] == kind_L[first], alike[1:left] + 1, 0)
        unit = np.arange(left + 1)  # by a run's length: the shortest unit that it repeats
        repeated = 1 + np.flatnonzero(alike[1:left] >= unit[1:left])
        while len(repeated):
            shortest = repeated[0]
            lengths = slice(shortest, shortest + alike[shortest] + 1, shortest)
            unit[lengths] = np.minimum(unit[lengths], shortest)
            repeated = repeated[1:][unit[repeated[1:]] == repeated[1:]]  # others repeat what is repeated already
        cost = (written[first + 1 :] + unit[1:]) * (L + 1) + runs[first + 1 :] + 1
        length = left - int(np.argmin(cost[::-1]))  # the longest of those that cost the least
        written[first], runs[first] = divmod(int(cost[length - 1]), L + 1)
        unit_of[first], length_of[first] = unit[length], length
    found, at = list[LayerGroup](), 0
    while at < L:
        length = int(length_of[at])
        found.append(LayerGroup(kinds[at : at + int(unit_of[at])], length // int(unit_of[at])))
        at += length
    return tuple(found)
