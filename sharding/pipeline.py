"""A pipeline over `stage`, from one device's view: GPipe's schedule (Huang et al. 2019, arXiv:1811.06965) as one loop.

    tick        0    1    2    3    4   …           S stages, M microbatches, M + S - 1 ticks
    stage 0    m0   m1   m2   m3   m4               each stage works on every tick: in S - 1 of them on nothing that
    stage 1     ·   m0   m1   m2   m3               counts (·), which is the bubble, (S - 1) / (M + S - 1) of the work
    stage 2     ·    ·   m0   m1   m2

What stands outside of the pipeline (embedding, head, layers that no stage owns) is shared out: stage s works there on
the rows of microbatches s, s + S, s + 2S …, as if `stage` were one more axis of data parallelism. So each stage begins with
m = M / S microbatches, its slots, and ends with those same ones; three arrays move by one stage a tick (here S = 3):

                      tick 0     tick 1     tick 2     tick 3     tick 4
    waiting, slot 0  m0 m1 m2 ← m1 m2  · ← m2  ·  ·    ·  ·  ·    ·  ·  ·   towards stage 0, which takes one a tick
    waiting, slot 1  m3 m4 m5   m3 m4 m5   m3 m4 m5   m3 m4 m5 ← m4 m5  ·   from tick S on, and so forth
    at work          m0  ·  · → m1 m0  · → m2 m1 m0 → m3 m2 m1 → m4 m3 m2   to the stage that has the next layers
    done, slot 0      ·  ·  ·    ·  ·  ·    ·  · m0 ←  · m0 m1 ← m0 m1 m2   from stage S - 1 to the one whose slot it was

Letters: m microbatches of this stage, M of all stages, S stages, B rows of one microbatch, T sequence, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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

    def mine(a: jax.Array) -> jax.Array:
        by_stage = a.reshape(microbatches // S, S, a.shape[0] // microbatches, *a.shape[1:])
        return lax.dynamic_index_in_dim(by_stage, s, axis=1, keepdims=False).reshape(-1, *a.shape[1:])

    return jax.tree.map(mine, tree)


def microbatch(tree: Any, number: jax.Array, microbatches: int) -> Any:
    """The rows of one microbatch of arrays whose rows every stage has."""

    def rows(a: jax.Array) -> jax.Array:
        by_microbatch = a.reshape(microbatches, a.shape[0] // microbatches, *a.shape[1:])
        return lax.dynamic_index_in_dim(by_microbatch, number, keepdims=False)

    return jax.tree.map(rows, tree)


class Carry(NamedTuple):
    """What a stage holds between two ticks: see the drawing at the top."""

    waiting_mBTD: jax.Array  # microbatches that are to come in, by slot
    x_BTD: jax.Array  # what this stage works on next, unless it is the first
    done_mBTD: jax.Array  # microbatches that have come out, by slot
    sums: Any  # over what this stage has worked on


def pipeline(
    layers: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]], x_mBTD: jax.Array
) -> tuple[jax.Array, Any]:
    """All stages' layers on all microbatches; each stage gives and gets those that `my_microbatches` gives it.

    Args:
        layers: `layers(x_BTD, number)` applies this stage's layers to microbatch `number` and returns (x_BTD, sums): any
            pytree, which is added up over all microbatches.
        x_mBTD: this stage's microbatches.

    Returns:
        (x_mBTD, sums) after all stages' layers; the sums are those of this stage's layers.
    """
    S, s, m = lax.axis_size('stage'), lax.axis_index('stage'), x_mBTD.shape[0]
    M = m * S

    def work(carry: Carry, next_BTD: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        """This stage's layers on what it has at tick t; the sums with those of it, if it is a microbatch at all."""
        number = t - s
        y_BTD, found = layers(jnp.where(s == 0, next_BTD, carry.x_BTD), jnp.clip(number, 0, M - 1))
        counts = (number >= 0) & (number < M)
        return y_BTD, jax.tree.map(lambda a, b: a + jnp.where(counts, b, 0), carry.sums, found)

    def tick(carry: Carry, t: jax.Array) -> tuple[Carry, None]:
        in_slot, out_slot = jnp.minimum(t // S, m - 1), jnp.maximum(t - (S - 1), 0) // S
        next_BTD = lax.dynamic_index_in_dim(carry.waiting_mBTD, in_slot, keepdims=False)
        y_BTD, sums = work(carry, next_BTD, t)
        out_BTD = lax.dynamic_index_in_dim(carry.done_mBTD, out_slot, keepdims=False)
        # Devices that a CPU simulates may start what does not wait in different orders, a send on one while another is in the
        # layers' own collectives, and then wait for each other for ever. So all sends wait for y; t is never negative.
        next_BTD, out_BTD = (jnp.where(t < 0, y_BTD, x) for x in (next_BTD, out_BTD))
        next_BTD = ring_shift(next_BTD, 'stage', -1)
        out_BTD = jnp.where(s == S - 1, y_BTD, ring_shift(out_BTD, 'stage', -1))
        return Carry(
            lax.dynamic_update_index_in_dim(carry.waiting_mBTD, next_BTD, in_slot, 0),
            ring_shift(y_BTD, 'stage'),
            lax.dynamic_update_index_in_dim(carry.done_mBTD, out_BTD, out_slot, 0),
            sums,
        ), None

    _, shapes = jax.eval_shape(layers, x_mBTD[0], jnp.int32(0))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    start = mark_varying(Carry(x_mBTD, jnp.zeros_like(x_mBTD[0]), jnp.zeros_like(x_mBTD), zeros))
    end, _ = lax.scan(tick, start, jnp.arange(ticks(M, S)))
    return end.done_mBTD, end.sums
