"""Stacks of matrices that share a subspace by construction, to a degree that is known, and what sharing gains on each.

They say whether a negative result on a model means something: forms that share must win where sharing is planted, lose where it
is not, and the diagnosis must tell which, before anything is fitted.

Letters: E slices of a stack, I inputs, O outputs, R rank, K singular values of a slice, N stacks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from weft.compress.diagnosis import Gain, log_ratio, predicted_gain, ranks_within
from weft.compress.numerics import bits, svd, tucker
from weft.compress.sharing import DRAWS, random_frames, shared_energy
from weft.interpret.intervals import BOOTSTRAPS, Estimate, share
from weft.runtime.errors import UserError, nearest

Kind = Literal['in', 'out', 'both', 'mixed']
KINDS: tuple[Kind, ...] = ('in', 'out', 'both', 'mixed')
DEGREES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
SHAPE = (8, 64, 48)


@dataclasses.dataclass(frozen=True)
class PlantedStack:
    """How a stack is made; `planted_stack` makes it.

    With degree d a slice's leading frame of inputs (`in`), of outputs (`out`), or of both is the orthonormal frame of
    √d · S Q_e + √(1 − d) · G_e: S is a frame of `dims` columns that all slices share, Q_e a rotation within it, so that slices
    share the subspace and not its directions, and G_e is the slice's own. `mixed`: √d times combinations of a few matrices that
    all slices have (dims / 8 of them, at least 1), plus √(1 − d) times a matrix of the slice's own with the same spectrum.

    A form that shares can only win where its budget's rank holds most of `dims`.
    """

    kind: Kind
    degree: float  # from 0, nothing in common, to 1
    seed: int
    shape: tuple[int, int, int] = SHAPE
    dims: int = 16  # of what is shared
    decay: float = 0.5  # the k-th singular value is k^−decay
    rest: float = 0.2  # times this where k is above `dims`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f'kind {self.kind!r}: there is no such way of sharing{nearest(self.kind, KINDS)}')
        if not 0 <= self.degree <= 1:
            raise UserError(
                f'degree is {self.degree}: it must be from 0 to 1; nearest: {min(max(self.degree, 0), 1):g}'
            )
        most = min(self.shape[1:])
        if not 1 <= self.dims <= most:
            raise UserError(
                f'dims is {self.dims}: it must be from 1 to {most}; nearest: {min(max(self.dims, 1), most)}'
            )


def planted_stack(of: PlantedStack) -> np.ndarray:
    """float64 [E, I, O]: the stack, the same for the same description."""
    E, I, O = of.shape
    random = np.random.default_rng((of.seed, KINDS.index(of.kind), int(1000 * of.degree), of.dims))
    K = min(I, O)
    size_K = np.arange(1, K + 1) ** -of.decay * np.where(np.arange(K) < of.dims, 1, of.rest)
    if of.kind == 'mixed':
        count = max(of.dims // 8, 1)
        common_CIO = random_matrices(random, count, size_K, (I, O))
        share_EC = random.standard_normal((E, count)) / np.sqrt(count)
        own_EIO = random_matrices(random, E, size_K, (I, O))
        return np.sqrt(of.degree) * np.einsum('EC,CIO->EIO', share_EC, common_CIO) + np.sqrt(1 - of.degree) * own_EIO
    frame = {
        side: frames(random, of, n, K) if of.kind in (side, 'both') else random_frames(random, E, n, K)
        for side, n in (('in', I), ('out', O))
    }
    return np.einsum('EIK,K,EOK->EIO', frame['in'], size_K, frame['out'])


def random_matrices(random: np.random.Generator, count: int, size_K: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float64 [count, I, O] of given singular values and random singular vectors."""
    left, right = (random_frames(random, count, n, len(size_K)) for n in shape)
    return np.einsum('EIK,K,EOK->EIO', left, size_K, right)


def frames(random: np.random.Generator, of: PlantedStack, dims: int, columns: int) -> np.ndarray:
    """[E, dims, columns]: orthonormal frames whose first `of.dims` columns share a subspace to the degree asked for."""
    E, shared = of.shape[0], of.dims
    common_nR = random_frames(random, 1, dims, shared)[0]
    turned_EnR = common_nR @ random_frames(random, E, shared, shared)
    own_Enk = random_frames(random, E, dims, columns)
    own_Enk[:, :, :shared] = np.sqrt(of.degree) * turned_EnR + np.sqrt(1 - of.degree) * own_Enk[:, :, :shared]
    return np.linalg.qr(own_Enk)[0]


def real_gain(w_EIO: np.ndarray, budget_bits: float, width: int = bits.FLOAT) -> Gain:
    """By how much each form that shares beats a pair for each slice at equal bits, all fitted; see `Gain`.

    Pairs are truncated SVDs, bases the SVD of all slices together, Tucker's form is HOOI's, of the ranks that
    `diagnosis.ranks_within` has.
    """
    ranks = ranks_within(w_EIO, budget_bits, width)

    def error(v_EIO: np.ndarray) -> float:
        return float(((w_EIO - v_EIO) ** 2).sum() / (w_EIO**2).sum())

    pair = error(svd.rebuild(svd.truncated(w_EIO, ranks.pair)))
    found = (
        svd.rebuild(svd.shared_basis(w_EIO, ranks.shared_in, 'in')),
        svd.rebuild(svd.shared_basis(w_EIO, ranks.shared_out, 'out')),
        tucker.rebuild(tucker.hooi(w_EIO, ranks.tucker)),
    )
    return Gain(*(log_ratio(pair, error(v_EIO)) for v_EIO in found))


class Measured(NamedTuple):
    """A stack, and what sharing gains on it at a budget."""

    stack: PlantedStack
    budget: float  # of the stack's bits as it is
    predicted: Gain  # before anything is fitted
    real: Gain
    shares_modes: int  # how many modes of Tucker's form have a rank; where it is one, the prediction is exact
    above_chance: (
        float  # `Sharing.above_chance`, the larger of both sides', for a basis of the rank that the budget allows
    )


def measure(of: PlantedStack, budget: float, draws: int = DRAWS) -> Measured:
    """Makes a stack, predicts what sharing gains on it, and fits all forms; `draws`: of chance."""
    w_EIO = planted_stack(of)
    budget_bits = budget * bits.dense(w_EIO.shape)
    ranks = ranks_within(w_EIO, budget_bits)
    return Measured(
        stack=of,
        budget=budget,
        predicted=predicted_gain(w_EIO, budget_bits),
        real=real_gain(w_EIO, budget_bits),
        shares_modes=sum(rank is not None for rank in ranks.tucker),
        above_chance=max(
            shared_energy(w_EIO, min(ranks.shared_in, of.shape[1]), 'in', draws).above_chance,
            shared_energy(w_EIO, min(ranks.shared_out, of.shape[2]), 'out', draws).above_chance,
        ),
    )


def planted_stacks(seeds: Sequence[int] = range(4), degrees: Sequence[float] = DEGREES) -> Iterator[PlantedStack]:
    """For each seed a stack of each kind and degree, 24 a seed, of 8 matrices of 64 × 48 each.

    How many dims are shared (from 12 to 24), and how fast singular values fall (as k^−0.3 to k^−0.8), differs from stack to
    stack. Where they hardly fall pairs are at their worst, and a basis of twice their rank wins a little by chance.
    """
    for seed in seeds:
        random = np.random.default_rng(seed)
        for kind in KINDS:
            for degree in degrees:
                dims, decay = int(random.integers(12, 25)), float(random.uniform(0.3, 0.8))
                yield PlantedStack(kind, degree, seed, dims=dims, decay=decay)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, of equal values their mean rank (Spearman 1904)."""
    x, y = (ranks_of(np.asarray(values, np.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float(np.clip((x * y).sum() / size, -1, 1)) if size else 0.0


def ranks_of(value_N: np.ndarray) -> np.ndarray:
    """float64 [N]: the place of each value from 0, of equal values their mean place."""
    _, which_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    first = np.cumsum(count) - count
    return (first + (count - 1) / 2)[which_N]


def correlation_by_group(a: Sequence[float], b: Sequence[float], groups: Sequence[int], seed: int = 0) -> Estimate:
    """Spearman's rank correlation, its 95 % interval by drawing whole groups anew (percentile bootstrap).

    Values of a group, such as stacks of one seed, are not independent: they come and go together.
    """
    a_N, b_N, group_N = np.asarray(a), np.asarray(b), np.asarray(groups)
    members = [np.flatnonzero(group_N == group) for group in np.unique(group_N)]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(BOOTSTRAPS):
        chosen = np.concatenate([members[i] for i in random.integers(len(members), size=len(members))])
        drawn.append(rank_correlation(a_N[chosen], b_N[chosen]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(rank_correlation(a, b), float(low), float(high), len(a_N))


class Verdict(NamedTuple):
    """What planted stacks say of sharing, and of the diagnosis; correlations are of ranks, and seeds are drawn anew."""

    stacks: int
    shared: Estimate  # how many of the stacks of degree 1 a form that shares beats pairs on
    apart: Estimate  # likewise of degree 0
    predicted: Estimate  # of `predicted_gain` with the real gain, of the best form
    several: Estimate  # likewise where Tucker's form has several ranks, so that the prediction is no theorem
    above_chance: Estimate  # of `Sharing.above_chance` with the real gain


def verdict(rows: Sequence[Measured]) -> Verdict:
    """Sums up stacks that were measured; there must be stacks of degree 0, of degree 1, and with several ranks."""

    def correlation(predictions: Sequence[float], some: Sequence[Measured]) -> Estimate:
        return correlation_by_group(predictions, [one.real.best for one in some], [one.stack.seed for one in some])

    wins = {degree: [one.real.best > 0 for one in rows if one.stack.degree == degree] for degree in (0, 1)}
    several = [one for one in rows if one.shares_modes > 1]
    return Verdict(
        stacks=len(rows),
        shared=share(wins[1]),
        apart=share(wins[0]),
        predicted=correlation([one.predicted.best for one in rows], rows),
        several=correlation([one.predicted.best for one in several], several),
        above_chance=correlation([one.above_chance for one in rows], rows),
    )
