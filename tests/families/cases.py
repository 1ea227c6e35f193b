"""Tiny configs of each family, as published config.json files are: together they exercise what the family can do.

CASES: name -> config. The name begins with the family's file in hub/families.
"""

from typing import Any

ROWS, LENGTH, KEPT = 4, 160, 32  # tokens of a case; positions whose logits are committed
PROMPT, NEW = 16, 64  # tokens that are read, and continued greedily
VOCABULARY = 200
SEED = 7
BEAMS = {'llama-grouped': 117, 't5-v1.1': 44}  # cases with a beam search, and the token that ends a continuation
NOT_IN_TRANSFORMERS = ('grok1',)
OFFSET_NORMS = ('gemma2', 'gemma3')  # families whose norm weights are differences from 1
BASE: dict[str, Any] = {
    'vocab_size': VOCABULARY,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 512,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False,
}
CASES: dict[str, dict[str, Any]] = {}


def case(name: str, architecture: str, model_type: str, base: dict[str, Any] = BASE, **fields: Any) -> None:
    """One more config: `base` with other fields; None is null in it."""
    config = {'architectures': [architecture], 'model_type': model_type, **base, **fields}
    assert name not in CASES, name
    CASES[name] = config


def family(name: str) -> str:
    return name.partition('-')[0]


def llama(name: str, **fields: Any) -> None:
    case(f'llama-{name}', 'LlamaForCausalLM', 'llama', **fields)


llama('grouped', rope_theta=5e5)
llama('multi-head-tied-all-biases', num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
llama('multi-query-wide-heads', num_key_value_heads=1, head_dim=24, rms_norm_eps=1e-3)
llama(
    'llama3-scaling',
    rope_theta=1e4,
    rope_scaling={
        'rope_type': 'llama3',
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 64,
    },
)
llama('linear-scaling', rope_scaling={'type': 'linear', 'factor': 4.0})
llama('dynamic-scaling-long', rope_scaling={'type': 'dynamic', 'factor': 2.0}, max_position_embeddings=64)
llama(
    'yarn',
    rope_scaling={'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32},
)
llama(
    'yarn-all-said',
    rope_parameters={
        'rope_type': 'yarn',
        'rope_theta': 2e4,
        'factor': 8.0,
        'original_max_position_embeddings': 64,
        'beta_fast': 4.0,
        'beta_slow': 0.5,
        'attention_factor': 1.25,
        'truncate': False,
    },
)


case('mistral-window', 'MistralForCausalLM', 'mistral', sliding_window=24)
case('mistral-no-window-wide-heads', 'MistralForCausalLM', 'mistral', sliding_window=None, head_dim=24)
case(
    'mistral-wide-window-yarn',
    'MistralForCausalLM',
    'mistral',
    sliding_window=1000,
    rope_parameters={
        'rope_type': 'yarn',
        'rope_theta': 1e6,
        'factor': 4.0,
        'original_max_position_embeddings': 128,
    },
)

MIXTRAL = BASE | {'num_local_experts': 8, 'num_experts_per_tok': 2, 'rope_theta': 1e6}
case('mixtral-plain', 'MixtralForCausalLM', 'mixtral', MIXTRAL)
case('mixtral-window-top-3', 'MixtralForCausalLM', 'mixtral', MIXTRAL, sliding_window=20, num_experts_per_tok=3)
case('mixtral-top-1-tied', 'MixtralForCausalLM', 'mixtral', MIXTRAL, num_experts_per_tok=1, tie_word_embeddings=True)

case('qwen2-plain', 'Qwen2ForCausalLM', 'qwen2', rope_theta=1e6, use_sliding_window=False, sliding_window=16)
case(
    'qwen2-late-windows',
    'Qwen2ForCausalLM',
    'qwen2',
    num_hidden_layers=4,
    use_sliding_window=True,
    sliding_window=16,
    max_window_layers=2,
    tie_word_embeddings=True,
)
case(
    'qwen2-yarn',
    'Qwen2ForCausalLM',
    'qwen2',
    rope_scaling={'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 128},
)

case('qwen3-plain', 'Qwen3ForCausalLM', 'qwen3', head_dim=32)
case('qwen3-biases-tied', 'Qwen3ForCausalLM', 'qwen3', head_dim=16, attention_bias=True, tie_word_embeddings=True)
case(
    'qwen3-windows-by-layer',
    'Qwen3ForCausalLM',
    'qwen3',
    head_dim=16,
    num_hidden_layers=4,
    use_sliding_window=True,
    sliding_window=12,
    layer_types=['sliding_attention', 'full_attention'] * 2,
)

QWEN3_MOE = BASE | {
    'head_dim': 16,
    'num_experts': 16,
    'num_experts_per_tok': 4,
    'moe_intermediate_size': 32,
    'norm_topk_prob': True,
}
case('qwen3_moe-plain', 'Qwen3MoeForCausalLM', 'qwen3_moe', QWEN3_MOE)
case(
    'qwen3_moe-every-second-layer',
    'Qwen3MoeForCausalLM',
    'qwen3_moe',
    QWEN3_MOE,
    num_hidden_layers=4,
    decoder_sparse_step=2,
    norm_topk_prob=False,
)
case(
    'qwen3_moe-some-dense-window-biases',
    'Qwen3MoeForCausalLM',
    'qwen3_moe',
    QWEN3_MOE,
    num_hidden_layers=3,
    mlp_only_layers=[1],
    attention_bias=True,
    use_sliding_window=True,
    sliding_window=16,
)

OLMOE = BASE | {'num_experts': 8, 'num_experts_per_tok': 2, 'num_key_value_heads': 4, 'intermediate_size': 32}
case('olmoe-plain', 'OlmoeForCausalLM', 'olmoe', OLMOE)
case('olmoe-grouped-renormalised', 'OlmoeForCausalLM', 'olmoe', OLMOE, num_key_value_heads=2, norm_topk_prob=True)
case('olmoe-one-kv-head-biases', 'OlmoeForCausalLM', 'olmoe', OLMOE, num_key_value_heads=1, attention_bias=True)

OLMO2 = BASE | {'rope_theta': 5e5}
case('olmo2-plain', 'Olmo2ForCausalLM', 'olmo2', OLMO2, num_key_value_heads=4)
case(
    'olmo2-grouped-biases-tied',
    'Olmo2ForCausalLM',
    'olmo2',
    OLMO2,
    attention_bias=True,
    tie_word_embeddings=True,
    rms_norm_eps=1e-3,
)
case(
    'olmo2-one-kv-head-yarn',
    'Olmo2ForCausalLM',
    'olmo2',
    OLMO2,
    num_key_value_heads=1,
    rope_scaling={'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64},
)

SMOLLM3 = {name: value for name, value in BASE.items() if name != 'tie_word_embeddings'} | {'pad_token_id': 0}
case(
    'smollm3-as-published',
    'SmolLM3ForCausalLM',
    'smollm3',
    SMOLLM3,
    num_hidden_layers=5,
    layer_types=['full_attention'] * 5,
    max_window_layers=28,
    mlp_bias=False,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0, 1],
    pretraining_tp=2,
    rope_theta=5e4,
    sliding_window=None,
    use_sliding_window=False,
)
case(
    'smollm3-every-second-windows-untied',
    'SmolLM3ForCausalLM',
    'smollm3',
    SMOLLM3,
    num_hidden_layers=4,
    no_rope_layer_interval=2,
    use_sliding_window=True,
    sliding_window=12,
    tie_word_embeddings=False,
)
case(
    'smollm3-first-layer-windows-by-layer-biases',
    'SmolLM3ForCausalLM',
    'smollm3',
    SMOLLM3,
    num_hidden_layers=3,
    num_key_value_heads=1,
    no_rope_layers=[0, 1, 1],
    use_sliding_window=True,
    sliding_window=20,
    layer_types=['full_attention', 'sliding_attention', 'full_attention'],
    attention_bias=True,
    mlp_bias=True,
)

QWEN2_MOE = BASE | {
    'num_key_value_heads': 4,
    'num_experts': 8,
    'num_experts_per_tok': 3,
    'moe_intermediate_size': 32,
    'shared_expert_intermediate_size': 56,
    'norm_topk_prob': False,
}
case('qwen2_moe-plain', 'Qwen2MoeForCausalLM', 'qwen2_moe', QWEN2_MOE, rope_theta=1e6)
case(
    'qwen2_moe-every-second-layer-renormalised-no-biases-tied',
    'Qwen2MoeForCausalLM',
    'qwen2_moe',
    QWEN2_MOE,
    num_hidden_layers=4,
    num_key_value_heads=1,
    decoder_sparse_step=2,
    norm_topk_prob=True,
    qkv_bias=False,
    tie_word_embeddings=True,
)
case(
    'qwen2_moe-some-dense-windows',
    'Qwen2MoeForCausalLM',
    'qwen2_moe',
    QWEN2_MOE,
    num_hidden_layers=4,
    num_key_value_heads=2,
    mlp_only_layers=[1],
    use_sliding_window=True,
    sliding_window=16,
    max_window_layers=3,
)

LONGROPE = {
    'type': 'longrope',
    'short_factor': [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    'long_factor': [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
PHI3 = BASE | {'original_max_position_embeddings': 512, 'pad_token_id': 0}
case('phi3-plain-window', 'Phi3ForCausalLM', 'phi3', PHI3, sliding_window=30)
case(
    'phi3-longrope-long',
    'Phi3ForCausalLM',
    'phi3',
    PHI3,
    rope_scaling=LONGROPE,
    original_max_position_embeddings=64,
)
case(
    'phi3-longrope-short',
    'Phi3ForCausalLM',
    'phi3',
    PHI3,
    rope_scaling=LONGROPE,
    original_max_position_embeddings=256,
    num_key_value_heads=4,
)
case(
    'phi3-partly-rotary-tied',
    'Phi3ForCausalLM',
    'phi3',
    PHI3,
    partial_rotary_factor=0.75,
    num_attention_heads=2,
    tie_word_embeddings=True,
)

case(
    'phi3-4-mini',
    'Phi3ForCausalLM',
    'phi3',
    PHI3,
    rope_scaling=LONGROPE | {'short_factor': [1.0] * 6, 'long_factor': [1.0, 1.25, 1.5, 2.5, 5.0, 8.0]},
    original_max_position_embeddings=64,
    partial_rotary_factor=0.75,
    sliding_window=1000,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    lm_head_bias=False,
    full_attn_mod=1,
    interpolate_factor=1,
)

GLM4_MOE = BASE | {
    'head_dim': 16,
    'n_routed_experts': 8,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 32,
    'num_hidden_layers': 3,
    'first_k_dense_replace': 1,
    'num_nextn_predict_layers': 0,
}
case('glm4_moe-air', 'Glm4MoeForCausalLM', 'glm4_moe', GLM4_MOE, attention_bias=True, partial_rotary_factor=0.5)
case('glm4_moe-qk-norm', 'Glm4MoeForCausalLM', 'glm4_moe', GLM4_MOE, use_qk_norm=True, routed_scaling_factor=2.5)
case(
    'glm4_moe-groups-two-dense',
    'Glm4MoeForCausalLM',
    'glm4_moe',
    GLM4_MOE,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    norm_topk_prob=False,
    first_k_dense_replace=2,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1e5, 'partial_rotary_factor': 0.25},
)


GPT2 = {'vocab_size': VOCABULARY, 'n_embd': 64, 'n_layer': 2, 'n_head': 4, 'n_positions': 160}
case('gpt2-plain', 'GPT2LMHeadModel', 'gpt2', GPT2, n_ctx=160, n_inner=None)
case(
    'gpt2-untied-unscaled-exact-gelu',
    'GPT2LMHeadModel',
    'gpt2',
    GPT2,
    n_inner=96,
    activation_function='gelu',
    layer_norm_epsilon=1e-3,
    scale_attn_weights=False,
    tie_word_embeddings=False,
)
case(
    'gpt2-relu-other-names',
    'GPT2LMHeadModel',
    'gpt2',
    {'vocab_size': VOCABULARY},
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=200,
    activation_function='relu',
    reorder_and_upcast_attn=True,
)
case(
    'gpt2-by-layer',
    'GPT2LMHeadModel',
    'gpt2',
    GPT2,
    n_layer=3,
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
)

GEMMA2 = {name: value for name, value in BASE.items() if name != 'tie_word_embeddings'} | {'head_dim': 16}
case(
    'gemma2-as-published',
    'Gemma2ForCausalLM',
    'gemma2',
    GEMMA2,
    hidden_size=48,
    num_hidden_layers=4,
    hidden_act='gelu_pytorch_tanh',
    hidden_activation='gelu_pytorch_tanh',
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    sliding_window=12,
    sliding_window_size=12,
    query_pre_attn_scalar=12,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=10.0,
    cache_implementation='hybrid',
)
case(
    'gemma2-no-caps-biases-untied',
    'Gemma2ForCausalLM',
    'gemma2',
    GEMMA2,
    head_dim=24,
    num_key_value_heads=1,
    layer_types=['full_attention'] * 2,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    attention_bias=True,
    tie_word_embeddings=False,
)
case(
    'gemma2-defaults-layer-types-linear-silu',
    'Gemma2ForCausalLM',
    'gemma2',
    GEMMA2,
    num_hidden_layers=3,
    hidden_activation='silu',
    query_pre_attn_scalar=16,
    sliding_window=20,
    layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
    rope_parameters={'rope_type': 'linear', 'rope_theta': 1e5, 'factor': 4.0},
)

GEMMA3 = GEMMA2 | {'num_hidden_layers': 6, 'hidden_activation': 'gelu_pytorch_tanh'}
case(
    'gemma3-as-published',
    'Gemma3ForCausalLM',
    'gemma3_text',
    GEMMA3,
    num_hidden_layers=7,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    query_pre_attn_scalar=20,
    rope_local_base_freq=100,
    rope_theta=1e6,
    rope_scaling={'rope_type': 'linear', 'factor': 8.0},
    sliding_window=20,
    sliding_window_pattern=6,
    rms_norm_eps=1e-6,
)
case(
    'gemma3-two-ropes-yarn-capped-biases-untied',
    'Gemma3ForCausalLM',
    'gemma3_text',
    GEMMA3,
    hidden_size=48,
    head_dim=24,
    num_hidden_layers=3,
    num_key_value_heads=1,
    query_pre_attn_scalar=24,
    attention_bias=True,
    tie_word_embeddings=False,
    final_logit_softcapping=6.0,
    sliding_window=12,
    layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
    rope_parameters={
        'full_attention': {
            'rope_type': 'yarn',
            'rope_theta': 1e4,
            'factor': 4.0,
            'original_max_position_embeddings': 64,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 500.0},
    },
)
case(
    'gemma3-every-second-silu-defaults',
    'Gemma3ForCausalLM',
    'gemma3_text',
    GEMMA3,
    num_hidden_layers=4,
    hidden_activation='silu',
    rms_norm_eps=1e-3,
    sliding_window=16,
    sliding_window_pattern=2,
)
case(
    'gemma3-no-windows',
    'Gemma3ForCausalLM',
    'gemma3_text',
    GEMMA3,
    num_hidden_layers=2,
    layer_types=['full_attention'] * 2,
    rope_local_base_freq=100,
)

GPT_OSS = BASE | {'head_dim': 16, 'intermediate_size': 32, 'num_local_experts': 8}
case(
    'gpt_oss-as-published',
    'GptOssForCausalLM',
    'gpt_oss',
    GPT_OSS,
    num_hidden_layers=4,
    attention_bias=True,
    experts_per_token=4,
    num_experts_per_tok=4,
    hidden_act='silu',
    initial_context_length=32,
    layer_types=['sliding_attention', 'full_attention'] * 2,
    rope_scaling={
        'rope_type': 'yarn',
        'factor': 4.0,
        'beta_fast': 8.0,
        'beta_slow': 1.0,
        'original_max_position_embeddings': 32,
        'truncate': False,
    },
    rope_theta=1000,
    sliding_window=12,
    swiglu_limit=1.0,
)
case(
    'gpt_oss-defaults-no-biases-tied',
    'GptOssForCausalLM',
    'gpt_oss',
    GPT_OSS,
    num_key_value_heads=1,
    num_experts_per_tok=1,
    attention_bias=False,
    tie_word_embeddings=True,
    sliding_window=16,
    rms_norm_eps=1e-3,
)
case(
    'gpt_oss-unscaled-late-windows',
    'GptOssForCausalLM',
    'gpt_oss',
    GPT_OSS,
    hidden_size=48,
    head_dim=24,
    num_hidden_layers=3,
    num_local_experts=6,
    num_experts_per_tok=2,
    layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
    rope_parameters={'rope_type': 'default', 'rope_theta': 1e4},
    sliding_window=20,
    swiglu_limit=0.5,
    swiglu_alpha=1.702,
)
case(
    'gpt_oss-no-windows',
    'GptOssForCausalLM',
    'gpt_oss',
    GPT_OSS,
    layer_types=['full_attention'] * 2,
    rope_scaling={'type': 'linear', 'factor': 4.0},
)

DEEPSEEK = BASE | {
    'num_key_value_heads': 4,
    'q_lora_rank': 24,
    'kv_lora_rank': 16,
    'qk_nope_head_dim': 16,
    'qk_rope_head_dim': 8,
    'v_head_dim': 12,
    'n_routed_experts': 8,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 32,
    'num_hidden_layers': 3,
    'first_k_dense_replace': 1,
}
MSCALE = {
    'type': 'yarn',
    'factor': 40,
    'original_max_position_embeddings': 32,
    'beta_fast': 32,
    'beta_slow': 1,
    'mscale': 0.707,
    'mscale_all_dim': 0.707,
}
DEEPSEEK_V2 = DEEPSEEK | {'topk_method': 'greedy', 'norm_topk_prob': False, 'scoring_func': 'softmax'}
case('deepseek_v2-lite', 'DeepseekV2ForCausalLM', 'deepseek_v2', DEEPSEEK_V2, q_lora_rank=None, rope_scaling=MSCALE)
case(
    'deepseek_v2-groups',
    'DeepseekV2ForCausalLM',
    'deepseek_v2',
    DEEPSEEK_V2,
    topk_method='group_limited_greedy',
    n_group=4,
    topk_group=2,
    routed_scaling_factor=16.0,
    n_shared_experts=1,
    num_experts_per_tok=3,
)
case(
    'deepseek_v2-biases-no-dense-layer',
    'DeepseekV2ForCausalLM',
    'deepseek_v2',
    DEEPSEEK_V2,
    attention_bias=True,
    mlp_bias=True,
    first_k_dense_replace=0,
    num_hidden_layers=2,
    rope_parameters={'rope_type': 'default', 'rope_theta': 5e4},
    tie_word_embeddings=True,
)
DEEPSEEK_V3 = DEEPSEEK | {
    'n_group': 4,
    'topk_group': 2,
    'topk_method': 'noaux_tc',
    'scoring_func': 'sigmoid',
    'norm_topk_prob': True,
    'routed_scaling_factor': 2.5,
    'n_shared_experts': 1,
    'num_nextn_predict_layers': 0,
}
case(
    'deepseek_v3-as-published',
    'DeepseekV3ForCausalLM',
    'deepseek_v3',
    DEEPSEEK_V3,
    rope_scaling=MSCALE | {'mscale': 1.0, 'mscale_all_dim': 1.0},
)
case(
    'deepseek_v3-halves-plain-queries-two-dense',
    'DeepseekV3ForCausalLM',
    'deepseek_v3',
    DEEPSEEK_V3,
    rope_interleave=False,
    q_lora_rank=None,
    norm_topk_prob=False,
    first_k_dense_replace=2,
    n_group=1,
    topk_group=1,
    tie_word_embeddings=True,
)
case(
    'deepseek_v3-biases-two-mscales',
    'DeepseekV3ForCausalLM',
    'deepseek_v3',
    DEEPSEEK_V3,
    attention_bias=True,
    n_shared_experts=2,
    topk_group=3,
    rope_scaling=MSCALE | {'mscale': 1.0},
)

GROK1 = BASE | {
    'num_experts': 8,
    'num_experts_per_tok': 2,
    'attn_output_multiplier': 0.25,
    'max_attn_value': 30.0,
    'embedding_multiplier_scale': 8.0,
    'output_multiplier_scale': 0.5773502691896257,
    'tie_word_embeddings': True,
}
case('grok1-as-published', 'Grok1ModelForCausalLM', 'grok-1', GROK1)
case(
    'grok1-low-cap-one-kv-head-top-3',
    'Grok1ModelForCausalLM',
    'grok-1',
    GROK1,
    max_attn_value=2.0,
    attn_output_multiplier=0.5,
    num_key_value_heads=1,
    num_experts_per_tok=3,
)
case(
    'grok1-untied-four-experts',
    'Grok1ModelForCausalLM',
    'grok-1',
    GROK1,
    num_experts=4,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    rms_norm_eps=1e-3,
    output_multiplier_scale=2.0,
    embedding_multiplier_scale=1.5,
)

case('deepseek_v3-two-ahead', 'DeepseekV3ForCausalLM', 'deepseek_v3', DEEPSEEK_V3, num_nextn_predict_layers=2)
case('glm4_moe-one-ahead', 'Glm4MoeForCausalLM', 'glm4_moe', GLM4_MOE, num_nextn_predict_layers=1, use_qk_norm=True)

# Without an LM head: what such models give are their last hidden states.
case('qwen3-headless', 'Qwen3Model', 'qwen3', head_dim=16, tie_word_embeddings=True, rope_theta=1e6)


def headless(config: dict[str, Any]) -> bool:
    """Whether a config is of a model without an LM head."""
    name = config['architectures'][0]
    return name.endswith('Model') and not name.endswith(('LMHeadModel', 'MTModel'))


from tests.families import encoder_cases  # noqa: E402, F401  (adds its cases to these)
