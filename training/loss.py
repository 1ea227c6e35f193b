"""Cross-entropy over a vocabulary that is split between devices, and the router's losses.

Letters: B rows, T sequence, V this device's part of the vocabulary, N tokens of this device, D model, L layers, E experts.
"""

import jax
import jax.numpy as jnp
from jax import P, lax

from model.decoder import Decoder, backends, to_vocabulary
from model.forward import TOKENS, one_device
from model.layers import View, specs
from sharding.collectives import join, my_slice, vary
from sharding.mesh import AXES, BATCH

CHUNK = 2048  # tokens whose logits exist at once


def loss_sums(model: Decoder, batch: dict, dropout_key=None) -> dict:
    """Sums over all real tokens of a batch, float32 or wider; differentiable.

    Args:
        model: the decoder, sharded as it was born.
        batch: 'tokens', 'targets', 'positions', 'segments', each int32 [B, T], rows split over BATCH; segment 0 is padding.
        dropout_key: one key for all devices; None turns dropout off.

    Returns:
        'nats' Σ cross-entropy, 'tokens' how many, 'rows' with a real token, and with experts 'router': each figure of
        `model.moe.route` by layer.
    """

    def body(model, batch, key):
        tokens_BT = batch['tokens']
        rows = tokens_BT.shape[0]
        row_B = lax.axis_index(BATCH) * rows + jnp.arange(rows)
        key_or_none = None if dropout_key is None else key
        at = batch['positions'], batch['segments']
        view = View(*at, **backends(model.config), dropout_key=key_or_none, row_B=row_B)
        x_BTD, _, figures = model.hidden(tokens_BT, view)
        live_BT = my_slice(batch['segments']) > 0
        nats = cross_entropy(vary(model.head()), x_BTD, my_slice(batch['targets']), live_BT, model.config.vocabulary)
        copies = lax.axis_size('tensor')
        rows = (batch['segments'] > 0).any(1).sum() / copies
        return lax.psum(vary({'nats': nats, 'tokens': live_BT.sum(), 'rows': rows, 'router': figures}), AXES)

    key = jax.random.key(0) if dropout_key is None else dropout_key
    run = one_device(body, model, (specs(model), dict.fromkeys(batch, TOKENS), P()), P())
    return run(model, batch, key)


def cross_entropy(head_DV, x_BTD, target_BT, live_BT, vocabulary: int):
    """Σ −log p(target) over the real tokens of all devices of `tensor`, as this device's share of that sum.

    The vocabulary is split over `tensor`; logits exist for CHUNK tokens at a time, in the backward pass too.
    """
    n, shard = lax.axis_size('tensor'), head_DV.shape[1]
    columns_V = lax.axis_index('tensor') * shard + jnp.arange(shard)

    @jax.checkpoint
    def chunk(x_1ND, target_1N, live_1N):
        x_ND, target_N, live_N = (join(a)[0] for a in (x_1ND, target_1N, live_1N))
        logit_NV = jnp.where((columns_V < vocabulary)[None], to_vocabulary(x_ND, head_DV), -jnp.inf)
        top_N = lax.pmax(lax.stop_gradient(logit_NV.max(-1)), 'tensor')
        sum_N = lax.psum(jnp.exp(logit_NV - top_N[:, None]).sum(-1), 'tensor')
        hit_N = lax.psum(jnp.where(columns_V[None] == target_N[:, None], logit_NV, 0).sum(-1), 'tensor')
        return jnp.where(live_N, top_N + jnp.log(sum_N) - hit_N, 0).sum() / n

    flat = lambda a: a.reshape(1, -1, *a.shape[2:])
    x, target, live = flat(x_BTD), flat(target_BT), flat(live_BT)
    N = x.shape[1]
    chunks = -(-N * n // CHUNK)
    if chunks == 1:
        return chunk(x, target, live)
    size = -(-N // chunks)
    fill = lambda a: jnp.pad(a, ((0, 0), (0, chunks * size - N), *[(0, 0)] * (a.ndim - 2)))  # live: False
    cut = lambda a: fill(a).reshape(chunks, 1, size, *a.shape[2:])
    return lax.map(lambda a: chunk(*a), (cut(x), cut(target), cut(live))).sum()


def loss_fn(model: Decoder, batch: dict, dropout_key=None):
    """The loss to minimise, and the parts it is made of.

    loss = mean cross-entropy over real tokens + balance_loss · mean over rows and layers of the balance loss
    + z_loss · mean over tokens and layers of the router z-loss; in nats.
    """
    sums = loss_sums(model, batch, dropout_key)
    tokens = jnp.maximum(sums['tokens'], 1)
    parts = {'loss': sums['nats'] / tokens, 'tokens': sums['tokens']}
    total, moe = parts['loss'], model.config.moe
    if moe:
        router = sums['router']
        load_LE = router['load_E'] / (tokens * moe.top_k)
        parts['router'] = {
            'balance_loss': router['balance'].mean() / jnp.maximum(sums['rows'], 1),
            'z_loss': router['z'].mean() / tokens,
            'entropy': router['entropy'].mean() / tokens,
            'max_share': load_LE.max(),
            'load': load_LE,
        }
        total = total + moe.balance_loss * parts['router']['balance_loss'] + moe.z_loss * parts['router']['z_loss']
    return total, parts
