"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), from one device's view.

Keys and values are made of one small vector a token, and that vector and one rotary key are all that a cache keeps: R + r
numbers a token and layer, whatever the number of heads. While decoding no key or value is made: queries go to the latent
space instead, and outputs come back from it ("absorbed" weights), so that all heads share one key of width R + r.

Letters: B rows, T sequence, S slots of a cache, D model, Q the queries' latent vector, R the keys' and values', r a rotary
key, N query heads times their width, n query heads of this device, H width of a head's query, U of its value.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.costs import CostCounter
from weft.model.kv_cache import CacheSize, DenseCache, token_cache
from weft.model.layers.attention import how_to_attend, softmax_costs
from weft.model.layers.norm import rms_norm
from weft.model.layers.pattern import HEADS, attend_cached, attend_own
from weft.model.layers.rope import rope
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import Role, Size, parameter, residual_gain
from weft.model.parts.registry import MIXERS
from weft.runtime.errors import UserError
from weft.sharding.mesh import BATCH, FSDP, Divides

LATENT_EPSILON = 1e-6  # of the latent vectors' norms, in all published models, whatever the others' is


class LatentAttention(nnx.Module):
    """Causal self-attention from latent vectors, heads split over `tensor`; the latent vectors are whole on each device."""

    def __init__(self, c: ModelConfig, spec: LayerSpec):
        a = c.attention
        assert a.kind == 'mla'
        self.config, self.windowed = c, spec.windowed
        D, R = Size(c.model_dim, 'model.model_dim'), Size(a.kv_lora_rank, 'model.attention.kv_lora_rank')
        N, U = (Size(a.heads * width, 'model.attention.heads', a.heads) for width in (a.query_dim, a.v_head_dim))
        whole, part = (FSDP, None), 'attention'
        if a.q_lora_rank:
            Q = Size(a.q_lora_rank, 'model.attention.q_lora_rank')
            self.q_down = Linear(D, Q, part=part, bias=a.qkv_bias, split=whole)
            self.q_scale_Q = parameter((Q,), P(None), Role.SCALE, value=1.0, part=part)
            self.q_up = Linear(Q, N, part=part)
        else:
            self.q = Linear(D, N, part=part)
        self.kv_down = Linear(D, R + a.qk_rope_head_dim, part=part, bias=a.qkv_bias, split=whole)
        self.kv_scale_R = parameter((R,), P(None), Role.SCALE, value=1.0, part=part)
        # Of each head first the key's columns, then the value's.
        self.kv_up = Linear(
            R, Size(a.heads * (a.qk_nope_head_dim + a.v_head_dim), 'model.attention.heads', a.heads), part=part
        )
        self.o = TransposedLinear(U, D, part=part, bias=a.o_bias, gain=residual_gain(c.layers))

    @staticmethod
    def rules(c: ModelConfig) -> list[Divides]:
        """What a mesh must divide beside the weights."""
        return [Divides(('tensor',), 'model.attention.heads', c.attention.heads)]

    @staticmethod
    def cache(c: ModelConfig, spec: LayerSpec, size: CacheSize) -> DenseCache:
        """What decoding keeps: a latent vector and a rotary key side by side, for all heads."""
        a = c.attention
        assert a.kind == 'mla'
        return token_cache(size, a.window if spec.windowed else None, 1, a.kv_lora_rank + a.qk_rope_head_dim)

    @staticmethod
    def costs(c: ModelConfig, spec: LayerSpec, count: CostCounter) -> None:
        """Tells a counter what one device does; each device of `tensor` makes the latent vectors of its own tokens."""
        a, D = c.attention, c.model_dim
        assert a.kind == 'mla'
        R, n, Q = a.kv_lora_rank, a.heads / count.mesh.tensor, a.q_lora_rank or D
        count.gather_sequence(R + a.qk_rope_head_dim)
        count.gather_sequence(Q)
        count.matmul('projections', count.own_tokens, D, R + a.qk_rope_head_dim)
        if a.q_lora_rank:
            count.matmul('projections', count.own_tokens, D, Q)
        count.matmul('projections', count.tokens, Q, n * a.query_dim)
        # Keys and values; in decoding the same weights take queries into the latent space, and outputs back.
        count.matmul('projections', count.tokens, R, n * (a.qk_nope_head_dim + a.v_head_dim))
        widths = (R + a.qk_rope_head_dim, R) if count.decoding else (a.query_dim, a.v_head_dim)
        softmax_costs(c, spec, count, *widths)
        count.matmul('projections', count.tokens, n * a.v_head_dim, D)
        count.reduce_scatter_sequence(D)

    def __call__(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: DenseCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, DenseCache | None]:
        """The block's output in the layout between blocks, and the cache with these tokens' latent vectors."""
        c, a, dtype = self.config, self.config.attention, x_BTD.dtype
        assert a.kind == 'mla'
        down_BTR = self.kv_down(x_BTD)
        latent_BTR = rms_norm(down_BTR[..., : a.kv_lora_rank], self.kv_scale_R[...], LATENT_EPSILON)
        # What travels between the devices of `tensor` is the latent vectors, which are smaller than x.
        both_BTR = ctx.gather_sequence(jnp.concatenate([latent_BTR, down_BTR[..., a.kv_lora_rank :]], -1))
        latent_BTR, key_BTr = both_BTR[..., : a.kv_lora_rank], both_BTR[..., a.kv_lora_rank :]
        if a.q_lora_rank:
            q_BTQ = rms_norm(self.q_down(x_BTD), self.q_scale_Q[...], LATENT_EPSILON)
            q_BTQ = ctx.tap('attention.query_latent', q_BTQ)
            q = self.q_up(ctx.gather_sequence(q_BTQ))
        else:
            q = self.q(ctx.gather_sequence(x_BTD))
        q_BTnH = q.reshape(*q.shape[:2], -1, a.query_dim)
        plain_BTnH, turning_BTnr = q_BTnH[..., : a.qk_nope_head_dim], q_BTnH[..., a.qk_nope_head_dim :]
        turned_BTnr = rope(turning_BTnr, ctx.position_BT, ctx.segment_BT, c)
        key_BTr = rope(key_BTr, ctx.position_BT, ctx.segment_BT, c)
        if ctx.asks('attention.queries'):
            q_BTnH = ctx.tap('attention.queries', jnp.concatenate([plain_BTnH, turned_BTnr], -1), HEADS)
            plain_BTnH, turned_BTnr = q_BTnH[..., : a.qk_nope_head_dim], q_BTnH[..., a.qk_nope_head_dim :]
        latent_BTR = ctx.tap('attention.latent', latent_BTR, P(BATCH, 'context'))
        key_BTr = ctx.tap('attention.rotary_key', key_BTr, P(BATCH, 'context'))
        if cache is not None:
            for name in ('attention.keys', 'attention.values'):
                if ctx.edits(name):
                    raise UserError(
                        f'edit of {name!r}: latent attention keeps none in its cache; edit attention.latent, of which '
                        'they are made, or attention.rotary_key'
                    )
            new_BT1R = jnp.concatenate([latent_BTR, key_BTr], -1)[:, :, None]
            cache = cache.write((new_BT1R,), ctx)
        up_RnH = self.kv_up.kernel(dtype).reshape(a.kv_lora_rank, -1, a.qk_nope_head_dim + a.v_head_dim)
        up_RnP, up_RnU = up_RnH[..., : a.qk_nope_head_dim], up_RnH[..., a.qk_nope_head_dim :]
        how = how_to_attend(c, self.windowed)
        if ctx.decoding:
            assert cache is not None
            (kept_BS1R,) = cache.read(new_BT1R)
            q_BTnR = jnp.concatenate([jnp.einsum('BTnP,RnP->BTnR', plain_BTnH, up_RnP), turned_BTnr], -1)
            value_BS1R, at_BS = kept_BS1R[..., : a.kv_lora_rank], cache.positions(ctx)
            out_BT1nR = attend_cached(q_BTnR[:, :, None], kept_BS1R, value_BS1R, at_BS, ctx, **how)
            out_BTnU = jnp.einsum('BTnR,RnU->BTnU', out_BT1nR[:, :, 0], up_RnU)
        else:
            k_BTnP = jnp.einsum('BTR,RnP->BTnP', latent_BTR, up_RnP)
            v_BTnU = jnp.einsum('BTR,RnU->BTnU', latent_BTR, up_RnU)
            shared = jnp.broadcast_to(key_BTr[:, :, None], (*k_BTnP.shape[:3], a.qk_rope_head_dim))
            k_BTnH = ctx.tap('attention.keys', jnp.concatenate([k_BTnP, shared], -1), HEADS)
            v_BTnU = ctx.tap('attention.values', v_BTnU, HEADS)
            q_BTn1H = jnp.concatenate([plain_BTnH, turned_BTnr], -1)[:, :, :, None]
            out_BTnU = attend_own(q_BTn1H, k_BTnH, v_BTnU, ctx, **how)
        out_BTnU = ctx.tap('attention.head_outputs', out_BTnU.reshape(*q.shape[:2], -1, a.v_head_dim), HEADS)
        return self.o(out_BTnU.reshape(*q.shape[:2], -1), ctx.reduce_scatter_sequence), cache


MIXERS.implement('mla', LatentAttention)
