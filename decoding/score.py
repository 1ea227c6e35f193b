"""Logits of whole sequences, a few rows at a time."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from model.decoder import Decoder
from model.forward import TOKENS, logits
from sharding.mesh import BATCH


def score(model: Decoder, tokens_BT: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The full forward pass of rows that are one document each; use it under `jax.set_mesh`.

    Yields (first row, float32 [b, T, V]) block by block, so that not all logits exist at once.
    """
    mesh = jax.sharding.get_mesh()
    rows = mesh.shape[BATCH[0]] * mesh.shape[BATCH[1]]
    count, T = tokens_BT.shape
    padded = -(-T // mesh.shape['tensor']) * mesh.shape['tensor']
    run = jax.jit(logits)
    put = lambda array: jax.device_put(array, NamedSharding(mesh, TOKENS))
    place = put(np.broadcast_to(np.arange(padded, dtype=np.int32), (rows, padded)))
    document = put(np.broadcast_to((np.arange(padded) < T).astype(np.int32), (rows, padded)))
    for begin in range(0, count, rows):
        block = tokens_BT[begin : begin + rows]
        filled = np.zeros((rows, padded), np.int32)
        filled[: len(block), :T] = block
        yield begin, np.asarray(run(model, put(filled), place, document), np.float32)[: len(block), :T]
