"""Attention of a layer, from one device's view: by a kernel or, where somebody asks for its pattern, with that as an array.

A kernel never holds the pattern, which query gives how much to which key. Asked for, all of it is made, as the reference
does, and what stands there after edits weights the values. Its keys are in the order of the row's columns, however `context`
lays them out.

Letters: B rows, T queries of this device, S keys of a row, K key/value heads, G query heads per key/value head, N query heads
of this device, H width of a query and a key, U of a value, C columns of a row, while decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from weft.model.context import ForwardContext
from weft.model.ops.attention import attention
from weft.model.ops.attention.cached import cached_attention
from weft.model.ops.attention.mask import QKV, MaskRule
from weft.model.ops.attention.reference import Relative, masked_scores, softmax_weights, weighted_values
from weft.sharding.collectives import all_gather, match_varying, pmax, psum
from weft.sharding.mesh import BATCH

PATTERN = 'attention.pattern'
HEADS = P(BATCH, 'context', 'tensor')  # of [B, T, heads, …]: whole sequences on each device of `tensor`, heads split


def tap_heads(name: str, a_BTKGH: jax.Array, ctx: ForwardContext) -> jax.Array:
    """Offers what each query head has, as [B, T, heads, H]."""
    heads = a_BTKGH.reshape(*a_BTKGH.shape[:2], -1, a_BTKGH.shape[-1])
    return ctx.tap(name, heads, HEADS).reshape(a_BTKGH.shape)


def attend_own(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, ctx: ForwardContext, **how: Any) -> jax.Array:
    """Attention of tokens to each other, [B, T, K, G, U]; `how`: arguments of `attention`."""
    here = (ctx.position_BT, ctx.segment_BT)
    if not ctx.asks(PATTERN):
        return attention(q_BTKGH, k_BTKH, v_BTKU, here, here, **how, backend=ctx.compute.attention, ring=True)
    assert ctx.column_T is not None, 'whole rows are read'
    order_S = jnp.argsort(all_gather(ctx.column_T, 'context'))

    def in_order(a_BT: jax.Array) -> jax.Array:
        return all_gather(a_BT, 'context', 1)[:, order_S]

    k_BSKH, v_BSKU, *there = map(in_order, (k_BTKH, v_BTKU, *here))
    rule, extras = rule_of(how)
    inputs, extras = match_varying((QKV(q_BTKGH, k_BSKH, v_BSKU, here, (there[0], there[1])), extras))
    p_BKGTS = tap_pattern(softmax_weights(inputs, rule, **extras), ctx)
    return weighted_values(p_BKGTS, inputs.v_BSKU).astype(q_BTKGH.dtype)


def attend_cached(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, k_position_BS: jax.Array, ctx: ForwardContext, **how: Any
) -> jax.Array:
    """Attention of new tokens to the slots of a cache, [B, T, K, G, U]; `how`: arguments of `cached_attention`."""
    if not (ctx.slots and ctx.asks(PATTERN)):
        return cached_attention(q_BTKGH, k_BSKH, v_BSKU, ctx.position_BT, k_position_BS, **how)
    rule, extras = rule_of(how)
    q_at, k_at = ((position, jnp.ones_like(position)) for position in (ctx.position_BT, k_position_BS))
    inputs = QKV(q_BTKGH, k_BSKH, v_BSKU, q_at, k_at)
    s_BKGTS, max_BKGT1, sink_1KG11 = masked_scores(inputs, rule, extras['sink_KG'], extras['relative'])
    max_BKGT1 = pmax(max_BKGT1, 'context')
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    sum_BKGT1 = psum(p_BKGTS.sum(-1, keepdims=True), 'context')
    if sink_1KG11 is not None:
        sum_BKGT1 = sum_BKGT1 + jnp.exp(sink_1KG11 - max_BKGT1)
    # Slots of all devices of `context` to the columns whose keys they hold, and back to those of this device.
    at_BSC = (k_position_BS[..., None] == jnp.arange(ctx.slots)[None, None]).astype(p_BKGTS.dtype)
    p_BKGTC = psum(jnp.einsum('BKGTS,BSC->BKGTC', p_BKGTS / sum_BKGT1, at_BSC, precision='highest'), 'context')
    p_BKGTS = jnp.einsum('BKGTC,BSC->BKGTS', tap_pattern(p_BKGTC, ctx), at_BSC, precision='highest')
    return psum(weighted_values(p_BKGTS, v_BSKU), 'context').astype(q_BTKGH.dtype)


def tap_pattern(p_BKGTS: jax.Array, ctx: ForwardContext) -> jax.Array:
    """Offers the pattern as [B, T, heads, S]."""
    B, K, G, T, S = p_BKGTS.shape
    p_BTNS = ctx.tap(PATTERN, p_BKGTS.reshape(B, K * G, T, S).swapaxes(1, 2), HEADS)
    return p_BTNS.swapaxes(1, 2).reshape(p_BKGTS.shape)


def rule_of(how: dict[str, Any]) -> tuple[MaskRule, dict[str, Any]]:
    """Arguments of `attention` as a rule of who sees whom, and the arrays beside it."""
    rule = MaskRule(how['window'], how['scale'], how['softcap'], how.get('causal', True))
    relative: Relative | None = how.get('relative')
    return rule, {'sink_KG': how.get('sink_KG'), 'relative': relative}
