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
import functools
import sys
import threading
import time
from pathlib import Path
from typing import Any

from weft.runtime import streams
from weft.runtime.errors import MachineError, UserError, shown
from weft.storage.buckets import Bucket
from weft.storage.lock_file import LockFile, LockGone, LockObject, Record, lock_places, own_record

BEAT = 10.0  # seconds between two signs of life
STALE = 45.0  # seconds without one after which a holder that this machine cannot see is gone
SETTLED = 3.0  # seconds after which what another wrote at the same time is there to be seen
LEASE = 120.0  # seconds for which a file server may keep the kernel's lock of a machine that is gone (NFSv4: 90)
TRIES = 20  # times that a lock is asked for again because its file was removed meanwhile


class Taken(UserError):
    """Another process writes the run."""


class Lock:
    """The lock of a run, held while the block lasts. Raises Taken, in a line that names the holder, where another has it."""

    def __init__(self, folder: Path | Bucket):
        self.folder = folder
        self.lost = False  # another process took it over: this one was taken for dead
        self._found: Record | None = None  # what its file said when it was last looked at

    def __enter__(self) -> 'Lock':
        place, other, self._made = lock_places(self.folder)
        self._record = own_record()
        with contextlib.ExitStack() as undo:
            undo.callback(self._unmake)
            self._file = self._taken(place)
            self._ended = threading.Event()
            self._beats = threading.Thread(target=self._beat, name='lock', daemon=True)
            self._beats.start()
            undo.push(self.__exit__)
            if other is not None:
                self._look_at(other)
            undo.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
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

    @property
    def run(self) -> Path | Bucket:
        """The run's folder, for its one writer: in a bucket each change is refused once another process has taken it over."""
        if not isinstance(self.folder, Bucket):
            return self.folder
        return dataclasses.replace(self.folder, before_change=functools.partial(self.check, look=True))

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

    def _taken(self, place: Path | Bucket) -> LockFile | LockObject:
        """The lock's file, once it is this process' own."""
        for _ in range(TRIES):
            file: LockFile | LockObject = (
                LockObject(place) if isinstance(place, Bucket) else LockFile(place, place.parent)
            )
            try:
                file.open(self._record)
                if file.blocked:
                    self._wait_for(file)
                if not file.made:
                    self._take_over(file)
                return file
            except LockGone:
                file.close()
            except BaseException:
                file.close()
                raise
        raise self._held_by(Record())  # made and removed all the time: others are starting

    def _wait_for(self, file: LockFile | LockObject) -> None:
        """Waits for a kernel's lock whose holder's machine is gone. Raises Taken where that may live."""
        known = self._written(file, 1.0)
        if known.boot in ('', self._record.boot) or self._lives(file, known):
            raise self._held_by(file.read() or known)
        self._say(
            f'{known} gives no sign of life, and the file server keeps its lock: asking again for up to {LEASE:.0f} s'
        )
        until = time.monotonic() + LEASE
        while not file.lock():
            if time.monotonic() >= until:
                raise Taken(
                    f'{self.folder} is locked by {known}, which gives no sign of life, and the file server keeps the lock of a '
                    f'machine that is gone: remove {file.path} if that process has ended for certain, or bring its machine back'
                )
            time.sleep(BEAT / 10)
            if (now := file.read()) and now != known:
                raise self._held_by(now)

    def _take_over(self, file: LockFile | LockObject) -> None:
        """Takes what another process has left. Raises Taken where that lives."""
        known = self._written(file)
        left = file.locked and known.boot in ('', self._record.boot)  # the kernel would not give a living holder's lock
        if not left and not known.is_dead and self._lives(file, known):
            raise self._held_by(known)
        file.write(self._record)
        if not file.locked:
            time.sleep(SETTLED)
            found = file.read()
            if found is None or found.token != self._record.token:
                raise self._held_by(found or Record())

    def _written(self, file: LockFile | LockObject, seconds: float | None = None) -> Record:
        """What a lock's file says. One that says nothing may be new: of a machine whose writing is not seen here yet."""
        known = file.read()
        if known is not None and not known.token:
            until = time.monotonic() + (seconds or SETTLED - max(file.silent(), 0))
            while known is not None and not known.token and time.monotonic() < until:
                time.sleep(BEAT / 100)
                known = file.read()
        if known is None:
            raise LockGone
        return known

    def _look_at(self, other: LockFile) -> None:
        """Raises Taken where a process has the run's lock at its other place, which this one does not take."""
        with contextlib.suppress(LockGone):
            known = other.read()
            if known is None:
                return
            taken = other.is_taken()
            left = known.boot in ('', self._record.boot) if taken is False else not known.token
            if taken or (not left and not known.is_dead and self._lives(other, known)):
                raise self._held_by(known)

    def _lives(self, file: LockFile | LockObject, known: Record) -> bool:
        """Whether a holder that this machine cannot see gives a sign of life."""
        rest = STALE - file.silent()
        if rest <= 0:
            return False
        self._say(f'{known} may be writing it: watching its lock for up to {rest:.0f} s')
        until = time.monotonic() + rest
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            now = file.read()
            if now is None:
                raise LockGone
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
                self._file.write(self._record)

    def _is_mine(self) -> bool:
        self._found = found = self._file.read()
        return found is not None and found.token == self._record.token

    def _held_by(self, record: Record) -> Taken:
        return Taken(f'{self.folder} is being written by {record}: wait until it ends, or stop it')

    def _unmake(self) -> None:
        """Takes the folders away that were made for the lock, if nothing else is in them."""
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()
