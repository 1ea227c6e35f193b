"""What a run writes down about itself: metrics.jsonl, TensorBoard, loss.png."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weft.runtime import streams
from weft.runtime.errors import UserError, shown
from weft.storage import files as disk
from weft.training.board import Board
from weft.training.patient import Patient
from weft.training.picture import draw

MOST = 2**31  # bytes of a metrics.jsonl
DRAWN = ('step', 'loss', 'router.max_share', 'validation_loss', 'validation_bits_per_byte')


class Metrics:
    """Appends rows to folder/metrics.jsonl and folder/tensorboard, and draws folder/loss.png.

    Rows after `step`, which a restored checkpoint does not know, are cut; damaged ones are left out, and `say` is told how
    many. On a full disk rows wait in memory, and stderr says so. Raises UserError where something else has one of the names.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None] = print):
        self.folder = folder
        self.path = folder / 'metrics.jsonl'
        for name, kind, is_right in (('loss.png', 'file', Path.is_file), ('tensorboard', 'folder', Path.is_dir)):
            if os.path.lexists(folder / name) and not is_right(folder / name):
                raise UserError(f'{shown(folder / name)}: is no {kind}; move away what stands there')
        rows, damaged = read(self.path)
        if damaged:
            say(f'{self.path}: {damaged} damaged row{"s" * (damaged > 1)} left out')
        rows = [row for row in rows if row['step'] <= step]
        disk.write(self.path, ''.join(json.dumps(row) + '\n' for row in rows).encode())
        self.rows = [brief(row) for row in rows]
        self.file = Patient(self.path, streams.say)
        self.board = Board(folder / 'tensorboard', step, streams.say)

    def log(self, row: dict[str, Any]) -> None:
        """One row; all of its numbers go to TensorBoard too."""
        self.rows.append(brief(row))
        self.file.write((json.dumps(row) + '\n').encode())
        numbers = {name: value for name, value in row.items() if name != 'step'}
        self.board.add(row['step'], dict(_numbers(numbers)))

    def flush(self) -> None:
        """Returns when all rows are on the disk that it takes."""
        self.file.sync()
        self.board.file.sync()

    def close(self) -> None:
        """Writes what is pending, and the picture. Raises MachineError where the disk does not take it."""
        with contextlib.ExitStack() as last:
            if self.rows:
                last.callback(draw, self.rows, self.folder / 'loss.png', self.folder.name)
            last.callback(self.board.file.close)
            last.callback(self.file.close)

    def abandon(self) -> None:
        """Writes nothing more: the folder is another process' now."""
        self.file.abandon()
        self.board.file.abandon()


def _numbers(value: Any, name: str = '') -> Iterator[tuple[str, float]]:
    """The numbers of a row by name; of a list each of its own: what layers log by layer has the layers first."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _numbers(part, f'{name}/{key}' if name else str(key))


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What `draw` needs of a row, which a long run keeps in memory."""
    kept = {name: value for name, value in row.items() if name in DRAWN}
    return kept | ({'experts': len(row['router.load'][0])} if 'router.load' in row else {})


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole rows of a metrics.jsonl, and how many are damaged; a last line that a kill cut short is neither."""
    try:
        lines = disk.read(path, MOST).split(b'\n')[:-1]
    except FileNotFoundError:
        return [], 0
    rows = [row for row in map(_row, lines) if row is not None]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """A row that has what is needed of one: its step, the loss and whatever else is drawn. None for a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(step := row.get('step')) is not int or 'loss' not in row:
        return None
    drawn = [row.get(name, 0) for name in DRAWN[1:]]
    if 'validation_loss' in row:
        drawn.append(row.get('validation_bits_per_byte'))
    if 'router.max_share' in row or 'router.load' in row:
        load = row.get('router.load')
        experts = len(load[0]) if isinstance(load, list) and load and isinstance(load[0], list) else None
        drawn += [row.get('router.max_share'), experts]
    return row if 0 < step < 2**63 and all(map(_is_drawable, drawn)) else None


def _is_drawable(value: Any) -> bool:
    if type(value) is float and not math.isfinite(value):
        return True
    return type(value) in (int, float) and abs(value) < 2**63
