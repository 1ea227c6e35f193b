"""Models of sentencepiece (tokenizer.model, spiece.model) as a tokenizer.json, which knows added tokens too.

The file is a protocol buffer: sentencepiece_model.proto of its repository. Of its messages are read the pieces and what says
how text is normalised; each tokenizer class of transformers 5 then makes its own of them, as its files on the hub expect.
"""

import base64
import dataclasses
import enum
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from weft.data.tokenizer import SPACE
from weft.hub.tokenizers import built
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer
from weft.hub.tokenizers.side_files import LARGEST_VOCABULARY, LONGEST_PIECE, MOST_CHARACTERS, Said
from weft.runtime.errors import UserError
from weft.storage.foreign import shown_value

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


class Kind(enum.IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model of sentencepiece says."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    unk: int
    bos: int
    eos: int
    charsmap: bytes  # characters and what they are normalised to; none: text stays as it is
    adds_space: bool  # before a text
    removes_spaces: bool  # around a text, and all but one within
    escapes_spaces: bool  # as U+2581

    @property
    def ids(self) -> dict[str, int]:
        return {piece.text: i for i, piece in enumerate(self.pieces)}


def read_model(content: bytes, where: str) -> Model:
    """Reads a model. Raises UserError for a file that is none."""
    try:
        pieces: list[Piece] = []
        characters, seen = 0, set[str]()
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for field, value in _fields(content):
            if field == 1:
                pieces.append(_piece(value))
                text = pieces[-1].text
                if text in seen:
                    raise ValueError(f'piece {shown_value(text)} is there twice')
                seen.add(text)
                characters += len(text)
                if len(pieces) > LARGEST_VOCABULARY or characters > MOST_CHARACTERS:
                    rule = f'at most {LARGEST_VOCABULARY} and {MOST_CHARACTERS} are read'
                    raise ValueError(f'it has {len(pieces)} pieces of {characters} characters and more: {rule}')
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_fields(value))
    except UnicodeDecodeError:
        raise UserError(f'{where}: not a readable sentencepiece model: piece {len(pieces)} is not UTF-8') from None
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f'{where}: not a readable sentencepiece model: {error}') from None
    if not pieces:
        raise UserError(f'{where}: not a readable sentencepiece model: it has no pieces')
    if (kind := trainer.get(3, UNIGRAM)) not in (UNIGRAM, BPE):
        raise UserError(f'{where}: its model_type is {kind}: supported are 1 (unigram) and 2 (BPE)')
    return Model(
        pieces,
        model_type=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        **{name: _signed(trainer.get(field, i)) for name, field, i in (('unk', 40, 0), ('bos', 41, 1), ('eos', 42, 2))},
        charsmap=normalizer.get(2, b''),
        adds_space=bool(normalizer.get(3, 1)),
        removes_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


def _piece(content: bytes) -> Piece:
    """A piece of a model. Raises ValueError for one that no text can have, or that is as long as none is."""
    said = dict(_fields(content))
    score = struct.unpack('<f', said.get(2, b'\0\0\0\0'))[0]
    text = said.get(1, b'').decode()
    if not 0 < len(text) <= LONGEST_PIECE:
        raise ValueError(f'a piece of {len(text)} characters: from 1 to {LONGEST_PIECE} are read')
    return Piece(text, score, said.get(3, Kind.NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: varints as numbers, all else as bytes. Raises ValueError for what is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(content) and shift < 70:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError('a number in it has no end')

    while at < len(content):
        tag = varint()
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            yield field, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire, 0)
        if not size and wire != 2:
            raise ValueError(f'field {field} is of the unknown type {wire}')
        if at + size > len(content):
            raise ValueError(f'field {field} has {size} bytes and {len(content) - at} are left')
        yield field, content[at : at + size]
        at += size


def _signed(value: int) -> int:
    """An int32, whose negative numbers are written as those of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def sentencepiece_tokenizer(content: bytes, said: Said, name: str) -> JsonTokenizer:
    """The tokenizer of a model of sentencepiece and the files beside it."""
    model = read_model(content, f'{said.where}/{name}')
    kind = class_of(said)
    if kind == 'T5Tokenizer' and model.model_type == UNIGRAM:
        return _t5(model, said)
    if kind == 'GemmaTokenizer' and model.model_type == BPE:
        defaults = {**_names(unk='<unk>', bos='<bos>', eos='<eos>'), 'pad_token': '<pad>', 'mask_token': '<mask>'}
        return built.finished(_gemma(model, said), said, defaults)
    if kind == 'LlamaTokenizer' and model.model_type == BPE:
        return built.finished(_llama(model, said), said, _names(unk='<unk>', bos='<s>', eos='</s>'))
    told = {name: text for name in ('unk', 'bos', 'eos') if (text := _text(model, getattr(model, name))) is not None}
    return built.finished(_as_the_model_says(model, said), said, _names(**told), opens=said.kind is said.model is None)


# Models whose files on the hub name another tokenizer class than the one that reads them: what their file says holds.
AS_THE_MODEL_SAYS = ('mistral', 'mixtral', 'phi3', 'glm4_moe', 'olmo2')
CLASSES = {'t5': 'T5Tokenizer', 'mt5': 'T5Tokenizer'} | dict.fromkeys(
    ('gemma', 'gemma2', 'gemma3', 'gemma3_text'), 'GemmaTokenizer'
)


def class_of(said: Said) -> str | None:
    """The tokenizer class of a folder with a model of sentencepiece, as transformers chooses it."""
    return None if said.model in AS_THE_MODEL_SAYS else said.kind or CLASSES.get(said.model or '')


def _names(**names: str) -> dict[str, str]:
    return {f'{name}_token': token for name, token in names.items()}


def _llama(model: Model, said: Said) -> dict[str, Any]:
    """As LlamaTokenizer reads it: text is not normalised, and spaces are kept."""
    vocab = built.placed(model.ids, said.added)
    spaced = said.tokenizer.get('add_prefix_space') is not False
    scheme = ('always' if said.tokenizer.get('legacy') else 'first') if spaced else 'never'
    return {
        'added_tokens': _added(model, said),
        'normalizer': None,
        'pre_tokenizer': built.metaspace(scheme, split=False),
        'decoder': built.pieces_decoder(strips=spaced, falls_back=True),
        'model': _bpe(vocab, built.ranked_merges(vocab, lambda token, left: (vocab[token], len(left))), None, True),
    }


def _gemma(model: Model, said: Said) -> dict[str, Any]:
    """As GemmaTokenizer reads it: nothing is put before a text."""
    vocab = built.placed(model.ids, said.added)
    return {
        'added_tokens': _added(model, said),
        'normalizer': built.replace({'String': ' '}, SPACE),
        'pre_tokenizer': None,
        'decoder': built.pieces_decoder(strips=False, falls_back=True),
        'model': _bpe(vocab, built.ranked_merges(vocab, lambda token, left: (vocab[token], len(left))), '<unk>', True),
    }  # fmt: skip


def _t5(model: Model, said: Said) -> JsonTokenizer:
    """As T5Tokenizer reads it: words, however they are spaced, and sentinels `<extra_id_99>` … `<extra_id_0>` at the end."""
    extra = said.tokenizer.get('extra_ids', 100)
    if isinstance(extra, bool) or not isinstance(extra, int) or not 0 <= extra <= 10_000:
        raise said.error(f'extra_ids is {shown_value(extra)}: it must be a whole number from 0 to 10000')
    have = {piece.text for piece in model.pieces}
    sentinels = [name for i in reversed(range(extra)) if (name := f'<extra_id_{i}>') not in have]
    pieces = [*model.pieces, *(Piece(name, 0.0, Kind.CONTROL) for name in sentinels)]
    model = dataclasses.replace(model, pieces=pieces, byte_fallback=False)
    names = built.placed(model.ids, said.added, beyond=False)
    eos = {**_names(unk='<unk>', eos='</s>'), 'pad_token': '<pad>'}
    fields = {
        'added_tokens': _added(model, said),
        'normalizer': built.sequence('normalizers', _precompiled(model)),
        'pre_tokenizer': built.sequence(
            'pretokenizers', [{'type': 'WhitespaceSplit'}, built.metaspace('always', split=True)]
        ),
        'decoder': built.metaspace('always', split=True),
        'model': _unigram(model, names),
    }
    return built.finished(fields, said, eos, around=(False, True))


def _as_the_model_says(model: Model, said: Said) -> dict[str, Any]:
    bpe = model.model_type == BPE
    vocab = built.placed(model.ids, said.added, beyond=bpe)
    legacy = said.tokenizer.get('legacy', True) is not False
    normalizers = _precompiled(model)
    if model.removes_spaces:
        normalizers += [built.replace({'Regex': r'\A +| +\z'}, ''), built.replace({'Regex': ' {2,}'}, ' ')]
    if model.escapes_spaces:
        normalizers.append(built.replace({'String': ' '}, SPACE))
    before = []
    if model.adds_space:
        if legacy:  # Metaspace puts none before a text that begins with one, as sentencepiece does
            normalizers.append(built.replace({'Regex': rf'\A{SPACE}'}, SPACE * 2))
        before.append(built.metaspace('always' if legacy else 'first', split=False))
    own = [piece.text for piece in model.pieces if piece.kind == Kind.USER_DEFINED]
    if own:  # these are never joined with what is beside them
        before.append(built.split('|'.join(re.escape(text) for text in sorted(own, key=len, reverse=True))))
    if bpe:
        normal = {
            piece.text: piece.score for piece in model.pieces if piece.kind == Kind.NORMAL and piece.text in vocab
        }
        merges = built.ranked_merges(normal, lambda token, left: (-normal[token], vocab[token], left))
        kind = _bpe(vocab, merges, _text(model, model.unk), model.byte_fallback) | {'ignore_merges': bool(own)}
    else:
        kind = _unigram(model, vocab)
    added = [token for token in _added(model, said) if token['special']]
    return {
        'added_tokens': added,
        'normalizer': built.sequence('normalizers', normalizers),
        'pre_tokenizer': built.sequence('pretokenizers', before),
        'decoder': built.pieces_decoder(strips=model.adds_space, falls_back=model.byte_fallback),
        'model': kind,
    }


def _text(model: Model, i: int) -> str | None:
    return model.pieces[i].text if 0 <= i < len(model.pieces) else None


def _added(model: Model, said: Said) -> list[dict[str, Any]]:
    """The pieces that are whole in any text, control pieces and the user's own, but for those that another file describes."""
    told = {token['content'] for token in said.added} | {token['id'] for token in said.added}
    return [
        built.added_token(i, piece.text, piece.kind == Kind.CONTROL)
        for i, piece in enumerate(model.pieces)
        if piece.kind in (Kind.CONTROL, Kind.USER_DEFINED) and piece.text not in told and i not in told
    ]


def _bpe(vocab: Mapping[str, int], merges: list[list[str]], unk: str | None, falls_back: bool) -> dict[str, Any]:
    return {
        'type': 'BPE', 'unk_token': unk, 'fuse_unk': True, 'byte_fallback': falls_back, 'vocab': vocab, 'merges': merges,
    }  # fmt: skip


def _unigram(model: Model, names: Mapping[str, int]) -> dict[str, Any]:
    scores = [
        [token, piece.score] for token, piece in zip(sorted(names, key=names.__getitem__), model.pieces, strict=True)
    ]
    unk = model.unk if 0 <= model.unk < len(scores) else None
    return {'type': 'Unigram', 'unk_id': unk, 'vocab': scores, 'byte_fallback': model.byte_fallback}


def _precompiled(model: Model) -> list[dict[str, Any]]:
    said = base64.b64encode(model.charsmap).decode()
    return [{'type': 'Precompiled', 'precompiled_charsmap': said}] if said else []
