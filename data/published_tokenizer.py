"""Tokenizers of published models: a tokenizer.json, or a sentencepiece model with its own normalisation; and any run's.

A run keeps such a tokenizer as its file and `tokenizer.special.json`, which says what the model's other files said of it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.tokenizer import SPACE, Tokenizer, check_unicode
from sharding.buckets import Bucket
from sharding.errors import UserError

SPECIAL = 'tokenizer.special.json'
JSON, MODELS = 'tokenizer.json', ('tokenizer.model', 'spiece.model')
LARGEST_VOCABULARY = 2**22  # of the tokenizers that are read: a mistake rather than a model
FILES = (JSON, 'tokenizer.model', SPECIAL)  # of a run


class SentencepieceTokenizer(Tokenizer):
    """Encodes as sentencepiece does by itself: with the normalisation and the leading space that the model asks for."""

    lossless = False

    def __init__(self, model: bytes, special: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.special = _set(self, special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos."""
        check_unicode(texts)
        return self._processor.encode(list(texts))

    def files(self) -> dict[str, bytes]:
        return super().files() | {SPECIAL: self.special}


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, which the tokenizers library runs."""

    name = JSON
    lossless = False

    def __init__(self, model: bytes, special: Mapping[str, Any]) -> None:
        self.model = model
        self._tokenizer = _library(model)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = _vocabulary(ids)
        self.pieces = _pieces(model, ids, self.vocabulary)
        self.special = _set(self, special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without what stands before and after it; names of special tokens in a text are those tokens."""
        check_unicode(texts)
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each of `encode(text)`, which characters it stands for: [begin, end)."""
        check_unicode([text])
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    def files(self) -> dict[str, bytes]:
        return super().files() | {SPECIAL: self.special}


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether there is one among a run's files."""
    return JSON in files or Tokenizer.name in files


def run_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer | None:
    """The tokenizer among a run's files; None for an imported model without one."""
    special = json.loads(files[SPECIAL]) if SPECIAL in files else None
    try:
        if JSON in files:
            return JsonTokenizer(files[JSON], special or {})
        if Tokenizer.name in files:
            model = files[Tokenizer.name]
            return Tokenizer(model) if special is None else SentencepieceTokenizer(model, special)
    except RuntimeError as error:  # what sentencepiece says to a file that is none of its own
        message = ' '.join(str(error).split())
        raise UserError(
            f'{where}/{Tokenizer.name}: not a readable sentencepiece model ({message}); a run writes one when it prepares '
            'its data'
        ) from None
    return None


def load_tokenizer(folder: Path | Bucket) -> Tokenizer | None:
    """The tokenizer in a run's folder."""
    return run_tokenizer(
        {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, str(folder)
    )


def published_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer | None:
    """The tokenizer among a published model's files; None if there is none."""
    say = _said(files, where)
    if JSON in files:
        return JsonTokenizer(files[JSON], _special_of_json(files[JSON], say, where))
    for name in MODELS:
        if name in files:
            try:
                plain = Tokenizer(files[name])
            except RuntimeError as error:
                raise UserError(
                    f'{where}/{name}: not a readable sentencepiece model: {" ".join(str(error).split())}'
                ) from None
            bos = plain.bos if plain.bos >= 0 else None
            eos = plain.eos if plain.eos >= 0 else None
            prefix = [bos] if bos is not None and say.get('add_bos_token', True) else []
            return SentencepieceTokenizer(files[name], _special(say, plain.id_of, prefix, bos, eos, f'{where}/{name}'))
    return None


def _library(model: bytes) -> Any:
    import tokenizers  # it takes a while, and most runs have no use for it

    try:
        found = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # its own kind has no name
        raise UserError(
            f'{JSON}: not readable by tokenizers {tokenizers.__version__}: {" ".join(str(error).split())}'
        ) from None
    found.no_truncation()
    found.no_padding()
    return found


def _said(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """What the files beside the tokenizer say of it: the fields that matter, the more special file's word first."""
    said: dict[str, Any] = {}
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'config.json'):
        if name in files:
            try:
                found = json.loads(files[name])
            except ValueError as error:
                raise UserError(f'{where}/{name}: not readable as JSON: {error}') from None
            for field, value in found.items():
                if value is not None:
                    said.setdefault(field, value)
                if field == 'eos_token_id':
                    said.setdefault('ends', []).extend(
                        value if isinstance(value, list) else [] if value is None else [value]
                    )
    return said


def _special_of_json(model: bytes, say: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The special ids of a tokenizer.json."""
    tokenizer = _library(model)
    bare = tokenizer.encode('a', add_special_tokens=False).ids
    full = tokenizer.encode('a', add_special_tokens=True).ids
    first = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    prefix = full[:first]
    after = full[first + len(bare) :]
    special = _special(
        say, tokenizer.token_to_id, prefix, prefix[0] if prefix else None, after[0] if after else None, where
    )
    wanted = say.get('add_bos_token')
    if wanted is not None and (say.get('bos_token') is not None):
        special['prefix'] = [special['bos']] if wanted else [i for i in prefix if i != special['bos']]
    return special


def _special(
    say: Mapping[str, Any],
    find: Callable[[str], int | None],
    prefix: list[int],
    bos: int | None,
    eos: int | None,
    where: str,
) -> dict[str, Any]:
    """The ids that open and end texts: as named in the files beside the tokenizer, or as it has them itself."""

    def named(*fields: str) -> int | None:
        for field in fields:
            token = say.get(field)
            token = token.get('content') if isinstance(token, dict) else token
            if isinstance(token, str) and (found := find(token)) is not None:
                return found
        return None

    one = lambda value: value[0] if isinstance(value, list) and value else value
    bos = next((i for i in (named('bos_token', 'cls_token'), bos, one(say.get('bos_token_id'))) if i is not None), None)
    eos = next((i for i in (named('eos_token', 'sep_token'), eos, one(say.get('eos_token_id'))) if i is not None), None)
    if bos is None and eos is None:
        raise UserError(
            f'{where}: its tokenizer has no token that opens or ends a text: tokenizer_config.json must name a bos_token or an '
            'eos_token; or import it without its tokenizer'
        )
    eos = bos if eos is None else eos
    bos = eos if bos is None else bos
    for field, found in (('bos_token_id', [bos]), ('eos_token_id', [eos, *say.get('ends', [])])):
        for i in found:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < LARGEST_VOCABULARY:
                raise UserError(
                    f'{where}: {field} is {i!r}: it must be a whole number from 0 to {LARGEST_VOCABULARY - 1}'
                )
    return {'bos': bos, 'eos': eos, 'prefix': prefix, 'ends': sorted({eos, *say.get('ends', [])})}


def _set(tokenizer: Tokenizer, special: Mapping[str, Any]) -> bytes:
    """Takes over the special ids; their file. Raises UserError where the tokenizer has no such id."""
    for name in ('bos', 'eos'):
        if special[name] >= tokenizer.vocabulary:
            raise UserError(
                f'{name}_token_id is {special[name]} and the tokenizer has {tokenizer.vocabulary} pieces: the largest that '
                f'works is {tokenizer.vocabulary - 1}'
            )
    tokenizer.bos, tokenizer.eos = special['bos'], special['eos']
    tokenizer.prefix, tokenizer.ends = tuple(special['prefix']), frozenset(special['ends'])
    return json.dumps(special).encode() + b'\n'


def _vocabulary(ids: Mapping[str, int]) -> int:
    """One more than the largest id. Raises UserError where that is no size: a table of all ids is made."""
    if not ids:
        raise UserError(f'{JSON}: has no tokens')
    token = max(ids, key=ids.__getitem__)
    if ids[token] >= LARGEST_VOCABULARY:
        raise UserError(f'{JSON}: token {token!r} has id {ids[token]}: at most {LARGEST_VOCABULARY - 1} works')
    return ids[token] + 1


def _pieces(model: bytes, ids: Mapping[str, int], vocabulary: int) -> list[bytes]:
    """The bytes that each id of a tokenizer.json stands for, by its decoder; none for special tokens."""
    said = json.loads(model)
    decoders = list(_flat(said.get('decoder')))
    kinds = {decoder['type'] for decoder in decoders}
    pieces = [b''] * vocabulary
    to_bytes = _by_decoder(decoders, kinds)
    for token, i in ids.items():
        pieces[i] = to_bytes(token)
    for added in said.get('added_tokens', []):
        # The library gives an added token that stands in its vocabulary the id that it has there.
        if ids.get(added['content']) != added['id']:
            raise UserError(
                f'{JSON}: added token {added["content"]!r} has id {added["id"]} and is read as '
                f'{ids.get(added["content"])}: ids of added tokens go on from the vocabulary, without a gap'
            )
        pieces[added['id']] = b'' if added['special'] else added['content'].encode()
    return pieces


def _flat(decoder: Any) -> Iterable[dict[str, Any]]:
    if decoder and decoder['type'] == 'Sequence':
        for inner in decoder['decoders']:
            yield from _flat(inner)
    elif decoder:
        yield decoder


def _by_decoder(decoders: list[dict[str, Any]], kinds: set[str]) -> Callable[[str], bytes]:
    """From a token to its bytes."""
    if 'ByteLevel' in kinds:
        table = {character: byte for byte, character in enumerate(_byte_characters())}
        return lambda token: b''.join(
            bytes([table[character]]) if character in table else character.encode() for character in token
        )
    if 'WordPiece' in kinds:
        mark = next(decoder['prefix'] for decoder in decoders if decoder['type'] == 'WordPiece')
        return lambda token: (token.removeprefix(mark) if token.startswith(mark) else f' {token}').encode()
    if 'BPEDecoder' in kinds:
        end = next(decoder['suffix'] for decoder in decoders if decoder['type'] == 'BPEDecoder')
        return lambda token: (token.removesuffix(end) + ' ' if token.endswith(end) else token).encode()
    spaces = [decoder['replacement'] for decoder in decoders if decoder['type'] == 'Metaspace']
    spaces += [d['pattern'].get('String') for d in decoders if d['type'] == 'Replace' and d.get('content') == ' ']
    if not spaces:
        raise UserError(
            f'{JSON}: its decoder has {", ".join(sorted(kinds)) or "nothing"}; supported: ByteLevel, Metaspace, Replace of '
            f'{SPACE} with a space, ByteFallback, WordPiece, BPEDecoder'
        )
    falls_back = 'ByteFallback' in kinds

    def plain(token: str) -> bytes:
        if falls_back and len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
            return bytes([int(token[3:5], 16)])
        return token.replace(spaces[0], ' ').encode()

    return plain


def _byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary (its published encoder.py)."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
