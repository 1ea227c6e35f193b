"""What a traced program asks for."""

import itertools
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from weft.model.dots import bodies
from weft.planner.traffic.tables import Mesh, Traffic, cost, label, largest, name, span

# JAX's primitives, with the variants that say what varies (check_vma) beside the plain ones.
KINDS = ('all_gather', 'reduce_scatter', 'psum', 'pmax', 'pmin', 'ppermute', 'all_to_all', 'ragged_all_to_all')
ASKED = dict(zip(KINDS, KINDS, strict=True)) | {
    'all_gather_invariant': 'all_gather',
    'all_gather_reduced': 'all_gather',
    'unreduced_reduce_scatter': 'reduce_scatter',
    'psum_invariant': 'psum',
    'unreduced_psum': 'psum',
}
# They name mesh axes and send nothing.
SILENT = {'axis_index', 'pvary', 'pcast', 'core_pvary', 'preduced', 'mesh_cast'}
SILENT |= {'reduced_vary_cast', 'vary_unreduced_cast'}
REDUCTIONS = {'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or', 'argmax', 'argmin'}


def jaxpr_traffic(jaxpr: Any, mesh: Mesh) -> Traffic:
    """What a traced program asks for, loops multiplied out, exactly as it is written: what nobody uses counts too.

    Args:
        jaxpr: what `jax.make_jaxpr` gives of a whole step, traced under the mesh.
        mesh: devices along each axis, as in `jax.sharding.Mesh.shape`.

    Inside shard_map every collective is seen. Outside, where arrays are global and their types say how they are split,
    these are: `reshard` and every other change of a layout that is written down (kind `reshard`), sums and the like over
    a split dim, and matmuls contracted over one (kind `reduce`). What else a compiler adds only `compiled_traffic` sees.
    """
    return _walk(getattr(jaxpr, 'jaxpr', jaxpr), mesh, manual=False)


def _walk(jaxpr: Any, mesh: Mesh, manual: bool) -> Traffic:
    found = Traffic()
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        inner = [_walk(body, mesh, manual or primitive == 'shard_map') for body in bodies(params)]
        if primitive == 'cond':
            found.include(largest(inner))
        else:
            for table in inner:
                found.include(table, params['length'] if primitive == 'scan' else 1)
        if primitive == 'while' and any(table.sent for table in inner):
            what = ', '.join(sorted({name(key) for table in inner for key in table.sent}))
            found.unknown.append(f'trips of a while loop that holds {what}')
        if manual:
            _manual(equation, mesh, found)
        else:
            _explicit(equation, mesh, found)
    return found


def _manual(equation: Any, mesh: Mesh, found: Traffic) -> None:
    primitive, params = equation.primitive.name, equation.params
    named = params.get('axis_name', params.get('axes', ()))
    named = named if isinstance(named, (tuple, list, set, frozenset)) else (named,)
    axes = label((axis for axis in named if isinstance(axis, str)), mesh)
    if not axes or primitive in SILENT:
        return
    kind = ASKED.get(primitive)
    if kind is None:
        found.unknown.append(f'what {primitive} sends over {axes}')
        return
    # In groups an operation joins only some of an axis's devices.
    groups = params.get('axis_index_groups')
    p = len(groups[0]) if groups else span(axes.split('+'), mesh)
    axes += f' (groups of {p})' if groups else ''
    sizes_in, sizes_out = ([_bytes(v.aval) for v in vs] for vs in (equation.invars, equation.outvars))
    if kind == 'ppermute' and all(source == target for source, target in params['perm']):
        return
    if kind == 'ragged_all_to_all':
        sizes_in = [min(sizes_in[0], sizes_out[0])]  # the other operands say how much goes where
    for size in sizes_out if kind == 'all_gather' else sizes_in:
        found.add(kind, axes, cost(kind, size, p))


def _explicit(equation: Any, mesh: Mesh, found: Traffic) -> None:
    """Adds what an equation on global arrays asks for: its types say how they are split."""
    primitive, params = equation.primitive.name, equation.params
    if primitive in ('reshard', 'sharding_constraint'):
        _reshard(equation.invars[0].aval, params.get('dst_sharding', params.get('sharding')), mesh, found)
    elif primitive in ('jit', 'pjit'):
        for variable, target in zip(params['jaxpr'].jaxpr.outvars, params['out_shardings'], strict=True):
            _reshard(variable.aval, target, mesh, found)
    elif primitive in REDUCTIONS:
        split = _split(equation.invars[0].aval)
        _reduce([axis for dim in params['axes'] for axis in split[dim]], equation.outvars[0].aval, mesh, found)
    elif primitive == 'dot_general':
        (left_dims, right_dims), _ = params['dimension_numbers']
        left, right = (v.aval for v in equation.invars)
        over = set[str]()
        for i, j in zip(left_dims, right_dims, strict=True):
            left_axes, right_axes = set(_split(left)[i]), set(_split(right)[j])
            over |= left_axes & right_axes
            # Split on one side only: that side is gathered.
            _gather(left, left_axes - right_axes, mesh, found)
            _gather(right, right_axes - left_axes, mesh, found)
        _reduce(over, equation.outvars[0].aval, mesh, found)


def _reshard(aval: Any, target: Any, mesh: Mesh, found: Traffic) -> None:
    """From the layout of aval's type to `target`: axes that go are gathered, axes that move to another dim change places."""
    spec = getattr(target, 'spec', None)
    if spec is None or not hasattr(aval, 'shape'):
        return
    before, after = _split(aval), _dims(spec, len(aval.shape))
    where = lambda dims: {axis: i for i, axes in enumerate(dims) for axis in axes}
    old, new = where(before), where(after)
    pending = set(getattr(aval.sharding.spec, 'unreduced', ())) - set(getattr(spec, 'unreduced', ()))
    _reduce(pending, aval, mesh, found)
    _gather(aval, old.keys() - new.keys(), mesh, found)
    moved = [axis for axis in old.keys() & new.keys() if old[axis] != new[axis]]
    found.add('reshard', label(moved, mesh), cost('reshard', _shard(aval, mesh), span(moved, mesh)))


def _gather(aval: Any, axes: Collection[str], mesh: Mesh, found: Traffic) -> None:
    p = span(axes, mesh)
    found.add('reshard', label(axes, mesh), cost('reshard', _shard(aval, mesh) * p, p))


def _reduce(axes: Collection[str], out: Any, mesh: Mesh, found: Traffic) -> None:
    found.add('reduce', label(axes, mesh), cost('reduce', _shard(out, mesh), span(axes, mesh)))


def _dims(spec: Any, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    dims = [tuple(axis for axis in entry if isinstance(axis, str)) for entry in entries]
    return dims + [()] * (rank - len(dims))


def _split(aval: Any) -> list[tuple[str, ...]]:
    return _dims(aval.sharding.spec, len(aval.shape))


def _shard(aval: Any, mesh: Mesh) -> float:
    """Bytes of a global array on one device."""
    return _bytes(aval) / span(itertools.chain(*_split(aval)), mesh)


def _bytes(aval: Any) -> float:
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    else:
        bits = 8 * dtype.itemsize
    return math.prod(aval.shape) * bits / 8
