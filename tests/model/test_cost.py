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
from weft.model.config import MLAConfig, ModelConfig, MoEConfig
from weft.model.decoder import init_decoder
from weft.model.kv_cache import CacheSize
from weft.model.stack import stacked_caches
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load

ROOT = Path(__file__).parents[2]

DENSE = ModelConfig(vocabulary=256, layers=2, model_dim=32, heads=4, kv_heads=2, mlp_dim=48)
CONFIGS = [
    DENSE,
    dataclasses.replace(DENSE, norm='layernorm', bias=True, qkv_bias=True, activation='gelu', tied_embedding=False),
    dataclasses.replace(
        DENSE,
        layers=3,
        qk_norm=True,
        moe=MoEConfig(experts=8, mlp_dim=16, top_k=2, shared_experts=1, first_dense_layers=1, bias_update_rate=0.001),
    ),
]
LATENT = MLAConfig(q_rank=12, kv_rank=8, plain_dim=6, rotary_dim=4, value_dim=10)
GATED = MoEConfig(experts=4, mlp_dim=16, shared_experts=2, shared_mlp_dim=10, shared_gate=True)
BIASED = MoEConfig(experts=4, mlp_dim=16, shared_experts=2, router_bias=True, bias=True, pattern=(False, True))
OPTIONS: list[dict[str, Any]] = [
    {'norm': 'layernorm', 'norm_order': 'post', 'bias': True, 'positions': 'learned', 'max_positions': 40},
    {'norm': 'layernorm', 'mlp_bias': True, 'o_bias': True, 'tied_embedding': False},
    {'norm_order': 'sandwich', 'qk_norm': 'full', 'head_dim': 10, 'attention_sinks': True},
    {'kv_heads': 4, 'head_dim': None, 'latent': LATENT, 'qkv_bias': True, 'o_bias': True},
    {'kv_heads': 4, 'head_dim': None, 'latent': dataclasses.replace(LATENT, q_rank=None)},
    {'moe': BIASED, 'mlp_bias': True, 'activation': 'relu'},
    {'moe': BIASED, 'bias': True, 'qkv_bias': True},
    {'moe': GATED, 'norm_order': 'output', 'head': False, 'tied_embedding': False, 'rotary_pattern': (True, False)},
]


@pytest.mark.parametrize('c', CONFIGS + [dataclasses.replace(DENSE, **o) for o in OPTIONS])
def test_parameters_are_those_of_the_built_model(c):
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = jax.eval_shape(lambda: init_decoder(c, DEFAULT, jax.random.key(0)))
    assert sum(cost.parameters(c).values()) == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_keys_seen_is_the_mean_of_the_mask():
    for window, T in ((None, 7), (3, 7), (1, 7), (9, 7)):
        c = dataclasses.replace(DENSE, window=window)
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
    c = load(ROOT / f'configs/models/{name}.yaml').model

    def kept(platform: str) -> set[tuple[int, ...]]:
        """Numbers of a slot on one device of `tensor`, of each array."""
        size = CacheSize(rows=1, length=1, tensor=tensor, platform=platform)
        return {tuple(array.shape[-1] // tensor for array in group.arrays) for group in stacked_caches(c, size)}

    assert [kept(platform) for platform in ('cpu', 'gpu', 'tpu')] == [{numbers}, {numbers}, {on_tpu}]


def test_cache_is_two_vectors_a_head_and_layer():
    assert cost.cache_bytes_per_token(DENSE, 2) == 2 * 2 * 2 * 8 * 2
