"""Gemma 3's language models (arXiv:2503.19786): five layers with a window and their own rotary base to each without.

Gemma 2 with norms of queries and keys instead of its soft caps. Models that also read images are refused.
"""

from typing import Any

from weft.hub.families import Family, Fields, head_of, rotary_of
from weft.hub.families.gemma2 import NORMS, WINDOW, common, read_windows, write_own, write_windows
from weft.hub.families.llama import ATTENTION, MLP, OUTER
from weft.hub.families.qwen3 import QK_NORMS
from weft.hub.families.rope import read_scaling, write_rope
from weft.model.config import ModelConfig, model_of

SCALINGS = ('linear', 'yarn', 'llama3')


def read(f: Fields) -> ModelConfig:
    if f('vision_config', None) or f('text_config', None):
        raise f.error(
            'vision_config: this model reads images, which is not supported; its language model alone is, '
            'saved with transformers: m = Gemma3ForConditionalGeneration.from_pretrained(OLD); '
            't = Gemma3ForCausalLM(m.config.text_config); t.model, t.lm_head = m.model.language_model, m.lm_head; '
            't.save_pretrained(NEW)'
        )
    f.only('attn_logit_softcapping', None)  # transformers takes the field, and does nothing with it
    every = f.either(('sliding_window_pattern', '_sliding_window_pattern'), 6)
    if every < 1:
        raise f.error(f'sliding_window_pattern is {every}: it must be at least 1, which gives no layer the window')
    windows = read_windows(f, every, default=WINDOW)
    rope = read_two_ropes(f)
    if not windows:
        del rope['positions.local_theta']
    return model_of(
        common(f)
        | windows
        | rope
        | {'attention.qk_norm': True, 'head.softcap': f.given('final_logit_softcapping', None)}
    )


def read_two_ropes(f: Fields) -> dict[str, Any]:
    """Of layers without a window, and of those with it: in fields of their own, or in rope_parameters by kind of layer."""
    f.skip('max_position_embeddings')
    thetas = {'positions.theta': f('rope_theta', 1e6), 'positions.local_theta': f('rope_local_base_freq', 1e4)}
    both = f.part('rope_parameters')
    if both is None:
        scaled = f.part('rope_scaling')
    else:
        scaled, local = both.part('full_attention'), both.part('sliding_attention')
        both.finish()
        if scaled is not None:
            thetas['positions.theta'] = scaled('rope_theta', thetas['positions.theta'])
        if local is not None:
            thetas['positions.local_theta'] = local('rope_theta', thetas['positions.local_theta'])
            local.only('rope_type', 'default')
            local.finish()
    scaling = None if scaled is None else read_scaling(f, scaled)
    if scaling and scaling.kind not in SCALINGS:
        raise f.error(
            f'the rotary scaling is of type {scaling.kind}, which this family does not have; '
            f'supported: default, {", ".join(SCALINGS)}'
        )
    return {name: float(theta) for name, theta in thetas.items()} | {'positions.scaling': scaling}


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'gemma3_text', 'final_logit_softcapping': head_of(c).softcap}
    if (local := rotary_of(c).local_theta) is not None:
        own['rope_local_base_freq'] = local
    return write_own(c) | write_rope(c) | write_windows(c) | own


FAMILY = Family(
    'gemma3',
    ('Gemma3ForCausalLM', 'Gemma3ForConditionalGeneration'),  # the second only to be refused with the way out
    read,
    write,
    OUTER | NORMS | ATTENTION | QK_NORMS | MLP,
    prefix='model.',
    headless='Gemma3TextModel',
)
