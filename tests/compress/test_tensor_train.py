"""Tensor trains of matrices against their bound, tensorly's, Kronecker products, and sizes tried one by one."""

import itertools
import math

import numpy as np
import pytest
from tensorly import decomposition

from weft.compress.numerics.tensor_train import (
    error_bound,
    inner_ranks,
    largest_ranks,
    matrix_to_tensor,
    modes,
    rebuild,
    tensor_to_matrix,
    tt_svd,
)
from weft.runtime.errors import UserError

ROWS, COLUMNS = (2, 3, 4), (3, 2, 2)
W_IO = np.random.default_rng(0).standard_normal((24, 12)) * 0.8 ** np.arange(12)


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_modes_have_the_least_sum_of_all_that_there_are(order):
    for n in (1, 7, 12, 36, 60, 96, 97):
        ascending = itertools.combinations_with_replacement(range(1, n + 1), order)
        least = min(sum(sizes) for sizes in ascending if math.prod(sizes) == n)
        found = modes(n, order)
        assert (math.prod(found), len(found), sum(found)) == (n, order, least)
        assert list(found) == sorted(found)


def test_modes_of_models_sizes():
    assert modes(576, 3) == (8, 8, 9)
    assert modes(1536, 4) == (4, 6, 8, 8)
    assert modes(4096, 12) == (2,) * 12
    assert modes(576, 12) == (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)


def test_a_matrix_comes_back_from_its_tensor_whose_entries_are_where_their_digits_say():
    tensor = matrix_to_tensor(W_IO, ROWS, COLUMNS)
    assert tensor.shape == (6, 6, 8)
    np.testing.assert_array_equal(tensor_to_matrix(tensor, ROWS, COLUMNS), W_IO)
    for row, column in ((0, 0), (13, 7), (23, 11), (5, 6)):
        of_rows, of_columns = np.unravel_index(row, ROWS), np.unravel_index(column, COLUMNS)
        place = tuple(i * size + o for i, o, size in zip(of_rows, of_columns, COLUMNS, strict=True))
        assert tensor[place] == W_IO[row, column]


@pytest.mark.parametrize(
    ('rows', 'columns'), [(ROWS, COLUMNS), ((24,), (12,)), ((1, 4, 6), (12, 1, 1)), ((2,) * 3 + (3,), (1, 2, 2, 3))]
)
def test_the_largest_ranks_give_the_weights_back(rows, columns):
    largest = largest_ranks(rows, columns)
    for ranks in (largest, 10**6):
        train = tt_svd(W_IO, rows, columns, ranks)
        np.testing.assert_allclose(rebuild(train), W_IO, atol=1e-12)
        assert tuple(core.shape[-1] for core in train.cores) == (*largest, 1)
        assert [core.shape[1:3] for core in train.cores] == list(zip(rows, columns, strict=True))


@pytest.mark.parametrize('ranks', [1, 2, 3, (2, 5), (6, 1), (1, 8)])
def test_the_error_is_within_its_bound_and_above_what_no_train_is_below(ranks):
    error = np.linalg.norm(W_IO - rebuild(tt_svd(W_IO, ROWS, COLUMNS, ranks)))
    bound = error_bound(W_IO, ROWS, COLUMNS, ranks)
    assert 0 < error <= bound * (1 + 1e-12)
    tensor, tails = matrix_to_tensor(W_IO, ROWS, COLUMNS), []
    for k, rank in zip((1, 2), inner_ranks(ROWS, COLUMNS, ranks), strict=True):
        size = np.linalg.svd(tensor.reshape(math.prod(tensor.shape[:k]), -1), compute_uv=False)
        tails.append(np.linalg.norm(size[rank:]))
    assert bound == pytest.approx(np.linalg.norm(tails), rel=1e-12)
    assert error >= max(tails) * (1 - 1e-12)


def test_a_train_of_two_cores_is_a_truncated_svd_of_the_rearranged_matrix():
    size = np.linalg.svd(matrix_to_tensor(W_IO, (4, 6), (3, 4)), compute_uv=False)
    error = np.linalg.norm(W_IO - rebuild(tt_svd(W_IO, (4, 6), (3, 4), 5)))
    assert error == pytest.approx(np.linalg.norm(size[5:]), rel=1e-10)
    assert error == pytest.approx(error_bound(W_IO, (4, 6), (3, 4), 5), rel=1e-10)


def test_a_kronecker_product_has_rank_one_and_a_sum_of_two_rank_two():
    r = np.random.default_rng(1)
    product = lambda: np.kron(np.kron(r.standard_normal((2, 3)), r.standard_normal((3, 2))), r.standard_normal((4, 2)))
    one, two = product(), product()
    np.testing.assert_allclose(rebuild(tt_svd(one, ROWS, COLUMNS, 1)), one, atol=1e-12)
    np.testing.assert_allclose(rebuild(tt_svd(one + two, ROWS, COLUMNS, 2)), one + two, atol=1e-12)
    assert np.linalg.norm(one + two - rebuild(tt_svd(one + two, ROWS, COLUMNS, 1))) > 1


def test_it_is_tensorlys_train_of_the_matrixs_tensor():
    theirs = decomposition.tensor_train(matrix_to_tensor(W_IO, ROWS, COLUMNS), [1, 3, 4, 1])
    expected = tensor_to_matrix(theirs.to_tensor(), ROWS, COLUMNS)
    np.testing.assert_allclose(rebuild(tt_svd(W_IO, ROWS, COLUMNS, (3, 4))), expected, atol=1e-10)


def test_a_rank_that_those_beside_it_cannot_reach_is_less_and_loses_nothing():
    train = tt_svd(W_IO, (24, 1, 1), (1, 12, 1), (2, 1))
    assert [core.shape[-1] for core in train.cores] == [2, 1, 1]
    few = tt_svd(W_IO, (2, 2, 6), (2, 2, 3), (1, 16))
    assert [core.shape[-1] for core in few.cores] == [1, 4, 1]
    assert np.linalg.norm(W_IO - rebuild(few)) <= error_bound(W_IO, (2, 2, 6), (2, 2, 3), (1, 16)) * (1 + 1e-12)


def test_what_cannot_be_is_named_with_what_can():
    with pytest.raises(
        UserError, match=r'ranks\[1\] is 9: .* to 8, .* place 1 of a train of 2 × 3 × 4 by 3 × 2 × 2; nearest: 8'
    ):
        tt_svd(W_IO, ROWS, COLUMNS, (2, 9))
    with pytest.raises(UserError, match='ranks is 0: it must be at least 1; nearest: 1'):
        tt_svd(W_IO, ROWS, COLUMNS, 0)
    with pytest.raises(UserError, match='ranks are 3: a train of order 3 has 2 between its cores'):
        tt_svd(W_IO, ROWS, COLUMNS, (1, 1, 1))
    with pytest.raises(UserError, match='rows are 2 × 3 × 5: their product must be 24; such as 2 × 3 × 4'):
        tt_svd(W_IO, (2, 3, 5), COLUMNS, 1)
    with pytest.raises(UserError, match='2 rows and 3 columns: a train has as many of both'):
        tt_svd(W_IO, (4, 6), COLUMNS, 1)
    with pytest.raises(UserError, match='order is 0: it must be at least 1'):
        modes(12, 0)
