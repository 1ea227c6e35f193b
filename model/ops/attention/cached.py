"""Attention of new tokens over a cache whose slots are split over `context`, as decoding needs it.

Letters: B batch rows, T queries (one, when decoding), S slots of this device, K key/value heads, G query heads per
key/value head, H width of a query and a key, U of a value.
"""

import jax
import jax.numpy as jnp

from weft.model.ops.attention.mask import FLOOR, HIDDEN, sees
from weft.model.ops.attention.reference import Relative
from weft.sharding.collectives import pmax, psum


def cached_attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    q_position_BT: jax.Array,
    k_position_BS: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sink_KG: jax.Array | None = None,
    relative: Relative | None = None,
) -> jax.Array:
    """softmax(scale q k') v over the slots of all devices of `context`, [B, T, K, G, U] in q's dtype; no gradient.

    Positions after the query's are not seen: a slot that is not filled yet is to have such a one. Each device sums over its
    own slots; only maxima and sums travel.
    """
    see_BTS = sees((q_position_BT, jnp.ones_like(q_position_BT)), (k_position_BS, jnp.ones_like(k_position_BS)), window)
    wide = jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    s_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide)
    if softcap is not None:
        s_BKGTS = softcap * jnp.tanh(s_BKGTS / softcap)
    if relative is not None:
        s_BKGTS = s_BKGTS + relative.bias(q_position_BT, k_position_BS).astype(wide)
    s_BKGTS = jnp.where(see_BTS[:, None, None], s_BKGTS, HIDDEN)
    max_BKGT1 = jnp.maximum(s_BKGTS.max(-1, keepdims=True), FLOOR)
    if sink_KG is not None:
        sink_1KG11 = sink_KG.astype(wide)[None, :, :, None, None]
        max_BKGT1 = jnp.maximum(max_BKGT1, sink_1KG11)
    max_BKGT1 = pmax(max_BKGT1, 'context')
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    out_BTKGU = jnp.einsum('BKGTS,BSKU->BTKGU', p_BKGTS, v_BSKU.astype(wide), preferred_element_type=wide)
    out_BTKGU, sum_BKGT = psum((out_BTKGU, p_BKGTS.sum(-1)), 'context')
    if sink_KG is not None:
        sum_BKGT = sum_BKGT + jnp.exp(sink_1KG11 - max_BKGT1)[..., 0]
    return (out_BTKGU / sum_BKGT.transpose(0, 3, 1, 2)[..., None]).astype(q_BTKGH.dtype)
