"""vocab.json and merges.txt, as GPT-2 and older Qwen2 models have them (byte pair encoding of bytes), as a tokenizer.json."""

from typing import Any

from weft.hub.tokenizers.built import byte_level, finished, placed, sequence, split
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer
from weft.hub.tokenizers.side_files import Said, read_vocabulary, text_of
from weft.runtime.errors import UserError, shown
from weft.storage.foreign import shown_value

VOCAB, MERGES = 'vocab.json', 'merges.txt'
END = '<|endoftext|>'
# Qwen2's published pattern: contractions, words with the sign before them, single digits, signs, line ends, spaces.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
DEFAULTS = {
    'GPT2Tokenizer': {'bos_token': END, 'eos_token': END, 'unk_token': END},
    'Qwen2Tokenizer': {'eos_token': END, 'unk_token': END, 'pad_token': END},
}
CLASSES = {'gpt2': 'GPT2Tokenizer'} | dict.fromkeys(('qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe'), 'Qwen2Tokenizer')


def byte_pair_tokenizer(vocab: bytes, merges: bytes, said: Said) -> JsonTokenizer:
    """The tokenizer of a vocab.json, a merges.txt, and the files beside them."""
    kind = said.kind if said.kind in DEFAULTS else CLASSES.get(said.model or '')
    if kind is None:
        what = said.kind or said.model or 'no class that a file names'
        raise said.error(
            f'{VOCAB} and {MERGES} are of {shown(what, 60)}: supported are {" and ".join(DEFAULTS)}; others '
            'need a tokenizer.json, as transformers’ AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes'
        )
    ids = read_vocabulary(vocab, f'{said.where}/{VOCAB}')
    spaced = said.tokenizer.get('add_prefix_space') is True
    fields: dict[str, Any] = {
        'added_tokens': [],
        'normalizer': None,
        'pre_tokenizer': byte_level(spaced),
        'decoder': byte_level(spaced),
        'model': {
            'type': 'BPE', 'unk_token': None, 'fuse_unk': False, 'byte_fallback': False,
            'vocab': placed(ids, said.added), 'merges': read_merges(merges, f'{said.where}/{MERGES}'),
        },
    }  # fmt: skip
    if kind == 'Qwen2Tokenizer':
        fields['normalizer'] = {'type': 'NFC'}
        fields['pre_tokenizer'] = sequence('pretokenizers', [split(QWEN2), byte_level(spaced, regex=False)])
    return finished(fields, said, DEFAULTS[kind])


def read_merges(content: bytes, where: str) -> list[list[str]]:
    """The pairs of a merges.txt, one a line, after a line `#version`. Raises UserError for a line that is no pair."""
    found = []
    for number, line in enumerate(text_of(content, where).split('\n'), start=1):
        pair = line.removesuffix('\r').split(' ')
        if line.startswith('#version') or pair == ['']:
            continue
        if len(pair) != 2:
            raise UserError(f'{where}:{number}: {shown_value(line)} must be two tokens with a space between them')
        found.append(pair)
    return found
