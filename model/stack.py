"""Layers one after another, from one device's view: scanned, written out, or split over the stages of a pipeline.

Letters: B rows, T sequence, D model, m microbatches of this stage.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from weft.model.block import Block
from weft.model.compute import Remat
from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.kv_cache import KVCache
from weft.sharding.collectives import mark_varying
from weft.sharding.mesh import platform
from weft.sharding.pipeline import pipeline

# Platform -> layers that are written out at most, of whole rows and of a decoding step: a loop's slices of weights, and of what
# is kept, are copies, and with them a decoding step takes up to twice as long. More keep the loop, to compile quickly.
UNROLLED = {'cpu': (8, 64), 'gpu': (16, 256)}


# TPUs read a slice of a stack where it is used, but for experts, all of which they would copy to multiply by a few.
UNROLLED_EXPERTS = {'tpu': (0, 64)}


def in_order(blocks: tuple[Block, ...], x_BTD, ctx: ForwardContext, cache: KVCache | None, first):
    """x after the layers of a run, of which the first has number `first`; the cache; by kind the figures of each layer.

    Each of `blocks` has the layers of one kind: stacked, or a list of them (inference/unstacked.py).
    """

    def unit(carry, numbered):
        (x_BTD, cache), (blocks, number) = carry, numbered
        figures = []
        for place, block in enumerate(blocks):
            x_BTD, cache, found = block(x_BTD, ctx, cache, number + place)
            figures.append(found)
        return (x_BTD, cache), mark_varying(figures)

    if isinstance(blocks[0], nnx.List):
        figures = []
        run = jax.jit(remat(unit, ctx.compute.remat, True))  # like layers are traced once
        for number, layers in enumerate(zip(*blocks, strict=True)):
            (x_BTD, cache), found = run((x_BTD, cache), (layers, first + number * len(blocks)))
            figures.append(found)
        return x_BTD, cache, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *figures)
    repeats = jax.tree.leaves(blocks)[0].shape[0]
    unroll = written_out(repeats * len(blocks), blocks[0].config, ctx.compute.remat, ctx.decoding, platform())
    run = remat(unit, ctx.compute.remat, unroll)
    numbers = first + jnp.arange(repeats) * len(blocks)
    (x_BTD, cache), figures = lax.scan(run, (x_BTD, cache), (blocks, numbers), unroll=unroll)
    return x_BTD, cache, figures


def written_out(layers: int, c: ModelConfig, kept: Remat, decoding: bool, on: str) -> bool:
    """Whether so many layers are no loop on a platform."""
    # XLA for GPUs would compute all of them again at once, and what remat is to save would be there together.
    together = kept != 'none' and on == 'gpu' and not decoding
    most = UNROLLED.get(on) or (UNROLLED_EXPERTS.get(on) if c.moe else None) or (0, 0)
    return not together and layers <= most[decoding]


def pipelined(blocks: tuple[Block, ...], x_BTD, ctx: ForwardContext, first, repeats: int):
    """Applies a run of blocks that is split over `stage`; x holds the rows of this stage's microbatches. No cache."""
    mine = jax.tree.leaves(blocks)[0].shape[0]
    before = lax.axis_index('stage') * mine

    def layers(x_BTD, number):
        x_BTD, _, figures = in_order(blocks, x_BTD, ctx.microbatch(number), None, first + before * len(blocks))
        return x_BTD, figures

    m = ctx.microbatches // lax.axis_size('stage')
    x_mBTD, figures = pipeline(layers, x_BTD.reshape(m, -1, *x_BTD.shape[1:]))
    place = lambda a: lax.dynamic_update_slice_in_dim(jnp.zeros((repeats, *a.shape[1:]), a.dtype), a, before, 0)
    return x_mBTD.reshape(x_BTD.shape), jax.tree.map(place, figures)


def by_layer(figures: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The figures of all groups with a router as one: name -> [L, …], group after group."""
    found = [of_group for of_group in figures if of_group]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found) if found else {}


def remat(layer, kept: Remat, unrolled: bool):
    """The layer, keeping for its backward pass what `compute.remat` says."""
    if kept == 'none':
        return layer
    policy = None if kept == 'block' else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolled)  # a loop's border keeps it apart anyhow
