"""Weights from integers: the same float32 numbers wherever they are made, by a tensor's name and shape alone."""

import functools
import zlib
from collections.abc import Iterator

import numpy as np

STEPS = 2**12  # values between -1 and 1


def integers(key: int, count: int) -> np.ndarray:
    """uint64 [count] of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    with np.errstate(over='ignore'):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def key_of(seed: int, name: str) -> int:
    return seed << 32 | zlib.crc32(name.encode())


@functools.cache
def tensor(seed: int, name: str, shape: tuple[int, ...], offset_norms: bool = False) -> np.ndarray:
    """float32, not to be written to: the same array each time."""
    found = make(seed, name, shape, offset_norms)
    found.flags.writeable = False
    return found


def make(seed: int, name: str, shape: tuple[int, ...], offset_norms: bool) -> np.ndarray:
    """float32: norms around 1 (or around 0, where they are kept as differences), vectors small, matrices by their width."""
    count = int(np.prod(shape))
    unit = (integers(key_of(seed, name), count) % np.uint64(2 * STEPS)).astype(np.float32) / STEPS - 1
    unit = unit.reshape(shape)
    last = name.removesuffix('.weight').rpartition('.')[2].lower()
    if len(shape) == 1 and name.endswith(('weight', 'scale')):
        return unit / 4 + (0 if offset_norms else 1)
    if len(shape) == 1 or 'bias' in last:
        return unit / 4
    if 'embed' in name or last in ('wte', 'wpe', 'shared', 'relative_attention_bias'):
        return unit
    size = np.sqrt(3 / shape[-1]) / (
        4 if last == 'q' else 1
    )  # T5's scores are not scaled: its queries are small instead
    return unit * np.float32(2.0 ** np.round(np.log2(size)))


def ids(seed: int, rows: int, length: int, vocabulary: int, name: str = 'ids') -> np.ndarray:
    """int32 [rows, length]."""
    return (integers(key_of(seed, name), rows * length) % np.uint64(vocabulary)).astype(np.int32).reshape(rows, length)


def places(seed: int, count: int, rows: int, length: int) -> np.ndarray:
    """int32 [count, 2]: rows and positions where logits are kept, each row's last among them."""
    found = np.stack([np.arange(count) % rows, integers(key_of(seed, 'places'), count) % np.uint64(length)], 1)
    found[:rows, 1] = length - 1
    return found.astype(np.int32)


def all_of(seed: int, shapes: dict[str, tuple[int, ...]], offset_norms: bool) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in shapes.items():
        yield name, tensor(seed, name, tuple(shape), offset_norms)
