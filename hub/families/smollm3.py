"""SmolLM3 (huggingface.co/blog/smollm3): Llama of which every fourth layer turns no queries and keys (arXiv:2501.18795)."""

from typing import Any

from weft.hub.families import Fields, pattern
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, biases, causal_family, sizes, write_common
from weft.hub.families.qwen2 import read_types
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, model_of
from weft.runtime.errors import UserError
from weft.storage.foreign import shown_value


def read(f: Fields) -> ModelConfig:
    f.only('hidden_act', 'silu')
    f.skip('max_window_layers')  # of other models' code, which SmolLM3's does not read
    turned = read_turned(f)
    fields = sizes(f, kv_heads=4, tied=True) | read_rope(f, 2e6) | biases(f) | read_window(f, turned)
    return model_of(fields | {'positions.pattern': pattern(turned)})


def read_turned(f: Fields) -> list[bool]:
    """Which layers have rotary positions: those with a 1 in no_rope_layers, or all but every so many."""
    layers, every = f('num_hidden_layers'), f('no_rope_layer_interval', 4)
    said = f('no_rope_layers', None)
    if said is None:
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(said) < layers or not set(said) <= {0, 1}:
        raise UserError(
            f'{f.source}: no_rope_layers is {shown_value(said)}: a 1 is needed for each of the {layers} layers with '
            'rotary positions, a 0 '
            'for each without'
        )
    return [bool(one) for one in said[:layers]]


def read_window(f: Fields, turned: list[bool]) -> dict[str, Any]:
    """The window, and which layers have it: as layer_types says, else those without rotary positions."""
    on, window, types = f('use_sliding_window', False), f('sliding_window', None), f('layer_types', None)
    window = window if on else None
    windowed = [window is not None and not one for one in turned] if types is None else read_types(f, types)
    if any(windowed) and window is None:
        raise UserError(
            f'{f.source}: layer_types has sliding_attention and use_sliding_window is {on}, sliding_window '
            f'{f("sliding_window", None)}: such layers need true and a number of tokens'
        )
    return {'attention.window': window, 'attention.window_pattern': pattern(windowed)} if any(windowed) else {}


def write(c: ModelConfig) -> dict[str, Any]:
    return (
        write_common(c)
        | write_rope(c)
        | {
            'model_type': 'smollm3',
            'attention_bias': c.attention.qkv_bias,
            'mlp_bias': c.mlp.bias,
            'no_rope_layers': [int(kind.turned) for kind in c.layer_specs],
            'use_sliding_window': c.attention.window is not None,
            'sliding_window': c.attention.window,
            'layer_types': ['sliding_attention' if kind.windowed else 'full_attention' for kind in c.layer_specs],
        }
    )


FAMILY = causal_family('smollm3', 'SmolLM3', read, write, OUTER | NORMS | ATTENTION | MLP)
