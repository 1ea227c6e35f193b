"""How bits are spread over linear maps as the loss of calibration text says."""

import math
from collections.abc import Callable

import numpy as np

from weft.compress.methods.base import Compressed, Method, Options, errors
from weft.compress.weights import Arrays, Target, weight_name
from weft.model.config import ModelConfig
from weft.runtime.errors import UserError

GRID = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # shares of a map's bits that are chosen among
HARDER = 3  # by so much less than a uniform spread a map has while it is measured
LEAST = 0.1  # of the median k: no map counts as free
Loss = Callable[[Arrays], float]  # nats a token of calibration text, with other values of weights by layers' numbers


def by_sensitivity(
    c: ModelConfig, meant: list[Target], method: Method, room: float, options: Options, loss: Loss
) -> list[float | None]:
    """Shares of `GRID`, or all, whose predicted losses add up to the least within the budget.

    What a map costs is taken to grow as its squared error: Δ loss = k ε². Each k is measured by that map alone, at a third of
    the share that a uniform spread would have, where the loss tells more than noise; the geometric mean with the median of all
    maps is taken, for a k from one short text is worth no more than that. Then the step that saves the most loss a bit is taken
    while the budget allows it.
    """
    uniform = room / sum(one.bits for one in meant)
    whole = loss({})
    k_of = list[float]()
    for one in meant:
        at = method.fit(one, max(uniform / HARDER, GRID[0]) * one.bits, options)
        harm = max(loss({weight_name(c, one): at.w}) - whole, 0.0)
        k_of.append(harm / max(_error(one, at, options), 1e-9) ** 2)
    middle = max(float(np.median(k_of)), 1e-9)
    curves = list[list[tuple[float, float, float | None]]]()  # of each map (bits, predicted loss, share), ascending
    for one, k in zip(meant, k_of, strict=True):
        weight = math.sqrt(max(k, LEAST * middle) * middle)
        points = list[tuple[float, float, float | None]]()
        for share in GRID:
            try:
                done = method.fit(one, share * one.bits, options)
            except UserError:  # not even the least rank fits
                continue
            points.append((done.bits, weight * _error(one, done, options) ** 2, share))
        points.append((one.bits, 0.0, None))
        curves.append(_hull(points))
    chosen = [0] * len(meant)
    left = room - sum(curve[0][0] for curve in curves)
    if left < 0:
        raise UserError(
            f'--spread sensitivity: the budget is below {GRID[0]} of each map’s bits; --spread uniform goes lower'
        )
    steps = sorted(
        ((curve[k][1] - curve[k + 1][1]) / (curve[k + 1][0] - curve[k][0]), -number, -k)
        for number, curve in enumerate(curves)
        for k in range(len(curve) - 1)
    )
    stopped = set[int]()
    for _, number, k in reversed(steps):
        number, k = -number, -k
        more = curves[number][k + 1][0] - curves[number][k][0]
        if number in stopped or more > left:
            stopped.add(number)
            continue
        chosen[number], left = k + 1, left - more
    return [curve[place][2] for curve, place in zip(curves, chosen, strict=True)]


def _error(target: Target, done: Compressed, options: Options) -> float:
    frobenius, weighted = errors(target, done.w)
    return weighted if options.objective == 'whitened' and target.gram is not None else frobenius


def _hull(points: list[tuple[float, float, float | None]]) -> list[tuple[float, float, float | None]]:
    """Of points (bits, loss) those on the lower convex hull, on which each further bit saves less."""
    found = list[tuple[float, float, float | None]]()
    for point in sorted(points, key=lambda one: (one[0], one[1])):
        if found and point[1] >= found[-1][1]:
            continue
        while len(found) > 1 and (found[-2][1] - found[-1][1]) * (point[0] - found[-1][0]) <= (
            found[-1][1] - point[1]
        ) * (found[-1][0] - found[-2][0]):
            found.pop()
        found.append(point)
    return found
