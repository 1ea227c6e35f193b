"""Parts of arrays: a box is the begin and end of a part along each dim."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

Box = tuple[tuple[int, int], ...]
NO_MESH = Mesh(np.empty((), object), ())  # for work on one device, whatever mesh the caller is under


def cut(shard: jax.Array, box: Box, part: Box) -> np.ndarray:
    """On the host: a part of what one device has, which is `box`."""
    begin = [b - a for (b, _), (a, _) in zip(part, box, strict=True)]
    if part == box or all(is_host(device) for device in shard.devices()):
        return np.asarray(shard)[tuple(slice(a, a + size) for a, size in zip(begin, sizes(part), strict=True))]
    with jax.set_mesh(NO_MESH):
        return np.asarray(_cut(shard, np.array(begin, np.int32), sizes(part)))


def is_host(device: jax.Device) -> bool:
    """Whether a device's memory is the host's, so that nothing need be copied from one to the other."""
    return device.platform == 'cpu'


@functools.partial(jax.jit, static_argnums=2)
def _cut(shard, begin, shape):
    return lax.dynamic_slice(shard, tuple(begin[i] for i in range(shard.ndim)), shape)


def blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """A box in pieces of at most `limit` bytes that follow one another in memory."""
    if math.prod(sizes(box)) * itemsize <= limit or not box:
        yield box
        return
    (begin, end), rest = box[0], box[1:]
    row = math.prod(sizes(rest)) * itemsize
    step = max(limit // row, 1)
    for start in range(begin, end, step):
        stop = min(start + step, end)
        if row <= limit:
            yield ((start, stop), *rest)
        else:
            yield from (((start, stop), *piece) for piece in blocks(rest, itemsize, limit))


def sizes(box: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(end - begin for begin, end in box)
