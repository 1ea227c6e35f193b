"""Files that come from strangers, read within bounds: files alone, as many bytes as were allowed, JSON of bounded size.

A file is refused in one line that names it, the value and the limit, before memory is taken for what it says.
"""

import contextlib
import dataclasses
import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weft.runtime.errors import UserError, shown
from weft.storage import files

MOST_VALUES = 2**23  # of a JSON file, each an object of Python's: Gemma's tokenizer.json, the largest, has a third
MOST_DEPTH = 64  # lists and objects within each other: no published file has ten
TOO_DEEP = f'not readable as JSON: lists or objects stand within each other too deep: at most {MOST_DEPTH} are read'
MOST_DIGITS = 64  # of a whole number
HALF = re.compile(rb'\\u[dD][89abAB]|\\u[dD][c-fC-F]')  # of a surrogate pair, as JSON writes it
VALUE = reprlib.Repr()
VALUE.maxstring = VALUE.maxother = 60
VALUE.maxlevel = VALUE.maxdict = 4


def shown_path(path: Path) -> str:
    """A path for a message: all of what a user calls a folder, and of a file's own name as much as names have."""
    return shown(str(path)[: len(str(path)) - len(path.name)], 1000) + shown(path.name, 100)


def shown_value(value: Any) -> str:
    """A value that a file holds for a message, as Python writes it, without what would make it long."""
    return shown(VALUE.repr(value))


# Files ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file, closed in the end. Raises UserError for what is none or cannot be read, and never waits."""
    try:
        descriptor = files.open_regular(path)
    except files.NotRegular as kind:
        raise UserError(f'{shown_path(path)}: is {kind}: it must be a file') from None
    except OSError as error:
        raise UserError(f'{shown_path(path)}: cannot be read: {error.strerror}') from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(path: Path, most: int) -> bytes:
    """All of a file of at most so many bytes."""
    file = SteadyFile.of(path)
    if file.size > most:
        raise file.error(f'has {file.size} bytes: at most {most} are read of such a file')
    return file.read(0, file.size)


@dataclasses.dataclass(frozen=True)
class SteadyFile:
    """A file that is read by parts, all of them as it was when its header was read.

    What was written to it, or put in its place, is seen by its size or the time of its last change. Another file that has both
    alike cannot be told from it: on disks over a network (rclone, gcsfuse, sshfs) a file may have another number and another
    device each time it is looked at.

    It is not mapped into memory, where a file that is cut off meanwhile would end the process.
    """

    path: Path
    state: tuple[int, int]  # size, time of the last change in ns

    @classmethod
    def of(cls, path: Path) -> 'SteadyFile':
        with opened(path) as descriptor:
            return cls(path, _state(descriptor))

    @property
    def size(self) -> int:
        """In bytes."""
        return self.state[0]

    def error(self, said: str) -> UserError:
        return UserError(f'{shown_path(self.path)}: {said}')

    def read_into(self, out: np.ndarray, *begins: int) -> None:
        """Fills each row of `out` with the bytes from one of `begins` on. Raises UserError where the file has changed."""
        rows = out.reshape(len(begins), -1).view(np.uint8)
        with opened(self.path) as descriptor:
            whole = True
            try:
                with open(descriptor, 'rb', closefd=False) as file:
                    for row, begin in zip(rows, begins, strict=True):
                        file.seek(begin)
                        whole &= file.readinto(row.data) == len(row)
            except OSError as error:
                raise self.error(f'cannot be read: {error.strerror}') from None
            if not whole or _state(descriptor) != self.state:
                raise self.error('changed while it was read: try again when nothing writes to it')

    def read(self, begin: int, size: int) -> bytes:
        """The bytes from `begin` on."""
        out = np.empty(size, np.uint8)
        self.read_into(out, begin)
        return out.tobytes()


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


# JSON -----------------------------------------------------------------------------------------------------------------------


class Unreadable(ValueError):
    """Why a file of JSON is not read, to be told after its name."""


def read_object(content: bytes, where: str, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The JSON object that a file holds, as `read_json` reads it."""
    found = read_json(content, where, most_values)
    if not isinstance(found, dict):
        raise UserError(f'{where}: {_no_object(found)}')
    return found


def read_json(content: bytes, where: str, most_values: int = MOST_VALUES) -> Any:
    """What a file of JSON says. Raises UserError for what is not readable, or no published file has.

    Refused are more than `most_values` values, MOST_DEPTH lists and objects within each other, MOST_DIGITS digits, a name that
    an object has twice, and half of a surrogate pair, which no file or text can hold. `where` names the file.
    """
    try:
        found = _read_json(content, most_values)
    except Unreadable as error:
        raise UserError(f'{where}: {error}') from None
    if HALF.search(content):
        _check_halves(found, where)
    return found


def read_own_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a file of this project's own, within the bounds of `read_json`, whatever has become of it.

    Raises Unreadable. Its texts may hold halves of a surrogate pair, as names of files that are no UTF-8 have them in Python.
    """
    found = _read_json(content, MOST_VALUES)
    if not isinstance(found, dict):
        raise Unreadable(_no_object(found))
    return found


def _no_object(found: Any) -> str:
    return f'must be a JSON object, not {type(found).__name__}'


def _read_json(content: bytes, most_values: int) -> Any:
    values = sum(map(content.count, (b',', b'[', b'{')))
    if values > most_values:
        raise Unreadable(f'has {values} lists, objects and commas: at most {most_values} are read')
    try:
        found = json.loads(
            content.removeprefix(b'\xef\xbb\xbf').decode(), object_pairs_hook=unique, parse_int=_whole_number
        )
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f'not readable as JSON: {shown(error)}') from None
    _check_depth(found)
    return found


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its pairs. Raises Unreadable for a name that it has twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Unreadable(f'an object in it has {shown(twice, 100, quoted=True)} twice')
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Unreadable(f'has a whole number of {len(digits)} digits: at most {MOST_DIGITS} are read')
    return int(digits)


def _check_depth(found: Any) -> None:
    level = [found] if isinstance(found, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise Unreadable(TOO_DEEP)


def lone_surrogate(text: str) -> int | None:
    """Where the first half of a surrogate pair stands, which UTF-8 cannot write; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _check_halves(found: Any, where: str) -> None:
    left = [found]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if lone_surrogate(one) is not None:
                raise UserError(
                    f'{where}: has the text {shown(one, 60, quoted=True)}: a lone surrogate is not Unicode text; leave it out'
                )
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one
