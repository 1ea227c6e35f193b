"""Layers as arrays of their own, as decoding reads them: out of a stack each step would copy every layer's weights first."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from weft.model.decoder import Decoder
from weft.model.stack import is_unrolled
from weft.sharding.mesh import platform


def is_written_out(model: Decoder) -> bool:
    """Whether a decoding step on the current mesh's platform has no loop over this model's layers."""
    return is_unrolled(model.config.layers, model.config, model.compute.remat, True, platform())


def unstacked(model: Decoder, divide: Callable[[Any], list[Any]]) -> Decoder:
    """The model with stacked layers as lists: `divide` (`divided`, or `kinds` of shapes) makes L parts of a weight [L, …]."""
    model = jax.tree.map(lambda w: w, model)  # the modules anew, with the same arrays
    for number, group in enumerate(model.groups):
        leaves, structure = jax.tree.flatten(group)
        parts = [divide(w) for w in leaves]
        model.groups[number] = nnx.List([jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)])
    return model


def kinds(stack: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    """Shape, dtype and layout of each layer's part of a stack."""
    return [stack.update(shape=stack.shape[1:], sharding=_of_layer(stack.sharding))] * stack.shape[0]


def divided(stack: jax.Array) -> list[jax.Array]:
    """Each layer's part of a stack, which is gone afterwards: no more than one stack is ever there twice, on a CPU none."""
    if platform() == 'cpu':
        # A CPU's array can lie in memory that NumPy knows, and so can its parts.
        layout, shape = _of_layer(stack.sharding), stack.shape[1:]
        shards = [(np.asarray(shard.data), shard.device) for shard in stack.addressable_shards]

        def here(layer: int) -> list[jax.Array]:
            return [jax.device_put(part[layer], device) for part, device in shards]

        whole = jax.make_array_from_single_device_arrays
        return [whole(shape, layout, here(layer), dtype=stack.dtype) for layer in range(stack.shape[0])]
    parts = list(_divide(stack))
    jax.block_until_ready(parts)
    stack.delete()
    return parts


@jax.jit
def _divide(stack: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(stack[layer] for layer in range(stack.shape[0]))


def _of_layer(layout: Any) -> NamedSharding:
    return NamedSharding(layout.mesh, P(*layout.spec[1:]))
