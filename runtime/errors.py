"""What the scripts tell a user in one line instead of a traceback, and the search for what they may have meant."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath

CLOSE = 0.7  # how alike two names must be, of 1, for one to be meant by the other
NAMED = 64  # characters of a name that are compared
SEARCHED = 2000  # names that are compared with
LONGEST = 4096  # characters of a path that is told whole
LISTED = 24  # names that a message lists
ENDINGS = re.compile(r'(?<=.)(\.[a-z][a-z0-9]{0,6})+$')  # of files, but not what follows the dot of a version
# What a disk or a system may refuse, whatever library was asked for it: libraries that are not Python say it in words.
REFUSED = tuple(
    getattr(errno, name)
    for name in ('ENOSPC', 'EDQUOT', 'EIO', 'EROFS', 'EFBIG', 'EMFILE', 'ENFILE', 'ESTALE', 'EACCES', 'ENAMETOOLONG')
)


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its one line and exit with 2.

    The message names the field or file, the value, the rule, and the nearest value that works.
    """


class MachineError(RuntimeError):
    """What this machine or this run cannot do, whoever asks: the scripts print its one line and exit with 1."""


class OutOfMemory(MachineError):
    """A device has too little memory for what the user asked of it: one line says what used it and what to change."""


class NotTogether(MachineError):
    """The processes of a run did not find each other: started again, they may (exit code 75)."""


class Diverged(MachineError):
    """Numbers of the run are not finite any more."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The closest known name as the tail of a message: `; did you mean 'layers'?`, or the names that exist.

    Names that come out of a file may be long, many, or made to trouble a terminal: they are quoted and cut.
    """
    known = sorted(known)
    if (close := closest(name, known)) is not None:
        return f'; did you mean {shown(close, quoted=True)}?'
    listed = ', '.join(shown(one, 60) for one in known[:LISTED])
    more = f' and {len(known) - LISTED} more' if len(known) > LISTED else ''
    return f'; known: {listed}{more}'


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like one that is none; None where no one is much like it."""
    full = {one[:NAMED]: one for one in sorted(known)[:SEARCHED]}
    close = difflib.get_close_matches(name[:NAMED], full, n=1, cutoff=CLOSE)
    return full[close[0]] if close else None


def nearest_path(path: str, known: Iterable[str]) -> str:
    """The closest known file or folder as the tail of a message: by names alone, without endings, for what paths share says
    nothing.
    """
    stems = {_stem(one)[:NAMED]: one for one in sorted(known, reverse=True)}
    stem = closest(_stem(path), stems)
    return nearest('', stems.values()) if stem is None else f'; did you mean {shown(stems[stem], quoted=True)}?'


def _stem(path: str) -> str:
    return ENDINGS.sub('', PurePath(path).name.casefold())


def shown(text: object, most: int = 200, quoted: bool = False) -> str:
    """Text of unknown origin for a message: on one line, no control characters, at most `most` characters.

    Line ends, control characters and what no terminal can print (lone halves of a pair, marks that turn the direction of
    writing) become escapes as in a Python string.
    """
    text = str(text)
    cut = text if len(text) <= most else text[: most - 1]
    plain = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in cut)
    plain += '' if len(text) <= most else '…'
    return f"'{plain}'" if quoted else plain


def machine_fault(error: BaseException) -> str | None:
    """The line for an error that is the machine's, whatever library brings it; None for one that is a fault of the code."""
    if isinstance(error, MemoryError):
        return 'out of memory: this machine has no more of it for this process'
    if isinstance(error, MachineError):
        return str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    for cause in _causes(error):
        if isinstance(cause, OSError) and (cause.errno in REFUSED or cause is error.__cause__):
            return _of_system(cause)
        for number in REFUSED:
            text = os.strerror(number)
            if isinstance(cause, Exception) and text in (said := str(cause)):
                # Such a library tells the file, and its own lines of source: what stands before the reason is cut short.
                before = ' '.join(said.partition(text)[0].split())
                return f'{before[-FILE:]} {text}'.strip()
    return None


FILE = 300  # characters before a reason that another library gives, the file's name among them


def _of_system(error: OSError) -> str:
    names = ' → '.join(shown(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f'{names}: {reason}' if names else reason


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, those that it came of, and those that were being handled then."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is not None and all(one is not other for other in seen):
            seen.append(one)
            yield one
            todo += [one.__cause__, one.__context__, *getattr(one, 'exceptions', ())]
