"""The parts of a block, from one device's view: each weight's global shape, layout and scale stand on one line.

Outside `jax.shard_map` a module holds global arrays, whose types carry their layout (`specs` reads it off). Inside, the same
module holds this device's shards, and `__call__` says what is sent: weights are gathered over FSDP where they are used,
activations are joined and split over `tensor` around each block.

Letters, as local sizes inside a call: B rows, T sequence, D model, N query heads times H, M kv heads times H, K kv heads,
G query heads per kv head, H head dim, F hidden units of an MLP, L layers, S slots of a cache or tokens of a source, R buckets
of distances.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.ops.attention import Relative, attention
from weft.model.ops.attention.cached import cached_attention
from weft.model.rope import rope, yarn_gain
from weft.sharding.collectives import (
    axis_index,
    gather_sequence,
    psum,
    reduce_scatter_sequence,
    tensor_slice,
    unshard,
    upcast,
)
from weft.sharding.mesh import BATCH, FSDP, platform
from weft.sharding.pipeline import microbatch, my_microbatches


class CrossKVCache(NamedTuple):
    """What decoding keeps of an encoder's output: each layer's keys and values of all of it, in the form of a cache."""

    k_LBSM: jax.Array
    v_LBSM: jax.Array
    length_B: jax.Array  # tokens of each row, int32


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: a row's token at position p is in slot p // n of device p mod n of `context`.

    [L, B, S, tensor × numbers]: each device of `tensor` has its heads side by side; on TPUs zeros follow, up to a multiple of
    128 (`model.cost.cached_numbers`).
    """

    k_LBSM: jax.Array
    v_LBSM: jax.Array | None  # None where one latent vector is both (model/latent.py)
    source: CrossKVCache | None = None  # of an encoder–decoder


class EncoderOutput(NamedTuple):
    """An encoder's output while a decoder reads whole rows."""

    x_BSD: jax.Array  # on each device of `tensor` all of it
    segment_BS: jax.Array  # as a View's: the decoder's tokens attend to those of their own segment


CACHE_SPEC = P(None, (*BATCH, 'stage'), 'context', 'tensor')  # `stage` is 1 where there is a cache


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What a block needs to know of its tokens beside their activations: those of this device's part of `context`."""

    position_BT: jax.Array  # place in the document, int32
    segment_BT: jax.Array  # documents of a row, numbered from 1; 0 is padding
    backend: str  # of attention
    experts: str  # backend of the experts' grouped matmul
    sequence_split: bool = True  # between blocks each device of `tensor` holds a slice of the sequence, not all of it
    dropout_key: jax.Array | None = None  # one for all devices; None: no dropout
    row_B: jax.Array | None = None  # number of each row in the global batch, for dropout
    column_T: jax.Array | None = None  # number of each column in the row, for dropout
    microbatches: int = 1  # of a pipeline, into which the rows are cut; 1 where `stage` is 1
    decoding: bool = False  # one token a row, that sees the cache
    kind_BT: jax.Array | None = None  # what text a token is of, where the model has `segment_kinds`; None: all 0
    source: EncoderOutput | CrossKVCache | None = None  # what an encoder made of the rows' sources
    relative_RN: jax.Array | None = None  # relative positions' biases of this device's heads

    def my_microbatches(self) -> 'ForwardContext':
        """The rows that this stage works on outside of the pipeline."""
        return self._rows(lambda tree: my_microbatches(tree, self.microbatches))

    def microbatch(self, number: jax.Array) -> 'ForwardContext':
        """The rows of one microbatch."""
        return self._rows(lambda tree: microbatch(tree, number, self.microbatches))

    def _rows(self, choose) -> 'ForwardContext':
        names = ('position_BT', 'segment_BT', 'row_B', 'kind_BT')
        return dataclasses.replace(self, **choose({name: getattr(self, name) for name in names}))

    @property
    def live_BT(self) -> jax.Array:
        """Which of the tokens that stand between blocks on this device are real."""
        return (tensor_slice(self.segment_BT) if self.sequence_split else self.segment_BT) > 0

    def gather_sequence(self, x_BTD):
        """From the layout between blocks to this context's whole sequence on each device of `tensor`."""
        return gather_sequence(x_BTD) if self.sequence_split else x_BTD

    def reduce_scatter_sequence(self, x_BTD):
        """Partial sums over `tensor` to the layout between blocks."""
        return reduce_scatter_sequence(x_BTD) if self.sequence_split else psum(x_BTD, 'tensor')

    def dropout(self, x_BTD, rate: float, *site: int | jax.Array):
        """Zeroes a share of x; which ones depends on the key, the site, the row and the column alone, not on the mesh."""
        if self.dropout_key is None or rate == 0:
            return x_BTD
        key = self.dropout_key
        for number in site:
            key = jax.random.fold_in(key, number)
        column_T = tensor_slice(self.column_T, 0) if self.sequence_split else self.column_T
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        key_BT = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, self.row_B), column_T)
        keep_BTD = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[-1:])))(key_BT)
        return jnp.where(keep_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def weight(rngs: nnx.Rngs, c: ModelConfig, shape, spec: P, fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A normal weight of scale gain / √fan_in, born in its layout: no device ever holds all of it.

    Its values depend on the key and the shape, not on the mesh.
    """
    return nnx.Param(
        jax.random.normal(rngs.params(), shape, c.parameter_dtype, out_sharding=spec) * (gain * fan_in**-0.5)
    )


def constant(c: ModelConfig, value: float, shape, spec: P) -> nnx.Param:
    """A weight that starts the same everywhere: a norm's scale, a bias."""
    return nnx.Param(jnp.full(shape, value, c.parameter_dtype, out_sharding=spec))


def specs(tree):
    """The PartitionSpec of every array, read off its type."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def is_matrix(path) -> bool:
    """Whether the weight at a tree path is a matrix, which its name tells: q_DN is, scale_D and up_bias_EF are not."""
    return names_matrix(next(part.name for part in reversed(path) if '_' in getattr(part, 'name', '')))


def names_matrix(name: str) -> bool:
    """Whether a weight of this name is a matrix: its dims, the last part, are more than one."""
    return len(name.rpartition('_')[2]) > 1 and '_bias_' not in name


def residual_gain(c: ModelConfig) -> float:
    """Scale of the projections that write to the residual stream (GPT-2, section 2.3): 2 per layer add up to about 1."""
    return (2 * c.layers) ** -0.5


def linear(x_BTD, w_DN):
    """x @ w on tokens flattened to one dim: on a CPU the gradient is twice as fast as with two."""
    flat_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    # Of one token XLA for GPUs may write all products out before it adds them up; of two it does not.
    alone = len(flat_ND) == 1 and platform() == 'gpu'
    y_NM = (jnp.pad(flat_ND, ((0, 1), (0, 0))) @ w_DN)[:1] if alone else flat_ND @ w_DN
    return y_NM.reshape(*x_BTD.shape[:-1], -1)


def linear_back(x_BTN, w_DN):
    """x @ w.T, for weights kept with D first."""
    flat = lax.dot_general(x_BTN.reshape(-1, x_BTN.shape[-1]), w_DN, (((1,), (1,)), ((), ())))
    return flat.reshape(*x_BTN.shape[:-1], -1)


def rms_norm(x, scale, epsilon: float):
    """Zhang and Sennrich 2019 (arXiv:1910.07467), in at least float32; the result in x's dtype."""
    h = upcast(x)
    h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + epsilon)
    return (h * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dim."""

    def __init__(self, c: ModelConfig):
        self.config = c
        self.scale_D = constant(c, 1.0 - c.norm_offset, (c.model_dim,), P(None))
        if c.norm == 'layernorm' and c.bias:
            self.bias_D = constant(c, 0.0, (c.model_dim,), P(None))

    def __call__(self, x_BTD):
        c = self.config
        scale_D = offset(self.scale_D[...], c)
        if c.norm == 'rmsnorm':
            return rms_norm(x_BTD, scale_D, c.norm_epsilon)
        h = upcast(x_BTD)
        h = h - h.mean(-1, keepdims=True)
        h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + c.norm_epsilon) * scale_D[None, None]
        return (h + upcast(self.bias_D[...])[None, None] if c.bias else h).astype(x_BTD.dtype)


def offset(scale_D, c: ModelConfig):
    """The scale that a norm multiplies by, of the one that is kept, in at least float32."""
    return upcast(scale_D) + c.norm_offset if c.norm_offset else upcast(scale_D)


class Attention(nnx.Module):
    """Self-attention with any grouping of query and KV heads, heads split over `tensor`.

    Where `tensor` is a multiple of the KV heads, each of its devices uses one of them.
    """

    def __init__(self, c: ModelConfig, kind: LayerSpec, rngs: nnx.Rngs):
        self.config, self.windowed, self.turned = c, kind.windowed, kind.turned
        D, N, M, H = c.model_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.head_dim
        self.q_DN = weight(rngs, c, (D, N), P(FSDP, 'tensor'), fan_in=D)
        self.k_DM = weight(rngs, c, (D, M), P(FSDP, 'tensor'), fan_in=D)
        self.v_DM = weight(rngs, c, (D, M), P(FSDP, 'tensor'), fan_in=D)
        self.o_DN = weight(rngs, c, (D, N), P(FSDP, 'tensor'), fan_in=N, gain=residual_gain(c))
        if c.qkv_bias:
            self.q_bias_N = constant(c, 0.0, (N,), P('tensor'))
            self.k_bias_M = constant(c, 0.0, (M,), P('tensor'))
            self.v_bias_M = constant(c, 0.0, (M,), P('tensor'))
        if c.bias or c.o_bias:
            self.o_bias_D = constant(c, 0.0, (D,), P(None))
        if c.qk_norm == 'full':
            self.q_scale_N = constant(c, 1.0 - c.norm_offset, (N,), P('tensor'))
            self.k_scale_M = constant(c, 1.0 - c.norm_offset, (M,), P('tensor'))
        elif c.qk_norm:
            self.q_scale_H = constant(c, 1.0 - c.norm_offset, (H,), P(None))
            self.k_scale_H = constant(c, 1.0 - c.norm_offset, (H,), P(None))
        if c.attention_sinks:
            self.sink_N = constant(c, 0.0, (c.heads,), P('tensor'))

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """The block's output in the layout between blocks, and the cache with these tokens' keys and values at [layer]."""
        c, H = self.config, self.config.head_dim
        x_BTD = ctx.gather_sequence(x_BTD)
        q = linear(x_BTD, unshard(self.q_DN[...], x_BTD.dtype))
        k = linear(x_BTD, local_kv_heads(unshard(self.k_DM[...], x_BTD.dtype), c))
        v = linear(x_BTD, local_kv_heads(unshard(self.v_DM[...], x_BTD.dtype), c))
        if c.qkv_bias:
            q = q + self.q_bias_N.astype(q.dtype)[None, None]
            k = k + local_kv_heads(self.k_bias_M[...], c).astype(k.dtype)[None, None]
            v = v + local_kv_heads(self.v_bias_M[...], c).astype(v.dtype)[None, None]
        if c.qk_norm == 'full':
            q = norm_of_all(q, offset(self.q_scale_N[...], c), c.heads, c)
            k = norm_of_all(k, offset(local_kv_heads(self.k_scale_M[...], c), c), c.kv_heads, c)
        k_BTKH, v_BTKH = (a.reshape(*a.shape[:2], -1, H) for a in (k, v))
        q_BTKGH = q.reshape(*q.shape[:2], k_BTKH.shape[2], -1, H)
        if c.qk_norm and c.qk_norm != 'full':
            q_BTKGH = rms_norm(q_BTKGH, offset(self.q_scale_H[...], c), c.norm_epsilon)
            k_BTKH = rms_norm(k_BTKH, offset(self.k_scale_H[...], c), c.norm_epsilon)
        if c.query_scale_by_layer:
            q_BTKGH = (upcast(q_BTKGH) / (layer + 1)).astype(q_BTKGH.dtype)
        if c.positions == 'rotary' and self.turned:
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
        if c.attention_sinks:
            how['sink_KG'] = self.sink_N.reshape(q_BTKGH.shape[2:4])
        if ctx.relative_RN is not None:
            table_KGR = ctx.relative_RN.T.reshape(*q_BTKGH.shape[2:4], -1)
            how['relative'] = Relative(table_KGR, not c.causal, c.relative_most)
        if ctx.decoding:
            k_BSKH, v_BSKH = (cache_read(kept, layer, k_BTKH) for kept in cache[:2])
            a_BTKGH = cached_attention(q_BTKGH, k_BSKH, v_BSKH, ctx.position_BT, **how)
        else:
            how |= {'causal': c.causal, 'backend': ctx.backend, 'ring': True}
            a_BTKGH = attention(q_BTKGH, k_BTKH, v_BTKH, here, here, **how)
        y_BTD = ctx.reduce_scatter_sequence(
            linear_back(a_BTKGH.reshape(*q.shape[:2], -1), unshard(self.o_DN[...], q.dtype))
        )
        return (y_BTD + self.o_bias_D.astype(q.dtype)[None, None] if c.bias or c.o_bias else y_BTD), cache


def how_to_attend(c: ModelConfig, windowed: bool) -> dict[str, Any]:
    """The arguments of `attention` and `cached_attention` that the config decides."""
    scale = c.query_dim**-0.5 if c.query_scale is None else c.query_scale
    if c.rope_scaling and c.rope_scaling.mscale_all_dim:
        scale *= yarn_gain(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim) ** 2
    return {
        'window': c.window if windowed else None,
        'scale': scale,
        'softcap': c.attention_softcap,
    }


def norm_of_all(x_BTN, scale_N, heads: int, c: ModelConfig):
    """RMSNorm over all `heads` heads of all devices of `tensor`; heads of which several devices have copies count once."""
    h, n = upcast(x_BTN), lax.axis_size('tensor')
    copies = max(n // heads, 1)
    squares = psum((h * h).sum(-1, keepdims=True), 'tensor') / copies
    h = h * lax.rsqrt(squares / (heads * c.head_dim) + c.norm_epsilon)
    return (h * scale_N[None, None]).astype(x_BTN.dtype)


def cache_update(old_LBSM, new_BTKH, layer, position_BT):
    """A cache with new tokens' keys or values at [layer]: each device of `context` keeps those of its own positions."""
    n, rows_B1 = lax.axis_size('context'), jnp.arange(new_BTKH.shape[0])[:, None]
    slot_BT = jnp.where(position_BT % n == axis_index('context'), position_BT // n, old_LBSM.shape[2])
    new_BTM = pad_heads(new_BTKH, old_LBSM.shape[-1]).astype(old_LBSM.dtype)
    return old_LBSM.at[layer, rows_B1, slot_BT].set(new_BTM, mode='drop')


def pad_heads(a_BTKH, width: int):
    """Heads' keys or values as a cache has them, filled up to its width."""
    a_BTM = a_BTKH.reshape(*a_BTKH.shape[:2], -1)
    return jnp.pad(a_BTM, ((0, 0), (0, 0), (0, width - a_BTM.shape[-1])))


def cache_read(cached_LBSM, layer, like_BTKH):
    """The keys or values [B, S, K, H] at [layer], heads and dtype as those of `like_BTKH`."""
    K, H = like_BTKH.shape[2:]
    kept_BSM = cached_LBSM[layer].astype(like_BTKH.dtype)
    return kept_BSM[..., : K * H].reshape(*kept_BSM.shape[:2], K, H)


def local_kv_heads(w_DM, c: ModelConfig):
    """This device's KV heads, in the last dim. More devices along `tensor` than heads: the head that its query heads use."""
    n = lax.axis_size('tensor')
    if n <= c.kv_heads:
        return w_DM
    w_DM = lax.all_gather(w_DM, 'tensor', axis=w_DM.ndim - 1, tiled=True)
    head = lax.axis_index('tensor') * c.kv_heads // n
    return lax.dynamic_slice_in_dim(w_DM, head * c.head_dim, c.head_dim, axis=w_DM.ndim - 1)


def clamped_swiglu(gate, up, *, limit: float):
    """gpt-oss's gated unit (its published modeling code): a sigmoid of slope 1.702, both inputs cut off, up moved by 1."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable] = {
    'swiglu': lambda gate, up: jax.nn.silu(gate) * up,
    'geglu': lambda gate, up: jax.nn.gelu(gate) * up,
    'clamped_swiglu': clamped_swiglu,
    'gelu': jax.nn.gelu,  # the tanh form, as in GPT-2
    'gelu_exact': partial(jax.nn.gelu, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def activation(c: ModelConfig) -> Callable[..., jax.Array]:
    """Of an MLP's hidden units: a function of up, or of gate and up where `c.gated`."""
    found = ACTIVATIONS[c.activation]
    return partial(found, limit=c.activation_limit) if c.activation == 'clamped_swiglu' else found


class Mlp(nnx.Module):
    """Gated (Shazeer 2020, arXiv:2002.05202) or plain, hidden units split over `tensor`."""

    def __init__(self, c: ModelConfig, hidden: int, rngs: nnx.Rngs):
        self.config = c
        D, F = c.model_dim, hidden
        if c.gated:
            self.gate_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=D)
        self.up_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=D)
        self.down_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=F, gain=residual_gain(c))
        self.biased = c.bias or c.mlp_bias
        if self.biased:
            if c.gated:
                self.gate_bias_F = constant(c, 0.0, (F,), P('tensor'))
            self.up_bias_F = constant(c, 0.0, (F,), P('tensor'))
            self.down_bias_D = constant(c, 0.0, (D,), P(None))

    def __call__(self, x_BTD, ctx: ForwardContext):
        """The block's output in the layout between blocks."""
        c, dtype = self.config, x_BTD.dtype
        x_BTD = ctx.gather_sequence(x_BTD)
        h_BTF = linear(x_BTD, unshard(self.up_DF[...], dtype))
        if self.biased:
            h_BTF = h_BTF + self.up_bias_F.astype(dtype)[None, None]
        if c.gated:
            gate_BTF = linear(x_BTD, unshard(self.gate_DF[...], dtype))
            if self.biased:
                gate_BTF = gate_BTF + self.gate_bias_F.astype(dtype)[None, None]
            h_BTF = activation(c)(gate_BTF, h_BTF)
        else:
            h_BTF = activation(c)(h_BTF)
        y_BTD = ctx.reduce_scatter_sequence(linear_back(h_BTF, unshard(self.down_DF[...], dtype)))
        return y_BTD + self.down_bias_D.astype(dtype)[None, None] if self.biased else y_BTD
