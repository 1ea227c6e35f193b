"""Rows of metrics outlive damage: what is whole is kept, what is not is left out with a word."""

import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from tests.training.kinds import put
from weft.runtime.errors import MachineError, UserError
from weft.storage import files as disk
from weft.training.metrics import Metrics, read

ROWS = [{'step': step, 'loss': 1.5 / step, 'tokens': 8 * step} for step in range(1, 6)]


def written(folder: Path, *lines: bytes) -> Path:
    path = folder / 'metrics.jsonl'
    path.write_bytes(b''.join(lines))
    return path


def whole(rows: list[dict]) -> list[bytes]:
    return [json.dumps(row).encode() + b'\n' for row in rows]


ODD = [
    b'{"step": 1, "lo\xff\n',
    bytes(4096) + b'\n',
    b'{"a": 1}\n',
    b'[]\n',
    b'\n',
    b'{"step": "2", "loss": 1}\n',
    b'{"step": true, "loss": 1}\n',
    b'{"step": 2}\n',
    b'{"step": 2, "loss": null}\n',
    b'{"step": 2, "loss": 1, "validation_loss": 2}\n',
    b'{"step": 2, "loss": 1, "router.max_share": 0.5}\n',
    b'{"step": 2, "loss": 1, "router.max_share": 0.5, "router.load": []}\n',
    b'[' * 100_000 + b'\n',
    b'{"step": 1' + b'0' * 5000 + b', "loss": 1}\n',
]


@pytest.mark.parametrize('odd', ODD)
def test_a_damaged_row_is_left_out_with_a_word_and_the_file_is_whole_again(tmp_path, odd):
    lines = whole(ROWS)
    path = written(tmp_path, *lines[:2], odd, *lines[2:])
    assert read(path) == (ROWS, 1)
    told: list[str] = []
    metrics = Metrics(tmp_path, 4, told.append)
    assert told == [f'{path}: 1 damaged row left out']
    metrics.log({'step': 5, 'loss': 0.25})
    metrics.flush()
    metrics.close()
    assert path.read_bytes().splitlines(keepends=True) == [*lines[:4], b'{"step": 5, "loss": 0.25}\n']
    assert (tmp_path / 'loss.png').stat().st_size > 1000
    assert [one.name for one in tmp_path.glob('*.partial')] == []


def test_a_last_line_that_a_kill_cut_short_needs_no_word(tmp_path):
    path = written(tmp_path, *whole(ROWS), b'{"step": 6, "lo')
    assert read(path) == (ROWS, 0)
    Metrics(tmp_path, 5, pytest.fail).close()
    assert read(path) == (ROWS, 0)
    assert read(tmp_path / 'absent') == ([], 0)


def test_a_loss_that_is_no_number_is_a_row(tmp_path):
    rows = [{'step': 1, 'loss': float('inf')}]
    assert read(written(tmp_path, *whole(rows))) == (rows, 0)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        (name, kind)
        for name, right in (('metrics.jsonl', 'file'), ('loss.png', 'file'), ('tensorboard', 'folder'))
        for kind in ('folder', 'file', 'fifo', 'loop', 'nowhere')
        if kind != right
    ],
)
def test_what_has_a_name_and_is_of_another_kind_is_told_before_the_first_step(tmp_path, name, kind):
    path = tmp_path / name
    put(path, kind)
    if (name, kind) == ('metrics.jsonl', 'nowhere'):
        Metrics(tmp_path, 0, pytest.fail).close()  # a new file takes the link's place
        assert not path.is_symlink()
        assert not (tmp_path / 'nowhere').exists()
        return
    with pytest.raises(UserError, match=name.replace('.', r'\.')):
        Metrics(tmp_path, 0, pytest.fail)


def events(folder: Path) -> Iterator[Event]:
    """What TensorBoard reads."""
    for path in sorted((folder / 'tensorboard').glob('events.out.tfevents.*')):
        content = path.read_bytes()
        while content:
            (length,), body = struct.unpack('<Q', content[:8]), content[12:]
            event, content = body[:length], body[length + 4 :]
            assert body[length : length + 4] == struct.pack('<I', masked_crc32c(event))
            yield Event.FromString(event)


def test_tensorboard_has_the_numbers_of_each_row(tmp_path):
    metrics = Metrics(tmp_path, 4)
    metrics.log({'step': 5, 'loss': 0.25, 'router.max_share': 0.5, 'router.load': [[0.5, 0.25], [0.125, 0.0]]})
    metrics.close()
    version, start, row = events(tmp_path)
    assert version.file_version == 'brain.Event:2'
    assert (start.step, start.session_log.status) == (5, 1), 'what it had of step 5 and later is forgotten'
    assert row.step == 5
    assert abs(row.wall_time - os.stat(tmp_path / 'metrics.jsonl').st_mtime) < 60
    assert {one.tag: one.simple_value for one in row.summary.value} == {
        'loss': 0.25,
        'router.max_share': 0.5,
        'router.load/0/0': 0.5,
        'router.load/0/1': 0.25,
        'router.load/1/0': 0.125,
        'router.load/1/1': 0.0,
    }


@pytest.mark.parametrize('full', ['metrics.jsonl', 'tensorboard'])
@pytest.mark.parametrize('ends', [False, True])
def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path, capfd, full, ends):
    metrics, refuses = Metrics(tmp_path, 0), [False]

    def disk_of_this_size(action: str, path: Path, what: object) -> None:
        if refuses[0] and action == 'append' and full in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with disk.watched(disk_of_this_size):
        for row in ROWS:
            refuses[0] = row['step'] in (2, 3, 4)
            metrics.log(row)
            metrics.flush()
        refuses[0] = not ends
        metrics.log({'step': 6, 'loss': 1.0})
        if ends:
            metrics.close()
        else:
            with pytest.raises(MachineError, match=f'{full}.*No space left on device'):
                metrics.close()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == (2 if ends else 3), told
    assert 'No space left on device; what is written to it waits in memory until there is room' in told[0]
    assert 'has all of its rows again' in told[1]
    steps = [one.step for one in events(tmp_path)][2:]
    found = steps if full == 'tensorboard' else [row['step'] for row in read(tmp_path / 'metrics.jsonl')[0]]
    assert found == ([1, 2, 3, 4, 5, 6] if ends else [1, 2, 3, 4, 5])


def test_half_of_a_row_is_taken_back_where_the_disk_is_full(tmp_path, monkeypatch):
    """As a disk does that has room for a part of it."""
    file = disk.Appended(tmp_path / 'rows')
    file.write(b'first\n')

    class Small:
        def __init__(self, file):
            self.file, self.fileno = file, file.fileno

        def write(self, content: bytes) -> int:
            if len(content) < 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content[:4])

    whole, file._file = file._file, Small(file._file)
    with pytest.raises(MachineError, match='No space left on device'):
        file.write(b'second\n')
    file._file = whole
    file.write(b'third\n')
    file.close()
    assert (tmp_path / 'rows').read_bytes() == b'first\nthird\n'
