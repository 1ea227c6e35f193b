"""Where a stack's matrices share a subspace by construction, forms that share win at equal bits; where not, they lose.

The diagnosis tells which from singular values, before anything is fitted.
"""

import functools

import numpy as np
import pytest
from scipy import stats

from weft.compress.diagnosis import predicted_gain, ranks_within
from weft.compress.numerics import bits, svd, tucker
from weft.compress.planted import (
    KINDS,
    Measured,
    PlantedStack,
    correlation_by_group,
    measure,
    planted_stack,
    planted_stacks,
    rank_correlation,
    real_gain,
    verdict,
)
from weft.runtime.errors import UserError

BUDGET = 0.3


@functools.cache
def measured() -> list[Measured]:
    """Of 80 stacks, 640 matrices."""
    return [measure(stack, BUDGET, draws=3) for stack in planted_stacks(range(5), (0.0, 0.5, 0.9, 1.0))]


def of_degree(degree: float) -> list[Measured]:
    return [one for one in measured() if one.stack.degree == degree]


def test_what_is_planted_is_there():
    """Of degree 1 one basis of `dims` holds all leading parts, of degree 0 none does."""
    for kind, axes in (('in', [0, 2]), ('out', [0, 1]), ('both', [0, 2]), ('both', [0, 1])):
        held = []
        for degree in (1.0, 0.0):
            w_EIO = planted_stack(PlantedStack(kind, degree, 3, rest=0.0))
            assert np.linalg.matrix_rank(w_EIO).tolist() == [16] * 8
            energy = np.linalg.eigvalsh(np.tensordot(w_EIO, w_EIO, (axes, axes)))[::-1]
            held.append(energy[:16].sum() / energy.sum())
        assert held[0] > 1 - 1e-12
        assert held[1] < 0.7
    mixed = planted_stack(PlantedStack('mixed', 1.0, 3))
    assert np.linalg.matrix_rank(mixed.reshape(8, -1)) == 2
    np.testing.assert_array_equal(mixed, planted_stack(PlantedStack('mixed', 1.0, 3)))
    assert not np.allclose(mixed, planted_stack(PlantedStack('mixed', 1.0, 4)))


def test_sharing_wins_where_all_is_shared_at_equal_bits():
    for one in of_degree(1.0):
        stack, real = one.stack, one.real
        assert real.tucker > 0, one
        if stack.kind in ('in', 'both'):
            assert real.shared_in > 0, one
        if stack.kind == 'out':
            assert real.shared_out > 0 > real.shared_in, one
        if stack.kind == 'in':
            assert real.shared_in > 0 > real.shared_out, one


def test_sharing_loses_where_nothing_is_shared():
    assert len(of_degree(0.0)) == 20
    for one in of_degree(0.0):
        assert max(one.real) < 0, one


def test_the_diagnosis_predicts_the_gain_before_anything_is_fitted():
    """By rank, with the interval of drawing seeds anew; also where Tucker's form has several ranks, which no theorem knows."""
    rows = measured()
    found = verdict(rows)
    assert found.stacks == 80
    assert (found.shared.value, found.apart.value) == (1, 0)
    assert found.predicted.low > 0.95
    assert found.several.of >= 15
    assert found.several.low > 0.95
    assert found.above_chance.high < found.predicted.low, 'what is shared is not all that decides'
    wrong = [m for m in rows if (m.predicted.best > 0) != (m.real.best > 0)]
    assert all(abs(m.real.best) < 0.1 for m in wrong), 'the sign is wrong only near 0'
    assert len(wrong) <= 4


def test_sharing_above_chance_tells_how_much_is_shared():
    """It is of the degree; what that gains depends on spectra and the budget too."""
    rows = [m for m in measured() if m.stack.kind != 'mixed']
    assert rank_correlation([m.above_chance for m in rows], [m.stack.degree for m in rows]) > 0.9


@pytest.mark.parametrize('kind', KINDS)
def test_gains_are_those_of_forms_that_fit_the_budget(kind):
    w_EIO = planted_stack(PlantedStack(kind, 0.9, 7))
    E, I, O = w_EIO.shape
    budget = BUDGET * bits.dense(w_EIO.shape)
    ranks, real = ranks_within(w_EIO, budget), real_gain(w_EIO, budget)
    assert E * bits.pair(I, O, ranks.pair) <= budget < E * bits.pair(I, O, ranks.pair + 1)
    for side, rank, gain in (('in', ranks.shared_in, real.shared_in), ('out', ranks.shared_out, real.shared_out)):
        assert bits.shared_basis(E, I, O, rank, side) <= budget < bits.shared_basis(E, I, O, rank + 1, side)
        pair = svd.errors(w_EIO, svd.truncated(w_EIO, ranks.pair)).frobenius
        shared = svd.errors(w_EIO, svd.shared_basis(w_EIO, rank, side)).frobenius
        np.testing.assert_allclose(np.exp(gain), pair / shared, rtol=1e-9)
    assert bits.tucker(w_EIO.shape, ranks.tucker) <= budget
    fitted = svd.errors(w_EIO, tucker.rebuild(tucker.hooi(w_EIO, ranks.tucker))).frobenius
    np.testing.assert_allclose(np.exp(real.tucker), pair / fitted, rtol=1e-9)
    predicted = predicted_gain(w_EIO, budget)
    np.testing.assert_allclose(predicted[:2], real[:2], atol=1e-9)
    assert predicted.tucker - 0.01 < real.tucker < predicted.tucker + 0.2, 'what modes lose is partly the same'


def test_where_singular_values_do_not_fall_sharing_wins_a_little_by_chance():
    """The diagnosis knows that too: what is shared is not all that decides."""
    one = measure(PlantedStack('in', 0.0, 0, dims=24, decay=0.0), BUDGET)
    assert abs(one.above_chance) < 0.1
    assert 0 < one.real.best < 0.1
    np.testing.assert_allclose(one.predicted.best, one.real.best, atol=0.02)


@pytest.mark.parametrize('shape', [(8, 32, 28), (16, 32, 8)])
def test_of_random_matrices_nothing_is_promised(shape):
    """Tucker's form is exactly as good as is predicted, within a hundredth of pairs or of the better basis."""
    w_EIO = np.random.default_rng(0).standard_normal(shape)
    for share in (0.2, 0.4, 0.6):
        budget = share * bits.dense(shape)
        np.testing.assert_allclose(predicted_gain(w_EIO, budget), real_gain(w_EIO, budget), atol=0.01)


def test_rank_correlations_are_those_of_scipy():
    random = np.random.default_rng(0)
    for _ in range(5):
        a, b = random.integers(0, 6, (2, 30))
        np.testing.assert_allclose(rank_correlation(a, b), stats.spearmanr(a, b).statistic, atol=1e-12)
    a = random.standard_normal(60)
    b, groups = a + random.standard_normal(60), np.repeat(np.arange(6), 10)
    found = correlation_by_group(a, b, groups)
    assert found.low < found.value < found.high
    assert found.high - found.low > 0.05
    assert correlation_by_group(a, a, groups).low == pytest.approx(1)


MISTAKES = [
    ({'kind': 'inn'}, r"kind 'inn': there is no such way of sharing; did you mean 'in'"),
    ({'degree': 1.5}, r'degree is 1\.5: it must be from 0 to 1; nearest: 1'),
    ({'dims': 49}, r'dims is 49: it must be from 1 to 48; nearest: 48'),
]


@pytest.mark.parametrize(('given', 'message'), MISTAKES, ids=[message[:8] for _, message in MISTAKES])
def test_stacks_that_cannot_be_are_told(given, message):
    with pytest.raises(UserError, match=message):
        PlantedStack(**{'kind': 'in', 'degree': 1.0, 'seed': 0} | given)
