"""Sparse experts equal a plain dense reference: every expert on every token, what was not chosen weighted with 0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests import reference
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.context import ForwardContext
from weft.model.layers import moe as moe_module
from weft.model.layers.moe import MoE, updated_bias
from weft.model.ops.expert_dispatch import capacity
from weft.model.ops.grouped_matmul import needs_unchecked
from weft.model.parameters import initialise, specs
from weft.runtime.errors import UserError
from weft.sharding.collectives import mark_varying
from weft.sharding.mesh import AXES, BATCH, SEQUENCE, MeshConfig, make_mesh

MODEL = ModelConfig(
    vocabulary=128,
    layers=1,
    model_dim=16,
    attention=AttentionConfig(heads=4),
    mlp=MLPConfig(dim=16),
    moe=MoEConfig(experts=8, top_k=2, mlp_dim=16, shared_experts=1),
)
B, T = 8, 16
MESHES = [
    MeshConfig(),
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(expert=8),
    MeshConfig(expert=4, tensor=2),
    MeshConfig(context=2, expert=4),
]
DISPATCHES = ['all_gather', 'all_to_all', 'ragged']
EVERY = np.ones((1, 1, 1), bool)
LOSSES = {'balance_loss': 3.0, 'z_loss': 0.1}  # weights in the differentiated sum, so that it feels both


def config(**changes) -> ModelConfig:
    """With `changes` to the mixture."""
    return dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **changes))


def computed(dtype='float32', **changes) -> ComputeConfig:
    """Capacity has room for everything, unless `changes` say otherwise."""
    fields = {'attention': 'reference', 'grouped_matmul': 'blocked', 'dispatch': 'all_gather', 'capacity_factor': 4.0}
    return ComputeConfig(dtype=dtype, **fields | changes)


@functools.cache
def sparse(compute: ComputeConfig, sequence_split: bool = True):
    """A jitted function of global arrays: ((Σ y · ct + losses, (y, figures)), gradients of weights and x)."""
    x_spec, copies = (P(BATCH, SEQUENCE), ('stage',)) if sequence_split else (P(BATCH), ('stage', *SEQUENCE))

    def body(moe, x_BTD, ct_BTD, segment_BT):
        here = {} if sequence_split else {'sequence_split': False, 'decoding': True}
        ctx = ForwardContext(jnp.zeros_like(segment_BT), segment_BT, compute, measures=True, **here)
        ctx, records = ctx.recording()
        y_BTD = moe(mark_varying(x_BTD), ctx)
        y_BTD = jax.lax.pmean(mark_varying(y_BTD), copies)
        figures = {name.removeprefix('router.'): metric.total for name, metric in records.metrics.items()}
        figures = jax.lax.psum(mark_varying(figures), AXES)
        axes = tuple(axis for axis in AXES if axis not in copies)
        total = jax.lax.psum((y_BTD * ct_BTD).sum(), axes) + sum(n * figures[name] for name, n in LOSSES.items())
        return total, y_BTD, figures

    def run(moe, x, ct, segment):
        segment_spec = P(BATCH, 'context') if sequence_split else P(BATCH)
        out_specs = (P(), x_spec, P())
        in_specs, checked = (specs(moe), x_spec, x_spec, segment_spec), not needs_unchecked(compute.grouped_matmul)
        body_ = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=checked)
        total, y, figures = body_(moe, x, ct, segment)
        return total, (y, figures)

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True) if sequence_split else run)


@functools.partial(jax.jit, static_argnums=4)
def dense(w, x, ct, segment, c, kept_BTE=EVERY):
    def run(w, x):
        y, (balance, z, load_E) = reference.experts(w, x, segment, c, kept_BTE)
        total = (y * ct).sum() + LOSSES['balance_loss'] * balance + LOSSES['z_loss'] * z
        return total, (y, {'balance_loss': balance, 'z_loss': z, 'load': load_E / c.moe.top_k})

    return jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(w, x)


def inputs(c: ModelConfig, dtype: str, tokens: int = T):
    """x, ct, and segments: the first tokens of a row are padding, of row 0 none, of row 5 all but one."""
    r = np.random.default_rng(0)
    x, ct = r.normal(size=(2, B, tokens, c.model_dim)).astype(dtype)
    segment = (np.arange(tokens)[None] >= np.array([0, 3, 0, 0, 1, tokens - 1, 0, 2])[:, None]).astype(np.int32)
    return x, ct, segment


@functools.cache
def values(c: ModelConfig, dtype: str, skewed: bool) -> list[np.ndarray]:
    """A layer's weights. `skewed`: where x is positive experts 0 and 1 win everywhere, and six get nothing."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        moe = jax.device_get(jax.jit(lambda key: initialise(MoE(c), key, dtype))(jax.random.key(0)))
    if skewed:
        skew = np.array([0.3, 0.2, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1], dtype)
        moe.router.w_IO.set_value(moe.router.w_IO[...] * 0.01 + skew)
    elif c.moe.bias_update_rate:
        moe.correction_E.set_value(np.random.default_rng(1).normal(size=c.moe.experts).astype(dtype) * 0.2)
    return jax.tree.leaves(moe)


def layer(c: ModelConfig, dtype: str, skewed: bool = False) -> MoE:
    """A layer on the current mesh."""
    moe = jax.eval_shape(lambda: initialise(MoE(c), jax.random.key(0), dtype))
    leaves, structure = jax.tree.flatten(moe)
    put = [jax.device_put(a, s.sharding.spec) for a, s in zip(values(c, dtype, skewed), leaves, strict=True)]
    return jax.tree.unflatten(structure, put)


def named(tree) -> dict:
    return {
        'mlp.' + jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, tolerance: float, skewed: bool, kept_BTE=EVERY
) -> dict:
    """Asserts that value, gradients and figures equal the dense reference. Returns what was got."""
    x, ct, segment = inputs(c, compute.dtype)
    x = np.abs(x) if skewed else x
    with jax.set_mesh(make_mesh(mesh)):
        moe = layer(c, compute.dtype, skewed)
        put = lambda a, *spec: jax.device_put(a, P(*spec))
        arrays = put(x, BATCH, SEQUENCE), put(ct, BATCH, SEQUENCE), put(segment, BATCH, 'context')
        (_, (y, figures)), (dw, dx) = sparse(compute)(moe, *arrays)
        got = {**named(dw), 'x': dx, 'y': y, **{name: figures[name] for name in ('balance_loss', 'z_loss', 'load')}}
        got, w, dropped = jax.device_get(got), named(moe), float(figures['dropped_share']) * c.moe.top_k
    with jax.numpy_rank_promotion('allow'):
        (_, (want_y, want_figures)), (want_dw, want_dx) = dense(w, x, ct, segment, c, kept_BTE)
    want = {**want_dw, 'x': want_dx, 'y': want_y, **want_figures}
    assert got.keys() == want.keys()
    for name in want:
        error, scale = np.abs(got[name] - want[name]).max(), np.abs(want[name]).max()
        assert error <= tolerance * scale, (name, error, scale)
    if skewed:
        assert not got['mlp.up.w_EIO'][2:].any(), 'experts without tokens learn nothing'
        assert got['mlp.up.w_EIO'][:2].any()
    return {**got, 'dropped': dropped}


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'ragged'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('float64', 1e-10)])
@pytest.mark.parametrize('mesh', MESHES[:2])
def test_sparse_experts_equal_dense_ones(mesh, dtype, tolerance, backend, request):
    if dtype == 'float64':
        request.getfixturevalue('float64')
    for skewed in (False, True):
        check(config(), computed(dtype, grouped_matmul=backend), mesh, tolerance, skewed)


@pytest.mark.parametrize(
    'mesh', MESHES[:1] if jax.default_backend() != 'cpu' else MESHES[1:2]
)  # interpreting takes long
def test_the_kernels_equal_dense_experts(mesh):
    check(config(), computed(grouped_matmul='gmm'), mesh, 1e-5, skewed=True)


# With a bias: it chooses, and the gates are made of the scores without it. Sigmoid scores, as DeepSeek-V3 uses it with.
@pytest.mark.parametrize('dispatch', DISPATCHES)
@pytest.mark.parametrize(('mesh', 'dtype'), [*((mesh, 'float64') for mesh in MESHES), (MESHES[1], 'float32')])
def test_every_dispatch_equals_dense_experts(mesh, dtype, dispatch, request):
    if dtype == 'float64':
        request.getfixturevalue('float64')
    c, compute = config(bias_update_rate=0.001, router='sigmoid'), computed(dtype, dispatch=dispatch)
    for skewed in (False, True):
        got = check(c, compute, mesh, 1e-5 if dtype == 'float32' else 1e-10, skewed)
        assert got['dropped'] == 0
        assert not got['mlp.correction_E'].any(), 'no gradient moves the bias'


@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_a_wrong_expert_is_noticed(dispatch, monkeypatch):
    right = MoE.experts

    def shifted(self, dtype, backend):
        held = right(self, dtype, backend)
        return held._replace(up_EDF=jnp.roll(held.up_EDF, 1, 0))

    monkeypatch.setattr(MoE, 'experts', shifted)
    compute = computed(dispatch=dispatch, capacity_factor=5.0)  # of its own: `sparse` keeps what it traced
    with pytest.raises(AssertionError, match='mlp'):
        check(config(), compute, MeshConfig(expert=4, tensor=2), 1e-2, skewed=False)


def kept(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, w: dict, skewed: bool) -> tuple[np.ndarray, int]:
    """Which choices find room, [B, T, E], and how many do not: one device after the other, one token after the other."""
    x, _, segment = inputs(c, compute.dtype)
    score = np.abs(x) @ w['mlp.router.w_IO'] if skewed else x @ w['mlp.router.w_IO']
    choice_BTK = np.argsort(-score, axis=-1)[..., : c.moe.top_k]
    rows, columns = mesh.span(BATCH), mesh.span(SEQUENCE)
    room = capacity(B * T // rows // columns, c.moe.top_k, c.moe.experts, compute.capacity_factor)
    kept_BTE, dropped = np.zeros((B, T, c.moe.experts), bool), 0
    for rows_b in np.split(np.arange(B), rows):
        for columns_t in np.split(np.arange(T), columns):
            used_E = np.zeros(c.moe.experts, int)
            for b in rows_b:
                for t in columns_t[segment[b, columns_t] > 0]:
                    for e in choice_BTK[b, t]:
                        used_E[e] += 1
                        kept_BTE[b, t, e] = used_E[e] <= room
                        dropped += used_E[e] > room
    return kept_BTE, dropped


@pytest.mark.parametrize('mesh', [MESHES[1], MESHES[4]])
def test_what_exceeds_the_capacity_is_dropped_later_tokens_first(mesh, float64):
    c, compute = config(), computed('float64', dispatch='all_to_all', capacity_factor=0.5)
    for skewed in (False, True):
        with jax.set_mesh(make_mesh(mesh)):
            w = named(layer(c, 'float64', skewed))
        kept_BTE, dropped = kept(c, compute, mesh, w, skewed)
        got = check(c, compute, mesh, 1e-10, skewed, kept_BTE)
        assert got['dropped'] == dropped > 0


@pytest.mark.parametrize('dispatch', DISPATCHES)
@pytest.mark.parametrize('mesh', [MeshConfig(expert=8), MeshConfig(expert=4, tensor=2)])
def test_decoding_drops_nothing_and_equals_dense_experts(mesh, dispatch, float64):
    """One token a row, the same on all devices of `tensor`: on the first mesh one on each device."""
    c, compute = config(), computed('float64', dispatch=dispatch, capacity_factor=0.01)
    x, ct, segment = (a[:, -1:] for a in inputs(c, 'float64'))
    with jax.set_mesh(make_mesh(mesh)):
        moe = layer(c, 'float64')
        arrays = (jax.device_put(a, P(BATCH)) for a in (x, ct, segment))
        _, (y, figures) = sparse(compute, sequence_split=False)(moe, *arrays)
        y, w, figures = np.asarray(y), named(moe), jax.device_get(figures)
    with jax.numpy_rank_promotion('allow'):
        (_, (want, want_figures)), _ = dense(w, x, ct, segment, c)
    assert np.abs(y - want).max() <= 1e-10 * np.abs(want).max()
    np.testing.assert_allclose(figures['load'], want_figures['load'])
    np.testing.assert_allclose(figures['balance_loss'], want_figures['balance_loss'])
    np.testing.assert_allclose(figures['z_loss'], want_figures['z_loss'])
    assert figures['dropped_share'] == 0


def test_a_bias_changes_the_choice_and_not_the_gates(float64):
    c = config(router='sigmoid', renormalize=False)
    x, _, segment = inputs(c, 'float64')
    router = np.random.default_rng(2).normal(size=(c.model_dim, c.moe.experts))

    def body(x, segment, bias):
        ctx = ForwardContext(jnp.zeros_like(segment), segment, computed('float64'))
        return moe_module.route(mark_varying(x), jnp.asarray(router), bias, ctx, c)[:2]

    with jax.set_mesh(make_mesh(MeshConfig())):
        run = jax.jit(jax.shard_map(body, in_specs=(P(BATCH), P(BATCH), P()), out_specs=P(AXES)))
        x, segment = (jax.device_put(a, P(BATCH)) for a in (x, segment))
        bias = np.zeros(c.moe.experts)
        gate, expert = run(x, segment, bias)
        same_gate, same_expert = run(x, segment, bias + 0.7)
        third = np.where(np.arange(c.moe.experts) == 3, 10.0, 0)  # not in place: a step under way may still read it
        all_gate, all_expert = run(x, segment, third)
    np.testing.assert_array_equal(expert, same_expert)
    np.testing.assert_allclose(gate, same_gate)
    assert (np.asarray(all_expert)[..., 0] == 3).all()
    assert not (np.asarray(expert) == 3).any(-1).all()
    np.testing.assert_allclose(np.asarray(all_gate)[..., 0], 1 / (1 + np.exp(-x @ router[:, 3])))


def test_the_bias_rises_where_experts_have_few_tokens():
    bias_LE, load_LE = jnp.array([[0.0, 0.5, 0.0], [0, 0, 0]]), jnp.array([[1.0, 2.0, 6.0], [4, 4, 4]])
    np.testing.assert_allclose(updated_bias(bias_LE, load_LE, 0.1), [[0.1, 0.6, -0.1], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ('make', 'field', 'value', 'message'),
    [
        (computed, 'dispatch', 'al_to_all', "compute.dispatch is 'al_to_all'.* did you mean 'all_to_all'"),
        (computed, 'capacity_factor', 0.0, 'compute.capacity_factor is 0.0: it must be a number above 0; 1 makes room'),
        (computed, 'capacity_factor', float('nan'), 'compute.capacity_factor is nan'),
        (config, 'bias_update_rate', -0.1, 'model.moe.bias_update_rate is -0.1: it cannot be negative; nearest: 0'),
    ],
)
def test_mistakes_in_the_config_are_named(make, field, value, message):
    with pytest.raises(UserError, match=message):
        make(**{field: value})
