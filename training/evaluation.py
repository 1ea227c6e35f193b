"""The loss of a model on packed rows."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from weft.data.packing import Samples
from weft.data.tokenizer import Tokenizer
from weft.model.batch import Batch
from weft.model.decoder import Decoder
from weft.model.forward import needs_causal, place_rows, row_ways
from weft.runtime.errors import Diverged
from weft.training.loss import loss_sums

_sums = jax.jit(loss_sums, static_argnames='microbatches')
_total = jax.jit(jax.numpy.sum)


class Evaluation(NamedTuple):
    """Sums over what was read."""

    nats: float
    tokens: int  # predicted ones, the end of each document included
    bytes: int  # of the text that they stand for

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """What a tokenizer's choice of pieces does not change."""
        return self.nats / math.log(2) / self.bytes


def evaluate(
    model: Decoder, tokenizer: Tokenizer, rows: Samples, numbers: Sequence[int] | np.ndarray, batch: int
) -> Evaluation:
    """Reads rows, about `batch` at a time, without dropout, under `jax.set_mesh`. Raises Diverged if the loss is not finite."""
    needs_causal(model, 'evaluating')
    bytes_V = np.array([len(piece) for piece in tokenizer.pieces], np.int32)
    stages = jax.sharding.get_mesh().shape['stage']  # a pipeline takes as many microbatches at least
    ways = row_ways() * stages
    batch = -(-min(batch, len(numbers)) // ways) * ways
    nats, tokens, bytes_ = 0.0, 0, 0
    for start in range(0, len(numbers), batch):
        taken = np.asarray(numbers[start : start + batch])
        block, bytes_B = place_rows(batch, functools.partial(_padded, rows, taken, bytes_V))
        found = jax.device_get({**_sums(model, block, microbatches=stages), 'bytes': _total(bytes_B)})
        loss = float(found['loss_sum'])
        if not math.isfinite(loss):
            raise Diverged(f'the loss of rows {taken[0]} to {taken[-1]} is {loss}: the model gives no finite number')
        nats, tokens, bytes_ = nats + loss, tokens + int(found['tokens']), bytes_ + int(found['bytes'])
    if not tokenizer.lossless and len(numbers) == len(rows):
        bytes_ = rows.bytes  # what an imported tokenizer decodes may be longer or shorter than the text
    return Evaluation(nats, tokens, bytes_)


def _padded(rows: Samples, taken: np.ndarray, bytes_V: np.ndarray, begin: int, end: int) -> tuple[Batch, np.ndarray]:
    """Rows `begin` to `end` of those `taken`, with padding after the last, and the bytes of text of each."""
    mine = taken[begin:end]
    block = rows.take(np.pad(mine, (0, end - begin - len(mine))))
    block.segment_BT[len(mine) :] = 0
    bytes_BT = np.where(block.segment_BT > 0, bytes_V[block.target_BT], 0)
    return block, bytes_BT.sum(1, dtype=np.int32)


def spread(count: int, size: int) -> np.ndarray:
    """`count` of `size` rows, evenly spread: rows are packed long pieces first, so that the first ones are no sample."""
    count = min(count, size)
    return np.arange(count) * size // count
