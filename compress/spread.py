"""How a budget is spread over the linear maps of a model: which share of its bits each may take.

Uniformly, by the loss of calibration text, or on whole layers from the middle outward.
"""

import math
from typing import Literal

from weft.compress.methods.base import Method, Options
from weft.compress.sensitivity import Loss, by_sensitivity
from weft.compress.weights import Target
from weft.model.config import ModelConfig
from weft.runtime.errors import UserError

Spread = Literal['uniform', 'sensitivity', 'middle']


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
        order = outward(sorted({one.layer for one in meant}))
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
    return by_sensitivity(c, meant, method, room, options, loss)


def outward(layers: list[int]) -> list[int]:
    """Layers from the middle to both ends."""
    middle = (len(layers) - 1) / 2
    return [layers[place] for place in sorted(range(len(layers)), key=lambda place: (abs(place - middle), place))]


def _middle(meant: list[Target], count: int) -> set[int]:
    order = outward(sorted({one.layer for one in meant}))
    if not 0 <= count <= len(order):
        raise UserError(f'--layers {count}: the model has {len(order)}; nearest: {min(max(count, 0), len(order))}')
    return set(order[:count])
