"""Tensors of GGUF files as they were before their conversion, each read a part at a time.

A converter reorders, turns, stacks, splits and shifts some of a model's tensors; each class here undoes one such change.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from weft.hub.gguf.blocks import Numbers
from weft.hub.tensor_files import Derived, full_index

Take = tuple[Any, ...]  # slices, and in Regrouped arrays of indices


@dataclasses.dataclass(frozen=True)
class Undone(Derived):
    """A tensor of which `of` holds the numbers in another order or form."""

    of: Numbers

    @property
    def held(self) -> tuple[Numbers, ...]:
        """The tensors of the file that it is read from."""
        return (self.of,)


@dataclasses.dataclass(frozen=True)
class Regrouped(Undone):
    """Rows of queries or keys whose pairs for the rotation are neighbours in the file, and half a head apart here."""

    heads: int

    def read(self, take: Take = ()) -> np.ndarray:
        rows = self.shape[0]
        half = rows // self.heads // 2
        order = np.arange(rows).reshape(self.heads, half, 2).swapaxes(1, 2).reshape(rows)
        first, *others = full_index(take, len(self.shape))
        if len(self.shape) == 1:  # a bias, which has no blocks
            return self.of.read()[order[first]]
        return self.of.read((order[first], *others))


@dataclasses.dataclass(frozen=True)
class Shifted(Undone):
    """A norm's weights without the 1 that was added to them."""

    def read(self, take: Take = ()) -> np.ndarray:
        return (self.of.read(take).astype(np.float32) - 1).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Narrowed(Derived):
    """A tensor in a narrower dtype that holds all of its numbers exactly."""

    of: Numbers | Undone
    narrow: np.dtype

    @property
    def dtype(self) -> np.dtype:
        return self.narrow

    def read(self, take: Take = ()) -> np.ndarray:
        return self.of.read(take).astype(self.narrow)


@dataclasses.dataclass(frozen=True)
class Expert(Undone):
    """One of several matrices of one tensor."""

    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[1:]

    def read(self, take: Take = ()) -> np.ndarray:
        return self.of.read((slice(self.index, self.index + 1), *take))[0]


@dataclasses.dataclass(frozen=True)
class Turned(Undone):
    """Its last two dims are the other way round."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-2], self.of.shape[-1], self.of.shape[-2])

    def read(self, take: Take = ()) -> np.ndarray:
        *first, row, column = full_index(take, len(self.shape))
        return self.of.read((*first, column, row)).swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class OfTwo(Undone):
    """A tensor that is two in the file."""

    second: Numbers

    @property
    def dtype(self) -> np.dtype:
        return jnp.promote_types(self.of.dtype, self.second.dtype)

    @property
    def held(self) -> tuple[Numbers, ...]:
        return self.of, self.second


@dataclasses.dataclass(frozen=True)
class Woven(OfTwo):
    """Two tensors in turns along the last dim, which of those `turned` is the one before it in the file."""

    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = Turned(self.of).shape if self.turned else self.of.shape
        return (*shape[:-1], 2 * shape[-1])

    def read(self, take: Take = ()) -> np.ndarray:
        *first, last = full_index(take, len(self.shape))
        span = np.arange(self.shape[-1])[last]
        parts = []
        for number, numbers in enumerate(self.held):
            source: Numbers | Turned = Turned(numbers) if self.turned else numbers
            mine = span % 2 == number
            places = span[mine] // 2
            begin, end = (int(places.min()), int(places.max()) + 1) if len(places) else (0, 0)
            parts.append((mine, source.read((*first, slice(begin, end)))[..., places - begin]))
        out = np.empty((*parts[0][1].shape[:-1], len(span)), self.dtype)
        for mine, found in parts:
            out[..., mine] = found
        return out


@dataclasses.dataclass(frozen=True)
class Unsplit(OfTwo):
    """Keys' and values' matrices [heads · (keys + values), rank] of latent attention, which are two tensors in the file:
    keys [heads, rank, keys], turned, and values [heads, values, rank].
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.of.shape[0] * (self.of.shape[2] + self.second.shape[1]), self.of.shape[1])

    def read(self, take: Take = ()) -> np.ndarray:
        row, column = full_index(take, 2)
        rows = np.arange(self.shape[0])[row]
        of_head = self.of.shape[2] + self.second.shape[1]
        out = np.empty((len(rows), len(np.arange(self.shape[1])[column])), self.dtype)
        for head in np.unique(rows // of_head):
            one = slice(int(head), int(head) + 1)
            keys = self.of.read((one, column))[0].T
            both = np.concatenate([keys, self.second.read((one, slice(None), column))[0]])
            mine = rows // of_head == head
            out[mine] = both[rows[mine] % of_head]
        return out
