"""A tokenizer.json for folders that have none: what those of all kinds have in common."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from weft.data.tokenizer import SPACE
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer
from weft.hub.tokenizers.side_files import AddedToken, Said
from weft.hub.tokenizers.special_tokens import missing, special_ids


def halves(pieces: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Every piece that is two other pieces one after another, with these two."""
    for piece in pieces:
        for at in range(1, len(piece)):
            if piece[:at] in pieces and piece[at:] in pieces:
                yield piece, piece[:at], piece[at:]


def ranked_merges(rank_of: Mapping[str, Any], key: Any) -> list[list[str]]:
    """Which two tokens make which, the first ones first: `key` ranks a token with its left half."""
    found = sorted((key(token, left), left, right) for token, left, right in halves(rank_of))
    return [[left, right] for _, left, right in found]


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {'type': 'Replace', 'pattern': pattern, 'content': content}


def split(pattern: str) -> dict[str, Any]:
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def byte_level(spaced: bool = False, regex: bool = True) -> dict[str, Any]:
    """Bytes as characters; `spaced` puts a space before a text, and GPT-2's pattern (`regex`) cuts it."""
    return {'type': 'ByteLevel', 'add_prefix_space': spaced, 'trim_offsets': True, 'use_regex': regex}


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {'type': 'Metaspace', 'replacement': SPACE, 'prepend_scheme': scheme, 'split': split}


def sequence(field: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {'type': 'Sequence', field: parts} if parts else None


def pieces_decoder(strips: bool, falls_back: bool) -> dict[str, Any]:
    """The decoder of sentencepiece's pieces; `strips` a space from the beginning, `falls_back` to bytes."""
    fallback = [{'type': 'ByteFallback'}] if falls_back else []
    strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if strips else []
    return {'type': 'Sequence', 'decoders': [replace({'String': SPACE}, ' '), *fallback, {'type': 'Fuse'}, *strip]}


def added_token(i: int, content: str, special: bool) -> AddedToken:
    """A token that is found as it is written, anywhere in a text."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': i, 'content': content, 'special': special} | flags


def placed(vocab: Mapping[str, int], added: Iterable[AddedToken], beyond: bool = True) -> dict[str, int]:
    """A vocabulary in which each added token has its id, whatever stood there; those after its end only if `beyond`."""
    found = dict(vocab)
    token_of = {i: token for token, i in found.items()}
    for token in added:
        name, i = token['content'], token['id']
        if name in found or not (beyond or i in token_of):
            continue
        if i in token_of:
            del found[token_of[i]]
        found[name], token_of[i] = i, name
    return found


def finished(
    fields: Mapping[str, Any],
    said: Said,
    defaults: Mapping[str, str],
    around: tuple[bool, bool] | None = None,
    opens: bool = False,
) -> JsonTokenizer:
    """The tokenizer of a description, with the tokens that other files add.

    Args:
        fields: of a tokenizer.json, but for the post-processor.
        defaults: names of special tokens by field, where no file names them.
        around: whether bos stands before a text and eos after it; None: as add_bos_token and add_eos_token say.
        opens: what add_bos_token is where no file has it.
    """
    vocab = fields['model']['vocab']
    ids = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    special = {token['content'] for _, token in said.names(defaults)}
    own = [token | {'special': token['special'] or token['content'] in special} for token in fields['added_tokens']]
    new = missing(said, [token['content'] for token in own], ids, defaults)
    tokens = sorted([*own, *new], key=lambda token: token['id'])
    if isinstance(vocab, dict):  # so that the library gives them these ids where the vocabulary has gaps
        vocab = vocab | {token['content']: token['id'] for token in tokens}
    find = {**ids, **{token['content']: token['id'] for token in tokens}}.get
    flag = said.tokenizer.get
    adds = around or (bool(flag('add_bos_token', opens)), bool(flag('add_eos_token', False)))
    names = {field: token['content'] for field, token in said.names(defaults)}
    sides = [names.get(field) if add else None for field, add in zip(('bos_token', 'eos_token'), adds, strict=True)]
    whole = {
        'version': '1.0', 'truncation': None, 'padding': None, **fields, 'added_tokens': tokens,
        'post_processor': template(*({name: find(name)} if name and find(name) is not None else {} for name in sides)) or None,
        'model': fields['model'] | {'vocab': vocab},
    }  # fmt: skip
    found = JsonTokenizer(json.dumps(whole, ensure_ascii=False).encode(), where=said.where)
    found.settle(special_ids(said, found.ids, defaults, found.around))
    return found


def template(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The post-processor that writes these tokens, whose ids stand beside them, before and after a text; {} for none."""
    if not before and not after:
        return {}
    special = lambda names: [{'SpecialToken': {'id': name, 'type_id': 0}} for name in names]
    text = lambda name: {'Sequence': {'id': name, 'type_id': 0}}
    return {
        'type': 'TemplateProcessing',
        'single': [*special(before), text('A'), *special(after)],
        'pair': [*special(before), text('A'), *special(after), *special(before), text('B'), *special(after)],
        'special_tokens': {name: {'id': name, 'ids': [i], 'tokens': [name]} for name, i in {**before, **after}.items()},
    }
