"""Cross-entropy over a vocabulary that is split between devices, the router's losses, and their gradient.

Letters: B rows, T sequence, V this device's part of the vocabulary, N tokens of this device, D model, L layers, E experts,
A parts of a step, one after another, whose gradients are added up.
"""

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.decoder import Decoder
from weft.model.forward import TOKENS, Source, columns, one_device, with_source
from weft.model.head import Head, to_vocabulary
from weft.model.parameters import specs
from weft.model.stack import by_layer
from weft.sharding.collectives import (
    axis_index,
    gather_sequence,
    mark_varying,
    pmax,
    psum,
    reduce_gradients,
    tensor_slice,
    upcast,
)
from weft.sharding.mesh import AXES, BATCH, platform
from weft.sharding.pipeline import my_microbatches
from weft.sharding.sequence_layout import zigzag

CHUNK = 2048  # tokens whose logits exist at once


def loss_sums(model: Decoder, batch: dict, dropout_key=None, microbatches: int = 1) -> dict:
    """Sums over all real tokens of a batch, float32 or wider.

    Args:
        model: the decoder, sharded as it was born.
        batch: 'tokens', 'targets', 'positions', 'segments', each int32 [B, T], rows split over BATCH; segment 0 is padding. Of
            an encoder–decoder also 'source_tokens', 'source_positions', 'source_segments' [B, S].
        dropout_key: one key for all devices; None turns dropout off.
        microbatches: into which the pipeline cuts each device's rows, where the mesh has stages: a multiple of them.

    Returns:
        'nats' Σ cross-entropy, 'tokens' how many, 'rows' with a real token; with experts 'router': each figure of
        `model.moe.route` by layer; with `mtp_layers` 'ahead': of each Σ cross-entropy.
    """

    def body(model, batch, key):
        shares = device_shares(model, batch, first_row(batch), key if dropout_key is not None else None, microbatches)
        return counts(batch) | psum(mark_varying(shares), AXES)

    run = one_device(body, model, (dict.fromkeys(batch, TOKENS), P()), P())
    return run(model, batch, jax.random.key(0) if dropout_key is None else dropout_key)


def loss_fn(model: Decoder, batch: dict, dropout_key=None, microbatches: int = 1):
    """The loss to minimise, and the parts it is made of; arguments as in `loss_sums`.

    loss = mean cross-entropy over real tokens + balance_loss · mean over rows and layers of the balance loss
    + z_loss · mean over tokens and layers of the router z-loss + mtp_loss · mean over `mtp_layers` of their Σ cross-entropy
    over real tokens (DeepSeek-V3, arXiv:2412.19437, eq. 24–25); in nats.
    """
    sums = loss_sums(model, batch, dropout_key, microbatches)
    return total_loss(sums, sums, model), parts(sums, model)


def loss_and_gradient(model: Decoder, batch: dict, dropout_key=None, microbatches: int = 1, accumulation: int = 1):
    """((loss, parts), gradient) of `loss_fn`, the gradient laid out like the model.

    `accumulation` parts of each device's rows are worked on one after another, and their gradients added up. They are
    those of the whole batch: what a token's loss is divided by is known beforehand. Differentiates one device's view
    (in the shard_map, not through it), so that what a weight's copies need of each other is sent once a step.
    """

    def body(model, batch, key):
        known, rows = counts(batch), batch['tokens'].shape[0]
        # Devices that a CPU simulates may start what does not wait in different orders and then wait for each other for ever:
        # so the layers' collectives wait for those of the counts, which are never negative.
        batch = jax.tree.map(lambda a: jnp.where(known['tokens'] < 0, 0, a), batch)
        first, key = first_row(batch), key if dropout_key is not None else None
        size = rows // accumulation

        def one_part(batch, number):
            def share(model):
                shares = device_shares(model, batch, first + number * size, key, microbatches)
                return total_loss(shares, known, model), shares

            return mark_varying(jax.grad(share, has_aux=True)(model))

        if accumulation == 1:
            gradient, shares = one_part(batch, 0)
        else:
            cut = jax.tree.map(lambda a: a.reshape(accumulation, size, *a.shape[1:]), batch)
            found = jax.eval_shape(one_part, jax.tree.map(lambda a: a[0], cut), 0)
            nothing = mark_varying(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), found))
            # XLA's TPU compiler fails where a reduce-scatter's result goes straight into a loop's sum.
            apart = lax.optimization_barrier if platform() == 'tpu' else lambda found: found
            add = lambda total, part: (jax.tree.map(jnp.add, total, apart(one_part(*part))), None)
            (gradient, shares), _ = lax.scan(add, nothing, (cut, jnp.arange(accumulation)))
        return reduce_gradients(gradient, layouts), known | psum(mark_varying(shares), AXES)

    layouts = specs(model)
    run = one_device(body, model, (dict.fromkeys(batch, TOKENS), P()), (layouts, P()))
    gradient, sums = run(model, batch, jax.random.key(0) if dropout_key is None else dropout_key)
    return (total_loss(sums, sums, model), parts(sums, model)), gradient


def first_row(batch: dict) -> jax.Array:
    """The number in the global batch of this device's first row."""
    return axis_index(BATCH) * batch['tokens'].shape[0]


def counts(batch: dict) -> dict:
    """How many real tokens the global batch has, and rows with one; known before anything is computed."""
    live_BT = batch['segments'] > 0
    return psum({'tokens': live_BT.sum(), 'rows': live_BT.any(1).sum()}, BATCH)


def device_shares(model: Decoder, batch: dict, first, key, microbatches: int) -> dict:
    """This device's share of 'nats' and 'router', which added up over all devices are those of the batch."""
    B, T = batch['tokens'].shape
    column_T = columns(T, zigzag)
    tokens_BT, target_BT, position_BT, segment_BT = (
        batch[name][:, column_T] for name in ('tokens', 'targets', 'positions', 'segments')
    )
    ctx = ForwardContext(
        position_BT,
        segment_BT,
        compute=model.resolved_compute,
        dropout_key=key,
        row_B=first + jnp.arange(B),
        column_T=column_T,
        microbatches=microbatches,
    )
    if model.config.encoder:
        source = Source(*(batch[f'source_{name}'] for name in ('tokens', 'positions', 'segments')))
        ctx = with_source(model, ctx, source)
    x_BTD, _, figures = model.hidden(tokens_BT, ctx)
    target_BT, live_BT = tensor_slice(my_microbatches(target_BT, microbatches)), ctx.my_microbatches().live_BT
    head = model.head(learns=True)
    shares = {'nats': cross_entropy(head, x_BTD, target_BT, live_BT, model.config), 'router': figures}
    if model.config.mtp.layers:
        next_kBT, target_kBT, live_kBT = (
            [a_BT[:, column_T] for a_BT in a_kBT] for a_kBT in shifted(batch, model.config.mtp.layers)
        )
        x_kBTD, found = model.ahead(x_BTD, next_kBT, ctx)
        mine = lambda a_BT: tensor_slice(my_microbatches(a_BT, microbatches))
        ahead = zip(x_kBTD, target_kBT, live_kBT, strict=True)
        shares['ahead'] = jnp.stack(
            [cross_entropy(head, x, mine(target), mine(live), model.config) for x, target, live in ahead]
        )
        shares['router'] = by_layer([figures, found])
    return shares


def shifted(batch: dict, depth: int) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Of each layer that predicts further ahead: the tokens it is given, those it must predict, and where both are real.

    All [B, T]. Layer k (from 0) is given the token k + 1 places on, and predicts the next; it has none where its document ends.
    """
    left = lambda a_BT: jnp.pad(a_BT[:, 1:], ((0, 0), (0, 1)))
    next_BT, segment_BT, live_BT = batch['targets'], batch['segments'], batch['segments'] > 0
    found = []
    for _ in range(depth):
        segment_BT = left(segment_BT)
        live_BT = live_BT & (segment_BT == batch['segments'])
        found.append((next_BT, left(next_BT), live_BT))
        next_BT = left(next_BT)
    next_kBT, target_kBT, live_kBT = map(list, zip(*found, strict=True))
    return next_kBT, target_kBT, live_kBT


def total_loss(sums: dict, known: dict, model: Decoder):
    """The loss of whole sums, or a device's share of it: of its own sums and the counts of the whole batch."""
    tokens, moe = jnp.maximum(known['tokens'], 1), model.config.moe
    total = sums['nats'] / tokens
    if model.config.mtp.layers:
        total = total + model.config.mtp.loss * sums['ahead'].mean() / tokens
    if moe:
        router, rows = sums['router'], jnp.maximum(known['rows'], 1)
        total = total + moe.balance_loss * router['balance'].mean() / rows + moe.z_loss * router['z'].mean() / tokens
    return total


def parts(sums: dict, model: Decoder) -> dict:
    """What is reported of whole sums."""
    tokens, moe = jnp.maximum(sums['tokens'], 1), model.config.moe
    found = {'loss': sums['nats'] / tokens, 'tokens': sums['tokens']}
    if model.config.mtp.layers:
        found['mtp_loss'] = sums['ahead'].mean() / tokens
    if moe:
        router = sums['router']
        load_LE = router['load_E'] / (tokens * moe.top_k)
        found['router'] = {
            'balance_loss': router['balance'].mean() / jnp.maximum(sums['rows'], 1),
            'z_loss': router['z'].mean() / tokens,
            'entropy': router['entropy'].mean() / tokens,
            'max_share': load_LE.max(),
            'dropped_share': router['dropped'].sum() / (tokens * moe.top_k * load_LE.shape[0]),
            'load': load_LE,
        }
    return found


def cross_entropy(head: Head, x_BTD, target_BT, live_BT, c: ModelConfig):
    """Σ −log p(target) over the real tokens of all devices of `tensor`, as this device's share of that sum.

    The vocabulary is split over `tensor`; logits exist for CHUNK tokens at a time, and once: the gradient is made along with
    the value, and scaled in the backward pass by what the sum counts in the loss, on all devices the same.
    """
    n, shard = lax.axis_size('tensor'), head.w.shape[0 if c.embedding.tied else 1]
    columns_V = axis_index('tensor') * shard + jnp.arange(shard)

    def chunk(head, x_1ND, target_1N, live_1N):
        x_ND, target_N, live_N = (gather_sequence(a)[0] for a in (x_1ND, target_1N, live_1N))
        logit_NV = to_vocabulary(x_ND, head, c)
        if c.padded_vocabulary > c.vocabulary:
            logit_NV = jnp.where((columns_V < c.vocabulary)[None], logit_NV, -jnp.inf)
        top_N = pmax(lax.stop_gradient(logit_NV.max(-1)), 'tensor')
        sum_N = psum(jnp.exp(logit_NV - top_N[:, None]).sum(-1), 'tensor')
        hit_N = psum(jnp.where(columns_V[None] == target_N[:, None], logit_NV, 0).sum(-1), 'tensor')
        return jnp.where(live_N, top_N + jnp.log(sum_N) - hit_N, 0).sum() / n

    flat = lambda a: a.reshape(1, -1, *a.shape[2:])
    N = x_BTD.shape[0] * x_BTD.shape[1]
    chunks = -(-N * n // CHUNK)
    size = -(-N // chunks)
    fill = lambda a: jnp.pad(a, ((0, 0), (0, chunks * size - N), *[(0, 0)] * (a.ndim - 2)))  # live: False
    cut = lambda a: fill(flat(a)).reshape(chunks, 1, size, *a.shape[2:])
    known = cut(target_BT), cut(live_BT)

    @jax.custom_vjp
    def total(head, x_c1ND):
        return lax.map(lambda a: chunk(head, *a), (x_c1ND, *known)).sum()

    def forward(head, x_c1ND):
        sink = mark_varying(jnp.zeros_like(head.w, dtype=upcast(head.w).dtype))

        def step(sums, a):
            x, *rest = a
            run = lambda sink, bias_V, x: chunk(Head(head.w, bias_V, sink), x, *rest)
            value, pull = jax.vjp(run, sink, head.bias_V, x)
            *made, dx = pull(mark_varying(jnp.ones_like(value)))
            return jax.tree.map(jnp.add, sums, (value, *made)), dx

        nothing = mark_varying(jax.tree.map(jnp.zeros_like, (sink[0, 0], sink, head.bias_V)))
        (value, *made), dx_c1ND = lax.scan(step, nothing, (x_c1ND, *known))
        return value, (*made, dx_c1ND)

    def backward(made, scale):
        scaled = lambda d, like: (scale * upcast(d)).astype(like.dtype)
        dw, d_bias_V, dx_c1ND = made
        d_bias_V = None if d_bias_V is None else scaled(d_bias_V, head.bias_V)
        return Head(scaled(dw, head.w), d_bias_V), scaled(dx_c1ND, x_BTD)

    total.defvjp(forward, backward)
    return total(head, cut(x_BTD))
