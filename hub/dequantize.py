"""Published tensors in few bits, read as the bfloat16 that they stand for, a part at a time.

FP8 in blocks: `X.weight` in float8_e4m3fn, `X.weight_scale_inv` a factor for each block of 128 × 128 (DeepSeek-V3,
arXiv:2412.19437, section 3.3, and its published inference/kernel.py: weight_dequant).
MXFP4: `X_blocks` [..., rows, groups, 16] of two 4-bit floats a byte, the lower half first, `X_scales` [..., rows, groups] of
exponents (OCP Microscaling Formats 1.0, section 5.3); X is [..., 32 · groups, rows], as gpt-oss multiplies it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from weft.hub.families.fields import Fields
from weft.hub.tensor_files import Derived, Stored, full_index
from weft.runtime.errors import shown
from weft.storage.foreign import shown_value

DTYPE_FP8 = np.dtype(jnp.float8_e4m3fn)
BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by their 4 bits
GROUP = 32  # numbers that share an exponent
# Fields of a quantization_config that are not looked at: which tensors are packed, their names say.
IRRELEVANT = ('quant_method', 'modules_to_not_convert', 'scale_fmt', 'dequantize')


@dataclasses.dataclass(frozen=True)
class BlockScaled(Derived):
    """A matrix in FP8 with a factor for each block."""

    of: Stored
    scale: Stored
    block: tuple[int, int]
    dtype = BFLOAT16

    def read(self, take: tuple[slice, ...] = ()) -> np.ndarray:
        spans = [range(size)[part] for size, part in zip(self.shape, full_index(take, len(self.shape)), strict=True)]
        row, column = (np.array(span) // step for span, step in zip(spans, self.block, strict=True))
        factors = np.array(self.scale.read(), np.float32)[row[:, None], column[None]]
        return (self.of.read(take).astype(np.float32) * factors).astype(BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Mxfp4(Derived):
    """Matrices of 4-bit floats in groups with an exponent."""

    of: Stored
    scales: Stored
    dtype = BFLOAT16

    @property
    def shape(self) -> tuple[int, ...]:
        *first, rows, groups, _ = self.of.shape
        return (*first, groups * GROUP, rows)

    def read(self, take: tuple[slice, ...] = ()) -> np.ndarray:
        *first, columns, rows = full_index(take, len(self.shape))
        span = range(self.shape[-2])[columns]
        begin, end = span[0] // GROUP, span[-1] // GROUP + 1
        where = (*first, rows, slice(begin, end))
        packed = self.of.read(where)
        numbers = np.empty((*packed.shape[:-1], GROUP), np.float32)
        numbers[..., 0::2], numbers[..., 1::2] = FLOAT4[packed & 15], FLOAT4[packed >> 4]
        with np.errstate(over='ignore', invalid='ignore'):  # the largest exponent says that the group is not a number
            numbers *= np.ldexp(np.float32(1), self.scales.read(where).astype(np.int32) - 127)[..., None]
        wide = numbers.astype(self.dtype).reshape(*packed.shape[:-2], -1)
        cut = slice(span[0] - begin * GROUP, span[-1] - begin * GROUP + 1, span.step)
        return wide[..., cut].swapaxes(-1, -2)


def unpacked(stored: Mapping[str, Stored], config: Fields) -> dict[str, Stored | BlockScaled | Mxfp4]:
    """The tensors of a folder, with those that stand for others under the others' names.

    Raises UserError for a quantization_config that is not supported, and where a tensor or its factors lack each other.
    """
    said = config.values.get('quantization_config')
    found: dict[str, Any] = dict(stored)
    if said is None or (isinstance(said, dict) and all(value is None for value in said.values())):
        return found  # what is left of one where the numbers are plain
    method = said.get('quant_method') if isinstance(said, dict) else said
    known = {'fp8': _fp8, 'mxfp4': _mxfp4}
    if not isinstance(method, str) or method not in known:
        raise config.error(
            f'quantization_config has quant_method {shown_value(method)}, which is not supported; supported: fp8 in blocks as '
            'of DeepSeek-V3, mxfp4 as of gpt-oss; otherwise take the revision that is not quantised'
        )
    known[method](found, said, config)
    return found


def _check_config(said: Mapping[str, Any], config: Fields, works: Mapping[str, Any]) -> None:
    """Raises UserError for a field of a quantization_config that says anything but what `works`."""
    for field, value in said.items():
        if field not in IRRELEVANT and works.get(field, ...) != value:
            raise config.error(
                f'quantization_config.{shown(field, 60)} is {shown_value(value)}, which is not supported'
                + (f'; supported: {works[field]!r}' if field in works else '')
            )


def _fp8(found: dict[str, Any], said: Mapping[str, Any], config: Fields) -> None:
    block: Any = said.get('weight_block_size')
    _check_config(said, config, {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'weight_block_size': block})
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)):
        raise config.error(
            f'quantization_config.weight_block_size is {shown_value(block)}: FP8 is supported in blocks, such as [128, 128]'
        )
    for name in [name for name, one in found.items() if one.dtype == DTYPE_FP8]:
        weight, scale = found[name], found.pop(f'{name}_scale_inv', None)
        if scale is None:
            raise weight.file.error(f'tensor {name} is in FP8 and its factors {name}_scale_inv are missing')
        if len(weight.shape) != 2 or not jnp.issubdtype(scale.dtype, np.floating) or scale.dtype.itemsize < 2:
            raise weight.file.error(
                f'tensor {name} {weight.dtype}{list(weight.shape)} with factors '
                f'{scale.dtype}{list(scale.shape)}: FP8 is supported for matrices, with factors in float32 or bfloat16'
            )
        wanted = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        if scale.shape != wanted:
            raise scale.file.error(
                f'tensor {name}_scale_inv is {list(scale.shape)} and must be {list(wanted)}: one '
                f'factor for each block of {block} of {name} {list(weight.shape)}'
            )
        found[name] = BlockScaled(weight, scale, (block[0], block[1]))


def _mxfp4(found: dict[str, Any], said: Mapping[str, Any], config: Fields) -> None:
    _check_config(said, config, {})
    for packed in [name for name, one in found.items() if name.endswith('_blocks') and one.dtype == np.uint8]:
        name = packed.removesuffix('_blocks')
        blocks, scales = found.pop(packed), found.pop(f'{name}_scales', None)
        if scales is None:
            raise blocks.file.error(f'tensor {packed} is in MXFP4 and its exponents {name}_scales are missing')
        if blocks.shape[-1:] != (GROUP // 2,) or scales.shape != blocks.shape[:-1] or scales.dtype != np.uint8:
            raise blocks.file.error(
                f'tensors {packed} {list(blocks.shape)} and {name}_scales {scales.dtype}{list(scales.shape)} do not fit each '
                f'other: MXFP4 has a byte of exponent for each {GROUP // 2} bytes of numbers'
            )
        if name in found:
            raise blocks.file.error(f'tensors {packed} and {name} are both there')
        found[name] = Mxfp4(blocks, scales)
