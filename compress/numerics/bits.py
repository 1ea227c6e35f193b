"""Bits that a weight takes in each form, with its scales and indices, from shapes and ranks alone.

Numbers of factors have 32 bits unless another width is given. Letters: I inputs, O outputs, R rank, E slices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from weft.compress.numerics.rounding import GROUP
from weft.compress.numerics.tensor_train import inner_ranks
from weft.runtime.errors import UserError

FLOAT = 32  # bits of a number that is not rounded, and of a scale of int8 and fp8
HALF = 16  # bits of a scale of int4


def dense(shape: Sequence[int], width: int = FLOAT) -> int:
    """Of an array as it is, of numbers of `width` bits."""
    return width * math.prod(shape)


def pair(inputs: int, outputs: int, rank: int, width: int = FLOAT) -> int:
    """Of two factors [I, R] and [R, O]."""
    return width * rank * (inputs + outputs)


def shared_basis(
    slices: int, inputs: int, outputs: int, rank: int, side: Literal['in', 'out'], width: int = FLOAT
) -> int:
    """Of a basis for all slices, and a factor for each: [I, R] and [E, R, O] for `in`, [R, O] and [E, I, R] for `out`."""
    shared, own = (inputs, outputs) if side == 'in' else (outputs, inputs)
    return width * rank * (shared + slices * own)


def tucker(shape: Sequence[int], ranks: Sequence[int | None], width: int = FLOAT) -> int:
    """Of a core and a factor [n, r] for each mode that has a rank; None leaves a mode whole, without a factor."""
    core = math.prod(size if rank is None else rank for size, rank in zip(shape, ranks, strict=True))
    return width * (core + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank is not None))


def cp(shape: Sequence[int], rank: int, width: int = FLOAT) -> int:
    """Of a factor [n, R] for each mode."""
    return width * rank * sum(shape)


def tensor_train(rows: Sequence[int], columns: Sequence[int], ranks: int | Sequence[int], width: int = FLOAT) -> int:
    """Of the cores [r, i, o, r'] that `tt_svd` makes for these ranks, one number that caps all or a number for each place."""
    sizes = [i * o for i, o in zip(rows, columns, strict=True)]
    around = [1]
    for size, rank in zip(sizes, inner_ranks(rows, columns, ranks), strict=False):
        around.append(min(rank, around[-1] * size))
    around.append(1)
    return width * sum(left * size * right for left, size, right in zip(around, sizes, around[1:], strict=False))


def int8(shape: Sequence[int], axis: int) -> int:
    """Of 8 bits a number, and a float32 scale for all numbers along an axis."""
    size = math.prod(shape)
    return 8 * size + FLOAT * (size // shape[axis])


def int4(shape: Sequence[int], axis: int, group: int = GROUP) -> int:
    """Of 4 bits a number, and a float16 scale for each group along an axis, of which the last may be shorter."""
    size = math.prod(shape)
    return 4 * size + HALF * (size // shape[axis]) * -(-shape[axis] // group)


def fp8(shape: Sequence[int], axis: int) -> int:
    """Of 8 bits a number, and a float32 scale for all numbers along an axis."""
    return int8(shape, axis)


def quantised_pair(inputs: int, outputs: int, rank: int, bits: int, group: int = GROUP) -> int:
    """Of two factors [I, R] and [R, O] of int8 or int4, with their scales along axis 0 of each."""
    shapes = ((inputs, rank), (rank, outputs))
    return sum(int8(shape, 0) if bits == 8 else int4(shape, 0, group) for shape in shapes)


def sparse(shape: Sequence[int], kept: int, width: int = FLOAT) -> int:
    """Of a bitmap, one bit a weight, and the numbers of the weights that are kept."""
    return math.prod(shape) + width * kept


def sparse_n_of_m(shape: Sequence[int], n: int = 2, m: int = 4, width: int = FLOAT) -> int:
    """Of n numbers in every m, and for each its place among the m: 2 bits each for 2 of 4."""
    return math.prod(shape) * n // m * (width + math.ceil(math.log2(m)))


def rank_within(bits_of_rank: Callable[[int], int], budget: float, most: int) -> int:
    """The largest rank from 1 to `most` whose bits fit.

    Args:
        bits_of_rank: bits of a rank; they never fall where the rank rises.
        budget: bits. UserError, which names what rank 1 takes, where not even that fits.
        most: the highest rank that the form has.
    """
    if bits_of_rank(1) > budget:
        raise UserError(
            f'a budget of {budget:g} bits: rank 1 takes {bits_of_rank(1)}, and no form of a rank takes less'
        )
    low, high = 1, most  # low fits
    while low < high:
        middle = (low + high + 1) // 2
        if bits_of_rank(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
