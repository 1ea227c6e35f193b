"""The gradient by distance: exact for a linear net with a known eigenvalue, and that of the decoder's own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import filled, on
from weft.interpret.history.gradients import (
    beside_the_last,
    last_loss,
    norm_by_distance,
    of_decoder,
    of_net,
    single_documents,
)
from weft.interpret.history.nets import LSTM, Elman
from weft.model.batch import Batch
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, changed
from weft.model.forward import logits
from weft.sharding.mesh import MeshConfig

T = 12


def rows(vocabulary: int) -> Batch:
    """Three rows whose tokens are all different, one document each."""
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(vocabulary)[: T + 1] for _ in range(3)]).astype(np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)).copy()
    return Batch(ids[:, :-1], ids[:, 1:], places, np.ones((3, T), np.int32))


@pytest.mark.parametrize('eigenvalue', [0.5, 0.9, 1.1])
def test_a_linear_net_s_gradient_is_the_power_of_its_eigenvalue(eigenvalue):
    net = Elman(vocabulary=20, dim=8, activation=lambda x: x)
    w = net.initial(jax.random.key(0))
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    w |= {'recurrent_HH': jnp.asarray(eigenvalue * turned, jnp.float32), 'input_DH': jnp.eye(8)}
    share_T = beside_the_last(of_net(net, w, {}, rows(20)))
    np.testing.assert_allclose(share_T, eigenvalue ** np.arange(T), rtol=1e-4)


def test_a_net_that_forgets_and_one_that_keeps():
    net = LSTM(vocabulary=20, dim=8)
    w = net.initial(jax.random.key(0))
    for bias, least, most in ((-20.0, 0, 1e-3), (20.0, 1e-2, 1e3)):  # forget gates shut, and open
        w['bias_G'] = w['bias_G'].at[8:16].set(bias)
        w['recurrent_HG'] = jnp.zeros_like(w['recurrent_HG'])
        assert least <= beside_the_last(of_net(net, w, {}, rows(20)))[-1] <= most


@pytest.mark.parametrize('positions', ['rotary', 'sinusoidal'])
def test_the_decoder_s_gradient_is_that_of_its_embedding(positions):
    c = ModelConfig(
        vocabulary=32,
        layers=2,
        model_dim=16,
        attention=AttentionConfig(heads=2),
        mlp=MLPConfig(dim=24),
        embedding=EmbeddingConfig(tied=False),
    )
    if positions == 'sinusoidal':
        c = changed(c, {'positions.kind': 'sinusoidal', 'positions.max': T})
    batch = rows(32)
    with on(MeshConfig()):
        model = filled(c)
        found = of_decoder(model, batch)

        def loss(model):
            found_BTV = logits(model, *(jnp.asarray(a) for a in (batch.tokens_BT, batch.position_BT, batch.segment_BT)))
            return last_loss(found_BTV[:, -1], jnp.asarray(batch.target_BT[:, -1]))[0]

        gradient_VD = np.asarray(jax.jit(jax.grad(loss))(model).embed_VD[...])
    # A row's tokens are all different: the gradient of a token's row of the table is that of its place.
    wanted_T = np.linalg.norm(gradient_VD[batch.tokens_BT[0]], axis=-1)[::-1]
    assert wanted_T.min() > 0
    np.testing.assert_allclose(found[0], wanted_T, rtol=1e-4)


def test_rows_of_several_documents_are_left_out():
    segment_BT = np.array([[1, 1, 1], [1, 2, 2], [1, 1, 0], [1, 1, 1]])
    assert single_documents(Batch(segment_BT, segment_BT, segment_BT, segment_BT)).tolist() == [0, 3]


def test_norms_are_told_from_the_last_token_back():
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)))
    weight_T = jnp.array([1.0, 2.0, 3.0, 4.0])
    found = norm_by_distance(lambda x_BTD: (x_BTD.sum(-1) * weight_T[None]).sum(-1), x_BTD)
    np.testing.assert_allclose(found, np.tile([4.0, 3.0, 2.0, 1.0], (2, 1)) * np.sqrt(3), rtol=1e-6)
