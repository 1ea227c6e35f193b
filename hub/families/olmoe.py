"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): 64 experts, norms of all heads' queries and keys together."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.llama import ATTENTION, NORMS, OUTER, attention_biases, causal_family, common, write_common
from weft.hub.families.qwen3_moe import EXPERTS
from weft.model.config import ModelConfig, model_of

QK_NORMS = {
    'model.layers.{i}.self_attn.q_norm.weight': 'attention.q_scale_N',
    'model.layers.{i}.self_attn.k_norm.weight': 'attention.k_scale_M',
}
MIXTURE: Table = {
    'num_experts': ('moe.experts', 64),
    'num_experts_per_tok': ('moe.top_k', 8),
    'intermediate_size': ('moe.mlp_dim', ...),
    'norm_topk_prob': ('moe.renormalize', False),
}


def read(f: Fields) -> ModelConfig:
    f.only('clip_qkv', None)
    fields = common(f, rms_norm_eps=1e-5) | attention_biases(f) | read_fields(f, MIXTURE)
    return model_of(fields | {'attention.qk_norm': 'full'})


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'olmoe', 'attention_bias': c.attention.qkv_bias, 'clip_qkv': None}
    return write_common(c) | own | write_fields(c, MIXTURE)


FAMILY = causal_family('olmoe', 'Olmoe', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | EXPERTS)
