"""What decoding keeps of the tokens so far, from one device's view.

Letters: L layers, B rows, S slots of this device, T new tokens, K kv heads, H head dim, M kv heads times H.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.config import ModelConfig
from weft.sharding.collectives import axis_index
from weft.sharding.mesh import BATCH


class CrossKVCache(NamedTuple):
    """What decoding keeps of an encoder's output: each layer's keys and values of all of it, in the form of a cache."""

    k_LBSM: jax.Array
    v_LBSM: jax.Array
    length_B: jax.Array  # tokens of each row, int32


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: a row's token at position p is in slot p // n of device p mod n of `context`.

    [L, B, S, tensor × numbers]: each device of `tensor` has its heads side by side; on TPUs zeros follow, up to a multiple of
    128 (`cached_numbers`).
    """

    k_LBSM: jax.Array
    v_LBSM: jax.Array | None  # None where one latent vector is both (model/latent.py)
    source: CrossKVCache | None = None  # of an encoder–decoder


CACHE_SPEC = P(None, (*BATCH, 'stage'), 'context', 'tensor')  # `stage` is 1 where there is a cache


def cache_update(old_LBSM, new_BTKH, layer, position_BT):
    """A cache with new tokens' keys or values at [layer]: each device of `context` keeps those of its own positions."""
    n, rows_B1 = lax.axis_size('context'), jnp.arange(new_BTKH.shape[0])[:, None]
    slot_BT = jnp.where(position_BT % n == axis_index('context'), position_BT // n, old_LBSM.shape[2])
    new_BTM = pad_heads(new_BTKH, old_LBSM.shape[-1]).astype(old_LBSM.dtype)
    return old_LBSM.at[layer, rows_B1, slot_BT].set(new_BTM, mode='drop')


def pad_heads(a_BTKH, width: int):
    """Heads' keys or values as a cache has them, filled up to its width."""
    a_BTM = a_BTKH.reshape(*a_BTKH.shape[:2], -1)
    return jnp.pad(a_BTM, ((0, 0), (0, 0), (0, width - a_BTM.shape[-1])))


def cache_read(cached_LBSM, layer, like_BTKH):
    """The keys or values [B, S, K, H] at [layer], heads and dtype as those of `like_BTKH`."""
    K, H = like_BTKH.shape[2:]
    kept_BSM = cached_LBSM[layer].astype(like_BTKH.dtype)
    return kept_BSM[..., : K * H].reshape(*kept_BSM.shape[:2], K, H)


def cached_numbers(c: ModelConfig, tensor: int, platform: str) -> tuple[int, ...]:
    """Numbers that a device of `tensor` keeps of a token and layer: of its keys and of its values, or of its latent vector.

    TPUs tile arrays by 128 numbers of the last dim: a cache with other rows comes in another layout than the loop over the
    layers works with, and is copied whole, there and back, at every step. So there rows are filled up.
    """
    heads = max(c.attention.cached_heads // tensor, 1)
    unit = 128 if platform == 'tpu' else 1
    return tuple(-(-heads * width // unit) * unit for width in c.attention.cached_widths)
