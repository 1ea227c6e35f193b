"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): attention from latent vectors, softmax routing, by groups in the large one."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.deepseek_v3 import LATENT, ROUTING, SHARED, read_latent, read_routing, write_latent
from weft.hub.families.fields import write_fields
from weft.hub.families.llama import MLP, NORMS, OUTER, causal_family
from weft.hub.families.qwen3_moe import EXPERTS
from weft.model.config import ModelConfig, model_of

DEFAULTS = {  # the defaults of V2's config
    'n_routed_experts': 64,
    'moe_intermediate_size': 1407,
    'n_shared_experts': 2,
    'first_k_dense_replace': 0,
    'norm_topk_prob': False,
}


def read(f: Fields) -> ModelConfig:
    f.only('scoring_func', 'softmax')
    f.only('moe_layer_freq', 1)
    f.only('norm_topk_prob', False)
    fields = (
        read_latent(f) | read_routing(f, **DEFAULTS) | {'moe.group_score': 'max', 'positions.layout': 'interleaved'}
    )
    if f.only('topk_method', 'greedy', 'group_limited_greedy') == 'greedy':  # which does not look at groups
        fields |= {'moe.groups': 1, 'moe.top_groups': 1}
    return model_of(fields | {'mlp.bias': f('mlp_bias', False)})


def write(c: ModelConfig) -> dict[str, Any]:
    m, fields = c.moe, write_latent(c) | {'model_type': 'deepseek_v2', 'mlp_bias': c.mlp.bias}
    if m is None:
        return fields
    return fields | write_fields(c, ROUTING) | {'topk_method': 'greedy' if m.groups == 1 else 'group_limited_greedy'}


FAMILY = causal_family('deepseek_v2', 'DeepseekV2', read, write, OUTER | NORMS | LATENT | MLP | EXPERTS | SHARED)
