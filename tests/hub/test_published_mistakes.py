"""Published tokenizers with something wrong: one line that names it, and never a guess at what ends a text."""

import base64
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.test_tokenizer_goldens import files_of, read
from weft.hub.published_tokenizer import load_tokenizer, published_tokenizer
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer
from weft.runtime.errors import UserError

FLAGS = dict.fromkeys(('special', 'single_word', 'lstrip', 'rstrip', 'normalized'), False)


def refusal(files: dict[str, bytes]) -> str:
    """What the user is told."""
    with pytest.raises(UserError) as error:
        published_tokenizer(files, 'folder')
    line = str(error.value)
    assert '\n' not in line
    assert line.isprintable()
    assert len(line) < 700
    return line


def said(**files: Any) -> dict[str, bytes]:
    """A folder with a tokenizer.json of 300 tokens, `<s>` before each text, and other files beside it."""
    found = files_of('json_template_PreTrainedTokenizerFast_True')
    for name, value in files.items():
        found[f'{name}.json'] = value if isinstance(value, bytes) else json.dumps(value).encode()
    return found


def changed(change: Callable[[dict], Any], **files: Any) -> dict[str, bytes]:
    """`said` with a change of its tokenizer.json."""
    found = said(**files)
    fields = json.loads(found['tokenizer.json'])
    change(fields)
    return found | {'tokenizer.json': json.dumps(fields).encode()}


NAMES = {'bos_token': '<s>', 'eos_token': '</s>'}
BESIDE = {  # files beside the tokenizer, and words of the refusal
    'a list': ({'special_tokens_map': []}, ['folder/special_tokens_map.json', 'JSON object']),
    'null': ({'tokenizer_config': b'null'}, ['folder/tokenizer_config.json', 'JSON object']),
    'a text': ({'generation_config': 'x'}, ['folder/generation_config.json', 'JSON object']),
    'deep': ({'tokenizer_config': b'[' * 100_000}, ['folder/tokenizer_config.json', 'too deep']),
    'not UTF-8': ({'tokenizer_config': b'{"x": "\xe9"}'}, ['folder/tokenizer_config.json', 'not readable as JSON']),
    'large': ({'config': b'[' + b'[],' * 2**19}, ['folder/config.json', f'at most {2**20} are read']),
    'eos a list': (
        {'tokenizer_config': NAMES | {'eos_token': ['</s>']}},
        ["eos_token is ['</s>']", 'the name of a token'],
    ),
    'eos without content': ({'tokenizer_config': NAMES | {'eos_token': {'x': 1}}}, ["eos_token is {'x': 1}"]),
    'eos unknown': (
        {'tokenizer_config': NAMES | {'eos_token': '</S>'}},
        ["eos_token is '</S>'", "did you mean '</s>'?"],
    ),
    'eos half a surrogate': ({'tokenizer_config': NAMES | {'eos_token': '\ud800'}}, ["'\\ud800'", 'surrogate']),
    'no end': ({'tokenizer_config': {'bos_token': '<s>', 'eos_token': 'end'}}, ["eos_token is 'end'"]),
    'added without content': (
        {'tokenizer_config': NAMES | {'added_tokens_decoder': {'300': {'special': True}}}},
        ['added_tokens_decoder: 300 is', '"content"'],
    ),
    'added is a list': ({'tokenizer_config': NAMES | {'added_tokens_decoder': [1]}}, ['added_tokens_decoder is [1]']),
    'added with a strange id': (
        {'tokenizer_config': NAMES | {'added_tokens_decoder': {'x': {'content': 'new'}}}},
        ["token 'new' has id 'x'"],
    ),
    'added after a gap': (
        {'tokenizer_config': NAMES | {'added_tokens_decoder': {'305': {'content': 'new'}}}},
        ["'new' has id 305 and would get 300", 'without a gap'],
    ),
    'added_tokens.json with a strange id': ({'added_tokens': {'new': [7]}}, ["token 'new' has id [7]"]),
}


@pytest.mark.parametrize('name', BESIDE)
def test_a_mistake_beside_the_tokenizer_is_told(name):
    files, words = BESIDE[name]
    line = refusal(said(**files))
    assert all(word in line for word in words), line


class Twice(dict):
    """An object whose first name is there twice when it is written."""

    def items(self):
        return [*super().items(), *[*super().items()][:1]]


def growing(fields: dict) -> None:
    replace = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'a' * 10}
    fields['normalizer'] = {'type': 'Sequence', 'normalizers': [replace] * 10}


def template(*pieces: str) -> Callable[[dict], None]:
    """A post-processor that writes these names, and the text where one is A."""
    write = lambda name: {'Sequence' if name == 'A' else 'SpecialToken': {'id': name, 'type_id': 0}}
    return lambda fields: fields['post_processor'].update(single=[write(name) for name in pieces])


FAR = b'\4\0\0\0\0\0\0\0' + b'x' * 2000 + b'\0'  # a charsmap that makes 2,000 characters of one
CHARACTERS = {'trie beyond the end': b'\xff\0\0\0abc', 'not UTF-8': b'\4\0\0\0\0\0\0\0\xff\xfe', 'short': b'\1'}
TOKENIZER = {  # changes of a tokenizer.json, and words of the refusal
    'a list': (lambda fields: fields.update(model=[]), ['tokenizer.json', 'not readable by tokenizers']),
    'decoder without a type': (lambda fields: fields.update(decoder={'x': 1}), ['tokenizer.json']),
    'decoder that writes bytes of its own': (lambda fields: fields.update(decoder={'type': 'Fuse'}), ['Fuse', 'ByteLevel']),
    'added token without content': (lambda fields: fields['added_tokens'].append({'id': 300}), ['tokenizer.json', 'content']),
    'text twice': (template('A', '<s>', 'A'), ['post_processor', 'writes the text 2 times', 'supported is once']),
    'text never': (template('<s>'), ['tokenizer.json']),
    'unknown token around texts': (template('A', '<x>'), ['post_processor', "'<x>'"]),
    'growth': (growing, ['normalizers', '100 times as long', 'at most 64']),
    'growth by a pattern that finds nothing': (
        lambda fields: fields.update(normalizer={'type': 'Replace', 'pattern': {'Regex': 'x*'}, 'content': 'y' * 99}),
        ['normalizers', '100 times as long', 'at most 64'],
    ),
    'growth by a prefix of every part': (
        lambda fields: fields.update(normalizer={'type': 'Prepend', 'prepend': 'y' * 1000}),
        ['normalizers', '1,001 times as long'],
    ),
    'growth by characters': (
        lambda fields: fields.update(
            normalizer={'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(FAR).decode()}
        ),
        ['normalizers may make a text 111 times as long', 'at most 64'],
    ),
    'a name twice': (
        lambda fields: fields.update(model=Twice(fields['model'])),
        ["folder/tokenizer.json: an object in it has 'type' twice"],
    ),
    'growth by pre-tokenizers': (
        lambda fields: fields.update(
            pre_tokenizer={'type': 'Sequence', 'pretokenizers': [fields['pre_tokenizer']] * 30}
        ),
        ['normalizers', 'times as long'],
    ),
    'no vocabulary': (
        lambda fields: fields.update(model={'type': 'Unigram', 'unk_id': None, 'vocab': []}, added_tokens=[]),
        ['tokenizer.json'],
    ),
    'merge that its prefix does not fit': (
        lambda fields: fields['model'].update(continuing_subword_prefix='A' * 300),
        ['merge', 'continuing_subword_prefix'],
    ),
} | {
    f'characters {name}': (
        lambda fields, content=content: fields.update(
            normalizer={'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(content).decode()}
        ),
        ['tokenizer.json', 'precompiled_charsmap'],
    )
    for name, content in CHARACTERS.items()
}  # fmt: skip


@pytest.mark.parametrize('name', TOKENIZER)
def test_a_mistake_in_a_tokenizer_json_is_told(name, capfd):
    change, words = TOKENIZER[name]
    line = refusal(changed(change))
    assert all(word in line for word in words), line
    assert capfd.readouterr() == ('', ''), 'nor does the library print anything'


def pieces(*names: bytes, kind: int = 1) -> bytes:
    """A model of sentencepiece of no more than some pieces: the field 1 of each is its name, 3 its kind."""
    messages = [b'\x0a' + bytes([len(name)]) + name + b'\x18' + bytes([kind]) for name in names]
    return b''.join(b'\x0a' + bytes([len(message)]) + message for message in messages)


def long_piece(size: int) -> bytes:
    number = lambda n: bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21])
    message = b'\x0a' + number(size) + b'a' * size
    return b'\x0a' + number(len(message)) + message


MODELS = {  # of sentencepiece, and words of the refusal
    'empty': (b'', ['it has no pieces']),
    'empty piece': (pieces(b'a', b''), ['a piece of 0 characters']),
    'text': (b'no', ['not a readable sentencepiece model']),
    'tiktoken': (b'IQ== 0\nIg== 1\n', ['is in tiktoken’s format, which is not read', 'save_pretrained']),
    'piece that is not UTF-8': (pieces(b'a', b'\xff\xfe'), ['piece 1 is not UTF-8']),
    'piece twice': (pieces(b'a', b'a'), ["piece 'a' is there twice"]),
    'piece beyond the end': (pieces(b'a') + b'\x0a\xff\xff\xff\xff\x0f', ['4294967295 bytes and 0 are left']),
    'number without an end': (b'\x0a' + b'\xff' * 20, ['number', 'no end']),
    'words': (pieces(b'a') + b'\x12\x02\x18\x03', ['model_type is 3']),
    'long piece': (long_piece(2**20), ['a piece of 1048576 characters: from 1 to 256 are read']),
}


@pytest.mark.parametrize('name', MODELS)
def test_a_damaged_model_of_sentencepiece_is_told(name):
    content, words = MODELS[name]
    line = refusal({'tokenizer.model': content})
    assert all(word in line for word in ('folder/tokenizer.model', *words)), line


PARTS = {  # changes of folders of other kinds, and words of the refusal
    'merge of one token': ('gpt2', {'merges.txt': b'#version: 0.2\na b\nabc\n'}, ["merges.txt:3: 'abc'", 'two tokens']),
    'merge of unknown tokens': ('gpt2', {'merges.txt': b'qq zz\n'}, ['not readable by tokenizers', 'qq']),
    'merges not UTF-8': ('gpt2', {'merges.txt': b'\xff'}, ['merges.txt: not UTF-8 at byte 0']),
    'id of the vocabulary': ('qwen2', {'vocab.json': b'{"a": -1}'}, ["vocab.json: token 'a' has id -1"]),
    'class': (
        'gpt2',
        {'tokenizer_config.json': b'{"tokenizer_class": "RobertaTokenizer"}', 'config.json': b'{"model_type": "roberta"}'},
        ['RobertaTokenizer', 'GPT2Tokenizer and Qwen2Tokenizer', 'save_pretrained'],
    ),
    'eos': ('qwen2', {'tokenizer_config.json': b'{"eos_token": "<|end|>"}', 'config.json': b'{"model_type": "qwen2"}',
                      'generation_config.json': b'{}'}, ["eos_token is '<|end|>'"]),
    'sentinels': ('t5', {'tokenizer_config.json': b'{"extra_ids": 1e9}'}, ['extra_ids is 1000000000.0']),
    'no target': ('marian', {'target.spm': None}, ['has source.spm and lacks target.spm']),
    'no vocabulary': ('marian', {'vocab.json': None}, ['has source.spm and lacks vocab.json']),
    'two vocabularies': ('marian', {'tokenizer_config.json': b'{"separate_vocabs": true}'}, ['separate_vocabs is true']),
    'broken model': ('marian', {'target.spm': b'x'}, ['target.spm: not a readable sentencepiece model']),
    'broken piece': ('marian', {'target.spm': pieces(b'a', b'\xff')}, ['target.spm: not a readable sentencepiece model']),
    'no unknown': ('marian', {'vocab.json': b'{"</s>": 0}'}, ["vocab.json: lacks '<unk>'"]),
}  # fmt: skip


@pytest.mark.parametrize('name', PARTS)
def test_a_mistake_in_folders_of_other_kinds_is_told(name):
    folder, changes, words = PARTS[name]
    files = {file: content for file, content in (files_of(folder) | changes).items() if content is not None}
    line = refusal(files)
    assert all(word in line for word in words), line


@pytest.mark.parametrize('name', ['tekken.json', 'qwen.tiktoken', 'tiktoken.model'])
def test_formats_that_are_not_read_are_named_with_the_way_out(name):
    line = refusal({name: b'{}', 'config.json': b'{"model_type": "mistral"}'})
    assert f'folder/{name}: is in ' in line
    assert 'save_pretrained' in line
    assert isinstance(published_tokenizer(said() | {name: b'{}'}, 'folder'), JsonTokenizer)


def test_what_ends_a_text_is_found_otherwise_where_its_name_is_not():
    unknown = NAMES | {'eos_token': '<|im_end|>'}
    mine = published_tokenizer(said(tokenizer_config=unknown, generation_config={'eos_token_id': [7, 8]}), 'folder')
    assert (mine.bos, mine.eos, mine.ends) == (0, 7, {7, 8})
    assert published_tokenizer(said(tokenizer_config={'ends': 5, 'bos_token': '<s>'}), 'folder').ends == {1}


def test_a_vocabulary_without_the_letter_a_keeps_what_stands_before_texts():
    def change(fields: dict) -> None:
        model = fields['model']
        model['vocab'] = {token: i for token, i in model['vocab'].items() if 'a' not in token}
        model['merges'] = [pair for pair in model['merges'] if 'a' not in ''.join(pair)]

    mine = published_tokenizer(changed(change), 'folder')
    assert (mine.prefix, mine.bos, mine.eos) == ((0,), 0, 1)


def test_a_piece_that_only_looks_like_a_byte_is_text():
    files = files_of('llama_bare')
    mine = published_tokenizer({**files, 'added_tokens.json': b'{"<0xZZ>": 360, "<0x+F>": 361}'}, 'folder')
    assert mine.encode('<0xZZ><0x+F>') == [360, 361]
    assert mine.decode([360, 361]) == '<0xZZ><0x+F>'


def test_words_that_no_token_stands_for_are_told():
    model = {'type': 'WordLevel', 'vocab': {'a': 0, '</s>': 1}, 'unk_token': '[UNK]'}
    change = lambda fields: fields.update(model=model, added_tokens=[], post_processor=None)
    mine = published_tokenizer(changed(change, tokenizer_config={'eos_token': '</s>'}), 'folder')
    with pytest.raises(UserError, match=r'the text cannot be encoded: WordLevel error: Missing \[UNK\]'):
        mine.encode('never seen')


def test_ids_beyond_the_embedding_are_refused_where_they_occur():
    mine = published_tokenizer(files_of('llama_chatml'), 'folder', embedded=360)
    assert mine.encode('the dog') == read('llama_chatml').encode('the dog')
    with pytest.raises(UserError, match=r"token '<\|im_start\|>' has id 360, and the model’s embedding has 360 rows"):
        mine.encode_batch(['the dog', 'the <|im_start|>'])
    with pytest.raises(UserError, match=r"token '<\|im_end\|>' has id 361"):
        mine.check([mine.bos, mine.eos])
    assert read('llama_chatml').embedded == read('llama_chatml').vocabulary


DAMAGED = {
    'no JSON': b'x',
    'a prefix beyond the vocabulary': b'{"bos": 1, "eos": 2, "prefix": [99999], "ends": [2]}',
    'ends that is none': b'{"bos": 1, "eos": 2, "prefix": [1], "ends": 5}',
    'nothing': b'{}',
}


@pytest.mark.parametrize('folder', ['llama_bare', 'marian'])
@pytest.mark.parametrize('name', DAMAGED)
def test_a_run_whose_special_ids_are_damaged_is_told(name, folder, tmp_path):
    read(folder).save(tmp_path)
    (tmp_path / 'tokenizer.special.json').write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=r'tokenizer\.special\.json'):
        load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.special.json').unlink()
    with pytest.raises(UserError, match=r'lacks tokenizer\.special\.json'):
        load_tokenizer(tmp_path)


def test_a_file_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    read('llama_bare').save(tmp_path)

    def refuse(path):  # as a file without permission does to all but root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(UserError, match=r'tokenizer\.json: Permission denied'):
        load_tokenizer(tmp_path)
