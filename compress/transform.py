"""A model in another form: a method, a budget in bits, and how it is spread over layers and maps.

The budget is a share of the bits of all weights as float32, with scales and indices, and with what no method touches: tables,
norms, routers. Letters: D model, F hidden units.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from weft.compress.activations import InputStatistics
from weft.compress.methods import matrices, pruning, rounding, tensors  # noqa: F401  (they add their methods)
from weft.compress.methods.base import METHODS, Compressed, Method, Options, errors, method_of, unchanged
from weft.compress.methods.rounding import Kind, bits_of, rounded, stored
from weft.compress.methods.structure import STRUCTURES, numbers, smaller
from weft.compress.numerics.rounding import decode
from weft.compress.spread import Loss, Spread, shares_of
from weft.compress.weights import Arrays, Target, places, targets, weight_name
from weft.model.config import ModelConfig
from weft.model.decoder import declared_decoder, weights_of
from weft.model.linear_forms import TABLES, linear_maps
from weft.model.parts.linear_forms import LinearForm, RoundedConfig
from weft.runtime.errors import UserError, nearest

NAMES = (*METHODS, *STRUCTURES)


@dataclasses.dataclass(frozen=True)
class MapRow:
    """What became of one linear map."""

    name: str
    bits_before: int
    bits: int
    frobenius: float  # relative error of the weights
    weighted: float  # of what calibration text makes of them; NaN: it was not measured


@dataclasses.dataclass(frozen=True)
class CompressedModel:
    """A model in another form.

    Attributes:
        config: with `model.weights`, or with fewer parts.
        arrays: by layers' numbers (`weights.layer_arrays`), as they are stored.
        dense: of the same config as before, what the forms stand for, where they stand for all weights; else None.
        bits, bits_before: of all weights.
        maps: those that were meant, first layer first.
    """

    config: ModelConfig
    arrays: Arrays
    dense: Arrays | None
    bits: int
    bits_before: int
    maps: tuple[MapRow, ...]

    @property
    def share(self) -> float:
        """Bits that are left, as a share."""
        return self.bits / self.bits_before


def compress_model(
    c: ModelConfig,
    arrays: Arrays,
    method: str,
    budget: float | None,
    options: Options = Options(),  # noqa: B008  (it is frozen)
    statistics: InputStatistics | None = None,
    spread: Spread = 'uniform',
    hard: float = 0.1,
    maps: Sequence[str] = ('*',),
    layers: int | None = None,
    loss: Loss | None = None,
    say: Callable[[int, int, MapRow], object] = lambda done, of, row: None,
) -> CompressedModel:
    """Compresses a model.

    Args:
        c: its config, without `model.weights`.
        arrays: its weights, as `layer_arrays` gives them.
        method: one of `NAMES`.
        budget: share of all bits that may be left; None for methods that take what they take.
        options: of the method.
        statistics: of calibration text, where the method or the objective needs them.
        spread: `uniform`: each map has the same share; `sensitivity`: as the loss of calibration text says; `middle`: whole
            layers from the middle outward are left a share `hard`, the others all.
        maps: patterns of names such as `layers.*.attention.*`; all others stay as they are.
        layers: of `middle`, so many, whatever the budget.
        loss: of the model with other weights, for `sensitivity`.
        say: is told of each map that is done.

    Raises UserError for what cannot be, naming the nearest that can.
    """
    if c.weights or c.adapter:
        raise UserError(
            'model.weights: the run is compressed already, or has an adapter; give the run that it was made of'
        )
    if c.encoder:
        raise UserError('model.encoder: encoder–decoders are not compressed; decoders and encoders alone are')
    if method in STRUCTURES:
        found = smaller(c, arrays, method, budget, statistics)
        bits, before = (32 * numbers(one) for one in (found.config, c))
        return CompressedModel(found.config, found.arrays, None, bits, before, ())
    chosen = method_of(method)
    meant = _chosen(c, arrays, maps, statistics)
    before = 32 * sum(w.size for w in arrays.values())
    tables = _tables(c, arrays, chosen, maps)
    rest = before - sum(target.bits for target in meant)
    rest += sum(table.bits - 32 * arrays[name].size for name, table in tables.items())
    shares = shares_of(c, meant, chosen, budget, before, rest, options, spread, hard, layers, loss)
    fits = list[tuple[Target, Compressed]]()
    rows = list[MapRow]()
    for number, target in enumerate(meant):
        share = shares[number]
        done = unchanged(target) if share is None else chosen.fit(target, share * target.bits, options)
        fits.append((target, done))
        rows.append(MapRow(target.name, target.bits, done.bits, *errors(target, done.w)))
        say(number + 1, len(meant), rows[-1])
    total = rest + sum(done.bits for _, done in fits)
    if budget is not None and chosen.fixed and total > budget * before * (1 + 1e-9):
        raise UserError(
            f'--budget {budget}: {method} takes {total / before:.4f} of the bits; nearest that works: '
            f'{math.ceil(total / before * 1e4) / 1e4}'
        )
    return _assembled(c, arrays, fits, tables, total, before, tuple(rows))


def _chosen(c: ModelConfig, arrays: Arrays, maps: Sequence[str], statistics: InputStatistics | None) -> list[Target]:
    """The maps that patterns name, with what calibration text said of their inputs."""
    known = targets(c, arrays)
    found = [one for one in known if any(fnmatch.fnmatch(one.name, pattern) for pattern in maps)]
    for pattern in maps:
        if not fnmatch.filter([one.name for one in known], pattern):
            raise UserError(f'--maps {pattern!r}: no such linear map{nearest(pattern, [one.name for one in known])}')
    if statistics is None:
        return found
    return [dataclasses.replace(one, gram=np.asarray(statistics.map(one.name).gram, np.float64)) for one in found]


class Table(NamedTuple):
    """An embedding or a head, rounded."""

    target: str  # of the form
    kind: Kind
    bits: int
    arrays: Arrays  # as they are kept
    w: np.ndarray  # what they stand for


def _tables(c: ModelConfig, arrays: Arrays, method: Method, maps: Sequence[str]) -> dict[str, Table]:
    """The embedding and the head, rounded, where the method rounds all of a model."""
    if method.tables is None or tuple(maps) != ('*',):
        return {}
    found = {}
    for target, name in TABLES.items():
        if name in arrays:
            axis = -1 if target == 'embedding' else -2
            done = rounded(np.asarray(arrays[name], np.float64), method.tables, axis, 32)
            kept = stored(done, method.tables, axis, 32)
            taken = bits_of(arrays[name].shape, method.tables, axis, 32)
            found[name] = Table(target, method.tables, taken, kept, decode(done))
    return found


def _assembled(
    c: ModelConfig,
    arrays: Arrays,
    found: list[tuple[Target, Compressed]],
    tables: dict[str, Table],
    total: int,
    before: int,
    rows: tuple[MapRow, ...],
) -> CompressedModel:
    """The model of compressed maps; like forms of several maps and layers are one entry of `model.weights`."""
    kept, dense = dict(arrays), dict(arrays)
    of_form: dict[LinearForm, dict[str, set[int]]] = {}
    for target, done in found:
        name = weight_name(c, target)
        dense[name] = done.w.astype(np.float32)
        if done.form is None:
            continue
        del kept[name]
        kept |= {f'{name}.{part}': array for part, array in done.arrays.items()}
        of_form.setdefault(done.form, {}).setdefault(target.map, set()).add(target.layer)
    forms = list[LinearForm]()
    for form, layers_of_map in of_form.items():
        maps_of_layers: dict[tuple[int, ...] | None, list[str]] = {}
        for name, layers in layers_of_map.items():
            where = None if _is_all(c, name, layers) else tuple(sorted(layers))
            maps_of_layers.setdefault(where, []).append(name)
        for where, names in maps_of_layers.items():
            forms.append(dataclasses.replace(form, targets=tuple(names), layers=where))
    for name, table in tables.items():
        del kept[name]
        kept |= {f'{name}.{part}': array for part, array in table.arrays.items()}
        dense[name] = table.w.astype(np.float32)
        forms.append(RoundedConfig(kind=table.kind, targets=(table.target,)))
    config = dataclasses.replace(c, weights=tuple(forms))
    shapes = {key: weight.shape for name, weight in weights_of(config).items() for key, _ in places(name, weight)}
    kept = {name: _filled(kept[name], shape) for name, shape in shapes.items()}
    return CompressedModel(config, kept, dense, total, before, rows)


def _is_all(c: ModelConfig, name: str, layers: set[int]) -> bool:
    """Whether these are all layers that have such a map: then a form need not name them."""
    return layers == {layer for layer, names in _maps_of(c).items() if name in names}


@functools.cache
def _maps_of(c: ModelConfig) -> dict[int, set[str]]:
    """The linear maps of each layer."""
    found: dict[int, set[str]] = {}
    for group in declared_decoder(c).groups:
        for name, one in linear_maps(group):
            for layer in one.weight.get_value().layers or ():
                found.setdefault(layer, set()).add(name)
    return found


def _filled(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array in the shape in which it is kept: a core that all devices split is flat, and ends with zeros."""
    if array.shape == tuple(shape):
        return array
    return np.pad(array.reshape(-1), (0, math.prod(shape) - array.size))
