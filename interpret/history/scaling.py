"""The power law of a model's size: L(N) = E + A N^−α (Hestness et al. 2017, arXiv:1712.00409; Kaplan et al. 2020,
arXiv:2001.08361; with the offset E as Hoffmann et al. 2022, arXiv:2203.15556, eq. 2, at a fixed number of tokens).

Letters: n runs, P parameters of the fit: log E, log A, α.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.runtime.errors import UserError

STEPS = 400
SHARES = (0.05, 0.3, 0.6, 0.85, 0.97)  # of the smallest loss, with which E begins
EXPONENTS = (0.1, 0.3, 0.6, 1.0)


class PowerLaw(NamedTuple):
    """L(N) = offset + factor · N^−exponent."""

    offset: float
    factor: float
    exponent: float
    error: float  # root mean square of log L − log of the fit, over the runs

    def __call__(self, size: np.ndarray) -> np.ndarray:
        """The loss of models of so many parameters."""
        return self.offset + self.factor * np.asarray(size, np.float64) ** -self.exponent


def fit(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The law with the least squares of log L, by Levenberg–Marquardt from several beginnings.

    Raises UserError for fewer than four runs, or for sizes and losses that have no logarithm.
    """
    size_n, loss_n = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if len(set(sizes)) < 4 or len(size_n) != len(loss_n):
        raise UserError(f'a law of three numbers is fitted to {len(set(sizes))} sizes: at least 4 are needed')
    if not (np.isfinite(size_n) & np.isfinite(loss_n) & (size_n > 0) & (loss_n > 0)).all():
        raise UserError('sizes and losses of a law must be finite and above 0')
    scale = np.exp(np.log(size_n).mean())  # else A and α would be tied to each other
    found = [_descend(size_n / scale, loss_n, share, alpha) for share in SHARES for alpha in EXPONENTS]
    (offset, factor, alpha), error = min(found, key=lambda one: one[1])
    return PowerLaw(float(offset), float(factor * scale**alpha), float(alpha), float(error))


def _descend(
    size_n: np.ndarray, loss_n: np.ndarray, share: float, alpha: float
) -> tuple[tuple[float, float, float], float]:
    """E, A, α and the error that a beginning leads to."""
    least = loss_n.min()
    p = np.array([np.log(share * least), np.log((1 - share) * least), alpha])
    damping, log_size_n, log_loss_n = 1e-2, np.log(size_n), np.log(loss_n)

    def residuals(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the logarithms [n], and their derivatives [n, P]."""
        e, a_n = np.exp(p[0]), np.exp(p[1] - p[2] * log_size_n)
        law_n = e + a_n
        return np.log(law_n) - log_loss_n, np.stack([e / law_n, a_n / law_n, -a_n * log_size_n / law_n], 1)

    r_n, j_nP = residuals(p)
    for _ in range(STEPS):
        h_PP = j_nP.T @ j_nP
        step = np.linalg.solve(h_PP + damping * (np.diag(np.diag(h_PP)) + 1e-12 * np.eye(3)), -j_nP.T @ r_n)
        tried = p + np.clip(step, -2, 2)
        new_n, new_nP = residuals(tried)
        if np.isfinite(new_n).all() and new_n @ new_n < r_n @ r_n:
            settled = new_n @ new_n > (1 - 1e-9) * (r_n @ r_n)
            p, r_n, j_nP, damping = tried, new_n, new_nP, max(damping / 3, 1e-12)
            if settled:
                break
        elif (damping := damping * 4) > 1e12:
            break
    return (float(np.exp(p[0])), float(np.exp(p[1])), float(p[2])), float(np.sqrt((r_n**2).mean()))


def without_one(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest exponent among the fits that leave out one run each: how far the exponent can be trusted."""
    left_out = [(np.delete(sizes, i), np.delete(losses, i)) for i in range(len(sizes))]
    found = [fit(size_n.tolist(), loss_n.tolist()).exponent for size_n, loss_n in left_out]
    return min(found), max(found)
