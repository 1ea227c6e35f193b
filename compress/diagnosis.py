"""What a stack of matrices says before anything is fitted to it: its ranks, how well shared forms can do, and whether they pay.

Letters: E slices of a stack (heads, layers, experts), I inputs, O outputs, R rank, K singular values of a slice, n size of a
mode, r its rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.compress.numerics import bits
from weft.compress.numerics.checks import finite
from weft.compress.numerics.tucker import check_ranks
from weft.compress.sharing import mode_energies

EXACT = 1e-8  # a relative error below it counts as so much: there is nothing left to gain


def stable_rank(w: np.ndarray) -> np.ndarray:
    """float64 [...]: ‖W‖_F² / ‖W‖₂² of each matrix [..., I, O]; 0 of zeros (Rudelson and Vershynin 2007, math/0503442)."""
    energy = np.linalg.svd(finite(w), compute_uv=False) ** 2
    return np.divide(energy.sum(-1), energy[..., 0], out=np.zeros(energy.shape[:-1]), where=energy[..., 0] > 0)


def effective_rank(w: np.ndarray) -> np.ndarray:
    """float64 [...]: exp of the entropy of σ / Σσ of each matrix [..., I, O] (Roy and Vetterli 2007, EUSIPCO); 0 of zeros.

    From 1, of one direction, to min(I, O), where all singular values are equal.
    """
    size = np.linalg.svd(finite(w), compute_uv=False)
    total = size.sum(-1, keepdims=True)
    share = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


class Bounds(NamedTuple):
    """Between which relative Frobenius errors the best form of given ranks lies."""

    low: float
    high: float


def tucker_bounds(w: np.ndarray, ranks: Sequence[int | None]) -> Bounds:
    """Bounds of the relative error ‖W − V‖ / ‖W‖ of the best Tucker form of given ranks, from singular values alone.

    Let V be any tensor of such a form: V = G ×₁ F₁ ×₂ F₂ …, with F_n of r_n columns. Its unfolding along mode n is
    F_n · (what the core and the other factors make), a matrix of rank at most r_n. Unfolding keeps the Frobenius norm, and no
    matrix of rank r_n is nearer to the unfolding W_(n) than its truncated SVD (Eckart and Young 1936, Psychometrika 1:211):

        ‖W − V‖² = ‖W_(n) − V_(n)‖² ≥ Σ_{k > r_n} σ_k(W_(n))².

    That holds for each mode, so the largest of these tails bounds the error from below whatever fitted V. A basis that slices
    share is the form with one rank, (None, R, None) or (None, None, R), and there the bound is reached: the truncated SVD of
    that unfolding is of this form. So are a CP form of R terms with ranks (R, R, R), and a pair for each slice of rank R
    with (None, E·R, E·R), where those are below the sizes. From above, projecting on each mode's leading vectors in turn loses
    at most what each projection by itself does, so the best error squared is at most the sum of the tails (De Lathauwer et al.
    2000, doi:10.1137/S0895479896305696, property 10).

    Args:
        w: a tensor, such as a stack [E, I, O].
        ranks: for each mode from 1 to its size, or None: it is left whole. UserError for others.
    """
    w = finite(w)
    check_ranks(w.shape, ranks)
    total = float((w**2).sum())
    tails = [
        0.0,
        *(mode_energies(w, mode)[r:].sum() / total for mode, r in enumerate(ranks) if r is not None and total),
    ]
    return Bounds(float(np.sqrt(max(tails))), float(np.sqrt(min(sum(tails), 1.0))))


class Gain(NamedTuple):
    """By how much forms that share beat a pair for each slice at equal bits: log(error of pairs / error of the form).

    Above 0 sharing wins: 0.1 is an error smaller by a tenth. Errors are relative, of the Frobenius norm.

    Sharing can win a little where nothing is shared: a basis for all slices has about twice the rank of pairs, and where
    singular values hardly fall, two random subspaces of many dims hold more than one of few. Both errors are large then.
    """

    shared_in: float
    shared_out: float
    tucker: float

    @property
    def best(self) -> float:
        """Of the form that gains the most."""
        return max(self)


class Ranks(NamedTuple):
    """The ranks of each form that a budget allows."""

    pair: int  # of each slice
    shared_in: int
    shared_out: int
    tucker: tuple[int | None, int | None, int | None]  # of slices, inputs and outputs; None: the mode is whole


def ranks_within(w_EIO: np.ndarray, budget_bits: float, width: int = bits.FLOAT) -> Ranks:
    """The largest rank of each form within a budget; of Tucker's forms the one whose error is predicted to be the least.

    Args:
        w_EIO: the stack.
        budget_bits: for the whole stack. UserError where a form's rank 1 does not fit.
        width: bits of a factor's number.
    """
    E, I, O = w_EIO.shape
    pair = bits.rank_within(lambda r: E * bits.pair(I, O, r, width), budget_bits, min(I, O))
    shared_in = bits.rank_within(lambda r: bits.shared_basis(E, I, O, r, 'in', width), budget_bits, min(I, E * O))
    shared_out = bits.rank_within(lambda r: bits.shared_basis(E, I, O, r, 'out', width), budget_bits, min(E * I, O))
    return Ranks(pair, shared_in, shared_out, tucker_ranks(w_EIO, budget_bits, width))


def predicted_gain(w_EIO: np.ndarray, budget_bits: float, width: int = bits.FLOAT) -> Gain:
    """What sharing will gain on a stack at equal bits, from singular values alone: nothing is fitted.

    The error of the best pairs is the tail of the slices' singular values, that of the best shared basis the tail of the
    unfolding's, both exactly (see `tucker_bounds`). Tucker's form lies between two bounds; `tucker_error` says what is
    predicted.

    Args:
        w_EIO: the stack; with a root of the inputs' Gram matrix before it (`numerics.svd.gram_root(gram) @ w`) errors are those
            of outputs.
        budget_bits: for the whole stack. UserError where a form's rank 1 does not fit.
        width: bits of a factor's number.
    """
    w_EIO = finite(w_EIO)
    ranks = ranks_within(w_EIO, budget_bits, width)
    energy_EK = np.linalg.svd(w_EIO, compute_uv=False) ** 2
    total = float(energy_EK.sum())
    if total == 0:
        return Gain(0.0, 0.0, 0.0)
    inputs, outputs = (mode_energies(w_EIO, mode) for mode in (1, 2))
    pair = energy_EK[:, ranks.pair :].sum() / total
    shared = (inputs[ranks.shared_in :].sum() / total, outputs[ranks.shared_out :].sum() / total)
    tails = [tails_of(mode_energies(w_EIO, mode)) for mode in range(3)]
    lost = [0.0 if r is None else float(tail[r]) for r, tail in zip(ranks.tucker, tails, strict=True)]
    return Gain(*(log_ratio(pair, float(error)) for error in (*shared, tucker_error(*lost))))


def log_ratio(pair: float, form: float) -> float:
    """log of a ratio of errors, of their squares."""
    return 0.5 * float(np.log(max(pair, EXACT**2) / max(form, EXACT**2)))


def tails_of(energy_n: np.ndarray) -> np.ndarray:
    """float64 [n + 1]: what share of a mode's energy each rank from 0 on loses; 0 of zeros."""
    left_n = energy_n[::-1].cumsum()[::-1]
    return np.append(left_n / left_n[0] if left_n[0] else left_n, 0.0)


def tucker_error(*lost: np.ndarray | float) -> np.ndarray:
    """The squared relative error that is predicted of Tucker's form, from the share of energy that each mode loses.

    1 − Π (1 − tail), which lies between `tucker_bounds`: it is at least the largest tail and at most their sum. It is exact
    where one mode alone loses energy, and right where energy is spread evenly, as in random matrices. Where modes lose the same
    energy, as they do of a common subspace in noise, the error is less, down to the largest tail: so it says too little for
    sharing rather than too much.
    """
    tails = np.stack(np.broadcast_arrays(*lost))
    return 1 - np.prod(1 - tails, 0)


def tucker_ranks(
    w_EIO: np.ndarray, budget_bits: float, width: int = bits.FLOAT
) -> tuple[int | None, int | None, int | None]:
    """The ranks within a budget whose `tucker_error` is the least; a mode whose rank is its size is left whole, None.

    For all ranks of two modes the third has the largest that fits. UserError where none fits.
    """
    E, I, O = w_EIO.shape
    slices, inputs, outputs = (tails_of(mode_energies(w_EIO, mode)) for mode in range(3))
    e_e1, i_1i = np.arange(1, E + 1)[:, None], np.arange(1, I + 1)[None]
    # Numbers of both factors; a whole mode has none.
    factors_ei = np.where(e_e1 < E, E * e_e1, 0) + np.where(i_1i < I, I * i_1i, 0)
    room_ei = budget_bits / width - factors_ei
    o_ei = np.floor(room_ei / (e_e1 * i_1i + O)).astype(int)
    o_ei = np.where(room_ei >= e_e1 * i_1i * O, O, np.minimum(o_ei, O - 1))
    error_ei = tucker_error(slices[e_e1], inputs[i_1i], outputs[np.maximum(o_ei, 0)])
    error_ei = np.where(o_ei >= 1, error_ei, np.inf)
    best_e, best_i = np.unravel_index(int(np.argmin(error_ei)), error_ei.shape)
    ranks = (int(best_e) + 1, int(best_i) + 1, int(o_ei[best_e, best_i]))
    if ranks[2] < 1:
        bits.rank_within(lambda r: bits.tucker((E, I, O), (r, r, r), width), budget_bits, 1)
    e, i, o = (None if rank == size else rank for rank, size in zip(ranks, (E, I, O), strict=True))
    return e, i, o
