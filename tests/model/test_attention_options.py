"""What published models add to attention: soft caps, sinks, both directions, values of another width, relative positions."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import P

from weft.model.kv_cache import dense_positions
from weft.model.ops.attention import AttentionFeatures, attention, default_backend
from weft.model.ops.attention.blockwise import blockwise_attention
from weft.model.ops.attention.cached import cached_attention
from weft.model.ops.attention.reference import Relative, relative_bucket
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh

OPTIONS = {
    'softcap': {'softcap': 1.5},
    'sinks': {'sink_KG': True},
    'two ways': {'causal': False},
    'two ways in a window': {'causal': False, 'window': 5},
    'all': {'softcap': 0.7, 'sink_KG': True, 'window': 9, 'scale': 0.9},
}
K, G, H, U = 2, 3, 8, 6


def sample(T: int, dtype=np.float64):
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=shape).astype(dtype) for shape in ((2, T, K, G, H), (2, T, K, H), (2, T, K, U)))
    segment_BT = (1 + np.cumsum(r.random((2, T)) < 0.08, axis=1)).astype(np.int32)
    column_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    starts_BT = np.diff(segment_BT, axis=1, prepend=0) > 0
    position_BT = column_BT - np.maximum.accumulate(np.where(starts_BT, column_BT, 0), axis=1)
    return q, k, v, r.normal(size=(K, G)).astype(dtype), (position_BT, segment_BT)


def plainly(q, k, v, sink_KG, at, *, window=None, scale=None, softcap=None, causal=True):
    """One query at a time, as the definition reads."""
    position_BT, segment_BT = at
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, t in np.ndindex(*position_BT.shape):
        ago_S = position_BT[b, t] - position_BT[b]
        see_S = segment_BT[b] == segment_BT[b, t]
        if causal:
            see_S = see_S & (ago_S >= 0)
        if window:
            see_S = see_S & (abs(ago_S) < window)
        for n, g in np.ndindex(K, G):
            s_S = k[b, see_S, n] @ q[b, t, n, g] * (H**-0.5 if scale is None else scale)
            if softcap:
                s_S = softcap * np.tanh(s_S / softcap)
            p_S = np.exp(s_S) / (np.exp(s_S).sum() + (0 if sink_KG is None else np.exp(sink_KG[n, g])))
            out[b, t, n, g] = p_S @ v[b, see_S, n]
    return out


def run_of(name: str, T: int, **how):
    """A function of (q, k, v, sink) and the same without jax."""
    q, k, v, sink, at = sample(T)
    options = dict(OPTIONS[name])
    sinks = options.pop('sink_KG', False)
    run = lambda q, k, v, sink: attention(q, k, v, at, at, sink_KG=sink if sinks else None, **options, **how)
    return run, (q, k, v, sink), plainly(q, k, v, sink if sinks else None, at, **options)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name', OPTIONS)
def test_the_reference_is_what_the_docstring_says(name):
    run, inputs, expected = run_of(name, 23, backend='reference')
    np.testing.assert_allclose(run(*inputs), expected, atol=1e-12)


def value_and_gradients(run, inputs):
    weight = np.random.default_rng(1).normal(size=(*inputs[0].shape[:-1], U))
    return jax.value_and_grad(lambda *a: (run(*a) * weight).sum(), argnums=(0, 1, 2, 3))(*inputs)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('tile', [None, 8])
@pytest.mark.parametrize('name', OPTIONS)
def test_blockwise_equals_the_reference_and_so_do_its_gradients(name, tile, monkeypatch):
    expected = value_and_gradients(*run_of(name, 45, backend='reference')[:2])
    monkeypatch.setitem(attention.__globals__, 'blockwise_attention', partial(blockwise_attention, tile=tile))
    found = value_and_gradients(*run_of(name, 45, backend='blockwise')[:2])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11 * max(1.0, np.abs(other).max()))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('backend', ['reference', 'blockwise'])
@pytest.mark.parametrize('name', ['sinks', 'two ways in a window', 'all'])
def test_a_ring_of_four_equals_one_device(name, backend):
    T = 40
    whole, inputs, _ = run_of(name, T, backend='reference')
    expected = value_and_gradients(whole, inputs)
    q, k, v, sink, at = sample(T)
    options = dict(OPTIONS[name])
    sinks = options.pop('sink_KG', False)

    def body(q, k, v, sink, position_BT, segment_BT):
        here = position_BT, segment_BT
        return attention(q, k, v, here, here, sink_KG=sink if sinks else None, backend=backend, ring=True, **options)

    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        rows = P(None, 'context')
        specs = rows, rows, rows, P(), rows, rows
        run = jax.jit(jax.shard_map(body, in_specs=specs, out_specs=rows))
        *inputs, position_BT, segment_BT = map(jax.device_put, (q, k, v, sink, *at), specs)
        weight = jax.device_put(np.random.default_rng(1).normal(size=(*q.shape[:-1], U)), rows)
        total = lambda *a: (run(*a, position_BT, segment_BT) * weight).sum()
        found = jax.value_and_grad(total, argnums=(0, 1, 2, 3))(*inputs)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11 * max(1.0, np.abs(other).max()))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('context', [1, 4])
@pytest.mark.parametrize('name', ['softcap', 'sinks', 'all'])
def test_over_a_cache_the_last_query_gives_what_it_gives_in_the_row(name, context):
    T = 24
    q, k, v, sink, _ = sample(T)
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    at = position_BT, np.ones_like(position_BT)
    options = {'window': None, 'scale': H**-0.5, **OPTIONS[name]}
    sinks = sink if options.pop('sink_KG', False) else None
    expected = attention(q, k, v, at, at, sink_KG=sinks, backend='reference', **options)[:, -1:]
    slots = [slice(i, None, context) for i in range(context)]  # device i keeps positions i, i + n …
    kept = [np.concatenate([x[:, one] for one in slots], 1) for x in (k, v)]
    with jax.set_mesh(make_mesh(MeshConfig(context=context))):
        run = jax.shard_map(
            lambda q, k, v: cached_attention(
                q, k, v, position_BT[:, -1:], dense_positions(2, T // context), sink_KG=sinks, **options
            ),
            in_specs=(P(), P(None, 'context'), P(None, 'context')),
            out_specs=P(),
        )
        split = [jax.device_put(x, P(None, 'context')) for x in kept]
        np.testing.assert_allclose(jax.jit(run)(q[:, -1:], *split), expected, atol=1e-12)


@pytest.mark.usefixtures('float64')
def test_relative_positions_are_added_to_the_scores():
    q, k, v, _, at = sample(17)
    table = np.random.default_rng(2).normal(size=(K, G, 8))
    run = lambda table, backend='reference': attention(
        q, k, v, at, at, causal=False, relative=Relative(table, True, 6), scale=1.0, backend=backend
    )
    out = run(table)
    ahead_BTS = at[0][:, None, :] - at[0][:, :, None]
    bias = table[:, :, np.asarray(relative_bucket(ahead_BTS, 8, True, 6))]
    s = np.einsum('BTKGH,BSKH->BKGTS', q, k) + np.moveaxis(bias, 2, 0)
    s = np.where((at[1][:, :, None] == at[1][:, None, :])[:, None, None], s, -np.inf)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum('BKGTS,BSKU->BTKGU', p, v), atol=1e-12)
    moved = jax.grad(lambda table: (run(table) ** 2).sum())(table)
    assert (np.abs(moved) > 0).all((0, 1)).tolist() == [True] * 4 + [False] + [
        True
    ] * 3  # nothing is 0 ahead and yet after
    with pytest.raises(UserError, match='blockwise has no relative, which this model needs; use reference'):
        run(table, 'blockwise')


@pytest.mark.parametrize('both_ways', [True, False])
def test_buckets_of_distances_are_those_of_t5(both_ways):
    """Near ones each have their own, far ones share, and beyond `most` all are one."""
    ahead = np.arange(-300, 300)
    bucket = np.asarray(relative_bucket(ahead, 32, both_ways, 128))
    half = 16 if both_ways else 32
    assert bucket[ahead == 0] == 0
    assert (bucket[ahead < -128] == half - 1).all()
    near = half // 2
    np.testing.assert_array_equal(bucket[(ahead <= 0) & (ahead > -near)], np.arange(near)[::-1])
    assert (bucket[ahead > 0] >= 16).all() if both_ways else (bucket[ahead > 0] == 0).all()


@pytest.mark.parametrize(
    ('platform', 'context', 'asked', 'name'),
    [
        ('cpu', 1, AttentionFeatures(softcap=True), 'blockwise'),
        ('gpu', 1, AttentionFeatures(), 'flash'),
        ('gpu', 1, AttentionFeatures(sinks=True), 'blockwise'),
        ('gpu', 1, AttentionFeatures(float64=True), 'blockwise'),
        ('tpu', 1, AttentionFeatures(softcap=True, value_width=True), 'splash'),
        ('tpu', 1, AttentionFeatures(sinks=True), 'blockwise'),
        ('tpu', 2, AttentionFeatures(), 'blockwise'),
        ('tpu', 1, AttentionFeatures(relative=True), 'reference'),
    ],
)
def test_the_fast_backend_is_one_that_has_what_is_asked(platform, context, asked, name):
    assert default_backend(platform, context, asked) == name


@pytest.mark.parametrize('options', [{'softcap': 1.5}, {'causal': False}, {}])
def test_splash_equals_the_reference(options):
    q, k, v, _, _ = sample(40, np.float32)
    position_BT = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    at = position_BT, np.ones_like(position_BT)
    run = lambda backend: attention(q, k, v, at, at, backend=backend, **options)
    np.testing.assert_allclose(jax.jit(run, static_argnums=0)('splash'), run('reference'), atol=2e-5)
