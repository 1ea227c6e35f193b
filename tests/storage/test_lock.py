"""One run has one writer: whatever is left of a killed one is no obstacle, and whoever lives is named."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.storage.store import Store, bucket, everything
from tests.storage.test_checkpoint import small
from weft.runtime.errors import MachineError, UserError
from weft.storage import files, lock
from weft.storage.checkpoint import Checkpoints
from weft.storage.lock import Lock, Taken
from weft.storage.lock_file import Record, own_record

CHILD = """
import sys
from pathlib import Path
from weft.storage.lock import Lock
with Lock(Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


def holder(run: Path) -> subprocess.Popen:
    """A process that holds a run's lock until its input ends."""
    child = subprocess.Popen(
        [sys.executable, '-c', CHILD, str(run)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == 'held\n'
    return child


@pytest.fixture
def quick(monkeypatch):
    """Times in which a test can wait."""
    monkeypatch.setattr(lock, 'BEAT', 0.05)
    monkeypatch.setattr(lock, 'STALE', 0.6)
    monkeypatch.setattr(lock, 'SETTLED', 0.15)


@pytest.fixture
def without_locks(monkeypatch, quick):
    """A file system that knows no locks."""

    def refuse(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', refuse)


def elsewhere(place: Path | str = '', **fields) -> Record:
    """What a process of another machine writes down."""
    record = dataclasses.replace(own_record(), host='far', boot='another', process=7, **fields)
    if place:
        Path(place).write_bytes(record.written())
    return record


def test_another_process_is_refused_and_told_who_has_it(tmp_path):
    run = tmp_path / 'runs' / 'demo'
    with holder(run) as child:
        with pytest.raises(Taken) as caught, Lock(run):
            pass
        line = str(caught.value)
        assert line.startswith(f'{run} is being written by process {child.pid} of host ')
        assert f'since {time.strftime("%Y-%m-%d")}' in line
        assert '(-c ' in line
        assert line.endswith('wait until it ends, or stop it')
        assert '\n' not in line
        child.stdin.close()
        assert child.wait() == 0
    assert list(tmp_path.iterdir()) == [], 'nothing is left of a lock, nor the folder that was made for it'
    with Lock(run):
        assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['.demo.lock']


def test_what_a_kill_leaves_is_no_obstacle(tmp_path, capsys):
    with holder(tmp_path / 'demo') as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (tmp_path / '.demo.lock').exists()
    begun = time.monotonic()
    with Lock(tmp_path / 'demo'):
        assert time.monotonic() - begun < 2
    assert capsys.readouterr().err == ''
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_holder_keeps_its_lock(tmp_path):
    with holder(tmp_path / 'demo') as child:
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(Taken, match=f'process {child.pid} '), Lock(tmp_path / 'demo'):
            pass
        child.send_signal(signal.SIGCONT)
        child.stdin.close()


def test_a_run_has_one_lock_by_whatever_path(tmp_path):
    (tmp_path / 'big' / 'demo').mkdir(parents=True)
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'demo').symlink_to(tmp_path / 'big' / 'demo')
    with Lock(tmp_path / 'big' / 'demo'), pytest.raises(Taken), Lock(tmp_path / 'runs' / '..' / 'runs' / 'demo'):
        pass
    with Lock(tmp_path / 'runs' / 'demo'), Lock(tmp_path / 'runs' / 'demo2'):
        assert (tmp_path / 'big' / '.demo.lock').exists()


@pytest.mark.parametrize('letter', ['x', '"', '\\', '\U0001f600', '\udcff', '\x1b'])
def test_whatever_its_command_is_a_holder_knows_its_own_lock(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(sys, 'argv', ['train.py', letter * 1000])
    with Lock(tmp_path / 'demo') as held:
        held.check(look=True)
        assert len((tmp_path / '.demo.lock').read_bytes()) == 4096
        with pytest.raises(Taken, match=rf'process {os.getpid()} .*\(train\.py '), Lock(tmp_path / 'demo'):
            pass


def test_two_at_once_are_one(tmp_path, quick):
    """Threads stand for processes: flock knows them apart by their open files."""
    inside, most, wins = 0, 0, 0
    guard, end = threading.Lock(), time.monotonic() + 1.0

    def work() -> None:
        nonlocal inside, most, wins
        while time.monotonic() < end:
            try:
                with Lock(tmp_path / 'demo'):
                    with guard:
                        inside, wins = inside + 1, wins + 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with guard:
                        inside -= 1
            except Taken:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert wins > 5
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_watched_for_a_sign_of_life(tmp_path, quick, capsys):
    """As on NFS whose locks are each machine's own: the kernel here gives the lock."""
    path, run = tmp_path / '.demo.lock', tmp_path / 'demo'
    elsewhere(path)
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.1):
            beats += 1
            elsewhere(path, beats=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Taken, match='process 7 of host far since'), Lock(run):
        pass
    ended.set()
    thread.join()
    assert 'process 7 of host far' in capsys.readouterr().err
    begun = time.monotonic()
    with Lock(run):
        assert 0.2 < time.monotonic() - begun < 5, 'it beats no more'
        assert json.loads(path.read_bytes())['host'] != 'far'
    assert 'watching its lock for up to 1 s' in capsys.readouterr().err
    elsewhere(path)
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    with Lock(run):
        pass
    assert capsys.readouterr().err == '', 'one that has been silent for long is not waited for'


@pytest.mark.parametrize('content', [b'', b'\0' * 2048, b'{', b'{"token": 5}', b'[' * 5000])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path, quick, content):
    (tmp_path / '.demo.lock').write_bytes(content)
    with Lock(tmp_path / 'demo'):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_flushed_for_other_machines(tmp_path, monkeypatch, quick):
    flushed = []
    monkeypatch.setattr(os, 'fsync', lambda file: flushed.append(os.pread(file, 4096, 0)))
    with Lock(tmp_path / 'demo'):
        path = tmp_path / '.demo.lock'
        assert flushed == [path.read_bytes()]
        until = time.monotonic() + 5
        while len(flushed) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert json.loads(flushed[1])['beats'] == 1


def test_a_new_file_that_says_nothing_yet_may_be_a_holders(tmp_path, quick, monkeypatch):
    """As where another machine has made it, and what it wrote is not seen here yet."""
    monkeypatch.setattr(lock, 'SETTLED', 2.0)
    path, held = tmp_path / '.demo.lock', []
    path.write_bytes(b'')

    def write() -> None:
        time.sleep(0.3)
        for beats in range(10):
            elsewhere(path, beats=beats)
            time.sleep(0.1)

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(Taken, match='process 7 of host far since'), Lock(tmp_path / 'demo') as mine:
        held.append(mine)
    thread.join()
    assert not held
    path.write_bytes(b'')
    os.utime(path, (time.time() - 5, time.time() - 5))
    begun = time.monotonic()
    with Lock(tmp_path / 'demo'):
        assert time.monotonic() - begun < 1, 'an old one is nobody’s'


@pytest.mark.parametrize('first', ['beside', 'inside'])
def test_a_run_has_one_lock_whoever_may_write_beside_it(tmp_path, monkeypatch, quick, first):
    """One user may write in the folder of runs, and another one in the run alone."""
    run, access, beside = tmp_path / 'demo', os.access, first == 'beside'
    run.mkdir()
    monkeypatch.setattr(os, 'access', lambda path, mode: access(path, mode) and (beside or path != tmp_path))
    with Lock(run):
        assert (tmp_path / '.demo.lock').exists() == beside
        assert (run / '.lock').exists() != beside
        beside = not beside
        with pytest.raises(Taken, match=f'is being written by process {os.getpid()} '), Lock(run):
            pass
        beside = not beside
    assert [path.name for path in tmp_path.rglob('*')] == ['demo'], 'whoever is refused leaves nothing'
    other = run / '.lock' if beside else tmp_path / '.demo.lock'
    for left in Record().written(), dataclasses.replace(own_record(), began='1').written(), elsewhere().written():
        other.write_bytes(left)
        with Lock(run):
            pass


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(tmp_path, monkeypatch, quick, capsys):
    """A file server keeps the kernel's lock of such a machine: another open file stands for it here."""
    path, run = tmp_path / '.demo.lock', tmp_path / 'demo'
    elsewhere(path)
    monkeypatch.setattr(lock, 'LEASE', 5.0)
    with open(path, 'rb') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        freeing = threading.Timer(1.2, fcntl.flock, (file, fcntl.LOCK_UN))
        freeing.start()
        with Lock(run) as held:
            assert held._file.locked
        freeing.join()
    told = capsys.readouterr().err.splitlines()
    assert ['watching its lock for up to 1 s' in told[0], 'asking again for up to 5 s' in told[1], len(told)] == [
        True,
        True,
        2,
    ]
    elsewhere(path)
    monkeypatch.setattr(lock, 'LEASE', 0.1)
    with open(path, 'rb') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Taken, match=r'is locked by process 7 of host far .*remove .*\.demo\.lock if '), Lock(run):
            pass


def test_a_lock_that_cannot_be_removed_or_looked_at_spoils_no_end(monkeypatch, quick, capfd):
    run = bucket(monkeypatch) / 'demo'
    with Lock(run):
        Store.before = staticmethod(lambda *_: (_ for _ in ()).throw(ConnectionError('no network')))
    assert 'runs/demo: its lock could not be removed, and the next process takes it over' in capfd.readouterr().err
    Store.before = staticmethod(lambda *_: None)
    run.parent.delete(['.demo.lock'])
    cat = Store.cat_file
    with Lock(run) as held:
        run.with_name('.demo.lock').write_bytes(elsewhere().written())
        while not held.lost:
            time.sleep(0.01)
        monkeypatch.setattr(Store, 'cat_file', lambda *_, **__: (_ for _ in ()).throw(ConnectionError('no network')))
        with pytest.raises(MachineError, match='process 7 of host far'):
            held.check()
        monkeypatch.setattr(Store, 'cat_file', cat)


@pytest.mark.parametrize('kind', ['folder', 'link', 'fifo'])
def test_what_has_the_locks_name_is_named_and_left(tmp_path, kind):
    path = tmp_path / '.demo.lock'
    {'folder': path.mkdir, 'link': lambda: path.symlink_to('/etc/passwd'), 'fifo': lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(UserError, match=r'\.demo\.lock'), Lock(tmp_path / 'demo'):
        pass
    assert os.path.lexists(path)


def test_a_place_where_no_lock_can_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'loop').symlink_to('loop')
    for place in tmp_path / 'file' / 'run', tmp_path / 'loop' / 'run', tmp_path / ('x' * 300), tmp_path / 'loop':
        with pytest.raises(UserError, match='cannot be made: '), Lock(place):
            pass


def test_without_locks_the_file_is_the_lock(tmp_path, without_locks, capsys):
    run, path = tmp_path / 'demo', tmp_path / '.demo.lock'
    with Lock(run) as held:
        with pytest.raises(Taken, match=f'process {os.getpid()} '), Lock(run):
            pass
        held.check()
    assert not path.exists()
    elsewhere(path)  # killed
    with Lock(run):
        pass
    dead = dataclasses.replace(own_record(), began='1')  # of this machine: the process of that number is another one
    path.write_bytes(dead.written())
    capsys.readouterr()
    with Lock(run):
        pass
    assert capsys.readouterr().err == ''
    assert not path.exists()


def test_of_two_that_take_over_at_once_one_has_it(tmp_path, without_locks):
    elsewhere(tmp_path / '.demo.lock')
    start, held, refused, over = threading.Barrier(3), [], [], threading.Event()

    def take() -> None:
        start.wait()
        try:
            with Lock(tmp_path / 'demo') as mine:
                held.append(mine)
                over.wait(10)
        except Taken:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(held) + len(refused) < 3:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1


def test_a_holder_that_was_taken_for_dead_writes_no_more(tmp_path, without_locks):
    path = tmp_path / '.demo.lock'
    with Lock(tmp_path / 'demo') as held:
        elsewhere(path)
        while not held.lost:
            time.sleep(0.01)
        with pytest.raises(MachineError, match=r'demo is no longer this process’s to write: process 7 of host far'):
            held.check()
    assert path.exists(), 'the lock is the other’s'


def test_a_process_that_stood_still_saves_nothing_into_anothers_run(tmp_path, without_locks, monkeypatch):
    """Its beat has not looked again when it wakes up."""
    monkeypatch.setattr(lock, 'BEAT', 1000.0)
    with Lock(tmp_path / 'demo') as held:
        elsewhere(tmp_path / '.demo.lock')
        held.check()
        checkpoints = Checkpoints(tmp_path / 'demo', lock=held)
        with pytest.raises(MachineError, match=r'no longer this process’s to write: process 7 of host far'):
            checkpoints.save(1, {}, {})
        checkpoints.close()
    assert not (tmp_path / 'demo').exists()


def test_a_process_that_loses_its_run_while_it_saves_changes_nothing_of_the_others(
    tmp_path, without_locks, monkeypatch
):
    """The new holder comes while what is written is flushed, the longest part of a save."""
    monkeypatch.setattr(lock, 'BEAT', 1000.0)
    run, moved = tmp_path / 'demo', []

    def lose(action: str, path: Path, what: object) -> None:
        if action == 'sync' and path.name == 'manifest.json':
            elsewhere(tmp_path / '.demo.lock')
        elif (tmp_path / '.demo.lock').read_bytes().count(b'"host": "far"') and action in ('rename', 'remove'):
            moved.append((action, path))

    with Lock(run) as held:
        checkpoints = Checkpoints(run, keep=1, lock=held)
        checkpoints.save(1, small(1), {})
        checkpoints.wait()
        with files.watched(lose):
            checkpoints.save(1, small(1), {})
            with pytest.raises(MachineError, match=r'no longer this process’s to write: process 7 of host far'):
                checkpoints.wait()
        checkpoints.close()
    assert moved == []


def test_a_run_in_a_bucket(monkeypatch, quick, capsys):
    run = bucket(monkeypatch) / 'demo'
    with Lock(run) as held:
        assert [key.rpartition('/')[2] for key in everything()] == ['.demo.lock']
        with pytest.raises(Taken, match=f'process {os.getpid()} of host .* since .*: wait'), Lock(run):
            pass
        Store.before = staticmethod(lambda *_: (_ for _ in ()).throw(ConnectionError('no network')))
        time.sleep(0.2)
        Store.before = staticmethod(lambda *_: None)
        held.check()  # a beat that failed is none lost
    assert everything() == {}
    place = run.with_name('.demo.lock')
    place.write_bytes(elsewhere().written())
    with Lock(run) as held:
        assert 'process 7 of host far' in capsys.readouterr().err
        place.write_bytes(elsewhere().written())
        while not held.lost:
            time.sleep(0.01)
        with pytest.raises(MachineError, match=r'process 7 of host far .*took it'):
            held.check()
    assert len(everything()) == 1
