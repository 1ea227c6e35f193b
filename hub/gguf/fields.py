"""The keys of GGUF files as the fields of an equivalent config.json: one function for each architecture.

Where a converter leaves something out of a file, what llama.cpp assumes in its place is said here. A key of the architecture
that nothing reads becomes a field of its own name, so that it is refused like any field that may change the result.
"""

from typing import Any

import numpy as np

from weft.hub.gguf.common_fields import common_fields, head_fields, scaling_fields
from weft.hub.gguf.keys import Keys
from weft.runtime.errors import UserError
from weft.storage.foreign import shown_value

GATES = {1: 'softmax', 2: 'sigmoid'}  # how experts are scored, by llama.cpp's numbers


def has_bias(k: Keys, *names: str) -> bool:
    """Whether the first layer has a bias of one of these."""
    return any(k.has(f'blk.0.{name}.bias') for name in names)


def of_class(name: str, kind: str) -> dict[str, Any]:
    return {'architectures': [name], 'model_type': kind}


def llama(k: Keys) -> dict[str, Any]:
    """Llama, and Mistral without its window; with experts Mixtral."""
    fields = common_fields(k)
    fields |= head_fields(k, fields)
    fields |= scaling_fields(k, fields, k.count('rope.dimension_count', fields['head_dim']))
    if not k.whole('expert_count', 0):
        k('expert_used_count', 0)
        biases = {'attention_bias': has_bias(k, 'attn_q'), 'mlp_bias': has_bias(k, 'ffn_gate')}
        return of_class('LlamaForCausalLM', 'llama') | fields | biases
    if k('expert_weights_norm', True) is not True:
        raise UserError(f'{k.path}: key {k.architecture}.expert_weights_norm is false, which Mixtral does not have')
    of_experts = {'num_local_experts': k.count('expert_count'), 'num_experts_per_tok': k.count('expert_used_count')}
    return of_class('MixtralForCausalLM', 'mixtral') | fields | of_experts


def qwen2(k: Keys) -> dict[str, Any]:
    fields = common_fields(k)
    fields |= head_fields(k, fields)
    return of_class('Qwen2ForCausalLM', 'qwen2') | fields | scaling_fields(k, fields, fields['head_dim'])


def qwen3(k: Keys) -> dict[str, Any]:
    fields = common_fields(k)
    fields |= head_fields(k, fields) | {'attention_bias': has_bias(k, 'attn_q')}
    return of_class('Qwen3ForCausalLM', 'qwen3') | fields | scaling_fields(k, fields, fields['head_dim'])


def qwen3moe(k: Keys) -> dict[str, Any]:
    """Weights of the chosen experts add up to 1 where a file says nothing, as in llama.cpp and all published models."""
    fields = qwen3(k)
    return fields | {
        **of_class('Qwen3MoeForCausalLM', 'qwen3_moe'),
        'num_experts': k.count('expert_count'),
        'num_experts_per_tok': k.count('expert_used_count'),
        'moe_intermediate_size': k.count('expert_feed_forward_length'),
        'norm_topk_prob': k('expert_weights_norm', True),
    }


def gemma(k: Keys, deepest: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share. Of the largest model alone, which has `deepest` layers, queries are scaled by the
    width over heads, as llama.cpp knows by that; a file only says it in attention.scale, if at all.
    """
    fields = common_fields(k)
    fields |= head_fields(k, fields)
    plain = (
        fields['head_dim']
        if fields['num_hidden_layers'] != deepest
        else fields['hidden_size'] // fields['num_attention_heads']
    )
    scale = k('attention.scale', None)
    return fields | {
        'query_pre_attn_scalar': plain if scale is None else round(max(k.positive('attention.scale'), 1e-4) ** -2),
        'attention_bias': has_bias(k, 'attn_q'),
        'hidden_activation': 'gelu_pytorch_tanh',
        'hidden_act': 'gelu_pytorch_tanh',
    }


def cap(k: Keys, name: str, default: float = 0.0) -> float | None:
    """A soft cap, of which 0 is none."""
    found = k.number(name, default)
    return float(found) if found else None


def windows(k: Keys, layers: int, every: int, default: int = 0) -> dict[str, Any]:
    """The window, and the layers that have it: all but each so many, where no key says otherwise."""
    key = f'{k.architecture}.attention.sliding_window_pattern'
    said, window = k.values.get(key), k.whole('attention.sliding_window', default)
    k.seen.add(key)
    if isinstance(said, np.ndarray):
        flags = [bool(one) for one in said]
    else:
        every = k.count('attention.sliding_window_pattern', every)
        flags = [(i + 1) % every != 0 for i in range(layers)]
    if len(flags) != layers:
        raise UserError(f'{k.path}: key {key} has {len(flags)} values and the model {layers} layers')
    if not window:
        flags = [False] * layers
    kinds = ['sliding_attention' if flag else 'full_attention' for flag in flags]
    return {'layer_types': kinds} | ({'sliding_window': window} if window else {})


def gemma2(k: Keys) -> dict[str, Any]:
    """Files that were written early say nothing of caps and window: they are those of all published sizes."""
    fields = gemma(k, deepest=46)
    return (
        of_class('Gemma2ForCausalLM', 'gemma2')
        | fields
        | scaling_fields(k, fields, fields['head_dim'])
        | {
            'attn_logit_softcapping': cap(k, 'attn_logit_softcapping', 50.0),
            'final_logit_softcapping': cap(k, 'final_logit_softcapping', 30.0),
            **windows(k, fields['num_hidden_layers'], 2, 4096),
        }
    )


def gemma3(k: Keys) -> dict[str, Any]:
    fields = gemma(k, deepest=62)
    return (
        of_class('Gemma3ForCausalLM', 'gemma3_text')
        | fields
        | scaling_fields(k, fields, fields['head_dim'])
        | {
            'final_logit_softcapping': cap(k, 'final_logit_softcapping'),
            'rope_local_base_freq': float(k.number('rope.freq_base_swa', 10_000.0)),
            **windows(k, fields['num_hidden_layers'], 6),
        }
    )


def gpt_oss(k: Keys) -> dict[str, Any]:
    """YaRN’s bounds are not rounded and units end at 7, as published; no file says either."""
    fields = common_fields(k)
    fields |= head_fields(k, fields)
    scaled = scaling_fields(k, fields, fields['head_dim']).get('rope_scaling', {'rope_type': 'default'})
    if scaled['rope_type'] == 'yarn':
        scaled['truncate'] = False
    return (
        of_class('GptOssForCausalLM', 'gpt_oss')
        | fields
        | {
            'rope_scaling': scaled,
            'intermediate_size': k.count('expert_feed_forward_length', k('feed_forward_length', None)),
            'attention_bias': has_bias(k, 'attn_q'),
            'num_local_experts': k.count('expert_count'),
            'num_experts_per_tok': k.count('expert_used_count'),
            **windows(k, fields['num_hidden_layers'], 2),
        }
    )


def phi3(k: Keys) -> dict[str, Any]:
    fields = common_fields(k)
    plain = fields['hidden_size'] // fields['num_attention_heads']
    turning = k.count('rope.dimension_count', plain)
    fields |= head_fields(k, fields)
    window = k.whole('attention.sliding_window', 0)
    long, short = (k.vector(f'rope_factors_{name}.weight', turning // 2) for name in ('long', 'short'))
    if (long is None) != (short is None):
        raise UserError(
            f'{k.path}: has one of rope_factors_long.weight and rope_factors_short.weight: both or none work'
        )
    kind = k('rope.scaling.type', 'none')
    if kind not in ('none', 'longrope') or (kind == 'longrope' and long is None):
        raise UserError(
            f'{k.path}: key {k.architecture}.rope.scaling.type is {shown_value(kind)}: supported: none, and longrope '
            'with its two tensors of factors'
        )
    k('rope.scaling.attn_factor', None)  # follows from the two contexts
    original = k.count('rope.scaling.original_context_length', fields['max_position_embeddings'])
    scaled: dict[str, Any] = {}
    if long is not None and short is not None:
        factors = {'short_factor': decimals(short), 'long_factor': decimals(long)}
        scaled['rope_scaling'] = {'type': 'longrope'} | factors
    return (
        of_class('Phi3ForCausalLM', 'phi3')
        | fields
        | scaled
        | {
            'original_max_position_embeddings': original,
            'sliding_window': window or None,
        }
    )


def decimals(numbers: np.ndarray) -> list[float]:
    """The shortest decimals that float32 numbers stand for."""
    return [float(str(number)) for number in numbers]


def gpt2(k: Keys) -> dict[str, Any]:
    k('attention.head_count_kv', None)
    k('rope.dimension_count', None)
    embedding = k.tensors.get('token_embd.weight')
    if embedding is None:
        raise UserError(f'{k.path}: tensor token_embd.weight is missing, which every model has')
    return of_class('GPT2LMHeadModel', 'gpt2') | {
        'vocab_size': embedding.shape[0],
        'n_layer': k.layers(),
        'n_embd': k.count('embedding_length'),
        'n_head': k.count('attention.head_count'),
        'n_inner': k.count('feed_forward_length'),
        'n_positions': k.count('context_length'),
        'layer_norm_epsilon': k.positive('attention.layer_norm_epsilon'),
        'activation_function': 'gelu_new',
        'tie_word_embeddings': not k.has('output.weight'),
    }


def routing(k: Keys) -> dict[str, Any]:
    """The experts of DeepSeek's models and of GLM-4.5."""
    return {
        'n_routed_experts': k.count('expert_count'),
        'num_experts_per_tok': k.count('expert_used_count'),
        'moe_intermediate_size': k.count('expert_feed_forward_length'),
        'n_shared_experts': k.whole('expert_shared_count', 0),
        'first_k_dense_replace': k.whole('leading_dense_block_count', 0),
        'norm_topk_prob': k('expert_weights_norm', False),
        'routed_scaling_factor': float(k.number('expert_weights_scale', 1.0) or 1.0),
    }


def gate(k: Keys, default: int) -> str:
    """How experts are scored."""
    found = k.whole('expert_gating_func', 0) or default  # older files do not say it
    if found not in GATES:
        known = ', '.join(f'{number} ({name})' for number, name in GATES.items())
        raise UserError(f'{k.path}: key {k.architecture}.expert_gating_func is {found}; supported: {known}')
    return GATES[found]


def deepseek2(k: Keys) -> dict[str, Any]:
    """DeepSeek-V2, with a softmax over experts; V3 and R1, with a sigmoid.

    Keys and values of latent attention are one tensor in older files (attn_kv_b), and two in newer ones, whose keys
    attention.key_length and value_length are of the joint form that llama.cpp computes in.
    """
    fields = common_fields(k)
    turning, rank = k.count('rope.dimension_count'), k.count('attention.kv_lora_rank')
    joint = k.has('blk.0.attn_k_b.weight')
    width = k.count('attention.key_length_mla' if joint else 'attention.key_length')
    values = k.count('attention.value_length_mla' if joint else 'attention.value_length')
    for name in ('attention.key_length', 'attention.key_length_mla', 'attention.value_length_mla'):
        k(name, None)
    if width <= turning:
        raise UserError(f'{k.path}: keys of {width} dims are not wider than the {turning} of them that turn')
    sigmoid = gate(k, default=1) == 'sigmoid'
    # Files of V3 from before llama.cpp chose experts by groups do not say the groups, which that model has.
    published = sigmoid and k.count('expert_count') == 256
    groups = k.count('expert_group_count', 8 if published else 1)
    top = k.count('expert_group_used_count', 4 if published else 1)
    scaled = scaling_fields(k, fields, turning)
    log = k.number('rope.scaling.yarn_log_multiplier', 0.0)
    if 'rope_scaling' in scaled and log:
        both = float(f'{log / 0.1:.6g}')  # a converter writes a tenth of it
        scaled['rope_scaling'] |= {'mscale': both, 'mscale_all_dim': both}
    how = {
        'scoring_func': 'sigmoid' if sigmoid else 'softmax',
        'topk_method': 'noaux_tc' if sigmoid else 'greedy' if groups == 1 else 'group_limited_greedy',
        'n_group': groups,
        'topk_group': top,
    }
    both_classes = {True: ('DeepseekV3ForCausalLM', 'deepseek_v3'), False: ('DeepseekV2ForCausalLM', 'deepseek_v2')}
    fields |= of_class(*both_classes[sigmoid]) | scaled | routing(k) | how
    if not sigmoid:
        fields['mlp_bias'] = has_bias(k, 'ffn_gate', 'ffn_gate_shexp')
    k('nextn_predict_layers', 0)  # converters leave these layers out
    return fields | {
        'num_key_value_heads': fields['num_attention_heads'],
        'q_lora_rank': k.count('attention.q_lora_rank')
        if k.has('blk.0.attn_q_a.weight')
        else k('attention.q_lora_rank', None),
        'kv_lora_rank': rank,
        'qk_nope_head_dim': width - turning,
        'qk_rope_head_dim': turning,
        'v_head_dim': values,
        'attention_bias': has_bias(k, 'attn_q_a', 'attn_kv_a_mqa'),
    }


def glm4moe(k: Keys) -> dict[str, Any]:
    """GLM-4.5; layers that predict further ahead count among the blocks."""
    fields = common_fields(k)
    fields |= head_fields(k, fields)
    ahead = k.whole('nextn_predict_layers', 0)
    layers = fields['num_hidden_layers'] - ahead
    if not 0 <= ahead < fields['num_hidden_layers']:
        raise UserError(
            f'{k.path}: key {k.architecture}.nextn_predict_layers is {ahead} of '
            f'{fields["num_hidden_layers"]} blocks: it must be less'
        )
    if gate(k, default=2) != 'sigmoid':
        raise UserError(f'{k.path}: key {k.architecture}.expert_gating_func is 1 (softmax); supported: 2 (sigmoid)')
    fraction = fields.pop('partial_rotary_factor', 1.0)
    return (
        of_class('Glm4MoeForCausalLM', 'glm4_moe')
        | fields
        | scaling_fields(k, fields, round(fraction * fields['head_dim']))
        | {
            **routing(k),
            'num_hidden_layers': layers,
            'num_nextn_predict_layers': ahead,
            'partial_rotary_factor': fraction,
            'n_group': k.whole('expert_group_count', 1) or 1,
            'topk_group': k.whole('expert_group_used_count', 1) or 1,
            'attention_bias': has_bias(k, 'attn_q'),
            'use_qk_norm': k.has('blk.0.attn_q_norm.weight'),
        }
    )
