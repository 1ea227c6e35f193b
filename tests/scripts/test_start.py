"""From a command to its first token: little is imported and compiled, and the next process compiles nothing, whatever became of
what this one kept."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import zstandard

from tests.scripts.runs import QUICK, ROOT
from weft.data.tokenizer import Tokenizer
from weft.inference.run import open_run
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.runtime import program_cache
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.storage.manifest import leaves_by_path
from weft.training import config as configs
from weft.training.config import RunConfig, TrainingConfig
from weft.training.step import init

# A process of a user's, which says on its last line what it imported and compiled.
DECODE = """
import json, sys
import jax
from weft.scripts import decode
counts = {'compiled': 0, 'hits': 0}
def compiled(event, duration_secs, **about):
    counts['compiled'] += event == '/jax/core/compile/backend_compile_duration'
def hit(event, **about):
    counts['hits'] += event == '/jax/compilation_cache/cache_hits'
jax.monitoring.register_event_duration_secs_listener(compiled)
jax.monitoring.register_event_listener(hit)
decode.main()
print(json.dumps(counts | {'modules': sorted(sys.modules)}))
"""
# What takes long to import, and a greedy decode of an imported model has no use for.
HEAVY = (
    'orbax',
    'matplotlib',
    'tensorboardX',
    'scipy',
    'pandas',
    'gguf',
    'jax.experimental.pallas',
    'weft.hub.families',
)
HEAVY += (
    'weft.hub.read',
    'weft.training.loop',
    'weft.training.importing',
    'weft.planner',
    'weft.proof',
    'uvicorn',
    'fsspec',
)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run of weights alone, as an import makes it."""
    folder = tmp_path_factory.mktemp('start') / 'run'
    tokenizer = Tokenizer.train(['def read(path):\n    return open(path).read()\n' * 30], 300)
    model = ModelConfig(
        layers=2, model_dim=32, attention=AttentionConfig(heads=2, kv_heads=1), mlp=MLPConfig(dim=64), vocabulary=300
    )
    training = TrainingConfig(steps=1, batch=1, sequence_length=64)
    config = RunConfig(name='run', mesh=MeshConfig(), model=model, training=training)
    with jax.set_mesh(make_mesh(config.mesh)):
        weights = jax.jit(lambda: init(config).model)()
    files = {'config.yaml': configs.dump(config).encode(), **tokenizer.files()}
    facts = {'step': 0, 'tokens': 0, 'corpus': None, 'seed': 0, 'next_sample': 0}
    Checkpoints(folder).save_weights(0, 'model', iter(leaves_by_path(weights).items()), facts, files)
    (folder / 'config.yaml').write_bytes(files['config.yaml'])
    return folder


def decode(run: Path, cache: Path, mesh: str = 'data=1', **variables: str) -> dict:
    """A greedy decode with the user's cache folder, and what it says of itself; it says nothing else than it should."""
    mine = ('XLA_FLAGS', 'JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR')
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    environment |= {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': QUICK, 'XDG_CACHE_HOME': str(cache)}
    command = [
        sys.executable,
        '-c',
        DECODE,
        str(run),
        '--prompt',
        'def read',
        '--max-new-tokens',
        '5',
        '--json',
        '--mesh',
        mesh,
    ]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, '')
    completion, said = (json.loads(line) for line in done.stdout.splitlines())
    return said | {'tokens': completion['tokens']}


def entries(cache: Path) -> list[Path]:
    """The programs in it, in the order of their names."""
    return sorted(cache.rglob('*-cache'))


def test_the_next_process_compiles_nothing_and_damage_is_no_obstacle(run, tmp_path):
    cold = decode(run, tmp_path)
    assert [name for name in cold['modules'] if name.startswith(HEAVY)] == []
    assert (cold['compiled'], cold['hits']) == (2, 0), 'the prefill and the step, and nothing beside them'
    assert [entry.name.split('-')[0] for entry in entries(tmp_path)] == ['jit_first_token', 'jit_next_token']
    before = {entry: entry.read_bytes() for entry in entries(tmp_path)}
    warm = decode(run, tmp_path)
    assert (warm['compiled'], warm['hits'], warm['tokens']) == (2, 2, cold['tokens'])
    short, altered = entries(tmp_path)
    short.write_bytes(before[short][:-100])
    altered.write_bytes(before[altered][:-100] + bytes([before[altered][-100] ^ 1]) + before[altered][-99:])
    again = decode(run, tmp_path)
    assert (again['compiled'], again['hits'], again['tokens']) == (2, 0, cold['tokens'])
    program_cache.tidy(short.parent, program_cache.MOST)
    assert entries(tmp_path) == [short, altered], 'what was damaged has been made anew'


def test_without_a_cache(run, tmp_path):
    (tmp_path / 'a file').write_text('no folder')
    assert len(decode(run, tmp_path / 'a file')['tokens']) == 5
    off = decode(run, tmp_path, JAX_ENABLE_COMPILATION_CACHE='false')
    assert (len(off['tokens']), off['hits']) == (5, 0)
    assert [path.name for path in tmp_path.iterdir()] == ['a file']


def test_several_simulated_devices_keep_nothing(run, tmp_path):
    assert decode(run, tmp_path, mesh='data=2')['hits'] == 0
    assert entries(tmp_path) == []


def written(folder: Path, name: str, age: int) -> Path:
    """A sealed entry of the cache, written so many seconds ago."""
    entry = folder / f'{name}-cache'
    entry.write_bytes(zstandard.compress(os.urandom(1000)))
    program_cache.seal(entry)
    os.utime(entry, (time.time() - age, time.time() - age))
    return entry


def test_only_what_is_whole_and_newest_stays(tmp_path):
    new, middle, _old, altered, unsealed, cut = (written(tmp_path, f'{i}', i) for i in range(6))
    altered.write_bytes(altered.read_bytes()[:-1] + b'x')
    unsealed.with_name(unsealed.name + '.sha256').unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    program_cache.seal(cut)  # as written to a full disk
    program_cache.tidy(tmp_path, 2500)
    assert entries(tmp_path) == [new, middle]
    assert len(list(tmp_path.iterdir())) == 4, 'the hashes of the others went too'


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    folder = program_cache.cache_folder()
    assert folder.parent == tmp_path / 'weft'
    monkeypatch.setattr(program_cache, '_processor', lambda: 'another processor')
    assert program_cache.cache_folder().name != folder.name, 'its machine code may not run here'
    monkeypatch.setenv('XDG_CACHE_HOME', 'not/absolute')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert program_cache.cache_folder().parent == tmp_path / '.cache' / 'weft'
    folder.mkdir(parents=True, mode=0o700)
    assert program_cache.is_private(folder)
    folder.chmod(0o770)
    assert not program_cache.is_private(folder), 'others could have put programs there'


def test_what_is_wrong_with_the_weights_is_told_when_they_are_wanted(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / 'run')
    shard = next((copy / 'checkpoints' / '0' / 'model').rglob('*.bin'))
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    opened = open_run(copy)
    about = lambda model: [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(model)]
    assert about(opened.kind) == about(open_run(run).model)
    with pytest.raises(UserError, match=f'{shard.name} was altered: its SHA-256'):
        _ = opened.model
