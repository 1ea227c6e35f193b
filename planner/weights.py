"""All weights of a model as a plan needs them, read off what the layers declare: no mesh, no arrays, no tracing.

Layers that are alike are one `Group`, so that nothing here grows with the depth.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Literal

from flax import nnx

from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, declared_decoder
from weft.model.parameters import Parameter, Role, declared
from weft.sharding.mesh import MeshConfig

Where = Literal['pipeline', 'stack', 'encoder', 'mtp']


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array, or several of a layer that are split and used alike, as their numbers together."""

    declared: Parameter  # of several the first
    size: int  # numbers in all, of one layer

    @functools.cached_property
    def split(self) -> tuple[str, ...]:
        """Axes that split one of its dims."""
        return self.declared.split

    def shard(self, mesh: MeshConfig) -> float:
        """Numbers of one device."""
        return self.size / mesh.span(self.split)

    def used(self, mesh: MeshConfig) -> float:
        """Numbers of one device once the weight is gathered."""
        return self.size / mesh.span(self.left)

    @functools.cached_property
    def left(self) -> tuple[str, ...]:
        """Axes that still split it once it is gathered."""
        return tuple(axis for axis in self.split if axis not in self.declared.gathered)


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one kind that are worked on in one way."""

    where: Where  # `pipeline`: the layers are split over `stage`; `stack`: every stage has all of them; the encoder's; `mtp`
    experts: bool  # whether they are mixtures of experts
    layers: int  # of all stages together
    ends: int  # of them the last of what is computed once more for the backward pass in one go (`model.stack.remat`)
    written: int  # of them those that a program writes down: the units of kinds that its loops repeat
    config: ModelConfig  # the encoder's for its layers
    weights: tuple[Weight, ...]  # of one layer

    def held(self, mesh: MeshConfig) -> int:
        """Layers on one device."""
        return self.layers // self.stages(mesh)

    def stages(self, mesh: MeshConfig) -> int:
        """Into how many parts its layers are split."""
        return mesh.stage if self.where == 'pipeline' else 1

    @functools.cached_property
    def kept_alike(self) -> tuple[tuple[Weight, int], ...]:
        """One for all weights of a layer that are split and stored alike, with their numbers together; how many they are."""
        of = lambda w: w.declared
        key = lambda w: (w.split, of(w).role is Role.CORRECTION, of(w).role.learns, of(w).narrow, of(w).dtype)
        return _joined(self.weights, key)

    @functools.cached_property
    def gathered_alike(self) -> tuple[tuple[Weight, int], ...]:
        """The same of those that are gathered alike, and as wide; keys and values of a source apart."""
        key = lambda w: (w.declared.gathered, w.left, w.declared.narrow, w.declared.dtype, w.declared.of_source)
        return _joined([weight for weight in self.weights if weight.declared.gathered], key)


def _joined(weights: Iterable[Weight], key: Callable[[Weight], Hashable]) -> tuple[tuple[Weight, int], ...]:
    alike: dict[Hashable, list[Weight]] = {}
    for weight in weights:
        alike.setdefault(key(weight), []).append(weight)
    size = lambda some: sum(weight.size for weight in some)
    return tuple((dataclasses.replace(some[0], size=size(some)), len(some)) for some in alike.values())


@dataclasses.dataclass(frozen=True)
class Inventory:
    """All weights of a model."""

    groups: tuple[Group, ...]
    outside: tuple[Weight, ...]  # of no layer

    def held(self, mesh: MeshConfig) -> Iterator[tuple[Weight, float]]:
        """Each weight, those of a layer that are alike as one, with the numbers of it, in all layers, that one device keeps."""
        for weight in self.outside:
            yield weight, weight.shard(mesh)
        for group in self.groups:
            for weight, _ in group.kept_alike:
                yield weight, group.held(mesh) * weight.shard(mesh)


@functools.lru_cache(maxsize=256)
def inventory(c: ModelConfig) -> Inventory:
    groups, outside = _of_stack(c, declared_decoder(c))
    if c.encoder:
        more, encoder = _of_stack(c.of_encoder, declared_decoder(c).encoder)
        groups += [dataclasses.replace(group, where='encoder') for group in more]
        outside += encoder
    if c.mtp.layers:
        last, weights = c.layer_specs[-1], _weights(declared_decoder(c).mtp)
        groups.append(Group('mtp', last.experts, c.mtp.layers, 0, c.mtp.layers, c, weights))
    return Inventory(tuple(groups), tuple(outside))


def _of_stack(c: ModelConfig, decoder: Decoder) -> tuple[list[Group], list[Weight]]:
    """The layers of one stack, and what of it is in no layer."""
    count, ends, written = (Counter[tuple[Where, bool, tuple[int, ...]]]() for _ in range(3))
    weights, stacks = {}, iter(decoder.groups)
    for number, group in enumerate(c.layer_groups):
        where: Where = 'pipeline' if number == c.pipelined_group else 'stack'
        for spec in group.specs:
            key = where, spec.experts, spec.forms
            count[key] += group.repeats
            written[key] += 1
            weights[key] = _weights(next(stacks))
        ends[where, group.specs[-1].experts, group.specs[-1].forms] += group.repeats
    groups = [Group(*key[:2], layers, ends[key], written[key], c, weights[key]) for key, layers in count.items()]
    inside = ('groups.', 'mtp.', 'encoder.')
    outside = [Weight(found, found.size) for name, found in declared(decoder).items() if not name.startswith(inside)]
    return groups, outside


def _weights(layer: nnx.Module) -> tuple[Weight, ...]:
    return tuple(Weight(found, found.size) for found in declared(layer).values())
