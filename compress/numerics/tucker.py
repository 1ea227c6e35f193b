"""Tucker's form of a tensor: a small core times a factor for each mode, by HOSVD and by HOOI; modes may be left whole.

Letters: n size of a mode, r its rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite
from weft.runtime.errors import UserError

Ranks = Sequence[int | None]


class Tucker(NamedTuple):
    """A core times factors, float64: T ≈ core ×₁ F₁ ×₂ F₂ …

    Attributes:
        core: of a rank r for each mode, or of the mode's size where it is left whole.
        factors: for each mode a matrix [n, r] of orthonormal columns; None where the mode is left whole.
    """

    core: np.ndarray
    factors: tuple[np.ndarray | None, ...]


def rebuild(tucker: Tucker) -> np.ndarray:
    """The tensor that a Tucker form stands for."""
    w = tucker.core
    for mode, factor in enumerate(tucker.factors):
        if factor is not None:
            w = mode_product(w, factor, mode)
    return w


def hosvd(w: np.ndarray, ranks: Ranks) -> Tucker:
    """The truncated higher-order SVD (De Lathauwer, De Moor and Vandewalle 2000): each mode's leading singular vectors.

    With d modes that have a rank its Frobenius error is at most √d of the least that these ranks allow (their property 10),
    and its square at most the sum over these modes of the squares of the singular values that the mode's unfolding loses.

    Args:
        w: a tensor of any order.
        ranks: for each mode a rank from 1 to the mode's size, or UserError; None leaves the mode whole.
    """
    w = finite(w)
    check_ranks(w.shape, ranks)
    factors = tuple(None if rank is None else _leading(w, mode, rank) for mode, rank in enumerate(ranks))
    return Tucker(_core(w, factors), factors)


def hooi(w: np.ndarray, ranks: Ranks, iterations: int = 20, tolerance: float = 1e-7) -> Tucker:
    """Higher-order orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000b) from `hosvd`: never worse than that.

    A round gives each mode in turn the factor that is best with the others as they are, so the core's norm only grows. It stops
    at a local optimum, which need not be the global one.

    Args:
        w: a tensor of any order.
        ranks: for each mode a rank from 1 to the mode's size, or UserError; None leaves the mode whole.
        iterations: rounds at most.
        tolerance: it stops where a round lowers the relative Frobenius error by less.
    """
    w = finite(w)
    best = hosvd(w, ranks)
    if sum(rank is not None for rank in ranks) < 2:
        return best  # one mode alone: the first is the optimum
    factors, total = list(best.factors), float((w**2).sum())
    error = _relative_error(total, best.core)
    for _ in range(iterations):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                others = [None if other == mode else factor for other, factor in enumerate(factors)]
                factors[mode] = _leading(_core(w, others), mode, rank)
        found = Tucker(_core(w, factors), tuple(factors))
        last, error = error, _relative_error(total, found.core)
        if error < last:
            best = found
        if last - error < tolerance:
            break
    return best


def mode_product(w: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """A tensor whose mode of size n is multiplied by a matrix [m, n], so that it has size m."""
    return np.moveaxis(np.tensordot(w, matrix, (mode, 1)), -1, mode)


def check_ranks(shape: Sequence[int], ranks: Ranks) -> None:
    """Raises UserError unless each mode of a tensor has a rank from 1 to its size, or None."""
    if len(ranks) != len(shape):
        raise UserError(
            f'ranks are {len(ranks)}: a tensor of {len(shape)} modes needs {len(shape)}; None leaves one whole'
        )
    for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        if rank is not None:
            check_rank(rank, size, f'mode {mode} of a tensor of {" × ".join(map(str, shape))}', f'ranks[{mode}]')


def _leading(w: np.ndarray, mode: int, rank: int) -> np.ndarray:
    """The leading left singular vectors of a mode's unfolding, [n, r].

    They are eigenvectors of its Gram matrix, which is small where the unfolding is wide. Squaring costs no accuracy here: what
    the core loses by it is at most of the order of the machine's epsilon times the tensor's norm.
    """
    others = [other for other in range(w.ndim) if other != mode]
    _, vector = np.linalg.eigh(np.tensordot(w, w, (others, others)))
    return vector[:, ::-1][:, :rank]


def _core(w: np.ndarray, factors: Sequence[np.ndarray | None]) -> np.ndarray:
    """The core that is best for orthonormal factors: the tensor times their transposes."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            w = mode_product(w, factor.T, mode)
    return w


def _relative_error(total: float, core: np.ndarray) -> float:
    """Of a projection onto orthonormal factors, from the squared norm of the tensor and the core."""
    return (max(total - float((core**2).sum()), 0.0) / total) ** 0.5 if total else 0.0
