"""A new folder that is whole or not there: made under another name, synced, and only then given its own."""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files

# What the place that was named is at fault for; all else is the machine's.
OF_THE_PLACE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, *files.IN_THE_WAY}


class staged:
    """A new folder that gets its name when the block ends well, and is gone when it does not.

    What a process that was killed left of it is gone when the next begins. Raises UserError where the name is taken or no
    folder can be made there, MachineError where the disk fails.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock: int | None = None

    def __enter__(self) -> Path:
        refuse_existing(self.folder)
        with making(self.folder):
            files.make_folder(self.folder.parent)
            self.clear()
            self.make()
        return self.place

    def make(self) -> None:
        """A folder of this process alone, whoever else makes one of that name; locked while the process lives."""
        while True:
            prefix, suffix = f'.{self.folder.name}.', files.PARTIAL
            self.place = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=self.folder.parent))
            with contextlib.suppress(OSError):  # a file system without locks: what is killed there stays
                self.lock = locked(self.place)
            if self.place.exists():  # nobody took it for a leftover before it was locked
                self.place.chmod(0o777 & ~umask())
                files.declare(self.place)
                return
            self.unlock()

    def clear(self) -> None:
        """Removes what processes that were killed left of this name."""
        ours = re.compile(rf'\.{re.escape(self.folder.name)}\.\w{{8}}\.partial')  # as tempfile names them
        for path in self.folder.parent.iterdir():
            if ours.fullmatch(path.name):
                with contextlib.suppress(OSError, MachineError):  # a living process or another user has it
                    lock = locked(path)
                    try:
                        files.remove(path)
                    finally:
                        os.close(lock)

    def unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                refuse_existing(self.folder)
                files.sync_tree(self.place)
                files.rename(self.place, self.folder)
        finally:
            try:
                files.remove(self.place)
            finally:
                self.unlock()


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """What stands in the way of a folder's making is told as a fault of the place that was named for it."""
    try:
        yield
    except (OSError, UserError, MachineError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        if cause.errno not in OF_THE_PLACE:
            raise files.fault(folder, cause) from cause
        raise UserError(
            f'{shown(folder)}: cannot be made: {cause.strerror}: {shown(cause.filename or folder.parent)}'
        ) from None


def locked(folder: Path) -> int:
    """A lock on a folder, which ends when it is closed or the process does.

    Raises OSError where another process has it, the folder is gone, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def umask() -> int:
    """Which rights this process does not give to what it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_existing(folder: Path) -> None:
    """Raises UserError where there is something of that name."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f'{shown(folder)}: cannot be made: {error.strerror}') from None
    raise UserError(
        f'{shown(folder)}: exists already, and nothing is overwritten; choose another name, or move it away'
    )
