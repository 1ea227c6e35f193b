"""The tensor-train form of a matrix: its dims taken apart into factors, a core for each pair of them, by TT-SVD.

Letters: I = i_1·…·i_d rows, O = o_1·…·o_d columns, d order, r_k the rank between cores k and k + 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite
from weft.runtime.errors import UserError


class TensorTrain(NamedTuple):
    """Cores [r_(k−1), i_k, o_k, r_k], float64, with r_0 = r_d = 1: an entry of the matrix is a product of d small matrices."""

    cores: tuple[np.ndarray, ...]


def modes(n: int, order: int) -> tuple[int, ...]:
    """Sizes whose product is n, ascending and as balanced as its primes allow: of the least sum, then the least largest.

    Where n has fewer primes than `order` the first ones are 1: a train of a prime times anything has long cores of one dim.

    Args:
        n: at least 1.
        order: how many sizes, at least 1; else UserError.
    """
    if order < 1:
        raise UserError(f'order is {order}: it must be at least 1')
    assert n >= 1
    return _balanced(n, order, 1)


@functools.lru_cache(maxsize=65536)
def _balanced(n: int, order: int, least: int) -> tuple[int, ...]:
    """The best sizes of n none of which is below `least`; empty where there are none."""
    if order == 1:
        return (n,) if n >= least else ()
    found = []
    for first in _divisors(n):
        if first >= least and first**order <= n:  # ascending: no later size is smaller than the first
            rest = _balanced(n // first, order - 1, first)
            if rest:
                found.append((first, *rest))
    return min(found, key=lambda sizes: (sum(sizes), sizes[::-1])) if found else ()


@functools.lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    """Of n, up to its root, ascending."""
    return tuple(size for size in range(1, math.isqrt(n) + 1) if n % size == 0)


def matrix_to_tensor(w_IO: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """A matrix [I, O] as a tensor [i_1·o_1, …, i_d·o_d] (Oseledets 2010, there with sizes of 2); UserError for other sizes."""
    check_modes(w_IO.shape, rows, columns)
    d = len(rows)
    paired = [place for k in range(d) for place in (k, d + k)]
    tensor = w_IO.reshape(*rows, *columns).transpose(paired)
    return tensor.reshape([i * o for i, o in zip(rows, columns, strict=True)])


def tensor_to_matrix(w: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """The matrix [I, O] of which `matrix_to_tensor` makes a tensor [i_1·o_1, …, i_d·o_d]."""
    d = len(rows)
    pairs = w.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    matrix = pairs.transpose([*range(0, 2 * d, 2), *range(1, 2 * d, 2)])
    return matrix.reshape(math.prod(rows), math.prod(columns))


def tt_svd(w_IO: np.ndarray, rows: Sequence[int], columns: Sequence[int], ranks: int | Sequence[int]) -> TensorTrain:
    """A tensor train by successive truncated SVDs (Oseledets 2011, algorithm 1), core by core from the first.

    Its Frobenius error is at most `error_bound`, and so at most √(d − 1) times the least that the ranks allow. The first
    cores are left-orthogonal, and the last carries the scale.

    Args:
        w_IO: weights, [I, O].
        rows: i_1 … i_d, whose product is I, such as `modes(I, d)`; else UserError.
        columns: o_1 … o_d, whose product is O; else UserError.
        ranks: at most so much everywhere, an integer of at least 1; or r_1 … r_(d−1), each from 1 to what `largest_ranks` says;
            else UserError. Where the ranks beside one are so small that it cannot be reached, it is less, and nothing is lost.
    """
    w_IO = finite(w_IO)
    tensor = matrix_to_tensor(w_IO, rows, columns)
    inner = inner_ranks(rows, columns, ranks)
    cores, left = [], 1
    remaining = tensor.reshape(1, -1)
    for i, o, rank in zip(rows[:-1], columns[:-1], inner, strict=True):
        u, size, v = np.linalg.svd(remaining.reshape(left * i * o, -1), full_matrices=False)
        right = min(rank, len(size))
        cores.append(u[:, :right].reshape(left, i, o, right))
        remaining, left = size[:right, None] * v[:right], right
    return TensorTrain((*cores, remaining.reshape(left, rows[-1], columns[-1], 1)))


def rebuild(train: TensorTrain) -> np.ndarray:
    """The matrix that a tensor train stands for, [I, O]."""
    tensor = np.ones((1, 1))
    for core in train.cores:
        tensor = (tensor @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    rows, columns = [core.shape[1] for core in train.cores], [core.shape[2] for core in train.cores]
    return tensor_to_matrix(tensor, rows, columns)


def largest_ranks(rows: Sequence[int], columns: Sequence[int]) -> tuple[int, ...]:
    """r_1 … r_(d−1) that reach any matrix of these sizes: the smaller of the products of i·o before and after the place."""
    sizes = [i * o for i, o in zip(rows, columns, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def inner_ranks(rows: Sequence[int], columns: Sequence[int], ranks: int | Sequence[int]) -> tuple[int, ...]:
    """r_1 … r_(d−1) of what a user asks for: one number caps all; several are checked. Raises UserError for others."""
    largest = largest_ranks(rows, columns)
    if isinstance(ranks, int | np.integer):
        if ranks < 1:
            raise UserError(f'ranks is {ranks}: it must be at least 1; nearest: 1')
        return tuple(min(int(ranks), most) for most in largest)
    if len(ranks) != len(largest):
        raise UserError(f'ranks are {len(ranks)}: a train of order {len(rows)} has {len(largest)} between its cores')
    for place, (rank, most) in enumerate(zip(ranks, largest, strict=True)):
        check_rank(rank, most, f'place {place} of a train of {_spelt(rows)} by {_spelt(columns)}', f'ranks[{place}]')
    return tuple(int(rank) for rank in ranks)


def error_bound(w_IO: np.ndarray, rows: Sequence[int], columns: Sequence[int], ranks: int | Sequence[int]) -> float:
    """What the Frobenius error of `tt_svd` is at most: √(Σ_k ε_k²), ε_k of unfolding k (Oseledets 2011, theorem 2.2).

    ε_k is the norm of the singular values beyond r_k of the tensor's unfolding [i_1·o_1·…·i_k·o_k, the rest]. No train of these
    ranks has an error below the greatest ε_k.
    """
    tensor = matrix_to_tensor(finite(w_IO), rows, columns)
    total, left = 0.0, 1
    for i, o, rank in zip(rows[:-1], columns[:-1], inner_ranks(rows, columns, ranks), strict=True):
        left *= i * o
        size = np.linalg.svd(tensor.reshape(left, -1), compute_uv=False)
        total += float((size[rank:] ** 2).sum())
    return total**0.5


def check_modes(shape: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> None:
    """Raises UserError unless there are as many row sizes as column sizes, whose products are a matrix's sizes."""
    if len(rows) != len(columns) or not rows:
        raise UserError(f'{len(rows)} rows and {len(columns)} columns: a train has as many of both, at least one')
    for name, size, sizes in (('rows', shape[0], rows), ('columns', shape[1], columns)):
        if math.prod(sizes) != size:
            nearest = _spelt(modes(size, len(sizes)))
            raise UserError(f'{name} are {_spelt(sizes)}: their product must be {size}; such as {nearest}')


def _spelt(sizes: Sequence[int]) -> str:
    return ' × '.join(map(str, sizes))
