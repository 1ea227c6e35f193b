"""One run, one writer: whatever writes a run holds its lock from before the first change to the end. Readers never ask for it.

    runs/.NAME.lock         who holds it (`Record`): beside the run, which may not be there yet, or be moved aside
    runs/NAME/.lock         there instead, where the run folder is a mount of its own or nothing may be written beside it
    s3://…/runs/.NAME.lock  of a run in a bucket

Three things keep a second writer out, each where the one before it cannot:

- The kernel's lock on that file (flock), which ends with its process however that ends. On NFS it holds between machines,
  unless they mount without locks or with local ones.
- A beat: the holder writes the file anew every few seconds. A file that another machine left is watched until it changes,
  which is a living holder, or has not for as long as STALE says: then the holder was killed. No two clocks are compared.
- Where there are no locks at all (a bucket, some network mounts) the file itself is the lock: it is made if it is not there, in
  one step. One that a dead holder left is overwritten and looked at again after SETTLED seconds: of two that do this at once
  the later one has it. A holder that finds another's record in its place saves nothing more.
"""

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
import threading
import time
from pathlib import Path
from typing import Any

from sharding.buckets import Bucket
from sharding.errors import MachineError, UserError, shown
from storage import files
from storage.sealed import read_object
from storage.staged import making

BEAT = 10.0  # seconds between two signs of life
STALE = 45.0  # seconds without one after which a holder that this machine cannot see is gone
SETTLED = 3.0  # seconds after which what another wrote at the same time is there to be seen
TRIES = 20  # times that a lock is asked for again because its file was removed meanwhile
LONG = 4096  # bytes of a record
NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
}  # what file systems without them say


class Taken(UserError):
    """Another process writes the run."""


class _Held(Exception):
    """A lock has a living holder, of whom this is known."""

    def __init__(self, record: 'Record'):
        self.record = record


class _Gone(Exception):
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
        return json.dumps(dataclasses.asdict(self)).encode()[:LONG].ljust(LONG)

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
        boot=_first_line(Path('/proc/sys/kernel/random/boot_id')) or socket.gethostname(),
        process=os.getpid(),
        space=_link('/proc/self/ns/pid'),
        began=_began(os.getpid()),
        since=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        command=command if len(command) <= 400 else f'{command[:399]}…',
    )


class Lock:
    """The lock of a run, held while the block lasts. Raises Taken, in a line that names the holder, where another has it."""

    def __init__(self, folder: Path | Bucket):
        self.folder = folder
        self.lost = False  # another process took it over: this one was taken for dead

    def __enter__(self) -> 'Lock':
        place, self._made = _place(self.folder)
        self._record = own_record()
        try:
            self._file = self._taken(place)
        except BaseException as error:
            self._unmake()
            if isinstance(error, _Held):
                raise self._refusal(error.record) from None
            raise
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name='lock', daemon=True)
        self._beats.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._ended.set()
        self._beats.join()
        try:
            if not self.lost and self._is_mine():
                self._file.remove()
        finally:
            self._file.close()
            self._unmake()

    def check(self, look: bool = False) -> None:
        """Raises MachineError where another process is known to have taken the run over.

        `look`: it is looked for now. Else what the last beat found is told, which costs nothing.
        """
        if look and not self.lost:
            with contextlib.suppress(UserError, MachineError, OSError):  # where nobody can say, the save will
                self.lost = not self._is_mine()
        if self.lost:
            now = _read(self._file)
            raise MachineError(
                f'{self.folder} is no longer this process’s to write: '
                + (f'{now} took it, for want of a sign of life' if now else 'somebody removed its lock')
            )

    def _taken(self, place: Path | Bucket) -> '_File | _Object':
        """The lock's file, once it is this process' own."""
        for _ in range(TRIES):
            file: _File | _Object = _Object(place) if isinstance(place, Bucket) else _File(place)
            try:
                file.open(self._record)
                if not file.made:
                    self._take_over(file)
                return file
            except _Gone:
                file.close()
            except BaseException:
                file.close()
                raise
        raise _Held(Record())  # made and removed all the time: others are starting

    def _take_over(self, file: '_File | _Object') -> None:
        """Takes what another process has left. Raises _Held where that lives."""
        known = _read(file)
        if known is None:
            raise _Gone
        left = file.locked and known.boot in ('', self._record.boot)  # the kernel would not give a living holder's lock
        if not left and not known.is_dead and self._lives(file, known):
            raise _Held(known)
        file.write(self._record.written())
        if not file.locked:
            time.sleep(SETTLED)
            found = _read(file)
            if found is None or found.token != self._record.token:
                raise _Held(found or Record())

    def _lives(self, file: '_File | _Object', known: Record) -> bool:
        """Whether a holder that this machine cannot see gives a sign of life."""
        rest = STALE - file.silent()
        if rest <= 0:
            return False
        line = f'{self.folder}: {known} may be writing it: watching its lock for up to {rest:.0f} s'
        print(line, file=sys.stderr, flush=True)
        until = time.monotonic() + rest
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            now = _read(file)
            if now is None:
                raise _Gone
            if now != known:
                return True
        return False

    def _beat(self) -> None:
        """Gives a sign of life until the end, or until another has taken over."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(UserError, MachineError, OSError):  # what fails now may not the next time
                if not self._is_mine():
                    self.lost = True
                    return
                self._record = dataclasses.replace(self._record, beats=self._record.beats + 1)
                self._file.write(self._record.written())

    def _is_mine(self) -> bool:
        found = _read(self._file)
        return found is not None and found.token == self._record.token

    def _refusal(self, holder: Record) -> Taken:
        return Taken(f'{self.folder} is being written by {holder}: wait until it ends, or stop it')

    def _unmake(self) -> None:
        """Takes the folders away that were made for the lock, if nothing else is in them."""
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


class _File:
    """A lock file on a disk."""

    def __init__(self, path: Path):
        self.path = path
        self.made = False  # by this process, in one step
        self.locked = False  # by the kernel, until this process ends
        self._file: int | None = None

    def open(self, record: Record) -> None:
        """Makes it, or opens what is there. Raises _Held where a living process has it, _Gone where it went meanwhile."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with making(self.path):
            try:
                self._file = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                self.made = True
            except FileExistsError:
                try:
                    self._file = os.open(self.path, flags)
                except FileNotFoundError:
                    raise _Gone from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locked = True
        except BlockingIOError:
            until = time.monotonic() + 1
            while not ((known := _read(self)) and known.token) and time.monotonic() < until:
                time.sleep(0.02)  # it is being written
            raise _Held(known or Record()) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise files.fault(self.path, error) from error
        try:
            if not os.path.samestat(self.path.lstat(), os.fstat(self._file)):
                raise _Gone
        except FileNotFoundError:
            raise _Gone from None
        if self.made:
            self.write(record.written())

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

    def silent(self) -> float:
        """Seconds since it was written, by the clock of its file system."""
        with making(self.path), tempfile.NamedTemporaryFile(dir=self.path.parent, prefix='.now.') as now:
            return os.stat(now.name).st_mtime - self.path.stat().st_mtime

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


class _Object:
    """A lock in a bucket."""

    locked = False

    def __init__(self, at: Bucket):
        self.at, self.made = at, False

    def open(self, record: Record) -> None:
        """Makes it if it is not there."""
        self.made = self.at.create(record.written())

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


def _place(folder: Path | Bucket) -> tuple[Path | Bucket, list[Path]]:
    """Where a run's lock is, and the folders that were made for it."""
    if isinstance(folder, Bucket):
        return folder.with_name(f'.{folder.name}.lock'), []
    with making(folder):
        try:
            real = folder.resolve()
        except RuntimeError:  # links that lead to each other
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from None
        made = files.make_folder(real.parent)
        inside = real.is_dir() and (os.path.ismount(real) or not os.access(real.parent, os.W_OK | os.X_OK))
    return (real / '.lock' if inside else real.with_name(f'.{real.name}.lock')), made


def _read(file: _File | _Object) -> Record | None:
    """What a lock's file says; None where there is none."""
    content = file.read()
    if content is None:
        return None
    with contextlib.suppress(ValueError, TypeError):
        found: dict[str, Any] = read_object(content)
        if all(type(found[field.name]) is field.type for field in dataclasses.fields(Record)):
            return Record(**found)
    return Record()


def _began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; '' where there is none."""
    # What follows the command's name, which may hold anything, in parentheses: the 22nd field is the 20th of them.
    fields = _first_line(Path(f'/proc/{process}/stat')).rpartition(')')[2].split()
    return fields[19] if len(fields) > 19 else ''


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace').partition('\n')[0]
    except OSError:
        return ''


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ''
