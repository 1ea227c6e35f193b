"""What layers send: the weights that are gathered, and what each layer says of its activations."""

import dataclasses

from weft.model.block import Block
from weft.model.config import LayerSpec
from weft.model.parameters import Parameter
from weft.planner.communication.counter import TrafficCounter
from weft.planner.weights import Group
from weft.sharding.mesh import AXES


def layers(count: TrafficCounter, group: Group, ticks: int = 1) -> None:
    """All layers of a group that this device holds, each on `ticks` passes of the counter's rows."""
    weights(count, group, ticks)
    times, ends = group.held(count.mesh) * ticks, group.ends // group.stages(count.mesh) * ticks
    here = dataclasses.replace(count, times=times, ends=ends, written=group.written * ticks)
    Block.costs(group.config, LayerSpec(group.experts), here)


def weights(count: TrafficCounter, group: Group, ticks: int) -> None:
    """Each matrix is gathered in each forward pass of its layer; its gradient is scattered back in each backward pass.

    What a pipeline's backward pass needs of them is the same on every tick: JAX computes it once, before the ticks.
    """
    n, held = count.mesh.tensor, group.held(count.mesh)
    gathers = held * (ticks + 1 if count.again else 1)

    def gather(axes: tuple[str, ...], size: float, arrays: int = 1) -> None:
        count.add('all_gather', axes, size, gathers, arrays)
        count.add('reduce_scatter', axes, size, held * ticks * count.training, arrays)

    kept = lambda weight: not count.training and weight.declared.of_source  # not the weight, but what it makes
    for weight, arrays in group.gathered_alike:
        if not kept(weight):
            number = sent(count, weight.declared)
            gather(weight.declared.gathered, weight.used(count.mesh) * number, arrays)
    # More devices than heads: each uses one head of keys and one of values, which it takes from all of them.
    for weight in group.weights:
        if weight.declared.repeats and n > weight.declared.repeats and not kept(weight):
            gather(('tensor',), weight.size * sent(count, weight.declared))


def sent(count: TrafficCounter, declared: Parameter) -> int:
    """Bytes of a number of a weight as it is gathered."""
    return declared.in_use(count.compute.dtype, count.compute.parameter_dtype).itemsize


def copies(count: TrafficCounter, group: Group) -> None:
    """A step sums the gradients of weights over the axes along which they are copies."""
    for weight, arrays in group.kept_alike:
        split = {*weight.split, *(['stage'] if group.where == 'pipeline' else [])}
        number = weight.declared.stored(count.compute.parameter_dtype).itemsize
        axes = tuple(axis for axis in AXES if axis not in split)
        count.add('psum', axes, group.held(count.mesh) * weight.shard(count.mesh) * number, 1, arrays)
