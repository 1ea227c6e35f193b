"""What encoders add to the stack, from one device's view: attention to what an encoder read, BERT's head, fixed positions.

Letters: B rows, T sequence, S tokens of a source, D model, K kv heads, H head dim, M kv heads times H, N query heads times H,
L layers, J wavelengths, P positions, C classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.cost import cached_numbers
from weft.model.layers import (
    Attention,
    CrossKVCache,
    EncoderOutput,
    ForwardContext,
    KVCache,
    Norm,
    activation,
    cache_read,
    constant,
    how_to_attend,
    linear,
    linear_back,
    local_kv_heads,
    pad_heads,
    weight,
)
from weft.model.ops.attention import attention
from weft.model.ops.attention.cached import cached_attention
from weft.sharding.collectives import unshard
from weft.sharding.mesh import FSDP, platform

EVERY = (*FSDP, 'tensor')  # axes that split a weight of tokens that are not joined


class CrossAttention(Attention):
    """A decoder's queries on an encoder's output (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3): no positions."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        super().__init__(c, LayerSpec(), rngs)

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """The output in the layout between blocks, and the cache, which holds nothing of this."""
        c, source = self.config, ctx.source
        x_BTD = ctx.gather_sequence(x_BTD)
        q = linear(x_BTD, unshard(self.q_DN[...], x_BTD.dtype))
        if c.qkv_bias:
            q = q + self.q_bias_N.astype(q.dtype)[None, None]
        how = how_to_attend(c, windowed=False)
        if isinstance(source, CrossKVCache):
            K = max(c.kv_heads // lax.axis_size('tensor'), 1)
            q_BTKGH = q.reshape(*q.shape[:2], K, -1, c.head_dim)
            k_BSKH, v_BSKH = (cache_read(kept, layer, q_BTKGH[:, :, :, 0]) for kept in (source.k_LBSM, source.v_LBSM))
            a_BTKGH = cached_attention(q_BTKGH, k_BSKH, v_BSKH, ctx.position_BT, **how, length_B=source.length_B)
        else:
            k_BSKH, v_BSKH = self.keys(source.x_BSD)
            q_BTKGH = q.reshape(*q.shape[:2], k_BSKH.shape[2], -1, c.head_dim)
            here, there = (ctx.position_BT, ctx.segment_BT), (jnp.zeros_like(source.segment_BS), source.segment_BS)
            a_BTKGH = attention(q_BTKGH, k_BSKH, v_BSKH, here, there, **how, causal=False, backend=ctx.backend)
        y_BTD = ctx.reduce_scatter_sequence(
            linear_back(a_BTKGH.reshape(*q.shape[:2], -1), unshard(self.o_DN[...], q.dtype))
        )
        return (y_BTD + self.o_bias_D.astype(q.dtype)[None, None] if c.bias or c.o_bias else y_BTD), cache

    def keys(self, x_BSD):
        """Keys and values of an encoder's output, [B, S, K, H] each."""
        c = self.config
        k = linear(x_BSD, local_kv_heads(unshard(self.k_DM[...], x_BSD.dtype), c))
        v = linear(x_BSD, local_kv_heads(unshard(self.v_DM[...], x_BSD.dtype), c))
        if c.qkv_bias:
            k = k + local_kv_heads(self.k_bias_M[...], c).astype(k.dtype)[None, None]
            v = v + local_kv_heads(self.v_bias_M[...], c).astype(v.dtype)[None, None]
        return tuple(a.reshape(*a.shape[:2], -1, c.head_dim) for a in (k, v))

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


class HeadMlp(nnx.Module):
    """What BERT (arXiv:1810.04805; its published code) has between its layers and the LM head: dense, activation, norm."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        D = c.model_dim
        self.up_DD = weight(rngs, c, (D, D), P(EVERY, None), fan_in=D)
        self.up_bias_D = constant(c, 0.0, (D,), P(None))
        self.norm = Norm(c)

    def __call__(self, x_BTD):
        """Of tokens in any layout."""
        dtype = x_BTD.dtype
        h_BTD = linear(x_BTD, unshard(self.up_DD[...], dtype, EVERY)) + self.up_bias_D.astype(dtype)[None, None]
        return self.norm(activation(self.config)(h_BTD))


class Pooler(nnx.Module):
    """BERT's weights for whole rows, which no logit depends on: they are kept, so that what was read can be written again."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        D = c.model_dim
        self.up_DD = weight(rngs, c, (D, D), P(EVERY, None), fan_in=D)
        self.up_bias_D = constant(c, 0.0, (D,), P(None))
        if c.next_sentence:
            self.next_CD = weight(rngs, c, (2, D), P(None, None), fan_in=D)
            self.next_bias_C = constant(c, 0.0, (2,), P(None))


def sinusoids(c: ModelConfig) -> np.ndarray:
    """float64 [P, D]: sines of D / 2 wavelengths, then their cosines (arXiv:1706.03762, section 3.5, in Marian's order)."""
    P_, D = c.max_positions, c.model_dim
    angle_PJ = np.arange(P_)[:, None] / np.power(10000, 2 * np.arange(D // 2) / D)[None]
    return np.concatenate([np.sin(angle_PJ), np.cos(angle_PJ)], 1)
