"""Tucker forms against tensorly's, against their bounds, and on tensors whose ranks are planted."""

import numpy as np
import pytest
from tensorly import decomposition

from weft.compress.numerics.tucker import Tucker, hooi, hosvd, mode_product, rebuild
from weft.runtime.errors import UserError

W = np.random.default_rng(0).standard_normal((5, 8, 6)) * 0.7 ** np.arange(8)[:, None]
RANKS = [(2, 3, 2), (None, 3, 2), (3, None, None), (1, 1, 1), (4, 8, 1)]


def error(tucker: Tucker, w: np.ndarray = W) -> float:
    return float(np.linalg.norm(w - rebuild(tucker)))


def tail(w: np.ndarray, mode: int, rank: int) -> float:
    """The norm of the singular values that a mode's unfolding loses."""
    size = np.linalg.svd(np.moveaxis(w, mode, 0).reshape(w.shape[mode], -1), compute_uv=False)
    return float(np.linalg.norm(size[rank:]))


@pytest.mark.parametrize('method', [hosvd, hooi])
def test_full_ranks_give_the_tensor_back(method):
    for ranks in ((5, 8, 6), (None, 8, None), (None, None, None)):
        found = method(W, ranks)
        np.testing.assert_allclose(rebuild(found), W, atol=1e-12)
        assert [factor is None for factor in found.factors] == [rank is None for rank in ranks]
    four = np.random.default_rng(1).standard_normal((2, 3, 2, 4))
    np.testing.assert_allclose(rebuild(method(four, four.shape)), four, atol=1e-12)


@pytest.mark.parametrize('ranks', RANKS)
def test_hosvd_is_within_the_root_of_its_modes_of_the_best(ranks):
    """The greatest tail is below any error of these ranks, so that the bound is tried without the unknown best."""
    found = error(hosvd(W, ranks))
    tails = [tail(W, mode, rank) for mode, rank in enumerate(ranks) if rank is not None]
    assert found <= np.linalg.norm(tails) * (1 + 1e-12)
    assert found >= max(tails) * (1 - 1e-12)
    best = error(hooi(W, ranks, iterations=200, tolerance=1e-12))
    assert best >= max(tails) * (1 - 1e-12)
    assert found <= len(tails) ** 0.5 * best * (1 + 1e-12)


def test_hooi_is_never_worse_than_hosvd_and_often_better():
    gains = []
    for seed in range(20):
        w = np.random.default_rng(seed).standard_normal((4, 6, 5))
        for ranks in RANKS[:3]:
            gains.append(error(hosvd(w, ranks), w) - error(hooi(w, ranks), w))
    assert min(gains) >= -1e-12
    assert np.mean(np.array(gains) > 1e-4) > 0.6
    rounds = [error(hooi(W, (2, 3, 2), iterations, 0.0)) for iterations in range(5)]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] == error(hosvd(W, (2, 3, 2)))


@pytest.mark.parametrize('ranks', [(2, 3, 2), (4, 4, 3)])
def test_hooi_is_as_good_as_tensorlys(ranks):
    core, factors = decomposition.tucker(W, list(ranks), n_iter_max=200, tol=1e-10)
    theirs = np.linalg.norm(W - rebuild(Tucker(core, tuple(factors))))
    assert error(hooi(W, ranks, iterations=200, tolerance=1e-10)) <= theirs * 1.001
    core, factors = decomposition.tucker(W, list(ranks), n_iter_max=0)
    assert error(hosvd(W, ranks)) == pytest.approx(np.linalg.norm(W - rebuild(Tucker(core, tuple(factors)))), rel=1e-8)


def test_planted_ranks_are_exact_and_one_less_is_not():
    r = np.random.default_rng(3)
    core = r.standard_normal((2, 3, 4))
    planted = rebuild(Tucker(core, (r.standard_normal((7, 2)), r.standard_normal((8, 3)), None)))
    for method in (hosvd, hooi):
        assert error(method(planted, (2, 3, None)), planted) < 1e-12 * np.linalg.norm(planted)
        assert error(method(planted, (2, 2, None)), planted) > 1e-2 * np.linalg.norm(planted)


def test_factors_are_orthonormal_and_the_core_holds_the_norm():
    found = hooi(W, (2, 3, None))
    assert found.core.shape == (2, 3, 6)
    for factor in found.factors[:2]:
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)
    assert error(found) ** 2 == pytest.approx((W**2).sum() - (found.core**2).sum(), rel=1e-10)
    assert not rebuild(hooi(np.zeros((2, 3, 2)), (1, 1, 1))).any()


def test_a_mode_product_is_the_sum_that_defines_it():
    matrix = np.random.default_rng(4).standard_normal((3, 8))
    np.testing.assert_allclose(mode_product(W, matrix, 1), np.einsum('anb,mn->amb', W, matrix), atol=1e-12)


def test_ranks_that_cannot_be_are_named_with_the_nearest():
    with pytest.raises(UserError, match=r'ranks\[1\] is 9: .* to 8, .* mode 1 of a tensor of 5 × 8 × 6; nearest: 8'):
        hosvd(W, (2, 9, 2))
    with pytest.raises(UserError, match=r'ranks\[0\] is 0: .*; nearest: 1'):
        hooi(W, (0, None, 2))
    with pytest.raises(UserError, match='ranks are 2: a tensor of 3 modes needs 3'):
        hooi(W, (2, 2))
