"""The meshes that a model and a batch can be laid out on, and the numbers of devices that such meshes have."""

import itertools
import math
from collections.abc import Iterable, Iterator

from weft.model.config import ModelConfig
from weft.model.sizes import batch_sizes, sizes
from weft.sharding.mesh import AXES, Divides, MeshConfig
from weft.training.config import RunConfig

MOST_CHIPS = 2**18  # of a plan: no machine has more
TRIED = 200  # numbers of devices, the nearest first, of which one with a mesh is looked for


def meshes(run: RunConfig, chips: int) -> Iterator[MeshConfig]:
    """Meshes of so many devices that divide the model and the batch."""
    return meshes_of(run.model, chips, batch_sizes(run.training.batch, run.training.sequence_length))


def meshes_of(c: ModelConfig, chips: int, more: Iterable[Divides]) -> Iterator[MeshConfig]:
    """Meshes that divide a model and keep more rules. A dense model's `expert` is `data` by another name."""
    rules = rules_of(c, more)
    alone = {axis: [rule for rule in rules if rule.axes == (axis,)] for axis in AXES}
    allowed = {
        axis: [n for n in divisors(chips) if all(rule.holds(MeshConfig(**{axis: n})) for rule in alone[axis])]
        for axis in AXES
    }
    for shape in _shapes(chips, [allowed[axis] for axis in AXES]):
        mesh = MeshConfig(**dict(zip(AXES, shape, strict=True)))
        if all(rule.holds(mesh) for rule in rules):
            yield mesh


def _shapes(chips: int, allowed: list[list[int]]) -> Iterator[tuple[int, ...]]:
    if len(allowed) == 1:
        if chips in allowed[0]:
            yield (chips,)
        return
    for first in allowed[0]:
        if chips % first == 0:
            yield from ((first, *rest) for rest in _shapes(chips // first, allowed[1:]))


def divisors(n: int) -> list[int]:
    """Of n, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def rules_of(c: ModelConfig, more: Iterable[Divides]) -> list[Divides]:
    """What a mesh must divide to hold a model, and more."""
    return [*sizes(c), *more, *([] if c.moe else [Divides(('expert',), 'the one expert', 1)])]


def counts_of(c: ModelConfig, more: Iterable[Divides]) -> list[int]:
    """Numbers of devices, ascending, that a mesh of the model may have; what several axes must divide together, not all keep.

    Along an axis that divides nothing they are powers of two.
    """
    rules, found = rules_of(c, more), {1}
    for axis in AXES:
        limits = [rule.size for rule in rules if axis in rule.axes and not rule.or_repeats]
        lengths = divisors(math.gcd(*limits)) if limits else [2**power for power in range(MOST_CHIPS.bit_length())]
        found = {n * length for n, length in itertools.product(found, lengths) if n * length <= MOST_CHIPS}
    return sorted(found)


def nearest_count(run: RunConfig, chips: int) -> int:
    """The number of chips nearest to `chips` that some mesh has; 1 where none is near."""
    counts = counts_of(run.model, batch_sizes(run.training.batch, run.training.sequence_length))
    near = sorted(counts, key=lambda n: (abs(n - chips), n))[:TRIED]
    return next((n for n in near if next(meshes(run, n), None)), 1)
