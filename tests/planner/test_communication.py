"""Counts of what is sent by the shapes alone equal, exactly, what the traced steps ask for."""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.sharding import NamedSharding

from tests.planner.steps import decode_step, mesh_shape, rows, run_config, training_step
from weft.inference.step import encode, prefill
from weft.model.batch import Source
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, EncoderConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.ops import expert_dispatch as dispatch
from weft.planner import communication
from weft.planner.traffic.tables import Sent, Traffic
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs/models'
BATCH, LENGTH = 8, 32
PROMPTS = 16, 5  # tokens: with a sequence that `tensor` splits, and one that it may not
SCALARS = 400  # bytes: of the loss's sums and the gradient's norm, which are not counted

DENSE = ModelConfig(
    vocabulary=300,
    layers=4,
    model_dim=64,
    attention=AttentionConfig(heads=8, kv_heads=4),
    mlp=MLPConfig(dim=48),
)
EXPERTS = dataclasses.replace(
    DENSE,
    layers=3,
    moe=MoEConfig(experts=8, mlp_dim=32, shared_experts=1, first_dense_layers=1, bias_update_rate=0.001),
)
BIASED = MoEConfig(experts=4, mlp_dim=16, router_bias=True, bias=True, pattern=(True, False))
GATED = dataclasses.replace(EXPERTS.moe, shared_gate=True, shared_mlp_dim=24)
LATENT = MLAConfig(heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=16)
LARGE = changed(DENSE, {'vocabulary': 8192, 'layers': 2, 'model_dim': 512, 'mlp.dim': 1024})


class Case(NamedTuple):
    """A model on a mesh, the fields of it that differ from the base, and fields of TrainingConfig."""

    base: ModelConfig
    fields: dict
    mesh: MeshConfig
    training: dict = {}  # noqa: RUF012
    length: int = LENGTH
    compute: ComputeConfig = DEFAULT


LAYERNORM = {
    'norm.kind': 'layernorm',
    'norm.order': 'post',
    'attention.o_bias': True,
    'mlp.bias': True,
    'norm.bias': True,
    'mlp.activation': 'gelu',
}
LEARNED = {'positions.kind': 'learned', 'positions.max': 64, 'embedding.token_types': 2, 'embedding.norm': True}
MLA = {'attention': LATENT}
BLOCK = ComputeConfig(remat='block')
NARROW = ComputeConfig(dtype='bfloat16')


def narrow(**fields) -> ComputeConfig:
    return dataclasses.replace(NARROW, **fields)


CASES = {
    'dots, ring': Case(DENSE, {}, MeshConfig(data=2, context=2, tensor=2), compute=ComputeConfig(remat='dots')),
    'one kv head for several devices': Case(
        DENSE,
        {
            'attention.qk_norm': 'full',
            'attention.qkv_bias': True,
            'attention.sinks': True,
            'attention.o_bias': True,
            'norm.order': 'sandwich',
        },
        MeshConfig(tensor=8),
    ),
    'norms after, tables': Case(DENSE, {**LAYERNORM, **LEARNED}, MeshConfig(data=2, tensor=4), compute=BLOCK),
    'windows, replicas, parts': Case(
        DENSE,
        {'layers': 5, 'attention.window': 8, 'attention.window_pattern': (True, False), 'attention.qk_norm': True},
        MeshConfig(replica=2, data=2, tensor=2),
        {'accumulation': 2},
        compute=BLOCK,
    ),
    'pipeline': Case(
        DENSE,
        {'embedding.tied': False},
        MeshConfig(stage=2, context=2, tensor=2),
        {'accumulation': 2},
        compute=BLOCK,
    ),
    'pipeline of experts, one ahead': Case(
        EXPERTS, {'layers': 5, 'mtp.layers': 1}, MeshConfig(stage=2, data=2, tensor=2), compute=NARROW
    ),
    'experts gathered, a gate': Case(
        EXPERTS, {'moe': GATED}, MeshConfig(data=2, expert=2, tensor=2), compute=narrow(remat='block')
    ),
    'experts gathered, dots, norms of outputs': Case(
        EXPERTS, {'norm.order': 'output'}, MeshConfig(context=2, expert=2, tensor=2), compute=narrow(remat='dots')
    ),
    'experts all_to_all': Case(
        EXPERTS, {}, MeshConfig(expert=4, tensor=2), compute=narrow(remat='block', dispatch='all_to_all')
    ),
    'experts ragged': Case(
        EXPERTS, {}, MeshConfig(data=2, expert=2, tensor=2), compute=narrow(remat='block', dispatch='ragged')
    ),
    'experts with biases': Case(
        EXPERTS,
        {'layers': 4, 'moe': BIASED},
        MeshConfig(data=2, expert=2, tensor=2),
        compute=narrow(remat='block'),
    ),
    'latent, two ahead': Case(
        EXPERTS,
        {**MLA, 'mtp.layers': 2, 'embedding.tied': False},
        MeshConfig(data=2, expert=2, tensor=2),
        compute=narrow(remat='block', weight_dtype='bfloat16'),
    ),
    'latent, ring': Case(DENSE, {**MLA, 'attention.qkv_bias': True}, MeshConfig(context=4, tensor=2), compute=BLOCK),
    'reference ring': Case(
        DENSE, {}, MeshConfig(context=4, tensor=2), compute=ComputeConfig(attention='reference', remat='block')
    ),
    'encoder': Case(
        DENSE,
        {'encoder': EncoderConfig(layers=3, mlp_dim=32), 'positions.kind': 'relative'},
        MeshConfig(data=2, tensor=4),
        compute=BLOCK,
    ),
    'chunks of the loss': Case(
        LARGE,
        {},
        MeshConfig(data=4, tensor=2),
        length=2048,
        compute=narrow(remat='block', attention='reference'),
    ),
    'rings in tiles': Case(
        LARGE, {}, MeshConfig(context=4, tensor=2), length=2048, compute=narrow(attention='blockwise')
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_steps_ask_for_what_their_shapes_say(name, monkeypatch):
    base, fields, mesh, training, length, compute = CASES[name]
    c = changed(base, fields)
    run = run_config(c, mesh, BATCH, length, compute, **training)
    run.check_sizes()
    monkeypatch.setattr(dispatch, 'platform', lambda: 'tpu')  # a CPU's `ragged` gathers
    with jax.set_mesh(make_mesh(mesh)):
        step, (state, batch) = training_step(run)
        if c.encoder:
            batch = batch._replace(source=Source(*batch[:1] * 3))
        parts = run.training.accumulation, run.microbatches
        same(jax.make_jaxpr(step)(state, batch), communication.training(c, compute, mesh, BATCH, length, *parts))
        if mesh.stage > 1 or length != LENGTH:
            return
        step, (model, cache, *one) = decode_step(run)
        if c.encoder:
            here = lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
            )
            source = jax.eval_shape(encode, model, rows(BATCH, 16), rows(BATCH))
            cache = cache._replace(source=jax.tree.map(here, source))
        same(jax.make_jaxpr(step)(model, cache, *one), communication.decoding(c, compute, mesh, BATCH))
        for tokens in PROMPTS:
            traced = jax.make_jaxpr(prefill)(model, cache, rows(BATCH, tokens), rows(BATCH))
            same(traced, communication.prefill(c, compute, mesh, BATCH, tokens))


def same(traced, counted: Traffic) -> None:
    """Every row is exact; those of sums, but for scalars, which are not counted."""
    found = jaxpr_traffic(traced, mesh_shape())
    assert not found.unknown
    for key in found.sent.keys() | counted.sent.keys():
        asked, want = found.sent.get(key, Sent(0, 0)), counted.sent.get(key, Sent(0, 0))
        if key[0] in ('psum', 'reduce'):
            assert 0 <= asked.bytes - want.bytes < SCALARS, (key, asked, want)
        else:
            assert asked == want, key


def test_what_is_not_done_is_not_counted():
    both_ways = dataclasses.replace(DENSE, causal=False)
    with pytest.raises(ValueError, match=r'model\.causal is false'):
        communication.training(both_ways, DEFAULT, MeshConfig(), 8, 32)
    with pytest.raises(ValueError, match=r'model\.causal is false'):
        communication.decoding(both_ways, DEFAULT, MeshConfig(), 8)
    with pytest.raises(ValueError, match=r'mesh\.stage is 2.*mesh\.data=2'):
        communication.decoding(DENSE, DEFAULT, MeshConfig(stage=2), 8)


@pytest.mark.parametrize('name', ['llama-3.1-405b', 'deepseek-v3'])
def test_a_count_takes_no_time_whatever_the_depth(name):
    run, mesh = load_config(CONFIGS / f'{name}.yaml'), MeshConfig(data=8, expert=8, tensor=8)
    c, compute = run.model, run.compute
    communication.training(c, compute, mesh, 512, 4096)
    start = time.process_time()
    for _ in range(20):
        communication.training(c, compute, mesh, 512, 4096)
        communication.decoding(c, compute, mesh, 512)
    assert (time.process_time() - start) / 20 < 0.02
