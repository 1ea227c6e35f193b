"""What is sent between devices, each as one readable call from one device's view (inside a fully manual `jax.shard_map`).

An axis of size 1 sends nothing and leaves no trace in the program: XLA's CPU compiler would keep a collective over one device
as a copy. Types know no such axes either (`sharding.mesh` sets JAX so), and nothing varies over them. So `lax`'s own
collectives are called here, and elsewhere only where the axis is known to be larger: KV heads, the ring, expert dispatch.

Letters: B rows, T sequence (here: as long as the name says), D model, N any dim split over `tensor`.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.typing import DTypeLike

from weft.sharding.mesh import AXES, FSDP, as_axes, platform, split_axes

Tree = TypeVar('Tree')  # any pytree of arrays
Axes = str | Iterable[str]


def mark_varying(tree: Tree) -> Tree:
    """Marks arrays as this device's own copies, so that a gradient is summed once over the axes that replicate them here.

    Without the mark the sum would be taken at each use, inside the scan over layers.
    """

    return _vary(tree, AXES)


def match_varying(tree: Tree) -> Tree:
    """Marks arrays as varying over every mesh axis that one of them varies over; outside of shard_map nothing happens.

    A loop's carry, a kernel's operands and a custom gradient have one type throughout. What JAX adds for the cast in the
    backward pass is the sum that the gradient of a replicated array needs.
    """
    return _vary(tree, sorted(frozenset().union(*map(varying, jax.tree.leaves(tree)))))


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """A constant x as varying over the mesh axes that `like` varies over, as a loop's carry must."""
    return match_varying((x, like))[0]


def _vary(tree: Tree, axes: Iterable[str]) -> Tree:
    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying(x))
        return lax.pcast(x, missing, to='varying') if missing else x

    return jax.tree.map(mark, tree)


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which x is known to differ between devices."""
    return jax.typeof(x).manual_axis_type.varying


def reduce_gradients(tree: Tree, specs: Any) -> Tree:
    """Sums each device's own gradient over the axes that replicate its weight; `specs` has each weight's PartitionSpec.

    One call for all weights of a layout: a step sends this once, whatever the number of its layers and microbatches.
    """
    leaves, structure = jax.tree.flatten(tree)
    layouts = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, P))
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for i, spec in enumerate(layouts):
        by_axes.setdefault(active_axes(axis for axis in AXES if axis not in split_axes(spec)), []).append(i)
    for axes, where in by_axes.items():
        for i, total in zip(where, psum([leaves[i] for i in where], axes), strict=True):
            leaves[i] = total
    return jax.tree.unflatten(structure, leaves)


def active_axes(axes: Axes) -> tuple[str, ...]:
    """The axes among `axes` that have more than one device, in their order."""
    return tuple(axis for axis in as_axes(axes) if lax.axis_size(axis) > 1)


def psum(tree: Tree, axes: Axes) -> Tree:
    """The sum over all devices along the axes."""
    active = active_axes(axes)
    return lax.psum(tree, active) if active else tree


def pmax(tree: Tree, axes: Axes) -> Tree:
    """The largest over all devices along the axes."""
    active = active_axes(axes)
    return lax.pmax(tree, active) if active else tree


def axis_index(axes: Axes) -> jax.Array:
    """This device's number along an axis, or along several, of which the last counts fastest; int32."""
    active = active_axes(axes)
    return lax.axis_index(active) if active else jnp.int32(0)


def all_to_all(x: jax.Array, axis: str, split_dim: int, concat_dim: int) -> jax.Array:
    """Cuts x along `split_dim`, sends part i to device i of the axis, and joins the parts that come along `concat_dim`.

    Backward: the all_to_all with both dims exchanged.
    """
    return lax.all_to_all(x, axis, split_dim, concat_dim, tiled=True) if active_axes(axis) else x


def ring_shift(tree: Tree, axis: str, by: int = 1) -> Tree:
    """Sends this device's arrays `by` places on along `axis`, in a ring; returns those of the device `by` places before."""
    n = lax.axis_size(axis)
    return lax.ppermute(tree, axis, [(i, (i + by) % n) for i in range(n)]) if n > 1 else tree


def as_replicated(x: jax.Array, axis: str) -> jax.Array:
    """Declares x replicated along `axis` for the VMA check, by broadcasting device 0's copy; the values already agree."""
    return psum(jnp.where(axis_index(axis) == 0, x, 0), axis) if active_axes(axis) else x


def gather_stages(axis: str) -> list[list[list[int]] | None]:
    """`axis_index_groups` of an all-gather along an axis, stage by stage, nearest devices first, so that no more is sent.

    [None] for a single stage over the whole axis; [] where the axis has one device. Two stages on a TPU whose chips are all
    on this axis: XLA would make an all-reduce of a reduce-scatter over all chips, and send twice the bytes
    (benchmarks/plan.md).
    """
    n = lax.axis_size(axis)
    if n == 1:
        return []
    if platform() != 'tpu' or n < lax.axis_size(AXES) or n % 4:
        return [None]
    far = 4 if n > 8 else 2
    near = n // far
    return [
        [[g * near + i for i in range(near)] for g in range(far)],
        [[g * near + i for g in range(far)] for i in range(near)],
    ]


def all_gather(x: jax.Array, axis: str, dim: int = 0) -> jax.Array:
    """The parts of all devices of an axis, concatenated along `dim`. Backward: `reduce_scatter`."""
    for groups in gather_stages(axis):
        x = lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    """The sum over all devices of an axis, of which each keeps its part of the first dim. Backward: `all_gather`."""
    for groups in reversed(gather_stages(axis)):
        x = lax.psum_scatter(x, axis, tiled=True, axis_index_groups=groups)
    return x


def unshard(w: jax.Array, dtype: Any, axes: tuple[str, ...] = FSDP, dim: int = 0) -> jax.Array:
    """All-gathers a weight from its shards along `axes`, sent in the compute dtype. Backward: a reduce-scatter of its gradient.

    One axis after the other, the innermost first, which sends no more: over several at once TPUs send twice the bytes where
    they are the whole machine, as in `gather_stages`.
    """
    w = w.astype(dtype)
    for axis in reversed(axes):
        w = all_gather(w, axis, dim)
    return w


def gather_sequence(x_BTD: jax.Array) -> jax.Array:
    """All-gathers the sequence from its slices over `tensor`: [B, T / tensor, …] to [B, T, …].

    Backward: `reduce_scatter_sequence`.
    Rows and sequence are one dim while they travel, here and in `reduce_scatter_sequence`: of more dims than two XLA's TPU
    compiler makes an all-reduce where a reduce-scatter was asked for, and sends twice the bytes.
    """
    if not active_axes('tensor'):
        return x_BTD
    B, T, *rest = x_BTD.shape
    x_ND = all_gather(x_BTD.reshape(B * T, *rest), 'tensor')
    return x_ND.reshape(-1, B, T, *rest).swapaxes(0, 1).reshape(B, -1, *rest)


def reduce_scatter_sequence(x_BTD: jax.Array) -> jax.Array:
    """The sum of partial products over `tensor`, of which each device keeps its slice of the sequence.

    Backward: `gather_sequence`.
    """
    n = lax.axis_size('tensor')
    if n == 1:
        return x_BTD
    B, T, *rest = x_BTD.shape
    x_ND = x_BTD.reshape(B, n, T // n, *rest).swapaxes(0, 1).reshape(B * T, *rest)
    return reduce_scatter(x_ND, 'tensor').reshape(B, T // n, *rest)


def tensor_slice(x_BT: jax.Array, dim: int = 1) -> jax.Array:
    """This device's slice over `tensor` of an array that every device of `tensor` holds whole."""
    n = lax.axis_size('tensor')
    size = x_BT.shape[dim] // n
    return lax.dynamic_slice_in_dim(x_BT, axis_index('tensor') * size, size, axis=dim) if n > 1 else x_BT


def upcast(x: jax.Array) -> jax.Array:
    """x in at least float32."""
    return x.astype(wide(x.dtype))


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of scores, norms and sums: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
