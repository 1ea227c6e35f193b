"""What is published is whole and restores bit for bit onto any mesh; damage is named; kills and errors spoil none."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from weft.runtime.errors import MachineError, UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage import files as disk
from weft.storage.checkpoint import Checkpoints

MESHES = MeshConfig(data=2, expert=2, tensor=2), MeshConfig(data=1, expert=4, tensor=2)
FILES = {'config.yaml': b'name: test\n', 'tokenizer.model': bytes(range(256))}


class Block(nnx.Module):
    """A module's arrays are items too."""

    def __init__(self, weight_DF: jax.Array):
        self.weight_DF = nnx.Param(weight_DF)


@functools.cache
def state(mesh: MeshConfig, seed: int) -> dict:
    """Items with every kind of leaf: float32, bfloat16, int32, scalars, keys; in dicts, a module and optax' tuples."""
    devices, random_numbers = make_mesh(mesh), np.random.default_rng(seed)

    def weight(shape: tuple, spec: P, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        value = random_numbers.standard_normal(shape).astype(dtype)
        return jax.device_put(value, NamedSharding(devices, spec))

    with jax.set_mesh(devices):
        model = {
            'embed_VD': weight((32, 16), P('tensor', ('data', 'expert'))),
            'blocks': {
                'up.w_EIO': weight((4, 16, 8), P('expert', 'data', 'tensor')),
                'scale_D': weight((16,), P(), jnp.bfloat16),
                'module': Block(weight((16, 8), P(None, 'tensor'))),
            },
        }
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        moments = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x - 0.5, optimizer.init(model))
        keys_B = jax.device_put(
            jax.random.split(jax.random.key(seed, impl='rbg'), 8), NamedSharding(devices, P('data'))
        )
        key = jax.device_put(jax.random.key(seed), NamedSharding(devices, P()))
        rest = {'key': key, 'keys_B': keys_B, 'step': jnp.int32(seed)}
    return {'model': model, 'optimizer': moments, 'random': rest}


def wanted(mesh: MeshConfig) -> dict:
    """The shapes and layouts of `state` on a mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(mesh, 0))


def bits(tree: dict) -> list[tuple]:
    """Every leaf's path, dtype and bytes."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        raw = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        found.append((path, str(x.dtype), x.shape, np.asarray(jax.device_get(raw)).tobytes()))
    return found


def small(step: int) -> dict:
    """The items of step `step` in the tests that save often: whoever reads them can tell what they must be."""
    return {'model': {'w': jnp.full((64, 64), step, jnp.float32)}, 'random': {'step': jnp.int32(step)}}


def restored_small(checkpoints: Checkpoints, step: int) -> dict:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0))
    return checkpoints.restore(step, shapes)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run with checkpoints 10 and 20, saved on the first mesh. Tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    checkpoints = Checkpoints(folder)
    for step in 10, 20:
        checkpoints.save(step, state(MESHES[0], step), {'tokens': step * 7}, FILES)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / 'run'))


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_restores_bit_equal_on_its_mesh_and_on_another(run, mesh):
    shapes = wanted(mesh)
    found = Checkpoints(run).restore(20, shapes)
    assert bits(found) == bits(state(MESHES[0], 20))
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for x, shape in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert x.sharding == shape.sharding


def test_meta_and_files_are_there(run):
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.newest() == 20
    assert checkpoints.meta(10) == {'tokens': 70}
    for name, content in FILES.items():
        assert (run / 'checkpoints' / '10' / name).read_bytes() == content


def test_reads_only_the_items_named(copy):
    """Another item may even be damaged: whoever decodes does not read the optimizer."""
    for path in (copy / 'checkpoints' / '20' / 'optimizer').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    mesh = MESHES[1]
    found = Checkpoints(copy).restore(20, {'model': wanted(mesh)['model']})
    assert list(found) == ['model']
    assert bits(found['model']) == bits(state(mesh, 20)['model'])
    with pytest.raises(UserError, match=r'optimizer.*was truncated'):
        Checkpoints(copy).restore(20, wanted(mesh))


def test_reading_touches_nothing(run):
    def listing() -> list:
        return sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob('*'))

    before = listing()
    checkpoints = Checkpoints(run)
    checkpoints.restore(checkpoints.newest(), wanted(MESHES[1]))
    checkpoints.meta(10)
    checkpoints.close()
    assert listing() == before
    absent = run.with_name('absent')
    with pytest.raises(UserError, match='absent has no checkpoint;'):
        Checkpoints(absent).newest()
    assert Checkpoints(absent).steps() == []
    assert not absent.exists()


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """Training overwrites the weights while they are being written."""
    mesh = make_mesh(MESHES[0])
    layout = NamedSharding(mesh, P('data', 'tensor'))
    w_DF = jax.device_put(jax.random.normal(jax.random.key(0), (512, 256)), layout)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    items = {'model': {f'layer{n}': w_DF + n for n in range(4)}}
    shapes = {'model': {name: jax.ShapeDtypeStruct(w_DF.shape, w_DF.dtype, sharding=layout) for name in items['model']}}
    checkpoints = Checkpoints(tmp_path, keep=4)
    expected = {}
    for number in range(1, 4):
        expected[number] = bits(items)
        checkpoints.save(number, items, {})
        for _ in range(3):
            donated = items
            items = jax.block_until_ready(step(items))
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    checkpoints.close()
    for number, saved in expected.items():
        found = checkpoints.restore(number, shapes)
        assert bits(found) == saved
        # Nor does what was restored share memory with anything: it can be donated as well.
        again = jax.block_until_ready(step(found))
        assert bits(again) == bits(step(checkpoints.restore(number, shapes)))


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in 3, 20, 100:  # as text, '100' comes before '20'
        checkpoints.save(step, small(step), {})
    checkpoints.close()
    assert checkpoints.steps() == [20, 100]
    assert list((tmp_path / 'checkpoints' / 'saving').iterdir()) == []


def test_a_step_taken_again_replaces_the_old(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, small(1), {})
    checkpoints.save(5, small(2), {})
    checkpoints.close()
    assert checkpoints.steps() == [5]
    assert bits(restored_small(checkpoints, 5)) == bits(small(2))


def test_a_step_taken_again_stands_until_its_successor_has_the_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, small(3), {})
    checkpoints.wait()
    asked = []

    def refuse(action: str, path: Path, what: object) -> None:
        if action == 'rename':
            asked.append(path.name)
        if asked == ['3', '3'] and action == 'rename':
            raise OSError(5, 'Input/output error')

    with disk.watched(refuse):
        checkpoints.save(3, small(7), {})
        with pytest.raises(MachineError, match=r'checkpoint 3 could not be saved: .*Input/output error'):
            checkpoints.wait()
    assert asked == ['3', '3', '3.deleted']
    assert bits(restored_small(checkpoints, 3)) == bits(small(3))
    checkpoints.save(3, small(7), {})
    checkpoints.close()
    assert bits(restored_small(checkpoints, 3)) == bits(small(7))
    assert list((tmp_path / 'checkpoints' / 'saving').iterdir()) == []


def test_an_item_without_arrays(tmp_path):
    """The state of plain gradient descent."""
    optimizer = optax.sgd(0.1).init({'w': jnp.ones(3)})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {**small(1), 'optimizer': optimizer}, {})
    checkpoints.close()
    assert checkpoints.restore(1, {'optimizer': optimizer}) == {'optimizer': optimizer}


def damages(folder: Path) -> list[tuple[str, Path]]:
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return [(damage, path) for path in files for damage in ('missing', 'truncated', 'altered', 'longer')]


def test_every_damaged_file_is_named(copy):
    """Each file of the checkpoint, the manifest included, missing, cut short, with one bit changed, or longer."""
    checkpoints, shapes = Checkpoints(copy), wanted(MESHES[1])
    folder = copy / 'checkpoints' / '20'
    for damage, path in damages(folder):
        content = path.read_bytes()
        middle = len(content) // 2
        match damage:
            case 'missing':
                path.unlink()
            case 'truncated':
                path.write_bytes(content[:middle])
            case 'altered':
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case 'longer':
                path.write_bytes(content + b'\0')
        with pytest.raises(UserError) as error:
            checkpoints.restore(20, shapes)
        assert f'{path.relative_to(copy)} ' in str(error.value), damage
        assert ('was altered' if damage == 'longer' else damage) in str(error.value)
        assert 'to go on from step 10' in str(error.value)
        assert '\n' not in str(error.value)
        path.write_bytes(content)
    assert bits(checkpoints.restore(20, shapes)) == bits(state(MESHES[0], 20))


@pytest.mark.parametrize('name', ['extra', 'model/extra', 'random/d/extra', 'folder/extra'])
def test_an_extra_file_is_named(copy, name):
    path = copy / 'checkpoints' / '20' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
    with pytest.raises(UserError, match=f'20/{name} is not part of the checkpoint'):
        Checkpoints(copy).restore(20, wanted(MESHES[1]))


def test_a_checkpoint_that_is_not_there(run):
    with pytest.raises(UserError, match='no checkpoint of step 15; it has 10, 20'):
        Checkpoints(run).restore(15, {})
    with pytest.raises(UserError, match=r"20 has no item 'weights'; known: model, optimizer, random"):
        Checkpoints(run).restore(20, {'weights': {}})


def test_a_name_shape_or_dtype_that_differs_is_an_error(run):
    checkpoints, mesh = Checkpoints(run), MESHES[1]

    def read(blocks: dict | None = None, **change: jax.ShapeDtypeStruct) -> None:
        model = wanted(mesh)['model']
        checkpoints.restore(20, {'model': {**model, **change, 'blocks': {**model['blocks'], **(blocks or {})}}})

    layout = NamedSharding(make_mesh(mesh), P())
    with pytest.raises(UserError, match=r'model/embed_VD is float32\[32, 16\] in .*20 and float32\[64, 16\] is wanted'):
        read(embed_VD=jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=layout))
    with pytest.raises(
        UserError, match=r'model/embed_VD is float32\[32, 16\] in .*20 and bfloat16\[32, 16\] is wanted'
    ):
        read(embed_VD=jax.ShapeDtypeStruct((32, 16), jnp.bfloat16, sharding=layout))
    with pytest.raises(UserError, match=r'model/blocks/bias_F is absent in .*20 and float32\[8\] is wanted'):
        read(blocks={'bias_F': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=layout)})
    model = wanted(mesh)['model']
    del model['blocks']['module']
    with pytest.raises(
        UserError, match=r'model/blocks/module/weight_DF/value is float32\[16, 8\] .* and none is wanted'
    ):
        checkpoints.restore(20, {'model': model})


class Full:
    """A disk whose change number `number` (from 0) of one kind finds it full."""

    def __init__(self, action: str, number: int):
        self.action, self.number, self.calls = action, number, 0

    def __call__(self, action: str, path: Path, what: object) -> None:
        if action == self.action:
            self.calls += 1
            if self.calls == self.number + 1:
                raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('action', ['write', 'sync', 'folder', 'rename', 'remove'])
def test_a_disk_error_surfaces_and_spoils_nothing(tmp_path, action, capfd):
    """Each step of a save fails in turn: the error comes out, what is published stays whole, the next save works."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    failures = 0
    for step, number in enumerate([0, 1, 5, 10**6], start=2):
        full, errors = Full(action, number), []
        with disk.watched(full):
            try:
                checkpoints.save(step, small(step), {})
                checkpoints.wait()
            except MachineError as error:
                errors.append(str(error))
        assert all('No space left on device' in line and '\n' not in line for line in errors)
        told = capfd.readouterr().err.splitlines()  # of what fails after the new one has its name: it stands
        assert len(errors) + len(told) == (full.calls > number)
        failures += full.calls > number
        for line in told:
            assert line.startswith(f'{tmp_path}: checkpoint {step} is saved, and older ones could not be removed: ')
            assert 'No space left on device' in line
            assert checkpoints.newest() == step
        assert errors or told or checkpoints.steps() == [step]
        if action in ('rename', 'remove'):
            assert bool(errors) == (step not in checkpoints.steps()), 'what stands is not told as failed'
        for published in checkpoints.steps():
            assert bits(restored_small(checkpoints, published)) == bits(small(published))
    assert failures
    checkpoints.close()


def test_a_full_disk_under_orbax_surfaces(tmp_path):
    """The operating system refuses files as large as the arrays' (the limit stands in for a full disk)."""
    noise = {'model': {'w': jnp.asarray(np.random.default_rng(0).standard_normal((512, 512), np.float32))}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(2, noise, {})
        with pytest.raises(MachineError, match=r'checkpoint 2 could not be saved: File too large') as caught:
            checkpoints.wait()
        assert '\n' not in str(caught.value)
        assert not (tmp_path / 'checkpoints' / 'saving').exists(), 'what is half made is removed at once'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [1]
    checkpoints.save(3, noise, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_a_failed_save_is_told_at_once_and_at_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    for tell in checkpoints.check, checkpoints.wait, lambda: checkpoints.save(2, small(2), {}):
        with disk.watched(Full('rename', 0)):
            checkpoints.save(1, small(1), {})
            checkpoints._last.exception()
        with pytest.raises(MachineError, match='No space left'):
            tell()
        checkpoints.check()  # once
    checkpoints.save(2, small(2), {})
    checkpoints.close()
    checkpoints.check()
    assert checkpoints.steps() == [2]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'run').write_text('a file where the folder should be')
    with pytest.raises(UserError, match='run'):
        Checkpoints(tmp_path / 'run').save(1, small(1), {})


CHILD = """
import sys
from pathlib import Path
import jax.numpy as jnp
from weft.storage.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
first = checkpoints.newest() if checkpoints.steps() else 0
for step in range(first + 1, first + 1000):
    items = {'model': {'w': jnp.full((64, 64), step, jnp.float32)}, 'random': {'step': jnp.int32(step)}}
    checkpoints.save(step, items, {'step': step})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    """SIGKILL to a process that saves as fast as it can: what is published is whole, is what was saved, and goes on."""
    moments = random.Random(0)
    checkpoints = Checkpoints(tmp_path)
    seen = 0
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2]), 'JAX_PLATFORMS': 'cpu'}
    for _ in range(4):
        command = [sys.executable, '-c', CHILD, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(moments.randint(3, 6)):
                begun = int(child.stdout.readline())
            time.sleep(moments.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
        steps = checkpoints.steps()
        assert len(steps) <= 3  # the two kept, and one whose turn to go had come
        assert steps[-1] >= begun - 1 > seen
        seen = steps[-1]
        for step in steps:
            assert bits(restored_small(checkpoints, step)) == bits(small(step))
            assert checkpoints.meta(step) == {'step': step}
    checkpoints.save(seen + 1, small(seen + 1), {})  # clears what the last kill left
    checkpoints.close()
    assert list((tmp_path / 'checkpoints' / 'saving').iterdir()) == []
    assert checkpoints.steps() == [seen, seen + 1]


def test_the_manifest_lists_every_array_and_file(run):
    manifest = json.loads((run / 'checkpoints' / '20' / 'manifest.json').read_bytes())
    assert manifest['arrays']['model']['blocks/scale_D'] == 'bfloat16[16]'
    assert manifest['arrays']['random']['keys_B'] == 'key<rbg>[8]'
    folder = run / 'checkpoints' / '20'
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    assert set(manifest['files']) == files - {'manifest.json'}
