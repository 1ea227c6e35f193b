"""The loss of a batch and its gradient: cross-entropy, that of multi-token prediction, and the router's losses.

Letters: B rows, T sequence, D model, L layers, E experts, k layers of multi-token prediction.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax

from weft.model.batch import Batch
from weft.model.capture import EVERYWHERE, Taps, chosen, collected, leading, look, out_layouts, own_taps
from weft.model.context import ForwardContext
from weft.model.decoder import Decoder, learning, with_rest
from weft.model.edits import Edit, Observer
from weft.model.forward import TOKENS, columns, one_device, with_source
from weft.model.head import to_vocabulary
from weft.model.ops.cross_entropy import cross_entropy
from weft.model.parameters import specs
from weft.model.records import Tap, join
from weft.sharding.collectives import Tree, axis_index, mark_varying, psum, reduce_gradients, tensor_slice
from weft.sharding.mesh import AXES, BATCH, platform
from weft.sharding.pipeline import my_microbatches
from weft.sharding.sequence_layout import zigzag

Sums = dict[str, Any]  # arrays by name


def loss_sums(
    model: Decoder,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    microbatches: int = 1,
    edits: Sequence[Edit] = (),
) -> Sums:
    """Sums over all real tokens of a batch, float32 or wider.

    Args:
        model: the decoder, sharded as it was born.
        batch: global arrays, rows split over BATCH.
        dropout_key: one key for all devices; None turns dropout off.
        microbatches: into which the pipeline cuts each device's rows, where the mesh has stages: a multiple of them.
        edits: changes to activations on the way (model/edits.py).

    Returns:
        'loss_sum' Σ cross-entropy in nats, 'tokens' how many, 'rows' with a real token; 'metrics': what layers say of
        themselves (`model.records.Metric`) by name; with `mtp.layers` 'mtp_loss_sum' [k]: Σ cross-entropy of each such layer.
    """

    def body(model: Decoder, batch: Batch, key: jax.Array | None, edits: tuple[Edit, ...]) -> Sums:
        observer = Observer(edits=edits) if edits else None
        sums, _ = local_loss_sums(model, batch, first_row(batch), key, microbatches, observer)
        return token_counts(batch) | psum(mark_varying(sums), AXES)

    return one_device(body, model, (TOKENS, P(), P()), P())(model, batch, dropout_key, tuple(edits))


def loss_fn(
    model: Decoder,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    microbatches: int = 1,
    edits: Sequence[Edit] = (),
) -> tuple[jax.Array, Sums]:
    """The objective, which training minimises, and the metrics that are reported; arguments as in `loss_sums`.

    objective = mean cross-entropy over real tokens + mtp.loss · mean over `mtp.layers` of their Σ cross-entropy over real
    tokens (DeepSeek-V3, arXiv:2412.19437, eq. 24–25) + Σ over what layers say of weight · mean over layers, and over real
    tokens or rows: with experts the balance loss and the router z-loss; in nats.
    """
    sums = loss_sums(model, batch, dropout_key, microbatches, edits)
    return objective(sums, sums, model), loss_metrics(sums, model)


def loss_and_gradient(
    model: Decoder,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    microbatches: int = 1,
    accumulation: int = 1,
    taps: Collection[str] = (),
    edits: Sequence[Edit] = (),
) -> tuple[tuple[jax.Array, Sums], Decoder]:
    """((objective, metrics), gradient) of `loss_fn`, the gradient laid out like the model, None where a weight learns nothing.

    `accumulation`: parts of each device's rows that are worked on one after another, their gradients added up. The sum is the
    gradient of the whole batch: what a token's loss is divided by is known beforehand. Differentiates one device's view
    (in the shard_map, not through it), so that what a weight's copies need of each other is sent once a step.

    `taps`: names of activations that are captured, as by `model.capture.capture`, with columns in the order of the rows: the
    metrics have them under 'taps', by name. Logits are not among them, for they never exist together. Raises UserError for
    taps on a mesh with stages, for a name that no layer offers and an edit that does not fit.
    """

    def run(names: Collection[str], layouts_of_taps: Any) -> Callable[..., Any]:
        def body(
            model: Decoder, batch: Batch, key: jax.Array | None, edits: tuple[Edit, ...]
        ) -> tuple[Decoder, Sums, Taps]:
            observer = Observer(frozenset(names), edits) if names or edits else None
            counts = token_counts(batch)
            # Devices that a CPU simulates may start what does not wait in different orders and then wait for each other for
            # ever: so the layers' collectives wait for those of the counts, which are never negative.
            batch = jax.tree.map(lambda a: jnp.where(counts['tokens'] < 0, 0, a), batch)
            first, size = first_row(batch), batch.tokens_BT.shape[0] // accumulation

            def one_part(batch: Batch, number: int | jax.Array) -> tuple[tuple[Decoder, Sums], Taps]:
                def local_objective(part: Decoder) -> tuple[jax.Array, tuple[Sums, Taps]]:
                    whole = with_rest(part, model)
                    sums, found = local_loss_sums(whole, batch, first + number * size, key, microbatches, observer)
                    return objective(sums, counts, model), (sums, found)

                gradient, (sums, found) = jax.grad(local_objective, has_aux=True)(learning(model))
                return mark_varying((gradient, sums)), found

            one = accumulation == 1
            (gradient, sums), found = one_part(batch, 0) if one else accumulate(one_part, batch, accumulation)
            return (
                reduce_gradients(gradient, layouts),
                counts | psum(mark_varying(sums), AXES),
                found if one else {name: one_after_another(tap) for name, tap in found.items()},
            )

        return one_device(body, model, (TOKENS, P(), P()), (layouts, P(), layouts_of_taps))

    layouts, rows = specs(learning(model)), (batch, dropout_key, tuple(edits))
    names, offered = list[str](), Taps()
    if taps:
        offered = offered_taps(model, batch, dropout_key)
        names = chosen(taps, offered)
    gradient, sums, found = run(names, out_layouts(names, offered))(model, *rows)
    metrics = loss_metrics(sums, model)
    if taps:
        metrics['taps'] = {name: tap.value for name, tap in collected(found, column_order(batch)).items()}
    return (objective(sums, sums, model), metrics), gradient


def offered_taps(model: Decoder, batch: Batch, dropout_key: jax.Array | None) -> Taps:
    """What a loss's layers offer by name, their shapes one device's."""

    def body(model: Decoder, batch: Batch, key: jax.Array | None) -> Taps:
        return local_loss_sums(model, batch, first_row(batch), key, 1, Observer('all'))[1]

    found: Taps = look(one_device(body, model, (TOKENS, P()), EVERYWHERE), model, batch, dropout_key)
    return found


def column_order(batch: Batch) -> np.ndarray:
    """int32 [T]: which column of a row stands where, all devices of `context` side by side."""
    return zigzag(batch.tokens_BT.shape[1], jax.sharding.get_abstract_mesh().shape['context']).reshape(-1)


def accumulate(
    one_part: Callable[[Batch, int | jax.Array], tuple[Tree, Any]], batch: Batch, parts: int
) -> tuple[Tree, Any]:
    """Of (to add, to keep) = one_part(part n of the rows, n) the sum over n and what is kept of each n, from one device's view.

    One part is worked on after another; both are any pytrees, and what is kept has a leading dim of parts.
    """
    batches = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)
    shapes, _ = jax.eval_shape(one_part, jax.tree.map(lambda a: a[0], batches), 0)
    nothing = mark_varying(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))

    def add(total: Tree, part: tuple[Batch, jax.Array]) -> tuple[Tree, Any]:
        found, kept = one_part(*part)
        if platform() == 'tpu':
            # XLA's TPU compiler fails where a reduce-scatter's result goes straight into a loop's sum.
            found = lax.optimization_barrier(found)
        return jax.tree.map(jnp.add, total, found), kept

    return lax.scan(add, nothing, (batches, jnp.arange(parts)))


def one_after_another(tap: Tap) -> Tap:
    """What was captured of the rows of several parts, a leading dim, as of all the rows of a device."""
    rows = len(leading(tap))
    value = jnp.moveaxis(tap.value, 0, rows)
    shape = *value.shape[:rows], value.shape[rows] * value.shape[rows + 1], *value.shape[rows + 2 :]
    return dataclasses.replace(tap, value=value.reshape(shape))


def first_row(batch: Batch) -> jax.Array:
    """The number in the global batch of this device's first row."""
    return axis_index(BATCH) * batch.tokens_BT.shape[0]


def token_counts(batch: Batch) -> Sums:
    """How many real 'tokens' the global batch has, and 'rows' with one; known before anything is computed."""
    live_BT = batch.segment_BT > 0
    return psum({'tokens': live_BT.sum(), 'rows': live_BT.any(1).sum()}, BATCH)


def local_loss_sums(
    model: Decoder,
    batch: Batch,
    first: jax.Array,
    key: jax.Array | None,
    microbatches: int,
    observer: Observer | None = None,
) -> tuple[Sums, Taps]:
    """This device's share of `loss_sums` but for the counts, added up over all devices it is the batch's; what is captured."""
    B, T = batch.tokens_BT.shape
    column_T = columns(T, zigzag)
    tokens_BT, target_BT, position_BT, segment_BT = (a_BT[:, column_T] for a_BT in batch[:4])
    ctx = ForwardContext(
        position_BT,
        segment_BT,
        compute=model.resolved_compute,
        dropout_key=key,
        row_B=first + jnp.arange(B),
        column_T=column_T,
        microbatches=microbatches,
        measures=True,
        observer=observer,
    )
    ctx = with_source(model, ctx, batch.source)
    x_BTD, _, records = model.hidden(tokens_BT, ctx)
    head, to_logits = model.head(learns=True), functools.partial(to_vocabulary, c=model.config)

    assert model.config.vocabulary is not None, 'the tokenizer has decided'
    entropy = functools.partial(cross_entropy, to_logits, head, vocabulary=model.config.vocabulary)

    def mine(a_BT: jax.Array) -> jax.Array:
        """The rows of this stage's microbatches, and of them this device's slice of the sequence: the layout of x."""
        return tensor_slice(my_microbatches(a_BT, microbatches))

    sums = {'loss_sum': entropy(x_BTD, mine(target_BT), ctx.my_microbatches().live_BT), 'metrics': records.metrics}
    if model.config.mtp.layers:
        targets = mtp_targets(batch, model.config.mtp.layers)
        next_kBT, target_kBT, live_kBT = ([a_BT[:, column_T] for a_BT in a_kBT] for a_kBT in targets)
        x_kBTD, mtp_records = model.mtp_hidden(x_BTD, next_kBT, ctx)
        layers = zip(x_kBTD, target_kBT, live_kBT, strict=True)
        sums['mtp_loss_sum'] = jnp.stack([entropy(x, mine(target), mine(live)) for x, target, live in layers])
        sums['metrics'] = join([records, mtp_records]).metrics
    if observer:
        observer.check(model.config.layers)
    return sums, own_taps(records)


def mtp_targets(batch: Batch, depth: int) -> tuple[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]]:
    """For each of `depth` layers of multi-token prediction: the tokens it is given, its targets, and where both are real.

    All [B, T]. Layer k (from 0) is given the token k + 1 places on, and predicts the next; it has none where its document ends.
    """

    def left(a_BT: jax.Array) -> jax.Array:
        return jnp.pad(a_BT[:, 1:], ((0, 0), (0, 1)))

    next_BT, segment_BT, live_BT = batch.target_BT, batch.segment_BT, batch.segment_BT > 0
    layers = []
    for _ in range(depth):
        segment_BT = left(segment_BT)
        live_BT = live_BT & (segment_BT == batch.segment_BT)
        layers.append((next_BT, left(next_BT), live_BT))
        next_BT = left(next_BT)
    next_kBT, target_kBT, live_kBT = zip(*layers, strict=True)
    return next_kBT, target_kBT, live_kBT


def objective(sums: Sums, counts: Sums, model: Decoder) -> jax.Array:
    """What training minimises, of a whole batch's sums; or a device's share of it, of its own sums and the batch's counts."""
    tokens = jnp.maximum(counts['tokens'], 1)
    total = sums['loss_sum'] / tokens
    if model.config.mtp.layers:
        total = total + model.config.mtp.loss * sums['mtp_loss_sum'].mean() / tokens
    for metric in sums['metrics'].values():
        if metric.weight:
            total = total + metric.loss(counts)
    return total


def loss_metrics(sums: Sums, model: Decoder) -> Sums:
    """What is reported of a whole batch's sums."""
    tokens = jnp.maximum(sums['tokens'], 1)
    metrics = {'loss': sums['loss_sum'] / tokens, 'tokens': sums['tokens']}
    if model.config.mtp.layers:
        metrics['mtp_loss'] = sums['mtp_loss_sum'].mean() / tokens
    for name, metric in sums['metrics'].items():
        metrics |= metric.logged(name, sums)
    return metrics
