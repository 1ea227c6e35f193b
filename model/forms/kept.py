"""What stands in a weight's place where `model.weights` asks for another form of it.

A weight is kept as [model, hidden], experts' as [experts, model, hidden]: the width of the model is its first dim in both
directions (model/linear.py), gathered over the axes that split it, and what `tensor` splits its last. Letters: B rows, T
sequence, I inputs, O outputs, E experts, H heads, K dims of a head, D model, F hidden units of this device, R rank.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from weft.model.parameters import Parameter, Role, Size
from weft.runtime.errors import UserError

Columns = Callable[[jax.Array], jax.Array]


class KeptWeight(nnx.Module):
    """A weight in another form; made of that weight's `Parameter` and the form's config.

    Attributes:
        out_first: the weight is kept as out × in, else in × out.
        gathered: the axes that split its model's dim.
        dim: that dim: 0, of experts' weights 1.
        learns: whether its numbers have a gradient where they can have one: not beside an adapter.
    """

    def __init__(self, weight: Parameter):
        self.out_first, self.gathered, self.dim = weight.out_first, weight.gathered, len(weight.shape) - 2
        self.learns = weight.role.learns

    @property
    def role(self) -> Role:
        """Of factors: they learn and decay as the weight does."""
        return (Role.EXPERT if self.dim else Role.MATRIX) if self.learns else Role.FROZEN

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The weight as numbers of the compute dtype: the model's dim whole, of the hidden dim what this device has."""
        raise NotImplementedError

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        """x W in another way than by the dense weight, before the sum over `tensor`; None: the dense weight is to be used.

        `columns` takes this device's outputs of a weight whose last dim they are, for keys and values of repeated heads.
        """
        return None

    def encode(self, w: jax.Array) -> None:
        """Takes the values of a weight, a global array, which may have a leading dim of layers."""
        raise UserError(f'{type(self).__name__} has no numbers of its own for a weight: scripts/compress.py finds them')


def heads_of(weight: Parameter) -> int:
    """Of a weight whose hidden units are heads side by side, how many heads; 0: they are not."""
    hidden = weight.shape[-1]
    found = weight.repeats or (hidden.units if isinstance(hidden, Size) else 1)
    return int(found) if found < hidden and weight.part.endswith('attention') else 0


def resized(size: int, new: int, units: int) -> int:
    """A dim that stands for another, which mesh axes split into so many units."""
    return Size(new, size.field, units) if isinstance(size, Size) else new


def layout_of(weight: Parameter) -> tuple[Any, ...]:
    """The mesh axes that split each dim."""
    return tuple(weight.layout) + (None,) * (len(weight.shape) - len(weight.layout))
