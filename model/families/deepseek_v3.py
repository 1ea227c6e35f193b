"""DeepSeek-V3, V3.1 and R1 (arXiv:2412.19437): attention from latent vectors, experts chosen with a bias and by groups."""

from typing import Any

from model.config import LatentConfig, ModelConfig
from model.families import Family, Fields
from model.families.glm4_moe import CHOICE, SHARED, read_experts, write_experts
from model.families.llama import MLP, NORMS, OUTER, common, write_common
from model.families.qwen3_moe import EXPERTS
from model.families.rope import read_rope, write_rope

LATENT = {
    'model.layers.{i}.self_attn.q_proj.weight': 'attention.q_DN',
    'model.layers.{i}.self_attn.q_a_proj.weight': 'attention.q_down_DQ',
    'model.layers.{i}.self_attn.q_a_proj.bias': 'attention.q_down_bias_Q',
    'model.layers.{i}.self_attn.q_a_layernorm.weight': 'attention.q_scale_Q',
    'model.layers.{i}.self_attn.q_b_proj.weight': 'attention.q_up_QN',
    'model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight': 'attention.kv_down_DR',
    'model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias': 'attention.kv_down_bias_R',
    'model.layers.{i}.self_attn.kv_a_layernorm.weight': 'attention.kv_scale_R',
    'model.layers.{i}.self_attn.kv_b_proj.weight': 'attention.kv_up_RN',
    'model.layers.{i}.self_attn.o_proj.weight': 'attention.o_DU',
    'model.layers.{i}.self_attn.o_proj.bias': 'attention.o_bias_D',
}


def read(f: Fields) -> ModelConfig:
    moe = read_experts(f, dense=3, scale=2.5, groups=8, top_groups=4)
    return ModelConfig(**read_latent(f), rotary_pairs='neighbours' if f('rope_interleave', True) else 'halves', moe=moe)


def read_latent(f: Fields) -> dict[str, Any]:
    """The fields of DeepSeek-V2 and V3: all but their experts, and which dims turn together."""
    f.skip('head_dim', 'qk_head_dim')  # transformers writes them; they follow from the others
    f.only('num_key_value_heads', f('num_attention_heads'))
    latent = LatentConfig(
        q_rank=f.given('q_lora_rank', 1536),
        kv_rank=f('kv_lora_rank', 512),
        plain_dim=f('qk_nope_head_dim', 128),
        rotary_dim=f('qk_rope_head_dim', 64),
        value_dim=f('v_head_dim', 128),
    )
    bias = f('attention_bias', False)
    fields = common(f) | read_rope(f, scores=True) | {'latent': latent, 'qkv_bias': bias, 'o_bias': bias}
    return {name: value for name, value in fields.items() if name != 'head_dim'}


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'deepseek_v3', 'rope_interleave': c.rotary_pairs == 'neighbours'}
    return write_latent(c) | own | write_experts(c)


def write_latent(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_latent`."""
    fields = write_common(c) | write_rope(c) | {'attention_bias': c.qkv_bias}
    del fields['head_dim']
    if c.latent:
        fields |= {
            'q_lora_rank': c.latent.q_rank,
            'kv_lora_rank': c.latent.kv_rank,
            'qk_nope_head_dim': c.latent.plain_dim,
            'qk_rope_head_dim': c.latent.rotary_dim,
            'v_head_dim': c.latent.value_dim,
        }
    return fields


NAMES = OUTER | NORMS | LATENT | MLP | EXPERTS | CHOICE | SHARED
FAMILY = Family('deepseek_v3', ('DeepseekV3ForCausalLM',), read, write, NAMES)
