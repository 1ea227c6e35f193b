"""Logits of whole sequences, or hidden states where there is no LM head, a few rows at a time."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from weft.model.batch import Source
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.model.forward import hidden_states, logits, place, row_ways
from weft.sharding.mesh import SEQUENCE, platform

TOKENS = {'cpu': 512}  # that a device works on at once; of these, rows of 32 take 0.45 of their time one by one
TOKENS_ELSEWHERE = 8192
BYTES = 2**28  # of a device's results at once, unless one row has more


def score(
    model: Decoder, tokens_BT: np.ndarray, source_BS: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The full forward pass of rows that are one document each; use it under `jax.set_mesh`.

    `source_BS`: what the encoder of an encoder–decoder reads for each row; below 0 is padding. Yields (first row,
    float32 [b, T, V]) block by block, so that not all logits exist at once; of a model without an LM head its last hidden
    states, [b, T, D].
    """
    split, ways = row_ways(), math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    count, T = tokens_BT.shape
    padded = -(-T // ways) * ways
    rows = split * rows_at_once(model.config, model.compute, -(-count // split), padded)
    run = jax.jit(logits if model.config.head else hidden_states)
    position = place(np.broadcast_to(np.arange(padded, dtype=np.int32), (rows, padded)))
    document = place(np.broadcast_to((np.arange(padded) < T).astype(np.int32), (rows, padded)))
    for begin in range(0, count, rows):
        block = tokens_BT[begin : begin + rows]
        filled = np.zeros((rows, padded), np.int32)
        filled[: len(block), :T] = block
        more = {} if source_BS is None else {'source': place(source_of(source_BS[begin : begin + rows], rows))}
        found = run(model, place(filled), position, document, **more)
        yield begin, np.asarray(found, np.float32)[: len(block), :T]


def rows_at_once(c: ModelConfig, compute: ComputeConfig, rows: int, length: int) -> int:
    """Rows of so many tokens that a device scores at once: one alone where they compete (`dispatch: all_to_all`)."""
    if c.moe and compute.dispatch == 'all_to_all':
        return 1
    width = c.vocabulary if c.head and c.vocabulary else c.model_dim
    most = max(1, min(TOKENS.get(platform(), TOKENS_ELSEWHERE) // length, BYTES // (4 * length * width)))
    return -(-rows // -(-rows // most))


def source_of(tokens_BS: np.ndarray, rows: int) -> Source:
    """Sources as an encoder reads them, filled up to so many rows."""
    tokens_BS = np.pad(tokens_BS.astype(np.int32), ((0, rows - len(tokens_BS)), (0, 0)), constant_values=-1)
    position_BS = np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape)
    return Source(np.maximum(tokens_BS, 0), position_BS, (tokens_BS >= 0).astype(np.int32))
