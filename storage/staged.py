"""A new folder that is whole or not there: made under another name, synced, and only then given its own."""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files

# What the place that was named is at fault for; all else is the machine's.
OF_THE_PLACE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, *files.IN_THE_WAY}


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder that gets its name when the block ends well, and is gone when it does not.

    Raises UserError where the name is taken or no folder can be made there, MachineError where the disk fails.
    """
    refuse_existing(folder)
    with workplace(folder) as place:
        yield place
        refuse_existing(folder)
        files.sync_tree(place)
        files.rename(place, folder)


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder beside one that is being made, of this process alone, and gone when the block ends.

    It is locked while the process lives: what one that was killed left is gone when the next begins. Raises UserError where no
    folder can be made there, MachineError where the disk fails.
    """
    ours = re.compile(rf'\.{re.escape(folder.name)}\.\w{{8}}\.partial')  # as tempfile names them
    with contextlib.ExitStack() as undo:
        with making(folder):
            files.make_folder(folder.parent)
            for path in folder.parent.iterdir():
                if ours.fullmatch(path.name):
                    with (
                        contextlib.suppress(OSError, MachineError),
                        locked(path),
                    ):  # else a living process or user has it
                        files.remove(path)
            while True:
                place = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', suffix=files.PARTIAL, dir=folder.parent))
                with contextlib.suppress(OSError):  # a file system without locks: what is killed there stays
                    undo.enter_context(locked(place))
                if place.exists():  # nobody took it for a leftover before it was locked
                    break
            undo.callback(files.remove, place)
            mask = os.umask(0)
            os.umask(mask)
            place.chmod(0o777 & ~mask)
            files.declare(place)
        yield place


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder for this process. Raises OSError where another has the lock, or there is no folder or no such lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
