"""Attention of new tokens over a cache whose slots are split over `context`, as decoding needs it.

Letters: B batch rows, T queries (one, when decoding), S slots of this device, K key/value heads, G query heads per
key/value head, H width of a query and a key, U of a value.
"""

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.attention.mask import FLOOR, HIDDEN, sees
from weft.model.ops.attention.reference import Relative
from weft.sharding.collectives import axis_index, pmax, psum


def cached_attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    position_BT: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sink_KG: jax.Array | None = None,
    relative: Relative | None = None,
    length_B: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k') v over the slots of all devices of `context`, [B, T, K, G, U] in q's dtype; no gradient.

    Slot s of device i holds position s n + i. Positions after the query's are not seen, so slots that are not filled
    yet are not either; with `length_B` all positions below a row's length are, and no others (cross-attention). Each
    device sums over its own slots; only maxima and sums travel.
    """
    S, n = k_BSKH.shape[1], lax.axis_size('context')
    slot_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) * n + axis_index('context'), k_BSKH.shape[:2])
    if length_B is None:
        see_BTS = sees((position_BT, jnp.ones_like(position_BT)), (slot_BS, jnp.ones_like(slot_BS)), window)
    else:
        see_BTS = jnp.broadcast_to((slot_BS < length_B[:, None])[:, None], (*position_BT.shape, S))
    wide = jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    s_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide)
    if softcap is not None:
        s_BKGTS = softcap * jnp.tanh(s_BKGTS / softcap)
    if relative is not None:
        s_BKGTS = s_BKGTS + relative.bias(position_BT, slot_BS).astype(wide)
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
