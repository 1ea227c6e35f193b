"""Attention of new tokens over a cache whose slots are split over `context`, as decoding needs it.

Letters: B batch rows, T queries (one, when decoding), S slots of this device, K key/value heads, G query heads per
key/value head, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from model.attention.mask import FLOOR, HIDDEN, sees


def cached_attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    *,
    window: int | None,
    scale: float,
) -> jax.Array:
    """softmax(q k' / √H) v over the slots of all devices of `context`, [B, T, K, G, H] in q's dtype; no gradient.

    Slot s of device i holds position s n + i. Positions after the query's are not seen, so slots that are not filled
    yet are not either. Each device sums over its own slots; only maxima and sums travel.
    """
    S, n = k_BSKH.shape[1], lax.axis_size('context')
    slot_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) * n + lax.axis_index('context'), k_BSKH.shape[:2])
    see_BTS = sees((position_BT, jnp.ones_like(position_BT)), (slot_BS, jnp.ones_like(slot_BS)), window)
    wide = jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    s_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide)
    s_BKGTS = jnp.where(see_BTS[:, None, None], s_BKGTS, HIDDEN)
    max_BKGT1 = lax.pmax(jnp.maximum(s_BKGTS.max(-1, keepdims=True), FLOOR), 'context')
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH.astype(wide), preferred_element_type=wide)
    out_BTKGH, sum_BKGT = lax.psum((out_BTKGH, p_BKGTS.sum(-1)), 'context')
    return (out_BTKGH / sum_BKGT.transpose(0, 3, 1, 2)[..., None]).astype(q_BTKGH.dtype)
