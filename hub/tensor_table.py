"""A family's table of names, spelt out for one model: every published tensor, and where each part of it goes in our arrays."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax

from weft.hub.families import ENCODER, AsRow, Entry, Family, Flipped, Joined, Tensor, TensorPart, Where, Woven
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import declared_decoder, weights_of
from weft.model.parameters import Parameter, Role, abstract, name_of
from weft.runtime.errors import UserError


def array_shapes(c: ModelConfig, compute: ComputeConfig = DEFAULT) -> dict[str, jax.ShapeDtypeStruct]:
    """Our arrays by name, as shapes with shardings on the current mesh, in the dtype that `compute` stores."""
    found = abstract(declared_decoder(c, compute), compute.parameter_dtype)
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def tensors(family: Family, c: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[Tensor]:
    """The published tensors of a model, `shapes` being `array_shapes(c)`; together they fill each of our arrays exactly once.

    Raises UserError where the family has no name for one of our arrays.
    """
    found: list[Tensor] = []
    places = {'': list(layer_prefixes(c)), ENCODER: list(layer_prefixes(c.of_encoder, 'encoder.')) if c.encoder else []}

    def fits(entry: Entry, prefix: str) -> bool:
        if isinstance(entry, Where) and (array_name(prefix, entry.beside) in shapes) != entry.has:
            return False
        return all(array_name(prefix, leaf) in shapes for leaf in named_by(entry))

    for name, entry in family.names.items():
        layers: list[tuple[str, str, tuple[int, ...]]] = [(name, '', ())]
        if '{i}' in name:
            stack = ENCODER if named_by(entry)[0].startswith(ENCODER) else ''
            layers = [(name.replace('{i}', str(i)), prefix, (at,)) for i, (prefix, at) in enumerate(places[stack])]
        for of_layer, prefix, at in [layer for layer in layers if fits(entry, layer[1])]:
            if '{e}' not in name:
                found.append(entry_tensor(of_layer, entry, prefix, at, c))
                continue
            assert c.moe is not None, 'experts fit'
            for e in range(c.moe.experts):
                found.append(entry_tensor(of_layer.replace('{e}', str(e)), entry, prefix, (*at, e), c))
    used = {part.leaf for one in found for part in one.parts}
    for leaf in shapes:
        if leaf not in used:
            raise UserError(f'family {family.name} has no tensor for {leaf}: this model is not one of its own')
    check_filled(found, c, shapes)
    by_name = {one.name: one for one in found}
    found += [
        dataclasses.replace(by_name[source], name=name.replace('{i}', str(c.layers + k)), copy_of=source)
        for k in range(c.mtp.layers)
        for name, source in family.copies.items()
        if source in by_name
    ]
    return found


def layer_prefixes(c: ModelConfig, stack: str = '') -> Iterator[tuple[str, int]]:
    """Of each layer, first to last, then those of `mtp`: the prefix of its arrays' names, and its index in them.

    The names begin with `stack`.
    """
    group = 0
    for run in c.layer_groups:
        for repeat in range(run.repeats):
            for place in range(len(run.specs)):
                yield f'{stack}groups.{group + place}.', repeat
        group += len(run.specs)
    yield from (('mtp.', k) for k in range(c.mtp.layers))


def array_name(prefix: str, leaf: str) -> str:
    """The whole name of an array that a table names."""
    return prefix + leaf.removeprefix(ENCODER)


def named_by(entry: Entry) -> tuple[str, ...]:
    """The arrays that an entry speaks of."""
    if isinstance(entry, str):
        return (entry,)
    return (entry.leaf,) if isinstance(entry, Flipped | AsRow | Where) else entry.leaves


def entry_tensor(name: str, entry: Entry, prefix: str, at: tuple[int, ...], c: ModelConfig) -> Tensor:
    """One published tensor of an entry of a table."""
    flip = isinstance(entry, Flipped) or (isinstance(entry, Joined | Woven) and entry.flip)
    parts, published = [], []
    for leaf in named_by(entry):
        known = weights_of(c)[array_name(prefix, leaf)]
        shape = unpadded(known, c)[len(at) :]
        axes: tuple[int, ...] | None = None
        if len(shape) > 1 and known.in_first != flip:
            axes = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
        parts.append(TensorPart(array_name(prefix, leaf), at, axes=axes))
        published.append(tuple(shape[i] for i in axes) if axes else tuple(shape))
    if isinstance(entry, AsRow):
        return Tensor(name, (1, *published[0]), (dataclasses.replace(parts[0], take=(0,)),))
    if len(parts) == 1:
        return Tensor(name, published[0], tuple(parts))
    assert isinstance(entry, Joined | Woven)
    dim = entry.dim if isinstance(entry, Joined) else len(published[0]) - 1
    begin, placed = 0, []
    for number, (part, shape) in enumerate(zip(parts, published, strict=True)):
        end = begin + shape[dim]
        cut = slice(begin, end) if isinstance(entry, Joined) else slice(number, None, len(parts))
        placed.append(dataclasses.replace(part, take=(*[slice(None)] * dim, cut)))
        begin = end
    return Tensor(name, (*published[0][:dim], begin, *published[0][dim + 1 :]), tuple(placed))


def unpadded(weight: Parameter, c: ModelConfig) -> tuple[int, ...]:
    """An array's shape without the rows or columns that fill up the vocabulary."""
    shape = list(weight.global_shape)
    if weight.padded is not None:
        assert c.vocabulary is not None, 'published models say it'
        shape[weight.padded] = c.vocabulary
    return tuple(shape)


def check_filled(found: list[Tensor], c: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """That names differ, that no two parts fill one place, and that together they fill every place."""
    names = [one.name for one in found]
    assert len(set(names)) == len(names), 'two tensors of one name'
    places = [(part.leaf, part.at) for one in found for part in one.parts]
    assert len(set(places)) == len(places), 'two tensors fill one place'
    count = dict.fromkeys(shapes, 0)
    for leaf, at in places:
        count[leaf] += math.prod(unpadded(weights_of(c)[leaf], c)[len(at) :])
    for leaf, shape in shapes.items():
        assert count[leaf] == math.prod(unpadded(weights_of(c)[leaf], c)), (
            f'{leaf}: {count[leaf]} numbers of {shape.shape}'
        )


def is_correction(one: Tensor, c: ModelConfig) -> bool:
    """Whether a published tensor is the correction of a router's choices, which is kept in at least float32."""
    return all(weights_of(c)[part.leaf].role is Role.CORRECTION for part in one.parts)
