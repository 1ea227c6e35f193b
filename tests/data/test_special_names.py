"""The name of a special token that stands in training text is text, unless the config says otherwise; and it is said."""

import json
from pathlib import Path

import pytest

from tests.hub.test_tokenizer_goldens import FOLDERS, read
from weft.data.config import DataConfig
from weft.data.packing import encode_documents
from weft.data.pairs import Pair, pack_pairs
from weft.data.prepare import prepare
from weft.data.tokenizer import Tokenizer
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer

# What a folder's tokenizer writes otherwise: it knows no signs, or takes spaces away.
LOSSY = {'unigram', 't5', 't5_by_its_config', 'marian'}


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_name_in_data_is_text_and_in_a_prompt_the_token(folder: str) -> None:
    tokenizer = read(folder)
    special = {
        i for i, piece in enumerate(tokenizer.pieces) if not piece and tokenizer.id_of(tokenizer.name_of(i)) == i
    }
    special &= {i for i in special if tokenizer.special_names.fullmatch(tokenizer.name_of(i))}
    unknown = {tokenizer.id_of(name) for name in ('<unk>', '[UNK]')}
    assert tokenizer.eos in special
    for i in special:
        for text in (f'a {tokenizer.name_of(i)} b', tokenizer.name_of(i), f'x{tokenizer.name_of(i)}'):
            stream_S, length_D, size = encode_documents(tokenizer, [text])
            assert not special & set(stream_S[1:-1].tolist()) - unknown, text
            assert length_D.tolist() == [len(stream_S)]
            assert size == len(text.encode())
            if folder not in LOSSY and not unknown & set(stream_S[1:-1].tolist()):
                assert text.replace(' ', '') in tokenizer.decode(stream_S.tolist()).replace(' ', '')
            assert i in encode_documents(tokenizer, [text], names=True)[0][1:-1]
            assert i in tokenizer.encode(text), 'afterwards everything is as it was'


PLAIN = {'one': 3, 'two': 4, **{sign: 5 + i for i, sign in enumerate('</>s[X]ab')}}
VOCAB = {'<unk>': 0, '</s>': 1, '[X]': 2, **PLAIN}
BUILT = {**VOCAB, '</': 20, '</s': 21, 's>': 22}
UNIGRAM = {'unk_id': 0, 'vocab': [[token, -1.0] for token in VOCAB]}
MODELS: dict[str, dict] = {
    'Unigram': {'type': 'Unigram', **UNIGRAM},
    'Unigram as older files have it': UNIGRAM,
    'WordLevel': {'type': 'WordLevel', 'vocab': VOCAB, 'unk_token': '<unk>'},
    'WordPiece': {
        'type': 'WordPiece', 'vocab': VOCAB | {f'##{sign}': 30 + i for i, sign in enumerate('</>s[X]')}, 'unk_token': '<unk>',
        'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100,
    },
    'BPE whose merges make it': {'type': 'BPE', 'vocab': BUILT, 'merges': [['<', '/'], ['</', 's'], ['</s', '>']]},
    'BPE as older files have it': {'vocab': BUILT, 'merges': ['#version: 0.2', '< /', 's >', '</ s>']},
    'BPE that merges it further': {
        'type': 'BPE', 'vocab': BUILT | {'</s>a': 23}, 'merges': [['<', '/'], ['</', 's'], ['</s', '>'], ['</s>', 'a']],
    },
    'BPE that prefers whole words': {'type': 'BPE', 'vocab': VOCAB, 'merges': [], 'ignore_merges': True},
    'BPE with a prefix': {
        'type': 'BPE', 'vocab': VOCAB | {'##s': 20, '##>': 21, '##/': 22, '</': 23, '##s>': 24},
        'merges': [['<', '##/'], ['##s', '##>'], ['</', '##s>']], 'continuing_subword_prefix': '##', 'unk_token': '<unk>',
    },
}  # fmt: skip


def made(model: dict, *special: str) -> JsonTokenizer:
    """A tokenizer of words between spaces, with special tokens of its vocabulary."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False) | {'special': True}
    vocab = (
        dict(model['vocab']) if isinstance(model['vocab'], dict) else {t: i for i, (t, _) in enumerate(model['vocab'])}
    )
    fields = {
        'version': '1.0',
        'added_tokens': [{'id': vocab[name], 'content': name, **flags} for name in special],
        'normalizer': None,
        'pre_tokenizer': {'type': 'WhitespaceSplit'},
        'post_processor': None,
        'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': False},
        'model': model,
    }
    return JsonTokenizer(json.dumps(fields).encode())


@pytest.mark.parametrize('kind', MODELS)
def test_no_model_of_any_kind_finds_a_name_in_data(kind: str) -> None:
    tokenizer = made(MODELS[kind], '<unk>', '</s>', '[X]')
    for text in ('</s>', 'one </s> two', 'a[X]b </s>a', '[X]', '[X]</s>'):
        with tokenizer.names_as_text():
            found = tokenizer.encode(text)
        assert found
        assert not {1, 2} & set(found), text
        assert {1, 2} & set(tokenizer.encode(text)), 'afterwards everything is as it was'
    with tokenizer.names_as_text():
        plain = tokenizer.encode('one two a < s >')
    assert plain == tokenizer.encode('one two a < s >')


def test_a_special_token_of_one_sign_is_no_text_either() -> None:
    model = {'type': 'BPE', 'vocab': VOCAB, 'merges': [], 'unk_token': '<unk>'}
    tokenizer = made(model, '<unk>', 'a')
    with tokenizer.names_as_text():
        assert tokenizer.encode('bab') == [VOCAB['b'], 0, VOCAB['b']]
    assert tokenizer.encode('bab') == [VOCAB['b'], VOCAB['a'], VOCAB['b']]


def test_where_no_text_becomes_a_special_token_the_tokenizer_is_made_once() -> None:
    assert read('gpt2')._hidden is None  # type: ignore[attr-defined]
    assert made({'type': 'BPE', 'vocab': VOCAB, 'merges': []}, '<unk>', '</s>')._hidden is None


def test_a_name_in_pairs_is_text_too() -> None:
    tokenizer = read('t5')
    pairs = [Pair('a </s> b', 'b </s> a')]
    as_text, _ = pack_pairs(tokenizer, pairs, 64, start=0)
    as_token, _ = pack_pairs(tokenizer, pairs, 64, start=0, names=True)
    count = lambda rows: rows.stream_S.tolist().count(tokenizer.eos)
    assert (count(as_text), count(as_token)) == (2, 4)


def test_a_learnt_tokenizer_has_no_names() -> None:
    tokenizer = Tokenizer.train(['<s> and </s> are names of its pieces ' * 100], 300)
    assert tokenizer.special_names is None
    stream_S, _, _ = encode_documents(tokenizer, ['<s> a </s>'])
    assert tokenizer.decode(stream_S.tolist()) == '<s> a </s>'
    assert stream_S.tolist().count(tokenizer.eos) == 1


@pytest.mark.parametrize('names', [False, True])
def test_preparing_says_what_becomes_of_names(tmp_path: Path, names: bool) -> None:
    tokenizer = read('gpt2')
    (tmp_path / 'a.txt').write_text('one two <|endoftext|> three\n' * 200)
    (tmp_path / 'b.txt').write_text('four five six\n' * 200)
    said: list[str] = []
    config = DataConfig(source=str(tmp_path / '*.txt'), vocabulary=None, special_tokens=names)
    dataset = prepare(config, tmp_path / 'run', 64, said.append, tokenizer=tokenizer)
    line = next(line for line in said if 'special tokens' in line)
    assert line.startswith('data: 1 documents have names of special tokens')
    assert f'data.special_tokens={str(not names).lower()}' in line
    found = dataset.train_bytes() + dataset.validation_bytes()
    assert (b'<|endoftext|>' in found) is not names
    assert (len(found) == dataset.facts['bytes']) is not names


def test_names_are_looked_for_in_so_much_text_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, looked = read('gpt2'), []
    pattern = tokenizer.special_names

    class Counting:
        def search(self, text: str, begin: int = 0, end: int = 1 << 62) -> object:
            looked.append(len(text[begin:end]))
            return pattern.search(text, begin, end)

    monkeypatch.setattr(type(tokenizer), 'special_names', Counting())
    for number in range(10):
        begin = 'one <|endoftext|> ' if number % 2 else ''
        (tmp_path / f'{number}.txt').write_text(begin + f'two three {number}\n' * 100)
    said: list[str] = []
    config = DataConfig(source=str(tmp_path / '*.txt'), vocabulary=None)
    for most, told in ((10_000, 'data: 5 documents'), (4_000, 'data: at least 3 documents'), (100, None)):
        monkeypatch.setattr('weft.data.prepare.SEARCHED', most)
        looked.clear(), said.clear()
        prepare(config, tmp_path / f'run {most}', 64, said.append, tokenizer=tokenizer)
        lines = [line for line in said if 'special tokens' in line]
        assert [line.split(' have')[0] for line in lines] == ([told] if told else [])
        assert sum(looked) <= most + 5 * 1300, 'what follows a name in a text is not looked at'


def test_preparing_pairs_says_what_becomes_of_names_too(tmp_path: Path) -> None:
    (tmp_path / 'a.tsv').write_text(''.join(f'one {i} </s>\tone {i}\n' for i in range(200)))
    said: list[str] = []
    config = DataConfig(source=str(tmp_path / 'a.tsv'), vocabulary=None)
    prepare(config, tmp_path / 'run', 64, said.append, pairs=True, tokenizer=read('t5'), start=0)
    assert any(line.startswith('data: 200 pairs have names of special tokens') for line in said)
