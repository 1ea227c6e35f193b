"""What decoding keeps of the tokens so far, from one device's view: each kind of cache in one place, behind one protocol.

A mixer declares what it keeps with `cache(config, layer spec, CacheSize)`, which gives a `LayerCache` of `CacheArray`s: shapes,
dtypes and layouts, known without arrays. Made real, and with a leading dim of layers, it is the cache of a group of like layers
(`Decoder.groups`). While a layer runs, its mixer is given that cache with `layer` set, writes the new tokens and reads what
is kept. Nobody else looks inside: a decoder, a beam search and a planner handle arrays [L, B, …].

    kind                what it keeps of the token at position p, where `context` has n devices
    DenseCache          its numbers, in slot p // n of device p mod n
    WindowCache         its numbers, in slot (p // n) mod S of device p mod n, until a later token takes the slot
    latent vectors      either of the two, with one array in place of keys and values (model/layers/mla.py)
    CrossCache          nothing: an encoder's keys and values, which are only read (model/context.py, model/layers/cross.py)

Another kind is another subclass of `LayerCache`: pages and a table of them, or a recurrent state, which has no slots.

Letters: L layers of a group, B rows, S slots of this device, T new tokens, K kv heads, H head dim, M numbers of a slot: K · H,
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
from weft.sharding.mesh import BATCH, MeshConfig

ROWS = (*BATCH, 'stage')  # axes that split a cache's rows; `stage` is 1 where there is a cache
LANES = 128  # numbers in which TPUs tile the last dim of an array


class CacheSize(NamedTuple):
    """What a cache is to hold, and on what mesh."""

    rows: int  # sequences, all devices together
    length: int  # tokens of a row at most
    piece: int = 1  # tokens of a row at most that one step writes and then reads: more than 1 where `extend` is used
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
        axes = [axis for part in self.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize / mesh.span(axes)


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What the mixers of a group of like layers keep: arrays [L, B, …]. Its methods are those of a kind without slots.

    Attributes:
        arrays: `CacheArray`s where it is declared; arrays of all devices between steps, and of this one inside a step.
        layer: which of the L layers is at work, int32; None between layers.
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

    def rewinds(self, written: int, to: int) -> bool:
        """Whether a row of which the tokens before position `written` have been read can go on from position `to` instead."""
        return to == written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache(LayerCache):
    """A slot for every token of a row: [L, B, S, M] each, keys and values or whatever a mixer keeps of a token."""

    def write(self, new: Sequence[jax.Array], ctx: ForwardContext) -> Self:
        """The cache with new tokens' [B, T, K, H] of each array: each device of `context` keeps those of its own positions.

        Padding is not written.
        """
        slot_BT = self._slots(ctx)
        rows_B1 = jnp.arange(slot_BT.shape[0])[:, None]

        def put(old_LBSM: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BTM = pad_heads(new_BTKH, old_LBSM.shape[-1]).astype(old_LBSM.dtype)
            return old_LBSM.at[self.layer, rows_B1, slot_BT].set(new_BTM, mode='drop')

        return dataclasses.replace(self, arrays=tuple(map(put, self.arrays, new)))

    def read(self, *like_BTKH: jax.Array) -> tuple[jax.Array, ...]:
        """What this layer keeps, [B, S, K, H] of each array: heads, their width and dtype as those of the arrays given."""

        return tuple(unpad_heads(kept[self.layer], like) for kept, like in zip(self.arrays, like_BTKH, strict=True))

    def positions(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, S]: the position of the token that a slot holds. One that holds none has a position after every query's."""
        return dense_positions(ctx.position_BT.shape[0], self.arrays[0].shape[2])

    def grown(self, length: int) -> Self:
        """The cache with slots for rows of `length` tokens, with what is in it; inside `jax.shard_map`."""
        n = lax.axis_size('context')
        fill = self._tokens(length, n) // n - self.arrays[0].shape[2]
        longer = lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, fill), (0, 0)))
        return dataclasses.replace(self, arrays=tuple(map(longer, self.arrays)))

    def rewinds(self, written: int, to: int) -> bool:
        """Always: what stands after a token is not seen, and is written over before it is."""
        return True

    def _tokens(self, length: int, n: int) -> int:
        return slots(length, n)

    def _slots(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, T]: the slot that each new token takes on this device; one too high, and dropped, where it takes none."""
        return jnp.where(own(ctx), ctx.position_BT // lax.axis_size('context'), self.arrays[0].shape[2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache(DenseCache):
    """Slots for what a window shows: the token at p takes the slot of the one that stands n · S before it, n · S ≥ window.

    A step that writes `piece` tokens and then reads must still find what the first of them sees, so n · S is at least
    window + piece - 1, unless that is more than a row holds.
    """

    window: int = dataclasses.field(kw_only=True, metadata={'static': True})
    piece: int = dataclasses.field(kw_only=True, metadata={'static': True})

    def positions(self, ctx: ForwardContext) -> jax.Array:
        """int32 [B, S]: the position of the token that a slot holds. One that holds none has a position after every query's."""
        T, ring = ctx.position_BT.shape[1], self.arrays[0].shape[2] * lax.axis_size('context')
        assert self.piece >= T, f'{T} tokens at once, and a cache that was made for {self.piece}'
        last_B1 = jnp.where(ctx.segment_BT > 0, ctx.position_BT, 0).max(1, keepdims=True)
        first_BS = super().positions(ctx)  # of the tokens that can be in a slot the first; others come `ring` after it
        return first_BS + jnp.maximum(last_B1 - first_BS, 0) // ring * ring

    def rewinds(self, written: int, to: int) -> bool:
        """Whether the window of the token at `to` is still there, and no slot holds a token after it that looks older."""
        ring = self.arrays[0].shape[2]
        return written <= ring or written - to <= ring - self.window + 1

    def _tokens(self, length: int, n: int) -> int:
        return slots(length, n, self.window, self.piece)

    def _slots(self, ctx: ForwardContext) -> jax.Array:
        """As `DenseCache` has it; of the new tokens that would take one slot the last one does."""
        S, slot_BT, own_BT = self.arrays[0].shape[2], ctx.position_BT // lax.axis_size('context'), own(ctx)
        last_B1 = jnp.where(own_BT, slot_BT, -1).max(1, keepdims=True)
        return jnp.where(own_BT & (slot_BT > last_B1 - S), slot_BT % S, S)


class KVCache(NamedTuple):
    """The cache of a decoder."""

    groups: tuple[Any, ...]  # a LayerCache for each of `Decoder.groups`
    source: tuple[CrossCache, ...] | None = None  # of an encoder–decoder, likewise

    def part(self, these: slice) -> 'KVCache':
        """The cache of some of the groups."""
        return KVCache(self.groups[these], self.source and self.source[these])

    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> 'KVCache':
        """The cache of other rows: `change(array, axis of its rows)` of each array."""
        of_source = lambda array: change(array, 1)
        return KVCache(tuple(group.map_rows(change) for group in self.groups), jax.tree.map(of_source, self.source))

    def grown(self, length: int) -> 'KVCache':
        """The cache with room for rows of `length` tokens, with what is in it; inside `jax.shard_map`."""
        return self._replace(groups=tuple(group.grown(length) for group in self.groups))

    def rewinds(self, written: int, to: int) -> bool:
        """Whether rows of which the tokens before position `written` have been read can go on from position `to` instead."""
        return all(group.rewinds(written, to) for group in self.groups)


def slots(length: int, context: int, window: int | None = None, piece: int = 1) -> int:
    """Slots of a row, all devices of `context` together, whose number divides them; see `CacheSize` and `WindowCache`."""
    tokens = length if window is None else min(length, window + piece - 1)
    return -(-tokens // context) * context


def token_cache(size: CacheSize, window: int | None, heads: int, *widths: int) -> DenseCache:
    """The declaration of a cache that keeps numbers of each token: one array for each of `widths`, a head's numbers in it.

    With a window a layer keeps no more than that shows. Where `tensor` has more devices than there are heads, each keeps the
    head that it uses.
    """
    kept = slots(size.length, size.context, window, size.piece)
    numbers = (size.tensor * row_numbers(heads, width, size.tensor, size.platform) for width in widths)
    arrays = tuple(CacheArray((size.rows, kept, M), size.dtype, P(ROWS, 'context', 'tensor')) for M in numbers)
    return DenseCache(arrays) if window is None else WindowCache(arrays, window=window, piece=size.piece)


def row_numbers(heads: int, width: int, tensor: int, platform: str) -> int:
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
