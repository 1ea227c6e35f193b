"""That the proof can fail: a model that is wrong in one way is not within the tolerance of transformers' logits.

A mutant is one line: a case, and what is changed in its config (dotted fields of ModelConfig), in its family's table of
names, or in the code.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import pytest

from model import layers
from model.attention.reference import relative_bucket
from model.encoder import sinusoids
from model.families import Joined
from sharding.mesh import MeshConfig, make_mesh
from tests.families.loading import GOLDENS, changed, generated, golden, read
from tests.families.test_families import TOLERANCE, error, of_golden

LAYER = 'model.layers.{i}.'
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ('llama-grouped', {'rotary_pairs': 'neighbours'}),
    ('llama-grouped', {'rope_theta': 1e4}),
    ('llama-multi-query-wide-heads', {'norm_epsilon': 1e-2}),
    ('llama-multi-query-wide-heads', {'query_scale': 16**-0.5}),
    ('llama-multi-head-tied-all-biases', {'qkv_bias': False}),
    ('llama-multi-head-tied-all-biases', {'o_bias': False}),
    ('llama-multi-head-tied-all-biases', {'mlp_bias': False}),
    ('llama-llama3-scaling', {'rope_scaling': None}),
    ('llama-llama3-scaling', {'rope_scaling.high_frequency_factor': 3.0}),
    ('llama-linear-scaling', {'rope_scaling': None}),
    ('llama-dynamic-scaling-long', {'rope_scaling': None}),
    ('llama-dynamic-scaling-long', {'rope_scaling.original_positions': 128}),
    ('llama-yarn', {'rope_scaling.factor': 2.0}),
    ('llama-yarn', {'rope_scaling.truncate': False}),
    ('llama-yarn-all-said', {'rope_scaling.attention_factor': None}),
    ('llama-yarn-all-said', {'rope_scaling.beta_fast': 32.0}),
    ('llama-yarn-all-said', {'rope_scaling.beta_slow': 1.0}),
    ('llama-yarn-all-said', {'rope_scaling.truncate': True}),
    ('mistral-window', {'window': 25}),
    ('mistral-window', {'window': None}),
    ('mistral-wide-window-yarn', {'rope_theta': 1e4}),
    ('mixtral-plain', {'moe.renormalize': False}),
    ('mixtral-plain', {'moe.router': 'sigmoid'}),
    ('mixtral-window-top-3', {'moe.top_k': 2}),
    ('mixtral-window-top-3', {'window': 19}),
    ('qwen2-plain', {'qkv_bias': False}),
    ('qwen2-late-windows', {'window': 17}),
    ('qwen2-late-windows', {'window_pattern': (True,)}),
    ('qwen2-late-windows', {'window_pattern': (False, True, True, False)}),
    ('qwen3-plain', {'qk_norm': False}),
    ('qwen3-plain', {'norm_epsilon': 1e-4}),
    ('qwen3-biases-tied', {'o_bias': False}),
    ('qwen3-windows-by-layer', {'window_pattern': (False, True)}),
    ('qwen3_moe-plain', {'moe.renormalize': False}),
    ('qwen3_moe-every-second-layer', {'moe.renormalize': True}),
    ('qwen3_moe-every-second-layer', {'moe.pattern': (True, False)}),
    ('qwen3_moe-some-dense-window-biases', {'window': 15}),
    ('olmoe-plain', {'qk_norm': False}),
    ('olmoe-plain', {'moe.renormalize': True}),
    ('olmoe-grouped-renormalised', {'moe.renormalize': False}),
    ('phi3-plain-window', {'window': 31}),
    ('phi3-longrope-long', {'rope_scaling.attention_factor': 1.0}),
    ('phi3-longrope-long', {'rope_scaling.original_positions': 160, 'rope_scaling.factor': 8.0}),
    ('phi3-longrope-short', {'rope_scaling.original_positions': 159, 'rope_scaling.factor': 2.0}),
    ('phi3-partly-rotary-tied', {'rotary_fraction': 1.0}),
    ('phi3-4-mini', {'rope_scaling': None}),
    ('glm4_moe-air', {'rotary_fraction': 1.0}),
    ('glm4_moe-air', {'moe.choice_bias': False}),
    ('glm4_moe-air', {'moe.router': 'softmax'}),
    ('glm4_moe-air', {'moe.shared_experts': 0}),
    ('glm4_moe-air', {'moe.first_dense_layers': 2}),
    ('glm4_moe-qk-norm', {'qk_norm': False}),
    ('glm4_moe-qk-norm', {'moe.routed_scale': 1.0}),
    ('glm4_moe-groups-two-dense', {'moe.top_groups': 4}),
    ('glm4_moe-groups-two-dense', {'moe.group_score': 'max'}),
    ('glm4_moe-groups-two-dense', {'moe.renormalize': True}),
    ('deepseek_v2-lite', {'rotary_pairs': 'halves'}),
    ('deepseek_v2-lite', {'rope_scaling.mscale_all_dim': 0.0}),
    ('deepseek_v2-lite', {'rope_scaling.attention_factor': None}),
    ('deepseek_v2-lite', {'moe.renormalize': True}),
    ('deepseek_v2-groups', {'moe.group_score': 'top2'}),
    ('deepseek_v2-groups', {'moe.top_groups': 4}),
    ('deepseek_v2-groups', {'moe.routed_scale': 1.0}),
    ('deepseek_v2-biases-no-dense-layer', {'qkv_bias': False}),
    ('deepseek_v2-biases-no-dense-layer', {'o_bias': False}),
    ('deepseek_v2-biases-no-dense-layer', {'mlp_bias': False}),
    ('deepseek_v3-as-published', {'rope_scaling.mscale_all_dim': 0.0}),
    ('deepseek_v3-as-published', {'rope_scaling.factor': 20.0}),
    ('deepseek_v3-as-published', {'moe.choice_bias': False}),
    ('deepseek_v3-as-published', {'moe.group_score': 'max'}),
    ('deepseek_v3-as-published', {'moe.top_groups': 3}),
    ('deepseek_v3-as-published', {'moe.renormalize': False}),
    ('deepseek_v3-halves-plain-queries-two-dense', {'rotary_pairs': 'neighbours'}),
    ('deepseek_v3-halves-plain-queries-two-dense', {'moe.first_dense_layers': 1}),
    ('deepseek_v3-biases-two-mscales', {'rope_scaling.attention_factor': 1.0}),
    ('deepseek_v3-biases-two-mscales', {'moe.shared_experts': 1}),
    ('grok1-as-published', {'query_scale': 0.125}),
    ('grok1-as-published', {'embedding_scale': 1.0}),
    ('grok1-as-published', {'logit_scale': 1.0}),
    ('grok1-as-published', {'moe.router': 'sigmoid'}),
    ('grok1-low-cap-one-kv-head-top-3', {'attention_softcap': None}),
    ('grok1-low-cap-one-kv-head-top-3', {'moe.top_k': 2}),
    ('grok1-untied-four-experts', {'activation': 'swiglu'}),
    ('grok1-untied-four-experts', {'norm_epsilon': 1e-5}),
    ('bert-plain', {'causal': True}),
    ('bert-plain', {'activation': 'gelu'}),
    ('bert-plain', {'norm_epsilon': 1e-3}),
    ('bert-plain', {'embedding_norm': False}),
    ('bert-plain', {'head_mlp': False}),
    ('bert-plain', {'head_bias': False}),
    ('bert-plain', {'qkv_bias': False}),
    ('bert-plain', {'segment_kinds': 0}),
    ('bert-tanh-gelu-many-kinds', {'activation': 'gelu_exact'}),
    ('bert-relu-wide-epsilon', {'norm_epsilon': 1e-5}),
    ('t5-v1.1', {'relative_most': 64}),
    ('t5-v1.1', {'relative_buckets': 16}),
    ('t5-v1.1', {'activation': 'swiglu'}),
    ('t5-v1.1', {'query_scale': None}),
    ('t5-v1.1', {'norm_epsilon': 1e-3}),
    ('t5-v1.1', {'positions': 'none'}),
    ('t5-before-v1.1', {'logit_scale': 1.0}),
    ('t5-exact-gelu', {'activation': 'gelu'}),
    ('marian-published', {'embedding_scale': 1.0}),
    ('marian-published', {'activation': 'gelu'}),
    ('marian-published', {'head_bias': False}),
    ('marian-published', {'positions': 'none'}),
    ('marian-published', {'norm_epsilon': 1e-3}),
]
NAMES: list[tuple[str, dict[str, Any]]] = [
    (
        'grok1-as-published',
        {
            'moe_block.experts.{e}.linear.weight': 'mlp.up_EDF',
            'moe_block.experts.{e}.linear_v.weight': 'mlp.gate_EDF',
        },
    ),
    (
        'grok1-as-published',
        {'pre_attn_norm.scale': 'attention_out_norm.scale_D', 'post_attn_norm.scale': 'attention_norm.scale_D'},
    ),
    (
        'phi3-longrope-short',
        {'self_attn.qkv_proj.weight': Joined(('attention.q_DN', 'attention.v_DM', 'attention.k_DM'))},
    ),
    ('phi3-plain-window', {'mlp.gate_up_proj.weight': Joined(('mlp.up_DF', 'mlp.gate_DF'))}),
    (
        'mixtral-plain',
        {
            'block_sparse_moe.experts.{e}.w1.weight': 'mlp.up_EDF',
            'block_sparse_moe.experts.{e}.w3.weight': 'mlp.gate_EDF',
        },
    ),
    (
        'llama-grouped',
        {'input_layernorm.weight': 'mlp_norm.scale_D', 'post_attention_layernorm.weight': 'attention_norm.scale_D'},
    ),
    (
        't5-v1.1',
        {
            'decoder.block.{i}.layer.1.EncDecAttention.k.weight': 'cross.v_DM',
            'decoder.block.{i}.layer.1.EncDecAttention.v.weight': 'cross.k_DM',
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


def by_head(x_BTN, scale_N, heads, c):
    """In place of a norm over all heads: one of each head."""
    x_BTKH = x_BTN.reshape(*x_BTN.shape[:2], -1, c.head_dim)
    x_BTKH = layers.rms_norm(x_BTKH, jax.numpy.ones(c.head_dim), c.norm_epsilon)
    return x_BTKH.reshape(x_BTN.shape) * scale_N[None, None]


def one_way(ahead, buckets, both_ways, most):
    """In place of buckets for both directions: those of one."""
    return relative_bucket(ahead, buckets, False, most)


def interleaved(c):
    """In place of sines and then cosines: in turns, as in the paper."""
    table_PD = sinusoids(c)
    return table_PD.reshape(len(table_PD), 2, -1).swapaxes(1, 2).reshape(table_PD.shape)


CODE: list[tuple[str, str, Callable]] = [
    ('t5-v1.1', 'model.attention.reference.relative_bucket', one_way),
    ('marian-published', 'model.decoder.sinusoids', interleaved),
    ('olmoe-plain', 'model.layers.norm_of_all', by_head),
    ('grok1-as-published', 'jax.nn.gelu', functools.partial(jax.nn.gelu, approximate=False)),
]


def short(value: Any) -> str:
    """A test's name."""
    if isinstance(value, dict):
        return ','.join(name if isinstance(of, str | Joined) else f'{name}={of}' for name, of in value.items())
    return getattr(value, '__name__', value)


def wrong_by(case: str, changes: dict[str, Any], names: dict[str, Any]) -> float:
    """How far the mutant's logits are from those of transformers, at the positions that are kept."""
    known = golden(GOLDENS / f'{case}.npz')
    family, c = read(known.config)
    names = {name if name in family.names else LAYER + name: leaf for name, leaf in names.items()}
    assert set(names) <= set(family.names)
    family = dataclasses.replace(family, names={**family.names, **names})
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = generated(case, family, changed(c, changes), known.seed)
        return error(of_golden(model, known)[known.at[:, 0], known.at[:, 1]], known.logits)


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
