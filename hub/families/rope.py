"""Rotary positions in published configs, in the old form (rope_theta, rope_scaling) and the new one (rope_parameters)."""

from typing import Any

from weft.hub.families import Fields, rotary_of
from weft.model.config import ModelConfig, RopeScaling
from weft.model.layers.rope import yarn_gain
from weft.runtime.errors import shown
from weft.storage.foreign import shown_value

KINDS = ('linear', 'dynamic', 'yarn', 'llama3', 'longrope')


def read_rope(
    f: Fields,
    default_theta: float = 10_000.0,
    fraction: float | None = None,
    original: int | None = None,
    scores: bool = False,
) -> dict[str, Any]:
    """The fields of a model that say how positions turn, with a family's defaults.

    `fraction` is the part of a head that turns, None in families that have no such field; `original` the old context;
    `scores` whether mscale_all_dim makes them grow, as in DeepSeek's models, and not only queries and keys.
    """
    f.skip('max_position_embeddings')
    p = rope_part(f)
    said = lambda name, default: f(name, default) if p is None else p(name, f(name, default))
    found: dict[str, Any] = {'positions.theta': float(said('rope_theta', default_theta))}
    if fraction is not None:
        found['positions.fraction'] = float(said('partial_rotary_factor', fraction))
    return found | {'positions.scaling': None if p is None else read_scaling(f, p, original, scores)}


def rope_part(f: Fields) -> Fields | None:
    """rope_parameters or, as it was called before, rope_scaling. A config may have both, if they say the same."""
    new, old = f.part('rope_parameters'), f.part('rope_scaling')
    if new and old:
        one, other = _meant(new), _meant(old)
        beside = {'rope_theta', 'partial_rotary_factor'}  # which stood beside rope_scaling
        for name in sorted((one.keys() | other.keys()) - (beside - other.keys())):
            if one.get(name) != other.get(name):
                raise f.error(
                    f'rope_parameters has {shown(name, 60)} {shown_value(one.get(name))} and rope_scaling '
                    f'{shown_value(other.get(name))}: they mean the same, and must agree'
                )
    return new or old


def _meant(p: Fields) -> dict[str, Any]:
    """What a section says, by one name for each thing."""
    found = {'rope_type': p.values.get('type'), **p.values}
    kind = found['rope_type'] or 'default'
    found['rope_type'] = 'longrope' if kind == 'su' else kind
    return {name: value for name, value in found.items() if name != 'type' and value is not None}


def read_scaling(f: Fields, p: Fields, original: int | None = None, scores: bool = False) -> RopeScaling | None:
    """The scaling of a rope_scaling or rope_parameters mapping `p` in `f`; `original` is the old context by default."""
    kind = p('rope_type', p('type', 'default'))
    p.skip('type', 'rope_theta')
    name = 'original_max_position_embeddings'
    outer, old = f(name, original), p(name, f(name, original))
    if outer not in (None, old):
        raise f.error(f'{name} is {outer} and in {p.source} {old}: they mean the same, and must agree')
    scaling: dict[str, Any] = {'original_positions': old}
    if kind == 'default':
        p.finish()
        return None
    if kind == 'su':
        kind = 'longrope'
    if kind not in KINDS:
        raise p.error(
            f'rope_type is {shown_value(kind)}, which is not supported; supported: default, {", ".join(KINDS)}'
        )
    if kind == 'dynamic' or (kind in ('yarn', 'longrope') and not old):
        scaling['original_positions'] = f('max_position_embeddings')
    if kind == 'llama3':
        scaling['low_frequency_factor'] = float(p('low_freq_factor'))
        scaling['high_frequency_factor'] = float(p('high_freq_factor'))
    elif kind == 'yarn':
        scaling['beta_fast'], scaling['beta_slow'] = float(p('beta_fast', 32.0)), float(p('beta_slow', 1.0))
        scaling['truncate'] = p('truncate', True)
        p.skip('finetuned')  # what was trained, which the numbers have
        for name in ('attn_factor', 'extrapolation_factor'):  # of the first YaRN models' own code
            p.only(name, 1)
        scaling['attention_factor'] = _yarn_gain(p)
        if scores:
            scaling['mscale_all_dim'] = float(p('mscale_all_dim', 0.0))
    elif kind == 'longrope':
        scaling['short_factors'] = tuple(map(float, p('short_factor')))
        scaling['long_factors'] = tuple(map(float, p('long_factor')))
        scaling['attention_factor'] = p('attention_factor', None)
    factor = p('factor', None) if kind in ('yarn', 'longrope') else p('factor')
    if factor is None:
        factor = f('max_position_embeddings') / scaling['original_positions']
    p.finish()
    return RopeScaling(kind=kind, factor=float(factor), **scaling)


def _yarn_gain(p: Fields) -> float | None:
    """YaRN's factor on queries and keys where the config says another than the paper's."""
    gain, part, whole = p('attention_factor', None), p('mscale', None), p('mscale_all_dim', None)
    if gain is None and part and whole:
        gain = yarn_gain(p('factor'), part) / yarn_gain(p('factor'), whole)
    return None if gain is None else float(gain)


def write_rope(c: ModelConfig, fraction: bool = False) -> dict[str, Any]:
    p = rotary_of(c)
    fields: dict[str, Any] = {'rope_theta': p.theta}
    if fraction:
        fields['partial_rotary_factor'] = p.fraction
    if p.scaling:
        fields['rope_scaling'] = write_scaling(p.scaling)
        if (whole := positions(c)) is not None:
            fields['max_position_embeddings'] = whole
    return fields


def write_scaling(s: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {'rope_type': s.kind, 'factor': s.factor}
    if s.original_positions is not None and s.kind != 'dynamic':
        fields['original_max_position_embeddings'] = s.original_positions
    if s.kind == 'llama3':
        fields |= {'low_freq_factor': s.low_frequency_factor, 'high_freq_factor': s.high_frequency_factor}
    elif s.kind == 'yarn':
        fields |= {'beta_fast': s.beta_fast, 'beta_slow': s.beta_slow, 'truncate': s.truncate}
    elif s.kind == 'longrope':
        fields |= {'short_factor': list(s.short_factors or ()), 'long_factor': list(s.long_factors or ())}
    if s.mscale_all_dim:
        fields['mscale_all_dim'] = s.mscale_all_dim
    if s.mscale_all_dim and s.attention_factor == 1:
        fields['mscale'] = s.mscale_all_dim
    elif s.attention_factor is not None:
        fields['attention_factor'] = s.attention_factor
    return fields


def positions(c: ModelConfig) -> int | None:
    """What max_position_embeddings must be for the scaling to read back the same; None: it does not matter."""
    s = c.rope_scaling
    if s is None or s.original_positions is None:
        return None
    return {'dynamic': s.original_positions, 'longrope': round(s.factor * s.original_positions)}.get(s.kind)
