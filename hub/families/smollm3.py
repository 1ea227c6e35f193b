"""SmolLM3 (huggingface.co/blog/smollm3): Llama of which every fourth layer turns no queries and keys (arXiv:2501.18795)."""

from typing import Any

from weft.hub.families import Fields, pattern
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, attention_biases, causal_family, common, write_common
from weft.hub.families.qwen2 import layer_types, read_windows
from weft.hub.families.rope import read_rope
from weft.model.config import ModelConfig, model_of
from weft.storage.foreign import shown_value


def read(f: Fields) -> ModelConfig:
    f.skip('max_window_layers')  # of other models' code, which SmolLM3's does not read
    turned = read_turned(f)
    windows = read_windows(f, [not one for one in turned], default=None)
    fields = common(f, 4, read_rope(f, 2e6), tie_word_embeddings=True) | attention_biases(f) | windows
    return model_of(fields | {'mlp.bias': f('mlp_bias', False), 'positions.pattern': pattern(turned)})


def read_turned(f: Fields) -> list[bool]:
    """Which layers have rotary positions: those with a 1 in no_rope_layers, or all but every so many."""
    layers, every = f('num_hidden_layers'), f('no_rope_layer_interval', 4)
    said = f('no_rope_layers', None)
    if said is None:
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(said) < layers or not set(said) <= {0, 1}:
        raise f.error(
            f'no_rope_layers is {shown_value(said)}: a 1 is needed for each of the {layers} layers with rotary '
            'positions, a 0 for each without'
        )
    return [bool(one) for one in said[:layers]]


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | {
        'model_type': 'smollm3',
        'attention_bias': c.attention.qkv_bias,
        'mlp_bias': c.mlp.bias,
        'no_rope_layers': [int(kind.turned) for kind in c.layer_specs],
        'use_sliding_window': c.attention.window is not None,
        'sliding_window': c.attention.window,
        'layer_types': layer_types(c),
    }


FAMILY = causal_family('smollm3', 'SmolLM3', read, write, OUTER | NORMS | ATTENTION | MLP)
