"""Llama 2, 3, 3.1, 3.2, 3.3 (Touvron et al. 2023, arXiv:2307.09288; Dubey et al. 2024, arXiv:2407.21783).

Grouped-query attention, SwiGLU, RMSNorm, rotary positions in halves.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from weft.hub.families import Entry, Family, Fields
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, model_of
from weft.storage.foreign import shown_value


def linears(published: str, ours: str, **names: str) -> dict[str, str]:
    """The weights of a layer's linear maps, then their biases; of `names` the published one says ours with its axes."""
    place = f'model.layers.{{i}}.{published}'
    weights = {f'{place}.{name}.weight': f'{ours}.{weight}' for name, weight in names.items()}
    return weights | {f'{place}.{name}.bias': f'{ours}.{weight[:-4]}b_O' for name, weight in names.items()}


ATTENTION = linears('self_attn', 'attention', q_proj='q.w_IO', k_proj='k.w_IO', v_proj='v.w_IO', o_proj='o.w_OI')
MLP = linears('mlp', 'mlp', gate_proj='gate.w_IO', up_proj='up.w_IO', down_proj='down.w_OI')
NORMS = {
    'model.layers.{i}.input_layernorm.weight': 'attention_norm.scale_D',
    'model.layers.{i}.post_attention_layernorm.weight': 'mlp_norm.scale_D',
}
OUTER = {'model.embed_tokens.weight': 'embed_VD', 'model.norm.weight': 'norm.scale_D', 'lm_head.weight': 'head_DV'}


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
    return model_of(unwindowed(f) | {'mlp.bias': f('mlp_bias', False)})


SIZES: Table = {
    'vocab_size': ('vocabulary', ...),
    'num_hidden_layers': ('layers', ...),
    'hidden_size': ('model_dim', ...),
    'num_attention_heads': ('attention.heads', ...),
    'num_key_value_heads': ('attention.kv_heads', None),
    'head_dim': ('attention.head_dim', None),
    'intermediate_size': ('mlp.dim', ...),
    'rms_norm_eps': ('norm.epsilon', 1e-6),
    'tie_word_embeddings': ('embedding.tied', False),
}


def common(
    f: Fields, kv_heads: int | None = None, rope: dict[str, Any] | None = None, **defaults: Any
) -> dict[str, Any]:
    """The fields that Llama and its many descendants share; see `sizes`. `rope`: what `read_rope` gives with other defaults."""
    f.only('hidden_act', 'silu')
    return sizes(f, kv_heads, **defaults) | (read_rope(f) if rope is None else rope)


def sizes(f: Fields, kv_heads: int | None = None, **defaults: Any) -> dict[str, Any]:
    """The fields of SIZES, with a family's own `defaults`. kv_heads None, and null in a config: as many as heads."""
    found = read_fields(f, SIZES, **defaults)
    found['attention.kv_heads'] = f.given('num_key_value_heads', kv_heads) or found['attention.heads']
    found['attention.head_dim'] = found['attention.head_dim'] or found['model_dim'] // found['attention.heads']
    return found


def unwindowed(f: Fields, **defaults: Any) -> dict[str, Any]:
    """`common` and attention's biases of a model without windows, of which layer_types, where it is there, tells none."""
    types = f('layer_types', ['full_attention'])
    if set(types) != {'full_attention'}:
        raise f.error(f'layer_types is {shown_value(types)}: this family has full_attention in all layers')
    return common(f, **defaults) | attention_biases(f)


def attention_biases(f: Fields, default: bool = False) -> dict[str, Any]:
    """Of all attention's projections."""
    bias = f('attention_bias', default)
    return {'attention.qkv_bias': bias, 'attention.o_bias': bias}


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | {'model_type': 'llama', 'attention_bias': c.attention.qkv_bias, 'mlp_bias': c.mlp.bias}


def write_common(c: ModelConfig, fraction: bool = False) -> dict[str, Any]:
    return {'hidden_act': 'silu'} | write_fields(c, SIZES) | write_rope(c, fraction)


FAMILY = causal_family('llama', 'Llama', read, write, OUTER | NORMS | ATTENTION | MLP)
