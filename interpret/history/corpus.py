"""The one corpus of all models of the page: prepared once, its tokens drawn by every model in one order.

Letters: V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from weft.data import prepared
from weft.data.packing import Samples
from weft.data.prepare import Dataset, prepare
from weft.interpret.history.kneser_ney import Texts
from weft.interpret.history.net_training import Plan
from weft.model.batch import Batch
from weft.runtime.errors import UserError
from weft.training.config import RunConfig

SHARED = ('data', 'training', 'seed', 'metrics')  # sections that all configs of the page have alike


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The data, and how much of it each model reads."""

    dataset: Dataset
    config: RunConfig  # of the dense model: what all share

    def plan(self, learning_rate: float) -> Plan:
        """How a small net learns from it: as the dense model, at a learning rate of its own."""
        c, d = self.config, self.dataset
        return Plan(
            d.train,
            d.validation,
            d.tokenizer,
            dataclasses.replace(c.optimizer, learning_rate=learning_rate),
            steps=c.training.steps,
            batch=c.training.batch,
            seed=c.seed,
            validate_every=c.metrics.validate_every,
            validation_rows=c.metrics.validation_rows,
        )

    def batches(self) -> list[Batch]:
        """What each model reads, in its order."""
        t = self.config.training
        return [self.dataset.train.batch(self.config.seed, step, t.batch) for step in range(t.steps)]

    def validation(self) -> Batch:
        """All of the validation split."""
        rows = self.dataset.validation
        return rows.take(range(len(rows)))

    def texts(self, batches: list[Batch]) -> Texts:
        """Rows as texts for a model of n-grams: each piece of a document with what its last token predicts.

        A piece that does not begin its document has a mark before it, of number V: what comes before is not known, to a
        decoder neither, and its first token is predicted by nobody.
        """
        tokenizer = self.dataset.tokenizer
        texts, given = list[Sequence[int]](), list[int]()
        for text in pieces(batches):
            begins = text[0] == tokenizer.bos
            texts.append(text.tolist() if begins else [tokenizer.vocabulary, *text.tolist()])
            given.append(1 if begins else 2)
        found = Texts.of(texts)
        given_S = np.repeat(given, [len(text) for text in texts])
        return found._replace(predicted_S=found.place_S >= given_S)

    def bytes_of(self, batch: Batch) -> int:
        """UTF-8 bytes of the text that a batch's targets stand for."""
        bytes_V = np.array([len(piece) for piece in self.dataset.tokenizer.pieces])
        return int(np.where(batch.segment_BT > 0, bytes_V[batch.target_BT], 0).sum())

    def piece(self, text: str) -> int | None:
        """The token that is a text, and nothing else; None where there is none."""
        ids = self.dataset.tokenizer.encode(text)
        return ids[0] if len(ids) == 1 else None


def pieces(batches: list[Batch]) -> list[np.ndarray]:
    """The pieces of documents in rows, with what the last token of each predicts."""
    found = []
    for batch in batches:
        for tokens_T, target_T, segment_T in zip(batch.tokens_BT, batch.target_BT, batch.segment_BT, strict=True):
            for segment in range(1, int(segment_T.max(initial=0)) + 1):
                here = np.flatnonzero(segment_T == segment)
                found.append(np.append(tokens_T[here], target_T[here[-1]]).astype(np.int64))
    return found


def open_corpus(config: RunConfig, folder: Path, say: Callable[[str], None] = print) -> Corpus:
    """The corpus of a config, prepared in `folder`, or as it is there already. Raises UserError where it has too few rows."""
    dataset = prepare(config.data, folder, config.training.sequence_length, say=say)
    wanted = config.training.steps * config.training.batch
    check_rows(dataset.train, wanted)
    return Corpus(dataset, config.with_vocabulary(dataset.tokenizer.embedded))


def check_rows(rows: Samples, wanted: int) -> None:
    """Raises UserError where a model would read rows twice: counts of n-grams and weights would not mean the same."""
    if wanted > len(rows):
        raise UserError(
            f'training.steps · training.batch is {wanted} rows, and the corpus has {len(rows)}: each is read at most once; '
            f'nearest that works: {len(rows)} rows'
        )


def lend(corpus: Corpus, folder: Path) -> None:
    """Puts the prepared data into a run's folder, where it is not there: preparing it again would take as long."""
    if not (folder / 'data').exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepared.save(folder, corpus.dataset)


def check_shared(one: RunConfig, other: RunConfig) -> None:
    """Raises UserError where two configs of the page do not share corpus and budget."""
    for section in SHARED:
        if getattr(one, section) != getattr(other, section):
            raise UserError(
                f'{section} of {other.name} is not that of {one.name}: all models of the page have one corpus and one budget'
            )
