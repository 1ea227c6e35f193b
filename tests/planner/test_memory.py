"""What a device needs by formula: the arguments are exactly those of the real steps, the rest is held to compiled programs."""

import dataclasses
import math
import time
from collections import Counter
from pathlib import Path

import jax
import pytest

from tests.families.cases import CASES, family
from tests.families.loading import read
from tests.planner.steps import decode_step, run_config, training_step
from weft.inference.run import in_compute_dtype
from weft.model.batch import Source
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.decoder import init_decoder
from weft.planner.memory import serving_memory, training_memory
from weft.planner.weights import inventory
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs/models'


@pytest.mark.parametrize('name', {family(name): name for name in CASES}.values())  # the last one of each
def test_weights_are_those_that_the_model_declares(name):
    """Shapes and the axes that split them, as many as there are layers."""
    _, c = read(CASES[name])
    jax.config.update('jax_remove_size_one_mesh_axis_from_type', False)  # the axes that are declared, on one device too
    try:
        with jax.set_mesh(make_mesh(MeshConfig())):
            model = jax.eval_shape(lambda key: init_decoder(c, DEFAULT, key), jax.random.key(0))
    finally:
        jax.config.update('jax_remove_size_one_mesh_axis_from_type', True)
    declared, counted = Counter(), Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        names = [getattr(part, 'name', getattr(part, 'key', '')) for part in path]
        stacked = 'groups' in names or 'mtp' in names
        axes = {axis for axes in leaf.sharding.spec if axes for axis in (axes if isinstance(axes, tuple) else (axes,))}
        # An encoder–decoder has no pipeline, wherever its layers' types say so.
        axes -= {'stage'} if c.encoder else set()
        shape = leaf.shape[1:] if stacked else leaf.shape
        declared[shape, frozenset(axes)] += leaf.shape[0] if stacked else 1
    found = inventory(c)
    for layers, where, weights in (
        (1, '', found.outside),
        *((group.layers, group.where, group.weights) for group in found.groups),
    ):
        for weight in weights:
            axes = {*weight.split, *(['stage'] if where == 'pipeline' and not c.encoder else [])}
            counted[tuple(map(int, weight.declared.shape)), frozenset(axes)] += layers
    assert counted == declared


DENSE = ModelConfig(
    vocabulary=300,
    layers=4,
    model_dim=32,
    attention=AttentionConfig(heads=8, kv_heads=4),
    mlp=MLPConfig(dim=48),
)
MIXED = dataclasses.replace(
    DENSE,
    moe=MoEConfig(experts=8, mlp_dim=16, shared_experts=1, first_dense_layers=1, bias_update_rate=0.001),
)
LATENT = changed(
    MIXED,
    {
        'layers': 5,
        'attention': MLAConfig(
            heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        'mtp.layers': 1,
        'embedding.tied': False,
    },
)
NARROW = ComputeConfig(dtype='bfloat16')
NARROW_WEIGHTS = ComputeConfig(dtype='bfloat16', weight_dtype='bfloat16')
ARGUMENTS = [
    (DENSE, DEFAULT, MeshConfig(data=2, stage=2, tensor=2)),
    (
        changed(DENSE, {'positions.kind': 'learned', 'positions.max': 64}),
        DEFAULT,
        MeshConfig(data=2, context=2, tensor=2),
    ),
    (
        changed(DENSE, {'attention.window': 5, 'attention.window_pattern': (True, False)}),
        DEFAULT,
        MeshConfig(context=4, tensor=2),
    ),
    (MIXED, NARROW, MeshConfig(replica=2, expert=2, tensor=2)),
    (LATENT, NARROW_WEIGHTS, MeshConfig(data=2, expert=2, tensor=2)),
    (LATENT, NARROW_WEIGHTS, MeshConfig(stage=2, data=2, expert=2)),
    (read(CASES['t5-v1.1'])[1], DEFAULT, MeshConfig(data=4, tensor=2)),
]


def on_a_device(tree) -> int:
    """Bytes of one device's shards of all arrays."""
    sizes = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (8 if 'key' in str(leaf.dtype) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(sizes)


@pytest.mark.parametrize(('model', 'compute', 'mesh'), ARGUMENTS, ids=[str(mesh) for *_, mesh in ARGUMENTS])
def test_arguments_are_those_of_the_real_steps(model, compute, mesh):
    config = run_config(model, mesh, 8, 32, compute)
    with jax.set_mesh(make_mesh(mesh)):
        _, (state, batch) = training_step(config)
        if model.encoder:
            batch = batch._replace(source=Source(*batch[:1] * 3))
        memory = training_memory(config)
        assert memory.parameters == on_a_device(state.model)
        assert memory.optimizer + memory.parameters == on_a_device(state)
        assert memory.batch == on_a_device(batch)
        if mesh.stage == 1 and not model.encoder:
            _, (model_, cache, *rest) = decode_step(config)
            model_ = jax.eval_shape(in_compute_dtype, model_)
            memory = serving_memory(model, compute, mesh, 8, 16, platform='cpu')
            assert memory.parameters == on_a_device(model_)
            assert memory.cache == on_a_device(cache)
            assert memory.batch == on_a_device(rest)


def test_an_estimate_takes_no_time_whatever_the_depth():
    run = load_config(CONFIGS / 'llama-3.1-405b.yaml')
    training_memory(run)
    start = time.process_time()
    for _ in range(200):
        training_memory(run)
    assert (time.process_time() - start) / 200 < 2e-3
