"""Qwen3 (arXiv:2505.09388): Llama with norms of each head's query and key."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, attention_biases, causal_family, common, write_common
from weft.hub.families.qwen2 import read_window, write_window
from weft.model.config import ModelConfig, model_of

QK_NORMS = {
    'model.layers.{i}.self_attn.q_norm.weight': 'attention.q_scale_H',
    'model.layers.{i}.self_attn.k_norm.weight': 'attention.k_scale_H',
}


def read(f: Fields) -> ModelConfig:
    fields = common(f, kv_heads=32, head_dim=128) | read_window(f) | attention_biases(f)
    return model_of(fields | {'attention.qk_norm': True})


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'qwen3', 'attention_bias': c.attention.qkv_bias}
    return write_common(c) | write_window(c) | own


FAMILY = causal_family('qwen3', 'Qwen3', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | MLP)
