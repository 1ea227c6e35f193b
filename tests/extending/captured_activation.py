"""A captured activation: the hidden units of an MLP, and a metric of them, from a layer that offers both.

Letters: B rows, T sequence, D model, F hidden units of this device.
"""

import dataclasses
from typing import Literal

from jax import P

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.layers.mlp import Mlp, activation
from weft.model.parts.feed_forward import MLPConfig
from weft.model.parts.registry import FEED_FORWARDS
from weft.sharding.mesh import BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedConfig(MLPConfig):
    """`model: {mlp: {kind: watched, dim: 1024, activation: relu}}`"""

    kind: Literal['watched'] = 'watched'


class WatchedMlp(Mlp):
    """An ungated MLP that says which share of its hidden units is 0, and offers them all."""

    def __init__(self, c: ModelConfig):
        super().__init__(c)

    def __call__(self, x_BTD, ctx: ForwardContext):
        h_BTF = activation(self.config)(self.up(ctx.gather_sequence(x_BTD)))
        h_BTF = ctx.tap('hidden_units', h_BTF, P(BATCH, 'context', 'tensor'))
        idle_BTF = (h_BTF == 0) & (ctx.segment_BT > 0)[..., None]
        ctx.metric('mlp.idle_share', idle_BTF.sum() / self.config.mlp.dim)
        return self.down(h_BTF, ctx.reduce_scatter_sequence)


FEED_FORWARDS.register('watched', WatchedConfig, WatchedMlp)
