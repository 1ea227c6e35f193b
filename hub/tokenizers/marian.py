"""Marian's tokenizers: one model of sentencepiece for sources and one for targets, whose pieces vocab.json gives ids."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sentencepiece

from weft.data.tokenizer import SPACE, StreamDecoder, check_unicode
from weft.hub.tokenizers.side_files import LARGEST_VOCABULARY, Said, one_line, read_vocabulary
from weft.hub.tokenizers.special_tokens import SPECIAL, PublishedTokenizer, missing, special_ids
from weft.runtime.errors import UserError
from weft.storage.foreign import shown_value

SOURCE, TARGET, VOCAB = 'source.spm', 'target.spm', 'vocab.json'
DEFAULTS = {'unk_token': '<unk>', 'eos_token': '</s>', 'pad_token': '<pad>'}
LANGUAGE = re.compile('>>.*?<<', re.DOTALL)  # what a source may begin with: the language that it is to be translated to


class MarianTokenizer(PublishedTokenizer):
    """Encodes sources, or with `encode_targets` targets. `whole` texts have no space at their beginning or end."""

    def __init__(self, files: Mapping[str, bytes], special: Mapping[str, Any], where: str) -> None:
        self._own = {name: files[name] for name in (SOURCE, TARGET, VOCAB)}
        self.model = files[VOCAB]
        self._ids = _ids(files[VOCAB], f'{where}/{VOCAB}')
        added: Any = special.get('added')
        unk: Any = special.get('unk')
        silent: Any = special.get('silent')
        numbers = [unk, *(silent if isinstance(silent, list) else [None])]
        numbers += added.values() if isinstance(added, dict) and added else [None]
        if not all(type(i) is int and 0 <= i < LARGEST_VOCABULARY for i in numbers):
            raise UserError(f'{where}/{SPECIAL}: damaged: import the run again')
        self._added: dict[str, int] = added
        self._unk: int = unk
        self._source, self._target = (_processor(files[name], f'{where}/{name}') for name in (SOURCE, TARGET))
        self.vocabulary = max(*self._ids.values(), *self._added.values()) + 1
        self.names = {**{i: token for token, i in self._ids.items()}, **{i: name for name, i in self._added.items()}}
        self.pieces = [self.names.get(i, '').replace(SPACE, ' ').encode() for i in range(self.vocabulary)]
        for i in silent:
            self.pieces[i] = b''
        self._split = re.compile('|'.join(map(re.escape, sorted(self._added, key=len, reverse=True))))
        self.settle(special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each source, without eos; names of special tokens in a text are those tokens."""
        return self._encode(self._source, texts)

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(self._target, texts)

    @contextlib.contextmanager
    def names_as_text(self) -> Iterator[None]:
        own, self._split = self._split, re.compile('(?!)')
        try:
            yield
        finally:
            self._split = own

    @property
    def special_names(self) -> re.Pattern[str] | None:
        return self._split

    def _encode(self, processor: Any, texts: Sequence[str]) -> list[list[int]]:
        check_unicode(texts)
        parts_of = [list(self._parts_of(text)) for text in texts]
        plain = [part for parts in parts_of for part, whole in parts if not whole]
        encoded = iter(processor.encode(plain, out_type=str, num_threads=os.cpu_count() or 1))
        found = []
        for parts in parts_of:
            tokens = [token for part, whole in parts for token in ([part] if whole else next(encoded))]
            ids = [self._added[token] if token in self._added else self._ids.get(token, self._unk) for token in tokens]
            self.check(ids)
            found.append(ids)
        return found

    def _parts_of(self, text: str) -> Iterable[tuple[str, bool]]:
        """The parts of a text, and whether each is a token as it is: added ones, and a language where plain text begins."""
        begin = 0
        for match in [*self._split.finditer(text), None]:
            part = text[begin : match.start() if match else len(text)]
            if language := LANGUAGE.match(part):
                yield language[0], True
                part = part[language.end() :]
            if part:
                yield part, False
            if match:
                yield match[0], True
                begin = match.end()

    def id_of(self, piece: str) -> int | None:
        return self._added.get(piece, self._ids.get(piece))

    def name_of(self, i: int) -> str:
        return self.names.get(i, '')

    def stream(self, whole: bool = False, special: bool = False) -> StreamDecoder:
        names = {i: name.encode() for name, i in self._added.items()} if special else {}
        return Stripped(self.pieces, names) if whole else StreamDecoder(self.pieces, names)

    def files(self) -> dict[str, bytes]:
        return self._own | {SPECIAL: super().files()[SPECIAL]}


class Stripped(StreamDecoder):
    """Holds spaces back until other text comes, and those at the beginning for good."""

    held = ''
    begun = False

    def push(self, ids: Iterable[int]) -> str:
        text = self.held + super().push(ids)
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        self.held = text[len(text.rstrip()) :]
        return text.rstrip()

    def finish(self) -> str:
        return (self.held + rest).rstrip() if (rest := super().finish()) else ''


def marian_tokenizer(files: Mapping[str, bytes], said: Said) -> MarianTokenizer:
    """The tokenizer of a published folder. Raises UserError where a part of it is missing or cannot be used."""
    for name in (SOURCE, TARGET, VOCAB):
        if name not in files:
            raise said.error(f'has {SOURCE if SOURCE in files else TARGET} and lacks {name}, its other part')
    if said.tokenizer.get('separate_vocabs'):
        raise said.error('separate_vocabs is true: only one vocabulary for both languages is supported')
    ids = _ids(files[VOCAB], f'{said.where}/{VOCAB}')
    new = missing(said, (), ids, DEFAULTS)
    added = {token['content']: token['id'] for token in new}
    unk = dict(said.names(DEFAULTS))['unk_token']['content']
    if ids.get(unk) is None:
        raise UserError(f'{said.where}/{VOCAB}: lacks {shown_value(unk)}, which stands for what it does not know')
    special = special_ids(said, {**ids, **added}, DEFAULTS, ([], []))
    special |= {
        'suffix': [special['eos']],
        'unk': ids[unk],
        'added': added,
        'silent': sorted(token['id'] for token in new if token['special']),
    }
    return MarianTokenizer(files, special, said.where)


def _ids(content: bytes, where: str) -> dict[str, int]:
    ids = read_vocabulary(content, where)
    if not ids:
        raise UserError(f'{where}: has no tokens')
    return ids


def _processor(model: bytes, where: str) -> Any:
    try:
        if not model:
            raise RuntimeError('it is empty')
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where its message holds the file's bytes
        raise UserError(f'{where}: not a readable sentencepiece model: {one_line(str(error))}') from None
