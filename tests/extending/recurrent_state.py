"""A layer with recurrent state: gated linear attention (Yang et al. 2024, arXiv:2312.06635).

Of each head a matrix S_t = a_t S_{t-1} + k_t v_tᵀ takes the place of keys and values; a token reads q_tᵀ S_t. The state goes
through a row in order: so over `context` rows are laid out anew, all of a row's tokens on each device, of a part of the heads.

Letters: B rows, T sequence, D model, N heads times H, n heads, H width of a head's query, key and value.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.kv_cache import ROWS, CacheArray, CacheSize, LayerCache
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import Size
from weft.model.parts.attention import MixerConfig
from weft.model.parts.registry import MIXERS
from weft.sharding.collectives import all_gather, all_to_all, axis_index
from weft.sharding.mesh import Divides


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
    """`model: {attention: {kind: linear, heads: 8, head_dim: 64}, positions: {kind: none}}`"""

    kind: Literal['linear'] = 'linear'
    heads: int
    head_dim: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache(LayerCache):
    """One array [L, B, n, H, H], whatever the length of a row; heads are split over `tensor` and `context`."""

    def write(self, state_BnHH) -> 'StateCache':
        (old,) = self.arrays
        return dataclasses.replace(self, arrays=(old.at[self.layer].set(state_BnHH.astype(old.dtype)),))


class LinearAttention(nnx.Module):
    """Heads are split over `tensor`, and where there is a state over `context` too."""

    def __init__(self, c: ModelConfig, spec: LayerSpec):
        self.config, a = c, c.attention
        D, N = Size(c.model_dim, 'model.model_dim'), Size(a.heads * a.head_dim, 'model.attention.heads', a.heads)
        self.q, self.k, self.v, self.decay = (Linear(D, N, part='attention') for _ in range(4))
        self.o = TransposedLinear(N, D, part='attention')

    @staticmethod
    def rules(c: ModelConfig) -> list[Divides]:
        return [Divides(('tensor', 'context'), 'model.attention.heads', c.attention.heads)]

    @staticmethod
    def cache(c: ModelConfig, spec: LayerSpec, size: CacheSize) -> StateCache:
        shape = size.rows, c.attention.heads, c.attention.head_dim, c.attention.head_dim
        return StateCache(
            (CacheArray(shape, str(jnp.promote_types(size.dtype, 'float32')), P(ROWS, ('tensor', 'context'))),)
        )

    def __call__(self, x_BTD, ctx: ForwardContext, cache: StateCache | None, layer):
        H = self.config.attention.head_dim
        x_BTD = ctx.gather_sequence(x_BTD)
        q, k, v, decay = (map_(x_BTD).reshape(*x_BTD.shape[:2], -1, H) for map_ in (self.q, self.k, self.v, self.decay))
        live_BT11 = (ctx.segment_BT > 0)[..., None, None]
        k, keep = (
            jnp.where(live_BT11, k, 0),
            jnp.where(live_BT11, jax.nn.sigmoid(decay + 2), 1),
        )  # padding changes nothing
        keep = jnp.where(live_BT11 & (ctx.position_BT == 0)[..., None, None], 0, keep)  # a document begins
        B, n = q.shape[0], q.shape[2]
        if ctx.decoding:
            m = n // lax.axis_size('context')
            mine = lambda a: lax.dynamic_slice_in_dim(a, axis_index('context') * m, m, 2)
            out_BTnH, state = recurrence(*map(mine, (q, k, v, keep)), cache.arrays[0][cache.layer])
            out_BTnH = all_gather(out_BTnH, 'context', 2)
        else:
            order_BT = ctx.segment_BT * (1 << 20) + ctx.position_BT
            order_BT = jnp.argsort(all_gather(order_BT, 'context', 1), axis=1)  # padding comes first
            there = [
                jnp.take_along_axis(all_to_all(a, 'context', 2, 1), order_BT[..., None, None], 1)
                for a in (q, k, v, keep)
            ]
            nothing = jnp.zeros_like(there[0], shape=(B, there[0].shape[2], H, H))
            out_BTnH, state = recurrence(*there, nothing)
            back_BT = jnp.argsort(order_BT, axis=1)[..., None, None]
            out_BTnH = all_to_all(jnp.take_along_axis(out_BTnH, back_BT, 1), 'context', 1, 2)
        if cache is not None:
            cache = cache.write(state)
        return self.o(out_BTnH.reshape(*out_BTnH.shape[:2], n * H), ctx.reduce_scatter_sequence), cache


def recurrence(q_BTnH, k_BTnH, v_BTnH, keep_BTnH, state_BnHH):
    """What each token reads, and the state after the last of them."""

    def step(state_BnHH, token):
        q, k, v, keep = token
        state_BnHH = keep[..., None] * state_BnHH + k[..., None] * v[:, :, None]
        return state_BnHH, jnp.einsum('BnH,BnHV->BnV', q, state_BnHH)

    tokens = [a.swapaxes(0, 1) for a in (q_BTnH, k_BTnH, v_BTnH, keep_BTnH)]
    state_BnHH, out_TBnH = lax.scan(step, state_BnHH.astype(q_BTnH.dtype), tokens)
    return out_TBnH.swapaxes(0, 1), state_BnHH


MIXERS.register('linear', LinearConfig, LinearAttention)
