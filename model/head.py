"""The LM head: from activations to logits, from one device's view. Its loss is ops/cross_entropy.py.

Letters: N tokens, D model, V padded vocabulary.
"""

import jax
import jax.numpy as jnp

from weft.model.config import ModelConfig
from weft.model.forms.rounded import few_tokens, uses_sums
from weft.model.ops.cross_entropy import Head, head_product
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


def is_rounded(c: ModelConfig) -> bool:
    """Whether the table that makes logits is kept in few bits."""
    return any(('embedding' if c.embedding.tied else 'head') in form.targets for form in c.weights or ())


def to_vocabulary(x_ND: jax.Array, head: Head, c: ModelConfig) -> jax.Array:
    """Logits [..., V] of x [..., D], in at least float32 however narrow x and the head are."""
    assert c.head is not None, 'a model without an LM head has no logits'
    if is_rounded(c) and uses_sums(x_ND):
        logit_NV = few_tokens(upcast(x_ND), head.w, out_first=c.embedding.tied)
    else:
        logit_NV = head_product(x_ND, head.w, head.sink, 'VD' if c.embedding.tied else 'DV')
    if c.head.scale != 1:
        logit_NV = logit_NV * c.head.scale
    if head.bias_V is not None:
        logit_NV = logit_NV + upcast(head.bias_V).reshape((1,) * (logit_NV.ndim - 1) + (-1,))
    return logit_NV if c.head.softcap is None else c.head.softcap * jnp.tanh(logit_NV / c.head.softcap)
