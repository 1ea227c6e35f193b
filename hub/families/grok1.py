"""Grok-1, by the names of its published conversions to safetensors; the released checkpoint itself is pickled.

What it computes is what the released code does (xai-org/grok-1, model.py): the tanh form of GELU where a conversion's own
code has the exact one, and expert weights that are not renormalised (of which the norm after the mixture leaves no more to
see than its epsilon).
"""

from typing import Any

from weft.hub.families import Family, Fields, head_of
from weft.hub.families.llama import sizes, write_common
from weft.model.config import ModelConfig, MoEConfig, model_of

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


def read(f: Fields) -> ModelConfig:
    f.skip('max_position_embeddings')
    f.only('hidden_act', 'gelu')
    moe = MoEConfig(
        experts=f('num_experts', 8),
        top_k=f('num_experts_per_tok', 2),
        mlp_dim=f('intermediate_size'),
        renormalize=False,
    )
    fields = sizes(f, epsilon=1e-5) | {'embedding.tied': f('tie_word_embeddings', True)}
    return model_of(
        fields
        | {
            'mlp.activation': 'geglu',
            'norm.order': 'sandwich',
            'attention.scale': f('attn_output_multiplier', 128**-0.5),
            'attention.softcap': f('max_attn_value', 30.0),
            'embedding.scale': f('embedding_multiplier_scale', 6144**0.5),
            'head.scale': f('output_multiplier_scale', 3**-0.5),
            'moe': moe,
        }
    )


def write(c: ModelConfig) -> dict[str, Any]:
    fields = write_common(c) | {
        'model_type': 'grok-1',
        'attn_output_multiplier': c.attention.scale,
        'max_attn_value': c.attention.softcap,
        'embedding_multiplier_scale': c.embedding.scale,
        'output_multiplier_scale': head_of(c).scale,
    }
    del fields['hidden_act'], fields['head_dim']
    if c.moe:
        experts = {'num_experts': c.moe.experts, 'num_experts_per_tok': c.moe.top_k}
        fields |= experts | {'intermediate_size': c.moe.mlp_dim}
    return fields


FAMILY = Family('grok1', ('Grok1ModelForCausalLM',), read, write, NAMES)
