"""The order of the rows: a permutation for each epoch that needs no memory and reaches any step at once."""

import numpy as np

# The finaliser of splitmix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators).
INCREMENT = 0x9E3779B97F4A7C15
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1
ROUNDS = 6


def _mix(x_N: np.ndarray) -> np.ndarray:
    x_N = x_N + np.uint64(INCREMENT)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(FACTORS[0])
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(FACTORS[1])
    return x_N ^ (x_N >> np.uint64(31))


def permute(position_N: np.ndarray, size: int, seed: int, epoch_N: np.ndarray) -> np.ndarray:
    """Where `position_N` goes in the permutation of [0, size) that (seed, epoch) names; int64 [N], both in [0, size).

    A Feistel network (Luby and Rackoff 1988) permutes the smallest [0, 4^k) that holds `size`; a result that lies
    outside is sent through again until it lies inside (cycle walking: Black and Rogaway 2002, Ciphers with arbitrary
    finite domains, method 2): fewer than four trips on average, whatever the size. Integer arithmetic alone, so every
    platform agrees.
    """
    assert size > 0
    assert position_N.ndim == 1
    assert ((position_N >= 0) & (position_N < size)).all()
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    key_N = _mix(_mix(np.full(position_N.shape, seed & WORD, np.uint64)) ^ epoch_N.astype(np.uint64))
    keys_N = [_mix(key_N + np.uint64(i)) for i in range(ROUNDS)]
    x_N = position_N.astype(np.uint64)
    outside_N = np.ones(x_N.shape, bool)
    while outside_N.any():
        left_N, right_N = x_N >> half, x_N & mask
        for round_key_N in keys_N:
            left_N, right_N = right_N, left_N ^ (_mix(right_N ^ round_key_N) & mask)
        x_N = np.where(outside_N, (left_N << half) | right_N, x_N)
        outside_N &= x_N >= size
    return x_N.astype(np.int64)


def row_ids(rows: int, seed: int, step: int, batch: int) -> np.ndarray:
    """The rows of global batch `step`, int64 [batch]. Every `rows` samples, over all steps, are an epoch."""
    epoch, position = divmod(step * batch, rows)
    sample_N = position + np.arange(batch, dtype=np.int64)
    return permute(sample_N % rows, rows, seed, epoch + sample_N // rows)
