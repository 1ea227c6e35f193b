"""How positions are scaled, from the keys of a GGUF file as the fields of an equivalent config.json."""

import math
from typing import Any

import numpy as np

from weft.hub.gguf.keys import LARGEST, Config, Keys
from weft.storage.foreign import shown_value


def original_context(k: Keys, fields: Config) -> int:
    """Positions before they were scaled."""
    return k.count('rope.scaling.original_context_length', fields['max_position_embeddings'])


def scaling_fields(k: Keys, fields: Config, width: int | None = None) -> dict[str, Any]:
    """The field rope_scaling; `width` is how many dims of a head turn, None for all."""
    width = fields['head_dim'] if width is None else width
    kind, name = k('rope.scaling.type', 'none'), f'{k.architecture}.rope.scaling'
    factors = k.vector('rope_freqs.weight', width // 2)
    if factors is not None and not np.allclose(factors, 1):
        if kind != 'none':
            raise k.error(
                f'has both rope_freqs.weight and {name}.type {shown_value(kind)}: only one of them is supported'
            )
        return {'rope_scaling': llama3_scaling(k, factors, fields['rope_theta'], width)}
    if kind == 'none':
        factor = k.number('rope.scale_linear', 1.0)  # of older files
        return {} if factor in (0, 1) else {'rope_scaling': {'rope_type': 'linear', 'factor': float(factor)}}
    if kind == 'linear':
        return {'rope_scaling': {'rope_type': 'linear', 'factor': k.positive('rope.scaling.factor')}}
    if kind != 'yarn':
        raise k.error(f'key {name}.type is {shown_value(kind)}, which is not supported; supported: none, linear, yarn')
    found: dict[str, Any] = {'rope_type': 'yarn', 'factor': k.positive('rope.scaling.factor')}
    found['original_max_position_embeddings'] = original_context(k, fields)
    mixed = k.number('rope.scaling.yarn_ext_factor', 1.0)
    if mixed not in (1, -1):  # below 0: as the kind of scaling has it
        raise k.error(f'key {name}.yarn_ext_factor is {mixed}: only 1 is supported')
    for field, key in (('beta_fast', 'beta_fast'), ('beta_slow', 'beta_slow'), ('attention_factor', 'attn_factor')):
        if k(f'rope.scaling.yarn_{key}', None) is not None:
            found[field] = k.positive(f'rope.scaling.yarn_{key}')
    return {'rope_scaling': found}


def llama3_scaling(k: Keys, factors: np.ndarray, theta: float, width: int) -> dict[str, Any]:
    """Llama 3's scaling of which these are the factors of wavelengths (transformers' modeling_rope_utils.py has the formula).

    Of wavelengths between two bounds the inverse factor grows as the inverse wavelength does; the line gives the bounds, of
    which only the ratios to the old context matter: low_freq_factor is taken to be 1, as in all published models.
    """
    wrong = k.error('tensor rope_freqs.weight has factors that are not those of Llama 3’s scaling of positions')
    largest = float(factors.max())
    if not np.isfinite(factors).all() or factors.min() < 1:
        raise wrong
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    between = np.flatnonzero((factors > 1 + 1e-6) & (factors < largest * (1 - 1e-6)))
    smooth = (1 / factors[between].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
    with np.errstate(all='ignore'):
        if len(between) > 1:
            slope = (smooth[0] - smooth[-1]) / (1 / waves[between[0]] - 1 / waves[between[-1]])
            offset = smooth[0] - slope / waves[between[0]]
        else:  # one is not enough for a line, nor is none: with the bounds and the context of all published models
            offset = np.float64(-1 / 3)
            slope = (smooth[0] - offset) * waves[between[0]] if len(between) else 8192 / 3
        high = round(float(1 - 1 / offset), 3)
        old = float(slope * (high - 1))
    if not 1 < high < math.inf or not 1 <= old < LARGEST:
        raise wrong
    part = np.clip((round(old) / waves - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - part) / largest + part), factors, rtol=1e-4, atol=0):
        raise wrong
    return {
        'rope_type': 'llama3',
        'factor': float(str(np.float32(largest))),
        'low_freq_factor': 1.0,
        'high_freq_factor': high,
        'original_max_position_embeddings': round(old),
    }
