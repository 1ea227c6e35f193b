"""The programs that score text with a model, beside a reference or alone: log-probabilities of tokens, and KL divergence.

What the reference's last layer gives is kept on the devices, [B, T, D] of each batch; its logits are made of that again beside
those of each model, a batch at a time. Logits of all tokens never exist together.

Letters: R rows of a text, T their columns, B rows of a batch, D model, V vocabulary, N cloze items, C candidates of an item, Q
tokens that are asked for at each place: the next one and a cloze item's candidates.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.compress.cloze import CANDIDATES
from weft.compress.texts import Text
from weft.inference.score import rows_at_once
from weft.model.decoder import Decoder
from weft.model.forward import ROWS, one_device, place, real_vocabulary, row_ways, scoring_view
from weft.model.head import to_vocabulary
from weft.runtime.errors import Diverged
from weft.sharding.collectives import gather_sequence
from weft.sharding.mesh import BATCH, SEQUENCE


class Scores(NamedTuple):
    """What a model gives of one text, on the host."""

    log_p_RT: np.ndarray  # float64: log p of the token that follows; 0 at padding
    cloze_NC: np.ndarray  # float64: log p of each candidate
    kl_RT: np.ndarray | None  # float64: KL(reference ‖ model); 0 at padding


class Questions(NamedTuple):
    """A batch of rows and what is to be told of it: NumPy's on the host and JAX's on devices."""

    tokens_BT: Any  # int32, as the position and the segment
    position_BT: Any
    segment_BT: Any
    asked_BTQ: Any  # int32: the token that follows, and the candidates of the cloze item there, or token 0


def batches(model: Decoder, text: Text) -> Iterator[Questions]:
    """The text's rows, as many at a time as a device scores at once, filled up with padding; all of one shape."""
    R, T = text.rows.target_BT.shape
    ways = math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    split, columns = row_ways(), -(-T // ways) * ways
    asked_RTQ = np.zeros((R, T, 1 + CANDIDATES), np.int32)
    asked_RTQ[:, :, 0] = text.rows.target_BT
    asked_RTQ[text.cloze.row_N, text.cloze.column_N, 1:] = text.cloze.candidate_NC
    rows = split * rows_at_once(model.config, model.compute, -(-R // split), columns)
    whole = Questions(text.rows.tokens_BT, text.rows.position_BT, text.rows.segment_BT, asked_RTQ)
    for begin in range(0, R, rows):

        def filled(array: np.ndarray, begin: int = begin) -> np.ndarray:
            part = array[begin : begin + rows]
            more = (0, rows - len(part)), (0, columns - T), *[(0, 0)] * (array.ndim - 2)
            return np.pad(part, more)

        yield jax.tree.map(filled, whole)


@jax.jit
def _hidden(model: Decoder, batch: Questions) -> jax.Array:
    """[B, T, D]: what the LM head is given."""

    def body(model: Decoder, rows: tuple[jax.Array | None, ...]) -> jax.Array:
        return model.hidden(*scoring_view(model, rows))[0]

    rows = (batch.tokens_BT, batch.position_BT, batch.segment_BT, None)
    return one_device(body, model, (P(BATCH),), P(ROWS, SEQUENCE))(model, rows)


@jax.jit
def _answers(model: Decoder, x_BTD: jax.Array, asked_BTQ: jax.Array) -> jax.Array:
    """float32 [B, T, Q]: log p of each token that is asked for."""
    return entries(log_probabilities(model, x_BTD), asked_BTQ)


@jax.jit
def _compared(
    model: Decoder, x_BTD: jax.Array, asked_BTQ: jax.Array, reference: Decoder, y_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_answers`, and float32 [B, T]: KL(reference ‖ model) of the token that follows."""
    log_p_BTV, log_q_BTV = log_probabilities(model, x_BTD), log_probabilities(reference, y_BTD)
    return entries(log_p_BTV, asked_BTQ), (jnp.exp(log_q_BTV) * (log_q_BTV - log_p_BTV)).sum(-1)


def log_probabilities(model: Decoder, x_BTD: jax.Array) -> jax.Array:
    """[B, T, V] of what the LM head is given, in at least float32: rows and T split, the vocabulary whole."""

    def body(model: Decoder, x_BTD: jax.Array) -> jax.Array:
        return to_vocabulary(gather_sequence(x_BTD), model.head(), model.config)

    run = one_device(body, model, (P(ROWS, SEQUENCE),), P(ROWS, 'context', 'tensor'))
    return jax.nn.log_softmax(real_vocabulary(run(model, x_BTD), model), axis=-1)


def entries(log_p_BTV: jax.Array, asked_BTQ: jax.Array) -> jax.Array:
    """[B, T, Q]: the entries that are asked for."""
    split = P(BATCH, 'context')
    take = functools.partial(jnp.take_along_axis, axis=-1)
    return jax.shard_map(take, in_specs=(split, split), out_specs=split)(log_p_BTV, jax.reshard(asked_BTQ, split))


def scores_of(
    model: Decoder,
    text: Text,
    reference: Decoder | None = None,
    hidden: Sequence[jax.Array] = (),
    keep: list[jax.Array] | None = None,
) -> Scores:
    """What a model gives of a text; batches' `hidden` are the reference's, and the model's own are added to `keep`.

    Raises Diverged where the log-probability of a token that counts is not finite.
    """
    found: list[list[Any]] = []
    for number, batch in enumerate(batches(reference or model, text)):
        placed = place(batch)
        x_BTD = _hidden(model, placed)
        if keep is not None:
            keep.append(x_BTD)
        if reference is None:
            found.append([_answers(model, x_BTD, placed.asked_BTQ)])
        else:
            found.append(list(_compared(model, x_BTD, placed.asked_BTQ, reference, hidden[number])))
    R, T = text.rows.target_BT.shape
    arrays = [
        np.concatenate([np.asarray(one, np.float64) for one in part])[:R, :T] for part in zip(*found, strict=True)
    ]
    live_RT = text.rows.segment_BT > 0
    log_p_RT = np.where(live_RT, arrays[0][:, :, 0], 0)
    kl_RT = np.where(live_RT, arrays[1], 0) if reference is not None else None
    if not np.isfinite(log_p_RT if kl_RT is None else log_p_RT + kl_RT).all():
        raise Diverged(f'the {text.name} text: the model gives no finite number at some of its tokens')
    return Scores(log_p_RT, arrays[0][text.cloze.row_N, text.cloze.column_N, 1:], kl_RT)
