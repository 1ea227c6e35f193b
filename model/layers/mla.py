"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), from one device's view.

Keys and values are made of one small vector a token, and that vector and one rotary key are all that a cache keeps: R + r
numbers a token and layer, whatever the number of heads. While decoding no key or value is made: queries go to the latent
space instead, and outputs come back from it ("absorbed" weights), so that all heads share one key of width R + r.

Letters: B rows, T sequence, S slots of a cache, D model, Q the queries' latent vector, R the keys' and values', r a rotary
key, N query heads times their width, n query heads of this device, H width of a head's query, U of its value.
"""

import jax.numpy as jnp
from flax import nnx
from jax import P

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.kv_cache import KVCache, cache_read, cache_update
from weft.model.layers.attention import how_to_attend
from weft.model.layers.norm import rms_norm
from weft.model.layers.rope import rope
from weft.model.linear import linear, linear_back
from weft.model.ops.attention import attention
from weft.model.ops.attention.cached import cached_attention
from weft.model.parameters import constant, residual_gain, weight
from weft.model.parts.registry import MIXERS
from weft.sharding.collectives import unshard
from weft.sharding.mesh import FSDP

LATENT_EPSILON = 1e-6  # of the latent vectors' norms, in all published models, whatever the others' is


class LatentAttention(nnx.Module):
    """Causal self-attention from latent vectors, heads split over `tensor`; the latent vectors are whole on each device."""

    def __init__(self, c: ModelConfig, kind: LayerSpec, rngs: nnx.Rngs):
        assert c.attention.kind == 'mla'
        self.config, self.windowed, a = c, kind.windowed, c.attention
        D, N, R = c.model_dim, c.attention.heads * c.attention.query_dim, a.kv_lora_rank
        if a.q_lora_rank:
            self.q_down_DQ = weight(rngs, c, (D, a.q_lora_rank), P(FSDP, None), fan_in=D)
            self.q_scale_Q = constant(c, 1.0, (a.q_lora_rank,), P(None))
            self.q_up_QN = weight(rngs, c, (a.q_lora_rank, N), P(FSDP, 'tensor'), fan_in=a.q_lora_rank)
        else:
            self.q_DN = weight(rngs, c, (D, N), P(FSDP, 'tensor'), fan_in=D)
        self.kv_down_DR = weight(rngs, c, (D, R + a.qk_rope_head_dim), P(FSDP, None), fan_in=D)
        if c.attention.qkv_bias:
            self.kv_down_bias_R = constant(c, 0.0, (R + a.qk_rope_head_dim,), P(None))
            if a.q_lora_rank:
                self.q_down_bias_Q = constant(c, 0.0, (a.q_lora_rank,), P(None))
        self.kv_scale_R = constant(c, 1.0, (R,), P(None))
        # Of each head first the key's columns, then the value's.
        self.kv_up_RN = weight(
            rngs, c, (R, c.attention.heads * (a.qk_nope_head_dim + a.v_head_dim)), P(FSDP, 'tensor'), fan_in=R
        )
        U = c.attention.heads * a.v_head_dim
        self.o_DU = weight(rngs, c, (D, U), P(FSDP, 'tensor'), fan_in=U, gain=residual_gain(c))
        if c.attention.o_bias:
            self.o_bias_D = constant(c, 0.0, (D,), P(None))

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """The block's output in the layout between blocks, and the cache with these tokens' latent vectors at [layer]."""
        c, a, dtype = self.config, self.config.attention, x_BTD.dtype
        assert a.kind == 'mla'
        down_BTR = linear(x_BTD, unshard(self.kv_down_DR[...], dtype))
        if c.attention.qkv_bias:
            down_BTR = down_BTR + self.kv_down_bias_R.astype(dtype)[None, None]
        latent_BTR = rms_norm(down_BTR[..., : a.kv_lora_rank], self.kv_scale_R[...], LATENT_EPSILON)
        # What travels between the devices of `tensor` is the latent vectors, which are smaller than x.
        both_BTR = ctx.gather_sequence(jnp.concatenate([latent_BTR, down_BTR[..., a.kv_lora_rank :]], -1))
        latent_BTR, key_BTr = both_BTR[..., : a.kv_lora_rank], both_BTR[..., a.kv_lora_rank :]
        if a.q_lora_rank:
            q_BTQ = linear(x_BTD, unshard(self.q_down_DQ[...], dtype))
            if c.attention.qkv_bias:
                q_BTQ = q_BTQ + self.q_down_bias_Q.astype(dtype)[None, None]
            q_BTQ = rms_norm(q_BTQ, self.q_scale_Q[...], LATENT_EPSILON)
            q = linear(ctx.gather_sequence(q_BTQ), unshard(self.q_up_QN[...], dtype))
        else:
            q = linear(ctx.gather_sequence(x_BTD), unshard(self.q_DN[...], dtype))
        q_BTnH = q.reshape(*q.shape[:2], -1, c.attention.query_dim)
        plain_BTnH, turning_BTnr = q_BTnH[..., : a.qk_nope_head_dim], q_BTnH[..., a.qk_nope_head_dim :]
        turned_BTnr = rope(turning_BTnr, ctx.position_BT, ctx.segment_BT, c)
        key_BTr = rope(key_BTr, ctx.position_BT, ctx.segment_BT, c)
        if cache is not None:
            new_BT1R = jnp.concatenate([latent_BTR, key_BTr], -1)[:, :, None]
            cache = KVCache(cache_update(cache.k_LBSM, new_BT1R, layer, ctx.position_BT), None)
        up_RnH = unshard(self.kv_up_RN[...], dtype).reshape(a.kv_lora_rank, -1, a.qk_nope_head_dim + a.v_head_dim)
        up_RnP, up_RnU = up_RnH[..., : a.qk_nope_head_dim], up_RnH[..., a.qk_nope_head_dim :]
        how = how_to_attend(c, self.windowed)
        if ctx.decoding:
            kept_BS1R = cache_read(cache.k_LBSM, layer, new_BT1R)
            q_BTnR = jnp.concatenate([jnp.einsum('BTnP,RnP->BTnR', plain_BTnH, up_RnP), turned_BTnr], -1)
            out_BT1nR = cached_attention(
                q_BTnR[:, :, None], kept_BS1R, kept_BS1R[..., : a.kv_lora_rank], ctx.position_BT, **how
            )
            out_BTnU = jnp.einsum('BTnR,RnU->BTnU', out_BT1nR[:, :, 0], up_RnU)
        else:
            k_BTnP = jnp.einsum('BTR,RnP->BTnP', latent_BTR, up_RnP)
            v_BTnU = jnp.einsum('BTR,RnU->BTnU', latent_BTR, up_RnU)
            shared = jnp.broadcast_to(key_BTr[:, :, None], (*k_BTnP.shape[:3], a.qk_rope_head_dim))
            k_BTnH = jnp.concatenate([k_BTnP, shared], -1)
            q_BTn1H = jnp.concatenate([plain_BTnH, turned_BTnr], -1)[:, :, :, None]
            here = (ctx.position_BT, ctx.segment_BT)
            out_BTnU = attention(q_BTn1H, k_BTnH, v_BTnU, here, here, **how, backend=ctx.compute.attention, ring=True)
        y_BTD = ctx.reduce_scatter_sequence(
            linear_back(out_BTnU.reshape(*q.shape[:2], -1), unshard(self.o_DU[...], dtype))
        )
        return (y_BTD + self.o_bias_D.astype(dtype)[None, None] if c.attention.o_bias else y_BTD), cache


MIXERS.implement('mla', LatentAttention)
