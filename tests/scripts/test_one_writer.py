"""Two processes on one run folder: the second is refused before it touches anything, and readers are not."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.runs import everything, rows, run, start, workplace
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.storage.checkpoint import Checkpoints
from weft.storage.lock import Lock, Taken
from weft.training.exporting import export_run
from weft.training.importing import import_run

SMALL = 'tiny.yaml', 'mesh={}', 'model.layers=1', 'model.moe=null', 'metrics.validate_every=100000'


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    place = workplace(tmp_path)
    folder = place / 'runs' / 'tiny'
    often = 'training.steps=100000', 'checkpoint.every=1', 'checkpoint.keep=1'
    with start(place, 'train', *SMALL, *often) as first:
        until = time.monotonic() + 200
        while first.poll() is None and time.monotonic() < until and not Checkpoints(folder).steps():
            time.sleep(0.05)
        began = set(everything(place / 'runs'))
        for options in ([], ['--fresh']):
            line = run(place, 'train', *SMALL, *often, *options, code=2).stderr.splitlines()[-1]
            assert line.startswith(f'error: runs/tiny is being written by process {first.pid} of host ')
            assert f'(train.py {" ".join(SMALL[:1])}' in line
        told = run(place, 'decode', 'runs/tiny', '--prompt', 'def ', '--max-new-tokens', '2', '--json')
        assert json.loads(told.stdout)['tokens']
        assert {path.partition('/')[0] for path in everything(place / 'runs')} == {
            path.partition('/')[0] for path in began
        }
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=120)
    assert first.returncode == 143
    (step,) = Checkpoints(folder).steps()
    assert [row['step'] for row in rows(place)] == list(range(1, step + 1)), 'its rows are its own'
    assert sorted(path.name for path in (place / 'runs').iterdir()) == ['tiny']


def test_an_import_has_the_lock_before_it_reads_anything(tmp_path):
    with Lock(tmp_path / 'runs' / 'run'):
        with pytest.raises(Taken, match=f'is being written by process {os.getpid()} '):
            import_run(tmp_path / 'absent', tmp_path / 'runs' / 'run', MeshConfig(), say=str)
        assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['.run.lock']


@pytest.mark.parametrize('url', ['s3://bucket/x', 'gs://bucket/runs/x', 'https://host/x'])
def test_a_url_is_no_local_folder(tmp_path, url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in import_run, export_run:
        with pytest.raises(UserError, match=r'local folders; give one, such as runs/x'):
            make(Path('absent'), Path(url), mesh=MeshConfig(), say=str)
    assert list(tmp_path.iterdir()) == []
