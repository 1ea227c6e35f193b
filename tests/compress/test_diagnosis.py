"""What a stack says before anything is fitted: angles, shared energy against chance, ranks, bounds that no fit beats."""

import itertools

import numpy as np
import pytest
from scipy import linalg

from weft.compress.diagnosis import (
    effective_rank,
    predicted_gain,
    ranks_within,
    stable_rank,
    tails_of,
    tucker_bounds,
    tucker_error,
    tucker_ranks,
)
from weft.compress.numerics import bits, svd, tucker
from weft.compress.outliers import OutlierWeight, outlier_loss, outlier_weights, without
from weft.compress.planted import PlantedStack, planted_stack
from weft.compress.sharing import angles_between, mode_energies, principal_angles, random_frames, shared_energy
from weft.runtime.errors import UserError

random = np.random.default_rng(0)
STACK = random.standard_normal((4, 12, 9))


def test_principal_angles_are_those_that_were_made():
    """Small ones too, of which a cosine knows nothing."""
    planted = np.array([1e-9, 0.3, 1.2])
    axes = random_frames(random, 1, 12, 6)[0]
    a, b = axes[:, :3], axes[:, :3] * np.cos(planted) + axes[:, 3:] * np.sin(planted)
    turn = random_frames(random, 2, 3, 3)
    np.testing.assert_allclose(angles_between(a @ turn[0], b @ turn[1]), planted, rtol=1e-6)
    for side in ('in', 'out'):
        found = principal_angles(STACK, 3, side)
        assert found.shape == (4, 4, 3)
        assert (np.diff(found) >= 0).all()
        u, _, v = np.linalg.svd(STACK)
        basis = u[:, :, :3] if side == 'in' else v[:, :3].swapaxes(1, 2)
        for x, y in itertools.combinations(range(4), 2):
            wanted = linalg.subspace_angles(basis[x], basis[y])[::-1]
            np.testing.assert_allclose(found[x, y], wanted, atol=1e-12)
            np.testing.assert_array_equal(found[x, y], found[y, x])
    with pytest.raises(UserError, match=r'rank is 10: it must be from 1 to 9'):
        principal_angles(STACK, 10, 'in')


def test_shared_energy_is_what_the_best_basis_holds():
    for side, rank in (('in', 5), ('out', 3)):
        error = svd.errors(STACK, svd.shared_basis(STACK, rank, side)).frobenius
        np.testing.assert_allclose(shared_energy(STACK, rank, side).energy, 1 - error**2, atol=1e-12)
    assert shared_energy(STACK, 12, 'in').energy == pytest.approx(1)
    assert shared_energy(STACK, 12, 'in').above_chance == 0, 'of all dims nothing is to be told'
    assert shared_energy(np.zeros((2, 4, 3)), 1, 'in').above_chance == 0


def test_sharing_above_chance_is_0_of_random_frames_and_1_where_the_leading_subspaces_are_the_same():
    size = np.arange(1, 10) ** -0.7
    inputs, outputs = random_frames(random, 6, 12, 9), random_frames(random, 6, 9, 9)
    stack = lambda frames: np.einsum('EIK,K,EOK->EIO', frames, size, outputs)
    apart = shared_energy(stack(inputs), 4, 'in', draws=100)
    assert abs(apart.above_chance) < 0.1
    assert apart.chance.low - 0.02 < apart.energy < apart.chance.high + 0.02
    turned = inputs.copy()
    turned[:, :, :4] = inputs[0, :, :4] @ random_frames(random, 6, 4, 4)
    turned[:, :, 4:] = np.linalg.svd(inputs[0, :, :4])[0][:, 4:9] @ random_frames(random, 6, 5, 5)
    same = shared_energy(stack(turned), 4, 'in')
    assert same.above_chance == pytest.approx(1, abs=0.05)
    assert same.energy <= same.most + 1e-12
    aligned = shared_energy(stack(inputs[:1].repeat(6, 0)), 4, 'in')
    assert aligned.above_chance == pytest.approx(1)
    assert aligned.most == pytest.approx(same.most), 'they have the same spectra'


def test_random_frames_are_uniform():
    """Each column is a uniform direction, and no sign is preferred, as it is in what a QR decomposition gives."""
    frames = random_frames(np.random.default_rng(1), 4000, 4, 2)
    np.testing.assert_allclose(frames.swapaxes(1, 2) @ frames, np.broadcast_to(np.eye(2), (4000, 2, 2)), atol=1e-12)
    assert np.abs(frames.mean(0)).max() < 0.04
    np.testing.assert_allclose((frames**2).mean(0), 0.25, atol=0.02)


def test_ranks_of_matrices_that_are_known():
    found = np.stack([np.eye(5), np.outer(np.arange(5), np.ones(5)), np.zeros((5, 5)), np.diag([2.0, 1, 1, 0, 0])])
    np.testing.assert_allclose(stable_rank(found), [5, 1, 0, 1.5])
    np.testing.assert_allclose(effective_rank(found), [5, 1, 0, 2**1.5], atol=1e-12)


@pytest.mark.parametrize('ranks', [(2, 5, 4), (None, 6, 5), (3, None, 4), (None, 4, None), (1, 1, 1), (None, None, 3)])
def test_no_fit_beats_the_bound(ranks):
    """Neither HOOI, nor alternating least squares from random factors; one rank alone reaches it."""
    stacks = [STACK, planted_stack(PlantedStack('both', 0.9, 1, shape=(4, 12, 9), dims=3))]
    for w_EIO in stacks:
        bounds = tucker_bounds(w_EIO, ranks)
        best = svd.errors(w_EIO, tucker.rebuild(tucker.hooi(w_EIO, ranks))).frobenius
        first = svd.errors(w_EIO, tucker.rebuild(tucker.hosvd(w_EIO, ranks))).frobenius
        assert bounds.low <= best + 1e-12
        assert best <= first + 1e-12
        assert first <= bounds.high + 1e-12
        for _ in range(3):
            assert bounds.low <= descent(w_EIO, ranks) + 1e-12
        if sum(rank is not None for rank in ranks) == 1:
            np.testing.assert_allclose(best, bounds.low, rtol=1e-9)
        lost = [mode_energies(w_EIO, n)[r:].sum() / (w_EIO**2).sum() if r else 0.0 for n, r in enumerate(ranks)]
        assert bounds.low - 1e-12 <= np.sqrt(tucker_error(*lost)) <= bounds.high + 1e-12, (
            'what is predicted lies between'
        )


def descent(w_EIO: np.ndarray, ranks: tuple[int | None, ...]) -> float:
    """The relative error after a few rounds from random factors: the core by least squares, then each factor."""
    shape = w_EIO.shape
    factors = [random_frames(random, 1, n, r or n)[0] for n, r in zip(shape, ranks, strict=True)]
    for _ in range(5):
        for mode in range(3):
            if ranks[mode] is None:
                continue
            core = np.einsum('abc,ai,bj,ck->ijk', w_EIO, *(np.linalg.pinv(f).T for f in factors))
            others = list(factors)
            others[mode] = np.eye(ranks[mode])
            made = np.einsum('ijk,ai,bj,ck->abc', core, *others)
            made = np.moveaxis(made, mode, 0).reshape(ranks[mode], -1)
            factors[mode] = np.moveaxis(w_EIO, mode, 0).reshape(shape[mode], -1) @ np.linalg.pinv(made)
    core = np.einsum('abc,ai,bj,ck->ijk', w_EIO, *(np.linalg.pinv(f).T for f in factors))
    return float(np.linalg.norm(w_EIO - np.einsum('ijk,ai,bj,ck->abc', core, *factors)) / np.linalg.norm(w_EIO))


def test_a_pair_for_each_slice_is_bounded_as_well():
    for rank in (1, 2):
        error = svd.errors(STACK, svd.truncated(STACK, rank)).frobenius
        assert tucker_bounds(STACK, (None, 4 * rank, min(4 * rank, 9))).low <= error


def test_tuckers_ranks_are_the_best_of_all_that_fit():
    shape = 3, 6, 5
    w_EIO = planted_stack(PlantedStack('mixed', 0.8, 5, shape=shape, dims=3))
    tails = [tails_of(mode_energies(w_EIO, mode)) for mode in range(3)]
    for share in (0.3, 0.5, 0.8, 1.0):
        budget = share * bits.dense(shape)
        fitting = []
        for ranks in itertools.product(*([*range(1, n), None] for n in shape)):
            if bits.tucker(shape, ranks) <= budget:
                lost = [0.0 if r is None else tail[r] for r, tail in zip(ranks, tails, strict=True)]
                fitting.append(tucker_error(*lost))
        found = tucker_ranks(w_EIO, budget)
        assert bits.tucker(shape, found) <= budget
        lost = [0.0 if r is None else tail[r] for r, tail in zip(found, tails, strict=True)]
        np.testing.assert_allclose(tucker_error(*lost), min(fitting), atol=1e-12)
    assert tucker_ranks(w_EIO, bits.dense(shape)) == (None, None, None)


def test_budgets_that_hold_nothing_are_told():
    with pytest.raises(UserError, match=r'a budget of 100 bits: rank 1 takes'):
        predicted_gain(STACK, 100)
    with pytest.raises(UserError, match=r'a budget of 100 bits: rank 1 takes'):
        tucker_ranks(STACK, 100)
    ranks = ranks_within(STACK, 0.5 * bits.dense(STACK.shape, 8), 8)
    assert ranks == ranks_within(STACK, 0.5 * bits.dense(STACK.shape)), 'narrower numbers, and as many of them'
    assert predicted_gain(np.zeros((4, 12, 9)), 0.5 * bits.dense(STACK.shape)) == (0, 0, 0)


def super_weight() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Maps of two experts and a dense one; one input is a thousand times the others, and one small weight reads it."""
    r = np.random.default_rng(2)
    x_NI = r.standard_normal((50, 8))
    x_NI[:, 3] *= 1000
    weights = {'a': r.standard_normal((8, 6)), 'b': r.standard_normal((2, 8, 6))}
    weights['a'][3] = 0
    weights['a'][3, 2] = 0.5
    norms = {'a': np.linalg.norm(x_NI, axis=0), 'b': np.ones((2, 8))}
    return weights, norms, x_NI, x_NI @ weights['a']


def test_an_outlier_weight_is_found_by_what_it_reads():
    weights, norms, x_NI, _ = super_weight()
    found = outlier_weights(weights, norms, 3)
    first = found.weights[0]
    assert (first.name, first.at, first.value) == ('a', (3, 2), 0.5)
    np.testing.assert_allclose(first.score, 0.5 * np.linalg.norm(x_NI[:, 3]))
    assert [one.score for one in found.weights] == sorted((one.score for one in found.weights), reverse=True)
    assert found.score_share > 0.99
    energy = sum((w**2).sum() for w in weights.values())
    np.testing.assert_allclose(found.frobenius_share, sum(one.value**2 for one in found.weights) / energy)
    scores = np.concatenate([(np.abs(weights[n]) * norms[n][..., None]).ravel() for n in 'ab'])
    np.testing.assert_allclose([one.score for one in found.weights], np.sort(scores)[::-1][:3])
    emptied = without(weights, [first, OutlierWeight('b', (1, 0, 5), 0.0, 0.0)])
    assert (emptied['a'][3, 2], emptied['b'][1, 0, 5], weights['a'][3, 2]) == (0, 0, 0.5)
    assert sum((emptied[name] != weights[name]).sum() for name in weights) == 2


def test_what_it_costs_stands_beside_random_weights_and_the_largest():
    weights, norms, x_NI, y_NO = super_weight()
    asked = []

    def loss(given: dict[str, np.ndarray]) -> float:
        asked.append(sum(int((given[name] != weights[name]).sum()) for name in weights))
        return float(((x_NI @ given['a'] - y_NO) ** 2).mean())

    found = outlier_loss(weights, norms, 1, loss, draws=4)
    assert found.before == 0
    assert found.without > 1000 * found.random.value
    assert found.without > 1000 * found.largest
    assert len(asked) == 7
    assert set(asked) <= {0, 1}
    with pytest.raises(UserError, match=r"'b': there are no lengths of its inputs"):
        outlier_weights(weights, {'a': norms['a']}, 1)
    with pytest.raises(UserError, match=r'count is 145: it must be from 1 to 144'):
        outlier_weights(weights, norms, 145)
