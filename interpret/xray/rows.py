"""The rows of text that an index of cells reads: a run's own training data, or files that are named."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weft.data.packing import Rows, Samples, pack_documents
from weft.data.prepare import load
from weft.data.sources import texts
from weft.data.walk import LeftOut, left_out_text
from weft.hub.published_tokenizer import load_tokenizer
from weft.inference.run import TrainedRun
from weft.runtime.errors import UserError, shown

MOST = 256  # tokens of a row of files that are named


def check_own(folder: Path) -> None:
    """Raises UserError for a run that has no data of its own."""
    if not (folder / 'data').exists():
        raise UserError(
            f'{shown(folder)} has no training data of its own, as an imported model: give text with --data PATH'
        )


def own(folder: Path) -> tuple[Samples, str, str]:
    """A run's training rows, what they were made of, and a digest of it."""
    dataset = load(folder, lambda line: print(line, file=sys.stderr), load_tokenizer)
    return dataset.train, ', '.join(map(str, dataset.facts['source'])), str(dataset.facts['sha256'])


def given(paths: Sequence[str], field: str) -> list[str]:
    """The texts of files; says on stderr what is left out."""
    skipped: list[LeftOut] = []
    found = [text for _, text in texts(paths, field, skipped)]
    if skipped:
        print(f'--data: {len(found)} texts{left_out_text(skipped)}', file=sys.stderr)
    return found


def packed(run: TrainedRun, found: Sequence[str], paths: Sequence[str]) -> tuple[Rows, str, str]:
    """Texts as rows, what they are, and a digest of them."""
    assert run.tokenizer is not None
    length = min(run.context, run.config.training.sequence_length, MOST)
    rows = pack_documents(run.tokenizer, found, length, run.config.data.special_tokens)
    if not len(rows):
        raise UserError(f'--data {shown(" ".join(paths))}: holds no text')
    return rows, ', '.join(paths), hashlib.sha256(np.asarray(rows.stream_S, np.int32).tobytes()).hexdigest()
