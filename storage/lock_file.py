"""The file or object that is a run's lock: what it says of its holder, and where it lies. storage/lock.py uses it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from weft.runtime.errors import shown
from weft.storage import files
from weft.storage.buckets import Bucket
from weft.storage.foreign import read_own_object
from weft.storage.staged import making

LONG = 4096  # bytes of a record
# What file systems without locks say.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class LockGone(Exception):
    """The lock's file was removed or replaced while it was being taken: ask again."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a lock's file says of its holder; empty where it is being written."""

    token: str = ''  # of one holding
    beats: int = 0
    host: str = '?'
    boot: str = ''  # of the kernel
    process: int = 0
    space: str = ''  # in which the process has that number
    began: str = ''  # the process, in the kernel's ticks
    since: str = '?'
    command: str = '?'

    def __str__(self) -> str:
        if not self.token:
            return 'another process'
        return f'process {self.process} of host {shown(self.host, 80)} since {shown(self.since, 40)} ({shown(self.command)})'

    def written(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode().ljust(LONG)

    @property
    def is_dead(self) -> bool:
        """Whether this machine knows that the holder has ended."""
        own = own_record()
        if (self.boot, self.space) != (own.boot, own.space) or not self.token:
            return False
        return _began(self.process) != self.began


def own_record() -> Record:
    """What others are told of this process."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Record(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot=_first_line('/proc/sys/kernel/random/boot_id') or socket.gethostname(),
        process=os.getpid(),
        space=_space(),
        began=_began(os.getpid()),
        since=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        command=shown(command, 400),  # with a JSON of at most LONG bytes, whatever was written there
    )


def _space() -> str:
    """The namespace of this process's number; empty where the machine has none, or does not tell."""
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


def record_of(content: bytes) -> Record:
    """What a lock's file says; an empty record where it says nothing that can be read."""
    with contextlib.suppress(ValueError, TypeError):
        found: dict[str, Any] = read_own_object(content)
        if all(type(found[field.name]) is field.type for field in dataclasses.fields(Record)):
            return Record(**found)
    return Record()


def _began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; '' where there is none."""
    # What follows the command's name, which may hold anything, in parentheses: the 22nd field is the 20th of them.
    fields = _first_line(f'/proc/{process}/stat').rpartition(')')[2].split()
    return fields[19] if len(fields) > 19 else ''


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding='utf-8', errors='replace').partition('\n')[0]
    except OSError:
        return ''


@dataclasses.dataclass
class LockFile:
    """A lock file on a disk."""

    path: Path
    clock: Path  # a folder that can be written, for the file system's time
    made: bool = False  # by this process, in one step
    locked: bool = False  # by the kernel, until this process ends
    blocked: bool = False  # by the kernel, for another process
    _file: int | None = None

    def open(self, record: Record) -> None:
        """Makes it, or opens what is there. Raises LockGone where it went meanwhile."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with making(self.path):
            try:
                self._file = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                made = True
            except FileExistsError:
                made = False
                try:
                    self._file = os.open(self.path, flags)
                except FileNotFoundError:
                    raise LockGone from None
        if self.lock() and made:
            self.made = True
            self.write(record)

    def lock(self) -> bool:
        """Asks the kernel for it; False where it is another's. Raises LockGone where another file has its name now."""
        assert self._file is not None
        with files.writing(self.path):
            got = _flock(self._file, fcntl.LOCK_EX)
        if got is not None:
            self.locked, self.blocked = got, not got
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
                got = _flock(descriptor, fcntl.LOCK_SH)
            return None if got is None else not got
        except FileNotFoundError:
            return False

    def read(self) -> Record | None:
        """What the file of that name says now; None where there is none."""
        try:
            with files.reading(self.path) as descriptor:
                return record_of(os.pread(descriptor, LONG, 0))
        except FileNotFoundError:
            return None

    def write(self, record: Record) -> None:
        assert self._file is not None
        with files.writing(self.path):
            os.pwrite(self._file, record.written(), 0)
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


def _flock(descriptor: int, kind: int) -> bool | None:
    """Asks the kernel for a lock: False where another process has it, None where the file system has none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


@dataclasses.dataclass
class LockObject:
    """A lock in a bucket."""

    path: Bucket
    made: bool = False
    locked = blocked = False  # there is no kernel to ask

    def open(self, record: Record) -> None:
        """Makes it if it is not there."""
        self.made = self.path.create(record.written())

    def lock(self) -> bool:
        return True

    def read(self) -> Record | None:
        """What it says now; None where there is none."""
        try:
            return record_of(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def write(self, record: Record) -> None:
        self.path.write_bytes(record.written())

    def silent(self) -> float:
        """Nobody's clock is known: it is watched for all of STALE."""
        return 0.0

    def remove(self) -> None:
        self.path.parent.delete([self.path.name])

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
