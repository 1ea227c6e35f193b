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
from weft.model.config import EncoderConfig, MLAConfig, ModelConfig, MoEConfig
from weft.model.ops import expert_dispatch as dispatch
from weft.planner import communication, traffic
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load

CONFIGS = Path(__file__).parents[2] / 'configs/models'
BATCH, LENGTH = 8, 32
PROMPTS = 16, 5  # tokens: with a sequence that `tensor` splits, and one that it may not
SCALARS = 400  # bytes: of the loss's sums and the gradient's norm, which are not counted

DENSE = ModelConfig(vocabulary=300, layers=4, model_dim=64, heads=8, kv_heads=4, mlp_dim=48)
EXPERTS = dataclasses.replace(
    DENSE,
    layers=3,
    dtype='bfloat16',
    moe=MoEConfig(experts=8, mlp_dim=32, shared_experts=1, first_dense_layers=1, bias_update_rate=0.001),
)
BIASED = MoEConfig(experts=4, mlp_dim=16, router_bias=True, bias=True, pattern=(True, False))
GATED = dataclasses.replace(EXPERTS.moe, shared_gate=True, shared_mlp_dim=24)
LATENT = MLAConfig(q_rank=16, kv_rank=16, plain_dim=8, rotary_dim=4, value_dim=16)
LARGE = dataclasses.replace(DENSE, vocabulary=8192, layers=2, model_dim=512, mlp_dim=1024, dtype='bfloat16')


class Case(NamedTuple):
    """A model on a mesh, the fields of it that differ from the base, and fields of TrainingConfig."""

    base: ModelConfig
    fields: dict
    mesh: MeshConfig
    training: dict = {}  # noqa: RUF012
    length: int = LENGTH


def sent(way: str) -> dict:
    return {'moe': dataclasses.replace(EXPERTS.moe, dispatch=way)}


LAYERNORM = {'norm': 'layernorm', 'norm_order': 'post', 'bias': True, 'activation': 'gelu'}
LEARNED = {'positions': 'learned', 'max_positions': 64, 'segment_kinds': 2, 'embedding_norm': True}
MLA = {'kv_heads': None, 'head_dim': None, 'latent': LATENT}
CASES = {
    'dots, ring': Case(DENSE, {'remat': 'dots'}, MeshConfig(data=2, context=2, tensor=2)),
    'one kv head for several devices': Case(
        DENSE,
        {'qk_norm': 'full', 'qkv_bias': True, 'attention_sinks': True, 'o_bias': True, 'norm_order': 'sandwich'},
        MeshConfig(tensor=8),
    ),
    'norms after, tables': Case(DENSE, {'remat': 'block', **LAYERNORM, **LEARNED}, MeshConfig(data=2, tensor=4)),
    'windows, replicas, parts': Case(
        DENSE,
        {'layers': 5, 'window': 8, 'window_pattern': (True, False), 'remat': 'block', 'qk_norm': True},
        MeshConfig(replica=2, data=2, tensor=2),
        {'accumulation': 2},
    ),
    'pipeline': Case(
        DENSE,
        {'remat': 'block', 'tied_embedding': False},
        MeshConfig(stage=2, context=2, tensor=2),
        {'accumulation': 2},
    ),
    'pipeline of experts, one ahead': Case(
        EXPERTS, {'layers': 5, 'mtp_layers': 1}, MeshConfig(stage=2, data=2, tensor=2)
    ),
    'experts gathered, a gate': Case(EXPERTS, {'remat': 'block', 'moe': GATED}, MeshConfig(data=2, expert=2, tensor=2)),
    'experts gathered, dots, norms of outputs': Case(
        EXPERTS, {'remat': 'dots', 'norm_order': 'output'}, MeshConfig(context=2, expert=2, tensor=2)
    ),
    'experts all_to_all': Case(EXPERTS, {'remat': 'block', **sent('all_to_all')}, MeshConfig(expert=4, tensor=2)),
    'experts ragged': Case(EXPERTS, {'remat': 'block', **sent('ragged')}, MeshConfig(data=2, expert=2, tensor=2)),
    'experts with biases': Case(
        EXPERTS, {'layers': 4, 'moe': BIASED, 'remat': 'block'}, MeshConfig(data=2, expert=2, tensor=2)
    ),
    'latent, two ahead': Case(
        EXPERTS,
        {**MLA, 'mtp_layers': 2, 'remat': 'block', 'tied_embedding': False, 'weight_dtype': 'bfloat16'},
        MeshConfig(data=2, expert=2, tensor=2),
    ),
    'latent, ring': Case(DENSE, {**MLA, 'qkv_bias': True, 'remat': 'block'}, MeshConfig(context=4, tensor=2)),
    'reference ring': Case(DENSE, {'attention': 'reference', 'remat': 'block'}, MeshConfig(context=4, tensor=2)),
    'encoder': Case(
        DENSE,
        {'encoder': EncoderConfig(layers=3, mlp_dim=32), 'positions': 'relative', 'remat': 'block'},
        MeshConfig(data=2, tensor=4),
    ),
    'chunks of the loss': Case(
        LARGE, {'remat': 'block', 'attention': 'reference'}, MeshConfig(data=4, tensor=2), length=2048
    ),
    'rings in tiles': Case(LARGE, {'attention': 'blockwise'}, MeshConfig(context=4, tensor=2), length=2048),
}


@pytest.mark.parametrize('name', CASES)
def test_steps_ask_for_what_their_shapes_say(name, monkeypatch):
    base, fields, mesh, training, length = CASES[name]
    c = dataclasses.replace(base, **fields)
    run = run_config(c, mesh, BATCH, length, **training)
    run.check_sizes()
    monkeypatch.setattr(dispatch, 'platform', lambda: 'tpu')  # a CPU's `ragged` gathers
    with jax.set_mesh(make_mesh(mesh)):
        step, (state, batch) = training_step(run)
        if c.encoder:
            batch = batch._replace(source=Source(*batch[:1] * 3))
        parts = run.training.accumulation, run.microbatches
        same(jax.make_jaxpr(step)(state, batch), communication.training(c, mesh, BATCH, length, *parts))
        if mesh.stage > 1 or length != LENGTH:
            return
        step, (model, cache, *one) = decode_step(run)
        if c.encoder:
            here = lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
            )
            source = jax.eval_shape(encode, model, rows(BATCH, 16), rows(BATCH))
            cache = cache._replace(source=jax.tree.map(here, source))
        same(jax.make_jaxpr(step)(model, cache, *one), communication.decoding(c, mesh, BATCH))
        for tokens in PROMPTS:
            traced = jax.make_jaxpr(prefill)(model, cache, rows(BATCH, tokens), rows(BATCH))
            same(traced, communication.prefill(c, mesh, BATCH, tokens))


def same(traced, counted: traffic.Traffic) -> None:
    """Every row is exact; those of sums, but for scalars, which are not counted."""
    found = traffic.asked(traced, mesh_shape())
    assert not found.unknown
    for key in found.sent.keys() | counted.sent.keys():
        asked, want = found.sent.get(key, traffic.Sent(0, 0)), counted.sent.get(key, traffic.Sent(0, 0))
        if key[0] in ('psum', 'reduce'):
            assert 0 <= asked.bytes - want.bytes < SCALARS, (key, asked, want)
        else:
            assert asked == want, key


def test_what_is_not_done_is_not_counted():
    both_ways = dataclasses.replace(DENSE, causal=False)
    with pytest.raises(ValueError, match=r'model\.causal is false'):
        communication.training(both_ways, MeshConfig(), 8, 32)
    with pytest.raises(ValueError, match=r'model\.causal is false'):
        communication.decoding(both_ways, MeshConfig(), 8)
    with pytest.raises(ValueError, match=r'mesh\.stage is 2.*mesh\.data=2'):
        communication.decoding(DENSE, MeshConfig(stage=2), 8)


@pytest.mark.parametrize('name', ['llama-3.1-405b', 'deepseek-v3'])
def test_a_count_takes_no_time_whatever_the_depth(name):
    c, mesh = load(CONFIGS / f'{name}.yaml').model, MeshConfig(data=8, expert=8, tensor=8)
    communication.training(c, mesh, 512, 4096)
    start = time.process_time()
    for _ in range(20):
        communication.training(c, mesh, 512, 4096)
        communication.decoding(c, mesh, 512)
    assert (time.process_time() - start) / 20 < 0.02
