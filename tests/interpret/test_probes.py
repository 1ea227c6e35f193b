"""Probes, intervals, and prompts whose activations are changed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.models import filled, on
from weft.interpret import intervals, probes
from weft.interpret.claims import experts
from weft.interpret.claims.__main__ import DENSE, MIXTURE, experiment, main, plain
from weft.interpret.passes import CELLS, HEADS, Change, Prompts
from weft.model.config import model_of
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig

TINY = model_of({'vocabulary': 40, 'layers': 2, 'model_dim': 16, 'attention.heads': 2, 'mlp.dim': 24})
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope='module')
def prompts():
    with on(MeshConfig()):
        yield Prompts(filled(TINY), ROWS, at_once=2)


def test_a_probe_finds_what_a_line_parts_and_nothing_in_shuffled_labels():
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((400, 20))
    class_N = (x_ND @ rng.standard_normal((20, 3))).argmax(-1)
    assert probes.right(x_ND[:300], class_N[:300], x_ND[300:], class_N[300:]).mean() > 0.85
    shuffled = rng.permutation(class_N[:300])
    chance = np.bincount(class_N[300:]).max() / 100
    assert probes.right(x_ND[:300], shuffled, x_ND[300:], class_N[300:]).mean() < chance + 0.1


def test_the_closed_form_of_leaving_one_out_is_leaving_one_out():
    rng = np.random.default_rng(1)
    x_ND, y_N = rng.standard_normal((30, 4)), rng.integers(2, size=30)
    found = probes.fit(x_ND, y_N)
    scaled = (x_ND - found.mean_D) / found.scale_D
    target_NC = np.eye(2)[y_N] - found.prior_C
    mean_square = (np.linalg.svd(scaled, compute_uv=False) ** 2).mean()

    def error(strength: float) -> float:
        gram = scaled.T @ scaled + strength * np.eye(4)
        hat_NN = scaled @ np.linalg.solve(gram, scaled.T) + 1 / 30
        rest = target_NC - (hat_NN - 1 / 30) @ target_NC
        return float(((rest / (1 - hat_NN.diagonal())[:, None]) ** 2).mean())

    best = min(probes.STRENGTHS * mean_square, key=error)
    w_DC = np.linalg.solve(scaled.T @ scaled + best * np.eye(4), scaled.T @ target_NC)
    np.testing.assert_allclose(found.w_DC, w_DC, atol=1e-8)


def test_an_activation_that_never_changes_says_nothing():
    x_ND = np.concatenate([np.ones((20, 1)), np.arange(20.0)[:, None]], 1)
    assert probes.right(x_ND, x_ND[:, 1].astype(int) // 10, x_ND, x_ND[:, 1].astype(int) // 10).mean() > 0.9


def test_intervals():
    all_right = intervals.share([True] * 20)
    assert (all_right.value, all_right.high) == (1, pytest.approx(1))
    assert all_right.low == pytest.approx(0.8389, abs=1e-4)  # z = 1.96: n / (n + z²)
    mean = intervals.mean(np.arange(101))
    assert mean.value == 50
    assert mean.low == pytest.approx(50 - 1.96 * 2.9, abs=0.7)
    assert intervals.of_draws(np.arange(1001))[1:3] == (25, 975)
    assert mean.text(0) == f'50 [{mean.low:.0f}, {mean.high:.0f}]'


def test_prompts_say_what_a_whole_pass_says(prompts):
    ids = np.zeros((4, 16), np.int32)
    for row, some in enumerate(ROWS):
        ids[row, : len(some)] = some
    position, segment = np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape), np.ones_like(ids)
    whole = np.asarray(jax.jit(logits)(prompts.model, *place((ids, position, segment))))
    np.testing.assert_allclose(
        prompts.logits(), [whole[row, len(some) - 1] for row, some in enumerate(ROWS)], atol=1e-5
    )


def test_a_change_is_of_its_prompt_alone(prompts):
    before = prompts.logits()
    mask_LBTNH = np.zeros((2, 3, 1, 2, 1), bool)
    mask_LBTNH[1, 2, 0, 1] = True
    after = prompts.logits([Change(HEADS, mask_LBTNH, np.zeros((1,) * 5, np.float32))])
    np.testing.assert_allclose(after[:2], before[:2], atol=1e-6)
    assert np.abs(after[2] - before[2]).max() > 1e-3


def test_gradients_are_what_a_small_change_does(prompts):
    answer_B, other_B = np.array([1, 2, 3]), np.array([4, 5, 6])
    value, gradient = prompts.gradients(answer_B, other_B, (HEADS, CELLS))[CELLS]
    assert value.shape == gradient.shape == (2, 3, 16, 24)
    step = 1e-2
    moved = value.copy()
    moved[0, :, 1, 7] += step
    mask = np.zeros((2, 1, 16, 24), bool)
    mask[0, 0, 1, 7] = True
    difference = lambda logit_BV: logit_BV[np.arange(3), answer_B] - logit_BV[np.arange(3), other_B]
    slope = (difference(prompts.logits([Change(CELLS, mask, moved)])) - difference(prompts.logits())) / step
    np.testing.assert_allclose(slope, gradient[0, :, 1, 7], rtol=0.05, atol=2e-3)


def test_the_stream_is_that_of_the_last_tokens(prompts):
    stream_RBD = prompts.stream()
    every = prompts.taps(['residual.after_mlp'], last=False)['residual.after_mlp']
    assert stream_RBD.shape == (3, 3, 16)
    for row, some in enumerate(ROWS):
        np.testing.assert_array_equal(stream_RBD[1:, row], every[:, row, len(some) - 1])


def test_information_is_none_of_equal_loads_and_all_of_what_is_parted():
    equal, parted = np.full((2, 1, 2), 5), np.array([[[5, 0]], [[0, 5]]])
    np.testing.assert_allclose(experts.information(equal), [0], atol=1e-12)
    np.testing.assert_allclose(experts.information(parted), [1])
    choice_MTK = np.array([[[0, 1], [1, 2], [0, 2]]])
    np.testing.assert_array_equal(experts.counts(choice_MTK, np.array([0, 0, 1]), 2, 3), [[[1, 2, 1]], [[1, 0, 1]]])


def test_mistakes_of_the_command():
    with pytest.raises(UserError, match="--only 'grammer': there is no such claim"):
        main(['runs/none', '--only', 'grammer'])
    with pytest.raises(UserError, match='--seed is -1'):
        main(['runs/none', '--seed', '-1'])
    with pytest.raises(UserError, match='runs/none'):
        main(['runs/none'])


def test_figures_as_json_has_them():
    assert plain({'a': intervals.Estimate(0.123456789, 0.0, 1.0, 3), 'b': [(1, 2)]}) == {
        'a': {'value': 0.123457, 'low': 0.0, 'high': 1.0, 'of': 3},
        'b': [[1, 2]],
    }


def test_each_claim_has_its_row_in_the_page():
    page = (Path(__file__).parents[2] / 'docs/claims.md').read_text(encoding='utf-8')
    rows = page.partition('# Claims of behaviour')[2].splitlines()
    for name in (*DENSE, *MIXTURE):
        assert experiment(name).__name__ == name
        assert [row for row in rows if f'`{name}`' in row and row.startswith('|')], name
