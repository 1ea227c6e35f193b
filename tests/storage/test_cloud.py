"""Runs in a bucket: as whole, exact and careful as in a local folder. The store is tests/storage/store.py: no network."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.scripts.runs import workplace
from tests.storage.store import Killed, Store, bucket, everything
from tests.storage.test_checkpoint import FILES, MESHES, bits, restored_small, small, state, wanted
from weft.inference.run import open_run
from weft.runtime.errors import MachineError, UserError
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.buckets import Bucket, at, at_once
from weft.storage.checkpoint import MANIFEST, Checkpoints, SaveFailed
from weft.storage.local_copy import LocalCopy
from weft.storage.lock_file import own_record
from weft.training import config as configs
from weft.training.loop import Run, train


@pytest.fixture
def runs(monkeypatch) -> Bucket:
    return bucket(monkeypatch)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('cloud'))


def trained(place: Path, runs: Path | Bucket, *overrides: str, fresh: bool = False) -> list[str]:
    """Trains the tiny run in this process; what it printed."""
    source = f'data.source={place / "text"}'
    small_model = 'model.layers=1', 'model.moe=null', 'mesh={data: 2, tensor: 2}', 'metrics.validate_every=1000'
    config = configs.load_config(place / 'tiny.yaml', [source, *small_model, *overrides])
    console = Console(record=True, quiet=False, width=200, file=open('/dev/null', 'w'))  # noqa: SIM115
    try:
        assert train(config, runs, fresh, console) == 0
        return console.export_text().splitlines()
    finally:
        console.file.close()


def rows(folder: Path | Bucket) -> list[dict]:
    found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if name != 'tokens_per_second'} for row in found]


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_restores_bit_equal_on_its_mesh_and_on_another(runs, mesh):
    checkpoints = checkpoints_of(runs / 'run')
    for step in 10, 20:
        checkpoints.save(step, state(MESHES[0], step), {'tokens': step * 7}, FILES)
    checkpoints.close()
    checkpoints = checkpoints_of(runs / 'run')
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.meta(20) == {'tokens': 140}
    assert all(checkpoints.file(20, name) == content for name, content in FILES.items())
    shapes = wanted(mesh)
    found = checkpoints.restore(20, shapes)
    assert bits(found) == bits(state(MESHES[0], 20))
    for x, shape in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert x.sharding == shape.sharding


def test_equal_copies_are_written_once_and_only_what_is_needed_is_read(runs, monkeypatch):
    checkpoints = checkpoints_of(runs / 'run')
    items = state(MESHES[0], 1)
    checkpoints.save(1, items, {})
    checkpoints.close()
    stored = sum(len(content) for key, content in everything().items() if key.endswith('.bin'))
    raw = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(items)
    ]
    assert stored == sum(x.nbytes for x in raw)
    read = []
    cat = Store.cat_file
    monkeypatch.setattr(Store, 'cat_file', lambda self, path, *a, **k: (read.append(path), cat(self, path, *a, **k))[1])
    checkpoints_of(runs / 'run').restore(1, {'model': wanted(MESHES[1])['model']})
    assert not [path for path in read if '/optimizer/' in path or '/random/' in path]


def test_a_kill_at_any_change_leaves_whole_checkpoints_and_the_next_save_clears_the_rest(runs):
    """Each change of the store in turn is the last of its process: before, in and after publishing."""
    for number in range(1000):
        count, dead = 0, False

        def before(change: str, key: str, number: int = number) -> None:
            nonlocal count, dead
            count += 1
            dead = dead or count > number  # what other threads of a killed process would do is not done either
            if dead:
                raise Killed

        checkpoints = checkpoints_of(runs / 'run', keep=1)
        try:
            checkpoints.save(2 * number + 1, small(2 * number + 1), {}, FILES)
            checkpoints.wait()
            Store.before = staticmethod(before)
            checkpoints.save(2 * number + 2, small(2 * number + 2), {}, FILES)
            checkpoints.wait()
        except Killed:
            pass
        finally:
            Store.before = staticmethod(lambda change, key: None)
            checkpoints._last = None
            checkpoints.close()
        found = checkpoints_of(runs / 'run')
        assert found.steps()
        for step in found.steps():
            assert bits(restored_small(found, step)) == bits(small(step))
        if not dead:
            assert found.steps() == [2 * number + 2]
            assert {key.split('/checkpoints/')[1].split('/')[0] for key in everything()} == {str(2 * number + 2)}
            break
    assert number > 5


def test_a_save_that_a_bucket_refuses_is_told_at_once_and_the_next_one_works(runs):
    checkpoints = checkpoints_of(runs / 'run')
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    Store.before = staticmethod(lambda change, key: (_ for _ in ()).throw(PermissionError('Access Denied')))
    checkpoints.save(2, small(2), {})
    checkpoints._last.exception()
    with pytest.raises(
        SaveFailed, match=r'run: checkpoint 2 could not be saved: teststore://.*Access Denied'
    ) as caught:
        checkpoints.check()
    assert '\n' not in str(caught.value)
    Store.before = staticmethod(lambda change, key: None)
    checkpoints.save(3, small(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert not [key for key in everything() if '/checkpoints/2/' in key]


def fail(error: Exception) -> None:
    Store.before = staticmethod(lambda change, key: (_ for _ in ()).throw(error))


def test_an_error_of_a_bucket_is_the_machines_unless_the_user_can_mend_it(runs):
    class NoCredentialsError(Exception):
        pass

    class HttpError(Exception):
        code = 403

    for error, kind in (
        (OSError(16, 'Please reduce your request rate'), MachineError),
        (ConnectionError('Could not connect to the endpoint URL'), MachineError),
        (TimeoutError(), MachineError),
        (RuntimeError('503'), MachineError),
        (NoCredentialsError('Unable to locate credentials'), UserError),
        (HttpError('Forbidden'), UserError),
        (PermissionError('Access Denied'), UserError),
    ):
        fail(error)
        with pytest.raises(kind, match=r'^teststore://bucket/runs/x: ') as caught:
            (runs / 'x').write_bytes(b'')
        assert ('are there credentials' in str(caught.value)) == (kind is UserError)


def test_a_bucket_that_fails_when_a_save_begins_or_an_older_one_is_deleted(runs, capfd):
    checkpoints = checkpoints_of(runs / 'run', keep=1)
    checkpoints.save(1, small(1), {})
    checkpoints.wait()
    (runs / 'run' / 'checkpoints' / '2' / 'left').write_bytes(b'by a kill')
    fail(ConnectionError('503'))
    with pytest.raises(SaveFailed, match=r'run: checkpoint 3 could not be saved: teststore://.*503'):
        checkpoints.save(3, small(3), {})
    Store.before = staticmethod(
        lambda change, key: (_ for _ in ()).throw(ConnectionError('503')) if key.endswith('1/manifest.json') else None
    )
    checkpoints.save(4, small(4), {})
    checkpoints.wait()
    assert 'run: checkpoint 4 is saved, and older ones could not be removed: ' in capfd.readouterr().err
    assert checkpoints.steps() == [1, 4]
    Store.before = staticmethod(lambda change, key: None)
    checkpoints.save(5, small(5), {})
    checkpoints.close()
    assert checkpoints.steps() == [5]


def test_a_bucket_that_fails_for_a_while_ends_no_run(runs, place, capfd, monkeypatch):
    failing, ls, save = False, Store.ls, Run.save

    def saving(self: Run, step: int) -> None:
        nonlocal failing
        self.settle(wait=True)
        failing = step != 4
        save(self, step)

    def refuse(change: str = '', key: str = '') -> None:
        if failing and not key.endswith('.lock'):  # else the next one would watch it for a sign of life
            raise ConnectionError('503')

    monkeypatch.setattr(Run, 'save', saving)
    monkeypatch.setattr(Store, 'ls', lambda *arguments, **options: (refuse(), ls(*arguments, **options))[1])
    Store.before = staticmethod(refuse)
    small_run = 'training.steps=6', 'checkpoint.every=2'
    with pytest.raises(MachineError, match=r'^the last save failed: .*checkpoint 6 .*503'):
        trained(place, runs, *small_run)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    assert told[0].startswith('error: an upload failed: teststore://bucket/runs/tiny/')
    assert told[0].endswith('; training goes on, to the next one')
    assert told[1].startswith('error: a save failed: teststore://bucket/runs/tiny: checkpoint 2 could not be saved: ')
    assert told[1].endswith('; which checkpoint is the newest cannot be seen now; training goes on, to the next save')
    failing = False
    assert checkpoints_of(runs / 'tiny').steps() == [4]
    monkeypatch.setattr(Run, 'save', save)
    trained(place, runs, *small_run)
    assert checkpoints_of(runs / 'tiny').newest() == 6
    assert [row['step'] for row in rows(runs / 'tiny')] == list(range(1, 7))


def test_a_last_upload_that_fails_is_no_good_end(runs, place):
    Store.before = staticmethod(
        lambda change, key: (_ for _ in ()).throw(ConnectionError('503')) if key.endswith('/loss.png') else None
    )
    with pytest.raises(MachineError, match=r'/tiny lacks the last rows of its metrics: .*503.* is of step 2$'):
        trained(place, runs, 'training.steps=2')


@pytest.mark.parametrize(
    'moment', [('delete', '/data/data.json'), ('write', '/2/model/'), ('write', '/2/manifest.json')], ids=str
)
def test_a_run_that_another_process_took_over_is_written_no_more(runs, place, monkeypatch, moment):
    """In the middle of an upload, in the middle of a save, and at its end, of which only training can tell."""
    theirs, after, save = b'the new holder wrote this', [], Run.save

    def saving(self: Run, step: int) -> None:
        self.settle(wait=True)  # else an object of the next upload may be on its way when the checkpoint is published
        save(self, step)

    def before(change: str, key: str) -> None:
        if change == moment[0] and moment[1] in key:
            Store.before = staticmethod(lambda change, key: None)
            (runs / '.tiny.lock').write_bytes(dataclasses.replace(own_record(), host='far').written())
            (runs / 'tiny' / 'metrics.jsonl').write_bytes(theirs)
            Store.before = staticmethod(lambda change, key: after.append(key))

    monkeypatch.setattr(Run, 'save', saving)
    monkeypatch.setattr('weft.storage.lock.BEAT', 1000.0)  # a beat at the same moment would win the lock back
    monkeypatch.setattr(at_once, '__defaults__', (1,))  # and no object is on its way beside that one
    Store.before = staticmethod(before)
    with pytest.raises(MachineError, match=r'no longer this process’s to write: process \d+ of host far'):
        trained(place, runs, 'training.steps=6', 'checkpoint.every=2')
    assert after == []
    assert (runs / 'tiny' / 'metrics.jsonl').read_bytes() == theirs
    assert (runs / '.tiny.lock').is_file()


def test_damage_is_named(runs):
    checkpoints = checkpoints_of(runs / 'run')
    for step in 1, 2:
        checkpoints.save(step, small(step), {}, FILES)
    checkpoints.close()
    path = runs / 'run' / 'checkpoints' / '2'
    (shard,) = (name for name in path.files() if name.startswith('model/'))
    content = (path / shard).read_bytes()
    for change, words in (
        (lambda: path.delete([shard]), 'is missing'),
        (lambda: (path / shard).write_bytes(content[:-1]), 'truncated'),
        (lambda: (path / shard).write_bytes(content[:-1] + b'x'), 'altered'),
        (lambda: (path / 'config.yaml').write_bytes(b'name: tesT\n'), 'altered'),
        (lambda: (path / 'more').write_bytes(b''), 'not part'),
    ):
        kept = dict(Store.store)
        files = {key: file.getvalue() for key, file in kept.items()}
        change()
        with pytest.raises(UserError, match=words) as caught:
            restored_small(checkpoints_of(runs / 'run'), 2)
        assert str(path) in str(caught.value)
        path.delete(path.files())
        for key, value in files.items():
            Bucket('teststore', key.strip('/')).write_bytes(value)
    assert bits(restored_small(checkpoints_of(runs / 'run'), 2)) == bits(small(2))
    path.delete([MANIFEST])
    assert checkpoints_of(runs / 'run').steps() == [1]
    with pytest.raises(UserError, match=r'no checkpoint of step 2; it has 1'):
        checkpoints_of(runs / 'run').meta(2)


def test_a_run_may_be_copied_either_way(runs, tmp_path):
    for source in checkpoints_of(runs / 'a'), checkpoints_of(tmp_path / 'b'):
        source.save(3, state(MESHES[0], 3), {}, FILES)
        source.close()
    (runs / 'a').download(tmp_path / 'a', (runs / 'a').files())
    for path in (tmp_path / 'b').rglob('*'):
        if path.is_file():
            (runs / 'b' / path.relative_to(tmp_path / 'b').as_posix()).upload(path)
    for copy in tmp_path / 'a', runs / 'b':
        assert bits(checkpoints_of(copy).restore(3, wanted(MESHES[1]))) == bits(state(MESHES[0], 3))


def test_a_run_in_a_bucket_is_the_run_in_a_folder(runs, place, tmp_path):
    trained(place, tmp_path, 'training.steps=9')
    # The schedule looks at training.steps: both are cut after 6 of 9.
    trained(place, runs, 'training.steps=9')
    assert rows(runs / 'tiny') == rows(tmp_path / 'tiny')
    names = set((runs / 'tiny').files())
    assert {'config.yaml', 'tokenizer.model', 'metrics.jsonl', 'loss.png', 'data/data.json'} <= names
    assert any(name.startswith('tensorboard/') for name in names)
    assert checkpoints_of(runs / 'tiny').steps() == Checkpoints(tmp_path / 'tiny').steps() == [6, 9]
    # Back to step 6, as after a kill: it goes on, and its rows after the checkpoint are cut.
    step = runs / 'tiny' / 'checkpoints' / '9'
    step.delete([MANIFEST])
    assert any('continuing' in line and 'after step 6' in line for line in trained(place, runs, 'training.steps=9'))
    assert rows(runs / 'tiny') == rows(tmp_path / 'tiny')
    opened = open_run(runs / 'tiny')
    same = open_run(tmp_path / 'tiny')
    assert opened.step == 9
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), opened.model, same.model))
    with pytest.raises(UserError, match=r'did you mean .*tiny'):
        open_run(runs / 'tony')


def test_what_is_refused_touches_nothing_and_fresh_moves_aside(runs, place):
    trained(place, runs, 'training.steps=3')
    before = everything()
    for overrides, fresh in ((['model.layers=2'], False), (['training.steps=2'], False), (['data.source=none'], True)):
        with pytest.raises(UserError):
            trained(place, runs, 'training.steps=3', *overrides, fresh=fresh)
        assert everything() == before
    told = trained(place, runs, 'training.steps=2', 'model.mlp.dim=64', fresh=True)
    assert any(f'moved the earlier {runs}/tiny aside to {runs}/tiny.old-1' in line for line in told)
    old = {key: value for key, value in everything().items() if '/tiny.old-1/' in key}
    assert {key.replace('.old-1', ''): value for key, value in old.items()} == before
    assert checkpoints_of(runs / 'tiny').steps() == [2]


def test_data_is_there_whole_or_not_at_all(runs, tmp_path):
    """Killed at each upload in turn, a local_copy's data is not there, or is all of it."""
    for number in range(20):
        source = LocalCopy(runs / f'run{number}')
        for name in 'data/a.npy', 'data/b.npy', 'data/data.json', 'tokenizer.model':
            (source.local / name).parent.mkdir(parents=True, exist_ok=True)
            (source.local / name).write_text(f'new {name}')
            (source.folder / name).write_bytes(f'old {name}'.encode())
        changes = iter(range(1000))

        def before(change: str, key: str, number: int = number, changes=changes) -> None:
            if next(changes) >= number:
                raise Killed

        Store.before = staticmethod(before)
        dead = False
        try:
            source.push()
        except Killed:
            dead = True
        Store.before = staticmethod(lambda change, key: None)
        source.close()
        reader = LocalCopy(runs / f'run{number}')
        reader.fetch()
        found = {path.name: path.read_text()[:3] for path in reader.local.rglob('data/*')}
        reader.close()
        assert found in ({}, dict.fromkeys(('a.npy', 'b.npy', 'data.json'), 'old' if number == 0 else 'new'))
        if not dead:
            break
    assert found
    assert number == 5


def test_urls(runs, monkeypatch):
    assert str(at('teststore://bucket//a/b/')) == 'teststore://bucket/a/b'
    assert at('runs/a') == Path('runs/a')
    for url in 'ftp://host/runs', 's3://', 'https://bucket/x':
        with pytest.raises(UserError, match=r'gs://BUCKET'):
            at(url)

    def missing(*arguments, **options):
        raise ImportError('Install s3fs')

    monkeypatch.setattr('fsspec.filesystem', missing)
    for url, extra in ('s3://b/r', 's3'), ('gs://b/r', 'gcs'):
        with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
            at(url)


def test_what_a_client_raises_is_one_line_with_the_url(runs, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError('Access\nDenied')

    for name in 'ls', 'find', 'cat_file', 'isfile', 'pipe_file':
        monkeypatch.setattr(Store, name, refuse)
    folder = runs / 'run'
    for use in folder.names, folder.files, folder.read_bytes, folder.is_file, lambda: folder.write_bytes(b''):
        with pytest.raises(UserError, match=r'^teststore://bucket/runs/run: Access Denied'):
            use()
