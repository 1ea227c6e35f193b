"""Tokenizers of published models, of every kind that is read; and any run's.

A folder's tokenizer.json is taken as it is; a model of sentencepiece, or vocab.json with merges.txt, is made into one; Marian
has its own. hub/tokenizers/ has a file for each. A run keeps the tokenizer.json (of Marian its three files) and
`tokenizer.special.json`, which says what the model's other files said of it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.data.tokenizer import Tokenizer, check_unicode
from weft.hub.tokenizers import marian
from weft.hub.tokenizers.byte_pairs import MERGES, VOCAB, byte_pair_tokenizer
from weft.hub.tokenizers.json_tokenizer import JSON, JsonTokenizer, published_json
from weft.hub.tokenizers.sentencepiece_model import sentencepiece_tokenizer
from weft.hub.tokenizers.side_files import one_line, said_of
from weft.hub.tokenizers.special_tokens import SPECIAL, PublishedTokenizer, read_special
from weft.runtime.errors import UserError
from weft.storage.buckets import Bucket

MODELS = ('tokenizer.model', 'spiece.model')
FILES = (JSON, 'tokenizer.model', marian.SOURCE, marian.TARGET, marian.VOCAB, SPECIAL)  # of a run
# Formats that are not read: their names, or what they begin with.
TEKKEN = 'tekken.json'
TIKTOKEN = re.compile(rb'[A-Za-z0-9+/]+=* \d+\r?\n')
WRITE_JSON = (
    'write a tokenizer.json with transformers’ AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or take it out '
    'of the folder to import the model without its tokenizer'
)


class SentencepieceTokenizer(PublishedTokenizer):
    """A published model of sentencepiece in runs that keep it as it was: sentencepiece runs it, and knows no added tokens."""

    def __init__(self, model: bytes, special: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.settle(special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos."""
        check_unicode(texts)
        return self._processor.encode(list(texts))


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether there is one among a run's files."""
    return any(name in files for name in (JSON, Tokenizer.name, marian.SOURCE))


def run_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer | None:
    """The tokenizer among a run's files; None for an imported model without one. UserError for a damaged one."""
    found = _run_tokenizer(files, where)
    if found is None:
        return None
    for i in (*found.prefix, *found.suffix):
        if i >= max(found.vocabulary, found.embedded):
            rule = f'the tokenizer has {found.vocabulary} tokens: import the run again'
            raise UserError(f'{where}/{SPECIAL}: id {i} stands before or after texts, and {rule}')
    return found


def _run_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer | None:
    special = read_special(files[SPECIAL], f'{where}/{SPECIAL}') if SPECIAL in files else None
    if special is None and (JSON in files or marian.SOURCE in files):
        raise UserError(f'{where}: lacks {SPECIAL}, which belongs to its tokenizer: import the run again')
    if JSON in files:
        return JsonTokenizer(files[JSON], special, f'{where}/{JSON}')
    if special is not None and marian.SOURCE in files:
        return marian.MarianTokenizer(files, special, where)
    if Tokenizer.name not in files:
        return None
    try:
        model = files[Tokenizer.name]
        return Tokenizer(model) if special is None else SentencepieceTokenizer(model, special)
    except (RuntimeError, UnicodeDecodeError) as error:  # what sentencepiece says to a file that is none of its own
        message = one_line(str(error))
        raise UserError(
            f'{where}/{Tokenizer.name}: not a readable sentencepiece model ({message}); a run writes one when it prepares '
            'its data'
        ) from None


def load_tokenizer(folder: Path | Bucket) -> Tokenizer | None:
    """The tokenizer in a run's folder."""
    try:
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror}') from None
    return run_tokenizer(files, str(folder))


def published_tokenizer(files: Mapping[str, bytes], where: str, embedded: int | None = None) -> Tokenizer | None:
    """The tokenizer among a published model's files; None if there is none.

    `embedded` is the number of ids that the model knows, where these may be fewer than the tokenizer's. Raises UserError for a
    tokenizer that cannot be read, and for formats that are not.
    """
    found = _published(files, where)
    if found is not None and embedded is not None and embedded < found.vocabulary:
        found.settle({**found.special, 'embedded': embedded})
    return found


def _published(files: Mapping[str, bytes], where: str) -> PublishedTokenizer | None:
    if JSON in files:
        return published_json(files[JSON], said_of(files, where))
    if marian.SOURCE in files or marian.TARGET in files:
        return marian.marian_tokenizer(files, said_of(files, where))
    for name in MODELS:
        if name in files:
            if TIKTOKEN.match(files[name]):
                raise UserError(f'{where}/{name}: is in tiktoken’s format, which is not read: {WRITE_JSON}')
            return sentencepiece_tokenizer(files[name], said_of(files, where), name)
    if VOCAB in files and MERGES in files:
        return byte_pair_tokenizer(files[VOCAB], files[MERGES], said_of(files, where))
    for name in files:
        if name == TEKKEN or name.endswith('.tiktoken') or name == 'tiktoken.model':
            kind = 'Mistral’s own' if name == TEKKEN else 'tiktoken’s'
            raise UserError(f'{where}/{name}: is in {kind} format, which is not read: {WRITE_JSON}')
    return None
