"""The keys of GGUF files as the fields of an equivalent config.json: one function for each architecture.

Where a converter leaves something out of a file, what llama.cpp assumes in its place is said here. A key of the architecture
that nothing reads becomes a field of its own name, so that it is refused like any field that may change the result.
"""

from typing import Any

import numpy as np

from weft.hub.gguf.keys import Keys
from weft.hub.gguf.rope_scaling import original_context, scaling_fields
from weft.storage.foreign import shown_value

GATES = {1: 'softmax', 2: 'sigmoid'}  # how experts are scored, by llama.cpp's numbers


def of_class(name: str, kind: str) -> dict[str, Any]:
    return {'architectures': [name], 'model_type': kind}


def common_fields(k: Keys) -> dict[str, Any]:
    """The fields that Llama and its many descendants share, but for heads."""
    heads, width = k.count('attention.head_count'), k.count('embedding_length')
    return {
        'vocab_size': k.vocabulary(),
        'num_hidden_layers': k.layers(),
        'hidden_size': width,
        'num_attention_heads': heads,
        'num_key_value_heads': k.count('attention.head_count_kv', heads),
        'intermediate_size': k.count('feed_forward_length'),
        'rms_norm_eps': k.positive('attention.layer_norm_rms_epsilon'),
        'max_position_embeddings': k.count('context_length'),
        'rope_theta': k.positive('rope.freq_base', 10_000.0),
        'tie_word_embeddings': 'output.weight' not in k.tensors,
    }


def decoder_fields(k: Keys, name: str, kind: str) -> dict[str, Any]:
    """`common_fields` of a class, the width of its heads, and of which part of one positions turn."""
    fields = of_class(name, kind) | common_fields(k)
    width = k.count('attention.key_length', fields['hidden_size'] // fields['num_attention_heads'])
    turning, values = k.count('rope.dimension_count', width), k.count('attention.value_length', width)
    if values != width:
        raise k.error(
            f'key {k.architecture}.attention.value_length is {values} and key_length {width}: both must be the same'
        )
    return fields | {'head_dim': width} | ({} if turning == width else {'partial_rotary_factor': turning / width})


def has_bias(k: Keys, *names: str) -> bool:
    """Whether the first layer has a bias of one of these."""
    return any(f'blk.0.{name}.bias' in k.tensors for name in names)


def experts(k: Keys, field: str) -> dict[str, Any]:
    """How many there are, by the name of config.json's `field`, and how many a token visits."""
    return {field: k.count('expert_count'), 'num_experts_per_tok': k.count('expert_used_count')}


def llama(k: Keys) -> dict[str, Any]:
    """Llama, and Mistral without its window; with experts Mixtral."""
    fields = decoder_fields(k, 'LlamaForCausalLM', 'llama')
    fields |= scaling_fields(k, fields, k.count('rope.dimension_count', fields['head_dim']))
    if not k.whole('expert_count', 0):
        k('expert_used_count', 0)
        return fields | {'attention_bias': has_bias(k, 'attn_q'), 'mlp_bias': has_bias(k, 'ffn_gate')}
    if k('expert_weights_norm', True) is not True:
        raise k.error(f'key {k.architecture}.expert_weights_norm is false, which Mixtral does not have')
    return fields | of_class('MixtralForCausalLM', 'mixtral') | experts(k, 'num_local_experts')


def qwen2(k: Keys) -> dict[str, Any]:
    fields = decoder_fields(k, 'Qwen2ForCausalLM', 'qwen2')
    return fields | scaling_fields(k, fields)


def qwen3(k: Keys) -> dict[str, Any]:
    fields = decoder_fields(k, 'Qwen3ForCausalLM', 'qwen3')
    return fields | {'attention_bias': has_bias(k, 'attn_q')} | scaling_fields(k, fields)


def qwen3moe(k: Keys) -> dict[str, Any]:
    """Weights of the chosen experts add up to 1 where a file says nothing, as in llama.cpp and all published models."""
    return {
        **qwen3(k),
        **of_class('Qwen3MoeForCausalLM', 'qwen3_moe'),
        **experts(k, 'num_experts'),
        'moe_intermediate_size': k.count('expert_feed_forward_length'),
        'norm_topk_prob': k('expert_weights_norm', True),
    }


def gemma(k: Keys, name: str, kind: str, deepest: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share. Of the largest model alone, which has `deepest` layers, queries are scaled by the
    width over heads, as llama.cpp knows by that; a file only says it in attention.scale, if at all.
    """
    fields = decoder_fields(k, name, kind)
    largest = fields['num_hidden_layers'] == deepest
    scalar = fields['hidden_size'] // fields['num_attention_heads'] if largest else fields['head_dim']
    if k('attention.scale', None) is not None:
        scalar = round(max(k.positive('attention.scale'), 1e-4) ** -2)
    fields |= {
        'query_pre_attn_scalar': scalar,
        'attention_bias': has_bias(k, 'attn_q'),
        'hidden_activation': 'gelu_pytorch_tanh',
        'hidden_act': 'gelu_pytorch_tanh',
    }
    return fields | scaling_fields(k, fields)


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
        raise k.error(f'key {key} has {len(flags)} values and the model {layers} layers')
    if not window:
        flags = [False] * layers
    kinds = ['sliding_attention' if flag else 'full_attention' for flag in flags]
    return {'layer_types': kinds} | ({'sliding_window': window} if window else {})


def gemma2(k: Keys) -> dict[str, Any]:
    """Files that were written early say nothing of caps and window: they are those of all published sizes."""
    fields = gemma(k, 'Gemma2ForCausalLM', 'gemma2', deepest=46)
    return fields | {
        'attn_logit_softcapping': cap(k, 'attn_logit_softcapping', 50.0),
        'final_logit_softcapping': cap(k, 'final_logit_softcapping', 30.0),
        **windows(k, fields['num_hidden_layers'], 2, 4096),
    }


def gemma3(k: Keys) -> dict[str, Any]:
    fields = gemma(k, 'Gemma3ForCausalLM', 'gemma3_text', deepest=62)
    return fields | {
        'final_logit_softcapping': cap(k, 'final_logit_softcapping'),
        'rope_local_base_freq': float(k.number('rope.freq_base_swa', 10_000.0)),
        **windows(k, fields['num_hidden_layers'], 6),
    }


def gpt_oss(k: Keys) -> dict[str, Any]:
    """YaRN’s bounds are not rounded and units end at 7, as published; no file says either."""
    fields = decoder_fields(k, 'GptOssForCausalLM', 'gpt_oss')
    scaled = scaling_fields(k, fields).get('rope_scaling', {'rope_type': 'default'})
    if scaled['rope_type'] == 'yarn':
        scaled['truncate'] = False
    return fields | {
        'rope_scaling': scaled,
        'intermediate_size': k.count('expert_feed_forward_length', k('feed_forward_length', None)),
        'attention_bias': has_bias(k, 'attn_q'),
        **experts(k, 'num_local_experts'),
        **windows(k, fields['num_hidden_layers'], 2),
    }


def phi3(k: Keys) -> dict[str, Any]:
    fields = decoder_fields(k, 'Phi3ForCausalLM', 'phi3')
    turning = k.count('rope.dimension_count', fields['hidden_size'] // fields['num_attention_heads'])
    window = k.whole('attention.sliding_window', 0)
    long, short = (k.vector(f'rope_factors_{name}.weight', turning // 2) for name in ('long', 'short'))
    if (long is None) != (short is None):
        raise k.error('has one of rope_factors_long.weight and rope_factors_short.weight: both or none work')
    kind = k('rope.scaling.type', 'none')
    if kind not in ('none', 'longrope') or (kind == 'longrope' and long is None):
        raise k.error(
            f'key {k.architecture}.rope.scaling.type is {shown_value(kind)}: supported: none, and longrope with its two '
            'tensors of factors'
        )
    k('rope.scaling.attn_factor', None)  # follows from the two contexts
    original = original_context(k, fields)
    if long is not None and short is not None:
        factors = {'short_factor': decimals(short), 'long_factor': decimals(long)}
        fields['rope_scaling'] = {'type': 'longrope'} | factors
    return fields | {'original_max_position_embeddings': original, 'sliding_window': window or None}


def decimals(numbers: np.ndarray) -> list[float]:
    """The shortest decimals that float32 numbers stand for."""
    return [float(str(number)) for number in numbers]


def gpt2(k: Keys) -> dict[str, Any]:
    k('attention.head_count_kv', None)
    k('rope.dimension_count', None)
    return of_class('GPT2LMHeadModel', 'gpt2') | {
        'vocab_size': k.vocabulary(),
        'n_layer': k.layers(),
        'n_embd': k.count('embedding_length'),
        'n_head': k.count('attention.head_count'),
        'n_inner': k.count('feed_forward_length'),
        'n_positions': k.count('context_length'),
        'layer_norm_epsilon': k.positive('attention.layer_norm_epsilon'),
        'activation_function': 'gelu_new',
        'tie_word_embeddings': 'output.weight' not in k.tensors,
    }


def routing(k: Keys) -> dict[str, Any]:
    """The experts of DeepSeek's models and of GLM-4.5."""
    return {
        **experts(k, 'n_routed_experts'),
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
        raise k.error(f'key {k.architecture}.expert_gating_func is {found}; supported: {known}')
    return GATES[found]


def deepseek2(k: Keys) -> dict[str, Any]:
    """DeepSeek-V2, with a softmax over experts; V3 and R1, with a sigmoid.

    Keys and values of latent attention are one tensor in older files (attn_kv_b), and two in newer ones, whose keys
    attention.key_length and value_length are of the joint form that llama.cpp computes in.
    """
    fields = common_fields(k)
    turning, rank = k.count('rope.dimension_count'), k.count('attention.kv_lora_rank')
    joint = 'blk.0.attn_k_b.weight' in k.tensors
    width = k.count('attention.key_length_mla' if joint else 'attention.key_length')
    values = k.count('attention.value_length_mla' if joint else 'attention.value_length')
    for name in ('attention.key_length', 'attention.key_length_mla', 'attention.value_length_mla'):
        k(name, None)
    if width <= turning:
        raise k.error(f'keys of {width} dims are not wider than the {turning} of them that turn')
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
    version = 3 if sigmoid else 2
    fields |= of_class(f'DeepseekV{version}ForCausalLM', f'deepseek_v{version}') | scaled | routing(k)
    fields |= {
        'scoring_func': 'sigmoid' if sigmoid else 'softmax',
        'topk_method': 'noaux_tc' if sigmoid else 'greedy' if groups == 1 else 'group_limited_greedy',
        'n_group': groups,
        'topk_group': top,
    }
    if not sigmoid:
        fields['mlp_bias'] = has_bias(k, 'ffn_gate', 'ffn_gate_shexp')
    k('nextn_predict_layers', 0)  # converters leave these layers out
    name = 'attention.q_lora_rank'
    return fields | {
        'num_key_value_heads': fields['num_attention_heads'],
        'q_lora_rank': k.count(name) if 'blk.0.attn_q_a.weight' in k.tensors else k(name, None),
        'kv_lora_rank': rank,
        'qk_nope_head_dim': width - turning,
        'qk_rope_head_dim': turning,
        'v_head_dim': values,
        'attention_bias': has_bias(k, 'attn_q_a', 'attn_kv_a_mqa'),
    }


def glm4moe(k: Keys) -> dict[str, Any]:
    """GLM-4.5; layers that predict further ahead count among the blocks."""
    fields = decoder_fields(k, 'Glm4MoeForCausalLM', 'glm4_moe')
    ahead, blocks = k.whole('nextn_predict_layers', 0), fields['num_hidden_layers']
    if not 0 <= ahead < blocks:
        raise k.error(f'key {k.architecture}.nextn_predict_layers is {ahead} of {blocks} blocks: it must be less')
    if gate(k, default=2) != 'sigmoid':
        raise k.error(f'key {k.architecture}.expert_gating_func is 1 (softmax); supported: 2 (sigmoid)')
    fraction = fields.pop('partial_rotary_factor', 1.0)
    return fields | {
        **scaling_fields(k, fields, round(fraction * fields['head_dim'])),
        **routing(k),
        'num_hidden_layers': blocks - ahead,
        'num_nextn_predict_layers': ahead,
        'partial_rotary_factor': fraction,
        'n_group': k.whole('expert_group_count', 1) or 1,
        'topk_group': k.whole('expert_group_used_count', 1) or 1,
        'attention_bias': has_bias(k, 'attn_q'),
        'use_qk_norm': 'blk.0.attn_q_norm.weight' in k.tensors,
    }
