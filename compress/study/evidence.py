"""What a model's matrices say before anything is compressed: how much heads, experts and layers share, and its outliers.

Letters: E slices of a stack (heads, experts, layers), I inputs, O outputs.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from weft.compress.diagnosis import predicted_gain, stable_rank
from weft.compress.numerics import bits
from weft.compress.outliers import outlier_loss
from weft.compress.planted import real_gain
from weft.compress.sharing import Side, principal_angles, random_frames, shared_energy
from weft.compress.study.subjects import Subject
from weft.compress.weights import Target, targets, weight_name
from weft.interpret.intervals import mean

GAIN_BUDGETS = (0.5, 0.25)  # of a stack's bits, at which gains are predicted and measured
DRAWS = 5  # of stacks that share nothing
OUTLIERS = 16


class Stack(NamedTuple):
    """Matrices side by side."""

    kind: str  # `heads`, `experts`, `layers`
    map: str
    layer: int | None  # None: of all layers
    w_EIO: np.ndarray


def evidence(subject: Subject) -> dict[str, Any]:
    """Of one model: sharing of each kind of stack and map, predicted and real gains, stable ranks, outlier weights."""
    c = subject.run.config.model
    maps = targets(c, subject.arrays)
    return {
        'stacks': sharing(maps),
        'gains': gains(maps),
        'stable_ranks': stable_ranks(maps),
        'outliers': outliers(subject, maps),
    }


def stacks(maps: list[Target]) -> Iterator[Stack]:
    """Heads of a layer's map, experts of a layer's map, and each map of all layers that have it."""
    by_map: dict[str, list[Target]] = defaultdict(list)
    for one in maps:
        by_map[one.map].append(one)
        if one.slices > 1:
            yield Stack('experts' if one.experts else 'heads', one.map, one.layer, one.stack)
    for name, several in by_map.items():
        if not several[0].experts:
            yield Stack('layers', name, None, np.stack([one.w_IO for one in several]))


def sharing(maps: list[Target]) -> list[dict[str, Any]]:
    """Of each kind and map, over layers: energy that a basis of a quarter of the dims holds, and angles, beside chance."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for stack in stacks(maps):
        sides: tuple[Side, ...] = ('in', 'out') if stack.kind == 'layers' else ('in',)
        for side in sides:
            n = stack.w_EIO.shape[1 if side == 'in' else 2]
            rank = max(n // 4, 1)
            one = shared_energy(stack.w_EIO, rank, side, DRAWS)
            few = max(min(stack.w_EIO.shape[1:]) // 4, 1)
            angles = mean_cosine(principal_angles(stack.w_EIO, few, side))
            found[stack.kind, stack.map, side].append(
                {
                    'energy': one.energy,
                    'chance': one.chance.value,
                    'most': one.most,
                    'above_chance': one.above_chance,
                    'cosine': angles,
                    'cosine_of_chance': chance_cosine(len(stack.w_EIO), n, few),
                }
            )
    return [
        {'kind': kind, 'map': name, 'side': side, 'stacks': len(many)}
        | {field: mean([one[field] for one in many])._asdict() for field in many[0]}
        for (kind, name, side), many in found.items()
    ]


def mean_cosine(angle_EER: np.ndarray) -> float:
    """The mean of cos² over pairs of slices and angles: the share of one leading subspace that lies in another."""
    pairs = np.triu_indices(len(angle_EER), 1)
    return float((np.cos(angle_EER[pairs]) ** 2).mean())


def chance_cosine(count: int, dims: int, rank: int) -> float:
    """`mean_cosine` of random subspaces, which is rank / dims; drawn, as a check of the formula costs nothing."""
    frame_EnR = random_frames(np.random.default_rng(0), min(count, 4), dims, rank)
    inner = np.einsum('anr,bns->abrs', frame_EnR, frame_EnR)
    pairs = np.triu_indices(len(frame_EnR), 1)
    return float((inner[pairs] ** 2).sum((1, 2)).mean() / rank)


def gains(maps: list[Target]) -> list[dict[str, Any]]:
    """Of each stack of heads and of experts what sharing should gain over pairs at equal bits, and what it does."""
    found = []
    for stack in stacks(maps):
        if stack.layer is None:
            continue
        for budget in GAIN_BUDGETS:
            room = budget * bits.dense(stack.w_EIO.shape)
            predicted, real = predicted_gain(stack.w_EIO, room), real_gain(stack.w_EIO, room)
            found.append(
                {
                    'kind': stack.kind,
                    'map': stack.map,
                    'layer': stack.layer,
                    'budget': budget,
                    'predicted': predicted._asdict(),
                    'real': real._asdict(),
                }
            )
    return found


def stable_ranks(maps: list[Target]) -> list[dict[str, Any]]:
    """Of each map, over layers and experts, beside the number of its singular values."""
    by_map: dict[str, list[float]] = defaultdict(list)
    sizes = {}
    for one in maps:
        by_map[one.map] += np.atleast_1d(stable_rank(one.w_IO)).tolist()
        sizes[one.map] = min(one.w_IO.shape[-2:])
    return [{'map': name, 'singular_values': sizes[name], **mean(values)._asdict()} for name, values in by_map.items()]


def outliers(subject: Subject, maps: list[Target]) -> dict[str, Any]:
    """What the few weights of highest |w| · ‖x‖ are worth, beside as many others."""
    c = subject.run.config.model
    weights = {one.name: np.asarray(one.w_IO) for one in maps}
    norms = {one.name: subject.statistics.map(one.name).norm for one in maps}
    by_name = {one.name: one for one in maps}

    def loss(changed: Any) -> float:
        arrays = {}
        for name, w_IO in changed.items():
            if w_IO is not weights[name]:
                one = by_name[name]
                arrays[weight_name(c, one)] = w_IO.swapaxes(-1, -2) if one.weight.out_first else w_IO
        return float(subject.loss(arrays))

    found = outlier_loss(weights, norms, OUTLIERS, loss, draws=3)
    few = {'count': OUTLIERS, 'before': found.before, 'without': found.without, 'largest': found.largest}
    return few | {'random': found.random._asdict(), 'weights': sum(w.size for w in weights.values())}
