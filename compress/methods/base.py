"""What a method is, and the table of all of them.

Letters: D model, F hidden units, S slices (heads or experts), K units of a slice, I inputs, O outputs, R rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from weft.compress.numerics.svd import gram_root
from weft.compress.weights import Arrays, Target
from weft.model.parts.linear_forms import LinearForm
from weft.runtime.errors import UserError, nearest

Objective = Literal['frobenius', 'whitened']


@dataclasses.dataclass(frozen=True)
class Options:
    """What a method may be told beside the budget.

    Attributes:
        objective: what is made small: the error of the weights, or that of what calibration text makes of them.
        order: cores of a tensor train.
        rank: of a tensor train, the most between two cores, whatever the budget; None: what the budget allows.
        group: inputs of an int4 scale.
        compute: how factors are used (`model.weights.compute`).
        seed: of what begins with random numbers (CP).
    """

    objective: Objective = 'whitened'
    order: int = 3
    rank: int | None = None
    group: int = 32
    compute: Literal['auto', 'factors', 'rebuild'] = 'auto'
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A linear map in another form.

    Attributes:
        form: its config, whose targets and layers are set later; None: the weight as it was.
        arrays: by their names below the weight's, such as `first.w`; of a weight in its own form, `''`.
        bits: with scales and indices.
        w: what the form stands for, as the weight is kept, float64.
    """

    form: LinearForm | None
    arrays: Arrays
    bits: int
    w: np.ndarray


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compress linear maps one by one.

    Attributes:
        fit: of a map, bits that it may take, and options.
        about: one line.
        measures: whether it needs statistics of the inputs, whatever the objective.
        fixed: whether it takes as many bits as it takes: a budget only says whether they fit.
        tables: the kind in which it keeps the embedding and the head; None: as they are.
    """

    name: str
    fit: Callable[[Target, float, Options], Compressed]
    about: str
    measures: bool = False
    fixed: bool = False
    tables: Literal['int8', 'fp8'] | None = None


METHODS: dict[str, Method] = {}


def register(name: str, about: str, **more: Any) -> Callable[..., Any]:
    """Adds the function that it decorates to the methods."""

    def add(fit: Callable[[Target, float, Options], Compressed]) -> Callable[..., Any]:
        METHODS[name] = Method(name, fit, about, **more)
        return fit

    return add


def method_of(name: str) -> Method:
    """Raises UserError for a name that none has."""
    if name not in METHODS:
        raise UserError(f'--method {name!r}: no such method{nearest(name, METHODS)}')
    return METHODS[name]


def unchanged(target: Target) -> Compressed:
    """The map as it is."""
    return Compressed(None, {'': target.w.astype(np.float32)}, target.bits, target.w)


def gram_for(target: Target, options: Options) -> np.ndarray | None:
    """Of the inputs, where the objective is theirs."""
    return target.gram if options.objective == 'whitened' else None


def errors(target: Target, w: np.ndarray) -> tuple[float, float]:
    """The relative error of weights, ‖W − V‖ / ‖W‖, and of what the calibration text made of them; NaN: it was not measured."""
    error = target.w - w
    frobenius = float(np.linalg.norm(error)) / max(float(np.linalg.norm(target.w)), 1e-30)
    if target.gram is None:
        return frobenius, float('nan')
    back = target.weight.out_first
    error, w = (a.swapaxes(-1, -2) if back else a for a in (error, target.w))
    return frobenius, (max(_weighted(error, target.gram), 0.0) / max(_weighted(w, target.gram), 1e-60)) ** 0.5


def _weighted(w_IO: np.ndarray, gram_II: np.ndarray) -> float:
    """tr(Wᵀ G W), of experts summed."""
    return float((w_IO * (gram_II @ w_IO)).sum())


def root_of(target: Target, options: Options) -> tuple[np.ndarray, np.ndarray] | None:
    """A square root of the mean Gram matrix of a map's slices and its inverse, for tensors of slices; None: unweighted."""
    gram = target.mean_gram if options.objective == 'whitened' else None
    if gram is None:
        return None
    root = gram_root(gram)
    return root, np.linalg.inv(root)
