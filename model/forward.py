"""The forward pass as ONE fully manual `jax.shard_map` over the whole mesh: global arrays in, global arrays out.

What runs inside reads the weights' layouts off their types, and is one device's view: the loss (training/loss.py), the
logits of whole sequences (here), prefill and decoding steps (decoding/step.py).
Letters: B rows, T sequence, V vocabulary.
"""

import math

import jax
from jax import P
from jax.sharding import NamedSharding

from model.attention import needs_unchecked
from model.decoder import Decoder, backends, to_vocabulary
from model.layers import View, specs
from sharding.collectives import join
from sharding.mesh import BATCH

TOKENS = P(BATCH)  # of a [B, T] array: its rows are split, each device of `tensor` holds them whole


def place(tree):
    """Host arrays, rows first, as global arrays whose rows are split over the current mesh."""
    rows = NamedSharding(jax.sharding.get_mesh(), TOKENS)
    return jax.tree.map(lambda array: jax.device_put(array, rows), tree)


def row_ways() -> int:
    """Into how many parts the current mesh splits the rows of a batch."""
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in BATCH)


def one_device(body, model: Decoder, in_specs, out_specs):
    """`body` as a shard_map over every axis.

    check_vma finds a missing sum; attention kernels that cannot say what varies turn it off.
    """
    checked = not needs_unchecked(backends(model.config)['backend'])
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


def logits(model: Decoder, tokens_BT, position_BT, segment_BT):
    """Logits [B, T, vocabulary] of the full forward pass, float32 or wider, rows split over BATCH; `tensor` must divide T."""

    def body(model, tokens_BT, position_BT, segment_BT):
        x_BTD, _, _ = model.hidden(tokens_BT, View(position_BT, segment_BT, **backends(model.config)))
        return to_vocabulary(join(x_BTD), model.head())

    run = one_device(body, model, (specs(model), TOKENS, TOKENS, TOKENS), P(BATCH, None, 'tensor'))
    return real_vocabulary(run(model, tokens_BT, position_BT, segment_BT), model)


def real_vocabulary(logit_V, model: Decoder):
    """Logits split over `tensor` and padded, to all of the real vocabulary on each of its devices."""
    spec = P(*jax.typeof(logit_V).sharding.spec[:-1], None)
    return jax.reshard(logit_V, spec)[..., : model.config.vocabulary]
