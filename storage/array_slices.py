"""Parts of arrays by their bounds: the begin and end of a part along each dim, as (begin, end) pairs."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

Bounds = tuple[tuple[int, int], ...]
ALIGNED = 64  # bytes: XLA for CPUs takes an array that begins at a multiple of it as it is, and copies any other
NO_MESH = Mesh(np.empty((), object), ())  # for work on one device, whatever mesh the caller is under


def bounds_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """The bounds of a device's part of an array, from its slices."""
    assert index is not None, 'every device here has a part'
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def overlap(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> Bounds | None:
    """What two parts have in common; None where that is nothing."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(begin < end for begin, end in both) else None


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros in memory that a CPU device can use as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNED, np.uint8)
    begin = -memory.ctypes.data % ALIGNED
    return memory[begin : begin + size].view(dtype).reshape(shape)


def host_slice(shard: jax.Array, bounds: Bounds, part: Bounds) -> np.ndarray:
    """On the host: a part of what one device has, whose part of the whole array is `bounds`."""
    begin = [b - a for (b, _), (a, _) in zip(part, bounds, strict=True)]
    if part == bounds or all(is_host(device) for device in shard.devices()):
        return np.asarray(shard)[tuple(slice(a, a + size) for a, size in zip(begin, slice_shape(part), strict=True))]
    with jax.set_mesh(NO_MESH):
        return np.asarray(_cut(shard, np.array(begin, np.int32), slice_shape(part)))


def is_host(device: jax.Device) -> bool:
    """Whether a device's memory is the host's, so that nothing need be copied from one to the other."""
    return device.platform == 'cpu'


@functools.partial(jax.jit, static_argnums=2)
def _cut(shard: jax.Array, begin: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(shard, tuple(begin[i] for i in range(shard.ndim)), shape)


def split_bounds(bounds: Bounds, itemsize: int, limit: int) -> Iterator[Bounds]:
    """The part within some bounds, in pieces of at most `limit` bytes that follow one another in memory."""
    if math.prod(slice_shape(bounds)) * itemsize <= limit or not bounds:
        yield bounds
        return
    (begin, end), rest = bounds[0], bounds[1:]
    row = math.prod(slice_shape(rest)) * itemsize
    step = max(limit // row, 1)
    for start in range(begin, end, step):
        stop = min(start + step, end)
        if row <= limit:
            yield ((start, stop), *rest)
        else:
            yield from (((start, stop), *piece) for piece in split_bounds(rest, itemsize, limit))


def slice_shape(bounds: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The shape of the part within some bounds."""
    return tuple(end - begin for begin, end in bounds)
