"""DeepSeek-V3, V3.1 and R1 (arXiv:2412.19437): attention from latent vectors, experts chosen with a bias and by groups,
layers that predict further ahead.
"""

from typing import Any

from weft.hub.families import Fields, linear, rotary_of
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.llama import MLP, NORMS, OUTER, attention_biases, causal_family, common, linears, write_common
from weft.hub.families.qwen3_moe import EXPERTS
from weft.hub.families.rope import read_rope
from weft.model.config import MLAConfig, ModelConfig, model_of

LATENT = {
    'model.layers.{i}.self_attn.q_proj.weight': 'attention.q.w_IO',
    **linear('model.layers.{i}.self_attn.q_a_proj', 'attention.q_down'),
    'model.layers.{i}.self_attn.q_a_layernorm.weight': 'attention.q_scale_Q',
    'model.layers.{i}.self_attn.q_b_proj.weight': 'attention.q_up.w_IO',
    **linear('model.layers.{i}.self_attn.kv_a_proj_with_mqa', 'attention.kv_down'),
    'model.layers.{i}.self_attn.kv_a_layernorm.weight': 'attention.kv_scale_R',
    'model.layers.{i}.self_attn.kv_b_proj.weight': 'attention.kv_up.w_IO',
    **linear('model.layers.{i}.self_attn.o_proj', 'attention.o', 'w_OI'),
}

CHOICE = {'model.layers.{i}.mlp.gate.e_score_correction_bias': 'mlp.correction_E'}
SHARED = linears('mlp.shared_experts', 'mlp.shared', gate_proj='gate.w_IO', up_proj='up.w_IO', down_proj='down.w_OI')
MTP = {
    'model.layers.{i}.enorm.weight': 'embedding_norm.scale_D',
    'model.layers.{i}.hnorm.weight': 'hidden_norm.scale_D',
    'model.layers.{i}.eh_proj.weight': 'join.w_OI',
    'model.layers.{i}.shared_head.norm.weight': 'norm.scale_D',
}
COPIES = {  # in each layer of MTP
    'model.layers.{i}.embed_tokens.weight': 'model.embed_tokens.weight',
    'model.layers.{i}.shared_head.head.weight': 'lm_head.weight',
}
RANKS: Table = {
    'kv_lora_rank': ('attention.kv_lora_rank', 512),
    'qk_nope_head_dim': ('attention.qk_nope_head_dim', 128),
    'qk_rope_head_dim': ('attention.qk_rope_head_dim', 64),
    'v_head_dim': ('attention.v_head_dim', 128),
}
ROUTING: Table = {
    'n_routed_experts': ('moe.experts', ...),
    'num_experts_per_tok': ('moe.top_k', ...),
    'moe_intermediate_size': ('moe.mlp_dim', ...),
    'n_shared_experts': ('moe.shared_experts', 1),
    'first_k_dense_replace': ('moe.first_dense_layers', 1),
    'norm_topk_prob': ('moe.renormalize', True),
    'routed_scaling_factor': ('moe.routed_scale', 1.0),
    'n_group': ('moe.groups', 1),
    'topk_group': ('moe.top_groups', 1),
}
DEFAULTS = {'first_k_dense_replace': 3, 'routed_scaling_factor': 2.5, 'n_group': 8, 'topk_group': 4}  # V3's defaults


def read(f: Fields) -> ModelConfig:
    fields = read_latent(f) | read_experts(f, **DEFAULTS)
    return model_of(fields | {'positions.layout': 'interleaved' if f('rope_interleave', True) else 'half'})


def read_latent(f: Fields) -> dict[str, Any]:
    """The fields of DeepSeek-V2 and V3: all but their experts, and which dims turn together."""
    f.skip('head_dim', 'qk_head_dim')  # transformers writes them; they follow from the others
    f.only('num_key_value_heads', f('num_attention_heads'))
    fields = common(f, rope=read_rope(f, scores=True))
    del fields['attention.kv_heads'], fields['attention.head_dim']
    own = {'attention.kind': 'mla', 'attention.q_lora_rank': f.given('q_lora_rank', 1536)}
    return fields | attention_biases(f) | read_fields(f, RANKS) | own


def read_experts(f: Fields, **defaults: Any) -> dict[str, Any]:
    """Experts and MTP layers of DeepSeek-V3 and GLM-4.5, with a family's own `defaults`."""
    f.only('scoring_func', 'sigmoid')
    f.only('topk_method', 'noaux_tc')
    f.only('moe_layer_freq', 1)
    ahead = f.either(('num_nextn_predict_layers', 'num_mtp_layers'), 0)
    return read_routing(f, **defaults) | {'moe.router': 'sigmoid', 'moe.choice_bias': True, 'mtp.layers': ahead}


def read_routing(f: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields of the experts and of how a token finds its own, DeepSeek-V2's too."""
    found = read_fields(f, ROUTING, **defaults)
    return found | {'moe.routed_scale': float(found['moe.routed_scale'])}


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'deepseek_v3', 'rope_interleave': rotary_of(c).layout == 'interleaved'}
    return write_latent(c) | own | write_experts(c)


def write_latent(c: ModelConfig) -> dict[str, Any]:
    fields = write_common(c) | {'attention_bias': c.attention.qkv_bias}
    del fields['head_dim']
    if isinstance(c.attention, MLAConfig):
        fields |= {'q_lora_rank': c.attention.q_lora_rank} | write_fields(c, RANKS)
    return fields


def write_experts(c: ModelConfig) -> dict[str, Any]:
    return {} if c.moe is None else write_fields(c, ROUTING) | {'num_nextn_predict_layers': c.mtp.layers}


NAMES = OUTER | NORMS | LATENT | MLP | EXPERTS | CHOICE | SHARED | MTP
FAMILY = causal_family('deepseek_v3', 'DeepseekV3', read, write, NAMES, copies=COPIES)
