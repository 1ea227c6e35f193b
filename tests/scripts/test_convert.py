"""A run that is exported and imported again is the same model, to be decoded, scored and trained on."""

import json

import numpy as np
import pytest

from model.config import ModelConfig
from scripts.score import check_ids
from sharding.errors import UserError
from tests.scripts.runs import everything, rows, run, workplace

DENSE = ('model.moe=null', 'mesh.expert=1', 'mesh.data=1', 'training.steps=2', 'training.learning_rate=1e-3')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp('convert'))
    run(folder, 'train', 'tiny.yaml', *DENSE)
    run(folder, 'convert', 'export', 'runs/tiny', 'published')
    run(folder, 'convert', 'import', 'published', 'runs/again', '--mesh', 'data=2,expert=2')
    return folder


def test_the_same_text_and_logits(place):
    np.save(place / 'ids.npy', np.random.default_rng(0).integers(0, 300, (3, 32)).astype(np.int32))
    found = []
    for name in ('tiny', 'again'):
        done = run(place, 'decode', f'runs/{name}', '--prompt', 'def f1', '--max-new-tokens', '8', '--json')
        run(place, 'score', f'runs/{name}', '--tokens', 'ids.npy', '--logits', 'out.npy')
        found.append((json.loads(done.stdout)['tokens'], np.load(place / 'out.npy', allow_pickle=False)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5 * np.abs(found[0][1]).max())


def test_training_begins_from_imported_weights(place):
    run(place, 'train', 'runs/again/config.yaml', 'data.source=text', 'training.steps=2', 'training.batch=8')
    ours, theirs = rows(place, 'tiny'), rows(place, 'again')
    assert theirs[0]['loss'] < ours[0]['loss'] - 0.01, 'it has learnt something already'
    tokenizers = [(place / 'runs' / 'again' / name) for name in ('tokenizer.json', 'checkpoints/2/tokenizer.json')]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes() == (place / 'published/tokenizer.json').read_bytes()
    done = run(place, 'train', 'runs/again/config.yaml', 'model.mlp_dim=64', code=2)
    assert 'model.mlp_dim is 64 and was 32' in done.stderr


@pytest.mark.parametrize('more', [['name=other'], ['--fresh'], ['--runs', 'elsewhere']], ids=' '.join)
def test_an_imported_model_never_begins_from_random_weights_unsaid(place, more):
    before = everything(place)
    done = run(place, 'train', 'runs/again/config.yaml', *more, code=2)
    assert 'is an imported model' in done.stderr
    assert everything(place).keys() == before.keys()


MISTAKES = {
    'no folder': (['import', 'nowhere', 'runs/new'], ['nowhere', 'no such folder']),
    'a run that is there': (['import', 'published', 'runs/tiny'], ['runs/tiny', 'exists already']),
    'a folder that is there': (['export', 'runs/tiny', 'published'], ['published', 'exists already']),
    'no run': (['export', 'runs/none', 'new'], ['runs/none', 'not a run']),
    'a name that is none': (['import', 'published', 'runs/a b'], ["'a b'", "'a-b'"]),
    'a mesh that does not fit': (['import', 'published', 'runs/new', '--mesh', 'tensor=3'], ['mesh.tensor is 3']),
    'no such family': (['export', 'runs/tiny', 'new', '--family', 'lama'], ['lama', "did you mean 'llama'"]),
    'another family': (['export', 'runs/tiny', 'new', '--family', 'gpt2'], ['gpt2: ', 'activation_function']),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(place, name):
    arguments, words = MISTAKES[name]
    before = everything(place)
    done = run(place, 'convert', *arguments, code=2)
    assert everything(place).keys() == before.keys()
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line


def test_rows_longer_than_the_table_of_positions_are_not_scored():
    c = ModelConfig(vocabulary=9, layers=1, model_dim=8, heads=1, mlp_dim=8, positions='learned', max_positions=16)
    check_ids('--tokens', 'ids.npy', np.zeros((1, 16), np.int32), 0, c)
    with pytest.raises(UserError, match='rows of 17 tokens: this run has 16 positions'):
        check_ids('--tokens', 'ids.npy', np.zeros((1, 17), np.int32), 0, c)
