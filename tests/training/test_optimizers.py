"""Optimizers by kind: alike on every mesh, back from a checkpoint as they were, counted by the plan; and a user's mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from tests.extending import harness
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.decoder import init_decoder
from weft.model.parameters import Role
from weft.runtime.errors import UserError
from weft.sharding.mesh import FSDP, MeshConfig, make_mesh
from weft.training.config import dump, parse
from weft.training.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, Shard, register, roles

MODEL = ModelConfig(
    vocabulary=harness.VOCABULARY,
    layers=3,
    model_dim=16,
    attention=AttentionConfig(heads=4),
    mlp=MLPConfig(dim=32),
    embedding=EmbeddingConfig(tied=False),
    moe=MoEConfig(experts=4, mlp_dim=8, first_dense_layers=1),
)
KINDS = [kind(learning_rate=1e-2, warmup_steps=0) for kind in (AdamW, Lion, Adafactor, Muon)]
BASE = """
name: tiny
model: {layers: 2, model_dim: 64, attention: {heads: 4}, mlp: {dim: 128}}
training: {steps: 2, batch: 4, sequence_length: 64}
"""


# Shape, layout and role of what a model has: layers' matrices, their experts, scales; an embedding.
WEIGHTS = {
    'layers': ((2, 16, 24), P(None, FSDP, 'tensor'), Role.MATRIX),
    'experts': ((2, 4, 16, 8), P(None, 'expert', ('data', 'context'), 'tensor'), Role.EXPERT),
    'scales': ((2, 16), P(), Role.SCALE),
    'embedding': ((40, 16), P(FSDP, 'tensor'), Role.EMBEDDING),
}


def updated(config: OptimizerConfig, mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Weights after three updates by gradients that are the same on every mesh."""
    r = np.random.default_rng(0)
    optimizer = config.build(4, {name: role for name, (_, _, role) in WEIGHTS.items()})
    with jax.set_mesh(make_mesh(mesh)):
        draw = lambda: {name: jax.device_put(r.normal(size=size), spec) for name, (size, spec, _) in WEIGHTS.items()}
        weights = draw()
        before = state = jax.jit(optimizer.init)(weights)
        for _ in range(3):
            updates, state = jax.jit(optimizer.update)(draw(), state, weights)
            weights = optax.apply_updates(weights, updates)
        harness.check_layouts(state, before)
        return jax.device_get(weights)


@pytest.mark.parametrize('optimizer', KINDS, ids=lambda config: config.kind)
def test_it_is_alike_on_every_mesh(optimizer, float64):
    wanted = updated(optimizer, MeshConfig())
    for mesh in harness.MESHES:
        for name, array in updated(optimizer, mesh).items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-9, atol=1e-11, err_msg=f'{name} on {mesh}')


@pytest.mark.parametrize('optimizer', KINDS, ids=lambda config: config.kind)
def test_it_is_saved_and_counted(optimizer, tmp_path):
    run = harness.run_of(MODEL, optimizer=optimizer)
    harness.check_checkpoint(run, tmp_path / 'run')
    harness.check_plan(run)


def test_what_is_said_of_the_state_is_what_tracing_counts():
    shards = [
        Shard((6, 4), 'float32', Role.MATRIX),
        Shard((3, 6, 4), 'bfloat16', Role.MATRIX),
        Shard((8, 2), 'float32', Role.EMBEDDING),
    ]
    for config in KINDS:
        for shard in (*shards, Shard((7,), 'float32', Role.SCALE)):
            assert config.state_bytes(shard) == OptimizerConfig.state_bytes(config, shard)


def test_each_weight_has_the_role_that_its_layer_declares():
    with jax.set_mesh(make_mesh(MeshConfig())):
        found = roles(jax.eval_shape(lambda: init_decoder(MODEL, ComputeConfig(), jax.random.key(0))))
    assert jax.tree.leaves(found.embed_VD) == [Role.EMBEDDING]
    assert jax.tree.leaves(found.head_DV) == [Role.HEAD]
    assert jax.tree.leaves(found.groups[1].mlp.router) == [Role.ROUTER]
    assert set(jax.tree.leaves(found.groups[1].mlp)) == {Role.ROUTER, Role.EXPERT}
    assert set(jax.tree.leaves(found.groups[0])) == {Role.MATRIX, Role.SCALE}
    assert not any(role.decays for role in jax.tree.leaves(found.norm))


def test_adafactor_is_optax_for_one_matrix_and_one_vector(float64):
    """Its rows and columns are those of each matrix of a stack, where `optax.adafactor` sees the stack's two largest dims."""
    r = np.random.default_rng(0)
    weights = {'one': r.normal(size=(6, 9)), 'vector': r.normal(size=7)}
    weight_roles = {'one': Role.MATRIX, 'vector': Role.VECTOR}
    config = Adafactor(warmup_steps=0, weight_decay=0, grad_clip=None, final_learning_rate_ratio=1.0)
    theirs = optax.adafactor(config.learning_rate, min_dim_size_to_factor=1, multiply_by_parameter_scale=True)
    ours = config.build(4, weight_roles)
    stack = {'stack': np.stack([weights['one'], weights['one'] * 3])}
    stacked = config.build(4, {'stack': Role.MATRIX})
    states = theirs.init(weights), ours.init(weights), stacked.init(stack)
    for _ in range(3):
        gradient = jax.tree.map(lambda w: r.normal(size=w.shape), weights)
        wanted, a = theirs.update(gradient, states[0], weights)
        found, b = ours.update(gradient, states[1], weights)
        of_stack, c = stacked.update({'stack': np.stack([gradient['one'], gradient['one'] * 5])}, states[2], stack)
        states = a, b, c
        for name in weights:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)  # optax counts in float32
        np.testing.assert_allclose(of_stack['stack'], np.stack([found['one'], found['one'] * 3]), rtol=1e-12)
        weights = optax.apply_updates(weights, found)
        stack = optax.apply_updates(stack, of_stack)


def test_muon_makes_each_matrix_of_a_stack_orthogonal():
    r = np.random.default_rng(0)
    weights = {'stack': jnp.asarray(r.normal(size=(2, 3, 8, 12)), jnp.float32), 'table': jnp.ones((4, 4))}
    optimizer = Muon(warmup_steps=0, weight_decay=0, learning_rate=1.0, grad_clip=None).build(
        2, {'stack': Role.EXPERT, 'table': Role.HEAD}
    )
    with jax.set_mesh(make_mesh(MeshConfig())):
        weights = jax.device_put(weights, P())
        updates, _ = jax.jit(optimizer.update)(weights, jax.jit(optimizer.init)(weights), weights)
    values = np.linalg.svd(np.asarray(updates['stack']) / (0.2 * 12**0.5), compute_uv=False)
    assert values.shape == (2, 3, 8)
    assert values.min() > 0.5
    assert values.max() < 1.5
    np.testing.assert_allclose(updates['table'], -1, rtol=1e-5)  # AdamW's first step is the gradient's sign


def test_a_config_names_the_kind_and_its_fields():
    assert parse(BASE, 'a.yaml').optimizer == AdamW()
    lion = parse(
        BASE + 'optimizer: {kind: lion, beta2: 0.95}\n', 'a.yaml', ['optimizer.beta1=0.8', 'optimizer.grad_clip=null']
    )
    assert lion.optimizer == Lion(beta1=0.8, beta2=0.95, grad_clip=None)
    muon = parse(BASE, 'a.yaml', ['optimizer.momentum=0.9', 'optimizer.kind=muon'])
    assert muon.optimizer == Muon(momentum=0.9)
    for config in (lion, muon):
        assert parse(dump(config), 'b.yaml') == config
        assert hash(config.optimizer) == hash(parse(dump(config), 'b.yaml').optimizer)


MISTAKES = {
    'optimizer.kind=adamm': ["optimizer.kind is 'adamm': no such kind; did you mean 'adamw'?"],
    'optimizer.kind=7': ["optimizer.kind is '7'", 'known: adafactor, adamw, lion, muon'],
    'optimizer={kind: [1]}': ['optimizer.kind', 'no such kind'],
    'optimizer=adamw': ['optimizer is "adamw": it must be a mapping of keys to values'],
    'optimizer=null': ['optimizer is null: it must be a mapping'],
    'optimizer={kind: lion, epsilon: 1}': ["no key 'optimizer.epsilon'"],
    'optimizer.momentum=0.9': ["no key 'optimizer.momentum'; known: optimizer.beta1"],
    'optimizer.beta=0.9': ["no key 'optimizer.beta'; did you mean 'optimizer.beta"],
    'optimizer.beta1=one': ['optimizer.beta1 is "one": it must be a valid number'],
    'optimizer.beta1=1': ['optimizer.beta1 is 1.0: it must be at least 0 and less than 1'],
    'optimizer.epsilon=-1': ['optimizer.epsilon is -1.0: it must be at least 0'],
    'optimizer.grad_clip=0': ['optimizer.grad_clip is 0.0: it must be above 0; null turns clipping off'],
    'training.learning_rate=1': ["no key 'training.learning_rate'; did you mean 'optimizer.learning_rate'?"],
    'training.final_learning_rate=1': ["did you mean 'optimizer.final_learning_rate_ratio'?"],
    'training.clip=1': ["did you mean 'optimizer.grad_clip'?"],
    'training.optimizer=muon': ["did you mean 'optimizer'?"],
}


@pytest.mark.parametrize('override', MISTAKES)
def test_a_mistake_is_named(override):
    with pytest.raises(UserError) as caught:
        parse(BASE, 'a.yaml', [override])
    assert all(words in str(caught.value) for words in MISTAKES[override]), str(caught.value)


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match=r"optimizer\.kind 'lion' is weft\.training\.optimizers\.Lion already"):

        @register
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Another(OptimizerConfig):
            kind: str = 'lion'

    assert register(Lion) is Lion, 'a module may be imported anew'
