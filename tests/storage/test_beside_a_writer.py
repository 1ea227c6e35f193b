"""Whoever opens a run while it is trained reads a whole checkpoint, however fast they come and go."""

import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from tests.storage.store import bucket
from tests.storage.test_checkpoint import bits, restored_small, small
from weft.runtime.errors import UserError
from weft.storage import checkpoint_reader
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.checkpoint import Checkpoints
from weft.storage.checkpoint_reader import Gone, read_newest
from weft.storage.lock import Lock


@contextmanager
def writer(folder: Path) -> Iterator[Callable[[], int]]:
    """Saves as fast as it can, and keeps one. Gives a function: how many it has published."""
    over, published = threading.Event(), 0

    def work() -> None:
        nonlocal published
        checkpoints, step = checkpoints_of(folder, keep=1), 1
        while not over.is_set():
            checkpoints.save(step, small(step), {'step': step}, {'config.yaml': b'x'})
            checkpoints.wait()
            published, step = published + 1, step + 1
        checkpoints.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not checkpoints_of(folder).steps():
            pass
        yield lambda: published
    finally:
        over.set()
        thread.join()


def opened(checkpoints: Checkpoints) -> int:
    """Reads the newest as a script does, and looks that it is one."""

    def read(step: int) -> int:
        assert checkpoints.meta(step) == {'step': step}
        assert checkpoints.files(step)['config.yaml'] == b'x'
        assert bits(restored_small(checkpoints, step)) == bits(small(step))
        return step

    return read_newest(checkpoints, read)


def test_two_hundred_openings_beside_a_run_that_keeps_one_checkpoint(tmp_path, capsys):
    with writer(tmp_path) as published:
        reader = Checkpoints(tmp_path)
        steps = [opened(reader) for _ in range(200)]
        assert published() > 10
    assert steps == sorted(steps)
    assert len(set(steps)) > 5
    told = capsys.readouterr().err.splitlines()
    assert all('has deleted or replaced' in line or 'has no checkpoint of step' in line for line in told)


def test_openings_beside_a_run_in_a_bucket(monkeypatch):
    run = bucket(monkeypatch) / 'run'
    with writer(run) as published:
        steps = [opened(checkpoints_of(run)) for _ in range(50)]
        assert published() > 5
    assert steps == sorted(steps)


@pytest.mark.parametrize('form', ['orbax', 'orbax, no links to open files', 'shards', 'bucket', 'orbax in a bucket'])
@pytest.mark.parametrize('moment', ['_manifest', '_verify', '_content', '_read_orbax', '_read_shards', 'after'])
def test_a_checkpoint_that_goes_at_any_moment_is_read_anew(form, moment, tmp_path, monkeypatch):
    """As it goes, so do its files: by a rename, an object at a time, or before the last of them is read."""
    folder = bucket(monkeypatch) / 'run' if 'bucket' in form else tmp_path
    checkpoints = checkpoints_of(folder, keep=5)
    for step in 1, 2:
        if form == 'shards':
            arrays = iter(small(step)['model'].items())
            checkpoints.save_weights(step, 'model', arrays, {'step': step}, {'config.yaml': b'x'})
        elif form.endswith('in a bucket'):
            local = Checkpoints(tmp_path / 'local')
            local.save(step, small(step), {'step': step}, {'config.yaml': b'x'})
            local.close()
        else:
            checkpoints.save(step, small(step), {'step': step}, {'config.yaml': b'x'})
            checkpoints.wait()
    for path in (tmp_path / 'local').rglob('*'):
        if path.is_file():
            (folder / path.relative_to(tmp_path / 'local').as_posix()).upload(path)

    def go() -> None:
        gone = folder / 'checkpoints' / '2'
        if 'bucket' in form:
            gone.delete(sorted(gone.files(), key=lambda name: name != 'manifest.json'))
        elif gone.exists():
            shutil.rmtree(gone)

    kind = type(checkpoints)
    name = {'after': '_read_shards' if form in ('shards', 'bucket') else '_read_orbax'}.get(moment, moment)
    real, calls = getattr(kind, name), []

    def wrapped(self, *arguments):
        if not calls and moment != 'after':
            calls.append(1)
            go()
        found = real(self, *arguments)
        if not calls:
            calls.append(1)
            go()  # what it found may be of files that were there in part
        return found

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {'model': small(0)['model']}
    )
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, wrapped)
        if 'no links' in form:
            patch.setattr(checkpoint_reader, 'open_files', lambda: 0)
        found = read_newest(checkpoints, lambda step: (step, checkpoints.meta(step), checkpoints.restore(step, shapes)))
    step = found[0]
    assert found[1] == {'step': step}
    assert bits(found[2]['model']) == bits(small(step)['model'])
    if not calls:
        assert moment in ('_read_orbax', '_read_shards'), 'the other way to read was taken'
    elif moment == 'after' or (moment, form) in (('_read_orbax', 'orbax'), ('_read_orbax', 'orbax in a bucket')):
        # What was hashed, or is open, is read to its end; where files cannot be kept open nobody knows what was read.
        assert step == (1 if form == 'orbax, no links to open files' else 2)
    else:
        assert step == 1


def test_where_no_links_can_be_made_the_checkpoint_itself_is_read(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {'step': 1}, {'config.yaml': b'x'})
    checkpoints.close()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'absent'))
    assert opened(checkpoints) == 1
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    assert opened(checkpoints) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoints'], 'no link is left'


def test_a_step_that_is_asked_for_and_goes_is_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in 1, 2:
        checkpoints.save(step, small(step), {})
    checkpoints.close()

    def read(step: int) -> None:
        shutil.rmtree(tmp_path / 'checkpoints' / str(step))
        checkpoints.meta(step)

    with pytest.raises(UserError, match=r'--step 1: .* has no checkpoint of step 1; it has 2') as caught:
        read_newest(checkpoints, read, 1)
    assert '\n' not in str(caught.value)

    monkeypatch.setattr(checkpoint_reader, 'AGAIN', 3)
    with pytest.raises(UserError, match=r'3 checkpoints in a row were deleted .* larger checkpoint\.keep'):
        read_newest(checkpoints, lambda step: (_ for _ in ()).throw(Gone('gone')))


def test_a_damaged_checkpoint_is_not_taken_for_one_that_went(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in 1, 2:
        checkpoints.save(step, small(step), {})
    checkpoints.close()
    (tmp_path / 'checkpoints' / '2' / 'meta.json').unlink()
    with pytest.raises(UserError, match=r'2/meta\.json is missing; remove .*/2 to go on from step 1') as caught:
        read_newest(checkpoints, checkpoints.meta)
    assert not isinstance(caught.value, Gone)


def test_the_lock_and_the_saves_of_two_processes_in_every_order(tmp_path):
    """Starting, saving and ending: whoever comes second while the first is there is refused, and neither spoils a save."""
    for number, order in enumerate(set(itertools.permutations('ABCabc'))):
        if [order.index(x) for x in 'ABC'] != sorted(order.index(x) for x in 'ABC'):
            continue
        if [order.index(x) for x in 'abc'] != sorted(order.index(x) for x in 'abc'):
            continue
        run = tmp_path / f'run{number}'
        holding: dict[str, tuple[Lock, Checkpoints]] = {}
        saved: list[int] = []
        for what in order:
            who = what.lower() == what
            match what.upper():
                case 'A':
                    lock = Lock(run)
                    try:
                        lock.__enter__()
                    except UserError:
                        assert holding
                        continue
                    assert not holding
                    holding[str(who)] = lock, Checkpoints(run, keep=1, lock=lock)
                case 'B' if str(who) in holding:
                    step = len(saved) + 1
                    holding[str(who)][1].save(step, small(step), {'step': step})
                    saved.append(step)
                case 'C' if str(who) in holding:
                    lock, checkpoints = holding.pop(str(who))
                    checkpoints.close()
                    lock.__exit__(None, None, None)
        assert not holding
        assert saved
        assert Checkpoints(run).steps() == saved[-1:]
        assert bits(restored_small(Checkpoints(run), saved[-1])) == bits(small(saved[-1]))
        assert not (tmp_path / f'.run{number}.lock').exists()
