"""What a model reads before its first new token, as one batch. Letters: B rows, T prompt tokens, S tokens of a source."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.pairs import first_token
from data.pairs import prompts as sources_of
from data.tokenizer import TWICE, Tokenizer
from model.config import ModelConfig
from model.forward import place, row_ways
from sharding.errors import UserError

BUCKET = 32  # prompts and caches are padded to multiples of it, so that few sizes are compiled


class Prompts(NamedTuple):
    """Rows of prompts, on the host or a mesh; rows that only fill up the mesh hold one token."""

    tokens_BT: Any  # int32, padded
    length_B: Any  # int32: of each row
    source: tuple[Any, Any] | None = None  # the same of what an encoder reads: int32 [B, S] and [B]

    def placed(self) -> 'Prompts':
        """On the current mesh."""
        return place(self)

    def slots(self, new: int, context: int) -> int:
        """Tokens of a cache for these prompts and up to `new` more each."""
        longest = int(self.length_B.max())
        return max(-(-min(context, longest + new) // BUCKET) * BUCKET, self.tokens_BT.shape[1])


def read_prompts(c: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> Prompts:
    """Prompts as tokens: what is to be gone on with, or of an encoder–decoder the source of what is to be written.

    Raises UserError for a prompt that leaves no room in the context, or does not fit it as a source.
    """
    if c.encoder is None:
        if any(map(tokenizer.starts_twice, texts)):
            say_once(TWICE)
        rows = [[*tokenizer.prefix, *ids] or [tokenizer.bos] for ids in tokenizer.encode_batch(texts)]
        tokenizer.check(row[0] for row in rows)
        return Prompts(*batch(rows, context - 1, context))
    start = first_token(tokenizer, c.encoder.start_token)
    source = batch(sources_of(tokenizer, texts), context, context)
    return Prompts(*batch([[start]] * len(texts), context, context), source)


@functools.cache
def say_once(line: str) -> None:
    """Tells the user something that is no mistake, however often it comes up."""
    print(line, file=sys.stderr)


def batch(rows: Sequence[Sequence[int]], most: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most `most` tokens, padded to one length, and their lengths."""
    for number, ids in enumerate(rows):
        if len(ids) > most:
            rule = f'at most {most} leave room for an answer' if most < context else f'at most {most} work'
            raise UserError(
                f'prompt {number + 1} has {len(ids)} tokens, its start or end token included, and the context is {context}: '
                f'{rule}'
            )
    count = -(-len(rows) // row_ways()) * row_ways()
    tokens_BT = np.zeros((count, -(-max(map(len, rows)) // BUCKET) * BUCKET), np.int32)
    length_B = np.ones(count, np.int32)
    for number, ids in enumerate(rows):
        tokens_BT[number, : len(ids)], length_B[number] = ids, len(ids)
    return tokens_BT, length_B
