"""What one device sends, by kind of collective and by mesh axes: asked for in a traced program, and left in a compiled one.

Conventions, for an array of S bytes on p devices, by the ring algorithms that need no more than this:

    all_gather          S (p − 1) / p    S: the result
    reduce_scatter      S (p − 1) / p    S: the operand
    all_to_all          S (p − 1) / p
    ragged_all_to_all   S (p − 1) / p    S: the smaller of operand and result; what an even choice sends
    psum, pmax, pmin, reduce, all_reduce  2 S (p − 1) / p
    ppermute            S                of the devices that send to another one

Axes of size 1 send nothing and are left out; an operation over several axes is labelled with all of them, as in
`data+expert`. A loop counts as often as it runs; of several branches each kind counts where it is largest. A loop whose
trips nobody can know counts once, and the table says so in `unknown`.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Mesh = Mapping[str, int]  # devices along each axis, in the mesh's order
Key = tuple[str, str]  # kind, axes joined with '+'


class Sent(NamedTuple):
    """Arrays, and bytes that one device sends of them."""

    calls: float
    bytes: float


@dataclasses.dataclass
class Traffic:
    """A table of what is sent, and what could not be counted."""

    sent: dict[Key, Sent] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, axes: str, size: float, calls: float = 1) -> None:
        """Counts one more operation; none where no axis is left or nothing is sent."""
        if axes and size:
            old = self.sent.get((kind, axes))
            self.sent[kind, axes] = Sent(old.calls + calls, old.bytes + size) if old else Sent(calls, size)

    def include(self, other: 'Traffic', times: float = 1) -> None:
        """Adds all of another table, `times` over."""
        for (kind, axes), sent in other.sent.items():
            self.add(kind, axes, sent.bytes * times, sent.calls * times)
        self.unknown += [line for line in other.unknown if line not in self.unknown]

    def bytes_by_axes(self) -> dict[str, float]:
        """Bytes over each set of axes, of all kinds together."""
        total = collections.Counter[str]()
        for (_, axes), sent in self.sent.items():
            total[axes] += sent.bytes  # type: ignore[assignment]  # Counter takes any number
        return dict(total)

    def lowered(self) -> 'Traffic':
        """A table of what a program asks for, in the words of a compiled one: every sum and maximum is an all_reduce."""
        words = dict.fromkeys(('psum', 'pmax', 'pmin', 'reduce'), 'all_reduce') | {'reshard': 'all_gather'}
        found = Traffic(unknown=list(self.unknown))
        for (kind, axes), sent in self.sent.items():
            found.add(words.get(kind, kind), axes, sent.bytes, sent.calls)
        return found

    def __str__(self) -> str:
        rows = sorted(self.sent.items(), key=lambda row: -row[1].bytes)
        lines = [f'{name(key)}: {_amount(sent)}' for key, sent in rows]
        return '\n'.join([*lines, *(f'not counted: {line}' for line in self.unknown)])


def largest(tables: Iterable[Traffic]) -> Traffic:
    """Of each kind and axes the largest figures among alternatives: a device takes one branch, nobody knows which."""
    found = Traffic()
    for table in tables:
        for key, sent in table.sent.items():
            old = found.sent.get(key, Sent(0, 0))
            found.sent[key] = Sent(max(old.calls, sent.calls), max(old.bytes, sent.bytes))
        found.unknown += [line for line in table.unknown if line not in found.unknown]
    return found


def name(key: Key) -> str:
    """A row's name, as in `all_gather over data+expert`."""
    return ' over '.join(key)


def cost(kind: str, size: float, p: int) -> float:
    """Bytes that one of p devices sends, where `size` is the S of the module's table."""
    if kind == 'ppermute':
        return size
    share = size * (p - 1) / p
    return (
        share if kind in ('all_gather', 'reduce_scatter', 'all_to_all', 'ragged_all_to_all', 'reshard') else 2 * share
    )


def label(axes: Iterable[str], mesh: Mesh) -> str:
    """The axes of more than one device, in the mesh's order, joined with '+'."""
    axes = set(axes)
    return '+'.join(axis for axis in mesh if axis in axes and mesh[axis] > 1)


def span(axes: Iterable[str], mesh: Mesh) -> int:
    """Devices along the axes together."""
    return math.prod(mesh[axis] for axis in axes)


# Budgets --------------------------------------------------------------------------------------------------------------


def to_json(table: Traffic) -> dict[str, list[float]]:
    """{'all_gather over data+expert': [calls, bytes]}, sorted."""
    assert not table.unknown, f'a table with unknown trip counts is no budget: {table.unknown}'
    return {name(key): [_whole(x) for x in table.sent[key]] for key in sorted(table.sent)}


def from_json(rows: Mapping[str, list[float]]) -> Traffic:
    """The table that `to_json` wrote."""
    split = lambda text: tuple(text.split(' over ', 1))
    return Traffic({split(text): Sent(*amounts) for text, amounts in rows.items()})


def rows_of(table: Traffic) -> dict[str, Any]:
    """The table as JSON with what could not be counted, unlike a budget: {'bytes': `to_json`'s, 'unknown': lines}."""
    return {'bytes': to_json(dataclasses.replace(table, unknown=[])), 'unknown': table.unknown}


def table(rows: Mapping[str, Any]) -> Traffic:
    """The table that `rows_of` wrote."""
    return dataclasses.replace(from_json(rows['bytes']), unknown=rows['unknown'])


def dumps(budgets: Mapping[str, Mapping[str, list[float]]]) -> str:
    """JSON with one row a line, so that a change of a budget is a readable diff."""
    parts = []
    for part, rows in budgets.items():
        lines = ',\n'.join(f'  {json.dumps(text)}: {json.dumps(amounts)}' for text, amounts in rows.items())
        parts.append(f' {json.dumps(part)}: {{\n{lines}\n }}' if lines else f' {json.dumps(part)}: {{}}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


SUSPECTS = {
    'all_gather': 'unplanned gather?',
    'reduce_scatter': 'a gradient or an activation summed once more?',
    'psum': 'a sum where a reduce_scatter would do?',
    'all_reduce': 'a reduce_scatter turned into an all_reduce?',
    'reshard': 'an unplanned change of layout?',
    'reduce': 'a sum over a split dim outside shard_map?',
}


def difference(
    golden: Traffic, found: Traffic, *, exact: bool = False, slack: float = 0.0, ignore: float = 0.0
) -> list[str]:
    """Readable lines for what `found` sends beyond the budget `golden`; with `exact`, for what it sends less too.

    `slack` is the share by which a row's bytes may exceed its budget; an excess below the share `ignore` of all that the
    budget sends over the same axes is not told. Calls count only where `exact` is asked for: a compiler joins and splits
    them. Loops of unknown trips are always told. Empty when all is within budget.
    """
    total = golden.bytes_by_axes()
    lines = [f'not counted: {line}' for line in found.unknown]
    for key in sorted(golden.sent.keys() | found.sent.keys()):
        had, have = golden.sent.get(key), found.sent.get(key)
        hint = f': {SUSPECTS[key[0]]}' if key[0] in SUSPECTS else ''
        excess = (have.bytes if have else 0) - (had.bytes if had else 0)
        if 0 < excess <= ignore * total.get(key[1], 0):
            continue
        if had is None:
            lines.append(f'{name(key)}: {_amount(have)} (not in the budget){hint}')
        elif have is None:
            lines += [f'{name(key)}: gone (budget {_amount(had)})'] if exact else []
        elif have.bytes > had.bytes * (1 + slack) or (exact and have.calls > had.calls):
            lines.append(f'{name(key)}: {_amount(have)} (budget {_amount(had)}){hint}')
        elif exact and have != had:
            lines.append(f'{name(key)}: {_amount(have)} (less than the budget, {_amount(had)})')
    return lines


def _amount(sent: Sent) -> str:
    return f'{sent.calls:,.12g} call{"s" * (sent.calls != 1)}, {_size(sent.bytes)}'


def _size(count: float) -> str:
    for unit, size in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= size:
            return f'{count / size:.6g} {unit}'
    return f'{count:.6g} B'


def _whole(x: float) -> float:
    return int(x) if x == int(x) else round(x, 3)


# A traced program -----------------------------------------------------------------------------------------------------

# JAX's primitives, with the variants that say what varies (check_vma) beside the plain ones.
ASKED = {
    'all_gather': 'all_gather',
    'all_gather_invariant': 'all_gather',
    'all_gather_reduced': 'all_gather',
    'reduce_scatter': 'reduce_scatter',
    'unreduced_reduce_scatter': 'reduce_scatter',
    'psum': 'psum',
    'psum_invariant': 'psum',
    'unreduced_psum': 'psum',
    'pmax': 'pmax',
    'pmin': 'pmin',
    'ppermute': 'ppermute',
    'all_to_all': 'all_to_all',
    'ragged_all_to_all': 'ragged_all_to_all',
}
# They name mesh axes and send nothing.
SILENT = {
    'axis_index',
    'pvary',
    'pcast',
    'core_pvary',
    'preduced',
    'reduced_vary_cast',
    'vary_unreduced_cast',
    'mesh_cast',
}
REDUCTIONS = {'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or', 'argmax', 'argmin'}


def asked(jaxpr: Any, mesh: Mesh) -> Traffic:
    """What a traced program asks for, loops multiplied out, exactly as it is written: what nobody uses counts too.

    Args:
        jaxpr: what `jax.make_jaxpr` gives of a whole step, traced under the mesh.
        mesh: devices along each axis, as in `jax.sharding.Mesh.shape`.

    Inside shard_map every collective is seen. Outside, where arrays are global and their types say how they are split,
    these are: `reshard` and every other change of a layout that is written down (kind `reshard`), sums and the like over
    a split dim, and matmuls contracted over one (kind `reduce`). What else a compiler adds only `compiled` sees.
    """
    return _walk(getattr(jaxpr, 'jaxpr', jaxpr), mesh, manual=False)


def _walk(jaxpr: Any, mesh: Mesh, manual: bool) -> Traffic:
    found = Traffic()
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        inner = [_walk(body, mesh, manual or primitive == 'shard_map') for body in _bodies(params)]
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


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: of a loop, of branches, of jit, of a rematerialised or custom-gradient function."""
    for value in params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(body, 'jaxpr', body)
            if hasattr(body, 'eqns'):
                yield body


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
        target = params.get('dst_sharding', params.get('sharding'))
        _reshard(equation.invars[0].aval, target, mesh, found)
    elif primitive in ('jit', 'pjit'):
        for variable, target in zip(params['jaxpr'].jaxpr.outvars, params['out_shardings'], strict=True):
            _reshard(variable.aval, target, mesh, found)
    elif primitive in REDUCTIONS:
        split = _split(equation.invars[0].aval)
        _reduce((axis for dim in params['axes'] for axis in split[dim]), equation.outvars[0].aval, mesh, found)
    elif primitive == 'dot_general':
        (left_dims, right_dims), _ = params['dimension_numbers']
        left, right = (_split(v.aval) for v in equation.invars)
        over = set[str]()
        for i, j in zip(left_dims, right_dims, strict=True):
            over |= set(left[i]) & set(right[j])
            # Split on one side only: that side is gathered.
            for variable, mine, other in (
                (equation.invars[0], left[i], right[j]),
                (equation.invars[1], right[j], left[i]),
            ):
                _gather(variable.aval, set(mine) - set(other), mesh, found)
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


def _gather(aval: Any, axes: Iterable[str], mesh: Mesh, found: Traffic) -> None:
    axes = list(axes)
    p = span(axes, mesh)
    found.add('reshard', label(axes, mesh), cost('reshard', _shard(aval, mesh) * p, p))


def _reduce(axes: Iterable[str], out: Any, mesh: Mesh, found: Traffic) -> None:
    axes = list(axes)
    found.add('reduce', label(axes, mesh), cost('reduce', _shard(out, mesh), span(axes, mesh)))


def _dims(spec: Any, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim."""
    entries = [*spec, *(None,) * (rank - len(spec))]
    dims = []
    for entry in entries:
        names = entry if isinstance(entry, tuple) else (entry,)
        dims.append(tuple(axis for axis in names if isinstance(axis, str)))
    return dims


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


# A compiled program ---------------------------------------------------------------------------------------------------

BITS = {
    'pred': 8,
    **{f'{sign}{bits}': bits for sign in 'su' for bits in (2, 4, 8, 16, 32, 64)},
    **{'f16': 16, 'bf16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128},
}
COLLECTIVES = {
    'all-gather': 'all_gather',
    'all-reduce': 'all_reduce',
    'reduce-scatter': 'reduce_scatter',
    'all-to-all': 'all_to_all',
    'ragged-all-to-all': 'ragged_all_to_all',
    'collective-permute': 'ppermute',
    'collective-broadcast': 'broadcast',
}


class Instruction(NamedTuple):
    """`%name = shape opcode(operands), attributes` of an HLO module's text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses, if it is no operand: the value of a constant, a parameter's number
    attributes: str


class Computation(NamedTuple):
    """One block of an HLO module's text."""

    name: str
    instructions: dict[str, Instruction]
    root: str


def compiled(text: str, mesh: Mesh) -> Traffic:
    """What a compiled module sends: `jax.stages.Compiled.as_text()` for CPU, TPU or GPU, loops multiplied out.

    `mesh` names the axes and their sizes in the order of the mesh whose devices the module was compiled for: a device in
    the text is a place in it. Groups that are no whole axes are labelled with their size, as in `data (groups of 2)`.
    """
    computations, entry = parse(text)
    return _Module(computations, mesh).visit(entry, {})


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module's text by name, and which of them is its entry."""
    computations, entry, current = {}, '', None
    for line in text.splitlines():
        head = None if line[:1].isspace() else re.match(r'(ENTRY )?%?([\w.\-]+) .*-> .*\{$', line)
        if head:
            current = computations[head[2]] = Computation(head[2], {}, '')
            entry = head[2] if head[1] else entry
        elif line == '}':
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith('ROOT '):
                computations[current.name] = current = current._replace(root=instruction.name)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = ', line)
    if not match:
        return None
    end = _closing(line, match.end()) if line[match.end()] == '(' else line.find(' ', match.end())
    opcode = re.match(r' *([\w\-]+)\(', line[end:])
    if not opcode:
        return None
    first = end + opcode.end() - 1
    last = _closing(line, first)
    inside = line[first + 1 : last - 1]
    shape = line[match.end() : end]
    return Instruction(match[1], shape, opcode[1], tuple(re.findall(r'%([\w.\-]+)', inside)), inside, line[last:])


def _closing(line: str, first: int) -> int:
    """One past the parenthesis that closes the one at `first`."""
    depth = 0
    for place in range(first, len(line)):
        depth += (line[place] == '(') - (line[place] == ')')
        if not depth:
            return place + 1
    return len(line)


def shape_bytes(shape: str) -> float:
    """Bytes of an HLO shape; of a tuple, those of all its arrays."""
    total = 0.0
    for dtype, dims in re.findall(r'\b([a-z][a-z0-9]*)\[([\d,<= ]*)\]', shape):
        bits = BITS.get(dtype) or (4 if dtype.startswith('f4') else 8 if dtype.startswith('f8') else 0)
        total += math.prod(int(size) for size in re.findall(r'\d+', dims)) * bits / 8
    return total


class _Module:
    def __init__(self, computations: dict[str, Computation], mesh: Mesh):
        self.computations, self.mesh = computations, mesh

    def visit(self, called: str, known: Mapping[int, int]) -> Traffic:
        """What a computation sends; `known` are the elements of its parameter that are the same whole number in each call."""
        found = Traffic()
        computation = self.computations[called]
        for instruction in computation.instructions.values():
            opcode, attributes = instruction.opcode, instruction.attributes
            if opcode == 'while':
                self._loop(computation, instruction, known, found)
            elif opcode == 'conditional':
                listed = re.search(r'branch_computations=\{([^}]*)\}', attributes)
                two = re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', attributes)
                names = re.findall(r'[\w.\-]+', listed[1]) if listed else two
                found.include(largest(self.visit(branch, {}) for branch in names))
            elif opcode.removesuffix('-start') in COLLECTIVES:
                self._collective(computation, instruction, found)
            else:
                for callee in re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', attributes):
                    if callee in self.computations and not _repeats(instruction, callee):
                        found.include(self.visit(callee, {}))
        return found

    def _loop(self, outer: Computation, loop: Instruction, known: Mapping[int, int], found: Traffic) -> None:
        condition, body = (
            self.computations[re.search(rf'{part}=%?([\w.\-]+)', loop.attributes)[1]] for part in ('condition', 'body')
        )
        start = self._elements(outer, loop.operands[0])
        unchanged = {}
        if start and body.root:
            ends = self._elements(body, body.root)
            for i, (first, last) in enumerate(zip(start, ends or (), strict=False)):
                value = _integer(outer, first, known)
                if value is not None and _element_of_parameter(body, last) == i:
                    unchanged[i] = value
        inside = self.visit(body.name, unchanged)
        if not inside.sent:
            return
        trips = self._trips(outer, loop, condition, body, known, unchanged)
        if trips is None:
            found.unknown.append(f'trips of %{loop.name}, whose condition is %{condition.name}')
        found.include(inside, 1 if trips is None else trips)

    def _trips(
        self,
        outer: Computation,
        loop: Instruction,
        condition: Computation,
        body: Computation,
        known: Mapping[int, int],
        unchanged: Mapping[int, int],
    ) -> int | None:
        """As the compiler says on the loop; else from its counter's start, step and limit, if all three are constants."""
        said = re.search(r'known_trip_count[^\d}]*(\d+)', loop.attributes)
        if said:
            return int(said[1])
        root = condition.instructions[condition.root]
        direction = re.search(r'direction=(LT|LE)', root.attributes)
        if root.opcode != 'compare' or not direction:
            return None
        counter = _element_of_parameter(condition, root.operands[0])
        limit = _integer(condition, root.operands[1], unchanged)
        start, ends = self._elements(outer, loop.operands[0]), self._elements(body, body.root)
        if counter is None or limit is None or not start or not ends:
            return None
        first = _integer(outer, start[counter], known)
        added = body.instructions[_source(body, ends[counter])]
        if first is None or added.opcode != 'add' or _element_of_parameter(body, added.operands[0]) != counter:
            return None
        step = _integer(body, added.operands[1], unchanged)
        if not step or step < 0:
            return None
        return max(0, -(-(limit + (direction[1] == 'LE') - first) // step))

    def _elements(self, computation: Computation, tuple_name: str) -> tuple[str, ...] | None:
        found = computation.instructions[tuple_name]
        return found.operands if found.opcode == 'tuple' else None

    def _collective(self, computation: Computation, instruction: Instruction, found: Traffic) -> None:
        kind = COLLECTIVES[instruction.opcode.removesuffix('-start')]
        # A TPU's reduce_scatter is mostly an all-reduce and a slice in a fusion of this name, with a kernel of its own.
        if kind == 'all_reduce' and 'all-reduce-scatter' in computation.name:
            kind = 'reduce_scatter'
        size = [shape_bytes(computation.instructions[operand].shape) for operand in instruction.operands]
        if kind == 'ppermute':
            pairs = source_target_pairs(instruction.attributes)
            pairs = pairs[pairs[:, 0] != pairs[:, 1]]
            if len(pairs):
                found.add(kind, _axes(pairs, self.mesh, whole=False), sum(size))
            return
        ids = replica_groups(instruction.attributes, span(self.mesh, self.mesh))
        p = ids.shape[1]
        if p == 1:
            return
        if kind == 'ragged_all_to_all':
            size = [min(size[:2])]  # operand and result; the rest says how much goes where
        elif kind == 'all_gather':
            size = [p * part for part in size]
        calls = 1 if kind == 'ragged_all_to_all' else len(size)
        found.add(kind, _axes(ids, self.mesh), cost(kind, sum(size), p) if kind != 'broadcast' else sum(size), calls)


def _repeats(instruction: Instruction, callee: str) -> bool:
    """Whether a TPU's asynchronous collective stands here once more: in what it overlaps, or where it is done."""
    return instruction.name.startswith('async-collective-done') or callee.startswith('async_collective_fusion')


def _source(computation: Computation, wanted: str) -> str:
    """The instruction whose value `wanted` is a copy of."""
    instruction = computation.instructions[wanted]
    while instruction.opcode in ('copy', 'copy-start', 'copy-done', 'bitcast', 'convert', 'reshape'):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction.name


def _element_of_parameter(computation: Computation, wanted: str) -> int | None:
    """Which element of the computation's parameter, a tuple, a value is; None: it is none."""
    found = computation.instructions[_source(computation, wanted)]
    if found.opcode != 'get-tuple-element' or computation.instructions[found.operands[0]].opcode != 'parameter':
        return None
    return int(re.search(r'index=(\d+)', found.attributes)[1])


def _integer(computation: Computation, wanted: str, known: Mapping[int, int]) -> int | None:
    """The whole number that a value is in every run, if that can be seen."""
    found = computation.instructions[_source(computation, wanted)]
    if found.opcode == 'constant' and re.fullmatch(r'-?\d+', found.literal):
        return int(found.literal)
    element = _element_of_parameter(computation, wanted)
    return None if element is None else known.get(element)


# Groups of devices ----------------------------------------------------------------------------------------------------


def replica_groups(attributes: str, n: int) -> np.ndarray:
    """Devices that work together, one row a group, from an instruction's attributes; all n where it names none.

    Three spellings: `{{0,1},{2,3}}`; iota, as `[2,4]<=[4,2]T(1,0)`: 0 … 7 in that shape, transposed, cut into that many rows;
    and axes of a mesh, as `mesh['a'=4,'b'=2] {'b'}`.
    """
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?(\[[^)]*\)?)\))? *\{([^}]*)\}', attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
        wanted = re.findall(r"'(\w+)'", mesh[3])
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        axes = list(sizes)
        order = [axes.index(axis) for axis in axes if axis not in wanted] + [axes.index(axis) for axis in wanted]
        return (
            ids.reshape(tuple(sizes.values())).transpose(order).reshape(-1, math.prod(sizes[axis] for axis in wanted))
        )
    iota = re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', attributes)
    if iota:
        return _iota(iota[1])
    lists = re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', attributes)
    if lists:
        return np.array([_numbers(group) for group in re.findall(r'\{([\d, ]+)\}', lists[1])])
    return np.arange(n)[None]


def source_target_pairs(attributes: str) -> np.ndarray:
    """[pairs, 2]: the devices of a permutation, who sends to whom."""
    text = re.search(r'source_target_pairs=\{(.*?\})\}', attributes)[1]
    return np.array([_numbers(pair) for pair in re.findall(r'\{([\d, ]+)\}', text)])


def _iota(text: str) -> np.ndarray:
    shape, base, order = re.match(r'\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?', text).groups()
    ids = np.arange(math.prod(_numbers(base or shape))).reshape(_numbers(base or shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]


def _axes(ids: np.ndarray, mesh: Mesh, whole: bool = True) -> str:
    """The mesh axes along which the devices of a row differ."""
    at = np.array(np.unravel_index(ids, tuple(mesh.values())))  # [axis, group, member]
    axes = [axis for axis, row in zip(mesh, at, strict=True) if (row != row[:, :1]).any()]
    partial = whole and span(axes, mesh) != ids.shape[1]
    return label(axes, mesh) + (f' (groups of {ids.shape[1]})' if partial else '')
