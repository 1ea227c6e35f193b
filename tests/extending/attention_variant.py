"""An attention variant: a gate on each head's output, of the layer's input (Qiu et al. 2025, arXiv:2505.06708).

Letters: B rows, T sequence, D model, N query heads times their width.
"""

import dataclasses
from typing import Literal

import jax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.costs import CostCounter
from weft.model.layers.attention import Attention
from weft.model.linear import Linear
from weft.model.parameters import Size
from weft.model.parts.attention import AttentionConfig
from weft.model.parts.registry import MIXERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConfig(AttentionConfig):
    """`model: {attention: {kind: gated, heads: 8, kv_heads: 2}}`"""

    kind: Literal['gated'] = 'gated'


class GatedAttention(Attention):
    """Cache, rotary positions, masks and rings are grouped-query attention's."""

    def __init__(self, c: ModelConfig, spec: LayerSpec):
        super().__init__(c, spec)
        N = Size(c.attention.heads * c.attention.head_dim, 'model.attention.heads', c.attention.heads)
        self.gate = Linear(Size(c.model_dim, 'model.model_dim'), N, part='attention')

    @staticmethod
    def costs(c: ModelConfig, spec: LayerSpec, count: CostCounter) -> None:
        Attention.costs(c, spec, count)
        width = c.attention.heads * c.attention.head_dim / count.mesh.tensor
        count.matmul('projections', count.tokens, c.model_dim, width)
        count.keep(2 * count.tokens * width * count.number)  # the gate, and what it is multiplied by

    def attend(self, x_BTD, ctx: ForwardContext, cache, layer):
        a_BTN, cache = super().attend(x_BTD, ctx, cache, layer)
        return a_BTN * jax.nn.sigmoid(self.gate(x_BTD)), cache


MIXERS.register('gated', GatedConfig, GatedAttention)
