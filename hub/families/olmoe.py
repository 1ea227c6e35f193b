"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): 64 experts, norms of all heads' queries and keys together."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.llama import ATTENTION, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.qwen3_moe import EXPERTS
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, MoEConfig, model_of

QK_NORMS = {
    'model.layers.{i}.self_attn.q_norm.weight': 'attention.q_scale_N',
    'model.layers.{i}.self_attn.k_norm.weight': 'attention.k_scale_M',
}


def read(f: Fields) -> ModelConfig:
    f.only('clip_qkv', None)
    fields, bias = common(f, epsilon=1e-5), f('attention_bias', False)
    moe = MoEConfig(
        experts=f('num_experts', 64),
        top_k=f('num_experts_per_tok', 8),
        mlp_dim=fields['mlp.dim'],
        renormalize=f('norm_topk_prob', False),
    )
    return model_of(
        fields
        | read_rope(f)
        | {'attention.qk_norm': 'full', 'attention.qkv_bias': bias, 'attention.o_bias': bias, 'moe': moe}
    )


def write(c: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {'model_type': 'olmoe', 'attention_bias': c.attention.qkv_bias, 'clip_qkv': None}
    if c.moe:
        own |= {
            'num_experts': c.moe.experts,
            'num_experts_per_tok': c.moe.top_k,
            'intermediate_size': c.moe.mlp_dim,
            'norm_topk_prob': c.moe.renormalize,
        }
    return write_common(c) | write_rope(c) | own


FAMILY = causal_family('olmoe', 'Olmoe', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | EXPERTS)
