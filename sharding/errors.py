"""What the scripts tell a user in one line instead of a traceback, and the search for what they may have meant."""

import difflib
from collections.abc import Iterable


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
    """The closest known name as the tail of a message: `; did you mean 'layers'?`, or the names that exist."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean {close[0]!r}?' if close else f'; known: {", ".join(known)}'
