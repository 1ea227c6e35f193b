"""The newest checkpoint of a run that may delete it meanwhile."""

import sys
from collections.abc import Callable
from typing import TypeVar

from weft.runtime.errors import UserError
from weft.storage.checkpoint_reader import Gone, Reader

AGAIN = 100  # checkpoints that a reader tries one after another, each deleted while it was read
T = TypeVar('T')


def read_newest(checkpoints: Reader, read: Callable[[int], T], step: int | None = None, first: int | None = None) -> T:
    """What `read` gives of the newest checkpoint, and of the next where that is deleted meanwhile.

    Args:
        step: the one to read instead, and no other.
        first: the one to read unless it is deleted.

    Raises UserError where there is none, or the one that was asked for goes away.
    """
    if step is not None:
        try:
            return read(step)
        except Gone as gone:
            raise UserError(f'--step {step}: {gone}') from None
    for _ in range(AGAIN):
        try:
            return read(checkpoints.newest() if first is None else first)
        except Gone as gone:
            first = None
            print(f'{gone}: reading the newest', file=sys.stderr, flush=True)
    raise UserError(
        f'{checkpoints.run}: {AGAIN} checkpoints in a row were deleted while they were read: train with a larger '
        'checkpoint.keep or checkpoint.every, so that one lasts as long as it takes to read it'
    )
