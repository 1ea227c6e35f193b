"""Weights of which some are 0, and stay so in training: what is 0 is no more a weight, and needs no mask beside it."""

from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from weft.model.forms.kept import KeptWeight
from weft.model.parameters import Parameter
from weft.model.parts.linear_forms import PrunedConfig
from weft.model.parts.registry import WEIGHTS
from weft.sharding.collectives import unshard


class PrunedWeight(KeptWeight):
    """The weight's numbers as they are; where one is 0 its gradient is."""

    def __init__(self, weight: Parameter, config: PrunedConfig):
        super().__init__(weight)
        self.w: nnx.Param[Any] = nnx.Param(weight)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        w = self.w[...]
        return unshard(w * lax.stop_gradient((w != 0).astype(w.dtype)), dtype, self.gathered, self.dim)

    def encode(self, w: jax.Array) -> None:
        self.w.set_value(w)


WEIGHTS.implement('pruned', PrunedWeight)
