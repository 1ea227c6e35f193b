"""How much the matrices of a stack (heads, layers, experts) have in common: their subspaces, and one basis for all of them.

A shared basis pays where matrices use the same directions of their inputs or outputs. How much of a stack's energy one basis
holds says little by itself, for any basis of most dims holds most of any stack. So it stands between two others of the same
spectra: matrices that share nothing (random frames) and matrices whose leading directions are the same.

Letters: E slices of a stack, I inputs, O outputs, R rank, K singular values of a slice, n size of a mode.
"""

from typing import Literal, NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite
from weft.interpret.intervals import Estimate, of_draws

Side = Literal['in', 'out']
DRAWS = 20
EPSILON = 1e-12  # of a stack's energy: less between chance and the most is rounding


class Sharing(NamedTuple):
    """The share of a stack's energy ‖W‖² that one basis for all slices holds, from 0 to 1, and what to compare it with."""

    energy: float  # of the best basis
    chance: Estimate  # of stacks with the same singular values, and random singular vectors: the mean, and 95 % of the draws
    most: float  # of a stack with the same singular values whose slices' leading subspaces are the same

    @property
    def above_chance(self) -> float:
        """0 where slices share no more than chance has it, 1 where they share all that their spectra allow."""
        span = self.most - self.chance.value
        return (self.energy - self.chance.value) / span if span > EPSILON else 0.0


def mode_energies(w: np.ndarray, mode: int) -> np.ndarray:
    """float64 [n], descending: the squared singular values of a mode's unfolding, n × (all other modes); 0 past its rank."""
    w = finite(w)
    size = np.linalg.svd(np.moveaxis(w, mode, 0).reshape(w.shape[mode], -1), compute_uv=False)
    return np.pad(size**2, (0, w.shape[mode] - len(size)))


def shared_energy(w_EIO: np.ndarray, rank: int, side: Side, draws: int = DRAWS, seed: int = 0) -> Sharing:
    """What the best basis of a rank for all slices' inputs (`in`) or outputs (`out`) holds, against chance and the most.

    With P the projector on a basis of inputs the energy is Σ_e ‖P W_e‖² = tr(P Σ_e W_e W_eᵀ), whose maximum over projectors of
    rank R is the sum of the R largest eigenvalues (Fan 1949): the leading squared singular values of the slices side by side.
    For each slice alone it is at most Σ_{r ≤ R} σ_er², and the sum of these over slices, `most`, is reached where their leading
    subspaces are the same.

    Chance keeps each slice's singular values and draws its frame uniformly (Haar). Its other frame changes nothing.

    Args:
        w_EIO: the stack; with a root of the inputs' Gram matrix before it (`numerics.svd.gram_root(gram) @ w`) energies are
            those of outputs.
        rank: of the basis: from 1 to I or O, or UserError.
        draws, seed: of random stacks.
    """
    w_EIO = finite(w_EIO)
    mode = 1 if side == 'in' else 2
    check_rank(rank, w_EIO.shape[mode], f'a basis of {w_EIO.shape[mode]} {side}puts')
    size_EK = np.linalg.svd(w_EIO, compute_uv=False)
    total = float((size_EK**2).sum())
    if total == 0:
        return Sharing(1.0, of_draws([1.0] * draws), 1.0)
    held = mode_energies(w_EIO, mode)[:rank].sum() / total
    most = (size_EK[:, :rank] ** 2).sum() / total
    random, found = np.random.default_rng(seed), []
    for _ in range(draws):
        frame_EnK = random_frames(random, len(w_EIO), w_EIO.shape[mode], size_EK.shape[1])
        found.append(mode_energies(frame_EnK * size_EK[:, None], 1)[:rank].sum() / total)
    return Sharing(float(held), of_draws(found), float(most))


def random_frames(random: np.random.Generator, count: int, dims: int, columns: int) -> np.ndarray:
    """[count, dims, columns]: frames of orthonormal columns, uniformly distributed (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(random.standard_normal((count, dims, columns)))
    return q * np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1, 1)[:, None]


def principal_angles(w_EIO: np.ndarray, rank: int, side: Side) -> np.ndarray:
    """float64 [E, E, R], in radians, ascending: the angles between the leading subspaces of each pair of slices.

    A slice's leading subspace of inputs (`in`) or outputs (`out`) is that of its first R singular vectors. 0 are directions
    that both have, π / 2 directions of which the other has none. Cosines are the singular values of UᵀV; below π / 4 the angle
    is taken from its sine, which a cosine near 1 has lost (Björck and Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3).

    Raises UserError for a rank beyond min(I, O).
    """
    w_EIO = finite(w_EIO)
    check_rank(rank, min(w_EIO.shape[1:]), f'matrices of {w_EIO.shape[1]} × {w_EIO.shape[2]}')
    u_EIK, _, v_EKO = np.linalg.svd(w_EIO, full_matrices=False)
    basis_EnR = u_EIK[:, :, :rank] if side == 'in' else v_EKO[:, :rank].swapaxes(1, 2)
    E = len(w_EIO)
    angle_EER = np.zeros((E, E, rank))
    for a in range(E):
        for b in range(a + 1, E):
            angle_EER[a, b] = angle_EER[b, a] = angles_between(basis_EnR[a], basis_EnR[b])
    return angle_EER


def angles_between(a_nR: np.ndarray, b_nR: np.ndarray) -> np.ndarray:
    """float64 [R], in radians, ascending: the principal angles of the spans of two frames of orthonormal columns."""
    inner_RR = a_nR.T @ b_nR
    cosine_R = np.clip(np.linalg.svd(inner_RR, compute_uv=False), 0, 1)
    sine_R = np.clip(np.linalg.svd(b_nR - a_nR @ inner_RR, compute_uv=False)[::-1], 0, 1)
    return np.where(cosine_R**2 > 0.5, np.arcsin(sine_R), np.arccos(cosine_R))
