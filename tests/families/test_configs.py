"""What configs mean: published ones, what stands for a field that is left out, and what is refused rather than ignored."""

import contextlib
import operator
from typing import Any

import jax
import numpy as np
import pytest

from tests.families import cases
from tests.families.loading import read
from weft.hub.families.fields import HARMLESS, KIND_OF
from weft.hub.tensor_table import array_shapes, tensors
from weft.model.config import PoolerConfig
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh

QWEN_2_5: dict[str, Any] = {  # Qwen/Qwen2.5-0.5B, config.json
    'architectures': ['Qwen2ForCausalLM'],
    'attention_dropout': 0.0,
    'bos_token_id': 151643,
    'eos_token_id': 151643,
    'hidden_act': 'silu',
    'hidden_size': 896,
    'initializer_range': 0.02,
    'intermediate_size': 4864,
    'max_position_embeddings': 32768,
    'max_window_layers': 24,
    'model_type': 'qwen2',
    'num_attention_heads': 14,
    'num_hidden_layers': 24,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-06,
    'rope_theta': 1000000.0,
    'sliding_window': 32768,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
    'transformers_version': '4.40.1',
    'use_cache': True,
    'use_mrope': False,
    'use_sliding_window': False,
    'vocab_size': 151936,
}
PHI_4_MINI: dict[str, Any] = {  # microsoft/Phi-4-mini-instruct, config.json; the factors are others
    'architectures': ['Phi3ForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'},
    'bos_token_id': 199999,
    'embd_pdrop': 0.0,
    'eos_token_id': 199999,
    'full_attn_mod': 1,
    'hidden_act': 'silu',
    'hidden_size': 3072,
    'initializer_range': 0.02,
    'intermediate_size': 8192,
    'interpolate_factor': 1,
    'lm_head_bias': False,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'model_type': 'phi3',
    'num_attention_heads': 24,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'original_max_position_embeddings': 4096,
    'pad_token_id': 199999,
    'partial_rotary_factor': 0.75,
    'resid_pdrop': 0.0,
    'rms_norm_eps': 1e-05,
    'rope_scaling': {'long_factor': [1.5] * 48, 'short_factor': [1.0] * 48, 'type': 'longrope'},
    'rope_theta': 10000.0,
    'sliding_window': 262144,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
    'use_cache': True,
    'vocab_size': 200064,
}
NEW_FORM = {
    'rope_theta': None,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
    'layer_types': ['full_attention'] * 24,
    'sliding_window': None,
    'torch_dtype': None,
    'dtype': 'bfloat16',
}


def test_published_configs_are_read():
    _, c = read(QWEN_2_5)
    assert (
        c.attention.window,
        c.attention.qkv_bias,
        c.attention.o_bias,
        c.attention.kv_heads,
        c.attention.head_dim,
        c.positions.theta,
    ) == (None, True, False, 2, 64, 1e6)
    assert read(QWEN_2_5 | NEW_FORM)[1] == c
    _, c = read(PHI_4_MINI)
    assert (c.attention.window, c.rotary_dim, c.positions.scaling.kind, c.positions.scaling.factor) == (
        262144,
        96,
        'longrope',
        32,
    )
    assert c.positions.scaling.original_positions == 4096


@pytest.mark.parametrize(
    ('case', 'field', 'expected'),
    [
        ('mistral-window', 'sliding_window', {'attention.window': 4096}),
        ('mistral-window', 'num_key_value_heads', {'attention.kv_heads': 8}),
        ('mixtral-window-top-3', 'sliding_window', {'attention.window': None}),
        ('mixtral-plain', 'rope_theta', {'positions.theta': 1e6}),
        ('mixtral-plain', 'rms_norm_eps', {'norm.epsilon': 1e-5}),
        ('qwen2-late-windows', 'sliding_window', {'attention.window': 4096}),
        ('qwen2-late-windows', 'max_window_layers', {'attention.window': None}),
        ('qwen3-plain', 'head_dim', {'attention.head_dim': 128}),
        ('qwen3-plain', 'rms_norm_eps', {'norm.epsilon': 1e-6}),
        ('qwen3_moe-plain', 'head_dim', {'attention.head_dim': 16}),
        ('qwen3_moe-some-dense-window-biases', 'sliding_window', {'attention.window': 4096}),
        ('olmoe-grouped-renormalised', 'num_key_value_heads', {'attention.kv_heads': 4}),
        ('phi3-plain-window', 'num_key_value_heads', {'attention.kv_heads': 4}),
        ('phi3-plain-window', 'sliding_window', {'attention.window': None}),
        ('glm4_moe-air', 'partial_rotary_factor', {'positions.fraction': 0.5}),
        ('gpt2-untied-unscaled-exact-gelu', 'activation_function', {'mlp.activation': 'gelu'}),
        ('gpt2-untied-unscaled-exact-gelu', 'n_inner', {'mlp.dim': 256}),
        ('gemma2-as-published', 'query_pre_attn_scalar', {'attention.scale': 1 / 16}),
        ('gemma2-as-published', 'head_dim', {'attention.head_dim': 256}),
        ('gemma2-as-published', 'attn_logit_softcapping', {'attention.softcap': 50}),
        ('gemma2-as-published', 'final_logit_softcapping', {'head.softcap': 30}),
        ('gemma2-no-caps-biases-untied', 'tie_word_embeddings', {'embedding.tied': True}),
        (
            'gemma2-no-caps-biases-untied',
            'layer_types',
            {'attention.window': 4096, 'attention.window_pattern': (True, False)},
        ),
        ('gemma3-as-published', 'rope_local_base_freq', {'positions.local_theta': 1e4}),
        ('gemma3-as-published', 'sliding_window_pattern', {'attention.window_pattern': (True,) * 5 + (False,)}),
        ('gpt_oss-as-published', 'rope_theta', {'positions.theta': 150_000}),
        ('gpt_oss-as-published', 'swiglu_limit', {'mlp.limit': 7}),
        ('gpt_oss-as-published', 'attention_bias', {'attention.qkv_bias': True, 'attention.o_bias': True}),
        ('gpt_oss-no-windows', 'layer_types', {'attention.window': 128, 'attention.window_pattern': (True, False)}),
    ],
)
def test_a_field_that_is_left_out_means_what_transformers_takes_for_it(case, field, expected):
    config = cases.CASES[case] | (
        {'num_attention_heads': 8} if field == 'num_key_value_heads' and case[0] == 'm' else {}
    )
    _, c = read({name: value for name, value in config.items() if name != field})
    assert {name: operator.attrgetter(name)(c) for name in expected} == expected


BERT_BASE: dict[str, Any] = {  # google-bert/bert-base-uncased, config.json
    'architectures': ['BertForMaskedLM'],
    'attention_probs_dropout_prob': 0.1,
    'gradient_checkpointing': False,
    'hidden_act': 'gelu',
    'hidden_dropout_prob': 0.1,
    'hidden_size': 768,
    'initializer_range': 0.02,
    'intermediate_size': 3072,
    'layer_norm_eps': 1e-12,
    'max_position_embeddings': 512,
    'model_type': 'bert',
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'pad_token_id': 0,
    'position_embedding_type': 'absolute',
    'transformers_version': '4.6.0.dev0',
    'type_vocab_size': 2,
    'use_cache': True,
    'vocab_size': 30522,
}


def test_the_published_bert_has_tensors_that_its_config_does_not_tell_of():
    family, c = read(BERT_BASE)
    assert family.known_as('bert.embeddings.LayerNorm.gamma') == 'bert.embeddings.LayerNorm.weight'
    there = [
        'bert.pooler.dense.weight',
        'bert.pooler.dense.bias',
        'cls.seq_relationship.weight',
        'cls.predictions.bias',
    ]
    whole = family.model_of(c, there)
    assert (c.pooler, whole.pooler) == (None, PoolerConfig(next_sentence=True))
    with jax.set_mesh(make_mesh(MeshConfig())):
        found = {one.name for one in tensors(family, whole, array_shapes(whole))}
    assert set(there) < found
    assert len(found) == 5 + 12 * 16 + 5 + 4


T5_V1_1_BASE: dict[str, Any] = {  # google/t5-v1_1-base, config.json
    'architectures': ['T5ForConditionalGeneration'],
    'd_ff': 2048,
    'd_kv': 64,
    'd_model': 768,
    'decoder_start_token_id': 0,
    'dropout_rate': 0.1,
    'eos_token_id': 1,
    'feed_forward_proj': 'gated-gelu',
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'layer_norm_epsilon': 1e-06,
    'model_type': 't5',
    'num_decoder_layers': 12,
    'num_heads': 12,
    'num_layers': 12,
    'output_past': True,
    'pad_token_id': 0,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': False,
    'use_cache': True,
    'vocab_size': 32128,
}


def test_t5_configs_tell_whether_the_head_is_tied():
    _, c = read(T5_V1_1_BASE)
    assert (c.embedding.tied, c.head.scale, c.mlp.activation, c.encoder.layers) == (False, 1.0, 'geglu', 12)
    as_saved = {'tie_word_embeddings': True, 'scale_decoder_outputs': False}
    assert read(T5_V1_1_BASE | as_saved)[1] == c
    _, c = read(cases.CASES['t5-before-v1.1'])
    assert (c.embedding.tied, c.head.scale, c.mlp.activation) == (True, 64**-0.5, 'relu')


def test_marian_s_table_of_positions_follows_from_the_config():
    family, c = read(cases.CASES['marian-published'])
    table_PD = family.fixed['model.encoder.embed_positions.weight'](c)
    assert table_PD.shape == (192, 64)
    assert np.allclose(table_PD[5, [0, 1, 32]], [np.sin(5), np.sin(5 / 10000 ** (1 / 32)), np.cos(5)])


def test_a_published_smollm3_has_every_fourth_layer_without_positions():
    _, c = read(cases.CASES['smollm3-as-published'])
    assert [kind.turned for kind in c.layer_specs] == [True, True, True, False, True]
    every = {name: value for name, value in cases.CASES['smollm3-as-published'].items() if name != 'no_rope_layers'}
    assert read(every)[1].layer_specs == c.layer_specs
    assert read(every | {'no_rope_layer_interval': None})[1].layer_specs == c.layer_specs


ANY = ({}, [], None, True, -1, 0.5, 'x', {'x': [1]}, 10**30)  # what fields that nothing reads may hold


@pytest.mark.parametrize('case', ['llama-grouped', 'qwen2_moe-plain', 'gpt2-plain', 'gemma3-no-windows'])
def test_bookkeeping_and_fields_of_generation_change_nothing(case):
    mine = cases.CASES[case]
    names = HARMLESS - {*mine, 'architectures'}
    names |= {'_name_or_path', '_anything', 'unsloth_fixed', 'unsloth_version'}
    for number, value in enumerate(ANY):
        more = {name: ANY[(number + place) % len(ANY)] for place, name in enumerate(sorted(names))}
        assert read(mine | more) == read(mine), value


def test_fields_that_configs_repeat_of_other_files_are_known():
    """As transformers before 5 wrote them into config.json."""
    known = 'max_length do_sample temperature top_k top_p num_beams repetition_penalty tokenizer_class torchscript use_bfloat16'
    known += ' min_p stop_strings watermarking_config token_healing prefix num_labels problem_type return_dict id2label'
    assert set(known.split()) <= HARMLESS


IDLE_AND_NOT = [  # a field that a Llama's config may have, with a value that says nothing, and with one that does
    ('pruned_heads', {}, {'0': [1]}),
    ('is_encoder_decoder', False, True),
    ('alibi', False, True),
    ('use_sliding_window', False, True),
    ('partial_rotary_factor', 1.0, 0.5),
    ('layer_types', ['full_attention'] * 2, ['full_attention', 'sliding_attention']),
    ('quantization', None, {'bits': 4}),
]


@pytest.mark.parametrize(('name', 'idle', 'other'), IDLE_AND_NOT)
def test_a_field_that_says_nothing_passes_and_one_that_may_change_the_result_does_not(name, idle, other):
    mine = cases.CASES['llama-grouped']
    assert read(mine | {name: idle}) == read(mine)
    with pytest.raises(UserError, match=f'{name} is '):
        read(mine | {name: other})


def test_long_values_are_cut_in_messages():
    deep: Any = 'x' * 10_000
    for _ in range(900):
        deep = [deep, {'a': deep}]
    for value in (['x' * 10_000], [1] * 10**6, deep):
        with pytest.raises(UserError, match=r'mystery is .*\.\.\..*: .* --ignore mystery passes it over') as found:
            read(cases.CASES['llama-grouped'] | {'mystery': value})
        assert len(str(found.value)) < 1000


LINEAR = {'rope_type': 'linear', 'rope_theta': 5e5, 'factor': 2.0}
TWICE = [  # rope_parameters and rope_scaling that say the same
    (LINEAR, {'type': 'linear', 'factor': 2.0}),
    (LINEAR, {'rope_type': 'linear', 'type': 'linear', 'factor': 2, 'rope_theta': 5e5}),
    ({'rope_type': 'default', 'rope_theta': 5e5}, {'type': 'default'}),
    ({'rope_type': 'default', 'rope_theta': 5e5}, {'rope_type': None}),
]


@pytest.mark.parametrize(('new', 'old'), TWICE)
def test_scaling_may_be_said_twice_if_it_is_the_same(new, old):
    mine = cases.CASES['llama-grouped']
    assert read(mine | {'rope_parameters': new, 'rope_scaling': old}) == read(mine | {'rope_parameters': new})
    for other in ({**old, 'rope_type': 'dynamic'}, {**old, 'factor': 3.0}):
        with pytest.raises(UserError, match=r'rope_parameters has .* and rope_scaling .*must agree'):
            read(mine | {'rope_parameters': new, 'rope_scaling': other})


def test_yarn_says_what_was_trained_and_what_changes_nothing():
    yarn = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 128}
    mine = cases.CASES['llama-grouped'] | {'rope_scaling': yarn}
    idle = {'finetuned': True, 'attn_factor': 1.0, 'extrapolation_factor': 1}
    assert read(mine | {'rope_scaling': yarn | idle}) == read(mine)
    with pytest.raises(UserError, match=r'attn_factor is 0.5, which is not supported'):
        read(mine | {'rope_scaling': yarn | {'attn_factor': 0.5}})


YARN = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 128}


@pytest.mark.parametrize(
    ('case', 'changes', 'message'),
    [
        ('mistral-window', {'hidden_act': 'gelu'}, "hidden_act is 'gelu', which is not supported; supported: 'silu'"),
        ('mistral-window', {'layer_types': ['full_attention'] * 2}, 'layer_types is .*does not know the field'),
        ('mixtral-plain', {'attention_bias': True}, 'attention_bias is True: this family does not know the field'),
        ('qwen2-plain', {'use_mrope': True}, 'use_mrope is True, which is not supported; supported: False'),
        ('qwen2-plain', {'layer_types': ['sliding_attention'] * 2}, 'use_sliding_window is False.*need true'),
        ('qwen2-plain', {'layer_types': ['full_attention']}, 'needed for each layer'),
        ('qwen2-plain', {'layer_types': ['full_attention', 'linear_attention']}, 'linear_attention.*needed'),
        ('qwen2-plain', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5: .*does not know'),
        ('qwen2-plain', {'rope_scaling': {'type': 'ntk', 'factor': 2.0}}, "rope_type is 'ntk', which is not supported"),
        ('qwen2-plain', {'rope_scaling': {'type': 'linear'}}, 'factor is missing'),
        ('qwen2-plain', {'rope_scaling': YARN | {'mrope_section': [1]}}, r'mrope_section is \[1\]: .*does not know'),
        ('qwen2-yarn', {'original_max_position_embeddings': 64}, 'is 64 and in .*rope_scaling 128: .*must agree'),
        ('qwen3_moe-plain', {'num_local_experts': 8}, 'num_experts is 16 and num_local_experts 8: .*must agree'),
        ('qwen3_moe-plain', {'mlp_only_layers': [0, 1]}, 'model.moe.pattern is .*must have a true'),
        ('olmo2-plain', {'layer_types': ['sliding_attention'] * 2}, 'this family has full_attention in all layers'),
        ('smollm3-as-published', {'no_rope_layers': [1, 0]}, r'no_rope_layers is \[1, 0\]: .* each of the 5 layers'),
        ('smollm3-as-published', {'no_rope_layers': [1, 2, 1, 1, 1]}, r'no_rope_layers is \[1, 2, 1, 1, 1\]'),
        ('smollm3-as-published', {'layer_types': ['sliding_attention'] * 5}, 'use_sliding_window is False.*need true'),
        ('qwen2_moe-plain', {'shared_expert_intermediate_size': 0}, 'shared_expert_intermediate_size is 0'),
        ('olmoe-plain', {'clip_qkv': 8.0}, 'clip_qkv is 8.0, which is not supported'),
        (
            'phi3-plain-window',
            {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
            'type linear.*supported: default, long',
        ),
        ('phi3-4-mini', {'full_attn_mod': 2}, 'full_attn_mod is 2, which is not supported'),
        (
            'phi3-4-mini',
            {'partial_rotary_factor': 1.0},
            'short_factors has 6 numbers: one is needed for each of the 8 pairs',
        ),
        ('glm4_moe-air', {'scoring_func': 'softmax'}, 'scoring_func is .*supported: .sigmoid'),
        ('glm4_moe-air', {'n_group': 3}, 'model.moe.groups is 3'),
        ('gpt2-plain', {'activation_function': 'tanh'}, "activation_function is 'tanh'.*supported: 'gelu_new'"),
        ('gpt2-plain', {'n_ctx': 512}, 'n_positions is 160 and n_ctx 512: .*must agree'),
        ('gpt2-plain', {'add_cross_attention': True}, 'add_cross_attention is True, which is not supported'),
        ('gemma2-as-published', {'hidden_act': 'gelu'}, "hidden_activation is 'gelu_.*hidden_act 'gelu': .*must agree"),
        ('gemma2-as-published', {'use_bidirectional_attention': True}, 'attention is True, which is not supported'),
        (
            'gemma2-as-published',
            {'sliding_window_size': 8},
            'sliding_window is 12 and sliding_window_size 8: .*must agree',
        ),
        ('gemma2-as-published', {'sliding_window': None}, 'sliding_window is null: 2 layers have it'),
        ('gemma2-as-published', {'layer_types': ['chunked_attention'] * 4}, 'layer_types is .*needed for each layer'),
        ('gemma2-as-published', {'attn_logit_softcapping': 0.0}, 'attention.softcap is 0.0: it must be above 0'),
        (
            'gemma3-as-published',
            {'architectures': ['Gemma3ForConditionalGeneration'], 'vision_config': {'hidden_size': 1}},
            'vision_config: this model reads images.*t = Gemma3ForCausalLM',
        ),
        (
            'gemma3-as-published',
            {'attn_logit_softcapping': 50.0},
            'attn_logit_softcapping is 50.0, which is not supported',
        ),
        ('gemma3-as-published', {'use_bidirectional_attention': True}, 'attention is True, which is not supported'),
        ('gemma3-as-published', {'sliding_window_pattern': 0}, 'sliding_window_pattern is 0: it must be at least 1'),
        (
            'gemma3-as-published',
            {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
            'type dynamic.*supported: default, lin',
        ),
        (
            'gemma3-as-published',
            {'rope_scaling': None, 'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}},
            "sliding_attention: rope_type is 'linear', which is not supported",
        ),
        (
            'gemma3-as-published',
            {'rope_parameters': {'full_attention': {'rope_type': 'default'}}},
            'rope_scaling is .*does not know the field',
        ),
        (
            'gemma3-as-published',
            {'rope_scaling': None, 'rope_parameters': {'rope_type': 'default'}},
            "rope_type is 'default': .*does not know the field",
        ),
        (
            'gpt_oss-as-published',
            {'swiglu_alpha': 1.0},
            'swiglu_alpha is 1.0, which is not supported; supported: 1.702',
        ),
        ('gpt_oss-as-published', {'experts_per_token': 2}, 'tok is 4 and experts_per_token 2: .*must agree'),
        ('gpt_oss-as-published', {'initial_context_length': 64}, 'length is 64 and original.* 32: .*must agree'),
        ('gpt_oss-as-published', {'sliding_window': None}, 'sliding_window is null: 2 layers have it'),
        ('gpt_oss-as-published', {'hidden_act': 'gelu'}, "hidden_act is 'gelu', which is not supported"),
        ('t5-v1.1', {'feed_forward_proj': 'gated-relu'}, "feed_forward_proj is 'gated-relu', which is not supported"),
        ('t5-v1.1', {'is_encoder_decoder': False}, 'is_encoder_decoder is False'),
        ('marian-published', {'share_encoder_decoder_embeddings': False}, 'share_encoder_decoder_embeddings is False'),
        ('marian-published', {'decoder_vocab_size': 100}, 'decoder_vocab_size is 100.*supported: 200'),
        ('marian-published', {'normalize_before': True}, 'normalize_before is True'),
        ('bert-plain', {'is_decoder': True}, 'is_decoder is True, which is not supported; supported: False'),
        ('bert-plain', {'position_embedding_type': 'relative_key'}, "position_embedding_type is 'relative_key'"),
        ('bert-plain', {'tie_word_embeddings': False}, 'tie_word_embeddings is False, which is not supported'),
    ],
)
def test_what_cannot_be_represented_is_refused(case, changes, message):
    with pytest.raises(UserError, match=message) as found:
        read(cases.CASES[case] | changes)
    assert '\n' not in str(found.value)


WRONG: tuple[Any, ...] = ('x', [], ['x'], {}, {'x': 1}, -1, 0, 1.5, True, 10**30, 1e30, float('nan'))


@pytest.mark.parametrize('name', cases.CASES)
def test_a_value_of_another_kind_is_refused(name):
    config = cases.CASES[name]
    sections = {(): config} | {(key,): value for key, value in config.items() if isinstance(value, dict)}
    taken = []
    for path, section in sections.items():
        for field in section:
            for value in WRONG:
                changed = section | {field: value}
                with contextlib.suppress(UserError):
                    read(config | {path[0]: changed} if path else changed)
                    taken.append((field, value))
    assert [(field, value) for field, value in taken if field not in HARMLESS and not KIND_OF[field].fits(value)] == []


def test_marian_begins_with_the_token_that_transformers_has_by_default():
    config = {
        name: value for name, value in cases.CASES['marian-published'].items() if name != 'decoder_start_token_id'
    }
    assert read(config | {'vocab_size': 58101, 'decoder_vocab_size': 58101})[1].encoder.start_token == 58100
    with pytest.raises(UserError, match=r'start_token is 58100: it must be at least 0 and less than .* 200'):
        read(config)
