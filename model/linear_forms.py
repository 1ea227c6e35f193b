"""Layers' linear maps in another form: an adapter beside them, or a weight that is not kept as it is used.

A config's `model.adapter` and `model.weights` name kinds, which any file may register (docs/extending.md), and which maps are
meant. What a kind declares is declared like any weight: initialised, sharded, saved, counted by that line.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
from flax import nnx

from weft.model.config import ModelConfig
from weft.model.linear import LinearMap
from weft.model.parameters import Module, Role, name_of
from weft.model.parts.linear_forms import LinearForm
from weft.model.parts.registry import ADAPTERS, WEIGHTS
from weft.runtime.errors import UserError, nearest

TARGETS = (Role.MATRIX, Role.EXPERT)  # neither routers nor what stands around the layers


class Adapter(Protocol):
    """A module beside a linear map whose own weight has no gradient any more; made of that weight's Parameter and a config."""

    def __call__(self, x_BTI: jax.Array, columns: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What it adds to x W: [B, T, O], before the bias; where `tensor` splits the inputs, this device's part of the sum.

        `columns` takes this device's outputs from a weight whose last dim they are, for keys and values of repeated heads.
        """
        ...

    def delta(self, dtype: Any, columns: Callable[[jax.Array], jax.Array] = ...) -> jax.Array:
        """What it adds to W, laid out as W is kept, for maps whose weight is not only multiplied by tokens: experts' too."""
        ...


class KeptWeight(Protocol):
    """A module in the place of a weight; made of that weight's Parameter and a config."""

    def dense(self, dtype: Any, axes: tuple[str, ...], dim: int) -> jax.Array:
        """The weight gathered over `axes`, which split its dim `dim`, as numbers of the compute dtype."""
        ...

    def encode(self, w: jax.Array) -> None:
        """Takes the values of a weight, a global array, which may have a leading dim of layers."""
        ...


def linear_maps(module: nnx.Module) -> Iterator[tuple[str, LinearMap]]:
    """The linear maps of a layer, or of what stands in it, by name, such as `attention.q`."""
    for path, found in nnx.iter_modules(module):
        if isinstance(found, LinearMap):
            yield '.'.join(map(str, path)), found


def take_forms(c: ModelConfig, layers: Iterable[nnx.Module], whole: bool = True) -> None:
    """Gives declared layers the adapters and the forms of weights that a config asks for.

    Raises UserError for a target that no layer has; `whole`: these are all layers that could have it.
    """
    if c.adapter is None and c.weights is None:
        return
    maps = [one for layer in layers for one in linear_maps(layer) if one[1].weight.get_value().role in TARGETS]
    adapted, kept = (_chosen(maps, section, config, whole) for section, config in forms(c).items())
    for one in adapted:
        declared = one.weight.get_value()
        one.adapter = ADAPTERS.module(c.adapter)(declared, c.adapter)
        one.weight.set_value(dataclasses.replace(declared, role=Role.FROZEN))
    for one in kept:
        one.weight = WEIGHTS.module(c.weights)(one.weight.get_value(), c.weights)


def forms(c: ModelConfig) -> dict[str, LinearForm | None]:
    """What a config says of the form of linear maps, by its section."""
    return {'model.adapter': c.adapter, 'model.weights': c.weights}


def _chosen(maps: list[tuple[str, LinearMap]], section: str, config: LinearForm | None, whole: bool) -> list[LinearMap]:
    """The maps that a config names. Raises UserError for a target that is none of these."""
    found: dict[int, LinearMap] = {}
    for target in config.targets if config else ():
        chosen = [m for name, m in maps if m.weight.get_value().role.value == target or fnmatch.fnmatch(name, target)]
        if not chosen and whole and target not in {role.value for role in TARGETS}:
            known = sorted({name for name, _ in maps})
            raise UserError(f'{section}.targets has {target!r}: no layer has such a linear map{nearest(target, known)}')
        found |= {id(one): one for one in chosen}
    return list(found.values())


def take_weights(new: Module, weights: dict[str, jax.Array]) -> Module:
    """A model with the values of another, by name, whose linear maps may be in other forms; what only it has stays."""
    for path, one in nnx.iter_modules(new):
        if isinstance(one, LinearMap) and not isinstance(one.weight, nnx.Param):
            one.weight.encode(weights['.'.join(map(str, path)) + '.' + one.weight_name])

    def take(path: Any, value: jax.Array) -> jax.Array:
        return weights.get(name_of(path), value)

    return jax.tree_util.tree_map_with_path(take, new)
