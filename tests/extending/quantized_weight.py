"""A quantised weight: matrices that are rounded to 8 bits as they are used, and learn as if they were not.

Straight-through gradients: Bengio et al. 2013, arXiv:1308.3432.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from weft.model.forms.kept import KeptWeight
from weft.model.parameters import Parameter
from weft.model.parts.linear_forms import LinearForm
from weft.model.parts.registry import WEIGHTS
from weft.sharding.collectives import unshard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Config(LinearForm):
    """`model: {weights: [{kind: int8_aware, targets: [mlp.*]}]}`"""

    kind: Literal['int8_aware'] = 'int8_aware'


def rounded(w, dim: int):
    """w as int8 with one scale along `dim`, and back; its gradient is that of w."""
    scale = jnp.maximum(abs(w).max(dim, keepdims=True), 1e-8) / 127
    return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)


class Int8Weight(KeptWeight):
    """A scale for each output of a map that is kept as in × out, for each hidden unit of one that maps back.

    Those are the last dim, along which all numbers of a scale are here once the weight is gathered.
    """

    def __init__(self, weight: Parameter, config: Int8Config):
        super().__init__(weight)
        self.w = nnx.Param(weight)

    def dense(self, dtype):
        """The weight as the map uses it."""
        return rounded(unshard(self.w[...], dtype, self.gathered, self.dim), -2)

    def encode(self, w):
        """Takes a weight's values."""
        self.w.set_value(w)


WEIGHTS.register('int8_aware', Int8Config, Int8Weight)
