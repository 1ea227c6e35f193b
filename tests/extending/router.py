"""A router: the cosine of token and expert, by a learnt temperature (Chi et al. 2022, arXiv:2204.09179).

Letters: B rows, T sequence, D model, E experts, K experts per token.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.layers.moe import MoE
from weft.model.parameters import Role, parameter
from weft.model.parts.feed_forward import MoEConfig
from weft.model.parts.registry import MIXTURES
from weft.sharding.collectives import upcast


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineConfig(MoEConfig):
    """`model: {moe: {kind: cosine, experts: 8, mlp_dim: 256}}`"""

    kind: Literal['cosine'] = 'cosine'


class CosineMoE(MoE):
    """The project's mixture but for who chooses; the balance of its load is a metric with a weight, and so a loss."""

    def __init__(self, c: ModelConfig):
        super().__init__(c)
        self.temperature_E = parameter((c.moe.experts,), P(None), Role.SCALE, value=10.0, part='router')

    def route(self, x_BTD, ctx: ForwardContext):
        m = self.config.moe
        unit = lambda a, dim: a * lax.rsqrt((a * a).sum(dim, keepdims=True) + 1e-6)
        router_DE = unit(upcast(self.router.kernel(self.router.weight.dtype)), 0)
        cosine_BTE = jnp.einsum('BTD,DE->BTE', unit(upcast(x_BTD), -1), router_DE, precision='highest')
        score_BTE = jax.nn.softmax(cosine_BTE * upcast(self.temperature_E[...])[None, None])
        gate_BTK, expert_BTK = lax.top_k(score_BTE, m.top_k)
        copies = 1 if ctx.sequence_split else lax.axis_size('tensor')  # devices that have these tokens, too
        squares = jnp.where(ctx.live_BT[..., None], score_BTE, 0) ** 2
        ctx.metric('router.balance_loss', m.experts * squares.sum() / copies, weight=m.balance_loss)
        return gate_BTK, expert_BTK


MIXTURES.register('cosine', CosineConfig, CosineMoE)
