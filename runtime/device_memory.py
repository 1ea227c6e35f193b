"""Bytes that arrays take on a device, and a line for the user where a device has too few."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from weft.runtime.errors import OutOfMemory


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of their shapes, dtypes and shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(count: float) -> str:
    """A number of bytes for a person."""
    return f'{count / 2**30:.2f} GiB'


def human_bytes(count: int) -> str:
    """The size of files for a person, in three digits of a unit that suits it."""
    unit = min(int(math.log10(max(count, 1))) // 3, 4)
    return f'{count / 1000**unit:.{0 if unit == 0 else 2}f} {("bytes", "kB", "MB", "GB", "TB")[unit]}'


@contextlib.contextmanager
def explain_oom(what: Callable[[], str]) -> Iterator[None]:
    """Turns a device's out-of-memory error into OutOfMemory with the line that `what` gives: what used it, what to change."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(
            mark in str(error) for mark in ('RESOURCE_EXHAUSTED', 'Out of memory')
        ):
            raise OutOfMemory(what()) from error
        raise
