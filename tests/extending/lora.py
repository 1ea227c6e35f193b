"""A LoRA adapter (Hu et al. 2021, arXiv:2106.09685) beside queries and values, whose own maps learn no more.

Letters: B rows, T sequence, I inputs, O outputs, R rank.
"""

import dataclasses
from typing import Literal

from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.layers.attention import Attention
from weft.model.linear import Linear, linear
from weft.model.parameters import Role, parameter
from weft.model.parts.attention import AttentionConfig
from weft.model.parts.registry import MIXERS
from weft.sharding.collectives import unshard
from weft.sharding.mesh import FSDP, Divides


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedConfig(AttentionConfig):
    """`model: {attention: {kind: adapted, heads: 8, rank: 4}}`"""

    kind: Literal['adapted'] = 'adapted'
    rank: int = 4
    alpha: float = 8.0


class Adapted(nnx.Module):
    """Takes the place of a linear map W, which has no gradient any more: x W + x A B · alpha / rank. At first B is 0."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        declared = base.weight.get_value()
        base.weight.set_value(dataclasses.replace(declared, role=Role.FROZEN))
        self.base, self.scale = base, alpha / rank
        self.a_IR = parameter(
            (declared.shape[0], rank), P(FSDP, None), Role.MATRIX, scale=rank**-0.5, gathered=FSDP, part='adapters'
        )
        self.b_RO = parameter((rank, declared.shape[1]), P(None, 'tensor'), Role.MATRIX, part='adapters')

    def __call__(self, x_BTI):
        a_IR = unshard(self.a_IR[...], x_BTI.dtype)
        w_IO = lax.stop_gradient(self.base.kernel(x_BTI.dtype))
        y_BTO = linear(x_BTI, w_IO) + linear(linear(x_BTI, a_IR), self.b_RO.astype(x_BTI.dtype)) * self.scale
        return y_BTO + self.base.bias(x_BTI.dtype)[None, None] if self.base.biased else y_BTO


class AdaptedAttention(Attention):
    @staticmethod
    def rules(c: ModelConfig) -> list[Divides]:  # heads of values are not repeated
        return [*Attention.rules(c), Divides(('tensor',), 'model.attention.kv_heads', c.attention.kv_heads)]

    def __init__(self, c: ModelConfig, kind: LayerSpec):
        super().__init__(c, kind)
        self.q = Adapted(self.q, c.attention.rank, c.attention.alpha)
        self.v = Adapted(self.v, c.attention.rank, c.attention.alpha)


MIXERS.register('adapted', AdaptedConfig, AdaptedAttention)
