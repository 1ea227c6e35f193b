"""Logits of whole sequences, a few rows at a time."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from model.decoder import Decoder
from model.forward import logits, place, row_ways
from sharding.mesh import SEQUENCE


def score(model: Decoder, tokens_BT: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The full forward pass of rows that are one document each; use it under `jax.set_mesh`.

    Yields (first row, float32 [b, T, V]) block by block, so that not all logits exist at once.
    """
    rows, ways = row_ways(), math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    count, T = tokens_BT.shape
    padded = -(-T // ways) * ways
    run = jax.jit(logits)
    position = place(np.broadcast_to(np.arange(padded, dtype=np.int32), (rows, padded)))
    document = place(np.broadcast_to((np.arange(padded) < T).astype(np.int32), (rows, padded)))
    for begin in range(0, count, rows):
        block = tokens_BT[begin : begin + rows]
        filled = np.zeros((rows, padded), np.int32)
        filled[: len(block), :T] = block
        yield begin, np.asarray(run(model, place(filled), position, document), np.float32)[: len(block), :T]
