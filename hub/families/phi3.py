"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219): Llama in fused projections, LongRoPE, a part of heads turned."""

from typing import Any

from weft.hub.families import Entry, Fields, Joined
from weft.hub.families.llama import NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.rope import read_rope
from weft.model.config import ModelConfig, model_of

FUSED: dict[str, Entry] = {
    'model.layers.{i}.self_attn.qkv_proj.weight': Joined(('attention.q.w_IO', 'attention.k.w_IO', 'attention.v.w_IO')),
    'model.layers.{i}.self_attn.o_proj.weight': 'attention.o.w_OI',
    'model.layers.{i}.mlp.gate_up_proj.weight': Joined(('mlp.gate.w_IO', 'mlp.up.w_IO')),
    'model.layers.{i}.mlp.down_proj.weight': 'mlp.down.w_OI',
}


def read(f: Fields) -> ModelConfig:
    for name in ('attention_bias', 'mlp_bias', 'lm_head_bias'):
        f.only(name, False)
    for name in ('full_attn_mod', 'interpolate_factor'):  # of Phi-4-mini's config
        f.only(name, 1)
    f.skip('original_max_position_embeddings')
    rope = read_rope(f, fraction=1.0, original=4096)
    if rope['positions.scaling'] and rope['positions.scaling'].kind != 'longrope':
        raise f.error(
            f'rope_scaling is of type {rope["positions.scaling"].kind}, which this family does not have; '
            'supported: default, longrope'
        )
    return model_of(common(f, rope=rope, rms_norm_eps=1e-5) | {'attention.window': f('sliding_window', None)})


def write(c: ModelConfig) -> dict[str, Any]:
    fields = write_common(c, fraction=True) | {'model_type': 'phi3', 'sliding_window': c.attention.window}
    s = c.rope_scaling
    if s and s.kind == 'longrope':
        # As published: transformers before 5 wants type, short_factor and long_factor, and no other field.
        fields['original_max_position_embeddings'] = s.original_positions
        implied = {'rope_type', 'original_max_position_embeddings'}
        if fields['max_position_embeddings'] / s.original_positions == s.factor:
            implied.add('factor')
        scaling = {name: value for name, value in fields['rope_scaling'].items() if name not in implied}
        fields['rope_scaling'] = {'type': 'longrope', **scaling}
    return fields


FAMILY = causal_family('phi3', 'Phi3', read, write, FUSED | OUTER | NORMS)
