"""Outlier weights: few numbers that carry next to nothing of a matrix's norm and without which a model is another one.

Yu et al. 2024, The Super Weight in Large Language Models (arXiv:2411.07191). What minimises a Frobenius norm does not see them.

Letters: I inputs, O outputs of a map; experts' maps have a dim before.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_rank, finite
from weft.interpret.intervals import Estimate, of_draws
from weft.runtime.errors import UserError, nearest


class OutlierWeight(NamedTuple):
    """One number of a weight."""

    name: str  # of the map
    at: tuple[int, ...]  # (input, output), of experts' maps (expert, input, output)
    value: float
    score: float  # |value| times the length of its input over the text


class OutlierWeights(NamedTuple):
    """The weights with the highest scores, the highest first."""

    weights: list[OutlierWeight]
    frobenius_share: float  # of the squared norm of all maps that were looked at
    score_share: float  # likewise of the squared scores: of what each weight by itself adds to the outputs


class OutlierLoss(NamedTuple):
    """What a model loses with its outlier weights, in the units of the loss."""

    before: float
    without: float  # with the outliers set to 0
    random: Estimate  # with as many weights of the same maps set to 0, drawn anew each time
    largest: float  # with as many weights of the largest magnitude set to 0, whatever their inputs


def outlier_weights(weights: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray], count: int) -> OutlierWeights:
    """The weights of highest |w_io| · ‖x_i‖, which is what each by itself adds to the length of an output (Wanda's score).

    Args:
        weights: of maps by name, [I, O] or [E, I, O].
        norms: of the same names the lengths of their inputs over a text, [I] or [E, I] (`MapInputs.norm`).
        count: how many: from 1 to all, or UserError.
    """
    return _highest(weights, {name: np.asarray(norms_of(norms, name)) for name in weights}, count)


def outlier_loss(
    weights: Mapping[str, np.ndarray],
    norms: Mapping[str, np.ndarray],
    count: int,
    loss: Callable[[Mapping[str, np.ndarray]], float],
    draws: int = 5,
    seed: int = 0,
) -> OutlierLoss:
    """The loss without the `count` outliers, beside that without as many random weights, and as many of the largest.

    Args:
        weights, norms, count: as `outlier_weights`.
        loss: of a model with these weights in the place of its own; it is called draws + 3 times.
        draws, seed: of random weights; each map loses as many as it has outliers.
    """
    found = outlier_weights(weights, norms, count)
    largest = _highest(weights, {name: np.ones(w.shape[:-1]) for name, w in weights.items()}, count)
    random, lost = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = []
        for name, number in _per_map(found).items():
            for flat in random.choice(weights[name].size, number, replace=False):
                index = np.unravel_index(flat, weights[name].shape)
                chosen.append(OutlierWeight(name, tuple(map(int, index)), 0.0, 0.0))
        lost.append(loss(without(weights, chosen)))
    return OutlierLoss(
        before=float(loss(weights)),
        without=float(loss(without(weights, found.weights))),
        random=of_draws(lost),
        largest=float(loss(without(weights, largest.weights))),
    )


def without(weights: Mapping[str, np.ndarray], chosen: list[OutlierWeight]) -> dict[str, np.ndarray]:
    """The weights with some set to 0; maps that lose none are the same arrays."""
    found = dict(weights)
    for name in {one.name for one in chosen}:
        found[name] = np.array(weights[name])
    for one in chosen:
        found[one.name][one.at] = 0
    return found


def norms_of(norms: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Those of a map. Raises UserError where there are none."""
    if name not in norms:
        raise UserError(f'{name!r}: there are no lengths of its inputs{nearest(name, sorted(norms))}')
    return norms[name]


def _highest(weights: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray], count: int) -> OutlierWeights:
    """The `count` weights of highest |w| · norm of all maps."""
    check_rank(count, sum(w.size for w in weights.values()), 'these maps', 'count')
    found, energy, score_energy = list[OutlierWeight](), 0.0, 0.0
    for name, w in weights.items():
        w = finite(w, name)
        score = np.abs(w) * norms[name][..., None]
        energy, score_energy = energy + float((w**2).sum()), score_energy + float((score**2).sum())
        most = min(count, w.size)
        for flat in np.argpartition(score.ravel(), w.size - most)[w.size - most :]:
            index = tuple(map(int, np.unravel_index(flat, w.shape)))
            found.append(OutlierWeight(name, index, float(w[index]), float(score[index])))
    found = sorted(found, key=lambda one: -one.score)[:count]
    share = sum(one.value**2 for one in found) / energy if energy else 0.0
    return OutlierWeights(found, share, sum(one.score**2 for one in found) / score_energy if score_energy else 0.0)


def _per_map(found: OutlierWeights) -> dict[str, int]:
    """How many of the weights each map has."""
    counts: dict[str, int] = {}
    for one in found.weights:
        counts[one.name] = counts.get(one.name, 0) + 1
    return counts
