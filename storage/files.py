"""Writing to a disk so that what stands there is whole: each write, sync, rename and removal that others rely on.

A file is written under another name, flushed to the disk, and only then given its name; the folder's list of names is flushed
after that. So whatever happens in between, a reader finds the old content or the new one.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from sharding.errors import UserError, shown

PARTIAL = '.partial'  # what the name of a file ends in until it is whole


def write(path: Path, content: bytes) -> None:
    """A file with this content, or what was there before."""
    temporary = partial(path)
    with temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name, in the place of a file that has it; returns when that is on the disk."""
    os.replace(path, target)
    sync(target.parent)
    if path.parent != target.parent:
        sync(path.parent)


def remove(path: Path) -> None:
    """Takes away a file, a link (not what it leads to) or a folder with all in it, if there is one of that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and all that it holds are on the disk."""
    for path in [*folder.rglob('*'), folder]:
        sync(path)


def partial(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + PARTIAL)


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


class Output:
    """A file of results that gets its name when the block ends well, and is not there when it does not.

    `option` names it in messages. Raises UserError on entering where it cannot be made: before the work, not after it.
    `keep`: what was written before a failure stays, in NAME.partial, and `kept` says so.
    """

    def __init__(self, option: str, path: str | Path, mode: str = 'wb', keep: bool = False):
        self.option, self.path, self.mode, self.keep = option, Path(path), mode, keep
        self.kept = False

    def __enter__(self) -> IO[Any]:
        check_output(self.option, self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        encoding = None if 'b' in self.mode else 'utf-8'
        try:
            self.file = open(os.open(partial(self.path), flags, 0o666), self.mode, encoding=encoding)
        except OSError as error:
            raise UserError(f'{self.option} {shown(str(self.path))}: {error.strerror}') from None
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                check_output(self.option, self.path)  # once more: something may have taken its name meanwhile
                rename(partial(self.path), self.path)
        finally:
            # What is still there has not got its name. A file that cannot be flushed must be closed all the same.
            try:
                self.file.close()
            finally:
                left = partial(self.path)
                if left.exists():
                    self.kept = self.keep and left.stat().st_size > 0
                    if not self.kept:
                        left.unlink()
