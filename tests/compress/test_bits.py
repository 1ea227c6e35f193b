"""Bits of each form against what the arrays of that form really hold.

Letters: I inputs, O outputs, R rank, E slices.
"""

import numpy as np
import pytest

from weft.compress.numerics import bits, cp, pruning, quantised_pair, rounding, svd, tensor_train, tucker
from weft.runtime.errors import UserError

W_EIO = np.random.default_rng(0).standard_normal((3, 24, 12))
W_IO = W_EIO[0]


def held(*arrays: np.ndarray | None, width: int = 32) -> int:
    """Bits of these arrays' numbers at a width."""
    return sum(width * array.size for array in arrays if array is not None)


def of_rounded(rounded: rounding.Rounded, width: int) -> int:
    return held(rounded.codes, width=width) + 8 * rounded.scale.nbytes


def test_factors_take_what_their_arrays_hold():
    assert bits.dense(W_EIO.shape) == 8 * W_EIO.astype(np.float32).nbytes
    assert bits.pair(24, 12, 5) == held(*svd.truncated(W_IO, 5))
    for side in ('in', 'out'):
        assert bits.shared_basis(3, 24, 12, 5, side) == held(*svd.shared_basis(W_EIO, 5, side))
    for ranks in ((2, 5, 4), (None, 5, 4), (None, None, None)):
        found = tucker.hosvd(W_EIO, ranks)
        assert bits.tucker(W_EIO.shape, ranks, 16) == held(found.core, *found.factors, width=16)
    assert bits.cp(W_EIO.shape, 4) == held(*cp.cp_als(W_EIO, 4, iterations=1).factors)


@pytest.mark.parametrize('ranks', [1, 3, 100, (2, 5), (6, 8), (1, 8)])
def test_a_train_takes_what_its_cores_hold(ranks):
    rows, columns = (2, 3, 4), (3, 2, 2)
    assert bits.tensor_train(rows, columns, ranks) == held(*tensor_train.tt_svd(W_IO, rows, columns, ranks).cores)
    assert bits.tensor_train((24,), (12,), ranks if isinstance(ranks, int) else ()) == bits.dense(W_IO.shape)


def test_rounded_weights_take_their_codes_and_their_scales():
    for axis in (0, 1, -1):
        assert bits.int8(W_EIO.shape, axis) == of_rounded(rounding.int8(W_EIO, axis), 8)
        assert bits.fp8(W_EIO.shape, axis) == of_rounded(rounding.fp8(W_EIO, axis), 8)
        for group in (5, 8, 32):
            assert bits.int4(W_EIO.shape, axis, group) == of_rounded(rounding.int4(W_EIO, axis, group), 4)
    for width in (4, 8):
        pair = quantised_pair.quantised_pair(W_IO, 10, width, group=4)
        found = of_rounded(pair.first, width) + of_rounded(pair.second, width)
        assert bits.quantised_pair(24, 12, 10, width, group=4) == found
    assert bits.int4((4096, 4096), 0) == 4.5 * 4096**2


def test_sparse_weights_take_a_bitmap_or_places_and_their_numbers():
    mask = pruning.magnitude(W_IO, 0.3)
    kept = int(mask.sum())
    assert bits.sparse(W_IO.shape, kept) == 8 * np.packbits(mask).nbytes + held(W_IO[mask])
    mask = pruning.n_of_m(np.abs(W_IO))
    assert bits.sparse_n_of_m(W_IO.shape) == held(W_IO[mask]) + 2 * int(mask.sum())
    assert bits.sparse_n_of_m((8, 1), 1, 8, 16) == 16 + 3


@pytest.mark.parametrize('share', [0.05, 0.1, 0.5, 0.9, 3])
def test_the_rank_within_a_budget_fits_and_the_next_does_not(share):
    forms = [
        (lambda rank: bits.pair(24, 12, rank), 12),
        (lambda rank: bits.cp((24, 12, 3), rank), 36),
        (lambda rank: bits.tensor_train((2, 3, 4), (3, 2, 2), rank), 8),
        (lambda rank: bits.quantised_pair(24, 12, rank, 4), 12),
    ]
    for of_rank, most in forms:
        budget = share * of_rank(most) + of_rank(1)
        rank = bits.rank_within(of_rank, budget, most)
        assert rank == max(rank for rank in range(1, most + 1) if of_rank(rank) <= budget)


def test_a_budget_below_rank_one_is_refused_with_what_that_takes():
    with pytest.raises(UserError, match='a budget of 1000 bits: rank 1 takes 1152'):
        bits.rank_within(lambda rank: bits.pair(24, 12, rank), 1000, 12)
