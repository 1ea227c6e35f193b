"""Llama 2, 3, 3.1, 3.2, 3.3 (Touvron et al. 2023, arXiv:2307.09288; Dubey et al. 2024, arXiv:2407.21783).

Grouped-query attention, SwiGLU, RMSNorm, rotary positions in halves.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from weft.hub.families import Entry, Family, Fields
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, model_of
from weft.runtime.errors import UserError
from weft.storage.foreign import shown_value

ATTENTION = {
    'model.layers.{i}.self_attn.q_proj.weight': 'attention.q.w_IO',
    'model.layers.{i}.self_attn.k_proj.weight': 'attention.k.w_IO',
    'model.layers.{i}.self_attn.v_proj.weight': 'attention.v.w_IO',
    'model.layers.{i}.self_attn.o_proj.weight': 'attention.o.w_OI',
    'model.layers.{i}.self_attn.q_proj.bias': 'attention.q.b_O',
    'model.layers.{i}.self_attn.k_proj.bias': 'attention.k.b_O',
    'model.layers.{i}.self_attn.v_proj.bias': 'attention.v.b_O',
    'model.layers.{i}.self_attn.o_proj.bias': 'attention.o.b_O',
}
MLP = {
    'model.layers.{i}.mlp.gate_proj.weight': 'mlp.gate.w_IO',
    'model.layers.{i}.mlp.up_proj.weight': 'mlp.up.w_IO',
    'model.layers.{i}.mlp.down_proj.weight': 'mlp.down.w_OI',
    'model.layers.{i}.mlp.gate_proj.bias': 'mlp.gate.b_O',
    'model.layers.{i}.mlp.up_proj.bias': 'mlp.up.b_O',
    'model.layers.{i}.mlp.down_proj.bias': 'mlp.down.b_O',
}
NORMS = {
    'model.layers.{i}.input_layernorm.weight': 'attention_norm.scale_D',
    'model.layers.{i}.post_attention_layernorm.weight': 'mlp_norm.scale_D',
}
OUTER = {
    'model.embed_tokens.weight': 'embed_VD',
    'model.norm.weight': 'norm.scale_D',
    'lm_head.weight': 'head_DV',
}


def causal_family(
    name: str,
    stem: str,
    read: Callable[[Fields], ModelConfig],
    write: Callable[[ModelConfig], dict[str, Any]],
    names: Mapping[str, Entry],
    copies: Mapping[str, str] = MappingProxyType({}),
) -> Family:
    """A family of classes {stem}ForCausalLM and {stem}Model, whose tensors' names begin with `model.`."""
    return Family(
        name, (f'{stem}ForCausalLM',), read, write, names, copies=copies, prefix='model.', headless=f'{stem}Model'
    )


def read(f: Fields) -> ModelConfig:
    no_windows(f)
    return model_of(common(f) | read_rope(f) | biases(f))


def common(f: Fields, epsilon: float = 1e-6, kv_heads: int | None = None) -> dict[str, Any]:
    """The fields that Llama and its many descendants share; see `sizes`."""
    f.only('hidden_act', 'silu')
    return sizes(f, epsilon, kv_heads)


def sizes(f: Fields, epsilon: float = 1e-6, kv_heads: int | None = None, tied: bool = False) -> dict[str, Any]:
    """Those of them that say nothing of the activation; `epsilon`, `kv_heads`, `tied` where a config leaves them out.

    None, and null in a config: as many kv_heads as heads.
    """
    return {
        'vocabulary': f('vocab_size'),
        'layers': f('num_hidden_layers'),
        'model_dim': f('hidden_size'),
        'attention.heads': f('num_attention_heads'),
        'attention.kv_heads': f.given('num_key_value_heads', kv_heads) or f('num_attention_heads'),
        'attention.head_dim': f('head_dim', f('hidden_size') // f('num_attention_heads')),
        'mlp.dim': f('intermediate_size'),
        'norm.epsilon': f('rms_norm_eps', epsilon),
        'embedding.tied': f('tie_word_embeddings', tied),
    }


def no_windows(f: Fields) -> None:
    """That layer_types, which configs of models without windows may have too, tells of none."""
    types = f('layer_types', ['full_attention'])
    if set(types) != {'full_attention'}:
        raise UserError(
            f'{f.source}: layer_types is {shown_value(types)}: this family has full_attention in all layers'
        )


def biases(f: Fields) -> dict[str, Any]:
    """Of all attention's projections, of all of the MLP's."""
    attention, mlp = f('attention_bias', False), f('mlp_bias', False)
    return {'attention.qkv_bias': attention, 'attention.o_bias': attention, 'mlp.bias': mlp}


def write(c: ModelConfig) -> dict[str, Any]:
    return (
        write_common(c)
        | write_rope(c)
        | {'model_type': 'llama', 'attention_bias': c.attention.qkv_bias, 'mlp_bias': c.mlp.bias}
    )


def write_common(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `common`."""
    return {
        'hidden_act': 'silu',
        'vocab_size': c.vocabulary,
        'num_hidden_layers': c.layers,
        'hidden_size': c.model_dim,
        'num_attention_heads': c.attention.heads,
        'num_key_value_heads': c.attention.kv_heads,
        'head_dim': c.attention.head_dim,
        'intermediate_size': c.mlp.dim,
        'rms_norm_eps': c.norm.epsilon,
        'tie_word_embeddings': c.embedding.tied,
    }


FAMILY = causal_family('llama', 'Llama', read, write, OUTER | NORMS | ATTENTION | MLP)
