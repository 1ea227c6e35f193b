"""What the scripts tell a user in one line instead of a traceback, and the search for what they may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import PurePath

CLOSE = 0.7  # how alike two names must be, of 1, for one to be meant by the other
NAMED = 64  # characters of a name that are compared
SEARCHED = 2000  # names that are compared with
LISTED = 24  # names that a message lists


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its one line and exit with 2.

    The message names the field or file, the value, the rule, and the nearest value that works.
    """


class OutOfMemory(RuntimeError):
    """A device has too little memory for what the user asked of it: one line says what used it and what to change."""


class NotTogether(RuntimeError):
    """The processes of a run did not find each other."""


class Diverged(RuntimeError):
    """The loss is no number any more."""


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
    """As `nearest`, of files and folders: by their names alone, without endings, for what paths share says nothing."""
    stems = {PurePath(one).stem.casefold()[:NAMED]: one for one in sorted(known, reverse=True)}
    stem = closest(PurePath(path).stem.casefold(), stems)
    return nearest('', stems.values()) if stem is None else f'; did you mean {shown(stems[stem], quoted=True)}?'


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
