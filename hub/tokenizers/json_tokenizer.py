"""A tokenizer.json, which the tokenizers library runs."""

import base64
import binascii
import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.data.tokenizer import StreamDecoder, check_unicode
from weft.hub.tokenizers.decoders import decoder_of, steps_of
from weft.hub.tokenizers.hidden_names import without_names
from weft.hub.tokenizers.side_files import LARGEST_VOCABULARY, AddedToken, Said, one_line
from weft.hub.tokenizers.special_tokens import PublishedTokenizer, missing, special_ids
from weft.runtime.errors import UserError
from weft.storage.foreign import read_object, shown_value

JSON = 'tokenizer.json'
MOST_GROWTH = 64  # how many times as long as a text its normalizers and pre-tokenizers may make it
LIBRARY_ERRORS = ('PanicException', 'UnicodeDecodeError', 'TypeError')  # beside plain Exceptions
UNICODE = 18  # characters that Unicode's own normalization makes of one, which counts for none


class JsonTokenizer(PublishedTokenizer):
    """A published tokenizer: what special tokens are called in a text is those tokens."""

    name = JSON

    def __init__(self, model: bytes, special: Mapping[str, Any] | None = None, where: str = JSON) -> None:
        """`special` is what tokenizer.special.json keeps; where it is still to be found, `settle` takes it.

        `where` names the file in messages.
        """
        fields = read_object(model, where)
        self.model = model
        self._tokenizer = library(model, fields, where)
        self.ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = _vocabulary(self.ids, where)
        self._decoder = decoder_of(fields.get('decoder'), where)
        self.around = around(fields.get('post_processor'), where)
        self._read_pieces(fields.get('added_tokens') or (), where)
        self.settle({'bos': 0, 'eos': 0, 'prefix': [], 'ends': []} if special is None else special)

    def _read_pieces(self, tokens: Sequence[AddedToken], where: str) -> None:
        """The bytes that each id stands for, by the decoder; none for special tokens."""
        self.pieces = [b''] * self.vocabulary
        for token, i in self.ids.items():
            self.pieces[i] = self._decoder.bytes_of(token)
        self.added: dict[int, bytes] = {}
        for added in tokens:
            name, i = added['content'], added['id']
            # The library gives an added token that stands in its vocabulary the id that it has there.
            if self.ids.get(name) != i:
                raise UserError(
                    f'{where}: added token {shown_value(name)} has id {i} and is read as {self.ids.get(name)}: ids of added '
                    'tokens go on from the vocabulary, without a gap'
                )
            self.added[i] = name.encode()
            self.pieces[i] = b'' if added['special'] else self.added[i]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without what stands before and after it; names of added tokens in a text are those tokens."""
        check_unicode(texts)
        with told_by_library('the text cannot be encoded'):
            found = [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        for ids in found:
            self.check(ids)
        return found

    @contextlib.contextmanager
    def names_as_text(self) -> Iterator[None]:
        own = self._tokenizer
        if self._hidden is not None:
            self._tokenizer = self._hidden
        own.encode_special_tokens = True
        try:
            yield
        finally:
            own.encode_special_tokens = False
            self._tokenizer = own

    @functools.cached_property
    def _hidden(self) -> Any:
        """The library's tokenizer whose model finds no special token in a text; None where it needs no other."""
        fields = read_object(self.model, JSON)
        special = {name.decode() for i, name in self.added.items() if not self.pieces[i]}
        changed = without_names(fields, special)
        if changed is None:
            return None
        return library(json.dumps(changed, ensure_ascii=False).encode(), changed, JSON)

    @functools.cached_property
    def special_names(self) -> re.Pattern[str] | None:
        names = sorted((name.decode() for i, name in self.added.items() if not self.pieces[i]), key=len, reverse=True)
        return re.compile('|'.join(map(re.escape, names))) if names else None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each of `encode(text)`, which characters it stands for: [begin, end)."""
        check_unicode([text])
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    def id_of(self, piece: str) -> int | None:
        return self.ids.get(piece)

    def name_of(self, i: int) -> str:
        return self._tokenizer.id_to_token(i) or ''

    def stream(self, whole: bool = False, special: bool = False) -> StreamDecoder:
        first, spaces = (self._first, self._decoder.spaces) if whole else (None, 0)
        return StreamDecoder(self.pieces, self.added if special else {}, first, spaces)

    def _first(self, i: int) -> bytes:
        """The bytes of a token that begins a text."""
        if i in self.added or self._decoder.first_of is None:
            return self.pieces[i]
        return self._decoder.first_of(self.name_of(i))


def published_json(content: bytes, said: Said) -> JsonTokenizer:
    """The tokenizer of a published tokenizer.json and the files beside it."""
    where = f'{said.where}/{JSON}'
    found = JsonTokenizer(content, where=where)
    names = [name.decode() for name in found.added.values()]
    if new := missing(said, names, found.ids, {}):
        fields = read_object(content, where)
        added = sorted([*(fields.get('added_tokens') or ()), *new], key=lambda token: token['id'])
        found = JsonTokenizer(json.dumps(fields | {'added_tokens': added}, ensure_ascii=False).encode(), where=where)
    found.settle(special_ids(said, found.ids, {}, found.around))
    return found


def around(processor: Any, where: str) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text. Raises UserError where it does anything else to it."""
    kind = processor.get('type') if isinstance(processor, dict) else None
    if kind == 'Sequence':
        prefix: list[int] = []
        suffix: list[int] = []
        for one in processor.get('processors') or ():
            before, after = around(one, where)
            prefix, suffix = before + prefix, suffix + after
        return prefix, suffix
    if kind in ('BertProcessing', 'RobertaProcessing'):
        return [_id(processor['cls'][1], where)], [_id(processor['sep'][1], where)]
    if kind != 'TemplateProcessing':
        return [], []
    tokens = processor['special_tokens']
    parts: list[list[int]] = [[]]
    for piece in processor['single']:
        if 'Sequence' in piece:
            parts.append([])
        else:
            name = piece['SpecialToken']['id']
            if name not in tokens:
                raise UserError(
                    f'{where}: its post_processor writes {shown_value(name)}, which its special_tokens lack'
                )
            parts[-1] += [_id(i, where) for i in tokens[name]['ids']]
    if len(parts) != 2:
        raise UserError(f'{where}: its post_processor writes the text {len(parts) - 1} times: supported is once')
    return parts[0], parts[1]


def _id(i: Any, where: str) -> int:
    if not isinstance(i, int) or not 0 <= i < LARGEST_VOCABULARY:
        raise UserError(f'{where}: its post_processor adds id {shown_value(i)}: at most {LARGEST_VOCABULARY - 1} works')
    return i


def library(content: bytes, fields: Mapping[str, Any], where: str) -> Any:
    """The library's tokenizer of a tokenizer.json whose fields were read. Raises UserError for one that it cannot run."""
    import tokenizers  # it takes a while, and most runs have no use for it

    _check_growth(fields, where)
    _check_halves(fields.get('model'), where)
    with told_by_library(f'{where}: not readable by tokenizers {tokenizers.__version__}'):
        found = tokenizers.Tokenizer.from_str(content.decode())
    found.no_truncation()
    found.no_padding()
    return found


@contextlib.contextmanager
def told_by_library(what: str) -> Iterator[None]:
    """The library's errors as the user's: they have no type of their own, and its panics are not even Exceptions."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ not in LIBRARY_ERRORS:
            raise
        raise UserError(f'{what}: {one_line(str(error))}') from None


def _check_growth(fields: Mapping[str, Any], where: str) -> None:
    """Raises UserError where normalizers would make a text MOST_GROWTH times as long: few of them would fill any memory."""
    growth = 1.0
    steps = (steps_of(fields.get(kind), 'normalizers', 'pretokenizers') for kind in ('normalizer', 'pre_tokenizer'))
    for step in itertools.chain.from_iterable(steps):
        kind, pattern = step.get('type'), step.get('pattern')
        if kind == 'Replace' and isinstance(pattern, dict):
            new, old = len(str(step.get('content', ''))), len(str(pattern.get('String', '')))
            # What a regular expression finds may be empty, and then it stands between any two characters.
            growth *= max(1.0, new / old) if old else 1 + new
        elif kind == 'Prepend':
            growth *= 1 + len(str(step.get('prepend', '')))
        elif kind == 'ByteLevel':
            growth *= 4  # bytes of a character
        elif kind == 'Precompiled':
            growth *= max(1.0, _longest(step.get('precompiled_charsmap'), where) / UNICODE)
        if growth > MOST_GROWTH:
            raise UserError(
                f'{where}: its normalizers may make a text {growth:,.0f} times as long: at most {MOST_GROWTH} times is read'
            )


def _check_halves(model: Any, where: str) -> None:
    """Raises UserError for merges whose second half lacks the continuing_subword_prefix: the library takes it off unseen."""
    prefix = model.get('continuing_subword_prefix') if isinstance(model, dict) else None
    if not isinstance(prefix, str) or not prefix:
        return
    for merge in model.get('merges') or ():
        halves = merge.split(' ') if isinstance(merge, str) else merge if isinstance(merge, list) and merge else ['']
        if not str(halves[-1]).startswith(prefix):
            raise UserError(
                f'{where}: merge {shown_value(merge)} does not go on with continuing_subword_prefix {shown_value(prefix)}'
            )


def _longest(charsmap: Any, where: str) -> int:
    """Characters of the longest text that a precompiled_charsmap makes of another.

    Raises UserError for one that is none: its length, a trie of that many bytes, and texts of UTF-8 with a NUL after each.
    """
    texts = ['']
    try:
        content = base64.b64decode(charsmap or '', validate=True)
        size = int.from_bytes(content[:4], 'little')
        whole = not content or (len(content) >= 4 + size and size % 4 == 0)
        texts = content[4 + size :].decode().split('\0')
    except (TypeError, ValueError, binascii.Error):
        whole = False
    if not whole:
        raise UserError(
            f'{where}: precompiled_charsmap is not readable: it must be base64 of a trie and the texts it names'
        )
    return max(map(len, texts))


def _vocabulary(ids: Mapping[str, int], where: str) -> int:
    """One more than the largest id. Raises UserError where that is no size: a table of all ids is made."""
    if not ids:
        raise UserError(f'{where}: has no tokens')
    token = max(ids, key=ids.__getitem__)
    if ids[token] >= LARGEST_VOCABULARY:
        raise UserError(
            f'{where}: token {shown_value(token)} has id {ids[token]}: at most {LARGEST_VOCABULARY - 1} works'
        )
    return ids[token] + 1
