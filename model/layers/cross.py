"""Attention to what an encoder has read, from one device's view.

Letters: B rows, T sequence, S tokens of a source, D model, K kv heads, G query heads per kv head, H head dim, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import EncoderOutput, ForwardContext
from weft.model.kv_cache import CrossKVCache, KVCache, cache_read, cached_numbers, pad_heads
from weft.model.layers.attention import Attention, how_to_attend
from weft.model.ops.attention import attention
from weft.model.ops.attention.cached import cached_attention
from weft.sharding.mesh import platform


class CrossAttention(Attention):
    """A decoder's queries on an encoder's output (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3): no positions."""

    def __init__(self, c: ModelConfig):
        super().__init__(c, LayerSpec(), 'cross_attention')

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """The output in the layout between blocks, and the cache, which holds nothing of this."""
        c, source = self.config, ctx.source
        x_BTD = ctx.gather_sequence(x_BTD)
        q = self.q(x_BTD)
        how = how_to_attend(c, windowed=False)
        if isinstance(source, CrossKVCache):
            K = max(c.attention.kv_heads // lax.axis_size('tensor'), 1)
            q_BTKGH = q.reshape(*q.shape[:2], K, -1, c.attention.head_dim)
            k_BSKH, v_BSKH = (cache_read(kept, layer, q_BTKGH[:, :, :, 0]) for kept in (source.k_LBSM, source.v_LBSM))
            a_BTKGH = cached_attention(q_BTKGH, k_BSKH, v_BSKH, ctx.position_BT, **how, length_B=source.length_B)
        else:
            k_BSKH, v_BSKH = self.keys(source.x_BSD)
            q_BTKGH = q.reshape(*q.shape[:2], k_BSKH.shape[2], -1, c.attention.head_dim)
            here, there = (ctx.position_BT, ctx.segment_BT), (jnp.zeros_like(source.segment_BS), source.segment_BS)
            a_BTKGH = attention(
                q_BTKGH, k_BSKH, v_BSKH, here, there, **how, causal=False, backend=ctx.compute.attention
            )
        return self.o(a_BTKGH.reshape(*q.shape[:2], -1), ctx.reduce_scatter_sequence), cache

    def keys(self, x_BSD):
        """Keys and values of an encoder's output, [B, S, K, H] each."""
        return tuple(
            a.reshape(*a.shape[:2], -1, self.config.attention.head_dim) for a in (self.k(x_BSD), self.v(x_BSD))
        )

    def kept(self, x_BSD):
        """Keys and values as a cache keeps them, [B, S, M] each."""
        widths = cached_numbers(self.config, lax.axis_size('tensor'), platform())
        return tuple(map(pad_heads, self.keys(x_BSD), widths))


def kept(memory: EncoderOutput, runs) -> CrossKVCache:
    """The keys and values of all layers, `runs` being each run's blocks by kind, stacked."""
    length_B = (memory.segment_BS > 0).sum(1, dtype=jnp.int32)
    of_runs = []
    for blocks in runs:
        by_kind = [by_layer(lambda block: block.cross.kept(memory.x_BSD), group) for group in blocks]
        of_runs.append(jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *by_kind))
    k_LBSM, v_LBSM = jax.tree.map(lambda *a: jnp.concatenate(a), *of_runs)
    return CrossKVCache(k_LBSM, v_LBSM, length_B)


def by_layer(f, group):
    """f of each layer, stacked, of a group that is stacked or is a list of layers."""
    if isinstance(group, nnx.List):
        return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *map(f, group))
    return lax.map(f, group)
