"""Attention in a few lines that are always right: every score at once, gradients by autodiff.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H width of a query and a key,
U of a value, N buckets of distances.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.attention.mask import FLOOR, HIDDEN, QKV, MaskRule, sees
from weft.sharding.collectives import upcast, wide


class Relative(NamedTuple):
    """What is added to a score by how far apart query and key stand (T5: Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    table_KGN: jax.Array  # by head and bucket
    both_ways: bool  # half of the buckets are for keys after the query
    most: int  # positions from which on all share one bucket

    def bias(self, q_position_BT: jax.Array, k_position_BS: jax.Array) -> jax.Array:
        """[B, K, G, T, S]."""
        ahead_BTS = k_position_BS[:, None, :] - q_position_BT[:, :, None]
        bucket_BTS = relative_bucket(ahead_BTS, self.table_KGN.shape[-1], self.both_ways, self.most)
        return jnp.moveaxis(self.table_KGN[:, :, bucket_BTS], 2, 0)


def relative_bucket(ahead: jax.Array, buckets: int, both_ways: bool, most: int) -> jax.Array:
    """The bucket of a key that stands so many positions after the query: near ones each their own, far ones by logarithm.

    Of T5's published code (`_relative_position_bucket`).
    """
    first = jnp.zeros_like(ahead)
    if both_ways:
        buckets //= 2
        first, ahead = jnp.where(ahead > 0, buckets, 0), jnp.abs(ahead)
    else:
        ahead = -jnp.minimum(ahead, 0)
    near = buckets // 2
    share = jnp.log(jnp.maximum(ahead, 1).astype(jnp.float32) / near) / jnp.log(jnp.float32(most / near))
    far = jnp.minimum(near + (share * (buckets - near)).astype(ahead.dtype), buckets - 1)
    return first + jnp.where(ahead < near, ahead, far)


def masked_scores(
    inputs: QKV, rule: MaskRule, sink_KG: jax.Array | None, relative: Relative | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scores [B, K, G, T, S], the largest of each query [B, K, G, T, 1], at least FLOOR, and sinks [1, K, G, 1, 1]; `wide`."""
    q_BTKGH, k_BSKH, _, q_at, k_at = inputs
    s_BKGTS = rule.scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide(q_BTKGH.dtype))
    if rule.softcap is not None:
        s_BKGTS = rule.softcap * jnp.tanh(s_BKGTS / rule.softcap)
    if relative is not None:
        s_BKGTS = s_BKGTS + relative.bias(q_at[0], k_at[0]).astype(s_BKGTS.dtype)
    s_BKGTS = jnp.where(sees(q_at, k_at, rule.window, rule.causal)[:, None, None], s_BKGTS, HIDDEN)
    max_BKGT1 = jnp.maximum(s_BKGTS.max(-1, keepdims=True), FLOOR)
    if sink_KG is None:
        return s_BKGTS, max_BKGT1, None
    sink_1KG11 = sink_KG.astype(s_BKGTS.dtype)[None, :, :, None, None]
    return s_BKGTS, jnp.maximum(max_BKGT1, sink_1KG11), sink_1KG11


def softmax_weights(
    inputs: QKV, rule: MaskRule, *, sink_KG: jax.Array | None = None, relative: Relative | None = None
) -> jax.Array:
    """What each query gives each key of its attention, [B, K, G, T, S] in at least float32: over S they add up to 1.

    Less where there is a sink, and 0 for a query that sees no key.
    """
    s_BKGTS, max_BKGT1, sink_1KG11 = masked_scores(inputs, rule, sink_KG, relative)
    max_BKGT1 = lax.stop_gradient(max_BKGT1)
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    sum_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    if sink_1KG11 is not None:
        sum_BKGT1 = sum_BKGT1 + jnp.exp(sink_1KG11 - max_BKGT1)
    return p_BKGTS / jnp.where(sum_BKGT1 > 0, sum_BKGT1, 1)


def weighted_values(p_BKGTS: jax.Array, v_BSKU: jax.Array) -> jax.Array:
    """The values, weighted and added up, [B, T, K, G, U] in the dtype of the weights."""
    return jnp.einsum('BKGTS,BSKU->BTKGU', p_BKGTS, upcast(v_BSKU), preferred_element_type=p_BKGTS.dtype)


def reference_attention(
    inputs: QKV, rule: MaskRule, *, sink_KG: jax.Array | None = None, relative: Relative | None = None
) -> jax.Array:
    """softmax(scale q k') v over the keys that each query sees, 0 where it sees none: [B, T, K, G, U] in q's dtype."""
    p_BKGTS = softmax_weights(inputs, rule, sink_KG=sink_KG, relative=relative)
    return weighted_values(p_BKGTS, inputs.v_BSKU).astype(inputs.q_BTKGH.dtype)
