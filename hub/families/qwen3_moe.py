"""Qwen3's mixtures of experts (arXiv:2505.09388): 128 small experts; dense and sparse layers may be mixed."""

from typing import Any

from weft.hub.families import Fields, pattern
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, attention_biases, causal_family, common, write_common
from weft.hub.families.qwen3 import QK_NORMS
from weft.model.config import ModelConfig, model_of

EXPERTS = {
    'model.layers.{i}.mlp.gate.weight': 'mlp.router.w_IO',
    'model.layers.{i}.mlp.experts.{e}.gate_proj.weight': 'mlp.gate.w_EIO',
    'model.layers.{i}.mlp.experts.{e}.up_proj.weight': 'mlp.up.w_EIO',
    'model.layers.{i}.mlp.experts.{e}.down_proj.weight': 'mlp.down.w_EOI',
}
MIXTURE: Table = {
    'num_experts': ('moe.experts', 128, 'num_local_experts'),  # published; as transformers 5 saves it
    'num_experts_per_tok': ('moe.top_k', 8),
    'moe_intermediate_size': ('moe.mlp_dim', 768),
    'norm_topk_prob': ('moe.renormalize', False),
}


def read(f: Fields) -> ModelConfig:
    f.skip('max_window_layers')  # the window is every layer's
    window = f.given('sliding_window', 4096)
    window = window if f('use_sliding_window', False) else None
    fields = common(f, kv_heads=4) | attention_biases(f) | read_mixture(f)
    return model_of(fields | {'attention.qk_norm': True, 'attention.window': window})


def read_mixture(f: Fields, **defaults: int) -> dict[str, Any]:
    """The experts; which layers are mixtures: every so many, without those that have an MLP anyhow."""
    step, dense = f('decoder_sparse_step', 1), set(f('mlp_only_layers', []))
    mixes = [i not in dense and (i + 1) % step == 0 for i in range(f('num_hidden_layers'))]
    return read_fields(f, MIXTURE, **defaults) | {'moe.pattern': pattern(mixes)}


def write(c: ModelConfig) -> dict[str, Any]:
    own = {
        'model_type': 'qwen3_moe',
        'attention_bias': c.attention.qkv_bias,
        'use_sliding_window': c.attention.window is not None,
        'sliding_window': c.attention.window,
    }
    return write_common(c) | own | write_mixture(c)


def write_mixture(c: ModelConfig) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(c.layer_specs) if not kind.experts]
    return {'decoder_sparse_step': 1, 'mlp_only_layers': dense} | write_fields(c, MIXTURE)


FAMILY = causal_family('qwen3_moe', 'Qwen3Moe', read, write, OUTER | NORMS | ATTENTION | QK_NORMS | MLP | EXPERTS)
