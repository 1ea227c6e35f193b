"""DeepSeek-V3, V3.1 and R1 (arXiv:2412.19437): attention from latent vectors, experts chosen with a bias and by groups,
layers that predict further ahead.
"""

from typing import Any

from weft.hub.families import Fields, rotary_of
from weft.hub.families.llama import MLP, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.qwen3_moe import EXPERTS
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import MLAConfig, ModelConfig, MoEConfig, model_of

LATENT = {
    'model.layers.{i}.self_attn.q_proj.weight': 'attention.q.w_IO',
    'model.layers.{i}.self_attn.q_a_proj.weight': 'attention.q_down.w_IO',
    'model.layers.{i}.self_attn.q_a_proj.bias': 'attention.q_down.b_O',
    'model.layers.{i}.self_attn.q_a_layernorm.weight': 'attention.q_scale_Q',
    'model.layers.{i}.self_attn.q_b_proj.weight': 'attention.q_up.w_IO',
    'model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight': 'attention.kv_down.w_IO',
    'model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias': 'attention.kv_down.b_O',
    'model.layers.{i}.self_attn.kv_a_layernorm.weight': 'attention.kv_scale_R',
    'model.layers.{i}.self_attn.kv_b_proj.weight': 'attention.kv_up.w_IO',
    'model.layers.{i}.self_attn.o_proj.weight': 'attention.o.w_OI',
    'model.layers.{i}.self_attn.o_proj.bias': 'attention.o.b_O',
}

CHOICE = {'model.layers.{i}.mlp.gate.e_score_correction_bias': 'mlp.correction_E'}
SHARED = {
    'model.layers.{i}.mlp.shared_experts.gate_proj.weight': 'mlp.shared.gate.w_IO',
    'model.layers.{i}.mlp.shared_experts.up_proj.weight': 'mlp.shared.up.w_IO',
    'model.layers.{i}.mlp.shared_experts.down_proj.weight': 'mlp.shared.down.w_OI',
    'model.layers.{i}.mlp.shared_experts.gate_proj.bias': 'mlp.shared.gate.b_O',
    'model.layers.{i}.mlp.shared_experts.up_proj.bias': 'mlp.shared.up.b_O',
    'model.layers.{i}.mlp.shared_experts.down_proj.bias': 'mlp.shared.down.b_O',
}
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


def read(f: Fields) -> ModelConfig:
    fields = read_latent(f) | read_experts(f, dense=3, scale=2.5, groups=8, top_groups=4)
    return model_of(fields | {'positions.layout': 'interleaved' if f('rope_interleave', True) else 'half'})


def read_latent(f: Fields) -> dict[str, Any]:
    """The fields of DeepSeek-V2 and V3: all but their experts, and which dims turn together."""
    f.skip('head_dim', 'qk_head_dim')  # transformers writes them; they follow from the others
    f.only('num_key_value_heads', f('num_attention_heads'))
    bias = f('attention_bias', False)
    fields = common(f) | read_rope(f, scores=True)
    del fields['attention.kv_heads'], fields['attention.head_dim']
    return fields | {
        'attention.kind': 'mla',
        'attention.q_lora_rank': f.given('q_lora_rank', 1536),
        'attention.kv_lora_rank': f('kv_lora_rank', 512),
        'attention.qk_nope_head_dim': f('qk_nope_head_dim', 128),
        'attention.qk_rope_head_dim': f('qk_rope_head_dim', 64),
        'attention.v_head_dim': f('v_head_dim', 128),
        'attention.qkv_bias': bias,
        'attention.o_bias': bias,
    }


def read_experts(f: Fields, dense: int = 1, scale: float = 1.0, groups: int = 1, top_groups: int = 1) -> dict[str, Any]:
    """Experts and MTP layers of DeepSeek-V3 and GLM-4.5, with a family's defaults."""
    f.only('scoring_func', 'sigmoid')
    f.only('topk_method', 'noaux_tc')
    f.only('moe_layer_freq', 1)
    moe = MoEConfig(
        experts=f('n_routed_experts'),
        top_k=f('num_experts_per_tok'),
        mlp_dim=f('moe_intermediate_size'),
        shared_experts=f('n_shared_experts', 1),
        first_dense_layers=f('first_k_dense_replace', dense),
        router='sigmoid',
        renormalize=f('norm_topk_prob', True),
        routed_scale=float(f('routed_scaling_factor', scale)),
        groups=f('n_group', groups),
        top_groups=f('topk_group', top_groups),
        choice_bias=True,
    )
    return {'moe': moe, 'mtp.layers': f.either(('num_nextn_predict_layers', 'num_mtp_layers'), 0)}


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'deepseek_v3', 'rope_interleave': rotary_of(c).layout == 'interleaved'}
    return write_latent(c) | own | write_experts(c)


def write_latent(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_latent`."""
    fields = write_common(c) | write_rope(c) | {'attention_bias': c.attention.qkv_bias}
    del fields['head_dim']
    if isinstance(c.attention, MLAConfig):
        names = ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
        fields |= {name: getattr(c.attention, name) for name in names}
    return fields


def write_experts(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    return {} if c.moe is None else write_routing(c.moe) | {'num_nextn_predict_layers': c.mtp.layers}


def write_routing(m: MoEConfig) -> dict[str, Any]:
    """The fields of the experts and of how a token finds its own, DeepSeek-V2's too."""
    return {
        'n_routed_experts': m.experts,
        'num_experts_per_tok': m.top_k,
        'moe_intermediate_size': m.mlp_dim,
        'n_shared_experts': m.shared_experts,
        'first_k_dense_replace': m.first_dense_layers,
        'norm_topk_prob': m.renormalize,
        'routed_scaling_factor': m.routed_scale,
        'n_group': m.groups,
        'topk_group': m.top_groups,
    }


NAMES = OUTER | NORMS | LATENT | MLP | EXPERTS | CHOICE | SHARED | MTP
FAMILY = causal_family('deepseek_v3', 'DeepseekV3', read, write, NAMES, copies=COPIES)
