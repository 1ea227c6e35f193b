"""Run folders in which something is of the wrong kind or says the wrong thing: one line, no waiting, nothing else touched."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import pytest
from rich.console import Console

from tests.families import folders
from tests.families.cases import CASES
from tests.hub.test_tokenizer_goldens import files_of
from tests.storage.test_checkpoint import bits, restored_small, small
from tests.training.kinds import put
from weft.hub.published_tokenizer import load_tokenizer
from weft.runtime.errors import MachineError, UserError
from weft.sharding.mesh import MeshConfig
from weft.storage.checkpoint import Checkpoints
from weft.storage.sealed import sealed, unsealed
from weft.training.config import load_config, parse
from weft.training.context import context
from weft.training.exporting import export_run, read_import
from weft.training.importing import import_run
from weft.training.loop import train

KINDS = 'folder', 'fifo', 'loop', 'nowhere', 'device'


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'run'
    checkpoints = Checkpoints(folder)
    for step in 1, 2:
        checkpoints.save(step, small(step), {'tokens': step}, {'config.yaml': b'name: x\n'})
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / 'run'))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['manifest.json', 'meta.json', 'config.yaml', 'model/manifest.ocdbt', 'model'])
def test_a_part_of_a_checkpoint_that_is_no_file(run, name, kind):
    if (name, kind) == ('model', 'folder'):
        kind = 'file'
    put(run / 'checkpoints' / '2' / name, kind)
    with pytest.raises(UserError, match=rf'checkpoints/2/{name}') as caught:
        restored_small(Checkpoints(run), 2)
    assert '\n' not in str(caught.value)
    if name not in ('model', 'model/manifest.ocdbt'):
        with pytest.raises(UserError, match=rf'checkpoints/2/{name}'):
            Checkpoints(run).meta(2)


@pytest.mark.parametrize('kind', ['file', 'fifo', 'loop', 'nowhere', 'device'])
def test_a_checkpoint_that_is_no_folder_is_named_and_the_next_save_takes_it_away(run, kind):
    put(run / 'checkpoints' / '7', kind)
    checkpoints = Checkpoints(run, keep=1)
    with pytest.raises(UserError, match=r'checkpoints/7'):
        checkpoints.meta(checkpoints.newest())
    checkpoints.save(7, small(7), {})
    checkpoints.close()
    assert checkpoints.steps() == [7]
    assert bits(restored_small(checkpoints, 7)) == bits(small(7))


@pytest.mark.parametrize('kind', ['file', *KINDS])
def test_where_saves_are_made_may_be_anything_and_no_link_is_followed(run, kind, tmp_path):
    saving = run / 'checkpoints' / 'saving'
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'outside' / 'theirs').write_text('x')
    put(saving, kind)
    if kind == 'loop':
        saving.unlink()
        saving.symlink_to(tmp_path / 'outside')
    checkpoints = Checkpoints(run, keep=1)
    checkpoints.save(3, small(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [3]
    assert (tmp_path / 'outside' / 'theirs').read_text() == 'x'


@pytest.mark.parametrize('kind', ['file', 'fifo', 'loop', 'nowhere'])
def test_checkpoints_that_are_no_folder_are_not_taken_for_none(run, kind):
    put(run / 'checkpoints', kind)
    with pytest.raises(UserError, match='run/checkpoints: '):
        Checkpoints(run).steps()


def test_names_that_no_checkpoint_has_are_passed_over(run):
    for name in '0009', '٣', '-1', '9.5', 'x':
        (run / 'checkpoints' / name).mkdir()
    assert Checkpoints(run).steps() == [1, 2]


def test_a_manifest_that_lists_the_wrong_things_is_damaged_whatever_its_hash(run):
    path = run / 'checkpoints' / '2' / 'manifest.json'
    fields = unsealed(path.read_bytes())
    entry = fields['files']['meta.json']
    odd = [
        {},
        {'arrays': {}},
        fields | {'arrays': []},
        fields | {'arrays': {'model': 5}},
        fields | {'arrays': {'model': {'w': None}}},
        fields | {'files': {}},
        fields | {'files': []},
        fields | {'files': {**fields['files'], 'meta.json': [entry[0]]}},
        fields | {'files': {**fields['files'], 'meta.json': [True, entry[1]]}},
        fields | {'files': {**fields['files'], '../1/meta.json': entry}},
        fields | {'format': 'shards', 'files': {'meta.json': entry}} | {'arrays': 5},
        fields | {'format': 0},
        fields | {'files': {name: one for name, one in fields['files'].items() if name != 'model/_METADATA'}},
        fields | {'files': {**fields['files'], '/etc/passwd': entry}},
    ]
    for content in [*map(sealed, odd), b'', b'{}', b'null', b'[' * 10**5, b'[' + b'{},' * 10**6, b'\xff', bytes(100)]:
        path.write_bytes(content)
        for read in Checkpoints(run).meta, Checkpoints(run).files, lambda step: restored_small(Checkpoints(run), step):
            with pytest.raises(UserError, match=r'checkpoints/2/manifest\.json was altered') as caught:
                read(2)
            assert '\n' not in str(caught.value)
            assert len(str(caught.value)) < 500


def test_shards_that_do_not_make_up_an_array_are_damage_whatever_the_hash(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_weights(1, 'model', iter(small(1)['model'].items()), {}, {})
    path = tmp_path / 'checkpoints' / '1' / 'manifest.json'
    fields = unsealed(path.read_bytes())
    (shard,) = (name for name in fields['files'] if name.endswith('.bin'))
    entry = fields['files'].pop(shard)
    folder = path.parent / 'model' / 'w'
    wanted = {
        'model': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0)['model'])
    }
    for name in 'all', '0-64', '0-64,0-63', '0-64,0-99999999999999', '0-64,0-64,0-64', 'x', '0-64,64-0', '-1-64,0-64':
        next(folder.glob('*.bin')).rename(folder / f'{name}.bin')
        path.write_bytes(sealed(fields | {'files': {**fields['files'], f'model/w/{name}.bin': entry}}))
        with pytest.raises(UserError, match=r'checkpoints/1/(manifest\.json|model/w/.*\.bin) was altered') as caught:
            checkpoints.restore(1, wanted)
        assert '\n' not in str(caught.value)
    next(folder.glob('*.bin')).unlink()
    path.write_bytes(sealed(fields))
    with pytest.raises(UserError, match=r'its shards do not make it up'):
        checkpoints.restore(1, wanted)


@pytest.mark.parametrize('content', [b'', b'[]', b'5', b'\xff', b'[' * 10**5])
def test_a_meta_that_says_nothing_is_damaged_whatever_its_hash(run, content):
    path = run / 'checkpoints' / '2' / 'meta.json'
    path.write_bytes(content)
    manifest = path.with_name('manifest.json')
    fields = unsealed(manifest.read_bytes())
    fields['files']['meta.json'] = [len(content), hashlib.sha256(content).hexdigest()]
    manifest.write_bytes(sealed(fields))
    with pytest.raises(UserError, match=r'2/meta\.json is no JSON'):
        Checkpoints(run).meta(2)


def test_a_place_where_no_run_can_be_is_one_line_and_nothing_is_left(tmp_path):
    (tmp_path / 'text.txt').write_text('Some lines of text.\n' * 500)
    config = parse(TINY.replace('SOURCE', str(tmp_path / 'text.txt')), 'tiny.yaml')
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'loop').symlink_to('loop')
    before = sorted(path.name for path in tmp_path.iterdir())
    console = Console(quiet=True)
    for runs, name in (
        (tmp_path / 'file', 'run'),
        (tmp_path / 'file' / 'more', 'run'),
        (tmp_path / 'loop', 'run'),
        (tmp_path, 'loop'),
        (tmp_path, 'file'),
        (tmp_path / ('x' * 300), 'run'),
        (Path('/proc'), 'run'),
    ):
        with pytest.raises((UserError, MachineError)) as caught:
            train(dataclasses.replace(config, name=name), runs, console=console)
        assert str(runs)[:150] in str(caught.value)
        assert '\n' not in str(caught.value)
        assert len(str(caught.value)) < 700
    assert sorted(path.name for path in tmp_path.iterdir()) == before


TINY = """
name: run
model: {layers: 1, model_dim: 16, attention: {heads: 2, kv_heads: 1}, mlp: {dim: 16}}
data: {source: SOURCE, vocabulary: 300}
training: {steps: 4, batch: 2, sequence_length: 16}
optimizer: {warmup_steps: 1}
"""


@pytest.fixture(scope='module')
def published(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp('imported')
    source = folders.write(place / 'source', CASES['llama-grouped'], folders.named('llama-grouped'))
    for file, content in files_of('json_template_PreTrainedTokenizerFast_True').items():
        if file != 'config.json':
            (source / file).write_bytes(content)
    import_run(source, place / 'run', MeshConfig(), say=str)
    return place / 'run'


@pytest.mark.parametrize('name', ['source.json', 'source/config.json', 'tokenizer.special.json'])
def test_a_damaged_file_of_an_import_is_one_line_with_a_way_out(published, tmp_path, name):
    run = Path(shutil.copytree(published, tmp_path / 'run'))
    path = run / name
    whole = path.read_bytes()
    fields = json.loads(whole)
    odd = [b'', b'null', b'[]', b'{}', b'\xff', bytes(50), whole[:-5], b'[' * 10**5, b'[' + b'{},' * 10**6]
    if name == 'source.json':
        odd += [json.dumps({**fields, field: value}).encode() for field in fields for value in (None, 5, [5], {'a': 5})]
        odd += [
            json.dumps({**fields, 'dtype': 'float31'}).encode(),
            json.dumps({**fields, 'copies': {'a': 'b'}}).encode(),
        ]
    if name == 'tokenizer.special.json':
        odd += [json.dumps({**fields, 'prefix': [99999]}).encode(), json.dumps({**fields, 'suffix': [-1]}).encode()]
    if name == 'source/config.json':
        odd.remove(b'{}')  # which says nothing of the context, and need not
    reads = {
        'source.json': lambda: export_run(run, tmp_path / 'target', say=str),
        'source/config.json': lambda: context(run, config),
        'tokenizer.special.json': lambda: load_tokenizer(run),
    }
    config = load_config(run / 'config.yaml')
    for content in odd:
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name) as caught:
            reads[name]()
        assert '\n' not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert not (tmp_path / 'target').exists()
    for kind in ('missing', *KINDS) if name == 'source/config.json' else ():
        put(path, kind)
        with pytest.raises(UserError, match=r'source/config\.json'):
            read_import(run)
