"""The loss of a head that is split over `tensor`, a chunk of tokens at a time, against the plain formula and autodiff.

B: rows   T: sequence   D: model   V: padded vocabulary
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from weft.model.ops import cross_entropy as module
from weft.model.ops.cross_entropy import Head, cross_entropy, head_product
from weft.sharding.collectives import mark_varying, psum
from weft.sharding.mesh import AXES, MeshConfig, make_mesh

B, T, D, V, VOCABULARY = 2, 20, 6, 16, 13


def to_logits(x_ND, head, scale=0.7):
    """With a scale, a cap and a bias, so that the product's gradient has to pass through something."""
    logit_NV = 3 * jnp.tanh(scale * head_product(x_ND, head.w, head.sink) / 3)
    return logit_NV + head.bias_V.reshape(1, -1)


def inputs(dtype='float64'):
    r = np.random.default_rng(0)
    x_BTD, w_DV, bias_V = (jnp.asarray(r.standard_normal(shape), dtype) for shape in ((B, T, D), (D, V), (V,)))
    target_BT = jnp.asarray(r.integers(0, VOCABULARY, (B, T)), jnp.int32)
    return (x_BTD, w_DV, bias_V), target_BT, jnp.asarray(r.random((B, T)) < 0.7)


def plain(arrays, target_BT, live_BT):
    """Over all devices: mean over 7 of Σ −log p(target), so that the cotangent is not 1."""
    x_BTD, w_DV, bias_V = arrays
    logit_BTV = 3 * jnp.tanh(0.7 * (x_BTD @ w_DV) / 3) + bias_V.reshape(1, 1, -1)
    log_p_BTV = jax.nn.log_softmax(logit_BTV[..., :VOCABULARY])
    return -jnp.where(live_BT, jnp.take_along_axis(log_p_BTV, target_BT[..., None], -1)[..., 0], 0).sum() / 7


def in_chunks(arrays, target_BT, live_BT):
    """The same by `cross_entropy` on the current mesh: sequence and vocabulary over `tensor`."""

    def body(arrays, target_BT, live_BT):
        x_BTD, w_DV, bias_V = mark_varying(arrays)
        share = cross_entropy(to_logits, Head(w_DV, bias_V), x_BTD, target_BT, live_BT, VOCABULARY)
        return psum(mark_varying(share), AXES) / 7

    rows, columns = P(None, 'tensor'), (P(None, 'tensor'), P('tensor'))
    specs = (rows, *columns), rows, rows
    return jax.shard_map(body, in_specs=specs, out_specs=P())(arrays, target_BT, live_BT)


@pytest.mark.parametrize('tensor', [1, 2, 4])
@pytest.mark.parametrize('chunk', [2048, 16, 12])  # one chunk, whole ones, and one that is filled up
def test_value_and_gradients_are_the_plain_formulas(float64, monkeypatch, chunk, tensor):
    monkeypatch.setattr(module, 'CHUNK', chunk)
    arrays, *rest = inputs()
    want = jax.value_and_grad(plain)(arrays, *rest)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor))):
        specs = P(None, 'tensor'), P(None, 'tensor'), P('tensor')
        placed = tuple(jax.device_put(a, spec) for a, spec in zip(arrays, specs, strict=True))
        rows = tuple(jax.device_put(a, P(None, 'tensor')) for a in rest)
        got = jax.jit(jax.value_and_grad(in_chunks))(placed, *rows)
    for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    assert (np.asarray(got[1][2])[VOCABULARY:] == 0).all(), 'columns that pad the vocabulary learn nothing'


def test_chunks_of_a_narrow_head_are_added_up_before_they_are_rounded(monkeypatch):
    """512 tokens, each a chunk, add 1/2 to a column's gradient, 256 in all: bfloat16 would stop at 128."""
    monkeypatch.setattr(module, 'CHUNK', 1)
    x_BTD = jnp.ones((1, 512, 1), jnp.bfloat16)
    w_DV = jnp.zeros((1, 2), jnp.bfloat16)
    target_BT = jnp.zeros((1, 512), jnp.int32)

    def loss(w_DV):
        share = cross_entropy(
            lambda x_ND, head: head_product(x_ND, head.w, head.sink),
            Head(mark_varying(w_DV)),
            mark_varying(x_BTD),
            target_BT,
            target_BT == 0,
            2,
        )
        return psum(mark_varying(share), AXES)

    with jax.set_mesh(make_mesh(MeshConfig())):
        run = jax.shard_map(jax.grad(loss), in_specs=P(), out_specs=P())
        dw_DV = jax.jit(run)(w_DV)
    assert dw_DV.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dw_DV, np.float32), [[-256, 256]])  # 512 · (p − 1) and 512 · p, p = 1/2
    rounded = functools.reduce(jnp.add, [jnp.full((), 0.5, jnp.bfloat16)] * 512)
    assert rounded < 256, 'what would come of rounding each chunk: the test could tell'


@pytest.mark.parametrize('dims', ['DV', 'VD'])
def test_the_sink_takes_the_weights_gradient_unrounded(dims):
    r = np.random.default_rng(1)
    x_ND = jnp.asarray(r.standard_normal((5, D)), jnp.bfloat16)
    w = jnp.asarray(r.standard_normal((D, V) if dims == 'DV' else (V, D)), jnp.bfloat16)
    sink = jnp.zeros(w.shape, jnp.float32)
    ct_NV = jnp.asarray(r.standard_normal((5, V)), jnp.bfloat16).astype(jnp.float32)  # no digits to lose
    y_NV, pull = jax.vjp(functools.partial(head_product, dims=dims), x_ND, w, sink)
    _, dw, dsink = pull(ct_NV)
    alone_NV, pull_alone = jax.vjp(lambda x, w: head_product(x, w, None, dims), x_ND, w)
    np.testing.assert_array_equal(y_NV, alone_NV)
    assert y_NV.dtype == dsink.dtype == jnp.float32
    assert dw.dtype == jnp.bfloat16
    assert not dw.any()
    np.testing.assert_array_equal(dsink.astype(jnp.bfloat16), pull_alone(ct_NV)[1])
    assert (dsink != dsink.astype(jnp.bfloat16)).any()
