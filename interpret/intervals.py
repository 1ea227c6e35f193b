"""How sure a measured number is.

Letters: N values, R draws.
"""

from typing import NamedTuple

import numpy as np

BOOTSTRAPS = 2000
NORMAL = 1.959964  # of a normal distribution 95 % lie within so many standard deviations


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float
    of: int  # values that it is a mean of

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """As `0.93 [0.88, 0.96]`."""
        value, low, high = (f'{factor * one:.{digits}f}' for one in (self.value, self.low, self.high))
        return f'{value} [{low}, {high}]'


def mean(values: object, seed: int = 0) -> Estimate:
    """The mean, its interval by drawing values anew (percentile bootstrap: Efron 1979, Bootstrap methods)."""
    value_N = np.asarray(values, np.float64).ravel()
    index_RN = np.random.default_rng(seed).integers(len(value_N), size=(BOOTSTRAPS, len(value_N)))
    low, high = np.percentile(value_N[index_RN].mean(1), [2.5, 97.5])
    return Estimate(float(value_N.mean()), float(low), float(high), len(value_N))


def share(right: object) -> Estimate:
    """Of booleans how many are true, with the score interval of a proportion (Wilson 1927, Probable inference).

    It is sound at 0 and 1 too, where drawing anew would know of no doubt.
    """
    right_N = np.asarray(right, np.float64).ravel()
    n, p, z = len(right_N), float(right_N.mean()), NORMAL
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, float(max(0.0, middle - half)), float(min(1.0, middle + half)), n)


def of_draws(values: object) -> Estimate:
    """The mean of draws, and between which values 95 % of the draws lie."""
    value_R = np.asarray(values, np.float64).ravel()
    low, high = np.percentile(value_R, [2.5, 97.5])
    return Estimate(float(value_R.mean()), float(low), float(high), len(value_R))
