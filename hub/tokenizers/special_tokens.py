"""Which tokens a published tokenizer has beside its vocabulary, and which of them open and end texts."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weft.data.tokenizer import Tokenizer
from weft.hub.tokenizers.side_files import LARGEST_VOCABULARY, AddedToken, Said, check_id
from weft.runtime.errors import UserError, nearest
from weft.storage.foreign import lone_surrogate, read_object, shown_value

SPECIAL = 'tokenizer.special.json'  # in a run, beside the tokenizer
ENDS = ('</s>', '<|endoftext|>', '<eos>', '<|end_of_text|>')  # what an end is called where no file names one


class PublishedTokenizer(Tokenizer):
    """A tokenizer of a published model, whose special ids other files say."""

    lossless = False
    special: Mapping[str, Any]  # as tokenizer.special.json keeps it

    def settle(self, special: Mapping[str, Any]) -> None:
        """Takes over the ids that open and end texts. Raises UserError where the tokenizer has no such id."""
        for name in ('bos', 'eos'):
            if special[name] >= self.vocabulary:
                raise UserError(
                    f'{name}_token_id is {special[name]} and the tokenizer has {self.vocabulary} pieces: the largest that '
                    f'works is {self.vocabulary - 1}'
                )
        for i in (*special['prefix'], *special.get('suffix', ())):
            if i >= self.vocabulary:
                raise UserError(
                    f'{SPECIAL}: id {i} stands around texts, and the tokenizer has {self.vocabulary} pieces'
                )
        self.special = dict(special)
        self.bos, self.eos = special['bos'], special['eos']
        self.prefix, self.suffix = tuple(special['prefix']), tuple(special.get('suffix', ()))
        self.ends = frozenset(special['ends'])
        self.embedded = special.get('embedded', self.vocabulary)

    def encode_long(self, text: str) -> Iterator[Sequence[int]]:
        yield self.encode(text)  # where such a tokenizer could be cut, no file says

    def files(self) -> dict[str, bytes]:
        return super().files() | {SPECIAL: json.dumps(self.special).encode() + b'\n'}


def missing(said: Said, has: Iterable[str], ids: Mapping[str, int], defaults: Mapping[str, str]) -> list[AddedToken]:
    """The added tokens that files beside a tokenizer have and its own file lacks, with the ids that transformers gives them.

    Args:
        has: the added tokens of its own file.
        ids: of its vocabulary, by token.
        defaults: a class's names of special tokens by field, for fields that no file has.

    A special token that no file gives an id gets the next one, but for bos and eos, which `special_ids` finds otherwise: a
    model that does not know them can neither begin nor end with them. Raises UserError for an added token whose id is taken
    or leaves a gap.
    """
    known = set(has)
    following = max(ids.values(), default=-1) + 1
    found: list[AddedToken] = []
    for field, token in [('', token) for token in said.added] + list(said.names(defaults)):
        name = token['content']
        if name in known:
            continue
        if lone_surrogate(name) is not None:
            raise said.error(f'token {shown_value(name)}: a lone surrogate is not Unicode text; leave it out')
        here = ids.get(name)
        if here is None and field in ('bos_token', 'eos_token'):
            continue
        i = following if here is None else here
        if token.get('id', i) != i:
            rule = 'ids of added tokens go on from the vocabulary, without a gap'
            raise said.error(f'added token {shown_value(name)} has id {token["id"]} and would get {i}: {rule}')
        known.add(name)
        found.append(token | {'id': i})
        following = max(following, i + 1)
    return found


def special_ids(
    said: Said, ids: Mapping[str, int], defaults: Mapping[str, str], around: tuple[Sequence[int], Sequence[int]]
) -> dict[str, Any]:
    """The ids that open and end texts, as tokenizer.special.json keeps them.

    Args:
        ids: of all tokens, the added ones among them.
        defaults: a class's names of special tokens by field.
        around: what the tokenizer puts before and after a text.

    Raises UserError where no token ends a text, and for ids that are none.
    """
    token_of = dict(said.names({}))
    prefix, suffix = around

    def named(*fields: str) -> int | None:
        found = (ids.get(token_of[field]['content']) for field in fields if field in token_of)
        return next((i for i in found if i is not None), None)

    usual = lambda field: ids.get(defaults[field]) if field in defaults else None
    bos = _first(named('bos_token', 'cls_token'), *prefix[:1], said.ids.get('bos_token_id'), usual('bos_token'))
    eos = named('eos_token')
    if eos is None and 'eos_token' in token_of:
        eos = _first(said.ids.get('eos_token_id'), named('sep_token'), *suffix[:1])
        if eos is None:
            name = token_of['eos_token']['content']
            raise said.error(
                f'eos_token is {shown_value(name)}, which is no token of its tokenizer, and no file has an '
                f'eos_token_id{near(name, ids)}'
            )
    elif eos is None:
        eos = _first(named('sep_token'), *suffix[:1], said.ids.get('eos_token_id'), usual('eos_token'))
    if eos is None and bos is not None:
        eos = _first(*map(ids.get, ENDS))
    if eos is None:
        what = 'opens or ends' if bos is None else 'ends'
        raise said.error(
            f'its tokenizer has no token that {what} a text: tokenizer_config.json must name a bos_token or an '
            'eos_token; or import it without its tokenizer'
        )
    bos = eos if bos is None else bos
    ends = [eos, *said.ends]
    for field, i in [('bos_token_id', bos), *(('eos_token_id', end) for end in ends)]:
        check_id(i, f'{said.where}: {field} is')
    found = {'bos': bos, 'eos': eos, 'prefix': [*prefix], 'ends': sorted(set(ends))}
    return found | ({'suffix': [*suffix]} if suffix else {})


def read_special(content: bytes, where: str) -> dict[str, Any]:
    """A run's tokenizer.special.json. Raises UserError for one that was damaged."""
    found = read_object(content, where)
    ids = [found.get('bos'), found.get('eos'), found.get('embedded', 1)]
    for field in ('prefix', 'suffix', 'ends'):
        some = found.get(field, [] if field == 'suffix' else None)  # which most have none of
        ids += some if isinstance(some, list) else [None]
    if not all(type(i) is int and 0 <= i < LARGEST_VOCABULARY for i in ids):
        raise UserError(
            f'{where}: its ids must be whole numbers from 0 to {LARGEST_VOCABULARY - 1}: import the run again'
        )
    return found


def near(name: str, names: Iterable[str]) -> str:
    """The tail of a message: which token a name may have meant, or a few of those that look special."""
    special = [
        token for token in names if len(token) < 50 and token[:1] + token[-1:] in ('<>', '[]') and token[:3] != '<0x'
    ]
    close = difflib.get_close_matches(name[:50], special[:1000], n=1, cutoff=0.5)
    return nearest(name, close or special[:8])


def _first(*values: Any) -> Any:
    """The first that is something, of a list its first."""
    for value in values:
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and value != []:
            return value
    return None
