"""The order of rows is a permutation in each epoch, reached at any step without the steps before it."""

import time

import numpy as np
import pytest

from weft.data.shuffle import permute, row_ids


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_each_epoch_is_a_permutation(size: int) -> None:
    position_N = np.arange(size)
    for epoch in range(3):
        assert sorted(permute(position_N, size, 7, np.full(size, epoch))) == list(range(size))


def test_seeds_and_epochs_differ_and_nothing_stays_in_order() -> None:
    size = 10_000
    position_N = np.arange(size)
    orders = [permute(position_N, size, seed, np.full(size, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, order_N in enumerate(orders):
        # As many fixed points, neighbours and coincidences as chance gives (1 on average; P(more than 8) < 1e-6 each).
        assert (order_N == position_N).sum() <= 8
        assert (np.diff(order_N) == 1).sum() <= 8
        assert abs(np.corrcoef(position_N, order_N)[0, 1]) < 0.05
        assert all((order_N == other_N).sum() <= 8 for other_N in orders[:i])


def test_order_never_changes() -> None:
    """Goldens: a run that goes on with another version, or on another machine, must meet the same rows."""
    assert row_ids(11, 0, 0, 11).tolist() == [0, 1, 2, 9, 10, 3, 4, 7, 6, 5, 8]
    assert row_ids(10_317, 1234, 567, 8).tolist() == [8511, 23, 9296, 8562, 3017, 2660, 998, 8250]
    assert row_ids(3_000_000_000, -5, 10**9, 4).tolist() == [847906336, 1908128211, 1451544842, 236671658]


@pytest.mark.parametrize('batch', [1, 4, 7, 29])
def test_steps_walk_the_epochs_one_after_another(batch: int) -> None:
    rows = 13
    walked = np.concatenate([row_ids(rows, 3, step, batch) for step in range(2 * rows)])
    for epoch_R in walked.reshape(-1, rows):
        assert sorted(epoch_R) == list(range(rows))


def test_a_late_step_costs_no_more_than_the_first() -> None:
    def cost(step: int) -> float:
        begin = time.perf_counter()
        row_ids(123_457, 0, step, 64)
        return time.perf_counter() - begin

    early, late = (min(cost(step) for _ in range(20)) for step in (0, 10**12))
    assert late < 10 * early
