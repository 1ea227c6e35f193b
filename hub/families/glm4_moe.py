"""GLM-4.5 and GLM-4.5-Air (arXiv:2508.06471): half of each head turned, experts chosen as in DeepSeek-V3."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.deepseek_v3 import CHOICE, COPIES, MTP, SHARED, read_experts, write_experts
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.qwen3 import QK_NORMS
from weft.hub.families.qwen3_moe import EXPERTS
from weft.hub.families.rope import read_rope
from weft.model.config import ModelConfig, model_of


def read(f: Fields) -> ModelConfig:
    fields = common(f, 8, read_rope(f, fraction=0.5), rms_norm_eps=1e-5) | read_experts(f)
    return model_of(
        fields | {'attention.qk_norm': f('use_qk_norm', False), 'attention.qkv_bias': f('attention_bias', False)}
    )


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'glm4_moe', 'use_qk_norm': bool(c.attention.qk_norm), 'attention_bias': c.attention.qkv_bias}
    return write_common(c, fraction=True) | own | write_experts(c)


NAMES = OUTER | NORMS | ATTENTION | QK_NORMS | MLP | EXPERTS | CHOICE | SHARED | MTP
FAMILY = causal_family('glm4_moe', 'Glm4Moe', read, write, NAMES, copies=COPIES)
