"""One device's view of a forward pass, and of the backward pass that belongs to it: what the terms of a count share."""

import dataclasses
import functools

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.planner.traffic import Traffic, cost, label, span
from weft.sharding.mesh import AXES, MeshConfig

INT32, BOOL = 4, 1  # bytes


@functools.lru_cache(maxsize=2**14)
def _group(axes: tuple[str, ...], mesh: MeshConfig) -> tuple[str, int, tuple[tuple[str, int, int], ...]]:
    """The label of a group of devices, and how many it has; the same of each of its axes, and of those before it."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    steps = [(axis, sizes[axis], span(axes[: axes.index(axis)], sizes)) for axis in reversed(axes) if sizes[axis] > 1]
    return label(axes, sizes), span(axes, sizes), tuple(steps)


@dataclasses.dataclass(frozen=True)
class View:
    """Rows that one device works on, and the table into which the terms count what it sends for them.

    A collective is counted as often as it is computed: in each forward pass, and in its transposed form backward.
    """

    config: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    found: Traffic
    rows: float  # B of this device
    columns: int  # of each row, all devices of `context` together; in decoding 1, which they all work on
    training: bool = True  # there is a backward pass
    split: bool = True  # between blocks each device of `tensor` holds a slice of the sequence, not all of it
    decoding: bool = False

    @functools.cached_property
    def tokens(self) -> float:
        """Tokens inside a block, where a device has all of its sequence over `tensor`."""
        return self.rows * self.columns / (1 if self.decoding else self.mesh.context)

    @functools.cached_property
    def mine(self) -> float:
        """Tokens between blocks."""
        return self.tokens / self.mesh.tensor if self.split else self.tokens

    @functools.cached_property
    def number(self) -> int:
        """Bytes of a number in the compute dtype, in which weights and activations are sent."""
        return jnp.dtype(self.compute.dtype).itemsize

    @functools.cached_property
    def wide(self) -> int:
        """Bytes of a number in at least float32, of the compute dtype."""
        return max(self.number, 4)

    @functools.cached_property
    def stored(self) -> int:
        """Bytes of a stored parameter and of its gradient."""
        return self.compute.parameter_dtype.itemsize

    @property
    def again(self) -> int:
        """How often a layer's forward pass is computed once more for its backward pass."""
        return int(self.training and self.compute.remat != 'none')

    def unchanged(self, times: int, written: int) -> int:
        """How often `times` layers send what is the same for all of a loop's layers, `written` of them in the program.

        JAX computes it before the loop: for the forward pass that is kept, or for the one that is computed once more.
        """
        if not self.training:
            return times
        return times + written if self.again else written

    def send(self, kind: str, axes: tuple[str, ...], size: float, times: float = 1, arrays: int = 1) -> None:
        """`times` operations on each of so many arrays of `size` bytes together, which is the S of `planner.traffic`."""
        name, devices, steps = _group(axes, self.mesh)
        if not times or not name:
            return
        if kind in ('all_gather', 'reduce_scatter'):  # one axis after the other: see collectives.unshard
            for axis, along, before in steps:
                self.found.add(kind, axis, cost(kind, size / before, along) * times, arrays * times)
        else:
            self.found.add(kind, name, cost(kind, size, devices) * times, arrays * times)

    def gather(self, axes: tuple[str, ...], size: float, times: float = 1, again: int = 0, grad: bool = True) -> None:
        """`times` an all_gather whose result has `size` bytes, `again` once more; backward a reduce_scatter."""
        self.send('all_gather', axes, size, times * (1 + again))
        if self.training and grad:
            self.send('reduce_scatter', axes, size, times)

    def scatter(self, axes: tuple[str, ...], size: float, times: float, again: float) -> None:
        """`times` a reduce_scatter of `size` bytes and `again` more; backward an all_gather."""
        self.send('reduce_scatter', axes, size, times + again)
        if self.training:
            self.send('all_gather', axes, size, times)

    def exchange(self, axes: tuple[str, ...], size: float, times: float, again: int = 0, kind: str = 'all_to_all'):
        """`times` an all_to_all of `size` bytes, `again` once more; backward the opposite one."""
        self.send(kind, axes, size, times * (1 + again + self.training))

    def join(self, width: float, times: float) -> None:
        """`ForwardContext.gather_sequence` of activations so wide, in a layer."""
        if self.split:
            self.gather(('tensor',), self.tokens * width * self.number, times, self.again)

    def sum(self, times: float, ends: float = 0) -> None:
        """`ForwardContext.reduce_scatter_sequence` in a layer; nobody needs again those at the layers' `ends`."""
        size = self.tokens * self.config.model_dim * self.number
        if self.split:
            self.scatter(('tensor',), size, times, self.again * (times - ends))
        else:
            assert not self.training
            self.send('psum', ('tensor',), size, times)
