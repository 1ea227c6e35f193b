"""Grok-1, by the names of its published conversions to safetensors; the released checkpoint itself is pickled.

What it computes is what the released code does (xai-org/grok-1, model.py): the tanh form of GELU where a conversion's own
code has the exact one, and expert weights that are not renormalised (of which the norm after the mixture leaves no more to
see than its epsilon).
"""

from typing import Any

from weft.hub.families import Family, Fields
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.llama import SIZES, sizes
from weft.model.config import ModelConfig, model_of

NAMES = {
    'model.embed_tokens.weight': 'embed_VD',
    'model.norm.scale': 'norm.scale_D',
    'lm_head.weight': 'head_DV',
    'model.layers.{i}.pre_attn_norm.scale': 'attention_norm.scale_D',
    'model.layers.{i}.post_attn_norm.scale': 'attention_out_norm.scale_D',
    'model.layers.{i}.pre_moe_norm.scale': 'mlp_norm.scale_D',
    'model.layers.{i}.post_moe_norm.scale': 'mlp_out_norm.scale_D',
    'model.layers.{i}.attn.q_proj.weight': 'attention.q.w_IO',
    'model.layers.{i}.attn.k_proj.weight': 'attention.k.w_IO',
    'model.layers.{i}.attn.v_proj.weight': 'attention.v.w_IO',
    'model.layers.{i}.attn.o_proj.weight': 'attention.o.w_OI',
    'model.layers.{i}.moe_block.gate.weight': 'mlp.router.w_IO',
    'model.layers.{i}.moe_block.experts.{e}.linear.weight': 'mlp.gate.w_EIO',
    'model.layers.{i}.moe_block.experts.{e}.linear_v.weight': 'mlp.up.w_EIO',
    'model.layers.{i}.moe_block.experts.{e}.linear_1.weight': 'mlp.down.w_EOI',
}
OWN: Table = {
    'attn_output_multiplier': ('attention.scale', 128**-0.5),
    'max_attn_value': ('attention.softcap', 30.0),
    'embedding_multiplier_scale': ('embedding.scale', 6144**0.5),
    'output_multiplier_scale': ('head.scale', 3**-0.5),
    'num_experts': ('moe.experts', 8),
    'num_experts_per_tok': ('moe.top_k', 2),
    'intermediate_size': ('moe.mlp_dim', ...),
}


def read(f: Fields) -> ModelConfig:
    f.skip('max_position_embeddings')
    f.only('hidden_act', 'gelu')
    fields = sizes(f, rms_norm_eps=1e-5, tie_word_embeddings=True) | read_fields(f, OWN)
    return model_of(fields | {'mlp.activation': 'geglu', 'norm.order': 'sandwich', 'moe.renormalize': False})


def write(c: ModelConfig) -> dict[str, Any]:
    fields = write_fields(c, SIZES) | {'model_type': 'grok-1'} | write_fields(c, OWN)
    del fields['head_dim']
    return fields


FAMILY = Family('grok1', ('Grok1ModelForCausalLM',), read, write, NAMES)
