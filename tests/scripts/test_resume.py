"""A run that is interrupted ends as one that never was; and it goes on where it stopped, on another mesh too."""

import functools
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data.prepare import load as load_data
from sharding.mesh import make_mesh
from tests.scripts.runs import rows, run, start, workplace
from training import config as configs
from training.checkpoint import Checkpoints
from training.loop import restore
from training.step import init

STEPS = 40


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('resume'))


@pytest.fixture(scope='module')
def undisturbed(place) -> Path:
    run(place, 'train', 'tiny.yaml', 'name=undisturbed')
    return place


def final(place: Path, name: str, mesh: str | None = None, step: int = STEPS):
    """All arrays of a run's checkpoint, gathered."""
    folder = place / 'runs' / name
    config = configs.load(folder / 'config.yaml', [f'mesh={mesh}'] if mesh else [])
    with jax.set_mesh(make_mesh(config.mesh)):
        state = restore(Checkpoints(folder), step, config)
        for leaf in jax.tree.leaves((state.model, state.optimizer)):
            assert leaf.sharding.mesh == jax.sharding.get_mesh()
        return jax.tree.map(np.asarray, (state.model, state.optimizer, state.step, jax.random.key_data(state.key)))


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_killed_at_random_moments_ends_bit_equal(undisturbed):
    seed = random.SystemRandom().randrange(10**6)
    moments, kills = random.Random(seed), 0
    for _ in range(4):
        with start(undisturbed, 'train', 'tiny.yaml', 'name=killed') as process:
            log = undisturbed / 'runs' / 'killed' / 'metrics.jsonl'
            begun = log.stat().st_mtime_ns if log.exists() else 0
            deadline = time.time() + 200
            # From the moment its steps begin: before, there is nothing to lose.
            while (
                process.poll() is None
                and time.time() < deadline
                and not (log.exists() and log.stat().st_mtime_ns > begun and log.stat().st_size)
            ):
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 1.0))
            kills += process.poll() is None
            process.kill()
            process.communicate()
    assert kills >= 1, 'at least one kill met a run at work'
    run(undisturbed, 'train', 'tiny.yaml', 'name=killed')
    assert same(final(undisturbed, 'undisturbed'), final(undisturbed, 'killed')), f'seed {seed}'
    assert [row['step'] for row in rows(undisturbed, 'killed')] == list(range(1, STEPS + 1))
    clean = lambda name: [
        {key: row[key] for key in row if key != 'tokens_per_second'} for row in rows(undisturbed, name)
    ]
    assert clean('killed') == clean('undisturbed')


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_before_leaving(undisturbed, number, code):
    name = f'signal{code}'
    with start(undisturbed, 'train', 'tiny.yaml', f'name={name}', 'checkpoint.every=1000') as process:
        log = undisturbed / 'runs' / name / 'metrics.jsonl'
        deadline = time.time() + 200
        while process.poll() is None and time.time() < deadline and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    (step,) = Checkpoints(undisturbed / 'runs' / name).steps()
    assert 1 <= step < STEPS, 'it stopped in the middle'
    assert [row['step'] for row in rows(undisturbed, name)] == list(range(1, step + 1))
    run(undisturbed, 'train', 'tiny.yaml', f'name={name}', 'checkpoint.every=1000')
    assert same(final(undisturbed, 'undisturbed'), final(undisturbed, name))


def test_another_mesh_restores_bit_equal_and_goes_on_with_the_next_rows(undisturbed):
    folder = undisturbed / 'runs' / 'moved'
    run(undisturbed, 'train', 'tiny.yaml', 'name=moved', 'training.steps=20')
    there = final(undisturbed, 'moved', step=20)
    assert same(there, final(undisturbed, 'moved', '{data: 1, expert: 4, tensor: 2}', step=20))
    meta = Checkpoints(folder).meta(20)
    assert meta['next_sample'] == 20 * 8
    dataset = load_data(folder)
    n = np.concatenate([dataset.train.row_ids(0, step, 8) for step in range(STEPS)])
    assert len(set(n[: len(dataset.train)])) == min(len(n), len(dataset.train)), 'no row comes twice within an epoch'
    run(undisturbed, 'train', 'tiny.yaml', 'name=moved', 'training.steps=24', 'mesh={data: 1, expert: 4, tensor: 2}')
    # The same, never interrupted: the losses tell whether the data went on where it stopped.
    run(undisturbed, 'train', 'tiny.yaml', 'name=stayed', 'training.steps=24', 'mesh={data: 1, expert: 4, tensor: 2}')
    moved, stayed = (rows(undisturbed, name) for name in ('moved', 'stayed'))
    assert [row['step'] for row in moved] == list(range(1, 25))
    # Up to the warm-up's end and a little beyond the schedules are alike; data order shows at once.
    np.testing.assert_allclose([r['loss'] for r in moved[:3]], [r['loss'] for r in stayed[:3]], rtol=1e-5)
    assert moved[-1]['tokens'] == stayed[-1]['tokens'], 'the same number of real tokens: the same rows'


def test_initial_state_does_not_depend_on_what_is_there(undisturbed):
    config = configs.load(undisturbed / 'runs' / 'undisturbed' / 'config.yaml')
    with jax.set_mesh(make_mesh(config.mesh)):
        fresh = jax.jit(functools.partial(init, config))()
        assert int(fresh.step) == 0
    assert not same(final(undisturbed, 'undisturbed')[0], jax.tree.map(np.asarray, fresh.model)), (
        'training moved the weights'
    )
