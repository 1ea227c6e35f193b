"""The two texts that compressed models are measured on: the run's own held-out one, and documentation of another project.

The first is what the run learnt: Python source of packages that it has not seen. The second is of another kind, English with
formulas and examples, and lies on every machine that the project runs on: the docstrings of optax, whose version is pinned.
What of the standard library is prose would not do, for runs learn from all of it.

Letters: R rows, T their columns.
"""

import ast
import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optax

from weft.compress.cloze import Cloze, cloze_items
from weft.data.config import DataConfig
from weft.data.packing import Samples, pack_documents
from weft.data.prepare import load
from weft.data.sources import documents
from weft.data.split import held_out
from weft.data.tokenizer import Tokenizer
from weft.hub.published_tokenizer import load_tokenizer
from weft.inference.run import TrainedRun
from weft.model.batch import Batch
from weft.runtime.errors import UserError
from weft.storage.local_copy import LocalCopy
from weft.training.evaluation import spread

TOKENS = 16_384  # of a text that are measured unless more are asked for
COLUMNS = 256  # of rows of a run that has no rows of its own
LEAST = 400  # characters of a docstring: shorter ones say little that can be predicted
SHARE = 0.02  # of the standard library that is held out where a run does not say: as configs/compression/ has it
DOCUMENTATION = (
    '7a08ddf050b73dcc5504603bc30683decda09ce8b08dec009c1a4c53eec2693c'  # SHA-256 of `documentation()`, optax 0.2.8
)
HELD_OUT, DOCS = 'held-out', 'documentation'  # the texts' names


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of text as tokens of one tokenizer, on the host, and the cloze items in them."""

    name: str
    source: str  # where it comes from
    tokenizer_sha256: str  # of what made tokens of it
    rows: Batch  # int32 [R, T] each
    cloze: Cloze

    @property
    def sha256(self) -> str:
        """Of the tokens that are predicted and of what is read before them: of two equal texts the same."""
        found = hashlib.sha256(str(self.rows.target_BT.shape).encode())
        for array in (self.rows.tokens_BT, self.rows.target_BT, self.rows.position_BT, self.rows.segment_BT):
            found.update(np.ascontiguousarray(array, '<i4').tobytes())
        return found.hexdigest()

    @property
    def tokens(self) -> int:
        """That are predicted."""
        return int((self.rows.segment_BT > 0).sum())


def study_texts(run: TrainedRun, tokens: int = TOKENS) -> tuple[Text, Text]:
    """The run's held-out text and the documentation, about `tokens` of each, with the run's tokenizer.

    Rows are taken evenly over the whole text. The held-out text is the run's validation split where the run has one; else, of
    a run that learns from the standard library and of an imported model, packages of this Python's standard library, those
    that a run like the study's holds out. Raises UserError for an encoder–decoder, for a run without a tokenizer, for one
    whose text is the user's and not in its folder, and for fewer tokens than two rows have.
    """
    if run.config.model.encoder:
        raise UserError('model.encoder is given: the texts of the study are for models without one')
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise UserError(f'{run.folder} was imported without a tokenizer: it can read no text')
    samples, source = held_out_rows(run, tokenizer)
    T = samples.sequence_length
    if tokens < 2 * T:
        raise UserError(f'tokens is {tokens}: an interval needs two rows, of {T} here; nearest that works: {2 * T}')
    texts = documentation()
    known = '' if digest_of(texts) == DOCUMENTATION else ', not the text that the study is of'
    said = f'docstrings of optax {optax.__version__}{known}'
    return (
        sampled_text(HELD_OUT, source, samples, tokenizer, tokens),
        sampled_text(DOCS, said, pack_documents(tokenizer, texts, T), tokenizer, tokens),
    )


def sampled_text(name: str, source: str, samples: Samples, tokenizer: Tokenizer, tokens: int) -> Text:
    """About so many tokens of packed text, its rows taken evenly, and the cloze items in them."""
    rows = samples.take(spread(tokens // samples.sequence_length, len(samples)))
    return Text(name, source, tokenizer.sha256, rows, cloze_items(rows, tokenizer))


def held_out_rows(run: TrainedRun, tokenizer: Tokenizer) -> tuple[Samples, str]:
    """Rows of text that a run has not learnt from, and what they are."""
    if (run.folder / 'data').exists():
        with contextlib.closing(LocalCopy(run.folder)) as local_copy:
            local_copy.fetch()
            dataset = load(local_copy.local, lambda line: None, load_tokenizer)
        return dataset.validation, f'validation split of {run.folder.name}'
    data = run.config.data
    if data.source not in (None, 'stdlib'):
        raise UserError(
            f'{run.folder}: its text, data.source={data.source!r}, is not in its folder: open the run that it was made of'
        )
    share = SHARE if (run.folder / 'source.json').exists() else data.validation_share
    rows = pack_documents(tokenizer, held_out_source(share), min(COLUMNS, run.context))
    return rows, f'packages of the standard library that data.validation_share={share:g} holds out'


def held_out_source(share: float) -> list[str]:
    """The text of each module of those packages of the standard library that a run holds out, as data/prepare.py has it."""
    size_of_group: Counter[str] = Counter()
    group_of: dict[str, str] = {}  # copies of a text are on the side of the first
    texts = list(documents(DataConfig(source='stdlib'), []))
    for document in texts:
        size_of_group[group_of.setdefault(document.text, document.group)] += len(document.text.encode())
    held = held_out(size_of_group, share)
    return [document.text for document in texts if group_of[document.text] in held]


def documentation() -> list[str]:
    """The docstrings of optax that have at least `LEAST` characters, each once, file by file in the order of their names."""
    root = Path(optax.__file__).parent
    found: dict[str, None] = {}
    for path in sorted(root.rglob('*.py'), key=lambda path: path.relative_to(root).as_posix()):
        if path.name.endswith('_test.py'):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LEAST:
                    found[text] = None
    return list(found)


def digest_of(texts: Sequence[str]) -> str:
    """The SHA-256 of texts one after another, a zero byte after each."""
    return hashlib.sha256(b''.join(text.encode() + b'\0' for text in texts)).hexdigest()
