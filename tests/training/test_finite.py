"""Numbers that are not finite never get out: not into a checkpoint, not out of one, not into what is told."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.scripts.runs import workplace
from weft.inference.run import open_run
from weft.inference.sampling import NO_TOKEN, RowSampling, check_token, choose
from weft.runtime.errors import Diverged, MachineError, UserError
from weft.scripts.entry import as_json
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.training import config as configs
from weft.training import finite, loop
from weft.training.config import RunConfig
from weft.training.exporting import export_run
from weft.training.finite import not_finite
from weft.training.importing import import_run
from weft.training.loop import train
from weft.training.state import items, restore, saved_config

STEPS, EVERY = 6, 2
SMALL = (
    'model.layers=1',
    'model.moe=null',
    'training.batch=4',
    'metrics.validation_rows=2',
    'metrics.validate_every=100',
)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('finite'))


@pytest.fixture(scope='module')
def sound(place) -> RunConfig:
    """A run that went well."""
    config = of(place, 'sound')
    assert train(config, place / 'runs') == 0
    return config


def of(place: Path, name: str, *more: str) -> RunConfig:
    source = f'data.source={place / "text"}'
    schedule = (f'training.steps={STEPS}', f'checkpoint.every={EVERY}')
    return configs.load_config(place / 'tiny.yaml', [f'name={name}', 'mesh={}', source, *SMALL, *schedule, *more])


def poisoned(tree, value: float = math.nan):
    """The tree with one number of its first array replaced."""
    leaves, structure = jax.tree.flatten(tree)
    at = jnp.zeros(leaves[0].shape, bool).at[(0,) * leaves[0].ndim].set(True)
    leaves[0] = jnp.where(jax.reshard(at, jax.typeof(leaves[0]).sharding.spec), value, leaves[0])
    return jax.tree.unflatten(structure, leaves)


def diverges(monkeypatch, config: RunConfig, runs: Path, at: int, part: str, value: float = math.nan) -> str:
    """What a run says whose state is no number after step `at`."""
    row_of = loop.Run.row

    def poisoning(run, step, found):
        if step == at:
            run.state = run.state._replace(**{part: poisoned(getattr(run.state, part), value)})
        return row_of(run, step, found)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, 'row', poisoning)
        with pytest.raises(Diverged) as raised:
            train(config, runs)
    return str(raised.value)


@pytest.mark.parametrize('data', [1, 2])
@pytest.mark.parametrize(
    ('at', 'part', 'says', 'left'),
    [
        (1, 'model', 'step 2 has loss nan', []),
        (3, 'model', 'step 4 has loss nan', [2]),
        (4, 'optimizer', 'after step 4 optimizer/', [2]),
        (STEPS, 'optimizer', f'after step {STEPS} optimizer/', [2, 4]),
        (STEPS, 'model', f'validation after step {STEPS}: the loss of rows 0 to 3 is nan', [2, 4]),
    ],
)
def test_a_state_that_is_no_number_is_never_saved(monkeypatch, place, at, part, says, left, data):
    name = f'at-{at}-{data}'
    said = diverges(monkeypatch, of(place, name, f'mesh.data={data}'), place / 'runs', at, part)
    assert said.startswith(says)
    assert (f'checkpoint {left[-1]}, from before, is finite' if left else 'nothing was saved before') in said
    assert '--fresh optimizer.learning_rate=0.0033' in said, 'a continuation takes the same steps'
    assert Checkpoints(place / 'runs' / name).steps() == left


def test_an_infinity_is_no_number_either_and_what_is_said_can_be_followed(monkeypatch, place):
    said = diverges(monkeypatch, of(place, 'followed'), place / 'runs', STEPS, 'model', math.inf)
    lower = said.partition('--fresh ')[2].split()[0]
    assert train(of(place, 'followed', lower), place / 'runs', fresh=True) == 0
    assert Checkpoints(place / 'runs' / 'followed').newest() == STEPS


def test_a_rate_that_float32_does_not_hold_is_refused(place):
    """The loss of a first step would be finite, and no weight after it."""
    with pytest.raises(UserError, match=r'optimizer\.learning_rate is 1e\+39: it must be a finite number'):
        of(place, 'steep', 'optimizer.learning_rate=1e39')


@pytest.fixture(scope='module')
def spoiled(place, sound) -> Path:
    """A run whose newest checkpoint is not finite, as an earlier version might have saved it."""
    folder = place / 'runs' / 'spoiled'
    shutil.copytree(place / 'runs' / 'sound', folder)
    checkpoints = Checkpoints(folder)
    with jax.set_mesh(make_mesh(sound.mesh)):
        state = restore(checkpoints, STEPS, saved_config(checkpoints, STEPS))
        bad = items(state._replace(model=poisoned(state.model)))
    meta, files = checkpoints.meta(STEPS), checkpoints.files(STEPS)
    files = {name: content for name, content in files.items() if name not in ('manifest.json', 'meta.json')}
    checkpoints.save(STEPS, bad, meta, files)
    checkpoints.close()
    return folder


def test_weights_that_are_no_numbers_are_neither_served_nor_published_nor_trained_on(place, sound, spoiled):
    opened = open_run(spoiled, stacked=True)
    wanted = (
        rf'checkpoints/{STEPS}: model/\S+ holds numbers that are not finite.*remove \S+/{STEPS} to use that of step 4'
    )
    with pytest.raises(UserError, match=wanted):
        _ = opened.model
    with pytest.raises(UserError, match=wanted):
        export_run(spoiled, place / 'published')
    assert not (place / 'published').exists()
    longer = dataclasses.replace(sound, name='spoiled', training=dataclasses.replace(sound.training, steps=STEPS + 1))
    with pytest.raises(UserError, match=wanted):
        train(longer, place / 'runs')
    shutil.rmtree(spoiled / 'checkpoints' / str(STEPS))
    assert train(longer, place / 'runs') == 0, 'as it was told'


def test_published_weights_that_are_no_numbers_are_not_imported(place, sound):
    export_run(place / 'runs' / 'sound', place / 'mine', say=str)
    (file,) = (place / 'mine').glob('*.safetensors')
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], 'little')
    begin, _ = json.loads(content[8:header])['model.layers.0.mlp.up_proj.weight']['data_offsets']
    content[header + begin + 28 : header + begin + 32] = np.float32(np.inf).tobytes()
    file.write_bytes(content)
    with pytest.raises(UserError, match=r'what becomes groups/0/mlp/up/w_IO/value holds numbers that are not finite'):
        import_run(place / 'mine', place / 'runs' / 'theirs', MeshConfig(), say=str)
    assert [path.name for path in (place / 'runs').iterdir() if 'theirs' in path.name] == []


@pytest.mark.parametrize('host', [True, False])
def test_every_array_that_is_no_number_is_found_and_no_other(monkeypatch, host):
    monkeypatch.setattr(finite, 'is_host', lambda: host)
    monkeypatch.setattr(finite, 'AT_ONCE', 5)
    monkeypatch.setattr(finite, 'PART', 7)
    numbers = np.ones((4, 3), np.float32)
    spoiled = numbers.copy()
    spoiled[3, 2] = np.nan
    halves = {
        f'{dtype}{value}': spoiled_as(dtype, value) for dtype in HALVES for value in (1, 3e38, np.nan, np.inf, -np.inf)
    }
    tree = halves | {
        'a': numbers,
        'b': spoiled,
        'c': -np.inf * numbers,
        'd': numbers.astype(jnp.bfloat16),
        'e': -spoiled_as('bfloat16', np.nan),
        'f': -spoiled_as('float16', 6e4),
        'n': np.arange(3),
    }
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        placed = {name: jax.device_put(x) for name, x in tree.items()} | {'key': jax.random.key(0)}
        wrong = [f'{dtype}{value}' for dtype in HALVES for value in (np.nan, np.inf, -np.inf)]
        wrong += [f'float16{3e38}']  # is an infinity there
        wrong += [name for name in halves if name.startswith('float8') and (name.endswith('3e+38'))]  # and a NaN here
        assert not_finite(placed) == sorted([*wrong, 'b', 'c', 'e'])
        assert not_finite({'n': placed['n']}) == []


HALVES = ('bfloat16', 'float16', 'float8_e4m3fn')


def spoiled_as(dtype: str, value: float) -> np.ndarray:
    with np.errstate(over='ignore'):
        return np.array([*range(7), value], np.float32).astype(jnp.dtype(dtype))


@pytest.mark.parametrize('temperature', [None, 0.0, 1.0])
def test_logits_that_are_no_numbers_choose_no_token(temperature):
    logits = np.zeros((4, 8), np.float32)
    logits[0, 3], logits[1, 2], logits[2, 5], logits[3] = 9, np.nan, np.inf, -np.inf
    one = lambda value, dtype: np.full(4, value, dtype)
    choice = None
    if temperature is not None:
        choice = RowSampling(
            one(temperature, np.float32), one(1, np.int32), one(1, np.float32), one(0, np.float32), one(0, np.uint32)
        )
    with jax.set_mesh(make_mesh(MeshConfig())):
        found = np.asarray(jax.jit(choose)(*jax.device_put((logits, one(0, np.int32), choice))))
    assert found.tolist() == [3, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    check_token(3)
    with pytest.raises(MachineError, match='logits of the next token are not finite'):
        check_token(NO_TOKEN)


def test_figures_are_told_as_json_or_not_at_all():
    assert json.loads(as_json({'a': [1.5, None]})) == {'a': [1.5, None]}
    with pytest.raises(MachineError, match=r'^parts\.1\.loss, inf, is no finite number'):
        as_json({'parts': [{'loss': 1.0}, {'loss': math.inf}]})
