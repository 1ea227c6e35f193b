"""GLM-4.5 and GLM-4.5-Air (arXiv:2508.06471): half of each head turned, experts chosen as in DeepSeek-V3."""

from typing import Any

from model.config import ModelConfig, MoEConfig
from model.families import Family, Fields
from model.families.llama import ATTENTION, MLP, NORMS, OUTER, common, write_common
from model.families.qwen3 import QK_NORMS
from model.families.qwen3_moe import EXPERTS
from model.families.rope import read_rope, write_rope

CHOICE = {'model.layers.{i}.mlp.gate.e_score_correction_bias': 'mlp.bias_E'}
SHARED = {
    'model.layers.{i}.mlp.shared_experts.gate_proj.weight': 'mlp.shared.gate_DF',
    'model.layers.{i}.mlp.shared_experts.up_proj.weight': 'mlp.shared.up_DF',
    'model.layers.{i}.mlp.shared_experts.down_proj.weight': 'mlp.shared.down_DF',
    'model.layers.{i}.mlp.shared_experts.gate_proj.bias': 'mlp.shared.gate_bias_F',
    'model.layers.{i}.mlp.shared_experts.up_proj.bias': 'mlp.shared.up_bias_F',
    'model.layers.{i}.mlp.shared_experts.down_proj.bias': 'mlp.shared.down_bias_D',
}


def read(f: Fields) -> ModelConfig:
    rope = read_rope(f, fraction=0.5)
    norm = f('use_qk_norm', False)
    fields = common(f, epsilon=1e-5, kv_heads=8)
    return ModelConfig(**fields, **rope, qk_norm=norm, qkv_bias=f('attention_bias', False), moe=read_experts(f))


def read_experts(f: Fields, dense: int = 1, scale: float = 1.0, groups: int = 1, top_groups: int = 1) -> MoEConfig:
    """Of GLM-4.5 and DeepSeek-V3, with a family's defaults: sigmoid scores, a bias for the choice, groups by their two best."""
    f.only('scoring_func', 'sigmoid')
    f.only('topk_method', 'noaux_tc')
    f.only('moe_layer_freq', 1)
    f.only('num_nextn_predict_layers', 0)
    return MoEConfig(
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


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'glm4_moe', 'use_qk_norm': bool(c.qk_norm), 'attention_bias': c.qkv_bias}
    return write_common(c) | write_rope(c, fraction=True) | own | write_experts(c)


def write_experts(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    m = c.moe
    if m is None:
        return {}
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
        'num_nextn_predict_layers': 0,
    }


NAMES = OUTER | NORMS | ATTENTION | QK_NORMS | MLP | EXPERTS | CHOICE | SHARED
FAMILY = Family('glm4_moe', ('Glm4MoeForCausalLM',), read, write, NAMES)
