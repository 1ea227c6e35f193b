"""Tiny configs of each family, as published config.json files are: together they exercise what the family can do.

CASES: name -> config. The name begins with the family's file in model/families.
"""

from typing import Any

ROWS, LENGTH, KEPT = 4, 160, 32  # tokens of a case; positions whose logits are committed
PROMPT, NEW = 16, 64  # tokens that are read, and continued greedily
VOCABULARY = 200
SEED = 7
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
    """One more config: `base` with other fields; None takes one away."""
    config = {'architectures': [architecture], 'model_type': model_type, **base, **fields}
    assert name not in CASES, name
    CASES[name] = {key: value for key, value in config.items() if value is not None}


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
        'beta_fast': 16.0,
        'beta_slow': 2.0,
        'attention_factor': 1.25,
        'truncate': False,
    },
)
