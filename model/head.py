"""From activations to logits, from one device's view.

Letters: N tokens, D model, V padded vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from weft.model.config import ModelConfig
from weft.sharding.collectives import upcast
from weft.sharding.mesh import platform


def scattered_columns(columns: int) -> int:
    """Columns to which a matrix is filled up so that its gradient is scattered as it was asked for.

    XLA's TPU compiler cuts a reduce-scatter into equal runs of tiles of 128 columns. Of a vocabulary whose number of tiles has
    a large prime factor (Llama 3's: 167) there are none of a fit size, and it sends an all-reduce, twice the bytes.
    """
    if platform() != 'tpu':
        return columns
    tiles = -(-columns // 128)
    if tiles <= 64 or any(tiles % run == 0 for run in range(8, 65)):
        return 128 * tiles
    unit = 2
    while tiles > 64 * unit:
        unit *= 2
    return 128 * unit * -(-tiles // unit)


class Head(NamedTuple):
    """What makes logits of activations."""

    w: jax.Array  # [D, V]; where `ModelConfig.tied_embedding` [V, D], as the embedding lies: to turn it is to copy it
    bias_V: jax.Array | None = None
    sink: jax.Array | None = None  # takes w's gradient: see `wide_product`


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def wide_product(x_ND, w, sink, dims: str = 'DV'):
    """x @ w in at least float32, [..., V], of w [D, V] or, where `dims` is 'VD', its transpose.

    Backward the narrow numbers of x and w are multiplied by as narrow ones. Else autodiff's products of float32 gradients
    would run in float32: on a GPU at half the rate or less. The gradient of w, in at least float32, is that of `sink`, zeros
    that nothing is added to, so that parts of it are not rounded before they are added up; without a sink it is w's own.
    """
    return jnp.einsum(f'...D,{dims}->...V', x_ND, w, preferred_element_type=upcast(x_ND).dtype)


def _wide_product_forward(x_ND, w, sink, dims):
    return wide_product(x_ND, w, sink, dims), (x_ND, w, sink is None)


def _wide_product_backward(dims, kept, dlogit_NV):
    x_ND, w, own = kept
    dlogit_NV = dlogit_NV.astype(x_ND.dtype)
    parts = (a.reshape(-1, a.shape[-1]) for a in (x_ND, dlogit_NV))
    dw = jnp.einsum(f'ND,NV->{dims}', *parts, preferred_element_type=upcast(x_ND).dtype)
    dx_ND = jnp.einsum(f'...V,{dims}->...D', dlogit_NV, w)
    return (dx_ND, dw.astype(w.dtype), None) if own else (dx_ND, jnp.zeros_like(w), dw)


wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def to_vocabulary(x_ND, head: Head, c: ModelConfig):
    """Logits, in at least float32 however narrow x and the head are."""
    assert c.head is not None
    logit_NV = wide_product(x_ND, head.w, head.sink, 'VD' if c.embedding.tied else 'DV')
    if c.head.scale != 1:
        logit_NV = logit_NV * c.head.scale
    if head.bias_V is not None:
        logit_NV = logit_NV + upcast(head.bias_V).reshape((1,) * (logit_NV.ndim - 1) + (-1,))
    return logit_NV if c.head.softcap is None else c.head.softcap * jnp.tanh(logit_NV / c.head.softcap)
