"""Quantisation: int8, int4 in groups and fp8, by rounding to the nearest or by GPTQ (arXiv:2210.17323).

All have the form of model/forms/rounded.py; int4 takes for each group the scale with the least squared error.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from weft.compress.methods.base import Compressed, Options, register
from weft.compress.numerics import bits
from weft.compress.numerics.gptq import gptq
from weft.compress.numerics.rounding import Rounded, decode, fp8, int4, int8
from weft.compress.weights import Arrays, Target
from weft.model.forms.rounded import check_groups, packed
from weft.model.parts.linear_forms import RoundedConfig

Kind = Literal['int8', 'int4', 'fp8']


def rounded(w: np.ndarray, kind: str, axis: int, group: int) -> Rounded:
    """To the nearest, with scales along an axis, −1 or −2."""
    if kind == 'int4':
        check_groups(w.shape[axis], group)
        return int4(w, axis % w.ndim, group, search=True)
    return (int8 if kind == 'int8' else fp8)(w, axis % w.ndim)


def stored(found: Rounded, kind: str, axis: int, group: int, prefix: str = '') -> Arrays:
    """Codes and scales as they are kept."""
    codes = found.codes.view(np.uint8) if kind == 'fp8' else found.codes
    codes = packed(codes, group, axis) if kind == 'int4' else codes
    dtype = np.float16 if kind == 'int4' else np.float32
    return {f'{prefix}codes': np.ascontiguousarray(codes), f'{prefix}scale': found.scale.astype(dtype)}


def bits_of(shape: tuple[int, ...], kind: str, axis: int, group: int) -> int:
    """With scales."""
    if kind == 'int4':
        return bits.int4(shape, axis % len(shape), group)
    return bits.int8(shape, axis % len(shape))


def fit_of(kind: Kind, by_inputs: bool) -> Callable[[Target, float, Options], Compressed]:
    """The method of a kind; `by_inputs`: GPTQ."""

    def fit(target: Target, budget: float, options: Options) -> Compressed:
        axis = -1 if target.weight.out_first else -2
        if by_inputs:
            check_groups(target.w.shape[axis], options.group) if kind == 'int4' else None
            assert kind != 'fp8'
            found = corrected(target, kind, options.group)
        else:
            found = rounded(target.w, kind, axis, options.group)
        form = RoundedConfig(kind=kind, group=options.group)
        arrays = stored(found, kind, axis, options.group, 'rounded.')
        return Compressed(form, arrays, bits_of(target.w.shape, kind, axis, options.group), decode(found))

    return fit


def corrected(target: Target, kind: Literal['int8', 'int4'], group: int) -> Rounded:
    """By GPTQ, each expert by its own inputs; as the weight is kept."""
    assert target.gram is not None, 'the method measures'
    w_IO = target.w_IO if target.experts else target.w_IO[None]
    grams = target.gram if target.experts else target.gram[None]
    parts = [gptq(w, gram, kind, group, search=True) for w, gram in zip(w_IO, grams, strict=True)]
    codes, scale = (np.stack([getattr(part, field) for part in parts]) for field in ('codes', 'scale'))
    if target.weight.out_first:
        codes, scale = codes.swapaxes(-1, -2), scale.swapaxes(-1, -2)
    codes, scale = (a if target.experts else a[0] for a in (codes, scale))
    axis = -1 if target.weight.out_first else -2
    return Rounded(
        np.ascontiguousarray(codes), np.ascontiguousarray(scale), axis % codes.ndim, group if kind == 'int4' else None
    )


ABOUT: dict[Kind, str] = {
    'int8': '8 bits, a scale an output',
    'int4': '4 bits in groups',
    'fp8': 'e4m3, a scale an output',
}
for _kind, _about in ABOUT.items():
    _table = 'fp8' if _kind == 'fp8' else 'int8'
    register(_kind, f'{_about}, rounded to the nearest', fixed=True, tables=_table)(fit_of(_kind, False))
    if _kind != 'fp8':
        register(f'gptq-{_kind}', f'{_about}, by GPTQ', fixed=True, measures=True, tables=_table)(fit_of(_kind, True))
