"""Rows of metrics outlive damage: what is whole is kept, what is not is left out with a word."""

import json
import os
from pathlib import Path

import pytest

from sharding.errors import UserError
from training.metrics import Metrics, read

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


@pytest.mark.parametrize('name', ['metrics.jsonl', 'loss.png', 'tensorboard'])
@pytest.mark.parametrize('kind', ['folder', 'file', 'fifo', 'loop', 'nowhere'])
def test_what_has_a_name_and_is_of_another_kind_is_told_before_the_first_step(tmp_path, name, kind):
    path = tmp_path / name
    if kind == ('folder' if name == 'tensorboard' else 'file'):
        return
    match kind:
        case 'folder':
            path.mkdir()
        case 'file':
            path.write_text('x')
        case 'fifo':
            os.mkfifo(path)
        case _:
            path.symlink_to({'loop': name}.get(kind, kind))
    if (name, kind) == ('metrics.jsonl', 'nowhere'):
        Metrics(tmp_path, 0, pytest.fail).close()  # a new file takes the link's place
        assert not path.is_symlink()
        assert not (tmp_path / 'nowhere').exists()
        return
    with pytest.raises(UserError, match=name.replace('.', r'\.')):
        Metrics(tmp_path, 0, pytest.fail)
