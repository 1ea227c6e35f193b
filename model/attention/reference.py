"""Attention in a few lines that are always right: every score at once, gradients by autodiff.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H head dim.
"""

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # the score of a key that must not be seen
FLOOR = -1e29  # the least maximum of a row: exp(HIDDEN - FLOOR) is 0, also in a row that sees nothing

At = tuple[jax.Array, jax.Array]  # (position, segment), int32 [B, T] each


def sees(q_at: At, k_at: At, window: int | None) -> jax.Array:
    """bool [B, T, S]: a query sees the keys of its own segment that are 0 to `window` - 1 positions behind it."""
    (q_position_BT, q_segment_BT), (k_position_BS, k_segment_BS) = q_at, k_at
    ago_BTS = q_position_BT[:, :, None] - k_position_BS[:, None, :]
    see_BTS = (q_segment_BT[:, :, None] == k_segment_BS[:, None, :]) & (ago_BTS >= 0)
    return see_BTS if window is None else see_BTS & (ago_BTS < window)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of scores and sums: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def reference(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_at: At, k_at: At, window: int | None, scale: float
) -> jax.Array:
    """softmax(scale q k') v over the keys that each query sees, 0 where it sees none: [B, T, K, G, H] in q's dtype."""
    acc = wide(q_BTKGH.dtype)
    see_BKGTS = sees(q_at, k_at, window)[:, None, None]
    s_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=acc)
    s_BKGTS = jnp.where(see_BKGTS, s_BKGTS, HIDDEN)
    max_BKGT1 = jax.lax.stop_gradient(jnp.maximum(s_BKGTS.max(-1, keepdims=True), FLOOR))
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    sum_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    p_BKGTS = p_BKGTS / jnp.where(sum_BKGT1 > 0, sum_BKGT1, 1)
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH.astype(acc), preferred_element_type=acc)
    return out_BTKGH.astype(q_BTKGH.dtype)
