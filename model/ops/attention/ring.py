"""Attention over a sequence that is split over the mesh axis `context`: queries stay, keys and values go round.

Ring attention, Liu et al. 2023 (arXiv:2310.01889). In each of n ticks a device's queries meet the keys and values of one
device of the n, while those of the next tick are already on their way; what the ticks give is merged by their
log-sum-exps. In the backward pass, which keeps what one device's attention keeps and no copy of another's keys (Dao 2023,
arXiv:2307.08691), dk and dv follow their keys and values and end at home. Tokens say where they stand, so that they may
lie in any order over the devices; `zigzag` is the one in which causal attention is equal work for all.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H head dim, all from one
device's view; n devices of `context`. A plain k or v is in whatever layout a backend's tick wants.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.attention import blockwise, flash
from weft.model.ops.attention.mask import FLOOR, QKV, Keys, MaskRule
from weft.model.ops.attention.reference import reference_attention
from weft.runtime.errors import UserError
from weft.sharding.collectives import ring_shift

AXIS = 'context'


def ring_attention(inputs: QKV, rule: MaskRule, backend: str, **options: Any) -> jax.Array:
    """What `reference_attention` gives of this device's queries and the keys of all devices of `context`, [B, T, K, G, H].

    Raises:
        UserError: a backend that cannot be a tick of the ring.
    """
    if backend not in _RING:
        raise UserError(
            f'attention backend {backend} masks by slot and takes no keys from other devices: with mesh.context above 1 '
            f'use blockwise'
        )
    return _RING[backend](inputs, rule, **options)


def ring_reference(inputs: QKV, rule: MaskRule, **options: Any) -> jax.Array:
    """Every device with all keys at once, gradients by autodiff."""
    q_BTKGH, k_BSKH, v_BSKU, q_at, k_at = inputs
    k_BSKH, v_BSKU, k_at = lax.all_gather((k_BSKH, v_BSKU, k_at), AXIS, axis=1, tiled=True)
    return reference_attention(QKV(q_BTKGH, k_BSKH, v_BSKU, q_at, k_at), rule, **options)


def ring_blockwise(
    inputs: QKV, rule: MaskRule, tile: int | None = None, *, sink_KG: jax.Array | None = None
) -> jax.Array:
    """A tick is `blockwise`'s tiles. Arguments as `blockwise_attention`'s."""
    q_tile, at_c, keys = blockwise.in_tiles(inputs, tile)
    tick = Tick(blockwise.more_keys, blockwise.more_keys_back, rule, inputs.v_BSKU.shape[-1])
    return ring(blockwise.fill(inputs.q_BTKGH, q_tile), at_c, keys, sink_KG, tick)[:, : inputs.q_BTKGH.shape[1]]


def ring_flash(inputs: QKV, rule: MaskRule, tiling: flash.Tilings | None = None) -> jax.Array:
    """A tick is `flash`'s kernels. Arguments as `flash_attention`'s."""
    tiles, plan = flash.in_tiles(inputs, rule, tiling)
    tick = Tick(flash_tick, flash_tick_back, plan, inputs.v_BSKU.shape[-1])
    return ring(*tiles, None, tick)[:, : inputs.q_BTKGH.shape[1]]


_RING: dict[str, Callable[..., jax.Array]] = {
    'reference': ring_reference,
    'blockwise': ring_blockwise,
    'flash': ring_flash,
}


# One tick: all queries of a device with the keys of one device ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tick:
    """What a backend does in a tick; `keys` are k, v and their places as it wants them, and `wide` is float32 or more.

    forward(state, q_BTKGH, q_at, keys, plan): the state (`blockwise.State` of [B, T, K, G] queries) with these keys too.
    backward(dq_BTKGH, q_BTKGH, q_at, keys, dout_BTKGH, lse_BTKG, delta_BTKG, plan): dq (wide) with these keys' part added,
    and their dk and dv (wide), given log-sum-exp and delta over the keys of all devices.
    """

    forward: Callable[..., blockwise.State]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    plan: Any
    value_width: int


def flash_tick(
    state: blockwise.State, q_BTKGH: jax.Array, at_BiT: jax.Array, keys: Keys, plan: flash.Plan
) -> blockwise.State:
    out_BTKGH, lse_BNT = flash.tiles_forward(q_BTKGH, at_BiT, keys, plan, jnp.float32)
    # Where no key is seen FLOOR itself: a compiler may keep more digits of a product (in a fused multiply-add), and in what
    # `merge` subtracts, at 1e29, the difference of one rounding is an infinite exponential.
    lse_BNT = jnp.where(lse_BNT > FLOOR / 2, lse_BNT * math.log(2), FLOOR)
    lse_BTKG = lse_BNT.swapaxes(1, 2).reshape(q_BTKGH.shape[:-1])
    return blockwise.merge(state, (lse_BTKG, jnp.ones_like(lse_BTKG), out_BTKGH))  # an output's weights add up to 1


def flash_tick_back(
    dq_BTKGH: jax.Array,
    q_BTKGH: jax.Array,
    at_BiT: jax.Array,
    keys: Keys,
    dout_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    delta_BTKG: jax.Array,
    plan: flash.Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    lse_BNT, delta_BNT = flash.by_head(lse_BTKG * math.log2(math.e)), flash.by_head(delta_BTKG)
    dq, dk, dv = flash.tiles_backward(q_BTKGH, at_BiT, keys, dout_BTKGH, lse_BNT, delta_BNT, plan, jnp.float32)
    return dq_BTKGH + dq, dk, dv


# All ticks ------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(q_BTKGH: jax.Array, q_at: Any, keys: Keys, sink_KG: jax.Array | None, tick: Tick) -> jax.Array:
    return ring_forward(q_BTKGH, q_at, keys, sink_KG, tick)[0]


def ring_forward(q_BTKGH: jax.Array, q_at: Any, mine: Keys, sink_KG: jax.Array | None, tick: Tick) -> tuple[Any, ...]:
    def meet(state: blockwise.State, keys: Keys) -> blockwise.State:
        return tick.forward(state, q_BTKGH, q_at, keys, tick.plan)

    def one_tick(carry: tuple[blockwise.State, Keys], _: None) -> tuple[tuple[blockwise.State, Keys], None]:
        state, keys = carry
        coming = ring_shift(keys, AXIS)  # wants nothing of this tick's work, so that it is sent meanwhile
        return (meet(state, keys), coming), None

    start = blockwise.nothing(q_BTKGH, tick.value_width), mine
    (state, last), _ = lax.scan(one_tick, start, length=lax.axis_size(AXIS) - 1)
    state = meet(state, last)
    sink_BTKG = None
    if sink_KG is not None:
        sink_BTKG = jnp.broadcast_to(sink_KG.astype(state[0].dtype)[None, None], state[0].shape)
    out_BTKGH, lse_BTKG = blockwise.finish(state, sink_BTKG)
    out_BTKGH = out_BTKGH.astype(q_BTKGH.dtype)
    return out_BTKGH, (q_BTKGH, q_at, mine, sink_KG, out_BTKGH, lse_BTKG)


Back = tuple[jax.Array, list[jax.Array], Keys]  # dq; dk and dv, and the keys that they are of, on their way


def ring_backward(tick: Tick, kept: tuple[Any, ...], dout_BTKGH: jax.Array) -> tuple[Any, ...]:
    q_BTKGH, q_at, mine, sink_KG, out_BTKGH, lse_BTKG = kept
    delta_BTKG = (dout_BTKGH.astype(lse_BTKG.dtype) * out_BTKGH).sum(-1)

    def meet(dq_BTKGH: jax.Array, keys: Keys) -> tuple[jax.Array, list[jax.Array]]:
        dq_BTKGH, *dkv = tick.backward(dq_BTKGH, q_BTKGH, q_at, keys, dout_BTKGH, lse_BTKG, delta_BTKG, tick.plan)
        return dq_BTKGH, dkv

    def one_tick(carry: Back, _: None) -> tuple[Back, None]:
        dq_BTKGH, dkv, keys = carry
        coming, dkv = ring_shift(keys, AXIS), ring_shift(dkv, AXIS)  # both while these keys are being used
        dq_BTKGH, more = meet(dq_BTKGH, keys)
        return (dq_BTKGH, jax.tree.map(jnp.add, dkv, more), coming), None

    # The first tick has no sums to receive, the last no keys to send.
    coming = ring_shift(mine, AXIS)
    start = *meet(blockwise.like(q_BTKGH, q_BTKGH.shape), mine), coming
    (dq_BTKGH, dkv, keys), _ = lax.scan(one_tick, start, length=lax.axis_size(AXIS) - 2)
    dkv = ring_shift(dkv, AXIS)
    dq_BTKGH, more = meet(dq_BTKGH, keys)
    dk, dv = ring_shift(jax.tree.map(jnp.add, dkv, more), AXIS)  # home
    dsink_KG = None
    if sink_KG is not None:
        share_BTKG = jnp.exp(sink_KG.astype(lse_BTKG.dtype)[None, None] - lse_BTKG)
        dsink_KG = -(share_BTKG * delta_BTKG).sum((0, 1)).astype(sink_KG.dtype)
    return dq_BTKGH.astype(q_BTKGH.dtype), None, (dk.astype(mine[0].dtype), dv.astype(mine[1].dtype), None), dsink_KG


ring.defvjp(ring_forward, ring_backward)
