"""Rounded weights against what their definition says of every number."""

import ml_dtypes
import numpy as np
import pytest

from weft.compress.numerics.rounding import Rounded, decode, fp8, int4, int8
from weft.runtime.errors import UserError

RNG = np.random.default_rng(0)
W = RNG.standard_normal((70, 9, 3)) * np.exp(RNG.standard_normal((70, 9, 3)))


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_int8_is_the_nearest_of_255_numbers_and_the_largest_is_kept(axis):
    found = int8(W, axis)
    assert (found.codes.dtype, found.scale.dtype) == (np.int8, np.float32)
    assert found.scale.shape == tuple(1 if place == axis % 3 else size for place, size in enumerate(W.shape))
    np.testing.assert_allclose(found.scale, np.abs(W).max(axis, keepdims=True) / 127, rtol=1e-7)
    assert (np.abs(found.codes).max(axis) == 127).all()
    every = np.arange(-127, 128) * found.scale[..., None].astype(np.float64)
    nearest = np.abs(W[..., None] - every).min(-1)
    np.testing.assert_allclose(np.abs(decode(found) - W), nearest, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(('axis', 'group'), [(0, 32), (0, 7), (1, 32), (-1, 2), (-3, 70)])
def test_int4_is_the_nearest_of_16_numbers_of_its_own_groups_scale(axis, group):
    found = int4(W, axis, group)
    assert (found.codes.dtype, found.scale.dtype) == (np.int8, np.float16)
    assert found.codes.min() >= -8
    assert found.codes.max() <= 7
    length = W.shape[axis]
    assert found.scale.shape[axis] == -(-length // group)
    w, decoded, scale = (np.moveaxis(array, axis, 0) for array in (W, decode(found), found.scale))
    for number, start in enumerate(range(0, length, group)):
        part = w[start : start + group]
        expected = (np.abs(part).max(0) / 7).astype(np.float16)
        np.testing.assert_array_equal(scale[number], expected)
        every = np.arange(-8, 8) * expected[..., None].astype(np.float64)
        nearest = np.abs(part[..., None] - every).min(-1)
        np.testing.assert_allclose(np.abs(decoded[start : start + group] - part), nearest, rtol=1e-9, atol=1e-12)


def test_a_searched_scale_is_never_worse_in_a_group_and_better_in_all():
    w = W[:64, :, 0]
    plain, searched = decode(int4(w, 0)), decode(int4(w, 0, search=True))
    error = lambda found: ((found - w) ** 2).reshape(2, 32, 9).sum(1)
    assert (error(searched) <= error(plain)).all()
    assert error(searched).sum() < 0.95 * error(plain).sum()


def test_a_searched_scale_gives_the_largest_number_the_code_of_its_sign():
    w = np.array([8.0, 1, -2, 3, -7, 5, 0, 4]) / 16
    found = int4(w, 0, group=8, search=True)
    np.testing.assert_array_equal(decode(found), w)
    assert found.scale < 0


def test_fp8_is_the_nearest_of_all_its_numbers():
    found = fp8(W, 0)
    assert (found.codes.dtype, found.scale.dtype) == (ml_dtypes.float8_e4m3fn, np.float32)
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    each = np.abs(W / found.scale)[..., None] - numbers
    expected = np.abs(each).min(-1) * found.scale
    np.testing.assert_allclose(np.abs(decode(found) - W), expected, rtol=1e-6, atol=1e-9)
    assert np.abs(found.codes.astype(np.float64)).max() == 448


def test_zeros_are_exact_and_alone_have_a_scale():
    w = np.zeros((4, 3))
    w[:, 1] = [0, 1, -2, 0]
    for found in (int8(w, 0), int4(w, 0), int4(w, 0, search=True), fp8(w, 0)):
        assert (found.scale != 0).all()
        assert not decode(found)[w == 0].any()


def test_numbers_too_small_for_a_scale_of_float16_are_near_zero_and_too_large_ones_are_refused():
    small = RNG.standard_normal((32, 4)) * 1e-9
    assert np.abs(decode(int4(small, 0)) - small).max() <= 6e-8
    with pytest.raises(UserError, match='a weight is 500000: int4 holds up to 458528'):
        int4(np.full((2, 2), 5e5), 0)


def test_numbers_of_a_grid_come_back_as_they_are():
    codes = RNG.integers(-7, 8, (64, 5)).astype(np.int8)
    codes[::32] = 7
    scale = (2.0 ** RNG.integers(-9, 3, (2, 5))).astype(np.float16)
    w = decode(Rounded(codes, scale, 0, 32))
    np.testing.assert_array_equal(int4(w, 0).codes, codes)
    np.testing.assert_array_equal(decode(int4(w, 0, search=True)), w)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(UserError, match='group is 0: it must be at least 1; 32 is usual'):
        int4(W, 0, 0)
    for rounding in (int8, int4, fp8):
        with pytest.raises(UserError, match='the weights have 1 numbers of 2 that are not finite'):
            rounding(np.array([1, np.inf]), 0)
