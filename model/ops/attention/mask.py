"""Who sees whom, of single tokens and of whole tiles of them.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H width of a query and a key,
U of a value; c query tiles, d key tiles.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# (position, segment): where a token stands in its document, and in which of its row
TokenIndex = tuple[jax.Array, jax.Array]
# Keys, values, and where their tokens stand, as a backend lays them out.
Keys = tuple[jax.Array, jax.Array, Any]


class QKV(NamedTuple):
    """What a backend attends with: queries, keys, values, and where the tokens of queries and keys stand."""

    q_BTKGH: jax.Array
    k_BSKH: jax.Array
    v_BSKU: jax.Array
    q_at: TokenIndex
    k_at: TokenIndex


HIDDEN = -1e30  # the score of a key that must not be seen
FLOOR = -1e29  # the least maximum of a row of scores: exp(HIDDEN - FLOOR) is 0, also in a row that sees nothing


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """Who sees whom, and how a score is made: what a kernel knows while it is traced."""

    window: int | None
    scale: float
    softcap: float | None = None  # c: a score s becomes c tanh(s / c)
    causal: bool = True


def sees(q_at: TokenIndex, k_at: TokenIndex, window: int | None, causal: bool = True) -> jax.Array:
    """bool [..., T, S]: a query sees the keys of its own segment that stand 0 to `window` - 1 positions behind it.

    Not `causal`: those that stand as far before it too.
    """
    (q_position, q_segment), (k_position, k_segment) = q_at, k_at
    ago = q_position[..., :, None] - k_position[..., None, :]
    see = q_segment[..., :, None] == k_segment[..., None, :]
    if causal:
        see &= ago >= 0
    elif window is not None:
        see &= ago > -window
    return see if window is None else see & (ago < window)


def tiles_of(at: TokenIndex, tile: int, nobody: int) -> TokenIndex:
    """[B, c, tile] each; what fills the last tile belongs to segment `nobody`, which must be no token's."""
    rows, length = at[0].shape
    fill = [(0, 0), (0, -length % tile)]
    position_BT, segment_BT = jnp.pad(at[0], fill), jnp.pad(at[1], fill, constant_values=nobody)
    return position_BT.reshape(rows, -1, tile), segment_BT.reshape(rows, -1, tile)


def tiles_see(
    at_c: TokenIndex, at_d: TokenIndex, window: int | None, causal: bool = True
) -> tuple[jax.Array, jax.Array]:
    """bool [B, c, d] twice: may any query of tile c see a key of tile d, and does every query of c see every key of d.

    From the tiles' bounds alone, so the first may err on the side of True and the second on the side of False.
    """
    (q_position, q_segment), (k_position, k_segment) = at_c, at_d
    q_first, q_last, q_low, q_high = (x[..., :, None] for x in bounds(q_position, q_segment))
    k_first, k_last, k_low, k_high = (x[..., None, :] for x in bounds(k_position, k_segment))
    some = (q_high >= k_low) & (q_low <= k_high)
    every = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if causal:
        some, every = some & (q_last >= k_first), every & (q_first >= k_last)
    elif window is not None:
        some, every = some & (k_first - q_last < window), every & (k_last - q_first < window)
    if window is not None:
        some, every = some & (q_first - k_last < window), every & (q_last - k_first < window)
    return some, every


def bounds(position: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """First and last position, lowest and highest segment of each tile."""
    return position.min(-1), position.max(-1), segment.min(-1), segment.max(-1)


def span(on_cd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and end (int32) of the least range of the last dim that holds every True; (0, 0) where there is none."""
    first = jnp.argmax(on_cd, axis=-1).astype(jnp.int32)
    end = on_cd.shape[-1] - jnp.argmax(on_cd[..., ::-1], axis=-1).astype(jnp.int32)
    return first, jnp.where(on_cd.any(-1), end, 0)


def seen_tiles(at_c: TokenIndex, at_d: TokenIndex, rule: MaskRule) -> tuple[jax.Array, jax.Array]:
    """int32 [B, c] twice: first and end of the key tiles that a query tile may see."""
    return span(tiles_see(at_c, at_d, rule.window, rule.causal)[0])
