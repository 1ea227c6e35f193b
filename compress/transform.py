"""A model in another form: a method, a budget in bits, and how it is spread over layers and maps.

The budget is a share of the bits of all weights as float32, with scales and indices, and with what no method touches: tables,
norms, routers. Letters: D model, F hidden units.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from weft.compress.activations import InputStatistics
from weft.compress.methods import matrices, pruning, rounding, tensors  # noqa: F401  (they add their methods)
from weft.compress.methods.base import METHODS, Compressed, Method, Options, errors, method_of, unchanged
from weft.compress.methods.rounding import Kind, bits_of, rounded, stored
from weft.compress.methods.structure import STRUCTURES
from weft.compress.numerics.rounding import decode
from weft.compress.weights import Arrays, Target, places, targets, weight_name
from weft.model.config import ModelConfig
from weft.model.decoder import declared_decoder, weights_of
from weft.model.linear_forms import TABLES, linear_maps
from weft.model.parts.attention import AttentionConfig
from weft.model.parts.linear_forms import LinearForm, RoundedConfig
from weft.runtime.errors import UserError, nearest

Spread = Literal['uniform', 'sensitivity', 'middle']
NAMES = (*METHODS, *STRUCTURES)
GRID = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # shares of a map's bits that `sensitivity` chooses among
Loss = Callable[[Arrays], float]


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
        return _smaller(c, arrays, method, budget, statistics)
    chosen = method_of(method)
    meant = _chosen(c, arrays, maps, statistics)
    before = 32 * sum(w.size for w in arrays.values())
    tables = _tables(c, arrays, chosen, maps)
    rest = before - sum(target.bits for target in meant)
    rest += sum(table.bits - 32 * arrays[name].size for name, table in tables.items())
    shares = _shares(c, meant, chosen, budget, before, rest, options, spread, hard, layers, loss)
    found = list[tuple[Target, Compressed]]()
    rows = list[MapRow]()
    for number, target in enumerate(meant):
        share = shares[number]
        done = unchanged(target) if share is None else chosen.fit(target, share * target.bits, options)
        found.append((target, done))
        rows.append(MapRow(target.name, target.bits, done.bits, *errors(target, done.w)))
        say(number + 1, len(meant), rows[-1])
    total = rest + sum(done.bits for _, done in found)
    if budget is not None and chosen.fixed and total > budget * before * (1 + 1e-9):
        raise UserError(
            f'--budget {budget}: {method} takes {total / before:.4f} of the bits; nearest that works: '
            f'{math.ceil(total / before * 1e4) / 1e4}'
        )
    return _assembled(c, arrays, found, tables, total, before, tuple(rows))


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


def _shares(
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


def _smaller(
    c: ModelConfig, arrays: Arrays, method: str, budget: float | None, statistics: InputStatistics | None
) -> CompressedModel:
    """The model with as many parts of a kind as the budget allows."""
    structure = STRUCTURES[method]
    most, least = structure.count(c), structure.least(c)
    assert statistics is not None, 'the caller measures what these methods need'
    if budget is None or not 0 < budget <= 1:
        raise UserError(
            f'--budget {budget}: {method} needs the share of all bits that may be left, above 0 and at most 1'
        )
    before = numbers(c)
    fit = [count for count in range(least, most + 1) if numbers(_counted(c, method, count)) <= budget * before]
    if not fit:
        share = math.ceil(numbers(_counted(c, method, least)) / before * 1e3) / 1e3
        raise UserError(
            f'--budget {budget}: with {least} of {most} {method} {share} is left; nearest that works: {share}'
        )
    found = structure.keep(c, arrays, fit[-1], statistics)
    bits = 32 * sum(w.size for w in found.arrays.values())
    return CompressedModel(found.config, found.arrays, None, bits, 32 * before, ())


def numbers(c: ModelConfig) -> int:
    """Of all weights of a model."""
    return sum(math.prod(weight.global_shape) for weight in weights_of(c).values())


def _counted(c: ModelConfig, method: str, count: int) -> ModelConfig:
    """The config with so many parts."""
    if method == 'layers':
        return dataclasses.replace(c, layers=count)
    if method == 'experts' and c.moe:
        return dataclasses.replace(c, moe=dataclasses.replace(c.moe, experts=count))
    if method == 'heads':
        a = c.attention
        assert isinstance(a, AttentionConfig), '`STRUCTURES` refuses others'
        heads = dataclasses.replace(a, heads=count * (a.heads // a.kv_heads), kv_heads=count, head_dim=a.head_dim)
        return dataclasses.replace(c, attention=heads)
    if c.moe:
        return dataclasses.replace(c, moe=dataclasses.replace(c.moe, mlp_dim=count))
    return dataclasses.replace(c, mlp=dataclasses.replace(c.mlp, dim=count))
