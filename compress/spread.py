"""How a budget is spread over the linear maps of a model: which share of its bits each may take.

Uniformly, by the loss of calibration text, or on whole layers from the middle outward.
"""

import math
from collections.abc import Callable
from typing import Literal

from weft.compress.methods.base import Compressed, Method, Options, errors
from weft.compress.weights import Arrays, Target, weight_name
from weft.model.config import ModelConfig
from weft.runtime.errors import UserError

Spread = Literal['uniform', 'sensitivity', 'middle']
Loss = Callable[[Arrays], float]  # nats a token of calibration text, with other values of weights by layers' numbers
GRID = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # shares of a map's bits that `sensitivity` chooses among


def shares_of(
    c: ModelConfig,
    meant: list[Target],
    method: Method,
    budget: float | None,
    before: int,
    rest: int,
    options: Options,
    spread: Spread,
    hard: float,
    layers: int | None,
    loss: Loss | None,
) -> list[float | None]:
    """Of each map the share of its bits that it may take; None: it stays as it is."""
    if method.fixed or (spread == 'middle' and layers is not None):
        hit = _middle(meant, layers) if spread == 'middle' and layers is not None else {one.layer for one in meant}
        return [hard if one.layer in hit else None for one in meant]
    if budget is None:
        raise UserError(f'--budget is missing: {method.name} needs the share of all bits that may be left, such as 0.5')
    mine = sum(one.bits for one in meant)
    if not 0 < budget <= 1:
        raise UserError(f'--budget {budget}: it must be above 0 and at most 1, such as 0.5')
    if budget * before <= rest:
        least = math.ceil((rest + 0.01 * mine) / before * 1e3) / 1e3
        raise UserError(
            f'--budget {budget}: what {method.name} leaves as it is (embedding, norms …) takes {rest / before:.3f}; '
            f'nearest that works: about {least}'
        )
    room = budget * before - rest
    if spread == 'uniform':
        return [room / mine] * len(meant)
    if spread == 'middle':
        order = _outward(sorted({one.layer for one in meant}))
        saved = {layer: (1 - hard) * sum(one.bits for one in meant if one.layer == layer) for layer in order}
        for count in range(len(order) + 1):
            if sum(saved[layer] for layer in order[:count]) >= mine - room:
                # The last layers are hit a little less, so that the budget is met and no more.
                exact = 1 - (mine - room) / max(sum(saved[layer] for layer in order[:count]) / (1 - hard), 1)
                return [exact if one.layer in order[:count] else None for one in meant]
        least = math.ceil((rest + hard * mine) / before * 1e3) / 1e3
        raise UserError(f'--budget {budget}: all layers at --hard {hard} leave {least}; nearest that works: {least}')
    if loss is None:
        raise UserError('--spread sensitivity: it is measured by the loss of calibration text, and none is given')
    return _by_sensitivity(c, meant, method, room, options, loss)


def _outward(layers: list[int]) -> list[int]:
    """Layers from the middle to both ends."""
    middle = (len(layers) - 1) / 2
    return [layers[place] for place in sorted(range(len(layers)), key=lambda place: (abs(place - middle), place))]


def _middle(meant: list[Target], count: int) -> set[int]:
    order = _outward(sorted({one.layer for one in meant}))
    if not 0 <= count <= len(order):
        raise UserError(f'--layers {count}: the model has {len(order)}; nearest: {min(max(count, 0), len(order))}')
    return set(order[:count])


def _by_sensitivity(
    c: ModelConfig, meant: list[Target], method: Method, room: float, options: Options, loss: Loss
) -> list[float | None]:
    """Shares of `GRID`, or all, whose predicted losses add up to the least within the budget.

    What a map costs is taken to grow as its squared error: Δ loss = k ε². Each k is measured by that map alone, at the share
    that a uniform spread would have; then the step that saves the most loss a bit is taken while the budget allows it.
    """
    uniform = room / sum(one.bits for one in meant)
    whole = loss({})
    curves = list[list[tuple[float, float, float | None]]]()  # of each map (bits, predicted loss, share), ascending
    for one in meant:
        at = method.fit(one, uniform * one.bits, options)
        harm = max(loss({weight_name(c, one): at.w}) - whole, 1e-6)
        error = max(_error(one, at, options), 1e-9)
        points = list[tuple[float, float, float | None]]()
        for share in GRID:
            try:
                done = method.fit(one, share * one.bits, options)
            except UserError:  # not even the least rank fits
                continue
            points.append((done.bits, harm * (_error(one, done, options) / error) ** 2, share))
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
