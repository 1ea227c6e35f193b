"""OLMo 2 (arXiv:2501.00656): Llama with a norm after each part in place of before it, and norms of all queries and all keys."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.llama import ATTENTION, MLP, OUTER, causal_family, unwindowed, write_common
from weft.hub.families.olmoe import QK_NORMS
from weft.model.config import ModelConfig, model_of

NORMS = {
    'model.layers.{i}.post_attention_layernorm.weight': 'attention_norm.scale_D',
    'model.layers.{i}.post_feedforward_layernorm.weight': 'mlp_norm.scale_D',
}


def read(f: Fields) -> ModelConfig:
    return model_of(unwindowed(f, rms_norm_eps=1e-5) | {'norm.order': 'output', 'attention.qk_norm': 'full'})


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | {'model_type': 'olmo2', 'attention_bias': c.attention.qkv_bias}


FAMILY = causal_family('olmo2', 'Olmo2', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | MLP)
