"""Which columns of a row each device of `context` holds. Positions and segments travel along, so any order is right.

T: tokens of a row; n: devices of `context`; c: columns that one device holds.
"""

import numpy as np


def contiguous(T: int, n: int) -> np.ndarray:
    """int32 [n, c]: the row as it is, cut in n."""
    assert T % n == 0, (T, n)
    return np.arange(T, dtype=np.int32).reshape(n, -1)


def zigzag(T: int, n: int) -> np.ndarray:
    """int32 [n, c]: of 2n chunks device i holds the chunks i and 2n - 1 - i.

    Then as many pairs of a query and an earlier key meet on every device, and in every tick of a ring (Brandon et al. 2023,
    arXiv:2311.09431, for the imbalance; the order is Llama 3's, arXiv:2407.21783, section 3.3.2).
    """
    if n == 1:
        return contiguous(T, 1)
    chunks = contiguous(T, 2 * n)
    return np.concatenate([chunks[:n], chunks[: n - 1 : -1]], axis=1)


def cyclic(T: int, n: int) -> np.ndarray:
    """int32 [n, c]: column t on device t mod n, at t // n. A cache is kept so: it grows on all devices alike."""
    return np.ascontiguousarray(contiguous(T, T // n).T)
