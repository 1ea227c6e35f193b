"""Pairs of factors for a matrix: the truncated SVD, plain or whitened by its inputs, and one basis for several matrices.

Letters: I inputs, O outputs, R rank, E slices (heads or experts), N tokens, F = E·O or E·I.
"""

from typing import Literal, NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite

FLOOR = 1e-10  # of a Gram matrix's greatest eigenvalue: smaller ones count as so much


class Pair(NamedTuple):
    """Two factors, float64, whose product stands for a weight: w ≈ first @ second.

    `first` is [..., I, R] and `second` [..., R, O]. A basis that slices share has no dim for them, and broadcasts.
    """

    first: np.ndarray
    second: np.ndarray


class Errors(NamedTuple):
    """Relative errors of an approximation: 0 is exact, and 1 is what zeros in the weight's place would do."""

    frobenius: float
    spectral: float
    weighted: float | None  # of the outputs, ‖X(W − V)‖_F / ‖XW‖_F; None where no Gram matrix was given


def rebuild(pair: Pair) -> np.ndarray:
    """The matrix that a pair stands for, [..., I, O]."""
    return pair.first @ pair.second


def truncated(w: np.ndarray, rank: int) -> Pair:
    """The best pair of a rank in Frobenius and in spectral norm (Eckart and Young 1936, Mirsky 1960), for each matrix.

    Both factors have the root of a singular value as the norm of their column or row, so that they train alike.

    Args:
        w: weights, [..., I, O]; leading dims are matrices of their own, such as heads or experts.
        rank: from 1 to min(I, O), or UserError.

    Returns:
        [..., I, R] and [..., R, O].
    """
    w = finite(w)
    check_rank(rank, min(w.shape[-2:]), f'a matrix of {w.shape[-2]} × {w.shape[-1]}')
    u, size, v = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(size[..., :rank])
    return Pair(u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :])


def whitened(w_IO: np.ndarray, gram_II: np.ndarray, rank: int) -> Pair:
    """The pair of a rank that minimises ‖X(W − AB)‖_F over all A and B, for inputs X of which only XᵀX is known.

    With a root S of the Gram matrix, SᵀS = XᵀX, that error is ‖S(W − AB)‖_F, which the truncated SVD of SW minimises (SVD-LLM,
    Wang et al. 2024, arXiv:2403.07378, section 3.1, where S is Cholesky's factor). With V the leading right singular vectors of
    SW the minimiser is AB = WVVᵀ, so nothing is divided by S.

    Eigenvalues below 1e-10 of the greatest count as so much: with a condition number below 1e10 the minimiser is exact, and of
    a singular matrix (fewer tokens than inputs) directions that no input had are kept as far as the rank allows. A Gram matrix
    of zeros counts as the identity.

    Args:
        w_IO: weights, [I, O], or [..., I, O] for matrices of their own.
        gram_II: XᵀX of the inputs X_NI, summed or averaged over tokens, [I, I] or [..., I, I].
        rank: from 1 to min(I, O), or UserError.

    Returns:
        [..., I, R] and [..., R, O], of equal norms by column and row.
    """
    w_IO = finite(w_IO)
    check_rank(rank, min(w_IO.shape[-2:]), f'a matrix of {w_IO.shape[-2]} × {w_IO.shape[-1]}')
    _, _, v = np.linalg.svd(gram_root(gram_II) @ w_IO, full_matrices=False)
    v_RO = v[..., :rank, :]
    return balanced(Pair(w_IO @ np.swapaxes(v_RO, -1, -2), v_RO))


def shared_basis(w_EIO: np.ndarray, rank: int, side: Literal['in', 'out'], gram_II: np.ndarray | None = None) -> Pair:
    """One basis for several matrices: the optimum, by an SVD of all of them side by side (`in`) or one above another (`out`).

    Args:
        w_EIO: weights of slices, [E, I, O].
        rank: of the basis: from 1 to min(I, E·O) for `in` and min(E·I, O) for `out`, or UserError.
        side: `in`: W_e ≈ A B_e, where A, [I, R], is shared. `out`: W_e ≈ A_e B, where B, [R, O], is shared.
        gram_II: XᵀX of the inputs, [I, I], floored as `whitened` says: Σ_e ‖X(W_e − V_e)‖² is minimised. [E, I, I] if each
            slice has inputs of its own: for `out` this has a closed form too, the optimum. For `in` it has none: the basis is
            then that of the sum of the Gram matrices, and B_e the best for this basis by the slice's own.

    Returns:
        [I, R] and [E, R, O] for `in`; [E, I, R] and [R, O] for `out`.
    """
    w_EIO = finite(w_EIO)
    E, I, O = w_EIO.shape
    stacked = f'{E} matrices of {I} × {O} that share their {side}puts'
    check_rank(rank, min(I, E * O) if side == 'in' else min(E * I, O), stacked)
    if side == 'out':
        weighted = w_EIO if gram_II is None else gram_root(gram_II) @ w_EIO
        _, _, v = np.linalg.svd(weighted.reshape(E * I, O), full_matrices=False)
        return balanced(Pair(w_EIO @ v[:rank].T, v[:rank]))
    side_by_side_IF = np.moveaxis(w_EIO, 0, 1).reshape(I, E * O)
    if gram_II is None:
        u, _, _ = np.linalg.svd(side_by_side_IF, full_matrices=False)
        return balanced(Pair(u[:, :rank], u[:, :rank].T @ w_EIO))
    gram_II = np.asarray(gram_II, np.float64)
    root_II = gram_root(gram_II if gram_II.ndim == 2 else gram_II.sum(0))
    u, _, _ = np.linalg.svd(root_II @ side_by_side_IF, full_matrices=False)
    basis_IR, _ = np.linalg.qr(np.linalg.solve(root_II, u[:, :rank]))  # orthonormal, so that no digits are lost below
    return balanced(Pair(basis_IR, second_factor(w_EIO, basis_IR, gram_II)))


def second_factor(w: np.ndarray, first: np.ndarray, gram: np.ndarray | None = None) -> np.ndarray:
    """The B, [..., R, O], that minimises ‖X(W − AB)‖_F for a given A, by least squares; of several the smallest.

    Args:
        w: weights, [..., I, O].
        first: A, [..., I, R].
        gram: XᵀX, [..., I, I], floored as in `whitened`; None: the identity.
    """
    if gram is not None:
        root = gram_root(gram)
        w, first = root @ w, root @ first
    return np.linalg.pinv(first, rcond=1e-13) @ w


def errors(w: np.ndarray, approximation: np.ndarray | Pair, gram: np.ndarray | None = None) -> Errors:
    """How far an approximation is from a weight, relative to the weight; several matrices count as one block-diagonal one.

    Args:
        w: weights, [..., I, O].
        approximation: of the weights, [..., I, O], or the pair that stands for it.
        gram: XᵀX of the inputs, [..., I, I], as it is (nothing is floored); None: the weighted error is None.
    """
    w = np.asarray(w, np.float64)
    off = w - (rebuild(approximation) if isinstance(approximation, Pair) else np.asarray(approximation, np.float64))
    weighted = None
    if gram is not None:
        gram = np.asarray(gram, np.float64)
        weighted = _ratio(_energy(off, gram) ** 0.5, _energy(w, gram) ** 0.5)
    return Errors(
        frobenius=_ratio(float(np.linalg.norm(off)), float(np.linalg.norm(w))),
        spectral=_ratio(_largest_singular_value(off), _largest_singular_value(w)),
        weighted=weighted,
    )


def gram_root(gram: np.ndarray) -> np.ndarray:
    """A root S of a Gram matrix, SᵀS = XᵀX, [..., I, I], with its eigenvalues floored as `whitened` says; always invertible."""
    gram = finite(gram, 'the Gram matrices')
    value, vector = np.linalg.eigh((gram + np.swapaxes(gram, -1, -2)) / 2)
    greatest = value[..., -1:]
    value = np.where(greatest > 0, np.maximum(value, FLOOR * greatest), 1)
    return np.sqrt(value)[..., None] * np.swapaxes(vector, -1, -2)


def balanced(pair: Pair) -> Pair:
    """A pair of the product of another, whose columns of `first` and rows of `second` have equal norms, by slice on average.

    A column or row of zeros is left as it is.
    """
    column = np.sqrt((pair.first**2).sum(-2))  # [..., R]
    row = np.sqrt((pair.second**2).sum(-1))
    if column.ndim < row.ndim:
        row = np.sqrt((row**2).mean(0))
    elif row.ndim < column.ndim:
        column = np.sqrt((column**2).mean(0))
    scale = np.sqrt(np.divide(row, column, out=np.ones_like(row), where=(row > 0) & (column > 0)))
    return Pair(pair.first * scale[..., None, :], pair.second / scale[..., :, None])


def _largest_singular_value(w: np.ndarray) -> float:
    return float(np.linalg.svd(w, compute_uv=False).max())


def _energy(w: np.ndarray, gram: np.ndarray) -> float:
    """‖XW‖², summed over matrices; rounding may not make it negative."""
    return max(float((w * (gram @ w)).sum()), 0.0)


def _ratio(error: float, size: float) -> float:
    if size:
        return error / size
    return float('inf') if error else 0.0
