"""What a compiled program sends, read off its text."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from weft.planner.traffic.groups import axes_of, replica_groups, source_target_pairs
from weft.planner.traffic.tables import Mesh, Traffic, cost, largest, span

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


def compiled_traffic(text: str, mesh: Mesh) -> Traffic:
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


@dataclasses.dataclass
class _Module:
    computations: dict[str, Computation]
    mesh: Mesh

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
        condition, body = (self.computations[_called(loop, part)] for part in ('condition', 'body'))
        ends = _elements(body, body.root)
        first = [_integer(outer, element, known) for element in _elements(outer, loop.operands[0])]
        unchanged = {
            i: value
            for i, (value, last) in enumerate(zip(first, ends, strict=False))
            if value is not None and _element_of_parameter(body, last) == i
        }
        inside = self.visit(body.name, unchanged)
        if not inside.sent:
            return
        said = re.search(r'known_trip_count[^\d}]*(\d+)', loop.attributes)
        trips = int(said[1]) if said else _trips(condition, body, first, ends, unchanged)
        if trips is None:
            found.unknown.append(f'trips of %{loop.name}, whose condition is %{condition.name}')
        found.include(inside, 1 if trips is None else trips)

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
                found.add(kind, axes_of(pairs, self.mesh, whole=False), sum(size))
            return
        ids = replica_groups(instruction.attributes, span(self.mesh, self.mesh))
        p = ids.shape[1]
        if p == 1:
            return
        if kind == 'ragged_all_to_all':
            size = [min(size[:2])]  # operand and result; the rest says how much goes where
        elif kind == 'all_gather':
            size = [p * part for part in size]
        found.add(kind, axes_of(ids, self.mesh), cost(kind, sum(size), p), len(size))


def _trips(
    condition: Computation,
    body: Computation,
    first: Sequence[int | None],
    ends: Sequence[str],
    unchanged: Mapping[int, int],
) -> int | None:
    """Of a loop by its counter's start, step and limit, if all three are constants.

    Args:
        first: the whole numbers among the elements that the loop begins with.
        ends: the values of the body that become the elements of the next trip.
        unchanged: elements that are the same whole number in each trip.
    """
    root = condition.instructions[condition.root]
    direction = re.search(r'direction=(LT|LE)', root.attributes)
    if root.opcode != 'compare' or not direction:
        return None
    counter = _element_of_parameter(condition, root.operands[0])
    limit = _integer(condition, root.operands[1], unchanged)
    if counter is None or limit is None or not ends or not first:
        return None
    if (begin := first[counter]) is None:
        return None
    added = body.instructions[_source(body, ends[counter])]
    if added.opcode != 'add' or _element_of_parameter(body, added.operands[0]) != counter:
        return None
    step = _integer(body, added.operands[1], unchanged)
    if not step or step < 0:
        return None
    return max(0, -(-(limit + (direction[1] == 'LE') - begin) // step))


def _called(loop: Instruction, part: str) -> str:
    """The computation that is a loop's `condition` or `body`."""
    found = re.search(rf'{part}=%?([\w.\-]+)', loop.attributes)
    assert found, loop.attributes
    return found[1]


def _elements(computation: Computation, tuple_name: str) -> tuple[str, ...]:
    """The values that a tuple is made of; () where it is made elsewhere."""
    found = computation.instructions.get(tuple_name)
    return found.operands if found and found.opcode == 'tuple' else ()


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
    index = re.search(r'index=(\d+)', found.attributes)
    assert index, found.attributes
    return int(index[1])


def _integer(computation: Computation, wanted: str, known: Mapping[int, int]) -> int | None:
    """The whole number that a value is in every run, if that can be seen."""
    found = computation.instructions[_source(computation, wanted)]
    if found.opcode == 'constant' and re.fullmatch(r'-?\d+', found.literal):
        return int(found.literal)
    element = _element_of_parameter(computation, wanted)
    return None if element is None else known.get(element)
