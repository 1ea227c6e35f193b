"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219): Llama in fused projections, LongRoPE, a part of heads turned."""

from typing import Any

from model.config import ModelConfig
from model.families import Entry, Family, Fields, Joined
from model.families.llama import NORMS, OUTER, common, write_common
from model.families.rope import positions, read_rope, write_rope

FUSED: dict[str, Entry] = {
    'model.layers.{i}.self_attn.qkv_proj.weight': Joined(('attention.q_DN', 'attention.k_DM', 'attention.v_DM')),
    'model.layers.{i}.self_attn.o_proj.weight': 'attention.o_DN',
    'model.layers.{i}.mlp.gate_up_proj.weight': Joined(('mlp.gate_DF', 'mlp.up_DF')),
    'model.layers.{i}.mlp.down_proj.weight': 'mlp.down_DF',
}


def read(f: Fields) -> ModelConfig:
    f.only('attention_bias', False)
    f.skip('original_max_position_embeddings')
    return ModelConfig(**common(f, epsilon=1e-5), **read_rope(f, fraction=1.0), window=f('sliding_window', None))


def write(c: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {'model_type': 'phi3', 'sliding_window': c.window}
    if c.rope_scaling and c.rope_scaling.kind == 'longrope':  # transformers looks for both here
        own |= {'original_max_position_embeddings': c.rope_scaling.original_positions}
        own |= {'max_position_embeddings': positions(c)}
    return write_common(c) | write_rope(c, fraction=True) | own


FAMILY = Family('phi3', ('Phi3ForCausalLM',), read, write, FUSED | OUTER | NORMS)
