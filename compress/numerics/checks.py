"""What the decompositions refuse: ranks that a tensor cannot have, and numbers that are not finite."""

import operator

import numpy as np

from weft.runtime.errors import UserError


def check_rank(rank: int, most: int, of: str, field: str = 'rank') -> None:
    """Raises UserError for a rank that is no integer from 1 to `most`, naming the nearest that is.

    Args:
        rank: as a user asked for it.
        most: the highest rank that `of` has.
        of: what is decomposed, in words that follow 'of'.
        field: what a user calls the rank.
    """
    try:
        whole = operator.index(rank)
    except TypeError:
        raise UserError(f'{field} is {rank!r}: it must be an integer from 1 to {most}') from None
    if not 1 <= whole <= most:
        nearest = min(max(whole, 1), most)
        raise UserError(f'{field} is {rank}: it must be from 1 to {most}, the highest of {of}; nearest: {nearest}')


def check_share(share: float, field: str = 'share') -> None:
    """Raises UserError for a share that is not above 0 and at most 1."""
    if not 0 < share <= 1:
        nearest = 'nearest: 1' if share > 1 else 'such as 0.5'
        raise UserError(f'{field} is {share}: it must be above 0 and at most 1; {nearest}')


def finite(w: np.ndarray, what: str = 'the weights') -> np.ndarray:
    """The numbers of an array in float64. Raises UserError where one of them is infinite or no number."""
    w = np.asarray(w, np.float64)
    if not np.isfinite(w).all():
        count = int(w.size - np.isfinite(w).sum())
        raise UserError(f'{what} have {count} numbers of {w.size} that are not finite: all must be')
    return w
