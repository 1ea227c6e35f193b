"""The counter of what one device sends in a forward pass, and in the backward pass that belongs to it."""

import dataclasses
import functools

from weft.model.costs import CostCounter
from weft.planner.traffic.tables import Traffic, cost, label, span
from weft.sharding.mesh import MeshConfig


@functools.lru_cache(maxsize=2**14)
def _group(axes: tuple[str, ...], mesh: MeshConfig) -> tuple[str, int, tuple[tuple[str, int, int], ...]]:
    """The label of a group of devices, and how many it has; the same of each of its axes, and of those before it."""
    sizes = dataclasses.asdict(mesh)
    steps = [(axis, sizes[axis], span(axes[: axes.index(axis)], sizes)) for axis in reversed(axes) if sizes[axis] > 1]
    return label(axes, sizes), span(axes, sizes), tuple(steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrafficCounter(CostCounter):
    """Adds up what one device sends; the S of a collective is that of `planner.traffic`."""

    found: Traffic = dataclasses.field(default_factory=Traffic)

    @functools.cached_property
    def stored(self) -> int:
        """Bytes of a stored parameter and of its gradient."""
        return self.compute.parameter_dtype.itemsize

    def add(self, kind: str, axes: tuple[str, ...], size: float, calls: float, arrays: int = 1) -> None:
        """`calls` operations on each of so many arrays of `size` bytes together."""
        name, devices, steps = _group(axes, self.mesh)
        if not calls or not name:
            return
        if kind in ('all_gather', 'reduce_scatter'):  # one axis after the other: see collectives.unshard
            for axis, along, before in steps:
                self.found.add(kind, axis, cost(kind, size / before, along) * calls, arrays * calls)
        else:
            self.found.add(kind, name, cost(kind, size, devices) * calls, arrays * calls)

    def send(self, kind: str, axes: tuple[str, ...], size: float, calls: float = 1) -> None:
        self.add(kind, axes, size, calls * self.times)

    def send_alike(self, kind: str, axes: tuple[str, ...], size: float, calls: float = 1) -> None:
        # JAX computes it before the loop: for the forward pass that is kept, or for the one that is computed once more.
        times = self.times * (self.again or not self.training) + self.written * self.training
        self.add(kind, axes, size, calls * times)

    def all_gather(self, axes: tuple[str, ...], size: float, grad: bool = True) -> None:
        self.send('all_gather', axes, size, 1 + self.again)
        if self.training and grad:
            self.send('reduce_scatter', axes, size)

    def reduce_scatter(self, axes: tuple[str, ...], size: float, last: bool = False) -> None:
        self.add('reduce_scatter', axes, size, self.times + self.again * (self.times - self.ends * last))
        if self.training:
            self.send('all_gather', axes, size)

    def gather_sequence(self, width: float) -> None:
        if self.split:
            self.all_gather(('tensor',), self.tokens * width * self.number)

    def reduce_scatter_sequence(self, width: float, last: bool = False) -> None:
        if self.split:
            self.reduce_scatter(('tensor',), self.tokens * width * self.number, last)
        else:
            assert not self.training
            self.send('psum', ('tensor',), self.tokens * width * self.number)

    def outside(self, times: float = 1) -> 'TrafficCounter':
        """The counter of what is in no layer, and never computed again."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, remat='none'), times=times, ends=0)
