"""Scoring takes several rows at once, and each row's logits are those of the row alone."""

import dataclasses

import jax
import numpy as np
import pytest

from weft.inference import score as scoring
from weft.inference.score import rows_at_once, score
from weft.model.batch import Batch
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient
from weft.training.step import init

MODEL = ModelConfig(vocabulary=320, layers=2, model_dim=32, attention=AttentionConfig(heads=4), mlp=MLPConfig(dim=48))
MIXTURE = dataclasses.replace(MODEL, moe=MoEConfig(experts=4, top_k=2, mlp_dim=16))


@pytest.mark.parametrize(
    ('rows', 'length', 'at_once'),
    [(100, 32, 15), (16, 32, 16), (17, 32, 9), (3, 512, 1), (3, 513, 1), (1, 8, 1), (5, 250, 2), (512, 1, 512)],
)
def test_a_device_takes_as_many_rows_as_it_works_on_well_in_turns_that_are_alike(rows, length, at_once):
    assert rows_at_once(MODEL, DEFAULT, rows, length) == at_once
    assert rows_at_once(MIXTURE, ComputeConfig(dispatch='all_to_all'), rows, length) == 1
    assert rows_at_once(MIXTURE, DEFAULT, rows, length) == at_once


def test_logits_of_many_tokens_bound_the_rows():
    wide = dataclasses.replace(MODEL, vocabulary=2**20)
    assert rows_at_once(wide, DEFAULT, 100, 16) == 4
    assert rows_at_once(wide, DEFAULT, 100, 200) == 1


@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(data=2, tensor=2)], ids=str)
def test_rows_together_have_the_logits_of_each_alone(monkeypatch, mesh):
    ids = np.random.default_rng(0).integers(0, 320, (7, 40)).astype(np.int32)
    run = RunConfig(name='x', mesh=mesh, model=MODEL, training=TrainingConfig(steps=1, batch=2, sequence_length=40))
    with jax.set_mesh(make_mesh(mesh)):
        model = jax.jit(init, static_argnums=0)(run).model
        together = list(score(model, ids))
        monkeypatch.setattr(scoring, 'rows_at_once', lambda *_: 1)
        alone = np.concatenate([logit_BTV for _, logit_BTV in score(model, ids)])
    assert [begin for begin, _ in together] == [0]
    found = np.concatenate([logit_BTV for _, logit_BTV in together])
    assert found.shape == alone.shape == (7, 40, 320)
    np.testing.assert_allclose(found, alone, atol=1e-5 * np.abs(alone).max())


def test_work_without_a_mesh_says_what_is_missing():
    ids = np.zeros((2, 8), np.int32)
    run = RunConfig(name='x', model=MODEL, training=TrainingConfig(steps=1, batch=2, sequence_length=8))
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = jax.jit(init, static_argnums=0)(run).model
    ways = (
        lambda: list(score(model, ids)),
        lambda: place(ids),
        lambda: jax.jit(logits)(model, ids, ids, ids),
        lambda: jax.jit(loss_and_gradient)(model, Batch(ids, ids, ids, ids)),
    )
    for way in ways:
        with pytest.raises(UserError, match=r'stands under `with jax\.set_mesh\(run\.mesh\):`'):
            way()
