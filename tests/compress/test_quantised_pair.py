"""Quantised pairs against the best pair that is rounded factor by factor, in each way that its scale can be spread.

Letters: I inputs, O outputs, R rank, N tokens.
"""

import numpy as np
import pytest

from weft.compress.numerics.quantised_pair import quantised_pair, rebuild
from weft.compress.numerics.rounding import decode, int4, int8
from weft.compress.numerics.svd import errors, truncated, whitened
from weft.runtime.errors import UserError

RNG = np.random.default_rng(0)
W_IO = RNG.standard_normal((80, 60)) * 0.93 ** np.arange(60) @ RNG.standard_normal((60, 60))
X_NI = RNG.standard_normal((300, 80)) * 0.95 ** np.arange(80) @ RNG.standard_normal((80, 80))
GRAM_II = X_NI.T @ X_NI


def both_rounded(pair, bits: int) -> np.ndarray:
    of = int8 if bits == 8 else int4
    return decode(of(pair.first, 0)) @ decode(of(pair.second, 0))


@pytest.mark.parametrize('rank', [1, 8, 40, 60])
@pytest.mark.parametrize('bits', [4, 8])
def test_it_is_not_worse_than_both_factors_rounded_by_themselves(bits, rank):
    size = np.linalg.svd(W_IO, compute_uv=False)[:rank]
    plain = truncated(W_IO, rank)
    for power in (0, 0.5, 1):  # of the singular values, in the first factor
        spread = size ** (power - 0.5)
        other = both_rounded(plain._replace(first=plain.first * spread, second=plain.second / spread[:, None]), bits)
        assert errors(W_IO, rebuild(quantised_pair(W_IO, rank, bits))).frobenius <= errors(W_IO, other).frobenius
    of_outputs = errors(W_IO, both_rounded(whitened(W_IO, GRAM_II, rank), bits), GRAM_II).weighted
    found = quantised_pair(W_IO, rank, bits, GRAM_II)
    assert errors(W_IO, rebuild(found), GRAM_II).weighted <= of_outputs


@pytest.mark.parametrize('bits', [4, 8])
def test_sizes_are_shared_so_that_plain_rounding_costs_less_than_by_equal_or_by_one_sided_shares(bits):
    size, plain = np.linalg.svd(W_IO, compute_uv=False)[:40], truncated(W_IO, 40)
    found = errors(W_IO, rebuild(quantised_pair(W_IO, 40, bits, rounds=0))).frobenius
    for power in (0, 0.5, 1):  # of the singular values, in the first factor
        spread = size ** (power - 0.5)
        first, second = plain.first * spread, plain.second / spread[:, None]
        rounded = [int8(w, 0) if bits == 8 else int4(w, 0, search=True) for w in (first, second)]
        assert found < errors(W_IO, decode(rounded[0]) @ decode(rounded[1])).frobenius


@pytest.mark.parametrize('gram', [None, GRAM_II])
def test_rounds_never_make_it_worse_and_int4_much_better(gram):
    which = 'frobenius' if gram is None else 'weighted'
    found = [
        getattr(errors(W_IO, rebuild(quantised_pair(W_IO, 50, 4, gram, rounds)), gram), which) for rounds in range(5)
    ]
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.8 * found[0]


def test_int8_adds_little_to_what_the_rank_costs():
    low = errors(W_IO, truncated(W_IO, 20)).frobenius
    assert low <= errors(W_IO, rebuild(quantised_pair(W_IO, 20, 8))).frobenius < 1.01 * low
    of_outputs = errors(W_IO, whitened(W_IO, GRAM_II, 20), GRAM_II).weighted
    assert errors(W_IO, rebuild(quantised_pair(W_IO, 20, 8, GRAM_II)), GRAM_II).weighted < 1.05 * of_outputs


def test_its_factors_are_rounded_along_their_inputs():
    found = quantised_pair(W_IO, 40, 4, group=16)
    assert (found.first.codes.shape, found.first.scale.shape) == ((80, 40), (5, 40))
    assert (found.second.codes.shape, found.second.scale.shape) == ((40, 60), (3, 60))
    found = quantised_pair(W_IO, 40, 8)
    assert (found.first.scale.shape, found.second.scale.shape) == ((1, 40), (1, 60))


def test_zeros_stay_and_what_cannot_be_is_refused():
    assert not rebuild(quantised_pair(np.zeros((4, 3)), 2, 4)).any()
    with pytest.raises(UserError, match='bits is 5: it must be 4 or 8; nearest: 4'):
        quantised_pair(W_IO, 2, 5)
    with pytest.raises(UserError, match=r'rank is 61: .* nearest: 60'):
        quantised_pair(W_IO, 61, 8)
