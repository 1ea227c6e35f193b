"""A user's mistake: one clear line, exit code 2, and nothing touched."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.scripts.runs import everything, refused, run, workplace


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = workplace(tmp_path_factory.mktemp('mistakes'))
    run(folder, 'train', 'tiny.yaml', 'training.steps=2')
    (folder / 'empty').mkdir()
    (folder / 'broken.txt').write_bytes(b'fine so far\n\xff\xfe not any more')
    (folder / 'void.txt').write_bytes(b'')
    (folder / 'bare').mkdir(parents=True)
    (folder / 'runs' / 'bare').mkdir()
    for name in ('config.yaml', 'tokenizer.model'):
        shutil.copy(folder / 'runs' / 'tiny' / name, folder / 'runs' / 'bare' / name)
    return folder


def mistake(place: Path, script: str, *arguments: str) -> str:
    """The one line that it prints."""
    with untouched(place):
        done = run(place, script, *arguments, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith('error: ')
    return lines[0]


@contextlib.contextmanager
def untouched(place: Path) -> Iterator[None]:
    """Nothing in the folder changes meanwhile; a lock beside a run may have come and gone."""
    facts = lambda: {path: None if path == 'runs' else found for path, found in everything(place).items()}
    before = facts()
    yield
    assert facts() == before, 'nothing was touched'


@pytest.fixture
def here(place) -> Callable[..., str]:
    """As `mistake`, in this process."""

    def mistake_here(script: str, *arguments: str) -> str:
        with untouched(place):
            return refused(place, script, *arguments)

    return mistake_here


TRAIN = {
    'unknown key': (['training.stepz=3'], ["'training.stepz'", "did you mean 'training.steps'"]),
    'unknown section': (['modle.layers=3'], ["'modle'", "did you mean 'model'"]),
    'wrong type': (['training.steps=many'], ['training.steps', '"many"', 'integer']),
    'true is not a number': (['training.batch=true'], ['training.batch', 'integer']),
    'name that leaves runs': (['name=../elsewhere'], ['../elsewhere', "'elsewhere'"]),
    'heads': (
        ['name=n', 'mesh.tensor=3', 'training.sequence_length=36'],
        ['mesh.tensor is 3', 'model.attention.heads is 4', 'nearest meshes that work'],
    ),
    'experts': (
        ['name=n', 'mesh.expert=8', 'mesh.data=1', 'mesh.tensor=1'],
        ['mesh.expert is 8', 'model.moe.experts is 4', 'nearest meshes'],
    ),
    'batch': (['name=n', 'training.batch=6'], ['training.batch is 6', 'mesh.data × mesh.expert is 4']),
    'too large for the machine': (
        ['name=n', 'model.model_dim=65536'],
        ['a step of this run needs', 'GiB of it activations', 'shared by 8 simulated devices', '--force'],
    ),
    'no such data': (['name=n', 'data.source=nowhere'], ['nowhere']),
    'empty folder': (['name=n', 'data.source=empty'], ['empty']),
    'empty file': (['name=n', 'data.source=void.txt'], ['void.txt']),
    'not UTF-8': (['name=n', 'data.source=broken.txt'], ['broken.txt', '12']),
    'another model than the run has': (['model.layers=3'], ['model.layers', '3', '2', '--fresh']),
    'fewer steps than taken': (['training.steps=1'], ['training.steps is 1', '2']),
    'fresh with bad data': (['--fresh', 'data.source=nowhere'], ['nowhere']),
    'no vocabulary': (['name=n', 'data.vocabulary=null'], ['data.vocabulary is null and model.vocabulary too', '4096']),
    'vocabulary smaller than the tokenizer': (['name=n', 'model.vocabulary=100'], ['model.vocabulary is 100', '320']),
    'only dense layers beside experts': (
        ['name=n', 'model.moe.first_dense_layers=2'],
        ['first_dense_layers is 2', 'at most 1'],
    ),
    'not a number': (['name=n', 'optimizer.learning_rate=.nan'], ['nan']),
    'far too many devices': (['name=n', 'mesh.data=20000'], ['80,000 devices', 'at most 1,024']),
    'kv heads': (['name=n', 'model.attention.kv_heads=3'], ['model.attention.kv_heads is 3', 'nearest that works']),
}


# Of each step on the way to training one, as a user sees it.
AS_A_PROCESS = ('unknown key', 'heads', 'too large for the machine', 'fresh with bad data', 'fewer steps than taken')


@pytest.mark.parametrize('name', TRAIN)
def test_train(place, here, name):
    arguments, words = TRAIN[name]
    line = (
        mistake(place, 'train', 'tiny.yaml', *arguments)
        if name in AS_A_PROCESS
        else here('train', 'tiny.yaml', *arguments)
    )
    assert all(word in line for word in words), line


def test_no_such_config(here):
    assert 'tinny.yaml' in (line := here('train', 'tinny.yaml'))
    assert "did you mean 'tiny.yaml'" in line


DECODE = {
    'negative temperature': (
        ['runs/tiny', '--prompt', 'x', '--temperature', '-1'],
        ['temperature is -1.0', 'at least 0'],
    ),
    'long prompt': (['runs/tiny', '--prompt', 'y ' * 100], ['prompt 1', 'the context is 32']),
    'no such run': (['runs/tony', '--prompt', 'x'], ['runs/tony', "did you mean 'runs/tiny'"]),
    'no checkpoint': (['runs/bare', '--prompt', 'x'], ['runs/bare', 'no checkpoint']),
    'mesh that does not divide': (
        ['runs/tiny', '--prompt', 'x', '--mesh', 'tensor=3'],
        ['mesh.tensor is 3', 'nearest meshes'],
    ),
    'no prompt': (['runs/tiny'], ['--prompt']),
}


@pytest.mark.parametrize('name', DECODE)
def test_decode(place, here, name):
    arguments, words = DECODE[name]
    line = mistake(place, 'decode', *arguments) if name == 'no such run' else here('decode', *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'altered'])
def test_damaged_checkpoint(place, here, damage):
    folder = place / 'runs' / damage
    shutil.copytree(place / 'runs' / 'tiny', folder)
    (step,) = (folder / 'checkpoints' / '2',)
    victim = max((path for path in (step / 'model').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    if damage == 'missing':
        victim.unlink()
    elif damage == 'truncated':
        victim.write_bytes(content[:-1])
    else:
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for script, arguments in (
        ('decode', [f'runs/{damage}', '--prompt', 'x']),
        ('train', ['tiny.yaml', f'name={damage}', 'training.steps=3']),
    ):
        line = mistake(place, script, *arguments) if damage == 'altered' else here(script, *arguments)
        assert victim.name in line, line


def test_score_wants_ids_of_the_vocabulary(place, here):
    np.save(place / 'ids.npy', np.array([[1, 2, 99999]], np.int32))
    assert '99999' in mistake(place, 'score', 'runs/tiny', '--tokens', 'ids.npy', '--logits', 'out.npy')
    (place / 'pickle.npy').write_bytes(b'\x93NUMPY not really')
    assert 'pickle.npy' in here('score', 'runs/tiny', '--tokens', 'pickle.npy', '--logits', 'out.npy')


def test_evaluate_names_the_missing_path(here):
    assert 'nowhere.txt' in here('evaluate', 'runs/tiny', '--data', 'nowhere.txt')


def test_evaluate_of_a_run_without_its_data(here):
    assert 'runs/bare/data: not there; a run that scripts/train.py made holds its data' in here('evaluate', 'runs/bare')


def test_out_of_memory_says_what_used_it_and_what_to_change(place):
    done = run(
        place,
        'train',
        'tiny.yaml',
        'name=huge',
        'model.layers=1',
        'model.moe=null',
        'model.mlp.dim=40000000000',
        '--force',
        code=1,
    )
    (line,) = done.stderr.strip().splitlines()
    assert all(
        word in line
        for word in ('weights', 'GiB', 'optimizer state', 'training.batch', 'compute.remat=block', 'mesh.data')
    ), line


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(place):
    done = run(place, 'train', 'tiny.yaml', 'name=steep', 'optimizer.learning_rate=1e38', 'checkpoint.every=1', code=1)
    (line,) = done.stderr.strip().splitlines()
    assert 'optimizer.learning_rate' in line
    steps = sorted(
        int(path.name) for path in (place / 'runs' / 'steep' / 'checkpoints').iterdir() if path.name.isdecimal()
    )
    assert f'step {steps[-1] + 1} ' in line, (line, steps)
    # What was saved is sound: its loss and gradient were numbers.
    assert 'temperature' not in run(place, 'decode', 'runs/tiny', '--prompt', 'def').stderr


def test_scores_and_evaluation_of_a_run(place):
    ids = np.random.default_rng(0).integers(0, 300, (3, 17)).astype(np.int32)
    np.save(place / 'good.npy', ids)
    for name, mesh in (('a', 'tensor=2'), ('b', 'data=2,expert=2')):
        run(place, 'score', 'runs/tiny', '--tokens', 'good.npy', '--logits', f'{name}.npy', '--mesh', mesh)
    a, b = (np.load(place / f'{name}.npy', allow_pickle=False) for name in 'ab')
    assert a.shape == (3, 17, 320)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    figures = json.loads(run(place, 'evaluate', 'runs/tiny', '--data', 'text/3.py', 'text/4.py', '--json').stdout)
    size = sum((place / 'text' / f'{n}.py').stat().st_size for n in (3, 4))
    assert figures['bytes'] == size
    assert figures['bits_per_byte'] == pytest.approx(figures['nats_per_token'] * figures['tokens'] / np.log(2) / size)
    assert 0 < figures['xz_given_training_bits_per_byte'] < figures['xz_bits_per_byte']


def test_decoding_answers_in_json(place):
    prompts = ['def f1', 'return', 'é😀']
    arguments = [part for prompt in prompts for part in ('--prompt', prompt)]
    done = run(place, 'decode', 'runs/tiny', *arguments, '--max-new-tokens', '5', '--json')
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one['prompt'] for one in found] == prompts
    for one in found:
        assert one.keys() == {'prompt', 'text', 'tokens', 'finish_reason', 'tokens_per_second'}
        assert len(one['tokens']) <= 5
