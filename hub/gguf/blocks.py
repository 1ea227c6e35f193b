"""The types of tensors in GGUF files, many of them numbers in blocks of few bits, and how a slice of one is read."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from weft.hub.tensor_files import Stored, full_index, read_part
from weft.storage.foreign import SteadyFile


class Layout(NamedTuple):
    """A type of tensor: so many numbers in a block of so many bytes."""

    name: str
    numbers: int
    bytes: int


# By the number that stands for each in a file.
LAYOUTS = {
    0: Layout('F32', 1, 4),
    1: Layout('F16', 1, 2),
    2: Layout('Q4_0', 32, 18),
    3: Layout('Q4_1', 32, 20),
    6: Layout('Q5_0', 32, 22),
    7: Layout('Q5_1', 32, 24),
    8: Layout('Q8_0', 32, 34),
    10: Layout('Q2_K', 256, 84),
    11: Layout('Q3_K', 256, 110),
    12: Layout('Q4_K', 256, 144),
    13: Layout('Q5_K', 256, 176),
    14: Layout('Q6_K', 256, 210),
    30: Layout('BF16', 1, 2),
    39: Layout('MXFP4', 32, 17),
}
PLAIN: dict[str, np.dtype] = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}


def type_name(kind: int) -> str:
    """What ggml calls a type; its number where it knows none."""
    from gguf import GGMLQuantizationType  # it brings much with it that most runs have no use for

    return next((known.name for known in GGMLQuantizationType if known == kind), str(kind))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tensor in blocks of few bits, read as the float32 that they stand for, MXFP4 as bfloat16, which holds it exactly."""

    file: SteadyFile
    layout: Layout
    shape: tuple[int, ...]  # the last dim's numbers are next to each other, in whole blocks
    begin: int  # of its bytes in the file

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(jnp.bfloat16 if self.layout.name == 'MXFP4' else np.float32)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.layout.numbers * self.layout.bytes

    def read(self, take: tuple[Any, ...] = ()) -> np.ndarray:
        """A part of it, by slices; the first may be an array of indices."""
        *first, last = full_index(take, len(self.shape))
        span = range(self.shape[-1])[last]
        row = self.shape[-1] // self.layout.numbers * self.layout.bytes
        ends = (min(span[0], span[-1]), max(span[0], span[-1]) + 1) if len(span) else (0, 0)
        begin, end = ends[0] // self.layout.numbers, -(-ends[1] // self.layout.numbers)
        cut = (*first, slice(begin * self.layout.bytes, end * self.layout.bytes))
        packed = read_part(self.file, self.begin, (*self.shape[:-1], row), np.dtype(np.uint8), cut)
        numbers = _numbers(packed, self.layout).astype(self.dtype, copy=False)
        if span == range(begin * self.layout.numbers, end * self.layout.numbers):
            return numbers
        return numbers[..., np.array(span, np.intp) - begin * self.layout.numbers]


def _numbers(packed: np.ndarray, layout: Layout) -> np.ndarray:
    """float32 [..., numbers] of blocks, uint8 [..., bytes]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if not packed.size:
        return np.zeros((*packed.shape[:-1], packed.shape[-1] // layout.bytes * layout.numbers), np.float32)
    with np.errstate(over='ignore', invalid='ignore'):  # a block's scale may be infinite or not a number
        return dequantize(np.ascontiguousarray(packed), GGMLQuantizationType[layout.name])


Numbers = Stored | Blocks
