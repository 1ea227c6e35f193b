"""Texts as vectors: pooled hidden states, on any mesh; what the published folder says of pooling; one row a line."""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import tokenizers

from tests.families import cases, folders
from tests.families.loading import generated, read
from tests.families.test_families import whole
from weft.inference.embed import MODULES, POOLING, embed, published_pooling, token_rows
from weft.inference.generate import generate
from weft.inference.run import open_run
from weft.inference.sampling import Sampling
from weft.runtime.errors import UserError
from weft.scripts import score as script
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config
from weft.training.importing import import_run

WORDS = ['[PAD]', '[CLS]', '[SEP]', '[UNK]', *['the', 'of', 'bank', 'river', 'money', 'house', 'dog', 'runs']]
TEXTS = ['the bank of the river', 'money', '', 'dog runs house', 'the ' * 70 + 'dog']
MEAN = {'pooling_mode_mean_tokens': True, 'pooling_mode_cls_token': False, 'pooling_mode_max_tokens': False}


def tokenizer() -> bytes:
    """Words, with a token before and after each text, as BERT's are."""
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, '[UNK]'))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.decoder = tokenizers.decoders.WordPiece()
    ends = [('[CLS]', 1), ('[SEP]', 2)]
    found.post_processor = tokenizers.processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=ends)
    found.enable_truncation(4)
    found.enable_padding(length=9)
    return found.to_str().encode()


def published(place: Path) -> Path:
    """A headless BERT's folder with a tokenizer, as sentence-transformers writes it."""
    jax.devices()
    source = folders.write(place, cases.CASES['bert-headless'], folders.named('bert-headless'))
    (source / 'tokenizer.json').write_bytes(tokenizer())
    (source / 'tokenizer_config.json').write_text('{"cls_token": "[CLS]", "sep_token": "[SEP]"}')
    kinds = [{'type': f'sentence_transformers.models.{kind}'} for kind in ('Transformer', 'Pooling', 'Normalize')]
    (source / MODULES).write_text(json.dumps(kinds))
    (source / POOLING).parent.mkdir()
    (source / POOLING).write_text(json.dumps(MEAN))
    return source


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('embed')
    import_run(published(folder / 'source'), folder / 'runs' / 'bert', MeshConfig(data=2, tensor=2), say=str)
    return folder


def hidden(rows: list[list[int]]) -> list[np.ndarray]:
    """What transformers' goldens hold the model to, of each row alone, on one device."""
    family, c = read(cases.CASES['bert-headless'])
    tokens_BT = np.zeros((len(rows), 96), np.int32)
    for number, ids in enumerate(rows):
        tokens_BT[number, : len(ids)] = ids
    live_BT = np.arange(96)[None] < np.array([len(ids) for ids in rows])[:, None]
    with jax.set_mesh(make_mesh(MeshConfig())):
        x_BTD = whole(generated('bert-headless', family, c, cases.SEED), tokens_BT, live_BT)
    return [x_TD[: len(ids)] for x_TD, ids in zip(x_BTD, rows, strict=True)]


def test_embeddings_are_pooled_hidden_states_of_unit_length_on_any_mesh(place):
    opened = open_run(place / 'runs' / 'bert')
    rows = token_rows(opened.tokenizer, TEXTS)
    assert rows[0] == [1, 4, 6, 5, 4, 7, 2]
    assert rows[2] == [1, 2]
    assert opened.tokenizer.suffix == (2,)
    of = {'mean': lambda x_TD: x_TD.mean(0), 'cls': lambda x_TD: x_TD[0], 'last': lambda x_TD: x_TD[-1]}
    expected = {name: np.stack([pool(x_TD) for x_TD in hidden(rows)]) for name, pool in of.items()}
    with jax.set_mesh(opened.mesh):
        for name, wanted in expected.items():
            found = embed(opened, TEXTS, name)
            np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=-1, keepdims=True), atol=1e-6)
        assert np.array_equal(embed(opened, TEXTS), embed(opened, TEXTS, 'mean')), 'as the folder says'
        with pytest.raises(UserError, match=r'--pooling max: no such pooling; there are mean, cls, last'):
            embed(opened, TEXTS, 'max')
        with pytest.raises(UserError, match=r'text 2 has 203 tokens.* context is 192: cut it'):
            embed(opened, ['the', 'the ' * 201])


SAID = {  # what 1_Pooling/config.json holds: which pooling that is, or what is told
    '{"pooling_mode_cls_token": true}': 'cls',
    '{"pooling_mode": "lasttoken", "include_prompt": true}': 'last',
    '{"pooling_mode_max_tokens": true}': r'max_tokens is not supported; say one with --pooling',
    '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}': r'mean_tokens and cls_token is not supported',
    '{}': r'no pooling at all is not supported',
    '[': r'1_Pooling/config.json: not readable as JSON',
}


@pytest.mark.parametrize('said', SAID)
def test_the_published_pooling(said, place, tmp_path):
    (tmp_path / 'source' / '1_Pooling').mkdir(parents=True)
    (tmp_path / 'source' / POOLING).write_text(said)
    run = mock.Mock(folder=tmp_path)
    if SAID[said] in ('cls', 'last'):
        assert published_pooling(run) == SAID[said]
        (tmp_path / 'source' / MODULES).write_text('[{"type": "sentence_transformers.models.Dense"}]')
        with pytest.raises(UserError, match=r'modules.json: names Dense, which is not supported; --pooling mean, cls'):
            published_pooling(run)
    else:
        with pytest.raises(UserError, match=SAID[said]):
            published_pooling(run)


def called(*arguments: str | Path) -> None:
    with mock.patch.object(sys, 'argv', ['score.py', *map(str, arguments)]):
        script.main()


def test_score_writes_embeddings_a_line_each_and_hidden_states(place, capsys):
    run, lines, out = place / 'runs' / 'bert', place / 'lines.txt', place / 'out.npy'
    lines.write_text('\n'.join(TEXTS[:4]) + '\n')
    called(run, '--texts', lines, '--embeddings', out)
    vectors = np.load(out, allow_pickle=False)
    assert (vectors.shape, vectors.dtype) == ((4, 64), np.float32)
    np.testing.assert_allclose((vectors**2).sum(1), 1, rtol=1e-6)
    np.save(place / 'ids.npy', np.array([[1, 4, 6, 5, 4, 7, 2]], np.int32))
    called(run, '--tokens', place / 'ids.npy', '--logits', out)
    x_TD = np.load(out, allow_pickle=False)[0]
    np.testing.assert_allclose(x_TD.mean(0) / np.linalg.norm(x_TD.mean(0)), vectors[0], atol=1e-6)
    assert 'last hidden states, float32 [1, 7, 64]' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'give --tokens FILE and --logits FILE, or .*; given: --tokens, --embeddings'):
        called(run, '--tokens', place / 'ids.npy', '--embeddings', out)
    lines.write_bytes(b'caf\xe9')
    with pytest.raises(UserError, match=r'byte 3 is 0xe9'):
        called(run, '--texts', lines, '--embeddings', out)


def test_a_model_without_a_head_says_that_it_neither_decodes_nor_learns(place):
    opened = open_run(place / 'runs' / 'bert')
    with (
        jax.set_mesh(opened.mesh),
        pytest.raises(UserError, match=r'model.head is null: decoding needs an LM head, which this model has not'),
    ):
        generate(opened.model, opened.tokenizer, ['the'], Sampling(), 2, context=opened.context)
    with pytest.raises(UserError, match=r'model.head is null: training needs an LM head'):
        load_config(place / 'runs' / 'bert' / 'config.yaml').check_sizes()
