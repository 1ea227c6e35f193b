"""Published tensors onto a mesh and back, a block at a time: no host ever holds an array, nor a device more than its shards.

Bounds are the begin and end of a part along each dim of one of our arrays.
"""

import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding

from weft.hub.families import Tensor, TensorPart
from weft.hub.tensor_files import full_index
from weft.runtime.errors import UserError
from weft.storage.array_slices import (
    NO_MESH,
    Bounds,
    aligned_zeros,
    bounds_of,
    host_slice,
    is_host,
    overlap,
    slice_shape,
    split_bounds,
)

BLOCK = 2**26  # bytes that a host holds of an array at a time
TILE = 256  # rows and columns
Read = Callable[[str, tuple[Any, ...]], np.ndarray]  # a part of a published tensor, by its name
Places = Mapping[tuple[int, ...], tuple[Tensor, TensorPart]]  # of one array, by its first dims


def arrays(
    table: Iterable[Tensor], shapes: Mapping[str, jax.ShapeDtypeStruct], read: Read, mesh: jax.sharding.Mesh
) -> Iterator[tuple[str, jax.Array]]:
    """Our arrays by name, one after another, in their layout on the mesh.

    `shapes` and `table` are those of hub/tensor_table.py. What no tensor fills (rows that pad the vocabulary) is 0.
    """
    places: dict[str, dict[tuple[int, ...], tuple[Tensor, TensorPart]]] = defaultdict(dict)
    for one in table:
        for part in one.parts:
            places[part.leaf][part.at] = (one, part)
    for leaf, shape in shapes.items():
        layout = NamedSharding(mesh, shape.sharding.spec)
        # No name here: the last array is gone, unless its taker keeps it, before the next is made.
        yield leaf, array(jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout), places[leaf], read)


def array(kind: jax.ShapeDtypeStruct, places: Places, read: Read) -> jax.Array:
    """One of our arrays; copies of a shard are copied from device to device."""
    # JAX lets go of host memory at its next call: of the last array's before this one is made.
    jax.device_put(np.int8(0))
    shards: dict[Bounds, jax.Array] = {}
    copies = []
    for device, index in kind.sharding.addressable_devices_indices_map(kind.shape).items():
        bounds = bounds_of(index, kind.shape)
        if bounds not in shards:
            shards[bounds] = _shard(bounds, np.dtype(kind.dtype), places, read, device)
        copies.append(jax.device_put(shards[bounds], device))
    return jax.make_array_from_single_device_arrays(kind.shape, kind.sharding, copies)


def _shard(bounds: Bounds, dtype: np.dtype, places: Places, read: Read, device: jax.Device) -> jax.Array:
    """One device's part of an array, filled there block after block."""
    if is_host(device):  # what the block is made in is the shard
        return jax.device_put(_block(bounds, dtype, places, read), device)
    with jax.set_mesh(NO_MESH):
        shard = jax.jit(lambda: jnp.zeros(slice_shape(bounds), dtype), out_shardings=SingleDeviceSharding(device))()
        for part in split_bounds(bounds, dtype.itemsize, BLOCK):
            begin = np.array([b - a for (b, _), (a, _) in zip(part, bounds, strict=True)], np.int32)
            block = jax.device_put(_block(part, dtype, places, read), device)
            shard = _put(shard, block, begin).block_until_ready()  # waiting keeps one block, not a queue of them
    return shard


@functools.partial(jax.jit, donate_argnums=0)
def _put(shard: jax.Array, block: jax.Array, begin: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(shard, block, tuple(begin[i] for i in range(shard.ndim)))


def _block(bounds: Bounds, dtype: np.dtype, places: Places, read: Read) -> np.ndarray:
    """A part of an array on the host."""
    out = aligned_zeros(slice_shape(bounds), dtype)
    first = len(next(iter(places)))  # dims that say which layer, which expert
    for at in itertools.product(*(range(*span) for span in bounds[:first])):
        one, part = places[at]
        cuts = full_index(part.take, len(one.shape))
        dims = [dim for dim, chosen in enumerate(cuts) if isinstance(chosen, slice)]
        dims = [dims[axis] for axis in part.axes or range(len(dims))]  # of the tensor, by ours
        spans = [range(one.shape[dim])[cuts[dim]] for dim in dims]
        whole = tuple((begin, min(end, len(span))) for span, (begin, end) in zip(spans, bounds[first:], strict=True))
        here = [i - begin for i, (begin, _) in zip(at, bounds, strict=False)]
        for piece in split_bounds(whole, dtype.itemsize, BLOCK):  # what has to be unpacked is not unpacked all at once
            take, inside = list(cuts), list[Any](here)
            for dim, span, (begin, end), (start, _) in zip(dims, spans, piece, bounds[first:], strict=True):
                mine = span[begin:end]
                take[dim] = slice(mine.start, mine.stop, mine.step)
                inside.append(slice(begin - start, begin - start + len(mine)))
            found = narrowed(read(one.name, tuple(take)), dtype, one.name)
            _copy(out[(*inside, ...)], found if part.axes is None else found.transpose(part.axes))
    return out


def narrowed(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Numbers as they are, or in float16 if that is wanted. Raises UserError where one is too large for it."""
    if dtype != np.float16 or x.dtype == np.float16:
        return x
    with np.errstate(over='ignore'):
        narrow = x.astype(dtype)
    if (np.isinf(narrow) & np.isfinite(x)).any():
        largest = np.abs(x[np.isfinite(x)]).max()
        raise UserError(
            f'tensor {name} has numbers up to {largest:.3g}, and float16 ends at 65504: use bfloat16 or float32'
        )
    return narrow


def _copy(out: np.ndarray, source: np.ndarray) -> None:
    """out[...] = source, on all cores, and a matrix that is transposed in tiles that fit a cache."""
    if out.nbytes < 2**20 or out.ndim < 2:
        out[...] = source
        return
    rows, columns = range(0, out.shape[-2], TILE), range(0, out.shape[-1], TILE)
    lead = list(np.ndindex(out.shape[:-2]))

    def stripe(at: tuple[tuple[int, ...], int]) -> None:
        first, r = at
        for c in columns:
            part: tuple[Any, ...] = (*first, slice(r, r + TILE), slice(c, c + TILE))
            out[part] = source[part]

    list(_threads().map(stripe, itertools.product(lead, rows)))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, 'copy')


def published(one: Tensor, found: Mapping[str, jax.Array]) -> np.ndarray:
    """A published tensor on the host, out of our arrays by name."""
    out, filled = np.empty(one.shape, found[one.parts[0].leaf].dtype), 0
    for part in one.parts:
        x, mine, first = found[part.leaf], out[part.take], len(part.at)
        mine = mine if part.axes is None else mine.transpose(part.axes)
        whole = [(i, i + 1) for i in part.at] + [(0, size) for size in mine.shape]
        for shard in x.addressable_shards:
            bounds = bounds_of(shard.index, x.shape)
            if shard.replica_id == 0 and (both := overlap(bounds, whole)) is not None:
                numbers = host_slice(shard.data, bounds, both)
                mine[tuple(slice(*span) for span in both[first:])] = numbers.reshape(numbers.shape[first:])
                filled += numbers.size
    assert filled == out.size, f'{one.name}: {filled} of {out.size} numbers are on devices of this process'
    return out
