"""Gemma 2 (arXiv:2408.00118): norms before and after each part, soft caps, a window in every second layer."""

from typing import Any

from weft.hub.families import Fields, head_of
from weft.hub.families.fields import write_fields
from weft.hub.families.llama import ATTENTION, MLP, OUTER, SIZES, attention_biases, causal_family, sizes
from weft.hub.families.qwen2 import layer_types, read_types, window_fields
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, model_of

ACTIVATIONS: dict[str, Any] = {'gelu_pytorch_tanh': 'geglu', 'silu': 'swiglu'}
WINDOW = 4096  # where a config leaves it out
NORMS = {
    'model.layers.{i}.input_layernorm.weight': 'attention_norm.scale_D',
    'model.layers.{i}.post_attention_layernorm.weight': 'attention_out_norm.scale_D',
    'model.layers.{i}.pre_feedforward_layernorm.weight': 'mlp_norm.scale_D',
    'model.layers.{i}.post_feedforward_layernorm.weight': 'mlp_out_norm.scale_D',
}


def read(f: Fields) -> ModelConfig:
    window = f.either(('sliding_window', 'sliding_window_size'), WINDOW)
    return model_of(
        common(f)
        | read_rope(f)
        | read_windows(f, every=2, default=window)
        | {
            'attention.softcap': f.given('attn_logit_softcapping', 50.0),
            'head.softcap': f.given('final_logit_softcapping', 30.0),
        }
    )


def common(f: Fields) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share."""
    f.only('use_bidirectional_attention', False)
    f.either(('hidden_activation', 'hidden_act'), None)  # published with both
    fields, scalar = sizes(f, kv_heads=4, tie_word_embeddings=True, head_dim=256), f('query_pre_attn_scalar', 256)
    return fields | {
        'mlp.activation': ACTIVATIONS[f.only('hidden_activation', *ACTIVATIONS)],
        'norm.order': 'sandwich',
        'norm.offset': 1.0,
        'embedding.scale': fields['model_dim'] ** 0.5,
        'attention.scale': None if scalar == fields['attention.head_dim'] else scalar**-0.5,
        **attention_biases(f),
    }


def read_windows(f: Fields, every: int, default: int) -> dict[str, Any]:
    """The window, and which layers have it: as layer_types says, else all but every so many."""
    types, window = f('layer_types', None), f.given('sliding_window', default)
    windowed = [(i + 1) % every != 0 for i in range(f('num_hidden_layers'))] if types is None else read_types(f, types)
    if any(windowed) and window is None:
        raise f.error(
            f'sliding_window is null: {sum(windowed)} layers have it, and need a number of tokens; layer_types '
            'of full_attention alone has none'
        )
    return window_fields(window, windowed)


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'attn_logit_softcapping': c.attention.softcap, 'final_logit_softcapping': head_of(c).softcap}
    return write_own(c) | write_rope(c) | write_windows(c) | {'model_type': 'gemma2'} | own


def write_own(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `common`."""
    name = next((name for name, ours in ACTIVATIONS.items() if ours == c.mlp.activation), 'gelu_pytorch_tanh')
    scalar = c.attention.head_dim if c.attention.scale is None else round(c.attention.scale**-2)
    own = {'hidden_activation': name, 'query_pre_attn_scalar': scalar, 'attention_bias': c.attention.qkv_bias}
    return {'hidden_act': name} | write_fields(c, SIZES) | own


def write_windows(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`. transformers wants a number even where no layer has the window."""
    window = WINDOW if c.attention.window is None else c.attention.window
    return {'sliding_window': window, 'layer_types': layer_types(c)}


FAMILY = causal_family('gemma2', 'Gemma2', read, write, OUTER | NORMS | ATTENTION | MLP)
