"""Self-attention with any grouping of query and KV heads, from one device's view.

Letters: B rows, T sequence, S slots of a cache, D model, N query heads times H, M kv heads times H, K kv heads, G query heads
per kv head, H head dim, R buckets of distances.
"""

from typing import Any

from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.kv_cache import KVCache, cache_read, cache_update
from weft.model.layers.norm import norm_of_all, offset, rms_norm
from weft.model.layers.rope import rope, yarn_gain
from weft.model.linear import linear, linear_back
from weft.model.ops.attention import Relative, attention
from weft.model.ops.attention.cached import cached_attention
from weft.model.parameters import constant, residual_gain, weight
from weft.model.parts.registry import MIXERS
from weft.sharding.collectives import (
    unshard,
    upcast,
)
from weft.sharding.mesh import FSDP


class Attention(nnx.Module):
    """Self-attention with any grouping of query and KV heads, heads split over `tensor`.

    Where `tensor` is a multiple of the KV heads, each of its devices uses one of them.
    """

    def __init__(self, c: ModelConfig, kind: LayerSpec, rngs: nnx.Rngs):
        self.config, self.windowed, self.turned = c, kind.windowed, kind.turned
        D, N, M, H = (
            c.model_dim,
            c.attention.heads * c.attention.head_dim,
            c.attention.kv_heads * c.attention.head_dim,
            c.attention.head_dim,
        )
        self.q_DN = weight(rngs, c, (D, N), P(FSDP, 'tensor'), fan_in=D)
        self.k_DM = weight(rngs, c, (D, M), P(FSDP, 'tensor'), fan_in=D)
        self.v_DM = weight(rngs, c, (D, M), P(FSDP, 'tensor'), fan_in=D)
        self.o_DN = weight(rngs, c, (D, N), P(FSDP, 'tensor'), fan_in=N, gain=residual_gain(c))
        if c.attention.qkv_bias:
            self.q_bias_N = constant(c, 0.0, (N,), P('tensor'))
            self.k_bias_M = constant(c, 0.0, (M,), P('tensor'))
            self.v_bias_M = constant(c, 0.0, (M,), P('tensor'))
        if c.attention.o_bias:
            self.o_bias_D = constant(c, 0.0, (D,), P(None))
        if c.attention.qk_norm == 'full':
            self.q_scale_N = constant(c, 1.0 - c.norm.offset, (N,), P('tensor'))
            self.k_scale_M = constant(c, 1.0 - c.norm.offset, (M,), P('tensor'))
        elif c.attention.qk_norm:
            self.q_scale_H = constant(c, 1.0 - c.norm.offset, (H,), P(None))
            self.k_scale_H = constant(c, 1.0 - c.norm.offset, (H,), P(None))
        if c.attention.sinks:
            self.sink_N = constant(c, 0.0, (c.attention.heads,), P('tensor'))

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """The block's output in the layout between blocks, and the cache with these tokens' keys and values at [layer]."""
        c, H = self.config, self.config.attention.head_dim
        x_BTD = ctx.gather_sequence(x_BTD)
        q = linear(x_BTD, unshard(self.q_DN[...], x_BTD.dtype))
        k = linear(x_BTD, local_kv_heads(unshard(self.k_DM[...], x_BTD.dtype), c))
        v = linear(x_BTD, local_kv_heads(unshard(self.v_DM[...], x_BTD.dtype), c))
        if c.attention.qkv_bias:
            q = q + self.q_bias_N.astype(q.dtype)[None, None]
            k = k + local_kv_heads(self.k_bias_M[...], c).astype(k.dtype)[None, None]
            v = v + local_kv_heads(self.v_bias_M[...], c).astype(v.dtype)[None, None]
        if c.attention.qk_norm == 'full':
            q = norm_of_all(q, offset(self.q_scale_N[...], c), c.attention.heads, c)
            k = norm_of_all(k, offset(local_kv_heads(self.k_scale_M[...], c), c), c.attention.kv_heads, c)
        k_BTKH, v_BTKH = (a.reshape(*a.shape[:2], -1, H) for a in (k, v))
        q_BTKGH = q.reshape(*q.shape[:2], k_BTKH.shape[2], -1, H)
        if c.attention.qk_norm and c.attention.qk_norm != 'full':
            q_BTKGH = rms_norm(q_BTKGH, offset(self.q_scale_H[...], c), c.norm.epsilon)
            k_BTKH = rms_norm(k_BTKH, offset(self.k_scale_H[...], c), c.norm.epsilon)
        if c.attention.scale_by_layer:
            q_BTKGH = (upcast(q_BTKGH) / (layer + 1)).astype(q_BTKGH.dtype)
        if c.positions.kind == 'rotary' and self.turned:
            place = (ctx.position_BT, ctx.segment_BT)
            q_BTKGH, k_BTKH = (rope(a, *place, c, self.windowed) for a in (q_BTKGH, k_BTKH))
        if cache is not None:
            kept = (
                cache_update(old, new, layer, ctx.position_BT)
                for old, new in zip(cache[:2], (k_BTKH, v_BTKH), strict=True)
            )
            cache = KVCache(*kept)
        here = (ctx.position_BT, ctx.segment_BT)
        how = how_to_attend(c, self.windowed)
        if c.attention.sinks:
            how['sink_KG'] = self.sink_N.reshape(q_BTKGH.shape[2:4])
        if ctx.relative_RN is not None:
            assert c.positions.kind == 'relative'
            table_KGR = ctx.relative_RN.T.reshape(*q_BTKGH.shape[2:4], -1)
            how['relative'] = Relative(table_KGR, not c.causal, c.positions.max_distance)
        if ctx.decoding:
            k_BSKH, v_BSKH = (cache_read(kept, layer, k_BTKH) for kept in cache[:2])
            a_BTKGH = cached_attention(q_BTKGH, k_BSKH, v_BSKH, ctx.position_BT, **how)
        else:
            how |= {'causal': c.causal, 'backend': ctx.compute.attention, 'ring': True}
            a_BTKGH = attention(q_BTKGH, k_BTKH, v_BTKH, here, here, **how)
        y_BTD = ctx.reduce_scatter_sequence(
            linear_back(a_BTKGH.reshape(*q.shape[:2], -1), unshard(self.o_DN[...], q.dtype))
        )
        return (y_BTD + self.o_bias_D.astype(q.dtype)[None, None] if c.attention.o_bias else y_BTD), cache


def how_to_attend(c: ModelConfig, windowed: bool) -> dict[str, Any]:
    """The arguments of `attention` and `cached_attention` that the config decides."""
    scale = c.attention.query_dim**-0.5 if c.attention.scale is None else c.attention.scale
    if (scaling := c.rope_scaling) and scaling.mscale_all_dim:
        scale *= yarn_gain(scaling.factor, scaling.mscale_all_dim) ** 2
    return {
        'window': c.attention.window if windowed else None,
        'scale': scale,
        'softcap': c.attention.softcap,
    }


def local_kv_heads(w_DM, c: ModelConfig):
    """This device's KV heads, in the last dim. More devices along `tensor` than heads: the head that its query heads use."""
    n = lax.axis_size('tensor')
    if n <= c.attention.kv_heads:
        return w_DM
    w_DM = lax.all_gather(w_DM, 'tensor', axis=w_DM.ndim - 1, tiled=True)
    head = lax.axis_index('tensor') * c.attention.kv_heads // n
    return lax.dynamic_slice_in_dim(w_DM, head * c.attention.head_dim, c.attention.head_dim, axis=w_DM.ndim - 1)


MIXERS.implement('gqa', Attention)
