"""The JSON files beside a published tokenizer, read within bounds, and what they say of it."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from weft.runtime.errors import UserError, shown
from weft.storage.foreign import read_object, shown_value

CONFIG, MAP, ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'
GENERATION, MODEL = 'generation_config.json', 'config.json'
MOST_SAID = 2**20  # values of a file beside a tokenizer, several of which are held at a time
LARGEST_VOCABULARY = 2**22  # ids of the tokenizers that are read: a mistake rather than a model
LONGEST_PIECE = 256  # characters of one whose merges are derived; 31 in Gemma's
MOST_CHARACTERS = 2**23  # of all of these; Gemma's 262,144 have 1.5 million
FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
# The fields that name a special token, in the order in which transformers adds those that no other file has.
NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
MORE = ('extra_special_tokens', 'additional_special_tokens')

AddedToken = dict[str, Any]  # as tokenizer.json has it: content, FLAGS, and the id


@dataclasses.dataclass(frozen=True)
class Said:
    """What the files beside a tokenizer say of it."""

    where: str  # the folder, for messages
    tokenizer: Mapping[str, Any]  # tokenizer_config.json, and of special_tokens_map.json what holds
    ids: Mapping[str, Any]  # bos_token_id and eos_token_id: generation_config.json's word before config.json's
    ends: tuple[Any, ...]  # every id that a file says ends a text
    added: tuple[AddedToken, ...]  # tokens with ids of their own, by id
    kind: str | None  # the tokenizer's class, without 'Fast'
    model: str | None  # model_type of config.json

    def error(self, message: str) -> UserError:
        return UserError(f'{self.where}: {message}')

    def names(self, defaults: Mapping[str, str]) -> Iterator[tuple[str, AddedToken]]:
        """The fields that name a special token, and the token: those of NAMED in their order, then whatever others there are.

        `defaults` are a class's names by field, for fields that no file has. Raises UserError where bos or eos is no name.
        """
        fields = {**defaults, **self.tokenizer}
        others = [field for field in fields if field.endswith('_token') and not field.startswith('add_')]
        for field in [*NAMED, *(field for field in others if field not in NAMED)]:
            value = fields.get(field)
            if token := named(value):
                yield field, token
            elif value is not None and field in ('bos_token', 'eos_token'):
                rule = 'it must be the name of a token, such as "</s>"'
                raise self.error(f'{field} is {shown_value(value)}: {rule}')
        for field in MORE:
            for token in all_named(fields.get(field)):
                yield field, token


def said_of(files: Mapping[str, bytes], where: str) -> Said:
    """What the files beside a tokenizer say. Raises UserError for one that cannot be read, or says something impossible."""
    read = {
        name: read_object(files[name], f'{where}/{name}', MOST_SAID)
        for name in (CONFIG, MAP, ADDED, GENERATION, MODEL)
        if name in files
    }
    config, generation, model = (read.get(name, {}) for name in (CONFIG, GENERATION, MODEL))
    # special_tokens_map.json is of the time before added_tokens_decoder: where that stands, it only fills gaps.
    first, second = (config, read.get(MAP, {})) if 'added_tokens_decoder' in config else (read.get(MAP, {}), config)
    tokenizer = {**first, **second, **{field: value for field, value in first.items() if value is not None}}
    kind = next((one for one in (config.get('tokenizer_class'), model.get('tokenizer_class')) if one is not None), None)
    type_ = model.get('model_type')
    ids: dict[str, Any] = {}
    ends: list[Any] = []
    for fields in (config, read.get(MAP, {}), generation, model):
        for field in ('bos_token_id', 'eos_token_id'):
            if fields.get(field) is not None:
                ids.setdefault(field, fields[field])
        end = fields.get('eos_token_id')
        ends += end if isinstance(end, list) else [] if end is None else [end]
    return Said(
        where=where,
        tokenizer=tokenizer,
        ids=ids,
        ends=tuple(ends),
        added=tuple(_added(config, read.get(ADDED), tokenizer, where)),
        kind=kind.removesuffix('Fast') if isinstance(kind, str) else None,
        model=type_ if isinstance(type_, str) else None,
    )


def named(value: Any) -> AddedToken | None:
    """A special token by its name or by its description; None where that is neither."""
    fields = value if isinstance(value, dict) else {'content': value}
    content = fields.get('content')
    if not isinstance(content, str) or not content:
        return None
    return _token(content, fields, special=True)


def _token(content: str, fields: Mapping[str, Any], special: bool) -> AddedToken:
    """An added token whose flags are those of `fields`; what is special is not normalized unless told otherwise."""
    flags = {flag: fields.get(flag) is True for flag in FLAGS} | {'special': special}
    return {'content': content} | flags | {'normalized': bool(fields.get('normalized', not special))}


def _added(
    config: Mapping[str, Any], old: Mapping[str, Any] | None, tokenizer: Mapping[str, Any], where: str
) -> list[AddedToken]:
    """The tokens that tokenizer_config.json adds, or where it adds none those of added_tokens.json, by id."""
    found: dict[int, AddedToken] = {}
    decoder = config.get('added_tokens_decoder')
    if isinstance(decoder, dict):
        for key, value in decoder.items():
            place = f'{where}/{CONFIG}: added_tokens_decoder'
            if not isinstance(value, dict) or not isinstance(value.get('content'), str):
                raise UserError(
                    f'{place}: {shown(key, 60)} is {shown_value(value)}: it must be an object with "content", the token’s text'
                )
            i = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
            content = value['content']
            check_id(i, f'{place}: token {shown_value(content)} has id')
            found[i] = _token(content, value, value.get('special') is True)
    elif decoder is not None:
        raise UserError(
            f'{where}/{CONFIG}: added_tokens_decoder is {shown_value(decoder)}: it must be an object of tokens by id'
        )
    elif old:
        special = {token['content'] for field in (*NAMED, *MORE) for token in all_named(tokenizer.get(field))}
        for content, i in old.items():
            check_id(i, f'{where}/{ADDED}: token {shown_value(content)} has id')
            found[i] = _token(content, {}, content in special)
    return [{'id': i} | found[i] for i in sorted(found)]


def all_named(value: Any) -> list[AddedToken]:
    """The special tokens of a field that holds one of them, a list, or an object of them by what they are for."""
    several = isinstance(value, dict) and 'content' not in value
    values = value.values() if several else value if isinstance(value, list) else [value]
    return [token for one in values if (token := named(one))]


def check_id(i: Any, what: str) -> int:
    """An id of a token. Raises UserError, which begins with `what`, for anything else."""
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < LARGEST_VOCABULARY:
        raise UserError(f'{what} {shown_value(i)}: it must be a whole number from 0 to {LARGEST_VOCABULARY - 1}')
    return i


def read_vocabulary(content: bytes, where: str) -> dict[str, int]:
    """Ids by token, of a vocab.json. Raises UserError for a file that holds something else."""
    ids = read_object(content, where)
    for token, i in ids.items():
        check_id(i, f'{where}: token {shown_value(token)} has id')
    return ids


def text_of(content: bytes, where: str) -> str:
    """A file's text. Raises UserError for what is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: not UTF-8 at byte {error.start}') from None


def json_file(fields: Mapping[str, Any]) -> bytes:
    """A file of JSON as publishers write it."""
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b'\n'


def one_line(text: str) -> str:
    """What a library says of a file, on one line and without what a terminal would obey."""
    text = ' '.join(text[:1000].split())
    return ''.join(character if character.isprintable() else '?' for character in text)[:300]
