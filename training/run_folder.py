"""The folder that a script is given as RUN: a run, or one line that says what it is instead."""

import os
import stat
from pathlib import Path

from weft.runtime.errors import UserError, nearest_path, shown
from weft.storage.buckets import Bucket, at


def run_folder(given: str | Path | Bucket) -> Path | Bucket:
    """A run's folder, local or in a bucket. Raises UserError where there is no run."""
    folder = at(given)
    name = shown(folder)
    if isinstance(folder, Path):
        run, part = _within(folder)
        if run is not None:
            step = f', with --step {part} for this checkpoint' if part.isdecimal() else ''
            raise UserError(f'{name}: is a part of a run; give the run: {shown(run)}{step}')
        if folder.exists() and not folder.is_dir():
            raise UserError(f'{name}: is a file; a run is a folder such as runs/demo')
    if not (folder / 'config.yaml').is_file():
        near = nearest_path(str(folder), runs) if (runs := _runs(folder.parent)) else ''
        raise UserError(f'{name}: not a run, for it has no config.yaml{near}')
    return folder


def _within(folder: Path) -> tuple[Path | None, str]:
    """The run that a path leads into, and which of its checkpoints is named; None for anything else."""
    for run, part in ((folder.parent.parent, folder.name), (folder.parent, '')):
        inside = folder.parent.name == 'checkpoints' if part else folder.name in ('checkpoints', 'config.yaml')
        if inside and folder.exists() and (run / 'config.yaml').is_file():
            return run, part
    return None, ''


def _runs(folder: Path | Bucket) -> list[str]:
    if isinstance(folder, Bucket):
        names = folder.names() if '/' in folder.key else []  # all of a bucket is not a folder of runs
        return [str(folder / name) for name in names if (folder / name / 'config.yaml').is_file()]
    return [str(path.parent) for path in folder.glob('*/config.yaml')] if folder.is_dir() else []


def check_new(runs: Path | Bucket, name: str) -> None:
    """Raises UserError where a run's folder cannot be made in `runs`, or something else has its name."""
    if isinstance(runs, Bucket):
        return
    folder = at(runs / name)
    assert isinstance(folder, Path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f'{shown(folder)}: is there and is no folder; choose another name, or move it away')
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not stat.S_ISDIR(there.stat().st_mode):
        raise UserError(f'--runs {shown(runs)}: {shown(there)} is no folder; runs are folders in it')
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f'--runs {shown(runs)}: {shown(there)} cannot be written to')
