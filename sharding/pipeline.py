"""A pipeline over `stage`, from one device's view: GPipe's schedule (Huang et al. 2019, arXiv:1811.06965) as one loop.

    tick        0    1    2    3    4   …           S stages, M microbatches, M + S - 1 ticks
    stage 0    m0   m1   m2   m3   m4               each stage works on every tick: in S - 1 of them on nothing that
    stage 1     ·   m0   m1   m2   m3               counts (·), which is the bubble, (S - 1) / (M + S - 1) of the work
    stage 2     ·    ·   m0   m1   m2

What stands outside of the pipeline (embedding, head, layers that no stage owns) is shared out: stage s works there on
the rows of microbatches s, s + S, s + 2S …, as if `stage` were one more axis of data parallelism.
Letters: m microbatches of this stage, M of all stages, S stages, B rows of one microbatch, T sequence, D model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.sharding.collectives import mark_varying, ring_shift


def ticks(microbatches: int, stages: int) -> int:
    """How often each stage applies its layers."""
    return microbatches + stages - 1


def bubble(microbatches: int, stages: int) -> float:
    """The share of the pipelined layers' work that counts for nothing."""
    return (stages - 1) / ticks(microbatches, stages)


def my_microbatches(tree: Any, microbatches: int) -> Any:
    """Of arrays whose rows every stage has, those of this stage's microbatches: what it works on outside the pipeline."""
    S = lax.axis_size('stage')
    if S == 1:
        return tree
    s = lax.axis_index('stage')

    def mine(a):
        by_stage = a.reshape(microbatches // S, S, a.shape[0] // microbatches, *a.shape[1:])
        return lax.dynamic_index_in_dim(by_stage, s, axis=1, keepdims=False).reshape(-1, *a.shape[1:])

    return jax.tree.map(mine, tree)


def microbatch(tree: Any, number: jax.Array, microbatches: int) -> Any:
    """The rows of one microbatch of arrays whose rows every stage has."""
    cut = lambda a: a.reshape(microbatches, a.shape[0] // microbatches, *a.shape[1:])
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(cut(a), number, keepdims=False), tree)


def pipeline(layers: Callable, x_mBTD: jax.Array) -> tuple[jax.Array, Any]:
    """All stages' layers on all microbatches; each stage gives and gets those that `my_microbatches` gives it.

    `layers(x_BTD, number)` applies this stage's layers to microbatch `number` and returns (x_BTD, sums): any pytree, which
    is added up over this stage's microbatches. Returns (x_mBTD, sums).

    Three things move one stage on a tick: microbatches that wait come nearer to stage 0, what stage s has worked on goes
    to s + 1, and what the last stage has finished goes towards the stage that its microbatch was dealt to.
    """
    S, s, m = lax.axis_size('stage'), lax.axis_index('stage'), x_mBTD.shape[0]
    M = m * S
    nearer = lambda x: ring_shift(x, 'stage', -1)

    def tick(carry, t):
        waiting_mBTD, x_BTD, done_mBTD, sums = carry
        in_slot = jnp.minimum(t // S, m - 1)  # microbatches come in, and later out, S from each slot
        next_BTD = lax.dynamic_index_in_dim(waiting_mBTD, in_slot, keepdims=False)
        number = t - s  # of the microbatch that this stage works on
        y_BTD, found = layers(jnp.where(s == 0, next_BTD, x_BTD), jnp.clip(number, 0, M - 1))
        counts = (number >= 0) & (number < M)
        sums = jax.tree.map(lambda a, b: a + jnp.where(counts, b, 0), sums, found)
        out_slot = jnp.maximum(t - (S - 1), 0) // S
        out_BTD = lax.dynamic_index_in_dim(done_mBTD, out_slot, keepdims=False)
        # Devices that a CPU simulates may start what does not wait in different orders, a send on one while another is in the
        # layers' own collectives, and then wait for each other for ever. So all sends wait for y; t is never negative.
        next_BTD, out_BTD = (jnp.where(t < 0, y_BTD, x) for x in (next_BTD, out_BTD))
        waiting_mBTD = lax.dynamic_update_index_in_dim(waiting_mBTD, nearer(next_BTD), in_slot, 0)
        out_BTD = jnp.where(s == S - 1, y_BTD, nearer(out_BTD))
        done_mBTD = lax.dynamic_update_index_in_dim(done_mBTD, out_BTD, out_slot, 0)
        return (waiting_mBTD, ring_shift(y_BTD, 'stage'), done_mBTD, sums), None

    nothing_BTD = jnp.zeros_like(x_mBTD[0])
    _, sums = jax.eval_shape(layers, x_mBTD[0], jnp.int32(0))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)
    start = mark_varying((x_mBTD, nothing_BTD, jnp.zeros_like(x_mBTD), zeros))
    (_, _, done_mBTD, sums), _ = lax.scan(tick, start, jnp.arange(ticks(M, S)))
    return done_mBTD, sums
