"""Sparse experts equal a plain dense reference: every expert on every token, what was not chosen weighted with 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from model.config import ModelConfig, MoEConfig
from model.layers import View, specs
from model.moe import MoE
from sharding.collectives import vary
from sharding.mesh import AXES, BATCH, SEQUENCE, MeshConfig, make_mesh
from tests import reference

MODEL = ModelConfig(
    vocabulary=128,
    layers=1,
    model_dim=16,
    heads=4,
    mlp_dim=16,
    moe=MoEConfig(experts=8, top_k=2, mlp_dim=16, shared_experts=1),
)
B, T = 8, 16


def sparse(c: ModelConfig, backend: str):
    """A function of global arrays: (Σ y · ct, (y, figures)) of the layer of experts."""

    def body(moe, x_BTD, ct_BTD, segment_BT):
        view = View(jnp.zeros_like(segment_BT), segment_BT, backend='reference', experts=backend)
        y_BTD, _ = moe(x_BTD, view)
        total = jax.lax.psum(vary((y_BTD * ct_BTD).sum()), AXES)
        return total, y_BTD

    def run(moe, x, ct, segment):
        split = P(BATCH, SEQUENCE)
        return jax.shard_map(body, in_specs=(specs(moe), split, split, P(BATCH)), out_specs=(P(), split))(
            moe, x, ct, segment
        )

    return run


def dense(w, x, ct, segment, c):
    y, _ = reference.experts(w, x, segment, c)
    return (y * ct).sum(), y


@pytest.mark.parametrize('router', ['even', 'all tokens choose the same experts'])
@pytest.mark.parametrize('backend', ['reference', 'blocked', 'ragged'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('float64', 1e-10)])
@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)])
def test_sparse_experts_equal_dense_ones(mesh, dtype, tolerance, backend, router, request):
    if dtype == 'float64':
        request.getfixturevalue('float64')
    c = dataclasses.replace(MODEL, dtype=dtype)
    r = np.random.default_rng(0)
    x, ct = r.normal(size=(2, B, T, c.model_dim)).astype(dtype)
    segment = np.ones((B, T), np.int32)
    if router != 'even':
        x = np.abs(x)  # with the router below, experts 0 and 1 win everywhere and six get nothing
    with jax.set_mesh(make_mesh(mesh)):
        moe = jax.jit(lambda key: MoE(c, nnx.Rngs(key)))(jax.random.key(0))
        if router != 'even':
            skew = jnp.asarray([0.3, 0.2, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1], dtype)
            moe.router_DE[...] = jax.jit(lambda w: w * 0.01 + skew[None])(moe.router_DE[...])
        split = lambda a: jax.device_put(a, P(BATCH, SEQUENCE))
        run = jax.jit(jax.value_and_grad(sparse(c, backend), argnums=(0, 1), has_aux=True))
        (_, y), (dw, dx) = run(moe, split(x), split(ct), jax.device_put(segment, P(BATCH)))
        named = lambda tree: {
            'mlp.' + jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        w, got = named(moe), {**named(dw), 'x': np.asarray(dx), 'y': np.asarray(y)}
    plainly = jax.jit(jax.value_and_grad(dense, argnums=(0, 1), has_aux=True), static_argnums=4)
    with jax.numpy_rank_promotion('allow'):
        (_, want_y), (want_dw, want_dx) = plainly(w, x, ct, segment, c)
    want = {**want_dw, 'x': want_dx, 'y': want_y}
    assert got.keys() == want.keys()
    for name in want:
        assert np.abs(got[name] - want[name]).max() <= tolerance * np.abs(want[name]).max(), name
    if router != 'even':
        assert not np.asarray(got['mlp.up_EDF'])[2:].any(), 'experts without tokens learn nothing'
        assert np.asarray(got['mlp.up_EDF'])[:2].any()
