"""Losses that no refactor may change.

A change of the arithmetic itself renews them: REGOLD=1 pytest tests/training/test_golden.py
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.test_meshes import RUN, batches, place
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.step import init, train_step

GOLDEN = Path(__file__).with_name('golden.json')
MODELS = {
    'dense': ModelConfig(
        vocabulary=300,
        layers=2,
        model_dim=32,
        attention=AttentionConfig(heads=4, kv_heads=2, qk_norm=True),
        mlp=MLPConfig(dim=48),
    ),
    'plain': ModelConfig(
        vocabulary=300,
        layers=2,
        model_dim=32,
        attention=AttentionConfig(heads=4, o_bias=True, qkv_bias=True),
        mlp=MLPConfig(dim=48, activation='gelu', bias=True),
        norm=NormConfig(kind='layernorm', bias=True),
        dropout=0.1,
    ),
    'softmax experts': ModelConfig(
        vocabulary=300,
        layers=2,
        model_dim=32,
        attention=AttentionConfig(heads=4),
        mlp=MLPConfig(dim=32),
        moe=MoEConfig(experts=4, mlp_dim=32),
    ),
    'sigmoid experts': ModelConfig(
        vocabulary=300,
        layers=2,
        model_dim=32,
        attention=AttentionConfig(heads=4),
        mlp=MLPConfig(dim=32),
        embedding=EmbeddingConfig(tied=False),
        moe=MoEConfig(
            experts=4, mlp_dim=32, router='sigmoid', shared_experts=1, first_dense_layers=1, routed_scale=1.5
        ),
    ),
}


@pytest.mark.parametrize('name', MODELS)
def test_losses_of_a_seed(name):
    config = dataclasses.replace(RUN, model=MODELS[name], mesh=MeshConfig(expert=2, tensor=2))
    losses = []
    with jax.set_mesh(make_mesh(config.mesh)):
        state = jax.jit(functools.partial(init, config))()
        step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        for batch in batches()[:8]:
            state, figures = step(state, place(batch))
            losses.append(float(figures['loss']))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get('REGOLD'):
        GOLDEN.write_text(json.dumps(golden | {name: losses}, indent=1) + '\n')
        return
    np.testing.assert_allclose(losses, golden[name], rtol=2e-6)
