"""Weights rounded to few bits: 8-bit and 4-bit whole numbers, and 8-bit floating point (e4m3), with scales.

A weight is codes times scales. int8 and fp8 have a float32 scale for each output, int4 a float16 one for each group of inputs
of an output. Two int4 codes are a byte, both plus 8: of a group of G inputs byte j has codes j (low) and j + G/2. Rounded
numbers do not learn. Letters: as kept.py, and N tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.typing import DTypeLike

from weft.model.forms.kept import Columns, KeptWeight, layout_of, resized
from weft.model.parameters import Parameter, Role, parameter
from weft.model.parts.linear_forms import RoundedConfig
from weft.model.parts.registry import WEIGHTS
from weft.runtime.errors import UserError
from weft.sharding.collectives import all_gather
from weft.sharding.mesh import platform

LARGEST = {'int8': 127.0, 'int4': 7.0, 'fp8': 448.0}  # codes
TERMS = 64  # of a sum that `few_tokens` writes out
FEW = 2  # tokens: of so many a CPU multiplies and adds, and never writes the weight out in the compute dtype


class RoundedArray(nnx.Module):
    """An array of codes and scales."""

    def __init__(self, of: Parameter, kind: str, axis: int, group: int):
        """Declares both.

        Args:
            of: the array that it stands for, of two dims or more; its dim before the last is the one that is gathered.
            kind: int8, int4 or fp8.
            axis: −1 or −2, along which numbers have one scale, or one for each `group` of them.
            group: of int4.

        Raises UserError where groups do not divide the axis.
        """
        self.kind, self.axis, self.gathered = kind, axis, of.gathered
        codes, scales, layout = list(of.shape), list(of.shape), list(layout_of(of))
        size, scale_layout, scale_gathered = codes[axis], list(layout), of.gathered
        self.group = group if kind == 'int4' else int(size)
        if kind == 'int4':
            check_groups(int(size), group)
            units = size // group
            codes[axis], scales[axis] = resized(size, size // 2, units), resized(size, units, units)
        else:
            scales[axis], scale_layout[axis] = 1, None
            scale_gathered = () if axis == -2 else of.gathered
        more: dict[str, Any] = {'part': of.part, 'repeats': of.repeats}
        value = (of.scale or 1.0) / LARGEST[kind]  # so that a code as large as can be is one standard deviation
        kept = {'codes': 'int8' if kind == 'int8' else 'uint8', 'scale': 'float16' if kind == 'int4' else 'float32'}
        self.codes = parameter(tuple(codes), of.layout, Role.CODES, dtype=kept['codes'], gathered=of.gathered, **more)
        layout_of_scales = P(*scale_layout)
        self.scale = parameter(
            tuple(scales),
            layout_of_scales,
            Role.FROZEN,
            value=value,
            dtype=kept['scale'],
            gathered=scale_gathered,
            **more,
        )
        self.scale_gathered = scale_gathered

    def parts(self) -> tuple[jax.Array, jax.Array]:
        """Codes and scales, the dim before the last whole; sent as they are kept."""
        codes, scale = self.codes[...], self.scale[...]
        for axis in reversed(self.gathered):
            codes = all_gather(codes, axis, codes.ndim - 2)
        for axis in reversed(self.scale_gathered):
            scale = all_gather(scale, axis, scale.ndim - 2)
        return codes, scale

    def rows(self, number_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Rows of a table [V, D], by their numbers, in the compute dtype."""
        codes, scale = (part[number_BT] for part in self.parts())
        return decode(codes, scale, self.kind, self.axis, dtype)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """`whole`, as forms of linear maps have it."""
        return self.whole(dtype)

    def whole(self, dtype: DTypeLike) -> jax.Array:
        """The numbers in the compute dtype, the dim before the last whole, of the others what this device has."""
        return decode(*self.parts(), self.kind, self.axis, dtype)


def check_groups(size: int, group: int) -> None:
    """Raises UserError where so many inputs are not groups of an even number."""
    if group < 2 or group % 2 or size % group:
        fit = [n for n in range(2, size + 1, 2) if not size % n]
        near = f'nearest: {min(fit, key=lambda n: (abs(n - group), n))}' if fit else 'nearest: int8, which has none'
        raise UserError(f'model.weights: int4 has group {group}: it must be even and divide the {size} inputs; {near}')


def decode(codes: jax.Array, scale: jax.Array, kind: str, axis: int, dtype: DTypeLike) -> jax.Array:
    """codes · scale in the compute dtype. `axis`: −1 or −2, as of `RoundedArray`."""
    if kind != 'int4':
        return numbers(codes, kind, dtype) * scale.astype(dtype)
    low, high = halves(codes)
    axis, groups = codes.ndim + axis, scale.shape[axis]
    grouped = (*codes.shape[:axis], groups, -1, *codes.shape[axis + 1 :])
    both = jnp.concatenate([low.reshape(grouped), high.reshape(grouped)], axis + 1).astype(dtype)
    w = both * jnp.expand_dims(scale.astype(dtype), axis + 1)
    return w.reshape(*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])


def numbers(codes: jax.Array, kind: str, dtype: DTypeLike) -> jax.Array:
    """What codes of int8 and fp8 stand for, before their scale."""
    return (lax.bitcast_convert_type(codes, jnp.float8_e4m3fn) if kind == 'fp8' else codes).astype(dtype)


def halves(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high code of each byte of int4, −8 … 7."""
    return (codes & 15).astype(jnp.int8) - 8, (codes >> 4).astype(jnp.int8) - 8


def packed(codes: Any, group: int, axis: int) -> Any:
    """Codes −8 … 7 of int4 along `axis` as bytes, half as many; a NumPy array or a global one."""
    axis = codes.ndim + axis
    grouped = codes.reshape(*codes.shape[:axis], -1, 2, group // 2, *codes.shape[axis + 1 :])
    low, high = ((grouped.take(half, axis + 1) + 8).astype('uint8') for half in (0, 1))
    return (low | (high << 4)).reshape(*codes.shape[:axis], codes.shape[axis] // 2, *codes.shape[axis + 1 :])


class RoundedWeight(KeptWeight):
    """Scales along the outputs: inputs that meet in a sum have one, or one for each group."""

    def __init__(self, weight: Parameter, config: RoundedConfig):
        super().__init__(weight)
        group = config.group if config.kind == 'int4' else 0
        self.rounded = RoundedArray(weight, config.kind, -1 if weight.out_first else -2, group)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return self.rounded.whole(dtype)

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        if self.dim or not uses_sums(x_BTI):
            return None
        codes, scale = map(columns, self.rounded.parts())
        kind, dtype = self.rounded.kind, x_BTI.dtype
        if kind == 'int4':
            return few_tokens_of_groups(x_BTI, codes, scale.astype(dtype), self.out_first)
        # One scale for an output: the sum is scaled, not each of its terms.
        return few_tokens(x_BTI, numbers(codes, kind, dtype), self.out_first) * scale.astype(dtype).reshape(1, 1, -1)


def uses_sums(x_BTI: jax.Array) -> bool:
    """Whether `few_tokens` is how x meets a rounded weight."""
    return platform() == 'cpu' and x_BTI.size <= FEW * x_BTI.shape[-1]


def few_tokens(x_BTI: jax.Array, w: jax.Array, out_first: bool) -> jax.Array:
    """x W as sums of products, into which a CPU's compiler fuses how the weight is decoded: only codes are read.

    Of a weight that is kept as in × out, terms of up to `TERMS` inputs are written out: each is a row of outputs side by side,
    which a CPU adds as vectors. A sum along the other dim is made one output after another, from numbers that lie together.
    """
    flat_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
    if out_first:
        found = [(x_I[None] * w).sum(1) for x_I in flat_NI]
    else:
        terms = max(n for n in range(1, TERMS + 1) if not w.shape[0] % n)
        w_bjO = w.reshape(-1, terms, w.shape[1])
        found = []
        for x_bj in flat_NI.reshape(len(flat_NI), -1, terms):
            parts = [x_bj[:, j, None] * w_bjO[:, j] for j in range(terms)]
            found.append(functools.reduce(jnp.add, parts).sum(0))
    return jnp.stack(found).reshape(*x_BTI.shape[:-1], -1)


def few_tokens_of_groups(x_BTI: jax.Array, codes: jax.Array, scale: jax.Array, out_first: bool) -> jax.Array:
    """x W of an int4 weight, as `few_tokens`: each half of the bytes meets its inputs, each group's sum its scale.

    Letters: N tokens, G groups, h of their inputs half.
    """
    flat_NI, dtype = x_BTI.reshape(-1, x_BTI.shape[-1]), x_BTI.dtype
    G = scale.shape[1 if out_first else 0]
    low, high = (half.astype(dtype) for half in halves(codes))
    found = []
    for x_G2h in flat_NI.reshape(len(flat_NI), G, 2, -1):
        if out_first:
            low_OGh, high_OGh = (half.reshape(half.shape[0], G, -1) for half in (low, high))
            terms_OGh = x_G2h[None, :, 0] * low_OGh + x_G2h[None, :, 1] * high_OGh
            found.append((terms_OGh * scale[..., None]).sum((1, 2)))
        else:
            low_GhO, high_GhO = (half.reshape(G, -1, half.shape[1]) for half in (low, high))
            parts = [
                x_G2h[:, 0, h, None] * low_GhO[:, h] + x_G2h[:, 1, h, None] * high_GhO[:, h]
                for h in range(low_GhO.shape[1])
            ]
            found.append((functools.reduce(jnp.add, parts) * scale).sum(0))
    return jnp.stack(found).reshape(*x_BTI.shape[:-1], -1)


for kind in ('int8', 'int4', 'fp8'):
    WEIGHTS.implement(kind, RoundedWeight)
