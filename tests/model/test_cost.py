"""Counts by formula equal counts by shapes: parameters of the built model. FLOPs: tests/planner/test_flops.py."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from weft.model import cost
from weft.model.compute import DEFAULT
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.decoder import init_decoder
from weft.model.kv_cache import CacheSize
from weft.model.stack import declared_cache
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

ROOT = Path(__file__).parents[2]

DENSE = ModelConfig(
    vocabulary=256,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=4, kv_heads=2),
    mlp=MLPConfig(dim=48),
)
CONFIGS = [
    DENSE,
    changed(
        DENSE,
        {
            'norm.kind': 'layernorm',
            'attention.o_bias': True,
            'mlp.bias': True,
            'norm.bias': True,
            'attention.qkv_bias': True,
            'mlp.activation': 'gelu',
            'embedding.tied': False,
        },
    ),
    changed(
        DENSE,
        {
            'layers': 3,
            'attention.qk_norm': True,
            'moe': MoEConfig(
                experts=8, mlp_dim=16, top_k=2, shared_experts=1, first_dense_layers=1, bias_update_rate=0.001
            ),
        },
    ),
]
BIASES = {'attention.o_bias': True, 'mlp.bias': True, 'norm.bias': True}
LATENT = MLAConfig(heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
GATED = MoEConfig(experts=4, mlp_dim=16, shared_experts=2, shared_mlp_dim=10, shared_gate=True)
BIASED = MoEConfig(experts=4, mlp_dim=16, shared_experts=2, router_bias=True, bias=True, pattern=(False, True))
OPTIONS: list[dict[str, Any]] = [
    {
        'norm.kind': 'layernorm',
        'norm.order': 'post',
        'attention.o_bias': True,
        'mlp.bias': True,
        'norm.bias': True,
        'positions.kind': 'learned',
        'positions.max': 40,
    },
    {'norm.kind': 'layernorm', 'mlp.bias': True, 'attention.o_bias': True, 'embedding.tied': False},
    {'norm.order': 'sandwich', 'attention.qk_norm': 'full', 'attention.head_dim': 10, 'attention.sinks': True},
    {
        'attention': LATENT,
        'attention.qkv_bias': True,
        'attention.o_bias': True,
    },
    {'attention': dataclasses.replace(LATENT, q_lora_rank=None)},
    {'moe': BIASED, 'mlp.bias': True, 'mlp.activation': 'relu'},
    {'moe': BIASED, 'attention.o_bias': True, 'mlp.bias': True, 'attention.qkv_bias': True},
    {'moe': GATED, 'norm.order': 'output', 'head': None, 'embedding.tied': False, 'positions.pattern': (True, False)},
]


@pytest.mark.parametrize('c', CONFIGS + [changed(DENSE, o) for o in OPTIONS])
def test_parameters_are_those_of_the_built_model(c):
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = jax.eval_shape(lambda: init_decoder(c, DEFAULT, jax.random.key(0)))
    assert sum(cost.parameters(c).values()) == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_keys_seen_is_the_mean_of_the_mask():
    for window, T in ((None, 7), (3, 7), (1, 7), (9, 7)):
        c = changed(DENSE, {'attention.window': window})
        ago = np.arange(T)[:, None] - np.arange(T)[None]
        assert math.isclose(cost.keys_seen(c, T), ((ago >= 0) & (ago < (window or T))).sum() / T)


def test_a_token_visits_its_experts_only():
    c = CONFIGS[2]
    one = 3 * c.model_dim * c.moe.mlp_dim
    assert cost.active_parameters(c) == sum(cost.parameters(c).values()) - 2 * (c.moe.experts - c.moe.top_k) * one
    assert cost.forward_flops(c, 1)['experts'] == 2 * 2 * (c.moe.top_k + 1) * one
    assert math.isclose(cost.decode_bytes(c, 1, 0, 4, 4), 4 * (cost.active_parameters(c))), (
        'one row reads exactly the experts that it visits'
    )


@pytest.mark.parametrize(
    ('name', 'tensor', 'numbers', 'on_tpu'),
    [
        ('deepseek-v3', 4, (576,), (640,)),
        ('gpt-oss-120b', 1, (512, 512), (512, 512)),
        ('gpt-oss-120b', 8, (64, 64), (128, 128)),
        ('gpt-oss-120b', 16, (64, 64), (128, 128)),  # more devices than heads
        ('llama-3.1-8b', 8, (128, 128), (128, 128)),
    ],
)
def test_a_cache_is_filled_up_for_tpus_alone(name, tensor, numbers, on_tpu):
    c = load_config(ROOT / f'configs/models/{name}.yaml').model

    def kept(platform: str) -> set[tuple[int, ...]]:
        """Numbers of a slot on one device of `tensor`, of each array."""
        size = CacheSize(rows=1, length=1, tensor=tensor, platform=platform)
        return {tuple(array.shape[-1] // tensor for array in group.arrays) for group in declared_cache(c, size)}

    assert [kept(platform) for platform in ('cpu', 'gpu', 'tpu')] == [{numbers}, {numbers}, {on_tpu}]


def test_cache_is_two_vectors_a_head_and_layer():
    assert cost.cache_numbers_per_token(DENSE) == 2 * 2 * 2 * 8
    assert cost.state_bytes(DENSE) == 0


def test_a_window_of_one_token_is_no_state():
    c = changed(DENSE, {'attention.window': 1, 'attention.window_pattern': (True, False)})
    assert (cost.cache_numbers_per_token(c), cost.state_bytes(c)) == (cost.cache_numbers_per_token(DENSE), 0)
