"""Self-attention with any grouping of query and KV heads, from one device's view.

Letters: B rows, T sequence, S slots of a cache, D model, N query heads times H, M kv heads times H, K kv heads, G query heads
per kv head, H head dim, R buckets of distances.
"""

from typing import Any

import jax
from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.costs import INT32, CostCounter
from weft.model.kv_cache import CacheSize, DenseCache, token_cache
from weft.model.layers.norm import norm_of_all, offset, rms_norm
from weft.model.layers.pattern import HEADS, attend_cached, attend_own, tap_heads
from weft.model.layers.rope import rope, yarn_gain
from weft.model.linear import Linear, TransposedLinear
from weft.model.ops.attention import Relative
from weft.model.parameters import Role, Size, parameter, residual_gain
from weft.model.parts.registry import MIXERS
from weft.sharding.collectives import upcast
from weft.sharding.mesh import Divides


class Attention(nnx.Module):
    """Self-attention with any grouping of query and KV heads, heads split over `tensor`.

    Where `tensor` is a multiple of the KV heads, each of its devices uses one of them.
    """

    def __init__(self, c: ModelConfig, spec: LayerSpec, part: str = 'attention'):
        self.config, self.windowed, self.turned = c, spec.windowed, spec.turned
        D, H, K = Size(c.model_dim, 'model.model_dim'), c.attention.head_dim, c.attention.kv_heads
        N = Size(c.attention.heads * H, 'model.attention.heads', c.attention.heads)
        of_source = part == 'cross_attention'
        self.q = Linear(D, N, part=part, bias=c.attention.qkv_bias)
        self.k = KVLinear(D, K, H, part=part, bias=c.attention.qkv_bias, of_source=of_source)
        self.v = KVLinear(D, K, H, part=part, bias=c.attention.qkv_bias, of_source=of_source)
        self.o = TransposedLinear(N, D, part=part, bias=c.attention.o_bias, gain=residual_gain(c.layers))
        one = {'value': 1.0 - c.norm.offset, 'part': part}
        if c.attention.qk_norm == 'full':
            self.q_scale_N = parameter((N,), P('tensor'), Role.SCALE, **one)
            self.k_scale_M = parameter((kv_width(K, H),), P('tensor'), Role.SCALE, repeats=K, **one)
        elif c.attention.qk_norm:
            self.q_scale_H = parameter((H,), P(None), Role.SCALE, **one)
            self.k_scale_H = parameter((H,), P(None), Role.SCALE, **one)
        if c.attention.sinks:
            self.sink_N = parameter(
                (Size(c.attention.heads, 'model.attention.heads'),), P('tensor'), Role.VECTOR, part=part
            )

    @staticmethod
    def rules(c: ModelConfig) -> list[Divides]:
        """What a mesh must divide beside the weights."""
        heads = Divides(('tensor',), 'model.attention.heads', c.attention.heads)
        return [heads, Divides(('tensor',), 'model.attention.kv_heads', c.attention.kv_heads, or_repeats=True)]

    @staticmethod
    def cache(c: ModelConfig, spec: LayerSpec, size: CacheSize) -> DenseCache:
        """What decoding keeps: a key and a value for each KV head."""
        return token_cache(
            size,
            c.attention.window if spec.windowed else None,
            c.attention.kv_heads,
            c.attention.head_dim,
            c.attention.head_dim,
        )

    @staticmethod
    def costs(c: ModelConfig, spec: LayerSpec, count: CostCounter) -> None:
        """Tells a counter what one device does."""
        D, H = c.model_dim, c.attention.head_dim
        heads, kv_heads = c.attention.heads / count.mesh.tensor, count.kv_heads(c.attention.kv_heads)
        count.gather_sequence(D)
        for width in (heads * H, kv_heads * H, kv_heads * H):
            count.matmul('projections', count.tokens, D, width)
        if c.attention.qk_norm == 'full':  # sums over all heads: of queries and of keys, and of the gradients of both
            count.send('psum', ('tensor',), count.tokens * count.wide, 2 * count.passes)
        softmax_costs(c, spec, count, H, H)
        count.matmul('projections', count.tokens, heads * H, D)
        count.reduce_scatter_sequence(D)

    def __call__(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: DenseCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, DenseCache | None]:
        """The block's output in the layout between blocks, and the cache with these tokens' keys and values."""
        a_BTN, cache = self.attend(ctx.gather_sequence(x_BTD), ctx, cache, layer)
        a_BTnH = a_BTN.reshape(*a_BTN.shape[:2], -1, self.config.attention.head_dim)
        a_BTN = ctx.tap('attention.head_outputs', a_BTnH, HEADS).reshape(a_BTN.shape)
        return self.o(a_BTN, ctx.reduce_scatter_sequence), cache

    def attend(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: DenseCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, DenseCache | None]:
        """What this device's heads make of whole sequences, before the output projection, and the cache."""
        c, H = self.config, self.config.attention.head_dim
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if c.attention.qk_norm == 'full':
            q = norm_of_all(q, offset(self.q_scale_N[...], c), c.attention.heads, c)
            k = norm_of_all(
                k, offset(local_kv_heads(self.k_scale_M[...], c.attention.kv_heads, H), c), c.attention.kv_heads, c
            )
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
        q_BTKGH = tap_heads('attention.queries', q_BTKGH, ctx)
        copies = max(lax.axis_size('tensor') // c.attention.kv_heads, 1)
        k_BTKH = ctx.tap('attention.keys', k_BTKH, HEADS, copies)
        v_BTKH = ctx.tap('attention.values', v_BTKH, HEADS, copies)
        if cache is not None:
            cache = cache.write((k_BTKH, v_BTKH), ctx)
        how = how_to_attend(c, self.windowed)
        if c.attention.sinks:
            how['sink_KG'] = self.sink_N.reshape(q_BTKGH.shape[2:4])
        if ctx.relative_RN is not None:
            table_KGR = ctx.relative_RN.T.reshape(*q_BTKGH.shape[2:4], -1)
            assert c.positions.kind == 'relative'
            how['relative'] = Relative(table_KGR, not c.causal, c.positions.max_distance)
        if ctx.decoding:
            assert cache is not None
            k_BSKH, v_BSKH = cache.read(k_BTKH, v_BTKH)
            a_BTKGH = attend_cached(q_BTKGH, k_BSKH, v_BSKH, cache.positions(ctx), ctx, **how)
        else:
            how |= {'causal': c.causal}
            a_BTKGH = attend_own(q_BTKGH, k_BTKH, v_BTKH, ctx, **how)
        return a_BTKGH.reshape(*q.shape[:2], -1), cache


class KVLinear(Linear):
    """To keys or values: where `tensor` has more devices than heads, each computes the head that its query heads use."""

    def __init__(self, inputs: int, heads: int, head_dim: int, **more: Any):
        super().__init__(inputs, kv_width(heads, head_dim), repeats=heads, **more)
        self.heads, self.head_dim = heads, head_dim

    def columns(self, w: jax.Array) -> jax.Array:
        return local_kv_heads(w, self.heads, self.head_dim)


def kv_width(heads: int, head_dim: int) -> Size:
    """All heads of keys, or of values, side by side."""
    return Size(heads * head_dim, 'model.attention.kv_heads × model.attention.head_dim')


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


def softmax_costs(c: ModelConfig, spec: LayerSpec, count: CostCounter, query_width: int, value_width: int) -> None:
    """Tells a counter what stands between the projections of any softmax attention to the tokens of one sequence."""
    heads, kv_heads = c.attention.heads / count.mesh.tensor, count.kv_heads(c.attention.kv_heads)
    count.attend('attention', heads, query_width, value_width, count.keys_seen(c, spec))
    kept_costs(c, count)
    if count.decoding:  # devices of `context` have their own keys: maxima, weighted values and sums of weights
        for kind, width in (('pmax', 1), ('psum', value_width), ('psum', 1)):
            count.send(kind, ('context',), count.rows * heads * width * count.wide)
    elif count.compute.attention == 'reference':
        n = count.mesh.context
        for width in (query_width, value_width):
            count.all_gather(('context',), n * count.tokens * kv_heads * width * count.number)
        count.send_alike('all_gather', ('context',), n * count.tokens * INT32, 2)
    else:
        ring_costs(count, kv_heads * query_width, kv_heads * value_width)


def ring_costs(count: CostCounter, *widths: float) -> None:
    """Tells a counter what model/ops/attention/ring.py sends: arrays of such widths, and the tokens' places, go round.

    In one send fewer than there are devices of `context` a pass. Backward the gradients go along, in at least float32, and
    one send further: home. Places are the same in all layers.
    """
    n = count.mesh.context
    for width in widths if n > 1 else ():
        count.send('ppermute', ('context',), count.tokens * width * count.number, count.passes * (n - 1))
        count.send('ppermute', ('context',), count.tokens * width * count.wide, count.training * n)
    count.send_alike('ppermute', ('context',), count.tokens * INT32, 2 * (n - 1))
    count.send('ppermute', ('context',), count.tokens * INT32, 2 * count.training * (n - 1))


def kept_costs(c: ModelConfig, count: CostCounter) -> None:
    """Tells a counter what the backward pass of softmax attention needs: input, queries, keys, values, output, log-sum-exps."""
    a, t = c.attention, count.tokens
    heads, kv_heads = a.heads / count.mesh.tensor, count.kv_heads(a.kv_heads)
    again = heads * a.value_dim * count.looped  # a loop keeps the output in two layouts
    numbers = c.model_dim + again + (heads + kv_heads) * (a.query_dim + a.value_dim)
    count.keep(t * (numbers * count.number + heads * count.wide))
    if count.looped and a.qk_norm:
        count.keep(2 * t * (heads + kv_heads) * a.query_dim * count.wide)


def local_kv_heads(w_DM: jax.Array, heads: int, head_dim: int) -> jax.Array:
    """This device's KV heads, in the last dim. More devices along `tensor` than heads: the head that its query heads use."""
    n = lax.axis_size('tensor')
    if n <= heads:
        return w_DM
    w_DM = lax.all_gather(w_DM, 'tensor', axis=w_DM.ndim - 1, tiled=True)
    head = lax.axis_index('tensor') * heads // n
    return lax.dynamic_slice_in_dim(w_DM, head * head_dim, head_dim, axis=w_DM.ndim - 1)


MIXERS.implement('gqa', Attention)
