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

from tests.families.loading import GOLDENS, changed, generated, golden, read
from tests.families.test_families import TOLERANCE, error, of_golden, whole, whole_ahead
from weft.hub.families import Entry, Joined, Woven
from weft.model.layers import mlp, norm
from weft.model.layers.rope import rope
from weft.sharding.mesh import MeshConfig, make_mesh

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
    ('olmo2-plain', {'norm_order': 'pre'}),
    ('olmo2-plain', {'norm_order': 'post'}),
    ('olmo2-plain', {'qk_norm': False}),
    ('olmo2-grouped-biases-tied', {'o_bias': False}),
    ('smollm3-as-published', {'rotary_pattern': (True,)}),
    ('smollm3-as-published', {'rotary_pattern': (True, False, True, True, True)}),
    ('smollm3-every-second-windows-untied', {'window_pattern': (True,)}),
    ('smollm3-every-second-windows-untied', {'window': 13}),
    ('smollm3-first-layer-windows-by-layer-biases', {'window_pattern': (True, False, False)}),
    ('qwen2_moe-plain', {'moe.shared_gate': False}),
    ('qwen2_moe-plain', {'moe.renormalize': True}),
    ('qwen2_moe-every-second-layer-renormalised-no-biases-tied', {'moe.renormalize': False}),
    ('qwen2_moe-some-dense-windows', {'window': 15}),
    ('qwen2_moe-some-dense-windows', {'window_pattern': (True,)}),
    ('qwen3-headless', {'rope_theta': 1e4}),
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
    ('gpt2-plain', {'norm': 'rmsnorm'}),
    ('gpt2-plain', {'bias': False}),
    ('gpt2-plain', {'qkv_bias': False}),
    ('gpt2-plain', {'activation': 'gelu_exact'}),
    ('gpt2-plain', {'positions': 'none'}),
    ('gpt2-untied-unscaled-exact-gelu', {'query_scale': None}),
    ('gpt2-by-layer', {'query_scale_by_layer': False}),
    ('gpt2-untied-unscaled-exact-gelu', {'activation': 'gelu'}),
    ('gpt2-untied-unscaled-exact-gelu', {'norm_epsilon': 1e-5}),
    ('gpt2-untied-unscaled-exact-gelu', {'tied_embedding': True}),
    ('gemma2-as-published', {'window': 13}),
    ('gemma2-as-published', {'window': 11}),
    ('gemma2-as-published', {'window_pattern': (False, True)}),
    ('gemma2-as-published', {'window_pattern': (True,)}),
    ('gemma2-as-published', {'attention_softcap': None}),
    ('gemma2-as-published', {'logit_softcap': None}),
    ('gemma2-as-published', {'query_scale': None}),
    ('gemma2-as-published', {'norm_offset': 0.0}),
    ('gemma2-as-published', {'norm_epsilon': 1e-5}),
    ('gemma2-as-published', {'embedding_scale': 1.0}),
    ('gemma2-as-published', {'embedding_scale': 7.0}),
    ('gemma2-as-published', {'activation': 'swiglu'}),
    ('gemma2-defaults-layer-types-linear-silu', {'attention_softcap': None}),
    ('gemma2-defaults-layer-types-linear-silu', {'attention_softcap': 30.0}),
    ('gemma2-defaults-layer-types-linear-silu', {'logit_softcap': 50.0}),
    ('gemma2-defaults-layer-types-linear-silu', {'rope_scaling': None}),
    ('gemma2-no-caps-biases-untied', {'logit_softcap': 30.0}),
    ('gemma2-no-caps-biases-untied', {'attention_softcap': 50.0}),
    ('gemma2-no-caps-biases-untied', {'qkv_bias': False}),
    ('gemma2-no-caps-biases-untied', {'o_bias': False}),
    ('gemma2-no-caps-biases-untied', {'window': 100}),
    ('gemma3-as-published', {'window': 21}),
    ('gemma3-as-published', {'window': 19}),
    ('gemma3-as-published', {'window_pattern': (True,)}),
    ('gemma3-as-published', {'window_pattern': (True,) * 4 + (False,)}),
    ('gemma3-as-published', {'rope_theta': 100.0, 'local_rope_theta': 1e6}),
    ('gemma3-as-published', {'local_rope_theta': None}),
    ('gemma3-as-published', {'rope_scaling': None}),
    ('gemma3-as-published', {'qk_norm': False}),
    ('gemma3-as-published', {'norm_offset': 0.0}),
    ('gemma3-as-published', {'query_scale': None}),
    ('gemma3-as-published', {'embedding_scale': 1.0}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'logit_softcap': None}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'rope_theta': 500.0, 'local_rope_theta': 1e4}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'rope_scaling.attention_factor': 1.0}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'window_pattern': (True, False, False)}),
    ('gemma3-two-ropes-yarn-capped-biases-untied', {'o_bias': False}),
    ('gemma3-every-second-silu-defaults', {'window_pattern': (False, True)}),
    ('gemma3-every-second-silu-defaults', {'rope_theta': 1e4}),
    ('gemma3-every-second-silu-defaults', {'norm_epsilon': 1e-6}),
    ('gemma3-every-second-silu-defaults', {'query_scale': None}),
    ('gemma3-no-windows', {'rope_theta': 100.0}),
    ('gpt_oss-as-published', {'attention_sinks': False}),
    ('gpt_oss-as-published', {'window': 13}),
    ('gpt_oss-as-published', {'window': 11}),
    ('gpt_oss-as-published', {'window_pattern': (False, True)}),
    ('gpt_oss-as-published', {'rope_scaling.truncate': True}),
    ('gpt_oss-as-published', {'rope_scaling.factor': 2.0}),
    ('gpt_oss-as-published', {'rope_scaling.attention_factor': 1.0}),
    ('gpt_oss-as-published', {'rope_scaling': None}),
    ('gpt_oss-as-published', {'activation': 'swiglu'}),
    ('gpt_oss-as-published', {'activation_limit': 7.0}),
    ('gpt_oss-as-published', {'moe.renormalize': False}),
    ('gpt_oss-as-published', {'moe.router': 'sigmoid'}),
    ('gpt_oss-as-published', {'moe.router_bias': False}),
    ('gpt_oss-as-published', {'moe.bias': False}),
    ('gpt_oss-as-published', {'moe.top_k': 3}),
    ('gpt_oss-as-published', {'qkv_bias': False}),
    ('gpt_oss-as-published', {'o_bias': False}),
    ('gpt_oss-defaults-no-biases-tied', {'attention_sinks': False}),
    ('gpt_oss-defaults-no-biases-tied', {'rope_scaling': None}),
    ('gpt_oss-defaults-no-biases-tied', {'rope_scaling.truncate': True}),
    ('gpt_oss-defaults-no-biases-tied', {'rope_theta': 1e4}),
    ('gpt_oss-defaults-no-biases-tied', {'norm_epsilon': 1e-5}),
    ('gpt_oss-defaults-no-biases-tied', {'moe.renormalize': False}),
    ('gpt_oss-unscaled-late-windows', {'window_pattern': (True, False)}),
    ('gpt_oss-unscaled-late-windows', {'rotary_pairs': 'neighbours'}),
    ('gpt_oss-no-windows', {'rope_scaling': None}),
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
    x_BTKH = x_BTN.reshape(*x_BTN.shape[:2], -1, c.head_dim)
    x_BTKH = norm.rms_norm(x_BTKH, jax.numpy.ones(c.head_dim), c.norm_epsilon)
    return x_BTKH.reshape(x_BTN.shape) * scale_N[None, None]


def scaled_everywhere(x_BTnH, position_BT, segment_BT, c, windowed=False):
    """In place of Gemma 3's two kinds of rotary positions: scaling in layers with a window too."""
    if windowed and c.local_rope_theta is not None:
        c = dataclasses.replace(c, rope_theta=c.local_rope_theta)
    return rope(x_BTnH, position_BT, segment_BT, c)


def unmoved(c):
    """In place of gpt-oss's gated unit: one whose up is not moved by 1."""
    return lambda gate, up: mlp.clamped_swiglu(gate, up - 1, limit=c.activation_limit)


def clamped_twice(c):
    """In place of gpt-oss's gated unit: one whose gate is cut off on both sides."""
    limit = c.activation_limit
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
