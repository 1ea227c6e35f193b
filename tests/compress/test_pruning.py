"""Masks against brute force, and scores against what leaving the thing out really costs.

Letters: I inputs, O outputs, H heads, D dims of a head, F hidden units, N tokens, K experts a token, E experts.
"""

import itertools

import numpy as np
import pytest

from weft.compress.numerics.pruning import (
    head_scores,
    hidden_unit_scores,
    highest,
    layer_scores,
    magnitude,
    n_of_m,
    reap_scores,
    reap_sums,
    wanda,
    wanda_score,
)
from weft.runtime.errors import UserError

RNG = np.random.default_rng(0)
W_IO = RNG.standard_normal((12, 5))
NORM_I = RNG.random(12) ** 3


@pytest.mark.parametrize('share', [0.1, 0.5, 0.72, 1.0])
def test_magnitude_leaves_the_least_error_of_any_mask_of_as_many(share):
    mask = magnitude(W_IO, share)
    assert mask.sum() == round(60 * share)
    assert share == 1 or np.abs(W_IO[mask]).min() >= np.abs(W_IO[~mask]).max()


def test_wanda_keeps_by_output_what_serves_the_outputs_of_independent_inputs_best():
    x_NI = np.linalg.qr(RNG.standard_normal((40, 12)))[0] * NORM_I  # orthogonal, with these norms
    mask = wanda(W_IO, NORM_I, 0.25)
    assert (mask.sum(0) == 3).all()
    for o in range(5):
        lost = {
            kept: np.linalg.norm(x_NI @ np.where(np.isin(np.arange(12), kept), 0, W_IO[:, o]))
            for kept in itertools.combinations(range(12), 3)
        }
        assert tuple(np.flatnonzero(mask[:, o])) == min(lost, key=lost.get)
    batch = wanda(np.stack([W_IO, W_IO]), np.stack([NORM_I, np.ones(12)]), 0.25)
    np.testing.assert_array_equal(batch[0], mask)
    np.testing.assert_array_equal(batch[1], wanda(W_IO, np.ones(12), 0.25))
    assert (batch[0] != batch[1]).any()


@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 3), (4, 6), (12, 12)])
def test_n_of_m_keeps_the_highest_of_each_group_of_inputs(n, m):
    for score in (np.abs(W_IO), wanda_score(W_IO, NORM_I), wanda_score(np.stack([W_IO, -W_IO]), NORM_I)):
        mask = n_of_m(score, n, m)
        outputs, kept = np.swapaxes(score, -1, -2).reshape(-1, 12), np.swapaxes(mask, -1, -2).reshape(-1, 12)
        for values, which in zip(outputs, kept, strict=True):
            for start in range(0, 12, m):
                group = values[start : start + m]
                assert set(np.flatnonzero(which[start : start + m])) == set(np.argsort(group)[m - n :])


def test_of_equal_weights_the_first_are_kept():
    assert magnitude(np.ones((2, 3)), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert n_of_m(np.ones((4, 1))).ravel().tolist() == [True, True, False, False]
    assert highest(np.array([1.0, 2, 2, 0, 2]), 2).tolist() == [1, 2]


def test_a_heads_score_is_the_error_of_leaving_it_out():
    w_HDO = RNG.standard_normal((3, 4, 5))
    x_NF = RNG.standard_normal((30, 12)) @ RNG.standard_normal((12, 12))
    scores = head_scores(w_HDO, x_NF.T @ x_NF)
    whole = x_NF @ w_HDO.reshape(12, 5)
    for head in range(3):
        without = w_HDO.copy()
        without[head] = 0
        assert scores[head] == pytest.approx(np.linalg.norm(whole - x_NF @ without.reshape(12, 5)))


def test_a_hidden_units_score_is_the_error_of_leaving_it_out():
    x_NF = RNG.standard_normal((30, 12))
    scores = hidden_unit_scores(W_IO, (x_NF**2).mean(0))
    for unit in range(12):
        lost = np.outer(x_NF[:, unit], W_IO[unit])
        assert scores[unit] == pytest.approx(np.linalg.norm(lost) / 30**0.5)
    of_experts = hidden_unit_scores(np.stack([W_IO, 2 * W_IO]), np.stack([(x_NF**2).mean(0)] * 2))
    np.testing.assert_allclose(of_experts, np.stack([scores, 2 * scores]))


def test_a_layers_score_is_how_far_it_turns_a_token():
    x_NM = RNG.standard_normal((7, 2))
    angle = np.array([0.0, 0.3, np.pi / 2, np.pi])
    turned = np.stack([x_NM @ [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]] * 5 for a in angle])
    np.testing.assert_allclose(layer_scores(np.stack([x_NM] * 4), turned), 1 - np.cos(angle), atol=1e-12)
    assert layer_scores(np.zeros((1, 2, 3)), np.ones((1, 2, 3))) == [1]


def test_an_experts_score_is_the_mean_over_its_own_tokens():
    expert_NK = np.array([[0, 2], [2, 0], [2, -1], [0, 2]])
    gate_NK = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 7.0], [0.2, 0.8]])
    norm_NK = np.array([[2.0, 4], [1, 3], [2, 9], [5, 10]])
    sums = reap_sums(expert_NK, gate_NK, norm_NK, 4)
    assert sums.tokens_E.tolist() == [3, 0, 4, 0]
    np.testing.assert_allclose(reap_scores(*sums), [(1 + 0.3 + 1) / 3, 0, (2 + 0.9 + 2 + 8) / 4, 0])
    parts = [reap_sums(expert_NK[n : n + 2], gate_NK[n : n + 2], norm_NK[n : n + 2], 4) for n in (0, 2)]
    together = [first + second for first, second in zip(*parts, strict=True)]
    np.testing.assert_allclose(reap_scores(*together), reap_scores(*sums))


def test_what_cannot_be_kept_is_named_with_what_can():
    with pytest.raises(UserError, match='share is 0: it must be above 0 and at most 1; such as 0'):
        magnitude(W_IO, 0)
    with pytest.raises(UserError, match=r'share is 1\.5: .*; nearest: 1'):
        wanda(W_IO, NORM_I, 1.5)
    with pytest.raises(UserError, match='5 of 4 weights: it must be from 1 to 4; nearest: 4 of 4'):
        n_of_m(np.abs(W_IO), 5, 4)
    with pytest.raises(UserError, match='2 of 5 weights: 5 must divide the 12 inputs; nearest: 2 of 4'):
        n_of_m(np.abs(W_IO), 2, 5)
    with pytest.raises(UserError, match='4 of 3 cannot be kept: it must be from 1 to 3; nearest: 3'):
        highest(np.ones(3), 4)
