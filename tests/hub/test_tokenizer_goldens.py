"""Tokenizers as they are published give transformers' ids and texts, in the folders of make_tokenizer_goldens.py."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from weft.data.tokenizer import Tokenizer
from weft.hub.published_tokenizer import has_tokenizer, load_tokenizer, published_tokenizer

GOLDEN = json.loads((Path(__file__).parent / 'goldens' / 'tokenizers.json').read_text(encoding='utf-8'))
LINES: list[str] = GOLDEN['lines']
FOLDERS = list(GOLDEN['cases'])


def content(said: Any) -> bytes:
    """A file of a golden folder."""
    if isinstance(said, dict) and said.keys() == {'file'}:
        return content(GOLDEN['files'][said['file']])
    if isinstance(said, dict) and said.keys() == {'base64'}:
        return base64.b64decode(said['base64'])
    return said.encode() if isinstance(said, str) else json.dumps(said).encode()


def files_of(folder: str) -> dict[str, bytes]:
    return {name: content(said) for name, said in GOLDEN['cases'][folder]['files'].items()}


@functools.cache
def read(folder: str) -> Tokenizer:
    return published_tokenizer(files_of(folder), folder)


@pytest.mark.parametrize('folder', FOLDERS)
def test_ids_texts_and_end_are_those_of_transformers(folder):
    mine, golden = read(folder), GOLDEN['cases'][folder]
    assert mine.eos == golden['eos']
    for line, ids, text, found in zip(LINES, golden['ids'], golden['texts'], mine.encode_batch(LINES), strict=True):
        assert [*mine.prefix, *found, *mine.suffix] == ids, line
        assert mine.decode(ids, whole=True) == text, line
        stream = mine.stream(whole=True)
        assert ''.join(stream.push([i]) for i in ids) + stream.finish() == text, line


@pytest.mark.parametrize('folder', FOLDERS)
def test_text_that_goes_on_is_the_rest_of_the_whole_and_names_are_shown_on_demand(folder):
    mine, golden = read(folder), GOLDEN['cases'][folder]
    if folder == 'marian':
        return  # its whole texts lack the spaces around them
    for ids in golden['ids']:
        for at in range(1, len(ids)):
            before, whole = (mine.decode(part, whole=True) for part in (ids[:at], ids))
            if before and '\ufffd' not in before:
                assert before + mine.decode(ids[at:]) == whole
        shown = mine.decode(ids, special=True)
        assert all(mine.name_of(i) in shown for i in ids if not mine.pieces[i] and i in mine.ends)


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_run_keeps_it(folder, tmp_path):
    mine = read(folder)
    mine.save(tmp_path)
    assert has_tokenizer(mine.files())
    again = load_tokenizer(tmp_path)
    assert type(again) is type(mine)
    assert again.encode_batch(LINES) == mine.encode_batch(LINES)
    for name in ('bos', 'eos', 'prefix', 'suffix', 'ends', 'pieces', 'sha256'):
        assert getattr(again, name) == getattr(mine, name)


def test_targets_of_marian_are_read_by_their_own_model():
    mine, golden = read('marian'), GOLDEN['cases']['marian']
    assert [[*ids, mine.eos] for ids in mine.encode_targets(LINES)] == golden['targets']
    assert golden['targets'] != golden['ids']


def test_several_ends_and_names_of_tokens():
    assert read('qwen2').ends == {298, 300}
    assert read('gemma').ends == {1, 6}
    mine = read('llama_chatml')
    assert (mine.name_of(mine.eos), mine.id_of('<|im_start|>'), mine.id_of('<|im'), mine.name_of(10**6)) == (
        '<|im_end|>',
        mine.eos - 1,
        None,
        '',
    )


@pytest.mark.parametrize(
    ('folder', 'text', 'twice'),
    [
        ('llama_chatml', '<s>the', True),
        ('llama_chatml', 'the <s>', False),
        ('llama_chatml', '', False),
        ('llama_bare', '<s>the', False),  # nothing is put before it
        ('json_template_PreTrainedTokenizerFast_False', '<s>', True),
        ('t5', '</s>', False),
    ],
)
def test_a_prompt_that_begins_with_the_token_before_it_is_known(folder, text, twice):
    assert read(folder).starts_twice(text) is twice
