"""The CP form of a tensor: a sum of products of vectors, by alternating least squares.

Letters: n_k size of mode k, R rank (terms of the sum).
"""

from typing import NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite

SMALLEST = 1e-13  # of a Gram matrix's greatest eigenvalue: directions below it have no part in a least-squares step


class CP(NamedTuple):
    """Factors [n_k, R] of each mode k, float64: T ≈ Σ_r F₁[:, r] ∘ F₂[:, r] ∘ …; the factors share a term's scale equally."""

    factors: tuple[np.ndarray, ...]


def rebuild(cp: CP) -> np.ndarray:
    """The tensor that a CP form stands for, of the sizes of the factors."""
    rows = cp.factors[0]  # [n_1·…·n_k, R]
    for factor in cp.factors[1:-1]:
        rows = (rows[:, None] * factor).reshape(-1, rows.shape[1])
    return (rows @ cp.factors[-1].T).reshape([len(factor) for factor in cp.factors])


def cp_als(
    w: np.ndarray, rank: int, iterations: int = 200, seed: int = 0, tolerance: float = 1e-8, starts: int = 1
) -> CP:
    """CANDECOMP/PARAFAC by alternating least squares (Carroll and Chang 1970, Harshman 1970; Kolda and Bader 2009, figure 3.3).

    It finds a local optimum. The first start has the leading singular vectors of each unfolding as factors, and normal random
    numbers in columns beyond a mode's size; others are normal random numbers. The start that ends with the least error is kept.

    Args:
        w: a tensor of order 2 or more.
        rank: terms, from 1 to the product of all sizes but the largest, which reaches any tensor; else UserError.
        iterations: rounds at most, in each of which every factor is solved for once.
        seed: of the random numbers.
        tolerance: it stops where a round lowers the relative Frobenius error by less.
        starts: how many are tried.
    """
    w = finite(w)
    shape = w.shape
    check_rank(rank, w.size // max(shape), f'a tensor of {" × ".join(map(str, shape))}')
    random = np.random.default_rng(seed)
    best, least = list[np.ndarray](), float('inf')
    for start in range(starts):
        factors = [random.standard_normal((size, rank)) for size in shape]
        if not start:
            for mode, factor in enumerate(factors):
                leading = _singular_vectors(w, mode)[:, :rank]
                factor[:, : leading.shape[1]] = leading
        factors, error = alternate(w, factors, iterations, tolerance)
        if error < least:
            best, least = factors, error
    return CP(_spread(best))


def alternate(
    w: np.ndarray, factors: list[np.ndarray], iterations: int, tolerance: float
) -> tuple[list[np.ndarray], float]:
    """Factors after alternating least squares from those that are given, [n_k, R] each, and the relative Frobenius error."""
    total = float((w**2).sum())
    if not total:
        return [np.zeros_like(factor) for factor in factors], 0.0
    error = float('inf')
    for _ in range(iterations):
        for mode in range(len(factors)):
            gram = np.ones((factors[0].shape[1],) * 2)
            for other, factor in enumerate(factors):
                if other != mode:
                    gram = gram * (factor.T @ factor)
            product = contraction(w, factors, mode)
            solved = product @ np.linalg.pinv(gram, rcond=SMALLEST, hermitian=True)
            # A norm of 1 keeps the other factors' Gram matrices in range; the last factor carries the scale.
            if mode < len(factors) - 1:
                norm = np.linalg.norm(solved, axis=0)
                solved = solved / np.where(norm > 0, norm, 1)
            factors[mode] = solved
        # Of the last mode: ‖T − V‖² = ‖T‖² − 2⟨T, V⟩ + ‖V‖², without V.
        last_factor = factors[-1]
        squared = total - 2 * (product * last_factor).sum() + (gram * (last_factor.T @ last_factor)).sum()
        last, error = error, max(float(squared) / total, 0.0) ** 0.5
        if last - error < tolerance:
            break
    return factors, error


def contraction(w: np.ndarray, factors: list[np.ndarray], mode: int) -> np.ndarray:
    """The tensor times each factor but that of a mode, column by column (MTTKRP, Bader and Kolda 2007), [n_mode, R].

    The largest other mode goes first, in one matrix product; what is left is as many times smaller as that mode is large.
    """
    others = sorted((other for other in range(w.ndim) if other != mode), key=lambda other: -w.shape[other])
    kept = [other for other in range(w.ndim) if other != others[0]]  # the modes of `left`, before R
    left = np.tensordot(w, factors[others[0]], (others[0], 0))
    for other in others[1:]:
        place = kept.index(other)
        left = np.einsum('...nr,nr->...r', np.moveaxis(left, place, -2), factors[other])
        kept.pop(place)
    return left


def _singular_vectors(w: np.ndarray, mode: int) -> np.ndarray:
    """Left singular vectors of a mode's unfolding, the leading ones first."""
    others = [other for other in range(w.ndim) if other != mode]
    return np.linalg.eigh(np.tensordot(w, w, (others, others)))[1][:, ::-1]


def _spread(factors: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Factors of the same sum whose columns have in every mode the same norm; a term of zeros is zeros in all."""
    norms = np.stack([np.linalg.norm(factor, axis=0) for factor in factors])  # [modes, R]
    each = np.prod(norms, axis=0) ** (1 / len(factors))
    return tuple(factor * (each / np.where(norm > 0, norm, 1)) for factor, norm in zip(factors, norms, strict=True))
