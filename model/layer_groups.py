"""What tells the layers of a stack apart, and how like ones are grouped to be scanned."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What tells one layer of a stack from another."""

    experts: bool = False  # a mixture of experts; else an MLP
    windowed: bool = False  # attention sees `window` tokens, and turns by `positions.local_theta`; else all of them
    forms: tuple[int, ...] = ()  # of `model.weights`, by number, those that name the layer
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
def group_layers(specs: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Splits the layers into repeated patterns to scan: fewest traced layers, then fewest scans, then the longest first scan.

    A dynamic program from the last layer back: the best split of the layers from `first` on is a group of some n layers and
    the best split of the layers after those. Vectors over n make it L steps of NumPy, for models of thousands of layers.
    """
    L = len(specs)
    number = {spec: i for i, spec in enumerate(dict.fromkeys(specs))}
    spec_L = np.array([number[spec] for spec in specs])
    # Of the best split of the layers from each one on: layers traced, groups, and the first group's pattern and layers.
    traced, groups, pattern, layers = np.zeros((4, L + 1), np.int64)
    same = np.zeros(L + 1, np.int64)  # [d]: so many layers from `first` on equal those d further on
    for first in reversed(range(L)):
        left = L - first
        same[1:left] = np.where(spec_L[first + 1 :] == spec_L[first], same[1:left] + 1, 0)
        patterns = _shortest_patterns(same[:left])
        # [n - 1], of a first group of n layers; the two costs in one number, for there are at most L groups.
        cost = (patterns[1:] + traced[first + 1 :]) * (L + 1) + 1 + groups[first + 1 :]
        n = left - int(np.argmin(cost[::-1]))  # the longest of those that cost the least
        traced[first], groups[first] = divmod(int(cost[n - 1]), L + 1)
        pattern[first], layers[first] = patterns[n], n
    found, first = list[LayerGroup](), 0
    while first < L:
        unit, n = int(pattern[first]), int(layers[first])
        found.append(LayerGroup(specs[first : first + unit], n // unit))
        first += n
    return tuple(found)


def _shortest_patterns(same: np.ndarray) -> np.ndarray:
    """[n]: the layers of the shortest pattern that the next n layers repeat a whole number of times, at worst n itself.

    `same[d]`: so many of the next layers equal those d further on. A pattern of d layers is then repeated by n layers where d
    divides n and n - d <= same[d].
    """
    left = len(same)
    shortest = np.arange(left + 1)
    repeated = 1 + np.flatnonzero(same[1:] >= shortest[1:left])  # patterns that stand there twice at least, ascending
    while len(repeated):
        d = repeated[0]
        multiples = slice(d, d + same[d] + 1, d)
        shortest[multiples] = np.minimum(shortest[multiples], d)
        repeated = repeated[1:][shortest[repeated[1:]] == repeated[1:]]  # others only repeat a shorter pattern
    return shortest
