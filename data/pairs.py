"""Pairs of a source and a target, for encoder–decoders: read from files, and packed side by side into rows of one length.

Legend: N rows of a batch, T tokens of a row, on each side; S tokens of all pairs one after another, P pairs, R rows.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from weft.data.packing import Samples, fill_rows
from weft.data.reading import lines_of, plain_name
from weft.data.sources import kind_of_text, objects, text_in
from weft.data.tokenizer import Tokenizer
from weft.data.walk import LeftOut, files_of, is_named
from weft.model.batch import Batch, Source
from weft.runtime.errors import UserError, shown


class Pair(NamedTuple):
    source: str
    target: str


def read_pairs(paths: Sequence[str], option: str, left_out: list[LeftOut] | None = None) -> Iterator[Pair]:
    """The pairs of files, folders and globs: lines `source<TAB>target` of .tsv, objects {"source": …, "target": …} of JSON.

    JSON comes as JSON Lines or as an array; files may be packed. UserError for a line that is no pair, naming file and line,
    and for other files.
    """
    left_out = [] if left_out is None else left_out
    for given in paths:
        if given == 'stdlib':
            raise UserError(f'{option}=stdlib holds no pairs: an encoder–decoder learns from .tsv or .jsonl files')
        for path in files_of(given, option, left_out):
            yield from _pairs_of(path, is_named(path, given))


def _pairs_of(path: Path, named: bool) -> Iterator[Pair]:
    kind, text = kind_of_text(path, Pair._fields, named)
    suffix = plain_name(path).suffix
    if kind != 'text':
        for name, value in objects(path, kind, text, 'an object with a source and a target', Pair._fields):
            yield Pair(*(text_in(value, field, name, repr(field)) for field in Pair._fields))
    elif suffix in ('.tsv', ''):
        file = shown(path)
        for number, line in lines_of(text, file):
            sides = line.split('\t')
            if len(sides) != 2:
                raise UserError(
                    f'{file}:{number}: {len(sides) - 1} tabs; a line must be a source, one tab, and a target'
                )
            yield Pair(*sides)
    else:
        raise UserError(f'{shown(path)}: an encoder–decoder learns from pairs, in .tsv or .jsonl files')


@dataclass(frozen=True, eq=False)
class PairRows(Samples):
    """The packed pairs of one split: a row's first source belongs to its first target, and so on.

    A source is its text and eos; a target is read as a start token and its text, and predicted as its text and eos.
    """

    ARRAYS: ClassVar = ('stream_S', 'start_P', 'source_P', 'target_P', 'first_R')
    stream_S: np.ndarray  # source, eos, start, target, eos of each pair, uint16 or int32
    start_P: np.ndarray  # int64: where a pair begins in the stream; row by row
    source_P: np.ndarray  # int32: tokens of its source, eos among them
    target_P: np.ndarray  # int32: tokens of its target that are read; as many are predicted, one token further on
    first_R: np.ndarray  # int64 [R + 1]: the first pair of each row
    sequence_length: int
    bytes: int  # UTF-8 bytes of the targets

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return int(np.asarray(self.target_P).sum(dtype=np.int64))

    def predicted(self) -> list[int]:
        """All targets' tokens, row after row."""
        begins = np.asarray(self.start_P) + np.asarray(self.source_P)
        return [
            token
            for begin, length in zip(begins.tolist(), self.target_P.tolist(), strict=True)
            for token in self.stream_S[begin + 1 : begin + 1 + length].tolist()
        ]

    def take(self, indices: Iterable[int]) -> Batch:
        """The rows `indices`, int32 [N, T] each, with their sources; a target attends to the source of its own segment."""
        row_N = self.checked(indices)
        arrays = np.zeros((7, len(row_N), self.sequence_length), np.int32)
        source = Source(*arrays[:3])
        rows = Batch(*arrays[3:])._replace(source=source)
        count_T = np.arange(self.sequence_length, dtype=np.int32)
        for n, row in enumerate(row_N.tolist()):
            begins = [0, 0]
            first, last = self.first_R[row : row + 2].tolist()
            pieces = (array[first:last].tolist() for array in (self.start_P, self.source_P, self.target_P))
            for segment, (start, *lengths) in enumerate(zip(*pieces, strict=True), start=1):
                pair = self.stream_S[start : start + sum(lengths) + 1]
                from_, to = ((n, slice(a, a + length)) for a, length in zip(begins, lengths, strict=True))
                source.tokens_BS[from_] = pair[: lengths[0]]
                source.position_BS[from_] = count_T[: lengths[0]]
                source.segment_BS[from_] = segment
                rows.tokens_BT[to] = pair[lengths[0] : -1]
                rows.target_BT[to] = pair[lengths[0] + 1 :]
                rows.position_BT[to] = count_T[: lengths[1]]
                rows.segment_BT[to] = segment
                begins = [a + length for a, length in zip(begins, lengths, strict=True)]
        return rows


def first_token(tokenizer: Tokenizer, start: int | None) -> int:
    """What a decoder reads first: the model's own start token (`model.encoder.start_token`), or the tokenizer's."""
    return tokenizer.bos if start is None else start


def pack_pairs(
    tokenizer: Tokenizer, pairs: Iterable[Pair], sequence_length: int, start: int | None = None, names: bool = False
) -> tuple[PairRows, int]:
    """The rows, and how many pairs are left out because one side has more tokens than a row.

    The name of a special token in a text is text, unless `names` has it be that token.
    """
    begin = first_token(tokenizer, start)
    tokenizer.check([begin, tokenizer.eos])
    token = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
    parts, lengths, size, left_out = [np.empty(0, token)], list[tuple[int, int]](), 0, 0
    pairs = iter(pairs)
    while some := list(islice(pairs, 256)):
        sources, targets = zip(*some, strict=True)
        with contextlib.nullcontext() if names else tokenizer.names_as_text():
            encoded = zip(some, tokenizer.encode_batch(sources), tokenizer.encode_targets(targets), strict=True)
        for one, source, target in encoded:
            if max(len(source), len(target)) + 1 > sequence_length:
                left_out += 1
                continue
            parts.append(np.array([*source, tokenizer.eos, begin, *target, tokenizer.eos], token))
            lengths.append((len(source) + 1, len(target) + 1))
            size += len(one.target.encode())
    length_P2 = np.array(lengths, np.int32).reshape(-1, 2)
    whole_P = length_P2.sum(1, dtype=np.int64) + 1
    start_P = np.cumsum(whole_P) - whole_P
    order_P, first_R = fill_rows(length_P2.max(1, initial=0), sequence_length)  # the longer side, so that both fit
    source_P, target_P = length_P2[order_P].T
    rows = PairRows(np.concatenate(parts), start_P[order_P], source_P, target_P, first_R, sequence_length, size)
    return rows, left_out


def prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """What an encoder reads of sources that stand alone."""
    tokenizer.check([tokenizer.eos])
    return [[*ids, tokenizer.eos] for ids in tokenizer.encode_batch(texts)]
