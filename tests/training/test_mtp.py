"""Layers that predict further ahead: what they must predict, their loss, and that every mesh gives the same."""

import functools

import jax
import numpy as np
import pytest

from tests import reference
from tests.models import filled, on
from weft.model.batch import Batch
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, MTPConfig
from weft.model.forward import mtp_logits, place
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient, mtp_targets
from weft.training.optimizers import AdamW
from weft.training.step import init, train_step

MODEL = ModelConfig(
    vocabulary=200,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=8, kv_heads=4),
    mlp=MLPConfig(dim=32),
    mtp=MTPConfig(layers=2, loss=0.5),
    moe=MoEConfig(experts=4, mlp_dim=16, first_dense_layers=0, bias_update_rate=0.001),
)
DOUBLE = ComputeConfig(dtype='float64', dispatch='all_gather')
MESHES = [
    MeshConfig(stage=2, context=2, expert=2),
]


def batch() -> Batch:
    return jax.tree.map(lambda array: array[:, :32], reference.packed_batch(200, B=8, T=33, seed=3))


def test_tokens_that_are_given_and_asked_for():
    tokens = np.array([[1, 2, 3, 11, 12, 0]], np.int32)
    targets = np.array([[2, 3, 4, 12, 13, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
    given, asked, live = mtp_targets(Batch(tokens, targets, np.zeros_like(tokens), segments), 2)
    np.testing.assert_array_equal(live[0], [[True, True, False, True, False, False]])
    np.testing.assert_array_equal(live[1], [[True, False, False, False, False, False]])
    np.testing.assert_array_equal(given[0][live[0]], [2, 3, 12])
    np.testing.assert_array_equal(asked[0][live[0]], [3, 4, 13])
    np.testing.assert_array_equal((given[1][live[1]], asked[1][live[1]]), [[3], [4]])


@functools.cache
def step_on(mesh: MeshConfig):
    microbatches = 2 * mesh.stage if mesh.stage > 1 else 1
    run = functools.partial(loss_and_gradient, microbatches=microbatches)
    with on(mesh):
        model = filled(MODEL, DOUBLE)
        return jax.tree.map(np.asarray, jax.jit(run)(model, place(batch())))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_every_mesh_has_the_same_loss_and_gradient(mesh):
    (loss, figures), gradient = step_on(MeshConfig())
    (other_loss, other_figures), other = step_on(mesh)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-12)
    np.testing.assert_allclose(other_figures['mtp_loss'], figures['mtp_loss'], rtol=1e-12)
    for mine, known in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        assert np.abs(mine - known).max() <= 1e-10 * np.abs(known).max()


@pytest.mark.usefixtures('float64')
def test_the_loss_is_that_of_the_logits():
    ids = np.random.default_rng(0).integers(0, 200, (8, 33), dtype=np.int32)
    alone = np.arange(32, dtype=np.int32)[None].repeat(
        8, 0
    )  # one document a row, so that the logits' shift is the loss'
    rows = Batch(ids[:, :-1], ids[:, 1:], alone, np.ones_like(alone))
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = filled(MODEL, DOUBLE)
        (loss, figures), _ = jax.jit(loss_and_gradient)(model, place(rows))
        padded = np.pad(ids, ((0, 0), (0, 7)))
        places = np.arange(40, dtype=np.int32)[None].repeat(8, 0)
        logit_kBTV = np.asarray(jax.jit(mtp_logits)(model, *place((padded, places, np.ones_like(places)))))
    nats = []
    for k, logit_BTV in enumerate(logit_kBTV):
        asked = ids[:, 2 + k :]
        log_p = logit_BTV - np.logaddexp.reduce(logit_BTV, -1, keepdims=True)
        nats.append(-np.take_along_axis(log_p[:, : asked.shape[1]], asked[..., None], -1).sum() / (8 * 32))
    np.testing.assert_allclose(figures['mtp_loss'], np.mean(nats), rtol=1e-12)
    parts = figures['loss'] + 0.5 * figures['mtp_loss']
    parts += 0.01 * figures['router.balance_loss'] + 0.001 * figures['router.z_loss']
    np.testing.assert_allclose(loss, parts, rtol=1e-12)


def test_a_step_moves_them_and_their_routers_biases():
    config = RunConfig(
        name='mtp',
        model=MODEL,
        training=TrainingConfig(steps=10, batch=8, sequence_length=32),
        optimizer=AdamW(learning_rate=1e-2),
    )
    with on(MeshConfig(data=2, tensor=2)):
        state = jax.jit(functools.partial(init, config))()
        step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        losses = []
        for _ in range(10):
            state, figures = step(state, place(batch()))
            losses.append(float(figures['mtp_loss']))
        bias_kE = np.asarray(state.model.mtp.mlp.correction_E[...])
    assert losses[-1] < losses[0] - 0.5
    assert bias_kE.shape == (2, 4)
    assert (bias_kE != 0).any(-1).all()
    assert figures['router.load'].shape == (4, 4)  # two layers, and two further ahead
