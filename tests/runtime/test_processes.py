"""Who a process is among several, which rows are its own, and how the line between processes ends."""

import functools
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest

from tests.runtime.one_of_several import play
from weft.data.shuffle import row_ids
from weft.model.forward import local_rows, place, place_rows
from weft.runtime import rendezvous as peers
from weft.runtime.errors import UserError
from weft.runtime.processes import Agreement, Launch, check_devices, detect_launch
from weft.sharding.mesh import MeshConfig, make_mesh

SLURM = {
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'a,b',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
}


def test_where_a_process_stands():
    assert detect_launch({}, {}) is None
    assert detect_launch({'coordinator': 'h:1', 'processes': '2', 'process': '1'}, {}) == Launch('h:1', 2, 1)
    variables = {'WEFT_COORDINATOR': '[::1]:9', 'WEFT_PROCESSES': '4', 'WEFT_PROCESS': '3'}
    assert detect_launch({}, variables) == Launch('[::1]:9', 4, 3)
    assert detect_launch({'process': '0'}, variables) == Launch('[::1]:9', 4, 0), 'an option goes before a variable'
    assert detect_launch({'coordinator': 'h:1', 'processes': '1', 'process': '0'}, {}) is None, 'one of one is alone'
    assert detect_launch({}, SLURM) == Launch(processes=2)
    assert detect_launch({}, SLURM | {'SLURM_NTASKS': '1'}) is None
    assert detect_launch({}, {name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'}) is None


MISTAKES = {
    'not all is told': (('h:1', None, None), r'--coordinator without --processes \(or WEFT_PROCESSES\), --process'),
    'no port': (('here', '2', '0'), "--coordinator is 'here': it must be HOST:PORT"),
    'no number': (('h:1', 'two', '0'), "--processes is 'two': it must be a whole number of at least 1"),
    'negative': (('h:1', '2', '-1'), "--process is '-1'"),
    'too high': (('h:1', '2', '2'), '--process is 2 and --processes is 2.*nearest that works: 1'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_named(name):
    values, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        detect_launch(dict(zip(('coordinator', 'processes', 'process'), values, strict=True)), {})


def test_a_variable_is_named_as_it_was_given():
    with pytest.raises(UserError, match="WEFT_PROCESS is 'x'"):
        detect_launch({}, {'WEFT_COORDINATOR': 'h:1', 'WEFT_PROCESSES': '2', 'WEFT_PROCESS': 'x'})


def test_devices_are_shared_out_evenly():
    check_devices(8, 4, 'mesh')
    with pytest.raises(UserError, match=r'8 devices and there are 3 processes.*nearest that work: 6 or 9'):
        check_devices(8, 3, 'mesh')
    with pytest.raises(UserError, match='nearest that work: 9 devices'):
        check_devices(8, 9, 'mesh')


@pytest.mark.parametrize('mesh', [MeshConfig(data=4, tensor=2), MeshConfig(replica=2, context=2, expert=2)], ids=str)
def test_rows_are_placed_by_parts_as_they_are_whole(mesh):
    tree = {'a': np.arange(24).reshape(8, 3).astype(np.int32), 'b': np.arange(8).astype(np.float32)}
    with jax.set_mesh(make_mesh(mesh)):
        asked = []

        def take(begin, end):
            asked.append((begin, end))
            return {name: array[begin:end] for name, array in tree.items()}

        whole, parts = place(tree), place_rows(8, take)
        assert asked == local_rows(8) == [(0, 8)], 'one process has all rows, and asks once'
        for name in tree:
            np.testing.assert_array_equal(parts[name], tree[name])
            assert parts[name].sharding == whole[name].sharding
            assert jax.typeof(parts[name]) == jax.typeof(whole[name])


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize(
    'mesh', [MeshConfig(data=8), MeshConfig(data=2, expert=2, tensor=2), MeshConfig(context=4, expert=2)], ids=str
)
def test_processes_read_the_same_rows_in_all(monkeypatch, mesh, processes):
    """Each process' devices are a part of the list; the rows that all read are the batch's, and no process reads others."""
    devices = make_mesh(mesh)
    batch = row_ids(100, seed=3, step=5, batch=16)
    with jax.set_mesh(devices):
        read = set()
        for process in range(processes):
            mine = set(np.array_split(jax.devices()[:8], processes)[process].tolist())
            with monkeypatch.context() as patch:
                patch.setattr(
                    jax.sharding.NamedSharding,
                    'addressable_devices_indices_map',
                    lambda self, shape, mine=mine: {
                        device: index for device, index in self.devices_indices_map(shape).items() if device in mine
                    },
                )
                spans = local_rows(16)
            rows = [n for begin, end in spans for n in range(begin, end)]
            where = [np.argwhere(devices.devices == device)[0] for device in mine]
            parts = {int(place[2] * mesh.expert + place[4]) for place in where}  # along data, expert
            share = 16 // (mesh.data * mesh.expert)
            assert rows == [n for part in sorted(parts) for n in range(part * share, (part + 1) * share)]
            read |= set(rows)
        assert sorted(read) == list(range(16))
        assert batch[sorted(read)].tolist() == batch.tolist()


def test_alone_everything_is_agreed_at_once():
    assert peers.first()
    assert not peers.several()
    assert peers.meet('anything', 5) == peers.at_first('anything', lambda: 5) == 5
    assert [Agreement(late=2)(n) for n in (0, 15)] == [0, 15]
    peers.leave()


@pytest.mark.parametrize(
    ('action', 'codes'),
    [
        ('leave', [0, 0, 0]),
        ('kill 0', [-9, 75, 75]),
        ('kill 2', [75, 75, -9]),
        ('fail 0', [2, 2, 2]),
        ('fail 1', [2, 2, 2]),
    ],
)
def test_an_end_is_an_end_for_all(action, codes, capfd):
    context = multiprocessing.get_context('spawn')
    box = context.Queue()
    began = time.monotonic()
    team = [context.Process(target=play, args=(n, 3, box, action)) for n in range(3)]
    for process in team:
        process.start()
    for process in team:
        process.join(60)
    assert [process.exitcode for process in team] == codes
    assert time.monotonic() - began < 60
    lines = capfd.readouterr().err.splitlines()
    if action.startswith('kill'):
        assert len(lines) == 2
        assert all(line.startswith(f'error: process {action[-1]} (host ') and 'was lost' in line for line in lines)
    elif action == 'fail 1':
        assert len(lines) == 1, 'process 0 says it'
        assert lines[0].startswith('process 1 (host ')
        assert lines[0].endswith('error: of its own')
    else:
        assert lines == []


@pytest.mark.parametrize('who', [0, 2])
def test_a_process_that_stands_still_ends_all_in_time(who, capfd, monkeypatch):
    """It is named, with its host; and it ends too, once it goes on."""
    monkeypatch.setenv(peers.VARIABLE, str(peers.LEAST))
    context = multiprocessing.get_context('spawn')
    box = context.Queue()
    team = [context.Process(target=play, args=(n, 3, box, f'stop {who}')) for n in range(3)]
    for process in team:
        process.start()
    others = [process for n, process in enumerate(team) if n != who]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [75, 75]
    assert team[who].is_alive()
    lines = capfd.readouterr().err.splitlines()
    wanted = f'error: process {who} (host {socket.gethostname()}) hangs: it has given no sign of life for '
    assert len(lines) == 2
    assert all(line.startswith(wanted) for line in lines), lines
    os.kill(team[who].pid, signal.SIGCONT)
    team[who].join(60)
    assert team[who].exitcode == 75


def test_a_process_that_works_is_not_taken_for_one_that_hangs(monkeypatch):
    monkeypatch.setenv(peers.VARIABLE, str(peers.LEAST))
    context = multiprocessing.get_context('spawn')
    box = context.Queue()
    team = [context.Process(target=play, args=(n, 2, box, 'work 1')) for n in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join(60)
    assert [process.exitcode for process in team] == [2, 2], (
        'its own code, after three times as long as it may be silent'
    )


@pytest.mark.parametrize(
    ('action', 'codes'),
    [
        ('busy', [2, 2, 2]),  # its own code, after twice as long as it may be silent
        ('busy then', [-9, 75, 75]),  # it stops once it is not busy any more
        ('late 1', [2, 2, 2]),  # process 0 has nothing to say before all have come
    ],
)
def test_a_process_that_may_be_silent_is_not_taken_for_one_that_hangs(action, codes, monkeypatch):
    monkeypatch.setenv(peers.VARIABLE, str(peers.LEAST))
    context = multiprocessing.get_context('spawn')
    box = context.Queue()
    team = [context.Process(target=play, args=(n, 3, box, action)) for n in range(3)]
    for process in team:
        process.start()
    for process in team[1:]:
        process.join(60)
    if 'then' in action:
        team[0].kill()
    team[0].join(60)
    assert [process.exitcode for process in team] == codes


@pytest.mark.parametrize('text', ['', '60', '2.5'])
def test_how_long_a_process_may_be_silent_can_be_said(monkeypatch, text):
    monkeypatch.setenv(peers.VARIABLE, text)
    assert peers.patience() == (float(text) if text else peers.PATIENCE) < 61


@pytest.mark.parametrize('text', ['0', '-1', 'nan', 'inf', 'long', '1e9', '1' * 5000])
def test_how_long_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv(peers.VARIABLE, text)
    with pytest.raises(
        UserError, match=r'WEFT_PATIENCE is .{,45}: it must be a number of seconds, at least 2'
    ) as raised:
        peers.patience()
    assert len(str(raised.value)) < 200


def test_a_stranger_is_not_let_in():
    """Whoever connects without the word is closed out, and the processes still find each other."""
    box: queue.Queue = queue.Queue()
    made = {}

    def exchange(number, message):
        if number == 0:
            with socket.create_connection(('localhost', message['port'])) as stranger:
                stranger.sendall(b'{"word": "guess", "process": 1, "name": "x"}\n')
            box.put(message)
            return message
        return box.get(timeout=30)

    def make(number):
        made[number] = peers._Peers(number, 2, functools.partial(exchange, number), lambda: None)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(made[0].links) == [1]
    leaving = [threading.Thread(target=made[number].leave) for number in range(2)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(60)
    for one in made.values():
        for link in one.links.values():
            link.socket.shutdown(socket.SHUT_RDWR)
            link.socket.close()
