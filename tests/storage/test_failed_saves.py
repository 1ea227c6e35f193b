"""A save that fails is told at once, and training goes on to the next one; a run whose last save failed is not done."""

import errno
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.scripts.runs import workplace
from weft.runtime.errors import MachineError
from weft.storage import files as disk
from weft.storage.checkpoint import Checkpoints
from weft.storage.local_copy import LocalCopy
from weft.storage.manifest import MANIFEST
from weft.training import config as configs
from weft.training.config import RunConfig
from weft.training.loop import train
from weft.training.prepare_run import prepare_run


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('saves'))


def of(place: Path, name: str) -> RunConfig:
    small = (
        'model.layers=1',
        'model.moe=null',
        'training.batch=4',
        'metrics.validation_rows=2',
        'metrics.validate_every=100',
    )
    more = ('training.steps=6', 'checkpoint.every=2', f'data.source={place / "text"}', f'name={name}', 'mesh={}')
    return configs.load_config(place / 'tiny.yaml', [*small, *more])


def full(monkeypatch, *steps: int) -> None:
    """Lets the disk be full whenever the manifest of one of these steps is written."""
    put = disk.put

    def refusing(path, content):
        if path.name == MANIFEST and int(path.parent.name) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        put(path, content)

    monkeypatch.setattr(disk, 'put', refusing)


def test_it_goes_on_to_the_next_save(monkeypatch, place, capfd):
    full(monkeypatch, 4)
    assert train(of(place, 'once'), place / 'runs') == 0
    assert Checkpoints(place / 'runs' / 'once').steps() == [2, 6]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error')]
    assert line.startswith('error: a save failed: ')
    assert 'checkpoint 4 could not be saved: No space left on device; the newest whole checkpoint is of step 2' in line


def test_a_last_save_that_fails_is_no_good_end(monkeypatch, place, capfd):
    full(monkeypatch, 2, 6)
    with pytest.raises(MachineError, match=r'^the last save failed: .*checkpoint 6 .*No space left .* is of step 4$'):
        train(of(place, 'last'), place / 'runs')
    assert Checkpoints(place / 'runs' / 'last').steps() == [4]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error')]
    assert ['there is no whole checkpoint' in lines[0], 'is of step 4' in lines[1], len(lines)] == [True, True, 2]
    monkeypatch.undo()
    assert train(of(place, 'last'), place / 'runs') == 0
    assert Checkpoints(place / 'runs' / 'last').newest() == 6


def test_a_fault_of_the_code_is_no_failed_save(monkeypatch, place):
    monkeypatch.setattr(Checkpoints, '_complete', lambda *_: {}['k'])
    with pytest.raises(KeyError):
        train(of(place, 'fault'), place / 'runs')


@pytest.mark.parametrize('error', [KeyboardInterrupt(), MachineError('the disk fails')])
def test_a_fresh_run_that_is_not_made_leaves_nothing(monkeypatch, place, tmp_path, error):
    """The old one is where it was, and what was made beside it is gone: it may be as large as the data."""
    (tmp_path / 'once').mkdir()
    made = []

    def stop(folder: Path) -> None:
        made.extend(path.name for path in (tmp_path / '.once.new').iterdir())
        raise error

    monkeypatch.setattr('weft.training.prepare_run.set_aside', stop)
    with pytest.raises(type(error)):
        prepare_run(of(place, 'once'), LocalCopy(tmp_path / 'once'), fresh=True, console=Console(quiet=True))
    assert 'data' in made
    assert [path.name for path in tmp_path.iterdir()] == ['once']
