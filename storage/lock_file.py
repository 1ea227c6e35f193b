"""The file or object that is a run's lock, and where it lies: see storage/lock.py, which says what is done with it."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

from weft.storage import files
from weft.storage.buckets import Bucket
from weft.storage.holder import LONG, Record, record_of
from weft.storage.staged import making

# What file systems without locks say.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class LockGone(Exception):
    """The lock's file was removed or replaced while it was being taken: ask again."""


class LockFile:
    """A lock file on a disk."""

    def __init__(self, path: Path, clock: Path | None = None):
        self.path = path
        self.clock = clock or path.parent  # a folder that can be written, for the file system's time
        self.made = False  # by this process, in one step
        self.locked = False  # by the kernel, until this process ends
        self.blocked = False  # by the kernel, for another process
        self._file: int | None = None

    def open(self, record: Record) -> None:
        """Makes it, or opens what is there. Raises LockGone where it went meanwhile."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        made = False
        with making(self.path):
            try:
                self._file = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                made = True
            except FileExistsError:
                try:
                    self._file = os.open(self.path, flags)
                except FileNotFoundError:
                    raise LockGone from None
        if self.lock() and made:
            self.made = True
            self.write(record.written())

    def lock(self) -> bool:
        """Asks the kernel for it; False where it is another's. Raises LockGone where another file has its name now."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locked, self.blocked = True, False
        except BlockingIOError:
            self.blocked = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise files.fault(self.path, error) from error
        try:
            if not os.path.samestat(self.path.lstat(), os.fstat(self._file)):
                raise LockGone
        except FileNotFoundError:
            raise LockGone from None
        return not self.blocked

    def is_taken(self) -> bool | None:
        """Whether a process has the kernel's lock on it; None where nobody can say. For a place that cannot be written."""
        try:
            with files.reading(self.path) as descriptor:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    return None
                return False
        except FileNotFoundError:
            return False

    def read(self) -> bytes | None:
        """What the file of that name says now."""
        try:
            with files.reading(self.path) as descriptor:
                return os.pread(descriptor, LONG, 0)
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        assert self._file is not None
        with files.writing(self.path):
            os.pwrite(self._file, content, 0)
            os.fsync(self._file)  # else it stays in this machine, and others see an empty file

    def silent(self) -> float:
        """Seconds since it was written, by the clock of its file system; 0 where that cannot be asked."""
        with making(self.path), tempfile.NamedTemporaryFile(dir=self.clock, prefix='.now.') as new:
            try:
                now, then = os.stat(new.name), self.path.stat()
            except FileNotFoundError:
                raise LockGone from None
        return now.st_mtime - then.st_mtime if now.st_dev == then.st_dev else 0.0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


class LockObject:
    """A lock in a bucket."""

    locked = blocked = False

    def __init__(self, at: Bucket):
        self.at, self.made = at, False

    def open(self, record: Record) -> None:
        """Makes it if it is not there."""
        self.made = self.at.create(record.written())

    def lock(self) -> bool:
        """There is no kernel to ask."""
        return True

    def read(self) -> bytes | None:
        """What it says now."""
        try:
            return self.at.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        self.at.write_bytes(content)

    def silent(self) -> float:
        """Nobody's clock is known: it is watched for all of STALE."""
        return 0.0

    def remove(self) -> None:
        self.at.parent.delete([self.at.name])

    def close(self) -> None:
        pass


def lock_places(folder: Path | Bucket) -> tuple[Path | Bucket, LockFile | None, list[Path]]:
    """Where this process takes a run's lock, where another may have it instead, and the folders that were made for it.

    The places change with who asks: one may write beside the run, and one whose mount or user differs may not.
    """
    if isinstance(folder, Bucket):
        return folder.with_name(f'.{folder.name}.lock'), None, []
    with making(folder):
        try:
            real = folder.resolve()
        except RuntimeError:  # links that lead to each other
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from None
        made = files.make_folder(real.parent)
        place, other = real.with_name(f'.{real.name}.lock'), real / '.lock'
        if not real.is_dir():
            return place, None, made
        if os.path.ismount(real) or not os.access(real.parent, os.W_OK | os.X_OK):
            place, other = other, place
    return place, LockFile(other, clock=place.parent), made


def read_record(file: LockFile | LockObject) -> Record | None:
    """What a lock's file says; None where there is none."""
    content = file.read()
    return None if content is None else record_of(content)
