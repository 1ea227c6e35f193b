"""The tokenizer in a GGUF file's header, as the files that a published folder has it in.

tokenizer.json (byte-level BPE, or sentencepiece's BPE with scores), tokenizer_config.json with the chat template, and
generation_config.json with what ends an answer. How text is cut before BPE a header says by a name alone: see cuts.py.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weft.data.tokenizer import SPACE
from weft.hub.gguf.cuts import CUTS, Cut
from weft.hub.tokenizers import built
from weft.hub.tokenizers.sentencepiece_model import Kind
from weft.hub.tokenizers.side_files import FLAGS, LONGEST_PIECE, MOST_CHARACTERS, json_file
from weft.runtime.errors import UserError, nearest
from weft.storage.foreign import shown_value

KEY = 'tokenizer.ggml.'
MODELS = ('gpt2', 'llama')  # byte-level BPE, sentencepiece's
NAMED = {'bos': 'bos_token', 'eos': 'eos_token', 'unknown': 'unk_token', 'padding': 'pad_token'}
BYTE_NAME = re.compile('<0x[0-9A-F]{2}>')
MOST_MERGES = 2**21  # of pieces by sentencepiece; a vocabulary of 262,144 has about half as many
# Tokens that end a turn, which count where the chat template speaks of them.
TURN_ENDS = ('<|eot_id|>', '<|im_end|>', '<end_of_turn>', '<|end|>', '<|eom_id|>', '<|return|>', '<|call|>', '<|user|>')
SAMPLING = {
    'temp': 'temperature',
    'top_k': 'top_k',
    'top_p': 'top_p',
    'min_p': 'min_p',
    'penalty_repeat': 'repetition_penalty',
}


def tokenizer_files(values: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """A tokenizer's files by name, of the keys and values of a header; none where it has no tokenizer.

    Raises UserError for one that is damaged or of a kind that is not supported.
    """
    model = values.get(f'{KEY}model', 'no_vocab')
    if isinstance(model, str) and model in ('no_vocab', 'none'):
        return {}
    if not isinstance(model, str) or model not in MODELS:
        raise UserError(
            f'{path}: {KEY}model is {shown_value(model)}, which is not supported; supported: gpt2 (byte-level BPE), llama '
            '(sentencepiece)'
        )
    header = _Header(values, path)
    cut = header.cut() if model == 'gpt2' else Cut(bos=True)
    written = header.byte_level(cut) if model == 'gpt2' else header.sentencepiece()
    written = {'version': '1.0', 'truncation': None, 'padding': None} | written
    config: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    config |= {field: token for name, field in NAMED.items() if (token := header.token(name)) is not None}
    written['added_tokens'] = header.added()
    written['post_processor'] = header.post_processor(cut)
    if (chat := header.chat_template()) is not None:
        config['chat_template'] = chat
    generation = header.generation(chat or '')
    return {
        'tokenizer.json': json.dumps(written, ensure_ascii=False).encode(),
        'tokenizer_config.json': json_file(config),
        'generation_config.json': json_file(generation),
    }


class _Header:
    """What a header says of its tokenizer, each part checked as it is read."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path
        self.tokens: list[str] = self.texts('tokens')
        kinds = self.numbers('token_type', 'iu')
        self.kinds: list[int] = [Kind.NORMAL] * len(self.tokens) if kinds is None else kinds.tolist()
        if wrong := [kind for kind in self.kinds if not Kind.NORMAL <= kind <= Kind.BYTE]:
            raise self.error(f'{KEY}token_type has a {wrong[0]}: types go from {min(Kind)} to {max(Kind)}')
        # Ids that no text has are left out.
        self.ids = {token: i for i, token in enumerate(self.tokens) if self.kinds[i] != Kind.UNUSED}
        if len(self.ids) != len(self.tokens) - self.kinds.count(Kind.UNUSED):
            seen: set[str] = set()
            for i, token in enumerate(self.tokens):
                if self.kinds[i] != Kind.UNUSED and token in seen:
                    raise self.error(f'{KEY}tokens has {shown_value(token)} twice: each token must be another text')
                seen.add(token)

    def error(self, said: str) -> UserError:
        return UserError(f'{self.path}: {said}')

    def texts(self, name: str) -> list[str]:
        found = self.values.get(f'{KEY}{name}')
        if not isinstance(found, list) or not found:
            what = 'is missing' if found is None else 'must be an array of texts'
            raise self.error(f'{KEY}{name} {what}: a tokenizer of {self.values[f"{KEY}model"]!r} has it')
        return found

    def numbers(self, name: str, kinds: str) -> np.ndarray | None:
        """An array of a number for each token."""
        found = self.values.get(f'{KEY}{name}')
        if found is None:
            return None
        if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds or len(found) != len(self.tokens):
            raise self.error(f'{KEY}{name} must be an array of a number for each of {len(self.tokens)} tokens')
        return found

    def id_of(self, name: str) -> int | None:
        found = self.values.get(f'{KEY}{name}_token_id')
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.error(f'{KEY}{name}_token_id is {shown_value(found)}: at most {len(self.tokens) - 1} works')
        return found

    def token(self, name: str) -> str | None:
        found = self.id_of(name)
        return None if found is None else self.tokens[found]

    def flag(self, name: str, default: bool) -> bool:
        found = self.values.get(f'{KEY}{name}', default)
        if not isinstance(found, bool):
            raise self.error(f'{KEY}{name} is {shown_value(found)}: it must be true or false')
        return found

    def cut(self) -> Cut:
        name = self.values.get(f'{KEY}pre')
        if name is None and self.values.get('general.architecture') == 'gpt2':
            return CUTS['gpt-2']
        if name is None:
            raise self.error(
                f'{KEY}pre is missing, which says how text is cut: the file was made before converters wrote it; '
                'convert the model again'
            )
        if not isinstance(name, str) or name not in CUTS:
            near = nearest(name[:64], CUTS) if isinstance(name, str) else ''
            raise self.error(f'{KEY}pre is {shown_value(name)}, which is not supported{near}')
        return CUTS[name]

    def byte_level(self, cut: Cut) -> dict[str, Any]:
        """Of tokenizer.json: byte-level BPE with its merges."""
        merges = []
        for text in self.texts('merges'):
            left, _, right = text.partition(' ')
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise self.error(f'{KEY}merges has {shown_value(text)}: two tokens that together are one must be there')
            merges.append([left, right])
        steps: list[dict[str, Any]] = [{'type': 'Digits', 'individual_digits': True}] if cut.digits else []
        steps += [*map(built.split, cut.patterns), built.byte_level(regex=cut.plain)]
        return {
            'normalizer': None,
            'pre_tokenizer': built.sequence('pretokenizers', steps),
            'decoder': built.byte_level(),
            'model': self.bpe(merges, self.ids) | {'ignore_merges': cut.whole},
        }

    def bpe(self, merges: list[list[str]], ids: Mapping[str, int]) -> dict[str, Any]:
        absent = dict.fromkeys(('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix'))
        off = dict.fromkeys(('fuse_unk', 'byte_fallback', 'ignore_merges'), False)
        return {'type': 'BPE'} | absent | off | {'vocab': dict(ids), 'merges': merges}

    def sentencepiece(self) -> dict[str, Any]:
        """Of tokenizer.json: sentencepiece's BPE, whose merges follow from its pieces and their scores."""
        scores = self.numbers('scores', 'f')
        if scores is None:
            raise self.error(f"{KEY}scores is missing: a tokenizer of 'llama' has it")
        for i, token in enumerate(self.tokens):
            if self.kinds[i] == Kind.BYTE and not BYTE_NAME.fullmatch(token):
                raise self.error(f'{KEY}tokens has {shown_value(token)} as a byte: bytes are <0x00> to <0xFF>')
        ids = {self.spelt(token): i for token, i in self.ids.items()}
        prefix = self.flag('add_space_prefix', True)
        spaces = built.replace({'String': ' '}, SPACE)
        return {
            'normalizer': built.sequence('normalizers', [{'type': 'Prepend', 'prepend': SPACE}, spaces])
            if prefix
            else spaces,
            'pre_tokenizer': None,
            'decoder': built.pieces_decoder(strips=prefix, falls_back=True),
            'model': self.bpe(self.merges(ids, scores), ids)
            | {'unk_token': self.token('unknown'), 'fuse_unk': True, 'byte_fallback': True},
        }

    def spelt(self, token: str) -> str:
        """A piece as sentencepiece spells it: a converter has given runs of spaces back as spaces."""
        return SPACE * len(token) if token and not token.strip(' ') else token

    def merges(self, ids: Mapping[str, int], scores: np.ndarray) -> list[list[str]]:
        """Pairs of pieces that together are a piece, those of the highest score first; of one piece, with the longest left part
        first. What users define, which is runs of spaces, goes before all others.
        """
        kinds = self.kinds
        pieces = {piece: i for piece, i in ids.items() if kinds[i] in (Kind.NORMAL, Kind.USER_DEFINED)}
        longest = max(pieces, key=len, default='')
        if len(longest) > LONGEST_PIECE or sum(map(len, pieces)) > MOST_CHARACTERS:
            raise self.error(
                f'{KEY}tokens has pieces of up to {len(longest)} characters, {sum(map(len, pieces))} together: at '
                f'most {LONGEST_PIECE} and {MOST_CHARACTERS} work'
            )
        rank = np.array(scores, np.float64)
        if not np.isfinite(rank).all():
            raise self.error(f'{KEY}scores has one that is not a number')
        for i in pieces.values():
            if kinds[i] == Kind.USER_DEFINED:
                rank[i] = math.inf
        found = list(itertools.islice(built.halves(pieces), MOST_MERGES + 1))
        if len(found) > MOST_MERGES:
            raise self.error(f'{KEY}tokens has more than {MOST_MERGES} pairs of pieces that together are a piece')

        def order(merge: tuple[str, str, str]) -> tuple[float, int, int, int]:
            piece, left, right = merge
            i = pieces[piece]
            return -rank[i], i if kinds[i] == Kind.USER_DEFINED else 0, -len(left), -len(right)

        return [[left, right] for _, left, right in sorted(found, key=order)]

    def added(self) -> list[dict[str, Any]]:
        """Of tokenizer.json: tokens that are found as a whole in a text, before BPE."""
        sentencepiece = self.values[f'{KEY}model'] == 'llama'
        kinds = (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)
        return [
            {'id': i, 'content': token} | dict.fromkeys(FLAGS, False) | {'special': self.kinds[i] != Kind.USER_DEFINED}
            for i, token in enumerate(self.tokens)
            if self.kinds[i] in kinds and token and not (sentencepiece and self.spelt(token) != token)
        ]

    def post_processor(self, cut: Cut) -> dict[str, Any] | None:
        """Of tokenizer.json: what stands before and after a text."""
        sides: list[dict[str, Any]] = []
        for name, default in (('bos', cut.bos), ('eos', False)):
            adds, token = self.flag(f'add_{name}_token', default), self.token(name)
            if adds and token is None:
                raise self.error(f'{KEY}add_{name}_token is true and {KEY}{name}_token_id is missing')
            sides.append({token: self.id_of(name)} if adds and token is not None else {})
        return built.template(*sides) or None

    def chat_template(self) -> str | list[dict[str, str]] | None:
        """The chat template; where there are several, each with its name."""
        found = self.values.get('tokenizer.chat_template')
        if found is not None and not isinstance(found, str):
            raise self.error(f'tokenizer.chat_template is {shown_value(found)}: it must be a text')
        named = {
            key.removeprefix('tokenizer.chat_template.'): text
            for key, text in self.values.items()
            if key.startswith('tokenizer.chat_template.') and isinstance(text, str)
        }
        if not named:
            return found
        return [{'name': name, 'template': text} for name, text in ({'default': found or ''} | named).items() if text]

    def generation(self, template: Any) -> dict[str, Any]:
        """The fields of generation_config.json: what ends an answer, and the sampling that the publisher advises."""
        said = template if isinstance(template, str) else ' '.join(one['template'] for one in template)
        ends = [self.id_of(name) for name in ('eos', 'eot', 'eom')]
        ends += [
            self.ids[token]
            for token in TURN_ENDS
            if token in said
            and token in self.ids
            and self.kinds[self.ids[token]] in (Kind.CONTROL, Kind.USER_DEFINED)
            # gpt-oss ends a message with <|end|>, and goes on; GLM ends a turn with the next one's first token.
            and not (token == '<|end|>' and '<|return|>' in self.ids)
            and not (token == '<|user|>' and '[gMASK]' not in self.ids)
        ]
        found = list(dict.fromkeys(i for i in ends if i is not None))
        fields: dict[str, Any] = {
            'bos_token_id': self.id_of('bos'),
            'eos_token_id': found[0] if len(found) == 1 else found or None,
            'pad_token_id': self.id_of('padding'),
        }
        for key, field in SAMPLING.items():
            value = self.values.get(f'general.sampling.{key}')
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                fields[field] = value
        if 'temperature' in fields or 'top_p' in fields or 'top_k' in fields:
            fields['do_sample'] = True
        return {name: value for name, value in fields.items() if value is not None}
