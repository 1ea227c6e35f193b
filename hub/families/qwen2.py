"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases of queries, keys and values."""

from typing import Any

from weft.hub.families import Fields, pattern
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, causal_family, common, write_common
from weft.model.config import ModelConfig, model_of
from weft.storage.foreign import shown_value


def read(f: Fields) -> ModelConfig:
    f.only('use_mrope', False)
    return model_of(common(f, kv_heads=32) | read_window(f) | {'attention.qkv_bias': True})


def read_window(f: Fields) -> dict[str, Any]:
    """The window, and which layers have it: those from max_window_layers on, or as layer_types says."""
    first = f('max_window_layers', 28)
    return read_windows(f, [i >= first for i in range(f('num_hidden_layers'))])


def read_windows(f: Fields, layers: list[bool], default: int | None = 4096) -> dict[str, Any]:
    """The window, `default` where a config leaves it out, and which layers have it: as layer_types says, else `layers`."""
    on, window, types = f('use_sliding_window', False), f.given('sliding_window', default), f('layer_types', None)
    window = window if on else None
    windowed = [window is not None and one for one in layers] if types is None else read_types(f, types)
    if any(windowed) and window is None:
        raise f.error(
            f'layer_types has sliding_attention and use_sliding_window is {on}, sliding_window '
            f'{f("sliding_window", None)}: such layers need true and a number of tokens'
        )
    return window_fields(window, windowed)


def window_fields(window: int | None, windowed: list[bool]) -> dict[str, Any]:
    return {'attention.window': window, 'attention.window_pattern': pattern(windowed)} if any(windowed) else {}


def read_types(f: Fields, types: list[str]) -> list[bool]:
    """Which layers have the window, of layer_types."""
    known = ('full_attention', 'sliding_attention')
    wrong = [name for name in types if name not in known]
    if wrong or len(types) != f('num_hidden_layers'):
        raise f.error(f'layer_types is {shown_value(types)}: one of {" and ".join(known)} is needed for each layer')
    return [name == 'sliding_attention' for name in types]


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | write_window(c) | {'model_type': 'qwen2'}


def write_window(c: ModelConfig) -> dict[str, Any]:
    return {
        'use_sliding_window': c.attention.window is not None,
        'sliding_window': c.attention.window,
        'max_window_layers': c.layers,
        'layer_types': layer_types(c),
    }


def layer_types(c: ModelConfig) -> list[str]:
    """The inverse of `read_types`."""
    return ['sliding_attention' if kind.windowed else 'full_attention' for kind in c.layer_specs]


FAMILY = causal_family('qwen2', 'Qwen2', read, write, OUTER | NORMS | ATTENTION | MLP)
