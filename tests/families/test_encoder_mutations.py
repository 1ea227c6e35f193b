"""That the proof of models with an encoder can fail: see tests/families/test_mutations.py."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import pytest

from tests.families.test_families import TOLERANCE
from tests.families.test_mutations import short, wrong_by
from weft.model.layers.positions import sinusoids
from weft.model.ops.attention.reference import relative_bucket

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ('bert-plain', {'causal': True}),
    ('bert-plain', {'mlp.activation': 'gelu'}),
    ('bert-plain', {'norm.epsilon': 1e-3}),
    ('bert-plain', {'embedding.norm': False}),
    ('bert-plain', {'head.mlp': False}),
    ('bert-plain', {'head.bias': False}),
    ('bert-plain', {'attention.qkv_bias': False}),
    ('bert-plain', {'embedding.token_types': 0}),
    ('bert-tanh-gelu-many-kinds', {'mlp.activation': 'gelu_exact'}),
    ('bert-relu-wide-epsilon', {'norm.epsilon': 1e-5}),
    ('bert-headless', {'causal': True}),
    ('bert-headless', {'norm.epsilon': 1e-3}),
    ('t5-v1.1', {'positions.max_distance': 64}),
    ('t5-v1.1', {'positions.buckets': 16}),
    ('t5-v1.1', {'mlp.activation': 'swiglu'}),
    ('t5-v1.1', {'attention.scale': None}),
    ('t5-v1.1', {'norm.epsilon': 1e-3}),
    ('t5-v1.1', {'positions.kind': 'none'}),
    ('t5-before-v1.1', {'head.scale': 1.0}),
    ('t5-exact-gelu', {'mlp.activation': 'gelu'}),
    ('marian-published', {'embedding.scale': 1.0}),
    ('marian-published', {'mlp.activation': 'gelu'}),
    ('marian-published', {'head.bias': False}),
    ('marian-published', {'positions.kind': 'none'}),
    ('marian-published', {'norm.epsilon': 1e-3}),
]
NAMES: list[tuple[str, dict[str, Any]]] = [
    (
        't5-v1.1',
        {
            'decoder.block.{i}.layer.1.EncDecAttention.k.weight': 'cross.v.w_IO',
            'decoder.block.{i}.layer.1.EncDecAttention.v.weight': 'cross.k.w_IO',
        },
    ),
    (
        't5-v1.1',
        {
            'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': 'relative_RN',
            'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': 'encoder.relative_RN',
        },
    ),
    (
        'marian-published',
        {
            'model.decoder.layers.{i}.encoder_attn_layer_norm.weight': 'attention_norm.scale_D',
            'model.decoder.layers.{i}.self_attn_layer_norm.weight': 'cross_norm.scale_D',
        },
    ),
]


def one_way(ahead, buckets, both_ways, most):
    """In place of buckets for both directions: those of one."""
    return relative_bucket(ahead, buckets, False, most)


def interleaved(c):
    """In place of sines and then cosines: in turns, as in the paper."""
    table_PD = sinusoids(c)
    return table_PD.reshape(len(table_PD), 2, -1).swapaxes(1, 2).reshape(table_PD.shape)


CODE: list[tuple[str, str, Callable]] = [
    ('t5-v1.1', 'weft.model.ops.attention.reference.relative_bucket', one_way),
    ('marian-published', 'weft.model.decoder.sinusoids', interleaved),
]


@pytest.mark.parametrize(('case', 'changes'), CONFIGS, ids=short)
def test_a_wrong_config_is_caught(case, changes):
    assert wrong_by(case, changes, {}) > TOLERANCE


@pytest.mark.parametrize(('case', 'names'), NAMES, ids=short)
def test_a_wrong_place_of_a_tensor_is_caught(case, names):
    assert wrong_by(case, {}, names) > TOLERANCE


@pytest.mark.parametrize(('case', 'target', 'wrong'), CODE, ids=short)
def test_wrong_code_is_caught(case, target, wrong):
    jax.clear_caches()  # the right code may have been traced before
    with mock.patch(target, wrong):
        assert wrong_by(case, {}, {}) > TOLERANCE
    jax.clear_caches()
