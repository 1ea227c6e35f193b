"""A family of published models: Llama with norms of queries and keys, under names of its own, gate and up in one tensor."""

from typing import Any

from weft.hub.families import Family, Fields, Joined, register
from weft.hub.families.llama import common, write_common
from weft.model.config import ModelConfig, model_of


def read(f: Fields) -> ModelConfig:
    return model_of(common(f) | {'attention.qk_norm': True})


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | {'model_type': 'loom'}


NAMES = {
    'tokens.weight': 'embed_VD',
    'layers.{i}.norm1.weight': 'attention_norm.scale_D',
    'layers.{i}.attention.query.weight': 'attention.q.w_IO',
    'layers.{i}.attention.key.weight': 'attention.k.w_IO',
    'layers.{i}.attention.value.weight': 'attention.v.w_IO',
    'layers.{i}.attention.query_norm.weight': 'attention.q_scale_H',
    'layers.{i}.attention.key_norm.weight': 'attention.k_scale_H',
    'layers.{i}.attention.out.weight': 'attention.o.w_OI',
    'layers.{i}.norm2.weight': 'mlp_norm.scale_D',
    'layers.{i}.mlp.gate_up.weight': Joined(('mlp.gate.w_IO', 'mlp.up.w_IO')),
    'layers.{i}.mlp.down.weight': 'mlp.down.w_OI',
    'norm.weight': 'norm.scale_D',
    'head.weight': 'head_DV',
}

register(Family('loom', ('LoomForCausalLM',), read, write, NAMES))
