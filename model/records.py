"""What layers say of themselves while they run: metrics, which are summed over all devices, and taps, which are captured.

A layer calls `ctx.metric(name, …)` or `ctx.tap(name, …)` (model/context.py). Each call of a layer has `Records` of its own,
made and read while JAX traces it: the loop over layers returns them stacked. What nobody asks for is not recorded, and leaves
nothing in the program.

Letters: L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.sharding.mesh import BATCH, SEQUENCE

BETWEEN_BLOCKS = P(BATCH, SEQUENCE)  # rows and the sequence are split as in the activations that go from block to block
Report = Callable[[jax.Array], dict[str, jax.Array]]


def static(**default: Any) -> Any:
    """A field that is part of the tree's structure, as it is known while JAX traces."""
    return dataclasses.field(metadata={'static': True}, **default)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A sum over a batch, of one layer or, with a leading dim L, of all layers that have it."""

    total: jax.Array  # this device's share, or the whole sum once it is added up over all mesh axes
    per: Literal['tokens', 'rows'] = static()  # what the sum is divided by: real tokens, or rows that have one
    weight: float = static()  # in the training objective
    report: Report | None = static()  # what is logged, from the quotients [L, …]; None: their mean

    def quotient(self, counts: dict[str, jax.Array]) -> jax.Array:
        """The sum by what it is divided by: [L, …]."""
        return self.total / jnp.maximum(counts[self.per], 1)

    def loss(self, counts: dict[str, jax.Array]) -> jax.Array:
        """What it adds to the objective: its weight · the mean over layers of the quotients."""
        return self.weight * self.total.mean() / jnp.maximum(counts[self.per], 1)

    def logged(self, name: str, counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What metrics.jsonl has of it."""
        quotient = self.quotient(counts)
        return self.report(quotient) if self.report else {name: quotient.mean()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """This device's part of an activation of one layer or, with a leading dim L, of all layers that have it."""

    value: jax.Array
    layout: P = static()  # of one layer's: the mesh axes that split each dim
    copies: int = static(default=1)  # so many neighbours along the axis of dim 2 have the same part of it
    real: int | None = static(default=None)  # numbers of the last dim, all devices together, before padding; None: all
    layers: tuple[int, ...] | None = static(
        default=None
    )  # numbers of the layers in the leading dim, where there is one


class Records(NamedTuple):
    """What one layer says of itself, or several layers, stacked."""

    metrics: dict[str, Metric]
    taps: dict[str, Tap]


def join(found: Sequence[Records], numbers: Sequence[Sequence[int]] = ()) -> Records:
    """Of each name the layers of several groups as one, group after group.

    With `numbers`, those of each group's layers, taps are in the order of the layers.
    """

    def concatenated(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        def joined(name: str) -> Any:
            having = (part[name] for part in parts if name in part)
            return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *having)

        return {name: joined(name) for name in sorted({name for part in parts for name in part})}

    taps = concatenated([one.taps for one in found])
    if numbers:
        for name, tap in taps.items():
            have = [layers for one, layers in zip(found, numbers, strict=True) if name in one.taps]
            order = np.argsort(np.concatenate(have))
            if (np.diff(order) != 1).any():
                tap = dataclasses.replace(tap, value=tap.value[order])
            taps[name] = dataclasses.replace(tap, layers=tuple(sorted(number for layers in have for number in layers)))
    return Records(concatenated([one.metrics for one in found]), taps)
