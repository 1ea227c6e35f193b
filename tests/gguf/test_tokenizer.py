"""Tokenizers in GGUF headers give the ids of the tokenizers that they were converted from."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from tests.data.test_tokenizer import TEXT, TRICKY, random_text
from tests.gguf.texts import texts
from tests.hub.test_published_tokenizer import byte_level, metaspace
from weft.data.tokenizer import Tokenizer
from weft.hub.gguf.cuts import CUTS
from weft.hub.gguf.tokenizer import tokenizer_files
from weft.hub.published_tokenizer import published_tokenizer
from weft.runtime.errors import UserError

SPECIAL = ['<s>', '</s>', '<unk>']
KEY = 'tokenizer.ggml.'


def keys(model: str, tokens: list[str], kinds: list[int], **others: Any) -> dict[str, Any]:
    found = {
        'model': model,
        'tokens': tokens,
        'token_type': np.array(kinds, np.int32),
        'bos_token_id': 1,
        'eos_token_id': 2,
    }
    return {KEY + name: value for name, value in (found | others).items() if value is not None}


def read(values: dict[str, Any]) -> Tokenizer:
    return published_tokenizer(tokenizer_files(values, Path('a.gguf')), 'a.gguf')


def of_byte_level(**others: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """As of GPT-2: `<s>` and `</s>` are control tokens, the last token is one that users define."""
    made = byte_level()
    said = json.loads(made.to_str())
    ids = said['model']['vocab'] | {'<think>': 304}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [' '.join(merge) for merge in said['model']['merges']]
    made.add_tokens([tokenizers.AddedToken('<think>', normalized=False)])
    return made, keys('gpt2', tokens, [3] * 3 + [1] * 301 + [4], **{'pre': 'gpt-2', 'merges': merges} | others)


def given() -> list[str]:
    source = random.Random(0)
    return [TEXT, *TRICKY, *(random_text(source) for _ in range(300)), *texts([*SPECIAL, '<think>'], 300)]


def test_byte_level_ids_are_those_of_the_tokenizer_that_was_converted():
    made, values = of_byte_level()
    mine = read(values)
    assert mine.encode_batch(given()) == [found.ids for found in made.encode_batch(given(), add_special_tokens=False)]
    assert (mine.vocabulary, mine.prefix, mine.bos, mine.eos, mine.ends) == (305, (), 1, 2, {2})
    assert mine.decode(mine.encode('héllo <think>')) == 'héllo <think>'
    assert mine.decode([1, 2]) == ''


def test_metaspace_ids_are_those_of_the_tokenizer_that_was_converted():
    made = metaspace(max_token_length=20)
    ids = json.loads(made.to_str())['model']['vocab']
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = -np.arange(len(tokens), dtype=np.float32)
    mine = read(keys('llama', tokens, kinds, scores=scores, unknown_token_id=0, add_bos_token=True))
    assert mine.encode_batch(given()) == [found.ids for found in made.encode_batch(given(), add_special_tokens=False)]
    assert (mine.prefix, mine.ends, mine.vocabulary) == ((1,), {2}, len(tokens))


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_ids_are_those_of_sentencepiece(prefix):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, vocab_size=340, byte_fallback=True, model_type='bpe',
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
        user_defined_symbols=['<tool>', '▁▁', '▁▁▁'],
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(library.vocab_size())
    tokens = [library.id_to_piece(i) for i in ids]
    tokens[tokens.index('▁▁')], tokens[tokens.index('▁▁▁')] = '  ', '   '  # as converters write them
    kinds = [
        6
        if library.is_byte(i)
        else 3
        if library.is_control(i)
        else 2
        if library.is_unknown(i)
        else 4
        if 3 <= i < 6
        else 1
        for i in ids
    ]
    scores = np.array([library.get_score(i) for i in ids], np.float32)
    mine = read(keys('llama', tokens, kinds, scores=scores, unknown_token_id=0, add_space_prefix=prefix))
    names = re.compile('|'.join((*SPECIAL, '<think>', '<tool>', '▁')))
    for text in given():
        # Of more than three spaces sentencepiece takes three first, and the library the largest that there are.
        text = re.sub(' {3,}', '  ', names.sub('', text))
        assert mine.encode(text) == library.encode(text), text
    named = mine.encode('a<tool>b</s>')
    assert tokens.index('<tool>') in named
    assert named[-1] == 2
    assert mine.pieces[tokens.index('  ')] == b'  '


SAMPLE = "He's  12345 naïve\n\n  DON'T; x=1/2 日本語!! "
PIECES = {
    'default': r"He|'|s| | |123|45| naïve|\n\n | DON|'|T|;| x|=|1|/|2| 日本語|!!| ",
    'gpt-2': r"He|'s| | 12345| naïve|\n\n | DON|'|T|;| x|=|1|/|2| 日本語|!!| ",
    'smollm': r"He|'s|  |1|2|3|4|5| naïve|\n\n | DON|'|T|;| x|=|1|/|2| 日本語|!!| ",
    'llama-bpe': r"He|'s| | |123|45| naïve|\n\n| | DON|'T|;| x|=|1|/|2| 日本語|!!| ",
    'qwen2': r"He|'s| | |1|2|3|4|5| naïve|\n\n| | DON|'T|;| x|=|1|/|2| 日本語|!!| ",
    'gpt-4o': r"He's| | |123|45| naïve|\n\n| | DON'T|;| x|=|1|/|2| 日本語|!!| ",
    'tekken': r"He|'s| | |1|2|3|4|5| naïve|\n\n| | DON|'T|;| x|=|1|/|2| 日本語|!!| ",
    # Its signs have a range that ASCII's letters are in, and so cut what letters of other kinds are in.
    'deepseek-llm': r"He|'|s|  |12345| na|ï|ve|\n|\n| | DON|'|T|;| x|=|1|/|2| |日本語|!!| ",
    'deepseek-coder': r"He|'|s|  |1|2|3|4|5| naïve|\n|\n| | DON|'|T|;| x|=|1|/|2| |日本語|!!| ",
    'deepseek-v3': r"He|'s|  |123|45| naïve|\n\n| | DON|'T|;| x|=|1|/|2| |日本語|!!| ",
}


@pytest.mark.parametrize('name', CUTS)
def test_text_is_cut_as_each_name_says(name):
    _, values = of_byte_level(pre=name, merges=['H e'])
    values[KEY + 'tokens'] = values[KEY + 'tokens'] + ['He']
    values[KEY + 'token_type'] = np.append(values[KEY + 'token_type'], np.int32(1))
    made = tokenizers.Tokenizer.from_str(tokenizer_files(values, Path('a.gguf'))['tokenizer.json'].decode())
    found = [SAMPLE[begin:end] for _, (begin, end) in made.pre_tokenizer.pre_tokenize_str(SAMPLE)]
    same = next(known for known in PIECES if CUTS[known][:3] == CUTS[name][:3])
    assert '|'.join(found).replace('\n', r'\n') == PIECES[same]


def test_merges_are_passed_over_where_a_name_says_so():
    """Of Llama 3's vocabulary a piece that is a token as a whole is that token, whatever its merges make of it."""
    tokens = ['<unk>', '<s>', '</s>', 'a', 'b', 'c', 'ab', 'bc', 'abc']
    ids = {}
    for pre in ('llama-bpe', 'qwen2'):
        values = keys('gpt2', tokens, [3] * 3 + [1] * 6, pre=pre, merges=['b c', 'a b'])
        ids[pre] = read(values).encode('abc')
    assert ids == {'llama-bpe': [8], 'qwen2': [3, 7]}


def test_what_opens_and_ends_texts():
    made = lambda **others: read(of_byte_level(**others)[1])
    assert made(pre='llama-bpe').prefix == (1,)  # llama.cpp begins texts with bos for this name
    assert made(pre='llama-bpe', add_bos_token=False).prefix == ()
    assert made(add_bos_token=True, add_eos_token=True).prefix == (1,)
    assert made(eot_token_id=7, eom_token_id=8).ends == {2, 7, 8}
    assert made(bos_token_id=None).bos == 2
    _, values = of_byte_level()
    values[KEY + 'tokens'] += ['<|im_end|>', '<|end|>']
    values[KEY + 'token_type'] = np.append(values[KEY + 'token_type'], np.array([3, 3], np.int32))
    assert read(values).ends == {2}
    values['tokenizer.chat_template'] = "{{ '<|im_end|>' }}"  # the template ends turns with it
    assert read(values).ends == {2, 305}
    files = {name: json.loads(content) for name, content in tokenizer_files(values, Path('a.gguf')).items()}
    assert files['tokenizer_config.json']['chat_template'] == "{{ '<|im_end|>' }}"
    assert files['generation_config.json'] == {'bos_token_id': 1, 'eos_token_id': [2, 305]}


def test_templates_and_sampling_come_with_it():
    _, values = of_byte_level()
    values |= {
        'tokenizer.chat_template': 'plain',
        'tokenizer.chat_templates': ['tool_use'],
        'tokenizer.chat_template.tool_use': 'tools',
        'general.sampling.temp': 0.6,
        'general.sampling.top_k': 20,
    }
    files = {name: json.loads(content) for name, content in tokenizer_files(values, Path('a.gguf')).items()}
    assert files['tokenizer_config.json']['chat_template'] == [
        {'name': 'default', 'template': 'plain'},
        {'name': 'tool_use', 'template': 'tools'},
    ]
    sampling = {'temperature': 0.6, 'top_k': 20, 'do_sample': True}
    assert files['generation_config.json'] == {'bos_token_id': 1, 'eos_token_id': 2} | sampling


def test_ids_that_are_not_used_are_left_out():
    made, values = of_byte_level()
    values[KEY + 'tokens'] = [*values[KEY + 'tokens'][:304], '[PAD304]', '<x>', '[PAD306]']
    values[KEY + 'token_type'] = np.append(values[KEY + 'token_type'][:304], np.array([5, 4, 5], np.int32))
    mine = read(values)
    assert mine.vocabulary == 306
    assert mine.encode('a<x>')[-1] == 305
    assert mine.encode('[PAD304]') == made.encode('[PAD304]').ids


def test_a_header_may_have_no_tokenizer():
    assert tokenizer_files({}, Path('a.gguf')) == {}
    assert tokenizer_files({f'{KEY}model': 'no_vocab'}, Path('a.gguf')) == {}


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'scores': None}, r"scores is missing: a tokenizer of 'llama' has it"),
        ({'scores': np.array([np.nan] * 5, np.float32)}, 'scores has one that is not a number'),
        (
            {'tokens': ['<unk>', '<s>', '</s>', 'a', '<0xZZ>'], 'token_type': np.array([2, 3, 3, 1, 6])},
            "'<0xZZ>' as a byte",
        ),
        ({'tokens': ['<unk>', '<s>', '</s>', 'a', 'b' * 300]}, 'pieces of up to 300 characters, .* at most 256'),
        ({'add_space_prefix': 'yes'}, "add_space_prefix is 'yes': it must be true or false"),
    ],
)
def test_what_is_wrong_with_sentencepiece_is_said(change, said):
    values = keys('llama', ['<unk>', '<s>', '</s>', 'a', 'b'], [2, 3, 3, 1, 1], scores=np.zeros(5, np.float32))
    values |= {KEY + name: value for name, value in change.items()}
    with pytest.raises(UserError, match=said):
        tokenizer_files(values, Path('a.gguf'))
