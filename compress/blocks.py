"""Means over the tokens of a text, and how sure they are: intervals by drawing the text's blocks anew.

Letters: R rows of a text, T their columns, N blocks, K quantities, S draws.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from weft.interpret.intervals import BOOTSTRAPS, NORMAL, Estimate

BLOCK = 256  # tokens, of one row, that are drawn together
SEED = 0  # of the draws


def per_token(quantity_KRT: Sequence[np.ndarray], live_RT: np.ndarray, block: int = BLOCK) -> list[Estimate]:
    """Of each quantity the mean over real tokens, its 95 % interval by drawing blocks of so many columns of a row anew.

    A draw has as many blocks as there are, with replacement, the same of all quantities; of a draw counts the sum over its
    tokens by their number, as blocks at the end of a document may have fewer.
    """
    begins = np.arange(0, live_RT.shape[1], block)
    blocks_of = lambda a_RT: np.add.reduceat(np.asarray(a_RT, np.float64), begins, axis=1).ravel()
    count_N = blocks_of(live_RT)
    some_N = count_N > 0
    sum_KN = np.stack([blocks_of(a_RT)[some_N] for a_RT in quantity_KRT])
    count_N = count_N[some_N]
    drawn_KS = sum_KN @ draws(len(count_N)).T / (draws(len(count_N)) @ count_N)
    low_K, high_K = np.percentile(drawn_KS, levels(len(count_N)), axis=1)
    value_K = sum_KN.sum(1) / count_N.sum()
    return [
        Estimate(float(value), float(low), float(high), len(count_N))
        for value, low, high in zip(value_K, low_K, high_K, strict=True)
    ]


def levels(count: int) -> tuple[float, float]:
    """The percentiles of the draws between which 95 % of intervals of so many blocks hold the truth: nearly 2.5 and 97.5.

    Draws of few values vary less than means do, by √((n − 1) / n), and know nothing of Student's t, whose quantile is here by
    its expansion (Abramowitz and Stegun 26.7.5). Wider levels make up for both (Hesterberg 2015, arXiv:1411.5279, section 5.3):
    of 60 blocks 2.5 and 97.5 themselves held the truth in 93.7 % of 3,000 simulated texts, these in 94.5 %.
    """
    z, freedom = NORMAL, max(count - 1, 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low = 50 * math.erfc(t * math.sqrt(count / freedom / 2))
    return low, 100 - low


@functools.lru_cache(maxsize=8)
def draws(count: int) -> np.ndarray:
    """float64 [S, count]: how often each of so many blocks is in each draw; the same for every model."""
    return np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAPS).astype(np.float64)
