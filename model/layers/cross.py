"""Attention to what an encoder has read, from one device's view.

Letters: B rows, T sequence, S tokens of a source, D model, K kv heads, G query heads per kv head, H head dim, M kv heads
times H.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import CrossCache, EncoderOutput, ForwardContext
from weft.model.costs import CostCounter
from weft.model.kv_cache import dense_positions, pad_heads, slot_width, unpad_heads
from weft.model.layers.attention import Attention, how_to_attend, kept_costs
from weft.model.ops.attention import attention
from weft.model.ops.attention.cached import cached_attention
from weft.sharding.mesh import platform


class CrossAttention(Attention):
    """A decoder's queries on an encoder's output (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3): no positions."""

    def __init__(self, c: ModelConfig):
        super().__init__(c, LayerSpec(), 'cross_attention')

    @staticmethod
    def costs(c: ModelConfig, spec: LayerSpec, count: CostCounter) -> None:
        """Tells a counter what one device does; decoding and prefill have the source's keys and values already."""
        D, N = c.model_dim, c.attention.heads / count.mesh.tensor * c.attention.head_dim
        count.gather_sequence(D)
        count.matmul('cross_attention', count.tokens, D, N)
        if count.what not in ('prefill', 'decode'):
            CrossAttention.key_costs(c, count)
        count.attend(
            'cross_attention',
            c.attention.heads / count.mesh.tensor,
            c.attention.query_dim,
            c.attention.value_dim,
            count.source_keys,
        )
        count.matmul('cross_attention', count.tokens, N, D)
        count.reduce_scatter_sequence(D)
        if not count.looped:
            count.keep(count.tokens * D / count.mesh.tensor * count.number)
            kept_costs(c, count)

    @staticmethod
    def key_costs(c: ModelConfig, count: CostCounter) -> None:
        """Tells a counter what the keys and values of an encoder's output take."""
        tokens, width = count.rows * count.source / count.mesh.context, count.kv_heads(c.attention.kv_heads)
        for _ in 'kv':
            count.matmul('cross_attention', tokens, c.model_dim, width * c.attention.head_dim)

    def __call__(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: Any = None, layer: Any = None
    ) -> tuple[jax.Array, None]:
        """The output in the layout between blocks, and no cache: what is kept of the source, `ctx.source`, is only read."""
        c, source = self.config, ctx.source
        x_BTD = ctx.gather_sequence(x_BTD)
        q = self.q(x_BTD)
        how = how_to_attend(c, windowed=False)
        if isinstance(source, CrossCache):
            K = max(c.attention.kv_heads // lax.axis_size('tensor'), 1)
            q_BTKGH = q.reshape(*q.shape[:2], K, -1, c.attention.head_dim)
            k_BSKH, v_BSKH = (unpad_heads(kept, q_BTKGH[:, :, :, 0]) for kept in (source.k_BSM, source.v_BSM))
            last_BT = jnp.broadcast_to(source.length_B[:, None] - 1, ctx.position_BT.shape)  # all of the source is seen
            a_BTKGH = cached_attention(q_BTKGH, k_BSKH, v_BSKH, last_BT, dense_positions(*k_BSKH.shape[:2]), **how)
        else:
            assert isinstance(source, EncoderOutput)
            k_BSKH, v_BSKH = self.keys(source.x_BSD)
            q_BTKGH = q.reshape(*q.shape[:2], k_BSKH.shape[2], -1, c.attention.head_dim)
            here, there = (ctx.position_BT, ctx.segment_BT), (jnp.zeros_like(source.segment_BS), source.segment_BS)
            a_BTKGH = attention(
                q_BTKGH, k_BSKH, v_BSKH, here, there, **how, causal=False, backend=ctx.compute.attention
            )
        return self.o(a_BTKGH.reshape(*q.shape[:2], -1), ctx.reduce_scatter_sequence), None

    def keys(self, x_BSD: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values of an encoder's output, [B, S, K, H] each."""
        return tuple(
            a.reshape(*a.shape[:2], -1, self.config.attention.head_dim) for a in (self.k(x_BSD), self.v(x_BSD))
        )

    def kept(self, source: EncoderOutput) -> CrossCache:
        """Keys and values as a cache keeps them."""
        c, on = self.config, (lax.axis_size('tensor'), platform())
        k_BSM, v_BSM = (
            pad_heads(a_BSKH, slot_width(c.attention.kv_heads, c.attention.head_dim, *on))
            for a_BSKH in self.keys(source.x_BSD)
        )
        return CrossCache(k_BSM, v_BSM, (source.segment_BS > 0).sum(1, dtype=jnp.int32))
