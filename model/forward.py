"""The forward pass as ONE fully manual `jax.shard_map` over the whole mesh: global arrays in, global arrays out.

What runs inside reads the weights' layouts off their types, and is one device's view: the loss (training/loss.py), the
logits of whole sequences (here), prefill and decoding steps (inference/step.py).
Letters: B rows, T sequence, S tokens of a source, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jax.sharding import NamedSharding

from weft.model.batch import Source
from weft.model.config import needs_head
from weft.model.context import ForwardContext
from weft.model.decoder import Decoder
from weft.model.edits import Edit, Observer
from weft.model.head import to_vocabulary
from weft.model.ops import attention, grouped_matmul
from weft.model.parameters import specs
from weft.runtime.errors import UserError
from weft.sharding.collectives import axis_index, gather_sequence, mark_varying
from weft.sharding.mesh import BATCH, SEQUENCE, check_mesh_is_set
from weft.sharding.sequence_layout import contiguous

TOKENS = P(BATCH)  # of a [B, T] array of integers: its rows are split; each device takes its own columns of them

LOGITS = P(BATCH, 'context', 'tensor')  # how a tap [B, T, V] of them is laid out

ROWS = (*BATCH, 'stage')  # axes of the rows that a device's view gives, where `stage` is 1


def place(tree: Any) -> Any:
    """Host arrays, rows first, the same in every process, as global arrays whose rows are split over the current mesh."""
    return jax.tree.map(lambda array: place_rows(len(array), lambda begin, end: array[begin:end]), tree)


def place_rows(count: int, take: Callable[[int, int], Any]) -> Any:
    """`count` rows as global arrays, laid out as by `place`, of which this process takes only those that it needs.

    `take(begin, end)` gives a tree of host arrays [end - begin, …]; it is called once for each of `local_rows(count)`.
    """
    check_mesh_is_set()
    split = NamedSharding(jax.sharding.get_mesh(), TOKENS)
    spans = local_rows(count)
    blocks = [take(*span) for span in spans]

    def whole(*parts: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, 'the array has rows'
            begin, end, _ = index[0].indices(count)
            span = next(n for n, (first, last) in enumerate(spans) if first <= begin and end <= last)
            return parts[span][begin - spans[span][0] : end - spans[span][0]]

        return jax.make_array_from_callback((count, *parts[0].shape[1:]), split, part)

    return jax.tree.map(whole, *blocks)


def local_rows(count: int) -> list[tuple[int, int]]:
    """Which of `count` rows lie on this process' devices of the current mesh: [begin, end) of each run of them, ascending."""
    split = NamedSharding(jax.sharding.get_mesh(), TOKENS)
    found: list[tuple[int, int]] = []
    places = [place for place in split.addressable_devices_indices_map((count,)).values() if place is not None]
    for begin, end in sorted({place[0].indices(count)[:2] for place in places}):
        if found and begin == found[-1][1]:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def row_ways() -> int:
    """Into how many parts the current mesh splits the rows of a batch."""
    check_mesh_is_set()
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in BATCH)


def one_device(
    body: Callable[..., Any], model: Decoder, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """`body(model, …)` as a shard_map over every axis, the model as this device's own copies (see `mark_varying`).

    check_vma finds a missing sum; attention kernels that cannot say what varies turn it off.
    """
    check_mesh_is_set()
    how = model.resolved_compute
    checked = not (
        attention.needs_unchecked(how.attention)
        or (model.config.moe and grouped_matmul.needs_unchecked(how.grouped_matmul))
    )

    def on_own_copies(model: Decoder, *rest: Any) -> Any:
        return body(mark_varying(model), *rest)

    return jax.shard_map(on_own_copies, in_specs=(specs(model), *in_specs), out_specs=out_specs, check_vma=checked)


def columns(T: int, order: Callable[[int, int], np.ndarray]) -> jax.Array:
    """int32 [T / context]: which columns of a row of T this device works on; `order`: see sharding/sequence_layout.py."""
    return jnp.asarray(order(T, lax.axis_size('context')))[axis_index('context')]


def needs_no_stages(what: str) -> None:
    """Raises UserError where the current mesh has a pipeline, which is for training."""
    check_mesh_is_set()
    stages = jax.sharding.get_abstract_mesh().shape['stage']
    if stages > 1:
        raise UserError(
            f'mesh.stage is {stages}: {what} has no pipeline; use the same devices as mesh.data={stages} more'
        )


def needs_causal(model: Decoder, what: str) -> None:
    """Raises UserError for a model whose tokens see those after them, and for one without an LM head."""
    needs_head(model.config, what)
    if not model.config.causal:
        raise UserError(
            f'model.causal is false: {what} needs a model that predicts the next token; scripts/score.py gives the logits of '
            'this one, at masked tokens too'
        )


def own_columns(tree: Any) -> Any:
    """Of arrays [B, T] what this device of `context` works on, in the order of the row."""
    return jax.tree.map(lambda a_BT: a_BT[:, columns(a_BT.shape[1], contiguous)], tree)


def scoring_view(
    model: Decoder, rows: tuple[jax.Array | None, ...], source: Source | None = None, **more: Any
) -> tuple[jax.Array, ForwardContext]:
    """One device's tokens, of whole rows (tokens, position, segment, kind), and their context; `more`: fields of it."""
    tokens_BT, position_BT, segment_BT, kind_BT = own_columns(rows)
    assert rows[0] is not None, 'there are tokens'
    column_T = columns(rows[0].shape[1], contiguous)
    ctx = ForwardContext(position_BT, segment_BT, model.resolved_compute, kind_BT=kind_BT, column_T=column_T, **more)
    return tokens_BT, with_source(model, ctx, source)


def logits(
    model: Decoder,
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    kind_BT: jax.Array | None = None,
    source: Source | None = None,
    edits: Sequence[Edit] = (),
) -> jax.Array:
    """Logits [B, T, vocabulary] of the full forward pass, float32 or wider, rows split over BATCH, T over `context`.

    context × tensor must divide T. `kind_BT`: token types, as `ForwardContext` has them; `source`: an encoder–decoder needs it;
    `edits`: changes to activations on the way (model/edits.py). Raises UserError on a mesh with stages, for a model without an
    LM head (`hidden_states`), and for an edit that does not fit.
    """
    needs_no_stages('scoring')
    needs_head(model.config, 'logits')

    def body(
        model: Decoder, rows: tuple[jax.Array | None, ...], source: Source | None, edits: tuple[Edit, ...]
    ) -> jax.Array:
        observer = Observer(edits=edits) if edits else None
        tokens_BT, ctx = scoring_view(model, rows, source, observer=observer)
        ctx, _ = ctx.recording()
        x_BTD, _, _ = model.hidden(tokens_BT, ctx)
        logit_BTV = scored(model, x_BTD, ctx)
        if observer:
            observer.check(model.config.layers)
        return logit_BTV

    run = one_device(body, model, (TOKENS, TOKENS, P()), P(ROWS, 'context', 'tensor'))
    return real_vocabulary(run(model, (tokens_BT, position_BT, segment_BT, kind_BT), source, tuple(edits)), model)


def scored(model: Decoder, x_BTD: jax.Array, ctx: ForwardContext) -> jax.Array:
    """One device's logits [B, T / context, V / tensor] of what `hidden` gives of whole rows."""
    logit_BTV = to_vocabulary(gather_sequence(x_BTD), model.head(), model.config)
    return ctx.tap('logits', logit_BTV, LOGITS, real=model.config.vocabulary)


def hidden_states(
    model: Decoder,
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    kind_BT: jax.Array | None = None,
) -> jax.Array:
    """What the last layer and the final norm give, [B, T, D] in the compute dtype, laid out as `logits` has its rows and T.

    context × tensor must divide T. Raises UserError on a mesh with stages, and for an encoder–decoder.
    """
    needs_no_stages('scoring')
    if model.config.encoder:
        raise UserError('model.encoder is given: hidden states and embeddings are of models without one')

    def body(model: Decoder, rows: tuple[jax.Array | None, ...]) -> jax.Array:
        return model.hidden(*scoring_view(model, rows), for_head=False)[0]

    run = one_device(body, model, (TOKENS,), P(ROWS, SEQUENCE))
    return jax.reshard(run(model, (tokens_BT, position_BT, segment_BT, kind_BT)), P(BATCH, 'context'))


def with_source(model: Decoder, ctx: ForwardContext, source: Source | None) -> ForwardContext:
    """One device's view with what the encoder makes of this device's rows of a source."""
    assert (source is None) == (model.config.encoder is None), 'an encoder reads a source'
    return ctx if source is None else dataclasses.replace(ctx, source=model.read(*source, ctx))


def mtp_logits(model: Decoder, tokens_BT: jax.Array, position_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Logits [k, B, T, vocabulary] of the layers that predict further ahead (`mtp.layers`), as those of `logits`.

    At column t of layer k (from 0) stand those of the token k + 2 columns later, given all tokens up to k + 1 columns later,
    which is why the last k + 1 columns mean nothing.
    """
    needs_no_stages('scoring')

    def body(model: Decoder, *rows: jax.Array) -> jax.Array:
        tokens_BT, ctx = scoring_view(model, (*rows, None))
        x_BTD, _, _ = model.hidden(tokens_BT, ctx)
        next_kBT = [own_columns(jnp.roll(rows[0], -1 - k, axis=1)) for k in range(model.config.mtp.layers)]
        found, _ = model.mtp_hidden(x_BTD, next_kBT, ctx)
        return jnp.stack([to_vocabulary(gather_sequence(x_BTD), model.head(), model.config) for x_BTD in found])

    run = one_device(body, model, (TOKENS, TOKENS, TOKENS), P(None, ROWS, 'context', 'tensor'))
    logit_kBTV = run(model, tokens_BT, position_BT, segment_BT)
    return jax.reshard(logit_kBTV, P(None, BATCH, 'context', None))[..., : model.config.vocabulary]


def real_vocabulary(logit_V: jax.Array, model: Decoder) -> jax.Array:
    """Logits split over `tensor` and padded, to all of the real vocabulary on each of its devices."""
    spec = P(BATCH, *jax.typeof(logit_V).sharding.spec[1:-1], None)
    return jax.reshard(logit_V, spec)[..., : model.config.vocabulary]
