"""What a model reads before its first new token, as one batch. Letters: B rows, T prompt tokens, S tokens of a source."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from weft.data.pairs import first_token
from weft.data.pairs import prompts as sources_of
from weft.data.tokenizer import TWICE, Tokenizer
from weft.hub.chat import Rendered
from weft.model.config import ModelConfig
from weft.model.forward import place, row_ways
from weft.runtime.errors import UserError

BUCKET = 32  # prompts and caches are padded to multiples of it, so that few sizes are compiled


class Prompts(NamedTuple):
    """Rows of prompts, on the host or a mesh; rows that only fill up the mesh hold one token."""

    tokens_BT: Any  # int32, padded
    length_B: Any  # int32: of each row
    source: tuple[Any, Any] | None = None  # the same of what an encoder reads: int32 [B, S] and [B]

    def placed(self) -> 'Prompts':
        return place(self)

    def seen(self, vocabulary: int) -> np.ndarray:
        """bool [B, vocabulary]: which tokens each prompt has; of prompts on the host."""
        seen_BV = np.zeros((len(self.length_B), vocabulary), bool)
        for row, (ids, length) in enumerate(zip(self.tokens_BT, self.length_B, strict=True)):
            seen_BV[row, ids[:length]] = True
        return seen_BV

    def slots(self, new: int, context: int, like: int = 0) -> int:
        """Tokens of a cache for these prompts and up to `new` more each; `like`: see `read_prompts`."""
        if new < 1:
            raise UserError(f'max-new-tokens is {new}: it must be at least 1')
        longest = self.tokens_BT.shape[1] if like else int(self.length_B.max())
        return max(-(-min(context, longest + new) // BUCKET) * BUCKET, self.tokens_BT.shape[1])


def read_prompts(c: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str], context: int, like: int = 0) -> Prompts:
    """Prompts as tokens: what is to be gone on with, or of an encoder–decoder the source of what is to be written.

    Args:
        texts: plain ones, or conversations as templates render them, which have their special tokens in them.
        like: rows of the batches that this is one of; it is filled up so that they have few shapes. 0: it is the only one.

    Raises UserError for a prompt that leaves no room in the context, or does not fit it as a source.
    """
    if c.encoder is None:
        return Prompts(*batch_rows(rows_of(tokenizer, texts), context - 1, context, like))
    start = first_token(tokenizer, c.encoder.start_token)
    source = batch_rows(sources_of(tokenizer, texts), context, context, like)
    return Prompts(*batch_rows([[start]] * len(texts), context, context, like), source)


@functools.cache
def say_once(line: str) -> None:
    """Tells the user something that is no mistake, however often it comes up."""
    print(line, file=sys.stderr)


def check_prompts(c: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> None:
    """Raises UserError for the first of all prompts that `read_prompts` would refuse, before any batch of them is made."""
    if c.encoder is None:
        check_lengths(rows_of(tokenizer, texts), context - 1, context)
    else:
        check_lengths(sources_of(tokenizer, texts), context, context)


def rows_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt to go on with, after the start token unless a template has rendered it."""
    rendered = [isinstance(text, Rendered) for text in texts]
    if any(tokenizer.starts_twice(text) for text, alone in zip(texts, rendered, strict=True) if not alone):
        say_once(TWICE)
    ids = zip(tokenizer.encode_batch(texts), rendered, strict=True)
    rows = [[*(() if alone else tokenizer.prefix), *of_text] or [tokenizer.bos] for of_text, alone in ids]
    tokenizer.check(row[0] for row in rows)
    return rows


def batch_rows(rows: Sequence[Sequence[int]], most: int, context: int, like: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most `most` tokens, padded to one length, and their lengths."""
    check_lengths(rows, most, context)
    count = -(-max(len(rows), like) // row_ways()) * row_ways()
    width = -(-max(map(len, rows)) // BUCKET) * BUCKET
    if like:
        width = BUCKET << (width // BUCKET - 1).bit_length()
    return pad_rows(rows, count, width)


def pad_rows(rows: Sequence[Sequence[int]], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [count, width] and [count]: the tokens of rows, and their lengths; rows that only fill up hold one token."""
    tokens_BT, length_B = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for number, ids in enumerate(rows):
        tokens_BT[number, : len(ids)], length_B[number] = ids, len(ids)
    return tokens_BT, length_B


def check_lengths(rows: Sequence[Sequence[int]], most: int, context: int) -> None:
    """Raises UserError for a row of more than `most` tokens."""
    for number, ids in enumerate(rows):
        if len(ids) > most:
            tokens = f'prompt {number + 1} has {len(ids)} tokens, its start or end token included'
            rule = f'at most {most} ' + ('leave room for an answer' if most < context else 'work')
            raise UserError(f'{tokens}, and the context is {context}: {rule}')
