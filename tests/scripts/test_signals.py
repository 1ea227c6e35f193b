"""Signals to a training in each part of its life: the right code, and a checkpoint where there is something to save."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.runs import rows, run, start, workplace
from weft.storage.checkpoint import Checkpoints

LONG = 100_000
SMALL = ('mesh={}', 'model.layers=1', 'model.moe=null', f'checkpoint.every={LONG}', f'metrics.validate_every={LONG}')


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('signals'))


def training(place: Path, name: str, *more: str):
    return start(place, 'train', 'tiny.yaml', f'name={name}', *SMALL, *more, PYTHONUNBUFFERED='1')


def until(process, text: str) -> None:
    """Reads what it prints up to a line with this text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'it never said {text!r}: {process.stderr.read()}')


def test_usr1_saves_and_goes_on_hup_saves_and_leaves(place):
    with training(place, 'life', f'training.steps={LONG}') as process:
        until(process, 'step 3/')
        process.send_signal(signal.SIGUSR1)
        until(process, 'SIGUSR1: saving step ')
        until(process, 'step ')
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=120)
    first, last = Checkpoints(place / 'runs' / 'life').steps()
    assert (process.returncode, err) == (129, '')
    assert 'SIGHUP: saving after this step; SIGINT to stop at once' in out.splitlines()
    assert f'stopped by SIGHUP after step {last}, saved; run again to continue' in out
    assert 3 <= first < last == len(rows(place, 'life'))
    # It goes on from there with fewer steps, and says what that does to the rate.
    done = run(place, 'train', 'tiny.yaml', 'name=life', *SMALL, f'training.steps={last + 2}')
    (line,) = [line for line in done.stdout.splitlines() if 'learning rate' in line]
    found = rows(place, 'life')
    before, after = found[last - 1]['learning_rate'], found[last]['learning_rate']
    assert line == (
        f'training.steps was {LONG} and is {last + 2}: the schedule is of all steps, and the learning rate goes from '
        f'{before:.3g} at step {last} to {after:.3g} at step {last + 1}'
    )
    again = run(place, 'train', 'tiny.yaml', 'name=life', *SMALL, f'training.steps={last + 2}')
    assert f'has taken all of its {last + 2} steps already' in again.stdout
    assert 'compiling' not in again.stdout
    assert 'learning rate goes' not in again.stdout


def test_while_compiling_the_first_step_is_still_saved_and_ctrl_c_twice_ends_at_once(place):
    with training(place, 'compiling', f'training.steps={LONG}') as process:
        until(process, 'compiling the first step')
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, ''), out
    assert 'SIGTERM: saving after this step; once more to stop at once' in out.splitlines()
    assert Checkpoints(place / 'runs' / 'compiling').steps() == [1]
    with training(place, 'twice', f'training.steps={LONG}') as process:
        until(process, 'compiling the first step')
        process.send_signal(signal.SIGINT)
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, ''), out


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGTERM])
def test_while_the_data_is_prepared_nothing_is_left_that_the_next_start_cannot_use(place, number):
    with training(place, f'early{number}', 'training.steps=1') as process:
        until(process, 'plan: ')
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + number, f'stopped by {number.name}\n'), out
    assert Checkpoints(place / 'runs' / f'early{number}').steps() == []
    if number == signal.SIGTERM:
        run(place, 'train', 'tiny.yaml', f'name=early{number}', *SMALL, 'training.steps=1')
        assert not (place / 'runs' / f'early{number}' / 'data.partial').exists()


def test_a_training_whose_reader_goes_away_trains_to_its_end(place):
    with training(place, 'unread', 'training.steps=30') as process:
        until(process, 'compiling the first step')
        process.stdout.close()
        assert process.stderr.read() == ''
        assert process.wait(120) == 0
    assert Checkpoints(place / 'runs' / 'unread').newest() == 30
    found = run(place, 'evaluate', 'runs/unread', '--json', PYTHONIOENCODING='ascii')
    assert json.loads(found.stdout)['step'] == 30
