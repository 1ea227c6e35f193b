"""What dispatchers are made of, against plain numpy: the ragged exchange, and who gets which slot.

n: devices   M: runs for one device   R: rows sent   S: rows of the result
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from weft.model.ops import expert_dispatch as dispatch
from weft.model.ops.expert_dispatch import capacity, exchange, gathered_ragged_all_to_all, slots
from weft.sharding.mesh import MeshConfig, make_mesh

R, S = 30, 40


def everywhere(f, n: int, *arrays):
    """f on n devices of `expert`, each with its own entry of every array's first dim."""
    body = lambda *a: f(*(x[0] for x in a))[None]
    with jax.set_mesh(make_mesh(MeshConfig(expert=n))):
        run = jax.jit(jax.shard_map(body, in_specs=P('expert'), out_specs=P('expert')))
        return np.asarray(run(*(jax.device_put(a, P('expert')) for a in arrays)))


@pytest.mark.parametrize(('n', 'M'), [(2, 3), (4, 1), (8, 2)])
def test_ragged_all_to_all_on_a_cpu_does_what_jax_documents(n, M):
    r = np.random.default_rng(n)
    operand, output = (r.normal(size=(n, rows, 2)).astype(np.float32) for rows in (R, S))
    # Runs of [source, destination, M]: sizes with zeros among them, read from anywhere, written to disjoint places in any
    # order with gaps.
    sizes = r.integers(0, 4, (n, n, M)) * (r.random((n, n, M)) < 0.6)
    sizes[0], sizes[:, -1] = 0, 0  # a device that sends nothing, one that gets nothing
    begins, lands = r.integers(0, R - 4, (n, n, M)), np.zeros((n, n, M), int)
    for to in range(n):
        end = 0
        for source, m in r.permutation([(i, m) for i in range(n) for m in range(M)]):
            lands[source, to, m] = end + (end + n * M < S // 2 and r.integers(2))
            end = lands[source, to, m] + sizes[source, to, m]
    assert (lands + sizes <= S).all()
    want = output.copy()
    for source, to, m in np.ndindex(n, n, M):
        size, begin, land = sizes[source, to, m], begins[source, to, m], lands[source, to, m]
        want[to, land : land + size] = operand[source, begin : begin + size]
    flat = lambda a: a.reshape(n, n * M).astype(np.int32)
    received = flat(sizes.swapaxes(0, 1))
    run = lambda *a: gathered_ragged_all_to_all(*a, axis_name='expert')
    got = everywhere(run, n, operand, output, flat(begins), flat(sizes), flat(lands), received)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('n', [1, 4])
def test_the_exchange_brings_rows_to_their_experts_in_order_and_back(n):
    E = 8
    count_nE = np.random.default_rng(0).integers(0, 4, (n, E))
    count_nE[:, 1], count_nE[0] = 0, 0
    rows = [[(source, e, i) for e in range(E) for i in range(count_nE[source, e])] for source in range(n)]
    pad = lambda rows, size: np.array([*rows, *[(0, 0, 0)] * (size - len(rows))], np.float32)
    home = np.stack([pad(device, R) for device in rows]) + 1  # no row is 0
    home[np.arange(R)[None] >= count_nE.sum(1)[:, None]] = 0
    size = n * R
    there = np.zeros((n, size, 3))
    for to in range(n):
        mine = range(to * E // n, (to + 1) * E // n)
        arrived = [row for e in mine for source in range(n) for row in rows[source] if row[1] == e]
        there[to, : len(arrived)] = np.array(arrived).reshape(-1, 3) + 1
    counts = np.broadcast_to(count_nE.astype(np.int32), (n, n, E))
    got = everywhere(lambda x, counts: exchange(x, counts, size), n, home, counts)
    np.testing.assert_array_equal(got, there)
    got = everywhere(lambda x, counts: exchange(x, counts, R, back=True), n, got, counts)
    np.testing.assert_array_equal(got, home)


def test_slots_go_to_the_first_tokens_of_each_expert():
    none = 3
    expert_NK = jnp.array([[0, 2], [none, none], [2, 0], [0, 2], [2, 1]])
    order_S, slot_R, dropped = slots(expert_NK, 3, 2)
    np.testing.assert_array_equal(order_S, [0, 5, 9, 10, 1, 4])  # pair 10 is none
    np.testing.assert_array_equal(slot_R.reshape(-1, 2), [[0, 4], [6, 6], [5, 1], [6, 6], [6, 2]])  # so is slot 6
    assert dropped == 3


def test_capacity_is_the_share_times_the_factor_and_never_more_than_the_tokens():
    assert capacity(N=64, K=2, E=8, factor=1.25) == 20
    assert capacity(N=10, K=2, E=8, factor=1.0) == 3
    assert capacity(N=10, K=2, E=8, factor=100.0) == 10
    assert capacity(N=1, K=2, E=8, factor=0.01) == 1


def test_what_auto_means_exists():
    for platform in ('cpu', 'gpu', 'tpu'):
        assert dispatch.dispatch(dispatch.default_dispatch(platform)) is not dispatch.all_to_all, 'auto drops nothing'
