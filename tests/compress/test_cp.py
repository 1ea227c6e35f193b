"""CP by alternating least squares: planted factors, tensorly's errors, the sums that define what it computes."""

import itertools

import numpy as np
import pytest
from tensorly import decomposition

from weft.compress.numerics.cp import CP, alternate, contraction, cp_als, rebuild
from weft.runtime.errors import UserError


def planted(shape: tuple[int, ...], rank: int, seed: int) -> CP:
    r = np.random.default_rng(seed)
    return CP(tuple(r.standard_normal((size, rank)) for size in shape))


def relative(w: np.ndarray, cp: CP) -> float:
    return float(np.linalg.norm(w - rebuild(cp)) / np.linalg.norm(w))


@pytest.mark.parametrize(('shape', 'rank'), [((6, 7, 8), 3), ((5, 4, 6, 3), 2), ((9, 5, 7), 5)])
def test_planted_factors_are_found_up_to_order_and_scale(shape, rank):
    truth = planted(shape, rank, seed=1)
    found = cp_als(rebuild(truth), rank, iterations=2000, tolerance=1e-13, starts=3)
    assert relative(rebuild(truth), found) < 1e-6
    # The product over modes of the cosines of their columns: 1 where a term is the other's, and for one term alone.
    alike = np.ones((rank, rank))
    for ours, true in zip(found.factors, truth.factors, strict=True):
        alike = alike * ((ours / np.linalg.norm(ours, axis=0)).T @ (true / np.linalg.norm(true, axis=0)))
    order = alike.argmax(1)
    assert sorted(order) == list(range(rank))
    np.testing.assert_allclose(alike[np.arange(rank), order], 1, atol=1e-6)
    for ours, true in zip(found.factors, truth.factors, strict=True):
        unit = true[:, order] / np.linalg.norm(true[:, order], axis=0)
        cosine = ((ours / np.linalg.norm(ours, axis=0)) * unit).sum(0)
        np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-6)


@pytest.mark.filterwarnings('ignore:Trying to compute SVD')  # tensorly's, of a rank above a mode's size
@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize(('shape', 'rank'), [((6, 7, 8), 4), ((4, 9, 5), 7), ((3, 4, 3, 4), 3)])
def test_the_error_is_not_worse_than_tensorlys(shape, rank, seed):
    """Of a rank above a mode's size each start has another optimum, a few per cent apart: the test below has equal starts."""
    w = rebuild(planted(shape, rank, seed)) + np.random.default_rng(seed + 9).standard_normal(shape)
    theirs = decomposition.parafac(w, rank, n_iter_max=200, init='svd', tol=1e-8, random_state=seed)
    rows = CP(tuple(factor * (theirs.weights if not mode else 1) for mode, factor in enumerate(theirs.factors)))
    assert relative(w, cp_als(w, rank, starts=2)) <= 1.01 * relative(w, rows)


@pytest.mark.parametrize(('shape', 'rank'), [((6, 7, 8), 4), ((4, 9, 5), 7), ((3, 4, 3, 4), 3)])
def test_from_the_same_start_the_rounds_are_tensorlys(shape, rank):
    w, start = np.random.default_rng(0).standard_normal(shape), planted(shape, rank, seed=5)
    for rounds in (1, 3, 40):
        init = (np.ones(rank), [factor.copy() for factor in start.factors])
        theirs = decomposition.parafac(w, rank, n_iter_max=rounds, init=init, tol=0)
        factors, error = alternate(w, list(start.factors), rounds, tolerance=0)
        np.testing.assert_allclose(rebuild(CP(tuple(factors))), theirs.to_tensor(), atol=1e-6)
        assert error == pytest.approx(relative(w, CP(tuple(factors))), rel=1e-9)


def test_the_largest_rank_reaches_any_tensor():
    w = np.random.default_rng(0).standard_normal((2, 5, 3))
    assert relative(w, cp_als(w, 6, iterations=3000, tolerance=0)) < 1e-6


def test_of_a_matrix_it_is_as_good_as_the_svd():
    w_IO = np.random.default_rng(0).standard_normal((6, 5)) * 0.6 ** np.arange(5)
    tail = np.linalg.svd(w_IO, compute_uv=False)[2:]
    assert np.linalg.norm(w_IO - rebuild(cp_als(w_IO, 2))) == pytest.approx(np.linalg.norm(tail), rel=1e-6)


def test_more_rounds_and_starts_are_never_worse():
    w = np.random.default_rng(2).standard_normal((5, 6, 4))
    by_rounds = [relative(w, cp_als(w, 4, iterations=n, tolerance=0)) for n in (1, 2, 5, 20)]
    assert by_rounds == sorted(by_rounds, reverse=True)
    by_starts = [relative(w, cp_als(w, 4, starts=n)) for n in (1, 2, 4)]
    assert by_starts == sorted(by_starts, reverse=True)
    again = zip(cp_als(w, 4, starts=2).factors, cp_als(w, 4, starts=2).factors, strict=True)
    assert all((one == other).all() for one, other in again)


def test_a_terms_scale_is_spread_equally_over_the_modes():
    w = 1e6 * np.random.default_rng(2).standard_normal((5, 6, 4))
    norms = [np.linalg.norm(factor, axis=0) for factor in cp_als(w, 7, seed=3).factors]
    for one, other in itertools.pairwise(norms):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    assert not rebuild(cp_als(np.zeros((2, 3, 2)), 2)).any()


@pytest.mark.parametrize('shape', [(3, 4), (3, 5, 4), (2, 3, 2, 4)])
def test_a_contraction_is_the_sum_that_defines_it(shape):
    cp = planted(shape, 3, seed=0)
    w = np.random.default_rng(1).standard_normal(shape)
    for mode in range(len(shape)):
        expected = np.zeros((shape[mode], 3))
        for place in itertools.product(*map(range, shape)):
            rows = [factor[n] for other, (factor, n) in enumerate(zip(cp.factors, place, strict=True)) if other != mode]
            expected[place[mode]] += w[place] * np.prod(rows, axis=0)
        np.testing.assert_allclose(contraction(w, list(cp.factors), mode), expected, atol=1e-12)


def test_ranks_that_cannot_be_are_named_with_the_nearest():
    with pytest.raises(UserError, match=r'rank is 7: .* to 6, the highest of a tensor of 2 × 5 × 3; nearest: 6'):
        cp_als(np.ones((2, 5, 3)), 7)
    with pytest.raises(UserError, match=r'rank is 0: .* nearest: 1'):
        cp_als(np.ones((2, 5, 3)), 0)
