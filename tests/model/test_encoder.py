"""An encoder alone: each token sees all of its document and nothing else; what needs the next token is refused."""

import jax
import numpy as np
import pytest

from tests.models import filled
from weft.inference.score import score
from weft.inference.step import empty_cache
from weft.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    HeadConfig,
    LearnedConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    changed,
)
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig

BERT = ModelConfig(
    vocabulary=40,
    layers=2,
    model_dim=16,
    attention=AttentionConfig(heads=4, o_bias=True),
    mlp=MLPConfig(dim=16, activation='gelu_exact', bias=True),
    norm=NormConfig(kind='layernorm', order='post', bias=True),
    positions=LearnedConfig(max=16),
    causal=False,
    embedding=EmbeddingConfig(token_types=2, norm=True),
    head=HeadConfig(mlp=True, bias=True),
)


def test_a_token_sees_all_of_its_document_and_nothing_of_others():
    r = np.random.default_rng(0)
    ids = r.integers(0, 40, (1, 12)).astype(np.int32)
    segment = np.array([[1] * 5 + [2] * 5 + [0] * 2], np.int32)
    position = np.array([[*range(5), *range(5), 0, 0]], np.int32)
    found = []
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = filled(BERT)
        for at in (None, 4, 7, 11):
            changed = ids.copy()
            if at is not None:
                changed[0, at] = (changed[0, at] + 1) % 40
            found.append(np.asarray(jax.jit(logits)(model, *place((changed, position, segment)))))
    whole, fourth, seventh, padding = found
    moved = lambda other: (np.abs(other - whole)[0].max(-1) > 0)[:10].tolist()
    assert moved(fourth) == [True] * 5 + [False] * 5
    assert moved(seventh) == [False] * 5 + [True] * 5
    assert moved(padding) == [False] * 10


@pytest.mark.parametrize('mesh', [MeshConfig(data=2, tensor=2), MeshConfig(context=2, expert=2)], ids=str)
def test_every_mesh_scores_alike(mesh):
    ids = np.random.default_rng(0).integers(0, 40, (3, 11))
    found = []
    for one in (MeshConfig(), mesh):
        with jax.set_mesh(make_mesh(one)):
            model = filled(BERT)
            found.append(np.concatenate([block for _, block in score(model, ids)]))
    assert found[0].shape == (3, 11, 40)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_what_needs_the_next_token_is_refused():
    training = TrainingConfig(steps=1, batch=2, sequence_length=16)
    with pytest.raises(UserError, match=r'model\.causal is false: training learns to predict the next token'):
        RunConfig(name='x', model=BERT, training=training).check_sizes()
    causal = changed(BERT, {'causal': True, 'positions.max': 8})
    with pytest.raises(UserError, match=r'positions\.max is 8 and training\.sequence_length 16'):
        RunConfig(name='x', model=causal, training=training).check_sizes()
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = filled(BERT)
        with pytest.raises(UserError, match=r'model\.causal is false: decoding needs'):
            empty_cache(model, 2, 8)
