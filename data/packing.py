"""Documents of any length to rows of one length, each target predicted once, and rows to batches.

Legend: N rows of a batch, T inputs of a row, S tokens of a split's documents one after another, D documents, P pieces
(documents, or their parts where they are longer than a row), R rows of a split.
"""

import abc
import contextlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from weft.data.shuffle import row_ids
from weft.data.tokenizer import Tokenizer
from weft.model.batch import Batch

LONG = 1 << 20  # characters of a document from which on its tokens are made a part at a time


class Samples(abc.ABC):
    """Rows of one length, drawn in batches."""

    ARRAYS: ClassVar[tuple[str, ...]]  # the names of its arrays
    first_R: np.ndarray  # int64 [R + 1]: where each row begins
    sequence_length: int
    bytes: int  # UTF-8 bytes of what is predicted

    def __len__(self) -> int:
        return len(self.first_R) - 1

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Tokens that are predicted."""

    @abc.abstractmethod
    def predicted(self) -> list[int]:
        """Those tokens and others without text, document after document."""

    @abc.abstractmethod
    def take(self, indices: Iterable[int]) -> Batch:
        """The rows `indices`, int32 [N, T] each."""

    def checked(self, indices: Iterable[int]) -> np.ndarray:
        """Numbers of rows, int64 [N]."""
        row_N = np.fromiter(indices, np.int64)
        assert ((row_N >= 0) & (row_N < len(self))).all(), f'rows {row_N} of {len(self)}'
        return row_N

    def row_ids(self, seed: int, step: int, batch: int) -> np.ndarray:
        """The rows of global batch `step`, int64 [batch]: a function of these numbers alone, in O(1) of `step`."""
        return row_ids(len(self), seed, step, batch)

    def batch(self, seed: int, step: int, batch: int, begin: int = 0, end: int | None = None) -> Batch:
        """Rows `begin:end` of the `batch` rows of global batch `step`: one host's part, as `take` gives it."""
        return self.take(self.row_ids(seed, step, batch)[begin:end])


@dataclass(frozen=True, eq=False)
class Rows(Samples):
    """The packed rows of one split.

    A document is bos, its text, eos: all its tokens but the last are inputs, all but the first are targets.
    """

    ARRAYS: ClassVar = ('stream_S', 'start_P', 'length_P', 'first_R')
    stream_S: np.ndarray  # the tokens of all documents, uint16 or int32
    start_P: np.ndarray  # int64: where a piece begins in the stream; row by row
    length_P: np.ndarray  # int32: its inputs; its targets are as many, one token further on
    first_R: np.ndarray  # int64 [R + 1]: the first piece of each row
    sequence_length: int
    bytes: int  # UTF-8 bytes of the text

    @property
    def tokens(self) -> int:
        """Targets of the split: tokens of text, and one end for each document."""
        return int(np.asarray(self.length_P).sum(dtype=np.int64))

    def predicted(self) -> list[int]:
        """All documents' tokens."""
        return self.stream_S.tolist()

    def take(self, indices: Iterable[int]) -> Batch:
        """The rows `indices`, int32 [N, T] each."""
        row_N = self.checked(indices)
        rows = Batch(*np.zeros((4, len(row_N), self.sequence_length), np.int32))
        count_T = np.arange(self.sequence_length, dtype=np.int32)
        for n, row in enumerate(row_N.tolist()):
            begin = 0
            first, last = self.first_R[row : row + 2].tolist()
            pieces = zip(self.start_P[first:last].tolist(), self.length_P[first:last].tolist(), strict=True)
            for segment, (start, length) in enumerate(pieces, start=1):
                place = n, slice(begin, begin + length)
                piece = self.stream_S[start : start + length + 1]
                rows.tokens_BT[place] = piece[:-1]
                rows.target_BT[place] = piece[1:]
                rows.position_BT[place] = count_T[:length]
                rows.segment_BT[place] = segment
                begin += length
        return rows


def best_fit(length_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the fullest row that has room for it, else into a new one.

    Best-fit-decreasing, as Ding et al. 2024 pack documents (Fewer truncations improve language modeling,
    arXiv:2404.10830).
    """
    row_P = np.empty(len(length_P), np.int64)
    rows_with: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the sizes of room that some row has left, ascending
    rows = 0
    for piece in np.argsort(-length_P, kind='stable').tolist():
        length = int(length_P[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room, rows = rows, capacity, rows + 1
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms.pop(at)
        room -= length
        if room > 0:
            if not rows_with[room]:
                insort(rooms, room)
            rows_with[room].append(row)
        row_P[piece] = row
    return row_P


def fill_rows(length_P: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces as `best_fit` has them, row by row: their order [P], and the first of each row [R + 1] in it."""
    row_P = best_fit(length_P, capacity)
    order_P = np.argsort(row_P, kind='stable')
    return order_P, np.searchsorted(row_P[order_P], np.arange(row_P.max(initial=-1) + 2))


def pack(stream_S: np.ndarray, length_D: np.ndarray, sequence_length: int, bytes: int) -> Rows:
    """Rows of documents of `length_D` tokens (bos and eos included) that lie one after another in the stream.

    A document of more than `sequence_length` inputs is cut into pieces of that many, the last one shorter; the last
    target of each piece is the first input of the next.
    """
    assert length_D.min(initial=2) >= 2
    assert length_D.sum() == len(stream_S)
    inputs_D = length_D.astype(np.int64) - 1
    pieces_D = -(-inputs_D // sequence_length)
    part_P = np.arange(pieces_D.sum()) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    start_P = np.repeat(np.cumsum(length_D, dtype=np.int64) - length_D, pieces_D) + part_P * sequence_length
    length_P = np.minimum(np.repeat(inputs_D, pieces_D) - part_P * sequence_length, sequence_length).astype(np.int32)
    order_P, first_R = fill_rows(length_P, sequence_length)
    return Rows(stream_S, start_P[order_P], length_P[order_P], first_R, sequence_length, bytes)


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], names: bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """The stream [S], the documents' lengths in tokens [D] and their UTF-8 bytes in all.

    The name of a special token in a text is text, unless `names` has it be that token.
    """
    token = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
    tokenizer.check([tokenizer.bos, tokenizer.eos])
    parts, lengths, size = [np.empty(0, token)], list[int](), 0
    for some in groups(texts):
        with contextlib.nullcontext() if names else tokenizer.names_as_text():
            if len(some[0]) < LONG:
                found = [np.array([tokenizer.bos, *ids, tokenizer.eos], token) for ids in tokenizer.encode_batch(some)]
            else:
                ids = (np.array(part, token) for part in tokenizer.encode_long(some[0]))
                found = [np.concatenate([np.array([tokenizer.bos], token), *ids, np.array([tokenizer.eos], token)])]
        parts += found
        lengths += map(len, found)
        size += sum(len(text.encode()) for text in some)
    return np.concatenate(parts), np.array(lengths, np.int64), size


def groups(texts: Iterable[str], most: int = 256) -> Iterator[list[str]]:
    """The texts by some that are encoded at once, for lists of ints need twenty times their memory. A long one is alone."""
    some, size = list[str](), 0
    for text in texts:
        if some and (len(some) == most or size + len(text) >= LONG):
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def pack_documents(tokenizer: Tokenizer, texts: Iterable[str], sequence_length: int, names: bool = False) -> Rows:
    """Rows of `texts`, each a document, for evaluation; `names` as `encode_documents` has it."""
    stream_S, length_D, size = encode_documents(tokenizer, texts, names)
    return pack(stream_S, length_D, sequence_length, size)
