"""Two processes of four devices are one process of eight: in losses, in checkpoints, in how they end."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.scripts.runs import rows, run, start_together, workplace
from weft.storage.checkpoint import Checkpoints

STEPS = 24
# One layer: two processes compile without each other's help, and that is what takes the time here.
ARGUMENTS = (
    *('tiny.yaml', 'model.layers=1', 'model.moe.first_dense_layers=0'),
    *(f'training.steps={STEPS}', 'checkpoint.every=2', 'metrics.validate_every=100'),
)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('processes'))


@pytest.fixture(scope='module')
def alone(place) -> list[dict]:
    """The rows of one process of eight devices that nobody disturbs; its checkpoint of step 22 stays."""
    run(place, 'train', *ARGUMENTS, 'name=alone')
    return rows(place, 'alone')


def figures(found: list[dict]) -> np.ndarray:
    return np.array([[row['tokens'], row['loss'], row['grad_norm']] for row in found])


def together(place: Path, *arguments: str, until: int = 0, **variables: str) -> list[subprocess.Popen]:
    """Two processes at work, past step `until`, with more environment variables."""
    pair = start_together(place, 2, *ARGUMENTS, *arguments, **variables)
    name = next(word.removeprefix('name=') for word in arguments if word.startswith('name='))
    deadline = time.time() + 200
    log = place / 'runs' / name / 'metrics.jsonl'
    while until and time.time() < deadline and all(process.poll() is None for process in pair):
        if log.exists() and len(log.read_text().splitlines()) > until:
            break
        time.sleep(0.02)
    return pair


def ends(pair: list[subprocess.Popen], timeout: float = 200) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    found = []
    try:
        for process in pair:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in pair:
            process.kill()
    return found


def test_disturbed_in_every_way_it_ends_as_one_process_undisturbed(place, alone):
    name = 'name=pair'
    # SIGTERM to one process stops both, at one step, with one checkpoint.
    pair = together(place, name, until=8)
    pair[1].send_signal(signal.SIGTERM)
    first, second = ends(pair)
    assert (first[0], second[0]) == (143, 143), (first, second)
    stopped = Checkpoints(place / 'runs' / 'pair').newest()
    assert f'stopped by SIGTERM after step {stopped}, saved' in first[1]
    assert [row['step'] for row in rows(place, 'pair')] == list(range(1, stopped + 1))
    assert stopped < STEPS - 6
    assert second[1:] == ('', ''), 'process 0 alone speaks'
    assert first[2] == ''
    # A process that is lost ends the other with a line that names it, whichever it is.
    for lost in 1, 0:
        pair = together(place, name, until=len(rows(place, 'pair')) + 2)
        pair[lost].kill()
        killed = time.time()
        code, _, err = ends(pair)[1 - lost]
        assert time.time() - killed < 60
        assert code == 75, err
        assert err.startswith(f'error: process {lost} (host {socket.gethostname()}) was lost'), err
        assert len(err.splitlines()) == 1, err
    # A process that is stopped ends the other in the time that it may be silent, and itself once it goes on.
    pair = together(place, name, until=len(rows(place, 'pair')) + 2, WEFT_PATIENCE='8')
    pair[1].send_signal(signal.SIGSTOP)
    stopped = time.time()
    _, err = pair[0].communicate(timeout=120)
    assert time.time() - stopped < 60
    assert pair[0].returncode == 75, err
    assert err.startswith(f'error: process 1 (host {socket.gethostname()}) hangs: it has given no sign of life for '), (
        err
    )
    assert len(err.splitlines()) == 1, err
    pair[1].send_signal(signal.SIGCONT)
    assert [code for code, *_ in ends(pair[1:])] == [75]
    # One process of eight devices goes on with what two of four have left.
    run(place, 'train', *ARGUMENTS, name)
    found = rows(place, 'pair')
    assert [row['step'] for row in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(figures(found)[0], figures(alone)[0], rtol=1e-6)
    np.testing.assert_allclose(figures(found), figures(alone), rtol=1e-5)
    assert found[-1]['validation_bits_per_byte'] == pytest.approx(alone[-1]['validation_bits_per_byte'], rel=1e-5)


def test_two_processes_go_on_with_what_one_has_left(place, alone):
    shutil.copytree(place / 'runs' / 'alone', place / 'runs' / 'parted')
    shutil.rmtree(place / 'runs' / 'parted' / 'checkpoints' / str(STEPS))
    for code, _, err in ends(together(place, 'name=parted')):
        assert (code, err) == (0, '')
    found = rows(place, 'parted')
    assert [row['step'] for row in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(figures(found), figures(alone), rtol=1e-5)
    assert found[-1]['validation_bits_per_byte'] == pytest.approx(alone[-1]['validation_bits_per_byte'], rel=1e-5)


def test_a_mistake_that_process_0_finds_ends_all(place):
    before = sorted(place.rglob('*'))
    first, second = ends(together(place, 'name=nothing', 'data.source=nowhere'))
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert first[2].startswith('error: ')
    assert 'nowhere' in first[2]
    assert len(first[2].splitlines()) == 1
    assert second[1:] == ('', '')
    assert before == sorted(place.rglob('*'))


def test_processes_that_cannot_share_the_devices_evenly(place):
    told = ('--coordinator', 'here:1', '--processes', '3', '--process', '0')
    (line,) = run(place, 'train', 'tiny.yaml', *told, code=2).stderr.splitlines()
    assert line.startswith('error: mesh (data=2 expert=2 tensor=2) asks for 8 devices and there are 3 processes')
    assert 'nearest that work: 6 or 9' in line
