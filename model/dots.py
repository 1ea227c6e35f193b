"""Matmul FLOPs of a traced program, counted at each dot: what `planner.flops` says by formula is held to this.

Conventions. A multiplication and an addition are 2 FLOPs. A dot counts by its shapes alone: masked scores, padding and what
a mask throws away afterwards are computed and count. A ragged dot counts each row of its buffer once, with one group's
weights. A loop counts as often as it runs; of several branches the one with most FLOPs counts. A kernel counts its body once
for each step of its grid. A loop whose trips nobody can know counts once, and `unknown` says so.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

Mesh = Mapping[str, int]  # devices along each axis


@dataclasses.dataclass
class Dots:
    """FLOPs of all devices together, and what could not be counted."""

    flops: float = 0.0
    calls: float = 0.0  # dots, each as often as it runs on one device
    unknown: list[str] = dataclasses.field(default_factory=list)

    def include(self, other: 'Dots', times: float = 1, devices: int = 1) -> None:
        """Adds another count, `times` over on each of `devices`."""
        self.flops += other.flops * times * devices
        self.calls += other.calls * times
        self.unknown += [line for line in other.unknown if line not in self.unknown]


def dots(jaxpr: Any, mesh: Mesh | None = None) -> Dots:
    """What a traced program multiplies, on all devices of the mesh together.

    Args:
        jaxpr: what `jax.make_jaxpr` gives.
        mesh: devices along each axis, as in `jax.sharding.Mesh.shape`; None: one device. A dot outside of shard_map is on
            global arrays; one inside is every device's own.
    """
    return _walk(getattr(jaxpr, 'jaxpr', jaxpr), math.prod((mesh or {}).values()))


def _walk(jaxpr: Any, devices: int) -> Dots:
    found = Dots()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inside = 1 if name == 'shard_map' else devices
        inner = [_walk(body, inside) for body in bodies(params)]
        if name == 'dot_general':
            found.include(Dots(_dot_flops(equation), 1))
        elif name == 'ragged_dot_general':
            found.include(Dots(_ragged_flops(equation), 1))
        elif name == 'cond':
            found.include(max(inner, key=lambda one: one.flops))
        else:
            for one in inner:
                found.include(one, _times(name, params), devices if name == 'shard_map' else 1)
        if name == 'while' and any(one.flops for one in inner):
            found.unknown.append('trips of a while loop that holds a dot')
        if name == 'conv_general_dilated':
            found.unknown.append('a convolution')
    return found


def bodies(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: of a loop, of branches, of jit, of a rematerialised function, of a kernel."""
    for value in params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(body, 'jaxpr', body)
            if hasattr(body, 'eqns'):
                yield body


def _times(name: str, params: Mapping[str, Any]) -> int:
    """How often an equation runs its program."""
    if name == 'scan':
        return params['length']
    return math.prod(params['grid_mapping'].grid) if name == 'pallas_call' else 1


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _ragged_flops(equation: Any) -> float:
    """Each row of the left side meets one group of the right, whether the rows are summed over (a gradient) or not."""
    numbers = equation.params['ragged_dot_dimension_numbers']
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    left, right = (v.aval.shape for v in equation.invars[:2])
    gone = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2.0 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in gone)
