"""Qwen3's mixtures of experts (arXiv:2505.09388): 128 small experts; dense and sparse layers may be mixed."""

from typing import Any

from weft.hub.families import Fields, pattern
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.qwen3 import QK_NORMS
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, MoEConfig, model_of

EXPERTS = {
    'model.layers.{i}.mlp.gate.weight': 'mlp.router.w_IO',
    'model.layers.{i}.mlp.experts.{e}.gate_proj.weight': 'mlp.gate.w_EIO',
    'model.layers.{i}.mlp.experts.{e}.up_proj.weight': 'mlp.up.w_EIO',
    'model.layers.{i}.mlp.experts.{e}.down_proj.weight': 'mlp.down.w_EOI',
}


def read(f: Fields) -> ModelConfig:
    bias = f('attention_bias', False)
    moe = MoEConfig(
        experts=f.either(('num_experts', 'num_local_experts'), 128),  # published; as transformers 5 saves it
        top_k=f('num_experts_per_tok', 8),
        mlp_dim=f('moe_intermediate_size', 768),
        renormalize=f('norm_topk_prob', False),
        pattern=pattern(read_sparse(f)),
    )
    f.skip('max_window_layers')  # the window is every layer's
    window = f.given('sliding_window', 4096)
    window = window if f('use_sliding_window', False) else None
    fields = common(f, kv_heads=4) | read_rope(f)
    return model_of(
        fields
        | {
            'attention.qk_norm': True,
            'attention.qkv_bias': bias,
            'attention.o_bias': bias,
            'attention.window': window,
            'moe': moe,
        }
    )


def read_sparse(f: Fields) -> list[bool]:
    """Which layers are mixtures: every so many, without those that have an MLP anyhow."""
    step, dense = f('decoder_sparse_step', 1), set(f('mlp_only_layers', []))
    return [i not in dense and (i + 1) % step == 0 for i in range(f('num_hidden_layers'))]


def write(c: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {
        'model_type': 'qwen3_moe',
        'attention_bias': c.attention.qkv_bias,
        'use_sliding_window': c.attention.window is not None,
        'sliding_window': c.attention.window,
    }
    return write_common(c) | write_rope(c) | own | write_sparse(c)


def write_sparse(c: ModelConfig) -> dict[str, Any]:
    """Which layers are mixtures, and what of."""
    own: dict[str, Any] = {
        'decoder_sparse_step': 1,
        'mlp_only_layers': [i for i, kind in enumerate(c.layer_specs) if not kind.experts],
    }
    if c.moe:
        own |= {
            'num_experts': c.moe.experts,
            'num_experts_per_tok': c.moe.top_k,
            'moe_intermediate_size': c.moe.mlp_dim,
            'norm_topk_prob': c.moe.renormalize,
        }
    return own


FAMILY = causal_family('qwen3_moe', 'Qwen3Moe', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | MLP | EXPERTS)
