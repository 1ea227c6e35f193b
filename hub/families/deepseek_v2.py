"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): attention from latent vectors, softmax routing, by groups in the large one."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.deepseek_v3 import LATENT, SHARED, read_latent, write_latent, write_routing
from weft.hub.families.llama import MLP, NORMS, OUTER, causal_family
from weft.hub.families.qwen3_moe import EXPERTS
from weft.model.config import ModelConfig, MoEConfig, model_of


def read(f: Fields) -> ModelConfig:
    f.only('scoring_func', 'softmax')
    f.only('moe_layer_freq', 1)
    f.only('norm_topk_prob', False)
    by_group = f.only('topk_method', 'greedy', 'group_limited_greedy') == 'group_limited_greedy'
    groups, top_groups = f('n_group', 1), f('topk_group', 1)  # which plain choices do not look at
    moe = MoEConfig(
        experts=f('n_routed_experts', 64),
        top_k=f('num_experts_per_tok'),
        mlp_dim=f('moe_intermediate_size', 1407),
        shared_experts=f('n_shared_experts', 2),
        first_dense_layers=f('first_k_dense_replace', 0),
        renormalize=False,
        routed_scale=float(f('routed_scaling_factor', 1.0)),
        groups=groups if by_group else 1,
        top_groups=top_groups if by_group else 1,
        group_score='max',
    )
    return model_of(read_latent(f) | {'positions.layout': 'interleaved', 'mlp.bias': f('mlp_bias', False), 'moe': moe})


def write(c: ModelConfig) -> dict[str, Any]:
    m, fields = c.moe, write_latent(c) | {'model_type': 'deepseek_v2', 'mlp_bias': c.mlp.bias}
    if m is None:
        return fields
    return fields | write_routing(m) | {'topk_method': 'greedy' if m.groups == 1 else 'group_limited_greedy'}


FAMILY = causal_family('deepseek_v2', 'DeepseekV2', read, write, OUTER | NORMS | LATENT | MLP | EXPERTS | SHARED)
