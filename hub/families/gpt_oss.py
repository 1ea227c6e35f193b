"""gpt-oss (OpenAI 2025, arXiv:2508.10925): sinks in attention, a window in every second layer, experts with biases.

An expert's gate and up stand in turns in one tensor, all experts' tensors in one, as transformers saves them; in the files
that OpenAI published the experts are packed as MXFP4.
"""

from typing import Any

from weft.hub.families import Entry, Fields, Flipped, Woven, linear
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.gemma2 import read_windows, write_windows
from weft.hub.families.llama import ATTENTION, NORMS, OUTER, attention_biases, causal_family, sizes, write_common
from weft.hub.families.rope import read_rope
from weft.model.config import ModelConfig, RopeScaling, model_of

YARN = RopeScaling(kind='yarn', factor=32.0, original_positions=4096, truncate=False)  # where a config says nothing
EXPERTS: dict[str, Entry] = {
    'model.layers.{i}.self_attn.sinks': 'attention.sink_N',
    **linear('model.layers.{i}.mlp.router', 'mlp.router'),
    'model.layers.{i}.mlp.experts.gate_up_proj': Woven(('mlp.gate.w_EIO', 'mlp.up.w_EIO'), flip=True),
    'model.layers.{i}.mlp.experts.gate_up_proj_bias': Woven(('mlp.gate.b_EO', 'mlp.up.b_EO')),
    'model.layers.{i}.mlp.experts.down_proj': Flipped('mlp.down.w_EOI'),
    'model.layers.{i}.mlp.experts.down_proj_bias': 'mlp.down.b_EO',
}
MIXTURE: Table = {
    'num_local_experts': ('moe.experts', 128, 'num_experts'),
    'num_experts_per_tok': ('moe.top_k', 4, 'experts_per_token'),
    'intermediate_size': ('moe.mlp_dim', ...),
}


def read(f: Fields) -> ModelConfig:
    f.only('hidden_act', 'silu')
    f.only('swiglu_alpha', 1.702)
    return model_of(
        sizes(f, kv_heads=8, rms_norm_eps=1e-5, head_dim=64)
        | read_positions(f)
        | read_windows(f, every=2, default=128)
        | attention_biases(f, default=True)
        # A softmax over the chosen logits is a softmax over all of them, made to add up to 1 over the chosen.
        | read_fields(f, MIXTURE)
        | {
            'mlp.activation': 'clamped_swiglu',
            'mlp.limit': float(f('swiglu_limit', 7.0)),
            'attention.sinks': True,
            'moe.router_bias': True,
            'moe.bias': True,
        }
    )


def read_positions(f: Fields) -> dict[str, Any]:
    """Rotary positions; YaRN's where a config does not speak of scaling."""
    rope = read_rope(f, 150_000.0)
    if f('rope_parameters', None) is None and f('rope_scaling', None) is None:
        rope['positions.scaling'] = YARN
    said, scaling = f('initial_context_length', None), rope['positions.scaling']
    if said is not None and scaling and said != scaling.original_positions:
        raise f.error(
            f'initial_context_length is {said} and original_max_position_embeddings '
            f'{scaling.original_positions}: they mean the same, and must agree'
        )
    return rope


def write(c: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {'model_type': 'gpt_oss', 'attention_bias': c.attention.qkv_bias, 'swiglu_limit': c.mlp.limit}
    if c.rope_scaling is None:
        own['rope_scaling'] = {'rope_type': 'default'}  # without it there would be YaRN
    return write_common(c) | write_windows(c) | own | write_fields(c, MIXTURE)


FAMILY = causal_family('gpt_oss', 'GptOss', read, write, OUTER | NORMS | ATTENTION | EXPERTS)
