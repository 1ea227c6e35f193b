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

from tests.families.loading import GOLDENS, generated, golden, read
from tests.families.test_families import TOLERANCE, error, of_golden, whole, whole_ahead
from weft.hub.families import Entry, Joined, Woven
from weft.model.config import changed
from weft.model.layers import mlp, norm
from weft.model.layers.rope import rope
from weft.sharding.mesh import MeshConfig, make_mesh

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ('llama-grouped', {'positions.layout': 'interleaved'}),
    ('llama-grouped', {'positions.theta': 1e4}),
    ('llama-multi-query-wide-heads', {'norm.epsilon': 1e-2}),
    ('llama-multi-query-wide-heads', {'attention.scale': 16**-0.5}),
    ('llama-multi-head-tied-all-biases', {'attention.qkv_bias': False}),
    ('llama-multi-head-tied-all-biases', {'attention.o_bias': False}),
    ('llama-multi-head-tied-all-biases', {'mlp.bias': False}),
    ('llama-llama3-scaling', {'positions.scaling': None}),
    ('llama-llama3-scaling', {'positions.scaling.high_frequency_factor': 3.0}),
    ('llama-linear-scaling', {'positions.scaling': None}),
    ('llama-dynamic-scaling-long', {'positions.scaling': None}),
    ('llama-dynamic-scaling-long', {'positions.scaling.original_positions': 128}),
    ('llama-yarn', {'positions.scaling.factor': 2.0}),
    ('llama-yarn', {'positions.scaling.truncate': False}),
    ('llama-yarn-all-said', {'positions.scaling.attention_factor': None}),
    ('llama-yarn-all-said', {'positions.scaling.beta_fast': 32.0}),
    ('llama-yarn-all-said', {'positions.scaling.beta_slow': 1.0}),
    ('llama-yarn-all-said', {'positions.scaling.truncate': True}),
    ('mistral-window', {'attention.window': 25}),
    ('mistral-window', {'attention.window': None}),
    ('mistral-wide-window-yarn', {'positions.theta': 1e4}),
    ('mixtral-plain', {'moe.renormalize': False}),
    ('mixtral-plain', {'moe.router': 'sigmoid'}),
    ('mixtral-window-top-3', {'moe.top_k': 2}),
    ('mixtral-window-top-3', {'attention.window': 19}),
    ('qwen2-plain', {'attention.qkv_bias': False}),
    ('qwen2-late-windows', {'attention.window': 17}),
    ('qwen2-late-windows', {'attention.window_pattern': (True,)}),
    ('qwen2-late-windows', {'attention.window_pattern': (False, True, True, False)}),
    ('qwen3-plain', {'attention.qk_norm': False}),
    ('qwen3-plain', {'norm.epsilon': 1e-4}),
    ('qwen3-biases-tied', {'attention.o_bias': False}),
    ('qwen3-windows-by-layer', {'attention.window_pattern': (False, True)}),
    ('qwen3_moe-plain', {'moe.renormalize': False}),
    ('qwen3_moe-every-second-layer', {'moe.renormalize': True}),
    ('qwen3_moe-every-second-layer', {'moe.pattern': (True, False)}),
    ('qwen3_moe-some-dense-window-biases', {'attention.window': 15}),
    ('olmoe-plain', {'attention.qk_norm': False}),
    ('olmoe-plain', {'moe.renormalize': True}),
    ('olmoe-grouped-renormalised', {'moe.renormalize': False}),
    ('olmo2-plain', {'norm.order': 'pre'}),
    ('olmo2-plain', {'norm.order': 'post'}),
    ('olmo2-plain', {'attention.qk_norm': False}),
    ('olmo2-grouped-biases-tied', {'attention.o_bias': False}),
    ('smollm3-as-published', {'positions.pattern': (True,)}),
    ('smollm3-as-published', {'positions.pattern': (True, False, True, True, True)}),
    ('smollm3-every-second-windows-untied', {'attention.window_pattern': (True,)}),
    ('smollm3-every-second-windows-untied', {'attention.window': 13}),
    ('smollm3-first-layer-windows-by-layer-biases', {'attention.window_pattern': (True, False, False)}),
    ('qwen2_moe-plain', {'moe.shared_gate': False}),
    ('qwen2_moe-plain', {'moe.renormalize': True}),
    ('qwen2_moe-every-second-layer-renormalised-no-biases-tied', {'moe.renormalize': False}),
    ('qwen2_moe-some-dense-windows', {'attention.window': 15}),
    ('qwen2_moe-some-dense-windows', {'attention.window_pattern': (True,)}),
    ('qwen3-headless', {'positions.theta': 1e4}),
    ('phi3-plain-window', {'attention.window': 31}),
    ('phi3-longrope-long', {'positions.scaling.attention_factor': 1.0}),
    ('phi3-longrope-long', {'positions.scaling.original_positions': 160, 'positions.scaling.factor': 8.0}),
    ('phi3-longrope-short', {'positions.scaling.original_positions': 159, 'positions.scaling.factor': 2.0}),
    ('phi3-partly-rotary-tied', {'positions.fraction': 1.0}),
    ('phi3-4-mini', {'positions.scaling': None}),
    ('glm4_moe-air', {'positions.fraction': 1.0}),
    ('glm4_moe-air', {'moe.choice_bias': False}),
    ('glm4_moe-air', {'moe.router': 'softmax'}),
    ('glm4_moe-air', {'moe.shared_experts': 0}),
    ('glm4_moe-air', {'moe.first_dense_layers': 2}),
    ('glm4_moe-qk-norm', {'attention.qk_norm': False}),
    ('glm4_moe-qk-norm', {'moe.routed_scale': 1.0}),
    ('glm4_moe-groups-two-dense', {'moe.top_groups': 4}),
    ('glm4_moe-groups-two-dense', {'moe.group_score': 'max'}),
    ('glm4_moe-groups-two-dense', {'moe.renormalize': True}),
    ('gpt2-plain', {'norm.kind': 'rmsnorm', 'norm.bias': False}),
    ('gpt2-plain', {'attention.o_bias': False, 'mlp.bias': False, 'norm.bias': False}),
    ('gpt2-plain', {'attention.qkv_bias': False}),
    ('gpt2-plain', {'mlp.activation': 'gelu_exact'}),
    ('gpt2-plain', {'positions.kind': 'none'}),
    ('gpt2-untied-unscaled-exact-gelu', {'attention.scale': None}),
    ('gpt2-by-layer', {'attention.scale_by_layer': False}),
    ('gpt2-untied-unscaled-exact-gelu', {'mlp.activation': 'gelu'}),
    ('gpt2-untied-unscaled-exact-gelu', {'norm.epsilon': 1e-5}),
    ('gpt2-untied-unscaled-exact-gelu', {'embedding.tied': True}),
    ('gemma2-as-published', {'attention.window': 13}),
    ('gemma2-as-published', {'attention.window': 11}),
    ('gemma2-as-published', {'attention.window_pattern': (False, True)}),
    ('gemma2-as-published', {'attention.window_pattern': (True,)}),
    ('gemma2-as-published', {'attention.softcap': None}),
    ('gemma2-as-published', {'head.softcap': None}),
    ('gemma2-as-published', {'attention.scale': None}),
    ('gemma2-as-published', {'norm.offset': 0.0}),
    ('gemma2-as-published', {'norm.epsilon': 1e-5}),
    ('gemma2-as-published', {'embedding.scale': 1.0}),
    ('gemma2-as-published', {'embedding.scale': 7.0}),
    ('gemma2-as-published', {'mlp.activation': 'swiglu'}),
    ('gemma2-defaults-layer-types-linear-silu', {'attention.softcap': None}),
    ('gemma2-defaults-layer-types-linear-silu', {'attention.softcap': 30.0}),
    ('gemma2-defaults-layer-types-linear-silu', {'head.softcap': 50.0}),
    ('gemma2-defaults-layer-types-linear-silu', {'positions.scaling': None}),
    ('gemma2-no-caps-biases-untied', {'head.softcap': 30.0}),
    ('gemma2-no-caps-biases-untied', {'attention.softcap': 50.0}),
    ('gemma2-no-caps-biases-untied', {'attention.qkv_bias': False}),
    ('gemma2-no-caps-biases-untied', {'attention.o_bias': False}),
    ('gemma2-no-caps-biases-untied', {'attention.window': 100}),
    ('gemma3-as-published', {'attention.window': 21}),
    ('gemma3-as-published', {'attention.window': 19}),
    ('gemma3-as-published', {'attention.window_pattern': (True,)}),
    ('gemma3-as-published', {'attention.window_pattern': (True,) * 4 + (False,)}),
    ('gemma3-as-published', {'positions.theta': 100.0, 'positions.local_theta': 1e6}),
    ('gemma3-as-published', {'positions.local_theta': None}),
    ('gemma3-as-published', {'positions.scaling': None}),
    ('gemma3-as-published', {'attention.qk_norm': False}),
    ('gemma3-as-published', {'norm.offset': 0.0}),
    ('gemma3-as-published', {'attention.scale': None}),
    ('gemma3-as-published', {'embedding.scale': 1.0}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'head.softcap': None}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'positions.theta': 500.0, 'positions.local_theta': 1e4}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'positions.scaling.attention_factor': 1.0}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'attention.window_pattern': (True, False, False)}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'attention.o_bias': False}),
    ('gemma3-every-second-silu-defaults', {'attention.window_pattern': (False, True)}),
    ('gemma3-every-second-silu-defaults', {'positions.theta': 1e4}),
    ('gemma3-every-second-silu-defaults', {'norm.epsilon': 1e-6}),
    ('gemma3-every-second-silu-defaults', {'attention.scale': None}),
    ('gemma3-no-windows', {'positions.theta': 100.0}),
    ('gpt_oss-as-published', {'attention.sinks': False}),
    ('gpt_oss-as-published', {'attention.window': 13}),
    ('gpt_oss-as-published', {'attention.window': 11}),
    ('gpt_oss-as-published', {'attention.window_pattern': (False, True)}),
    ('gpt_oss-as-published', {'positions.scaling.truncate': True}),
    ('gpt_oss-as-published', {'positions.scaling.factor': 2.0}),
    ('gpt_oss-as-published', {'positions.scaling.attention_factor': 1.0}),
    ('gpt_oss-as-published', {'positions.scaling': None}),
    ('gpt_oss-as-published', {'mlp.activation': 'swiglu'}),
    ('gpt_oss-as-published', {'mlp.limit': 7.0}),
    ('gpt_oss-as-published', {'moe.renormalize': False}),
    ('gpt_oss-as-published', {'moe.router': 'sigmoid'}),
    ('gpt_oss-as-published', {'moe.router_bias': False}),
    ('gpt_oss-as-published', {'moe.bias': False}),
    ('gpt_oss-as-published', {'moe.top_k': 3}),
    ('gpt_oss-as-published', {'attention.qkv_bias': False}),
    ('gpt_oss-as-published', {'attention.o_bias': False}),
    ('gpt_oss-defaults-no-biases-tied', {'attention.sinks': False}),
    ('gpt_oss-defaults-no-biases-tied', {'positions.scaling': None}),
    ('gpt_oss-defaults-no-biases-tied', {'positions.scaling.truncate': True}),
    ('gpt_oss-defaults-no-biases-tied', {'positions.theta': 1e4}),
    ('gpt_oss-defaults-no-biases-tied', {'norm.epsilon': 1e-5}),
    ('gpt_oss-defaults-no-biases-tied', {'moe.renormalize': False}),
    ('gpt_oss-unscaled-late-windows', {'attention.window_pattern': (True, False)}),
    ('gpt_oss-unscaled-late-windows', {'positions.layout': 'interleaved'}),
    ('gpt_oss-no-windows', {'positions.scaling': None}),
    ('deepseek_v2-lite', {'positions.layout': 'half'}),
    ('deepseek_v2-lite', {'positions.scaling.mscale_all_dim': 0.0}),
    ('deepseek_v2-lite', {'positions.scaling.attention_factor': None}),
    ('deepseek_v2-lite', {'moe.renormalize': True}),
    ('deepseek_v2-groups', {'moe.group_score': 'top2'}),
    ('deepseek_v2-groups', {'moe.top_groups': 4}),
    ('deepseek_v2-groups', {'moe.routed_scale': 1.0}),
    ('deepseek_v2-biases-no-dense-layer', {'attention.qkv_bias': False}),
    ('deepseek_v2-biases-no-dense-layer', {'attention.o_bias': False}),
    ('deepseek_v2-biases-no-dense-layer', {'mlp.bias': False}),
    ('deepseek_v3-as-published', {'positions.scaling.mscale_all_dim': 0.0}),
    ('deepseek_v3-as-published', {'positions.scaling.factor': 20.0}),
    ('deepseek_v3-as-published', {'moe.choice_bias': False}),
    ('deepseek_v3-as-published', {'moe.group_score': 'max'}),
    ('deepseek_v3-as-published', {'moe.top_groups': 3}),
    ('deepseek_v3-as-published', {'moe.renormalize': False}),
    ('deepseek_v3-halves-plain-queries-two-dense', {'positions.layout': 'interleaved'}),
    ('deepseek_v3-halves-plain-queries-two-dense', {'moe.first_dense_layers': 1}),
    ('deepseek_v3-biases-two-mscales', {'positions.scaling.attention_factor': 1.0}),
    ('deepseek_v3-biases-two-mscales', {'moe.shared_experts': 1}),
    ('grok1-as-published', {'attention.scale': 0.125}),
    ('grok1-as-published', {'embedding.scale': 1.0}),
    ('grok1-as-published', {'head.scale': 1.0}),
    ('grok1-as-published', {'moe.router': 'sigmoid'}),
    ('grok1-low-cap-one-kv-head-top-3', {'attention.softcap': None}),
    ('grok1-low-cap-one-kv-head-top-3', {'moe.top_k': 2}),
    ('grok1-untied-four-experts', {'mlp.activation': 'swiglu'}),
    ('grok1-untied-four-experts', {'norm.epsilon': 1e-5}),
]
NAMES: list[tuple[str, dict[str, Entry]]] = [  # by how the published names end
    (
        'grok1-as-published',
        {
            'moe_block.experts.{e}.linear.weight': 'mlp.up.w_EIO',
            'moe_block.experts.{e}.linear_v.weight': 'mlp.gate.w_EIO',
        },
    ),
    (
        'grok1-as-published',
        {'pre_attn_norm.scale': 'attention_out_norm.scale_D', 'post_attn_norm.scale': 'attention_norm.scale_D'},
    ),
    (
        'phi3-longrope-short',
        {'self_attn.qkv_proj.weight': Joined(('attention.q.w_IO', 'attention.v.w_IO', 'attention.k.w_IO'))},
    ),
    ('phi3-plain-window', {'mlp.gate_up_proj.weight': Joined(('mlp.up.w_IO', 'mlp.gate.w_IO'))}),
    (
        'mixtral-plain',
        {
            'block_sparse_moe.experts.{e}.w1.weight': 'mlp.up.w_EIO',
            'block_sparse_moe.experts.{e}.w3.weight': 'mlp.gate.w_EIO',
        },
    ),
    (
        'llama-grouped',
        {'input_layernorm.weight': 'mlp_norm.scale_D', 'post_attention_layernorm.weight': 'attention_norm.scale_D'},
    ),
    (
        'gpt2-plain',
        {'c_attn.weight': Joined(('attention.k.w_IO', 'attention.q.w_IO', 'attention.v.w_IO'), dim=1, flip=True)},
    ),
    ('gpt2-plain', {'attn.c_proj.weight': 'attention.o.w_OI'}),
    (
        'gemma2-as-published',  # as Llama has the second of these names
        {
            'post_attention_layernorm.weight': 'mlp_norm.scale_D',
            'pre_feedforward_layernorm.weight': 'attention_out_norm.scale_D',
        },
    ),
    (
        'gemma2-as-published',
        {
            'pre_feedforward_layernorm.weight': 'mlp_out_norm.scale_D',
            'post_feedforward_layernorm.weight': 'mlp_norm.scale_D',
        },
    ),
    ('gpt_oss-as-published', {'experts.gate_up_proj': Woven(('mlp.up.w_EIO', 'mlp.gate.w_EIO'), flip=True)}),
    ('gpt_oss-as-published', {'experts.gate_up_proj': Joined(('mlp.gate.w_EIO', 'mlp.up.w_EIO'), dim=2, flip=True)}),
    ('gpt_oss-as-published', {'experts.gate_up_proj_bias': Woven(('mlp.up.b_EO', 'mlp.gate.b_EO'))}),
    ('gpt_oss-as-published', {'experts.gate_up_proj_bias': Joined(('mlp.gate.b_EO', 'mlp.up.b_EO'), dim=1)}),
]


AHEAD: list[tuple[str, dict[str, Any]]] = [
    ('deepseek_v3-two-ahead', {'enorm.weight': 'hidden_norm.scale_D', 'hnorm.weight': 'embedding_norm.scale_D'}),
    ('glm4_moe-one-ahead', {'shared_head.norm.weight': 'hidden_norm.scale_D', 'hnorm.weight': 'norm.scale_D'}),
]


def by_head(x_BTN, scale_N, heads, c):
    """In place of a norm over all heads: one of each head."""
    x_BTKH = x_BTN.reshape(*x_BTN.shape[:2], -1, c.attention.head_dim)
    x_BTKH = norm.rms_norm(x_BTKH, jax.numpy.ones(c.attention.head_dim), c.norm.epsilon)
    return x_BTKH.reshape(x_BTN.shape) * scale_N[None, None]


def scaled_everywhere(x_BTnH, position_BT, segment_BT, c, windowed=False):
    """In place of Gemma 3's two kinds of rotary positions: scaling in layers with a window too."""
    if windowed and c.positions.local_theta is not None:
        c = changed(c, {'positions.theta': c.positions.local_theta})
    return rope(x_BTnH, position_BT, segment_BT, c)


def unmoved(c):
    """In place of gpt-oss's gated unit: one whose up is not moved by 1."""
    return lambda gate, up: mlp.clamped_swiglu(gate, up - 1, limit=c.mlp.limit)


def clamped_twice(c):
    """In place of gpt-oss's gated unit: one whose gate is cut off on both sides."""
    limit = c.mlp.limit
    return lambda gate, up: mlp.clamped_swiglu(jax.numpy.maximum(gate, -limit), up, limit=limit)


CODE: list[tuple[str, str, Callable]] = [
    ('gpt_oss-defaults-no-biases-tied', 'weft.model.layers.moe.activation', unmoved),
    ('gpt_oss-unscaled-late-windows', 'weft.model.layers.moe.activation', clamped_twice),
    ('gemma3-as-published', 'weft.model.layers.attention.rope', scaled_everywhere),
    ('olmoe-plain', 'weft.model.layers.attention.norm_of_all', by_head),
    ('grok1-as-published', 'jax.nn.gelu', functools.partial(jax.nn.gelu, approximate=False)),
]


def short(value: Any) -> str:
    """A test's name."""
    if isinstance(value, dict):
        return ','.join(name if isinstance(of, Entry) else f'{name}={of}' for name, of in value.items())
    return getattr(value, '__name__', value)


def wrong_by(case: str, changes: dict[str, Any], names: dict[str, Any], ahead: bool = False) -> float:
    """How far the mutant's logits are from those of transformers, at the positions that are kept.

    `ahead`: of the first layer that predicts further ahead instead.
    """
    known = golden(GOLDENS / f'{case}.npz')
    family, c = read(known.config)
    table = dict(family.names)
    for ending, entry in names.items():
        (name,) = [name for name in table if name == ending or name.endswith('.' + ending)]
        table[name] = entry
    family = dataclasses.replace(family, names=table)
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = generated(case, family, changed(c, changes), known.seed)
        if not ahead:
            return error(of_golden(model, known)[known.at[:, 0], known.at[:, 1]], known.logits)
        assert known.ahead is not None
        sure = known.at[:, 1] < known.ids.shape[1] - 1
        rows, places = known.at[sure].T
        return error(whole(model, known.ids, run=whole_ahead)[0][rows, places], known.ahead[0][sure])


@pytest.mark.parametrize(('case', 'changes'), CONFIGS, ids=short)
def test_a_wrong_config_is_caught(case, changes):
    assert wrong_by(case, changes, {}) > TOLERANCE


@pytest.mark.parametrize(('case', 'names'), NAMES, ids=short)
def test_a_wrong_place_of_a_tensor_is_caught(case, names):
    assert wrong_by(case, {}, names) > TOLERANCE


@pytest.mark.parametrize(('case', 'names'), AHEAD, ids=short)
def test_a_wrong_layer_that_predicts_further_ahead_is_caught(case, names):
    assert wrong_by(case, {}, names) <= TOLERANCE, 'the model itself is right'
    assert wrong_by(case, {}, names, ahead=True) > TOLERANCE


@pytest.mark.parametrize(('case', 'target', 'wrong'), CODE, ids=short)
def test_wrong_code_is_caught(case, target, wrong):
    jax.clear_caches()  # the right code may have been traced before
    with mock.patch(target, wrong):
        assert wrong_by(case, {}, {}) > TOLERANCE
    jax.clear_caches()
