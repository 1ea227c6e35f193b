"""The cache of decoding: what layers keep of the tokens so far. Each kind stands in one class, behind one protocol.

A mixer (attention, latent attention) declares what it keeps: its static method `cache(config, layer spec, CacheSize)` gives a
`LayerCache` whose arrays are `CacheArray`s, that is shapes, dtypes and layouts, known without a mesh or memory. With a leading
dim of layers that is the cache of a group of like layers (`model.stack.declared_cache`), one for each of `Decoder.groups`.
While a layer runs, its mixer has the group's cache with `layer` set: it writes the new tokens and reads what is kept. All
others (the decoder, beam search, sessions, the planner) handle whole arrays [L, B, …] and do not know the kind.

    kind                what it keeps of the token at position p, where `context` has n devices
    DenseCache          its numbers, in slot p // n of device p mod n
    WindowCache         its numbers, in slot (p // n) mod S of device p mod n, until a later token takes that slot
    latent vectors      either of the two, with one array in place of keys and values (model/layers/mla.py)
    CrossCache          an encoder's keys and values, which are only read (model/context.py, model/layers/cross.py)

Another kind is another subclass of `LayerCache`: pages with a table of them, or a recurrent state, which has no slots.

Letters: L layers of a group, B rows, S slots of this device, T new tokens, K KV heads, H head dim, M numbers of a slot: K · H,
on TPUs filled up with zeros.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.context import CrossCache, ForwardContext
from weft.sharding.collectives import axis_index
from weft.sharding.mesh import BATCH, MeshConfig, split_axes

ROWS = (*BATCH, 'stage')  # axes that split a cache's rows; `stage` is 1 where there is a cache
LANES = 128  # numbers in which TPUs tile the last dim of an array


class CacheSize(NamedTuple):
    """What a cache is asked to hold, and on what mesh."""

    rows: int  # sequences, all devices together
    length: int  # tokens of a row at most
    chunk: int = 1  # tokens of a row at most that one step adds to the cache; above 1 for `inference.step.extend`
    context: int = 1  # devices of the mesh along this axis
    tensor: int = 1
    dtype: str = 'float32'
    platform: str = 'cpu'


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """Shape, dtype and layout of one array of a cache, all devices together."""

    shape: tuple[int, ...]
    dtype: str
    spec: P

    def stacked(self, layers: int) -> 'CacheArray':
        """The array of so many layers: a leading dim, which no axis splits."""
        return CacheArray((layers, *self.shape), self.dtype, P(None, *self.spec))

    def shard_bytes(self, mesh: MeshConfig) -> float:
        """Bytes on one device."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize / mesh.span(split_axes(self.spec))


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What the mixers of a group of like layers keep. The base of all kinds; its methods suit one without slots.

    Attributes:
        arrays: [L, B, …] each: global arrays between steps, this device's inside a step; of a declaration `CacheArray`s.
        layer: number in the group of the layer that runs, int32; None between layers.
    """

    arrays: tuple[Any, ...]
    layer: jax.Array | int | None = None

    def of_layer(self, layer: jax.Array | int | None) -> Self:
        """The cache as it is given to a layer's mixer; with None as it is carried from layer to layer."""
        return dataclasses.replace(self, layer=layer)

    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> Self:
        """The cache of other rows: `change(array, axis of its rows)` of each array."""
        return dataclasses.replace(self, arrays=tuple(change(array, 1) for array in self.arrays))

    def grown(self, length: int) -> Self:
        """The cache with room for rows of `length` tokens, with what is in it."""
        del length
        return self

    def can_rewind(self, written: int, to: int) -> bool:
        """Whether a row whose tokens before position `written` were read can go on from the earlier position `to`."""
        return to == written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache(LayerCache):
    """A slot for every token of a row. Arrays [L, B, S, M]: keys and values, or whatever else a mixer keeps of a token."""

    def write(self, new: Sequence[jax.Array], ctx: ForwardContext) -> Self:
        """The cache with `new`, which has [B, T, K, H] for each array: each device of `context` keeps its own positions.

        Padding is not written.
        """
        slot_BT = self._slots(ctx)
        rows_B1 = jnp.arange(slot_BT.shape[0])[:, None]

        def put(old_LBSM: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BTM = pad_heads(new_BTKH, old_LBSM.shape[-1]).astype(old_LBSM.dtype)
            return old_LBSM.at[self.layer, rows_B1, slot_BT].set(new_BTM, mode='drop')

        return dataclasses.replace(self, arrays=tuple(map(put, self.arrays, new)))

    def read(self, *like_BTKH: jax.Array) -> tuple[jax.Array, ...]:
        """What this layer keeps, [B, S, K, H] of each array; K, H and the dtype are those of the arrays given."""

        return tuple(unpad_heads(kept[self.layer], like) for kept, like in zip(self.arrays, like_BTKH, strict=True))

    def positions(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, S]: the position of the token that a slot holds. One that holds none has a position after every query's."""
        return dense_positions(ctx.position_BT.shape[0], self.arrays[0].shape[2])

    def grown(self, length: int) -> Self:
        """The cache with slots for rows of `length` tokens, with what is in it; inside `jax.shard_map`."""
        n = lax.axis_size('context')
        fill = self._tokens(length, n) // n - self.arrays[0].shape[2]
        pads = (0, 0), (0, 0), (0, fill), (0, 0)
        return dataclasses.replace(self, arrays=tuple(jnp.pad(array, pads) for array in self.arrays))

    def can_rewind(self, written: int, to: int) -> bool:
        """True: a token does not see what stands after it, and that is written over before a later one does."""
        return True

    def _tokens(self, length: int, n: int) -> int:
        return slot_count(length, n)

    def _slots(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, T]: the slot that each new token takes on this device; S, which no write reaches, where it takes none."""
        return jnp.where(own(ctx), ctx.position_BT // lax.axis_size('context'), self.arrays[0].shape[2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache(DenseCache):
    """A ring buffer of the last tokens, as sliding-window attention needs them: a token takes the slot of that n · S before it.

    A step writes up to `chunk` tokens and then reads, and must still find what the first of them sees: n · S is at least
    window + chunk - 1, or the most tokens of a row, if those are fewer.
    """

    window: int = dataclasses.field(kw_only=True, metadata={'static': True})
    chunk: int = dataclasses.field(kw_only=True, metadata={'static': True})

    def positions(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, S]: the position of the token that a slot holds. One that holds none has a position after every query's."""
        T, ring = ctx.position_BT.shape[1], self.arrays[0].shape[2] * lax.axis_size('context')
        assert self.chunk >= T, f'{T} tokens at once, and a cache that was made for {self.chunk}'
        last_B1 = jnp.where(ctx.segment_BT > 0, ctx.position_BT, 0).max(1, keepdims=True)
        # Of the first token that a slot can hold; the others follow at distances of `ring`.
        first_BS = super().positions(ctx)
        return first_BS + jnp.maximum(last_B1 - first_BS, 0) // ring * ring

    def can_rewind(self, written: int, to: int) -> bool:
        """Whether all that the token at `to` sees is still there, and no later token could be taken for an older one."""
        ring = self.arrays[0].shape[2]
        return written <= ring or written - to <= ring - self.window + 1

    def _tokens(self, length: int, n: int) -> int:
        return slot_count(length, n, self.window, self.chunk)

    def _slots(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, T], as in `DenseCache`; where several new tokens come to one slot, the last takes it."""
        S, slot_BT, own_BT = self.arrays[0].shape[2], ctx.position_BT // lax.axis_size('context'), own(ctx)
        last_B1 = jnp.where(own_BT, slot_BT, -1).max(1, keepdims=True)
        return jnp.where(own_BT & (slot_BT > last_B1 - S), slot_BT % S, S)


class KVCache(NamedTuple):
    """The cache of a decoder, a pytree of arrays [L, B, …]."""

    groups: tuple[Any, ...]  # a LayerCache for each of `Decoder.groups`
    source: tuple[CrossCache, ...] | None = None  # of an encoder–decoder, likewise

    def part(self, these: slice) -> 'KVCache':
        """The cache of some of the groups."""
        return KVCache(self.groups[these], self.source and self.source[these])

    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> 'KVCache':
        """The cache of other rows: `change(array, axis of its rows)` of each array."""
        source = jax.tree.map(lambda array: change(array, 1), self.source)
        return KVCache(tuple(group.map_rows(change) for group in self.groups), source)

    def grown(self, length: int) -> 'KVCache':
        """The cache with room for rows of `length` tokens, with what is in it; inside `jax.shard_map`."""
        return self._replace(groups=tuple(group.grown(length) for group in self.groups))

    def can_rewind(self, written: int, to: int) -> bool:
        """Whether rows whose tokens before position `written` were read can go on from the earlier position `to`."""
        return all(group.can_rewind(written, to) for group in self.groups)


def slot_count(length: int, context: int, window: int | None = None, chunk: int = 1) -> int:
    """Slots of a row on all devices of `context` together, a multiple of their number; see `CacheSize`, `WindowCache`."""
    tokens = length if window is None else min(length, window + chunk - 1)
    return -(-tokens // context) * context


def token_cache(size: CacheSize, window: int | None, heads: int, *widths: int) -> DenseCache:
    """Declares a cache with slots for tokens: one array for each of `widths`, the numbers of a head in it.

    With a `window` no more than that is kept. Where `tensor` has more devices than there are heads, each keeps the head that
    it uses.
    """
    kept = slot_count(size.length, size.context, window, size.chunk)
    numbers = (size.tensor * slot_width(heads, width, size.tensor, size.platform) for width in widths)
    arrays = tuple(CacheArray((size.rows, kept, M), size.dtype, P(ROWS, 'context', 'tensor')) for M in numbers)
    return DenseCache(arrays) if window is None else WindowCache(arrays, window=window, chunk=size.chunk)


def slot_width(heads: int, width: int, tensor: int, platform: str) -> int:
    """M: numbers of a slot on one device of `tensor`, of heads that are so wide.

    TPUs tile arrays by 128 numbers of the last dim: a cache with other rows comes in another layout than the loop over the
    layers works with, and is copied whole, there and back, at every step. So there rows are filled up.
    """
    unit = LANES if platform == 'tpu' else 1
    return -(-max(heads // tensor, 1) * width // unit) * unit


def pad_heads(a_BTKH: jax.Array, width: int) -> jax.Array:
    """Heads side by side as a slot has them, [B, T, M], filled up to `width` numbers."""
    a_BTM = a_BTKH.reshape(*a_BTKH.shape[:2], -1)
    return jnp.pad(a_BTM, ((0, 0), (0, 0), (0, width - a_BTM.shape[-1])))


def unpad_heads(kept_BSM: jax.Array, like_BTKH: jax.Array) -> jax.Array:
    """Slots as heads, [B, S, K, H]: heads, their width and dtype as those of `like_BTKH`."""
    K, H = like_BTKH.shape[2:]
    kept_BSM = kept_BSM.astype(like_BTKH.dtype)
    return kept_BSM[..., : K * H].reshape(*kept_BSM.shape[:2], K, H)


def dense_positions(B: int, S: int) -> jax.Array:
    """int32 [B, S]: the position of the token in each slot of this device, where every token of a row has a slot."""
    return jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) * lax.axis_size('context') + axis_index('context'), (B, S))


def own(ctx: ForwardContext) -> jax.Array:
    """bool [B, T]: which of the new tokens this device of `context` keeps; none of padding."""
    return (ctx.segment_BT > 0) & (ctx.position_BT % lax.axis_size('context') == axis_index('context'))
