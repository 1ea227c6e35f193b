"""A model's weights layer by layer, as NumPy arrays, and a model of another config made of such arrays.

A weight's name counts layers through all groups of like ones: `layers.3.attention.q.w_IO`; one outside of them has its own.
Letters: D model, F hidden units, S slices (heads or experts), I inputs, O outputs.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, declared_decoder, weights_of
from weft.model.forms.kept import heads_of
from weft.model.linear_forms import TARGETS, linear_maps
from weft.model.parameters import Parameter, name_of

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear map of one layer, which a method may put into another form.

    Attributes:
        layer: its number.
        map: its name within the layer, such as `attention.q`.
        weight: as it is declared.
        w: float64 [D, F] or [experts, D, F], as it is kept.
        gram: of its inputs, XᵀX [I, I] or [experts, I, I], float64; None: it was not measured.
    """

    layer: int
    map: str
    weight: Parameter
    w: np.ndarray
    gram: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Such as `layers.3.attention.q`."""
        return f'layers.{self.layer}.{self.map}'

    @property
    def bits(self) -> int:
        """Of the weight as float32."""
        return 32 * self.w.size

    @property
    def experts(self) -> bool:
        """Whether it is a map of each expert."""
        return self.w.ndim == 3

    @property
    def slices(self) -> int:
        """Experts, or heads side by side; 0: it has neither."""
        return len(self.w) if self.experts else heads_of(self.weight)

    @property
    def w_IO(self) -> np.ndarray:
        """[…, I, O]."""
        return self.w.swapaxes(-1, -2) if self.weight.out_first else self.w

    @property
    def stack(self) -> np.ndarray:
        """[S, D, K]: the slices of a map that has some."""
        return self.w if self.experts else self.w.reshape(len(self.w), self.slices, -1).swapaxes(0, 1)

    def of_stack(self, w_SDK: np.ndarray) -> np.ndarray:
        """The weight as it is kept, of its slices."""
        return w_SDK if self.experts else w_SDK.swapaxes(0, 1).reshape(w_SDK.shape[1], -1)

    @property
    def mean_gram(self) -> np.ndarray | None:
        """Of the inputs of all slices together: as many as the model is wide, or as one slice has units."""
        if self.gram is None:
            return None
        if self.experts:
            found: np.ndarray = self.gram.sum(0)
            return found
        if not self.weight.out_first:
            return self.gram
        units = self.w.shape[1] // max(self.slices, 1)
        blocks = self.gram.reshape(self.slices, units, self.slices, units)
        return np.einsum('sisj->ij', blocks)


def layer_arrays(c: ModelConfig, model: Decoder) -> Arrays:
    """All weights of a model by their names with layers' numbers, on the host, each as it is stored. The model is stacked."""
    declared, found = weights_of(c), Arrays()
    for path, array in jax.tree_util.tree_leaves_with_path(model):
        name = name_of(path)
        for key, place in places(name, declared[name]):
            w = np.asarray(array)
            found[key] = w if place is None else w[place]
    return found


def places(name: str, weight: Parameter) -> Iterator[tuple[str, int | None]]:
    """Of an array the names of its layers' parts, with their places in it; of one without layers its own."""
    if weight.layers is None:
        yield name, None
    for place, layer in enumerate(weight.layers or ()):
        yield re.sub(r'^groups\.\d+\.', f'layers.{layer}.', name), place


def stacked_arrays(c: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a model of the config by its own names, in its order, of those by layers' numbers."""
    for name, weight in weights_of(c).items():
        parts = [arrays[key] for key, _ in places(name, weight)]
        yield name, parts[0] if weight.layers is None else np.stack(parts)


def targets(c: ModelConfig, arrays: Mapping[str, np.ndarray]) -> list[Target]:
    """All linear maps of a decoder's layers that are kept as they were declared, in the order of layers."""
    found = list[Target]()
    for group in declared_decoder(c).groups:
        for name, one in linear_maps(group):
            if not isinstance(one.weight, nnx.Param) or one.weight.get_value().role not in TARGETS:
                continue
            weight = one.weight.get_value()
            for layer in weight.layers or ():
                w = np.asarray(arrays[f'layers.{layer}.{name}.{one.weight_name}'], np.float64)
                found.append(Target(layer, name, dataclasses.replace(weight, layers=None), w))
    return sorted(found, key=lambda one: one.layer)


def weight_name(c: ModelConfig, target: Target) -> str:
    """The name of a map's weight in arrays by layers' numbers."""
    return f'{target.name}.{_leaf_names(c)[target.name]}'


@functools.cache
def _leaf_names(c: ModelConfig) -> dict[str, str]:
    """Of each linear map of each layer the name of its weight."""
    return {
        f'layers.{layer}.{name}': one.weight_name
        for group in declared_decoder(c).groups
        for name, one in linear_maps(group)
        if isinstance(one.weight, nnx.Param)
        for layer in one.weight.get_value().layers or ()
    }
