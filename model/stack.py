"""Layers one after another, from one device's view: scanned, unrolled, or split over the stages of a pipeline.

Letters: B rows, T sequence, D model, m microbatches of this stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from weft.model.block import Block, mixer
from weft.model.compute import Remat
from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.kv_cache import CacheSize, KVCache, LayerCache
from weft.model.records import Records
from weft.sharding.collectives import mark_varying
from weft.sharding.mesh import platform
from weft.sharding.pipeline import pipeline

# Platform -> layers that are unrolled at most, of whole rows and of a decoding step: a loop's slices of weights, and of what
# is kept, are copies, and with them a decoding step takes up to twice as long. More keep the loop, to compile quickly.
UNROLLED = {'cpu': (8, 64), 'gpu': (16, 256)}
# TPUs read a slice of a stack where it is used, but for experts, all of which they would copy to multiply by a few.
UNROLLED_EXPERTS = {'tpu': (0, 64)}


def declared_cache(c: ModelConfig, size: CacheSize) -> tuple[LayerCache, ...]:
    """A decoder's cache as it is declared: what the mixers of each group of layers keep, with a leading dim of layers."""
    found = []
    for run in c.layer_groups:
        for kind in run.specs:
            one = mixer(c).cache(c, kind, size)
            found.append(dataclasses.replace(one, arrays=tuple(array.stacked(run.repeats) for array in one.arrays)))
    return tuple(found)


def apply_layers(
    blocks: tuple[Block, ...], x_BTD: jax.Array, ctx: ForwardContext, cache: KVCache | None, first: jax.Array | int
) -> tuple[jax.Array, tuple[Any, ...], list[Records]]:
    """x after the layers of a run, of which the first has number `first`; by kind their cache, and what each layer records.

    Each of `blocks` has the layers of one kind: stacked, or a list of them (inference/unstacked.py). `cache` is of these kinds.
    """
    nothing = (None,) * len(blocks)
    groups = nothing if cache is None else cache.groups
    sources = nothing if cache is None or cache.source is None else cache.source

    def unit(
        carry: tuple[jax.Array, tuple[Any, ...]], numbered: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, tuple[Any, ...]], list[Records]]:
        (x_BTD, groups), (blocks, sources, repeat) = carry, numbered
        number, kept, found = first + repeat * len(blocks), [], []
        for place, (block, group, source) in enumerate(zip(blocks, groups, sources, strict=True)):
            here = ctx if source is None else dataclasses.replace(ctx, source=source)
            here, records = here.recording(number + place)
            x_BTD, group = block(x_BTD, here, group and group.of_layer(repeat), number + place)
            kept.append(group and group.of_layer(None))
            found.append(records)
        return (x_BTD, tuple(kept)), mark_varying(found)

    if isinstance(blocks[0], nnx.List):
        by_repeat = []
        run: Callable[..., Any] = jax.jit(remat(unit, ctx.compute.remat, True))  # like layers are traced once
        for repeat, layers in enumerate(zip(*blocks, strict=True)):
            of_repeat = jax.tree.map(lambda kept, repeat=repeat: kept[repeat], sources)
            (x_BTD, groups), found = run((x_BTD, groups), (layers, of_repeat, repeat))
            by_repeat.append(found)
        return x_BTD, groups, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *by_repeat)
    repeats = jax.tree.leaves(blocks)[0].shape[0]
    unroll = is_unrolled(repeats * len(blocks), blocks[0].config, ctx.compute.remat, ctx.decoding, platform())
    run = remat(unit, ctx.compute.remat, unroll)
    (x_BTD, groups), records = lax.scan(run, (x_BTD, groups), (blocks, sources, jnp.arange(repeats)), unroll=unroll)
    return x_BTD, groups, records


def is_unrolled(layers: int, c: ModelConfig, kept: Remat, decoding: bool, on: str) -> bool:
    """Whether so many layers are unrolled, not a loop, on a platform."""
    # XLA for GPUs would compute all of them again at once, and what remat is to save would be there together.
    together = kept != 'none' and on == 'gpu' and not decoding
    most = UNROLLED.get(on) or (UNROLLED_EXPERTS.get(on) if c.moe else None) or (0, 0)
    return not together and layers <= most[decoding]


def apply_pipeline(
    blocks: tuple[Block, ...], x_BTD: jax.Array, ctx: ForwardContext, first: int, repeats: int
) -> tuple[jax.Array, list[Records]]:
    """Applies a run of blocks that is split over `stage`; x holds the rows of this stage's microbatches. No cache."""
    mine = jax.tree.leaves(blocks)[0].shape[0]
    before = lax.axis_index('stage') * mine

    def layers(x_BTD: jax.Array, number: jax.Array) -> tuple[jax.Array, list[Records]]:
        x_BTD, _, records = apply_layers(blocks, x_BTD, ctx.microbatch(number), None, first + before * len(blocks))
        return x_BTD, records

    m = ctx.microbatches // lax.axis_size('stage')
    x_mBTD, records = pipeline(layers, x_BTD.reshape(m, -1, *x_BTD.shape[1:]))

    def among_all(a: jax.Array) -> jax.Array:
        """What this stage's layers record, in an array for those of all stages."""
        return lax.dynamic_update_slice_in_dim(jnp.zeros((repeats, *a.shape[1:]), a.dtype), a, before, 0)

    return x_mBTD.reshape(x_BTD.shape), jax.tree.map(among_all, records)


def each_layer(f: Callable[[Any], Any], group: Any) -> Any:
    """f of each layer, stacked, of a group that is stacked or is a list of layers."""
    if isinstance(group, nnx.List):
        return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *map(f, group))
    return lax.map(f, group)


def remat(layer: Callable[..., Any], kept: Remat, unrolled: bool) -> Callable[..., Any]:
    """The layer, keeping for its backward pass what `compute.remat` says."""
    if kept == 'none':
        return layer
    policy = None if kept == 'block' else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolled)  # a loop's border keeps it apart anyhow
