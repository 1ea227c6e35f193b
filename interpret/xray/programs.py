"""The programs that an X-ray runs on the mesh: one forward pass that captures, what the head reads, what linear maps write.

Each takes host arrays and gives host arrays, whatever the mesh; what is done with them after that is NumPy.

Letters: B rows, T sequence, L layers, D model, V vocabulary, N tokens of any number of rows, I inputs and O outputs of a
linear map, k tokens that are told of each place: TOLD, or all of a smaller vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax

from weft.model.capture import capture
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.model.forward import ROWS, one_device, place, real_vocabulary, row_ways
from weft.model.head import to_vocabulary
from weft.model.ops.cross_entropy import head_product
from weft.sharding.collectives import as_replicated, gather_sequence, mark_varying, psum
from weft.sharding.mesh import BATCH, SEQUENCE

BUCKET = 16  # columns are a multiple of it, so that texts of about the same length run the same program
TOKENS = 512  # that one call of a program works on, unless one row has more
TOLD = 10  # tokens: one number, so that all that is read runs one program
Part = Literal['attention', 'mlp']


def sequence_ways() -> int:
    """Into how many parts the current mesh splits a row between blocks."""
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)


def columns_for(tokens: int, least: int = 0) -> int:
    """Columns of rows that hold so many tokens on the current mesh."""
    unit = BUCKET * sequence_ways() // math.gcd(BUCKET, sequence_ways())
    return -(-max(tokens, least) // unit) * unit


def rows_for(columns: int) -> int:
    """Rows of so many columns that one call works on: about `TOKENS` tokens on each part of the rows."""
    return row_ways() * max(1, TOKENS // columns)


class Padded(NamedTuple):
    """Rows of documents, filled up with padding: int32 [B, T] each, NumPy's on the host and JAX's on devices."""

    tokens_BT: Any
    position_BT: Any
    segment_BT: Any


def padded(c: ModelConfig, rows: Sequence[Sequence[int]], columns: int) -> Padded:
    """Rows of ids in `columns` columns; there are as many as the mesh splits rows into, or a multiple."""
    count = -(-len(rows) // row_ways()) * row_ways()
    tokens_BT, segment_BT = np.zeros((2, count, columns), np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)], segment_BT[row, : len(ids)] = ids, 1
    # A table of positions may have fewer rows than there is padding, which nothing attends to.
    last = columns - 1 if c.max_positions is None else c.max_positions - 1
    position_T = np.minimum(np.arange(columns, dtype=np.int32), last)
    return Padded(tokens_BT, np.broadcast_to(position_T, tokens_BT.shape), segment_BT)


@functools.partial(jax.jit, static_argnums=1)
def _captured(model: Decoder, names: tuple[str, ...], rows: Padded) -> dict[str, jax.Array]:
    return capture(model, names, rows.tokens_BT, rows.position_BT, rows.segment_BT)


def offered(model: Decoder, rows: Padded) -> frozenset[str]:
    """The names under which the model's layers offer activations; nothing is computed."""
    return frozenset(jax.eval_shape(functools.partial(_captured, names=('*',)), model, rows=place(rows)))


def captured(model: Decoder, names: Sequence[str], rows: Padded) -> dict[str, np.ndarray]:
    """Of each name float32 [L, B, T, …] of the layers that offer it, or [B, T, …]; integers as int32. One program."""
    found = _captured(model, tuple(names), place(rows))
    return {name: host(array) for name, array in found.items()}


def host(array: Any) -> np.ndarray:
    """An array of a mesh on the host: float32, or int32."""
    whole = np.asarray(array)
    return whole.astype(np.int32 if np.issubdtype(whole.dtype, np.integer) else np.float32)


class Read(NamedTuple):
    """What the head makes of vectors, [N, …]."""

    top_Nk: np.ndarray  # int32: the likeliest tokens, the first most
    logit_Nk: np.ndarray  # their logits
    log_sum_N: np.ndarray  # logsumexp of all logits
    entropy_N: np.ndarray  # of the distribution, in nats
    asked_N: np.ndarray  # the logit of the token that was asked for
    rank_N: np.ndarray  # int32: of that token, 1 for the likeliest


@functools.partial(jax.jit, static_argnums=3)
def _read(model: Decoder, x_BTD: jax.Array, asked_BT: jax.Array, direct: bool) -> tuple[jax.Array, ...]:
    c = model.config

    def body(model: Decoder, x_BTD: jax.Array) -> jax.Array:
        if direct:
            head = model.head()
            return head_product(gather_sequence(x_BTD), head.w, None, 'VD' if c.embedding.tied else 'DV')
        normed_BTD = x_BTD if c.norm.order == 'post' else model.norm(x_BTD)
        return to_vocabulary(gather_sequence(normed_BTD), model.head(), c)

    split = P(ROWS, 'context', 'tensor')
    x_BTD = jax.reshard(x_BTD, P(BATCH, SEQUENCE)).astype(model.compute.dtype)
    logit_BTV = real_vocabulary(one_device(body, model, (P(BATCH, SEQUENCE),), split)(model, x_BTD), model)
    if direct:
        assert c.head is not None
        logit_BTV = logit_BTV * c.head.scale
    asked_BT1 = jax.reshard(asked_BT, P(BATCH, 'context'))[..., None]
    at_BTV = jnp.arange(logit_BTV.shape[-1])[None, None] == asked_BT1
    log_sum_BT = jax.nn.logsumexp(logit_BTV, -1)
    log_BTV = logit_BTV - log_sum_BT[..., None]
    entropy_BT = -(jnp.exp(log_BTV) * log_BTV).sum(-1)
    logit_BTk, top_BTk = lax.top_k(logit_BTV, min(TOLD, logit_BTV.shape[-1]))
    asked_logit_BT = jnp.where(at_BTV, logit_BTV, 0).sum(-1)
    rank_BT = 1 + (logit_BTV > asked_logit_BT[..., None]).sum(-1, dtype=jnp.int32)
    return top_BTk, logit_BTk, log_sum_BT, entropy_BT, asked_logit_BT, rank_BT


def read(model: Decoder, x_ND: np.ndarray, asked_N: np.ndarray, *, direct: bool = False) -> Read:
    """Vectors of the residual stream through the final norm and the head or, where `direct`, through the head alone.

    `direct` gives products with the head's vectors, times the head's scale, without bias and softcap: what a vector that is
    added after the final norm adds to each logit, before the softcap.
    """
    unit = sequence_ways()
    columns = -(-64 // unit) * unit
    rows = rows_for(columns)
    found = []
    for begin in range(0, len(x_ND), rows * columns):
        part = slice(begin, begin + rows * columns)
        x_BTD = filled(x_ND[part], rows * columns).reshape(rows, columns, -1)
        asked_BT = filled(asked_N[part].astype(np.int32), rows * columns).reshape(rows, columns)
        arrays = _read(model, *place((x_BTD, asked_BT)), direct)
        found.append([host(a).reshape(rows * columns, *a.shape[2:])[: len(x_ND[part])] for a in arrays])
    return Read(*map(np.concatenate, zip(*found, strict=True)))


def whole(part_BTD: jax.Array) -> jax.Array:
    """One device's view: the sum over `tensor` of a part that the devices of `context` have alike."""
    return as_replicated(psum(part_BTD, 'tensor'), 'context')


def filled(a_N: np.ndarray, count: int) -> np.ndarray:
    """The array with zeros after it, up to a count."""
    return np.concatenate([a_N, np.zeros((count - len(a_N), *a_N.shape[1:]), a_N.dtype)])


@jax.jit
def _head_vectors(model: Decoder, token_BT: jax.Array) -> jax.Array:
    def body(model: Decoder, token_BT: jax.Array) -> jax.Array:
        w = model.head().w
        w_VD = w if model.config.embedding.tied else w.T
        column_V = lax.axis_index('tensor') * len(w_VD) + jnp.arange(len(w_VD))
        one_BTV = (token_BT[..., None] == column_V[None, None]).astype(w_VD.dtype)
        return whole(jnp.einsum('BTV,VD->BTD', one_BTV, w_VD, precision='highest'))

    return one_device(body, model, (P(BATCH),), P(ROWS))(model, token_BT)


def head_vectors(model: Decoder, token_N: np.ndarray) -> np.ndarray:
    """float32 [N, D]: the vector whose product with what the final norm gives is a token's logit, before bias and softcap."""
    assert model.config.head is not None
    ways = row_ways()
    token_BT = filled(token_N.astype(np.int32), -(-len(token_N) // ways) * ways).reshape(ways, -1)
    found = host(_head_vectors(model, place(token_BT)))
    return found.reshape(-1, found.shape[-1])[: len(token_N)] * np.float32(model.config.head.scale)


def place_of(c: ModelConfig, layer: int) -> tuple[int, int]:
    """Where a layer's weights stand: in which of `Decoder.groups`, and at which place of its leading dim."""
    first = group = 0
    for run in c.layer_groups:
        if layer < first + run.layers:
            return group + (layer - first) % len(run.specs), (layer - first) // len(run.specs)
        first, group = first + run.layers, group + len(run.specs)
    raise AssertionError(f'layer {layer} of {c.layers}')


@functools.partial(jax.jit, static_argnums=(1, 2))
def _written(model: Decoder, part: Part, group: int, at: jax.Array, x_BTI: jax.Array) -> jax.Array:
    def body(model: Decoder, at: jax.Array, x_BTI: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda w: w[mark_varying(at)], model.groups[group])
        linear = block.attention.o if part == 'attention' else block.mlp.down
        return whole(linear.product(x_BTI))

    layout = P(BATCH, None, 'tensor')
    x_BTI = jax.reshard(x_BTI, layout).astype(model.compute.dtype)
    return one_device(body, model, (P(), layout), P(ROWS))(model, at, x_BTI)


def written(model: Decoder, part: Part, layer: int, x_NI: np.ndarray) -> np.ndarray:
    """float32 [N, O]: what the last linear map of a layer's part makes of its inputs, without its bias.

    The inputs of `attention` are all heads' outputs side by side, those of `mlp` its hidden units.
    """
    group, at = place_of(model.config, layer)
    columns = max(1, TOKENS // row_ways())
    count, found = row_ways() * columns, []
    for begin in range(0, len(x_NI), count):
        part_NI = x_NI[begin : begin + count]
        x_BTI = filled(part_NI, count).reshape(row_ways(), columns, -1)
        y_BTO = host(_written(model, part, group, jnp.int32(at), place(x_BTI)))
        found.append(y_BTO.reshape(count, -1)[: len(part_NI)])
    return np.concatenate(found)


def layer_weight(model: Decoder, layer: int, *path: str) -> np.ndarray | None:
    """float32: a small weight of a layer, a norm's scale or a bias, whole; None where the layer has none of that name."""
    group, at = place_of(model.config, layer)
    found: Any = model.groups[group]
    for name in path:
        found = getattr(found, name, None)
        if found is None:
            return None
    return np.asarray(found[...], np.float32)[at]
