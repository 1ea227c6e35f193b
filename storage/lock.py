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

The file is written in place and removed without storage/files.py: it is the sign of a life, no part of a run, and one that a
power cut tears or brings back says nothing that is believed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from weft.runtime import streams
from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files
from weft.storage.buckets import Bucket
from weft.storage.holder import LONG, Record, own_record, record_of
from weft.storage.staged import making

BEAT = 10.0  # seconds between two signs of life
STALE = 45.0  # seconds without one after which a holder that this machine cannot see is gone
SETTLED = 3.0  # seconds after which what another wrote at the same time is there to be seen
LEASE = 120.0  # seconds for which a file server may keep the kernel's lock of a machine that is gone (NFSv4: 90)
TRIES = 20  # times that a lock is asked for again because its file was removed meanwhile
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
    """A lock has a holder, of whom this is known; `silent`: who gives no sign of life, and the file server keeps the lock."""

    def __init__(self, record: Record, silent: bool = False):
        self.record, self.silent = record, silent


class _Gone(Exception):
    """The lock's file was removed or replaced while it was being taken: ask again."""


class Lock:
    """The lock of a run, held while the block lasts. Raises Taken, in a line that names the holder, where another has it."""

    def __init__(self, folder: Path | Bucket):
        self.folder = folder
        self.lost = False  # another process took it over: this one was taken for dead
        self._found: Record | None = None  # what its file said when it was last looked at

    def __enter__(self) -> 'Lock':
        place, other, self._made = _places(self.folder)
        self._record = own_record()
        try:
            self._file = self._taken(place)
        except BaseException as error:
            self._unmake()
            if isinstance(error, _Held):
                raise self._refusal(error, place) from None
            raise
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name='lock', daemon=True)
        self._beats.start()
        try:
            if other is not None:
                self._look_at(other)
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, _Held):
                raise self._refusal(error, other.path) from None
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._ended.set()
        self._beats.join()
        try:
            if not self.lost and self._is_mine():
                self._file.remove()
        except (UserError, MachineError, OSError) as fault:  # of the lock alone: what the run has saved stands
            streams.say(
                f'{self.folder}: its lock could not be removed, and the next process takes it over: {shown(fault, 500)}'
            )
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
            raise MachineError(
                f'{self.folder} is no longer this process’s to write: '
                + (f'{self._found} took it, for want of a sign of life' if self._found else 'somebody removed its lock')
            )

    def _taken(self, place: Path | Bucket) -> '_File | _Object':
        """The lock's file, once it is this process' own."""
        for _ in range(TRIES):
            file: _File | _Object = _Object(place) if isinstance(place, Bucket) else _File(place)
            try:
                file.open(self._record)
                if file.blocked:
                    self._wait_for(file)
                if not file.made:
                    self._take_over(file)
                return file
            except _Gone:
                file.close()
            except BaseException:
                file.close()
                raise
        raise _Held(Record())  # made and removed all the time: others are starting

    def _wait_for(self, file: '_File | _Object') -> None:
        """Waits for a kernel's lock whose holder's machine is gone. Raises _Held where that may live."""
        until = time.monotonic() + 1
        while not ((known := _read(file)) and known.token) and time.monotonic() < until:
            time.sleep(0.02)  # it is being written
        if known is None:
            raise _Gone
        if known.boot in ('', self._record.boot) or self._lives(file, known):
            raise _Held(_read(file) or known)
        self._say(
            f'{known} gives no sign of life, and the file server keeps its lock: asking again for up to {LEASE:.0f} s'
        )
        until = time.monotonic() + LEASE
        while not file.lock():
            if time.monotonic() >= until:
                raise _Held(known, silent=True)
            time.sleep(BEAT / 10)
            if (now := _read(file)) and now != known:
                raise _Held(now)

    def _take_over(self, file: '_File | _Object') -> None:
        """Takes what another process has left. Raises _Held where that lives."""
        known = self._written(file)
        left = file.locked and known.boot in ('', self._record.boot)  # the kernel would not give a living holder's lock
        if not left and not known.is_dead and self._lives(file, known):
            raise _Held(known)
        file.write(self._record.written())
        if not file.locked:
            time.sleep(SETTLED)
            found = _read(file)
            if found is None or found.token != self._record.token:
                raise _Held(found or Record())

    def _written(self, file: '_File | _Object') -> Record:
        """What a lock's file says. One that says nothing may be new, of a machine whose writing is not seen here yet."""
        known = _read(file)
        if known is not None and not known.token:
            until = time.monotonic() + min(SETTLED, SETTLED - file.silent())
            while known is not None and not known.token and time.monotonic() < until:
                time.sleep(BEAT / 100)
                known = _read(file)
        if known is None:
            raise _Gone
        return known

    def _look_at(self, other: '_File') -> None:
        """Raises _Held where a process has the run's lock at its other place, which this one does not take."""
        with contextlib.suppress(_Gone):
            known = _read(other)
            if known is None:
                return
            taken = other.is_taken()
            if taken:
                raise _Held(known)
            left = known.boot in ('', self._record.boot) if taken is False else not known.token
            if not left and not known.is_dead and self._lives(other, known):
                raise _Held(known)

    def _lives(self, file: '_File | _Object', known: Record) -> bool:
        """Whether a holder that this machine cannot see gives a sign of life."""
        rest = STALE - file.silent()
        if rest <= 0:
            return False
        self._say(f'{known} may be writing it: watching its lock for up to {rest:.0f} s')
        until = time.monotonic() + rest
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            now = _read(file)
            if now is None:
                raise _Gone
            if now != known:
                return True
        return False

    def _say(self, what: str) -> None:
        print(f'{self.folder}: {what}', file=sys.stderr, flush=True)

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
        self._found = found = _read(self._file)
        return found is not None and found.token == self._record.token

    def _refusal(self, held: _Held, place: Path | Bucket) -> Taken:
        if held.silent:
            return Taken(
                f'{self.folder} is locked by {held.record}, which gives no sign of life, and the file server keeps the lock of '
                f'a machine that is gone: remove {place} if that process has ended for certain, or bring its machine back'
            )
        return Taken(f'{self.folder} is being written by {held.record}: wait until it ends, or stop it')

    def _unmake(self) -> None:
        """Takes the folders away that were made for the lock, if nothing else is in them."""
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


class _File:
    """A lock file on a disk."""

    def __init__(self, path: Path, clock: Path | None = None):
        self.path = path
        self.clock = clock or path.parent  # a folder that can be written, for the file system's time
        self.made = False  # by this process, in one step
        self.locked = False  # by the kernel, until this process ends
        self.blocked = False  # by the kernel, for another process
        self._file: int | None = None

    def open(self, record: Record) -> None:
        """Makes it, or opens what is there. Raises _Gone where it went meanwhile."""
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
                    raise _Gone from None
        if self.lock() and made:
            self.made = True
            self.write(record.written())

    def lock(self) -> bool:
        """Asks the kernel for it; False where it is another's. Raises _Gone where the file of that name is another one now."""
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
                raise _Gone
        except FileNotFoundError:
            raise _Gone from None
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
                raise _Gone from None
        return now.st_mtime - then.st_mtime if now.st_dev == then.st_dev else 0.0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


class _Object:
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


def _places(folder: Path | Bucket) -> tuple[Path | Bucket, _File | None, list[Path]]:
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
    return place, _File(other, clock=place.parent), made


def _read(file: _File | _Object) -> Record | None:
    """What a lock's file says; None where there is none."""
    content = file.read()
    return None if content is None else record_of(content)
