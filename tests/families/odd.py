"""Odd settings of a case, other ones for each seed: what `make parity` compares beside the settings that are committed."""

import random
from typing import Any

# fmt: off
VALUES: dict[str, tuple[Any, ...]] = {  # of fields that a case has; each is drawn as often as not
    'vocab_size': (131, 200, 256, 300),
    'intermediate_size': (24, 40, 72), 'n_inner': (None, 40), 'd_ff': (24, 40, 72), 'moe_intermediate_size': (8, 24, 40),
    'num_hidden_layers': (2, 3, 5), 'n_layer': (1, 3, 5),
    'num_attention_heads': (2, 4, 8), 'n_head': (2, 8),
    'num_key_value_heads': (1, 2),
    'head_dim': (8, 16, 32),
    'rms_norm_eps': (1e-6, 1e-3), 'layer_norm_epsilon': (1e-6, 1e-3),
    'tie_word_embeddings': (False, True),
    'attention_bias': (False, True), 'mlp_bias': (False, True),
    'rope_theta': (3e3, 5e5, 1e6), 'rope_local_base_freq': (50, 3e3), 'partial_rotary_factor': (0.25, 0.5, 1.0),
    'sliding_window': (5, 37, 159, 1000), 'max_window_layers': (0, 1, 9), 'sliding_window_pattern': (2, 3),
    'query_pre_attn_scalar': (8, 31), 'attn_logit_softcapping': (1.0, 50.0), 'final_logit_softcapping': (2.0, 30.0),
    'attn_output_multiplier': (0.05, 0.4), 'max_attn_value': (1.0, 30.0), 'embedding_multiplier_scale': (1.0, 20.0),
    'output_multiplier_scale': (0.1, 3.0), 'swiglu_limit': (0.3, 7.0), 'scale_attn_weights': (False, True),
    'num_layers': (1, 3), 'num_decoder_layers': (1, 2, 4), 'num_heads': (2, 4, 8), 'd_kv': (8, 24),
    'relative_attention_num_buckets': (8, 12, 32), 'relative_attention_max_distance': (17, 64, 200),
    'feed_forward_proj': ('gated-gelu', 'gated-silu', 'relu', 'gelu', 'gelu_new', 'silu'),
    'encoder_layers': (1, 3), 'decoder_layers': (1, 2, 4), 'encoder_ffn_dim': (24, 72), 'decoder_ffn_dim': (24, 40),
    'encoder_attention_heads': (2, 4, 8), 'decoder_attention_heads': (2, 4, 8), 'scale_embedding': (False, True),
    'type_vocab_size': (1, 2, 4), 'layer_norm_eps': (1e-12, 1e-4),
    'activation_function': ('gelu_new', 'relu', 'gelu'),
    'num_experts': (4, 6, 16), 'num_local_experts': (4, 6, 16), 'n_routed_experts': (8, 16),
    'num_experts_per_tok': (1, 2, 3), 'norm_topk_prob': (False, True), 'routed_scaling_factor': (0.5, 4.0),
    'n_shared_experts': (1, 2, 3), 'first_k_dense_replace': (0, 1), 'decoder_sparse_step': (1, 2), 'topk_group': (2, 3),
    'no_rope_layer_interval': (2, 3), 'shared_expert_intermediate_size': (24, 40), 'qkv_bias': (False, True),
    'scale_attn_by_inverse_layer_idx': (False, True),
    'q_lora_rank': (None, 8, 40), 'kv_lora_rank': (8, 40), 'qk_nope_head_dim': (8, 24), 'v_head_dim': (8, 20),
    'qk_rope_head_dim': (8, 16), 'rope_interleave': (False, True), 'use_qk_norm': (False, True),
}
# fmt: on


def odd(name: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The config with about half of its fields at other values, those that must agree made to agree."""
    draw = random.Random(f'{seed} {name}')
    found = dict(config)
    for field in sorted(VALUES.keys() & config.keys()):
        if config[field] is not None and draw.random() < 0.5:
            found[field] = draw.choice(VALUES[field])
    heads = next((found[field] for field in ('num_attention_heads', 'n_head') if field in found), None)
    if heads and 'num_key_value_heads' in found:
        found['num_key_value_heads'] = (
            heads if 'kv_lora_rank' in found or draw.random() < 0.3 else min(found['num_key_value_heads'], heads)
        )
    width = next((found[field] for field in ('hidden_size', 'n_embd') if field in found), 0)
    if heads and width % heads and 'num_attention_heads' in found:
        found['num_attention_heads'] = config['num_attention_heads']
    for field in ('pad_token_id', 'decoder_start_token_id'):
        if field in found:
            found[field] = min(found[field], found['vocab_size'] - 1)
    if 'layer_types' in found:
        kinds = sorted(set(config['layer_types']))
        found['layer_types'] = [draw.choice(kinds) for _ in range(found['num_hidden_layers'])]
    if 'no_rope_layers' in found:
        found['no_rope_layers'] = [draw.choice((0, 1)) for _ in range(found['num_hidden_layers'])]
    for other, field in (('experts_per_token', 'num_experts_per_tok'), ('sliding_window_size', 'sliding_window')):
        if other in found:
            found[other] = found[field]
    if 'first_k_dense_replace' in found:
        found['first_k_dense_replace'] = min(found['first_k_dense_replace'], found['num_hidden_layers'] - 1)
    if found.get('scoring_func') == 'softmax':
        found['norm_topk_prob'] = False  # transformers does not look at it there
    if 'topk_group' in found:
        found['topk_group'] = min(found['topk_group'], found['n_group'])
    if long := [field for field in ('rope_scaling', 'rope_parameters') if 'short_factor' in (found.get(field) or {})]:
        pairs = int(found['hidden_size'] // heads * found.get('partial_rotary_factor', 1.0)) // 2
        factors = {'short_factor': (0.9, 0.1), 'long_factor': (1.1, 0.6)}
        lists = {key: [first + step * i for i in range(pairs)] for key, (first, step) in factors.items()}
        found[long[0]] = found[long[0]] | lists
    return found
