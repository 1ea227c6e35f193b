"""How long a step takes at least, and how long it is predicted to take, by what its chips can do at most.

A step does three things: it multiplies (FLOPs by the chip's peak), it moves numbers between memory and the units that multiply
(bytes by the memory's bandwidth), and it sends (bytes by the links of the group that exchanges them). Three figures come of
it, all of one device, since all do alike:

    bound        everything overlaps: the largest of all multiplying, all moving, and all sending over one set of axes
    apart        nothing overlaps: their sum
    predicted    parts follow one another, each as long as its multiplying or moving; weights are sent while others are used,
                 keys and values while others are attended to, activations while their device waits; all of it divided by
                 the chip's one efficiency

What moves is counted as if each matmul read its two sides and wrote its result once, and all that stands between matmuls
were fused into them: less than a program moves, so that the bound stays one.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.cost import training_flops
from weft.model.costs import What
from weft.model.parts.attention import SoftmaxConfig
from weft.planner import communication
from weft.planner.chips import Chip, group_rate
from weft.planner.flops import executed
from weft.planner.memory import cache_bytes, optimizer_bytes
from weft.planner.traffic.tables import Traffic
from weft.planner.weights import Group, inventory
from weft.sharding.mesh import AXES, BATCH, MeshConfig
from weft.training.config import RunConfig

WAITS = {'tensor', 'expert', 'stage'}  # axes that activations travel over alone, and a block cannot go on without them
Hides = Literal['nowhere', 'attention', 'anywhere']


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartTime:
    """One part of a step on one device: all layers' together."""

    name: str
    flops: float
    bytes: float  # to and from memory
    compute_seconds: float  # at the chip's peak
    memory_seconds: float  # at its bandwidth

    @property
    def seconds(self) -> float:
        """The longer of the two, which overlap within a part."""
        return max(self.compute_seconds, self.memory_seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveTime:
    """What one device sends over one set of axes by one kind of collective in a step."""

    axes: str
    kind: str
    calls: float
    bytes: float
    seconds: float
    rate: float  # bytes/s
    latency: float  # seconds that its calls take however little they send
    hides: Hides  # behind what the device does meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step's seconds on one device."""

    parts: tuple[PartTime, ...]
    collectives: tuple[CollectiveTime, ...]
    efficiency: float

    @property
    def compute(self) -> float:
        """Seconds of multiplying."""
        return sum(part.compute_seconds for part in self.parts)

    @property
    def memory(self) -> float:
        """Seconds of moving."""
        return sum(part.memory_seconds for part in self.parts)

    @property
    def links(self) -> float:
        """Seconds of sending, one collective after another."""
        return sum(send.seconds for send in self.collectives)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds that each of what can limit a step takes alone."""
        found = collections.defaultdict[str, float](float, compute=self.compute, memory=self.memory)
        for send in self.collectives:
            found[f'links over {send.axes}'] += send.seconds
        return found

    @property
    def limit(self) -> str:
        """What the bound is made of."""
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def bound(self) -> float:
        """Seconds if everything overlaps."""
        return max(self.limits.values())

    @property
    def apart(self) -> float:
        """Seconds if nothing does."""
        return self.compute + self.memory + self.links

    @property
    def ideal(self) -> float:
        """Seconds if parts follow one another, weights hide behind them, and activations do not."""
        return max(self.work, self.sending('anywhere')) + self.waits

    @property
    def work(self) -> float:
        """Seconds of all parts, one after another."""
        return sum(part.seconds for part in self.parts)

    @property
    def waits(self) -> float:
        """Seconds that a device waits for what it cannot go on without."""
        attention = sum(part.seconds for part in self.parts if part.name in ('attention', 'cross_attention', 'model'))
        return self.sending('nowhere') + max(0.0, self.sending('attention') - attention)

    def sending(self, hides: Hides) -> float:
        """Seconds of the sends that hide so, one after another; with what each takes at least, where a device waits."""
        found = [send for send in self.collectives if send.hides == hides]
        return sum(send.seconds + (send.latency if hides != 'anywhere' else 0.0) for send in found)

    @property
    def predicted(self) -> float:
        """Seconds, by the chip's efficiency."""
        return self.ideal / self.efficiency


def train_time(run: RunConfig, chip: Chip) -> StepTime:
    """Of one step of a run, its batch whole, on as many chips as its mesh has devices."""
    return step_time(run.compute, run.mesh, chip, _train_flops(run), train_bytes(run), run_traffic(run))


def decode_time(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, chip: Chip, rows: int, length: int
) -> StepTime:
    """Of one more token in each of `rows` sequences (all devices together), whose cache is for `length` tokens."""
    device_rows = rows / mesh.span(BATCH)
    moved = collections.defaultdict[str, float](float)
    for group in inventory(c).groups:
        if group.where not in ('mtp', 'encoder'):
            _add(moved, layer_bytes(group, compute, mesh, device_rows, 1, 1, rows), group.layers)
    moved['attention'] = cache_bytes(c, compute, mesh, rows, length, chip.platform)
    number = jnp.dtype(compute.dtype).itemsize
    moved['head'] = (c.model_dim + device_rows) * c.padded_vocabulary / mesh.tensor * number
    flops = step_flops(c, compute, 'decode', mesh, rows, length)
    return step_time(compute, mesh, chip, flops, moved, communication.decoding(c, compute, mesh, rows))


def prefill_time(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, chip: Chip, rows: int, length: int
) -> StepTime:
    """Of reading a prompt of `length` tokens in each of `rows` sequences, all devices together."""
    tokens = rows / mesh.span(BATCH) * length / mesh.context
    moved = collections.defaultdict[str, float](float)
    for group in inventory(c).groups:
        if group.where != 'mtp':
            _add(moved, layer_bytes(group, compute, mesh, tokens, 1, 1), group.layers)
    flops = step_flops(c, compute, 'prefill', mesh, rows, length)
    return step_time(compute, mesh, chip, flops, moved, communication.prefill(c, compute, mesh, rows, length))


def least_time(run: RunConfig, chip: Chip) -> float:
    """Seconds that `train_time` predicts at least, found much sooner: of the multiplying alone."""
    return sum(_train_flops(run).values()) / run.mesh.size / chip.flops(run.compute.dtype) / chip.efficiency


def _train_flops(run: RunConfig) -> dict[str, float]:
    t = run.training
    parts = {'accumulation': t.accumulation, 'microbatches': run.microbatches}
    return step_flops(run.model, run.compute, 'train', run.mesh, t.batch, t.sequence_length, **parts)


def step_flops(
    c: ModelConfig, compute: ComputeConfig, what: What, mesh: MeshConfig, rows: int, length: int, **parts: int
) -> dict[str, float]:
    """By part of one step, all devices together; `parts` are `accumulation` and `microbatches`."""
    # Devices multiply as much on a mesh on which all axes that split rows are `data`.
    mesh = MeshConfig(stage=mesh.stage, data=mesh.span(BATCH), context=mesh.context, tensor=mesh.tensor)
    source = length if c.encoder else 0
    how: dict[str, Any] = {'mesh': mesh, 'attention': 'flash', **parts}
    return _executed(c, compute, what, rows=rows, length=length, source=source, **how)


_executed = functools.lru_cache(maxsize=2**12)(executed)


def step_time(
    compute: ComputeConfig,
    mesh: MeshConfig,
    chip: Chip,
    flops: Mapping[str, float],
    moved: Mapping[str, float],
    sent: Traffic,
) -> StepTime:
    """FLOPs of all devices together, bytes of one."""
    if 'model' in flops:  # traced, not by part: the bytes of all parts move meanwhile
        layers = sum(size for name, size in moved.items() if name != 'optimizer')
        moved = {'model': layers} | {name: size for name, size in moved.items() if name == 'optimizer'}
    parts = []
    for name in dict.fromkeys((*flops, *moved)):
        mine, size = flops.get(name, 0.0) / mesh.size, moved.get(name, 0.0)
        seconds = {'compute_seconds': mine / chip.flops(compute.dtype), 'memory_seconds': size / chip.bandwidth}
        parts.append(PartTime(name=name, flops=mine, bytes=size, **seconds))
    return StepTime(parts=tuple(parts), collectives=collective_times(sent, mesh, chip), efficiency=chip.efficiency)


def collective_times(sent: Traffic, mesh: MeshConfig, chip: Chip) -> tuple[CollectiveTime, ...]:
    """Each row of a table with its seconds, the longest first."""
    times = []
    for (kind, axes), (calls, size) in sent.sent.items():
        label, _, groups = axes.partition(' (groups of ')
        names = label.split('+')
        joined = int(groups[:-1]) if groups else mesh.span(names)
        # Neighbours of a group stand as far apart among the mesh's devices as the axes after its last one are long.
        stride = mesh.span(AXES[max(AXES.index(axis) for axis in names) + 1 :])
        rate = group_rate(chip, mesh.size, joined, stride, kind)
        hides: Hides = 'nowhere' if set(names) <= WAITS or 'replica' in names else 'anywhere'
        times.append(
            CollectiveTime(
                axes=axes,
                kind=kind,
                calls=calls,
                bytes=size,
                seconds=size / rate,
                rate=rate,
                latency=calls * chip.latency,
                hides='attention' if (kind, axes) == ('ppermute', 'context') else hides,
            )
        )
    return tuple(sorted(times, key=lambda one: -one.seconds))


def run_traffic(run: RunConfig) -> Traffic:
    """What one device sends in a step."""
    t = run.training
    step = (t.batch, t.sequence_length, t.accumulation, run.microbatches)
    return communication.training(run.model, run.compute, run.mesh, *step)


def train_bytes(run: RunConfig) -> dict[str, float]:
    """Bytes that one device moves in a step, by part."""
    c, compute, mesh, t = run.model, run.compute, run.mesh, run.training
    held = inventory(c)
    tokens = t.batch / mesh.span(BATCH) * t.sequence_length / mesh.context
    passes = (2 if compute.remat == 'block' else 1) + 2  # forward, again, and both gradients
    moved = collections.defaultdict[str, float](float)
    for group in held.groups:
        # A pipeline's bubble is worked on like the rest; what no stage owns is shared out by rows.
        microbatches, share = 1, 1 / mesh.stage
        if group.where == 'pipeline':
            microbatches, share = run.microbatches, (run.microbatches + mesh.stage - 1) / run.microbatches
        size = layer_bytes(group, compute, mesh, tokens * share, passes, t.accumulation * microbatches)
        _add(moved, size, group.held(mesh))
    number = jnp.dtype(compute.dtype).itemsize
    width = c.padded_vocabulary / mesh.tensor
    logits = 3 * (c.model_dim + width) * tokens / mesh.stage * number  # forward, and both gradients
    moved['head'] += logits + 3 * c.model_dim * width * number
    numbers = sum(count for _, count in held.held(mesh))
    # Weight, state and gradient are read, all but the last written.
    moved['optimizer'] = 3 * numbers * compute.parameter_dtype.itemsize + 2 * optimizer_bytes(run)
    return moved


def _add(total: dict[str, float], part: Mapping[str, float], times: float) -> None:
    for name, size in part.items():
        total[name] += times * size


def layer_bytes(
    group: Group,
    compute: ComputeConfig,
    mesh: MeshConfig,
    tokens: float,
    passes: int,
    times: int,
    rows: int | None = None,
) -> dict[str, float]:
    """Bytes that one layer moves in a step: each matrix and, for each token, both sides of its matmul, in each pass.

    With `rows`, tokens of all devices together, only the experts that one of them is expected to visit if choices are even.
    """
    c, number = group.config, jnp.dtype(compute.dtype).itemsize
    whole = {'encoder': 'encoder', 'mtp': 'mtp'}.get(group.where)  # told as one part
    found = collections.defaultdict[str, float](float)
    for weight in group.weights:
        known = weight.declared
        if len(known.shape) < 2 or ('tensor' not in weight.split and not known.gathered):
            continue
        routed = known.part == 'experts'
        read = float(weight.used(mesh))
        if rows is not None and routed:
            assert c.moe is not None, 'a mixture has experts'
            read *= 1 - (1 - c.moe.top_k / c.moe.experts) ** rows
        height, width = known.shape[-2:]
        sides = height + (width / mesh.tensor if 'tensor' in weight.split else width)
        visits = tokens * (c.moe.top_k if c.moe and routed else 1)
        name = {'attention': 'projections', 'shared_experts': 'experts'}.get(known.part, known.part)
        found[whole or name] += (visits * sides * passes + times * passes * read) * number
    if not whole and isinstance(a := c.attention, SoftmaxConfig):
        numbers = tokens * (a.heads + a.kv_heads) * (a.query_dim + a.value_dim) / mesh.tensor
        found['attention'] = numbers * passes * number
    return found


def mfu(run: RunConfig, chip: Chip, seconds: float) -> float:
    """Model FLOPs (causal, nothing computed twice) by what the chips could have done in a step's seconds."""
    t = run.training
    needed = training_flops(run.model, t.sequence_length) * t.batch * t.sequence_length
    return needed / (seconds * chip.flops(run.compute.dtype) * run.mesh.size)
