"""What programs for one device are made of: nothing is sent, and a decoding step moves no parameter before it is used.

The programs are compiled from shapes alone, with the optimisations that users have, and read as text.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import NamedSharding

from tests.hlo import MOVED, SENT, instructions
from tests.planner.steps import run_config, training_step
from weft.inference.step import decode, empty_cache, prefill
from weft.inference.unstacked import kinds, unstacked
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.training.state import abstract_model

# Every weight that multiplies has 64 KiB or more, and nothing else in a decoding step has: neither activations nor the cache.
LARGE = 2**16
DENSE = ModelConfig(
    vocabulary=512,
    layers=2,
    model_dim=128,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=64),
    mlp=MLPConfig(dim=192),
)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(experts=4, mlp_dim=128))
MODELS = {
    'tied': DENSE,
    'untied, biases, learned positions': changed(
        DENSE,
        {
            'embedding.tied': False,
            'attention.o_bias': True,
            'mlp.bias': True,
            'norm.bias': True,
            'attention.qkv_bias': True,
            'norm.kind': 'layernorm',
            'mlp.activation': 'gelu',
            'positions.kind': 'learned',
            'positions.max': 512,
        },
    ),
    'sandwich, soft caps, windows': changed(
        DENSE,
        {
            'norm.order': 'sandwich',
            'attention.softcap': 50.0,
            'head.softcap': 30.0,
            'attention.window': 8,
            'attention.qk_norm': True,
        },
    ),
    'experts': EXPERTS,
    'experts with biases and sinks': changed(
        EXPERTS,
        {
            'attention.sinks': True,
            'moe': dataclasses.replace(EXPERTS.moe, bias=True, router_bias=True),
        },
    ),
    'latent': dataclasses.replace(
        DENSE,
        attention=MLAConfig(heads=4, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64),
    ),
}
# What moves a parameter after all, and why: opcodes, and the shape of one expert or of the heads' part of a matrix.
EXCEPTIONS = {
    # An expert's weights are copied out of the stack of all, where few rows have few experts: the others are not read.
    'experts': (('dynamic-slice',), {(1, 128, 128)}),
    'experts with biases and sinks': (('dynamic-slice',), {(1, 128, 128)}),
    # Queries and outputs go to the latent space and back by heads, and one matrix has each head's columns for both.
    'latent': (('slice', 'transpose', 'copy'), {(128, 4, 64), (4, 64, 128), (4, 128, 64)}),
}


def decoding(c: ModelConfig, rows: int = 1, slots: int = 32):
    """A decoding step's function and the kinds of its arguments, as opening a run gives them; likewise for prompts."""
    mesh = jax.sharding.get_mesh()
    model = unstacked(abstract_model(run_config(c, MeshConfig(), 8, 32)), kinds)
    here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
    cache = jax.tree.map(here, jax.eval_shape(lambda model: empty_cache(model, rows, slots), model))
    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))
    return {
        'decode': (decode, (model, cache, numbers(rows), numbers(rows))),
        'prefill': (prefill, (model, cache, numbers(rows, slots), numbers(rows))),
    }


def compiled(step, arguments) -> str:
    return jax.jit(step, donate_argnums=1).lower(*arguments).compile().as_text()


@pytest.mark.parametrize('name', MODELS)
def test_decoding_moves_no_parameter(optimized, name):
    with jax.set_mesh(make_mesh(MeshConfig())):
        found = instructions(compiled(*decoding(MODELS[name])['decode']))
    assert sum(opcode == 'dot' for opcode, *_ in found) >= 2 * 6, 'the text is not what this test can read'
    moved = {(opcode, shape) for opcode, shape, size in found if opcode in MOVED and size >= LARGE}
    opcodes, shapes = EXCEPTIONS.get(name, ((), set()))
    left = [(opcode, shape) for opcode, shape in moved if opcode not in opcodes or shape not in shapes]
    assert not left
    assert not [opcode for opcode, *_ in found if opcode in SENT]


@pytest.mark.parametrize('part', ['train', 'prefill'])
@pytest.mark.parametrize('name', ['tied', 'experts'])
def test_one_device_sends_nothing(optimized, name, part):
    with jax.set_mesh(make_mesh(MeshConfig())):
        step, arguments = (
            training_step(run_config(MODELS[name], MeshConfig(), 8, 32))
            if part == 'train'
            else decoding(MODELS[name])[part]
        )
        sent = [opcode for opcode, *_ in instructions(compiled(step, arguments)) if opcode in SENT]
    assert not sent


def test_what_is_forbidden_is_seen(optimized):
    """A stack that is sliced, and a matrix that is turned, are found in the text."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        stacked = abstract_model(run_config(DENSE, MeshConfig(), 8, 32))
        _, (_, *rest) = decoding(DENSE)['decode']
        found = instructions(compiled(decode, (stacked, *rest)))
        assert any(opcode in MOVED and size >= LARGE for opcode, _, size in found)
        matrix = jax.ShapeDtypeStruct((128, 256), jnp.float32)
        turned = jax.jit(lambda w, x: (w.T + 0, x)).lower(matrix, matrix).compile().as_text()
        assert any(opcode in MOVED and size >= LARGE for opcode, _, size in instructions(turned))
