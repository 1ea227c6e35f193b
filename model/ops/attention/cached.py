"""Attention of new tokens over a cache whose slots are split over `context`, as decoding needs it.

Letters: B batch rows, T queries (one, when decoding), S slots of this device, K key/value heads, G query heads per
key/value head, H width of a query and a key, U of a value.
"""

import jax
import jax.numpy as jnp

from weft.model.ops.attention.mask import QKV, MaskRule
from weft.model.ops.attention.reference import Relative, masked_scores
from weft.sharding.collectives import pmax, psum, upcast


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
    rule = MaskRule(window, scale, softcap)
    q_at, k_at = ((position, jnp.ones_like(position)) for position in (q_position_BT, k_position_BS))
    inputs = QKV(q_BTKGH, k_BSKH, v_BSKU, q_at, k_at)
    s_BKGTS, max_BKGT1, sink_1KG11 = masked_scores(inputs, rule, sink_KG, relative)
    max_BKGT1 = pmax(max_BKGT1, 'context')
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    out_BTKGU = jnp.einsum('BKGTS,BSKU->BTKGU', p_BKGTS, upcast(v_BSKU), preferred_element_type=p_BKGTS.dtype)
    out_BTKGU, sum_BKGT = psum((out_BTKGU, p_BKGTS.sum(-1)), 'context')
    if sink_1KG11 is not None:
        sum_BKGT = sum_BKGT + jnp.exp(sink_1KG11 - max_BKGT1)[..., 0]
    return (out_BTKGU / sum_BKGT.transpose(0, 3, 1, 2)[..., None]).astype(q_BTKGH.dtype)
