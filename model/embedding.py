"""The lookup of tokens.

Letters: B rows, T sequence, V padded vocabulary, D model.
"""

import jax
import jax.numpy as jnp

from weft.sharding.collectives import upcast


@jax.custom_vjp
def lookup(w_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The tokens' rows of w. Backward they are added up in at least float32: a frequent token has thousands."""
    return w_VD[tokens_BT]


def _lookup_forward(w_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(w_VD, tokens_BT), (w_VD, tokens_BT)


def _lookup_backward(kept: tuple[jax.Array, jax.Array], dx_BTD: jax.Array) -> tuple[jax.Array, None]:
    w_VD, tokens_BT = kept
    nothing = jnp.zeros_like(w_VD, dtype=upcast(w_VD).dtype)
    return nothing.at[tokens_BT].add(upcast(dx_BTD)).astype(w_VD.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
