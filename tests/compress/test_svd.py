"""Pairs of factors against Eckart and Young's tails, random pairs, and an optimiser that knows only the error.

Letters: I inputs, O outputs, R rank, E slices, N tokens.
"""

import numpy as np
import pytest
from scipy import optimize

from weft.compress.numerics.svd import (
    Pair,
    balanced,
    errors,
    rebuild,
    second_factor,
    shared_basis,
    truncated,
    whitened,
)
from weft.runtime.errors import UserError

RNG = np.random.default_rng(0)
W_EIO = RNG.standard_normal((3, 9, 7)) * 0.5 ** np.arange(7)
W_IO = W_EIO[0]
# Inputs that are far from white, and inputs of which there are fewer than dims.
X_NI = RNG.standard_normal((40, 9)) @ RNG.standard_normal((9, 9)) * 0.4 ** np.arange(9)
FEW_NI = RNG.standard_normal((4, 9))


def norm(w: np.ndarray) -> float:
    return float(np.linalg.norm(w))


def test_full_rank_gives_the_weights_back():
    for gram_II in (X_NI.T @ X_NI, FEW_NI.T @ FEW_NI, np.zeros((9, 9))):
        np.testing.assert_allclose(rebuild(whitened(W_IO, gram_II, 7)), W_IO, atol=1e-10)
        np.testing.assert_allclose(rebuild(whitened(W_EIO, gram_II, 7)), W_EIO, atol=1e-10)
        for rank, side in ((9, 'in'), (7, 'out')):
            for given in (gram_II, np.stack([gram_II] * 3), None):
                np.testing.assert_allclose(rebuild(shared_basis(W_EIO, rank, side, given)), W_EIO, atol=1e-10)
    np.testing.assert_allclose(rebuild(truncated(W_EIO, 7)), W_EIO, atol=1e-12)
    wide = np.swapaxes(W_EIO, 1, 2)
    np.testing.assert_allclose(rebuild(truncated(wide, 7)), wide, atol=1e-12)
    np.testing.assert_allclose(rebuild(whitened(wide, np.eye(7), 7)), wide, atol=1e-10)


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_a_truncated_svd_leaves_the_tail_of_singular_values_in_both_norms(rank):
    for w_IO, pair in zip(W_EIO, zip(*truncated(W_EIO, rank), strict=True), strict=True):
        tail = np.linalg.svd(w_IO, compute_uv=False)[rank:]
        off = w_IO - pair[0] @ pair[1]
        assert norm(off) == pytest.approx(norm(tail), rel=1e-10)
        assert np.linalg.norm(off, 2) == pytest.approx(tail[0], rel=1e-10)


def test_no_random_pair_is_nearer_in_either_norm():
    found = errors(W_IO, truncated(W_IO, 3))
    for seed in range(50):
        first_IR = np.random.default_rng(seed).standard_normal((9, 3))
        if seed % 2:  # near the best one
            first_IR = truncated(W_IO, 3).first + 0.01 * first_IR
        other = errors(W_IO, Pair(first_IR, second_factor(W_IO, first_IR)))
        assert other.frobenius > found.frobenius
        assert other.spectral > found.spectral


def by_optimiser(w_IO: np.ndarray, x_NI: np.ndarray, rank: int) -> float:
    """The least ‖X(W − AB)‖_F that L-BFGS finds from eight random starts."""
    inputs, outputs = w_IO.shape

    def error_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        a_IR = flat[: inputs * rank].reshape(inputs, rank)
        b_RO = flat[inputs * rank :].reshape(rank, outputs)
        off_NO = x_NI @ (a_IR @ b_RO - w_IO)
        slope_IO = 2 * x_NI.T @ off_NO
        return (off_NO**2).sum(), np.concatenate([(slope_IO @ b_RO.T).ravel(), (a_IR.T @ slope_IO).ravel()])

    least = np.inf
    for seed in range(8):
        start = np.random.default_rng(seed).standard_normal((inputs + outputs) * rank)
        options = {'maxiter': 5000, 'maxfun': 10000, 'ftol': 1e-15, 'gtol': 1e-10}
        found = optimize.minimize(error_and_slope, start, jac=True, method='L-BFGS-B', options=options)
        least = min(least, found.fun)
    return least**0.5


@pytest.mark.parametrize('rank', [1, 3])
def test_a_whitened_svd_minimises_the_whitened_error(rank):
    x_NI = RNG.standard_normal((30, 6)) @ RNG.standard_normal((6, 6))
    w_IO = RNG.standard_normal((6, 5))
    found = norm(x_NI @ (w_IO - rebuild(whitened(w_IO, x_NI.T @ x_NI, rank))))
    best = by_optimiser(w_IO, x_NI, rank)
    assert found == pytest.approx(best, rel=1e-6)
    assert found <= best * (1 + 1e-10)
    # The tail of XW is what no matrix of this rank can do better than.
    assert found == pytest.approx(norm(np.linalg.svd(x_NI @ w_IO, compute_uv=False)[rank:]), rel=1e-10)
    assert norm(x_NI @ (w_IO - rebuild(truncated(w_IO, rank)))) > 1.001 * found


def test_with_fewer_tokens_than_inputs_the_outputs_are_exact_once_the_rank_is_that_of_the_tokens():
    gram_II = FEW_NI.T @ FEW_NI
    tail = np.linalg.svd(FEW_NI @ W_IO, compute_uv=False)
    assert norm(FEW_NI @ (W_IO - rebuild(whitened(W_IO, gram_II, 2)))) == pytest.approx(norm(tail[2:]), rel=1e-6)
    assert errors(W_IO, whitened(W_IO, gram_II, 4), gram_II).weighted < 1e-4
    # What rank is left over serves the directions that no input had.
    assert errors(W_IO, whitened(W_IO, gram_II, 6)).frobenius < 0.2 * errors(W_IO, whitened(W_IO, gram_II, 4)).frobenius


def test_a_batch_of_gram_matrices_is_each_matrix_with_its_own():
    gram_EII = np.stack([np.diag(RNG.random(9) + 0.1) for _ in W_EIO])
    together = rebuild(whitened(W_EIO, gram_EII, 3))
    for w_IO, gram_II, found in zip(W_EIO, gram_EII, together, strict=True):
        np.testing.assert_allclose(found, rebuild(whitened(w_IO, gram_II, 3)), atol=1e-12)


def test_a_shared_basis_is_the_best_for_all_slices_together():
    for side, stacked in (('in', np.concatenate(list(W_EIO), 1)), ('out', np.concatenate(list(W_EIO), 0))):
        pair = shared_basis(W_EIO, 3, side)
        assert [part.ndim for part in pair] == ([2, 3] if side == 'in' else [3, 2])
        tail = np.linalg.svd(stacked, compute_uv=False)[3:]
        assert norm(W_EIO - rebuild(pair)) == pytest.approx(norm(tail), rel=1e-10)
        assert norm(X_NI @ W_EIO - X_NI @ rebuild(pair)) > 1.001 * norm(
            X_NI @ W_EIO - X_NI @ rebuild(shared_basis(W_EIO, 3, side, X_NI.T @ X_NI))
        )


def test_a_whitened_shared_basis_leaves_the_tail_of_the_outputs():
    gram_II = X_NI.T @ X_NI
    for side, axis in (('in', 1), ('out', 0)):
        tail = np.linalg.svd(np.concatenate(list(X_NI @ W_EIO), axis), compute_uv=False)[3:]
        off = X_NI @ (W_EIO - rebuild(shared_basis(W_EIO, 3, side, gram_II)))
        assert norm(off) == pytest.approx(norm(tail), rel=1e-8)


def test_slices_with_inputs_of_their_own_share_what_serves_them():
    x_ENI = np.stack([X_NI, X_NI[:, ::-1], RNG.standard_normal((40, 9))])
    gram_EII = np.swapaxes(x_ENI, 1, 2) @ x_ENI
    off = lambda pair: norm(x_ENI @ (W_EIO - rebuild(pair)))
    tail = np.linalg.svd((x_ENI @ W_EIO).reshape(-1, 7), compute_uv=False)[3:]
    assert off(shared_basis(W_EIO, 3, 'out', gram_EII)) == pytest.approx(norm(tail), rel=1e-8)
    own, summed = shared_basis(W_EIO, 3, 'in', gram_EII), shared_basis(W_EIO, 3, 'in', gram_EII.sum(0))
    assert off(own) < off(summed)
    for w_IO, x_NI, second_RO in zip(W_EIO, x_ENI, own.second, strict=True):  # the normal equations of least squares
        np.testing.assert_allclose((x_NI @ own.first).T @ x_NI @ (own.first @ second_RO - w_IO), 0, atol=1e-9)


def test_a_planted_basis_is_found_whole():
    basis_IR = RNG.standard_normal((9, 2))
    w_EIO = basis_IR @ RNG.standard_normal((5, 2, 4))
    assert errors(w_EIO, shared_basis(w_EIO, 2, 'in')).frobenius < 1e-12
    assert errors(w_EIO, shared_basis(w_EIO, 2, 'out')).frobenius > 0.1
    turned = np.swapaxes(w_EIO, 1, 2)
    assert errors(turned, shared_basis(turned, 2, 'out')).frobenius < 1e-12


def test_factors_have_equal_norms_and_zeros_stay():
    for pair in (truncated(W_IO, 4), whitened(W_IO, X_NI.T @ X_NI, 4), shared_basis(W_EIO, 4, 'in')):
        rows = np.sqrt((np.atleast_3d(pair.second.T).T ** 2).sum(-1).mean(0))
        np.testing.assert_allclose(np.linalg.norm(pair.first, axis=0), rows, rtol=1e-10)
    zeros = balanced(Pair(np.zeros((4, 2)), np.ones((2, 3))))
    assert np.isfinite(zeros.second).all()
    assert not rebuild(truncated(np.zeros((4, 3)), 2)).any()


def test_errors_are_those_of_one_block_diagonal_matrix():
    found = errors(W_EIO, W_EIO * [[[1.0]], [[0.5]], [[0.0]]], X_NI.T @ X_NI)
    sizes = np.linalg.norm(W_EIO, axis=(1, 2)) ** 2
    assert found.frobenius == pytest.approx(((sizes[1] / 4 + sizes[2]) / sizes.sum()) ** 0.5)
    spectral = np.linalg.norm(W_EIO, 2, axis=(1, 2))
    assert found.spectral == pytest.approx(max(spectral[1] / 2, spectral[2]) / spectral.max())
    outputs = np.linalg.norm(X_NI @ W_EIO, axis=(1, 2)) ** 2
    assert found.weighted == pytest.approx(((outputs[1] / 4 + outputs[2]) / outputs.sum()) ** 0.5)
    assert errors(W_IO, W_IO) == (0, 0, None)
    assert errors(np.zeros((2, 2)), np.eye(2)).frobenius == np.inf


def test_ranks_that_cannot_be_are_named_with_the_nearest():
    with pytest.raises(
        UserError, match='rank is 8: it must be from 1 to 7, the highest of a matrix of 9 × 7; nearest: 7'
    ):
        truncated(W_IO, 8)
    with pytest.raises(UserError, match=r'rank is 0: .*; nearest: 1'):
        whitened(W_IO, np.eye(9), 0)
    with pytest.raises(UserError, match=r'rank is 10: .* 3 matrices of 9 × 7 that share their inputs; nearest: 9'):
        shared_basis(W_EIO, 10, 'in')
    with pytest.raises(UserError, match=r'rank is 8: .* that share their outputs; nearest: 7'):
        shared_basis(W_EIO, 8, 'out')
    with pytest.raises(UserError, match=r'rank is 2\.5: it must be an integer from 1 to 7'):
        truncated(W_IO, 2.5)
    with pytest.raises(UserError, match='the weights have 1 numbers of 4 that are not finite'):
        truncated(np.array([[1, np.nan], [0, 1]]), 1)
    with pytest.raises(UserError, match='the Gram matrices have 81 numbers'):
        whitened(W_IO, np.full((9, 9), np.inf), 2)
