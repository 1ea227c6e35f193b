"""Weights rounded to the nearest of few numbers: int8, int4 in groups, fp8 (e4m3), each with its scales; zero is exact.

Letters: I inputs, O outputs, G groups of consecutive numbers along an axis of an array; S numbers of a group.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from weft.compress.numerics.checks import finite
from weft.runtime.errors import UserError

GROUP = 32  # numbers of an int4 scale, unless another is asked for
INT8_MOST = 127  # of codes −127 … 127
INT4_LEAST, INT4_MOST = -8, 7
FP8_MOST = 448.0  # the largest finite number of e4m3fn
FLOAT16_MOST = 65504.0
# Scales that `search` tries, as shares of max |w| / 7, with either sign: with −7/8 the largest number has the code −8.
SHARES = (0.7, 0.725, 0.75, 0.775, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.0)


class Rounded(NamedTuple):
    """A rounded weight: each number is its code times the scale of its group.

    Attributes:
        codes: like the weight: int8, also where they are −8 … 7 of int4, or float8_e4m3fn.
        scale: like the weight but for `axis`, which has one scale a group: float32 for int8 and fp8, float16 for int4.
        axis: of the weight, along which numbers share a scale.
        group: how many consecutive numbers share one, the last group may be shorter; None: all of the axis.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int
    group: int | None = None


def int8(w: np.ndarray, axis: int) -> Rounded:
    """Rounds to the nearest of 255 numbers, symmetric around zero, with one float32 scale, max |w| / 127, along an axis.

    For a weight [I, O] and axis 0 an output has a scale. An error is at most half a scale.

    Args:
        w: numbers of any shape; UserError where one is not finite.
        axis: all numbers along it share a scale.
    """
    w = finite(w)
    scale = int8_scale(w, axis)
    return Rounded(nearest_codes(w, scale, -INT8_MOST, INT8_MOST), scale, axis)


def int4(w: np.ndarray, axis: int, group: int = GROUP, search: bool = False) -> Rounded:
    """Rounds to the nearest of 16 numbers, codes −8 … 7, with one float16 scale for each group along an axis.

    The scale is max |w| / 7 of the group, rounded to float16 before the codes are chosen, so that what is decoded is what was
    weighed. With `search` it is, of 26 scales around that (0.7 to 1 of it, with either sign, since −8 has no counterpart), the
    one with the least squared error of the group, so never a worse one.

    Args:
        w: numbers of any shape; UserError where one is not finite, or is so large that float16 cannot hold its scale.
        axis: groups are of consecutive numbers along it.
        group: numbers that share a scale; the last group of an axis may be shorter.
        search: for the scale; 26 times the work.
    """
    w = finite(w)
    check_group(group)
    grouped = _in_groups(w, axis, group)  # [..., G, S], the axis last
    scale = int4_scale(grouped, search)  # [..., G, 1]
    codes = nearest_codes(grouped, scale, INT4_LEAST, INT4_MOST)
    flat = codes.reshape(*codes.shape[:-2], -1)[..., : w.shape[axis]]
    return Rounded(np.moveaxis(flat, -1, axis), np.moveaxis(scale[..., 0], -1, axis), axis, group)


def fp8(w: np.ndarray, axis: int) -> Rounded:
    """Rounds to float8 e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), with one float32 scale, max |w| / 448, along an axis.

    Ties go to even. Above 2⁻⁶ of a scale the relative error is at most 1/16.

    Args:
        w: numbers of any shape; UserError where one is not finite.
        axis: all numbers along it share a scale.
    """
    w = finite(w)
    scale = _float32(np.abs(w).max(axis, keepdims=True) / FP8_MOST)
    inside = np.clip(w / scale.astype(np.float64), -FP8_MOST, FP8_MOST)  # beyond, e4m3fn has no infinity but NaN
    return Rounded(inside.astype(ml_dtypes.float8_e4m3fn), scale, axis)


def decode(rounded: Rounded) -> np.ndarray:
    """The numbers that a rounded weight stands for, float64, in its shape."""
    codes, scale = rounded.codes.astype(np.float64), rounded.scale.astype(np.float64)
    if rounded.group is not None:
        each = np.repeat(scale, rounded.group, rounded.axis)
        scale = np.take(each, np.arange(codes.shape[rounded.axis]), rounded.axis)
    return codes * scale


def nearest_codes(w: np.ndarray, scale: np.ndarray, least: int, most: int) -> np.ndarray:
    """The integers, as int8, whose products with a scale are nearest to the numbers of w; ties go to even."""
    return np.clip(np.rint(w / scale.astype(np.float64)), least, most).astype(np.int8)


def int8_scale(w: np.ndarray, axis: int) -> np.ndarray:
    """The scales of `int8` along an axis, which has one: max |w| / 127, float32."""
    return _float32(np.abs(w).max(axis, keepdims=True) / INT8_MOST)


def int4_scale(grouped: np.ndarray, search: bool = False) -> np.ndarray:
    """The scales of `int4` for groups that are an array's last axis, float16; that axis has length 1. Raises UserError."""
    largest = np.abs(grouped).max(-1, keepdims=True)
    full = largest / INT4_MOST
    if full.size and full.max() > FLOAT16_MOST:
        most = INT4_MOST * FLOAT16_MOST
        raise UserError(f'a weight is {largest.max():g}: int4 holds up to {most:g}, for its scales are float16')
    scale = _float16(full)
    if not search:
        return scale
    least = _squared_error(grouped, scale)
    for share in SHARES:
        for sign in (1, -1):
            tried = _float16(full * share) * np.float16(sign)
            error = _squared_error(grouped, tried)
            scale = np.where(error < least, tried, scale)
            least = np.minimum(error, least)
    return scale


def check_group(group: int) -> None:
    """Raises UserError for a group of no numbers."""
    if group < 1:
        raise UserError(f'group is {group}: it must be at least 1; {GROUP} is usual')


def _squared_error(grouped: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes = np.clip(np.rint(grouped / scale.astype(np.float64)), INT4_LEAST, INT4_MOST)
    return ((codes * scale.astype(np.float64) - grouped) ** 2).sum(-1, keepdims=True)


def _in_groups(w: np.ndarray, axis: int, group: int) -> np.ndarray:
    """The numbers with an axis at the end, taken apart as [..., G, S]; zeros fill the last group."""
    last = np.moveaxis(w, axis, -1)
    missing = -last.shape[-1] % group
    padded = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, missing)])
    return padded.reshape(*last.shape[:-1], -1, group)


def _float32(scale: np.ndarray) -> np.ndarray:
    """Scales as float32, at least its smallest normal number; 1 where all numbers are zero."""
    tiny = np.finfo(np.float32).tiny
    return np.where(scale > 0, np.maximum(scale, tiny), 1).astype(np.float32)


def _float16(scale: np.ndarray) -> np.ndarray:
    """Scales as float16, at least its smallest number; 1 where all numbers are zero."""
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    return np.where(scale > 0, np.maximum(scale, tiny), 1).astype(np.float16)
