"""Arrays as objects: each shard of an array is the raw bytes of one object, named for the part of the array that it holds.

    model/groups/0/mlp/up/w_EIO/0-2,0-16,4-8.bin      rows 0 and 1, all 16 of the next dim, the second half of the last
    random/step/all.bin                         a scalar

Every process writes the shards that it is first to hold, and reads those that its part of an array lies in, whatever mesh
saved them: no process needs a disk that others see, and no object is ever renamed, appended to or merged.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import NamedSharding, Sharding

from weft.storage.array_slices import Bounds, aligned_zeros, bounds_of, host_slice, overlap, slice_shape, split_bounds

BLOCK = 2**26  # bytes of one object at most


def written(name: str, x: jax.Array) -> Iterator[tuple[str, bytes]]:
    """The shards of an array that this process writes, copied off the devices: path and content.

    A large shard is several objects, none above BLOCK bytes, and no more than one of them is on the host at a time.
    """
    x = jax.random.key_data(x) if _is_key(x) else x
    for shard in x.addressable_shards:
        if shard.replica_id == 0:  # of equal copies only one is written
            bounds = bounds_of(shard.index, x.shape)
            for part in split_bounds(bounds, x.dtype.itemsize, BLOCK):
                yield f'{name}/{_text(part)}.bin', host_slice(shard.data, bounds, part).tobytes()


def gather(
    name: str, x: jax.ShapeDtypeStruct, paths: Iterable[str], read: Callable[[str, memoryview], None]
) -> dict[Bounds, np.ndarray]:
    """What the devices of this process hold of an array in the layout of `x`, out of the shards that it lies in.

    `read(path, into)` fills memory of a shard's size with it. Raises ValueError where the paths do not make up the array.
    """
    shape, dtype, layout = _raw_kind(x)
    regions = {bounds_of(index, shape) for index in layout.addressable_devices_indices_map(shape).values()}
    parts = {bounds: aligned_zeros(slice_shape(bounds), dtype) for bounds in regions}
    filled = dict.fromkeys(parts, 0)
    for path in paths:
        stored = _parse(path.removeprefix(f'{name}/').removesuffix('.bin'))
        if not all(0 <= begin < end <= size for (begin, end), size in zip(stored, shape, strict=True)):
            raise ValueError(f'{path} is no part of {list(shape)}')
        shared = {bounds: both for bounds in parts if (both := overlap(bounds, stored)) is not None}
        if not shared:
            continue
        straight = _place_of(stored, parts, shared)
        content = np.empty(slice_shape(stored), dtype) if straight is None else straight
        read(path, content.reshape(-1).view(np.uint8).data)
        for bounds, both in shared.items():
            if straight is None:
                parts[bounds][_within(both, bounds)] = content[_within(both, stored)]
            filled[bounds] += math.prod(slice_shape(both))
    if not all(filled[bounds] == part.size for bounds, part in parts.items()):
        raise ValueError(f'{name}: its shards do not make it up')
    return parts


def _place_of(stored: Bounds, parts: dict[Bounds, np.ndarray], shared: dict[Bounds, Bounds]) -> np.ndarray | None:
    """Where a shard can be read to without a copy: where it belongs, if that is one place, whole and without gaps."""
    if list(shared.values()) != [stored]:
        return None
    (bounds,) = shared
    place = parts[bounds][_within(stored, bounds)] if stored else parts[bounds]
    return place if place.flags.c_contiguous else None


def place(x: jax.ShapeDtypeStruct, parts: dict[Bounds, np.ndarray]) -> jax.Array:
    """The array whose parts `gather` found."""
    shape, _, layout = _raw_kind(x)
    raw = jax.make_array_from_callback(shape, layout, lambda index: parts[bounds_of(index, shape)])
    if not _is_key(x):
        return raw
    implementation: list[Any] = []
    jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)), x)
    return jax.device_put(jax.random.wrap_key_data(raw, impl=implementation[0]), x.sharding)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw_kind(x: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], Any, Sharding]:
    """Shape, dtype and layout of an array, or of the numbers that a PRNG key is made of."""
    if not _is_key(x):
        return x.shape, x.dtype, x.sharding
    raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    layout = x.sharding
    if isinstance(layout, NamedSharding):
        layout = NamedSharding(layout.mesh, P(*layout.spec))  # its last dim, a key's own numbers, stays whole
    return raw.shape, raw.dtype, layout


def _within(inner: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """Where some bounds stand in an array that holds only `outer`."""
    return tuple(slice(x[0] - y[0], x[1] - y[0]) for x, y in zip(inner, outer, strict=True))


def _text(bounds: Bounds) -> str:
    return ','.join(f'{begin}-{end}' for begin, end in bounds) or 'all'


def _parse(text: str) -> Bounds:
    if text == 'all':
        return ()
    pairs = (part.split('-') for part in text.split(','))
    return tuple((int(begin), int(end)) for begin, end in pairs)
