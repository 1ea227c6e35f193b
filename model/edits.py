"""Changes to activations of a forward pass, as arrays: other numbers in them are the same compiled program.

An edit stands at the name of a tap (`ForwardContext.tap`). Its arrays have the dims of what is tapped, of all devices
together, after a dim of layers: [L, B, T, …] for a tap [B, T, …], each dim whole or 1, which is meant for all. Every device
has them whole and takes what belongs to its own layers, rows, columns, heads, hidden units or experts.

Letters: L layers, B rows, T sequence (columns of a row; in decoding positions of it).
"""

import dataclasses
from collections.abc import Iterable, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.records import static
from weft.runtime.errors import UserError, nearest
from weft.sharding.collectives import axis_index, mark_varying, upcast
from weft.sharding.mesh import as_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """value → shift + factor · value, where all masks hold. factor 0 forgets the value: `shift` takes its place.

    Ablation is factor 0 with shift 0, or the mean; activation patching is factor 0 with another run's values; steering is
    factor 1 with a vector. Integers (`router.choices`) are computed in float32 and rounded.
    """

    name: str = static()
    where: tuple[Any, ...]  # masks, bool, each with all dims, whole or 1
    factor: Any
    shift: Any


class Place(NamedTuple):
    """Where a tapped array stands, from one device's view."""

    layer: jax.Array | int | None  # number of the layer; None: it belongs to none
    row_B: jax.Array  # number of each row in the global batch
    column_BT: jax.Array  # number of each column in its row
    layout: P  # the mesh axes that split each dim
    copies: int  # so many neighbours along the axes of dim 2 have the same part of it
    real: int | None  # so many numbers of the last dim, all devices together, are more than padding; None: all
    chosen: 'Chosen | None'  # dim 2 has what a token chose, and an edit's array all that it could choose from


class Chosen(NamedTuple):
    """Which of so many things (experts) stand in dim 2 of each token."""

    number_BTK: jax.Array  # from 0; `among`: none
    among: int


class Observer:
    """Who captures activations of one program and changes them, while it is traced.

    `taps`: which names are captured. `edits`: inside the shard_map, so that each device takes its part.
    """

    def __init__(self, taps: Set[str] | Literal['all'] = frozenset(), edits: Iterable[Edit] = ()) -> None:
        self.taps = taps
        self.edits: dict[str, list[Edit]] = {}
        for edit in mark_varying(tuple(edits)):
            self.edits.setdefault(edit.name, []).append(edit)
        self.offered: set[str] = set()  # names that the program's layers have offered so far

    def captures(self, name: str) -> bool:
        """Whether somebody wants the array of that name."""
        return self.taps == 'all' or name in self.taps

    def asks(self, name: str) -> bool:
        """Whether somebody captures or changes what stands at that name; what is costly is made only then."""
        return self.captures(name) or name in self.edits

    def edited(self, name: str, value: jax.Array, place: Place) -> jax.Array:
        """The value after all edits of that name, in their order."""
        self.offered.add(name)
        for edit in self.edits.get(name, ()):
            value = changed(edit, value, place)
        return value

    def check(self, layers: int) -> None:
        """Once the program is traced: raises UserError for an edit at a name that it did not offer, or of too many layers."""
        for name, edits in self.edits.items():
            if name not in self.offered:
                raise UserError(f'{name!r}: no layer offers such an activation to an edit{nearest(name, self.offered)}')
            for edit in edits:
                for array in (*edit.where, edit.factor, edit.shift):
                    if array.shape[0] not in (1, layers):
                        sizes = f'an array of {array.shape[0]} layers, and the model has {layers}'
                        raise UserError(f'edit of {name!r}: {sizes}; give {layers}, or 1 for all')


def changed(edit: Edit, value: jax.Array, place: Place) -> jax.Array:
    """This device's part of a tapped array after an edit."""

    def mine(array: jax.Array) -> jax.Array:
        return part(array, edit.name, value.shape, place)

    held, factor, shift = mine(edit.where[0]), mine(edit.factor), mine(edit.shift)
    for mask in edit.where[1:]:
        held = held & mine(mask)
    number = upcast(value) if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
    new = jnp.where(factor == 0, shift, factor * number + shift)
    if jnp.issubdtype(value.dtype, jnp.integer):
        new = jnp.round(new)
    return jnp.where(held, new.astype(value.dtype), value)


def part(array: jax.Array, name: str, shape: tuple[int, ...], place: Place) -> jax.Array:
    """What meets this device's part of a tapped array, of an edit's array [L, B, T, …]; its dims are whole or 1."""
    if array.ndim != len(shape) + 1:
        dims = f'an array of {array.ndim} dims, and what is tapped has {len(shape)}'
        raise UserError(f'edit of {name!r}: {dims}; give one more than that, the first for layers')
    alike = array.shape[0] == 1 or place.layer is None
    array = array[0] if alike else array.at[place.layer].get(mode='fill', fill_value=0)
    for dim in range(2, len(shape)):
        if dim == 2 and place.chosen:
            if array.shape[dim] not in (1, place.chosen.among):
                sizes = f'is {array.shape[dim]}, and must be {place.chosen.among} or 1'
                raise UserError(f'edit of {name!r}: dim {dim + 1} (from 0) of an array {sizes}')
            continue
        axes = as_axes(place.layout[dim]) if dim < len(place.layout) else ()
        ways = lax.axis_size(axes) // (place.copies if dim == 2 else 1) if axes else 1
        whole = shape[dim] * ways
        real = place.real if place.real is not None and dim == len(shape) - 1 else whole
        if array.shape[dim] not in (1, real):
            raise UserError(
                f'edit of {name!r}: dim {dim + 1} (from 0) of an array is {array.shape[dim]}, and must be {real} or 1'
            )
        if array.shape[dim] > 1 and whole > real:
            array = jnp.pad(array, [(0, whole - real if at == dim else 0) for at in range(array.ndim)])
        if array.shape[dim] > shape[dim]:
            begin = axis_index(axes) // (place.copies if dim == 2 else 1) * shape[dim]
            array = lax.dynamic_slice_in_dim(array, begin, shape[dim], dim)
    rows, columns = array.shape[:2]
    if rows > 1 or columns > 1:
        row = place.row_B[:, None] if rows > 1 else jnp.zeros_like(place.row_B)[:, None]
        column = place.column_BT if columns > 1 else jnp.zeros_like(place.column_BT[:, :1])
        array = array.at[row, column].get(mode='fill', fill_value=0)  # past an edit's rows and columns nothing changes
    if place.chosen and array.shape[2] > 1:
        number_BTK = place.chosen.number_BTK
        one_hot_BTKE = number_BTK[..., None] == jnp.arange(place.chosen.among)[None, None, None]
        array = jnp.broadcast_to(array, (*number_BTK.shape[:2], *array.shape[2:]))
        flat_BTED = array.reshape(*array.shape[:3], -1).astype(jnp.float32)
        picked = jnp.einsum('BTKE,BTED->BTKD', one_hot_BTKE.astype(jnp.float32), flat_BTED, precision='highest')
        array = picked.reshape(*number_BTK.shape, *array.shape[3:]).astype(array.dtype)
    return array
