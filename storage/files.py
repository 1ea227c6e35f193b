"""Writing to a disk so that what stands there is whole: each write, sync, rename and removal that others rely on.

A file is written under another name, flushed to the disk, and only then given its name; the folder's list of names is flushed
after that. So whatever happens in between, a reader finds the old content or the new one.

The one exception is the file of a run's lock, which storage/lock.py writes in place and removes by itself: it is the sign of
a life, no part of a run, and nobody relies on it after a power cut.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from weft.runtime.errors import MachineError, UserError, shown

PARTIAL = '.partial'  # what the name of a file ends in until it is whole
# What stands where a file or folder is to be, which only its owner can move away; anything else is the machine's fault.
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO}
KINDS = {
    stat.S_IFDIR: 'a folder',
    stat.S_IFIFO: 'a pipe',
    stat.S_IFSOCK: 'a socket',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}
# What file systems say that cannot sync a folder's list of names.
NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}

# Called before each change with what is done, where, and with what: 'write' and 'append' (content), 'folder', 'rename'
# (target), 'remove', 'sync', and after others wrote into a folder 'declare'. It may raise OSError: a disk that fails.
Observer = Callable[[str, Path, Any], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def watched(observer: Observer) -> Iterator[None]:
    """Has an observer told of every change to a run's files until the block ends: tests record them, or play a full disk."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _tell(action: str, path: Path, what: Any = None) -> None:
    with writing(path):
        for observer in _observers:
            observer(action, path, what)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk meanwhile is one line that names the path: MachineError, or UserError for what is in the way."""
    try:
        yield
    except OSError as error:
        raise fault(path, error) from error


def fault(path: Any, error: OSError) -> MachineError | UserError:
    """An error of the operating system as one line."""
    why = error.strerror or str(error) or type(error).__name__
    if error.errno in IN_THE_WAY:
        return UserError(f'{shown(path)}: {why}; move away what stands there')
    return MachineError(f'{shown(path)}: {why}')


def write(path: Path, content: bytes) -> None:
    """A file with this content, or what was there before; returns when it is on the disk."""
    temporary = partial(path)
    put(temporary, content)
    sync(temporary)
    rename(temporary, path)


def put(path: Path, content: bytes) -> None:
    """A new file in a folder that nobody reads yet: it is synced with the folder (`sync_tree`), before that gets its name."""
    _tell('write', path, content)
    with writing(path), os.fdopen(_new(path), 'wb') as file:
        file.write(content)


@contextlib.contextmanager
def new(path: Path) -> Iterator[IO[bytes]]:
    """A new file, written bit by bit, in a folder that nobody reads yet: `sync_tree` of the folder has it on the disk."""
    with writing(path):
        with os.fdopen(_new(path), 'w+b') as file:
            yield file
        if _observers:
            _tell('write', path, path.read_bytes())


def _new(path: Path) -> int:
    """A new empty file of this name; a file, a link or a FIFO that has it goes."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


class Appended:
    """A file that grows: what is written is seen at once, and on the disk when `sync` returns."""

    def __init__(self, path: Path):
        self.path, self.closed = path, False
        if not os.path.lexists(path):
            put(path, b'')
            sync(path.parent)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with writing(path):
            self._file = os.fdopen(os.open(path, flags, 0o666), 'ab', buffering=0)

    def write(self, content: bytes) -> None:
        """Appends all of it, or raises MachineError and leaves the file as it was."""
        _tell('append', self.path, content)
        with writing(self.path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                os.ftruncate(self._file.fileno(), size)  # half of a row or record would spoil what follows
                raise

    def sync(self) -> None:
        _tell('sync', self.path)
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self.closed = True


def make_folder(path: Path) -> list[Path]:
    """A folder, with those that it stands in; those that were not there, once their names are on the disk."""
    missing: list[Path] = []
    with writing(path):
        while not path.is_dir():
            missing.append(path)
            path = path.parent
    for folder in reversed(missing):
        _tell('folder', folder)
        with writing(folder):
            folder.mkdir(exist_ok=True)
        sync(folder.parent)
    return missing[::-1]


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name, in the place of a file that has it; returns when that is on the disk."""
    _tell('rename', path, target)
    with writing(target):
        os.replace(path, target)
    sync(target.parent)
    if path.parent != target.parent:
        sync(path.parent)


def remove(path: Path) -> None:
    """Takes away a file, a link (not what it leads to) or a folder with all in it, if there is one of that name."""
    with writing(path):
        if not os.path.lexists(path):
            return
        _tell('remove', path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    _tell('sync', path)
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not (error.errno in NO_FOLDER_SYNC and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
                raise
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and all that it holds are on the disk."""
    for path in [*folder.rglob('*'), folder]:
        sync(path)


def declare(folder: Path) -> None:
    """Says that others (Orbax, TensorBoard) have written into a folder, by ways of their own."""
    _tell('declare', folder)


def partial(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + PARTIAL)


def kind_of(mode: int) -> str:
    """What something that is no regular file is, in words."""
    return KINDS.get(stat.S_IFMT(mode), 'no file')


class NotRegular(Exception):
    """What is no regular file; its text says what it is, as in `a folder`."""


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file. Raises NotRegular, before a device is opened, and OSError; it never waits."""
    _check_regular(path.stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotRegular(kind_of(found.st_mode))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """A regular file, opened to be read; nothing waits for the other end of a FIFO.

    Raises FileNotFoundError where there is none, and UserError where something else has the name or it may not be read.
    """
    try:
        descriptor = open_regular(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except NotRegular:
        raise UserError(f'{shown(path)}: is no regular file; move away what stands there') from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise UserError(f'{shown(path)}: {error.strerror}') from error
        raise fault(path, error) from error


def read(path: Path, most: int = 2**26) -> bytes:
    """What a regular file holds; as `reading`. Raises UserError for one of more than `most` bytes."""
    with reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise UserError(f'{shown(path)}: has {size} bytes, and at most {most} are read')
        with os.fdopen(os.dup(descriptor), 'rb') as file:
            return file.read()


def check_output(option: str, path: Path, reads: Iterable[str | Path] = ()) -> None:
    """Raises UserError where a result cannot be written to `path`: its folder is missing, or no regular file has the name.

    A device, a FIFO, a link or a folder would be replaced by the result: whatever reads or uses it would lose it. So would a
    file that the result is made of: `reads` are those.
    """
    for one in (path, partial(path)):
        try:
            kind = one.lstat().st_mode
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise UserError(f'{option} {shown(str(path))}: {shown(str(path.parent))} is no folder') from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f'{option} {shown(str(path))}: {getattr(error, "strerror", None) or error}') from None
        if stat.S_ISDIR(kind):
            raise UserError(f'{option} {shown(str(one))}: is a folder; name a file in it')
        if not stat.S_ISREG(kind):
            raise UserError(f'{option} {shown(str(one))}: is there and is no regular file; name another')
    if not path.parent.is_dir():
        raise UserError(f'{option} {shown(str(path))}: there is no folder {shown(str(path.parent))}')
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f'{option} {shown(str(path))}: {os.strerror(errno.EACCES)}: {shown(str(path.parent))}')
    for source in reads:
        if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f'{option} {shown(str(path))}: is what is read: name another file')


@contextlib.contextmanager
def output_file(
    option: str, path: str | Path, mode: str = 'wb', kept: Callable[[Path], object] | None = None
) -> Iterator[IO[Any]]:
    """A file of results that gets its name when the block ends well, and is not there when it does not.

    `option` names it in messages. Raises UserError on entering where it cannot be made: before the work, not after it.
    With `kept` what was written before a failure stays, in NAME.partial, which `kept` is called with then.
    """
    path = Path(path)
    left = partial(path)
    check_output(option, path)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        file = os.fdopen(os.open(left, flags, 0o666), mode, encoding=None if 'b' in mode else 'utf-8')
    except OSError as error:
        raise UserError(f'{option} {shown(str(path))}: {error.strerror}') from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_output(option, path)  # once more: something may have taken its name meanwhile
        rename(left, path)
    finally:
        if left.exists():  # it has not got its name
            if kept and left.stat().st_size:
                kept(left)
            else:
                left.unlink()
