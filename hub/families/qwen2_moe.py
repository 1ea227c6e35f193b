"""Qwen1.5-MoE and Qwen2's mixture of experts (arXiv:2407.10671): a shared expert beside the chosen ones, weighed by a gate."""

from typing import Any

from weft.hub.families import AsRow, Entry, Fields
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.qwen2 import read_windows, write_window
from weft.hub.families.qwen3_moe import EXPERTS, read_mixture, write_mixture
from weft.model.config import ModelConfig, model_of

SHARED: dict[str, Entry] = {
    'model.layers.{i}.mlp.shared_expert.gate_proj.weight': 'mlp.shared.gate.w_IO',
    'model.layers.{i}.mlp.shared_expert.up_proj.weight': 'mlp.shared.up.w_IO',
    'model.layers.{i}.mlp.shared_expert.down_proj.weight': 'mlp.shared.down.w_OI',
    'model.layers.{i}.mlp.shared_expert_gate.weight': AsRow('mlp.shared_gate_D'),
}


def read(f: Fields) -> ModelConfig:
    moe = read_mixture(f, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408) | {
        'moe.shared_experts': 1,
        'moe.shared_mlp_dim': f('shared_expert_intermediate_size', 5632),
        'moe.shared_gate': True,
    }
    first = f('max_window_layers', 28)
    # Every second layer of the first: so transformers has it, unlike in Qwen2 without experts.
    windows = read_windows(f, [i < first and i % 2 == 0 for i in range(f('num_hidden_layers'))])
    fields = common(f, kv_heads=16) | windows | moe
    return model_of(fields | {'attention.qkv_bias': f('qkv_bias', True)})


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'qwen2_moe', 'qkv_bias': c.attention.qkv_bias} | write_mixture(c)
    if c.moe and c.moe.shared_experts:
        own['shared_expert_intermediate_size'] = c.moe.shared_dim
    return write_common(c) | write_window(c) | own


FAMILY = causal_family('qwen2_moe', 'Qwen2Moe', read, write, OUTER | NORMS | ATTENTION | MLP | EXPERTS | SHARED)
