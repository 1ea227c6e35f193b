"""Attention in a few lines that are always right: every score at once, gradients by autodiff.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from model.attention.mask import FLOOR, HIDDEN, At, sees


def reference_attention(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_at: At, k_at: At, window: int | None, scale: float
) -> jax.Array:
    """softmax(scale q k') v over the keys that each query sees, 0 where it sees none: [B, T, K, G, H] in q's dtype."""
    wide = jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    s_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide)
    s_BKGTS = jnp.where(sees(q_at, k_at, window)[:, None, None], s_BKGTS, HIDDEN)
    p_BKGTS = jnp.exp(s_BKGTS - lax.stop_gradient(jnp.maximum(s_BKGTS.max(-1, keepdims=True), FLOOR)))
    sum_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    p_BKGTS = p_BKGTS / jnp.where(sum_BKGT1 > 0, sum_BKGT1, 1)
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH.astype(wide), preferred_element_type=wide)
    return out_BTKGH.astype(q_BTKGH.dtype)
