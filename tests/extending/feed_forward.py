"""A feed-forward layer: squared ReLU (So et al. 2021, arXiv:2109.08668), with a learnt scale for each hidden unit.

Letters: B rows, T sequence, D model, F hidden units of this device.
"""

import dataclasses
from typing import Literal

import jax
from flax import nnx
from jax import P

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.layers.mlp import Mlp
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import Role, Size, parameter
from weft.model.parts.feed_forward import MLPConfig
from weft.model.parts.registry import FEED_FORWARDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredReluConfig(MLPConfig):
    """`model: {mlp: {kind: squared_relu, dim: 1024}}`"""

    kind: Literal['squared_relu'] = 'squared_relu'
    activation: Literal['relu'] = 'relu'


class SquaredRelu(nnx.Module):
    """Hidden units are split over `tensor`, and so is what belongs to each of them."""

    def __init__(self, c: ModelConfig):
        D, F = Size(c.model_dim, 'model.model_dim'), Size(c.mlp.dim, 'model.mlp.dim')
        self.up, self.down = Linear(D, F, part='mlp'), TransposedLinear(F, D, part='mlp')
        self.scale_F = parameter((F,), P('tensor'), Role.SCALE, value=1.0, part='mlp')

    costs = staticmethod(Mlp.costs)  # of a plain MLP: two products

    def __call__(self, x_BTD, ctx: ForwardContext):
        h_BTF = jax.nn.relu(self.up(ctx.gather_sequence(x_BTD))) ** 2
        return self.down(h_BTF * self.scale_F.astype(h_BTF.dtype)[None, None], ctx.reduce_scatter_sequence)


FEED_FORWARDS.register('squared_relu', SquaredReluConfig, SquaredRelu)
