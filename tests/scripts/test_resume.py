"""A run that is interrupted ends as one that never was; and it goes on where it stopped, on another mesh too."""

import functools
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.scripts.runs import rows, run, start, workplace
from weft.data.prepare import load as load_data
from weft.sharding.mesh import make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.training import config as configs
from weft.training.state import restore
from weft.training.step import init

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
    config = configs.load_config(folder / 'config.yaml', [f'mesh={mesh}'] if mesh else [])
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
    for _ in range(3):
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
    wanted = {
        'step',
        'loss',
        'grad_norm',
        'learning_rate',
        'tokens',
        'tokens_per_second',
        'router.entropy',
        'router.dropped_share',
    }
    assert all(wanted <= row.keys() and row['tokens_per_second'] > 0 for row in rows(undisturbed, 'killed'))


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143)])  # others: test_signals.py
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
    folder, mesh = undisturbed / 'runs' / 'moved', '{data: 1, expert: 4, tensor: 2}'
    run(undisturbed, 'train', 'tiny.yaml', 'name=stayed', 'checkpoint.every=30')
    shutil.copytree(undisturbed / 'runs' / 'stayed', folder)
    shutil.rmtree(folder / 'checkpoints' / str(STEPS))
    assert same(final(undisturbed, 'moved', step=30), final(undisturbed, 'moved', mesh, step=30))
    assert Checkpoints(folder).meta(30)['next_sample'] == 30 * 8
    run(undisturbed, 'train', 'tiny.yaml', 'name=moved', 'checkpoint.every=30', f'mesh={mesh}')
    stayed, moved = (rows(undisturbed, name) for name in ('stayed', 'moved'))
    assert [row['step'] for row in moved] == list(range(1, STEPS + 1))
    tell = lambda found: [(row['tokens'], row['loss'], row['grad_norm']) for row in found[30:]]
    np.testing.assert_allclose(tell(moved), tell(stayed), rtol=1e-5)
    # The test can fail: the rows of the first steps would give other losses.
    data = load_data(folder).train
    ids = np.concatenate([data.row_ids(0, step, 8) for step in range(STEPS)])
    assert len(set(ids[: len(data)])) == min(len(ids), len(data)), 'no row comes twice within an epoch'


def test_initial_state_does_not_depend_on_what_is_there(undisturbed):
    config = configs.load_config(undisturbed / 'runs' / 'undisturbed' / 'config.yaml')
    with jax.set_mesh(make_mesh(config.mesh)):
        fresh = jax.jit(functools.partial(init, config))()
        assert int(fresh.step) == 0
    assert not same(final(undisturbed, 'undisturbed')[0], jax.tree.map(np.asarray, fresh.model)), (
        'training moved the weights'
    )
