"""Blocks of few bits stand for the numbers that the description of their format gives, whole and by slices.

Each function here is written from ggml's description of the format (ggml-quants.h and the loops of ggml-quants.c), a block at a
time, for comparison with what is read.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.gguf import written
from weft.hub.gguf import file as gguf_file
from weft.runtime.errors import UserError

ROWS, HEIGHT, BLOCKS = 3, 5, 3


def half(b: np.ndarray, at: int) -> np.float32:
    return b[at : at + 2].view(np.float16)[0].astype(np.float32)


def nibbles(b: np.ndarray) -> np.ndarray:
    """The lower halves of all bytes, then the upper."""
    return np.concatenate([b & 15, b >> 4]).astype(np.float32)


def fifth(b: np.ndarray) -> np.ndarray:
    """Bits of four bytes, the lowest first, as 16."""
    return 16 * np.unpackbits(b, bitorder='little').astype(np.float32)


def q4_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[2:]) - 8)


def q4_1(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * nibbles(b[4:]) + half(b, 2)


def q5_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[6:]) + fifth(b[2:6]) - 16)


def q5_1(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[8:]) + fifth(b[4:8])) + half(b, 2)


def q8_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * b[2:].view(np.int8).astype(np.float32)


def q2_k(b: np.ndarray) -> np.ndarray:
    out, d, least = np.empty(256, np.float32), half(b, 80), half(b, 82)
    for i in range(256):
        part, shift, byte = i // 128, 2 * (i % 128 // 32), i % 32
        scale = b[i // 16]
        number = b[16 + 32 * part + byte] >> shift & 3
        out[i] = d * np.float32(scale & 15) * np.float32(number) - least * np.float32(scale >> 4)
    return out


def q3_k(b: np.ndarray) -> np.ndarray:
    out, d, high, scales = np.empty(256, np.float32), half(b, 108), b[:32], b[96:108]
    for i in range(256):
        part, group, byte, k = i // 128, i % 128 // 32, i % 32, i // 16
        scale = (scales[k] & 15 if k < 8 else scales[k - 8] >> 4) | (scales[8 + k % 4] >> 2 * (k // 4) & 3) << 4
        number = int(b[32 + 32 * part + byte] >> 2 * group & 3) - (0 if high[byte] >> (4 * part + group) & 1 else 4)
        out[i] = d * np.float32(int(scale) - 32) * np.float32(number)
    return out


def six_bits(s: np.ndarray, k: int) -> tuple[int, int]:
    """The scale and the least number of one of eight groups."""
    if k < 4:
        return int(s[k] & 63), int(s[k + 4] & 63)
    return int(s[k + 4] & 15 | s[k - 4] >> 6 << 4), int(s[k + 4] >> 4 | s[k] >> 6 << 4)


def q4_k(b: np.ndarray, fifths: np.ndarray | None = None, at: int = 16) -> np.ndarray:
    out, d, least = np.empty(256, np.float32), half(b, 0), half(b, 2)
    for i in range(256):
        k, byte = i // 32, i % 32
        scale, low = six_bits(b[4:16], k)
        number = int(b[at + 32 * (k // 2) + byte] >> 4 * (k % 2) & 15)
        number += 0 if fifths is None else 16 * int(fifths[byte] >> k & 1)
        out[i] = d * np.float32(scale) * np.float32(number) - least * np.float32(low)
    return out


def q5_k(b: np.ndarray) -> np.ndarray:
    return q4_k(b, b[16:48], 48)


def q6_k(b: np.ndarray) -> np.ndarray:
    out, d, low, high, scales = np.empty(256, np.float32), half(b, 208), b[:128], b[128:192], b[192:208].view(np.int8)
    for i in range(256):
        part, group, byte = i // 128, i % 128 // 32, i % 32
        number = low[64 * part + 32 * (group % 2) + byte] >> 4 * (group // 2) & 15
        number |= (high[32 * part + byte] >> 2 * group & 3) << 4
        out[i] = d * np.float32(scales[i // 16]) * np.float32(int(number) - 32)
    return out


def mxfp4(b: np.ndarray) -> np.ndarray:
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    return np.ldexp(table[nibbles(b[1:]).astype(int)], int(b[0]) - 127).astype(np.float32)


# Type: its number, numbers and bytes in a block, where float16 scales stand, and what a block stands for.
KINDS: dict[str, tuple[int, int, int, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {
    'Q4_0': (2, 32, 18, (0,), q4_0),
    'Q4_1': (3, 32, 20, (0, 2), q4_1),
    'Q5_0': (6, 32, 22, (0,), q5_0),
    'Q5_1': (7, 32, 24, (0, 2), q5_1),
    'Q8_0': (8, 32, 34, (0,), q8_0),
    'Q2_K': (10, 256, 84, (80, 82), q2_k),
    'Q3_K': (11, 256, 110, (108,), q3_k),
    'Q4_K': (12, 256, 144, (0, 2), q4_k),
    'Q5_K': (13, 256, 176, (0, 2), q5_k),
    'Q6_K': (14, 256, 210, (208,), q6_k),
    'MXFP4': (39, 32, 17, (), mxfp4),
}


def packed(kind: str, draw: np.random.Generator) -> written.Packed:
    """Random blocks whose scales are numbers."""
    number, numbers, size, scales, _ = KINDS[kind]
    raw = draw.integers(0, 256, (ROWS, HEIGHT, BLOCKS, size), np.uint8)
    for at in scales:
        raw[..., at : at + 2] = draw.normal(size=(ROWS, HEIGHT, BLOCKS, 1)).astype(np.float16).view(np.uint8)
    if kind == 'MXFP4':
        raw[..., 0] = draw.integers(0, 250, raw.shape[:-1])
    return written.Packed(raw.reshape(ROWS, HEIGHT, -1), number, numbers, size)


def read(path: Path, tensors: dict) -> dict[str, gguf_file.Numbers]:
    return dict(gguf_file.read(written.write(path, {}, tensors)).tensors)


@pytest.mark.parametrize('kind', KINDS)
def test_blocks_are_the_numbers_of_their_description(kind, tmp_path):
    draw = np.random.default_rng(0)
    x = packed(kind, draw)
    size, of_block = KINDS[kind][2], KINDS[kind][4]
    wanted = np.stack([of_block(block) for block in x.raw.reshape(-1, size)]).reshape(x.shape)
    found = read(tmp_path / 'a.gguf', {'before': np.ones(3, np.float32), 'x': x})['x']
    assert (found.shape, found.bytes) == (wanted.shape, x.raw.nbytes)
    assert found.dtype == (jnp.bfloat16 if kind == 'MXFP4' else np.float32)
    np.testing.assert_array_equal(found.read().astype(np.float32), wanted)
    for _ in range(60):
        take = []
        for length in wanted.shape:
            begin = int(draw.integers(length))
            take.append(slice(begin, int(draw.integers(begin + 1, length + 1)), int(draw.integers(1, 4))))
        take = take[: draw.integers(1, 4)]
        part = found.read(tuple(take))
        assert part.dtype == found.dtype
        np.testing.assert_array_equal(part.astype(np.float32), wanted[tuple(take)])
    order = draw.permutation(ROWS)
    np.testing.assert_array_equal(found.read((order, slice(1, 3))).astype(np.float32), wanted[order, 1:3])
    assert found.read((slice(0), slice(None), slice(5, 9))).shape == (0, HEIGHT, 4)
    assert found.read((slice(2), slice(None), slice(7, 7))).shape == (2, HEIGHT, 0)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16], ids=['F32', 'F16', 'BF16'])
def test_plain_numbers_come_bit_for_bit(dtype, tmp_path):
    bits = np.random.default_rng(1).integers(0, 256, (7, 5, 3 * np.dtype(dtype).itemsize), np.uint8)
    x = bits.view(dtype)
    found = read(tmp_path / 'a.gguf', {'x': x, 'y': x[0, 0]})
    assert (found['x'].dtype, found['x'].shape, found['y'].shape) == (dtype, x.shape, (3,))
    assert found['x'].read().tobytes() == bits.tobytes()
    part = (slice(1, 6, 2), slice(3), slice(1, 3))
    assert found['x'].read(part).tobytes() == x[part].tobytes()


def test_other_types_are_refused_by_name(tmp_path):
    x = written.Packed(np.zeros((2, 66), np.uint8), 16, 256, 66)
    with pytest.raises(
        UserError, match=r"tensor 'x' is of type IQ2_XXS, which is not supported; supported: F32, F16, Q4_0"
    ):
        read(tmp_path / 'a.gguf', {'x': x})
    x = written.Packed(np.zeros((2, 66), np.uint8), 77, 256, 66)
    with pytest.raises(UserError, match=r"tensor 'x' is of type 77, which is not supported"):
        read(tmp_path / 'b.gguf', {'x': x})
