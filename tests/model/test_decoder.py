"""The sharded decoder equals the plain one, in its loss and in every gradient; and no token sees what it must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests import reference
from tests.models import filled
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.forward import logits
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.training.loss import loss_and_gradient, loss_fn

BASE = ModelConfig(
    vocabulary=150,
    layers=2,
    model_dim=16,
    attention=AttentionConfig(heads=4, kv_heads=2),
    mlp=MLPConfig(dim=24),
)
MOE = MoEConfig(experts=4, mlp_dim=16)
VARIANTS = {
    'grouped-query swiglu': BASE,
    'multi-head layernorm gelu, all biases': changed(
        BASE,
        {
            'attention.kv_heads': 4,
            'norm.kind': 'layernorm',
            'mlp.activation': 'gelu',
            'attention.o_bias': True,
            'mlp.bias': True,
            'norm.bias': True,
            'attention.qkv_bias': True,
        },
    ),
    'multi-query relu, window, untied': changed(
        BASE,
        {
            'attention.kv_heads': 1,
            'mlp.activation': 'relu',
            'attention.window': 3,
            'embedding.tied': False,
        },
    ),
    'geglu, q/k norm, qkv bias, wide heads': changed(
        BASE,
        {
            'mlp.activation': 'geglu',
            'attention.qk_norm': True,
            'attention.qkv_bias': True,
            'attention.head_dim': 6,
        },
    ),
    'softmax experts': dataclasses.replace(BASE, moe=MOE),
    'sigmoid experts, shared ones, dense first layer': dataclasses.replace(
        BASE,
        layers=3,
        moe=MoEConfig(
            experts=4, top_k=3, mlp_dim=8, shared_experts=2, first_dense_layers=1, router='sigmoid', routed_scale=2.5
        ),
    ),
    'norms of outputs, layers that do not turn, scores by layer, a gate of shared experts': changed(
        BASE,
        {
            'norm.order': 'output',
            'positions.pattern': (True, False),
            'attention.scale_by_layer': True,
            'moe': dataclasses.replace(MOE, shared_experts=1, shared_mlp_dim=20, shared_gate=True),
        },
    ),
    'experts without renormalisation, plain MLP': changed(
        BASE,
        {
            'mlp.activation': 'gelu',
            'moe': dataclasses.replace(MOE, renormalize=False, top_k=1),
        },
    ),
}


def place(tree):
    return jax.tree.map(lambda array: jax.device_put(array, P(BATCH)), tree)


@pytest.mark.usefixtures('float64')
# Rematerialisation wraps every layer alike: the variants with experts show it.
@pytest.mark.parametrize(
    ('name', 'remat'),
    [*((name, 'none') for name in VARIANTS), ('sigmoid experts, shared ones, dense first layer', 'block')],
)
def test_loss_and_gradients_equal_the_plain_decoder(name, remat):
    c, compute = VARIANTS[name], ComputeConfig(dtype='float64', remat=remat)
    batch = reference.packed_batch(c.vocabulary, B=4, T=12)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2, tensor=2))):
        model = filled(c, compute)
        (total, metrics), gradient = jax.jit(loss_and_gradient)(model, place(batch))
        assert jax.tree.all(
            jax.tree.map(lambda g, w: jax.typeof(g).sharding.spec == jax.typeof(w).sharding.spec, gradient, model)
        ), 'a gradient is laid out like its weight'
        w, got = reference.weights(model), reference.weights(gradient)
    plainly = jax.jit(jax.value_and_grad(reference.loss, has_aux=True), static_argnums=2)
    with jax.numpy_rank_promotion('allow'):
        (want, entropy), want_g = plainly(w, batch, c)
    np.testing.assert_allclose(total, want, rtol=1e-12)
    np.testing.assert_allclose(metrics['loss'], entropy, rtol=1e-12)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_g))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want_g), strict=True):
        scale = max(np.abs(b).max(), 1e-6 * largest)
        assert np.abs(a - b).max() <= 1e-10 * scale, (jax.tree_util.keystr(path), np.abs(a - b).max(), scale)


@pytest.mark.parametrize('name', ['grouped-query swiglu', 'multi-query relu, window, untied', 'softmax experts'])
def test_no_token_sees_later_ones_or_other_documents(name):
    """d logits[t] / d embedding of token s is zero exactly where s is later, in another document, or outside all windows."""
    c = dataclasses.replace(VARIANTS[name], layers=1 if VARIANTS[name].attention.window else 2)
    T = 8
    tokens_BT, position_BT, segment_BT = (
        np.array([row], np.int32).repeat(4, 0)
        for row in (
            range(T),  # all different: a row of the embedding is a place in the text
            [0, 1, 2, 3, 4, 0, 1, 2],
            [1, 1, 1, 1, 1, 2, 2, 2],
        )
    )
    with jax.set_mesh(make_mesh(MeshConfig(expert=2, tensor=2))):
        model, at = filled(changed(c, {'embedding.tied': False})), place((tokens_BT, position_BT, segment_BT))

        def change(model, t):
            here_1T1 = (jnp.arange(T) == t)[None, :, None]
            return jnp.where(here_1T1, logits(model, *at) ** 2, 0).sum()

        moved = jax.jit(lambda t: jnp.abs(jax.grad(change)(model, t).embed_VD[...]).sum(-1))
        moved_TV = np.stack([np.asarray(moved(t)) for t in range(T)])
    place_T, document_T = position_BT[0], segment_BT[0]
    ago = place_T[:, None] - place_T[None]
    see = (ago >= 0) & (document_T[:, None] == document_T[None]) & (ago < (c.attention.window or T))
    np.testing.assert_array_equal(moved_TV[:, :T] > 0, see)
    assert not moved_TV[:, T:].any()


def test_dropout_is_the_same_on_every_mesh_and_off_without_a_key():
    c = dataclasses.replace(VARIANTS['softmax experts'], dropout=0.3)
    batch = reference.packed_batch(c.vocabulary, B=8, T=8)
    losses, plain = [], []
    for mesh in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)):
        with jax.set_mesh(make_mesh(mesh)):
            model, at = filled(c), place(batch)
            run = jax.jit(loss_fn)
            losses.append([float(run(model, at, jax.random.key(i))[0]) for i in range(2)])
            plain.append(float(run(model, at)[0]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-5)
    assert len({round(value, 4) for value in (*losses[0], plain[0])}) == 3, 'two keys and none give three losses'


def test_bfloat16_computes_narrow_and_keeps_wide_parameters():
    c = VARIANTS['softmax experts']
    batch = reference.packed_batch(c.vocabulary, B=4, T=12)
    with jax.set_mesh(make_mesh(MeshConfig(expert=2, tensor=2))):
        model, at = filled(c, ComputeConfig(dtype='bfloat16')), place(batch)
        (narrow, _), gradient = jax.jit(loss_and_gradient)(model, at)
        assert {leaf.dtype for leaf in jax.tree.leaves((model, gradient))} == {jnp.dtype('float32')}
        traced = str(jax.make_jaxpr(loss_fn)(model, at))
        assert 'bf16[' in traced
        w = reference.weights(model)
    with jax.numpy_rank_promotion('allow'):
        want, _ = reference.loss(w, batch, c)
    np.testing.assert_allclose(narrow, want, rtol=2e-2)
