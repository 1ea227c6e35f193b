"""Gathers and scatters in several hops are those in one, whatever the compiler is spared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax

from weft.model import head
from weft.sharding import collectives
from weft.sharding.collectives import all_gather, reduce_scatter, unshard
from weft.sharding.mesh import MeshConfig, make_mesh


def sums(mesh: MeshConfig, axes: tuple[str, ...], gather, scatter):
    """A weight gathered and used with other values on each device, its gradient; and rows of which each keeps its part."""
    w_DN = jnp.arange(16.0 * 3).reshape(16, 3) ** 1.5

    def body(w_DN, x_RN):
        def loss(w_DN):
            return (gather(w_DN) * (1 + lax.axis_index(axes))).sum() ** 2

        return gather(w_DN)[None], jax.grad(loss)(w_DN), scatter(x_RN)

    with jax.set_mesh(make_mesh(mesh)):
        x_RN = jnp.arange(mesh.size * 16 * 3.0).reshape(-1, 3)
        split = jax.reshard(w_DN, P(axes)), jax.reshard(x_RN, P(axes))
        run = jax.shard_map(body, in_specs=(P(axes), P(axes)), out_specs=(P(axes), P(axes), P(axes)))
        return jax.tree.map(np.asarray, run(*split))


@pytest.mark.parametrize('axes', [{'data': 8}, {'tensor': 4}])
def test_the_two_hops_of_a_whole_tpu_are_one(monkeypatch, axes):
    mesh, (axis,) = MeshConfig(**axes), axes
    once = sums(
        mesh,
        (axis,),
        lambda w: lax.all_gather(w, axis, tiled=True),
        lambda x: lax.psum_scatter(x, axis, tiled=True),
    )
    monkeypatch.setattr(collectives, 'platform', lambda: 'tpu')
    hops = []
    monkeypatch.setattr(
        collectives, 'gather_stages', lambda axis, real=collectives.gather_stages: hops.append(real(axis)) or hops[-1]
    )
    twice = sums(mesh, (axis,), lambda w: all_gather(w, axis), lambda x: reduce_scatter(x, axis))
    assert all(len(groups) == 2 for groups in hops)
    for one, two in zip(once, twice, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize('axes', [{'data': 2, 'expert': 4}, {'data': 2, 'context': 2, 'expert': 2}])
def test_axis_after_axis_is_all_at_once(axes):
    names = tuple(axes)
    scatter = lambda x: lax.psum_scatter(x, names, tiled=True)
    together = sums(MeshConfig(**axes), names, lambda w: lax.all_gather(w, names, tiled=True), scatter)
    in_turn = sums(MeshConfig(**axes), names, lambda w: unshard(w, w.dtype, names), scatter)
    for one, two in zip(together, in_turn, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_matrix_is_filled_up_to_tiles_that_a_tpu_can_share_out(monkeypatch):
    assert head.scattered_columns(128256) == 128256
    monkeypatch.setattr(head, 'platform', lambda: 'tpu')
    for columns in (16032, 64128, 128256, 16160, 32000, 129280, 50304, 151936, 128, 100):
        filled = head.scattered_columns(columns)
        tiles, rest = divmod(filled, 128)
        assert rest == 0
        assert 0 <= filled - columns <= max(128, columns / 32)
        assert tiles <= 64 or any(tiles % run == 0 for run in range(8, 65))
    assert head.scattered_columns(32000) == 32000
