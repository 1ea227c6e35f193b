"""A run's folder on this machine: itself if it is local; if it is in a bucket, a temporary copy of all but its checkpoints.

Data is read at any place of its files, and metrics and TensorBoard append, which only local files can. So a process works on
the copy, and process 0 uploads what has changed before each checkpoint, after each validation and at the end. `TMPDIR` says
where copies lie.
"""

import shutil
import tempfile
from pathlib import Path

from weft.storage import files as disk
from weft.storage.buckets import Bucket, at_once

LAST_WRITTEN = 'data/data.json'  # data is there if this is: deleted before data changes, uploaded after all of it
LEFT = ('checkpoints/', 'tensorboard/')  # folders of a run in a bucket that are not copied


class LocalCopy:
    """`folder` is the run's, `local` the one to work on. Close it; data that was opened stays readable."""

    def __init__(self, folder: Path | Bucket):
        self.folder = folder
        self._temporary: Path | None = None
        self._known: dict[str, tuple[int, int]] = {}
        if isinstance(folder, Bucket):
            self._temporary = Path(tempfile.mkdtemp(prefix='weft-'))
            self.local = self._temporary / folder.name
        else:
            self.local = folder

    def fetch(self) -> None:
        """Brings what is there. Data that a kill left in parts is not there."""
        if not isinstance(self.folder, Bucket):
            return
        found = self.folder.files()
        names = [name for name in found if not name.startswith(LEFT) and (LAST_WRITTEN in found or name[:5] != 'data/')]
        self.folder.download(self.local, names)
        self._known = {name: self._stamp(name) for name in names}

    def push(self) -> None:
        """Uploads what has changed here."""
        folder = self.folder
        if not isinstance(folder, Bucket):
            return
        files = [path.relative_to(self.local).as_posix() for path in self.local.rglob('*') if path.is_file()]
        stamps = {name: self._stamp(name) for name in files}
        changed = [name for name, stamp in stamps.items() if self._known.get(name) != stamp]
        if any(name.startswith('data/') for name in changed):
            folder.delete([LAST_WRITTEN])
        at_once(
            lambda name: (folder / name).upload(self.local / name), [name for name in changed if name != LAST_WRITTEN]
        )
        if LAST_WRITTEN in changed:
            (folder / LAST_WRITTEN).upload(self.local / LAST_WRITTEN)
        self._known = stamps

    def adopt(self, other: 'LocalCopy') -> None:
        """Takes over the files of another, whose folder was never written to; this one's folder is empty or away."""
        if self._temporary:
            disk.remove(self.local)
        disk.rename(other.local, self.local)
        self._known = {}
        other.close()

    def close(self) -> None:
        """Deletes the copy."""
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _stamp(self, name: str) -> tuple[int, int]:
        found = (self.local / name).stat()
        return found.st_size, found.st_mtime_ns


def set_aside(folder: Path | Bucket) -> Path | Bucket:
    """Moves a run out of the way of a new one, whole; where it is now."""
    number = next(n for n in range(1, 10**6) if not folder.with_name(f'{folder.name}.old-{n}').exists())
    name = f'{folder.name}.old-{number}'
    if isinstance(folder, Path):
        disk.rename(folder, folder.with_name(name))
        return folder.with_name(name)
    # Copied and deleted: what vouches for others is the last to be there and the first to go, wherever this is killed.
    target, names = folder.with_name(name), list(folder.files())
    last = [name for name in names if name == LAST_WRITTEN or name.endswith('/manifest.json')]
    others = [name for name in names if name not in last]
    folder.copy(target, others)
    folder.copy(target, last)
    folder.delete(last)
    folder.delete(others)
    return target
