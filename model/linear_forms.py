"""Layers' linear maps in another form: an adapter beside them, or a weight that is not kept as it is used.

A config's `model.adapter` and `model.weights` name kinds, which any file may register (docs/extending.md), and which maps are
meant. What a kind declares is declared like any weight: initialised, sharded, saved, counted by that line.
"""

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
from flax import nnx

from weft.model.config import ModelConfig
from weft.model.forms import factored, pruned, rounded, tensor_train  # noqa: F401  (they add what computes their kinds)
from weft.model.linear import LinearMap
from weft.model.parameters import Module, Role, name_of
from weft.model.parts.linear_forms import LinearForm, RoundedConfig
from weft.model.parts.registry import ADAPTERS, WEIGHTS
from weft.runtime.errors import UserError, nearest

TARGETS = (Role.MATRIX, Role.EXPERT)  # of layers; not routers
TABLES = {'embedding': 'embed_VD', 'head': 'head_DV'}  # what a form may name beside them, and the decoder's attribute


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


def linear_maps(module: nnx.Module) -> Iterator[tuple[str, LinearMap]]:
    """The linear maps of a layer, or of what stands in it, by name, such as `attention.q`."""
    for path, found in nnx.iter_modules(module):
        if isinstance(found, LinearMap):
            yield '.'.join(map(str, path)), found


def take_forms(c: ModelConfig, layers: Iterable[tuple[nnx.Module, tuple[int, ...]]], whole: bool = True) -> None:
    """Gives declared layers the adapters and the forms of weights that a config asks for.

    Args:
        c: the config of the model.
        layers: each with the numbers of the forms of `model.weights` that name it.
        whole: these are all layers that could have a target.

    Raises UserError for a target that no layer has, and for a weight that two forms name.
    """
    if c.adapter is None and not c.weights:
        return
    maps = [[one for one in linear_maps(layer) if one[1].weight.get_value().role in TARGETS] for layer, _ in layers]
    kept = dict[int, tuple[LinearMap, LinearForm]]()
    for number, form in enumerate(c.weights or ()):
        named = [one for layer, (_, forms) in zip(maps, layers, strict=True) if number in forms for one in layer]
        for one in _chosen(named, f'model.weights.{number}', form, whole):
            if id(one) in kept:
                name = next(name for name, other in named if other is one)
                raise UserError(
                    f'model.weights.{number} is a {form.kind} of {name}, as another of model.weights is: a weight has one form'
                )
            kept[id(one)] = one, form
    for one in _chosen(list(itertools.chain(*maps)), 'model.adapter', c.adapter, whole):
        declared = one.weight.get_value()
        one.adapter = ADAPTERS.module(c.adapter)(declared, c.adapter)
        one.weight.set_value(dataclasses.replace(declared, role=Role.FROZEN))
    for one, form in kept.values():
        one.weight = WEIGHTS.module(form)(one.weight.get_value(), form)


def _chosen(maps: list[tuple[str, LinearMap]], section: str, config: LinearForm | None, whole: bool) -> list[LinearMap]:
    """The maps that a config names. Raises UserError for a target that is none of these."""
    found: dict[int, LinearMap] = {}
    for target in [target for target in config.targets if target not in TABLES] if config else ():
        chosen = [m for name, m in maps if m.weight.get_value().role.value == target or fnmatch.fnmatch(name, target)]
        if not chosen and whole and target not in {role.value for role in TARGETS}:
            known = sorted({name for name, _ in maps})
            raise UserError(f'{section}.targets has {target!r}: no layer has such a linear map{nearest(target, known)}')
        found |= {id(one): one for one in chosen}
    return list(found.values())


def take_table_forms(c: ModelConfig, decoder: nnx.Module) -> None:
    """Gives a declared decoder's embedding and head the rounded forms that a config asks for.

    Raises UserError where the model has no such table, or the kind does not round.
    """
    for number, form in enumerate(c.weights or ()):
        for target in TABLES.keys() & set(form.targets):
            where = f'model.weights.{number}'
            if not isinstance(form, RoundedConfig):
                raise UserError(f'{where}.targets has {target!r} of kind {form.kind}: tables can be int8, int4 and fp8')
            table = getattr(decoder, TABLES[target], None)
            if table is None:
                raise UserError(f'{where}.targets has {target!r}: the model has no head of its own; name embedding')
            if not isinstance(table, nnx.Param):
                raise UserError(
                    f'{where} is a {form.kind} of {target}, as another of model.weights is: a weight has one form'
                )
            rounded_table = rounded.RoundedArray(
                table.get_value(), form.kind, -1 if target == 'embedding' else -2, form.group
            )
            setattr(decoder, TABLES[target], rounded_table)


def take_weights(new: Module, weights: dict[str, jax.Array]) -> Module:
    """A model with the values of another, by name, whose linear maps may be in other forms; what only it has stays."""
    for path, one in nnx.iter_modules(new):
        if isinstance(one, LinearMap) and not isinstance(one.weight, nnx.Param):
            one.weight.encode(weights['.'.join(map(str, path)) + '.' + one.weight_name])

    def take(path: Any, value: jax.Array) -> jax.Array:
        return weights.get(name_of(path), value)

    return jax.tree_util.tree_map_with_path(take, new)
